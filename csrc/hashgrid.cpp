#include "hashgrid_block.h"
#include "parallel.h"

namespace dsd::DSD_ISA {
namespace {

// Points a task takes: its outputs of all levels stay in the L2 cache between levels.
constexpr int64_t kChunk = 1024;

template <int F, bool kJacobian>
void fwd_block(const HashGridParams& params, const GridLevel& level, int64_t begin, int n,
               const Points& points, int64_t column) {
    Cells cells;
    float v[8][F][kBlock];
    locate(level, points, n, cells);
    gather<F>(params.table + level.offset * F, cells, n, v);
    const int64_t width = static_cast<int64_t>(params.n_levels) * F;
    float* y = params.y + begin * width + column;
    float* jac = kJacobian ? params.jac + (begin * width + column) * 3 : nullptr;
    for (int f = 0; f < F; ++f) {
        float value[kBlock], jx[kBlock], jy[kBlock], jz[kBlock];
        for (int i = 0; i < n; ++i) {
            const float corner[8] = {v[0][f][i], v[1][f][i], v[2][f][i], v[3][f][i],
                                     v[4][f][i], v[5][f][i], v[6][f][i], v[7][f][i]};
            if (kJacobian) {
                value[i] = grid_value_jacobian(corner, cells.fx[i], cells.fy[i], cells.fz[i],
                                               level.scale, jx[i], jy[i], jz[i]);
            } else {
                value[i] = grid_value(corner, cells.fx[i], cells.fy[i], cells.fz[i]);
            }
        }
        for (int i = 0; i < n; ++i) y[i * width + f] = value[i];
        if (kJacobian) {
            for (int i = 0; i < n; ++i) {
                float* row = jac + (i * width + f) * 3;
                row[0] = jx[i];
                row[1] = jy[i];
                row[2] = jz[i];
            }
        }
    }
}

template <int F, bool kJacobian>
void fwd_chunk(const HashGridParams& params, int64_t begin, int64_t end) {
    const int64_t width = static_cast<int64_t>(params.n_levels) * F;
    const int64_t active = static_cast<int64_t>(params.n_active) * F;
    for (int l = 0; l < params.n_active; ++l) {
        for (int64_t b = begin; b < end; b += kBlock) {
            const int n = static_cast<int>(end - b < kBlock ? end - b : kBlock);
            Points points;
            load_points(params.x + 3 * b, n, points);
            fwd_block<F, kJacobian>(params, params.levels[l], b, n, points, l * F);
        }
    }
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t k = active; k < width; ++k) params.y[i * width + k] = 0.0f;
        if (kJacobian) {
            for (int64_t k = 3 * active; k < 3 * width; ++k) params.jac[3 * i * width + k] = 0.0f;
        }
    }
}

// One feature's column of a gradient, zero where the gradient is absent.
void load_column(const float* grad, int64_t stride, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = grad ? grad[i * stride] : 0.0f;
}

template <int F>
void bwd_table_block(const HashGridParams& params, int l, int64_t begin, int n) {
    const GridLevel& level = params.levels[l];
    const int64_t width = static_cast<int64_t>(params.n_levels) * F;
    Points points;
    Cells cells;
    float g[8][F][kBlock];
    load_points(params.x + 3 * begin, n, points);
    locate(level, points, n, cells);
    float* grad_table = params.grad_table + level.offset * F;
    prefetch_write<F>(grad_table, cells, n);
    for (int f = 0; f < F; ++f) {
        const int64_t at = begin * width + l * F + f;
        float gy[kBlock];
        load_column(params.grad_y ? params.grad_y + at : nullptr, width, n, gy);
        if (!params.grad_jac) {
            for (int i = 0; i < n; ++i) {
                float corner[8];
                grid_corner_weights(cells.fx[i], cells.fy[i], cells.fz[i], gy[i], corner);
                for (int c = 0; c < 8; ++c) g[c][f][i] = corner[c];
            }
            continue;
        }
        float gj[3][kBlock];
        for (int d = 0; d < 3; ++d) {
            load_column(params.grad_jac + 3 * at + d, 3 * width, n, gj[d]);
        }
        for (int i = 0; i < n; ++i) {
            float corner[8];
            grid_corner_gradients(cells.fx[i], cells.fy[i], cells.fz[i], gy[i],
                                  level.scale * gj[0][i], level.scale * gj[1][i],
                                  level.scale * gj[2][i], corner);
            for (int c = 0; c < 8; ++c) g[c][f][i] = corner[c];
        }
    }
    add_corners<F>(grad_table, cells, g, n);
}

