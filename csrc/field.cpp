#include "field.h"

#include <cstring>

#include "hashgrid_block.h"
#include "parallel.h"

namespace dsd::DSD_ISA {
namespace {

// Samples go through everything a block at a time, in arrays [column][sample] that stay in the L1
// and L2 caches.
constexpr int64_t kChunk = 8 * kBlock;
// Weight gradients are summed in this many parts, whatever the number of threads, so that results
// do not depend on it.
constexpr int64_t kParts = 32;

#if defined(__AVX__)
typedef float Vec __attribute__((vector_size(32), may_alias));
#elif defined(__GNUC__)
typedef float Vec __attribute__((vector_size(16), may_alias));
#else
typedef float Vec;
#endif
constexpr int kLanes = sizeof(Vec) / sizeof(float);
static_assert(kBlock % (2 * kLanes) == 0 && kFieldWidth % (2 * kLanes) == 0, "products are tiled");

int padded(int n, int to) { return (n + to - 1) / to * to; }

// out[r][c] = sum over t of a[r * kRowStep + t * kTermStep] x[t][c], or added to what is there. x
// and out have rows of kStride; rows is a multiple of 4 and columns of two vectors: a tile's sums
// are as many as cover the latency of an addition, and stay in registers.
template <int kRowStep, int kTermStep, int kStride, bool kAdd>
void product(const float* a, const float* x, int rows, int terms, int columns, float* out) {
    for (int r = 0; r < rows; r += 4) {
        for (int c = 0; c < columns; c += 2 * kLanes) {
            Vec s00{}, s01{}, s10{}, s11{}, s20{}, s21{}, s30{}, s31{};
            const float* factor = a + r * kRowStep;
            const float* row = x + c;
            for (int t = 0; t < terms; ++t, factor += kTermStep, row += kStride) {
                const Vec x0 = *reinterpret_cast<const Vec*>(row);
                const Vec x1 = *reinterpret_cast<const Vec*>(row + kLanes);
                s00 += factor[0] * x0;
                s01 += factor[0] * x1;
                s10 += factor[kRowStep] * x0;
                s11 += factor[kRowStep] * x1;
                s20 += factor[2 * kRowStep] * x0;
                s21 += factor[2 * kRowStep] * x1;
                s30 += factor[3 * kRowStep] * x0;
                s31 += factor[3 * kRowStep] * x1;
            }
            const Vec sums[4][2] = {{s00, s01}, {s10, s11}, {s20, s21}, {s30, s31}};
            for (int i = 0; i < 4; ++i) {
                Vec* to = reinterpret_cast<Vec*>(out + (r + i) * kStride + c);
                to[0] = kAdd ? to[0] + sums[i][0] : sums[i][0];
                to[1] = kAdd ? to[1] + sums[i][1] : sums[i][1];
            }
        }
    }
}

// The heads' weights in the orders that the products read: density head, feature head.
struct Weights {
    float first[2][kFieldWidth][kFieldHidden];
    float back[2][kFieldHidden][kFieldWidth];  // the density head's times the second layer's
};

void arrange_weights(const FieldParams& params, Weights& weights) {
    const int width = params.n_levels * params.n_features;
    memset(&weights, 0, sizeof weights);
    for (int head = 0; head < 2; ++head) {
        const float* first = head == 0 ? params.w1d : params.w1f;
        for (int j = 0; j < kFieldHidden; ++j) {
            const float factor = head == 0 ? params.w2d[j] : 1.0f;
            for (int k = 0; k < width; ++k) {
                weights.first[head][k][j] = first[j * width + k];
                weights.back[head][j][k] = factor * first[j * width + k];
            }
        }
    }
}

// The encoding of a block of samples. Columns of levels that are not active are left out of
// everything.
struct alignas(64) Encoded {
    float e[kFieldWidth][kBlock];
    float jac[3][kFieldWidth][kBlock];
    Points point, unit;
    int n;
    int columns;  // that are active
};

// What follows from it, up to what the outputs and the backward pass need.
struct alignas(64) Block {
    float hidden[2][kFieldHidden][kBlock];  // before the ReLU, or the density head's mask
    float g[kFieldWidth][kBlock];
    float raw[kBlock];
    float gradient[3][kBlock];  // of the raw density, world units
};

template <int F, bool kNormals>
void encode_level(const FieldParams& params, int l, Encoded& in) {
    const GridLevel& level = params.levels[l];
    Cells cell;
    float v[8][F][kBlock];
    locate(level, in.unit, in.n, cell);
    gather<F>(static_cast<const float*>(params.table) + level.offset * F, cell, in.n, v);
    for (int f = 0; f < F; ++f) {
        const int k = l * F + f;
        float* e = in.e[k];
        float *jx = in.jac[0][k], *jy = in.jac[1][k], *jz = in.jac[2][k];
        for (int i = 0; i < in.n; ++i) {
            const float corner[8] = {v[0][f][i], v[1][f][i], v[2][f][i], v[3][f][i],
                                     v[4][f][i], v[5][f][i], v[6][f][i], v[7][f][i]};
            if (kNormals) {
                e[i] = grid_value_jacobian(corner, cell.fx[i], cell.fy[i], cell.fz[i], level.scale,
                                           jx[i], jy[i], jz[i]);
            } else {
                e[i] = grid_value(corner, cell.fx[i], cell.fy[i], cell.fz[i]);
            }
        }
        // Samples that fill the block up have no part in anything.
        for (int i = in.n; i < kBlock; ++i) {
            e[i] = 0.0f;
            if (kNormals) jx[i] = jy[i] = jz[i] = 0.0f;
        }
    }
}

int block_size(int64_t first, int64_t end) {
    return end - first < kBlock ? static_cast<int>(end - first) : kBlock;
}

// Samples [begin, end), a chunk at most. Level by level, because a level's table has few enough
// pages for the translation buffer and all levels together do not.
template <int F>
void encode(const FieldParams& params, int64_t begin, int64_t end, bool normals, Encoded* chunk) {
    const int n_blocks = static_cast<int>((end - begin + kBlock - 1) / kBlock);
    for (int b = 0; b < n_blocks; ++b) {
        Encoded& in = chunk[b];
        const int64_t first = begin + b * kBlock;
        in.n = block_size(first, end);
        in.columns = params.n_active * F;
        in.point = {};
        load_points(params.points + 3 * first, in.n, in.point);
        for (int i = 0; i < kBlock; ++i) {
            in.unit.x[i] = field_unit(in.point.x[i], params.inverse_diameter);
            in.unit.y[i] = field_unit(in.point.y[i], params.inverse_diameter);
            in.unit.z[i] = field_unit(in.point.z[i], params.inverse_diameter);
        }
    }
    for (int l = 0; l < params.n_active; ++l) {
        for (int b = 0; b < n_blocks; ++b) {
            if (normals) {
                encode_level<F, true>(params, l, chunk[b]);
            } else {
                encode_level<F, false>(params, l, chunk[b]);
            }
        }
    }
}

void evaluate(const FieldParams& params, const Weights& weights, const Encoded& in, bool density,
              bool features, Block& block) {
    const int samples = padded(in.n, 2 * kLanes);
    for (int head = density ? 0 : 1; head < (features ? 2 : 1); ++head) {
        product<1, kFieldHidden, kBlock, false>(weights.first[head][0], in.e[0], kFieldHidden,
                                                in.columns, samples, block.hidden[head][0]);
    }
    if (!density) return;
    float slope[3];
    for (int i = 0; i < kBlock; ++i) {
        block.raw[i] = field_bias(params, in.point.x[i], in.point.y[i], in.point.z[i], slope);
        for (int d = 0; d < 3; ++d) block.gradient[d][i] = slope[d];
    }
    for (int j = 0; j < kFieldHidden; ++j) {
        const float weight = params.w2d[j];
        const float* h = block.hidden[0][j];
        // Written so that a NaN stays one.
        for (int i = 0; i < samples; ++i) block.raw[i] += weight * (h[i] < 0.0f ? 0.0f : h[i]);
    }
}

// The density head's mask in place of its hidden layer, and the gradient of the raw density.
void differentiate(const FieldParams& params, const Weights& weights, const Encoded& in,
                   bool normals, Block& block) {
    const int samples = padded(in.n, 2 * kLanes);
    for (int j = 0; j < kFieldHidden; ++j) {
        float* h = block.hidden[0][j];
        for (int i = 0; i < samples; ++i) h[i] = h[i] > 0.0f ? 1.0f : 0.0f;
    }
    product<1, kFieldWidth, kBlock, false>(weights.back[0][0], block.hidden[0][0],
                                           padded(in.columns, 4), kFieldHidden, samples,
                                           block.g[0]);
    if (!normals) return;
    for (int d = 0; d < 3; ++d) {
        float sum[kBlock] = {};
        for (int k = 0; k < in.columns; ++k) {
            for (int i = 0; i < samples; ++i) sum[i] += block.g[k][i] * in.jac[d][k][i];
        }
        for (int i = 0; i < samples; ++i) {
            block.gradient[d][i] += sum[i] * params.inverse_diameter;
        }
    }
}

void fwd_block(const FieldParams& params, const Weights& weights, int64_t first,
               const Encoded& in) {
    const bool normals = params.normal != nullptr, features = params.features != nullptr;
    Block block;
    evaluate(params, weights, in, true, features, block);
    if (normals) differentiate(params, weights, in, true, block);
    for (int i = 0; i < in.n; ++i) {
        float slope, curvature;
        params.density[first + i] =
            field_activate(params.activation, block.raw[i], slope, curvature);
        if (!normals) continue;
        const float gradient[3] = {block.gradient[0][i], block.gradient[1][i],
                                   block.gradient[2][i]};
        field_normal(gradient, slope, params.normal + 3 * (first + i));
    }
    if (!features) return;
    float sums[3][kBlock] = {};
    for (int j = 0; j < kFieldHidden; ++j) {
        const float* h = block.hidden[1][j];
        const float red = params.w2f[j], green = params.w2f[kFieldHidden + j],
                    blue = params.w2f[2 * kFieldHidden + j];
        for (int i = 0; i < in.n; ++i) {
            const float active = h[i] < 0.0f ? 0.0f : h[i];
            sums[0][i] += red * active;
            sums[1][i] += green * active;
            sums[2][i] += blue * active;
        }
    }
    for (int i = 0; i < in.n; ++i) {
        for (int c = 0; c < 3; ++c) params.features[3 * (first + i) + c] = sums[c][i];
    }
}

// Sums of the weight gradients.
struct alignas(64) WeightSums {
    float s[kFieldHidden][kFieldWidth];    // m u^T
    float w1f[kFieldHidden][kFieldWidth];  // q e^T
    float w2f[3][kFieldHidden][kLanes];    // one sum a lane
};

// What the table's gradient needs of one block.
struct alignas(64) TableGradient {
    Points unit;
    float v[3][kBlock];
    float to_e[kFieldWidth][kBlock];
    float g[kFieldWidth][kBlock];
};

// [column][sample] to [sample][column]; columns that do not exist are filled with zeros.
void transpose(const float (*x)[kBlock], int columns, float (*out)[kFieldWidth]) {
    for (int k = 0; k < columns; ++k) {
        for (int i = 0; i < kBlock; ++i) out[i][k] = x[k][i];
    }
    for (int i = 0; i < kBlock; ++i) {
        for (int k = columns; k < padded(columns, 2 * kLanes); ++k) out[i][k] = 0.0f;
    }
}

void bwd_density(const FieldParams& params, const Weights& weights, int64_t first,
                 const Encoded& in, Block& block, WeightSums& sums, TableGradient& out) {
    const bool normals = params.grad_normal != nullptr;
    differentiate(params, weights, in, normals, block);
    float r[kBlock] = {};
    memset(out.v, 0, sizeof out.v);
    for (int i = 0; i < in.n; ++i) {
        const float gradient[3] = {block.gradient[0][i], block.gradient[1][i],
                                   block.gradient[2][i]};
        float grad_normal[3] = {}, v[3];
        for (int d = 0; normals && d < 3; ++d) {
            grad_normal[d] = params.grad_normal[3 * (first + i) + d];
        }
        r[i] = field_head_gradient(params, block.raw[i], gradient,
                                   params.grad_density ? params.grad_density[first + i] : 0.0f,
                                   grad_normal, v);
        for (int d = 0; normals && d < 3; ++d) out.v[d][i] = v[d];
    }
    alignas(64) float u[kFieldWidth][kBlock], rows[kBlock][kFieldWidth];
    for (int k = 0; k < in.columns; ++k) {
        for (int i = 0; i < kBlock; ++i) {
            u[k][i] = r[i] * in.e[k][i];
            out.g[k][i] = block.g[k][i];
            out.to_e[k][i] = r[i] * block.g[k][i];
        }
        if (!normals) continue;
        for (int i = 0; i < kBlock; ++i) {
            u[k][i] += in.jac[0][k][i] * out.v[0][i] + in.jac[1][k][i] * out.v[1][i] +
                       in.jac[2][k][i] * out.v[2][i];
        }
    }
    transpose(u, in.columns, rows);
    product<kBlock, 1, kFieldWidth, true>(block.hidden[0][0], rows[0], kFieldHidden, in.n,
                                          padded(in.columns, 2 * kLanes), sums.s[0]);
}

// Adds to out.to_e.
void bwd_features(const FieldParams& params, const Weights& weights, int64_t first,
                  const Encoded& in, Block& block, WeightSums& sums, TableGradient& out) {
    alignas(64) float grad[3][kBlock] = {}, rows[kBlock][kFieldWidth];
    for (int i = 0; i < in.n; ++i) {
        for (int c = 0; c < 3; ++c) grad[c][i] = params.grad_features[3 * (first + i) + c];
    }
    const int samples = padded(in.n, 2 * kLanes);
    // The hidden layer turns into q.
    for (int j = 0; j < kFieldHidden; ++j) {
        float* h = block.hidden[1][j];
        const float red = params.w2f[j], green = params.w2f[kFieldHidden + j],
                    blue = params.w2f[2 * kFieldHidden + j];
        for (int c = 0; c < 3; ++c) {
            float* sum = sums.w2f[c][j];
            for (int i = 0; i < samples; i += kLanes) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    const float active = h[i + lane] > 0.0f ? h[i + lane] : 0.0f;
                    sum[lane] += grad[c][i + lane] * active;
                }
            }
        }
        for (int i = 0; i < samples; ++i) {
            const float q = red * grad[0][i] + green * grad[1][i] + blue * grad[2][i];
            h[i] = h[i] > 0.0f ? q : 0.0f;
        }
    }
    transpose(in.e, in.columns, rows);
    product<kBlock, 1, kFieldWidth, true>(block.hidden[1][0], rows[0], kFieldHidden, in.n,
                                          padded(in.columns, 2 * kLanes), sums.w1f[0]);
    product<1, kFieldWidth, kBlock, true>(weights.back[1][0], block.hidden[1][0],
                                          padded(in.columns, 4), kFieldHidden, samples,
                                          out.to_e[0]);
}

