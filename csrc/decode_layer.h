// One decoder layer for a few rows, each one token of its own sequence: the decode step.
//
//     h1 = residual + x          x1 = norm(h1)   [q k v] = x1 Wqkv   q, k rotated; k, v into the cache
//     delta = attention(q) Wo    h = h1 + delta  x2 = norm(h)        out = (silu(gate) * up) Wd, [gate up] = x2 Wgu
//
// Every product is a dot product per weight row (logits.h): the time is that of reading the weights once, and what this
// op saves is a dozen calls from Python a layer, each of which costs as much as reading 50 KB. The steps are the ops'
// own functions, so every row has the bits that they give one by one. Adapters sit in the weights' borders: a product's
// input has S = scale * x A^T in its tail columns, zeros in the columns of other rows' adapters.
#pragma once
#include <cstring>

#include "attention_tile.h"  // Bump
#include "check.h"
#include "logits.h"
#include "paged_attention.h"
#include "qk_norm_rope.h"
#include "rms_norm.h"
#include "scratch.h"
#include "swiglu.h"

namespace mint {

// Who sits in the border: segment s has the rows [0], [1] of the batch, rank offset [2], rank [3], and trains the
// groups of the bits in [4].
struct LayerAdapters {
    const int64_t* segments;
    const float* scales;
    int64_t count, ranks;

