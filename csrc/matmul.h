// out = scale * (a @ b) (+ bias), b row-major or column-major, rounded once to T.
#pragma once
#include "check.h"
#include "few_rows.h"
#include "gemm_long.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

// out[M, N] = scale * (a[M, K] @ b[K, N]) + bias[N]; b's element (kk, j) is b[j * b_col + kk * b_k], one of the two
// strides 1; bias may be null; words: see gemm.
template <class S, class T>
void matmul_kept(const T* a, int64_t a_stride, const T* b, int64_t b_col, int64_t b_k, const T* bias, T* out,
                 int64_t out_stride, int64_t m, int64_t n, int64_t k, float scale, KeptWords words) {
    const char* op = "matmul";
    check::row_stride(op, "a", a_stride, m, k);
    check::row_stride(op, "out", out_stride, m, n);
    if (b_k == 1) {
        check::row_stride(op, "b", b_col, n, k);
    } else {
        check::at_least(op, "b_col", b_col, 1);
        check::row_stride(op, "b", b_k, k, n);
    }
    if (m == 0) return;
    const auto factor = S::set1(scale);
    const auto finish = [=](int64_t i, int64_t j, int64_t count, const float* c) {
        T* row = out + i * out_stride + j;
        for_vectors<S>(count, [&](int64_t v, int lanes) __attribute__((always_inline)) {
            auto x = S::mul(factor, S::load_n(c + v, lanes));
            if (bias != nullptr) x = S::add(x, S::load_n(bias + j + v, lanes));
            S::store_n(row + v, x, lanes);
        });
    };
    if (m <= kFewRows && b_k == 1) return few_rows<S, T>(a, a_stride, b, b_col, m, n, k, finish, words);
    if (better_long<S, T>(b_col, n, k)) return gemm_long<S, T>(a, a_stride, b, b_k, m, n, k, finish);
    gemm<S, T>(a, a_stride, 1, b, b_col, b_k, m, n, k, finish, {out, out_stride * int64_t(sizeof(T)), sizeof(T)},
               words);
}

// The same for a b of which nothing is kept.
template <class S, class T>
void matmul(const T* a, int64_t a_stride, const T* b, int64_t b_col, int64_t b_k, const T* bias, T* out,
            int64_t out_stride, int64_t m, int64_t n, int64_t k, float scale) {
    matmul_kept<S, T>(a, a_stride, b, b_col, b_k, bias, out, out_stride, m, n, k, scale, {});
}

}  // namespace mint
