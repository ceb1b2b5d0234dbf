#include "rasterize.h"

#include "warp.cuh"

namespace dsd::cuda {

namespace {

using namespace raster;

// A triangle whose pixels hold at most so many samples is drawn by one thread, another one by
// warps.
constexpr int64_t kFewSamples = 64;

// Pixels of a warp.
constexpr int kTileWidth = 8;
constexpr int kTileHeight = kWarp / kTileWidth;

// Triangles that a block of the second kernel gets ready at a time, and blocks that share them.
constexpr int kBatch = 32;
constexpr int kSharers = 8;
constexpr unsigned int kLargeBlocks = 1024;

__device__ __forceinline__ void keep_nearest(int64_t* key, int64_t mine) {
    // Most that lose are known by a look; the others are compared for good.
    if (mine < *key) {
        atomicMin(reinterpret_cast<unsigned long long*>(key),
                  static_cast<unsigned long long>(mine));
    }
}

__device__ __forceinline__ void draw_pixel(const RasterizeParams& p, const Triangle& t,
                                           int64_t view, int64_t face, int x, int y) {
    int64_t* key = p.keys + ((view * p.height + y) * p.width + x) * p.n_samples;
    for (int i = 0; i < p.n_samples; ++i) {
        const int64_t sx = static_cast<int64_t>(x) * kSubpixels + sample_x(p.n_samples, i);
        const int64_t sy = static_cast<int64_t>(y) * kSubpixels + sample_y(p.n_samples, i);
        const int64_t edge[3] = {edge_at(t, 0, sx, sy), edge_at(t, 1, sx, sy),
                                 edge_at(t, 2, sx, sy)};
        if (covers(t, edge)) keep_nearest(key + i, key_of(t, edge, face));
    }
}

// Whether all of a tile lies outside of one edge: then at the corner where its function is largest.
__device__ __forceinline__ bool misses(const Triangle& t, int x, int y) {
    for (int k = 0; k < 3; ++k) {
        const int64_t cx = x + (t.right[k] > 0 ? kTileWidth : 0);
        const int64_t cy = y + (t.down[k] > 0 ? kTileHeight : 0);
        if (edge_at(t, k, cx * kSubpixels, cy * kSubpixels) < 0) return true;
    }
    return false;
}

// One thread projects one vertex of one view.
__global__ void __launch_bounds__(kBlock) project_kernel(const RasterizeParams p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (i >= p.n_views * p.n_vertices) return;
    p.vertices[i] = project_or_mark(p, i / p.n_vertices, i % p.n_vertices);
}

// The corners of a face on the screen; 0 for a face that is none, -1 where it must be clipped.
__device__ __forceinline__ int screen_corners(const RasterizeParams& p, int64_t view, int64_t face,
                                              int64_t* corners, ScreenVertex* screen) {
    if (!corners_of(p, face, corners)) return 0;
    bool inside = true;
    for (int k = 0; k < 3; ++k) {
        screen[k] = p.vertices[view * p.n_vertices + corners[k]];
        inside = inside && screen[k].x != kOutside;
    }
    return inside ? 1 : -1;
}

// One thread owns one face of one view: draws it if it is small, else puts it into the queue, in
// whatever order; the nearest of all triangles does not depend on it.
__global__ void __launch_bounds__(kBlock) small_kernel(const RasterizeParams p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    bool is_large = false;
    if (i < p.n_views * p.n_faces) {
        const int64_t view = i / p.n_faces, face = i - view * p.n_faces;
        int64_t corners[3];
        ScreenVertex s[3];
        const int found = screen_corners(p, view, face, corners, s);
        is_large = found < 0;
        if (found > 0) {
            const Triangle t = triangle_of(s[0], s[1], s[2], p.height, p.width);
            if (!is_empty(t)) {
                const int64_t n_pixels = static_cast<int64_t>(t.x1 - t.x0) * (t.y1 - t.y0);
                is_large = n_pixels * p.n_samples > kFewSamples;
                for (int y = t.y0; !is_large && y < t.y1; ++y) {
                    for (int x = t.x0; x < t.x1; ++x) draw_pixel(p, t, view, face, x, y);
                }
            }
        }
    }
    // One addition a warp.
    const unsigned int all = __ballot_sync(kAllLanes, is_large);
    if (all == 0) return;
    const int lane = lane_of_thread();
    unsigned long long place = 0;
    if (lane == 0) {
        place = atomicAdd(reinterpret_cast<unsigned long long*>(p.queue),
                          static_cast<unsigned long long>(__popc(all)));
    }
    place = __shfl_sync(kAllLanes, place, 0) + __popc(all & ((1u << lane) - 1));
    if (is_large) p.queue[1 + place] = i;
}

// A block goes through every gridDim.x-th batch of the queue; its warps, with those of the other
// blocks of the same blockIdx.x, share the tiles of each triangle. Thread i gets the i-th triangle
// of a batch ready, in shared memory.
__global__ void __launch_bounds__(kBlock) large_kernel(const RasterizeParams p) {
    __shared__ Triangle triangles[kBatch];
    __shared__ int64_t views[kBatch], faces[kBatch];
    __shared__ int most_pieces;
    const int64_t n_queued = p.queue[0];
    const int lane = lane_of_thread();
    const int64_t warp = static_cast<int64_t>(blockIdx.y) * (kBlock / kWarp) + threadIdx.x / kWarp;
    const int64_t n_warps = static_cast<int64_t>(gridDim.y) * (kBlock / kWarp);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kBatch;
    for (int64_t batch = static_cast<int64_t>(blockIdx.x) * kBatch; batch < n_queued;
         batch += stride) {
        const int n = static_cast<int>(n_queued - batch < kBatch ? n_queued - batch : kBatch);
        int n_pieces = 1;
        for (int piece = 0; piece < n_pieces; ++piece) {
            __syncthreads();  // the triangles before are drawn
            if (threadIdx.x == 0) most_pieces = 1;
            __syncthreads();
            if (threadIdx.x < n) {
                const int64_t i = p.queue[1 + batch + threadIdx.x], view = i / p.n_faces;
                int64_t corners[3];
                ScreenVertex s[3];
                views[threadIdx.x] = view;
                faces[threadIdx.x] = i - view * p.n_faces;
                Triangle t;
                if (screen_corners(p, view, i - view * p.n_faces, corners, s) < 0) {
                    int own_pieces;
                    t = clipped_piece(p, view, corners, piece, &own_pieces);
                    atomicMax(&most_pieces, own_pieces);
                } else {
                    t = triangle_of(s[0], s[1], s[2], p.height, p.width);
                    if (piece > 0) t.x1 = t.x0;
                }
                triangles[threadIdx.x] = t;
            }
            __syncthreads();
            n_pieces = most_pieces;
            for (int j = 0; j < n; ++j) {
                const Triangle& t = triangles[j];
                if (is_empty(t)) continue;
                const int64_t across = (t.x1 - t.x0 + kTileWidth - 1) / kTileWidth;
                const int64_t along = (t.y1 - t.y0 + kTileHeight - 1) / kTileHeight;
                for (int64_t tile = warp; tile < across * along; tile += n_warps) {
                    const int x = t.x0 + static_cast<int>(tile % across) * kTileWidth;
                    const int y = t.y0 + static_cast<int>(tile / across) * kTileHeight;
                    const int px = x + lane % kTileWidth, py = y + lane / kTileWidth;
                    if (misses(t, x, y) || px >= t.x1 || py >= t.y1) continue;
                    draw_pixel(p, t, views[j], faces[j], px, py);
                }
            }
        }
    }
}

// One thread writes one sample.
__global__ void __launch_bounds__(kBlock) write_kernel(const RasterizeParams p, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
    if (i < n) write_sample(p, i);
}

}  // namespace

void rasterize(const RasterizeParams& p, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const int64_t n_vertices = p.n_views * p.n_vertices, n_faces = p.n_views * p.n_faces;
    const int64_t n_samples = p.n_views * p.height * p.width * p.n_samples;
    if (n_vertices > 0 && n_faces > 0) {
        project_kernel<<<blocks_for(n_vertices), kBlock, 0, cuda_stream>>>(p);
        check(cudaGetLastError(), "rasterize: vertices");
        small_kernel<<<blocks_for(n_faces), kBlock, 0, cuda_stream>>>(p);
        check(cudaGetLastError(), "rasterize: small triangles");
        const int64_t batches = (n_faces + kBatch - 1) / kBatch;
        const unsigned int blocks =
            batches < kLargeBlocks ? static_cast<unsigned int>(batches) : kLargeBlocks;
        large_kernel<<<dim3(blocks, kSharers), kBlock, 0, cuda_stream>>>(p);
        check(cudaGetLastError(), "rasterize: large triangles");
    }
    write_kernel<<<blocks_for(n_samples), kBlock, 0, cuda_stream>>>(p, n_samples);
    check(cudaGetLastError(), "rasterize: samples");
}

}  // namespace dsd::cuda
