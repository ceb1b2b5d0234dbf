#include "sh.h"

namespace dsd::cuda {
namespace {

// A thread owns one direction: reads 3 floats, writes 9.
__global__ void __launch_bounds__(kBlock) sh_fwd_kernel(const ShParams params) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (i >= params.n_dirs) return;
    const float* d = params.dirs + 3 * i;
    sh_values(d[0], d[1], d[2], params.y + kShValues * i);
}

// A thread owns one direction: reads it and 9 gradients, writes 3.
__global__ void __launch_bounds__(kBlock) sh_bwd_kernel(const ShParams params) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (i >= params.n_dirs) return;
    const float* d = params.dirs + 3 * i;
    sh_gradient(d[0], d[1], d[2], params.grad_y + kShValues * i, params.grad_dirs + 3 * i);
}

}  // namespace

void sh_fwd(const ShParams& params, void* stream) {
    sh_fwd_kernel<<<blocks_for(params.n_dirs), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(
        params);
    check(cudaGetLastError(), "sh_fwd");
}

void sh_bwd(const ShParams& params, void* stream) {
    sh_bwd_kernel<<<blocks_for(params.n_dirs), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(
        params);
    check(cudaGetLastError(), "sh_bwd");
}

}  // namespace dsd::cuda
