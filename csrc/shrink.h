// An adapter's S = scale * X Aᵀ, made while the rows of X are written: by the norm, or by SwiGLU.
//
// A is packed once. Each thread then takes its rows a few at a time: they are written, and multiplied from L1.
#pragma once
#include "check.h"
#include "gemm.h"
#include "rms_norm.h"
#include "swiglu.h"

namespace mint {

// write(rows) fills those rows of x [rows, width]; s[m, :rank] = scale * x[m, :] . a[:, :] follows at once.
template <class S, class T, class Write>
void write_and_shrink(int64_t rows, int64_t width, const T* x, int64_t x_stride, const T* a, int64_t a_stride,
                      int64_t rank, float scale, T* s, int64_t s_stride, Write write) {
    using Q = Panel<S, T>;
    constexpr int64_t kTile = Q::kTiles ? Q::kRows : 2 * Q::kRows;
    const int64_t depth = Q::depth(width), columns = ceil_div(rank, Q::kCols) * Q::kCols;
    auto* panels = panel_scratch<S, T>(Slot::kShared, columns * depth);
    pack_panels<S, T>(a, a_stride, 1, rank, width, panels);
    const auto factor = S::set1(scale);
#pragma omp parallel if (rows > 1 && rows * width > kSerialWork)
    {
        const Range mine = my_rows(rows);
        float* c = static_cast<float*>(scratch(Slot::kTile, size_t(kTile * columns) * 4));
        const typename S::Tiles registers;
        Prefetch none;
        for (int64_t m = mine.begin; m < mine.end; m += kTile) {
            const int64_t n = min64(kTile, mine.end - m);
            write(Range{m, m + n});
            const Rows left = left_rows<S, T>(x + m * x_stride, x_stride, 1, n, width, Slot::kPanelsA);
            for (int64_t i = 0; i < n; i += Q::kRows)
                multiply_rows<S, T>(left.at(i), min64(Q::kRows, n - i), panels, rank, depth, c + i * columns, columns,
                                    false, &none);
            for (int64_t i = 0; i < n; ++i) {
                T* out = s + (m + i) * s_stride;
                const float* sum = c + i * columns;
                for_vectors<S>(rank, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                    S::store_n(out + v, S::mul(S::load_n(sum + v, lanes), factor), lanes);
                });
            }
        }
    }
}

template <class S, class T>
void rms_norm_shrink(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, T* h, int64_t h_stride,
                     const T* weight, float eps, T* y, int64_t y_stride, const T* a, int64_t a_stride, float scale,
                     T* s, int64_t s_stride, int64_t rows, int64_t width, int64_t rank) {
    const char* op = "rms_norm";
    check::row_stride(op, "x", x_stride, rows, width);
    check::row_stride(op, "y", y_stride, rows, width);
    check::row_stride(op, "a", a_stride, rank, width);
    check::row_stride(op, "s", s_stride, rows, rank);
    if (residual != nullptr) check::pointer(op, "h", h);
    write_and_shrink<S, T>(rows, width, y, y_stride, a, a_stride, rank, scale, s, s_stride, [=](Range some) {
        norm_rows<S>(some, x, x_stride, residual, residual_stride, h, h_stride, weight, eps, y, y_stride, width);
    });
}

template <class S, class T>
void swiglu_shrink(const T* gate_up, int64_t stride, T* out, int64_t out_stride, const T* a, int64_t a_stride,
                   float scale, T* s, int64_t s_stride, int64_t rows, int64_t width, int64_t rank) {
    const char* op = "swiglu";
    check::row_stride(op, "gate_up", stride, rows, 2 * width);
    check::row_stride(op, "out", out_stride, rows, width);
    check::row_stride(op, "a", a_stride, rank, width);
    check::row_stride(op, "s", s_stride, rows, rank);
    write_and_shrink<S, T>(rows, width, out, out_stride, a, a_stride, rank, scale, s, s_stride,
                           [=](Range some) { swiglu_rows<S>(some, gate_up, stride, out, out_stride, width); });
}

}  // namespace mint
