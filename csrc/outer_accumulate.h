// out[P, Q] += alpha * a.T @ b over M tokens: the adapter gradients. One of P, Q is a rank (16), so this reads the
// wide operand once. The wide side becomes the columns of the product, where the vectors are.
#pragma once
#include "check.h"
#include "gemm.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

// pack_panels of columns that lie side by side (stride_c 1), all panels of a row before the next row: a row of a wide
// matrix is a page of its own, and what lies beside a line of it comes with it.
template <class S, class T>
void pack_beside(const T* src, int64_t stride_k, int64_t n, int64_t k, typename Panel<S, T>::P* dst) {
    using Q = Panel<S, T>;
    if constexpr (Q::kSplit) {
        pack_panels<S, T>(src, 1, stride_k, n, k, dst);
    } else {
        constexpr int C = Q::kCols;
        constexpr int64_t kAhead = 8, kLine = 64 / int64_t(sizeof(T));
        const int64_t depth = Q::depth(k), whole = k / Q::kStep, wide = n / C * C;
        for (int64_t kk = 0; kk < whole; ++kk) {
            const T* p = src + kk * Q::kStep * stride_k;
            for (int64_t s = 0; s < Q::kStep; ++s)
                for (int64_t j = 0; j < wide; j += kLine) __builtin_prefetch(p + j + (kAhead + s) * stride_k);
            for (int64_t j = 0; j < wide; j += C)
                for (int64_t v = 0; v < C; v += S::W)
                    pack_across<S, T>(p + j + v, stride_k, dst + j * depth + kk * C + v);
        }
        for (int64_t j = 0; j < wide; j += C)
            for (int64_t kk = whole; kk < depth; ++kk)
                for (int64_t v = 0; v < C; ++v)
                    dst[j * depth + kk * C + v] = padded_element<S, T>(src + j + v, stride_k, kk, k);
        if (wide < n) pack_panels<S, T>(src + wide, 1, stride_k, n - wide, k, dst + wide * depth);
    }
}

// out[i, j] += alpha * sum of a[m, i] * b[m, j] over `tokens` m, for i < p and j < q, where p is wide and q a rank:
// the columns of b are the rows of the product, `left`, and a tile of it is transposed in registers on its way to out.
// By the calling thread, which has the tiles' registers.
template <class S, class T>
void add_tall(const Rows& left, int64_t q, const T* a, int64_t a_stride, int64_t p, int64_t tokens, float* out,
              int64_t out_stride, float alpha) {
    using Q = Panel<S, T>;
    constexpr int W = S::W;
    constexpr int64_t kCols = 6 * Q::kCols;
    const int64_t depth = Q::depth(tokens), padded = ceil_div(q, W) * W;
    auto* panels = panel_scratch<S, T>(Slot::kPanelsB, kCols * depth);
    float* c = static_cast<float*>(scratch(Slot::kTile, size_t(padded * kCols) * 4));
    alignas(64) float turned[W * W];
    const auto scale = S::set1(alpha);
    Prefetch none;
    for (int64_t i0 = 0; i0 < p; i0 += kCols) {
        const int64_t cols = min64(kCols, p - i0), ld = ceil_div(cols, W) * W;
        pack_beside<S, T>(a + i0, a_stride, cols, tokens, panels);
        for (int64_t r = 0; r < q; r += Q::kRows)
            multiply_rows<S, T>(left.at(r), min64(Q::kRows, q - r), panels, cols, depth, c + r * ld, ld, false, &none);
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

// The same over all of m tokens, shared between the threads. Sums of kTallTokens tokens start from zero and go to out
// in order.
template <class S, class T>
void outer_tall(const T* a, int64_t a_stride, const T* b, int64_t b_stride, float* out, int64_t out_stride, int64_t m,
                int64_t p, int64_t q, float alpha) {
    constexpr int64_t kTallTokens = 1024, kCols = 2 * Panel<S, T>::kCols;
    const int64_t tiles = ceil_div(p, kCols);
    for (int64_t m0 = 0; m0 < m; m0 += kTallTokens) {
        const int64_t tokens = min64(kTallTokens, m - m0);
        const Rows left = left_rows<S, T>(b + m0 * b_stride, 1, b_stride, q, tokens, Slot::kShared);
        Attempts attempts;
#pragma omp parallel if (tiles > 1 && tokens * p * q > kSerialWork * 16)
        {
            const typename S::Tiles registers;
            const Range mine = my_rows(tiles);
            const int64_t begin = mine.begin * kCols, end = min64(mine.end * kCols, p);
            attempts.run([&] {
                add_tall<S, T>(left, q, a + m0 * a_stride + begin, a_stride, end - begin, tokens,
                               out + begin * out_stride, out_stride, alpha);
            });
        }
        attempts.finish();
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
