// The gradient of causal attention (FlashAttention-2, arXiv:2307.08691), transposed like the forward (attention.h).
//
// One task owns a (sequence, kv head) and walks over row tiles, within them over key tiles:
//     P^T  [keys][rows]  = exp(scale K Q^T - lse)           dP^T [keys][rows] = V dO^T
//     dS^T [keys][rows]  = scale P^T (dP^T - delta)         delta = rowsum(dO * O)
//     dV   [keys][d]    += P^T dO                           dK   [keys][d]   += dS^T Q
//     dQ^T [d][rows]    += K^T dS^T
// S^T and dP^T are made a few keys at a time and never leave L1. dK and dV of the whole sequence are fp32 scratch of
// the task, dQ^T of the row tile: every sum has one owner and one order, whatever the number of threads. The sum over
// a group's q heads is part of the products, because the rows of a tile are (query, head) pairs.
#pragma once
#include "attention.h"

namespace mint {

template <class S, class T>
struct AttentionBackward {
    static constexpr bool kPairs = kAttentionPairs<S, T>;
    using X = Tile<S, kPairs>;
    using F = typename S::F;
    static constexpr int64_t kRows = kAttentionRows, kKeys = 64, kLd = kKeys / X::per_word;
    static constexpr int64_t kLdRows = kRows / X::per_word, kStep = 2 * X::kMr;  // keys per piece of S^T and dP^T

    const T *d_out, *q, *k, *v, *out;
    const float* lse;
    T *dq, *dk, *dv;
    int64_t d_out_stride, q_stride, k_stride, v_stride, out_stride, dq_stride, dk_stride, dv_stride;
    AttentionShape shape;
    float scale;

    // Scratch of one thread.
    Word *keys, *keys_t, *values, *zip, *q_rows, *q_t, *q_zip, *do_rows, *do_t, *do_zip, *p, *ds, *ds_zip;
    float *scores, *d_weights, *dk_sum, *dv_sum, *dq_sum, *row_lse, *row_delta;

    size_t place(char* base, int64_t longest) {
        const int64_t d = shape.d, w = X::row_words(d), dp = X::pad(d), tiles = ceil_div(longest, kKeys);
        Bump b{base, 0};
        keys = take<Word>(b, tiles * kKeys * w);
        values = take<Word>(b, tiles * kKeys * w);
        keys_t = take<Word>(b, tiles * dp * kLd);
        zip = take<Word>(b, kLd * dp);
        q_rows = take<Word>(b, kRows * max64(w, dp));
        do_rows = take<Word>(b, kRows * w);
        q_t = take<Word>(b, w * kRows);
        do_t = take<Word>(b, w * kRows);
        q_zip = take<Word>(b, kLdRows * dp);
        do_zip = take<Word>(b, kLdRows * dp);
        p = take<Word>(b, kKeys * kLdRows);
        ds = take<Word>(b, kKeys * kLdRows);
        ds_zip = take<Word>(b, kLd * kRows);
        scores = take<float>(b, kStep * kRows);
        d_weights = take<float>(b, kStep * kRows);
        dk_sum = take<float>(b, tiles * kKeys * dp);
        dv_sum = take<float>(b, tiles * kKeys * dp);
        dq_sum = take<float>(b, dp * kRows);
        row_lse = take<float>(b, kRows);
        row_delta = take<float>(b, kRows);
        return b.used;
    }

    void pack_keys(const AttentionTask& t, int64_t n_keys) {
        const int64_t d = shape.d, w = X::row_words(d), dp = X::pad(d);
        for (int64_t j = 0; j < n_keys; ++j) {
            X::copy_row(k + (t.token + j) * k_stride + t.kv_head * d, d, keys + j * w);
            X::copy_row(v + (t.token + j) * v_stride + t.kv_head * d, d, values + j * w);
        }
        const int64_t last = X::row_words(n_keys) * X::per_word;
        std::memset(keys + n_keys * w, 0, size_t(last - n_keys) * w * sizeof(Word));
        for (int64_t j0 = 0; j0 < n_keys; j0 += kKeys) {
            const int64_t depth = X::row_words(min64(kKeys, n_keys - j0));
            const Word* zipped = X::zipped(keys + j0 * w, depth * X::per_word, d, zip);
            X::transpose(zipped, dp, depth, dp, keys_t + j0 / kKeys * dp * kLd, kLd);
        }
        std::memset(dk_sum, 0, size_t(n_keys * dp) * sizeof(float));
        std::memset(dv_sum, 0, size_t(n_keys * dp) * sizeof(float));
    }

