#include "composite.h"

#include "composite_rays.h"
#include "parallel.h"

namespace dsd {

namespace {
// Rays a task. One ray is never cut, so the order of its sums does not depend on the threads.
constexpr int64_t kRaysPerTask = 64;
}  // namespace

void composite_fwd(const CompositeParams& p, int n_threads) {
    parallel_chunks(p.n_rays, kRaysPerTask, n_threads, [&](int64_t begin, int64_t end) {
        DSD_CPU(composite_rays_fwd)(p, begin, end);
    });
    for (int64_t i = composite::end_of_all(p); i < p.n_samples; ++i) p.weights[i] = 0.0f;
}

void composite_bwd(const CompositeParams& p, const CompositeGrads& g, int n_threads) {
    parallel_chunks(p.n_rays, kRaysPerTask, n_threads, [&](int64_t begin, int64_t end) {
        DSD_CPU(composite_rays_bwd)(p, g, begin, end);
    });
    for (int64_t i = composite::end_of_all(p); i < p.n_samples; ++i) {
        g.sigmas[i] = 0.0f;
        for (int c = 0; c < 3; ++c) g.rgbs[3 * i + c] = 0.0f;
        for (int c = 0; c < 3 && composite::is_full(p); ++c) g.normals[3 * i + c] = 0.0f;
    }
}

void visibility(const VisibilityParams& p, int n_threads) {
    parallel_chunks(p.n_rays, kRaysPerTask, n_threads,
                    [&](int64_t begin, int64_t end) { DSD_CPU(visibility_rays)(p, begin, end); });
    for (int64_t i = composite::end_of_all(p); i < p.n_samples; ++i) p.visible[i] = 0;
}

}  // namespace dsd
