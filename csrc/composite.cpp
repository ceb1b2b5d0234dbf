#include "composite.h"

#include "parallel.h"

namespace dsd {

namespace {

// Rays a task. One ray is never cut, so the order of its sums does not depend on the threads.
constexpr int64_t kRaysPerTask = 64;

DSD_HD float dot(const float* a, const float* b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

template <bool kFull>
void composite_ray(const CompositeParams& p, int64_t ray) {
    const int64_t begin = composite::begin_of(p, ray), end = composite::end_of(p, ray);
    double optical_depth = 0, opacity = 0, depth = 0, orientation = 0;
    double color[3] = {}, normal[3] = {};
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
            if (p.dirs != nullptr) {
                const double away =
                    composite::facing_away(dot(p.normals + 3 * i, p.dirs + 3 * ray));
                orientation += w * away * away;
            }
        }
    }
    p.opacity[ray] = static_cast<float>(opacity);
    p.depth[ray] = static_cast<float>(depth);
    for (int c = 0; c < 3; ++c) p.color[3 * ray + c] = static_cast<float>(color[c]);
    if (kFull) {
        for (int c = 0; c < 3; ++c) p.normal[3 * ray + c] = static_cast<float>(normal[c]);
        if (p.dirs != nullptr) p.orientation[ray] = static_cast<float>(orientation);
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
    const int64_t begin = composite::begin_of(p, ray), end = composite::end_of(p, ray);
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
        float values = dot(r.color, p.rgbs + 3 * i);
        if (kFull) values += dot(r.normal, p.normals + 3 * i);
        const float weight_grad =
            composite::weight_grad<kFull>(g, r, i, composite::middle(p, i), values);
        const double x_grad = static_cast<double>(weight_grad) * after - behind;
        behind += static_cast<double>(weight_grad) * weight;
        g.sigmas[i] = static_cast<float>(x_grad) * (p.t_ends[i] - p.t_starts[i]);
        for (int c = 0; c < 3; ++c) g.rgbs[3 * i + c] = weight * r.color[c];
        if (kFull) {
            for (int c = 0; c < 3; ++c) g.normals[3 * i + c] = weight * r.normal[c];
            if (r.orientation != 0.0f) {
                const float away =
                    composite::orientation_grad(r, weight, dot(p.normals + 3 * i, r.dir));
                for (int c = 0; c < 3; ++c) g.normals[3 * i + c] += away * r.dir[c];
            }
        }
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
    if (composite::is_full(p)) {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray<true>(p, ray); });
    } else {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray<false>(p, ray); });
    }
    for (int64_t i = composite::end_of_all(p); i < p.n_samples; ++i) p.weights[i] = 0.0f;
}

void composite_bwd(const CompositeParams& p, const CompositeGrads& g, int n_threads) {
    if (composite::is_full(p)) {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray_bwd<true>(p, g, ray); });
    } else {
        for_rays(p.n_rays, n_threads, [&](int64_t ray) { composite_ray_bwd<false>(p, g, ray); });
    }
    for (int64_t i = composite::end_of_all(p); i < p.n_samples; ++i) {
        g.sigmas[i] = 0.0f;
        for (int c = 0; c < 3; ++c) g.rgbs[3 * i + c] = 0.0f;
        if (composite::is_full(p)) {
            for (int c = 0; c < 3; ++c) g.normals[3 * i + c] = 0.0f;
        }
    }
}

void visibility(const VisibilityParams& p, int n_threads) {
    for_rays(p.n_rays, n_threads, [&](int64_t ray) {
        double optical_depth = 0;
        const int64_t begin = composite::begin_of(p, ray), end = composite::end_of(p, ray);
        for (int64_t i = begin; i < end; ++i) {
            const float x = composite::thickness(p, i);
            p.visible[i] = composite::visible(p, composite::transmittance(optical_depth),
                                              composite::alpha(x));
            optical_depth += x;
        }
    });
    for (int64_t i = composite::end_of_all(p); i < p.n_samples; ++i) p.visible[i] = 0;
}

}  // namespace dsd