    // One row tile's Q and dO in both layouts, its lse, and -scale * delta. Rows past n_rows are zeros.
    void pack_rows(const AttentionTask& t, int64_t row0, int64_t n_rows, int64_t columns) {
        const int64_t d = shape.d, g = shape.group, w = X::row_words(d);
        RowCursor row = rows_from(t, row0, g);
        for (int64_t c = 0; c < n_rows; ++c, next_row(row)) {
            const T* grad = d_out + row.token * d_out_stride + row.head * d;
            const T* o = out + row.token * out_stride + row.head * d;
            X::copy_row(q + row.token * q_stride + row.head * d, d, q_rows + c * w);
            X::copy_row(grad, d, do_rows + c * w);
            row_delta[c] = -scale * X::inner(grad, o, d);
            row_lse[c] = -lse[row.head * shape.tokens + row.token];
        }
        for (int64_t c = n_rows; c < columns; ++c) row_delta[c] = row_lse[c] = 0.0f;
        std::memset(q_rows + n_rows * w, 0, size_t(columns - n_rows) * w * sizeof(Word));
        std::memset(do_rows + n_rows * w, 0, size_t(columns - n_rows) * w * sizeof(Word));
        X::transpose(q_rows, w, columns, w, q_t, kRows);
        X::transpose(do_rows, w, columns, w, do_t, kRows);
    }

    // P^T and dS^T of keys [j, j + n) of a key tile: rows as A of dV and dK, dS^T zipped as B of dQ^T.
    void weights(int64_t j, int64_t n, int64_t columns) {
        const F vscale = S::set1(scale);
        for (int64_t c = 0; c < columns; c += S::W) {
            const F vlse = S::load(row_lse + c), vdelta = S::load(row_delta + c);
            F previous = S::zero();
            for (int64_t i = 0; i < n; ++i) {
                const F weight = S::exp_fast(S::fma(S::load(scores + i * kRows + c), vscale, vlse));
                const F grad = S::mul(weight, S::fma(S::load(d_weights + i * kRows + c), vscale, vdelta));
                if constexpr (kPairs) {
                    S::store(reinterpret_cast<T*>(p + (j + i) * kLdRows) + c, weight);
                    S::store(reinterpret_cast<T*>(ds + (j + i) * kLdRows) + c, grad);
                    if (i % 2) X::store_zipped(ds_zip + (j + i) / 2 * kRows + c, previous, grad);
                    previous = grad;
                } else {
                    S::store(reinterpret_cast<float*>(p) + (j + i) * kRows + c, weight);
                    S::store(reinterpret_cast<float*>(ds) + (j + i) * kRows + c, grad);
                }
            }
            if constexpr (kPairs) {
                if (n % 2) X::store_zipped(ds_zip + (j + n) / 2 * kRows + c, previous, S::zero());
            }
        }
    }

