// The blocked driver of products in tiles (simd/amx.h): rows of A stay in L1 while panels of B stream past them from
// L2.
//
// A step of 32 x 32 sums loads 4 KB in the 64 cycles that its multiplications take. From L2 alone that is too much: 32
// rows of A over one block of k (kTileSteps) are kept in L1, where the panels, loaded with tileloaddt1, leave them.
#pragma once
#include "panels.h"
#include "prefetch.h"

namespace mint {

constexpr int64_t kTileSteps = 20;  // of 32 k in a block: 40 of L1's 48 KB for 32 rows
constexpr int64_t kSplitBlock = 6;  // the same of operands in three parts, a multiple of kSplitChunk
static_assert(kSplitBlock % kSplitChunk == 0);

// How a product is cut: tiles of `rows` x `cols`, each with its own panels, and `depth` elements of k at a time.
struct Tiling {
    int64_t rows, cols, depth;
};

// Tiles of at most most_rows rows and `widest` panels; fewer panels where that would leave threads idle at the end.
template <class Q>
Tiling tiles_of(int64_t m, int64_t n, int64_t depth, int64_t most_rows, int64_t widest) {
    constexpr int64_t kFewRows = 64;
    const int64_t threads = omp_get_max_threads(), panels = ceil_div(n, Q::kCols);
    int64_t row_tiles = ceil_div(m, max64(most_rows, kFewRows));
    if (panels * row_tiles < 2 * threads)
        row_tiles = max64(row_tiles, min64(ceil_div(2 * threads, panels), ceil_div(m, kFewRows)));
    const auto busiest = [=](int64_t p) { return ceil_div(ceil_div(panels, p) * row_tiles, threads) * p; };
    int64_t wide = widest;
    while (wide > 1 && busiest(wide) * 25 > busiest(1) * 26) --wide;
    return {ceil_div(ceil_div(m, row_tiles), Q::kRows) * Q::kRows, wide * Q::kCols, depth};
}

// Blocks of k of equal size; the rows, the panels and, with several blocks, the sums of a tile in an L2 of 2 MB
// together.
template <class Q>
Tiling tile_cut(int64_t m, int64_t n, int64_t k) {
    constexpr int64_t kWide = 12;
    const int64_t steps = max64(Q::depth(k) / Q::kUnit, 1), blocks = ceil_div(steps, kTileSteps);
    const int64_t depth = (Q::kSplit ? min64(steps, kSplitBlock) : ceil_div(steps, blocks)) * Q::kUnit;
    const int64_t row_bytes = 4 * depth + (blocks > 1 ? kWide * Q::kCols * 4 : 0);
    return tiles_of<Q>(m, n, depth, (int64_t(900) << 10) / row_bytes, kWide);
}

// c[rows][ldc] = (accumulate ? c : 0) + rows of a * the panel of b that begins with column j, up to kRows and kCols of
// them, `depth` elements; columns and rows come out padded to 16. each() is called Panel::kCalls times a unit.
template <class S, class T, bool WeightLeft, class Each>
MINT_INLINE void multiply_panel(int64_t rows, int64_t cols, const Rows& a, const RightPanels<S, T>& b, int64_t j,
                                int64_t depth, float* c, int64_t ldc, bool accumulate, Each each) {
    using Q = Panel<S, T>;
    const int64_t steps = depth / Q::kUnit;
    if constexpr (Q::kSplit) {
        S::template multiply_split<WeightLeft, kSplitChunk>(rows, cols, a, b.at(j, 0, depth), c, ldc, steps,
                                                            WeightLeft ? a.exact : b.exact, accumulate, each);
    } else {
        typename S::Columns panel{b.at(j, 0, depth), Q::kCols};
        if (b.whole != 0) panel.steps = b.whole / Q::kUnit, panel.more = b.at(j, b.whole, depth);
        S::multiply_tiles(rows, cols, a, panel, c, ldc, steps, accumulate, each);
    }
}

// The product of gemm (gemm.h); left(i, rows, k0, step): those rows of A, from i on, and of them elements
// [k0, k0 + step) of k. WeightLeft: see gemm.
template <class S, class T, bool WeightLeft, class Left, class Out>
void multiply_in_tiles(Left left_of, const RightOperand<S, T>& b, int64_t m, int64_t n, Out out, Target target) {
    using Q = Panel<S, T>;
    constexpr int64_t kR = Q::kRows, kC = Q::kCols;
    const int64_t k = b.k;
    const Tiling cut = tile_cut<Q>(m, n, k);
    const int64_t block = Q::k_of(cut.depth), col_tiles = ceil_div(n, cut.cols);
    const int64_t tiles = ceil_div(m, cut.rows) * col_tiles;
    const bool one_block = k <= block;
    const int64_t kept = one_block ? kR * kC : cut.rows * cut.cols;  // sums: blocks of kR x kC, one after the other
    std::atomic<int64_t> claimed{0};
    Attempts attempts;
#pragma omp parallel if (tiles > 1 && m * n * k > kSerialWork * 16)
    {
        const typename S::Tiles registers;
        Rows left{};
        RightPanels<S, T> right(nullptr);
        int64_t packed_row = -1, packed_col = -1;  // of one block: which tile's rows and panels this thread has
        for_claimed(tiles, claimed, attempts, [&](int64_t t, int64_t following) {
            const int64_t i0 = t / col_tiles * cut.rows, j0 = t % col_tiles * cut.cols;
            const int64_t rows = min64(cut.rows, m - i0), cols = min64(cut.cols, n - j0);
            auto* pb = panel_scratch<S, T>(Slot::kPanelsB, cut.cols * cut.depth);
            float* sums = static_cast<float*>(scratch(Slot::kTile, size_t(kept) * 4));
            if (k == 0) std::memset(sums, 0, size_t(kept) * 4);  // an empty sum; scratch is undefined
            for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += block) {
                const int64_t step = min64(block, k - k0), depth = Q::depth(step);
                const bool last = k0 + step == k;
                if (!one_block || packed_row != i0) left = left_of(i0, rows, k0, step);
                if (!one_block || packed_col != j0) right = b.block(j0, cols, k0, step, pb, !WeightLeft);
                packed_row = i0, packed_col = j0;
                const int64_t calls = ceil_div(rows, kR) * ceil_div(cols, kC) * (depth / Q::kUnit) * Q::kCalls;
                Prefetch next;
                if (!last || following < tiles) {
                    const int64_t j1 = last ? following % col_tiles * cut.cols : j0, k1 = last ? 0 : k0 + step;
                    b.fetch(&next, j1, min64(cut.cols, n - j1), k1, min64(block, k - k1), calls);
                }
                float* c = sums;
                for (int64_t i = 0; i < rows; i += kR) {
                    const Rows some = left.at(i);
                    const int64_t count = min64(kR, rows - i);
                    for (int64_t j = 0; j < cols; j += kC) {
                        const int64_t wide = min64(kC, cols - j);
                        if (last) next.writes = target.lines(i0 + i, j0 + j, count, wide, depth / Q::kUnit * Q::kCalls);
                        multiply_panel<S, T, WeightLeft>(count, wide, some, right, j, depth, c, kC, k0 > 0,
                                                         [&]() __attribute__((always_inline)) { next.some(); });
                        if (last)
                            for (int64_t r = 0; r < count; ++r) out(i0 + i + r, j0 + j, wide, c + r * kC);
                        if (!one_block) c += kR * kC;
                    }
                }
            }
        });
    }
    attempts.finish();
}

