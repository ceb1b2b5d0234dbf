#include "common.h"

#include <cstdlib>
#include <cstring>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace dsd {

bool cpu_has_avx2() {
#if defined(DSD_WITH_AVX2)
    static const bool found = [] {
        const char* isa = std::getenv("DSD_CPU_ISA");
        const bool refused = isa != nullptr && std::strcmp(isa, "baseline") == 0;
        return !refused && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }();
    return found;
#else
    return false;
#endif
}

void keep_freed_memory() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT32_MAX);
#endif
}

}  // namespace dsd
