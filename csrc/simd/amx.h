// AVX-512 BF16 plus AMX: products of tiles, of bf16 and of fp32 in parts of bf16. Meanings: scalar.h.
//
// A tile register holds 16 rows of 64 bytes. A row of the left operand has 32 bf16, its k contiguous; a row of the
// right one has 16 pairs (k, k+1), one a column: a row of a panel (panels.h). One instruction adds 32 products to each
// of 16 x 16 fp32 sums: those of even k and those of odd k are summed from 0, then added. So a sum does not depend on
// which operand is the left one, nor on where a product is cut, as long as it is cut at multiples of 32 k.
// Subnormals are treated as zero.
#pragma once
#include <type_traits>

#include "avx512_bf16.h"

namespace mint {

struct Amx : Avx512Bf16 {
    static constexpr bool kTiles = true;

    // The thread's tile registers, all of full size, while this lives. Never assumed beyond: torch's library uses the
    // same threads with a configuration of its own. Does not nest. Takes 50 ns.
    class Tiles {
      public:
        Tiles() {
            struct alignas(64) {
                uint8_t palette = 1, rest[15] = {};
                uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } config;
            asm volatile("ldtilecfg %0" ::"m"(config));
        }
        ~Tiles() { asm volatile("tilerelease"); }
        Tiles(const Tiles&) = delete;
        Tiles& operator=(const Tiles&) = delete;
    };