// The same, of A as gemm has it.
template <class S, class T, bool WeightLeft, class Out>
void gemm_tiles(const T* a, int64_t a_row, int64_t a_k, const RightOperand<S, T>& b, int64_t m, int64_t n, Out out,
                Target target) {
    using Q = Panel<S, T>;
    if constexpr (Q::kSplit) {
        // Rows are split once, for all tiles of columns, some MB of them at a time.
        const int64_t depth = Q::depth(b.k), stride = depth * 4, fit = (int64_t(8) << 20) / max64(stride, 1);
        const int64_t most = max64(fit / Q::kRows, 10) * Q::kRows;
        for (int64_t m0 = 0; m0 < m; m0 += most) {
            const int64_t rows = min64(most, m - m0), blocks = ceil_div(rows, Q::kRows);
            auto* parts = panel_scratch<S, T>(Slot::kShared, blocks * Q::kRows * depth);
#pragma omp parallel for schedule(static) if (rows * b.k > kSerialWork)
            for (int64_t i = 0; i < blocks; ++i)
                split_rows<S>(a + (m0 + i * Q::kRows) * a_row, a_row, a_k, min64(Q::kRows, rows - i * Q::kRows), b.k,
                              parts + i * Q::kRows * depth, false);
            const auto left = [=](int64_t i, int64_t, int64_t k0, int64_t) {
                return Rows{reinterpret_cast<const char*>(parts + i * depth + k0 / kSplitK * kSplitWords), stride,
                            false};
            };
            multiply_in_tiles<S, T, WeightLeft>(
                left, b, rows, n,
                [=](int64_t i, int64_t j, int64_t count, const float* c) { out(m0 + i, j, count, c); },
                target.from(m0));
        }
    } else {
        const auto left = [=](int64_t i, int64_t rows, int64_t k0, int64_t step) {
            return left_rows<S, T>(a + i * a_row + k0 * a_k, a_row, a_k, rows, step, Slot::kPanelsA);
        };
        multiply_in_tiles<S, T, WeightLeft>(left, b, m, n, out, target);
    }
}

}  // namespace mint
