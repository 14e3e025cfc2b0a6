// out[P, Q] += alpha * a.T @ b over M tokens: the adapter gradients. One of P, Q is a rank (16), so this reads the
// wide operand once. The wide side becomes the columns of the product, where the vectors are.
#pragma once
#include "check.h"
#include "gemm.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

// The same where p is the wide side and q a rank: its columns are the rows of the product, in panels, and a tile of it
// is transposed in registers on its way to out. Sums of kTallTokens tokens start from zero and go to out in order.
template <class S, class T>
void outer_tall(const T* a, int64_t a_stride, const T* b, int64_t b_stride, float* out, int64_t out_stride, int64_t m,
                int64_t p, int64_t q, float alpha) {
    using Q = Panel<S, T>;
    constexpr int W = S::W;
    constexpr int64_t kTallTokens = 1024, kCols = 2 * Q::kCols;
    const int64_t tiles = ceil_div(p, kCols), padded = ceil_div(q, W) * W;
    const auto scale = S::set1(alpha);
    for (int64_t m0 = 0; m0 < m; m0 += kTallTokens) {
        const int64_t tokens = min64(kTallTokens, m - m0), depth = Q::depth(tokens);
        const Rows left = left_rows<S, T>(b + m0 * b_stride, 1, b_stride, q, tokens, Slot::kShared);
#pragma omp parallel if (tiles > 1 && tokens * p * q > kSerialWork * 16)
        {
            const typename S::Tiles registers;
            auto* panels = panel_scratch<S, T>(Slot::kPanelsB, kCols * depth);
            float* c = static_cast<float*>(scratch(Slot::kTile, size_t(padded * kCols) * 4));
            alignas(64) float turned[W * W];
            Prefetch none;
            const Range mine = my_rows(tiles);
            for (int64_t t = mine.begin; t < mine.end; ++t) {
                const int64_t i0 = t * kCols, cols = min64(kCols, p - i0), ld = ceil_div(cols, W) * W;
                pack_panels<S, T>(a + m0 * a_stride + i0, 1, a_stride, cols, tokens, panels);
                for (int64_t r = 0; r < q; r += Q::kRows)
                    multiply_rows<S, T>(left.at(r), min64(Q::kRows, q - r), panels, cols, depth, c + r * ld, ld, false,
                                        &none);
                for (int64_t i = 0; i < cols; i += W)
                    for (int64_t j = 0; j < q; j += W) {
                        S::transpose(c + j * ld + i, ld * 4, turned, W);
                        const int lanes = int(min64(W, q - j));
                        for (int64_t l = 0; l < min64(W, cols - i); ++l) {
                            float* row = out + (i0 + i + l) * out_stride + j;
                            S::store_n(row, S::fma(S::load(turned + l * W), scale, S::load_n(row, lanes)), lanes);
                        }
                    }
            }
        }
    }
}

template <class S, class T>
void outer_accumulate(const T* a, int64_t a_stride, const T* b, int64_t b_stride, float* out, int64_t out_stride,
                      int64_t m, int64_t p, int64_t q, float alpha) {
    const char* op = "outer_accumulate";
    check::row_stride(op, "a", a_stride, m, p);
    check::row_stride(op, "b", b_stride, m, q);
    check::row_stride(op, "out", out_stride, p, q);
    const auto scale = S::set1(alpha);
    if (q >= p) {
        gemm<S, T>(a, 1, a_stride, b, 1, b_stride, p, q, m, [=](int64_t i, int64_t j, int64_t n, const float* c) {
            float* row = out + i * out_stride + j;
            for_vectors<S>(n, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                S::store_n(row + v, S::fma(S::load_n(c + v, lanes), scale, S::load_n(row + v, lanes)), lanes);
            });
        });
    } else {
        outer_tall<S, T>(a, a_stride, b, b_stride, out, out_stride, m, p, q, alpha);
    }
}

}  // namespace mint
