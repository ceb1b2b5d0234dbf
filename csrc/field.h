// The field in one kernel: hash grid (hashgrid.h), two bias-free heads with one hidden layer each,
// a density activation with the initial blob, and the density's normal. Nothing per sample is kept
// for the backward pass, which computes everything again.
//
// With e the encoding [E], J its Jacobian [E, 3] to the unit cube, and per head a first layer W1
// [64, E] and a second W2:
//   m      = W1d e > 0                       mask, without a derivative
//   g      = (m * W2d) W1d                   gradient of the raw density to e
//   raw    = g . e + bias(p)
//   density = activation(raw)
//   x      = (J^T g / (2 radius) + bias'(p)) slope(raw),    normal = -x / max(|x|, 1e-12)
//   features = W2f relu(W1f e)
// Backward, with r = dL/draw, v = dL/d(J^T g) and q = (W2f^T dL/dfeatures) masked by W1f e > 0:
//   dL/de  = r g + W1f^T q,    dL/dJ = g v^T
//   u      = dL/dg = r e + J v
//   S      = sum over samples of m u^T:   dL/dW1d[j] = W2d[j] S[j],   dL/dW2d[j] = W1d[j] . S[j]
//   dL/dW1f = sum q e^T,    dL/dW2f = sum dL/dfeatures relu(W1f e)^T
#pragma once

#include "hashgrid.h"

