#include "composite_rays.h"

#include "simd_math.h"

namespace dsd::DSD_ISA {
namespace {

// A ray's samples are handled in blocks, so that the compiler vectorises all but the sums along the
// ray. Blocks are filled up to whole vectors with samples of no thickness.
constexpr int kBlock = 128;
constexpr int kLanes = 8;

int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

int block_size(int64_t first, int64_t end) {
    return end - first < kBlock ? static_cast<int>(end - first) : kBlock;
}

template <class Params>
void load_thickness(const Params& p, int64_t first, int n, float* x) {
    for (int i = 0; i < n; ++i) x[i] = composite::thickness(p, first + i);
    for (int i = n; i < padded(n); ++i) x[i] = 0.0f;
}

// Optical depths in front of each sample of a block, or behind it; returns that behind the last.
// Each vector is summed on its own and then shifted: the chain of additions that wait for each
// other is shorter by the vector's width.
template <bool kBehind>
double optical_depths(const float* x, int n, double depth, float* depths) {
    for (int i = 0; i < padded(n); i += kLanes) {
        double sums[kLanes + 1] = {};
        for (int l = 0; l < kLanes; ++l) sums[l + 1] = sums[l] + x[i + l];
        for (int l = 0; l < kLanes; ++l) {
            depths[i + l] = static_cast<float>(depth + sums[l + kBehind]);
        }
        depth += sums[kLanes];
    }
    return depth;
}

// For each sample of a block the sum of a[j] b[j] over the samples behind it, `sum` included;
// returns the sum over all. In whole vectors, the last first.
double sums_behind(const float* a, const float* b, int n, double sum, double* behind) {
    for (int i = padded(n) - kLanes; i >= 0; i -= kLanes) {
        double sums[kLanes + 1] = {};
        for (int l = kLanes - 1; l >= 0; --l) {
            sums[l] = sums[l + 1] + static_cast<double>(a[i + l]) * b[i + l];
        }
        for (int l = 0; l < kLanes; ++l) behind[i + l] = sum + sums[l + 1];
        sum += sums[0];
    }
    return sum;
}

// x -> exp(-x), whole vectors.
void transmittances(float* x, int n) {
    for (int i = 0; i < padded(n); ++i) x[i] = simd::exp(-x[i]);
}

// alphas[i] = 1 - exp(-x[i]), whole vectors.
void alphas(const float* x, int n, float* alpha) {
    for (int i = 0; i < padded(n); ++i) alpha[i] = -simd::expm1(-x[i]);
}

float dot(const float* a, const float* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

template <bool kFull>
void composite_ray(const CompositeParams& p, int64_t ray) {
    const int64_t begin = composite::begin_of(p, ray), end = composite::end_of(p, ray);
    double optical_depth = 0, opacity = 0, depth = 0, orientation = 0;
    double red = 0, green = 0, blue = 0, nx = 0, ny = 0, nz = 0;
    for (int64_t first = begin; first < end; first += kBlock) {
        const int n = block_size(first, end);
        float x[kBlock], transmittance[kBlock], weight[kBlock];
        load_thickness(p, first, n, x);
        optical_depth = optical_depths<false>(x, n, optical_depth, transmittance);
        transmittances(transmittance, n);
        alphas(x, n, weight);
        for (int i = 0; i < padded(n); ++i) weight[i] *= transmittance[i];
        for (int i = 0; i < n; ++i) p.weights[first + i] = weight[i];
        const float* rgbs = p.rgbs + 3 * first;
#pragma omp simd reduction(+ : opacity, depth, red, green, blue)
        for (int i = 0; i < n; ++i) {
            const double w = weight[i];
            opacity += w;
            depth += w * composite::middle(p, first + i);
            red += w * rgbs[3 * i];
            green += w * rgbs[3 * i + 1];
            blue += w * rgbs[3 * i + 2];
        }
        if (kFull) {
            const float* normals = p.normals + 3 * first;
#pragma omp simd reduction(+ : nx, ny, nz)
            for (int i = 0; i < n; ++i) {
                const double w = weight[i];
                nx += w * normals[3 * i];
                ny += w * normals[3 * i + 1];
                nz += w * normals[3 * i + 2];
            }
            if (p.dirs != nullptr) {
                const float* dir = p.dirs + 3 * ray;
                const float dx = dir[0], dy = dir[1], dz = dir[2];
#pragma omp simd reduction(+ : orientation)
                for (int i = 0; i < n; ++i) {
                    const double away = composite::facing_away(
                        normals[3 * i] * dx + normals[3 * i + 1] * dy + normals[3 * i + 2] * dz);
                    orientation += weight[i] * away * away;
                }
            }
        }
    }
    p.opacity[ray] = static_cast<float>(opacity);
    p.depth[ray] = static_cast<float>(depth);
    const double color[3] = {red, green, blue}, normal[3] = {nx, ny, nz};
    for (int c = 0; c < 3; ++c) p.color[3 * ray + c] = static_cast<float>(color[c]);
    if (kFull) {
        for (int c = 0; c < 3; ++c) p.normal[3 * ray + c] = static_cast<float>(normal[c]);
        if (p.dirs != nullptr) p.orientation[ray] = static_cast<float>(orientation);
        const float mean = composite::mean_depth(p.opacity[ray], p.depth[ray]);
        double spread = 0;
#pragma omp simd reduction(+ : spread)
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
    float x[kBlock], weight[kBlock], after[kBlock], weight_grad[kBlock];
    // Transmittances behind each sample.
    for (int64_t first = begin; first < end; first += kBlock) {
        const int n = block_size(first, end);
        load_thickness(p, first, n, x);
        optical_depth = optical_depths<true>(x, n, optical_depth, after);
        transmittances(after, n);
        for (int i = 0; i < n; ++i) g.sigmas[first + i] = after[i];
    }
    const composite::RayGrad r = composite::load_ray_grad<kFull>(p, g, ray);
    // Added apart: a read that depends on a pointer being null vectorises badly.
    CompositeGrads without_weights = g;
    without_weights.weights = nullptr;
    double behind = 0;  // sum over the samples behind of dL/dw w
    double behind_each[kBlock];
    // From the last block, which may be a part, to the first.
    for (int64_t first = begin + (end - begin - 1) / kBlock * kBlock; first >= begin && begin < end;
         first -= kBlock) {
        const int n = block_size(first, end);
        load_thickness(p, first, n, x);
        alphas(x, n, weight);
        weight[0] *= first > begin ? g.sigmas[first - 1] : 1.0f;
        for (int i = 0; i < n; ++i) after[i] = g.sigmas[first + i];
        for (int i = 1; i < n; ++i) weight[i] *= after[i - 1];
        for (int i = 0; i < n; ++i) {
            const int64_t at = first + i;
            float values = dot(r.color, p.rgbs + 3 * at);
            if (kFull) values += dot(r.normal, p.normals + 3 * at);
            weight_grad[i] = composite::weight_grad<kFull>(without_weights, r, at,
                                                           composite::middle(p, at), values);
        }
        if (g.weights != nullptr) {
            for (int i = 0; i < n; ++i) weight_grad[i] += g.weights[first + i];
        }
        for (int i = n; i < padded(n); ++i) weight_grad[i] = 0.0f;
        behind = sums_behind(weight_grad, weight, n, behind, behind_each);
        for (int i = 0; i < n; ++i) {
            const double x_grad = static_cast<double>(weight_grad[i]) * after[i] - behind_each[i];
            g.sigmas[first + i] =
                static_cast<float>(x_grad) * (p.t_ends[first + i] - p.t_starts[first + i]);
        }
        for (int i = 0; i < n; ++i) {
            const int64_t at = 3 * (first + i);
            for (int c = 0; c < 3; ++c) g.rgbs[at + c] = weight[i] * r.color[c];
            if (kFull) {
                for (int c = 0; c < 3; ++c) g.normals[at + c] = weight[i] * r.normal[c];
            }
            if (kFull && r.orientation != 0.0f) {
                const float away =
                    composite::orientation_grad(r, weight[i], dot(p.normals + at, r.dir));
                for (int c = 0; c < 3; ++c) g.normals[at + c] += away * r.dir[c];
            }
        }
    }
}

}  // namespace

void composite_rays_fwd(const CompositeParams& p, int64_t begin, int64_t end) {
    if (composite::is_full(p)) {
        for (int64_t ray = begin; ray < end; ++ray) composite_ray<true>(p, ray);
    } else {
        for (int64_t ray = begin; ray < end; ++ray) composite_ray<false>(p, ray);
    }
}

void composite_rays_bwd(const CompositeParams& p, const CompositeGrads& g, int64_t begin,
                        int64_t end) {
    if (composite::is_full(p)) {
        for (int64_t ray = begin; ray < end; ++ray) composite_ray_bwd<true>(p, g, ray);
    } else {
        for (int64_t ray = begin; ray < end; ++ray) composite_ray_bwd<false>(p, g, ray);
    }
}

void visibility_rays(const VisibilityParams& p, int64_t begin, int64_t end) {
    for (int64_t ray = begin; ray < end; ++ray) {
        double optical_depth = 0;
        const int64_t end = composite::end_of(p, ray);
        for (int64_t first = composite::begin_of(p, ray); first < end; first += kBlock) {
            const int n = block_size(first, end);
            float x[kBlock], transmittance[kBlock], alpha[kBlock];
            load_thickness(p, first, n, x);
            optical_depth = optical_depths<false>(x, n, optical_depth, transmittance);
            transmittances(transmittance, n);
            alphas(x, n, alpha);
            // Bytes may alias anything, the parameters too: all is read beforehand.
            uint8_t* visible = p.visible + first;
            const float least_alpha = *p.alpha_threshold;
            const float least_transmittance = p.transmittance_threshold;
            for (int i = 0; i < n; ++i) {
                const bool near = transmittance[i] >= least_transmittance;
                visible[i] = (near && alpha[i] >= least_alpha) ? 1 : 0;
            }
        }
    }
}

}  // namespace dsd::DSD_ISA
