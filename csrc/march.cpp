#include "march.h"

namespace dsd {

void march_count(const MarchParams& p, int n_threads) {
    pack::count_rays(p.out, n_threads, [&](int64_t ray) { return march::count_ray(p, ray); });
}

void march_write(const MarchParams& p, int n_threads) {
    pack::place_rays(p.out, n_threads, [&](int64_t ray, int64_t begin, int64_t end) {
        march::write_ray(p, ray, begin, end, 0, 1);
    });
}

}  // namespace dsd
