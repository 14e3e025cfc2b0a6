// A bordered linear over the rows of a pass, each with its own adapter: what models/linear.py and company.py do.
//
// One adapter that has all rows (`joined`) is multiplied in the base's own product, which goes on over the border. Of
// several each meets its own rows: S and dS from the first column of the tail on, whoever sits where in the border.
#pragma once
#include "grouped_linear.h"
#include "lora_gradients.h"
#include "matmul.h"
#include "narrow.h"
#include "shrink.h"

namespace mint {

// W [n, k] of up to three modules stacked on n, with the border: A's rows from row n on, B's columns from column k on.
template <class T>
struct Bordered {
    T* buf;
    int64_t stride;
    const T* bias;
    int64_t n, k, modules, rows[3];
    const uint32_t* words;  // of W, in panels of so many columns; null: none are kept
    int64_t word_columns;

    const T* a(int64_t offset) const { return buf + (n + modules * offset) * stride; }
    // B of module j, whose first row is `row`.
    const T* b(int64_t offset, int64_t rank, int64_t row, int64_t j) const {
        return buf + row * stride + k + modules * offset + j * rank;
    }
};

// An adapter with the rows [start, stop) of a pass, at a rank offset of the border.
struct Seat {
    int64_t start, stop, offset, rank;
    double scale;

    int64_t rows() const { return stop - start; }
};

// Those who train a linear; `tail`: columns of S, and of dS.
struct Seats {
    const Seat* seats;
    int64_t count, tail, joined;

    // Multiply-adds of each row's rank with n others.
    int64_t work(int64_t n) const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += seats[i].rows() * seats[i].rank * n;
        return sum;
    }
    // Columns of the border that the base's product goes on over.
    template <class T>
    int64_t border(const Bordered<T>& w) const {
        return joined ? w.modules * seats[0].rank : 0;
    }
};

// write(rows) fills those rows of x [rows, k + tail], the input of w, and S follows into their tail.
template <class S, class T, class Write>
void with_s(const Bordered<T>& w, const Seats& seats, T* x, int64_t stride, int64_t rows, Write write) {
    const auto job = [&](int64_t i) {
        const Seat& s = seats.seats[i];
        return ShrinkJob<T>{s.start, s.stop, w.a(s.offset), w.stride, w.modules * s.rank, float(s.scale)};
    };
    write_and_shrink<S, T>(rows, w.k, x, stride, x + w.k, stride, seats.count, job, write);
}

// S into the tail of x [rows, k + tail].
template <class S, class T>
void shrink(const Bordered<T>& w, const Seats& seats, T* x, int64_t stride, int64_t rows) {
    if (seats.count != 0) with_s<S, T>(w, seats, x, stride, rows, [](Range) {});
}

// x [rows, k + tail], the input of w, from the stream delta + residual, which goes to h; S with it.
template <class S, class T>
void norm_and_shrink(const Bordered<T>& w, const Seats& seats, const T* delta, const T* residual, T* h, const T* norm,
                     float eps, T* x, int64_t rows) {
    const int64_t width = w.k, stride = width + seats.tail;
    with_s<S, T>(w, seats, x, stride, rows, [=](Range some) {
        norm_rows<S>(some, delta, width, residual, width, h, width, norm, eps, x, stride, width);
    });
}

// a [rows, k + tail], the input of w = down, with S.
template <class S, class T>
void swiglu_and_shrink(const Bordered<T>& w, const Seats& seats, const T* gate_up, T* a, int64_t rows) {
    const int64_t width = w.k, stride = width + seats.tail;
    with_s<S, T>(w, seats, a, stride, rows,
                 [=](Range some) { swiglu_rows<S>(some, gate_up, 2 * width, a, stride, width); });
}

// Columns of a result that a thread adds to at a time.
constexpr int64_t kAddedColumns = 384;

// out [rows, n] += S B^T.
template <class S, class T>
void expand(const Bordered<T>& w, const Seats& seats, const T* x, int64_t stride, T* out) {
    int64_t pieces = 0;  // of all modules
    for (int64_t j = 0; j < w.modules; ++j) pieces += ceil_div(w.rows[j], kAddedColumns);
    for_products(seats.count * pieces, seats.work(w.n), [&](int64_t index) {
        const Seat& s = seats.seats[index / pieces];
        int64_t j = 0, row = 0, piece = index % pieces;
        for (; piece >= ceil_div(w.rows[j], kAddedColumns); row += w.rows[j++])
            piece -= ceil_div(w.rows[j], kAddedColumns);
        const int64_t begin = piece * kAddedColumns, n = min64(kAddedColumns, w.rows[j] - begin);
        add_narrow<S, T>(x + s.start * stride + w.k + j * s.rank, stride, w.b(s.offset, s.rank, row + begin, j),
                         w.stride, 1, out + s.start * w.n + row + begin, w.n, s.rows(), n, s.rank);
    });
}

