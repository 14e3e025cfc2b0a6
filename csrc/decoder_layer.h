// Decoder layers of a training pass or of a pass over prompts in one call, forward or backward: models/layer.py's ops
// one after the other, with nothing but C++ between them. That file says what is computed, in what order, and why; here
// are only addresses.
//
// Python fills the structs as rows of int64 (kernels/decoder_layer): all fields are 8 bytes. Rows of S and dS lie in
// the tails of the buffers they belong to, each row's own adapter's from the first column on.
#pragma once
#include <cstring>

#include "attention.h"
#include "attention_backward.h"
#include "company.h"
#include "qk_norm_rope.h"
#include "rms_norm.h"
#include "shrink.h"
#include "swiglu.h"

namespace mint {

template <class T>
struct LayerWeights {
    const T *attention_norm, *mlp_norm, *q_norm, *k_norm;
    Bordered<T> qkv, o, gate_up, down;
};

// What all layers share. `some` rows of the pass, `at`, go on behind the attention (at null: all of them); `seats` and
// `seats_some` say who has which of them.
struct LayerPass {
    int64_t rows, hidden, n_q, n_kv, d, sequences;
    const int32_t* cu_seqlens;
    const float *cos, *sin;
    int64_t table_stride, some;
    const int64_t* at;
    // Of prompts, else null: the cells of a layer's pools that the rows' k and v go to; and if there were tokens before
    // them, the cells of all n_held tokens of the sequences, whose bounds are cu_keys.
    const int64_t *slots, *held;
    int64_t n_held;
    const int32_t* cu_keys;
    Seats qkv, o, gate_up, down;  // qkv's of all rows, the others' of some

