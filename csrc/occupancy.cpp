#include "occupancy.h"

#include "parallel.h"

namespace dsd {

namespace {
constexpr int64_t kCellsPerTask = 1 << 16;
}  // namespace

void occupancy_update(const OccupancyUpdateParams& p, int n_threads) {
    // Serial: a few ten thousand comparisons into a table that fits the cache.
    for (int64_t i = 0; i < p.n_values; ++i) {
        if (!occupancy::counts(p, i)) continue;
        float& peak = p.peaks[p.indices[i]];
        peak = fmaxf(peak, p.values[i]);
    }
    parallel_chunks(p.n_cells, kCellsPerTask, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t cell = begin; cell < end; ++cell) occupancy::update_cell(p, cell);
    });
}

void occupancy_threshold(const OccupancyThresholdParams& p, int n_threads) {
    double sum = 0;  // serial: the order of the sum must not depend on the threads
    for (int64_t cell = 0; cell < p.n_cells; ++cell) sum += p.occs[cell];
    const float threshold = *p.threshold = occupancy::threshold(p, sum);
    parallel_chunks(p.n_cells, kCellsPerTask, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t cell = begin; cell < end; ++cell) p.binary[cell] = p.occs[cell] > threshold;
    });
}

}  // namespace dsd
