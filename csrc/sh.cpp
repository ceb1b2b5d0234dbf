#include "sh.h"

#include "parallel.h"

namespace dsd {
namespace { constexpr int64_t kChunk = 8192; }  // namespace

void sh_fwd(const ShParams& params, int n_threads) {
    parallel_chunks(params.n_dirs, kChunk, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* d = params.dirs + 3 * i;
            sh_values(d[0], d[1], d[2], params.y + kShValues * i);
        }
    });
}

void sh_bwd(const ShParams& params, int n_threads) {
    parallel_chunks(params.n_dirs, kChunk, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* d = params.dirs + 3 * i;
            sh_gradient(d[0], d[1], d[2], params.grad_y + kShValues * i, params.grad_dirs + 3 * i);
        }
    });
}

}  // namespace dsd
