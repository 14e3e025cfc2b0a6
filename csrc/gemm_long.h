// A product whose sums are long and whose result is narrow: dX of an unembedding, k the vocabulary.
//
// Cut as other products are, each narrow tile of the result would read all of A from memory again. Here the sums are
// cut: a piece of k is one thread's, for all rows and up to kLongCols columns, with its own fp32 sums; A and B are read
// once. At the end the pieces are added in order. Their number is fixed, so no bit depends on the threads or the rows.
#pragma once
#include "gemm.h"

namespace mint {

constexpr int64_t kPieces = 8, kLongCols = 1200;  // a packed block of B: kDepth elements of so many columns, 600 KB

// Whether to, for an A with a_k 1: both as gemm has them. From 57 blocks of k on no piece is empty.
template <class S, class T>
bool better_long(int64_t b_col, int64_t n, int64_t k) {
    using Q = Panel<S, T>;
    return Q::kInPlace && !Q::kTiles && b_col == 1 && k >= 16 * n && k >= 8 * kPieces * kDepth * Q::kStep;
}

// The product of gemm for contiguous columns of B (b_col 1).
template <class S, class T, class Out>
void gemm_long(const T* a, int64_t a_row, const T* b, int64_t b_k, int64_t m, int64_t n, int64_t k, Out out) {
    using Q = Panel<S, T>;
    constexpr int64_t kBlock = kDepth * Q::kStep;
    const int64_t groups = ceil_div(n, kLongCols), wide = ceil_div(ceil_div(n, groups), Q::kCols) * Q::kCols;
    const int64_t piece = ceil_div(ceil_div(k, kBlock), kPieces) * kBlock, ld = groups * wide;
    // More threads than pieces share the rows.
    const int64_t parts = min64(ceil_div(omp_get_max_threads(), kPieces * groups), ceil_div(m, Q::kRows));
    const int64_t part = ceil_div(ceil_div(m, Q::kRows), parts) * Q::kRows, tasks = kPieces * groups * parts;
    float* sums = static_cast<float*>(scratch(Slot::kShared, size_t(kPieces * m * ld) * 4));
    std::atomic<int64_t> claimed{0};
    Attempts attempts;
#pragma omp parallel if (m * n * k > kSerialWork * 16)
    {
        for_claimed(tasks, claimed, attempts, [&](int64_t t, int64_t) {
            auto* pb = panel_scratch<S, T>(Slot::kPanelsB, wide * kDepth);
            const int64_t j0 = t % groups * wide, cols = min64(wide, n - j0), p = t / groups % kPieces;
            const int64_t i0 = t / groups / kPieces * part, end = min64(i0 + part, m), last = min64((p + 1) * piece, k);
            float* c = sums + p * m * ld + j0;
            for (int64_t k0 = p * piece; k0 < last; k0 += kBlock) {
                const int64_t step = min64(kBlock, last - k0), depth = Q::depth(step);
                pack_panels<S, T>(b + j0 + k0 * b_k, 1, b_k, cols, step, pb);
                Prefetch next;
                next.reads = panels_ahead(b + j0 + (k0 + step) * b_k, 1, b_k, cols, min64(kBlock, last - k0 - step),
                                          prefetch_calls<S, T>(end - i0, cols, depth));
                for (int64_t i = i0; i < end; i += Q::kRows) {
                    const int64_t count = min64(Q::kRows, end - i);
                    for (int64_t r = i + Q::kRows; r < min64(i + 2 * Q::kRows, end); ++r)
                        for (int64_t kk = 0; kk < step; kk += 64 / int64_t(sizeof(T)))
                            __builtin_prefetch(a + r * a_row + k0 + kk);
                    const Rows left = left_rows<S, T>(a + i * a_row + k0, a_row, 1, count, step, Slot::kPanelsA);
                    multiply_rows<S, T>(left, count, pb, cols, depth, c + i * ld, ld, k0 > p * piece, &next);
                }
            }
        });
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; ++i) {
            float* row = sums + i * ld;
            for (int64_t p = 1; p < kPieces; ++p) {
                const float* more = sums + (p * m + i) * ld;
                for (int64_t j = 0; j < ld; j += S::W) S::store(row + j, S::add(S::load(row + j), S::load(more + j)));
            }
            out(i, 0, n, row);
        }
    }
    attempts.finish();
}

}  // namespace mint
