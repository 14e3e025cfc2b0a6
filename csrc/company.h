// A bordered linear over the rows of a pass, each with its own adapter: what models/linear.py and company.py do.
//
// One adapter that has all rows (`joined`) is multiplied in the base's own product, which goes on over the border. Of
// several each meets its own rows: S and dS from the first column of the tail on, whoever sits where in the border.
#pragma once
#include "grouped_linear.h"
#include "lora_gradients.h"
#include "matmul.h"
#include "shrink.h"

namespace mint {

// W [n, k] of up to three modules stacked on n, with the border: A's rows from row n on, B's columns from column k on.
template <class T>
struct Bordered {
    T* buf;
    int64_t stride;
    const T* bias;
    int64_t n, k, modules, rows[3];

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

    // Columns of the border that the base's product goes on over.
    template <class T>
    int64_t border(const Bordered<T>& w) const {
        return joined ? w.modules * seats[0].rank : 0;
    }
};

// S into the tail of x [rows, k + tail].
template <class S, class T>
void shrink(const Bordered<T>& w, const Seats& seats, T* x, int64_t stride) {
    for (int64_t i = 0; i < seats.count; ++i) {
        const Seat& s = seats.seats[i];
        T* mine = x + s.start * stride;
        matmul<S, T>(mine, stride, w.a(s.offset), w.stride, 1, nullptr, mine + w.k, stride, s.rows(),
                     w.modules * s.rank, w.k, float(s.scale));
    }
}

// x [rows, k + tail], the input of w, from the stream delta + residual, which goes to h; S with it.
template <class S, class T>
void norm_and_shrink(const Bordered<T>& w, const Seats& seats, const T* delta, const T* residual, T* h, const T* norm,
                     float eps, T* x, int64_t rows) {
    const int64_t width = w.k, stride = width + seats.tail;
    if (seats.joined) {
        const Seat& s = seats.seats[0];
        rms_norm_shrink<S, T>(delta, width, residual, width, h, width, norm, eps, x, stride, w.a(s.offset), w.stride,
                              float(s.scale), x + width, stride, rows, width, w.modules * s.rank);
        return;
    }
    rms_norm<S, T>(delta, width, residual, width, h, width, norm, eps, x, stride, rows, width);
    shrink<S, T>(w, seats, x, stride);
}

// a [rows, k + tail], the input of w = down, with S.
template <class S, class T>
void swiglu_and_shrink(const Bordered<T>& w, const Seats& seats, const T* gate_up, T* a, int64_t rows) {
    const int64_t width = w.k, stride = width + seats.tail;
    if (seats.joined) {
        const Seat& s = seats.seats[0];
        swiglu_shrink<S, T>(gate_up, 2 * width, a, stride, w.a(s.offset), w.stride, float(s.scale), a + width, stride,
                            rows, width, w.modules * s.rank);
        return;
    }
    swiglu<S, T>(gate_up, 2 * width, a, stride, rows, width);
    shrink<S, T>(w, seats, a, stride);
}

// run(seat, j, first row of module j, its rows) for every seat and module, shared between the threads.
template <class T, class Run>
void for_modules(const Bordered<T>& w, const Seats& seats, Run run) {
    int64_t work = 0;
    for (int64_t i = 0; i < seats.count; ++i) work += seats.seats[i].rows() * seats.seats[i].rank * w.n;
    for_products(seats.count * w.modules, work, [&](int64_t index) {
        const int64_t j = index % w.modules;
        int64_t row = 0;
        for (int64_t before = 0; before < j; ++before) row += w.rows[before];
        run(index / w.modules, j, row, w.rows[j]);
    });
}

// out [rows, n] += S B^T.
template <class S, class T>
void expand(const Bordered<T>& w, const Seats& seats, const T* x, int64_t stride, T* out) {
    for_modules(w, seats, [&](int64_t i, int64_t j, int64_t row, int64_t n) {
        const Seat& s = seats.seats[i];
        small_product<S, T>(x + s.start * stride + w.k + j * s.rank, stride, w.b(s.offset, s.rank, row, j), w.stride, 1,
                            out + s.start * w.n + row, w.n, s.rows(), n, s.rank, 1.0f, true);
    });
}

// out [rows, k] += dS A.
template <class S, class T>
void expand_gradient(const Bordered<T>& w, const Seats& seats, const T* dy, int64_t stride, T* out) {
    for (int64_t i = 0; i < seats.count; ++i) {
        const Seat& s = seats.seats[i];
        small_product<S, T>(dy + s.start * stride + w.n, stride, w.a(s.offset), 1, w.stride, out + s.start * w.k, w.k,
                            s.rows(), w.k, w.modules * s.rank, 1.0f, true);
    }
}

// A seat's gradients: dA [modules * rank, k] at the address grads[i], behind it dB_j [rows of module j, rank].
MINT_INLINE float* gradient_a(const int64_t* grads, int64_t i) { return reinterpret_cast<float*>(grads[i]); }

// dS into the tail of dy [rows, n + tail], dB_j += dY_j^T S_j, and with x [rows, k] dA += dS^T X. s: S of the forward.
template <class S, class T>
void gradients(const Bordered<T>& w, const Seats& seats, T* dy, int64_t stride, const T* s, int64_t s_stride,
               const T* x, int64_t x_stride, const int64_t* grads) {
    for (int64_t i = 0; i < seats.count; ++i) {
        const Seat& seat = seats.seats[i];
        float* da = gradient_a(grads, i);
        float* db = da + w.modules * seat.rank * w.k;
        int64_t modules[3 * 5];
        for (int64_t j = 0, row = 0; j < w.modules; row += w.rows[j++]) {
            int64_t* field = modules + j * 5;
            field[0] = w.rows[j];
            field[1] = reinterpret_cast<int64_t>(w.b(seat.offset, seat.rank, row, j));
            field[2] = w.stride;
            field[3] = reinterpret_cast<int64_t>(db + row * seat.rank);
            field[4] = seat.rank;
        }
        T* mine = dy + seat.start * stride;
        lora_gradients<S, T>(mine, stride, s + seat.start * s_stride, s_stride, mine + w.n, stride, modules, w.modules,
                             float(seat.scale), x == nullptr ? nullptr : x + seat.start * x_stride, x_stride, w.k,
                             x == nullptr ? nullptr : da, w.k, seat.rows(), seat.rank);
    }
}

// dA += dS^T X.
template <class S, class T>
void accumulate_a(const Bordered<T>& w, const Seats& seats, const T* dy, int64_t stride, const T* x, int64_t x_stride,
                  const int64_t* grads) {
    for (int64_t i = 0; i < seats.count; ++i) {
        const Seat& s = seats.seats[i];
        outer_accumulate<S, T>(dy + s.start * stride + w.n, stride, x + s.start * x_stride, x_stride,
                               gradient_a(grads, i), w.k, s.rows(), w.modules * s.rank, w.k, 1.0f);
    }
}

// out [rows, n] from x [rows, k + tail], whose tail is filled.
template <class S, class T>
void forward(const Bordered<T>& w, const Seats& seats, const T* x, int64_t stride, T* out, int64_t rows) {
    matmul<S, T>(x, stride, w.buf, w.stride, 1, w.bias, out, w.n, rows, w.n, w.k + seats.border(w), 1.0f);
    if (!seats.joined) expand<S, T>(w, seats, x, stride, out);
}

// out [rows, k] = dX from dy [rows, n + tail], whose tail is filled.
template <class S, class T>
void backward(const Bordered<T>& w, const Seats& seats, const T* dy, int64_t stride, T* out, int64_t rows) {
    matmul<S, T>(dy, stride, w.buf, 1, w.stride, nullptr, out, w.k, rows, w.k, w.n + seats.border(w), 1.0f);
    if (!seats.joined) expand_gradient<S, T>(w, seats, dy, stride, out);
}

}  // namespace mint
