// SwiGLU: a = gate * sigmoid(gate) * up on a stacked [gate | up] row, and its gradient.
#pragma once
#include "check.h"
#include "parallel.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

// sigmoid(x) = 1 / (1 + exp(-x)): exp overflows to inf for very negative x, and 1 / inf is the right 0.
template <class S>
MINT_INLINE typename S::F sigmoid(typename S::F x) {
    return S::reciprocal(S::add(S::set1(1.0f), S::exp(S::sub(S::zero(), x))));
}

// Rows [mine.begin, mine.end).
template <class S, class T>
MINT_INLINE void swiglu_rows(Range mine, const T* gate_up, int64_t stride, T* out, int64_t out_stride, int64_t width) {
    for (int64_t m = mine.begin; m < mine.end; ++m) {
        const T* gate = gate_up + m * stride;
        const T* up = gate + width;
        T* a = out + m * out_stride;
        for_vectors<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
            const auto g = S::load_n(gate + i, n);
            S::store_n(a + i, S::mul(S::mul(g, sigmoid<S>(g)), S::load_n(up + i, n)), n);
        });
    }
}

template <class S, class T>
void swiglu(const T* gate_up, int64_t stride, T* out, int64_t out_stride, int64_t rows, int64_t width) {
    check::row_stride("swiglu", "gate_up", stride, rows, 2 * width);
    check::row_stride("swiglu", "out", out_stride, rows, width);
#pragma omp parallel if (rows > 1 && rows * width > kSerialWork / 4)
    swiglu_rows<S>(my_rows(rows), gate_up, stride, out, out_stride, width);
}

template <class S, class T>
void swiglu_backward(const T* da, int64_t da_stride, const T* gate_up, int64_t stride, T* dgate_up, int64_t d_stride,
                     T* out, int64_t out_stride, int64_t rows, int64_t width) {
    check::row_stride("swiglu_backward", "da", da_stride, rows, width);
    check::row_stride("swiglu_backward", "gate_up", stride, rows, 2 * width);
    check::row_stride("swiglu_backward", "dgate_up", d_stride, rows, 2 * width);
    check::row_stride("swiglu_backward", "a", out_stride, rows, width);
#pragma omp parallel if (rows > 1 && rows * width > kSerialWork / 4)
    {
        const Range mine = my_rows(rows);
        const auto one = S::set1(1.0f);
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            const T* gate = gate_up + m * stride;
            const T* up = gate + width;
            const T* grad = da + m * da_stride;
            T* dgate = dgate_up + m * d_stride;
            T* dup = dgate + width;
            T* a = out + m * out_stride;
            for_vectors<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
                const auto g = S::load_n(gate + i, n), u = S::load_n(up + i, n), d = S::load_n(grad + i, n);
                const auto s = sigmoid<S>(g), silu = S::mul(g, s);
                const auto slope = S::mul(s, S::fma(g, S::sub(one, s), one));
                S::store_n(a + i, S::mul(silu, u), n);
                S::store_n(dup + i, S::mul(d, silu), n);
                S::store_n(dgate + i, S::mul(S::mul(d, u), slope), n);
            });
        }
    }
}

}  // namespace mint
