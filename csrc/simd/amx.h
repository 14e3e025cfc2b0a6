// AVX-512 BF16 plus AMX: products of bf16 tiles. Meanings: scalar.h.
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
        const int64_t stride = ldc * 4;
        if (accumulate) {
            load_tile<0>(c, stride);
            if constexpr (N == 2) load_tile<1>(c + 16, stride);
            if constexpr (M == 2) load_tile<2>(c + 16 * ldc, stride);
            if constexpr (M == 2 && N == 2) load_tile<3>(c + 16 * ldc + 16, stride);
        } else {
            zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
        }
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
        store_tile<0>(c, stride);
        if constexpr (N == 2) store_tile<1>(c + 16, stride);
        if constexpr (M == 2) store_tile<2>(c + 16 * ldc, stride);
        if constexpr (M == 2 && N == 2) store_tile<3>(c + 16 * ldc + 16, stride);
    }

    // The same for m <= 32 rows and n <= 32 columns, computed in whole tiles of 16.
    template <class Rows, class Each>
    MINT_INLINE void multiply_tiles(int64_t m, int64_t n, const Rows& x, const Columns& b, float* c, int64_t ldc,
                                    int64_t steps, bool accumulate, Each each) {
        const auto some = [&](auto rows, auto columns) __attribute__((always_inline)) {
            multiply_tiles<decltype(rows)::value, decltype(columns)::value>(x, b, c, ldc, steps, accumulate, each);
        };
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        if (m > 16 && n > 16) return some(two, two);
        if (m > 16) return some(two, one);
        if (n > 16) return some(one, two);
        some(one, one);
    }
};

}  // namespace mint
