#include "march.h"
#include "pack.cuh"

namespace dsd::cuda {

namespace {

// One thread walks one ray; reads the occupancy grid, writes the ray's count and first runs.
__global__ void __launch_bounds__(kGroup) march_count_kernel(const MarchParams p) {
    const int64_t ray = first_ray_of_group() + threadIdx.x;
    count_group(p.out, ray < p.n_rays ? march::count_ray(p, ray) : 0);
}

// One block places a group of rays; a warp writes the samples of every kGroupWarps-th of them, lane
// beside lane. All lanes read the same runs, or walk the same way where there are more.
__global__ void __launch_bounds__(kGroup) march_write_kernel(const MarchParams p) {
    __shared__ int64_t places[kGroup + 1];
    place_group(p.out, places);
    for (int r = threadIdx.x / kWarp; r < kGroup; r += kGroupWarps) {
        march::write_ray(p, first_ray_of_group() + r, places[r], places[r + 1], lane_of_thread(),
                         kWarp);
    }
    fill_rest(p.out);
}

}  // namespace

void march_count(const MarchParams& p, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    march_count_kernel<<<group_blocks(p.n_rays), kGroup, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "march_count");
    pack_scan(p.out, stream);
}

void march_write(const MarchParams& p, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    march_write_kernel<<<group_blocks(p.n_rays), kGroup, 0, cuda_stream>>>(p);
    check(cudaGetLastError(), "march_write");
}

}  // namespace dsd::cuda
