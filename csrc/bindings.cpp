// The only file that knows Python. Tensors come as addresses (0 for an absent one), then sizes,
// then the three launch arguments that dsd_fast._backend.target(tensor) returns:
//   device    CUDA device index, -1 for the CPU
//   stream    cudaStream_t as an integer (CUDA only)
//   n_threads threads to use (CPU only)
// Checks of shape, type and device are made in dsd_fast/ops. Launches run without the GIL.
#include "python.h"  // before all others, as Python asks

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "adam.h"
#include "common.h"
#include "composite.h"
#include "dense.h"
#include "field.h"
#include "hashgrid.h"
#include "march.h"
#include "occupancy.h"
#include "parallel.h"
#include "prune.h"
#include "rasterize.h"
#include "sh.h"

using Address = std::uintptr_t;
using dsd::python::method;

namespace dsd::cuda {
int set_device(int device);
void restore_device(int device);
int runtime_version();
}  // namespace dsd::cuda

namespace {

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Where a launch goes: see the head of this file.
struct Target {
    int device;
    Address stream;
    int n_threads;
};

// Calls cpu(n_threads) or cuda(stream) as the target says. DSD_CUDA_CALL keeps the names of CUDA
// launchers out of a build without them.
template <class Cpu, class Cuda>
void launch(const Target& target, const Cpu& cpu, const Cuda& cuda) {
    const dsd::python::WithoutGil without_gil;
    if (target.device < 0) {
        cpu(target.n_threads);
        return;
    }
#if defined(DSD_WITH_CUDA)
    // Put back afterwards, whatever happens: torch believes in its own current device.
    struct Restore {
        int device;
        ~Restore() { dsd::cuda::restore_device(device); }
    } restore{dsd::cuda::set_device(target.device)};
    cuda(pointer<void>(target.stream));
#else
    (void)cuda;
    throw std::runtime_error("dsd_fast._C was built without the CUDA backend");
#endif
}

#if defined(DSD_WITH_CUDA)
#define DSD_CUDA_CALL(...) [&](void* stream) { __VA_ARGS__; }
#else
#define DSD_CUDA_CALL(...) [](void*) {}
#endif
#define DSD_CPU_CALL(...) [&](int n_threads) { __VA_ARGS__; }

// What this module was built with, as a dict.
PyObject* build_info() {
    const char* compiler = "";
    PyObject* cuda = nullptr;
    const char* archs = "";
    const char* absent = "";  // why there is no CUDA
#if defined(__VERSION__)
    compiler = __VERSION__;
#elif defined(_MSC_VER)
    const std::string msvc = "MSVC " + std::to_string(_MSC_FULL_VER);
    compiler = msvc.c_str();
#endif
#if defined(DSD_WITH_CUDA)
    cuda = PyLong_FromLong(dsd::cuda::runtime_version());
    if (cuda == nullptr) return nullptr;
    archs = DSD_CUDA_ARCHS;
#else
    Py_INCREF(Py_None);
    cuda = Py_None;
    absent = DSD_CUDA_ABSENT;
#endif
    return Py_BuildValue("{ss si ss ss ss sN ss ss}",                               //
                         "cpu_isa", dsd::cpu_has_avx2() ? "avx2+fma" : "baseline",  //
                         "cpu_dense", dsd::dense_level(),                           //
                         "sanitize", DSD_SANITIZE,                                  //
                         "bindings_sha256", DSD_BINDINGS_SHA256,                    //
                         "compiler", compiler,                                      //
                         "cuda", cuda,                                              //
                         "cuda_archs", archs,                                       //
                         "cuda_absent", absent);
}

// `levels` is GridSpec.packed_levels: one GridLevel after the other.
dsd::HashGridParams hashgrid_params(int64_t n_points, int n_active, int n_features,
                                    const std::string& levels, Address x, Address table) {
    dsd::HashGridParams params = {};
    if (levels.size() % sizeof(dsd::GridLevel) != 0 || levels.size() > sizeof(params.levels) ||
        (n_features != 2 && n_features != 4)) {
        throw std::invalid_argument("hash grid: more levels or other features than compiled");
    }
    params.n_points = n_points;
    params.n_levels = static_cast<int32_t>(levels.size() / sizeof(dsd::GridLevel));
    params.n_active = n_active;
    params.n_features = n_features;
    params.x = pointer<const float>(x);
    params.table = pointer<const float>(table);
    std::memcpy(params.levels, levels.data(), levels.size());
    return params;
}

void hashgrid_fwd(Address x, Address table, Address y, Address jac, int64_t n_points, int n_active,
                  int n_features, const std::string& levels, bool half_table, int device,
                  Address stream, int n_threads) {
    auto params = hashgrid_params(n_points, n_active, n_features, levels, x, table);
    params.half_table = half_table;
    if (device < 0 && half_table) {
        throw std::invalid_argument("hash grid: the CPU reads float32 tables only");
    }
    params.y = pointer<float>(y);
    params.jac = pointer<float>(jac);
    launch({device, stream, n_threads}, DSD_CPU_CALL(DSD_CPU(hashgrid_fwd)(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::hashgrid_fwd(params, stream)));
}

// Bytes of the memory that hashgrid_bwd_table takes on CUDA to add in fixed point.
int64_t hashgrid_sums(int64_t n_params) {
#if defined(DSD_WITH_CUDA)
    return dsd::cuda::hashgrid_sums(n_params);
#else
    (void)n_params;
    return 0;
#endif
}

// `sums`: memory of hashgrid_sums (0: float atomics).
void hashgrid_bwd_table(Address x, Address grad_y, Address grad_jac, Address grad_table,
                        Address sums, int64_t n_points, int n_active, int n_features,
                        const std::string& levels, int device, Address stream, int n_threads) {
    auto params = hashgrid_params(n_points, n_active, n_features, levels, x, 0);
    params.grad_y = pointer<const float>(grad_y);
    params.grad_jac = pointer<const float>(grad_jac);
    params.grad_table = pointer<float>(grad_table);
    params.sums = pointer<void>(sums);
    launch({device, stream, n_threads},
           DSD_CPU_CALL(DSD_CPU(hashgrid_bwd_table)(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::hashgrid_bwd_table(params, stream)));
}

void hashgrid_bwd_input(Address x, Address table, Address grad_y, Address grad_jac, Address grad_x,
                        int64_t n_points, int n_active, int n_features, const std::string& levels,
                        int device, Address stream, int n_threads) {
    auto params = hashgrid_params(n_points, n_active, n_features, levels, x, table);
    params.grad_y = pointer<const float>(grad_y);
    params.grad_jac = pointer<const float>(grad_jac);
    params.grad_x = pointer<float>(grad_x);
    launch({device, stream, n_threads},
           DSD_CPU_CALL(DSD_CPU(hashgrid_bwd_input)(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::hashgrid_bwd_input(params, stream)));
}

// `weights` are W1 and W2 of the density head, then of the feature head; `numbers` are radius, and
// height (or the constant) and size of the blob.
dsd::FieldParams field_params(Address points, Address n_valid, Address table,
                              const std::array<Address, 4>& weights, int64_t n_points, int n_active,
                              int n_features, const std::string& levels, bool half_table,
                              int bias_kind, int activation, const std::array<double, 3>& numbers) {
    dsd::FieldParams params = {};
    if (levels.size() % sizeof(dsd::GridLevel) != 0 || levels.size() > sizeof(params.levels) ||
        (n_features != 2 && n_features != 4) ||
        levels.size() / sizeof(dsd::GridLevel) * n_features > dsd::kFieldWidth) {
        throw std::invalid_argument("field: a wider encoding or other features than compiled");
    }
    params.n_points = n_points;
    params.n_levels = static_cast<int32_t>(levels.size() / sizeof(dsd::GridLevel));
    params.n_active = n_active;
    params.n_features = n_features;
    params.half_table = half_table;
    params.bias_kind = bias_kind;
    params.activation = activation;
    params.inverse_diameter = static_cast<float>(0.5 / numbers[0]);
    params.bias_scale = static_cast<float>(numbers[1]);
    params.bias_std = static_cast<float>(numbers[2]);
    params.points = pointer<const float>(points);
    params.n_valid = pointer<const int64_t>(n_valid);
    params.table = pointer<const void>(table);
    params.w1d = pointer<const float>(weights[0]);
    params.w2d = pointer<const float>(weights[1]);
    params.w1f = pointer<const float>(weights[2]);
    params.w2f = pointer<const float>(weights[3]);
    std::memcpy(params.levels, levels.data(), levels.size());
    return params;
}

void field_launch(const dsd::FieldParams& params, bool backward, int device, Address stream,
                  int n_threads) {
    if (device < 0 && params.half_table) {
        throw std::invalid_argument("field: the CPU reads float32 tables only");
    }
    launch({device, stream, n_threads},
           DSD_CPU_CALL((backward ? DSD_CPU(field_bwd) : DSD_CPU(field_fwd))(params, n_threads)),
           DSD_CUDA_CALL((backward ? dsd::cuda::field_bwd : dsd::cuda::field_fwd)(params, stream)));
}

// `outputs`: density, features (0: none), normal (0: none).
void field_fwd(Address points, Address n_valid, Address table,
               const std::array<Address, 4>& weights, const std::array<Address, 3>& outputs,
               int64_t n_points, int n_active, int n_features, const std::string& levels,
               bool half_table, int bias_kind, int activation, const std::array<double, 3>& numbers,
               int device, Address stream, int n_threads) {
    auto params = field_params(points, n_valid, table, weights, n_points, n_active, n_features,
                               levels, half_table, bias_kind, activation, numbers);
    params.density = pointer<float>(outputs[0]);
    params.features = pointer<float>(outputs[1]);
    params.normal = pointer<float>(outputs[2]);
    field_launch(params, false, device, stream, n_threads);
}

// Bytes of the workspace that field_bwd asks for on CUDA.
int64_t field_workspace(int64_t n_points, int n_levels, int n_features, bool half_table,
                        bool normals) {
#if defined(DSD_WITH_CUDA)
    return dsd::cuda::field_workspace(n_points, n_levels, n_features, half_table, normals);
#else
    (void)n_points, (void)n_levels, (void)n_features, (void)half_table, (void)normals;
    return 0;
#endif
}

// Bytes of the memory that field_bwd takes on CUDA to add in one order and in fixed point.
int64_t field_sums(int64_t n_params) {
#if defined(DSD_WITH_CUDA)
    return dsd::cuda::field_sums(n_params);
#else
    (void)n_params;
    return 0;
#endif
}

// `grads`: of density, features, normal (0: none came), then those to add to: table, weights.
// `sums`: memory of field_sums (0: float atomics).
void field_bwd(Address points, Address n_valid, Address table,
               const std::array<Address, 4>& weights, const std::array<Address, 8>& grads,
               Address workspace, Address sums, int64_t n_points, int n_active, int n_features,
               const std::string& levels, bool half_table, int bias_kind, int activation,
               const std::array<double, 3>& numbers, int device, Address stream, int n_threads) {
    auto params = field_params(points, n_valid, table, weights, n_points, n_active, n_features,
                               levels, half_table, bias_kind, activation, numbers);
    params.grad_density = pointer<const float>(grads[0]);
    params.grad_features = pointer<const float>(grads[1]);
    params.grad_normal = pointer<const float>(grads[2]);
    params.grad_table = pointer<float>(grads[3]);
    params.grad_w1d = pointer<float>(grads[4]);
    params.grad_w2d = pointer<float>(grads[5]);
    params.grad_w1f = pointer<float>(grads[6]);
    params.grad_w2f = pointer<float>(grads[7]);
    params.workspace = pointer<void>(workspace);
    params.sums = pointer<void>(sums);
    field_launch(params, true, device, stream, n_threads);
}

void sh_fwd(Address dirs, Address y, int64_t n_dirs, int device, Address stream, int n_threads) {
    const dsd::ShParams params = {n_dirs, pointer<const float>(dirs), pointer<float>(y), nullptr,
                                  nullptr};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::sh_fwd(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::sh_fwd(params, stream)));
}

void sh_bwd(Address dirs, Address grad_y, Address grad_dirs, int64_t n_dirs, int device,
            Address stream, int n_threads) {
    const dsd::ShParams params = {n_dirs, pointer<const float>(dirs), nullptr,
                                  pointer<const float>(grad_y), pointer<float>(grad_dirs)};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::sh_bwd(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::sh_bwd(params, stream)));
}

// `aabb` is the low corner, then the high one.
dsd::MarchParams march_params(Address origins, Address dirs, Address jitter, Address occupancy,
                              int64_t n_rays, int n_cells, const std::array<double, 6>& aabb,
                              double step, double near, double far) {
    dsd::MarchParams params = {};
    params.origins = pointer<const float>(origins);
    params.dirs = pointer<const float>(dirs);
    params.jitter = pointer<const float>(jitter);
    params.occupancy = pointer<const uint8_t>(occupancy);
    params.n_rays = n_rays;
    params.n_cells = n_cells;
    for (int a = 0; a < 3; ++a) {
        params.low[a] = static_cast<float>(aabb[a]);
        params.high[a] = static_cast<float>(aabb[a + 3]);
        params.cells_per_unit[a] = static_cast<float>(n_cells / (aabb[a + 3] - aabb[a]));
        params.cell_size[a] = static_cast<float>((aabb[a + 3] - aabb[a]) / n_cells);
    }
    params.step = static_cast<float>(step);
    params.steps_per_unit = static_cast<float>(1.0 / step);
    params.near = static_cast<float>(near);
    params.far = static_cast<float>(far);
    return params;
}

// Scratch is (counts, bases, total). Packed is (offsets, n_dropped, ray_indices, t_starts, t_ends),
// the first two 0 where they are not wanted; `wide` ray indices are int64, others int32.
using Scratch = std::array<Address, 3>;
using Packed = std::array<Address, 5>;

dsd::PackParams pack_params(int64_t n_rays, const Scratch& scratch) {
    dsd::PackParams params = {};
    params.n_rays = n_rays;
    params.counts = pointer<int>(scratch[0]);
    params.bases = pointer<int64_t>(scratch[1]);
    params.total = pointer<int64_t>(scratch[2]);
    return params;
}

dsd::PackParams pack_params(int64_t n_rays, const Scratch& scratch, int64_t capacity,
                            const Packed& packed, bool wide) {
    auto params = pack_params(n_rays, scratch);
    params.capacity = capacity;
    params.offsets = pointer<int64_t>(packed[0]);
    params.n_dropped = pointer<int64_t>(packed[1]);
    params.ray_indices = wide ? pointer<int64_t>(packed[2]) : nullptr;
    params.ray_indices32 = wide ? nullptr : pointer<int32_t>(packed[2]);
    params.t_starts = pointer<float>(packed[3]);
    params.t_ends = pointer<float>(packed[4]);
    return params;
}

void march_count(Address origins, Address dirs, Address jitter, Address occupancy, int64_t n_rays,
                 int n_cells, const std::array<double, 6>& aabb, double step, double near,
                 double far, Address runs, const Scratch& scratch, int device, Address stream,
                 int n_threads) {
    auto params =
        march_params(origins, dirs, jitter, occupancy, n_rays, n_cells, aabb, step, near, far);
    params.runs = pointer<dsd::MarchRun>(runs);
    params.out = pack_params(n_rays, scratch);
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::march_count(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::march_count(params, stream)));
}

void march_write(Address origins, Address dirs, Address jitter, Address occupancy, int64_t n_rays,
                 int n_cells, const std::array<double, 6>& aabb, double step, double near,
                 double far, Address runs, const Scratch& scratch, int64_t capacity,
                 const Packed& packed, bool wide, int device, Address stream, int n_threads) {
    auto params =
        march_params(origins, dirs, jitter, occupancy, n_rays, n_cells, aabb, step, near, far);
    params.runs = pointer<dsd::MarchRun>(runs);
    params.out = pack_params(n_rays, scratch, capacity, packed, wide);
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::march_write(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::march_write(params, stream)));
}

