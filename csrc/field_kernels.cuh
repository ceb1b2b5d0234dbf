// The field's kernels and their launches, for a type of table, features a level and normals or not.
// Each type of table is compiled in a file of its own, at the same time: field.cu has the others,
// field_half.cu __half.
#pragma once

#include <type_traits>

#include "field.h"
#include "fixed_sums.cuh"
#include "hashgrid.cuh"

namespace dsd::cuda {
namespace {

// A block takes one sample a thread and tiles of samples in turn, until all are done: weights are
// read, and their gradients added to global memory, once a block. kBlockMax threads where shared
// memory allows, else half as many, and so on.
constexpr int kBlockMax = 128;
constexpr int kW = kFieldWidth;
constexpr int kH = kFieldHidden;

// The backward pass goes through chunks of samples, so that what lies between its two kernels stays
// small: 144 bytes a sample with normals, 16 levels and a half table.
constexpr int64_t kChunk = int64_t{1} << 18;
constexpr int kScatterBlock = 256;
// Levels that a block of the second kernel goes through. All blocks do the same levels at about the
// same time: their part of the table's gradient stays in the L2 cache.
constexpr int kScatterLevels = 4;
// Rows of floats then end at a multiple of 16 bytes.
__host__ __device__ constexpr int64_t round_up_to_4(int64_t n) { return (n + 3) / 4 * 4; }

// Sums of weight gradients that blocks leave side by side, where they are to be added in one order:
// at most so many blocks, each with all the weights.
constexpr int kMostPartials = 512;
constexpr int kPartial = 2 * kH * kW + 4 * kH;

// Where a block leaves its sums of weight gradients: with `sums` in its own row of the partials,
// else added to the gradients with atomics.
struct WeightTarget {
    float* w1d;
    float* w2d;
    float* w1f;
    float* w2f;
    bool is_own;

    __device__ explicit WeightTarget(const FieldParams& params)
        : w1d(params.grad_w1d),
          w2d(params.grad_w2d),
          w1f(params.grad_w1f),
          w2f(params.grad_w2f),
          is_own(params.sums != nullptr) {
        if (!is_own) return;
        const int n = kH * params.n_levels * params.n_features;
        w1d = static_cast<float*>(params.sums) + blockIdx.x * kPartial;
        w1f = w1d + n;
        w2d = w1f + n;
        w2f = w2d + kH;
    }

    // Once for each weight.
    __device__ __forceinline__ void add(float* to, float value) const {
        if (is_own) {
            *to = value;
        } else {
            atomicAdd(to, value);
        }
    }
};

// Behind the partials.
__host__ __device__ inline FixedSums table_sums(const FieldParams& params) {
    return FixedSums(static_cast<float*>(params.sums) + kMostPartials * kPartial);
}

// Between the kernels of the backward pass: for each level and sample dL/de of the level's
// features, in type T divided by the sample's largest, and with kNormals g as well; for each sample
// that largest, and with kNormals v (see field.h).
template <class T, int F, bool kNormals>
struct Between {
    static constexpr int kPack = kNormals ? 2 * F : F;
    static constexpr int kRow = kNormals ? 4 : 1;
    static constexpr int kBytes = kPack * sizeof(T);
    struct alignas(kBytes < 16 ? kBytes : 16) Pack {
        T value[kPack];
    };

    Pack* packs;  // [n_active, n]
    float* rows;  // [n, kRow]: the largest, v

    __device__ Between(void* memory, int64_t n)
        : packs(reinterpret_cast<Pack*>(static_cast<float*>(memory) + round_up_to_4(n) * kRow)),
          rows(static_cast<float*>(memory)) {}
};

// Columns of padding: rows of a tile then start in different banks, and at multiples of 16 bytes
// for half, as ldmatrix needs.
template <class T>
struct Pad;
template <>
struct Pad<__half> {
    static constexpr int value = 8;
};
template <>
struct Pad<float> {
    static constexpr int value = 1;
};

// Shared memory of a block of n samples. T is the type of the table, of the tiles and of the
// operands of the heads.
template <class T, bool kBackward, bool kNormals>
struct Tiles {
    static constexpr int kRow = kW + Pad<T>::value;   // a row of an [., E] tile
    static constexpr int kRowH = kH + Pad<T>::value;  // a row of an [., 64] tile
    static constexpr bool kG = kBackward || kNormals;
    // Tensor cores compute hidden values again and keep sums of weight gradients in registers.
    static constexpr bool kInMemory = kBackward && sizeof(T) == 4;

    T* w1;           // [128, kRow]: both first layers
    T* e;            // [n, kRow]: encoding
    T* g;            // [n, kRow]: gradient of raw to e; then u, each row divided by its largest
    T* ge;           // [n, kRow]: W1f^T q, each row divided by its largest dL/dfeatures
    T* h;            // [n, kRowH], if kInMemory: W1f e where positive, else 0
    T* jac;          // [E * 3, n]: Jacobian without the level's scale
    float* w2;       // [4, 64]: both second layers
    float* out;      // [n, 4]: raw density without bias, features
    float* q;        // [n, 3]: dL/dfeatures of a row, divided by the largest
    float* ratio;    // [n, 2]: rows' divisors of u and q, over the tile's
    float* largest;  // [2, warps]
    // If kInMemory:
    float* sum_s;    // [64, E]
    float* sum_w1f;  // [64, E]
    float* sum_w2f;  // [3, 64]
    uint2* mask;     // [n]

