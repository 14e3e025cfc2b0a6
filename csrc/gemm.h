// Matrix products with fp32 accumulation: a register tile over packed panels (panels.h), and one blocked driver.
//
// A result element is always the same sum in the same order (k in chunks of kDepth, each summed in registers from 0,
// which also keeps rounding errors from growing with k; in tiles 32 of k after the other, simd/amx.h, of fp32 192,
// split_panels.h): it does not depend on the tiling, the number of threads, or the other rows and columns of the
// product.
#pragma once
#include "gemm_tiles.h"

namespace mint {

// c[M][ldc] (+)= M rows * Nv vectors of columns of a panel, over `depth` elements. Not unrolled before it looks at acc,
// GCC 12 writes the zeros to the stack, and the sums.
template <class S, class T, int M, int Nv>
void register_tile(Rows a, const typename Panel<S, T>::P* b, int64_t depth, float* c, int64_t ldc, bool accumulate) {
    using Q = Panel<S, T>;
    typename S::F acc[M][Nv];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Nv; ++j) acc[i][j] = S::zero();
    const char* rows[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) rows[i] = a.data + i * a.stride;
    const int64_t whole = depth - (a.half ? 1 : 0);
    for (int64_t kk = 0; kk < whole; ++kk, b += Q::kCols) {
        if constexpr (Q::kPairs) {
            typename S::B bv[Nv];
#pragma GCC unroll 16
            for (int j = 0; j < Nv; ++j) bv[j] = S::load_pairs(b + j * S::W);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                uint32_t pair;
                std::memcpy(&pair, rows[i] + 4 * kk, 4);
                const auto av = S::set1_pair(pair);
#pragma GCC unroll 16
                for (int j = 0; j < Nv; ++j) acc[i][j] = S::dot(acc[i][j], av, bv[j]);
            }
        } else {
            typename S::F bv[Nv];
#pragma GCC unroll 16
            for (int j = 0; j < Nv; ++j) bv[j] = S::load(b + j * S::W);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                float value;
                std::memcpy(&value, rows[i] + 4 * kk, 4);
                const auto av = S::set1(value);
#pragma GCC unroll 16
                for (int j = 0; j < Nv; ++j) acc[i][j] = S::fma(av, bv[j], acc[i][j]);
            }
        }
    }
    if constexpr (Q::kPairs) {
        if (a.half) {
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                uint16_t last;
                std::memcpy(&last, rows[i] + 4 * whole, 2);
#pragma GCC unroll 16
                for (int j = 0; j < Nv; ++j)
                    acc[i][j] = S::dot(acc[i][j], S::set1_pair(last), S::load_pairs(b + j * S::W));
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Nv; ++j) {
            float* p = c + i * ldc + j * S::W;
            S::store(p, accumulate ? S::add(S::load(p), acc[i][j]) : acc[i][j]);
        }
}

// The tile of m <= M rows and nv <= Nv vectors.
template <class S, class T, int M = S::kMr, int Nv = S::kNv>
MINT_INLINE void tile_of(int64_t m, int64_t nv, Rows a, const typename Panel<S, T>::P* b, int64_t depth, float* c,
                         int64_t ldc, bool accumulate) {
    if constexpr (M > 1) {
        if (m < M) return tile_of<S, T, M - 1, Nv>(m, nv, a, b, depth, c, ldc, accumulate);
    }
    if constexpr (Nv > 1) {
        if (nv < Nv) return tile_of<S, T, M, Nv - 1>(m, nv, a, b, depth, c, ldc, accumulate);
    }
    register_tile<S, T, M, Nv>(a, b, depth, c, ldc, accumulate);
}

// c[rows][ldc] (+)= rows * panels of `depth` elements for at most kRows rows; columns come out padded to whole vectors,
// in tiles the rows too, to 16. WeightLeft: see gemm.
template <class S, class T, bool WeightLeft = false>
void multiply_rows(Rows a, int64_t rows, const RightPanels<S, T>& b, int64_t cols, int64_t depth, float* c, int64_t ldc,
                   bool accumulate, Prefetch* next) {
    using Q = Panel<S, T>;
    constexpr int kCols = Q::kCols;
    if constexpr (Q::kTiles) {
        for (int64_t j = 0; j < cols; j += kCols)
            multiply_panel<S, T, WeightLeft>(rows, cols - j, a, b, j, depth, c + j, ldc, accumulate,
                                             [=]() __attribute__((always_inline)) { next->some(); });
    } else {
        for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
            const int64_t step = min64(kDepth, depth - k0);
            const Rows part = {a.data + 4 * k0, a.stride, a.half && k0 + step == depth};
            for (int64_t j = 0; j < cols; j += kCols) {
                next->some();
                tile_of<S, T>(rows, ceil_div(min64(kCols, cols - j), S::W), part, b.at(j, k0, depth), step, c + j, ldc,
                              accumulate || k0 > 0);
            }
        }
    }
}

