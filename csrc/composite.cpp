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
}

void composite_bwd(const CompositeParams& p, const CompositeGrads& g, int n_threads) {
    parallel_chunks(p.n_rays, kRaysPerTask, n_threads, [&](int64_t begin, int64_t end) {
        DSD_CPU(composite_rays_bwd)(p, g, begin, end);
    });
}

void visibility(const VisibilityParams& p, int n_threads) {
    parallel_chunks(p.n_rays, kRaysPerTask, n_threads, [&](int64_t begin, int64_t end) {
        DSD_CPU(visibility_rays)(p, begin, end);
    });
}

}  // namespace dsd
