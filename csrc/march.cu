#include "march.h"

namespace dsd::cuda {

namespace {

// One thread walks one ray; reads the occupancy grid, writes counts[ray].
__global__ void __launch_bounds__(kBlock) march_count_kernel(const MarchParams p) {
    const int64_t ray = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (ray < p.n_rays) march::count_ray(p, ray);
}

// One thread walks one ray again; writes its samples from offsets[ray] on.
__global__ void __launch_bounds__(kBlock) march_write_kernel(const MarchParams p) {
    const int64_t ray = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (ray < p.n_rays) march::write_ray(p, ray);
}

}  // namespace

void march_count(const MarchParams& p, void* stream) {
    if (p.n_rays == 0) return;
    march_count_kernel<<<blocks_for(p.n_rays), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(p);
    check(cudaGetLastError(), "march_count");
}

void march_write(const MarchParams& p, void* stream) {
    if (p.n_rays == 0) return;
    march_write_kernel<<<blocks_for(p.n_rays), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(p);
    check(cudaGetLastError(), "march_write");
}

}  // namespace dsd::cuda