    int64_t q_width() const { return n_q * d; }
    int64_t kv_width() const { return n_kv * d; }
    int64_t qk_width() const { return (n_q + n_kv) * d; }
};

// Buffers of a forward. Rows without gaps: x and o have their linear's K + tail columns, a likewise. Null: h of the
// first layer (delta is the stream), s_* where nothing is saved, o_some and h_some where all rows go on.
template <class T>
struct ForwardRoom {
    const T* delta;
    const T* residual;
    T *h, *x, *s_qkv, *qkv, *qk, *o;
    float* lse;
    T *o_some, *h_some, *out, *x2, *h2, *s_gate_up, *gate_up, *a, *s_down;
    T *k_cells, *v_cells, *k_held, *v_held;  // of prompts: the layer's pools, and room for the held tokens
};

// Buffers of a backward, and at which address the gradients of each seat begin, per linear. dh has rows of dh_stride.
template <class T>
struct BackwardRoom {
    T* dh;
    int64_t dh_stride;
    const T *h, *s_qkv;
    int64_t s_qkv_stride;
    const T *qkv, *attended;
    int64_t attended_stride;
    const float* lse;
    const T* o;
    int64_t o_stride;
    const T *h2, *s_gate_up;
    int64_t s_gate_up_stride;
    const T *gate_up, *s_down;
    int64_t s_down_stride;
    T *da, *d_gate_up, *a, *x, *dx, *d_o, *do_all, *dh_all, *qk, *dqk, *dqkv;
    const int64_t *g_qkv, *g_o, *g_gate_up, *g_down;
    int64_t need_dx;
};

// to[i] = from[at[i]], rows of `width` elements.
template <class T>
void gather_rows(const T* from, int64_t from_stride, const int64_t* at, int64_t count, int64_t width, T* to,
                 int64_t to_stride) {
#pragma omp parallel for schedule(static) if (count * width > kSerialWork)
    for (int64_t i = 0; i < count; ++i)
        std::memcpy(to + i * to_stride, from + at[i] * from_stride, size_t(width) * sizeof(T));
}

// to[at[i]] = from[i], rows of `width` elements.
template <class T>
void scatter_rows(const T* from, int64_t from_stride, const int64_t* at, int64_t count, int64_t width, T* to,
                  int64_t to_stride) {
#pragma omp parallel for schedule(static) if (count * width > kSerialWork)
    for (int64_t i = 0; i < count; ++i)
        std::memcpy(to + at[i] * to_stride, from + i * from_stride, size_t(width) * sizeof(T));
}

// to[at[i]] = from[i], the other of `rows` rows zero; at ascends.
template <class T>
void spread_rows(const T* from, int64_t from_stride, const int64_t* at, int64_t count, int64_t width, T* to,
                 int64_t to_stride, int64_t rows) {
    for (int64_t i = 0, row = 0; row < rows; ++row) {
        T* line = to + row * to_stride;
        if (i < count && at[i] == row) {
            std::memcpy(line, from + i++ * from_stride, size_t(width) * sizeof(T));
        } else {
            std::memset(line, 0, size_t(width) * sizeof(T));
        }
    }
}

// A copy of the tail of x, for the backward.
template <class T>
void keep_tail(const T* x, int64_t stride, int64_t rows, int64_t tail, T* s) {
    if (s == nullptr || tail == 0) return;
    for (int64_t m = 0; m < rows; ++m) std::memcpy(s + m * tail, x + (m + 1) * stride - tail, size_t(tail) * sizeof(T));
}

template <class S, class T>
void layer_forward(const LayerWeights<T>& w, const LayerPass& p, const ForwardRoom<T>& r, float eps, float scale) {
    const int64_t m = p.rows, hidden = p.hidden, q_width = p.q_width(), qk_width = p.qk_width();

    const int64_t x_stride = hidden + p.qkv.tail;
    norm_and_shrink<S, T>(w.qkv, p.qkv, r.delta, r.residual, r.h, w.attention_norm, eps, r.x, m);
    keep_tail(r.x, x_stride, m, p.qkv.tail, r.s_qkv);
    forward<S, T>(w.qkv, p.qkv, r.x, x_stride, r.qkv, m);
    qk_norm_rope<S, T>(r.qkv, w.qkv.n, p.cos, p.table_stride, p.sin, p.table_stride, p.n_q, p.n_kv, w.q_norm, w.k_norm,
                       eps, r.qk, qk_width, m, p.d);
    // Of all rows the attention has what o reads; where some go on, its own room has no tail.
    const int64_t o_stride = q_width + p.o.tail, all_stride = p.at == nullptr ? o_stride : q_width;
    const T *k = r.qk + q_width, *v = r.qkv + qk_width;
    int64_t k_stride = qk_width, v_stride = w.qkv.n, keys = m;
    if (p.slots != nullptr) {
        const int64_t width = p.kv_width();
        scatter_rows(k, k_stride, p.slots, m, width, r.k_cells, width);
        scatter_rows(v, v_stride, p.slots, m, width, r.v_cells, width);
        if (p.held != nullptr) {
            gather_rows(r.k_cells, width, p.held, p.n_held, width, r.k_held, width);
            gather_rows(r.v_cells, width, p.held, p.n_held, width, r.v_held, width);
            k = r.k_held, v = r.v_held, k_stride = v_stride = width, keys = p.n_held;
        }
    }
    attention<S, T>(r.qk, qk_width, k, k_stride, v, v_stride, r.o, all_stride, r.lse, p.cu_seqlens,
                    p.held == nullptr ? p.cu_seqlens : p.cu_keys, p.sequences, m, keys, p.n_q, p.n_kv, p.d, scale);

    T* o = r.o;
    const T* h = r.residual == nullptr ? r.delta : r.h;
    if (p.at != nullptr) {
        gather_rows(r.o, all_stride, p.at, p.some, q_width, r.o_some, o_stride);
        gather_rows(h, hidden, p.at, p.some, hidden, r.h_some, hidden);
        o = r.o_some, h = r.h_some;
    }
    const int64_t some = p.some;
    shrink<S, T>(w.o, p.o, o, o_stride, some);
    forward<S, T>(w.o, p.o, o, o_stride, r.out, some);

    const int64_t x2_stride = hidden + p.gate_up.tail, a_stride = w.down.k + p.down.tail;
    norm_and_shrink<S, T>(w.gate_up, p.gate_up, r.out, h, r.h2, w.mlp_norm, eps, r.x2, some);
    keep_tail(r.x2, x2_stride, some, p.gate_up.tail, r.s_gate_up);
    forward<S, T>(w.gate_up, p.gate_up, r.x2, x2_stride, r.gate_up, some);
    swiglu_and_shrink<S, T>(w.down, p.down, r.gate_up, r.a, some);
    keep_tail(r.a, a_stride, some, p.down.tail, r.s_down);
    forward<S, T>(w.down, p.down, r.a, a_stride, r.out, some);
}

template <class S, class T>
void layer_backward(const LayerWeights<T>& w, const LayerPass& p, const BackwardRoom<T>& r, float eps, float scale) {
    const int64_t m = p.rows, some = p.some, hidden = p.hidden, ffn = w.down.k;
    const int64_t q_width = p.q_width(), qk_width = p.qk_width();

    // MLP. The SwiGLU backward recomputes `a`, which down's adapter gradient needs.
    T* dh = r.dh;
    gradients<S, T>(w.down, p.down, dh, r.dh_stride, r.s_down, r.s_down_stride, nullptr, 0, r.g_down);
    backward<S, T>(w.down, p.down, dh, r.dh_stride, r.da, some);
    const int64_t d_gate_up = 2 * ffn + p.gate_up.tail;
    swiglu_backward<S, T>(r.da, ffn, r.gate_up, 2 * ffn, r.d_gate_up, d_gate_up, r.a, ffn, some, ffn);
    accumulate_a<S, T>(w.down, p.down, dh, r.dh_stride, r.a, ffn, r.g_down);
    if (p.gate_up.count != 0)
        rms_norm<S, T>(r.h2, hidden, nullptr, 0, nullptr, 0, w.mlp_norm, eps, r.x, hidden, some, hidden);
    gradients<S, T>(w.gate_up, p.gate_up, r.d_gate_up, d_gate_up, r.s_gate_up, r.s_gate_up_stride, r.x, hidden,
                    r.g_gate_up);
    backward<S, T>(w.gate_up, p.gate_up, r.d_gate_up, d_gate_up, r.dx, some);
    rms_norm_backward<S, T>(r.dx, hidden, r.h2, hidden, w.mlp_norm, eps, dh, r.dh_stride, dh, r.dh_stride, some,
                            hidden);

    // Attention.
    gradients<S, T>(w.o, p.o, dh, r.dh_stride, r.o + q_width, r.o_stride, r.o, r.o_stride, r.g_o);
    backward<S, T>(w.o, p.o, dh, r.dh_stride, r.d_o, some);
    const T* d_o = r.d_o;
    if (p.at != nullptr) {
        spread_rows(r.d_o, q_width, p.at, some, q_width, r.do_all, q_width, m);
        spread_rows(dh, r.dh_stride, p.at, some, hidden, r.dh_all, r.dh_stride, m);
        d_o = r.do_all, dh = r.dh_all;
    }
    qk_norm_rope<S, T>(r.qkv, w.qkv.n, p.cos, p.table_stride, p.sin, p.table_stride, p.n_q, p.n_kv, w.q_norm, w.k_norm,
                       eps, r.qk, qk_width, m, p.d);
    const int64_t dqkv = w.qkv.n + p.qkv.tail;
    attention_backward<S, T>(d_o, q_width, r.qk, qk_width, r.qk + q_width, qk_width, r.qkv + qk_width, w.qkv.n,
                             r.attended, r.attended_stride, r.lse, r.dqk, qk_width, r.dqk + q_width, qk_width,
                             r.dqkv + qk_width, dqkv, p.cu_seqlens, p.sequences, m, p.n_q, p.n_kv, p.d, scale);
    qk_norm_rope_backward<S, T>(r.dqk, qk_width, r.qkv, w.qkv.n, p.cos, p.table_stride, p.sin, p.table_stride, p.n_q,
                                p.n_kv, w.q_norm, w.k_norm, eps, r.dqkv, dqkv, m, p.d);
    if (p.qkv.count != 0)
        rms_norm<S, T>(r.h, hidden, nullptr, 0, nullptr, 0, w.attention_norm, eps, r.x, hidden, m, hidden);
    gradients<S, T>(w.qkv, p.qkv, r.dqkv, dqkv, r.s_qkv, r.s_qkv_stride, r.x, hidden, r.g_qkv);
    if (r.need_dx == 0) return;
    backward<S, T>(w.qkv, p.qkv, r.dqkv, dqkv, r.dx, m);
    rms_norm_backward<S, T>(r.dx, hidden, r.h, hidden, w.attention_norm, eps, dh, r.dh_stride, dh, r.dh_stride, m,
                            hidden);
}

// One layer of a call.
template <class T, class Room>
struct Layer {
    const LayerWeights<T>* weights;
    const LayerPass* pass;
    const Room* room;
};

// `count` layers in the order in which they are done; `layers` are their Layer structs.
template <class S, class T>
void decoder_layers(const int64_t* layers, int64_t count, float eps, float scale) {
    const auto* layer = reinterpret_cast<const Layer<T, ForwardRoom<T>>*>(layers);
    for (; count > 0; --count, ++layer) layer_forward<S, T>(*layer->weights, *layer->pass, *layer->room, eps, scale);
}

template <class S, class T>
void decoder_layers_backward(const int64_t* layers, int64_t count, float eps, float scale) {
    const auto* layer = reinterpret_cast<const Layer<T, BackwardRoom<T>>*>(layers);
    for (; count > 0; --count, ++layer) layer_backward<S, T>(*layer->weights, *layer->pass, *layer->room, eps, scale);
}

}  // namespace mint
