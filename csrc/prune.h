// Pruning: the visible ones of packed samples (composite.h), packed anew (pack.h).
#pragma once

#include "composite.h"
#include "pack.h"

namespace dsd {

struct PruneParams {
    VisibilityParams seen;  // its flags are scratch
    PackParams out;
};

// Flags the samples that can be seen and counts them: fills `visible` and the scratch of `out`.
void prune_count(const PruneParams& p, int n_threads);
// Writes the results of `out` from there.
void prune_write(const PruneParams& p, int n_threads);

namespace cuda {
void prune_count(const PruneParams& p, void* stream);
void prune_write(const PruneParams& p, void* stream);
}  // namespace cuda

}  // namespace dsd
