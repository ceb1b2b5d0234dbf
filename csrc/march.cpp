#include "march.h"

#include "parallel.h"

namespace dsd {

namespace {
// Rays a task: neighbours cost alike, and a task of them outweighs handing it out.
constexpr int64_t kRaysPerTask = 64;
}  // namespace

void march_count(const MarchParams& p, int n_threads) {
    parallel_chunks(p.n_rays, kRaysPerTask, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t ray = begin; ray < end; ++ray) march::count_ray(p, ray);
    });
}

void march_write(const MarchParams& p, int n_threads) {
    parallel_chunks(p.n_rays, kRaysPerTask, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t ray = begin; ray < end; ++ray) march::write_ray(p, ray);
    });
}

}  // namespace dsd
