// The SIMD vocabulary on AVX2 + FMA: 8 fp32 lanes. Meanings: scalar.h.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "bf16.h"
#include "sanitizer.h"

namespace mint {

struct Avx2 {
    static constexpr int W = 8;
    static constexpr bool kBf16Dot = false, kTiles = false, kWidensWords = true;
    struct Tiles {
        Tiles() {}
    };
    static constexpr int kMr = 4, kNv = 3;
    using F = __m256;
    using Words = __m256i;  // two bf16 or four int8 a lane

    MINT_INLINE F zero() { return _mm256_setzero_ps(); }
    MINT_INLINE F set1(float x) { return _mm256_set1_ps(x); }
    MINT_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    MINT_INLINE F load(const bf16* p) {
        const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    MINT_INLINE __m256i mask(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    MINT_INLINE F load_n(const float* p, int n) {
        if (n >= W) return load(p);
        reads(p, n);
        return _mm256_maskload_ps(p, mask(n));
    }
    MINT_INLINE F load_n(const bf16* p, int n) {
        if (n >= W) return load(p);
        bf16 t[W] = {};
        std::memcpy(t, p, size_t(n < 0 ? 0 : n < W ? n : W) * 2);
        return load(t);
    }
    MINT_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    MINT_INLINE void store(bf16* p, F x) {
        const __m256i u = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i even = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256i isnan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(even, nan, isnan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    MINT_INLINE void store_n(float* p, F x, int n) {
        if (n >= W) return store(p, x);
        writes(p, n);
        _mm256_maskstore_ps(p, mask(n), x);
    }
    MINT_INLINE void store_n(bf16* p, F x, int n) {
        if (n >= W) return store(p, x);
        bf16 t[W];
        store(t, x);
        std::memcpy(p, t, size_t(n < 0 ? 0 : n < W ? n : W) * 2);
    }

    MINT_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    MINT_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    MINT_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    MINT_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
    MINT_INLINE F reciprocal(F a) { return div(set1(1.0f), a); }
    MINT_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
    MINT_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
    MINT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    MINT_INLINE float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    MINT_INLINE float hmax(F a) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
    }

    MINT_INLINE F exp(F x) {
        using namespace exp_constants;
        x = _mm256_min_ps(set1(kHigh), x);  // the second operand comes back where one is NaN
        x = _mm256_max_ps(set1(kLow), x);
        const F n = _mm256_round_ps(mul(x, set1(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const F r = _mm256_fnmadd_ps(n, set1(kLn2Lo), _mm256_fnmadd_ps(n, set1(kLn2Hi), x));
        F p = set1(kP0);
        p = fma(p, r, set1(kP1));
        p = fma(p, r, set1(kP2));
        p = fma(p, r, set1(kP3));
        p = fma(p, r, set1(kP4));
        p = fma(p, r, set1(kP5));
        p = add(fma(p, mul(r, r), r), set1(1.0f));
        const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
        const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
        const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
        return mul(mul(p, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
    }

    MINT_INLINE F exp_fast(F x) { return exp(x); }

    MINT_INLINE void transpose(const void* source, int64_t src_bytes, void* target, int64_t dst_stride) {
        const char* src = static_cast<const char*>(source);
        float* dst = static_cast<float*>(target);
        __m256 r[8], t[8];
        for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(src + i * src_bytes));
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
            r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
            r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
            _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
        }
    }

    // Of 8 rows of 16 bytes: to[i] has the word i of every row. Lanes are filled by the loads and never crossed, which
    // most CPUs are slow at.
    MINT_INLINE void transpose_words(const void* src, int64_t src_bytes, Words* to) {
        const auto half = [=](int r) __attribute__((always_inline)) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(src) + r * src_bytes));
        };
        __m256i r[4], t[4];
        for (int i = 0; i < 4; ++i) r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(half(i)), half(i + 4), 1);
        for (int i = 0; i < 4; i += 2) {
            t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            to[2 * i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
            to[2 * i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        }
    }
    MINT_INLINE Words load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    MINT_INLINE Words set1_word(uint32_t word) { return _mm256_set1_epi32(int(word)); }
    // Element I of every word.
    template <class E, int I>
    MINT_INLINE F widened(Words words) {
        if constexpr (std::is_same_v<E, int8_t>) {
            const __m256i top = I == 3 ? words : _mm256_slli_epi32(words, 24 - 8 * I);
            return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
        } else {
            const __m256i top =
                I == 0 ? _mm256_slli_epi32(words, 16) : _mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000)));
            return _mm256_castsi256_ps(top);
        }
    }
    MINT_INLINE void widen_transposed(const bf16* src, int64_t src_stride, float* dst, int64_t dst_stride) {
        Words words[4];
        transpose_words(src, src_stride * 2, words);
        for (int i = 0; i < 4; ++i, dst += 2 * dst_stride) {
            store(dst, widened<bf16, 0>(words[i]));
            store(dst + dst_stride, widened<bf16, 1>(words[i]));
        }
    }
};

}  // namespace mint