dsd::VisibilityParams visibility_params(Address sigmas, Address t_starts, Address t_ends,
                                        Address offsets, Address alpha_threshold,
                                        double transmittance_threshold, int64_t n_rays,
                                        int64_t n_samples, Address visible) {
    return {pointer<const float>(sigmas),
            pointer<const float>(t_starts),
            pointer<const float>(t_ends),
            pointer<const int64_t>(offsets),
            pointer<const float>(alpha_threshold),
            static_cast<float>(transmittance_threshold),
            n_rays,
            n_samples,
            pointer<uint8_t>(visible)};
}

void visibility(Address sigmas, Address t_starts, Address t_ends, Address offsets,
                Address alpha_threshold, double transmittance_threshold, int64_t n_rays,
                int64_t n_samples, Address visible, int device, Address stream, int n_threads) {
    const auto params = visibility_params(sigmas, t_starts, t_ends, offsets, alpha_threshold,
                                          transmittance_threshold, n_rays, n_samples, visible);
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::visibility(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::visibility(params, stream)));
}

// Both passes: the second needs no number that the host would have to wait for.
void prune(Address sigmas, Address t_starts, Address t_ends, Address offsets,
           Address alpha_threshold, double transmittance_threshold, int64_t n_rays,
           int64_t n_samples, Address visible, const Scratch& scratch, int64_t capacity,
           const Packed& packed, int device, Address stream, int n_threads) {
    const dsd::PruneParams params = {
        visibility_params(sigmas, t_starts, t_ends, offsets, alpha_threshold,
                          transmittance_threshold, n_rays, n_samples, visible),
        pack_params(n_rays, scratch, capacity, packed, false)};
    launch({device, stream, n_threads},
           DSD_CPU_CALL(dsd::prune_count(params, n_threads); dsd::prune_write(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::prune_count(params, stream);
                         dsd::cuda::prune_write(params, stream)));
}

void composite_fwd(Address sigmas, Address rgbs, Address normals, Address t_starts, Address t_ends,
                   Address offsets, Address dirs, int64_t n_rays, int64_t n_samples, Address color,
                   Address opacity, Address depth, Address z_variance, Address normal,
                   Address weights, Address orientation, int device, Address stream,
                   int n_threads) {
    const dsd::CompositeParams params = {pointer<const float>(sigmas),
                                         pointer<const float>(rgbs),
                                         pointer<const float>(normals),
                                         pointer<const float>(t_starts),
                                         pointer<const float>(t_ends),
                                         pointer<const int64_t>(offsets),
                                         pointer<const float>(dirs),
                                         n_rays,
                                         n_samples,
                                         pointer<float>(color),
                                         pointer<float>(opacity),
                                         pointer<float>(depth),
                                         pointer<float>(z_variance),
                                         pointer<float>(normal),
                                         pointer<float>(weights),
                                         pointer<float>(orientation)};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::composite_fwd(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::composite_fwd(params, stream)));
}