// How often multiply_rows lets a Prefetch do some of its work.
template <class S, class T>
int64_t prefetch_calls(int64_t rows, int64_t cols, int64_t depth) {
    using Q = Panel<S, T>;
    return ceil_div(rows, Q::kRows) * ceil_div(cols, Q::kCols) * ceil_div(depth, Q::kTiles ? Q::kUnit : kDepth) *
           Q::kCalls;
}

// The product of gemm, straight: panels of B, rows of A.
template <class S, class T, class Out>
void gemm_straight(const T* a, int64_t a_row, int64_t a_k, const RightOperand<S, T>& b, int64_t m, int64_t n, Out out,
                   Target target) {
    using Q = Panel<S, T>;
    // Two panels a tile, so that rows are fetched half as often; four where each tile packs its rows too.
    const int64_t k = b.k, most = min64(max64(Q::depth(k), 1), 8 * kDepth), widest = Q::kInPlace && a_k == 1 ? 2 : 4;
    const Tiling tile = tiles_of<Q>(m, n, most, 512, widest);
    const int64_t block = tile.depth * Q::kStep, col_tiles = ceil_div(n, tile.cols);
    const int64_t tiles = ceil_div(m, tile.rows) * col_tiles;
    const bool one_block = k <= block;  // then the sums of kRows rows at a time are all that is kept
    const size_t kept = size_t(one_block ? Q::kRows : tile.rows) * size_t(tile.cols) * 4;
    std::atomic<int64_t> claimed{0};
    Attempts attempts;
#pragma omp parallel if (tiles > 1 && m * n * k > kSerialWork * 16)
    {
        Rows left{};
        RightPanels<S, T> right(nullptr);
        int64_t packed_row = -1, packed_col = -1;  // of one block: which tile's rows and panels this thread has
        for_claimed(tiles, claimed, attempts, [&](int64_t t, int64_t following) {
            const int64_t i0 = t / col_tiles * tile.rows, j0 = t % col_tiles * tile.cols;
            const int64_t rows = min64(tile.rows, m - i0), cols = min64(tile.cols, n - j0);
            auto* pb = panel_scratch<S, T>(Slot::kPanelsB, tile.cols * tile.depth);
            float* c = static_cast<float*>(scratch(Slot::kTile, kept));
            if (k == 0) std::memset(c, 0, kept);  // an empty sum; scratch is undefined
            for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += block) {
                const int64_t step = min64(block, k - k0), depth = Q::depth(step);
                const bool last = k0 + step == k;
                if (!one_block || packed_row != i0)
                    left = left_rows<S, T>(a + i0 * a_row + k0 * a_k, a_row, a_k, rows, step, Slot::kPanelsA);
                if (!one_block || packed_col != j0) right = b.block(j0, cols, k0, step, pb, true);
                packed_row = i0, packed_col = j0;
                // Fetching ahead pays where there are few rows to hide behind; large fp32 panels would only push each
                // other out of L2.
                Prefetch next;
                if ((!last || following < tiles) && (Q::kPairs || rows < 256)) {
                    const int64_t j1 = last ? following % col_tiles * tile.cols : j0, k1 = last ? 0 : k0 + step;
                    b.fetch(&next, j1, min64(tile.cols, n - j1), k1, min64(block, k - k1),
                            prefetch_calls<S, T>(rows, cols, depth));
                }
                for (int64_t i = 0; i < rows; i += Q::kRows) {
                    const int64_t count = min64(Q::kRows, rows - i);
                    float* ci = one_block ? c : c + i * tile.cols;
                    if (last)
                        next.writes = target.lines(i0 + i, j0, count, cols, prefetch_calls<S, T>(count, cols, depth));
                    multiply_rows<S, T>(left.at(i), count, right, cols, depth, ci, tile.cols, k0 > 0, &next);
                    if (last)
                        for (int64_t r = 0; r < count; ++r) out(i0 + i + r, j0, cols, ci + r * tile.cols);
                }
            }
        });
    }
    attempts.finish();
}

// c[cols][ldc] = the transpose of t[rows][ldt]; both have room for whole vectors.
template <class S>
void turn(const float* t, int64_t ldt, int64_t rows, int64_t cols, float* c, int64_t ldc) {
    for (int64_t j = 0; j < cols; j += S::W)
        for (int64_t i = 0; i < rows; i += S::W) S::transpose(t + i * ldt + j, ldt * 4, c + j * ldc + i, ldc);
}

