#include "dense.h"

#include "parallel.h"

// CMakeLists.txt compiles this source for AVX-512 where the compiler can. float needs AVX-512 F,
// BW, DQ and VL; bfloat16 alone has instructions of AVX512-BF16.
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace dsd::avx512 {
namespace {

using Half = uint16_t;
// Tokens of a tile. With three vectors of outputs, the most, its sums take 24 of 32 registers.
constexpr int kTile = 8;
// Tokens of a task, at least, and multiplications.
constexpr int64_t kTaskTokens = 64;
constexpr int64_t kTaskProducts = 1 << 22;
// Keys whose shares are computed at once.
constexpr int64_t kKeys = 512;

template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

DSD_HD __m512 multiply_add(__m512 sum, __m512i x, __m512i w, float) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
}

DSD_HD __m512 multiply_add(__m512 sum, __m512i x, __m512i w, Half) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
}

// One number, or one pair of them, in all lanes.
template <class T>
DSD_HD __m512i broadcast(const T* x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

DSD_HD __mmask16 lanes(int64_t n) {
    return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

DSD_HD void store(float* y, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(y, mask, x); }

DSD_HD void store(Half* y, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// exp(x) to a few units in the last place; of x under -87 it is 0 or next to it.
DSD_HD __m512 exp(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    x = _mm512_min_ps(x, _mm512_set1_ps(88.7f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 q = _mm512_set1_ps(1.9875691500e-4f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.3981999507e-3f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(8.3334519073e-3f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(4.1665795894e-2f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(1.6666665459e-1f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(5.0000001201e-1f));
    q = _mm512_fmadd_ps(q, _mm512_mul_ps(r, r), r);
    return _mm512_scalef_ps(_mm512_add_ps(q, _mm512_set1_ps(1.0f)), n);
}

DSD_HD __m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// x Phi(x), Phi by 7.1.26 of Abramowitz and Stegun: to 1.5e-7.
DSD_HD __m512 gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 u = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(u, _mm512_set1_ps(0.3275911f), one));
    __m512 q = _mm512_set1_ps(1.061405429f);
    q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(-1.453152027f));
    q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(1.421413741f));
    q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(-0.284496736f));
    q = _mm512_fmadd_ps(q, t, _mm512_set1_ps(0.254829592f));
    q = _mm512_mul_ps(_mm512_mul_ps(q, t), exp(_mm512_fnmadd_ps(u, u, _mm512_setzero_ps())));
    const __m512 upper = _mm512_fnmadd_ps(_mm512_set1_ps(0.5f), q, one);  // Phi(|x|)
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(upper, negative, one, upper));
}

// sum[r][v] = sum over taps and terms of x[r x_pixel + taps[t] + k] w[v w_vector + t, k, lane].
// kPixel is x_pixel where that is known, else 0: sixteen places are more than there are registers.
template <class T, int V, int R, int kPixel = 0>
DSD_HD void tile(const T* x, int64_t x_pixel, const int64_t* taps, int n_taps, int64_t terms,
                 const T* w, int64_t w_vector, __m512 (&sum)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    if (kPixel != 0) x_pixel = kPixel;
    for (int t = 0; t < n_taps; ++t) {
        const T* from = x + taps[t];
        for (int64_t k = 0; k < terms; k += kPair<T>) {
            __m512i factor[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) factor[v] = _mm512_loadu_si512(w + v * w_vector);
            w += 16 * kPair<T>;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const __m512i number = broadcast(from + r * x_pixel + k);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    sum[r][v] = multiply_add(sum[r][v], number, factor[v], T());
                }
            }
        }
    }
}

// The outputs [o, o + 16 V) of R tokens from (b, i, j) on.
template <class T, class Out, int V, int R, int kPixel = 0>
void outputs(const DenseParams& p, int64_t b, int64_t i, int64_t j, int64_t o) {
    const int64_t w_vector = p.n_taps * p.terms * 16;
    const T* x = static_cast<const T*>(p.x) + b * p.x_batch + i * p.x_row + j * p.x_pixel;
    const T* w = static_cast<const T*>(p.w) + o / 16 * w_vector;
    const int64_t at = b * p.y_batch + i * p.y_row + j * p.y_pixel;
    __m512 sum[R][V];
    tile<T, V, R, kPixel>(x, p.x_pixel, p.taps, p.n_taps, p.terms, w, w_vector, sum);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        const int64_t c = o + 16 * v;
        const __mmask16 mask = lanes(p.columns - c);
        __m512 constant = _mm512_setzero_ps();
        if (p.bias != nullptr) constant = _mm512_maskz_loadu_ps(mask, p.bias + c);
        if (p.add != nullptr) {
            const float* add = p.add + b * p.add_stride + c;
            constant = _mm512_add_ps(constant, _mm512_maskz_loadu_ps(mask, add));
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const int64_t place = at + r * p.y_pixel + c;
            __m512 y = _mm512_add_ps(sum[r][v], constant);
            if (p.residual != nullptr) {
                y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.residual + place));
            }
            store(static_cast<Out*>(p.y) + place, mask, y);
        }
    }
}

