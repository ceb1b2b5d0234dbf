#include "rasterize.h"

#include <vector>

#include "parallel.h"

namespace dsd {

namespace {

// Rows of pixels that one task draws: what it writes stays in a cache.
constexpr int kBandRows = 16;
constexpr int64_t kVertexChunk = 8192;
constexpr int64_t kFaceChunk = 8192;

using namespace raster;

// The faces that each band of each view has to draw, in order: those of band i of all bands from
// begins[i] to begins[i + 1].
struct Bands {
    int64_t n_bands;
    std::vector<int64_t> begins;
    std::vector<int32_t> faces;
};

// The corners of a face on the screen; false where there are none. `clipped` where it must be cut.
bool screen_corners(const RasterizeParams& p, int64_t view, int64_t face, int64_t* corners,
                    const ScreenVertex** screen, bool* clipped) {
    if (!corners_of(p, face, corners)) return false;
    *clipped = false;
    for (int k = 0; k < 3; ++k) {
        screen[k] = p.vertices + view * p.n_vertices + corners[k];
        *clipped = *clipped || screen[k]->x == kOutside;
    }
    return true;
}

// The pieces that clipping leaves of a face.
template <class F>
void for_pieces(const RasterizeParams& p, int64_t view, const int64_t* corners, const F& f) {
    int n_pieces = 1;
    for (int piece = 0; piece < n_pieces; ++piece) {
        const Triangle t = clipped_piece(p, view, corners, piece, &n_pieces);
        if (piece < n_pieces && !is_empty(t)) f(t);
    }
}

// The triangles of a face, whole or in pieces.
template <class F>
void for_triangles(const RasterizeParams& p, int64_t view, int64_t face, const F& f) {
    int64_t corners[3];
    const ScreenVertex* s[3];
    bool clipped;
    if (!screen_corners(p, view, face, corners, s, &clipped)) return;
    if (clipped) return for_pieces(p, view, corners, f);
    const Triangle t = triangle_of(*s[0], *s[1], *s[2], p.height, p.width);
    if (!is_empty(t)) f(t);
}

// First and last band of a face (last < first for none).
void bands_of(const RasterizeParams& p, int64_t view, int64_t face, int64_t* first, int64_t* last) {
    int64_t corners[3];
    const ScreenVertex* s[3];
    bool clipped;
    *first = p.height;
    *last = -1;
    if (!screen_corners(p, view, face, corners, s, &clipped)) return;
    const auto join = [&](const Triangle& t) {
        const int64_t from = t.y0 / kBandRows, to = (t.y1 - 1) / kBandRows;
        *first = from < *first ? from : *first;
        *last = to > *last ? to : *last;
    };
    if (clipped) return for_pieces(p, view, corners, join);
    Triangle t;
    set_bounds(t, *s[0], *s[1], *s[2], p.height, p.width);
    if (!is_empty(t)) join(t);
}

Bands sort_into_bands(const RasterizeParams& p, int n_threads) {
    Bands bands;
    const int64_t n_bands = (p.height + kBandRows - 1) / kBandRows;
    const int64_t n_chunks = 1 + p.n_faces / kFaceChunk;
    bands.n_bands = n_bands;
    // [view, band, chunk]: how many faces, and later where the next one goes.
    std::vector<int64_t> places(static_cast<size_t>(p.n_views * n_bands * n_chunks), 0);
    const auto for_faces = [&](const auto& place) {
        parallel_for(p.n_views * n_chunks, n_threads, [&](int64_t task) {
            const int64_t view = task / n_chunks, chunk = task % n_chunks;
            const int64_t end = (chunk + 1) * kFaceChunk;
            for (int64_t face = chunk * kFaceChunk; face < end && face < p.n_faces; ++face) {
                int64_t first, last;
                bands_of(p, view, face, &first, &last);
                for (int64_t band = first; band <= last; ++band) {
                    place(places[(view * n_bands + band) * n_chunks + chunk], face);
                }
            }
        });
    };
    for_faces([](int64_t& count, int64_t) { ++count; });
    bands.begins.reserve(static_cast<size_t>(p.n_views * n_bands + 1));
    int64_t total = 0;
    for (size_t i = 0; i < places.size(); ++i) {
        if (static_cast<int64_t>(i) % n_chunks == 0) bands.begins.push_back(total);
        const int64_t count = places[i];
        places[i] = total;
        total += count;
    }
    bands.begins.push_back(total);
    bands.faces.resize(static_cast<size_t>(total));
    for_faces([&](int64_t& next, int64_t face) {
        bands.faces[static_cast<size_t>(next++)] = static_cast<int32_t>(face);
    });
    return bands;
}

// Those samples of rows [y0, y1) that a triangle covers, and nothing nearer so far.
void draw(const RasterizeParams& p, const Triangle& t, int64_t view, int64_t face, int y0, int y1) {
    constexpr int kMostSamples = 8;
    int64_t offset[kMostSamples][3];
    for (int i = 0; i < p.n_samples; ++i) {
        for (int k = 0; k < 3; ++k) {
            offset[i][k] = static_cast<int64_t>(t.right[k]) * sample_x(p.n_samples, i) +
                           static_cast<int64_t>(t.down[k]) * sample_y(p.n_samples, i);
        }
    }
    for (int y = greater(t.y0, y0); y < lesser(t.y1, y1); ++y) {
        int64_t corner[3];
        for (int k = 0; k < 3; ++k) corner[k] = edge_at(t, k, t.x0 * kSubpixels, y * kSubpixels);
        int64_t* key = p.keys + ((view * p.height + y) * p.width + t.x0) * p.n_samples;
        for (int x = t.x0; x < t.x1; ++x) {
            for (int i = 0; i < p.n_samples; ++i, ++key) {
                const int64_t edge[3] = {corner[0] + offset[i][0], corner[1] + offset[i][1],
                                         corner[2] + offset[i][2]};
                if (!covers(t, edge)) continue;
                const int64_t mine = key_of(t, edge, face);
                if (mine < *key) *key = mine;
            }
            for (int k = 0; k < 3; ++k) {
                corner[k] += static_cast<int64_t>(t.right[k]) * kSubpixels;
            }
        }
    }
}

}  // namespace

void rasterize(const RasterizeParams& p, int n_threads) {
    parallel_chunks(p.n_views * p.n_vertices, kVertexChunk, n_threads, [&](int64_t i, int64_t end) {
        for (; i < end; ++i) {
            p.vertices[i] = project_or_mark(p, i / p.n_vertices, i % p.n_vertices);
        }
    });
    const Bands bands = sort_into_bands(p, n_threads);
    parallel_for(p.n_views * bands.n_bands, n_threads, [&](int64_t task) {
        const int64_t view = task / bands.n_bands;
        const int y0 = static_cast<int>(task % bands.n_bands) * kBandRows;
        const int y1 = lesser(y0 + kBandRows, p.height);
        for (int64_t i = bands.begins[task]; i < bands.begins[task + 1]; ++i) {
            const int64_t face = bands.faces[i];
            for_triangles(p, view, face,
                          [&](const Triangle& t) { draw(p, t, view, face, y0, y1); });
        }
        const int64_t row = static_cast<int64_t>(p.width) * p.n_samples;
        const int64_t begin = (view * p.height + y0) * row, end = (view * p.height + y1) * row;
        for (int64_t sample = begin; sample < end; ++sample) write_sample(p, sample);
    });
}

}  // namespace dsd
