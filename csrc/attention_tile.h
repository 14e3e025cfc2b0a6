// Packed tiles and the small matrix product attention is made of.
//
// The contracted index of every product is stored in 32-bit words. A word holds two consecutive bf16 elements where
// the ISA multiplies bf16 pairs (Pairs), else one fp32 element: one text, two arithmetics, `per_word` elements a word.
//     A [m][k words]   row major, read one word at a time and broadcast
//     B [k words][n]   row major, read as vectors; n is a multiple of the vector width
// In tile registers (simd/amx.h) A and B are read as they lie, in whole tiles: k comes in multiples of 16 words
// (depth()), and rows of A and c exist up to a multiple of 16. "Zipping" turns rows of B's contracted index into words:
// out[r / 2][c] = (row r [c], row r + 1 [c]).
#pragma once
#include "panels.h"  // Rows
#include "simd/bf16.h"

namespace mint {

using Word = uint32_t __attribute__((may_alias));
using Half = uint16_t __attribute__((may_alias));

template <class I, bool Pairs>
struct Tile {
    using F = typename I::F;
    static constexpr int per_word = Pairs ? 2 : 1;
    static constexpr bool kTiles = Pairs && I::kTiles;
    // The register tile. Four vectors are the 64 rows of an AVX-512 tile of attention, so nothing is left over.
    static constexpr int kMr = kTiles ? 16 : I::W == 1 ? 4 : 6, kNv = I::W == 8 ? 2 : 4;
    static constexpr int64_t kRowUnit = kTiles ? 16 : 1;      // rows come in multiples of it
    static constexpr int64_t kUnit = kTiles ? 32 : per_word;  // elements of k likewise

    MINT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
    MINT_INLINE int64_t pad(int64_t n) { return round_up(n, I::W); }                // elements of a row of vectors
    MINT_INLINE int64_t words(int64_t n) { return (n + per_word - 1) / per_word; }  // words that hold n elements
    MINT_INLINE int64_t row_words(int64_t n) { return pad(words(n)); }              // the same, in whole vectors
    MINT_INLINE int64_t depth(int64_t n) { return round_up(n, kUnit) / per_word; }  // words to contract n elements

    MINT_INLINE F mac(F acc, Word a, const Word* b) {
        if constexpr (Pairs) {
            return I::dot(acc, I::set1_pair(a), I::load_pairs(b));
        } else {
            return I::fma(I::set1(bits_to_float(a)), I::load(reinterpret_cast<const float*>(b)), acc);
        }
    }

    template <int Mr, int Nv>
    MINT_INLINE void block(const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                           bool accumulate) {
        F acc[Mr][Nv];
#pragma GCC unroll 8
        for (int m = 0; m < Mr; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < Nv; ++v) acc[m][v] = I::zero();
        for (int64_t i = 0; i < k; ++i)
#pragma GCC unroll 8
            for (int m = 0; m < Mr; ++m)
#pragma GCC unroll 8
                for (int v = 0; v < Nv; ++v) acc[m][v] = mac(acc[m][v], a[m * lda + i], b + i * ldb + v * I::W);
#pragma GCC unroll 8
        for (int m = 0; m < Mr; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < Nv;
                 ++v) {  // a tile's sum is added once: shorter chains of roundings than starting from c
                float* p = c + m * ldc + v * I::W;
                I::store(p, accumulate ? I::add(I::load(p), acc[m][v]) : acc[m][v]);
            }
    }

    template <int Nv>
    static void panel(const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                      int64_t k, bool accumulate) {
        int64_t i = 0;
        for (; i + kMr <= m; i += kMr) block<kMr, Nv>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
        if (m - i >= 4) {
            block<4, Nv>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
            i += 4;
        }
        if (m - i == 3) return block<3, Nv>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
        if (m - i >= 2) {
            block<2, Nv>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
            i += 2;
        }
        if (m - i == 1) block<1, Nv>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, k, accumulate);
    }

    // Words summed in one chain of roundings: longer products are sums of such sums.
    static constexpr int64_t kDepth = 128;

    // c[m][n] = (accumulate ? c : 0) + a[m][k words] b[k words][n], in fp32.
    static void gemm(const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                     int64_t n, int64_t k, bool accumulate) {
        if constexpr (kTiles) {
            for (int64_t i = 0; i < m; i += 32)
                for (int64_t j = 0; j < n; j += 32)
                    I::multiply_tiles(m - i, n - j, Rows{reinterpret_cast<const char*>(a + i * lda), lda * 4, false},
                                      {b + j, ldb}, c + i * ldc + j, ldc, k / 16, accumulate, [] {});
        } else {
            for (; k > kDepth; k -= kDepth, a += kDepth, b += kDepth * ldb, accumulate = true)
                multiply(a, lda, b, ldb, c, ldc, m, n, kDepth, accumulate);
            multiply(a, lda, b, ldb, c, ldc, m, n, k, accumulate);
        }
    }

