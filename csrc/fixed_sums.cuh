// Sums over a hash grid's table that do not depend on the order in which they are added up: integer
// atomics, in units of a power of two that is chosen for each level.
//
// With n points, and B the most that one of them adds to a level, |sum| <= n B: the unit is the
// smallest for which such a sum stays below 2^62, but not below 2^-149, the smallest float. For
// 2^18 points that is 2^-44 B, where a float that holds B has 2^-24 B. A level where something is
// not finite gets NaN everywhere.
#pragma once

#include "hashgrid.h"
#include "warp.cuh"

namespace dsd::cuda {

struct FixedSums {
    // Bits of B for each level: those of floats that are not negative order like the floats, and
    // NaN comes last.
    unsigned int* bounds;      // [kGridMaxLevels]
    unsigned long long* sums;  // [entries, F]

    static constexpr size_t kBoundsBytes = kGridMaxLevels * sizeof(unsigned int);

    __host__ __device__ explicit FixedSums(void* memory)
        : bounds(static_cast<unsigned int*>(memory)),
          sums(reinterpret_cast<unsigned long long*>(static_cast<char*>(memory) + kBoundsBytes)) {}

    static constexpr size_t bytes(int64_t n_numbers) {
        return kBoundsBytes + n_numbers * sizeof(unsigned long long);
    }

    void clear(int64_t n_numbers, cudaStream_t stream) const {
        check(cudaMemsetAsync(bounds, 0, bytes(n_numbers), stream), "fixed_sums: clear");
    }
};

namespace {

// Raises a level's bound to the largest of the warp. For the whole warp.
__device__ __forceinline__ void raise_bound(unsigned int* bound, float value) {
    unsigned int bits = __float_as_uint(fabsf(value));
    for (int step = kWarp / 2; step > 0; step /= 2) {
        bits = max(bits, __shfl_xor_sync(kAllLanes, bits, step));
    }
    // Most find it as high already: one address takes one atomic at a time.
    if (lane_of_thread() == 0 && bits > *static_cast<volatile unsigned int*>(bound)) {
        atomicMax(bound, bits);
    }
}

// What a point adds to its 8 corners together is at most this, for gy = dL/dy and gj = scale dL/dJ
// of grid_corner_gradients. NaN where the cell's fractions are, which make any gradient NaN.
__device__ __forceinline__ float corner_bound(const GridCell& cell, float gy, float gjx, float gjy,
                                              float gjz) {
    return fabsf(gy) + 2.0f * (fabsf(gjx) + fabsf(gjy) + fabsf(gjz)) +
           0.0f * (cell.fx + cell.fy + cell.fz);
}

// k of the unit 2^-k.
__device__ __forceinline__ int fixed_exponent(unsigned int bound, int64_t n_points) {
    if (bound == 0u) return 0;
    const int above = ilogbf(__uint_as_float(bound)) + 1;  // B < 2^above
    const int log2_points = 64 - __clzll(n_points);        // n < 2^log2_points
    return min(62 - above - log2_points, 149);
}

__device__ __forceinline__ bool is_finite_bound(unsigned int bound) { return bound < 0x7f800000u; }

// 2^k for -126 <= k <= 127.
__device__ __forceinline__ float power_of_two(int k) { return __int_as_float((k + 127) << 23); }

// x 2^k as two factors, for -252 <= k <= 252: one float does not reach all units.
struct Scale {
    float first, second;

    __device__ __forceinline__ explicit Scale(int k) {
        const int half = max(-126, min(k, 126));
        first = power_of_two(half);
        second = power_of_two(k - half);
    }
};

// Floats to units, for one level's sums of so many points.
__device__ __forceinline__ Scale to_units(const FixedSums& fixed, int level, int64_t n_points) {
    const unsigned int bound = fixed.bounds[level];
    return Scale(is_finite_bound(bound) ? fixed_exponent(bound, n_points) : 0);
}

// Adds the 8 corners of a cell where `has`. The scaling is exact, the rounding to units is not. Two
// lanes take the two halves of a pair of numbers, first of the one's and then of the other's: what
// goes to one place in memory at once costs half as much. For the whole warp.
template <int F>
__device__ __forceinline__ void add_fixed(unsigned long long* sums, const GridCell& cell,
                                          const float (&g)[F][8], const Scale& units, bool has) {
    const int odd = threadIdx.x & 1;
    const bool other_has = __shfl_xor_sync(kAllLanes, static_cast<int>(has), 1) != 0;
    const bool of_even = odd ? other_has : has, of_odd = odd ? has : other_has;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, cell.entry[c], 1);
        unsigned long long* even_at =
            sums + static_cast<int64_t>(odd ? other : cell.entry[c]) * F + odd;
        unsigned long long* odd_at =
            sums + static_cast<int64_t>(odd ? cell.entry[c] : other) * F + odd;
#pragma unroll
        for (int f = 0; f < F; f += 2) {
            const long long low = __float2ll_rn(g[f][c] * units.first * units.second);
            const long long high = __float2ll_rn(g[f + 1][c] * units.first * units.second);
            const long long given = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
            if (of_even) {
                atomicAdd(even_at + f, static_cast<unsigned long long>(odd ? given : low));
            }
            if (of_odd) {
                atomicAdd(odd_at + f, static_cast<unsigned long long>(odd ? high : given));
            }
        }
    }
}

// Adds one level's sums of n_points (blockIdx.y) to its gradient, the blocks of a row together.
template <class Params>
__device__ __forceinline__ void add_sums(const Params& params, const FixedSums& fixed,
                                         int64_t n_points) {
    const GridLevel& level = params.levels[blockIdx.y];
    const unsigned int bound = fixed.bounds[blockIdx.y];
    if (bound == 0u) return;
    const bool finite = is_finite_bound(bound);
    const Scale unit(finite ? -fixed_exponent(bound, n_points) : 0);
    const int64_t begin = level.offset * params.n_features;
    const int64_t end = begin + static_cast<int64_t>(level.size) * params.n_features;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
    for (int64_t i = begin + static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < end;
         i += stride) {
        const auto sum = static_cast<long long>(fixed.sums[i]);
        // The small factor last: what rounds to a float under the normal ones rounds once.
        const float value = finite ? __ll2float_rn(sum) * unit.second * unit.first : NAN;
        if (value != 0.0f) params.grad_table[i] += value;
    }
}

// Numbers of the table's active levels.
template <class Params>
int64_t active_numbers(const Params& params) {
    const GridLevel& last = params.levels[params.n_active - 1];
    return (last.offset + last.size) * params.n_features;
}

// Blocks of a kernel that calls add_sums.
template <class Params>
dim3 blocks_for_sums(const Params& params) {
    constexpr int kTurns = 8;
    int64_t largest = 1;
    for (int l = 0; l < params.n_active; ++l) {
        const int64_t n = static_cast<int64_t>(params.levels[l].size) * params.n_features;
        largest = n > largest ? n : largest;
    }
    return dim3(blocks_for(largest, kTurns * kBlock), params.n_active);
}

}  // namespace
}  // namespace dsd::cuda
