// logits = x @ weight.T in fp32.
//
// Up to kDotRows rows: a dot product per weight row, straight from memory. Every byte of the weight is used once, so
// this is bound by memory and packing would only add traffic. More rows, and any number in tiles: gemm.
#pragma once
#include "check.h"
#include "gemm.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

constexpr int64_t kDotRows = 8;

// Whether a product of `rows` rows with a weight used transposed is dot products. Never in tiles: there gemm reads the
// weight straight from memory too, and gives a row the same bits in any company.
template <class S, class T>
bool by_dots(int64_t rows) {
    return !Panel<S, T>::kTiles && rows <= kDotRows;
}

// c[i * ldc + j] = x row i . weight row j for M rows of x and J rows of weight, with U partial sums each to hide the
// latency of a multiply-add. The weight is read in address order and prefetched kAhead elements further on: four rows
// side by side, each prefetched by the hardware alone, reached half of the bandwidth.
template <class S, class T, int M, int J, int U>
MINT_INLINE void dot_rows(const T* x, int64_t x_stride, const T* weight, int64_t w_stride, int64_t width, float* c,
                          int64_t ldc) {
    constexpr bool kPairs = Panel<S, T>::kPairs;
    constexpr int kStep = kPairs ? 2 * S::W : S::W, kAhead = (16 << 10) / int(sizeof(T));
    typename S::F acc[U][J][M];
    for (auto& u : acc)
        for (auto& j : u)
            for (auto& sum : j) sum = S::zero();
    int64_t k = 0;
    for (; k + U * kStep <= width; k += U * kStep)
        for (int u = 0; u < U; ++u)
            for (int j = 0; j < J; ++j) {
                const T* w = weight + j * w_stride + k + u * kStep;
                __builtin_prefetch(w + kAhead);
                for (int i = 0; i < M; ++i) {
                    const T* xi = x + i * x_stride + k + u * kStep;
                    if constexpr (kPairs) {
                        acc[u][j][i] = S::dot(acc[u][j][i], S::load_pairs(w), S::load_pairs(xi));
                    } else {
                        acc[u][j][i] = S::fma(S::load(w), S::load(xi), acc[u][j][i]);
                    }
                }
            }
    for (; k < width; k += kStep) {
        const int n = int(min64(kStep, width - k));
        for (int j = 0; j < J; ++j)
            for (int i = 0; i < M; ++i) {
                const T *w = weight + j * w_stride + k, *xi = x + i * x_stride + k;
                if constexpr (kPairs) {
                    acc[0][j][i] = S::dot(acc[0][j][i], S::load_pairs_n(w, n), S::load_pairs_n(xi, n));
                } else {
                    acc[0][j][i] = S::fma(S::load_n(w, n), S::load_n(xi, n), acc[0][j][i]);
                }
            }
    }
    for (int j = 0; j < J; ++j)
        for (int i = 0; i < M; ++i) {
            auto total = acc[0][j][i];
            for (int u = 1; u < U; ++u) total = S::add(total, acc[u][j][i]);
            c[i * ldc + j] = S::sum(total);
        }
}

// c[rows][cols] for rows <= M <= kDotRows; J weight rows share each load of x when there are many.
template <class S, class T, int M>
MINT_INLINE void dot_block(int64_t rows, const T* x, int64_t x_stride, const T* weight, int64_t w_stride, int64_t cols,
                           int64_t width, float* c, int64_t ldc) {
    if constexpr (M > 1) {
        if (rows < M) return dot_block<S, T, M - 1>(rows, x, x_stride, weight, w_stride, cols, width, c, ldc);
    }
    constexpr int J = M <= 4 ? 1 : 2, U = M <= 2 ? 4 : M <= 4 ? 2 : 1;
    int64_t j = 0;
    for (; j + J <= cols; j += J)
        dot_rows<S, T, M, J, U>(x, x_stride, weight + j * w_stride, w_stride, width, c + j, ldc);
    for (; j < cols; ++j) dot_rows<S, T, M, 1, U>(x, x_stride, weight + j * w_stride, w_stride, width, c + j, ldc);
}

template <class S, class T>
void logits(const T* x, int64_t x_stride, const T* weight, int64_t w_stride, float* out, int64_t out_stride,
            int64_t rows, int64_t vocab, int64_t width) {
    const char* op = "logits";
    check::row_stride(op, "x", x_stride, rows, width);
    check::row_stride(op, "weight", w_stride, vocab, width);
    check::row_stride(op, "out", out_stride, rows, vocab);
    if (rows == 0) return;
    if (by_dots<S, T>(rows)) {
        constexpr int64_t kBlock = 64;
        const int64_t blocks = ceil_div(vocab, kBlock);
#pragma omp parallel for schedule(static) if (vocab * width > kSerialWork * 2)
        for (int64_t t = 0; t < blocks; ++t) {
            const int64_t v = t * kBlock;
            dot_block<S, T, kDotRows>(rows, x, x_stride, weight + v * w_stride, w_stride, min64(kBlock, vocab - v),
                                      width, out + v, out_stride);
        }
        return;
    }
    gemm<S, T>(x, x_stride, 1, weight, w_stride, 1, rows, vocab, width,
               [=](int64_t i, int64_t j, int64_t n, const float* c) {
                   float* row = out + i * out_stride + j;
                   for_vectors<S>(n, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                       S::store_n(row + v, S::load_n(c + v, lanes), lanes);
                   });
               });
}

}  // namespace mint