    // Sets the pointers and returns the bytes behind the last.
    __host__ __device__ size_t lay_out(char* base, int n) {
        size_t at = 0;
        const auto take = [&](auto*& pointer, size_t count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + at);
            at += (count * sizeof(*pointer) + 15) / 16 * 16;
        };
        take(w1, 2 * kH * kRow);
        take(e, n * kRow);
        take(g, kG ? n * kRow : 0);
        take(ge, kBackward ? n * kRow : 0);
        take(h, kInMemory ? n * kRowH : 0);
        take(jac, kNormals ? kW * 3 * n : 0);
        take(w2, 4 * kH);
        take(out, 4 * n);
        take(q, kBackward ? 3 * n : 0);
        take(ratio, kBackward ? 2 * n : 0);
        take(largest, kBackward ? 2 * kBlockMax / kWarp : 0);
        take(sum_s, kInMemory ? kH * kW : 0);
        take(sum_w1f, kInMemory ? kH * kW : 0);
        take(sum_w2f, kInMemory ? 3 * kH : 0);
        take(mask, kInMemory ? n : 0);
        return at;
    }
};

// Writes this thread's row of e and, with kNormals, its column of jac. Levels that are not active
// and padding read zero.
template <class T, int F, bool kInside, bool kBackward, bool kNormals>
__device__ __forceinline__ void encode_cells(const FieldParams& params,
                                             const Tiles<T, kBackward, kNormals>& tiles,
                                             const float (&unit)[3]) {
    const int n = blockDim.x, t = threadIdx.x;
    T* row = tiles.e + t * tiles.kRow;
    const T* table = static_cast<const T*>(params.table);
// Loads of several levels in flight: blocks are few, so threads must hide the latency.
#pragma unroll(!kInside ? 1 : sizeof(T) == 2 ? 4 : 2)
    for (int l = 0; l < params.n_active; ++l) {
        const GridLevel& level = params.levels[l];
        const GridCell cell = grid_locate<kInside>(level, unit[0], unit[1], unit[2]);
        const T* entries = table + level.offset * F;
        float v[F][8];
        Corners<T, F>(entries, cell).values(cell, v);
#pragma unroll
        for (int f = 0; f < F; ++f) {
            const int k = l * F + f;
            if (kNormals) {
                float jx, jy, jz;
                row[k] = grid_value_jacobian(v[f], cell.fx, cell.fy, cell.fz, 1.0f, jx, jy, jz);
                tiles.jac[(3 * k) * n + t] = jx;
                tiles.jac[(3 * k + 1) * n + t] = jy;
                tiles.jac[(3 * k + 2) * n + t] = jz;
            } else {
                row[k] = grid_value(v[f], cell.fx, cell.fy, cell.fz);
            }
        }
    }
    for (int k = params.n_active * F; k < kW; ++k) row[k] = 0.0f;
}

template <class T, int F, bool kBackward, bool kNormals>
__device__ __forceinline__ void encode(const FieldParams& params,
                                       const Tiles<T, kBackward, kNormals>& tiles,
                                       const float (&unit)[3]) {
    if (__all_sync(~0u, is_inside(unit))) {
        encode_cells<T, F, true>(params, tiles, unit);
    } else {
        encode_cells<T, F, false>(params, tiles, unit);
    }
}

// ---- heads in float32 ---------------------------------------------------------------------------

// Both heads for this thread's sample: raw and features into out; g; and for the backward pass ge,
// h and the mask.
template <bool kBackward, bool kNormals>
__device__ __forceinline__ void heads(const Tiles<float, kBackward, kNormals>& tiles,
                                      bool features) {
    constexpr int kRow = Tiles<float, kBackward, kNormals>::kRow;
    constexpr int kRowH = Tiles<float, kBackward, kNormals>::kRowH;
    constexpr bool kG = Tiles<float, kBackward, kNormals>::kG;
    const int t = threadIdx.x;
    float e[kW], sum[kW] = {};
#pragma unroll
    for (int k = 0; k < kW; ++k) e[k] = tiles.e[t * kRow + k];
    float raw = 0.0f, y[3] = {};
    uint2 mask = make_uint2(0, 0);
    for (int j = 0; j < kH; ++j) {
        const float* w = tiles.w1 + j * kRow;
        float p = 0.0f;
#pragma unroll
        for (int k = 0; k < kW; ++k) p += w[k] * e[k];
        const float m = p > 0.0f ? tiles.w2[j] : 0.0f;
        raw += m * p;
        if (p > 0.0f) (j < 32 ? mask.x : mask.y) |= 1u << (j & 31);
        if (kG) {
#pragma unroll
            for (int k = 0; k < kW; ++k) sum[k] += m * w[k];
        }
    }
    if (kG) {
#pragma unroll
        for (int k = 0; k < kW; ++k) tiles.g[t * kRow + k] = sum[k], sum[k] = 0.0f;
    }
    if (kBackward) tiles.mask[t] = mask;
    if (features) {
        for (int j = 0; j < kH; ++j) {
            const float* w = tiles.w1 + (kH + j) * kRow;
            float p = 0.0f, q = 0.0f;
#pragma unroll
            for (int k = 0; k < kW; ++k) p += w[k] * e[k];
            p = fmaxf(p, 0.0f);
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                const float w2 = tiles.w2[(c + 1) * kH + j];
                y[c] += w2 * p;
                if (kBackward) q += w2 * tiles.q[3 * t + c];
            }
            if (!kBackward) continue;
            tiles.h[t * kRowH + j] = p;
            q = p > 0.0f ? q : 0.0f;
#pragma unroll
            for (int k = 0; k < kW; ++k) sum[k] += q * w[k];
        }
    }
    if (kBackward) {
#pragma unroll
        for (int k = 0; k < kW; ++k) tiles.ge[t * kRow + k] = sum[k];
    }
    tiles.out[4 * t] = raw;
#pragma unroll
    for (int c = 0; c < 3; ++c) tiles.out[4 * t + 1 + c] = y[c];
}

// Sums of the weight gradients over a block's tiles: S (see field.h), dL/dW1f and dL/dW2f. In
// float32 they lie in shared memory and every sum has one thread.
template <class T, bool kNormals, int kParts>
struct WeightSums;

template <bool kNormals, int kParts>
struct WeightSums<float, kNormals, kParts> {
    using Tile = Tiles<float, true, kNormals>;

