// Attention of single rows over a paged cache (decode), with the bits of the training kernel (attention.h): the same
// tiles of keys, counted from the sequence's beginning, and for every sum the same additions in the same order. So a
// row depends neither on its company nor on whether its token was part of a prompt that training saw.
//
// What differs is the layout. A task is the heads of one kv head's group in one row; it goes through the keys in
// order. A tile of K is transposed, so that a vector of scores is W keys of one head; V is zipped and is the right
// operand.
//     S [heads][keys]  = Q [heads][d]  K^T [d][keys]
//     O [heads][d]    += P [heads][keys]  V [keys][d]
#pragma once
#include <cmath>

#include "attention.h"  // kAttentionKeys, kAttentionPairs
#include "attention_tile.h"
#include "check.h"
#include "parallel.h"
#include "scratch.h"

namespace mint {

template <class S, class T>
struct PagedAttention {
    static constexpr bool kPairs = kAttentionPairs<S, T>;
    using X = Tile<S, kPairs>;
    using F = typename S::F;
    static constexpr int64_t kKeys = kAttentionKeys, kLd = kAttentionKeys / X::per_word;

    const T *q, *k_pool, *v_pool;
    int64_t q_stride, k_block_stride, k_stride, v_block_stride, v_stride;
    const int32_t* table;
    int64_t table_stride;
    const int32_t* lengths;
    int64_t rows, block, n_q, n_kv, d;
    float scale;

    // Scratch of one thread.
    Word *query, *key_rows, *keys, *value_rows, *zip, *weights;
    float *scores, *output, *top, *sum, *shrink;

    size_t place(char* base) {
        const int64_t w = X::row_words(d), g = n_q / n_kv;
        Bump b{base, 0};
        query = take<Word>(b, X::round_up(g, X::kRowUnit) * w);
        key_rows = take<Word>(b, kKeys * w);
        keys = take<Word>(b, kKeys * w);
        value_rows = take<Word>(b, kKeys * w);
        zip = take<Word>(b, kLd * X::pad(d));
        weights = take<Word>(b, X::round_up(g, X::kRowUnit) * kLd);
        scores = take<float>(b, X::round_up(g, X::kRowUnit) * kKeys);
        output = take<float>(b, X::round_up(g, X::kRowUnit) * X::pad(d));
        top = take<float>(b, X::pad(g));
        sum = take<float>(b, X::pad(g));
        shrink = take<float>(b, X::pad(g));
        return b.used;
    }

    void validate(int64_t n_blocks, int64_t max_blocks) const {
        const char* op = "paged_attention";
        check::multiple(op, "n_q", n_q, n_kv);
        for (int64_t m = 0; m < rows; ++m) {
            const int64_t length = lengths[m], used = ceil_div(length, block);
            check::at_least(op, "lengths", length, 0);
            check::at_least(op, "block_table width", max_blocks, used);
            for (int64_t b = 0; b < used; ++b) {
                const int64_t cell = table[m * table_stride + b];
                if (cell < 0) check::at_least(op, "block_table", cell, 0);
                if (cell >= n_blocks) check::at_least(op, "blocks in the pool", n_blocks, cell + 1);
            }
        }
    }

    const T* cell(const T* pool, int64_t block_stride, int64_t stride, int64_t row, int64_t token) const {
        const uint32_t at = uint32_t(token), size = uint32_t(block);  // 32-bit division: several times faster
        return pool + table[row * table_stride + at / size] * block_stride + at % size * stride;
    }

    // A tile's keys, transposed, and its values, zipped; returns these.
    const Word* load_tile(int64_t row, int64_t kv_head, int64_t j0, int64_t n) {
        const int64_t w = X::row_words(d);
        for (int64_t j = 0; j < n; ++j) {
            const T* value = cell(v_pool, v_block_stride, v_stride, row, j0 + j) + kv_head * d;
            for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(value + i);
            X::copy_row(cell(k_pool, k_block_stride, k_stride, row, j0 + j) + kv_head * d, d, key_rows + j * w);
        }
        std::memset(key_rows + n * w, 0, size_t(X::pad(n) - n) * w * sizeof(Word));
        X::transpose(key_rows, w, X::pad(n), w, keys, kKeys);
        for (int64_t j = 0; j < n; ++j)
            X::copy_row(cell(v_pool, v_block_stride, v_stride, row, j0 + j) + kv_head * d, d, value_rows + j * w);
        const int64_t last = X::depth(n) * X::per_word;
        X::clear_rows(value_rows, n, last, w);
        return X::zipped(value_rows, last, d, zip);
    }

    // Head h's weights exp(s - max) of n keys, rounded as the second product takes them, and their sum.
    float weigh(int64_t h, int64_t n) {
        float* s = scores + h * kKeys;
        const F vscale = S::set1(scale), shift = S::set1(-top[h]);
        T* rounded = reinterpret_cast<T*>(weights + h * kLd);
        for (int64_t j = 0; j < n; j += S::W) {
            const F e = S::exp_fast(S::fma(S::load(s + j), vscale, shift));
            S::store(s + j, e);
            if constexpr (kPairs) {
                S::store(rounded + j, e);
            } else {
                S::store(reinterpret_cast<float*>(weights + h * kLd) + j, e);
            }
        }
        float total = 0.0f;
        for (int64_t j = 0; j + 2 <= n; j += 2) total += s[j] + s[j + 1];
        if (n % 2 != 0) total += s[n - 1];
        if constexpr (kPairs)
            for (int64_t j = n; j < X::round_up(n, X::kUnit); ++j) rounded[j] = T{};
        return total;
    }

