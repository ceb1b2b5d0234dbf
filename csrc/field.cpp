#include "field.h"

#include <vector>

#include "parallel.h"

namespace dsd {
namespace {

constexpr int64_t kChunk = 512;
// Weight gradients are summed in this many parts, whatever the number of threads, so that results
// do not depend on it.
constexpr int64_t kParts = 32;

// One sample, up to what the outputs and the backward pass need.
struct Sample {
    float point[3], unit[3];
    float e[kFieldWidth];
    float jac[kFieldWidth][3];
    float g[kFieldWidth];
    float hidden[2][kFieldHidden];  // before the ReLU: density head, feature head
    float raw;
    float gradient[3];  // of the raw density, world units
};

void encode(const FieldParams& params, bool normals, Sample& s) {
    const int f_count = params.n_features, width = params.n_levels * f_count;
    const auto* table = static_cast<const float*>(params.table);
    for (int k = params.n_active * f_count; k < width; ++k) {
        s.e[k] = s.jac[k][0] = s.jac[k][1] = s.jac[k][2] = 0.0f;
    }
    for (int l = 0; l < params.n_active; ++l) {
        const GridLevel& level = params.levels[l];
        const GridCell cell = grid_locate<false>(level, s.unit[0], s.unit[1], s.unit[2]);
        for (int f = 0; f < f_count; ++f) {
            float v[8];
            for (int c = 0; c < 8; ++c) {
                v[c] = table[(level.offset + cell.entry[c]) * f_count + f];
            }
            const int k = l * f_count + f;
            if (normals) {
                s.e[k] = grid_value_jacobian(v, cell.fx, cell.fy, cell.fz, level.scale,
                                             s.jac[k][0], s.jac[k][1], s.jac[k][2]);
            } else {
                s.e[k] = grid_value(v, cell.fx, cell.fy, cell.fz);
            }
        }
    }
}

void evaluate(const FieldParams& params, int64_t i, bool normals, bool features, Sample& s) {
    const int width = params.n_levels * params.n_features;
    for (int d = 0; d < 3; ++d) {
        s.point[d] = params.points[3 * i + d];
        s.unit[d] = field_unit(s.point[d], params.inverse_diameter);
    }
    encode(params, normals, s);
    for (int head = 0; head < (features ? 2 : 1); ++head) {
        const float* first = head == 0 ? params.w1d : params.w1f;
        for (int j = 0; j < kFieldHidden; ++j) {
            float sum = 0.0f;
            for (int k = 0; k < width; ++k) sum += first[j * width + k] * s.e[k];
            s.hidden[head][j] = sum;
        }
    }
    for (int k = 0; k < width; ++k) s.g[k] = 0.0f;
    for (int j = 0; j < kFieldHidden; ++j) {
        if (!(s.hidden[0][j] > 0.0f)) continue;
        for (int k = 0; k < width; ++k) s.g[k] += params.w2d[j] * params.w1d[j * width + k];
    }
    s.raw = field_bias(params, s.point[0], s.point[1], s.point[2], s.gradient);
    for (int k = 0; k < width; ++k) {
        s.raw += s.g[k] * s.e[k];
        if (!normals) continue;
        for (int d = 0; d < 3; ++d) {
            s.gradient[d] += s.g[k] * s.jac[k][d] * params.inverse_diameter;
        }
    }
}

// Sums of the weight gradients, laid out one after the other.
struct WeightSums {
    float s[kFieldHidden][kFieldWidth];    // m u^T
    float w1f[kFieldHidden][kFieldWidth];  // q e^T
    float w2f[3][kFieldHidden];
};

// What the table's gradient needs of one sample.
struct TableGradient {
    float unit[3];
    float v[3];
    float to_e[kFieldWidth];
    float g[kFieldWidth];
};

void backward_sample(const FieldParams& params, int64_t i, WeightSums& sums, TableGradient& out) {
    const int width = params.n_levels * params.n_features;
    const bool normals = params.grad_normal != nullptr, features = params.grad_features != nullptr;
    Sample s;
    evaluate(params, i, normals, features, s);
    const float zero[3] = {};
    const float* grad_normal = normals ? params.grad_normal + 3 * i : zero;
    const float r = field_head_gradient(params, s.raw, s.gradient,
                                        params.grad_density ? params.grad_density[i] : 0.0f,
                                        grad_normal, out.v);
    if (!normals) out.v[0] = out.v[1] = out.v[2] = 0.0f;
    float u[kFieldWidth];
    for (int k = 0; k < width; ++k) {
        u[k] = r * s.e[k];
        if (normals) {
            u[k] += s.jac[k][0] * out.v[0] + s.jac[k][1] * out.v[1] + s.jac[k][2] * out.v[2];
        }
        out.g[k] = s.g[k];
        out.to_e[k] = r * s.g[k];
    }
    for (int d = 0; d < 3; ++d) out.unit[d] = s.unit[d];
    for (int j = 0; j < kFieldHidden; ++j) {
        if (!(s.hidden[0][j] > 0.0f)) continue;
        for (int k = 0; k < width; ++k) sums.s[j][k] += u[k];
    }
    if (!features) return;
    const float* grad = params.grad_features + 3 * i;
    for (int j = 0; j < kFieldHidden; ++j) {
        const float h = s.hidden[1][j];
        if (!(h > 0.0f)) continue;
        float q = 0.0f;
        for (int c = 0; c < 3; ++c) {
            q += params.w2f[c * kFieldHidden + j] * grad[c];
            sums.w2f[c][j] += grad[c] * h;
        }
        for (int k = 0; k < width; ++k) {
            sums.w1f[j][k] += q * s.e[k];
            out.to_e[k] += q * params.w1f[j * width + k];
        }
    }
}

// Adds n samples to one level of the table's gradient.
void scatter_level(const FieldParams& params, int l, const TableGradient* samples, int64_t n) {
    const GridLevel& level = params.levels[l];
    const int f_count = params.n_features;
    for (int64_t i = 0; i < n; ++i) {
        const TableGradient& s = samples[i];
        const GridCell cell = grid_locate<false>(level, s.unit[0], s.unit[1], s.unit[2]);
        for (int f = 0; f < f_count; ++f) {
            const int k = l * f_count + f;
            const float gj = s.g[k] * level.scale;
            float g[8];
            grid_corner_gradients(cell.fx, cell.fy, cell.fz, s.to_e[k], gj * s.v[0], gj * s.v[1],
                                  gj * s.v[2], g);
            for (int c = 0; c < 8; ++c) {
                params.grad_table[(level.offset + cell.entry[c]) * f_count + f] += g[c];
            }
        }
    }
}

}  // namespace

void field_fwd(const FieldParams& params, int n_threads) {
    const bool normals = params.normal != nullptr, features = params.features != nullptr;
    const int64_t n_valid = field_count(params);
    parallel_chunks(params.n_points, kChunk, n_threads, [&](int64_t begin, int64_t end) {
        Sample s;
        for (int64_t i = begin; i < end; ++i) {
            if (i >= n_valid) {
                field_clear(params, i);
                continue;
            }
            evaluate(params, i, normals, features, s);
            float slope, curvature;
            params.density[i] = field_activate(params.activation, s.raw, slope, curvature);
            if (normals) field_normal(s.gradient, slope, params.normal + 3 * i);
            if (!features) continue;
            for (int c = 0; c < 3; ++c) {
                float sum = 0.0f;
                for (int j = 0; j < kFieldHidden; ++j) {
                    sum += params.w2f[c * kFieldHidden + j] * fmaxf(s.hidden[1][j], 0.0f);
                }
                params.features[3 * i + c] = sum;
            }
        }
    });
}

void field_bwd(const FieldParams& params, int n_threads) {
    const int width = params.n_levels * params.n_features;
    // A round at a time, so that memory stays bounded: samples side by side, then levels.
    constexpr int64_t kRound = kParts * kChunk;
    std::vector<WeightSums> parts(kParts);
    const int64_t n_valid = field_count(params);
    std::vector<TableGradient> samples(n_valid < kRound ? n_valid : kRound);
    for (WeightSums& part : parts) part = {};
    for (int64_t start = 0; start < n_valid; start += kRound) {
        const int64_t n = n_valid - start < kRound ? n_valid - start : kRound;
        parallel_chunks(n, kChunk, n_threads, [&](int64_t begin, int64_t end) {
            WeightSums& part = parts[begin / kChunk];
            for (int64_t i = begin; i < end; ++i) {
                backward_sample(params, start + i, part, samples[i]);
            }
        });
        parallel_for(params.n_active, n_threads, [&](int64_t l) {
            scatter_level(params, static_cast<int>(l), samples.data(), n);
        });
    }
    for (const WeightSums& part : parts) {
        for (int j = 0; j < kFieldHidden; ++j) {
            for (int k = 0; k < width; ++k) {
                params.grad_w1d[j * width + k] += params.w2d[j] * part.s[j][k];
                params.grad_w2d[j] += params.w1d[j * width + k] * part.s[j][k];
                params.grad_w1f[j * width + k] += part.w1f[j][k];
            }
            for (int c = 0; c < 3; ++c) params.grad_w2f[c * kFieldHidden + j] += part.w2f[c][j];
        }
    }
}

}  // namespace dsd
