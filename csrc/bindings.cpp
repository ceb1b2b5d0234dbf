// The only file that knows Python. Tensors come as addresses (0 for an absent one), then sizes,
// then the three launch arguments that dsd_fast._backend.target(tensor) returns:
//   device    CUDA device index, -1 for the CPU
//   stream    cudaStream_t as an integer (CUDA only)
//   n_threads threads to use (CPU only)
// Checks of shape, type and device are made in dsd_fast/ops. Launches run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of dsd_fast (CPU, and CUDA when built with it)";
    m.def("build_info", &build_info, "What this module was built with, as a dict.");
}
