// Real spherical harmonics of unit directions, bands 0 to 2 (9 values), in the order and with the
// signs of tiny-cuda-nn's "SphericalHarmonics" encoding of degree 3.
#pragma once

#include <cstdint>

#include "common.h"

namespace dsd {

constexpr int kShValues = 9;

struct ShParams {
    int64_t n_dirs;
    const float* dirs;    // [N, 3]
    float* y;             // [N, 9]
    const float* grad_y;  // [N, 9]
    float* grad_dirs;     // [N, 3]
};

DSD_HD void sh_values(float x, float y, float z, float out[kShValues]) {
    out[0] = 0.28209479177387814f;
    out[1] = -0.48860251190291987f * y;
    out[2] = 0.48860251190291987f * z;
    out[3] = -0.48860251190291987f * x;
    out[4] = 1.0925484305920792f * x * y;
    out[5] = -1.0925484305920792f * y * z;
    out[6] = 0.94617469575755997f * z * z - 0.31539156525251999f;
    out[7] = -1.0925484305920792f * x * z;
    out[8] = 0.54627421529603959f * (x * x - y * y);
}

// dL/d(x, y, z) of the polynomials above, for g = dL/dy.
DSD_HD void sh_gradient(float x, float y, float z, const float g[kShValues], float out[3]) {
    const float c1 = 0.48860251190291987f, c2 = 1.0925484305920792f;
    out[0] = -c1 * g[3] + c2 * (y * g[4] - z * g[7] + x * g[8]);
    out[1] = -c1 * g[1] + c2 * (x * g[4] - z * g[5] - y * g[8]);
    out[2] = c1 * g[2] + c2 * (1.7320508075688772f * z * g[6] - y * g[5] - x * g[7]);
}

void sh_fwd(const ShParams&, int n_threads);
void sh_bwd(const ShParams&, int n_threads);

namespace cuda {
void sh_fwd(const ShParams&, void* stream);
void sh_bwd(const ShParams&, void* stream);
}  // namespace cuda

}  // namespace dsd
