#include "common.h"

namespace dsd {

bool cpu_has_avx2() {
#if defined(DSD_WITH_AVX2)
    static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return found;
#else
    return false;
#endif
}

}  // namespace dsd
