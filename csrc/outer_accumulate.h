// out[P, Q] += alpha * a.T @ b over M tokens: the adapter gradients. One of P, Q is a rank (16), so this reads the
// wide operand once. The wide side becomes the columns of the product, where the vectors are.
#pragma once
#include "check.h"
#include "gemm.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

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
        gemm<S, T>(b, 1, b_stride, a, 1, a_stride, q, p, m, [=](int64_t i, int64_t j, int64_t n, const float* c) {
            for (int64_t v = 0; v < n; ++v) out[(j + v) * out_stride + i] += alpha * c[v];
        });
    }
}

}  // namespace mint
