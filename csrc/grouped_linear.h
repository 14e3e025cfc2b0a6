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
    Attempts attempts;
#pragma omp parallel for schedule(dynamic, 1) if (count > 1 && work > kSerialWork * 16)
    for (int64_t i = 0; i < count; ++i) attempts.run([&] { run(i); });
    attempts.finish();
}

// Elements that a gemm of m rows and n columns computes, with its padding.
template <class S, class T>
int64_t padded(int64_t m, int64_t n) {
    using Q = Panel<S, T>;
    return ceil_div(m, Q::kRows) * Q::kRows * ceil_div(n, Q::kCols) * Q::kCols;
}

// out[i, j] (+)= scale * sum_k x[i, k] * weight[j * w_out + k * w_in], rounded once to T, for i < rows, j < n, k <
// depth. Of a narrow product the rows become the columns of the gemm, which it pads to kCols.
template <class S, class T>
void small_product(const T* x, int64_t x_stride, const T* weight, int64_t w_out, int64_t w_in, T* out,
                   int64_t out_stride, int64_t rows, int64_t n, int64_t depth, float scale, bool add) {
    if (padded<S, T>(n, rows) < padded<S, T>(rows, n)) {
        gemm<S, T, true>(weight, w_out, w_in, x, x_stride, 1, n, rows, depth,
                         [=](int64_t j, int64_t i, int64_t many, const float* c) {
                             for (int64_t v = 0; v < many; ++v) {
                                 T* element = out + (i + v) * out_stride + j;
                                 float value = c[v] * scale;
                                 if (add) value += to_float(*element);
                                 put(element, value);
                             }
                         });
        return;
    }
    gemm<S, T>(x, x_stride, 1, weight, w_out, w_in, rows, n, depth,
               [=](int64_t i, int64_t j, int64_t many, const float* c) {
                   T* row = out + i * out_stride + j;
                   for_vectors<S>(many, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                       auto value = S::mul(S::load_n(c + v, lanes), S::set1(scale));
                       if (add) value = S::add(S::load_n(row + v, lanes), value);
                       S::store_n(row + v, value, lanes);
                   });
               });
}

// out[i * stride + j] += sum_m a[m, i] * b[m, j] in fp32, for m < rows, i < p, j < q. Of p and q one is a rank; the
// wide side becomes the columns of the product, where the vectors are.
template <class S, class T>
void small_outer(const T* a, int64_t a_stride, const T* b, int64_t b_stride, float* out, int64_t stride, int64_t rows,
                 int64_t p, int64_t q) {
    if (q < p) return outer_tall<S, T>(a, a_stride, b, b_stride, out, stride, rows, p, q, 1.0f);
    gemm<S, T>(a, 1, a_stride, b, 1, b_stride, p, q, rows, [=](int64_t i, int64_t j, int64_t n, const float* c) {
        float* row = out + i * stride + j;
        for_vectors<S>(n, [&](int64_t v, int lanes) __attribute__((always_inline)) {
            S::store_n(row + v, S::add(S::load_n(row + v, lanes), S::load_n(c + v, lanes)), lanes);
        });
    });
}

// small_product for each row of a table: start, rows, x_col, depth, offset, w_out, w_in, out_col, n. Columns and
// offsets count elements.
template <class S, class T>
void grouped_linear(const T* x, int64_t x_stride, const T* weight, T* out, int64_t out_stride, const int64_t* table,
                    const float* scales, int64_t count, int64_t add) {
    constexpr int64_t kFields = 9;
    int64_t work = 0;
    for (const int64_t* p = table; p < table + count * kFields; p += kFields) work += p[1] * p[3] * p[8];
    for_products(count, work, [=](int64_t index) {
        const int64_t* p = table + index * kFields;
        small_product<S, T>(x + p[0] * x_stride + p[2], x_stride, weight + p[4], p[5], p[6],
                            out + p[0] * out_stride + p[7], out_stride, p[1], p[8], p[3], scales[index], add != 0);
    });
}

// small_outer for each row of a table: which, start, rows, a_col, p, b_col, q, offset, stride; out is
// outs[which] + offset.
template <class S, class T>
void grouped_outer(const T* a, int64_t a_stride, const T* b, int64_t b_stride, const int64_t* outs,
                   const int64_t* table, int64_t count) {
    constexpr int64_t kFields = 9;
    int64_t work = 0;
    for (const int64_t* r = table; r < table + count * kFields; r += kFields) work += r[2] * r[4] * r[6];
    for_products(count, work, [=](int64_t index) {
        const int64_t* r = table + index * kFields;
        small_outer<S, T>(a + r[1] * a_stride + r[3], a_stride, b + r[1] * b_stride + r[5], b_stride,
                          reinterpret_cast<float*>(outs[r[0]]) + r[7], r[8], r[2], r[4], r[6]);
    });
}

}  // namespace mint
