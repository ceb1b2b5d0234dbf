// Volume rendering of packed samples along rays.
//
// Sample i of a ray has thickness x_i = sigma_i (t_end - t_start), lies behind the optical depth
// X_i = sum_{j<i} x_j, and weighs w_i = exp(-X_i) (1 - exp(-x_i)) at its middle t_i. With
// g_i = dL/dw_i the gradient is dL/dx_i = g_i exp(-X_{i+1}) - sum_{j>i} g_j w_j: nothing is divided
// by a transmittance, so opaque samples (alpha = 1) get their true gradient.
//
// Per-sample arithmetic is float. Sums along a ray are carried in double, or in two floats on CUDA:
// an optical depth of 10 summed over hundreds of samples in float would put 1e-5 of error into the
// transmittance.
//
// Samples behind the last ray's, of arrays with a fixed capacity, are not read; their weights and
// gradients are zero.
#pragma once

#include <cmath>

#include "common.h"

namespace dsd {

// Floor of the opacity that normalises the weights of the z-variance.
constexpr float kMinOpacity = 1e-5f;

struct CompositeParams {
    const float* sigmas;     // [S]
    const float* rgbs;       // [S, 3]
    const float* normals;    // [S, 3], null leaves z_variance and normal out
    const float* t_starts;   // [S]
    const float* t_ends;     // [S]
    const int64_t* offsets;  // [n_rays + 1] where each ray's samples begin
    const float* dirs;       // [n_rays, 3], null leaves orientation out; needs normals
    int64_t n_rays;
    int64_t n_samples;  // S
    // Results of the forward pass; opacity, depth and z_variance are inputs of the backward pass.
    float* color;        // [n_rays, 3]
    float* opacity;      // [n_rays]
    float* depth;        // [n_rays]
    float* z_variance;   // [n_rays], if there are normals
    float* normal;       // [n_rays, 3], if there are normals
    float* weights;      // [S]
    float* orientation;  // [n_rays]
};

// Gradients; each incoming one may be null, meaning zero.
struct CompositeGrads {
    const float* color;        // [n_rays, 3]
    const float* opacity;      // [n_rays]
    const float* depth;        // [n_rays]
    const float* z_variance;   // [n_rays]
    const float* normal;       // [n_rays, 3]
    const float* weights;      // [S]
    const float* orientation;  // [n_rays]
    float* sigmas;             // [S] out; on the CPU holds transmittances between the two sweeps
    float* rgbs;               // [S, 3] out; on CUDA holds optical depths between the two sweeps
    float* normals;            // [S, 3] out, if there are normals
};

struct VisibilityParams {
    const float* sigmas;           // [S]
    const float* t_starts;         // [S]
    const float* t_ends;           // [S]
    const int64_t* offsets;        // [n_rays + 1]
    const float* alpha_threshold;  // one number, where the samples are: no copy to the host
    float transmittance_threshold;
    int64_t n_rays;
    int64_t n_samples;
    uint8_t* visible;  // [S] out, 0 or 1
};

namespace composite {

// An offset between 0 and the number of samples. Offsets without sense give wrong numbers, but
// neither an access out of bounds nor an overflow where something is added to them.
template <class Params>
DSD_HD int64_t offset_of(const Params& p, int64_t ray) {
    const int64_t offset = p.offsets[ray];
    return offset < 0 ? 0 : offset < p.n_samples ? offset : p.n_samples;
}

// Where the samples of a ray begin and end.
template <class Params>
DSD_HD int64_t begin_of(const Params& p, int64_t ray) {
    return offset_of(p, ray);
}

template <class Params>
DSD_HD int64_t end_of(const Params& p, int64_t ray) {
    return offset_of(p, ray + 1);
}

// Where the samples without a ray begin.
template <class Params>
DSD_HD int64_t end_of_all(const Params& p) {
    return offset_of(p, p.n_rays);
}

// Whether z_variance and normal are asked for; either is null where it has no elements.
DSD_HD bool is_full(const CompositeParams& p) {
    return p.z_variance != nullptr || p.normals != nullptr;
}

template <class Params>
DSD_HD float thickness(const Params& p, int64_t i) {
    return p.sigmas[i] * (p.t_ends[i] - p.t_starts[i]);
}

DSD_HD float middle(float t_start, float t_end) { return 0.5f * (t_start + t_end); }

DSD_HD float middle(const CompositeParams& p, int64_t i) {
    return middle(p.t_starts[i], p.t_ends[i]);
}

DSD_HD float alpha(float thickness) { return -expm1f(-thickness); }

DSD_HD float transmittance(double optical_depth) {
    return expf(-static_cast<float>(optical_depth));
}

DSD_HD bool visible(const VisibilityParams& p, float transmittance, float alpha) {
    return transmittance >= p.transmittance_threshold && alpha >= *p.alpha_threshold;
}

DSD_HD float mean_depth(float opacity, float depth) { return depth / fmaxf(opacity, kMinOpacity); }

// How far a normal faces away: its product with the ray's direction, at least 0. A NaN stays one.
DSD_HD float facing_away(float product) { return product < 0.0f ? 0.0f : product; }

// What is the same for all samples of a ray in the gradients.
struct RayGrad {
    float color[3];
    float normal[3];
    float dir[3];
    float opacity;
    float depth;
    float z_variance;  // dL/d(z_variance) / max(opacity, kMinOpacity)
    float mean;
    float constant;  // d(z_variance)/dw_i times the denominator is
    float slope;     // (t_i - mean)^2 + slope * t_i + constant
    float orientation;
};

DSD_HD float at(const float* values, int64_t i) { return values == nullptr ? 0.0f : values[i]; }

template <bool kFull>
DSD_HD RayGrad load_ray_grad(const CompositeParams& p, const CompositeGrads& g, int64_t ray) {
    RayGrad r{};
    for (int c = 0; c < 3; ++c) r.color[c] = at(g.color, 3 * ray + c);
    r.opacity = at(g.opacity, ray);
    r.depth = at(g.depth, ray);
    if (kFull) {
        for (int c = 0; c < 3; ++c) r.normal[c] = at(g.normal, 3 * ray + c);
        for (int c = 0; c < 3; ++c) r.dir[c] = at(p.dirs, 3 * ray + c);
        const float opacity = p.opacity[ray];
        r.z_variance = at(g.z_variance, ray) / fmaxf(opacity, kMinOpacity);
        r.mean = mean_depth(opacity, p.depth[ray]);
        // Above the floor the weights w/opacity sum to 1 and the denominator moves with w; below it
        // the denominator is constant and the mean is no longer the centre of mass.
        const bool above = opacity >= kMinOpacity;
        r.constant = above ? -p.z_variance[ray] : 0.0f;
        r.slope = above ? 0.0f : -2.0f * r.mean * (1.0f - opacity / kMinOpacity);
        r.orientation = at(g.orientation, ray);
    }
    return r;
}

// dL/dw of sample i, whose middle is t; `values` is the product of its colour and normal with their
// gradients. The orientation takes the weights as given.
template <bool kFull>
DSD_HD float weight_grad(const CompositeGrads& g, const RayGrad& r, int64_t i, float t,
                         float values) {
    float sum = at(g.weights, i) + r.opacity + r.depth * t + values;
    if (kFull) {
        const float from_mean = t - r.mean;
        sum += r.z_variance * (from_mean * from_mean + r.slope * t + r.constant);
    }
    return sum;
}

// Times the direction the orientation's gradient of a normal; `product` is normal times direction.
DSD_HD float orientation_grad(const RayGrad& r, float weight, float product) {
    return 2.0f * r.orientation * weight * facing_away(product);
}

}  // namespace composite

void composite_fwd(const CompositeParams& p, int n_threads);
void composite_bwd(const CompositeParams& p, const CompositeGrads& g, int n_threads);
void visibility(const VisibilityParams& p, int n_threads);

namespace cuda {
void composite_fwd(const CompositeParams& p, void* stream);
void composite_bwd(const CompositeParams& p, const CompositeGrads& g, void* stream);
void visibility(const VisibilityParams& p, void* stream);
}  // namespace cuda

}  // namespace dsd
