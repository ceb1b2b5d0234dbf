#include <cuda_fp16.h>

#include "adam.h"

namespace dsd::cuda {

namespace {

// Four elements a thread and turn: 16 bytes an access.
constexpr int kWidth = 4;
// Blocks a multiprocessor: they all fit at once, so that none is left over for a second round, and
// have enough loads on the way for the memory.
constexpr int kBlocksPerProcessor = 4;
// A parameter of so few elements is left to one block, which then counts the step itself.
constexpr int64_t kOneBlock = 8 * kBlock * kWidth;

__device__ __forceinline__ uint16_t half_bits(float x) {
    return __half_as_ushort(__float2half_rn(x));
}

// The elements are shared out over the grid, in fours as far as `n_fours` goes and then singly.
// Gradient and moments are used once a step and pass the cache by; the parameter is wanted soon.
template <bool kHalf, bool kZero>
__global__ void __launch_bounds__(kBlock, kBlocksPerProcessor)
    adam_kernel(const AdamParams p, int64_t n_fours) {
    __shared__ adam::Factors shared;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
    const bool skipped = adam::skipped(p);  // the same in all threads
    if (skipped) {
        if (kZero) {
            for (int64_t i = first; i < n_fours; i += stride) {
                __stcs(reinterpret_cast<float4*>(p.grad) + i, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
            }
            for (int64_t i = kWidth * n_fours + first; i < p.n; i += stride) p.grad[i] = 0.0f;
        }
        return;
    }
    if (threadIdx.x == 0) shared = adam::factors(p, *p.step + 1.0f);
    __syncthreads();
    // All have read the count; with one block nobody else wants it.
    if (gridDim.x == 1 && threadIdx.x == 0) *p.step += 1.0f;
    const adam::Factors f = shared;
    for (int64_t i = first; i < n_fours; i += stride) {
        const float4 grad = __ldcs(reinterpret_cast<const float4*>(p.grad) + i);
        float4 param = reinterpret_cast<const float4*>(p.param)[i];
        float4 m = __ldcs(reinterpret_cast<const float4*>(p.exp_avg) + i);
        float4 v = __ldcs(reinterpret_cast<const float4*>(p.exp_avg_sq) + i);
        adam::update(f, grad.x, param.x, m.x, v.x);
        adam::update(f, grad.y, param.y, m.y, v.y);
        adam::update(f, grad.z, param.z, m.z, v.z);
        adam::update(f, grad.w, param.w, m.w, v.w);
        reinterpret_cast<float4*>(p.param)[i] = param;
        __stcs(reinterpret_cast<float4*>(p.exp_avg) + i, m);
        __stcs(reinterpret_cast<float4*>(p.exp_avg_sq) + i, v);
        if (kHalf) {
            reinterpret_cast<ushort4*>(p.half)[i] = make_ushort4(
                half_bits(param.x), half_bits(param.y), half_bits(param.z), half_bits(param.w));
        }
        if (kZero) {
            __stcs(reinterpret_cast<float4*>(p.grad) + i, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        }
    }
    for (int64_t i = kWidth * n_fours + first; i < p.n; i += stride) {
        float param = p.param[i], m = p.exp_avg[i], v = p.exp_avg_sq[i];
        adam::update(f, p.grad[i], param, m, v);
        p.param[i] = param;
        p.exp_avg[i] = m;
        p.exp_avg_sq[i] = v;
        if (kHalf) p.half[i] = half_bits(param);
        if (kZero) p.grad[i] = 0.0f;
    }
}

// Runs after the blocks of a large parameter, all of which read the count.
__global__ void count_kernel(const AdamParams p) {
    if (!adam::skipped(p)) *p.step += 1.0f;
}

bool aligned(const void* pointer, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <bool kHalf, bool kZero>
void launch(const AdamParams& p, cudaStream_t stream) {
    const bool fours = aligned(p.param, 16) && aligned(p.grad, 16) && aligned(p.exp_avg, 16) &&
                       aligned(p.exp_avg_sq, 16) && aligned(p.half, 8);
    const int64_t n_fours = fours ? p.n / kWidth : 0;
    unsigned int n_blocks = 1;
    if (p.n > kOneBlock) {
        int device = 0, n_processors = 0;
        check(cudaGetDevice(&device), "adam_step: cudaGetDevice");
        check(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, device),
              "adam_step: cudaDeviceGetAttribute");
        const int64_t wanted = (p.n + kBlock * kWidth - 1) / (kBlock * kWidth);
        const int64_t resident = static_cast<int64_t>(kBlocksPerProcessor) * n_processors;
        n_blocks = static_cast<unsigned int>(wanted < resident ? wanted : resident);
    }
    adam_kernel<kHalf, kZero><<<n_blocks, kBlock, 0, stream>>>(p, n_fours);
    check(cudaGetLastError(), "adam_step");
    if (n_blocks == 1) return;
    count_kernel<<<1, 1, 0, stream>>>(p);
    check(cudaGetLastError(), "adam_step: count");
}

}  // namespace

void adam_step(const AdamParams& p, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (p.half != nullptr) {
        p.zero_grad ? launch<true, true>(p, cuda_stream) : launch<true, false>(p, cuda_stream);
    } else {
        p.zero_grad ? launch<false, true>(p, cuda_stream) : launch<false, false>(p, cuda_stream);
    }
}

}  // namespace dsd::cuda