// Sixteen gated outputs from o on.
template <class T, class Out, int R>
void gated(const DenseParams& p, int64_t b, int64_t i, int64_t j, int64_t o) {
    const int64_t vector = p.n_taps * p.terms * 16, half = p.columns / 2;
    const T* x = static_cast<const T*>(p.x) + b * p.x_batch + i * p.x_row + j * p.x_pixel;
    const T* w = static_cast<const T*>(p.w) + o / 16 * vector;
    __m512 sum[R][2];
    tile<T, 2, R>(x, p.x_pixel, p.taps, p.n_taps, p.terms, w, half / 16 * vector, sum);
    const __m512 value_bias = _mm512_loadu_ps(p.bias + o),
                 gate_bias = _mm512_loadu_ps(p.bias + half + o);
    Out* y = static_cast<Out*>(p.y) + b * p.y_batch + i * p.y_row + j * p.y_pixel + o;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const __m512 gate = gelu(_mm512_add_ps(sum[r][1], gate_bias));
        store(y + r * p.y_pixel, 0xffff, _mm512_mul_ps(_mm512_add_ps(sum[r][0], value_bias), gate));
    }
}

// Vectors of the next outputs, of `left`: threes, and no vector alone behind them.
DSD_HD int vectors_of(int64_t left) { return left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1; }

// The outputs from o on of the pixels [j, last) of a row.
template <class T, class Out>
void pixels(const DenseParams& p, int64_t b, int64_t i, int64_t j, int64_t last, int64_t o,
            int vectors) {
    if (p.gated) {
        for (; j + kTile <= last; j += kTile) gated<T, Out, kTile>(p, b, i, j, o);
        for (; j < last; ++j) gated<T, Out, 1>(p, b, i, j, o);
    } else if (vectors == 3) {
        for (; j + kTile <= last; j += kTile) outputs<T, Out, 3, kTile>(p, b, i, j, o);
        for (; j < last; ++j) outputs<T, Out, 3, 1>(p, b, i, j, o);
    } else if (vectors == 2) {
        for (; j + kTile <= last; j += kTile) outputs<T, Out, 2, kTile>(p, b, i, j, o);
        for (; j < last; ++j) outputs<T, Out, 2, 1>(p, b, i, j, o);
    } else {
        // Eight sums alone would wait for one another.
        constexpr int kPixel = 16;
        for (; p.x_pixel == kPixel && j + 2 * kTile <= last; j += 2 * kTile) {
            outputs<T, Out, 1, 2 * kTile, kPixel>(p, b, i, j, o);
        }
        for (; j + kTile <= last; j += kTile) outputs<T, Out, 1, kTile>(p, b, i, j, o);
        for (; j < last; ++j) outputs<T, Out, 1, 1>(p, b, i, j, o);
    }
}

template <class T, class Out>
void dense(const DenseParams& p, int n_threads) {
    // A task is some rows of an image, or a piece of a long one: enough work to be handed out.
    const int64_t wanted = kTaskProducts / (p.n_taps * p.terms * p.columns);
    const int64_t tokens = wanted > kTaskTokens ? wanted / kTile * kTile : kTaskTokens;
    const int64_t chunk = p.width < 2 * tokens ? p.width : tokens;
    const int64_t chunks = (p.width + chunk - 1) / chunk;
    const int64_t rows = chunk < tokens ? (tokens + chunk - 1) / chunk : 1;
    const int64_t groups = (p.height + rows - 1) / rows;
    const int64_t columns = p.gated ? p.columns / 2 : p.columns;
    parallel_for(p.batch * groups * chunks, n_threads, [&](int64_t task) {
        const int64_t b = task / (groups * chunks), group = task / chunks % groups;
        const int64_t first = task % chunks * chunk;
        const int64_t last = first + chunk < p.width ? first + chunk : p.width;
        const int64_t bottom = (group + 1) * rows < p.height ? (group + 1) * rows : p.height;
        for (int64_t o = 0; o < columns;) {
            const int vectors = p.gated ? 1 : vectors_of((columns - o + 15) / 16);
            for (int64_t i = group * rows; i < bottom; ++i) {
                pixels<T, Out>(p, b, i, first, last, o, vectors);
            }
            o += 16 * vectors;
        }
    });
}