// All points for the levels first, first + stride, ... Each level sees the points in their order;
// a chunk's gradients are read from memory once and serve all levels out of the cache.
template <int F>
void bwd_table_levels(const HashGridParams& params, int first, int stride) {
    for (int64_t chunk = 0; chunk < params.n_points; chunk += kChunk) {
        const int64_t end = chunk + kChunk < params.n_points ? chunk + kChunk : params.n_points;
        for (int l = first; l < params.n_active; l += stride) {
            for (int64_t b = chunk; b < end; b += kBlock) {
                const int n = static_cast<int>(end - b < kBlock ? end - b : kBlock);
                bwd_table_block<F>(params, l, b, n);
            }
        }
    }
}

template <int F>
void bwd_input_chunk(const HashGridParams& params, int64_t begin, int64_t end) {
    const int64_t width = static_cast<int64_t>(params.n_levels) * F;
    for (int64_t b = begin; b < end; b += kBlock) {
        const int n = static_cast<int>(end - b < kBlock ? end - b : kBlock);
        Points points;
        Cells cells;
        float v[8][F][kBlock];
        float sum[3][kBlock] = {};
        load_points(params.x + 3 * b, n, points);
        for (int l = 0; l < params.n_active; ++l) {
            const GridLevel& level = params.levels[l];
            locate(level, points, n, cells);
            gather<F>(params.table + level.offset * F, cells, n, v);
            for (int f = 0; f < F; ++f) {
                const int64_t at = b * width + l * F + f;
                float gy[kBlock], gj[3][kBlock];
                load_column(params.grad_y ? params.grad_y + at : nullptr, width, n, gy);
                for (int d = 0; d < 3; ++d) {
                    load_column(params.grad_jac ? params.grad_jac + 3 * at + d : nullptr, 3 * width,
                                n, gj[d]);
                }
                for (int i = 0; i < n; ++i) {
                    const float corner[8] = {v[0][f][i], v[1][f][i], v[2][f][i], v[3][f][i],
                                             v[4][f][i], v[5][f][i], v[6][f][i], v[7][f][i]};
                    float out[3] = {sum[0][i], sum[1][i], sum[2][i]};
                    grid_input_gradient(corner, cells.fx[i], cells.fy[i], cells.fz[i], level.scale,
                                        gy[i], gj[0][i], gj[1][i], gj[2][i], out);
                    for (int d = 0; d < 3; ++d) sum[d][i] = out[d];
                }
            }
        }
        for (int i = 0; i < n; ++i) {
            for (int d = 0; d < 3; ++d) params.grad_x[3 * (b + i) + d] = sum[d][i];
        }
    }
}

}  // namespace

void hashgrid_fwd(const HashGridParams& params, int n_threads) {
    with_features(params.n_features, [&](auto features) {
        constexpr int F = decltype(features)::value;
        parallel_chunks(params.n_points, kChunk, n_threads, [&](int64_t begin, int64_t end) {
            if (params.jac) {
                fwd_chunk<F, true>(params, begin, end);
            } else {
                fwd_chunk<F, false>(params, begin, end);
            }
        });
    });
}

void hashgrid_bwd_table(const HashGridParams& params, int n_threads) {
    with_features(params.n_features, [&](auto features) {
        constexpr int F = decltype(features)::value;
        const int n_tasks = params.n_active < n_threads ? params.n_active : n_threads;
        parallel_for(n_tasks, n_threads, [&](int64_t task) {
            bwd_table_levels<F>(params, static_cast<int>(task), n_tasks);
        });
    });
}

void hashgrid_bwd_input(const HashGridParams& params, int n_threads) {
    with_features(params.n_features, [&](auto features) {
        constexpr int F = decltype(features)::value;
        parallel_chunks(params.n_points, kChunk, n_threads, [&](int64_t begin, int64_t end) {
            bwd_input_chunk<F>(params, begin, end);
        });
    });
}

}  // namespace dsd::DSD_ISA