void composite_bwd(Address sigmas, Address rgbs, Address normals, Address t_starts, Address t_ends,
                   Address offsets, Address dirs, int64_t n_rays, int64_t n_samples,
                   Address opacity, Address depth, Address z_variance, Address grad_color,
                   Address grad_opacity, Address grad_depth, Address grad_z_variance,
                   Address grad_normal, Address grad_weights, Address grad_orientation,
                   Address grad_sigmas, Address grad_rgbs, Address grad_normals, int device,
                   Address stream, int n_threads) {
    const dsd::CompositeParams params = {pointer<const float>(sigmas),
                                         pointer<const float>(rgbs),
                                         pointer<const float>(normals),
                                         pointer<const float>(t_starts),
                                         pointer<const float>(t_ends),
                                         pointer<const int64_t>(offsets),
                                         pointer<const float>(dirs),
                                         n_rays,
                                         n_samples,
                                         nullptr,
                                         pointer<float>(opacity),
                                         pointer<float>(depth),
                                         pointer<float>(z_variance),
                                         nullptr,
                                         nullptr,
                                         nullptr};
    const dsd::CompositeGrads grads = {pointer<const float>(grad_color),
                                       pointer<const float>(grad_opacity),
                                       pointer<const float>(grad_depth),
                                       pointer<const float>(grad_z_variance),
                                       pointer<const float>(grad_normal),
                                       pointer<const float>(grad_weights),
                                       pointer<const float>(grad_orientation),
                                       pointer<float>(grad_sigmas),
                                       pointer<float>(grad_rgbs),
                                       pointer<float>(grad_normals)};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::composite_bwd(params, grads, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::composite_bwd(params, grads, stream)));
}