// ---- norms
// ---------------------------------------------------------------------------------------

constexpr int64_t kMostChannels = 4096;

// The rows [top, bottom) of an image that are part `part` of it.
struct Rows {
    int64_t top, bottom;
};

DSD_HD Rows rows_of(int64_t part, int64_t height, int64_t width) {
    const int64_t rows = dense_norm_rows(height, width), top = part * rows;
    return {top, top + rows < height ? top + rows : height};
}

// Sixteen channels from c on of an image, and their stride.
DSD_HD const float* channels_of(const DenseNormParams& p, int64_t b, int64_t c, int64_t& stride) {
    const int64_t tokens = p.height * p.width, second = p.channels - p.channels_1;
    stride = c < p.channels_1 ? p.channels_1 : second;
    return c < p.channels_1 ? p.x + b * tokens * stride + c
                            : p.x2 + b * tokens * stride + c - p.channels_1;
}

// Sums of sixteen channels over n tokens, and of their squares, less a pivot: a value of theirs, so
// that little is cancelled where they vary little around it, as behind an object.
DSD_HD void channel_sums(const float* x, int64_t stride, int64_t n, __m512 pivot, float* sum,
                         float* square) {
    // Four of each: an addition waits for the one before.
    __m512 s[4], q[4];
    for (int a = 0; a < 4; ++a) s[a] = q[a] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a) {
            const __m512 v = _mm512_sub_ps(_mm512_loadu_ps(x + (i + a) * stride), pivot);
            s[a] = _mm512_add_ps(s[a], v);
            q[a] = _mm512_fmadd_ps(v, v, q[a]);
        }
    }
    for (; i < n; ++i) {
        const __m512 v = _mm512_sub_ps(_mm512_loadu_ps(x + i * stride), pivot);
        s[0] = _mm512_add_ps(s[0], v);
        q[0] = _mm512_fmadd_ps(v, v, q[0]);
    }
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
    _mm512_storeu_ps(square, _mm512_add_ps(_mm512_add_ps(q[0], q[1]), _mm512_add_ps(q[2], q[3])));
}

// Sums over an image's parts of channel c: of the values and of the others.
DSD_HD void part_sums(const float* sums, int64_t parts, int64_t channels, int64_t c, double& first,
                      double& second) {
    first = second = 0.0;
    for (int64_t part = 0; part < parts; ++part) {
        first += static_cast<double>(sums[part * 2 * channels + c]);
        second += static_cast<double>(sums[(part * 2 + 1) * channels + c]);
    }
}

// What the norm does to the channels of image b: y = factor x + constant.
void affine(const DenseNormParams& p, int64_t b, bool tell, float* factor, float* constant) {
    const double n = static_cast<double>(p.height * p.width);
    const int64_t size = p.channels / p.groups, parts = dense_norm_parts(p.height, p.width);
    const float* sums = p.sums + b * parts * 2 * p.channels;
    const float* scale = p.scale_shift == nullptr ? nullptr : p.scale_shift + b * p.scale_stride;
    double means[kMostChannels];
    for (int64_t first = 0, g = 0; first < p.channels; first += size, ++g) {
        double mean = 0.0, variance = 0.0;
        for (int64_t c = first; c < first + size; ++c) {
            double sum, square;
            int64_t stride;
            part_sums(sums, parts, p.channels, c, sum, square);
            means[c] = static_cast<double>(*channels_of(p, b, c, stride)) + sum / n;
            mean += means[c] / static_cast<double>(size);
            variance += (square - sum * sum / n) / n;
        }
        for (int64_t c = first; c < first + size; ++c) {
            variance += (means[c] - mean) * (means[c] - mean);
        }
        variance = variance > 0.0 ? variance / static_cast<double>(size) : 0.0;
        const double rstd = 1.0 / __builtin_sqrt(variance + static_cast<double>(p.eps));
        if (tell) {
            p.stats[(b * p.groups + g) * 2] = static_cast<float>(mean);
            p.stats[(b * p.groups + g) * 2 + 1] = static_cast<float>(rstd);
        }
        for (int64_t c = first; c < first + size; ++c) {
            double f = rstd * static_cast<double>(p.weight[c]);
            double k = static_cast<double>(p.bias[c]) - mean * f;
            if (scale != nullptr) {
                const double s = 1.0 + static_cast<double>(scale[c]);
                f *= s;
                k = k * s + static_cast<double>(scale[p.channels + c]);
            }
            factor[c] = static_cast<float>(f);
            constant[c] = static_cast<float>(k);
        }
    }
}

