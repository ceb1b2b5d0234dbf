#include "composite.h"

#include "optical_depth.cuh"
#include "warp.cuh"

namespace dsd::cuda {

namespace {

constexpr int kWarps = kBlock / kWarp;

// Blocks at a time on a multiprocessor, so that enough loads are under way: at most 64 registers.
constexpr int kBlocksAtOnce = 4;

__device__ __forceinline__ int64_t ray_of_warp() {
    return (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
}

// Samples of the group that begins at `base` of a ray that ends at `end`: 32, or fewer at last.
__device__ __forceinline__ int samples_of(int64_t base, int64_t end) {
    return static_cast<int>(end - base < kWarp ? end - base : kWarp);
}

// Triples. The values [S, 3] of 32 samples are 96 floats, which lanes take in order, so that they
// read and write whole sectors: element j of a lane is number 32 j + lane, of sample
// (32 j + lane) / 3 and channel (32 j + lane) % 3.

__device__ __forceinline__ int sample_of(int j, int lane) { return (kWarp * j + lane) / 3; }

__device__ __forceinline__ float pick(const float (&of)[3], int k) {
    return k == 0 ? of[0] : k == 1 ? of[1] : of[2];
}

// The channel of a lane's element j; also the element of channel j, for it is its own inverse.
__device__ __forceinline__ int channel_of(int j, int lane) { return (2 * j + lane) % 3; }

// The sum of each channel over the warp, from lanes' sums of each element.
__device__ __forceinline__ void sum_channels(const float (&elements)[3], int lane,
                                             float (&channels)[3]) {
    for (int c = 0; c < 3; ++c) channels[c] = sum_all(pick(elements, channel_of(c, lane)));
}

// Leaves a lane's elements in shared memory; gives the sum of its sample's three. All lanes call.
__device__ __forceinline__ float sum_triple(float* shared, const float (&elements)[3], int lane) {
    for (int j = 0; j < 3; ++j) shared[kWarp * j + lane] = elements[j];
    __syncwarp();
    const float sum = shared[3 * lane] + shared[3 * lane + 1] + shared[3 * lane + 2];
    __syncwarp();  // the next call writes `shared`
    return sum;
}

// Sets values[first] to values[last - 1] to 0, the whole grid together.
__device__ __forceinline__ void fill_zero(float* values, int64_t first, int64_t last) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    const int64_t n_threads = static_cast<int64_t>(gridDim.x) * kBlock;
    for (int64_t i = first + thread; i < last; i += n_threads) values[i] = 0.0f;
}

// One warp owns one ray and takes its samples 32 at a time; reads the samples, writes their weights
// and the ray's sums. Lanes add in float (a few terms each) and join at the end. kOrient comes with
// kFull only.
template <bool kFull, bool kOrient>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    composite_fwd_kernel(const CompositeParams p) {
    __shared__ float triples[kOrient ? kWarps : 1][3 * kWarp];
    fill_zero(p.weights, composite::end_of_all(p), p.n_samples);
    const int64_t ray = ray_of_warp();
    if (ray >= p.n_rays) return;
    const int lane = lane_of_thread();
    const int64_t begin = composite::begin_of(p, ray), end = composite::end_of(p, ray);
    float dir[3] = {};  // of the lane's elements
    if (kOrient) {
        for (int j = 0; j < 3; ++j) dir[j] = p.dirs[3 * ray + channel_of(j, lane)];
    }
    OpticalDepth walk;
    float opacity = 0, depth = 0, orientation = 0, color[3] = {}, normal[3] = {};
    for (int64_t base = begin; base < end; base += kWarp) {
        const int64_t i = base + lane, first = 3 * base + lane;
        const int n = samples_of(base, end);
        const bool active = lane < n;
        const float t_start = active ? p.t_starts[i] : 0.0f, t_end = active ? p.t_ends[i] : 0.0f;
        const float x = active ? p.sigmas[i] * (t_end - t_start) : 0.0f;
        const float before = walk.advance(x, lane);
        const float weight = active ? before * composite::alpha(x) : 0.0f;
        if (active) p.weights[i] = weight;
        opacity += weight;
        depth += weight * composite::middle(t_start, t_end);
        float products[3];
        for (int j = 0; j < 3; ++j) {
            const float w = __shfl_sync(kAllLanes, weight, sample_of(j, lane));
            products[j] = 0.0f;
            if (kWarp * j + lane >= 3 * n) continue;
            color[j] += w * __ldcs(p.rgbs + first + kWarp * j);
            if (kFull) {
                const float value = __ldcs(p.normals + first + kWarp * j);
                normal[j] += w * value;
                products[j] = value * dir[j];
            }
        }
        if (kOrient) {
            const float away =
                composite::facing_away(sum_triple(triples[threadIdx.x / kWarp], products, lane));
            orientation += weight * away * away;
        }
    }
    if (begin < end) {  // otherwise they are zero already
        float channels[3];
        opacity = sum_all(opacity);
        depth = sum_all(depth);
        sum_channels(color, lane, channels);
        for (int c = 0; c < 3; ++c) color[c] = channels[c];
        if (kFull) {
            sum_channels(normal, lane, channels);
            for (int c = 0; c < 3; ++c) normal[c] = channels[c];
        }
        if (kOrient) orientation = sum_all(orientation);
    }
    if (lane == 0) {
        p.opacity[ray] = opacity;
        p.depth[ray] = depth;
        if (kOrient) p.orientation[ray] = orientation;
    }
    if (lane < 3) {
        p.color[3 * ray + lane] = pick(color, lane);
        if (kFull) p.normal[3 * ray + lane] = pick(normal, lane);
    }
    if (kFull) {
        const float mean = composite::mean_depth(opacity, depth);
        float spread = 0;
        for (int64_t i = begin + lane; i < end; i += kWarp) {  // each lane reads its own weights
            const float from_mean = composite::middle(p, i) - mean;
            spread += p.weights[i] * from_mean * from_mean;
        }
        if (begin < end) spread = sum_all(spread);
        if (lane == 0) p.z_variance[ray] = spread / fmaxf(opacity, kMinOpacity);
    }
}

// One warp owns one ray. A sweep forward leaves the optical depth in front of each 32 samples, but
// for the first, in the first two floats of their gradients of colour; a sweep backward reads it,
// carries the gradient of what lies behind, and writes the gradients of the samples.
template <bool kFull, bool kOrient>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    composite_bwd_kernel(const CompositeParams p, const CompositeGrads g) {
    __shared__ float triples[kWarps][3 * kWarp];
    const int64_t end_of_all = composite::end_of_all(p);
    fill_zero(g.sigmas, end_of_all, p.n_samples);
    fill_zero(g.rgbs, 3 * end_of_all, 3 * p.n_samples);
    if (kFull) fill_zero(g.normals, 3 * end_of_all, 3 * p.n_samples);

    const int64_t ray = ray_of_warp();
    if (ray >= p.n_rays) return;
    const int lane = lane_of_thread();
    float* const shared = triples[threadIdx.x / kWarp];
    const int64_t begin = composite::begin_of(p, ray), end = composite::end_of(p, ray);
    if (begin >= end) return;
    const int64_t last = begin + (end - 1 - begin) / kWarp * kWarp;
    LongSum depth;
    for (int64_t base = begin; base < last; base += kWarp) {
        depth.add(sum_all(composite::thickness(p, base + lane)));
        if (lane == 0) {
            g.rgbs[3 * (base + kWarp)] = depth.high;
            g.rgbs[3 * (base + kWarp) + 1] = depth.low;
        }
    }

    const composite::RayGrad r = composite::load_ray_grad<kFull>(p, g, ray);
    float color[3], normal[3] = {}, dir[3] = {};  // of the lane's elements
    for (int j = 0; j < 3; ++j) {
        const int c = channel_of(j, lane);
        color[j] = pick(r.color, c);
        if (kFull) normal[j] = pick(r.normal, c);
        if (kOrient) dir[j] = pick(r.dir, c);
    }
    LongSum behind;  // over the groups behind of dL/dw w
    for (int64_t base = last; base >= begin; base -= kWarp) {
        const int64_t i = base + lane, first = 3 * base + lane;
        const int n = samples_of(base, end);
        const bool active = lane < n;
        LongSum in_front;
        if (lane == 0 && base > begin) {  // the lane that wrote it
            in_front.high = g.rgbs[3 * base];
            in_front.low = g.rgbs[3 * base + 1];
        }
        in_front.high = __shfl_sync(kAllLanes, in_front.high, 0);
        in_front.low = __shfl_sync(kAllLanes, in_front.low, 0);
        const float t_start = active ? p.t_starts[i] : 0.0f, t_end = active ? p.t_ends[i] : 0.0f;
        const float x = active ? p.sigmas[i] * (t_end - t_start) : 0.0f;
        const float after = composite::transmittance(in_front.plus(sum_up_to(x, lane)));
        float before = __shfl_up_sync(kAllLanes, after, 1);
        if (lane == 0) before = composite::transmittance(in_front.plus(0.0f));
        const float weight = active ? before * composite::alpha(x) : 0.0f;

        float products[3] = {}, facing[3] = {};
        for (int j = 0; j < 3; ++j) {
            if (kWarp * j + lane >= 3 * n) continue;
            products[j] = color[j] * __ldcs(p.rgbs + first + kWarp * j);
            if (kFull) {
                const float value = __ldcs(p.normals + first + kWarp * j);
                products[j] += normal[j] * value;
                facing[j] = dir[j] * value;
            }
        }
        const float values = sum_triple(shared, products, lane);
        const float t = composite::middle(t_start, t_end);
        const float weight_grad = active ? composite::weight_grad<kFull>(g, r, i, t, values) : 0.0f;
        const float from_here = sum_from(weight_grad * weight, lane);
        float behind_here = __shfl_down_sync(kAllLanes, from_here, 1);
        if (lane == kWarp - 1) behind_here = 0.0f;
        if (active) {
            // The product and the sum cancel where all behind is alike: no rounding before that.
            const float x_grad =
                fmaf(weight_grad, after, -behind.high) - (behind.low + behind_here);
            __stcs(g.sigmas + i, x_grad * (t_end - t_start));
        }
        behind.add(__shfl_sync(kAllLanes, from_here, 0));

        float away = 0.0f;
        if (kOrient) {
            away = composite::orientation_grad(r, weight, sum_triple(shared, facing, lane));
        }
        for (int j = 0; j < 3; ++j) {
            const float w = __shfl_sync(kAllLanes, weight, sample_of(j, lane));
            const float a = kOrient ? __shfl_sync(kAllLanes, away, sample_of(j, lane)) : 0.0f;
            if (kWarp * j + lane >= 3 * n) continue;
            __stcs(g.rgbs + first + kWarp * j, w * color[j]);
            if (kFull) {
                const float grad = kOrient ? w * normal[j] + a * dir[j] : w * normal[j];
                __stcs(g.normals + first + kWarp * j, grad);
            }
        }
    }
}

// One warp owns one ray; reads densities and intervals, writes a flag for each sample.
__global__ void __launch_bounds__(kBlock) visibility_kernel(const VisibilityParams p) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    const int64_t n_threads = static_cast<int64_t>(gridDim.x) * kBlock;
    for (int64_t i = composite::end_of_all(p) + thread; i < p.n_samples; i += n_threads) {
        p.visible[i] = 0;
    }
    const int64_t ray = ray_of_warp();
    if (ray >= p.n_rays) return;
    const int lane = lane_of_thread();
    const int64_t begin = composite::begin_of(p, ray), end = composite::end_of(p, ray);
    OpticalDepth walk;
    for (int64_t base = begin; base < end; base += kWarp) {
        const int64_t i = base + lane;
        const float x = i < end ? composite::thickness(p, i) : 0.0f;
        const float before = walk.advance(x, lane);
        if (i < end) p.visible[i] = composite::visible(p, before, composite::alpha(x));
    }
}

// Blocks with a warp for each ray, and one for the samples where there is no ray.
unsigned int blocks_for_rays(int64_t n_rays) {
    return n_rays == 0 ? 1 : blocks_for(n_rays * kWarp);
}

}  // namespace