void bwd_block(const FieldParams& params, const Weights& weights, int64_t first, const Encoded& in,
               WeightSums& sums, TableGradient& out) {
    const bool normals = params.grad_normal != nullptr, features = params.grad_features != nullptr;
    const bool density = normals || params.grad_density != nullptr;
    Block block;
    evaluate(params, weights, in, density, features, block);
    out.unit = in.unit;
    if (density) {
        bwd_density(params, weights, first, in, block, sums, out);
    } else {
        memset(&out.v, 0, sizeof out - sizeof out.unit);
    }
    if (features) bwd_features(params, weights, first, in, block, sums, out);
}

// Adds n samples to one level of the table's gradient.
template <int F>
void scatter(const FieldParams& params, int l, const TableGradient& samples, int n) {
    const GridLevel& level = params.levels[l];
    Cells cells;
    float g[8][F][kBlock];
    locate(level, samples.unit, n, cells);
    float* grad_table = params.grad_table + level.offset * F;
    prefetch_write<F>(grad_table, cells, n);
    for (int f = 0; f < F; ++f) {
        const float *to_e = samples.to_e[l * F + f], *to_j = samples.g[l * F + f];
        if (params.grad_normal == nullptr) {
            for (int i = 0; i < n; ++i) {
                float corner[8];
                grid_corner_weights(cells.fx[i], cells.fy[i], cells.fz[i], to_e[i], corner);
                for (int c = 0; c < 8; ++c) g[c][f][i] = corner[c];
            }
            continue;
        }
        for (int i = 0; i < n; ++i) {
            const float scaled = to_j[i] * level.scale;
            float corner[8];
            grid_corner_gradients(cells.fx[i], cells.fy[i], cells.fz[i], to_e[i],
                                  scaled * samples.v[0][i], scaled * samples.v[1][i],
                                  scaled * samples.v[2][i], corner);
            for (int c = 0; c < 8; ++c) g[c][f][i] = corner[c];
        }
    }
    add_corners<F>(grad_table, cells, g, n);
}

