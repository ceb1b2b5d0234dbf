// Marching at a constant step through the occupied cells of a grid in an axis-aligned box.
//
// A ray carries a lattice t_k = start + k * step. Interval [t_k, t_k+1) is a sample where its
// middle lies in an occupied cell. Every product and sum that decides is rounded on its own (no
// fused multiply-add), and the middle's cell alone decides, so that all backends and the pure-torch
// reference give the same samples, bit for bit.
#pragma once

#include <cmath>

#include "pack.h"

namespace dsd {

// float counts whole steps exactly up to here; a ray's lattice ends there.
constexpr int kMaxMarchSteps = 1 << 24;

// A ray that takes more steps from the box's entry to its exit has no samples: as good as standing
// still, it would walk for seconds. Bounds the work and the samples of a ray.
constexpr int kMaxRaySteps = 1 << 17;

// Runs of a ray that are kept from counting for writing; behind them a ray is walked again.
constexpr int kMarchRuns = 4;

// Samples begin <= k < end without a gap.
struct MarchRun {
    int begin;
    int end;
};

struct MarchParams {
    const float* origins;      // [n_rays, 3]
    const float* dirs;         // [n_rays, 3]
    const float* jitter;       // [n_rays] in steps, or null
    const uint8_t* occupancy;  // [n_cells, n_cells, n_cells], 1 where occupied
    int64_t n_rays;
    int n_cells;  // along each axis, at most 1024: a cell's flat index is an int
    float low[3];
    float high[3];
    float cells_per_unit[3];
    float cell_size[3];
    float step;
    float steps_per_unit;
    float near;
    float far;
    MarchRun* runs;  // [kMarchRuns, n_rays] the first runs of each ray; written by march_count
    PackParams out;
};

namespace march {

// march.cpp is compiled without contraction: on the host the plain operators round once each.
#if defined(__CUDA_ARCH__)
DSD_HD float mul(float a, float b) { return __fmul_rn(a, b); }
DSD_HD float add(float a, float b) { return __fadd_rn(a, b); }
#else
DSD_HD float mul(float a, float b) { return a * b; }
DSD_HD float add(float a, float b) { return a + b; }
#endif

// One ray and the place reached on it.
struct Walk {
    float origin[3];
    float dir[3];
    float inverse_dir[3];
    float start;
    int k;     // next lattice index to look at
    int last;  // the walk ends before this index
};

struct Cell {
    int i[3];
    int flat;  // -1 outside the box or beyond `far`
};

DSD_HD float lattice(const MarchParams& p, float start, int k) {
    return add(start, mul(static_cast<float>(k), p.step));
}

// As comparisons, for baseline x86 calls a library for fminf, fmaxf and floorf.
DSD_HD float smaller(float a, float b) { return a < b ? a : b; }
DSD_HD float larger(float a, float b) { return a > b ? a : b; }

// Rounds down to an index within the lattice; NaN gives 0.
DSD_HD int step_index(float k) {
    return static_cast<int>(smaller(larger(k, 0.0f), static_cast<float>(kMaxMarchSteps)));
}

// t of the first lattice point.
DSD_HD float lattice_start(const MarchParams& p, int64_t ray) {
    return p.jitter == nullptr ? p.near : add(p.near, mul(p.jitter[ray], p.step));
}

// The walk of a ray from the box's entry to its exit; a ray that is not finite, or that would take
// too many steps, has an empty one.
DSD_HD Walk begin_walk(const MarchParams& p, int64_t ray) {
    Walk w;
    w.start = lattice_start(p, ray);
    bool finite = std::isfinite(w.start), moving = false;
    float entry = p.near, exit = p.far;
    for (int a = 0; a < 3; ++a) {
        const float o = w.origin[a] = p.origins[3 * ray + a];
        const float d = w.dir[a] = p.dirs[3 * ray + a];
        w.inverse_dir[a] = 1.0f / d;
        finite = finite && std::isfinite(o) && std::isfinite(d);
        if (d == 0.0f) continue;  // whether the ray is inside along this axis, cell_at decides
        moving = true;
        const float t_low = (p.low[a] - o) / d, t_high = (p.high[a] - o) / d;
        entry = larger(entry, smaller(t_low, t_high));
        exit = smaller(exit, larger(t_low, t_high));
    }
    // Two steps of room at both ends, so that rounding here does not decide which samples exist;
    // the reference rounds alike, for a ray that grazes the box may round to its inside for ever.
    w.k = step_index((entry - w.start) / p.step - 2.0f);
    w.last = step_index((exit - w.start) / p.step + 3.0f);
    if (!finite || !moving || w.last - w.k > kMaxRaySteps) w.last = 0;
    return w;
}

// The cell that holds the middle of lattice interval k.
DSD_HD Cell cell_at(const MarchParams& p, const Walk& w, int k) {
    Cell cell{{0, 0, 0}, -1};
    const float middle = mul(0.5f, add(lattice(p, w.start, k), lattice(p, w.start, k + 1)));
    if (!(middle < p.far)) return cell;
    for (int a = 0; a < 3; ++a) {
        const float point = add(w.origin[a], mul(w.dir[a], middle));
        const float c = mul(add(point, -p.low[a]), p.cells_per_unit[a]);
        if (!(c >= 0.0f && c < static_cast<float>(p.n_cells))) return cell;
        cell.i[a] = static_cast<int>(c);
    }
    cell.flat = (cell.i[0] * p.n_cells + cell.i[1]) * p.n_cells + cell.i[2];
    return cell;
}

// An index after w.k up to which (exclusive) all indices lie in `cell`, the cell of w.k. Rounded
// coordinates are monotone in k, so equal cells at both ends mean equal cells everywhere between.
// The distance to the cell's far side only guesses where to look: a poor guess costs time and
// never a sample.
DSD_HD int end_in_cell(const MarchParams& p, const Walk& w, const Cell& cell) {
    float exit = p.far;
    for (int a = 0; a < 3; ++a) {
        if (w.dir[a] == 0.0f) continue;
        const int ahead = cell.i[a] + (w.dir[a] > 0.0f);
        const float side = p.low[a] + static_cast<float>(ahead) * p.cell_size[a];
        exit = smaller(exit, (side - w.origin[a]) * w.inverse_dir[a]);
    }
    int guess = step_index((exit - w.start) * p.steps_per_unit - 0.5f);
    if (guess >= w.last) guess = w.last - 1;
    for (int back = 1; guess > w.k && cell_at(p, w, guess).flat != cell.flat; back *= 2) {
        guess -= back;
    }
    return (guess > w.k ? guess : w.k) + 1;
}

// Finds the next run of samples, begin <= k < end, in one occupied cell; false when there is none.
DSD_HD bool next_run(const MarchParams& p, Walk& w, int& begin, int& end) {
    while (w.k < w.last) {
        const Cell cell = cell_at(p, w, w.k);
        begin = w.k;
        end = w.k = cell.flat < 0 ? w.k + 1 : end_in_cell(p, w, cell);
        if (cell.flat >= 0 && p.occupancy[cell.flat] != 0) return true;
    }
    return false;
}

// Gives the number of samples of a ray and writes its first runs.
DSD_HD int count_ray(const MarchParams& p, int64_t ray) {
    int count = 0, n_runs = 0;
    MarchRun run{0, 0};
    Walk walk = begin_walk(p, ray);
    for (int begin, end; next_run(p, walk, begin, end);) {
        count += end - begin;
        if (begin != run.end) {  // a gap since the run so far, which may be none yet
            if (run.begin < run.end && n_runs < kMarchRuns) p.runs[n_runs++ * p.n_rays + ray] = run;
            run.begin = begin;
        }
        run.end = end;
    }
    if (run.begin < run.end && n_runs < kMarchRuns) p.runs[n_runs * p.n_rays + ray] = run;
    return count;
}

// Writes samples begin <= k < end to places from `out` on and before `out_end`; lane l of n takes
// every n-th.
DSD_HD void write_run(const MarchParams& p, int64_t ray, float start, const MarchRun& run,
                      int64_t out, int64_t out_end, int lane, int n_lanes) {
    const int64_t n = pack::smaller(run.end - run.begin, out_end - out);
    for (int64_t i = lane; i < n; i += n_lanes) {
        const int k = run.begin + static_cast<int>(i);
        pack::put(p.out, out + i, ray, lattice(p, start, k), lattice(p, start, k + 1));
    }
}

// Writes the samples of a ray to places begin to end, as many as count_ray found or fewer; the
// lanes of a warp do it together.
DSD_HD void write_ray(const MarchParams& p, int64_t ray, int64_t begin, int64_t end, int lane,
                      int n_lanes) {
    if (begin >= end) return;
    const float start = lattice_start(p, ray);
    int64_t out = begin;
    MarchRun run{0, 0};
    for (int r = 0; r < kMarchRuns && out < end; ++r) {
        run = p.runs[r * p.n_rays + ray];
        write_run(p, ray, start, run, out, end, lane, n_lanes);
        out += run.end - run.begin;
    }
    if (out >= end) return;
    Walk walk = begin_walk(p, ray);
    walk.k = run.end;
    while (out < end && next_run(p, walk, run.begin, run.end)) {
        write_run(p, ray, start, run, out, end, lane, n_lanes);
        out += run.end - run.begin;
    }
}

}  // namespace march

// Counts the samples: fills the runs and the scratch of `out`.
void march_count(const MarchParams& p, int n_threads);
// Writes the results of `out` from there.
void march_write(const MarchParams& p, int n_threads);

namespace cuda {
void march_count(const MarchParams& p, void* stream);
void march_write(const MarchParams& p, void* stream);
}  // namespace cuda

}  // namespace dsd