    void row_tile(const AttentionTask& t, int64_t row0, int64_t n_rows) {
        const int64_t d = shape.d, g = shape.group, w = X::row_words(d), dp = X::pad(d);
        const int64_t columns = X::round_up(X::pad(n_rows), X::kUnit), depth = X::depth(n_rows);
        const int64_t n_keys = (row0 + n_rows - 1) / g + 1;
        pack_rows(t, row0, n_rows, columns);
        const Word* q_b = X::zipped(q_rows, depth * X::per_word, d, q_zip);
        const Word* do_b = X::zipped(do_rows, depth * X::per_word, d, do_zip);
        const Word* ds_b = kPairs ? ds_zip : ds;
        for (int64_t j0 = 0; j0 < n_keys; j0 += kKeys) {
            const int64_t n = min64(kKeys, n_keys - j0);
            for (int64_t j = 0; j < n; j += kStep) {
                const int64_t step = min64(kStep, n - j);
                X::gemm(keys + (j0 + j) * w, w, q_t, kRows, scores, kRows, step, columns, X::depth(d), false);
                X::gemm(values + (j0 + j) * w, w, do_t, kRows, d_weights, kRows, step, columns, X::depth(d), false);
                if ((j0 + j + step - 1) * g > row0) mask_future<S>(scores, step, j0 + j, row0, g, columns);
                weights(j, step, columns);
            }
            X::clear_rows(p, n, X::round_up(n, X::kRowUnit), kLdRows);
            X::clear_rows(ds, n, X::round_up(n, X::kRowUnit), kLdRows);
            X::clear_rows(ds_zip, X::words(n), X::depth(n), kRows);
            X::gemm(p, kLdRows, do_b, dp, dv_sum + j0 * dp, dp, n, dp, depth, true);
            X::gemm(ds, kLdRows, q_b, dp, dk_sum + j0 * dp, dp, n, dp, depth, true);
            X::gemm(keys_t + j0 / kKeys * dp * kLd, kLd, ds_b, kRows, dq_sum, kRows, d, columns, X::depth(n), j0 > 0);
        }
        X::transpose(reinterpret_cast<const Word*>(dq_sum), kRows, dp, columns, q_rows, dp);
        RowCursor to = rows_from(t, row0, g);
        for (int64_t c = 0; c < n_rows; ++c, next_row(to))
            X::write_row(reinterpret_cast<const float*>(q_rows) + c * dp, d, dq + to.token * dq_stride + to.head * d);
    }

    void run(const AttentionTask& t) {
        const int64_t d = shape.d, n_keys = (t.end - 1) / shape.group + 1;
        pack_keys(t, n_keys);
        for (int64_t r = t.begin; r < t.end; r += kRows) row_tile(t, r, min64(kRows, t.end - r));
        for (int64_t j = 0; j < n_keys; ++j) {
            X::write_row(dk_sum + j * X::pad(d), d, dk + (t.token + j) * dk_stride + t.kv_head * d);
            X::write_row(dv_sum + j * X::pad(d), d, dv + (t.token + j) * dv_stride + t.kv_head * d);
        }
    }
};

template <class S, class T>
void attention_backward(const T* d_out, int64_t d_out_stride, const T* q, int64_t q_stride, const T* k,
                        int64_t k_stride, const T* v, int64_t v_stride, const T* out, int64_t out_stride,
                        const float* lse, T* dq, int64_t dq_stride, T* dk, int64_t dk_stride, T* dv, int64_t dv_stride,
                        const int32_t* cu_seqlens, int64_t n_seqs, int64_t tokens, int64_t n_q, int64_t n_kv, int64_t d,
                        float scale) {
    check::multiple("attention_backward", "head_dim", d, 2);
    check::multiple("attention_backward", "n_q", n_q, n_kv);
    check::row_stride("attention_backward", "dq", dq_stride, tokens, n_q * d);
    check::row_stride("attention_backward", "dk", dk_stride, tokens, n_kv * d);
    check::row_stride("attention_backward", "dv", dv_stride, tokens, n_kv * d);
    const AttentionShape shape{tokens, n_kv, n_q / n_kv, d};
    const AttentionPlan plan("attention_backward", cu_seqlens, nullptr, n_seqs, tokens, tokens, n_kv, shape.group, 0);
    const int64_t n_tasks = plan.n_tasks();
    AttentionBackward<S, T> shared{};
    shared.d_out = d_out, shared.q = q, shared.k = k, shared.v = v, shared.out = out, shared.lse = lse;
    shared.dq = dq, shared.dk = dk, shared.dv = dv, shared.shape = shape, shared.scale = scale;
    shared.d_out_stride = d_out_stride, shared.q_stride = q_stride, shared.k_stride = k_stride;
    shared.v_stride = v_stride, shared.out_stride = out_stride;
    shared.dq_stride = dq_stride, shared.dk_stride = dk_stride, shared.dv_stride = dv_stride;
    const size_t bytes = shared.place(nullptr, plan.longest());
    Attempts attempts;
    // No num_threads: a smaller team would end libgomp's other threads, and their scratch with them.
#pragma omp parallel if (n_tasks > 1)
    {
        const typename S::Tiles registers;
        AttentionBackward<S, T> mine = shared;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_tasks; ++i) {
            attempts.run([&] {
                mine.place(static_cast<char*>(scratch(Slot::kTile, bytes)), plan.longest());
                mine.run(plan.tasks()[i]);
            });
        }
    }
    attempts.finish();
}

}  // namespace mint
