// Causal attention over packed sequences, forward: an online softmax over tiles (FlashAttention-2, arXiv:2307.08691).
//
// Everything is kept transposed: scores are S^T [keys][rows], the output O^T [d][rows]. A vector is then 16 rows at one
// key, so maxima, sums and rescaling never reduce across lanes. The rows of a tile are the (query, head) pairs of
// one kv head's group (attention_plan.h), so a short sequence of grouped heads still fills whole vectors.
//     S^T [keys][rows]  = K [keys][d]  Q^T [d][rows]      K as it lies, Q transposed once per row tile
//     O^T [d][rows]    += V^T [d][keys] P^T [keys][rows]  V transposed once per task, P^T zipped as it is made
// Scores, maxima, sums and O^T are fp32; with bf16 pairs P is rounded to bf16 for the second product, as FA-2 does.
#pragma once
#include <cmath>

#include "attention_plan.h"
#include "attention_tile.h"
#include "check.h"
#include "parallel.h"
#include "scratch.h"

namespace mint {

constexpr int64_t kAttentionRows = 64;     // rows (columns of S^T) of a tile
constexpr int64_t kAttentionKeys = 96;     // keys of a tile: whole vectors of zipped words, whole register tiles of 6
constexpr int64_t kAttentionChunk = 1024;  // rows of a task; its keys are packed once more per task (< 1 % of the work)

template <class S, class T>
constexpr bool kAttentionPairs = S::kBf16Dot && sizeof(T) == 2;

struct AttentionShape {
    int64_t tokens, n_kv, group, d;
};

// Walks the rows of a task: which token and which q head a row is.
struct RowCursor {
    int64_t token, head, first_head, end_head;
};
MINT_INLINE RowCursor rows_from(const AttentionTask& t, int64_t row, int64_t group) {
    const int64_t first = t.kv_head * group;
    return {t.token + row / group, first + row % group, first, first + group};
}
MINT_INLINE void next_row(RowCursor& r) {
    if (++r.head == r.end_head) r.head = r.first_head, ++r.token;
}

template <class S>
MINT_INLINE void mask_future(float* scores, int64_t n_keys, int64_t key0, int64_t row0, int64_t group,
                             int64_t columns) {
    for (int64_t j = 0; j < n_keys; ++j) {  // row r sees key j from r = j * group on
        const int64_t hidden = min64((key0 + j) * group - row0, columns);
        for (int64_t c = 0; c < hidden; ++c) scores[j * kAttentionRows + c] = -INFINITY;
    }
}

template <class S, class T>
struct AttentionForward {
    static constexpr bool kPairs = kAttentionPairs<S, T>;
    using X = Tile<S, kPairs>;
    using F = typename S::F;
    static constexpr int64_t kRows = kAttentionRows, kKeys = kAttentionKeys, kLd = kAttentionKeys / X::per_word;

    const T *q, *k, *v;
    T* out;
    float* lse;
    int64_t q_stride, k_stride, v_stride, out_stride;
    AttentionShape shape;
    float scale;

    // Scratch of one thread.
    Word *keys, *values, *value_rows, *zip, *query_rows, *queries, *weights;
    float *scores, *output, *row_max, *row_sum;

    size_t place(char* base, int64_t longest) {
        const int64_t d = shape.d, w = X::row_words(d), tiles = ceil_div(longest, kKeys);
        Bump b{base, 0};
        keys = take<Word>(b, tiles * kKeys * w);
        values = take<Word>(b, tiles * X::pad(d) * kLd);
        value_rows = take<Word>(b, kKeys * w);
        zip = take<Word>(b, kLd * X::pad(d));
        query_rows = take<Word>(b, kRows * max64(w, X::pad(d)));
        queries = take<Word>(b, w * kRows);
        weights = take<Word>(b, kLd * kRows);
        scores = take<float>(b, kKeys * kRows);
        output = take<float>(b, X::pad(d) * kRows);
        row_max = take<float>(b, kRows);
        row_sum = take<float>(b, kRows);
        return b.used;
    }

    void pack_keys(const AttentionTask& t, int64_t n_keys) {
        const int64_t d = shape.d, w = X::row_words(d);
        for (int64_t j = 0; j < n_keys; ++j) X::copy_row(k + (t.key + j) * k_stride + t.kv_head * d, d, keys + j * w);
        for (int64_t j0 = 0; j0 < n_keys; j0 += kKeys) {
            const int64_t n = min64(kKeys, n_keys - j0), depth = X::row_words(n);
            for (int64_t j = 0; j < n; ++j)
                X::copy_row(v + (t.key + j0 + j) * v_stride + t.kv_head * d, d, value_rows + j * w);
            std::memset(value_rows + n * w, 0, size_t(depth * X::per_word - n) * w * sizeof(Word));
            const Word* zipped = X::zipped(value_rows, depth * X::per_word, d, zip);
            X::transpose(zipped, X::pad(d), depth, X::pad(d), values + j0 / kKeys * X::pad(d) * kLd, kLd);
        }
    }