void occupancy_update(Address occs, Address indices, Address values, Address peaks, int64_t n_cells,
                      int64_t n_values, double decay, int device, Address stream, int n_threads) {
    const dsd::OccupancyUpdateParams params = {pointer<float>(occs),
                                               pointer<const int64_t>(indices),
                                               pointer<const float>(values),
                                               pointer<float>(peaks),
                                               n_cells,
                                               n_values,
                                               static_cast<float>(decay)};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::occupancy_update(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::occupancy_update(params, stream)));
}

void occupancy_threshold(Address occs, int64_t n_cells, double max_threshold, Address threshold,
                         Address binary, int device, Address stream, int n_threads) {
    const dsd::OccupancyThresholdParams params = {
        pointer<const float>(occs), n_cells, static_cast<float>(max_threshold),
        pointer<float>(threshold), pointer<uint8_t>(binary)};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::occupancy_threshold(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::occupancy_threshold(params, stream)));
}

void adam_step(Address param, Address grad, Address exp_avg, Address exp_avg_sq, Address half,
               Address step, Address grad_scale, Address found_inf, int64_t n, double lr,
               double beta1, double beta2, double eps, bool zero_grad, int device, Address stream,
               int n_threads) {
    dsd::AdamParams params = {};
    params.param = pointer<float>(param);
    params.grad = pointer<float>(grad);
    params.exp_avg = pointer<float>(exp_avg);
    params.exp_avg_sq = pointer<float>(exp_avg_sq);
    params.half = pointer<uint16_t>(half);
    params.step = pointer<float>(step);
    params.grad_scale = pointer<const float>(grad_scale);
    params.found_inf = pointer<const float>(found_inf);
    params.n = n;
    params.lr = lr;
    params.beta1 = beta1;
    params.beta2 = beta2;
    params.eps = static_cast<float>(eps);
    params.zero_grad = zero_grad;
    launch({device, stream, n_threads}, DSD_CPU_CALL(DSD_CPU(adam_step)(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::adam_step(params, stream)));
}

// Scratch is (vertices, keys, queue), the last 0 on the CPU; outputs are ids and weights.
void rasterize(Address positions, Address faces, const std::array<int64_t, 3>& sizes,
               const std::array<int, 3>& picture, const Scratch& scratch, Address ids,
               Address weights, int device, Address stream, int n_threads) {
    const dsd::RasterizeParams params = {pointer<const float>(positions),
                                         pointer<const int32_t>(faces),
                                         sizes[0],
                                         sizes[1],
                                         sizes[2],
                                         picture[0],
                                         picture[1],
                                         picture[2],
                                         pointer<dsd::ScreenVertex>(scratch[0]),
                                         pointer<int64_t>(scratch[1]),
                                         pointer<int64_t>(scratch[2]),
                                         pointer<int32_t>(ids),
                                         pointer<float>(weights)};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::rasterize(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::rasterize(params, stream)));
}

