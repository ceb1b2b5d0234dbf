#include "prune.h"

#include "optical_depth.cuh"
#include "pack.cuh"

namespace dsd::cuda {

namespace {

// Where the samples of the group's rays begin and end, in shared memory: loaded at once, not ray
// after ray. A ray behind the last has none.
struct GroupSamples {
    int64_t begin[kGroup];
    int64_t end[kGroup];

    __device__ __forceinline__ void load(const VisibilityParams& p) {
        const int64_t ray = first_ray_of_group() + threadIdx.x;
        const bool exists = ray < p.n_rays;
        begin[threadIdx.x] = exists ? composite::begin_of(p, ray) : 0;
        end[threadIdx.x] = exists ? composite::end_of(p, ray) : 0;
        __syncthreads();
    }
};

// One block counts a group of rays, a warp every kGroupWarps-th of them, 32 samples at a time;
// reads densities and intervals, writes a flag for each sample and the counts.
__global__ void __launch_bounds__(kGroup) prune_count_kernel(const PruneParams p) {
    __shared__ GroupSamples samples;
    __shared__ int counts[kGroup];
    samples.load(p.seen);
    const int lane = lane_of_thread();
    for (int r = threadIdx.x / kWarp; r < kGroup; r += kGroupWarps) {
        const int64_t end = samples.end[r];
        OpticalDepth walk;
        int count = 0;
        for (int64_t base = samples.begin[r]; base < end; base += kWarp) {
            const int64_t i = base + lane;
            const float x = i < end ? composite::thickness(p.seen, i) : 0.0f;
            const float before = walk.advance(x, lane);
            const bool seen = i < end && composite::visible(p.seen, before, composite::alpha(x));
            if (i < end) p.seen.visible[i] = seen;
            count += __popc(__ballot_sync(kAllLanes, seen));
        }
        if (lane == 0) counts[r] = count;
    }
    __syncthreads();
    count_group(p.out, counts[threadIdx.x]);
}

// One block places a group of rays; a warp moves the samples of every kGroupWarps-th of them, each
// lane behind the visible ones of the lanes before it.
__global__ void __launch_bounds__(kGroup) prune_write_kernel(const PruneParams p) {
    __shared__ GroupSamples samples;
    __shared__ int64_t places[kGroup + 1];
    samples.load(p.seen);
    place_group(p.out, places);
    const int lane = lane_of_thread();
    const unsigned int lanes_before = (1u << lane) - 1;
    for (int r = threadIdx.x / kWarp; r < kGroup; r += kGroupWarps) {
        const int64_t ray = first_ray_of_group() + r, end = samples.end[r];
        int64_t out = places[r];
        const int64_t out_end = places[r + 1];
        for (int64_t base = samples.begin[r]; base < end && out < out_end; base += kWarp) {
            const int64_t i = base + lane;
            const bool seen = i < end && p.seen.visible[i] != 0;
            const unsigned int all = __ballot_sync(kAllLanes, seen);
            const int64_t place = out + __popc(all & lanes_before);
            if (seen && place < out_end) {
                pack::put(p.out, place, ray, p.seen.t_starts[i], p.seen.t_ends[i]);
            }
            out += __popc(all);
        }
    }
    fill_rest(p.out);
}

}  // namespace

void prune_count(const PruneParams& p, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    prune_count_kernel<<<group_blocks(p.out.n_rays), kGroup, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "prune_count");
    pack_scan(p.out, stream);
}

void prune_write(const PruneParams& p, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    prune_write_kernel<<<group_blocks(p.out.n_rays), kGroup, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "prune_write");
}

}  // namespace dsd::cuda