// An image of `channels` with zeros around, or without: where its pixels lie.
template <class Out>
struct Frame {
    Out* first;
    int64_t row, channels;

    Frame(void* y, int64_t b, int64_t height, int64_t width, int64_t channels_, bool border)
        : channels(channels_) {
        const int64_t edge = border ? 1 : 0;
        row = (width + 2 * edge) * channels;
        first = static_cast<Out*>(y) + b * (height + 2 * edge) * row + edge * (row + channels);
    }

    // Zeros around the rows [top, bottom).
    void clear(Rows rows, int64_t height) {
        const int64_t before = row / channels - 1;  // pixels from a row's first to the one after it
        if (rows.top == 0) clear(first - row - channels, row);
        for (int64_t i = rows.top; i < rows.bottom; ++i) {
            clear(first + i * row - channels, channels);
            clear(first + i * row + (before - 1) * channels, channels);
        }
        if (rows.bottom == height) clear(first + height * row - channels, row);
    }

    static void clear(Out* y, int64_t n) {
        for (int64_t i = 0; i < n; ++i) y[i] = Out(0);
    }
};

template <class Out, bool kNorm, bool kSilu>
void apply(const DenseNormParams& p, int64_t b, Rows rows, const float* factor,
           const float* constant) {
    Frame<Out> frame(p.y, b, p.height, p.width, p.channels, p.border);
    if (p.border) frame.clear(rows, p.height);
    for (int64_t c = 0; c < p.channels; c += 16) {
        const __mmask16 mask = lanes(p.channels - c);
        int64_t stride;
        const float* x = channels_of(p, b, c, stride) + rows.top * p.width * stride;
        __m512 f = _mm512_setzero_ps(), k = f;
        if (kNorm) {
            f = _mm512_loadu_ps(factor + c);
            k = _mm512_loadu_ps(constant + c);
        }
        for (int64_t i = rows.top; i < rows.bottom; ++i) {
            Out* y = frame.first + i * frame.row + c;
            for (int64_t j = 0; j < p.width; ++j, x += stride, y += p.channels) {
                __m512 v = _mm512_maskz_loadu_ps(mask, x);
                if (kNorm) v = _mm512_fmadd_ps(v, f, k);
                if (kSilu) v = silu(v);
                store(y, mask, v);
            }
        }
    }
}

template <class Out>
void norm(const DenseNormParams& p, int64_t b, int64_t part) {
    const Rows rows = rows_of(part, p.height, p.width);
    alignas(64) float factor[kMostChannels], constant[kMostChannels];
    if (p.groups == 0) {
        if (p.silu) return apply<Out, false, true>(p, b, rows, factor, constant);
        return apply<Out, false, false>(p, b, rows, factor, constant);
    }
    affine(p, b, part == 0 && p.stats != nullptr, factor, constant);
    if (p.silu) return apply<Out, true, true>(p, b, rows, factor, constant);
    return apply<Out, true, false>(p, b, rows, factor, constant);
}

// ---- the norm's gradient: g = grad act'(u), u = h weight + bias, h = (x - mean) rstd;
// dx = rstd (weight g - S1 / n - h S2 / n), S1 and S2 a group's sums of weight g and weight g h.

// Sixteen channels of an image: h = x scale + offset, u = h weight + bias.
struct Channels {
    __m512 scale, offset, weight, bias;
    __mmask16 mask;