    static void multiply(const Word* a, int64_t lda, const Word* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                         int64_t n, int64_t k, bool accumulate) {
        for (; n >= kNv * I::W; n -= kNv * I::W, b += kNv * I::W, c += kNv * I::W)
            panel<kNv>(a, lda, b, ldb, c, ldc, m, k, accumulate);
        if constexpr (kNv > 2) {
            if (n == 3 * I::W) return panel<3>(a, lda, b, ldb, c, ldc, m, k, accumulate);
            if (n == 2 * I::W) return panel<2>(a, lda, b, ldb, c, ldc, m, k, accumulate);
        }
        if (n == I::W) panel<1>(a, lda, b, ldb, c, ldc, m, k, accumulate);
    }

    // sum_i a[i] b[i] in fp32, in four interleaved chains.
    template <class T>
    MINT_INLINE float inner(const T* a, const T* b, int64_t d) {
        F s[4] = {I::zero(), I::zero(), I::zero(), I::zero()};
        int64_t i = 0;
        for (; i + 4 * I::W <= d; i += 4 * I::W)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) s[v] = I::fma(I::load(a + i + v * I::W), I::load(b + i + v * I::W), s[v]);
        for (; i < d; i += I::W) s[0] = I::fma(I::load_n(a + i, int(d - i)), I::load_n(b + i, int(d - i)), s[0]);
        return I::sum(I::add(I::add(s[0], s[1]), I::add(s[2], s[3])));
    }

    // One row of d elements as words, zeros up to row_words(d).
    template <class T>
    MINT_INLINE void copy_row(const T* src, int64_t d, Word* dst) {
        if constexpr (Pairs) {
            int64_t c = 0;
            for (; c + 2 * I::W <= d; c += 2 * I::W) std::memcpy(dst + c / 2, src + c, 4 * I::W);
            if (c < d) {
                std::memset(dst + c / 2, 0, 4 * I::W);
                std::memcpy(dst + c / 2, src + c, size_t(d - c) * 2);
            }
        } else {
            float* row = reinterpret_cast<float*>(dst);
            int64_t c = 0;
            for (; c + I::W <= d; c += I::W) I::store(row + c, I::load(src + c));
            if (c < d) I::store(row + c, I::load_n(src + c, int(d - c)));
        }
    }

    // dst[rows / 2][n] words from rows of lds words each; rows is even.
    MINT_INLINE void zip_rows(const Word* src, int64_t lds, int64_t rows, int64_t n, Word* dst) {
        for (int64_t r = 0; r < rows; r += 2, dst += n) {
            const Half* __restrict low = reinterpret_cast<const Half*>(src + r * lds);
            const Half* __restrict high = reinterpret_cast<const Half*>(src + (r + 1) * lds);
            Word* __restrict out = dst;
            for (int64_t c = 0; c < n; ++c) out[c] = Word(low[c]) | Word(high[c]) << 16;
        }
    }

    // Zeros in the rows [from, to) of `words` words.
    MINT_INLINE void clear_rows(Word* rows, int64_t from, int64_t to, int64_t words) {
        if (from < to) std::memset(rows + from * words, 0, size_t(to - from) * words * sizeof(Word));
    }

    // dst[c][r] = src[r][c]; rows and cols are multiples of the vector width.
    MINT_INLINE void transpose(const Word* src, int64_t lds, int64_t rows, int64_t cols, Word* dst, int64_t ldd) {
        for (int64_t r = 0; r < rows; r += I::W)
            for (int64_t c = 0; c < cols; c += I::W) I::transpose(src + r * lds + c, lds * 4, dst + c * ldd + r, ldd);
    }

    // Stores vectors of rows j and j + 1 as one vector of words (Pairs).
    MINT_INLINE void store_zipped(Word* p, F low, F high) {
#ifdef __AVX512BF16__
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
#else
        static_assert(!Pairs, "an ISA that multiplies bf16 pairs needs its own store_zipped");
        (void)p, (void)low, (void)high;
#endif
    }

    // fp32 rows [rows][ld] to the caller's dtype.
    template <class T>
    MINT_INLINE void write_row(const float* src, int64_t d, T* dst) {
        int64_t c = 0;
        for (; c + I::W <= d; c += I::W) I::store(dst + c, I::load(src + c));
        if (c < d) I::store_n(dst + c, I::load(src + c), int(d - c));
    }

    // The rows as B of a product that contracts over rows: [rows / per_word][pad(d)]. rows is a multiple of per_word.
    // Without pairs that is what `rows` already is. Returns where it lies.
    MINT_INLINE const Word* zipped(const Word* src, int64_t rows, int64_t d, Word* space) {
        if constexpr (!Pairs) return src;
        zip_rows(src, row_words(d), rows, pad(d), space);
        return space;
    }
};

// Hands out 64-byte aligned pieces of one allocation. With base == nullptr it only measures.
struct Bump {
    char* base;
    size_t used;
};
template <class T>
MINT_INLINE T* take(Bump& bump, int64_t n) {
    T* piece = reinterpret_cast<T*>(bump.base + bump.used);
    bump.used += (size_t(n) * sizeof(T) + 63) / 64 * 64;
    return piece;
}

}  // namespace mint
