// The CPU kernels of csrc/composite.h, compiled once per instruction set: each does a range of
// rays.
#pragma once

#include "composite.h"

namespace dsd {

DSD_DECLARE_CPU(void composite_rays_fwd(const CompositeParams& p, int64_t begin, int64_t end))
DSD_DECLARE_CPU(void composite_rays_bwd(const CompositeParams& p, const CompositeGrads& g,
                                        int64_t begin, int64_t end))
DSD_DECLARE_CPU(void visibility_rays(const VisibilityParams& p, int64_t begin, int64_t end))

}  // namespace dsd
