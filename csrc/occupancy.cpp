#include "occupancy.h"

#include <vector>

#include "parallel.h"

namespace dsd {

namespace {

constexpr int64_t kCellsPerTask = 1 << 16;
// Sums that grow side by side, so that no addition waits for the one before it.
constexpr int kLanes = 16;

// In an order that depends on the cells alone.
double sum_cells(const float* occs, int64_t n) {
    double lanes[kLanes] = {}, sum = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int l = 0; l < kLanes; ++l) lanes[l] += occs[i + l];
    }
    for (; i < n; ++i) sum += occs[i];
    for (int l = 0; l < kLanes; ++l) sum += lanes[l];
    return sum;
}

}  // namespace

void occupancy_update(const OccupancyUpdateParams& p, int n_threads) {
    // Serial: a few ten thousand comparisons into a table that fits the cache.
    for (int64_t i = 0; i < p.n_values; ++i) {
        if (!occupancy::counts(p, i)) continue;
        float& peak = p.peaks[p.indices[i]];
        if (p.values[i] > peak) peak = p.values[i];
    }
    parallel_chunks(p.n_cells, kCellsPerTask, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t cell = begin; cell < end; ++cell) {
            p.occs[cell] = occupancy::updated(p.occs[cell], p.peaks[cell], p.decay);
        }
    });
}

void occupancy_threshold(const OccupancyThresholdParams& p, int n_threads) {
    // One sum a task, added in the order of the cells: the threads change nothing.
    std::vector<double> sums((p.n_cells + kCellsPerTask - 1) / kCellsPerTask);
    parallel_chunks(p.n_cells, kCellsPerTask, n_threads, [&](int64_t begin, int64_t end) {
        sums[begin / kCellsPerTask] = sum_cells(p.occs + begin, end - begin);
    });
    double sum = 0;
    for (const double part : sums) sum += part;
    const float threshold = *p.threshold = occupancy::threshold(p, sum);
    parallel_chunks(p.n_cells, kCellsPerTask, n_threads, [&](int64_t begin, int64_t end) {
        // A byte may alias anything, the parameters and the threshold too.
        const float* occs = p.occs;
        const float least = threshold;
        uint8_t* binary = p.binary;
        for (int64_t cell = begin; cell < end; ++cell) binary[cell] = occs[cell] > least ? 1 : 0;
    });
}

}  // namespace dsd
