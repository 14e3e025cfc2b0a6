// Per-head RMSNorm (optional) and rotate-half RoPE of the q and k heads of a stacked qkv row, and the gradient.
// One head (64-128 elements) at a time, entirely in L1; fp32 inside, one rounding.
#pragma once
#include <cmath>

#include "check.h"
#include "parallel.h"
#include "rms_norm.h"  // for_vectors, row_sum

namespace mint {

// rsqrt(mean(x^2) + eps) of one head.
template <class S, class T>
MINT_INLINE float head_scale(const T* x, int64_t d, float eps) {
    const float squares = row_sum<S>(d, [&](int64_t i, int n) __attribute__((always_inline)) {
        const auto v = S::load_n(x + i, n);
        return S::mul(v, v);
    });
    return 1.0f / std::sqrt(squares / float(d) + eps);
}

// Rows `mine` of qk_norm_rope, below.
template <class S, class T>
void rotate_rows(Range mine, const T* qkv, int64_t stride, const float* cos, int64_t cos_stride, const float* sin,
                 int64_t sin_stride, int64_t n_q, int64_t n_kv, const T* q_weight, const T* k_weight, float eps, T* out,
                 int64_t out_stride, int64_t d) {
    const int64_t heads = n_q + n_kv, half = d / 2;
    for (int64_t m = mine.begin; m < mine.end; ++m) {
        const float* c = cos + m * cos_stride;
        const float* s = sin + m * sin_stride;
        for (int64_t j = 0; j < heads; ++j) {
            const T* x = qkv + m * stride + j * d;
            T* y = out + m * out_stride + j * d;
            const T* w = j < n_q ? q_weight : k_weight;
            const auto scale = S::set1(w == nullptr ? 1.0f : head_scale<S>(x, d, eps));
            for_vectors<S>(half, [&](int64_t i, int n) __attribute__((always_inline)) {
                auto x1 = S::load_n(x + i, n), x2 = S::load_n(x + half + i, n);
                if (w != nullptr) {
                    x1 = S::mul(S::mul(x1, scale), S::load_n(w + i, n));
                    x2 = S::mul(S::mul(x2, scale), S::load_n(w + half + i, n));
                }
                const auto ci = S::load_n(c + i, n), si = S::load_n(s + i, n);
                S::store_n(y + i, S::sub(S::mul(x1, ci), S::mul(x2, si)), n);
                S::store_n(y + half + i, S::fma(x2, ci, S::mul(x1, si)), n);
            });
        }
    }
}

template <class S, class T>
void qk_norm_rope(const T* qkv, int64_t stride, const float* cos, int64_t cos_stride, const float* sin,
                  int64_t sin_stride, int64_t n_q, int64_t n_kv, const T* q_weight, const T* k_weight, float eps,
                  T* out, int64_t out_stride, int64_t rows, int64_t d) {
    const char* op = "qk_norm_rope";
    const int64_t heads = n_q + n_kv;
    check::multiple(op, "d", d, 2);
    check::row_stride(op, "qkv", stride, rows, heads * d);
    check::row_stride(op, "out", out_stride, rows, heads * d);
#pragma omp parallel if (rows > 1 && rows * heads * d > kSerialWork)
    rotate_rows<S>(my_rows(rows), qkv, stride, cos, cos_stride, sin, sin_stride, n_q, n_kv, q_weight, k_weight, eps,
                   out, out_stride, d);
}

// With t = the rotation's transpose of dqk and g = t * w: dx = r (g - x r^2 mean(g x)); without a norm dx = t.
template <class S, class T>
void qk_norm_rope_backward(const T* dqk, int64_t dqk_stride, const T* qkv, int64_t stride, const float* cos,
                           int64_t cos_stride, const float* sin, int64_t sin_stride, int64_t n_q, int64_t n_kv,
                           const T* q_weight, const T* k_weight, float eps, T* dqkv, int64_t dqkv_stride, int64_t rows,
                           int64_t d) {
    const char* op = "qk_norm_rope_backward";
    const int64_t heads = n_q + n_kv, half = d / 2;
    check::multiple(op, "d", d, 2);
    check::row_stride(op, "dqk", dqk_stride, rows, heads * d);
    check::row_stride(op, "qkv", stride, rows, heads * d);
    check::row_stride(op, "dqkv", dqkv_stride, rows, heads * d);
#pragma omp parallel if (rows > 1 && rows * heads * d > kSerialWork)
    {
        const Range mine = my_rows(rows);
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            const float* c = cos + m * cos_stride;
            const float* s = sin + m * sin_stride;
            for (int64_t j = 0; j < heads; ++j) {
                const T* grad = dqk + m * dqk_stride + j * d;
                const T* x = qkv + m * stride + j * d;
                T* dx = dqkv + m * dqkv_stride + j * d;
                const T* w = j < n_q ? q_weight : k_weight;
                // The two halves of g at offset i.
                const auto rotated = [&](int64_t i, int n, typename S::F& g1, typename S::F& g2)
                                         __attribute__((always_inline)) {
                                             const auto a = S::load_n(grad + i, n), b = S::load_n(grad + half + i, n);
                                             const auto ci = S::load_n(c + i, n), si = S::load_n(s + i, n);
                                             g1 = S::fma(a, ci, S::mul(b, si));
                                             g2 = S::sub(S::mul(b, ci), S::mul(a, si));
                                             if (w != nullptr) {
                                                 g1 = S::mul(g1, S::load_n(w + i, n));
                                                 g2 = S::mul(g2, S::load_n(w + half + i, n));
                                             }
                                         };
                float r = 1.0f, mean = 0.0f;
                if (w != nullptr) {
                    r = head_scale<S>(x, d, eps);
                    mean =
                        row_sum<S>(half,
                                   [&](int64_t i, int n) __attribute__((always_inline)) {
                                       typename S::F g1, g2;
                                       rotated(i, n, g1, g2);
                                       return S::fma(g1, S::load_n(x + i, n), S::mul(g2, S::load_n(x + half + i, n)));
                                   }) /
                        float(d);
                }
                const auto scale = S::set1(r), slope = S::set1(-r * r * mean);
                for_vectors<S>(half, [&](int64_t i, int n) __attribute__((always_inline)) {
                    typename S::F g1, g2;
                    rotated(i, n, g1, g2);
                    if (w != nullptr) {
                        g1 = S::mul(scale, S::fma(S::load_n(x + i, n), slope, g1));
                        g2 = S::mul(scale, S::fma(S::load_n(x + half + i, n), slope, g2));
                    }
                    S::store_n(dx + i, g1, n);
                    S::store_n(dx + half + i, g2, n);
                });
            }
        }
    }
}

}  // namespace mint