// Strides in threes: batch, row, pixel.
using Strides = std::array<int64_t, 3>;

void need_dense(bool half) {
    if (dsd::dense_level() < (half ? 2 : 1)) {
        throw std::runtime_error("dense layers: this processor or build lacks AVX-512");
    }
}

void dense(Address x, Address w, Address bias, Address add, Address residual, Address y,
           const Strides& x_strides, const Strides& y_strides, int64_t add_stride,
           const std::array<int64_t, 3>& size, int64_t terms, int64_t columns,
           const std::array<int64_t, dsd::kDenseTaps>& taps, int n_taps, bool half, bool half_out,
           bool gated, int device, Address stream, int n_threads) {
    need_dense(half);
    dsd::DenseParams params = {};
    params.x = pointer<const void>(x);
    params.w = pointer<const void>(w);
    params.bias = pointer<const float>(bias);
    params.add = pointer<const float>(add);
    params.residual = pointer<const float>(residual);
    params.y = pointer<void>(y);
    params.x_batch = x_strides[0], params.x_row = x_strides[1], params.x_pixel = x_strides[2];
    params.y_batch = y_strides[0], params.y_row = y_strides[1], params.y_pixel = y_strides[2];
    params.add_stride = add_stride;
    params.batch = size[0], params.height = size[1], params.width = size[2];
    params.terms = terms;
    params.columns = columns;
    std::copy(taps.begin(), taps.end(), params.taps);
    params.n_taps = n_taps;
    params.half = half;
    params.half_out = half_out;
    params.gated = gated;
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::avx512::dense(params, n_threads)),
           [](void*) {});
}