    void softmax(int64_t n, bool first) {
        const int64_t g = n_q / n_kv, ldo = X::pad(d);
        for (int64_t h = 0; h < g; ++h) {
            float* s = scores + h * kKeys;
            for (int64_t j = n; j < X::pad(n); ++j) s[j] = -INFINITY;
            F most = S::load(s);
            for (int64_t j = S::W; j < n; j += S::W) most = S::max(most, S::load(s + j));
            const float now = S::hmax(most) * scale;
            shrink[h] = top[h];
            top[h] = !first && top[h] > now ? top[h] : now;
        }
        if (!first)
            for (int64_t h = 0; h < g; h += S::W)
                S::store(shrink + h, S::exp_fast(S::sub(S::load(shrink + h), S::load(top + h))));
        for (int64_t h = 0; h < g; ++h) {
            const float total = weigh(h, n);
            if (first) {
                sum[h] = total;
                continue;
            }
            const float earlier = sum[h] * shrink[h];  // rounded on its own
            sum[h] = earlier + total;
            for (int64_t i = 0; i < ldo; i += S::W) {
                float* o = output + h * ldo + i;
                S::store(o, S::mul(S::load(o), S::set1(shrink[h])));
            }
        }
    }

    void run(int64_t row, int64_t kv_head, T* out) {
        const int64_t w = X::row_words(d), g = n_q / n_kv, ldo = X::pad(d), length = lengths[row];
        if (length == 0) {
            std::memset(out, 0, size_t(g * d) * sizeof(T));
            return;
        }
        for (int64_t h = 0; h < g; ++h) X::copy_row(q + row * q_stride + (kv_head * g + h) * d, d, query + h * w);
        for (int64_t h = 0; h < X::pad(g); ++h) top[h] = shrink[h] = 0.0f;
        for (int64_t j0 = 0; j0 < length; j0 += kKeys) {
            const int64_t n = min64(kKeys, length - j0);
            const Word* values = load_tile(row, kv_head, j0, n);
            X::gemm(query, w, keys, kKeys, scores, kKeys, g, X::pad(n), X::depth(d), false);
            softmax(n, j0 == 0);
            X::gemm(weights, kLd, values, ldo, output, ldo, g, ldo, X::depth(n), j0 > 0);
        }
        for (int64_t h = 0; h < g; ++h) {
            const F inverse = S::div(S::set1(1.0f), S::set1(sum[h]));
            float* o = output + h * ldo;
            for (int64_t i = 0; i < ldo; i += S::W) S::store(o + i, S::mul(S::load(o + i), inverse));
            X::write_row(o, d, out + h * d);
        }
    }
};

// A thread's share of all rows; the caller holds the tile registers. `claimed` starts at 0 and is the team's; out is
// complete when all have come back.
template <class S, class T>
void paged_attention_share(PagedAttention<S, T> mine, std::atomic<int64_t>& claimed, T* out, int64_t out_stride) {
    mine.place(static_cast<char*>(scratch(Slot::kTile, mine.place(nullptr))));
    const int64_t group = mine.n_q / mine.n_kv * mine.d;
    for_claimed(mine.rows * mine.n_kv, claimed, [&](int64_t t, int64_t) {
        mine.run(t / mine.n_kv, t % mine.n_kv, out + t / mine.n_kv * out_stride + t % mine.n_kv * group);
    });
}

// out [rows, n_q d]. Strides in elements; a pool cell is [n_kv d] contiguous elements.
template <class S, class T>
void paged_attention(const T* q, int64_t q_stride, const T* k_pool, int64_t k_block_stride, int64_t k_stride,
                     const T* v_pool, int64_t v_block_stride, int64_t v_stride, const int32_t* table,
                     int64_t table_stride, const int32_t* lengths, T* out, int64_t out_stride, int64_t rows,
                     int64_t n_blocks, int64_t block, int64_t max_blocks, int64_t n_q, int64_t n_kv, int64_t d,
                     float scale) {
    check::row_stride("paged_attention", "out", out_stride, rows, n_q * d);
    PagedAttention<S, T> shared{};
    shared.q = q, shared.k_pool = k_pool, shared.v_pool = v_pool, shared.q_stride = q_stride;
    shared.k_block_stride = k_block_stride, shared.k_stride = k_stride;
    shared.v_block_stride = v_block_stride, shared.v_stride = v_stride;
    shared.table = table, shared.table_stride = table_stride, shared.lengths = lengths;
    shared.rows = rows, shared.block = block, shared.n_q = n_q, shared.n_kv = n_kv, shared.d = d, shared.scale = scale;
    shared.validate(n_blocks, max_blocks);
    int64_t tokens = 0;
    for (int64_t m = 0; m < rows; ++m) tokens += lengths[m];
    std::atomic<int64_t> claimed{0};
#pragma omp parallel if (rows * n_kv > 1 && tokens * n_q * d > kSerialWork)
    {
        const typename S::Tiles registers;
        paged_attention_share(shared, claimed, out, out_stride);
    }
}

}  // namespace mint
