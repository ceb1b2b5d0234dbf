// Packing in kernels whose blocks are groups of rays: kGroup threads, block g for group g.
#pragma once

#include "pack.h"
#include "warp.cuh"

namespace dsd::cuda {

constexpr int kGroupWarps = kGroup / kWarp;

__device__ __forceinline__ int64_t first_ray_of_group() {
    return static_cast<int64_t>(blockIdx.x) * kGroup;
}

// Takes the count of this thread's ray, 0 behind the last ray; writes it and the group's sum.
__device__ __forceinline__ void count_group(const PackParams& p, int count) {
    const int64_t ray = first_ray_of_group() + threadIdx.x;
    if (ray < p.n_rays) p.counts[ray] = count;
    int64_t total;
    sum_before<kGroup>(count, total);
    if (threadIdx.x == 0) p.bases[blockIdx.x] = total;
}

// Leaves in `places`, in shared memory, where each ray of the group begins, and where the last one
// ends; writes them to p.offsets.
__device__ __forceinline__ void place_group(const PackParams& p, int64_t (&places)[kGroup + 1]) {
    const int64_t ray = first_ray_of_group() + threadIdx.x;
    int64_t total;
    const int64_t before = sum_before<kGroup>(ray < p.n_rays ? p.counts[ray] : 0, total);
    const int64_t base = p.bases[blockIdx.x];
    const int64_t place = pack::smaller(base + before, p.capacity);
    places[threadIdx.x] = place;
    if (threadIdx.x == 0) places[kGroup] = pack::smaller(base + total, p.capacity);
    if (p.offsets != nullptr && ray <= p.n_rays) p.offsets[ray] = place;
    __syncthreads();
}

// Fills the places behind the last sample, the whole grid together; writes p.n_dropped.
__device__ __forceinline__ void fill_rest(const PackParams& p) {
    const int64_t total = *p.total, end = pack::smaller(total, p.capacity);
    const int64_t thread = first_ray_of_group() + threadIdx.x;
    if (thread == 0 && p.n_dropped != nullptr) *p.n_dropped = total - end;
    const int64_t n_threads = static_cast<int64_t>(gridDim.x) * kGroup;
    for (int64_t i = end + thread; i < p.capacity; i += n_threads) pack::put(p, i, 0, 0.0f, 0.0f);
}

// Blocks of a kernel over groups.
inline unsigned int group_blocks(int64_t n_rays) {
    return static_cast<unsigned int>(pack::n_groups(n_rays));
}

}  // namespace dsd::cuda
