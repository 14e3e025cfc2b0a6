// The bfloat16 storage type and the two attributes every SIMD vocabulary uses.
#pragma once
#include <cstdint>
#include <cstring>

// Always inlined: a function of a vocabulary that stayed out of line could be merged by the linker
// with the copy of a translation unit built for a newer CPU.
#define MINT_INLINE static inline __attribute__((always_inline))

namespace mint {

struct bf16 {
    uint16_t bits;
};

MINT_INLINE float bits_to_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

MINT_INLINE uint32_t float_to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

MINT_INLINE float to_float(float x) { return x; }
MINT_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
MINT_INLINE bf16 to_bf16(float f) {
    const uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40)};
    return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

MINT_INLINE void put(float* p, float x) { *p = x; }
MINT_INLINE void put(bf16* p, float x) { *p = to_bf16(x); }

// Constants of exp(x) = 2^n * p(r), n = round(x / ln 2), r = x - n ln 2 (ln 2 in two parts, the first with
// trailing zero bits so that n * kLn2Hi is exact). p is the degree-7 minimax form of Cephes' expf: about 1 ulp.
// The clamp keeps n finite: below kExpLow the result rounds to 0, above kExpHigh it overflows to inf.
namespace exp_constants {
constexpr float kLow = -104.0f, kHigh = 89.0f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
constexpr float kP0 = 1.9875691500e-4f, kP1 = 1.3981999507e-3f, kP2 = 8.3334519073e-3f;
constexpr float kP3 = 4.1665795894e-2f, kP4 = 1.6666665459e-1f, kP5 = 5.0000001201e-1f;
// 2^x = 2^floor(x) * p(x - floor(x)), p(0) = 1: minimax in the relative error (2e-9; 6e-8 in fp32 arithmetic).
constexpr float kQ1 = 6.9314704444e-1f, kQ2 = 2.4022930555e-1f, kQ3 = 5.5485280618e-2f;
constexpr float kQ4 = 9.6754515674e-3f, kQ5 = 1.2467846442e-3f, kQ6 = 2.1612914969e-4f;
}  // namespace exp_constants

}  // namespace mint
