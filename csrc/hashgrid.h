// Multiresolution hash-grid encoding (Müller et al. 2022, "Instant Neural Graphics Primitives"),
// with the table layout of tiny-cuda-nn, element for element.
//
// Level l has scale s_l and resolution R_l = ceil(s_l) + 1 (dsd_fast.ops.hashgrid.GridSpec computes
// both). A point x maps to p = x s_l + 0.5; its cell is floor(p), its value the trilinear mix of
// the cell's 8 corners. A corner's entry is x + y R + z R^2 where R^3 entries fit into the level's
// table, else a hash of the three numbers; either is taken modulo the level's size.
//
// With corner values v, fraction f = p - floor(p) and w_c = prod_d (c_d ? f_d : 1 - f_d):
//   value           y       = sum_c w_c v_c
//   Jacobian        J_d     = dy/dx_d = s_l sum_c (dw_c/df_d) v_c
//   table gradient  dL/dv_c = w_c dL/dy + s_l sum_d (dw_c/df_d) dL/dJ_d
//   input gradient  dL/dx_d = dL/dy J_d + sum_e dL/dJ_e d2y/(dx_d dx_e), zero for e = d
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

namespace dsd {

constexpr int kGridMaxLevels = 32;

struct GridLevel {
    float scale;
    uint32_t resolution;
    uint32_t size;    // entries; a power of two where hashed
    uint32_t hashed;  // 0 or 1
    int64_t offset;   // first entry in the table
};
static_assert(sizeof(GridLevel) == 24, "GridSpec.packed_levels packs it without padding");

// Shapes: x [N, 3], table [entries, F], y [N, L * F], jac [N, L * F, 3]; a gradient has the shape
// of what it belongs to. Optional pointers may be null where a launcher says so.
struct HashGridParams {
    int64_t n_points;
    int32_t n_levels;
    int32_t n_active;  // levels from here on give zeros and take no gradient
    int32_t n_features;
    int32_t half_table;  // table is float16 (hashgrid_fwd on CUDA alone)
    const float* x;
    const float* table;
    float* y;
    float* jac;
    const float* grad_y;
    const float* grad_jac;
    float* grad_table;
    float* grad_x;
    void* sums;  // hashgrid_bwd_table on CUDA: memory of hashgrid_sums, or null
    GridLevel levels[kGridMaxLevels];
};

// Cells further out than this are all read as this one: a float beyond it has no fraction left, and
// converting larger ones (or NaN) to an integer would be undefined.
constexpr float kGridFarCell = 1073741824.0f;  // 2^30

// The cell and the fraction of one coordinate.
DSD_HD void grid_cell(float x, float scale, uint32_t& cell, float& fraction) {
    // One rounding, as in tiny-cuda-nn: two could put a point on a face into the other cell.
    const float p = fmaf(x, scale, 0.5f);
    float whole = floorf(p);
    fraction = p - whole;
    // Written so that NaN ends at the far cell too; its fraction stays NaN and reaches the output.
    whole = whole > -kGridFarCell ? whole : -kGridFarCell;
    whole = whole < kGridFarCell ? whole : kGridFarCell;
    cell = static_cast<uint32_t>(static_cast<int32_t>(whole));
}

// Entry number before the modulo. Unsigned wrap-around is part of the format.
DSD_HD uint32_t grid_entry_dense(uint32_t resolution, uint32_t cx, uint32_t cy, uint32_t cz) {
    return cx + cy * resolution + cz * (resolution * resolution);
}
DSD_HD uint32_t grid_entry_hashed(uint32_t size, uint32_t cx, uint32_t cy, uint32_t cz) {
    return (cx ^ (cy * 2654435761u) ^ (cz * 805459861u)) & (size - 1u);
}
// The modulo of dense levels; inside the unit cube it only acts at the far faces.
DSD_HD uint32_t grid_entry_wrap(uint32_t size, uint32_t entry) {
    return entry < size ? entry : entry % size;
}

// A point's cell on one level. Corner c has offset (c & 1, c >> 1 & 1, c >> 2 & 1).
struct GridCell {
    uint32_t x, y, z;
    float fx, fy, fz;
    uint32_t entry[8];
};
// With kInside the point lies in the unit cube. Then there is no branch, so that the loads of
// several levels can be in flight: an entry before the modulo is less than two sizes.
template <bool kInside>
DSD_HD GridCell grid_locate(const GridLevel& level, float x, float y, float z) {
    GridCell cell;
    grid_cell(x, level.scale, cell.x, cell.fx);
    grid_cell(y, level.scale, cell.y, cell.fy);
    grid_cell(z, level.scale, cell.z, cell.fz);
    for (uint32_t c = 0; c < 8; ++c) {
        const uint32_t px = cell.x + (c & 1), py = cell.y + (c >> 1 & 1),
                       pz = cell.z + (c >> 2 & 1);
        const uint32_t hashed = grid_entry_hashed(level.size, px, py, pz);
        const uint32_t dense = grid_entry_dense(level.resolution, px, py, pz);
        const uint32_t wrapped = kInside ? dense - (dense >= level.size ? level.size : 0)
                                         : grid_entry_wrap(level.size, dense);
        cell.entry[c] = level.hashed ? hashed : wrapped;
    }
    return cell;
}

DSD_HD float mix(float a, float b, float f) { return a + f * (b - a); }

// Value of one feature from its 8 corner values.
DSD_HD float grid_value(const float v[8], float fx, float fy, float fz) {
    return mix(mix(mix(v[0], v[1], fx), mix(v[2], v[3], fx), fy),
               mix(mix(v[4], v[5], fx), mix(v[6], v[7], fx), fy), fz);
}

// Value and Jacobian row of one feature.
DSD_HD float grid_value_jacobian(const float v[8], float fx, float fy, float fz, float scale,
                                 float& jx, float& jy, float& jz) {
    const float a0 = mix(v[0], v[1], fx), a1 = mix(v[2], v[3], fx);
    const float a2 = mix(v[4], v[5], fx), a3 = mix(v[6], v[7], fx);
    const float b0 = mix(a0, a1, fy), b1 = mix(a2, a3, fy);
    jx = scale * mix(mix(v[1] - v[0], v[3] - v[2], fy), mix(v[5] - v[4], v[7] - v[6], fy), fz);
    jy = scale * mix(a1 - a0, a3 - a2, fz);
    jz = scale * (b1 - b0);
    return mix(b0, b1, fz);
}

// Gradient of one feature to its 8 corners, for gy = dL/dy and (gjx, gjy, gjz) = scale * dL/dJ.
// The sum over d factors by axis: along x the pair (1 - f, f) weighs the value and (-1, 1) the
// derivative, and only one axis at a time takes the derivative.
DSD_HD void grid_corner_gradients(float fx, float fy, float fz, float gy, float gjx, float gjy,
                                  float gjz, float g[8]) {
    const float ex = 1.0f - fx, ey = 1.0f - fy, ez = 1.0f - fz;
    // Along x: value coefficient times gy plus derivative coefficient times gjx.
    const float x0 = ex * gy - gjx, x1 = fx * gy + gjx;
    // Along y: the derivative along y meets the plain x weights.
    const float xy0 = ey * x0 - ex * gjy, xy1 = ey * x1 - fx * gjy;
    const float xy2 = fy * x0 + ex * gjy, xy3 = fy * x1 + fx * gjy;
    // Along z: the derivative along z meets the plain x and y weights.
    const float z0 = ex * ey * gjz, z1 = fx * ey * gjz, z2 = ex * fy * gjz, z3 = fx * fy * gjz;
    g[0] = ez * xy0 - z0;
    g[1] = ez * xy1 - z1;
    g[2] = ez * xy2 - z2;
    g[3] = ez * xy3 - z3;
    g[4] = fz * xy0 + z0;
    g[5] = fz * xy1 + z1;
    g[6] = fz * xy2 + z2;
    g[7] = fz * xy3 + z3;
}

// The same without a Jacobian gradient: g_c = w_c gy.
DSD_HD void grid_corner_weights(float fx, float fy, float fz, float gy, float g[8]) {
    const float x0 = (1.0f - fx) * gy, x1 = fx * gy;
    const float xy0 = (1.0f - fy) * x0, xy1 = (1.0f - fy) * x1, xy2 = fy * x0, xy3 = fy * x1;
    g[0] = (1.0f - fz) * xy0;
    g[1] = (1.0f - fz) * xy1;
    g[2] = (1.0f - fz) * xy2;
    g[3] = (1.0f - fz) * xy3;
    g[4] = fz * xy0;
    g[5] = fz * xy1;
    g[6] = fz * xy2;
    g[7] = fz * xy3;
}

// Adds one feature's part of dL/dx to out[3], for gy = dL/dy and gj = dL/dJ.
DSD_HD void grid_input_gradient(const float v[8], float fx, float fy, float fz, float scale,
                                float gy, float gjx, float gjy, float gjz, float out[3]) {
    float jx, jy, jz;
    grid_value_jacobian(v, fx, fy, fz, scale, jx, jy, jz);
    // Mixed second derivatives; a trilinear function has no pure ones.
    const float s2 = scale * scale;
    const float hxy = s2 * mix((v[3] - v[2]) - (v[1] - v[0]), (v[7] - v[6]) - (v[5] - v[4]), fz);
    const float hxz = s2 * mix((v[5] - v[4]) - (v[1] - v[0]), (v[7] - v[6]) - (v[3] - v[2]), fy);
    const float hyz = s2 * mix((v[6] - v[4]) - (v[2] - v[0]), (v[7] - v[5]) - (v[3] - v[1]), fx);
    out[0] += gy * jx + gjy * hxy + gjz * hxz;
    out[1] += gy * jy + gjx * hxy + gjz * hyz;
    out[2] += gy * jz + gjx * hxz + gjy * hyz;
}

// y and, where params.jac is not null, the Jacobian.
DSD_DECLARE_CPU(void hashgrid_fwd(const HashGridParams&, int n_threads))
// Adds to grad_table, which the caller has zeroed; grad_y or grad_jac may be null. Each level is
// summed by one thread in the order of the points, so the result does not depend on n_threads.
DSD_DECLARE_CPU(void hashgrid_bwd_table(const HashGridParams&, int n_threads))
// Writes grad_x; grad_y or grad_jac may be null.
DSD_DECLARE_CPU(void hashgrid_bwd_input(const HashGridParams&, int n_threads))

namespace cuda {
// As above. hashgrid_bwd_table adds with float atomics, so that its last bits change from run to
// run; with `sums` in fixed point (fixed_sums.cuh), and the same call gives the same bits.
void hashgrid_fwd(const HashGridParams&, void* stream);
void hashgrid_bwd_table(const HashGridParams&, void* stream);
void hashgrid_bwd_input(const HashGridParams&, void* stream);
// Bytes of `sums` for a table of so many numbers, at an address that is a multiple of 8.
int64_t hashgrid_sums(int64_t n_params);
}  // namespace cuda

}  // namespace dsd
