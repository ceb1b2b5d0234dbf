#include "hashgrid.cuh"

#include <type_traits>

#include "fixed_sums.cuh"

namespace dsd::cuda {
namespace {

// Levels that a block of the backward kernel goes through: see field_kernels.cuh.
constexpr int kLevels = 4;

// The point of this thread; the last one for threads behind it, so that warps stay whole.
__device__ __forceinline__ int64_t point_of_thread(const HashGridParams& params, bool& valid) {
    const int64_t point = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    valid = point < params.n_points;
    return valid ? point : params.n_points - 1;
}

// Calls function(std::true_type) if all points of the warp lie in the unit cube, else false_type.
template <class Function>
__device__ __forceinline__ void for_cube(const float (&x)[3], Function function) {
    if (__all_sync(~0u, is_inside(x))) {
        function(std::true_type());
    } else {
        function(std::false_type());
    }
}

// F numbers, moved at once.
template <int F>
struct alignas(4 * F) Numbers {
    float value[F];
};

// Levels of the forward kernel's block: as many as fill a sector of 32 bytes with their features.
template <int F>
constexpr int kFwdLevels = 8 / F;

// A thread owns one point on a few levels (blockIdx.y, so that the blocks in flight share these
// levels' part of the table in L2). On each it reads 8 entries, of type T, and writes F values and,
// with kJacobian, 3 F derivatives; zeros where the level is not active.
template <class T, int F, bool kJacobian>
__global__ void __launch_bounds__(kBlock, 2)
    hashgrid_fwd_kernel(const __grid_constant__ HashGridParams params) {
    bool valid;
    const int64_t point = point_of_thread(params, valid);
    const float x[3] = {params.x[3 * point], params.x[3 * point + 1], params.x[3 * point + 2]};
    const int first = blockIdx.y * kFwdLevels<F>;
    const T* table = reinterpret_cast<const T*>(params.table);
    Numbers<F> y[kFwdLevels<F>] = {};
    float jac[kFwdLevels<F>][F][3] = {};
    for_cube(x, [&](auto inside) {
    // Without a branch, so that the loads of all levels can be in flight: a level that is not
    // active reads the last one that is, for nothing.
#pragma unroll
        for (int i = 0; i < kFwdLevels<F>; ++i) {
            const int l = first + i;
            if (params.n_active == 0) continue;
            const GridLevel& level = params.levels[l < params.n_active ? l : params.n_active - 1];
            const GridCell cell = grid_locate<decltype(inside)::value>(level, x[0], x[1], x[2]);
            float v[F][8];
            Corners<T, F>(table + level.offset * F, cell).values(cell, v);
#pragma unroll
            for (int f = 0; f < F; ++f) {
                const float value =
                    kJacobian ? grid_value_jacobian(v[f], cell.fx, cell.fy, cell.fz, level.scale,
                                                    jac[i][f][0], jac[i][f][1], jac[i][f][2])
                              : grid_value(v[f], cell.fx, cell.fy, cell.fz);
                y[i].value[f] = l < params.n_active ? value : 0.0f;
#pragma unroll
                for (int d = 0; d < 3; ++d) {
                    jac[i][f][d] = l < params.n_active ? jac[i][f][d] : 0.0f;
                }
            }
        }
    });
    if (!valid) return;
#pragma unroll
    for (int i = 0; i < kFwdLevels<F>; ++i) {
        if (first + i >= params.n_levels) break;
        const int64_t at = (point * params.n_levels + first + i) * F;
        *reinterpret_cast<Numbers<F>*>(params.y + at) = y[i];
        if (kJacobian) {
            // 3 F floats from 3 at: aligned to 8 bytes for even F.
            auto* out = reinterpret_cast<float2*>(params.jac + 3 * at);
            const float* flat = &jac[i][0][0];
#pragma unroll
            for (int k = 0; k < 3 * F / 2; ++k) out[k] = make_float2(flat[2 * k], flat[2 * k + 1]);
        }
    }
}

// Values alone, from a half table, which the second-level cache holds as a whole. A thread reads
// one point's 8 entries of every level, a few levels' loads in flight, into its row in shared
// memory, and the block writes the rows: threads that write their own keep the first-level cache as
// busy with that as with a quarter of the reads.
constexpr int kValueBlock = 128;
constexpr int kColumns = 32;

template <class T, int F>
__global__ void __launch_bounds__(kValueBlock, 4)
    hashgrid_value_kernel(const __grid_constant__ HashGridParams params) {
    __shared__ float rows[kValueBlock][kColumns + 1];
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kValueBlock;
    const int t = threadIdx.x;
    const int64_t n = min(params.n_points - begin, static_cast<int64_t>(kValueBlock));
    const int64_t point = begin + (t < n ? t : n - 1);
    const float x[3] = {params.x[3 * point], params.x[3 * point + 1], params.x[3 * point + 2]};
    const T* table = reinterpret_cast<const T*>(params.table);
    const int width = params.n_levels * F;
    for (int column = 0; column < width; column += kColumns) {
        const int first = column / F, end = min(first + kColumns / F, params.n_levels);
        const int last = max(first, min(end, params.n_active));
        for_cube(x, [&](auto inside) {
#pragma unroll(decltype(inside)::value ? 4 : 1)
            for (int l = first; l < last; ++l) {
                const GridLevel& level = params.levels[l];
                const GridCell cell = grid_locate<decltype(inside)::value>(level, x[0], x[1], x[2]);
                float v[F][8];
                Corners<T, F>(table + level.offset * F, cell).values(cell, v);
#pragma unroll
                for (int f = 0; f < F; ++f) {
                    rows[t][(l - first) * F + f] = grid_value(v[f], cell.fx, cell.fy, cell.fz);
                }
            }
        });
        for (int k = (last - first) * F; k < (end - first) * F; ++k) rows[t][k] = 0.0f;
        __syncthreads();
        const int k = t % kColumns;
        for (int r = t / kColumns; column + k < width && r < n; r += kValueBlock / kColumns) {
            // Streamed: nobody reads it before the table's next entries need the cache.
            __stcs(params.y + (begin + r) * width + column + k, rows[r][k]);
        }
        __syncthreads();
    }
}

// The gradients of one level's outputs at a point: of F values, and with kJacobian of 3 F
// derivatives, these times the level's scale. Zeros for a thread without a point.
template <int F, bool kJacobian>
struct LevelGradient {
    Numbers<F> y = {};
    float jac[F][3] = {};

