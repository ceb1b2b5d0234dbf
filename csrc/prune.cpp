#include "prune.h"

namespace dsd {

void prune_count(const PruneParams& p, int n_threads) {
    visibility(p.seen, n_threads);
    pack::count_rays(p.out, n_threads, [&](int64_t ray) {
        const int64_t end = composite::end_of(p.seen, ray);
        int count = 0;
        for (int64_t i = composite::begin_of(p.seen, ray); i < end; ++i) count += p.seen.visible[i];
        return count;
    });
}

void prune_write(const PruneParams& p, int n_threads) {
    pack::place_rays(p.out, n_threads, [&](int64_t ray, int64_t out, int64_t out_end) {
        for (int64_t i = composite::begin_of(p.seen, ray); out < out_end; ++i) {
            if (p.seen.visible[i] == 0) continue;
            pack::put(p.out, out++, ray, p.seen.t_starts[i], p.seen.t_ends[i]);
        }
    });
}

}  // namespace dsd