    __device__ __forceinline__ void add(const Tile& tiles, bool features, float scale_u,
                                        float scale_q) {
        constexpr int kRow = Tile::kRow, kRowH = Tile::kRowH;
        const int n = blockDim.x;
        for (int i = threadIdx.x; i < kH * kW; i += n) {
            const int j = i / kW, k = i % kW;
            float s = 0.0f, w = 0.0f;
            for (int t = 0; t < n; ++t) {
                const uint2 mask = tiles.mask[t];
                if ((j < 32 ? mask.x : mask.y) >> (j & 31) & 1u) {
                    s += tiles.ratio[2 * t] * tiles.g[t * kRow + k];
                }
                if (features && tiles.h[t * kRowH + j] > 0.0f) {
                    float q = 0.0f;
#pragma unroll
                    for (int c = 0; c < 3; ++c)
                        q += tiles.w2[(c + 1) * kH + j] * tiles.q[3 * t + c];
                    w += q * tiles.ratio[2 * t + 1] * tiles.e[t * kRow + k];
                }
            }
            tiles.sum_s[i] += scale_u * s;
            tiles.sum_w1f[i] += scale_q * w;
        }
        for (int i = threadIdx.x; features && i < 3 * kH; i += n) {
            const int c = i / kH, j = i % kH;
            float w = 0.0f;
            for (int t = 0; t < n; ++t) {
                w += tiles.q[3 * t + c] * tiles.ratio[2 * t + 1] * tiles.h[t * kRowH + j];
            }
            tiles.sum_w2f[i] += scale_q * w;
        }
    }

    // Adds the sums to the gradients, or leaves them beside those of other blocks.
    __device__ __forceinline__ void flush(const FieldParams& params, const Tile& tiles,
                                          bool features) const {
        const int width = params.n_levels * params.n_features;
        const WeightTarget to(params);
        for (int i = threadIdx.x; i < kH * kW; i += blockDim.x) {
            const int j = i / kW, k = i % kW;
            if (k >= width) continue;
            to.add(to.w1d + j * width + k, tiles.w2[j] * tiles.sum_s[i]);
            if (features) to.add(to.w1f + j * width + k, tiles.sum_w1f[i]);
        }
        for (int j = threadIdx.x; j < kH; j += blockDim.x) {
            float sum = 0.0f;
            for (int k = 0; k < width; ++k) {
                sum += params.w1d[j * width + k] * tiles.sum_s[j * kW + k];
            }
            to.add(to.w2d + j, sum);
            for (int c = 0; features && c < 3; ++c) {
                to.add(to.w2f + c * kH + j, tiles.sum_w2f[c * kH + j]);
            }
        }
    }
};

// ---- heads on tensor cores ----------------------------------------------------------------------

__device__ __forceinline__ unsigned int pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned int*>(&pair);
}

// c[16, 8] += a[16, 16] b[16, 8] in the fragments of mma.m16n8k16. With lane = 4 r + s, c holds
// (r, 2s), (r, 2s + 1), (r + 8, 2s), (r + 8, 2s + 1); a holds the pairs of columns 2s at rows r and
// r + 8, then those 8 columns on; b holds the pairs of rows 2s and 2s + 8 in column r.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned int (&a)[4], unsigned int b0,
                                         unsigned int b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// The b fragment of a [16, 8] part of a tile whose rows are the multiplication's k.
__device__ __forceinline__ void load_b_rows(const __half* part, int row, unsigned int& b0,
                                            unsigned int& b1) {
    const int lane = threadIdx.x % kWarp;
    const auto at = static_cast<unsigned int>(__cvta_generic_to_shared(part + lane % 16 * row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b0), "=r"(b1)
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ unsigned int load_pair(const __half* at) {
    return *reinterpret_cast<const unsigned int*>(at);
}

// 16 hidden values c of 16 samples, from 16 rows of a first layer.
__device__ __forceinline__ void first_layer(const __half* w1, int row,
                                            const unsigned int (&a)[2][4], float (&c)[2][4]) {
    const int r = threadIdx.x % kWarp / 4, s = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[half][i] = 0.0f;
        const __half* w = w1 + (half * 8 + r) * row + 2 * s;
        multiply(c[half], a[0], load_pair(w), load_pair(w + 8));
        multiply(c[half], a[1], load_pair(w + 16), load_pair(w + 24));
    }
}

// As above; each warp takes its own 32 samples in two halves, so that no block barrier is needed.
template <bool kBackward, bool kNormals>
__device__ __forceinline__ void heads(const Tiles<__half, kBackward, kNormals>& tiles,
                                      bool features) {
    constexpr int kRow = Tiles<__half, kBackward, kNormals>::kRow;
    constexpr bool kG = Tiles<__half, kBackward, kNormals>::kG;
    const int r = threadIdx.x % kWarp / 4, s = threadIdx.x % 4;
    __syncwarp();
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
        const int sample = threadIdx.x / kWarp * kWarp + part * 16 + r;  // and sample + 8
        unsigned int a[2][4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const __half* e = tiles.e + sample * kRow + k * 16 + 2 * s;
            a[k][0] = load_pair(e);
            a[k][1] = load_pair(e + 8 * kRow);
            a[k][2] = load_pair(e + 8);
            a[k][3] = load_pair(e + 8 * kRow + 8);
        }
        float raw[2] = {}, y[2][3] = {};
        float sum[4][4] = {};
#pragma unroll
        for (int j = 0; j < kH; j += 16) {
            float c[2][4];
            first_layer(tiles.w1 + j * kRow, kRow, a, c);
            unsigned int m[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = j + half * 8 + 2 * s;
                const float2 w = *reinterpret_cast<const float2*>(tiles.w2 + column);
#pragma unroll
                for (int down = 0; down < 2; ++down) {
                    const float p0 = c[half][2 * down], p1 = c[half][2 * down + 1];
                    const float m0 = p0 > 0.0f ? w.x : 0.0f, m1 = p1 > 0.0f ? w.y : 0.0f;
                    raw[down] += m0 * p0 + m1 * p1;
                    m[2 * half + down] = pack(m0, m1);
                }
            }
            if constexpr (kG) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    unsigned int b0, b1;
                    load_b_rows(tiles.w1 + j * kRow + k * 8, kRow, b0, b1);
                    multiply(sum[k], m, b0, b1);
                }
            }
        }
        if (kG) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                __half* g = tiles.g + sample * kRow + k * 8 + 2 * s;
                *reinterpret_cast<unsigned int*>(g) = pack(sum[k][0], sum[k][1]);
                *reinterpret_cast<unsigned int*>(g + 8 * kRow) = pack(sum[k][2], sum[k][3]);
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[k][i] = 0.0f;
            }
        }
        if (features) {
            float q[2][3] = {};
            if (kBackward) {
#pragma unroll
                for (int i = 0; i < 6; ++i) {
                    q[i / 3][i % 3] = tiles.q[3 * (sample + i / 3 * 8) + i % 3];
                }
            }
#pragma unroll
            for (int j = 0; j < kH; j += 16) {
                float c[2][4];
                first_layer(tiles.w1 + (kH + j) * kRow, kRow, a, c);
                unsigned int m[4];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int column = j + half * 8 + 2 * s;
                    float2 w[3];
#pragma unroll
                    for (int o = 0; o < 3; ++o) {
                        w[o] = *reinterpret_cast<const float2*>(tiles.w2 + (o + 1) * kH + column);
                    }
#pragma unroll
                    for (int down = 0; down < 2; ++down) {
                        const float p0 = fmaxf(c[half][2 * down], 0.0f);
                        const float p1 = fmaxf(c[half][2 * down + 1], 0.0f);
                        if (!kBackward) {
#pragma unroll
                            for (int o = 0; o < 3; ++o) y[down][o] += w[o].x * p0 + w[o].y * p1;
                            continue;
                        }
                        float q0 = 0.0f, q1 = 0.0f;
#pragma unroll
                        for (int o = 0; o < 3; ++o) {
                            q0 += w[o].x * q[down][o];
                            q1 += w[o].y * q[down][o];
                        }
                        m[2 * half + down] = pack(p0 > 0.0f ? q0 : 0.0f, p1 > 0.0f ? q1 : 0.0f);
                    }
                }
                if constexpr (kBackward) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        unsigned int b0, b1;
                        load_b_rows(tiles.w1 + (kH + j) * kRow + k * 8, kRow, b0, b1);
                        multiply(sum[k], m, b0, b1);
                    }
                }
            }
        }
        if (kBackward) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                __half* ge = tiles.ge + sample * kRow + k * 8 + 2 * s;
                *reinterpret_cast<unsigned int*>(ge) = pack(sum[k][0], sum[k][1]);
                *reinterpret_cast<unsigned int*>(ge + 8 * kRow) = pack(sum[k][2], sum[k][3]);
            }
        }
        // A row's columns lie with four neighbouring lanes.
