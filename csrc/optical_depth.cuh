// The optical depth along a ray whose samples a warp takes 32 at a time.
#pragma once

#include "composite.h"
#include "warp.cuh"

namespace dsd::cuda {

class OpticalDepth {
  public:
    // Takes this lane's thickness; gives the transmittance in front of its sample. All lanes call.
    __device__ __forceinline__ float advance(float thickness, int lane) {
        const float up_to = sum_up_to(thickness, lane);
        const float after = composite::transmittance(carry_.plus(up_to));
        float before = __shfl_up_sync(kAllLanes, after, 1);
        if (lane == 0) before = passed_;
        passed_ = __shfl_sync(kAllLanes, after, kWarp - 1);
        carry_.add(__shfl_sync(kAllLanes, up_to, kWarp - 1));
        return before;
    }

  private:
    LongSum carry_;        // of all samples before this group of 32
    float passed_ = 1.0f;  // the transmittance behind them
};

}  // namespace dsd::cuda
