// Occupancy grid: each cell keeps a decaying maximum of the values seen in it; a cell is occupied
// above a threshold that follows the mean.
//
// A cell may be seen several times in one update. The largest value counts and the old one decays
// once, whatever the order: an update is deterministic on every backend.
#pragma once

#include <cmath>

#include "common.h"

namespace dsd {

struct OccupancyUpdateParams {
    float* occs;             // [n_cells] in and out
    const int64_t* indices;  // [n_values]
    const float* values;     // [n_values]
    float* peaks;            // [n_cells] scratch, -infinity on entry
    int64_t n_cells;
    int64_t n_values;
    float decay;
};

struct OccupancyThresholdParams {
    const float* occs;  // [n_cells]
    int64_t n_cells;    // at least 1
    float max_threshold;
    float* threshold;  // one number, out
    uint8_t* binary;   // [n_cells] out, 0 or 1
};

namespace occupancy {

// A value that is not finite says nothing about its cell; taken in, it would never decay. An index
// outside the grid is refused on the CPU before the launch and passed over here.
DSD_HD bool counts(const OccupancyUpdateParams& p, int64_t i) {
    return std::isfinite(p.values[i]) && p.indices[i] >= 0 && p.indices[i] < p.n_cells;
}

// A cell's new value; a peak of -infinity is that of a cell not seen. Written without fmaxf, which
// is a call on the CPU; a NaN of the past gives way all the same.
DSD_HD float updated(float occ, float peak, float decay) {
    const float decayed = occ * decay;
    const float seen = decayed > peak ? decayed : peak;
    return peak > -INFINITY ? seen : occ;
}

// min(mean, max_threshold); a mean of NaN stays visible.
DSD_HD float threshold(const OccupancyThresholdParams& p, double sum) {
    const float mean = static_cast<float>(sum / static_cast<double>(p.n_cells));
    return mean > p.max_threshold ? p.max_threshold : mean;
}

}  // namespace occupancy

void occupancy_update(const OccupancyUpdateParams& p, int n_threads);
void occupancy_threshold(const OccupancyThresholdParams& p, int n_threads);

namespace cuda {
void occupancy_update(const OccupancyUpdateParams& p, void* stream);
void occupancy_threshold(const OccupancyThresholdParams& p, void* stream);
}  // namespace cuda

}  // namespace dsd