    __device__ __forceinline__ LevelGradient(const HashGridParams& params, int64_t point, int l,
                                             bool valid) {
        const int64_t at = (point * params.n_levels + l) * F;
        if (!valid) return;
        if (params.grad_y) y = *reinterpret_cast<const Numbers<F>*>(params.grad_y + at);
        if constexpr (kJacobian) {
#pragma unroll
            for (int i = 0; i < 3 * F; ++i) {
                jac[i / 3][i % 3] = params.levels[l].scale * params.grad_jac[3 * at + i];
            }
        }
    }
};

// A thread owns one point on a few active levels (blockIdx.y). It reads the gradients of their
// outputs, and adds one combined gradient to each of 8 entries a level: to grad_table, or with
// kFixed to the sums.
template <int F, bool kJacobian, bool kFixed>
__global__ void __launch_bounds__(kBlock)
    hashgrid_bwd_table_kernel(const __grid_constant__ HashGridParams params) {
    bool valid;
    const int64_t point = point_of_thread(params, valid);
    const float x[3] = {params.x[3 * point], params.x[3 * point + 1], params.x[3 * point + 2]};
    const int first = blockIdx.y * kLevels, last = min(first + kLevels, params.n_active);
    for_cube(x, [&](auto inside) {
        for (int l = first; l < last; ++l) {
            const GridLevel& level = params.levels[l];
            const GridCell cell = grid_locate<decltype(inside)::value>(level, x[0], x[1], x[2]);
            const LevelGradient<F, kJacobian> to(params, point, l, valid);
            float g[F][8];
#pragma unroll
            for (int f = 0; f < F; ++f) {
                if (kJacobian) {
                    grid_corner_gradients(cell.fx, cell.fy, cell.fz, to.y.value[f], to.jac[f][0],
                                          to.jac[f][1], to.jac[f][2], g[f]);
                } else {
                    grid_corner_weights(cell.fx, cell.fy, cell.fz, to.y.value[f], g[f]);
                }
            }
            const bool has = combine_runs<F>(cell, g, valid);
            if constexpr (kFixed) {
                const FixedSums fixed(params.sums);
                const Scale units = to_units(fixed, l, params.n_points);
                add_fixed<F>(fixed.sums + level.offset * F, cell, g, units, has);
            } else if (has) {
                float* grad = params.grad_table + level.offset * F;
#pragma unroll
                for (int c = 0; c < 8; c += 2) add_pair<F>(grad, cell, g, c);
            }
        }
    });
}

// With the threads of the kernel above: raises the levels' bounds to what the points will add.
template <int F, bool kJacobian>
__global__ void __launch_bounds__(kBlock)
    hashgrid_bound_kernel(const __grid_constant__ HashGridParams params) {
    bool valid;
    const int64_t point = point_of_thread(params, valid);
    const float x[3] = {params.x[3 * point], params.x[3 * point + 1], params.x[3 * point + 2]};
    const int first = blockIdx.y * kLevels, last = min(first + kLevels, params.n_active);
    for (int l = first; l < last; ++l) {
        const GridCell cell = grid_locate<false>(params.levels[l], x[0], x[1], x[2]);
        const LevelGradient<F, kJacobian> to(params, point, l, valid);
        float bound = 0.0f;
#pragma unroll
        for (int f = 0; f < F; ++f) {
            bound = larger(
                bound, corner_bound(cell, to.y.value[f], to.jac[f][0], to.jac[f][1], to.jac[f][2]));
        }
        raise_bound(FixedSums(params.sums).bounds + l, bound);
    }
}

__global__ void __launch_bounds__(kBlock)
    hashgrid_sums_kernel(const __grid_constant__ HashGridParams params) {
    add_sums(params, FixedSums(params.sums), params.n_points);
}

// A thread owns one point. It goes through the active levels, reads 8 entries and the gradients of
// the outputs on each, and writes the point's gradient.
template <int F>
__global__ void __launch_bounds__(kBlock)
    hashgrid_bwd_input_kernel(const __grid_constant__ HashGridParams params) {
    bool valid;
    const int64_t point = point_of_thread(params, valid);
    const float x[3] = {params.x[3 * point], params.x[3 * point + 1], params.x[3 * point + 2]};
    float sum[3] = {};
    for_cube(x, [&](auto inside) {
        for (int l = 0; l < params.n_active; ++l) {
            const GridLevel& level = params.levels[l];
            const int64_t at = (point * params.n_levels + l) * F;
            const GridCell cell = grid_locate<decltype(inside)::value>(level, x[0], x[1], x[2]);
            float v[F][8];
            Corners<float, F>(params.table + level.offset * F, cell).values(cell, v);
#pragma unroll
            for (int f = 0; f < F; ++f) {
                const float gy = params.grad_y ? params.grad_y[at + f] : 0.0f;
                float gj[3] = {};
                if (params.grad_jac) {
#pragma unroll
                    for (int d = 0; d < 3; ++d) gj[d] = params.grad_jac[3 * (at + f) + d];
                }
                grid_input_gradient(v[f], cell.fx, cell.fy, cell.fz, level.scale, gy, gj[0], gj[1],
                                    gj[2], sum);
            }
        }
    });
    if (!valid) return;
#pragma unroll
    for (int d = 0; d < 3; ++d) params.grad_x[3 * point + d] = sum[d];
}

}  // namespace

void hashgrid_fwd(const HashGridParams& params, void* stream) {
    using Kernel = void (*)(HashGridParams);
    const auto on_stream = static_cast<cudaStream_t>(stream);
    if (params.half_table && params.jac == nullptr) {
        const Kernel kernel = params.n_features == 2 ? hashgrid_value_kernel<__half, 2>
                                                     : hashgrid_value_kernel<__half, 4>;
        kernel<<<blocks_for(params.n_points, kValueBlock), kValueBlock, 0, on_stream>>>(params);
        check(cudaGetLastError(), "hashgrid_fwd");
        return;
    }
    const int levels = params.n_features == 2 ? kFwdLevels<2> : kFwdLevels<4>;
    const dim3 grid(blocks_for(params.n_points), (params.n_levels + levels - 1) / levels);
    constexpr Kernel kKernels[] = {
        hashgrid_fwd_kernel<float, 2, false>, hashgrid_fwd_kernel<float, 2, true>,
        hashgrid_fwd_kernel<float, 4, false>, hashgrid_fwd_kernel<float, 4, true>,
        hashgrid_fwd_kernel<__half, 2, true>, hashgrid_fwd_kernel<__half, 4, true>};
    const int features = params.n_features == 4;
    const Kernel kernel = params.half_table ? kKernels[4 + features]
                                            : kKernels[2 * features + (params.jac != nullptr)];
    kernel<<<grid, kBlock, 0, on_stream>>>(params);
    check(cudaGetLastError(), "hashgrid_fwd");
}

namespace {

template <int F, bool kJacobian>
void launch_bwd_table(const HashGridParams& params, cudaStream_t stream) {
    const dim3 grid(blocks_for(params.n_points), (params.n_active + kLevels - 1) / kLevels);
    if (params.sums == nullptr) {
        hashgrid_bwd_table_kernel<F, kJacobian, false><<<grid, kBlock, 0, stream>>>(params);
        check(cudaGetLastError(), "hashgrid_bwd_table");
        return;
    }
    FixedSums(params.sums).clear(active_numbers(params), stream);
    hashgrid_bound_kernel<F, kJacobian><<<grid, kBlock, 0, stream>>>(params);
    check(cudaGetLastError(), "hashgrid_bwd_table: bounds");
    hashgrid_bwd_table_kernel<F, kJacobian, true><<<grid, kBlock, 0, stream>>>(params);
    check(cudaGetLastError(), "hashgrid_bwd_table: sums");
    hashgrid_sums_kernel<<<blocks_for_sums(params), kBlock, 0, stream>>>(params);
    check(cudaGetLastError(), "hashgrid_bwd_table: gradient");
}

}  // namespace

void hashgrid_bwd_table(const HashGridParams& params, void* stream) {
    if (params.n_active == 0) return;
    const auto launch =
        params.n_features == 2
            ? (params.grad_jac ? launch_bwd_table<2, true> : launch_bwd_table<2, false>)
            : (params.grad_jac ? launch_bwd_table<4, true> : launch_bwd_table<4, false>);
    launch(params, static_cast<cudaStream_t>(stream));
}

int64_t hashgrid_sums(int64_t n_params) { return FixedSums::bytes(n_params); }

void hashgrid_bwd_input(const HashGridParams& params, void* stream) {
    const auto kernel =
        params.n_features == 2 ? hashgrid_bwd_input_kernel<2> : hashgrid_bwd_input_kernel<4>;
    kernel<<<blocks_for(params.n_points), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "hashgrid_bwd_input");
}

}  // namespace dsd::cuda