void dense_norm(Address x, Address x2, Address weight, Address bias, Address scale_shift,
                Address sums, Address stats, Address y, const std::array<int64_t, 3>& size,
                int64_t channels, int64_t channels_1, int64_t scale_stride, int groups, double eps,
                bool silu, bool border, bool half, int device, Address stream, int n_threads) {
    need_dense(half);
    const dsd::DenseNormParams params = {pointer<const float>(x),
                                         pointer<const float>(x2),
                                         pointer<const float>(weight),
                                         pointer<const float>(bias),
                                         pointer<const float>(scale_shift),
                                         pointer<float>(sums),
                                         pointer<float>(stats),
                                         pointer<void>(y),
                                         size[0],
                                         size[1],
                                         size[2],
                                         channels,
                                         channels_1,
                                         scale_stride,
                                         groups,
                                         static_cast<float>(eps),
                                         silu,
                                         border,
                                         half};
    launch({device, stream, n_threads}, DSD_CPU_CALL(dsd::avx512::dense_norm(params, n_threads)),
           [](void*) {});
}

void dense_norm_grad(Address grad, Address x, Address weight, Address bias, Address stats,
                     Address residual, Address sums, Address dx, Address framed,
                     const std::array<int64_t, 3>& size, int64_t channels, int groups, bool silu,
                     bool half, int device, Address stream, int n_threads) {
    need_dense(half);
    const dsd::DenseNormGradParams params = {pointer<float>(grad),
                                             pointer<const float>(x),
                                             pointer<const float>(weight),
                                             pointer<const float>(bias),
                                             pointer<const float>(stats),
                                             pointer<const float>(residual),
                                             pointer<float>(sums),
                                             pointer<float>(dx),
                                             pointer<void>(framed),
                                             size[0],
                                             size[1],
                                             size[2],
                                             channels,
                                             groups,
                                             silu,
                                             half};
    launch({device, stream, n_threads},
           DSD_CPU_CALL(dsd::avx512::dense_norm_grad(params, n_threads)), [](void*) {});
}