// out [rows, k] += dS A.
template <class S, class T>
void expand_gradient(const Bordered<T>& w, const Seats& seats, const T* dy, int64_t stride, T* out) {
    const int64_t pieces = ceil_div(w.k, kAddedColumns);
    for_products(seats.count * pieces, seats.work(w.modules * w.k), [&](int64_t index) {
        const Seat& s = seats.seats[index / pieces];
        const int64_t begin = index % pieces * kAddedColumns, n = min64(kAddedColumns, w.k - begin);
        add_narrow<S, T>(dy + s.start * stride + w.n, stride, w.a(s.offset) + begin, 1, w.stride,
                         out + s.start * w.k + begin, w.k, s.rows(), n, w.modules * s.rank);
    });
}

// The adapters' gradients: of seat i dA [modules * rank, k] at the address grads[i], behind it dB_j [rows of j, rank].
template <class T>
struct SeatJobs {
    const Bordered<T>& w;
    const Seats& seats;
    T* dy;
    int64_t dy_stride;
    const T* s;
    int64_t s_stride;
    const T* x;
    int64_t x_stride;
    const int64_t* grads;
    int64_t count = seats.count;

    int64_t rows_of(int64_t j) const { return w.rows[j]; }
    int64_t first_row(int64_t j) const {
        int64_t row = 0;
        for (int64_t l = 0; l < j; ++l) row += w.rows[l];
        return row;
    }
    GradientJob<T> job(int64_t i) const {
        const Seat& seat = seats.seats[i];
        T* mine = dy + seat.start * dy_stride;
        const T* of_s = s == nullptr ? nullptr : s + seat.start * s_stride;
        const T* of_x = x == nullptr ? nullptr : x + seat.start * x_stride;
        auto* da = reinterpret_cast<float*>(grads[i]);
        return {mine, of_s, mine + w.n, of_x, da, seat.rows(), seat.rank, float(seat.scale)};
    }
    Factor<const T> b(int64_t i, int64_t j) const {
        const Seat& seat = seats.seats[i];
        return {w.b(seat.offset, seat.rank, first_row(j), j), w.stride};
    }
    Factor<float> db(int64_t i, int64_t j) const {
        const int64_t rank = seats.seats[i].rank;
        return {reinterpret_cast<float*>(grads[i]) + rank * (w.modules * w.k + first_row(j)), rank};
    }
    GradientShape shape() const { return {dy_stride, s_stride, dy_stride, x_stride, w.k, w.k, w.modules}; }
};

// dS into the tail of dy [rows, n + tail], dB_j += dY_j^T S_j, and with x [rows, k] dA += dS^T X. s: S of the forward.
template <class S, class T>
void gradients(const Bordered<T>& w, const Seats& seats, T* dy, int64_t stride, const T* s, int64_t s_stride,
               const T* x, int64_t x_stride, const int64_t* grads) {
    const SeatJobs<T> jobs{w, seats, dy, stride, s, s_stride, x, x_stride, grads};
    if (seats.count != 0) AdapterGradients<S, T>(jobs.shape()).narrow_and_b(jobs);
}

// dA += dS^T X.
template <class S, class T>
void accumulate_a(const Bordered<T>& w, const Seats& seats, T* dy, int64_t stride, const T* x, int64_t x_stride,
                  const int64_t* grads) {
    const SeatJobs<T> jobs{w, seats, dy, stride, nullptr, 0, x, x_stride, grads};
    if (seats.count != 0) AdapterGradients<S, T>(jobs.shape()).only_a(jobs);
}

// out [rows, n] from x [rows, k + tail], whose tail is filled.
template <class S, class T>
void forward(const Bordered<T>& w, const Seats& seats, const T* x, int64_t stride, T* out, int64_t rows) {
    KeptWords words;
    if (kReadsWords<S, T> && w.word_columns == FewRows<S, T>::C) words = {w.words, w.k};
    matmul_kept<S, T>(x, stride, w.buf, w.stride, 1, w.bias, out, w.n, rows, w.n, w.k + seats.border(w), 1.0f, words);
    if (!seats.joined) expand<S, T>(w, seats, x, stride, out);
}

// out [rows, k] = dX from dy [rows, n + tail], whose tail is filled.
template <class S, class T>
void backward(const Bordered<T>& w, const Seats& seats, const T* dy, int64_t stride, T* out, int64_t rows) {
    matmul<S, T>(dy, stride, w.buf, 1, w.stride, nullptr, out, w.k, rows, w.k, w.n + seats.border(w), 1.0f);
    if (!seats.joined) expand_gradient<S, T>(w, seats, dy, stride, out);
}

}  // namespace mint