    void load(const DenseNormGradParams& p, int64_t b, int64_t c) {
        const int64_t size = p.channels / p.groups;
        alignas(64) float s[16], o[16];
        for (int64_t lane = 0; lane < 16; ++lane) {
            const int64_t at = c + lane < p.channels ? c + lane : p.channels - 1;
            const float* stats = p.stats + (b * p.groups + at / size) * 2;
            s[lane] = stats[1];
            o[lane] = -stats[0] * stats[1];
        }
        mask = lanes(p.channels - c);
        scale = _mm512_load_ps(s);
        offset = _mm512_load_ps(o);
        weight = _mm512_maskz_loadu_ps(mask, p.weight + c);
        bias = _mm512_maskz_loadu_ps(mask, p.bias + c);
    }

    // Through SiLU.
    __m512 gradient(__m512 grad, __m512 h) const {
        const __m512 one = _mm512_set1_ps(1.0f), u = _mm512_fmadd_ps(h, weight, bias);
        const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), u));
        const __m512 s = _mm512_div_ps(one, _mm512_add_ps(one, e));
        // s (1 + u (1 - s))
        const __m512 slope = _mm512_fmadd_ps(u, _mm512_sub_ps(one, s), one);
        return _mm512_mul_ps(grad, _mm512_mul_ps(s, slope));
    }
};

void grad_sums(const DenseNormGradParams& p, int64_t b, int64_t part) {
    const Rows rows = rows_of(part, p.height, p.width);
    const int64_t n = (rows.bottom - rows.top) * p.width;
    const int64_t first = (b * p.height + rows.top) * p.width * p.channels;
    float* sums = p.sums + (b * dense_norm_parts(p.height, p.width) + part) * 2 * p.channels;
    for (int64_t c = 0; c < p.channels; c += 16) {
        Channels channel;
        channel.load(p, b, c);
        const float* x = p.x + first + c;
        float* grad = p.grad + first + c;
        __m512 s1 = _mm512_setzero_ps(), s2 = s1;
        for (int64_t i = 0; i < n; ++i) {
            const __m512 h =
                _mm512_fmadd_ps(_mm512_maskz_loadu_ps(channel.mask, x + i * p.channels),
                                channel.scale, channel.offset);
            __m512 g = _mm512_maskz_loadu_ps(channel.mask, grad + i * p.channels);
            if (p.silu) {
                g = channel.gradient(g, h);
                _mm512_mask_storeu_ps(grad + i * p.channels, channel.mask, g);
            }
            s1 = _mm512_add_ps(s1, g);
            s2 = _mm512_fmadd_ps(g, h, s2);
        }
        _mm512_mask_storeu_ps(sums + c, channel.mask, s1);
        _mm512_mask_storeu_ps(sums + p.channels + c, channel.mask, s2);
    }
}

template <class Out>
void norm_grad(const DenseNormGradParams& p, int64_t b, int64_t part) {
    const int64_t parts = dense_norm_parts(p.height, p.width), size = p.channels / p.groups;
    const double n = static_cast<double>(size * p.height * p.width);
    const Rows rows = rows_of(part, p.height, p.width);
    alignas(64) float constant[kMostChannels], slope[kMostChannels];
    for (int64_t first = 0, g = 0; first < p.channels; first += size, ++g) {
        double s1 = 0.0, s2 = 0.0;
        for (int64_t c = first; c < first + size; ++c) {
            double sum, product;
            part_sums(p.sums + b * parts * 2 * p.channels, parts, p.channels, c, sum, product);
            s1 += static_cast<double>(p.weight[c]) * sum;
            s2 += static_cast<double>(p.weight[c]) * product;
        }
        const double rstd = static_cast<double>(p.stats[(b * p.groups + g) * 2 + 1]);
        for (int64_t c = first; c < first + size; ++c) {
            constant[c] = static_cast<float>(-rstd * s1 / n);
            slope[c] = static_cast<float>(-rstd * s2 / n);
        }
    }
    Frame<Out> frame(p.framed, p.framed == nullptr ? 0 : b, p.height, p.width, p.channels, true);
    if (p.framed != nullptr) frame.clear(rows, p.height);
    const int64_t start = (b * p.height + rows.top) * p.width * p.channels;
    for (int64_t c = 0; c < p.channels; c += 16) {
        Channels channel;
        channel.load(p, b, c);
        const __m512 factor = _mm512_mul_ps(channel.scale, channel.weight);
        const __m512 k = _mm512_maskz_loadu_ps(channel.mask, constant + c);
        const __m512 m = _mm512_maskz_loadu_ps(channel.mask, slope + c);
        int64_t at = start + c;
        for (int64_t i = rows.top; i < rows.bottom; ++i) {
            Out* y = p.framed == nullptr ? nullptr : frame.first + i * frame.row + c;
            for (int64_t j = 0; j < p.width; ++j, at += p.channels) {
                const __m512 h = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(channel.mask, p.x + at),
                                                 channel.scale, channel.offset);
                const __m512 g = _mm512_maskz_loadu_ps(channel.mask, p.grad + at);
                __m512 d = _mm512_fmadd_ps(h, m, k);
                if (p.residual != nullptr) {
                    d = _mm512_add_ps(d, _mm512_maskz_loadu_ps(channel.mask, p.residual + at));
                }
                d = _mm512_fmadd_ps(g, factor, d);
                if (p.dx != nullptr) _mm512_mask_storeu_ps(p.dx + at, channel.mask, d);
                if (y != nullptr) store(y + j * p.channels, channel.mask, d);
            }
        }
    }
}

