#include "adam.h"

#include "parallel.h"
#include "simd_math.h"

#if defined(_MSC_VER)
#define DSD_RESTRICT __restrict
#else
#define DSD_RESTRICT __restrict__
#endif

namespace dsd::DSD_ISA {
namespace {

// Elements a task takes: its five arrays fit the L2 cache, and small parameters start no thread.
constexpr int64_t kChunk = 1 << 14;

template <bool kHalf>
void update(const AdamParams& p, const adam::Factors& f, int64_t begin, int64_t end) {
    const float* DSD_RESTRICT grad = p.grad;
    float* DSD_RESTRICT param = p.param;
    float* DSD_RESTRICT m = p.exp_avg;
    float* DSD_RESTRICT v = p.exp_avg_sq;
    uint16_t* DSD_RESTRICT half = p.half;
    for (int64_t i = begin; i < end; ++i) {
        float new_param = param[i], new_m = m[i], new_v = v[i];
        adam::update(f, grad[i], new_param, new_m, new_v);
        param[i] = new_param;
        m[i] = new_m;
        v[i] = new_v;
    }
    // Apart from the loop above, which would not be vectorised with elements of two sizes.
    if (kHalf) {
        for (int64_t i = begin; i < end; ++i) half[i] = simd::half_bits(param[i]);
    }
}

}  // namespace

void adam_step(const AdamParams& p, int n_threads) {
    const bool skipped = adam::skipped(p);
    if (skipped && !p.zero_grad) return;
    const float count = *p.step + 1.0f;
    const adam::Factors f = adam::factors(p, count);
    parallel_chunks(p.n, kChunk, n_threads, [&](int64_t begin, int64_t end) {
        if (!skipped && p.half != nullptr) {
            update<true>(p, f, begin, end);
        } else if (!skipped) {
            update<false>(p, f, begin, end);
        }
        if (p.zero_grad) {
            for (int64_t i = begin; i < end; ++i) p.grad[i] = 0.0f;
        }
    });
    if (!skipped) *p.step = count;
}

}  // namespace dsd::DSD_ISA