    // Not the compiler's intrinsics: gcc's _tile_loadd does not say that it reads memory. Strides in bytes.
    template <int R>
    MINT_INLINE void load_tile(const void* p, int64_t stride) {
        for (int i = 0; i < 16; ++i) reads(static_cast<const char*>(p) + i * stride, 64);
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
    }
    // The same for what is used once and streams through L1: it does not push out what stays there.
    template <int R>
    MINT_INLINE void load_tile_once(const void* p, int64_t stride) {
        for (int i = 0; i < 16; ++i) reads(static_cast<const char*>(p) + i * stride, 64);
        asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
    }
    template <int R>
    MINT_INLINE void store_tile(void* p, int64_t stride) {
        for (int i = 0; i < 16; ++i) writes(static_cast<char*>(p) + i * stride, 64);
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(R) : "memory");
    }
    template <int R>
    MINT_INLINE void zero_tile() {
        asm volatile("tilezero %%tmm%c0" ::"i"(R));
    }
    template <int C, int A, int B>
    MINT_INLINE void multiply_tile() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }

    // While it lives, the thread's vectors take subnormal operands for zero and give none, as tiles do.
    class SubnormalsAreZero {
      public:
        SubnormalsAreZero() {
            asm volatile("stmxcsr %0" : "=m"(before_));
            const uint32_t now = before_ | 0x8040;
            asm volatile("ldmxcsr %0" ::"m"(now) : "memory");
        }
        ~SubnormalsAreZero() { asm volatile("ldmxcsr %0" ::"m"(before_) : "memory"); }
        SubnormalsAreZero(const SubnormalsAreZero&) = delete;
        SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

      private:
        uint32_t before_;
    };

    // What multiply_tile adds to the sums of a row in W columns, bit for bit, in vectors: by[0] takes the products of
    // the first k of each pair, by[1] those of the second. (But a NaN may be another one.) While SubnormalsAreZero
    // lives.
    struct Chains {
        F by[2] = {zero(), zero()};

        __attribute__((always_inline)) void add_product(int parity, F x, F w) { by[parity] = fma(x, w, by[parity]); }
        __attribute__((always_inline)) F sum() const { return add(by[0], by[1]); }
    };

    // Sums: tiles 0 to 3, left: 4 and 5, right: 6 and 7.
    template <int M, int N>
    MINT_INLINE void multiply_step(const char* a, int64_t a_stride, const uint32_t* b, int64_t b_stride) {
        load_tile<4>(a, a_stride);
        load_tile_once<6>(b, b_stride);
        multiply_tile<0, 4, 6>();
        if constexpr (N == 2) {
            load_tile_once<7>(b + 16, b_stride);
            multiply_tile<1, 4, 7>();
        }
        if constexpr (M == 2) {
            load_tile<5>(a + 16 * a_stride, a_stride);
            multiply_tile<2, 5, 6>();
            if constexpr (N == 2) multiply_tile<3, 5, 7>();
        }
    }

    // fp32 as the sum of three bf16, exactly (of parts above 2^-126): the pairs (a[i], b[i]) of high parts, of mid
    // parts and of low parts. Each is the nearest bf16 to what is left, of two the larger one, so that the last has no
    // more than its 8 bits. In integers, which takes 0.6 of the time that vcvtne2ps2bf16 does.
    MINT_INLINE void split(F a, F b, uint32_t* high, uint32_t* mid, uint32_t* low) {
        a = take_part(a, &b, high);
        a = take_part(a, &b, mid);
        high_pairs(a, b, low);
    }
    // The pairs of high parts alone, where a and b are bf16 as they are.
    MINT_INLINE void high_pairs(F a, F b, uint32_t* high) {
        const __m512i upper = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(int(0xffff0000)));
        _mm512_storeu_si512(high, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), upper));
    }
    MINT_INLINE F or_bits(F a, F b) {
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    }
    MINT_INLINE bool is_bf16(F a) {
        return _mm512_test_epi32_mask(_mm512_castps_si512(a), _mm512_set1_epi32(0xffff)) == 0;
    }

    // Columns of a right operand, rows of pairs `stride` words apart; behind `steps` steps of 16 of them it goes on at
    // `more`.
    struct Columns {
        const uint32_t* data;
        int64_t stride;
        int64_t steps = -1;  // none goes on elsewhere
        const uint32_t* more = nullptr;
    };

    // c[16 M][ldc] = (accumulate ? c : 0) + x b over `steps` steps: 16 M rows of x (Rows, panels.h), 16 N columns of b.
    // each() is called once a step.
    template <int M, int N, class Rows, class Each>
    static void multiply_tiles(const Rows& x, const Columns& b, float* c, int64_t ldc, int64_t steps, bool accumulate,
                               Each each) {
        const char* a = x.data;
        const uint32_t* panel = b.data;
        begin_sums<M, N>(c, ldc, accumulate);
        if (x.tail != nullptr) --steps;
        const auto run = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
            for (int64_t s = from; s < to; ++s, a += 64, panel += 16 * b.stride) {
                each();
                multiply_step<M, N>(a, x.stride, panel, b.stride * 4);
            }
        };
        if (b.steps < 0 || b.steps > steps) {
            run(0, steps);
        } else {
            run(0, b.steps);
            panel = b.more;
            run(b.steps, steps);
        }
        if (x.tail != nullptr) multiply_step<M, N>(x.tail, 64, panel, b.stride * 4);
        end_sums<M, N>(c, ldc);
    }

    // The same for m <= 32 rows and n <= 32 columns, computed in whole tiles of 16.
    template <class Rows, class Each>
    MINT_INLINE void multiply_tiles(int64_t m, int64_t n, const Rows& x, const Columns& b, float* c, int64_t ldc,
                                    int64_t steps, bool accumulate, Each each) {
        in_tiles(m, n, [&](auto rows, auto columns) __attribute__((always_inline)) {
            multiply_tiles<decltype(rows)::value, decltype(columns)::value>(x, b, c, ldc, steps, accumulate, each);
        });
    }

    // The same of operands in three parts (split_panels.h), `b` a panel of them, Chunk steps from 0 at a time; the
    // weight, which with WeightLeft is the left one, is bf16 in the first `exact` steps. each() is called twice a step.
    // Which operand is the left one changes no bit.
    template <bool WeightLeft, int64_t Chunk, class Rows, class Each>
    MINT_INLINE void multiply_split(int64_t m, int64_t n, const Rows& x, const uint32_t* b, float* c, int64_t ldc,
                                    int64_t steps, int64_t exact, bool accumulate, Each each) {
        in_tiles(m, n, [&](auto rows, auto columns) __attribute__((always_inline)) {
            split_tiles<decltype(rows)::value, decltype(columns)::value, WeightLeft, Chunk>(x, b, c, ldc, steps, exact,
                                                                                            accumulate, each);
        });
    }

  private:
    // The sums in tiles 0 to 3, from c or zero, and back.
    template <int M, int N>
    MINT_INLINE void begin_sums(const float* c, int64_t ldc, bool accumulate) {
        const int64_t stride = ldc * 4;
        if (!accumulate) {
            zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
            return;
        }
        load_tile<0>(c, stride);
        if constexpr (N == 2) load_tile<1>(c + 16, stride);
        if constexpr (M == 2) load_tile<2>(c + 16 * ldc, stride);
        if constexpr (M == 2 && N == 2) load_tile<3>(c + 16 * ldc + 16, stride);
    }
    template <int M, int N>
    MINT_INLINE void end_sums(float* c, int64_t ldc) {
        const int64_t stride = ldc * 4;
        store_tile<0>(c, stride);
        if constexpr (N == 2) store_tile<1>(c + 16, stride);
        if constexpr (M == 2) store_tile<2>(c + 16 * ldc, stride);
        if constexpr (M == 2 && N == 2) store_tile<3>(c + 16 * ldc + 16, stride);
    }

    // What m <= 32 rows and n <= 32 columns take, in tiles of 16.
    template <class Some>
    MINT_INLINE void in_tiles(int64_t m, int64_t n, Some some) {
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        if (m > 16 && n > 16) return some(two, two);
        if (m > 16) return some(two, one);
        if (n > 16) return some(one, two);
        some(one, one);
    }

    // Takes the bf16 nearest to each of a and b away from it, and leaves the pairs of them at `part`.
    MINT_INLINE F take_part(F a, F* b, uint32_t* part) {
        const F near_a = nearest_bf16(a), near_b = nearest_bf16(*b);
        high_pairs(near_a, near_b, part);
        *b = sub(*b, near_b);
        return sub(a, near_a);
    }
    // Half up in magnitude. A NaN of nothing but ones becomes a zero, which leaves it to the last part.
    MINT_INLINE F nearest_bf16(F a) {
        const __m512i up = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(0x8000));
        return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000))));
    }

    // One step's tiles of the operands of multiply_split, by part, and their products.
    template <int M, int N, bool WeightLeft>
    struct SplitStep {
        static constexpr int kHigh = 0, kMid = 1, kLow = 2;
        static constexpr int64_t kColumns = 32;  // of a panel
        const char* a;
        int64_t a_stride;
        const uint32_t* b;

        __attribute__((always_inline)) void left(int part) const {
            load_tile<4>(a + 64 * part, a_stride);
            if constexpr (M == 2) load_tile<5>(a + 64 * part + 16 * a_stride, a_stride);
        }
        __attribute__((always_inline)) void right(int part) const {
            load_tile_once<6>(b + 16 * kColumns * part, kColumns * 4);
            if constexpr (N == 2) load_tile_once<7>(b + 16 * kColumns * part + 16, kColumns * 4);
        }
        __attribute__((always_inline)) void x(int part) const { WeightLeft ? right(part) : left(part); }
        __attribute__((always_inline)) void w(int part) const { WeightLeft ? left(part) : right(part); }
        MINT_INLINE void multiply() {
            multiply_tile<0, 4, 6>();
            if constexpr (N == 2) multiply_tile<1, 4, 7>();
            if constexpr (M == 2) multiply_tile<2, 5, 6>();
            if constexpr (M == 2 && N == 2) multiply_tile<3, 5, 7>();
        }

        // All but the high parts' product, each sharing the tiles of one operand with the one before.
        __attribute__((always_inline)) void small(bool exact) const {
            if (exact) {
                x(kMid), w(kHigh), multiply();
            } else {
                x(kHigh), w(kLow), multiply();
                w(kMid), multiply();
                x(kMid), multiply();
                w(kHigh), multiply();
            }
            x(kLow), multiply();
        }
        __attribute__((always_inline)) void high() const { x(kHigh), w(kHigh), multiply(); }
    };

    template <int M, int N, bool WeightLeft, int64_t Chunk, class Rows, class Each>
    static void split_tiles(const Rows& x, const uint32_t* b, float* c, int64_t ldc, int64_t steps, int64_t exact,
                            bool accumulate, Each each) {
        constexpr int64_t kLeft = 3 * 64, kRight = 3 * 16 * 32;  // a step's bytes of a row, words of a panel
        alignas(64) float sums[16 * M * 16 * N];
        const auto step = [&](int64_t s) __attribute__((always_inline)) {
            return SplitStep<M, N, WeightLeft>{x.data + s * kLeft, x.stride, b + s * kRight};
        };
        for (int64_t s0 = 0; s0 == 0 || s0 < steps; s0 += Chunk) {
            const int64_t end = s0 + Chunk < steps ? s0 + Chunk : steps;
            int64_t s = s0;
            begin_sums<M, N>(c, ldc, false);
            for (; s < end && s < exact; ++s) each(), step(s).small(true);
            for (; s < end; ++s) each(), step(s).small(false);
            for (s = s0; s < end; ++s) each(), step(s).high();
            if (s0 == 0 && !accumulate) {
                end_sums<M, N>(c, ldc);
                continue;
            }
            end_sums<M, N>(sums, 16 * N);
            for (int i = 0; i < 16 * M; ++i)
                for (int j = 0; j < 16 * N; j += W) {
                    float* to = c + i * ldc + j;
                    store(to, add(load(to), load(sums + i * 16 * N + j)));
                }
        }
    }
};

}  // namespace mint