template <class Out>
void layer_norm(const DenseLayerNormParams& p, int64_t row) {
    const float* x = p.x + row * p.channels;
    Out* y = static_cast<Out*>(p.y) + row * p.channels;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < p.channels; c += 16) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(p.channels - c), x + c));
    }
    const float n = static_cast<float>(p.channels);
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / n);
    sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < p.channels; c += 16) {
        const __mmask16 mask = lanes(p.channels - c);
        const __m512 d = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + c), mean);
        sum = _mm512_fmadd_ps(d, d, sum);
    }
    const float rstd = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / n + p.eps);
    for (int64_t c = 0; c < p.channels; c += 16) {
        const __mmask16 mask = lanes(p.channels - c);
        const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + c), mean);
        const __m512 w =
            _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, p.weight + c), _mm512_set1_ps(rstd));
        store(y + c, mask, _mm512_fmadd_ps(d, w, _mm512_maskz_loadu_ps(mask, p.bias + c)));
    }
}

// ---- attention
// -----------------------------------------------------------------------------------

// Keys and values of a head as products read them: k [keys / 16, width / P, 16, P],
// v [width / 16, keys / P, 16, P], absent ones zero.
template <class T>
void pack_head(const DenseAttentionParams& p, int64_t b, int64_t head, T* room) {
    const int64_t keys = (p.keys + 15) / 16 * 16, pair = kPair<T>;
    const T* k = static_cast<const T*>(p.k) + b * p.k_batch + head * p.width;
    const T* v = static_cast<const T*>(p.v) + b * p.v_batch + head * p.width;
    for (int64_t i = 0; i < keys; ++i) {
        T* block = room + i / 16 * 16 * p.width + i % 16 * pair;
        for (int64_t d = 0; d < p.width; ++d) {
            block[d / pair * 16 * pair + d % pair] = i < p.keys ? k[i * p.k_token + d] : T(0);
        }
    }
    T* values = room + keys * p.width;
    for (int64_t d = 0; d < (p.width + 15) / 16 * 16; d += 16) {
        T* block = values + d * keys;
        for (int64_t i = 0; i < keys; ++i) {
            T* to = block + i / pair * 16 * pair + i % pair;
            for (int64_t lane = 0; lane < 16; ++lane) {
                const bool there = i < p.keys && d + lane < p.width;
                to[lane * pair] = there ? v[i * p.v_token + d + lane] : T(0);
            }
        }
    }
}

// 2^x of x <= 0: to float's last digits, or to bfloat16's, which are fewer.
DSD_HD __m512 power(__m512 x, float) { return exp(_mm512_mul_ps(x, _mm512_set1_ps(0.69314718f))); }

DSD_HD __m512 power(__m512 x, Half) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 q = _mm512_set1_ps(9.61812911e-3f);
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(5.55041087e-2f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(2.40226507e-1f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(6.93147181e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(q, r, _mm512_set1_ps(1.0f)), n);
}

// Logits of R queries for 16 V keys, and in `top` the largest so far of every lane. Lanes of absent
// keys are zeros that `last` leaves out.
template <class T, int V, int R>
DSD_HD void logits_of(const T* q, int64_t q_token, const T* w, int64_t width, __mmask16 last,
                      float* logits, __m512 (&top)[R]) {
    const int64_t here = 0;
    __m512 sum[R][V];
    tile<T, V, R>(q, q_token, &here, 1, width, w, 16 * width, sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            _mm512_store_ps(logits + r * kKeys + 16 * v, sum[r][v]);
            top[r] = _mm512_mask_max_ps(top[r], v == V - 1 ? last : __mmask16(0xffff), top[r],
                                        sum[r][v]);
        }
    }
}