#pragma unroll
        for (int down = 0; down < 2; ++down) {
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                raw[down] += __shfl_xor_sync(~0u, raw[down], step);
                if constexpr (!kBackward) {
#pragma unroll
                    for (int o = 0; o < 3; ++o) {
                        y[down][o] += __shfl_xor_sync(~0u, y[down][o], step);
                    }
                }
            }
            if (s == 0) {
                const int row = sample + 8 * down;
                *reinterpret_cast<float4*>(tiles.out + 4 * row) =
                    make_float4(raw[down], y[down][0], y[down][1], y[down][2]);
            }
        }
    }
    __syncwarp();
}

// The a fragments of 16 rows of a first layer.
__device__ __forceinline__ void load_a(const __half* w1, int row, unsigned int (&a)[2][4]) {
    const int r = threadIdx.x % kWarp / 4, s = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const __half* w = w1 + r * row + k * 16 + 2 * s;
        a[k][0] = load_pair(w);
        a[k][1] = load_pair(w + 8 * row);
        a[k][2] = load_pair(w + 8);
        a[k][3] = load_pair(w + 8 * row + 8);
    }
}

// As above, samples as the multiplication's k. A warp has kParts times 16 neurons, whose sums stay
// in its registers; the warps of a block share all kH neurons.
template <bool kNormals, int kParts>
struct WeightSums<__half, kNormals, kParts> {
    using Tile = Tiles<__half, true, kNormals>;

    float s_[kParts][4][4] = {}, w1f_[kParts][4][4] = {}, w2f_[kParts][4] = {};

    __device__ __forceinline__ static int first_neuron(int part) {
        return (threadIdx.x / kWarp * kParts + part) * 16;
    }

    __device__ __forceinline__ void add(const Tile& tiles, bool features, float scale_u,
                                        float scale_q) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            add_part(tiles, features, scale_u, scale_q, part);
        }
    }

    __device__ __forceinline__ void add_part(const Tile& tiles, bool features, float scale_u,
                                             float scale_q, int part) {
        constexpr int kRow = Tile::kRow;
        const int r = threadIdx.x % kWarp / 4, s = threadIdx.x % 4;
        const int n = blockDim.x, j0 = first_neuron(part);
        unsigned int w1d[2][4], w1f[2][4];
        load_a(tiles.w1 + j0 * kRow, kRow, w1d);
        load_a(tiles.w1 + (kH + j0) * kRow, kRow, w1f);
        float w2[2][3];
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            w2[i / 3][i % 3] = tiles.w2[(i % 3 + 1) * kH + j0 + r + i / 3 * 8];
        }
        float sum_s[4][4] = {}, sum_w[4][4] = {}, sum_h[4] = {};
