// What every op shares: host/device macros, CPU instruction-set dispatch and the CUDA error check.
//
// Conventions: an op is one POD params struct (pointers, sizes, switches) plus launchers
//   dsd::<op>_fwd / <op>_bwd(const Params&, int n_threads)        CPU
//   dsd::cuda::<op>_fwd / <op>_bwd(const Params&, void* stream)   CUDA, device already set
// Tensors are dense, row-major; whoever calls has checked shape, type and device. Sizes and
// addresses are int64_t: index * width overflows 32 bits at a few million samples.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DSD_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define DSD_HD static __forceinline
#else
// Internal linkage: a source compiled twice (baseline and AVX2) must not share inline functions,
// or the linker may hand AVX2 code to a processor without it.
#define DSD_HD static inline __attribute__((always_inline))
#endif

#if defined(__GNUC__)
#define DSD_PREFETCH_WRITE(address) __builtin_prefetch(address, 1)
#else
#define DSD_PREFETCH_WRITE(address) (void)(address)
#endif

// Sources listed as DSD_SIMD_SOURCES in CMakeLists.txt are compiled once per instruction set, into
// the namespace dsd::DSD_ISA each time. They use no std templates, for the reason above.
#ifndef DSD_ISA
#define DSD_ISA baseline
#endif

// Declares such a source's launcher in every namespace; DSD_CPU picks one when called.
#if defined(DSD_WITH_AVX2)
#define DSD_DECLARE_CPU(...)            \
    namespace baseline { __VA_ARGS__; } \
    namespace avx2 { __VA_ARGS__; }
#define DSD_CPU(name) (::dsd::cpu_has_avx2() ? ::dsd::avx2::name : ::dsd::baseline::name)
#else
#define DSD_DECLARE_CPU(...) \
    namespace baseline { __VA_ARGS__; }
#define DSD_CPU(name) (::dsd::baseline::name)
#endif

namespace dsd {

// True where the processor runs AVX2 and FMA and DSD_CPU_ISA is not "baseline" (asked once).
bool cpu_has_avx2();

// Makes the C library keep freed memory for the next allocation instead of handing it back to the
// system (glibc only; elsewhere nothing happens). A training step on the CPU otherwise spends half
// its time on first touches of the same large buffers.
void keep_freed_memory();

#if defined(__CUDACC__)
namespace cuda {

constexpr int kBlock = 256;

// Throws std::runtime_error with the CUDA error's name and words when `status` is an error.
void check(cudaError_t status, const char* what);

// Blocks of `kBlock` threads that cover n items; call only for n > 0.
inline unsigned int blocks_for(int64_t n, int block = kBlock) {
    return static_cast<unsigned int>((n + block - 1) / block);
}

}  // namespace cuda
#endif

}  // namespace dsd
