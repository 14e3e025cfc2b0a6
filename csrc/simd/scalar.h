// The SIMD vocabulary with one lane: runs anywhere, and is the plainest statement of what each word means.
#pragma once
#include <cmath>

#include "bf16.h"

namespace mint {

struct Scalar {
    static constexpr int W = 1;                  // fp32 lanes in F
    static constexpr bool kBf16Dot = false;      // has a dot product of bf16 pairs
    static constexpr bool kWidensWords = false;  // has Words: bf16 or int8 in lanes of 32 bits, widened there (avx2.h)
    static constexpr bool kTiles = false;        // has products of whole tiles (amx.h), while a Tiles lives
    struct Tiles {
        Tiles() {}
    };
    static constexpr int kMr = 4, kNv = 4;  // GEMM register tile: kMr rows x kNv vectors
    using F = float;

    MINT_INLINE F zero() { return 0.0f; }
    MINT_INLINE F set1(float x) { return x; }
    template <class T>
    MINT_INLINE F load(const T* p) {
        return to_float(*p);
    }
    template <class T>
    MINT_INLINE F load_n(const T* p, int n) {
        return n > 0 ? to_float(*p) : 0.0f;
    }  // lanes >= n are 0
    template <class T>
    MINT_INLINE void store(T* p, F x) {
        put(p, x);
    }
    template <class T>
    MINT_INLINE void store_n(T* p, F x, int n) {
        if (n > 0) put(p, x);
    }

    MINT_INLINE F add(F a, F b) { return a + b; }
    MINT_INLINE F sub(F a, F b) { return a - b; }
    MINT_INLINE F mul(F a, F b) { return a * b; }
    MINT_INLINE F div(F a, F b) { return a / b; }
    MINT_INLINE F reciprocal(F a) { return 1.0f / a; }  // of a > 0, to an ulp
    MINT_INLINE F sqrt(F a) { return std::sqrt(a); }
    MINT_INLINE F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN
    MINT_INLINE F fma(F a, F b, F c) { return a * b + c; }
    MINT_INLINE float sum(F a) { return a; }
    MINT_INLINE float hmax(F a) { return a; }

    MINT_INLINE F exp(F x) {
        using namespace exp_constants;
        if (x != x) return x;
        x = x < kHigh ? x : kHigh;
        x = x > kLow ? x : kLow;
        const float z = x * kLog2e;
        const int n = int(z + (z < 0 ? -0.5f : 0.5f));
        const float r = (x - float(n) * kLn2Hi) - float(n) * kLn2Lo;
        float p = kP0;
        p = p * r + kP1;
        p = p * r + kP2;
        p = p * r + kP3;
        p = p * r + kP4;
        p = p * r + kP5;
        p = p * (r * r) + r + 1.0f;
        const int half = n >> 1;  // two steps, so that subnormal results and 2^128 both come out right
        return p * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(n - half + 127) << 23);
    }

    // e^x with a relative error of 1e-7 (1 + |x|), for softmaxes: there it matters only near 0. exp_fast(0) is 1.
    MINT_INLINE F exp_fast(F x) { return exp(x); }

    // W x W transpose of 32-bit words: dst[c * dst_stride + r] = word c at src + r * src_bytes (any alignment).
    MINT_INLINE void transpose(const void* src, int64_t, void* dst, int64_t) { std::memcpy(dst, src, 4); }
    // The same of bf16, src_stride apart, widened: dst[c * dst_stride + r] = src[r * src_stride + c].
    MINT_INLINE void widen_transposed(const bf16* src, int64_t, float* dst, int64_t) { *dst = to_float(*src); }
};

}  // namespace mint
