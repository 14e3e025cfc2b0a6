// Many small products in one call: the adapters of a pass, each on its own rows.
//
// A table has one row of int64 per product; columns and offsets count elements. Products of a table write different
// elements. Each is a gemm of its own and threads share the products, so no bit depends on the threads, nor on what
// else is in the table.
#pragma once
#include "check.h"
#include "gemm.h"
#include "outer_accumulate.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

template <class Do>
void for_products(int64_t count, int64_t work, Do run) {
#pragma omp parallel for schedule(dynamic, 1) if (count > 1 && work > kSerialWork * 16)
    for (int64_t i = 0; i < count; ++i) run(i);
}

// Elements that a gemm of m rows and n columns computes, with its padding.
template <class S, class T>
int64_t padded(int64_t m, int64_t n) {
    using Q = Panel<S, T>;
    return ceil_div(m, Q::kRows) * Q::kRows * ceil_div(n, Q::kCols) * Q::kCols;
}

// out[start + i, out_col + j] (+)= scale * sum_k x[start + i, x_col + k] * weight[offset + j * w_out + k * w_in],
// rounded once to T, for i < rows, j < n, k < depth. A table row: start, rows, x_col, depth, offset, w_out, w_in,
// out_col, n. Of a narrow product the rows become the columns of the gemm, which it pads to kCols.
template <class S, class T>
void grouped_linear(const T* x, int64_t x_stride, const T* weight, T* out, int64_t out_stride, const int64_t* table,
                    const float* scales, int64_t count, int64_t add) {
    constexpr int64_t kFields = 9;
    int64_t work = 0;
    for (const int64_t* p = table; p < table + count * kFields; p += kFields) work += p[1] * p[3] * p[8];
    for_products(count, work, [=](int64_t index) {
        const int64_t* p = table + index * kFields;
        const int64_t rows = p[1], depth = p[3], n = p[8];
        const float scale = scales[index];
        const T *left = x + p[0] * x_stride + p[2], *right = weight + p[4];
        T* o = out + p[0] * out_stride + p[7];
        if (padded<S, T>(n, rows) < padded<S, T>(rows, n)) {
            gemm<S, T>(right, p[5], p[6], left, x_stride, 1, n, rows, depth,
                       [=](int64_t j, int64_t i, int64_t many, const float* c) {
                           for (int64_t v = 0; v < many; ++v) {
                               T* element = o + (i + v) * out_stride + j;
                               float value = c[v] * scale;
                               if (add) value += to_float(*element);
                               put(element, value);
                           }
                       });
            return;
        }
        gemm<S, T>(left, x_stride, 1, right, p[5], p[6], rows, n, depth,
                   [=](int64_t i, int64_t j, int64_t many, const float* c) {
                       T* row = o + i * out_stride + j;
                       for_vectors<S>(many, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                           auto value = S::mul(S::load_n(c + v, lanes), S::set1(scale));
                           if (add) value = S::add(S::load_n(row + v, lanes), value);
                           S::store_n(row + v, value, lanes);
                       });
                   });
    });
}

// outs[which][offset + i * stride + j] += sum_m a[start + m, a_col + i] * b[start + m, b_col + j] in fp32, for m <
// rows, i < p, j < q. A table row: which, start, rows, a_col, p, b_col, q, offset, stride. Of p and q one is a rank;
// the wide side becomes the columns of the product, where the vectors are.
template <class S, class T>
void grouped_outer(const T* a, int64_t a_stride, const T* b, int64_t b_stride, const int64_t* outs,
                   const int64_t* table, int64_t count) {
    constexpr int64_t kFields = 9;
    int64_t work = 0;
    for (const int64_t* r = table; r < table + count * kFields; r += kFields) work += r[2] * r[4] * r[6];
    for_products(count, work, [=](int64_t index) {
        const int64_t* r = table + index * kFields;
        const int64_t m = r[2], p = r[4], q = r[6], stride = r[8];
        const T *left = a + r[1] * a_stride + r[3], *right = b + r[1] * b_stride + r[5];
        float* out = reinterpret_cast<float*>(outs[r[0]]) + r[7];
        if (q >= p) {
            gemm<S, T>(left, 1, a_stride, right, 1, b_stride, p, q, m,
                       [=](int64_t i, int64_t j, int64_t n, const float* c) {
                           float* row = out + i * stride + j;
                           for_vectors<S>(n, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                               S::store_n(row + v, S::add(S::load_n(row + v, lanes), S::load_n(c + v, lanes)), lanes);
                           });
                       });
        } else {
            outer_tall<S, T>(left, a_stride, right, b_stride, out, stride, m, p, q, 1.0f);
        }
    });
}

}  // namespace mint
