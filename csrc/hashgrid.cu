#include "hashgrid.h"

namespace dsd::cuda {
namespace {

// One table entry, moved with one load or store.
template <int F>
struct EntryOf;
template <>
struct EntryOf<2> {
    using type = float2;
};
template <>
struct EntryOf<4> {
    using type = float4;
};
template <int F>
using Entry = typename EntryOf<F>::type;

__device__ __forceinline__ float2 make_entry(const float (&v)[2]) {
    return make_float2(v[0], v[1]);
}
__device__ __forceinline__ float4 make_entry(const float (&v)[4]) {
    return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void split_entry(float2 entry, int c, float (&v)[2][8]) {
    v[0][c] = entry.x, v[1][c] = entry.y;
}
__device__ __forceinline__ void split_entry(float4 entry, int c, float (&v)[4][8]) {
    v[0][c] = entry.x, v[1][c] = entry.y, v[2][c] = entry.z, v[3][c] = entry.w;
}

struct Cell {
    float fx, fy, fz;
    uint32_t entry[8];
};

__device__ __forceinline__ Cell locate(const GridLevel& level, const float* __restrict__ x,
                                       int64_t point) {
    Cell cell;
    uint32_t cx, cy, cz;
    grid_cell(x[3 * point], level.scale, cx, cell.fx);
    grid_cell(x[3 * point + 1], level.scale, cy, cell.fy);
    grid_cell(x[3 * point + 2], level.scale, cz, cell.fz);
#pragma unroll
    for (uint32_t c = 0; c < 8; ++c) {
        const uint32_t px = cx + (c & 1), py = cy + (c >> 1 & 1), pz = cz + (c >> 2 & 1);
        cell.entry[c] =
            level.hashed
                ? grid_entry_hashed(level.size, px, py, pz)
                : grid_entry_wrap(level.size, grid_entry_dense(level.resolution, px, py, pz));
    }
    return cell;
}

template <int F>
__device__ __forceinline__ void gather(const float* __restrict__ table, const GridLevel& level,
                                       const Cell& cell, float (&v)[F][8]) {
    const auto* entries = reinterpret_cast<const Entry<F>*>(table) + level.offset;
#pragma unroll
    for (int c = 0; c < 8; ++c) split_entry(__ldg(entries + cell.entry[c]), c, v);
}

// grad[0..F) += g[0..F). GPUs of compute capability 9 and up add pairs with one instruction.
template <int F>
__device__ __forceinline__ void add(float* grad, const float (&g)[F]) {
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
#pragma unroll
    for (int f = 0; f < F; f += 2) {
        atomicAdd(reinterpret_cast<float2*>(grad + f), make_float2(g[f], g[f + 1]));
    }
#else
#pragma unroll
    for (int f = 0; f < F; ++f) atomicAdd(grad + f, g[f]);
#endif
}

// A thread owns one point on one level (blockIdx.y, so that the blocks in flight share a level's
// part of the table in L2). It reads 8 entries and writes F values and, with kJacobian, 3 F
// derivatives; zeros where the level is not active.
template <int F, bool kJacobian>
__global__ void __launch_bounds__(kBlock) hashgrid_fwd_kernel(
    const __grid_constant__ HashGridParams params) {
    const int64_t point = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (point >= params.n_points) return;
    const int l = static_cast<int>(blockIdx.y);
    const int64_t at = (point * params.n_levels + l) * F;
    float y[F] = {};
    float jac[F][3] = {};
    if (l < params.n_active) {
        const GridLevel& level = params.levels[l];
        const Cell cell = locate(level, params.x, point);
        float v[F][8];
        gather<F>(params.table, level, cell, v);
#pragma unroll
        for (int f = 0; f < F; ++f) {
            if (kJacobian) {
                y[f] = grid_value_jacobian(v[f], cell.fx, cell.fy, cell.fz, level.scale,
                                           jac[f][0], jac[f][1], jac[f][2]);
            } else {
                y[f] = grid_value(v[f], cell.fx, cell.fy, cell.fz);
            }
        }
    }
    *reinterpret_cast<Entry<F>*>(params.y + at) = make_entry(y);
    if (kJacobian) {
        // 3 F floats from 3 at: aligned to 8 bytes for even F.
        auto* out = reinterpret_cast<float2*>(params.jac + 3 * at);
        const float* flat = &jac[0][0];
#pragma unroll
        for (int k = 0; k < 3 * F / 2; ++k) out[k] = make_float2(flat[2 * k], flat[2 * k + 1]);
    }
}

// A thread owns one point on one active level (blockIdx.y). It reads the gradients of its F values
// and, with kJacobian, of its 3 F derivatives, and adds one combined gradient to each of 8 entries.
template <int F, bool kJacobian>
__global__ void __launch_bounds__(kBlock) hashgrid_bwd_table_kernel(
    const __grid_constant__ HashGridParams params) {
    const int64_t point = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (point >= params.n_points) return;
    const int l = static_cast<int>(blockIdx.y);
    const GridLevel& level = params.levels[l];
    const int64_t at = (point * params.n_levels + l) * F;
    const Cell cell = locate(level, params.x, point);
    float g[F][8];
#pragma unroll
    for (int f = 0; f < F; ++f) {
        const float gy = params.grad_y ? params.grad_y[at + f] : 0.0f;
        if (kJacobian) {
            const float* gj = params.grad_jac + 3 * (at + f);
            grid_corner_gradients(cell.fx, cell.fy, cell.fz, gy, level.scale * gj[0],
                                  level.scale * gj[1], level.scale * gj[2], g[f]);
        } else {
            grid_corner_weights(cell.fx, cell.fy, cell.fz, gy, g[f]);
        }
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        float corner[F];
#pragma unroll
        for (int f = 0; f < F; ++f) corner[f] = g[f][c];
        add<F>(params.grad_table + (level.offset + cell.entry[c]) * F, corner);
    }
}

// A thread owns one point. It goes through the active levels, reads 8 entries and the gradients of
// the outputs on each, and writes the point's gradient.
template <int F>
__global__ void __launch_bounds__(kBlock) hashgrid_bwd_input_kernel(
    const __grid_constant__ HashGridParams params) {
    const int64_t point = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (point >= params.n_points) return;
    float sum[3] = {};
    for (int l = 0; l < params.n_active; ++l) {
        const GridLevel& level = params.levels[l];
        const int64_t at = (point * params.n_levels + l) * F;
        const Cell cell = locate(level, params.x, point);
        float v[F][8];
        gather<F>(params.table, level, cell, v);
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
#pragma unroll
    for (int d = 0; d < 3; ++d) params.grad_x[3 * point + d] = sum[d];
}

}  // namespace

void hashgrid_fwd(const HashGridParams& params, void* stream) {
    const dim3 grid(blocks_for(params.n_points), params.n_levels);
    const auto kernel = params.n_features == 2
                            ? (params.jac ? hashgrid_fwd_kernel<2, true>
                                          : hashgrid_fwd_kernel<2, false>)
                            : (params.jac ? hashgrid_fwd_kernel<4, true>
                                          : hashgrid_fwd_kernel<4, false>);
    kernel<<<grid, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "hashgrid_fwd");
}

void hashgrid_bwd_table(const HashGridParams& params, void* stream) {
    if (params.n_active == 0) return;
    const dim3 grid(blocks_for(params.n_points), params.n_active);
    const auto kernel = params.n_features == 2
                            ? (params.grad_jac ? hashgrid_bwd_table_kernel<2, true>
                                               : hashgrid_bwd_table_kernel<2, false>)
                            : (params.grad_jac ? hashgrid_bwd_table_kernel<4, true>
                                               : hashgrid_bwd_table_kernel<4, false>);
    kernel<<<grid, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "hashgrid_bwd_table");
}

void hashgrid_bwd_input(const HashGridParams& params, void* stream) {
    const auto kernel = params.n_features == 2 ? hashgrid_bwd_input_kernel<2>
                                               : hashgrid_bwd_input_kernel<4>;
    kernel<<<blocks_for(params.n_points), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "hashgrid_bwd_input");
}

}  // namespace dsd::cuda