#pragma unroll 1
        for (int first = 0; first < n; first += 16) {
            unsigned int m[4], q[4] = {}, h[4] = {}, b[2] = {};
#pragma unroll
            for (int right = 0; right < 2; ++right) {
                const int t = first + right * 8 + 2 * s;  // and t + 1
                // Hidden values of neurons r, r + 8 for samples t, t + 1.
                const __half* e = tiles.e + (first + right * 8 + r) * kRow + 2 * s;
                const unsigned int e0 = load_pair(e), e1 = load_pair(e + 8);
                const unsigned int e2 = load_pair(e + 16), e3 = load_pair(e + 24);
                float p[4] = {};
                multiply(p, w1d[0], e0, e1);
                multiply(p, w1d[1], e2, e3);
#pragma unroll
                for (int down = 0; down < 2; ++down) {
                    m[2 * right + down] =
                        pack(p[2 * down] > 0.0f ? tiles.ratio[2 * t] : 0.0f,
                             p[2 * down + 1] > 0.0f ? tiles.ratio[2 * t + 2] : 0.0f);
                }
                if (!features) continue;
                float y[4] = {}, q_t[2][3];
                multiply(y, w1f[0], e0, e1);
                multiply(y, w1f[1], e2, e3);
#pragma unroll
                for (int i = 0; i < 6; ++i) {
                    q_t[i / 3][i % 3] = tiles.q[3 * t + i] * tiles.ratio[2 * (t + i / 3) + 1];
                }
#pragma unroll
                for (int down = 0; down < 2; ++down) {
                    float to_hidden[2] = {};
#pragma unroll
                    for (int i = 0; i < 6; ++i) {
                        to_hidden[i / 3] += w2[down][i % 3] * q_t[i / 3][i % 3];
                    }
                    const float y0 = fmaxf(y[2 * down], 0.0f), y1 = fmaxf(y[2 * down + 1], 0.0f);
                    q[2 * right + down] =
                        pack(y0 > 0.0f ? to_hidden[0] : 0.0f, y1 > 0.0f ? to_hidden[1] : 0.0f);
                    h[2 * right + down] = pack(y0, y1);
                }
                if (r < 3) {
                    b[right] = pack(r == 0   ? q_t[0][0]
                                    : r == 1 ? q_t[0][1]
                                             : q_t[0][2],
                                    r == 0   ? q_t[1][0]
                                    : r == 1 ? q_t[1][1]
                                             : q_t[1][2]);
                }
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                unsigned int b0, b1;
                load_b_rows(tiles.g + first * kRow + k * 8, kRow, b0, b1);
                multiply(sum_s[k], m, b0, b1);
                if (!features) continue;
                load_b_rows(tiles.e + first * kRow + k * 8, kRow, b0, b1);
                multiply(sum_w[k], q, b0, b1);
            }
            if (features) multiply(sum_h, h, b[0], b[1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                s_[part][k][i] += scale_u * sum_s[k][i];
                w1f_[part][k][i] += scale_q * sum_w[k][i];
            }
            w2f_[part][i] += scale_q * sum_h[i];
        }
    }

    __device__ __forceinline__ void flush(const FieldParams& params, const Tile& tiles,
                                          bool features) const {
        const int r = threadIdx.x % kWarp / 4, s = threadIdx.x % 4;
        const int width = params.n_levels * params.n_features;
        const WeightTarget to(params);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            float to_w2d[2] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int j = first_neuron(part) + r + i / 2 * 8, column = 2 * s + i % 2;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int at = j * width + k * 8 + column;
                    if (k * 8 + column >= width) continue;
                    to_w2d[i / 2] += params.w1d[at] * s_[part][k][i];
                    to.add(to.w1d + at, tiles.w2[j] * s_[part][k][i]);
                    if (features) to.add(to.w1f + at, w1f_[part][k][i]);
                }
                if (features && column < 3) {
                    to.add(to.w2f + column * kH + j, w2f_[part][i]);
                }
            }
#pragma unroll
            for (int down = 0; down < 2; ++down) {
                // The columns of a row lie with four neighbouring lanes.
                to_w2d[down] += __shfl_xor_sync(~0u, to_w2d[down], 1);
                to_w2d[down] += __shfl_xor_sync(~0u, to_w2d[down], 2);
                const int j = first_neuron(part) + r + 8 * down;
                if (s == 0) to.add(to.w2d + j, to_w2d[down]);
            }
        }
    }
};

// ---- kernels ------------------------------------------------------------------------------------

template <class T, bool kBackward, bool kNormals>
__device__ __forceinline__ void load_weights(const FieldParams& params,
                                             const Tiles<T, kBackward, kNormals>& tiles) {
    const int width = params.n_levels * params.n_features;
    for (int i = threadIdx.x; i < 2 * kH * kW; i += blockDim.x) {
        const int j = i / kW, k = i % kW;
        const float* w = j < kH ? params.w1d + j * width : params.w1f + (j - kH) * width;
        tiles.w1[j * tiles.kRow + k] = k < width ? w[k] : 0.0f;
    }
    for (int i = threadIdx.x; i < 4 * kH; i += blockDim.x) {
        tiles.w2[i] = i < kH ? params.w2d[i] : params.w2f[i - kH];
    }
    if (tiles.kInMemory) {
        for (int i = threadIdx.x; i < kH * kW; i += blockDim.x) {
            tiles.sum_s[i] = tiles.sum_w1f[i] = 0.0f;
        }
        for (int i = threadIdx.x; i < 3 * kH; i += blockDim.x) tiles.sum_w2f[i] = 0.0f;
    }
    __syncthreads();
}

// Adds J^T g / (2 radius) to gradient.
template <class T, int F, bool kBackward>
__device__ __forceinline__ void add_gradient(const FieldParams& params,
                                             const Tiles<T, kBackward, true>& tiles,
                                             float (&gradient)[3]) {
    const int n = blockDim.x, t = threadIdx.x;
    for (int l = 0; l < params.n_active; ++l) {
        const float scale = params.levels[l].scale * params.inverse_diameter;
#pragma unroll
        for (int f = 0; f < F; ++f) {
            const int k = l * F + f;
            const float g = scale * static_cast<float>(tiles.g[t * tiles.kRow + k]);
#pragma unroll
            for (int d = 0; d < 3; ++d) {
                gradient[d] += g * static_cast<float>(tiles.jac[(3 * k + d) * n + t]);
            }
        }
    }
}

// A block goes through tiles of blockDim.x samples, a thread gathers one sample's corners, and the
// heads run on the tile. Reads points, table and weights; writes density and what else is wanted.
template <class T, int F, bool kNormals>
__global__ void __launch_bounds__(kBlockMax, 4)
    field_fwd_kernel(const __grid_constant__ FieldParams params) {
    extern __shared__ __align__(16) char memory[];
    Tiles<T, false, kNormals> tiles;
    tiles.lay_out(memory, blockDim.x);
    load_weights(params, tiles);
    const int t = threadIdx.x;
    const int64_t n_valid = field_count(params);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x; first < params.n_points;
         first += stride) {
        const int64_t i = first + t;
        const bool valid = i < n_valid;
        if (first >= n_valid) {
            if (i < params.n_points) field_clear(params, i);
            continue;
        }
        float p[3] = {}, unit[3];
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            if (valid) p[d] = params.points[3 * i + d];
            unit[d] = field_unit(p[d], params.inverse_diameter);
        }
        encode<T, F>(params, tiles, unit);
        heads(tiles, params.features != nullptr);
        if (valid) {
            float gradient[3], slope, curvature;
            const float raw = tiles.out[4 * t] + field_bias(params, p[0], p[1], p[2], gradient);
            params.density[i] = field_activate(params.activation, raw, slope, curvature);
            if (params.features) {
#pragma unroll
                for (int c = 0; c < 3; ++c) params.features[3 * i + c] = tiles.out[4 * t + 1 + c];
            }
            if constexpr (kNormals) {
                add_gradient<T, F>(params, tiles, gradient);
                float normal[3];
                field_normal(gradient, slope, normal);
#pragma unroll
                for (int d = 0; d < 3; ++d) params.normal[3 * i + d] = normal[d];
            }
        } else if (i < params.n_points) {
            field_clear(params, i);
        }
        // The next tile's rows are written by their own threads, but read by the whole warp.
        __syncwarp();
    }
}

