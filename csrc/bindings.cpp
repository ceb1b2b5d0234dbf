// The only file that knows Python. Tensors come as addresses (0 for an absent one), then sizes,
// then the three launch arguments that dsd_fast._backend.target(tensor) returns:
//   device    CUDA device index, -1 for the CPU
//   stream    cudaStream_t as an integer (CUDA only)
//   n_threads threads to use (CPU only)
// Checks of shape, type and device are made in dsd_fast/ops. Launches run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common.h"
#include "hashgrid.h"
#include "sh.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace dsd::cuda {
void set_device(int device);
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
    py::gil_scoped_release release;
    if (target.device < 0) {
        cpu(target.n_threads);
        return;
    }
#if defined(DSD_WITH_CUDA)
    dsd::cuda::set_device(target.device);
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

py::dict build_info() {
    py::dict info;
    info["cpu_isa"] = dsd::cpu_has_avx2() ? "avx2+fma" : "baseline";
    info["sanitize"] = DSD_SANITIZE;
#if defined(__VERSION__)
    info["compiler"] = __VERSION__;
#endif
#if defined(DSD_WITH_CUDA)
    info["cuda"] = dsd::cuda::runtime_version();
    info["cuda_archs"] = DSD_CUDA_ARCHS;
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = "";
#endif
    return info;
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
                  int n_features, const std::string& levels, int device, Address stream,
                  int n_threads) {
    auto params = hashgrid_params(n_points, n_active, n_features, levels, x, table);
    params.y = pointer<float>(y);
    params.jac = pointer<float>(jac);
    launch({device, stream, n_threads}, DSD_CPU_CALL(DSD_CPU(hashgrid_fwd)(params, n_threads)),
           DSD_CUDA_CALL(dsd::cuda::hashgrid_fwd(params, stream)));
}

void hashgrid_bwd_table(Address x, Address grad_y, Address grad_jac, Address grad_table,
                        int64_t n_points, int n_active, int n_features, const std::string& levels,
                        int device, Address stream, int n_threads) {
    auto params = hashgrid_params(n_points, n_active, n_features, levels, x, 0);
    params.grad_y = pointer<const float>(grad_y);
    params.grad_jac = pointer<const float>(grad_jac);
    params.grad_table = pointer<float>(grad_table);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of dsd_fast (CPU, and CUDA when built with it)";
    m.def("build_info", &build_info, "What this module was built with, as a dict.");

    m.def("hashgrid_fwd", &hashgrid_fwd);
    m.def("hashgrid_bwd_table", &hashgrid_bwd_table);
    m.def("hashgrid_bwd_input", &hashgrid_bwd_input);

    m.def("sh_fwd", &sh_fwd);
    m.def("sh_bwd", &sh_bwd);
}
