// What the lanes of a warp and the threads of a block do together. All threads named must call.
#pragma once

#include "common.h"

namespace dsd::cuda {

constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarp; }

// NaN if one of them is: gradients that are not finite must show.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// Sum of `value` over this lane and those before it.
template <class T>
__device__ __forceinline__ T sum_up_to(T value, int lane) {
    for (int d = 1; d < kWarp; d *= 2) {
        const T other = __shfl_up_sync(kAllLanes, value, d);
        if (lane >= d) value += other;
    }
    return value;
}

// Sum of `value` over this lane and those after it.
__device__ __forceinline__ float sum_from(float value, int lane) {
    for (int d = 1; d < kWarp; d *= 2) {
        const float other = __shfl_down_sync(kAllLanes, value, d);
        if (lane + d < kWarp) value += other;
    }
    return value;
}

// Sum of `value` over the warp, in every lane.
__device__ __forceinline__ float sum_all(float value) {
    for (int d = kWarp / 2; d > 0; d /= 2) value += __shfl_xor_sync(kAllLanes, value, d);
    return value;
}

// Sum of `value` over the threads of the block before this one, and over all of them.
template <int kThreads>
__device__ __forceinline__ int64_t sum_before(int64_t value, int64_t& total) {
    __shared__ long long warps[kThreads / kWarp];
    const int lane = lane_of_thread(), warp = threadIdx.x / kWarp;
    const long long up_to = sum_up_to<long long>(value, lane);
    if (lane == kWarp - 1) warps[warp] = up_to;
    __syncthreads();
    int64_t before = up_to - value;
    total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
        if (w < warp) before += warps[w];
        total += warps[w];
    }
    __syncthreads();  // the next call writes `warps`
    return before;
}

// A sum of floats kept as two, so that many small terms do not wear off the large one. It is as
// good as a double here, and consumer GPUs add doubles 64 times slower than floats.
struct LongSum {
    float high = 0.0f, low = 0.0f;

    __device__ __forceinline__ void add(float x) {
        const float sum = high + x;
        const float part = sum - high;
        const float lost = (high - (sum - part)) + (x - part);
        high = sum;
        low = isfinite(sum) ? low + lost : 0.0f;  // inf - inf is NaN, and nothing is lost of inf
    }

    __device__ __forceinline__ float plus(float x) const { return high + (low + x); }
};

}  // namespace dsd::cuda
