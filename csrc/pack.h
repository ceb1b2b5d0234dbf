// Packing: the samples counted on each ray find their places in arrays of a fixed capacity, without
// the host learning how many there are.
//
// Rays stand in groups of kGroup. An op writes each ray's count and each group's sum; pack_scan
// turns the sums into the place where each group begins; within a group the counts say where each
// ray begins. Places are in the order of rays and then of samples. Those at the capacity and beyond
// do not exist: a ray keeps its first samples, and later rays get none.
#pragma once

#include "common.h"
#include "parallel.h"

namespace dsd {

// Rays of a group: the threads of a CUDA block that packs it.
constexpr int kGroup = 256;

struct PackParams {
    int64_t n_rays;
    int64_t capacity;
    // Scratch.
    int* counts;     // [n_rays] samples of each ray
    int64_t* bases;  // [n_groups] samples of each group; after pack_scan of all groups before it
    int64_t* total;  // one number: samples of all rays
    // Results.
    int64_t* offsets;        // [n_rays + 1] where each ray begins, or null
    int64_t* n_dropped;      // one number: samples without a place, or null
    int64_t* ray_indices;    // [capacity], or null
    int32_t* ray_indices32;  // [capacity], if the above is null
    float* t_starts;         // [capacity]
    float* t_ends;           // [capacity]
};

namespace pack {

// One more than full groups: never none, and the end of the last ray is a place of the last group.
DSD_HD int64_t n_groups(int64_t n_rays) { return n_rays / kGroup + 1; }

DSD_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Puts a sample at place i.
DSD_HD void put(const PackParams& p, int64_t i, int64_t ray, float t_start, float t_end) {
    if (p.ray_indices != nullptr) {
        p.ray_indices[i] = ray;
    } else {
        p.ray_indices32[i] = static_cast<int32_t>(ray);
    }
    p.t_starts[i] = t_start;
    p.t_ends[i] = t_end;
}

// On the CPU: p.counts[ray] = count(ray) for all rays, then the scan.
template <class Count>
static inline void count_rays(const PackParams& p, int n_threads, const Count& count) {
    parallel_for(n_groups(p.n_rays), n_threads, [&](int64_t group) {
        const int64_t first = group * kGroup, last = smaller(first + kGroup, p.n_rays);
        int64_t sum = 0;
        for (int64_t ray = first; ray < last; ++ray) sum += p.counts[ray] = count(ray);
        p.bases[group] = sum;
    });
    int64_t total = 0;
    for (int64_t group = 0; group < n_groups(p.n_rays); ++group) {
        const int64_t sum = p.bases[group];
        p.bases[group] = total;
        total += sum;
    }
    *p.total = total;
}

// On the CPU: write(ray, begin, end) with the places of each ray, then all that is not of a ray.
template <class Write>
static inline void place_rays(const PackParams& p, int n_threads, const Write& write) {
    parallel_for(n_groups(p.n_rays), n_threads, [&](int64_t group) {
        const int64_t first = group * kGroup, last = smaller(first + kGroup, p.n_rays);
        int64_t before = p.bases[group];
        for (int64_t ray = first; ray < last; ++ray) {
            const int64_t begin = smaller(before, p.capacity);
            before += p.counts[ray];
            if (p.offsets != nullptr) p.offsets[ray] = begin;
            write(ray, begin, smaller(before, p.capacity));
        }
    });
    const int64_t end = smaller(*p.total, p.capacity);
    if (p.offsets != nullptr) p.offsets[p.n_rays] = end;
    if (p.n_dropped != nullptr) *p.n_dropped = *p.total - end;
    for (int64_t i = end; i < p.capacity; ++i) put(p, i, 0, 0.0f, 0.0f);
}

}  // namespace pack

namespace cuda {
// Turns the groups' sums in `bases` into the samples before each group, and writes the total.
void pack_scan(const PackParams& p, void* stream);
}  // namespace cuda

}  // namespace dsd
