// The layers of a frozen network over token matrices [batch, tokens, channels], on CPUs with
// AVX-512: products (convolutions and linear layers are one), norms and attention. There is no CUDA
// form; elsewhere the network's own layers run.
//
// A token matrix is an image as it lies with its channels innermost. What goes into a product, and
// its weights, are float, or bfloat16 bits where the processor multiplies pairs of them
// (AVX512-BF16), which is twice as fast; sums, norms and residuals are float always.
#pragma once

#include "common.h"

namespace dsd {

constexpr int kDenseTaps = 9;
// Outputs of a vector: weights are stored in blocks of so many.
constexpr int kDenseLanes = 16;
// Widest head of an attention, and most groups of a norm.
constexpr int kDenseHead = 160;
constexpr int kDenseGroups = 64;

// y[b, i, j, o] = bias[o] + add[b, o] + residual[b, i, j, o]
//               + sum over taps t and terms k of x[b, i, j, taps[t] + k] w[t, k, o],
// where [b, i, j] are steps of the strides below. `gated`: columns are values, then gates, of which
// y gets value * gelu(gate); no residual then.
struct DenseParams {
    const void* x;          // float, or bfloat16 bits with `half`
    const void* w;          // as x, [ceil(columns / 16), n_taps, terms / P, 16, P], P = 2 with
                            // `half`, else 1; absent columns are zeros
    const float* bias;      // [columns] or null
    const float* add;       // [batch, add_stride], of which the first columns; or null
    const float* residual;  // strides of y, or null
    void* y;                // float, or bfloat16 bits with `half_out`
    int64_t x_batch, x_row, x_pixel;  // strides in numbers
    int64_t y_batch, y_row, y_pixel;
    int64_t add_stride;
    int64_t batch, height, width;  // of y
    int64_t terms, columns;        // `half`: terms is even
    int64_t taps[kDenseTaps];
    int32_t n_taps;
    bool half, half_out, gated;
};

// y = act(((s - mean) rstd weight + bias) (1 + scale) + shift), s = (x | x2) over channels, mean
// and rstd over a group's channels and all tokens; with `groups` 0 y = act(s).
struct DenseNormParams {
    const float* x;            // [batch, height width, channels_1]
    const float* x2;           // [batch, height width, channels - channels_1], or null
    const float* weight;       // [channels]
    const float* bias;         // [channels]
    const float* scale_shift;  // [batch, scale_stride]: scales, then shifts; or null
    float* sums;               // workspace [batch, dense_norm_parts(height, width), 2, channels]
    float* stats;              // [batch, groups, 2] gets mean and rstd, or null
    void* y;                   // float, or bfloat16 bits with `half`; zeros around with `border`:
                               // [batch, height + 2, width + 2, channels]
    int64_t batch, height, width, channels, channels_1, scale_stride;
    int32_t groups;
    float eps;
    bool silu, border, half;
};

// The gradient to x of y = act((x - mean) rstd weight + bias), added to `residual`.
struct DenseNormGradParams {
    float* grad;            // [batch, height width, channels]: to y; with `silu` that to what it
                            // is of, afterwards
    const float* x;         // as grad
    const float* weight;    // [channels]
    const float* bias;      // [channels]
    const float* stats;     // [batch, groups, 2]: mean and rstd
    const float* residual;  // as grad, or null
    float* sums;            // as in DenseNormParams
    float* dx;              // as grad, or null
    void* framed;           // the same as y of DenseNormParams, with its border; or null
    int64_t batch, height, width, channels;
    int32_t groups;
    bool silu, half;
};

// y = LayerNorm(x), [rows, channels].
struct DenseLayerNormParams {
    const float* x;
    const float* weight;
    const float* bias;
    void* y;  // float, or bfloat16 bits with `half`
    int64_t rows, channels;
    float eps;
    bool half;
};

// y = softmax(scale q k^T) v for each batch and head; heads lie side by side.
struct DenseAttentionParams {
    const void* q;  // [batch, queries, ..]: float, or bfloat16 bits with `half`, as all here
    const void* k;  // [batch, keys, ..]
    const void* v;
    void* y;          // [batch, queries, heads width]
    void* workspace;  // batch heads dense_attention_room(keys, width) numbers as q
    int64_t q_batch, q_token, k_batch, k_token, v_batch, v_token;  // strides
    int64_t batch, queries, keys, heads, width;  // width is even, at most kDenseHead
    float scale;
    bool half;
};

// What this build and processor have: 0 nothing, 1 float, 2 bfloat16 too.
int dense_level();

// Numbers of a workspace for one head.
inline int64_t dense_attention_room(int64_t keys, int64_t width) {
    const int64_t k = (keys + 15) / 16 * 16, w = (width + 15) / 16 * 16;
    return k * width + w * k;
}

// Parts of an image that are summed, and written, apart: so many rows each, at least 512 tokens and
// at most 16 parts, for every part adds up the sums of all.
inline int64_t dense_norm_rows(int64_t height, int64_t width) {
    const int64_t few = width < 512 ? 512 / (width > 0 ? width : 1) : 1, many = (height + 15) / 16;
    return few > many ? few : many;
}
inline int64_t dense_norm_parts(int64_t height, int64_t width) {
    const int64_t rows = dense_norm_rows(height, width);
    return (height + rows - 1) / rows;
}

namespace avx512 {
void dense(const DenseParams& p, int n_threads);
void dense_norm(const DenseNormParams& p, int n_threads);
void dense_norm_grad(const DenseNormGradParams& p, int n_threads);
void dense_layer_norm(const DenseLayerNormParams& p, int n_threads);
void dense_attention(const DenseAttentionParams& p, int n_threads);
}  // namespace avx512

}  // namespace dsd
