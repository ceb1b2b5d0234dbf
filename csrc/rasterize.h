// Rasterising: which triangle of a mesh each sample of a picture sees, and where on it.
//
// Vertices are snapped to 1/256 of a pixel, and edge functions are whole numbers: samples on an
// edge that two triangles share go to exactly one of them (the top-left rule), so that a closed
// surface has neither gaps nor samples twice. Depth is the affine z / w of the triangle at the
// sample; the nearest wins, and among equals the triangle that comes first. Every product and sum
// that decides is rounded on its own (no fused multiply-add): all backends and the pure-torch
// reference see the same triangles, bit for bit.
#pragma once

#include <cmath>

#include "common.h"

namespace dsd {

constexpr int kSubpixelBits = 8;
constexpr int kSubpixels = 1 << kSubpixelBits;

// Height and width of pictures: with the guard band, coordinates stay below 2^29 and their products
// far below 2^63.
constexpr int kMaxRasterSize = 1 << 14;

// Vertices may lie so many half pictures from the middle; what lies farther out is clipped.
constexpr double kGuardBand = 64.0;

// Clipping cuts off everything nearer to the plane of the eye than this w: there is nothing to
// divide by.
constexpr double kMinW = 0x1p-100;

// A triangle, cut by each of seven planes.
constexpr int kClipPlanes = 7;
constexpr int kMaxPolygon = 3 + kClipPlanes;
constexpr int kMaxPieces = kMaxPolygon - 2;

// The depth of a sample above the index of its triangle; this is farther than all of them.
constexpr int64_t kNoTriangle = INT64_MAX;

// A vertex on the screen, y down.
struct ScreenVertex {
    int32_t x, y;  // in subpixels; x is kOutside where triangles of this vertex must be clipped
    double z;      // in [-1, 1]
};
constexpr int32_t kOutside = INT32_MIN;

struct RasterizeParams {
    const float* positions;  // [n_views, n_vertices, 4] in clip space
    const int32_t* faces;    // [n_faces, 3]; a face with an index that is none is not seen
    int64_t n_views;
    int64_t n_vertices;
    int64_t n_faces;
    int32_t height;
    int32_t width;
    int32_t n_samples;       // of a pixel: 1, 4 or 8
    ScreenVertex* vertices;  // scratch [n_views, n_vertices]
    int64_t* keys;           // scratch [n_views, height, width, n_samples], kNoTriangle everywhere
    int64_t* queue;          // scratch on CUDA: 0, then room for [n_views * n_faces]
    int32_t* ids;            // [n_views, height, width, n_samples] faces, -1 where there is none
    float* weights;          // [n_views, height, width, n_samples, 3] of the face's corners
};

namespace raster {

// rasterize.cpp is compiled without contraction: on the host the plain operators round once each.
#if defined(__CUDA_ARCH__)
DSD_HD double mul(double a, double b) { return __dmul_rn(a, b); }
DSD_HD double add(double a, double b) { return __dadd_rn(a, b); }
DSD_HD double div(double a, double b) { return __ddiv_rn(a, b); }
#else
DSD_HD double mul(double a, double b) { return a * b; }
DSD_HD double add(double a, double b) { return a + b; }
DSD_HD double div(double a, double b) { return a / b; }
#endif

// Where the samples of a pixel lie, in subpixels from its upper left corner: its middle, or the
// patterns of Direct3D, in which no two samples share a row or a column.
DSD_HD int sample_x(int n_samples, int i) {
    constexpr int k4[4] = {96, 224, 32, 160};
    constexpr int k8[8] = {144, 112, 208, 80, 48, 16, 176, 240};
    return n_samples == 1 ? 128 : n_samples == 4 ? k4[i] : k8[i];
}
DSD_HD int sample_y(int n_samples, int i) {
    constexpr int k4[4] = {32, 96, 160, 224};
    constexpr int k8[8] = {80, 176, 144, 48, 208, 112, 240, 16};
    return n_samples == 1 ? 128 : n_samples == 4 ? k4[i] : k8[i];
}

struct ClipVertex {
    double x, y, z, w;
};

DSD_HD bool finite(const ClipVertex& v) {
    constexpr double most = 3.5e38;  // above all of float32
    return v.x > -most && v.x < most && v.y > -most && v.y < most && v.z > -most && v.z < most &&
           v.w > -most && v.w < most;
}

// Signed distance from a plane of the volume that is seen: positive inside.
DSD_HD double plane_distance(const ClipVertex& v, int plane) {
    switch (plane) {
        case 0:
            return add(v.w, -kMinW);
        case 1:
            return add(v.w, v.z);
        case 2:
            return add(v.w, -v.z);
        case 3:
            return add(mul(kGuardBand, v.w), -v.x);
        case 4:
            return add(mul(kGuardBand, v.w), v.x);
        case 5:
            return add(mul(kGuardBand, v.w), -v.y);
        default:
            return add(mul(kGuardBand, v.w), v.y);
    }
}

DSD_HD bool needs_clipping(const ClipVertex& v) {
    for (int plane = 0; plane < kClipPlanes; ++plane) {
        if (!(plane_distance(v, plane) >= 0.0)) return true;  // a NaN too
    }
    return false;
}

DSD_HD double clamped(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

// Of a vertex inside the volume, or cut to it.
DSD_HD ScreenVertex project(const ClipVertex& v, int height, int width) {
    constexpr double limit = 0x1p28;
    const double w = v.w > kMinW ? v.w : kMinW;
    const double right = add(mul(0.5, div(v.x, w)), 0.5);
    const double down = add(mul(-0.5, div(v.y, w)), 0.5);
    const double x = rint(mul(right, static_cast<double>(width) * kSubpixels));
    const double y = rint(mul(down, static_cast<double>(height) * kSubpixels));
    return {static_cast<int32_t>(clamped(x, -limit, limit)),
            static_cast<int32_t>(clamped(y, -limit, limit)), clamped(div(v.z, w), -1.0, 1.0)};
}

// A triangle that is ready to be asked for samples. Edge k lies opposite of corner k; its function
// is positive inside.
struct Triangle {
    int64_t edge[3];   // at the picture's upper left corner
    int32_t right[3];  // its change a subpixel
    int32_t down[3];
    int32_t bias[3];         // -1 where samples on the edge are not the triangle's, else 0
    int32_t x0, y0, x1, y1;  // pixels from which to which (not included) it may be seen
    double z[3];
    double inverse_area;
};

DSD_HD bool is_empty(const Triangle& t) { return t.x0 >= t.x1 || t.y0 >= t.y1; }

DSD_HD void set_edge(Triangle& t, int k, const ScreenVertex& from, const ScreenVertex& to) {
    const int32_t dx = to.x - from.x, dy = to.y - from.y;
    t.right[k] = -dy;
    t.down[k] = dx;
    t.edge[k] = static_cast<int64_t>(dy) * from.x - static_cast<int64_t>(dx) * from.y;
    // As if every sample lay a trifle to the right, and a trifle of that below: the top-left rule.
    t.bias[k] = dy < 0 || (dy == 0 && dx > 0) ? 0 : -1;
}

DSD_HD int32_t lesser(int32_t a, int32_t b) { return a < b ? a : b; }
DSD_HD int32_t greater(int32_t a, int32_t b) { return a > b ? a : b; }

// Sets the pixels that a triangle may be seen in.
DSD_HD void set_bounds(Triangle& t, const ScreenVertex& a, const ScreenVertex& b,
                       const ScreenVertex& c, int height, int width) {
    t.x0 = greater(lesser(lesser(a.x, b.x), c.x) >> kSubpixelBits, 0);
    t.y0 = greater(lesser(lesser(a.y, b.y), c.y) >> kSubpixelBits, 0);
    t.x1 = lesser((greater(greater(a.x, b.x), c.x) >> kSubpixelBits) + 1, width);
    t.y1 = lesser((greater(greater(a.y, b.y), c.y) >> kSubpixelBits) + 1, height);
}

// Seen from either side. Without an area it is empty.
DSD_HD Triangle triangle_of(const ScreenVertex& a, ScreenVertex b, ScreenVertex c, int height,
                            int width) {
    Triangle t;
    set_bounds(t, a, b, c, height, width);
    if (is_empty(t)) return t;
    int64_t area = static_cast<int64_t>(b.x - a.x) * (c.y - a.y) -
                   static_cast<int64_t>(b.y - a.y) * (c.x - a.x);
    if (area == 0) t.x1 = t.x0;
    if (area < 0) {
        const ScreenVertex swapped = b;
        b = c;
        c = swapped;
        area = -area;
    }
    set_edge(t, 0, b, c);
    set_edge(t, 1, c, a);
    set_edge(t, 2, a, b);
    t.z[0] = a.z;
    t.z[1] = b.z;
    t.z[2] = c.z;
    t.inverse_area = area == 0 ? 0.0 : div(1.0, static_cast<double>(area));
    return t;
}

DSD_HD int64_t edge_at(const Triangle& t, int k, int64_t x, int64_t y) {
    return t.edge[k] + t.right[k] * x + t.down[k] * y;
}

DSD_HD bool covers(const Triangle& t, const int64_t* edge) {
    // One of the three is negative, and so is what they have in common with it.
    return ((edge[0] + t.bias[0]) | (edge[1] + t.bias[1]) | (edge[2] + t.bias[2])) >= 0;
}

// By which the samples of triangles are compared: depth in 31 bits, then the face.
DSD_HD int64_t key_of(const Triangle& t, const int64_t* edge, int64_t face) {
    const double b = mul(static_cast<double>(edge[1]), t.inverse_area);
    const double c = mul(static_cast<double>(edge[2]), t.inverse_area);
    const double z = add(add(t.z[0], mul(b, add(t.z[1], -t.z[0]))), mul(c, add(t.z[2], -t.z[0])));
    const double depth = clamped(mul(add(z, 1.0), 0x1p30), 0.0, 0x1p31 - 1.0);
    return (static_cast<int64_t>(depth) << 32) | face;
}

DSD_HD ClipVertex vertex_of(const RasterizeParams& p, int64_t view, int64_t vertex) {
    const float* v = p.positions + 4 * (view * p.n_vertices + vertex);
    return {v[0], v[1], v[2], v[3]};
}

DSD_HD ScreenVertex project_or_mark(const RasterizeParams& p, int64_t view, int64_t vertex) {
    const ClipVertex v = vertex_of(p, view, vertex);
    if (needs_clipping(v)) return {kOutside, 0, 0.0};
    return project(v, p.height, p.width);
}

// Corners of a face; false where an index is none.
DSD_HD bool corners_of(const RasterizeParams& p, int64_t face, int64_t* corners) {
    bool exist = true;
    for (int k = 0; k < 3; ++k) {
        corners[k] = p.faces[3 * face + k];
        exist = exist && corners[k] >= 0 && corners[k] < p.n_vertices;
    }
    return exist;
}

// What the volume leaves of a triangle: a polygon of so many vertices, 0 for none. Where an edge
// leaves the volume is computed from its inner end to its outer one, so that both triangles of the
// edge find the same.
DSD_HD int clip(const ClipVertex* corners, ClipVertex* polygon) {
    ClipVertex other[kMaxPolygon];
    int n = 3;
    for (int k = 0; k < 3; ++k) {
        if (!finite(corners[k])) return 0;
        polygon[k] = corners[k];
    }
    for (int plane = 0; plane < kClipPlanes && n > 0; ++plane) {
        int kept = 0;
        for (int k = 0; k < n; ++k) {
            const ClipVertex& here = polygon[k];
            const ClipVertex& next = polygon[k + 1 < n ? k + 1 : 0];
            const double d = plane_distance(here, plane), d_next = plane_distance(next, plane);
            if (d >= 0.0 && kept < kMaxPolygon) other[kept++] = here;
            if ((d >= 0.0) == (d_next >= 0.0) || kept >= kMaxPolygon) continue;
            const ClipVertex& inner = d >= 0.0 ? here : next;
            const ClipVertex& outer = d >= 0.0 ? next : here;
            const double d_in = d >= 0.0 ? d : d_next, d_out = d >= 0.0 ? d_next : d;
            const double t = div(d_in, add(d_in, -d_out));
            other[kept++] = {add(inner.x, mul(t, add(outer.x, -inner.x))),
                             add(inner.y, mul(t, add(outer.y, -inner.y))),
                             add(inner.z, mul(t, add(outer.z, -inner.z))),
                             add(inner.w, mul(t, add(outer.w, -inner.w)))};
        }
        n = kept;
        for (int k = 0; k < n; ++k) polygon[k] = other[k];
    }
    return n < 3 ? 0 : n;
}

// Triangle number `piece` of the fan that clipping leaves of a face; empty where there is none.
// `n_pieces` is how many there are.
DSD_HD Triangle clipped_piece(const RasterizeParams& p, int64_t view, const int64_t* corners,
                              int piece, int* n_pieces) {
    ClipVertex polygon[kMaxPolygon];
    const ClipVertex triangle[3] = {vertex_of(p, view, corners[0]), vertex_of(p, view, corners[1]),
                                    vertex_of(p, view, corners[2])};
    const int n = clip(triangle, polygon);
    *n_pieces = n == 0 ? 0 : n - 2;
    if (piece >= *n_pieces) {
        Triangle none;
        none.x0 = none.x1 = none.y0 = none.y1 = 0;
        return none;
    }
    return triangle_of(project(polygon[0], p.height, p.width),
                       project(polygon[piece + 1], p.height, p.width),
                       project(polygon[piece + 2], p.height, p.width), p.height, p.width);
}

// Writes what a sample (its number among all of them) sees.
DSD_HD void write_sample(const RasterizeParams& p, int64_t sample) {
    const int64_t key = p.keys[sample];
    float* weights = p.weights + 3 * sample;
    if (key == kNoTriangle) {
        p.ids[sample] = -1;
        weights[0] = weights[1] = weights[2] = 0.0f;
        return;
    }
    const int64_t face = key & 0xffffffff, pixel = sample / p.n_samples;
    const int number = static_cast<int>(sample % p.n_samples);
    const int64_t row = pixel / p.width, view = row / p.height;
    const double x =
        static_cast<double>((pixel - row * p.width) * kSubpixels + sample_x(p.n_samples, number));
    const double y =
        static_cast<double>((row - view * p.height) * kSubpixels + sample_y(p.n_samples, number));
    const double sx = add(mul(x, div(2.0, static_cast<double>(p.width) * kSubpixels)), -1.0);
    const double sy = add(1.0, -mul(y, div(2.0, static_cast<double>(p.height) * kSubpixels)));
    int64_t corners[3];
    corners_of(p, face, corners);
    // In homogeneous coordinates, where perspective is exact and corners behind the eye are corners
    // like others (Olano and Greer 1997).
    double u[3], v[3];
    for (int k = 0; k < 3; ++k) {
        const ClipVertex at = vertex_of(p, view, corners[k]);
        u[k] = add(at.x, -mul(sx, at.w));
        v[k] = add(at.y, -mul(sy, at.w));
    }
    double part[3], sum = 0.0, positive = 0.0;
    for (int k = 0; k < 3; ++k) {
        const int i = k == 2 ? 0 : k + 1, j = k == 0 ? 2 : k - 1;
        part[k] = add(mul(u[i], v[j]), -mul(u[j], v[i]));
        sum = add(sum, part[k]);
    }
    // A sample lies in the snapped triangle, and up to a subpixel outside of the true one.
    for (int k = 0; k < 3; ++k) {
        part[k] = sum > 0.0 ? part[k] : -part[k];
        part[k] = part[k] > 0.0 ? part[k] : 0.0;
        positive = add(positive, part[k]);
    }
    p.ids[sample] = static_cast<int32_t>(face);
    for (int k = 0; k < 3; ++k) {
        weights[k] = positive > 0.0 ? static_cast<float>(div(part[k], positive)) : 1.0f / 3.0f;
    }
}

}  // namespace raster

void rasterize(const RasterizeParams& p, int n_threads);

namespace cuda { void rasterize(const RasterizeParams& p, void* stream); }

}  // namespace dsd