void composite_fwd(const CompositeParams& p, void* stream) {
    const unsigned int blocks = blocks_for_rays(p.n_rays);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (p.dirs != nullptr) {
        composite_fwd_kernel<true, true><<<blocks, kBlock, 0, cuda_stream>>>(p);
    } else if (composite::is_full(p)) {
        composite_fwd_kernel<true, false><<<blocks, kBlock, 0, cuda_stream>>>(p);
    } else {
        composite_fwd_kernel<false, false><<<blocks, kBlock, 0, cuda_stream>>>(p);
    }
    check(cudaGetLastError(), "composite_fwd");
}

void composite_bwd(const CompositeParams& p, const CompositeGrads& g, void* stream) {
    const unsigned int blocks = blocks_for_rays(p.n_rays);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (p.dirs != nullptr && g.orientation != nullptr) {
        composite_bwd_kernel<true, true><<<blocks, kBlock, 0, cuda_stream>>>(p, g);
    } else if (composite::is_full(p)) {
        composite_bwd_kernel<true, false><<<blocks, kBlock, 0, cuda_stream>>>(p, g);
    } else {
        composite_bwd_kernel<false, false><<<blocks, kBlock, 0, cuda_stream>>>(p, g);
    }
    check(cudaGetLastError(), "composite_bwd");
}

void visibility(const VisibilityParams& p, void* stream) {
    visibility_kernel<<<blocks_for_rays(p.n_rays), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(
        p);
    check(cudaGetLastError(), "visibility");
}

}  // namespace dsd::cuda
