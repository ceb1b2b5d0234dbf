#include "composite.h"

namespace dsd::cuda {

namespace {

constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

// Sum of `value` over this lane and those before it.
__device__ __forceinline__ float sum_up_to(float value, int lane) {
    for (int d = 1; d < kWarp; d *= 2) {
        const float other = __shfl_up_sync(kAllLanes, value, d);
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

// Walks a ray's optical depth 32 samples at a time, all lanes together.
struct OpticalDepth {
    double carry = 0;  // of all samples before this group of 32

    // Takes this lane's thickness; gives the transmittance in front of and behind its sample.
    __device__ __forceinline__ void advance(float thickness, int lane, float& before,
                                            float& after) {
        const float up_to = sum_up_to(thickness, lane);
        float in_front = __shfl_up_sync(kAllLanes, up_to, 1);
        if (lane == 0) in_front = 0.0f;  // not up_to - thickness: that would lose digits
        before = composite::transmittance(carry + in_front);
        after = composite::transmittance(carry + up_to);
        carry += __shfl_sync(kAllLanes, up_to, kWarp - 1);
    }
};

__device__ __forceinline__ int64_t ray_of_warp() {
    return (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
}

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarp; }

// One warp owns one ray and takes its samples 32 at a time; reads the samples, writes their weights
// and the ray's sums. Lanes add in float (a few terms each) and join at the end.
template <bool kFull>
__global__ void __launch_bounds__(kBlock) composite_fwd_kernel(const CompositeParams p) {
    const int64_t ray = ray_of_warp();
    if (ray >= p.n_rays) return;
    const int lane = lane_of_thread();
    const int64_t begin = p.offsets[ray], end = p.offsets[ray + 1];
    OpticalDepth walk;
    float opacity = 0, depth = 0, color[3] = {}, normal[3] = {};
    for (int64_t base = begin; base < end; base += kWarp) {
        const int64_t i = base + lane;
        const float x = i < end ? composite::thickness(p, i) : 0.0f;
        float before, after;
        walk.advance(x, lane, before, after);
        if (i >= end) continue;
        const float weight = before * composite::alpha(x);
        p.weights[i] = weight;
        opacity += weight;
        depth += weight * composite::middle(p, i);
        for (int c = 0; c < 3; ++c) color[c] += weight * p.rgbs[3 * i + c];
        if (kFull) {
            for (int c = 0; c < 3; ++c) normal[c] += weight * p.normals[3 * i + c];
        }
    }
    opacity = sum_all(opacity);
    depth = sum_all(depth);
    for (int c = 0; c < 3; ++c) color[c] = sum_all(color[c]);
    if (lane == 0) {
        p.opacity[ray] = opacity;
        p.depth[ray] = depth;
        for (int c = 0; c < 3; ++c) p.color[3 * ray + c] = color[c];
    }
    if (kFull) {
        for (int c = 0; c < 3; ++c) normal[c] = sum_all(normal[c]);
        const float mean = composite::mean_depth(opacity, depth);
        float spread = 0;
        for (int64_t i = begin + lane; i < end; i += kWarp) {  // each lane reads its own weights
            const float from_mean = composite::middle(p, i) - mean;
            spread += p.weights[i] * from_mean * from_mean;
        }
        spread = sum_all(spread);
        if (lane == 0) {
            p.z_variance[ray] = spread / fmaxf(opacity, kMinOpacity);
            for (int c = 0; c < 3; ++c) p.normal[3 * ray + c] = normal[c];
        }
    }
}

// One warp owns one ray. A sweep forward leaves the transmittance behind each sample in
// grads.sigmas; a sweep backward reads it, carries the gradient of what lies behind, and writes the
// gradients of the samples.
template <bool kFull>
__global__ void __launch_bounds__(kBlock) composite_bwd_kernel(const CompositeParams p,
                                                               const CompositeGrads g) {
    const int64_t ray = ray_of_warp();
    if (ray >= p.n_rays) return;
    const int lane = lane_of_thread();
    const int64_t begin = p.offsets[ray], end = p.offsets[ray + 1];
    if (begin >= end) return;
    OpticalDepth walk;
    for (int64_t base = begin; base < end; base += kWarp) {
        const int64_t i = base + lane;
        const float x = i < end ? composite::thickness(p, i) : 0.0f;
        float before, after;
        walk.advance(x, lane, before, after);
        if (i < end) g.sigmas[i] = after;
    }
    __syncwarp();  // lane 0 reads what lane 31 wrote

    const composite::RayGrad r = composite::load_ray_grad<kFull>(p, g, ray);
    double behind = 0;  // sum over the groups behind of dL/dw w
    for (int64_t base = begin + (end - 1 - begin) / kWarp * kWarp; base >= begin; base -= kWarp) {
        const int64_t i = base + lane;
        const bool active = i < end;
        const float after = active ? g.sigmas[i] : 0.0f;
        float before = __shfl_up_sync(kAllLanes, after, 1);
        if (lane == 0) before = base > begin ? g.sigmas[base - 1] : 1.0f;
        __syncwarp();  // lane 31 overwrites that value in the next round

        const float weight = active ? before * composite::alpha(composite::thickness(p, i)) : 0.0f;
        const float weight_grad = active ? composite::weight_grad<kFull>(p, g, r, i) : 0.0f;
        const float from_here = sum_from(weight_grad * weight, lane);
        float after_here = __shfl_down_sync(kAllLanes, from_here, 1);
        if (lane == kWarp - 1) after_here = 0.0f;
        if (active) {
            const double x_grad =
                static_cast<double>(weight_grad) * after - (behind + after_here);
            g.sigmas[i] = static_cast<float>(x_grad) * (p.t_ends[i] - p.t_starts[i]);
            composite::write_value_grads<kFull>(g, r, weight, i);
        }
        behind += __shfl_sync(kAllLanes, from_here, 0);
    }
}

// One warp owns one ray; reads densities and intervals, writes a flag for each sample.
__global__ void __launch_bounds__(kBlock) visibility_kernel(const VisibilityParams p) {
    const int64_t ray = ray_of_warp();
    if (ray >= p.n_rays) return;
    const int lane = lane_of_thread();
    const int64_t begin = p.offsets[ray], end = p.offsets[ray + 1];
    OpticalDepth walk;
    for (int64_t base = begin; base < end; base += kWarp) {
        const int64_t i = base + lane;
        const float x = i < end ? composite::thickness(p, i) : 0.0f;
        float before, after;
        walk.advance(x, lane, before, after);
        if (i < end) p.visible[i] = composite::visible(p, before, composite::alpha(x));
    }
}

}  // namespace

void composite_fwd(const CompositeParams& p, void* stream) {
    if (p.n_rays == 0) return;
    const unsigned int blocks = blocks_for(p.n_rays * kWarp);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (p.z_variance != nullptr) {
        composite_fwd_kernel<true><<<blocks, kBlock, 0, cuda_stream>>>(p);
    } else {
        composite_fwd_kernel<false><<<blocks, kBlock, 0, cuda_stream>>>(p);
    }
    check(cudaGetLastError(), "composite_fwd");
}

void composite_bwd(const CompositeParams& p, const CompositeGrads& g, void* stream) {
    if (p.n_rays == 0) return;
    const unsigned int blocks = blocks_for(p.n_rays * kWarp);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (p.z_variance != nullptr) {
        composite_bwd_kernel<true><<<blocks, kBlock, 0, cuda_stream>>>(p, g);
    } else {
        composite_bwd_kernel<false><<<blocks, kBlock, 0, cuda_stream>>>(p, g);
    }
    check(cudaGetLastError(), "composite_bwd");
}

void visibility(const VisibilityParams& p, void* stream) {
    if (p.n_rays == 0) return;
    visibility_kernel<<<blocks_for(p.n_rays * kWarp), kBlock, 0,
                        static_cast<cudaStream_t>(stream)>>>(p);
    check(cudaGetLastError(), "visibility");
}

}  // namespace dsd::cuda
