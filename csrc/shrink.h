// An adapter's S = scale * X Aᵀ, made while the rows of X are written: by the norm, or by SwiGLU.
//
// Each A is packed once. Each thread then takes its rows a few at a time: they are written, and multiplied from L1.
#pragma once
#include "check.h"
#include "gemm.h"
#include "rms_norm.h"
#include "swiglu.h"

namespace mint {

// Rows [start, stop) of X have the adapter whose A is [rank, width].
template <class T>
struct ShrinkJob {
    int64_t start, stop;
    const T* a;
    int64_t a_stride, rank;
    float scale;
};

// write(rows) fills those rows of x [rows, width]; s[m, :rank] = scale * x[m, :] . a[:, :] follows at once, with what
// job(i) says for i < count, in the order of their rows. Other rows are only written.
template <class S, class T, class Job, class Write>
void write_and_shrink(int64_t rows, int64_t width, const T* x, int64_t x_stride, T* s, int64_t s_stride, int64_t count,
                      Job job, Write write) {
    using Q = Panel<S, T>;
    constexpr int64_t kTile = Q::kTiles ? Q::kRows : 2 * Q::kRows;
    const int64_t depth = Q::depth(width);
    const auto columns = [](int64_t rank) { return ceil_div(rank, Q::kCols) * Q::kCols; };
    int64_t all = 0, widest = 1;
    for (int64_t i = 0; i < count; ++i) {
        all += columns(job(i).rank);
        widest = max64(widest, columns(job(i).rank));
    }
    auto* panels = panel_scratch<S, T>(Slot::kShared, max64(all * depth, 1));
    Attempts attempts;
#pragma omp parallel if (rows > 1 && rows * width > kSerialWork)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const ShrinkJob<T> j = job(i);
            auto* to = panels;
            for (int64_t l = 0; l < i; ++l) to += columns(job(l).rank) * depth;
            pack_panels<S, T>(j.a, j.a_stride, 1, j.rank, width, to);
        }
        const Range mine = my_rows(rows);
        attempts.run([&] {
            float* c = static_cast<float*>(scratch(Slot::kTile, size_t(kTile * widest) * 4));
            const typename S::Tiles registers;
            Prefetch none;
            int64_t m = mine.begin;
            const auto* packed = panels;
            for (int64_t i = 0; i < count; ++i) {
                const ShrinkJob<T> j = job(i);
                const int64_t start = max64(j.start, mine.begin), stop = min64(j.stop, mine.end), ld = columns(j.rank);
                if (start < stop) {
                    if (m < start) write(Range{m, start});
                    const auto factor = S::set1(j.scale);
                    for (m = start; m < stop; m += kTile) {
                        const int64_t n = min64(kTile, stop - m);
                        write(Range{m, m + n});
                        const Rows left = left_rows<S, T>(x + m * x_stride, x_stride, 1, n, width, Slot::kPanelsA);
                        for (int64_t r = 0; r < n; r += Q::kRows)
                            multiply_rows<S, T>(left.at(r), min64(Q::kRows, n - r), packed, j.rank, depth, c + r * ld,
                                                ld, false, &none);
                        for (int64_t r = 0; r < n; ++r) {
                            T* out = s + (m + r) * s_stride;
                            const float* sum = c + r * ld;
                            for_vectors<S>(j.rank, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                                S::store_n(out + v, S::mul(S::load_n(sum + v, lanes), factor), lanes);
                            });
                        }
                    }
                    m = stop;
                }
                packed += ld * depth;
            }
            if (m < mine.end) write(Range{m, mine.end});
        });
    }
    attempts.finish();
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
    const auto job = [=](int64_t) { return ShrinkJob<T>{0, rows, a, a_stride, rank, scale}; };
    write_and_shrink<S, T>(rows, width, y, y_stride, s, s_stride, 1, job, [=](Range some) {
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
    const auto job = [=](int64_t) { return ShrinkJob<T>{0, rows, a, a_stride, rank, scale}; };
    write_and_shrink<S, T>(rows, width, out, out_stride, s, s_stride, 1, job,
                           [=](Range some) { swiglu_rows<S>(some, gate_up, stride, out, out_stride, width); });
}

}  // namespace mint