// u of one feature; see field.h.
template <class T, bool kNormals>
__device__ __forceinline__ float to_g(const Tiles<T, true, kNormals>& tiles, int k, float r,
                                      const float (&v)[3], float scale) {
    const int n = blockDim.x, t = threadIdx.x;
    float u = r * static_cast<float>(tiles.e[t * tiles.kRow + k]);
    if (kNormals) {
        float along = 0.0f;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            along += v[d] * static_cast<float>(tiles.jac[(3 * k + d) * n + t]);
        }
        u += scale * along;
    }
    return u;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// As the forward kernel, then: a thread writes what its sample's gradient to the table needs, and
// the block adds the tile to its sums of weight gradients, which go to global memory at the end. A
// block of the half kind has kBlockMax / kParts threads.
template <class T, int F, bool kNormals, int kParts>
__global__ void __launch_bounds__(kBlockMax / kParts, (sizeof(T) == 2 ? 3 : 1) * kParts)
    field_bwd_kernel(const __grid_constant__ FieldParams params) {
    extern __shared__ __align__(16) char memory[];
    Tiles<T, true, kNormals> tiles;
    tiles.lay_out(memory, blockDim.x);
    const Between<T, F, kNormals> between(params.workspace, params.n_points);
    load_weights(params, tiles);
    const int t = threadIdx.x, n_warps = blockDim.x / kWarp;
    const bool features = params.grad_features != nullptr;
    WeightSums<T, kNormals, kParts> sums;
    const int64_t n_valid = field_count(params);
    if (static_cast<int64_t>(blockIdx.x) * blockDim.x >= n_valid) return;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x; first < n_valid;
         first += stride) {
        const int64_t i = first + t;
        const bool valid = i < n_valid;
        float p[3] = {}, unit[3];
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            if (valid) p[d] = params.points[3 * i + d];
            unit[d] = field_unit(p[d], params.inverse_diameter);
        }
        encode<T, F>(params, tiles, unit);
        // Gradients may be far below what half can hold: rows are divided by their largest.
        float q[3] = {}, q_largest = 0.0f;
        if (features && valid) {
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                q[c] = params.grad_features[3 * i + c];
                q_largest = larger(q_largest, fabsf(q[c]));
            }
        }
#pragma unroll
        for (int c = 0; c < 3; ++c)
            tiles.q[3 * t + c] = q_largest != 0.0f ? q[c] / q_largest : 0.0f;
        heads(tiles, features);

        float gradient[3], v[3] = {}, grad_normal[3] = {}, r = 0.0f;
        const float raw = tiles.out[4 * t] + field_bias(params, p[0], p[1], p[2], gradient);
        if constexpr (kNormals) {
            add_gradient<T, F>(params, tiles, gradient);
#pragma unroll
            for (int d = 0; d < 3; ++d) {
                if (valid) grad_normal[d] = params.grad_normal[3 * i + d];
            }
        }
        const float grad_density = params.grad_density && valid ? params.grad_density[i] : 0.0f;
        r = field_head_gradient(params, raw, gradient, grad_density, grad_normal, v);
        if (!valid) r = v[0] = v[1] = v[2] = 0.0f;

        const auto to_e = [&](int k) {
            return r * static_cast<float>(tiles.g[t * tiles.kRow + k]) +
                   q_largest * static_cast<float>(tiles.ge[t * tiles.kRow + k]);
        };
        float u_largest = 0.0f, e_largest = 0.0f;
        for (int l = 0; l < params.n_active; ++l) {
#pragma unroll
            for (int k = l * F; k < l * F + F; ++k) {
                const float u = to_g(tiles, k, r, v, params.levels[l].scale);
                u_largest = larger(u_largest, fabsf(u));
                e_largest = larger(e_largest, fabsf(to_e(k)));
            }
        }
        const float u_inverse = u_largest != 0.0f ? 1.0f / u_largest : 0.0f;
        const float u_tile = warp_max(u_largest), q_tile = warp_max(q_largest);
        if (t % kWarp == 0) {
            tiles.largest[t / kWarp] = u_tile;
            tiles.largest[n_warps + t / kWarp] = q_tile;
        }
        __syncthreads();
        float scale_u = 0.0f, scale_q = 0.0f;
        for (int w = 0; w < n_warps; ++w) {
            scale_u = larger(scale_u, tiles.largest[w]);
            scale_q = larger(scale_q, tiles.largest[n_warps + w]);
        }
        tiles.ratio[2 * t] = scale_u != 0.0f ? u_largest / scale_u : 0.0f;
        tiles.ratio[2 * t + 1] = scale_q != 0.0f ? q_largest / scale_q : 0.0f;

        if (valid) {
            float* row = between.rows + i * between.kRow;
            if constexpr (kNormals) {
                *reinterpret_cast<float4*>(row) = make_float4(e_largest, v[0], v[1], v[2]);
            } else {
                *row = e_largest;
            }
        }
        const float e_inverse = e_largest != 0.0f ? 1.0f / e_largest : 0.0f;
        for (int l = 0; l < params.n_active; ++l) {
            typename Between<T, F, kNormals>::Pack pack;
#pragma unroll
            for (int f = 0; f < F; ++f) {
                const int k = l * F + f;
                T* g = tiles.g + t * tiles.kRow + k;
                pack.value[f] = e_inverse * to_e(k);
                if constexpr (kNormals) pack.value[F + f] = *g;
                *g = u_inverse * to_g(tiles, k, r, v, params.levels[l].scale);
            }
            if (valid) between.packs[l * params.n_points + i] = pack;
        }
        // Columns beyond the active levels: their encoding is zero, and so is u.
        for (int k = params.n_active * F; k < kW; ++k) tiles.g[t * tiles.kRow + k] = 0.0f;
        __syncthreads();
        sums.add(tiles, features, scale_u, scale_q);
        __syncthreads();
    }
    sums.flush(params, tiles, features);
}