void dense_layer_norm(Address x, Address weight, Address bias, Address y, int64_t rows,
                      int64_t channels, double eps, bool half, int device, Address stream,
                      int n_threads) {
    need_dense(half);
    const dsd::DenseLayerNormParams params = {pointer<const float>(x),
                                              pointer<const float>(weight),
                                              pointer<const float>(bias),
                                              pointer<void>(y),
                                              rows,
                                              channels,
                                              static_cast<float>(eps),
                                              half};
    launch({device, stream, n_threads},
           DSD_CPU_CALL(dsd::avx512::dense_layer_norm(params, n_threads)), [](void*) {});
}

// Strides of q, k and v: batch and token of each.
void dense_attention(Address q, Address k, Address v, Address y, Address workspace,
                     const std::array<int64_t, 6>& strides, int64_t batch, int64_t queries,
                     int64_t keys, int64_t heads, int64_t width, double scale, bool half,
                     int device, Address stream, int n_threads) {
    need_dense(half);
    if (width > dsd::kDenseHead) throw std::invalid_argument("dense_attention: head too wide");
    const dsd::DenseAttentionParams params = {pointer<const void>(q),
                                              pointer<const void>(k),
                                              pointer<const void>(v),
                                              pointer<void>(y),
                                              pointer<void>(workspace),
                                              strides[0],
                                              strides[1],
                                              strides[2],
                                              strides[3],
                                              strides[4],
                                              strides[5],
                                              batch,
                                              queries,
                                              keys,
                                              heads,
                                              width,
                                              static_cast<float>(scale),
                                              half};
    launch({device, stream, n_threads},
           DSD_CPU_CALL(dsd::avx512::dense_attention(params, n_threads)), [](void*) {});
}