// total[r] += shares[r] times 16 V columns of values.
template <class T, int V, int R>
DSD_HD void add_values(const T* shares, int64_t keys, const T* w, int64_t w_vector, float* total) {
    const int64_t here = 0;
    __m512 sum[R][V];
    tile<T, V, R>(shares, kKeys, &here, 1, keys, w, w_vector, sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* t = total + r * kDenseHead + 16 * v;
            _mm512_store_ps(t, _mm512_add_ps(_mm512_load_ps(t), sum[r][v]));
        }
    }
}

// The running softmax of R queries (Milakov and Gimelshein 2018), keys in blocks.
template <class T, int R>
void attend(const DenseAttentionParams& p, int64_t b, int64_t head, int64_t query, const T* room) {
    const int64_t keys = (p.keys + 15) / 16 * 16, width = (p.width + 15) / 16 * 16;
    const T* q = static_cast<const T*>(p.q) + b * p.q_batch + query * p.q_token + head * p.width;
    const T* values = room + keys * p.width;
    const float scale = p.scale * 1.44269504f;
    alignas(64) float logits[R][kKeys];
    alignas(64) T shares[R][kKeys];
    alignas(64) float total[R][kDenseHead];
    float most[R], weight[R];
    for (int r = 0; r < R; ++r) {
        most[r] = -1e30f;
        weight[r] = 0.0f;
        for (int64_t d = 0; d < width; ++d) total[r][d] = 0.0f;
    }
    for (int64_t first = 0; first < keys; first += kKeys) {
        const int64_t n = first + kKeys < keys ? kKeys : keys - first;
        const __mmask16 last = first + n < keys ? 0xffff : lanes(p.keys - (keys - 16));
        __m512 top[R];
        for (int r = 0; r < R; ++r) top[r] = _mm512_set1_ps(-1e30f);
        for (int64_t c = 0; c < n; c += 32) {
            const T* w = room + (first + c) * p.width;
            if (c + 32 <= n) {
                logits_of<T, 2, R>(q, p.q_token, w, p.width, c + 32 < n ? 0xffff : last,
                                   logits[0] + c, top);
            } else {
                logits_of<T, 1, R>(q, p.q_token, w, p.width, last, logits[0] + c, top);
            }
        }
        for (int r = 0; r < R; ++r) {
            const float found = _mm512_reduce_max_ps(top[r]) * scale, before = most[r];
            const float now = found > before ? found : before;
            const __m512 factor = _mm512_set1_ps(scale), less = _mm512_set1_ps(-now);
            __m512 sum = _mm512_setzero_ps();
            int64_t c = 0;
            for (; c < n - 16; c += 16) {
                const __m512 share =
                    power(_mm512_fmadd_ps(_mm512_load_ps(logits[r] + c), factor, less), T());
                sum = _mm512_add_ps(sum, share);
                store(shares[r] + c, 0xffff, share);
            }
            const __m512 share = _mm512_maskz_mov_ps(
                last, power(_mm512_fmadd_ps(_mm512_load_ps(logits[r] + c), factor, less), T()));
            sum = _mm512_add_ps(sum, share);
            store(shares[r] + c, 0xffff, share);
            if (now > before) {
                const __m512 shrink = power(_mm512_set1_ps(before - now), T());
                weight[r] *= _mm512_cvtss_f32(shrink);
                for (int64_t d = 0; d < width; d += 16) {
                    float* t = total[r] + d;
                    _mm512_store_ps(t, _mm512_mul_ps(_mm512_load_ps(t), shrink));
                }
                most[r] = now;
            }
            weight[r] += _mm512_reduce_add_ps(sum);
        }
        for (int64_t d = 0; d < width;) {
            const T* w = values + d * keys + first * 16;
            const int64_t left = (width - d) / 16;
            if (left >= 3) add_values<T, 3, R>(shares[0], n, w, 16 * keys, total[0] + d);
            if (left == 2) add_values<T, 2, R>(shares[0], n, w, 16 * keys, total[0] + d);
            if (left == 1) add_values<T, 1, R>(shares[0], n, w, 16 * keys, total[0] + d);
            d += 16 * (left >= 3 ? 3 : left);
        }
    }
    T* y = static_cast<T*>(p.y) + ((b * p.queries + query) * p.heads + head) * p.width;
    for (int r = 0; r < R; ++r) {
        const __m512 inverse = _mm512_set1_ps(1.0f / weight[r]);
        for (int64_t d = 0; d < p.width; d += 16) {
            store(y + r * p.heads * p.width + d, lanes(p.width - d),
                  _mm512_mul_ps(_mm512_load_ps(total[r] + d), inverse));
        }
    }
}