    // Border columns of a group of m modules: none if nobody trains it.
    int64_t columns(int64_t group, int64_t m) const {
        for (int64_t s = 0; s < count; ++s)
            if (segments[s * 5 + 4] & group) return m * ranks;
        return 0;
    }
};

// A bordered weight [[W, B], [A, 0]]: W [n, k] of m modules, all rows `stride` apart.
template <class T>
struct LayerLinear {
    const T* buf;
    int64_t stride;
    const T* bias;
    int64_t n, k, m, group;
};

// sums [rows, n] = x [rows, width] weight^T. A block of weight rows is read from memory for the first rows of x and
// from the cache for the others.
template <class S, class T>
void few_rows(const T* x, int64_t x_stride, const T* weight, int64_t w_stride, float* sums, int64_t rows, int64_t n,
              int64_t width) {
    const int64_t block = max64(8, (64 << 10) / int64_t(sizeof(T)) / max64(width, 1) / 8 * 8);  // 64 KB: in any L2
    const int64_t blocks = ceil_div(n, block);
#pragma omp parallel for schedule(static) if (n * width > kSerialWork * 2)
    for (int64_t t = 0; t < blocks; ++t) {
        const int64_t j = t * block, columns = min64(block, n - j);
        for (int64_t i = 0; i < rows; i += kDotRows)
            dot_block<S, T, kDotRows>(min64(kDotRows, rows - i), x + i * x_stride, x_stride, weight + j * w_stride,
                                      w_stride, columns, width, sums + i * n + j, n);
    }
}

// y [rows, n] (contiguous) = x [rows, k + p] W^T; fills the tail of x first. sums: fp32 [rows, max(n, m * ranks)].
template <class S, class T>
void layer_linear(const LayerLinear<T>& w, const LayerAdapters& adapters, T* x, int64_t x_stride, T* y, float* sums,
                  int64_t rows) {
    const int64_t tail = adapters.columns(w.group, w.m);
    if (tail > 0) {
        for (int64_t i = 0; i < rows; ++i) std::memset(x + i * x_stride + w.k, 0, size_t(tail) * sizeof(T));
        for (int64_t s = 0; s < adapters.count; ++s) {
            const int64_t* segment = adapters.segments + s * 5;
            if (!(segment[4] & w.group)) continue;
            const int64_t first = segment[0], n = segment[1] - first, at = w.m * segment[2], width = w.m * segment[3];
            few_rows<S, T>(x + first * x_stride, x_stride, w.buf + (w.n + at) * w.stride, w.stride, sums, n, width,
                           w.k);
            const auto scale = S::set1(adapters.scales[s]);
            for (int64_t i = 0; i < n; ++i) {
                T* row = x + (first + i) * x_stride + w.k + at;
                for_vectors<S>(width, [&](int64_t j, int lanes) __attribute__((always_inline)) {
                    S::store_n(row + j, S::mul(S::load_n(sums + i * width + j, lanes), scale), lanes);
                });
            }
        }
    }
    few_rows<S, T>(x, x_stride, w.buf, w.stride, sums, rows, w.n, w.k + tail);
    for (int64_t i = 0; i < rows; ++i) {
        const float* sum = sums + i * w.n;
        T* row = y + i * w.n;
        for_vectors<S>(w.n, [&](int64_t j, int lanes) __attribute__((always_inline)) {
            auto v = S::load_n(sum + j, lanes);
            if (w.bias != nullptr) v = S::add(v, S::load_n(w.bias + j, lanes));
            S::store_n(row + j, v, lanes);
        });
    }
}

// x, residual (null: x is the stream), h, out: [rows, hidden] contiguous. Pools of one layer: [blocks, block, n_kv d]
// contiguous. slots[i]: the cell that row i's k and v go to.
template <class S, class T>
void decode_layer(const T* x, const T* residual, T* h, T* out, const T* attention_norm, const T* mlp_norm,
                  const T* q_norm, const T* k_norm, const T* qkv, int64_t qkv_stride, const T* qkv_bias, const T* o,
                  int64_t o_stride, const T* o_bias, const T* gate_up, int64_t gate_up_stride, const T* down,
                  int64_t down_stride, const float* cos, int64_t cos_stride, const float* sin, int64_t sin_stride,
                  T* k_pool, T* v_pool, int64_t n_blocks, int64_t block, const int64_t* slots, const int32_t* table,
                  int64_t table_stride, int64_t max_blocks, const int32_t* lengths, const int64_t* segments,
                  const float* scales, int64_t n_segments, int64_t ranks, int64_t rows, int64_t hidden, int64_t ffn,
                  int64_t n_q, int64_t n_kv, int64_t d, float eps, float scale) {
    const char* op = "decode_layer";
    const int64_t q_width = n_q * d, kv_width = n_kv * d, qk_width = q_width + kv_width, width = qk_width + kv_width;
    for (int64_t i = 0; i < rows; ++i) {
        check::at_least(op, "slots", slots[i], 0);
        check::at_least(op, "cells in the pool", n_blocks * block, slots[i] + 1);
    }
    const LayerAdapters adapters{segments, scales, n_segments, ranks};
    const LayerLinear<T> w_qkv{qkv, qkv_stride, qkv_bias, width, hidden, 3, 1},
        w_o{o, o_stride, o_bias, hidden, q_width, 1, 2},
        w_gate_up{gate_up, gate_up_stride, nullptr, 2 * ffn, hidden, 2, 4},
        w_down{down, down_stride, nullptr, hidden, ffn, 1, 8};

    T *x1, *projected, *rotated, *heads, *delta, *middle, *gated, *a;
    float* sums;
    const int64_t x_stride = hidden + 3 * ranks, o_in = q_width + ranks, a_in = ffn + ranks;
    const auto place = [&](char* base) {
        Bump b{base, 0};
        x1 = take<T>(b, rows * x_stride);
        projected = take<T>(b, rows * width);
        rotated = take<T>(b, rows * qk_width);
        heads = take<T>(b, rows * o_in);
        delta = take<T>(b, rows * hidden);
        middle = take<T>(b, rows * hidden);
        gated = take<T>(b, rows * 2 * ffn);
        a = take<T>(b, rows * a_in);
        sums = take<float>(b, rows * max64(max64(width, 2 * ffn), max64(hidden, 3 * ranks)));
        return b.used;
    };
    const size_t bytes = place(nullptr);
    place(static_cast<char*>(scratch(Slot::kLayer, bytes)));

    rms_norm<S, T>(x, hidden, residual, hidden, middle, hidden, attention_norm, eps, x1, x_stride, rows, hidden);
    const T* h1 = residual == nullptr ? x : middle;
    layer_linear<S, T>(w_qkv, adapters, x1, x_stride, projected, sums, rows);
    qk_norm_rope<S, T>(projected, width, cos, cos_stride, sin, sin_stride, n_q, n_kv, q_norm, k_norm, eps, rotated,
                       qk_width, rows, d);
    for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(k_pool + slots[i] * kv_width, rotated + i * qk_width + q_width, size_t(kv_width) * sizeof(T));
        std::memcpy(v_pool + slots[i] * kv_width, projected + i * width + qk_width, size_t(kv_width) * sizeof(T));
    }
    paged_attention<S, T>(rotated, qk_width, k_pool, block * kv_width, kv_width, v_pool, block * kv_width, kv_width,
                          table, table_stride, lengths, heads, o_in, rows, n_blocks, block, max_blocks, n_q, n_kv, d,
                          scale);
    layer_linear<S, T>(w_o, adapters, heads, o_in, delta, sums, rows);
    rms_norm<S, T>(delta, hidden, h1, hidden, h, hidden, mlp_norm, eps, x1, x_stride, rows, hidden);
    layer_linear<S, T>(w_gate_up, adapters, x1, x_stride, gated, sums, rows);
    swiglu<S, T>(gated, 2 * ffn, a, a_in, rows, ffn);
    layer_linear<S, T>(w_down, adapters, a, a_in, out, sums, rows);
}

}  // namespace mint