// What a thread of the kernels below adds to the table: one sample's gradient.
template <class T, int F, bool kNormals>
struct ToTable {
    using Memory = Between<T, F, kNormals>;

    const Memory between;
    const int64_t n_points, i;
    const bool valid;
    float unit[3], v[3] = {}, largest = 0.0f;
    bool any;  // whether there is something to add

    __device__ __forceinline__ ToTable(const FieldParams& params, int64_t n_valid)
        : between(params.workspace, params.n_points),
          n_points(params.n_points),
          i(static_cast<int64_t>(blockIdx.x) * kScatterBlock + threadIdx.x),
          valid(i < n_valid) {
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            unit[d] = field_unit(valid ? params.points[3 * i + d] : 0.0f, params.inverse_diameter);
        }
        if (valid) {
            if constexpr (kNormals) {
                const float4 row = *reinterpret_cast<const float4*>(between.rows + 4 * i);
                largest = row.x, v[0] = row.y, v[1] = row.z, v[2] = row.w;
            } else {
                largest = between.rows[i];
            }
        }
        any = largest != 0.0f || v[0] != 0.0f || v[1] != 0.0f || v[2] != 0.0f;
    }

    // Calls function(f, dL/dy, scale dL/dJ) for the features of a level.
    template <class Function>
    __device__ __forceinline__ void for_features(const GridLevel& level, int l,
                                                 Function function) const {
        typename Memory::Pack pack = {};
        if (valid) pack = between.packs[l * n_points + i];
#pragma unroll
        for (int f = 0; f < F; ++f) {
            const float to_e = largest * static_cast<float>(pack.value[f]);
            float g = 0.0f;
            if constexpr (kNormals) g = level.scale * static_cast<float>(pack.value[F + f]);
            function(f, to_e, g * v[0], g * v[1], g * v[2]);
        }
    }
};

// The second kernel of the backward pass: a thread adds one sample's gradient to 8 entries on each
// of a few levels (blockIdx.y): to grad_table, or with kFixed to the sums.
template <class T, int F, bool kNormals, bool kFixed>
__global__ void __launch_bounds__(kScatterBlock)
    field_scatter_kernel(const __grid_constant__ FieldParams params) {
    const int64_t n_valid = field_count(params);
    if (static_cast<int64_t>(blockIdx.x) * kScatterBlock >= n_valid) return;
    const ToTable<T, F, kNormals> to(params, n_valid);
    const auto add_levels = [&](auto inside) {
        const int first = blockIdx.y * kScatterLevels;
        const int last = min(first + kScatterLevels, params.n_active);
        for (int l = first; l < last; ++l) {
            const GridLevel& level = params.levels[l];
            const GridCell cell =
                grid_locate<decltype(inside)::value>(level, to.unit[0], to.unit[1], to.unit[2]);
            float corner[F][8];
            to.for_features(level, l, [&](int f, float gy, float gjx, float gjy, float gjz) {
                if constexpr (kNormals) {
                    grid_corner_gradients(cell.fx, cell.fy, cell.fz, gy, gjx, gjy, gjz, corner[f]);
                } else {
                    grid_corner_weights(cell.fx, cell.fy, cell.fz, gy, corner[f]);
                }
            });
            const bool has = combine_runs<F>(cell, corner, to.any);
            if constexpr (kFixed) {
                const FixedSums fixed = table_sums(params);
                const Scale units = to_units(fixed, l, n_valid);
                add_fixed<F>(fixed.sums + level.offset * F, cell, corner, units, has);
            } else if (has) {
                float* grad = params.grad_table + level.offset * F;
#pragma unroll
                for (int c = 0; c < 8; c += 2) add_pair<F>(grad, cell, corner, c);
            }
        }
    };
    if (__all_sync(~0u, is_inside(to.unit))) {
        add_levels(std::true_type());
    } else {
        add_levels(std::false_type());
    }
}

// With the threads of the kernel above: raises the levels' bounds to what the samples will add.
template <class T, int F, bool kNormals>
__global__ void __launch_bounds__(kScatterBlock)
    field_bound_kernel(const __grid_constant__ FieldParams params) {
    const int64_t n_valid = field_count(params);
    if (static_cast<int64_t>(blockIdx.x) * kScatterBlock >= n_valid) return;
    const ToTable<T, F, kNormals> to(params, n_valid);
    const int first = blockIdx.y * kScatterLevels;
    const int last = min(first + kScatterLevels, params.n_active);
    for (int l = first; l < last; ++l) {
        const GridLevel& level = params.levels[l];
        const GridCell cell = grid_locate<false>(level, to.unit[0], to.unit[1], to.unit[2]);
        float bound = 0.0f;
        to.for_features(level, l, [&](int, float gy, float gjx, float gjy, float gjz) {
            bound = larger(bound, corner_bound(cell, gy, gjx, gjy, gjz));
        });
        raise_bound(table_sums(params).bounds + l, to.any ? bound : 0.0f);
    }
}

__global__ void __launch_bounds__(kBlock)
    field_sums_kernel(const __grid_constant__ FieldParams params) {
    const int64_t n_valid = field_count(params);
    if (n_valid > 0) add_sums(params, table_sums(params), n_valid);
}

// Adds the partials that blocks of `block` samples left to the weights' gradients: a thread sums
// every kSummands-th of one weight, and the first of them what they have.
constexpr int kSummands = kBlock / kWarp;
__global__ void __launch_bounds__(kBlock)
    field_weights_kernel(const __grid_constant__ FieldParams params, int block, int n_blocks) {
    __shared__ float parts[kSummands][kWarp];
    const int n_first = kH * params.n_levels * params.n_features;
    const int weight = blockIdx.x * kWarp + threadIdx.x % kWarp, part = threadIdx.x / kWarp;
    // As in WeightTarget. Nothing is written of the features' head where it has no gradient.
    const bool of_features = (weight >= n_first && weight < 2 * n_first) ||
                             (weight >= 2 * n_first + kH && weight < 2 * n_first + 4 * kH);
    const bool exists =
        weight < 2 * n_first + 4 * kH && (!of_features || params.grad_features != nullptr);
    // Blocks without a sample have left nothing.
    const int64_t tiles = (field_count(params) + block - 1) / block;
    const int written = static_cast<int>(tiles < n_blocks ? tiles : n_blocks);
    float sum = 0.0f;
    for (int b = part; exists && b < written; b += kSummands) {
        sum += static_cast<const float*>(params.sums)[b * kPartial + weight];
    }
    parts[part][threadIdx.x % kWarp] = sum;
    __syncthreads();
    if (part != 0 || !exists) return;
    for (int p = 1; p < kSummands; ++p) sum += parts[p][threadIdx.x];
    float* grad = weight < n_first            ? params.grad_w1d + weight
                  : weight < 2 * n_first      ? params.grad_w1f + (weight - n_first)
                  : weight < 2 * n_first + kH ? params.grad_w2d + (weight - 2 * n_first)
                                              : params.grad_w2f + (weight - 2 * n_first - kH);
    *grad += sum;
}

