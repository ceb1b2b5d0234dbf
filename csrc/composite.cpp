#include "composite.h"

#include "parallel.h"

namespace dsd {

namespace {

// Rays a task. One ray is never cut, so the order of its sums does not depend on the threads.
constexpr int64_t kRaysPerTask = 64;

template <bool kFull>
void composite_ray(const CompositeParams& p, int64_t ray) {
    const int64_t begin = p.offsets[ray], end = p.offsets[ray + 1];
    double optical_depth = 0, opacity = 0, depth = 0, color[3] = {}, normal[3] = {};
    for (int64_t i = begin; i < end; ++i) {
        const float x = composite::thickness(p, i);
        const float weight = composite::transmittance(optical_depth) * composite::alpha(x);
        optical_depth += x;
        p.weights[i] = weight;
        const double w = weight;
        opacity += w;
        depth += w * composite::middle(p, i);
        for (int c = 0; c < 3; ++c) color[c] += w * p.rgbs[3 * i + c];
        if (kFull) {
            for (int c = 0; c < 3; ++c) normal[c] += w * p.normals[3 * i + c];
        }
    }
    p.opacity[ray] = static_cast<float>(opacity);
    p.depth[ray] = static_cast<float>(depth);
    for (int c = 0; c < 3; ++c) p.color[3 * ray + c] = static_cast<float>(color[c]);
    if (kFull) {
        for (int c = 0; c < 3; ++c) p.normal[3 * ray + c] = static_cast<float>(normal[c]);
        const float mean = composite::mean_depth(p.opacity[ray], p.depth[ray]);
        double spread = 0;
        for (int64_t i = begin; i < end; ++i) {
            const double from_mean = composite::middle(p, i) - mean;
            spread += p.weights[i] * from_mean * from_mean;
        }
        p.z_variance[ray] = static_cast<float>(spread) / fmaxf(p.opacity[ray], kMinOpacity);
    }
}

template <bool kFull>
void composite_ray_bwd(const CompositeParams& p, const CompositeGrads& g, int64_t ray) {
    const int64_t begin = p.offsets[ray], end = p.offsets[ray + 1];
    double optical_depth = 0;
    for (int64_t i = begin; i < end; ++i) {
        optical_depth += composite::thickness(p, i);
        g.sigmas[i] = composite::transmittance(optical_depth);
    }
    const composite::RayGrad r = composite::load_ray_grad<kFull>(p, g, ray);
    double behind = 0;  // sum over the samples behind of dL/dw w
    for (int64_t i = end - 1; i >= begin; --i) {
        const float after = g.sigmas[i], before = i > begin ? g.sigmas[i - 1] : 1.0f;
        const float weight = before * composite::alpha(composite::thickness(p, i));
        const float weight_grad = composite::weight_grad<kFull>(p, g, r, i);
        const double x_grad = static_cast<double>(weight_grad) * after - behind;
        behind += static_cast<double>(weight_grad) * weight;
        g.sigmas[i] = static_cast<float>(x_grad) * (p.t_ends[i] - p.t_starts[i]);
        composite::write_value_grads<kFull>(g, r, weight, i);
    }
}

template <class F>
void for_rays(int64_t n_rays, int n_threads, const F& f) {
    parallel_chunks(n_rays, kRaysPerTask, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t ray = begin; ray < end; ++ray) f(ray);
    });
}

}  // namespace

void composite_fwd(const CompositeParams& p, int n_threads) {
    if (p.z_variance != nullptr) {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray<true>(p, ray); });
    } else {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray<false>(p, ray); });
    }
}

void composite_bwd(const CompositeParams& p, const CompositeGrads& g, int n_threads) {
    if (p.z_variance != nullptr) {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray_bwd<true>(p, g, ray); });
    } else {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray_bwd<false>(p, g, ray); });
    }
}

void visibility(const VisibilityParams& p, int n_threads) {
    for_rays(p.n_rays, n_threads, [&](int64_t ray) {
        double optical_depth = 0;
        for (int64_t i = p.offsets[ray]; i < p.offsets[ray + 1]; ++i) {
            const float x = composite::thickness(p, i);
            p.visible[i] = composite::visible(p, composite::transmittance(optical_depth),
                                              composite::alpha(x));
            optical_depth += x;
        }
    });
}

}  // namespace dsd