PyMethodDef methods[] = {
    method<build_info>("build_info", "What this module was built with, as a dict."),
    method<dsd::keep_freed_memory>(
        "keep_freed_memory",
        "Tells the C library to keep freed memory (glibc): faster training steps on the CPU."),
    method<dsd::keep_crew>(
        "keep_crew", "Threads that wait for this thread's calls; whether it had none before."),
    method<dsd::release_crew>("release_crew"),

    method<hashgrid_fwd>("hashgrid_fwd"),
    method<hashgrid_bwd_table>("hashgrid_bwd_table"),
    method<hashgrid_sums>("hashgrid_sums"),
    method<hashgrid_bwd_input>("hashgrid_bwd_input"),

    method<field_fwd>("field_fwd"),
    method<field_bwd>("field_bwd"),
    method<field_workspace>("field_workspace"),
    method<field_sums>("field_sums"),

    method<sh_fwd>("sh_fwd"),
    method<sh_bwd>("sh_bwd"),

    method<march_count>("march_count"),
    method<march_write>("march_write"),

    method<visibility>("visibility"),
    method<prune>("prune"),
    method<composite_fwd>("composite_fwd"),
    method<composite_bwd>("composite_bwd"),

    method<occupancy_update>("occupancy_update"),
    method<occupancy_threshold>("occupancy_threshold"),

    method<adam_step>("adam_step"),

    method<rasterize>("rasterize"),

    method<dense>("dense"),
    method<dense_norm>("dense_norm"),
    method<dense_norm_grad>("dense_norm_grad"),
    method<dsd::dense_norm_parts>("dense_norm_parts"),
    method<dense_layer_norm>("dense_layer_norm"),
    method<dense_attention>("dense_attention"),
    method<dsd::dense_attention_room>("dense_attention_room"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Compiled kernels of dsd_fast (CPU, and CUDA when built with it)",
                          0,
                          methods,
                          slots,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&module_def); }