template <class T>
void attention(const DenseAttentionParams& p, int n_threads) {
    T* workspace = static_cast<T*>(p.workspace);
    const int64_t room = dense_attention_room(p.keys, p.width);
    parallel_for(p.batch * p.heads, n_threads, [&](int64_t task) {
        pack_head<T>(p, task / p.heads, task % p.heads, workspace + task * room);
    });
    const int64_t chunks = (p.queries + kTaskTokens - 1) / kTaskTokens;
    parallel_for(p.batch * p.heads * chunks, n_threads, [&](int64_t task) {
        const int64_t of = task / chunks, b = of / p.heads, head = of % p.heads;
        const int64_t first = task % chunks * kTaskTokens;
        const int64_t last = first + kTaskTokens < p.queries ? first + kTaskTokens : p.queries;
        const T* packed = workspace + of * room;
        int64_t i = first;
        for (; i + kTile <= last; i += kTile) attend<T, kTile>(p, b, head, i, packed);
        for (; i < last; ++i) attend<T, 1>(p, b, head, i, packed);
    });
}

}  // namespace

void dense(const DenseParams& p, int n_threads) {
    if (!p.half) return dense<float, float>(p, n_threads);
    if (p.half_out) return dense<Half, Half>(p, n_threads);
    return dense<Half, float>(p, n_threads);
}

void dense_norm(const DenseNormParams& p, int n_threads) {
    const int64_t parts = dense_norm_parts(p.height, p.width);
    if (p.groups > 0) {
        parallel_for(p.batch * parts, n_threads, [&](int64_t task) {
            const int64_t b = task / parts;
            const Rows rows = rows_of(task % parts, p.height, p.width);
            float* sums = p.sums + task * 2 * p.channels;
            for (int64_t c = 0; c < p.channels; c += 16) {
                int64_t stride;
                const float* x = channels_of(p, b, c, stride);
                channel_sums(x + rows.top * p.width * stride, stride,
                             (rows.bottom - rows.top) * p.width, _mm512_loadu_ps(x), sums + c,
                             sums + p.channels + c);
            }
        });
    }
    parallel_for(p.batch * parts, n_threads, [&](int64_t task) {
        if (p.half) return norm<Half>(p, task / parts, task % parts);
        norm<float>(p, task / parts, task % parts);
    });
}

void dense_norm_grad(const DenseNormGradParams& p, int n_threads) {
    const int64_t parts = dense_norm_parts(p.height, p.width);
    parallel_for(p.batch * parts, n_threads,
                 [&](int64_t task) { grad_sums(p, task / parts, task % parts); });
    parallel_for(p.batch * parts, n_threads, [&](int64_t task) {
        if (p.half) return norm_grad<Half>(p, task / parts, task % parts);
        norm_grad<float>(p, task / parts, task % parts);
    });
}

void dense_layer_norm(const DenseLayerNormParams& p, int n_threads) {
    parallel_chunks(p.rows, 4 * kTaskTokens, n_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            if (p.half) {
                layer_norm<Half>(p, row);
            } else {
                layer_norm<float>(p, row);
            }
        }
    });
}

void dense_attention(const DenseAttentionParams& p, int n_threads) {
    if (p.half) return attention<Half>(p, n_threads);
    attention<float>(p, n_threads);
}

}  // namespace dsd::avx512

#else

// A build without such a compiler: dense_level() is 0, and nothing calls these.
namespace dsd::avx512 {
void dense(const DenseParams&, int) {}
void dense_norm(const DenseNormParams&, int) {}
void dense_norm_grad(const DenseNormGradParams&, int) {}
void dense_layer_norm(const DenseLayerNormParams&, int) {}
void dense_attention(const DenseAttentionParams&, int) {}
}  // namespace dsd::avx512

#endif