// Memory for n objects, given back at the end of the scope.
template <class T>
struct Array {
    explicit Array(int64_t n) : data(new T[static_cast<size_t>(n)]) {}
    ~Array() { delete[] data; }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    T* data;
};

void add_weight_gradients(const FieldParams& params, const WeightSums& sums) {
    const int width = params.n_levels * params.n_features;
    for (int j = 0; j < kFieldHidden; ++j) {
        for (int k = 0; k < params.n_active * params.n_features; ++k) {
            params.grad_w1d[j * width + k] += params.w2d[j] * sums.s[j][k];
            params.grad_w2d[j] += params.w1d[j * width + k] * sums.s[j][k];
            params.grad_w1f[j * width + k] += sums.w1f[j][k];
        }
        for (int c = 0; c < 3; ++c) {
            float sum = 0.0f;
            for (int lane = 0; lane < kLanes; ++lane) sum += sums.w2f[c][j][lane];
            params.grad_w2f[c * kFieldHidden + j] += sum;
        }
    }
}

template <int F>
void bwd(const FieldParams& params, int n_threads) {
    // A round at a time, so that memory stays bounded: samples side by side, then levels.
    constexpr int64_t kRound = kParts * kChunk;
    const int64_t n_valid = field_count(params), most = n_valid < kRound ? n_valid : kRound;
    Weights weights;
    arrange_weights(params, weights);
    const Array<WeightSums> parts(kParts);
    const Array<TableGradient> blocks((most + kBlock - 1) / kBlock);
    memset(parts.data, 0, kParts * sizeof(WeightSums));
    for (int64_t start = 0; start < n_valid; start += kRound) {
        const int64_t n = n_valid - start < kRound ? n_valid - start : kRound;
        parallel_chunks(n, kChunk, n_threads, [&](int64_t begin, int64_t end) {
            Encoded chunk[kChunk / kBlock];
            encode<F>(params, start + begin, start + end, params.grad_normal != nullptr, chunk);
            for (int64_t b = begin; b < end; b += kBlock) {
                bwd_block(params, weights, start + b, chunk[(b - begin) / kBlock],
                          parts.data[begin / kChunk], blocks.data[b / kBlock]);
            }
        });
        // A level has one thread, which takes the samples in their order.
        parallel_for(params.n_active, n_threads, [&](int64_t l) {
            for (int64_t b = 0; b < n; b += kBlock) {
                scatter<F>(params, static_cast<int>(l), blocks.data[b / kBlock], block_size(b, n));
            }
        });
    }
    for (int64_t part = 0; part < kParts; ++part) add_weight_gradients(params, parts.data[part]);
}

}  // namespace

void field_fwd(const FieldParams& params, int n_threads) {
    const int64_t n_valid = field_count(params);
    Weights weights;
    arrange_weights(params, weights);
    with_features(params.n_features, [&](auto features) {
        constexpr int F = decltype(features)::value;
        parallel_chunks(params.n_points, kChunk, n_threads, [&](int64_t begin, int64_t end) {
            const int64_t valid = n_valid < begin ? begin : n_valid < end ? n_valid : end;
            Encoded chunk[kChunk / kBlock];
            encode<F>(params, begin, valid, params.normal != nullptr, chunk);
            for (int64_t b = begin; b < valid; b += kBlock) {
                fwd_block(params, weights, b, chunk[(b - begin) / kBlock]);
            }
            for (int64_t i = valid; i < end; ++i) field_clear(params, i);
        });
    });
}

void field_bwd(const FieldParams& params, int n_threads) {
    with_features(params.n_features,
                  [&](auto features) { bwd<decltype(features)::value>(params, n_threads); });
}

}  // namespace dsd::DSD_ISA