// Threads of a block for which shared memory suffices.
template <class T, bool kBackward, bool kNormals>
int choose_block(const char* what) {
    int device = 0, limit = 0;
    check(cudaGetDevice(&device), what);
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
    int block = kBlockMax;
    while (Tiles<T, kBackward, kNormals>().lay_out(nullptr, block) > static_cast<size_t>(limit) &&
           block > kWarp) {
        block /= 2;
    }
    return block;
}

// As many blocks as run at once, or as are needed; returns how many. With `sums` their number
// depends on the card alone, so that room behind the samples does not decide which ones a block
// adds up. Asks the driver for properties only, so it may be captured.
template <class T, bool kBackward, bool kNormals, class Kernel>
int launch_persistent(Kernel kernel, int block, const FieldParams& params, void* stream,
                      const char* what) {
    int device = 0, n_sms = 0, per_sm = 0;
    const auto bytes = static_cast<int>(Tiles<T, kBackward, kNormals>().lay_out(nullptr, block));
    check(cudaGetDevice(&device), what);
    check(cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device), what);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, block, bytes), what);
    const int64_t needed = (params.n_points + block - 1) / block;
    const int64_t most = static_cast<int64_t>(n_sms) * (per_sm > 0 ? per_sm : 1);
    int64_t blocks = needed < most ? needed : most;
    if (kBackward && params.sums != nullptr) blocks = most < kMostPartials ? most : kMostPartials;
    kernel<<<static_cast<unsigned int>(blocks), block, bytes, static_cast<cudaStream_t>(stream)>>>(
        params);
    check(cudaGetLastError(), what);
    return static_cast<int>(blocks);
}

// The first kernel of a chunk, and what becomes of its partials.
template <class T, int F, bool kNormals>
void launch_bwd(const FieldParams& params, void* stream) {
    const int block = choose_block<T, true, kNormals>("field_bwd");
    auto kernel = field_bwd_kernel<T, F, kNormals, 1>;
    if constexpr (sizeof(T) == 2) {
        // Every card has shared memory for 64 threads of the half kind.
        if (block < kBlockMax) kernel = field_bwd_kernel<T, F, kNormals, 2>;
    }
    const int blocks =
        launch_persistent<T, true, kNormals>(kernel, block, params, stream, "field_bwd");
    if (params.sums == nullptr) return;
    field_weights_kernel<<<blocks_for(kPartial, kWarp), kBlock, 0,
                           static_cast<cudaStream_t>(stream)>>>(params, block, blocks);
    check(cudaGetLastError(), "field_weights");
}

// The second one.
template <class T, int F, bool kNormals>
void launch_scatter(const FieldParams& params, cudaStream_t stream) {
    const dim3 grid(blocks_for(params.n_points, kScatterBlock),
                    (params.n_active + kScatterLevels - 1) / kScatterLevels);
    if (params.sums == nullptr) {
        field_scatter_kernel<T, F, kNormals, false><<<grid, kScatterBlock, 0, stream>>>(params);
        check(cudaGetLastError(), "field_scatter");
        return;
    }
    table_sums(params).clear(active_numbers(params), stream);
    field_bound_kernel<T, F, kNormals><<<grid, kScatterBlock, 0, stream>>>(params);
    check(cudaGetLastError(), "field_scatter: bounds");
    field_scatter_kernel<T, F, kNormals, true><<<grid, kScatterBlock, 0, stream>>>(params);
    check(cudaGetLastError(), "field_scatter: sums");
    field_sums_kernel<<<blocks_for_sums(params), kBlock, 0, stream>>>(params);
    check(cudaGetLastError(), "field_scatter: gradient");
}

template <class T, int F, bool kNormals>
void launch(const FieldParams& params, bool backward, void* stream) {
    if (backward) {
        FieldParams chunk = params;
        for (int64_t begin = 0; begin < params.n_points; begin += kChunk) {
            const auto from = [&](const float* rows, int width) {
                return rows == nullptr ? nullptr : rows + begin * width;
            };
            chunk.n_before = begin;
            chunk.n_points = params.n_points - begin < kChunk ? params.n_points - begin : kChunk;
            chunk.points = from(params.points, 3);
            chunk.grad_density = from(params.grad_density, 1);
            chunk.grad_features = from(params.grad_features, 3);
            chunk.grad_normal = from(params.grad_normal, 3);
            launch_bwd<T, F, kNormals>(chunk, stream);
            if (params.n_active == 0) continue;
            launch_scatter<T, F, kNormals>(chunk, static_cast<cudaStream_t>(stream));
        }
    } else {
        launch_persistent<T, false, kNormals>(field_fwd_kernel<T, F, kNormals>,
                                              choose_block<T, false, kNormals>("field_fwd"), params,
                                              stream, "field_fwd");
    }
}

// Launches for tables of T.
template <class T>
void launch_for(const FieldParams& params, bool normals, bool backward, void* stream) {
    using Launch = void (*)(const FieldParams&, bool, void*);
    constexpr Launch kLaunches[] = {launch<T, 2, false>, launch<T, 2, true>,  //
                                    launch<T, 4, false>, launch<T, 4, true>};
    kLaunches[(params.n_features == 4 ? 2 : 0) + normals](params, backward, stream);
}

}  // namespace

// For tables of __half (field_half.cu).
void field_half(const FieldParams& params, bool normals, bool backward, void* stream);

}  // namespace dsd::cuda
