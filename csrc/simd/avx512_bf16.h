// AVX-512 plus AVX512_BF16: bf16 pairs multiply straight into fp32 lanes. Meanings: scalar.h.
// The bf16 instructions treat subnormals as zero; everything else is IEEE round to nearest even.
#pragma once
#include "avx512.h"

namespace mint {

struct Avx512Bf16 : Avx512 {
    static constexpr bool kBf16Dot = true, kWidensWords = false;
    using B = __m512bh;  // 2 * W bf16; lane i of a dot holds elements 2i and 2i + 1

    using Avx512::store;
    using Avx512::store_n;
    MINT_INLINE void store(bf16* p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
    }
    MINT_INLINE void store_n(bf16* p, F x, int n) {
        if (n >= W) return store(p, x);
        writes(p, n);
        _mm256_mask_storeu_epi16(p, mask(n), (__m256i)_mm512_cvtneps_pbh(x));
    }

    MINT_INLINE B load_pairs(const void* p) { return (B)_mm512_loadu_si512(p); }
    MINT_INLINE B load_pairs_n(const bf16* p, int n) {  // elements >= n are 0
        const __mmask32 m = n >= 32 ? ~__mmask32(0) : n <= 0 ? __mmask32(0) : (__mmask32(1) << n) - 1;
        reads(p, n < 32 ? n : 32);
        return (B)_mm512_maskz_loadu_epi16(m, p);
    }
    // dst[i] = the pair (even[i], odd[i]) for W elements.
    MINT_INLINE void interleave(const bf16* even, const bf16* odd, uint32_t* dst) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
        _mm512_storeu_si512(dst, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    // The pair I of every word: of int8 their elements 2 I and 2 I + 1, which bf16 holds exactly.
    template <class E, int I>
    MINT_INLINE B widened_pairs(Words words) {
        if constexpr (std::is_same_v<E, int8_t>) {
            const __m512i even = _mm512_castps_si512(widened<int8_t, 2 * I>(words));
            const __m512i odd = _mm512_castps_si512(widened<int8_t, 2 * I + 1>(words));
            return (B)_mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
        } else {
            return (B)words;
        }
    }
    MINT_INLINE B set1_pair(uint32_t pair) { return (B)_mm512_set1_epi32(int(pair)); }
    MINT_INLINE F dot(F acc, B a, B b) { return _mm512_dpbf16_ps(acc, a, b); }
};

}  // namespace mint