    // One key tile's weights exp(s - max), zipped, and the running maximum and sum; rescales O^T.
    void softmax(int64_t n_keys, int64_t columns, bool first) {
        const F vscale = S::set1(scale);
        for (int64_t c = 0; c < columns; c += S::W) {
            F top = S::load(scores + c);
            for (int64_t j = 1; j < n_keys; ++j) top = S::max(top, S::load(scores + j * kRows + c));
            top = S::mul(top, vscale);
            F sum = S::zero(), earlier = S::zero();  // a tile is summed from zero and added once
            if (!first) {
                const F before = S::load(row_max + c);
                top = S::max(top, before);
                const F shrink = S::exp_fast(S::sub(before, top));
                earlier = S::mul(S::load(row_sum + c), shrink);
                for (int64_t i = 0; i < shape.d; ++i) {
                    float* o = output + i * kRows + c;
                    S::store(o, S::mul(S::load(o), shrink));
                }
            }
            S::store(row_max + c, top);
            const F shift = S::sub(S::zero(), top);
            const auto weight = [&](int64_t j) __attribute__((always_inline)) {
                return S::exp_fast(S::fma(S::load(scores + j * kRows + c), vscale, shift));
            };
            if constexpr (kPairs) {
                int64_t j = 0;
                for (; j + 2 <= n_keys; j += 2) {
                    const F a = weight(j), b = weight(j + 1);
                    sum = S::add(sum, S::add(a, b));
                    X::store_zipped(weights + j / 2 * kRows + c, a, b);
                }
                if (j < n_keys) {
                    const F a = weight(j);
                    sum = S::add(sum, a);
                    X::store_zipped(weights + j / 2 * kRows + c, a, S::zero());
                }
            } else {
                float* to = reinterpret_cast<float*>(weights) + c;
                for (int64_t j = 0; j + 2 <= n_keys; j += 2) {
                    const F a = weight(j), b = weight(j + 1);
                    sum = S::add(sum, S::add(a, b));
                    S::store(to + j * kRows, a);
                    S::store(to + (j + 1) * kRows, b);
                }
                if (n_keys % 2 != 0) {
                    const F a = weight(n_keys - 1);
                    sum = S::add(sum, a);
                    S::store(to + (n_keys - 1) * kRows, a);
                }
            }
            S::store(row_sum + c, S::add(earlier, sum));
        }
    }

    void row_tile(const AttentionTask& t, int64_t row0, int64_t n_rows) {
        const int64_t d = shape.d, g = shape.group, w = X::row_words(d), columns = X::pad(n_rows);
        RowCursor in = rows_from(t, row0, g), to = in;
        for (int64_t c = 0; c < n_rows; ++c, next_row(in))
            X::copy_row(q + in.token * q_stride + in.head * d, d, query_rows + c * w);
        std::memset(query_rows + n_rows * w, 0, size_t(columns - n_rows) * w * sizeof(Word));
        X::transpose(query_rows, w, columns, w, queries, kRows);

        const int64_t n_keys = (row0 + n_rows - 1) / g + 1;
        for (int64_t j0 = 0; j0 < n_keys; j0 += kKeys) {
            const int64_t n = min64(kKeys, n_keys - j0);
            X::gemm(keys + j0 * w, w, queries, kRows, scores, kRows, n, columns, X::depth(d), false);
            if ((j0 + n - 1) * g > row0) mask_future<S>(scores, n, j0, row0, g, columns);
            softmax(n, columns, j0 == 0);
            X::clear_rows(weights, X::words(n), X::depth(n), kRows);
            const Word* v_tile = values + j0 / kKeys * X::pad(d) * kLd;
            X::gemm(v_tile, kLd, weights, kRows, output, kRows, d, columns, X::depth(n), j0 > 0);
        }

        for (int64_t c = 0; c < columns; c += S::W) {
            const F inverse = S::div(S::set1(1.0f), S::load(row_sum + c));
            for (int64_t i = 0; i < d; ++i) {
                float* o = output + i * kRows + c;
                S::store(o, S::mul(S::load(o), inverse));
            }
        }
        X::transpose(reinterpret_cast<const Word*>(output), kRows, X::pad(d), columns, query_rows, X::pad(d));
        for (int64_t c = 0; c < n_rows; ++c, next_row(to)) {
            const float* row = reinterpret_cast<const float*>(query_rows) + c * X::pad(d);
            X::write_row(row, d, out + to.token * out_stride + to.head * d);
            lse[to.head * shape.tokens + to.token] = row_max[c] + std::log(row_sum[c]);
        }
    }

    void run(const AttentionTask& t) {
        pack_keys(t, (t.end - 1) / shape.group + 1);
        for (int64_t r = t.begin; r < t.end; r += kRows) row_tile(t, r, min64(kRows, t.end - r));
    }
};

// out [tokens, n_q d] and lse [n_q, tokens] (contiguous) of q [tokens, ..] and k, v [keys, ..]; the face checks their
// shapes. cu_keys: null where every key has a query.
template <class S, class T>
void attention(const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v, int64_t v_stride, T* out,
               int64_t out_stride, float* lse, const int32_t* cu_seqlens, const int32_t* cu_keys, int64_t n_seqs,
               int64_t tokens, int64_t keys, int64_t n_q, int64_t n_kv, int64_t d, float scale) {
    check::multiple("attention", "head_dim", d, 2);
    check::multiple("attention", "n_q", n_q, n_kv);
    check::row_stride("attention", "out", out_stride, tokens, n_q * d);
    const AttentionShape shape{tokens, n_kv, n_q / n_kv, d};
    const AttentionPlan plan("attention", cu_seqlens, cu_keys, n_seqs, tokens, keys, n_kv, shape.group,
                             kAttentionChunk);
    const int64_t n_tasks = plan.n_tasks();
    AttentionForward<S, T> shared{q,          k,       v,       out,     lse,     q_stride, k_stride, v_stride,
                                  out_stride, shape,   scale,   nullptr, nullptr, nullptr,  nullptr,  nullptr,
                                  nullptr,    nullptr, nullptr, nullptr, nullptr, nullptr};
    const size_t bytes = shared.place(nullptr, plan.longest());
    Attempts attempts;
    // No num_threads: a smaller team would end libgomp's other threads, and their scratch with them.
#pragma omp parallel if (n_tasks > 1)
    {
        const typename S::Tiles registers;
        AttentionForward<S, T> mine = shared;
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
