// The SIMD vocabulary on AVX-512 F/BW/DQ/VL: 16 fp32 lanes. Meanings: scalar.h.
#pragma once
#include <immintrin.h>

#include <limits>
#include <type_traits>

#include "bf16.h"
#include "sanitizer.h"

namespace mint {

struct Avx512 {
    static constexpr int W = 16;
    static constexpr bool kBf16Dot = false, kTiles = false, kWidensWords = true;
    struct Tiles {
        Tiles() {}
    };
    static constexpr int kMr = 8, kNv = 3;
    using F = __m512;
    using Words = __m512i;  // two bf16 or four int8 a lane

    MINT_INLINE F zero() { return _mm512_setzero_ps(); }
    MINT_INLINE F set1(float x) { return _mm512_set1_ps(x); }
    MINT_INLINE __mmask16 mask(int n) {
        return n >= W ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
    }
    MINT_INLINE F widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
    MINT_INLINE __m256i narrow(F x) {
        const __m512i u = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const __m512i even = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 isnan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i r = _mm512_mask_or_epi32(even, isnan, u, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
    }
    MINT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    MINT_INLINE F load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    MINT_INLINE F load_n(const float* p, int n) {
        if (n >= W) return load(p);
        reads(p, n);
        return _mm512_maskz_loadu_ps(mask(n), p);
    }
    MINT_INLINE F load_n(const bf16* p, int n) {
        if (n >= W) return load(p);
        reads(p, n);
        return widen(_mm256_maskz_loadu_epi16(mask(n), p));
    }
    MINT_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    MINT_INLINE void store(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
    MINT_INLINE void store_n(float* p, F x, int n) {
        if (n >= W) return store(p, x);
        writes(p, n);
        _mm512_mask_storeu_ps(p, mask(n), x);
    }
    MINT_INLINE void store_n(bf16* p, F x, int n) {
        if (n >= W) return store(p, x);
        writes(p, n);
        _mm256_mask_storeu_epi16(p, mask(n), narrow(x));
    }

    MINT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    MINT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    MINT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    MINT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    // An estimate of 14 bits and one Newton step, which would make 0 * inf of the reciprocal of inf.
    MINT_INLINE F reciprocal(F a) {
        const F y = _mm512_rcp14_ps(a);
        const __mmask16 finite = _mm512_cmp_ps_mask(a, set1(std::numeric_limits<float>::infinity()), _CMP_NEQ_UQ);
        return _mm512_maskz_fmadd_ps(finite, y, _mm512_fnmadd_ps(a, y, set1(1.0f)), y);
    }
    MINT_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
    MINT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    MINT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    MINT_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
    MINT_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a); }

    MINT_INLINE F exp(F x) {
        using namespace exp_constants;
        x = _mm512_min_ps(set1(kHigh), x);  // the second operand comes back where one is NaN
        x = _mm512_max_ps(set1(kLow), x);
        const F n = _mm512_roundscale_ps(mul(x, set1(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const F r = _mm512_fnmadd_ps(n, set1(kLn2Lo), _mm512_fnmadd_ps(n, set1(kLn2Hi), x));
        F p = set1(kP0);
        p = fma(p, r, set1(kP1));
        p = fma(p, r, set1(kP2));
        p = fma(p, r, set1(kP3));
        p = fma(p, r, set1(kP4));
        p = fma(p, r, set1(kP5));
        p = add(fma(p, mul(r, r), r), set1(1.0f));
        return _mm512_scalef_ps(p, n);
    }

    MINT_INLINE F exp_fast(F e) {
        using namespace exp_constants;
        const F x = mul(e, set1(kLog2e));
        const F r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x); 0 for inf
        F p = set1(kQ6);
        p = fma(p, r, set1(kQ5));
        p = fma(p, r, set1(kQ4));
        p = fma(p, r, set1(kQ3));
        p = fma(p, r, set1(kQ2));
        p = fma(p, r, set1(kQ1));
        p = fma(p, r, set1(1.0f));
        return _mm512_scalef_ps(p, x);  // times 2^floor(x)
    }

    // Of 16 rows of 16 bytes: to[i] has the word i of every row. Lanes are filled by the loads and never crossed.
    MINT_INLINE void transpose_words(const void* src, int64_t src_bytes, Words* to) {
        const auto quarter = [=](int r) __attribute__((always_inline)) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(src) + r * src_bytes));
        };
        __m512i r[4], t[4];
        for (int i = 0; i < 4; ++i) {
            r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(quarter(i)), quarter(i + 4), 1);
            r[i] = _mm512_inserti32x4(r[i], quarter(i + 8), 2);
            r[i] = _mm512_inserti32x4(r[i], quarter(i + 12), 3);
        }
        for (int i = 0; i < 4; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            to[2 * i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            to[2 * i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        }
    }
    MINT_INLINE Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
    MINT_INLINE Words set1_word(uint32_t word) { return _mm512_set1_epi32(int(word)); }
    // Element I of every word.
    template <class E, int I>
    MINT_INLINE F widened(Words words) {
        if constexpr (std::is_same_v<E, int8_t>) {
            const __m512i top = I == 3 ? words : _mm512_slli_epi32(words, 24 - 8 * I);
            return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
        } else {
            const __m512i top =
                I == 0 ? _mm512_slli_epi32(words, 16) : _mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000)));
            return _mm512_castsi512_ps(top);
        }
    }
    MINT_INLINE void widen_transposed(const bf16* src, int64_t src_stride, float* dst, int64_t dst_stride) {
        for (int half = 0; half < 2; ++half) {
            Words words[4];
            transpose_words(src + half * 8, src_stride * 2, words);
            for (int i = 0; i < 4; ++i, dst += 2 * dst_stride) {
                store(dst, widened<bf16, 0>(words[i]));
                store(dst + dst_stride, widened<bf16, 1>(words[i]));
            }
        }
    }

    MINT_INLINE void transpose(const void* source, int64_t src_bytes, void* target, int64_t dst_stride) {
        const char* src = static_cast<const char*>(source);
        float* dst = static_cast<float*>(target);
        __m512i r[16], t[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src + i * src_bytes);
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 16; i += 8)
            for (int j = 0; j < 4; ++j) {
                t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
                t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
            }
        for (int j = 0; j < 8; ++j) {
            _mm512_storeu_si512(dst + j * dst_stride, _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88));
            _mm512_storeu_si512(dst + (j + 8) * dst_stride, _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd));
        }
    }
};

}  // namespace mint
