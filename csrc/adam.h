// One step of Adam (Kingma and Ba 2014) over one flat parameter, in one pass:
//   g = grad / grad_scale
//   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,   t <- t + 1
//   param <- param - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// Where found_inf is 1, param, half, m, v and t stay as they are; the gradient is set to zero all
// the same if that is asked for, because the next one is added to it.
//
// Arithmetic is float; what depends on t alone is computed in double.
#pragma once

#include <cmath>

#include "common.h"

namespace dsd {

struct AdamParams {
    float* param;             // [n] in and out
    float* grad;              // [n] in, and out with zero_grad
    float* exp_avg;           // [n] in and out, m above
    float* exp_avg_sq;        // [n] in and out, v above
    uint16_t* half;           // [n] out: the new parameter as float16 bits, or null
    float* step;              // one number, in and out: steps taken
    const float* grad_scale;  // one number, or null for 1
    const float* found_inf;   // one number, or null for 0
    int64_t n;
    double lr;
    double beta1;
    double beta2;
    float eps;
    bool zero_grad;
};

namespace adam {

// What is the same for all elements.
struct Factors {
    float inverse_scale;
    float beta1, rest1;  // rest1 = 1 - beta1, as beta1 is given, before it is rounded to float
    float beta2, rest2;
    float step_size;          // lr / (1 - beta1^t)
    float inverse_bias_root;  // 1 / sqrt(1 - beta2^t)
    float eps;
};

// `count` is t after this step.
DSD_HD Factors factors(const AdamParams& p, float count) {
    const double bias1 = 1.0 - pow(p.beta1, static_cast<double>(count));
    const double bias2 = 1.0 - pow(p.beta2, static_cast<double>(count));
    Factors f;
    f.inverse_scale = p.grad_scale == nullptr ? 1.0f : 1.0f / *p.grad_scale;
    f.beta1 = static_cast<float>(p.beta1);
    f.rest1 = static_cast<float>(1.0 - p.beta1);
    f.beta2 = static_cast<float>(p.beta2);
    f.rest2 = static_cast<float>(1.0 - p.beta2);
    f.step_size = static_cast<float>(p.lr / bias1);
    f.inverse_bias_root = static_cast<float>(1.0 / sqrt(bias2));
    f.eps = p.eps;
    return f;
}

DSD_HD bool skipped(const AdamParams& p) { return p.found_inf != nullptr && *p.found_inf == 1.0f; }

// Moves one element.
DSD_HD void update(const Factors& f, float grad, float& param, float& m, float& v) {
    const float g = grad * f.inverse_scale;
    m = f.beta1 * m + f.rest1 * g;
    v = f.beta2 * v + f.rest2 * g * g;
    param -= f.step_size * m / (sqrtf(v) * f.inverse_bias_root + f.eps);
}

}  // namespace adam

DSD_DECLARE_CPU(void adam_step(const AdamParams& p, int n_threads))

namespace cuda { void adam_step(const AdamParams& p, void* stream); }  // namespace cuda

}  // namespace dsd
