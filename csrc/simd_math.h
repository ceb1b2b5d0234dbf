// exp, expm1 and float -> half for CPU loops that the compiler vectorises: no branches, no calls,
// no tables. For sources compiled once per instruction set (common.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace dsd::simd {

DSD_HD uint32_t bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

DSD_HD float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// 1.5 * 2^23: added to a float of less than 2^22, it leaves the nearest integer in the low bits.
constexpr float kRound = 12582912.0f;

// x = n log(2) + r with |r| <= log(2) / 2.
struct Reduced {
    float r;
    int32_t n;
};

DSD_HD Reduced reduce(float x) {
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    // log(2) in two parts, the first with few digits, so that n times it is exact.
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    return {r, static_cast<int32_t>(bits(shifted) - bits(kRound))};
}

// exp(r) - 1 for |r| <= log(2) / 2; the coefficients are those of Cephes' expf.
DSD_HD float expm1_reduced(float r) {
    float q = 1.9875691500e-4f;
    q = q * r + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
    return q * (r * r) + r;
}

// 2^n for n in [-126, 127].
DSD_HD float power_of_two(int32_t n) { return from_bits(static_cast<uint32_t>(n + 127) << 23); }

// exp(x) to 2 units in the last place. Subnormal results, 0, infinity and NaN come out as in libm.
DSD_HD float exp(float x) {
    x = x < -105.0f ? -105.0f : x;  // a NaN passes both
    x = x > 90.0f ? 90.0f : x;
    const Reduced k = reduce(x);
    // In two factors: n leaves the exponents of floats on both sides.
    const int32_t half = k.n >> 1;
    return (expm1_reduced(k.r) + 1.0f) * power_of_two(half) * power_of_two(k.n - half);
}

// exp(x) - 1 to 2 units in the last place, for tiny x too.
DSD_HD float expm1(float x) {
    x = x < -30.0f ? -30.0f : x;  // -1 to the last bit from -17 on
    x = x > 89.0f ? 89.0f : x;
    const Reduced k = reduce(x);
    // Half of it, because 2^128 is no float.
    const float scale = power_of_two(k.n - 1);
    return 2.0f * (scale * expm1_reduced(k.r) + (scale - 0.5f));
}

// The nearest half, ties to even, as bits. Overflow gives infinity, NaN a quiet NaN.
DSD_HD uint16_t half_bits(float x) {
    const uint32_t sign = bits(x) & 0x80000000u, u = bits(x) ^ sign;
    // Adding 0.5 rounds a number below 2^-14 to a multiple of 2^-24, as a subnormal half is.
    const uint32_t subnormal = bits(from_bits(u) + 0.5f) - bits(0.5f);
    const uint32_t normal = (u - (112u << 23) + 0xfffu + (u >> 13 & 1u)) >> 13;
    const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = u < (113u << 23) ? subnormal : normal;
    return static_cast<uint16_t>((u < (143u << 23) ? finite : special) | sign >> 16);
}

}  // namespace dsd::simd
