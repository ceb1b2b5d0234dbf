// Blocks of points on one level of the hash grid: what the CPU sources that read or write tables
// share. For sources compiled once per instruction set (common.h).
#pragma once

#include "hashgrid.h"

namespace dsd::DSD_ISA {
namespace {

// Points are handled in blocks, stored component by component, so that the compiler vectorises the
// arithmetic; only the gathers and scatters at 8 entries a point go one by one.
constexpr int kBlock = 64;

struct Cells {
    float fx[kBlock], fy[kBlock], fz[kBlock];
    uint32_t entry[8][kBlock];
};

struct Points {
    float x[kBlock], y[kBlock], z[kBlock];
};

void load_points(const float* x, int n, Points& points) {
    for (int i = 0; i < n; ++i) {
        points.x[i] = x[3 * i];
        points.y[i] = x[3 * i + 1];
        points.z[i] = x[3 * i + 2];
    }
}

// Fractions and corner entries of n points on one level.
void locate(const GridLevel& level, const Points& points, int n, Cells& cells) {
    const uint32_t resolution = level.resolution, size = level.size;
    const float scale = level.scale;
    uint32_t cx[kBlock], cy[kBlock], cz[kBlock];
    for (int i = 0; i < n; ++i) {
        grid_cell(points.x[i], scale, cx[i], cells.fx[i]);
        grid_cell(points.y[i], scale, cy[i], cells.fy[i]);
        grid_cell(points.z[i], scale, cz[i], cells.fz[i]);
    }
    for (uint32_t c = 0; c < 8; ++c) {
        const uint32_t dx = c & 1, dy = c >> 1 & 1, dz = c >> 2 & 1;
        uint32_t* entry = cells.entry[c];
        if (level.hashed) {
            for (int i = 0; i < n; ++i) {
                entry[i] = grid_entry_hashed(size, cx[i] + dx, cy[i] + dy, cz[i] + dz);
            }
            continue;
        }
        for (int i = 0; i < n; ++i) {
            entry[i] = grid_entry_dense(resolution, cx[i] + dx, cy[i] + dy, cz[i] + dz);
        }
        // Apart from the loop above, because a division would keep it from being vectorised.
        for (int i = 0; i < n; ++i) entry[i] = grid_entry_wrap(size, entry[i]);
    }
}

// Corner values v[corner][feature][point].
template <int F>
void gather(const float* table, const Cells& cells, int n, float (*v)[F][kBlock]) {
    for (int c = 0; c < 8; ++c) {
        for (int i = 0; i < n; ++i) {
            const float* value = table + static_cast<int64_t>(cells.entry[c][i]) * F;
            for (int f = 0; f < F; ++f) v[c][f][i] = value[f];
        }
    }
}

// A scatter waits for memory more than for anything else: ask early.
template <int F>
void prefetch_write(const float* grad_table, const Cells& cells, int n) {
    for (int c = 0; c < 8; ++c) {
        for (int i = 0; i < n; ++i) {
            DSD_PREFETCH_WRITE(grad_table + static_cast<int64_t>(cells.entry[c][i]) * F);
        }
    }
}

// Adds g[corner][feature][point]. Point by point: neighbours along a ray share corners, and corner
// by corner each addition would wait for the one before.
template <int F>
void add_corners(float* grad_table, const Cells& cells, const float (*g)[F][kBlock], int n) {
    for (int i = 0; i < n; ++i) {
        for (int c = 0; c < 8; ++c) {
            float* entry = grad_table + static_cast<int64_t>(cells.entry[c][i]) * F;
            for (int f = 0; f < F; ++f) entry[f] += g[c][f][i];
        }
    }
}

// Makes n_features a compile-time number, decltype(features)::value, inside call(features). The
// caller has checked that it is 2 or 4.
template <int F>
struct Features {
    static constexpr int value = F;
};
template <class Call>
void with_features(int n_features, const Call& call) {
    if (n_features == 2) {
        call(Features<2>{});
    } else {
        call(Features<4>{});
    }
}

}  // namespace
}  // namespace dsd::DSD_ISA