namespace dsd {

constexpr int kFieldHidden = 64;
constexpr int kFieldWidth = 32;  // columns of the encoding that fit; fewer are padded with zeros
constexpr float kFieldNormalEps = 1e-12f;
constexpr float kFieldSoftplusThreshold = 20.0f;  // linear above, as in torch
constexpr float kFieldTruncExpLimit = 15.0f;      // the derivative of trunc_exp stops growing here

enum FieldBias : int32_t { kBiasConstant = 0, kBiasCone = 1, kBiasGaussian = 2 };
enum FieldActivation : int32_t { kSoftplus = 0, kExp = 1, kTruncExp = 2 };

// Shapes: points [N, 3] in world units, table [entries, F], w1d and w1f [64, L F], w2d [1, 64],
// w2f [3, 64], density [N], features and normal [N, 3]; a gradient has the shape of what it belongs
// to. Null are: features and normal where they are not wanted, gradients of outputs that none came
// for. Points from *n_valid on get zeros, and have no part in gradients. The backward pass adds to
// the gradients of the table and of the weights.
struct FieldParams {
    int64_t n_points;
    int64_t n_before;        // points of earlier chunks, which count in *n_valid
    const int64_t* n_valid;  // where the points are; null: all are valid
    int32_t n_levels;
    int32_t n_active;
    int32_t n_features;
    int32_t half_table;  // table is float16 (CUDA only) and the heads run on tensor cores
    int32_t bias_kind;
    int32_t activation;
    float inverse_diameter;  // 1 / (2 radius)
    float bias_scale;        // height of the blob, or the constant
    float bias_std;
    const float* points;
    const void* table;
    const float* w1d;
    const float* w2d;
    const float* w1f;
    const float* w2f;
    float* density;
    float* features;
    float* normal;
    const float* grad_density;
    const float* grad_features;
    const float* grad_normal;
    float* grad_table;
    float* grad_w1d;
    float* grad_w2d;
    float* grad_w1f;
    float* grad_w2f;
    void* workspace;  // CUDA's backward pass: as many bytes as field_workspace says
    void* sums;       // there too: memory of field_sums, or null
    GridLevel levels[kGridMaxLevels];
};

DSD_HD int64_t field_count(const FieldParams& params) {
    if (params.n_valid == nullptr) return params.n_points;
    const int64_t n = *params.n_valid - params.n_before;
    return n < 0 ? 0 : n < params.n_points ? n : params.n_points;
}

// Zeros for a point that is not valid.
DSD_HD void field_clear(const FieldParams& params, int64_t i) {
    params.density[i] = 0.0f;
    for (int c = 0; c < 3; ++c) {
        if (params.features) params.features[3 * i + c] = 0.0f;
        if (params.normal) params.normal[3 * i + c] = 0.0f;
    }
}

// What is added to the raw density at p, and its gradient.
DSD_HD float field_bias(const FieldParams& params, float px, float py, float pz, float slope[3]) {
    slope[0] = slope[1] = slope[2] = 0.0f;
    if (params.bias_kind == kBiasConstant) return params.bias_scale;
    const float squared = px * px + py * py + pz * pz;
    float value, factor;
    if (params.bias_kind == kBiasCone) {
        const float distance = sqrtf(squared);
        value = params.bias_scale * (1.0f - distance / params.bias_std);
        // Zero, not NaN, at the tip of the cone.
        factor = -params.bias_scale / params.bias_std / fmaxf(distance, kFieldNormalEps);
    } else {
        const float variance = params.bias_std * params.bias_std;
        value = params.bias_scale * expf(-0.5f * squared / variance);
        factor = -value / variance;
    }
    slope[0] = factor * px;
    slope[1] = factor * py;
    slope[2] = factor * pz;
    return value;
}

// Density of a raw density, its slope and the slope's own derivative.
DSD_HD float field_activate(int32_t activation, float raw, float& slope, float& curvature) {
    if (activation == kSoftplus) {
        slope = 1.0f / (1.0f + expf(-raw));
        curvature = slope * (1.0f - slope);
        return raw > kFieldSoftplusThreshold ? raw : log1pf(expf(raw));
    }
    const float value = expf(raw);
    if (activation == kTruncExp && raw > kFieldTruncExpLimit) {
        slope = expf(kFieldTruncExpLimit);
        curvature = 0.0f;
    } else {
        slope = curvature = value;
    }
    return value;
}

// Writes the normal -x / max(|x|, eps) for x = gradient * slope.
DSD_HD void field_normal(const float gradient[3], float slope, float normal[3]) {
    const float x = gradient[0] * slope, y = gradient[1] * slope, z = gradient[2] * slope;
    const float scale = -1.0f / fmaxf(sqrtf(x * x + y * y + z * z), kFieldNormalEps);
    normal[0] = scale * x;
    normal[1] = scale * y;
    normal[2] = scale * z;
}

// dL/draw, and v = dL/d(J^T g), from the gradients of density and normal.
DSD_HD float field_head_gradient(const FieldParams& params, float raw, const float gradient[3],
                                 float grad_density, const float grad_normal[3], float v[3]) {
    float slope, curvature;
    field_activate(params.activation, raw, slope, curvature);
    const float x = gradient[0] * slope, y = gradient[1] * slope, z = gradient[2] * slope;
    const float norm = sqrtf(x * x + y * y + z * z);
    const float inverse = 1.0f / fmaxf(norm, kFieldNormalEps);
    // Below the threshold normalisation only scales.
    const float along =
        norm > kFieldNormalEps
            ? inverse * inverse * (x * grad_normal[0] + y * grad_normal[1] + z * grad_normal[2])
            : 0.0f;
    const float gx = -inverse * (grad_normal[0] - along * x);
    const float gy = -inverse * (grad_normal[1] - along * y);
    const float gz = -inverse * (grad_normal[2] - along * z);
    const float to_gradient = slope * params.inverse_diameter;
    v[0] = gx * to_gradient;
    v[1] = gy * to_gradient;
    v[2] = gz * to_gradient;
    // Length does not reach a unit vector: the slope matters below the threshold only.
    const float to_slope =
        norm > kFieldNormalEps ? 0.0f : gx * gradient[0] + gy * gradient[1] + gz * gradient[2];
    return grad_density * slope + to_slope * curvature;
}

// World to unit cube. One rounding, as torch.add(0.5, p, alpha=0.5 / radius) makes where it is
// vectorised: fine levels multiply what a second one would lose.
DSD_HD float field_unit(float p, float inverse_diameter) { return fmaf(p, inverse_diameter, 0.5f); }

// Results do not depend on n_threads; half_table is refused by the binding.
DSD_DECLARE_CPU(void field_fwd(const FieldParams&, int n_threads))
DSD_DECLARE_CPU(void field_bwd(const FieldParams&, int n_threads))

namespace cuda {
// Bytes that field_bwd needs, at an address that is a multiple of 16.
int64_t field_workspace(int64_t n_points, int n_active, int n_features, bool half_table,
                        bool normals);
// Bytes of `sums` for a table of so many numbers, at an address that is a multiple of 16.
int64_t field_sums(int64_t n_params);
// field_bwd adds with float atomics, so that its last bits change from run to run. With `sums` the
// table's gradient is summed in fixed point (fixed_sums.cuh) and those of the weights in one order:
// the same samples give the same bits, whatever room there is behind them.
void field_fwd(const FieldParams&, void* stream);
void field_bwd(const FieldParams&, void* stream);
}  // namespace cuda

}  // namespace dsd
