#include "dense.h"

#include <cstdlib>
#include <cstring>

namespace dsd {

int dense_level() {
#if defined(DSD_WITH_AVX512)
    static const int found = [] {
        const char* isa = std::getenv("DSD_CPU_ISA");
        if (isa != nullptr && std::strcmp(isa, "baseline") == 0) return 0;
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return !wide ? 0 : __builtin_cpu_supports("avx512bf16") ? 2 : 1;
    }();
    return found;
#else
    return 0;
#endif
}

}  // namespace dsd