// Whether the product of a [m, k] and the transpose of a weight [n, k] is better computed turned (gemm_turned):
// packing a and turning the result takes less than packing the weight, and the panels of a fit in half an L2.
template <class S, class T>
bool better_turned(int64_t m, int64_t n, int64_t k) {
    using Q = Panel<S, T>;
    return Q::kTiles && m * (k + 2 * n) < n * k &&
           ceil_div(m, Q::kCols) * Q::kCols * Q::depth(k) <= (int64_t(1) << 20) / 4;
}

// The product of gemm for a weight used transposed (a_k and b_k 1), turned: panels of A, packed once for all threads,
// and B as rows where they lie, or copied in parts. In tiles the sums are the same, bit for bit, and no panel of B is
// packed.
template <class S, class T, bool WeightLeft, class Out>
void gemm_turned(const T* a, int64_t a_row, const T* b, int64_t b_col, int64_t m, int64_t n, int64_t k, Out out,
                 Target target) {
    using Q = Panel<S, T>;
    constexpr int64_t kTileRows = 2 * Q::kRows;
    const int64_t depth = Q::depth(k), padded = ceil_div(m, Q::kCols) * Q::kCols, tiles = ceil_div(n, kTileRows);
    auto* pa = panel_scratch<S, T>(Slot::kShared, padded * depth);
    std::atomic<int64_t> claimed{0};
    Attempts attempts;
#pragma omp parallel if (tiles > 1 && m * n * k > kSerialWork * 16)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i += Q::kCols)
            pack_panel<S, T>(a + i * a_row, a_row, 1, min64(Q::kCols, m - i), k, pa + i * depth);
        const typename S::Tiles registers;
        for_claimed(tiles, claimed, attempts, [&](int64_t t, int64_t following) {
            float* sums = static_cast<float*>(scratch(Slot::kTile, size_t(2 * Q::kRows * padded) * 4));
            float* turned = sums + Q::kRows * padded;
            const int64_t j0 = t * kTileRows, rows = min64(kTileRows, n - j0), j1 = following * kTileRows;
            Prefetch next;
            if (j1 < n)
                next.reads = panels_ahead(b + j1 * b_col, b_col, 1, min64(kTileRows, n - j1), k,
                                          prefetch_calls<S, T>(rows, m, depth));
            const Rows left = left_rows<S, T>(b + j0 * b_col, b_col, 1, rows, k, Slot::kPanelsA, !WeightLeft);
            for (int64_t j = 0; j < rows; j += Q::kRows) {
                const int64_t count = min64(Q::kRows, rows - j);
                next.writes = target.lines(0, j0 + j, m, count, prefetch_calls<S, T>(count, m, depth));
                multiply_rows<S, T, !WeightLeft>(left.at(j), count, pa, m, depth, sums, padded, false, &next);
                turn<S>(sums, padded, count, m, turned, Q::kRows);
                for (int64_t i = 0; i < m; ++i) out(i, j0 + j, count, turned + i * Q::kRows);
            }
        });
    }
    attempts.finish();
}

// C = A * B: A is [m, k] with element (i, kk) at a[i * a_row + kk * a_k], B is [k, n] with element (kk, j) at
// b[j * b_col + kk * b_k]. Each finished piece of a row goes to out(i, j, count, values), values padded to a vector;
// target, if known, is where that writes: tiles fetch it before. words: what is kept of B, whose b_k is 1 then.
// WeightLeft: A is the weight of the two, not B; fp32 in parts of bf16 is summed in an order of theirs
// (split_panels.h).
template <class S, class T, bool WeightLeft = false, class Out>
void gemm(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_col, int64_t b_k, int64_t m, int64_t n,
          int64_t k, Out out, Target target = {}, KeptWords words = {}) {
    if (m == 0 || n == 0) return;
    const RightOperand<S, T> right{b, b_col, b_k, k, words};
    if constexpr (Panel<S, T>::kTiles) {
        if (words.data == nullptr && a_k == 1 && b_k == 1 && better_turned<S, T>(m, n, k))
            return gemm_turned<S, T, WeightLeft>(a, a_row, b, b_col, m, n, k, out, target);
        gemm_tiles<S, T, WeightLeft>(a, a_row, a_k, right, m, n, out, target);
    } else {
        gemm_straight<S, T>(a, a_row, a_k, right, m, n, out, target);
    }
}

}  // namespace mint
