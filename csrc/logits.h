// logits = x @ weight.T in fp32.
#pragma once
#include "check.h"
#include "few_rows.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

template <class S, class T>
void logits(const T* x, int64_t x_stride, const T* weight, int64_t w_stride, float* out, int64_t out_stride,
            int64_t rows, int64_t vocab, int64_t width) {
    const char* op = "logits";
    check::row_stride(op, "x", x_stride, rows, width);
    check::row_stride(op, "weight", w_stride, vocab, width);
    check::row_stride(op, "out", out_stride, rows, vocab);
    if (rows == 0) return;
    const auto store = [=](int64_t i, int64_t j, int64_t n, const float* c) {
        float* row = out + i * out_stride + j;
        for_vectors<S>(n, [&](int64_t v, int lanes)
                              __attribute__((always_inline)) { S::store_n(row + v, S::load_n(c + v, lanes), lanes); });
    };
    if (rows <= kFewRows) return few_rows<S, T>(x, x_stride, weight, w_stride, rows, vocab, width, store);
    gemm<S, T>(x, x_stride, 1, weight, w_stride, 1, rows, vocab, width, store);
}

}  // namespace mint
