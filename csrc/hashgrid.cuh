// Reading and adding to the table of a hash grid, for CUDA kernels.
#pragma once

#include <cuda_fp16.h>

#include "hashgrid.h"
#include "warp.cuh"

namespace dsd::cuda {
namespace {

// True for a point in the unit cube; false for NaN.
__device__ __forceinline__ bool is_inside(const float (&unit)[3]) {
    bool inside = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) inside = inside && unit[d] >= 0.0f && unit[d] <= 1.0f;
    return inside;
}

// F numbers of type T from 4-byte words.
template <class T, int F>
__device__ __forceinline__ void unpack(const unsigned int* words, float (&v)[F]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int f = 0; f < F; ++f) v[f] = __uint_as_float(words[f]);
    } else {
#pragma unroll
        for (int f = 0; f < F; f += 2) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(words + f / 2));
            v[f] = pair.x, v[f + 1] = pair.y;
        }
    }
}

// An entry of the table as 4-byte words, and as many of them as 16 bytes hold.
template <class T, int F>
struct Entry {
    static constexpr int kWords = F * sizeof(T) / 4;
    static constexpr uint32_t kGroup = 4 / kWords;
    unsigned int words[kWords];

    // `entry` of its group.
    __device__ __forceinline__ Entry(const uint4& group, uint32_t entry) {
        if constexpr (kWords == 4) {
            words[0] = group.x, words[1] = group.y, words[2] = group.z, words[3] = group.w;
        } else if constexpr (kWords == 2) {
            words[0] = entry & 1 ? group.z : group.x;
            words[1] = entry & 1 ? group.w : group.y;
        } else {
            const unsigned int low = entry & 1 ? group.y : group.x;
            const unsigned int high = entry & 1 ? group.w : group.z;
            words[0] = entry & 2 ? high : low;
        }
    }
};

// The 8 entries of a cell. Corners 2 i and 2 i + 1 are neighbours along x: fetching 16 bytes at a
// time, both come at once in most cells (three in four in a half table of pairs, one in two in a
// half table of fours or a float table of pairs).
template <class T, int F>
struct Corners {
    using E = Entry<T, F>;
    uint4 group[4];  // of the even corners
    uint4 other[4];  // of the odd ones, where it is another
    bool apart[4];

    __device__ __forceinline__ Corners(const T* entries, const GridCell& cell) {
        const uint4* groups = reinterpret_cast<const uint4*>(entries);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t a = cell.entry[2 * i] / E::kGroup, b = cell.entry[2 * i + 1] / E::kGroup;
            apart[i] = a != b;
            group[i] = __ldg(groups + a);
            other[i] = make_uint4(0, 0, 0, 0);
            if (apart[i]) other[i] = __ldg(groups + b);
        }
    }

    __device__ __forceinline__ void values(const GridCell& cell, float (&v)[F][8]) const {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const uint32_t entry = cell.entry[c] % E::kGroup;
            E e(group[c / 2], entry);
            if (c % 2) {
                const E far(other[c / 2], entry);
#pragma unroll
                for (int w = 0; w < E::kWords; ++w) {
                    e.words[w] = apart[c / 2] ? far.words[w] : e.words[w];
                }
            }
            float entry_values[F];
            unpack<T, F>(e.words, entry_values);
#pragma unroll
            for (int f = 0; f < F; ++f) v[f][c] = entry_values[f];
        }
    }
};

// Sums of runs pay where a warp has at most this many.
constexpr int kMostRuns = 16;

// Adds to F numbers of the table's gradient. Compute capability 9 adds vectors in one instruction.
template <int F>
__device__ __forceinline__ void add_entry(float* at, const float (&g)[F][8], int c) {
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
    if (F == 4) {
        atomicAdd(reinterpret_cast<float4*>(at),
                  make_float4(g[0][c], g[1][c], g[F - 2][c], g[F - 1][c]));
    } else {
        atomicAdd(reinterpret_cast<float2*>(at), make_float2(g[0][c], g[1][c]));
    }
#else
#pragma unroll
    for (int f = 0; f < F; ++f) atomicAdd(at + f, g[f][c]);
#endif
}

// Adds corners c and c + 1, neighbours along x: in one instruction where their entries are the two
// halves of an aligned pair, as they are for every other cell.
template <int F>
__device__ __forceinline__ void add_pair(float* grad, const GridCell& cell, const float (&g)[F][8],
                                         int c) {
    const uint32_t a = cell.entry[c], b = cell.entry[c + 1];
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
    if (F == 2 && (a ^ b) == 1u) {
        const bool swapped = a & 1u;
        const float4 pair = swapped ? make_float4(g[0][c + 1], g[1][c + 1], g[0][c], g[1][c])
                                    : make_float4(g[0][c], g[1][c], g[0][c + 1], g[1][c + 1]);
        atomicAdd(reinterpret_cast<float4*>(grad + static_cast<int64_t>(a & ~1u) * F), pair);
        return;
    }
#endif
    add_entry<F>(grad + static_cast<int64_t>(a) * F, g, c);
    add_entry<F>(grad + static_cast<int64_t>(b) * F, g, c + 1);
}

// Lanes hold neighbouring samples. Where runs of them lie in one cell, as along a ray on coarse
// levels, the first lane of a run takes the run's sum: atomics to one address would wait for each
// other. Returns whether this lane has something to add. For the whole warp.
template <int F>
__device__ __forceinline__ bool combine_runs(const GridCell& cell, float (&g)[F][8], bool any) {
    const int lane = threadIdx.x % kWarp;
    const bool same = __shfl_up_sync(~0u, cell.x, 1) == cell.x &
                      __shfl_up_sync(~0u, cell.y, 1) == cell.y &
                      __shfl_up_sync(~0u, cell.z, 1) == cell.z;
    const unsigned int firsts = __ballot_sync(~0u, lane == 0 || !same);
    if (__popc(firsts) > kMostRuns) return any;
    const unsigned int after = lane + 1 < kWarp ? firsts >> (lane + 1) : 0u;
    const int following = after ? __ffs(after) - 1 : kWarp - 1 - lane;  // lanes of the run behind
    int longest = following;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        longest = max(longest, __shfl_xor_sync(~0u, longest, step));
    }
    for (int step = 1; step <= longest; step *= 2) {
#pragma unroll
        for (int f = 0; f < F; ++f) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const float other = __shfl_down_sync(~0u, g[f][c], step);
                if (step <= following) g[f][c] += other;
            }
        }
    }
    const unsigned int live = __ballot_sync(~0u, any) >> lane & ((2u << following) - 1u);
    return (firsts >> lane & 1u) && live != 0u;
}

}  // namespace
}  // namespace dsd::cuda
