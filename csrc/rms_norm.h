// RMSNorm: y = h * rsqrt(mean(h^2) + eps) * w with h = x + residual, and its gradient for h.
//
// A row (2-16 KB) stays in L1 between the pass that sums its squares and the pass that scales it, so memory is touched
// once. Sums run in four fp32 vectors: their order is fixed by the width, not by the threads.
#pragma once
#include <cmath>

#include "check.h"
#include "parallel.h"

namespace mint {

// Calls body(offset, lanes) for each vector of a row of n elements; lanes < W only in the last.
template <class S, class Body>
MINT_INLINE void for_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + S::W <= n; i += S::W) body(i, S::W);
    if (i < n) body(i, int(n - i));
}

// sum_i f(offset) over a row, in four interleaved accumulators; f returns a vector whose lanes >= lanes are 0.
template <class S, class Value>
MINT_INLINE float row_sum(int64_t n, Value value) {
    typename S::F a = S::zero(), b = S::zero(), c = S::zero(), d = S::zero();
    int64_t i = 0;
    for (; i + 4 * S::W <= n; i += 4 * S::W) {
        a = S::add(a, value(i, S::W));
        b = S::add(b, value(i + S::W, S::W));
        c = S::add(c, value(i + 2 * S::W, S::W));
        d = S::add(d, value(i + 3 * S::W, S::W));
    }
    for (; i < n; i += S::W) a = S::add(a, value(i, int(min64(S::W, n - i))));
    return S::sum(S::add(S::add(a, b), S::add(c, d)));
}

// Rows [mine.begin, mine.end).
template <class S, class T>
MINT_INLINE void norm_rows(Range mine, const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, T* h,
                           int64_t h_stride, const T* weight, float eps, T* y, int64_t y_stride, int64_t width) {
    for (int64_t m = mine.begin; m < mine.end; ++m) {
        const T* source = x + m * x_stride;
        if (residual != nullptr) {
            const T* r = residual + m * residual_stride;
            T* sum = h + m * h_stride;
            for_vectors<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
                S::store_n(sum + i, S::add(S::load_n(source + i, n), S::load_n(r + i, n)), n);
            });
            source = sum;  // the norm sees the rounded sum, as its backward will
        }
        const float squares = row_sum<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
            const auto v = S::load_n(source + i, n);
            return S::mul(v, v);
        });
        const auto scale = S::set1(1.0f / std::sqrt(squares / float(width) + eps));
        T* out = y + m * y_stride;
        for_vectors<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
            S::store_n(out + i, S::mul(S::mul(S::load_n(source + i, n), scale), S::load_n(weight + i, n)), n);
        });
    }
}

template <class S, class T>
void rms_norm(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, T* h, int64_t h_stride,
              const T* weight, float eps, T* y, int64_t y_stride, int64_t rows, int64_t width) {
    const char* op = "rms_norm";
    check::row_stride(op, "x", x_stride, rows, width);
    check::row_stride(op, "y", y_stride, rows, width);
    if (residual != nullptr) check::pointer(op, "h", h);
#pragma omp parallel if (rows > 1 && rows * width > kSerialWork)
    norm_rows<S>(my_rows(rows), x, x_stride, residual, residual_stride, h, h_stride, weight, eps, y, y_stride, width);
}

// dh = dresidual + r (g - h r^2 mean(g h)), g = dy w, r = rsqrt(mean(h^2) + eps).
template <class S, class T>
void rms_norm_backward(const T* dy, int64_t dy_stride, const T* h, int64_t h_stride, const T* weight, float eps,
                       const T* dresidual, int64_t dresidual_stride, T* dh, int64_t dh_stride, int64_t rows,
                       int64_t width) {
    const char* op = "rms_norm_backward";
    check::row_stride(op, "dy", dy_stride, rows, width);
    check::row_stride(op, "h", h_stride, rows, width);
    check::row_stride(op, "dh", dh_stride, rows, width);
#pragma omp parallel if (rows > 1 && rows * width > kSerialWork)
    {
        const Range mine = my_rows(rows);
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            const T* g = dy + m * dy_stride;
            const T* x = h + m * h_stride;
            const float squares = row_sum<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
                const auto v = S::load_n(x + i, n);
                return S::mul(v, v);
            });
            const float product = row_sum<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
                return S::mul(S::mul(S::load_n(g + i, n), S::load_n(weight + i, n)), S::load_n(x + i, n));
            });
            const float r = 1.0f / std::sqrt(squares / float(width) + eps);
            const auto scale = S::set1(r), slope = S::set1(-r * r * (product / float(width)));
            const T* skip = dresidual == nullptr ? nullptr : dresidual + m * dresidual_stride;
            T* out = dh + m * dh_stride;
            for_vectors<S>(width, [&](int64_t i, int n) __attribute__((always_inline)) {
                const auto weighted = S::mul(S::load_n(g + i, n), S::load_n(weight + i, n));
                auto d = S::mul(scale, S::fma(S::load_n(x + i, n), slope, weighted));
                if (skip != nullptr) d = S::add(d, S::load_n(skip + i, n));
                S::store_n(out + i, d, n);
            });
        }
    }
}

}  // namespace mint
