// Attention of single rows over a paged cache (decode). Bound by the memory traffic of K and V, so the loops follow
// memory: a task takes one row's next kPagedChunk keys for all heads and reads each token's K, all kv heads of it, in
// the order it lies, while it prefetches the same token's V. Chunks depend on the length alone, and a row's partial
// results (maximum, sum, unnormalised output per head) meet in chunk order: the number of threads changes nothing.
// A tile of K is transposed, so that a vector of scores is W keys of one head and no dot product reduces across lanes;
// V is used as it lies, widened to fp32 once for up to four heads of a group, with weights in fp32.
#pragma once
#include <cmath>
#include <type_traits>

#include "attention_tile.h"
#include "check.h"
#include "parallel.h"
#include "scratch.h"

namespace mint {

constexpr int64_t kPagedChunk = 256;  // keys of a task
constexpr int64_t kPagedTile = 64;    // keys whose scores are held at once

struct PagedTask {
    int64_t row, key0;
};

template <class S, class T>
struct PagedAttention {
    static constexpr bool kPairs = S::kBf16Dot && sizeof(T) == 2;
    using X = Tile<S, kPairs>;
    using F = typename S::F;

    const T *q, *k_pool, *v_pool;
    int64_t q_stride, k_block_stride, k_stride, v_block_stride, v_stride;
    const int32_t* table;
    int64_t table_stride;
    const int32_t* lengths;
    int64_t block, n_q, n_kv, d;
    float scale;

    Word* query;     // [n_q][row_words(d)]
    Word* key_rows;  // [n_kv][kPagedTile][row_words(d)]
    Word* keys;      // [row_words(d)][kPagedTile]
    float* scores;   // [n_q][kPagedTile]

    size_t place(char* base) {
        Bump b{base, 0};
        query = take<Word>(b, n_q * X::row_words(d));
        key_rows = take<Word>(b, n_kv * kPagedTile * X::row_words(d));
        keys = take<Word>(b, kPagedTile * X::row_words(d));
        scores = take<float>(b, n_q * kPagedTile);
        return b.used;
    }

    int64_t partial_size() const { return n_q * (X::pad(d) + 2); }  // output, then maximum, then sum of every head

    // output[head][Nv vectors] of Heads heads += weights[head][j] values[j].
    template <int Heads, int Nv>
    MINT_INLINE void add_values(const float* weights, const T* const* values, int64_t n, int64_t offset, int lanes,
                                float* output, int64_t ldo) {
        F acc[Heads][Nv];
#pragma GCC unroll 4
        for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
            for (int v = 0; v < Nv; ++v) acc[h][v] = S::load(output + h * ldo + v * S::W);
        for (int64_t j = 0; j < n; ++j) {
            F value[Nv];
#pragma GCC unroll 4
            for (int v = 0; v < Nv; ++v) {
                const T* p = values[j] + offset + v * S::W;
                value[v] = lanes == Nv * S::W ? S::load(p) : S::load_n(p, lanes - v * S::W);
            }
#pragma GCC unroll 4
            for (int h = 0; h < Heads; ++h) {
                const F weight = S::set1(weights[h * kPagedTile + j]);
#pragma GCC unroll 4
                for (int v = 0; v < Nv; ++v) acc[h][v] = S::fma(weight, value[v], acc[h][v]);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
            for (int v = 0; v < Nv; ++v) S::store(output + h * ldo + v * S::W, acc[h][v]);
    }

    template <int Heads>
    MINT_INLINE void add_heads(const float* weights, const T* const* values, int64_t n, int64_t offset, int64_t d,
                               float* output, int64_t ldo) {
        constexpr int64_t wide = 4 * S::W;
        int64_t i = 0;
        for (; i + wide <= d; i += wide)
            add_values<Heads, 4>(weights, values, n, offset + i, int(wide), output + i, ldo);
        for (; i < d; i += S::W)
            add_values<Heads, 1>(weights, values, n, offset + i, int(min64(S::W, d - i)), output + i, ldo);
    }

    // Weights exp(s - max) in place of the scores of one head; returns by how much earlier output shrinks.
    float softmax(float* s, int64_t n, float* top, float* sum) {
        const F vscale = S::set1(scale);
        F most = S::set1(*top);
        for (int64_t j = n; j < X::pad(n); ++j) s[j] = -INFINITY;
        for (int64_t j = 0; j < n; j += S::W) most = S::max(most, S::mul(S::load(s + j), vscale));
        const float now = S::hmax(most), shift = -now;
        F total = S::zero();
        for (int64_t j = 0; j < n; j += S::W) {
            const F e = S::exp(S::fma(S::load(s + j), vscale, S::set1(shift)));
            total = S::add(total, e);
            S::store(s + j, e);
        }
        const float shrink = *top == -INFINITY ? 0.0f : std::exp(*top - now);
        *sum = *sum * shrink + S::sum(total);
        *top = now;
        return shrink;
    }

    const T* cell(const T* pool, int64_t block_stride, int64_t stride, int64_t row, int64_t token) const {
        const uint32_t at = uint32_t(token), size = uint32_t(block);  // 32-bit division: several times faster
        return pool + table[row * table_stride + at / size] * block_stride + at % size * stride;
    }

    void prefetch(const T* p) const {
        for (int64_t i = 0; i < n_kv * d; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
    }

    void run(const PagedTask& t, float* partial) {
        const int64_t w = X::row_words(d), g = n_q / n_kv, ldo = X::pad(d);
        const int64_t end = min64(t.key0 + kPagedChunk, lengths[t.row]);
        float *top = partial + n_q * ldo, *sum = top + n_q;
        for (int64_t h = 0; h < n_q; ++h) {
            X::copy_row(q + t.row * q_stride + h * d, d, query + h * w);
            top[h] = -INFINITY, sum[h] = 0.0f;
        }
        std::memset(partial, 0, size_t(n_q * ldo) * sizeof(float));
        for (int64_t j0 = t.key0; j0 < end; j0 += kPagedTile) {
            const int64_t n = min64(kPagedTile, end - j0);
            const T* values[kPagedTile];
            for (int64_t j = 0; j < n; ++j) {
                const T* key = cell(k_pool, k_block_stride, k_stride, t.row, j0 + j);
                values[j] = cell(v_pool, v_block_stride, v_stride, t.row, j0 + j);
                prefetch(values[j]);
                for (int64_t h = 0; h < n_kv; ++h) X::copy_row(key + h * d, d, key_rows + (h * kPagedTile + j) * w);
            }
            for (int64_t h = 0; h < n_kv; ++h) {
                Word* rows = key_rows + h * kPagedTile * w;
                std::memset(rows + n * w, 0, size_t(X::pad(n) - n) * w * sizeof(Word));
                X::transpose(rows, w, X::pad(n), w, keys, kPagedTile);
                X::gemm(query + h * g * w, w, keys, kPagedTile, scores + h * g * kPagedTile, kPagedTile, g, X::pad(n),
                        X::words(d), false);
            }
            for (int64_t h = 0; h < n_q; ++h) {
                const F shrink = S::set1(softmax(scores + h * kPagedTile, n, top + h, sum + h));
                if (j0 == t.key0) continue;  // the output is still zero
                float* o = partial + h * ldo;
                for (int64_t i = 0; i < ldo; i += S::W) S::store(o + i, S::mul(S::load(o + i), shrink));
            }
            for (int64_t h = 0; h < n_kv; ++h) {
                int64_t i = h * g;
                const int64_t last = i + g;
                const auto add = [&](auto heads) __attribute__((always_inline)) {
                    constexpr int kHeads = decltype(heads)::value;
                    add_heads<kHeads>(scores + i * kPagedTile, values, n, h * d, d, partial + i * ldo, ldo);
                    i += kHeads;
                };
                while (last - i >= 4) add(std::integral_constant<int, 4>{});
                if (last - i == 3) add(std::integral_constant<int, 3>{});
                if (last - i == 2) add(std::integral_constant<int, 2>{});
                if (last - i == 1) add(std::integral_constant<int, 1>{});
            }
        }
    }

    // One row's output from its n partial results, which it overwrites. No partial: zeros.
    void finish(float* partials, int64_t n, T* out) {
        const int64_t ldo = X::pad(d);
        for (int64_t h = 0; h < n_q; ++h) {
            float most = -INFINITY, sum = 0.0f;
            float* o = n > 0 ? partials + h * ldo : scores;
            if (n == 0) std::memset(out + h * d, 0, size_t(d) * sizeof(T));
            for (int64_t c = 0; c < n; ++c) {
                const float top = partials[c * partial_size() + n_q * ldo + h];
                most = top > most || top != top ? top : most;
            }
            for (int64_t c = 0; c < n; ++c) {
                const float* piece = partials + c * partial_size();
                const float factor = std::exp(piece[n_q * ldo + h] - most);
                sum += factor * piece[n_q * ldo + n_q + h];
                for (int64_t i = 0; i < ldo; i += S::W) {
                    const F term = S::mul(S::load(piece + h * ldo + i), S::set1(factor));
                    S::store(o + i, c == 0 ? term : S::add(S::load(o + i), term));
                }
            }
            if (n == 0) continue;
            for (int64_t i = 0; i < ldo; i += S::W) S::store(o + i, S::div(S::load(o + i), S::set1(sum)));
            X::write_row(o, d, out + h * d);
        }
    }
};

// out [rows, n_q d]. Strides in elements; a pool cell is [n_kv d] contiguous elements.
template <class S, class T>
void paged_attention(const T* q, int64_t q_stride, const T* k_pool, int64_t k_block_stride, int64_t k_stride,
                     const T* v_pool, int64_t v_block_stride, int64_t v_stride, const int32_t* table,
                     int64_t table_stride, const int32_t* lengths, T* out, int64_t out_stride, int64_t rows,
                     int64_t n_blocks, int64_t block, int64_t max_blocks, int64_t n_q, int64_t n_kv, int64_t d,
                     float scale) {
    check::multiple("paged_attention", "n_q", n_q, n_kv);
    check::row_stride("paged_attention", "out", out_stride, rows, n_q * d);
    int64_t n_tasks = 0, tokens = 0;
    for (int64_t m = 0; m < rows; ++m) {
        const int64_t length = lengths[m], used = ceil_div(length, block);
        check::at_least("paged_attention", "lengths", length, 0);
        check::at_least("paged_attention", "block_table width", max_blocks, used);
        for (int64_t b = 0; b < used; ++b) {
            const int64_t cell = table[m * table_stride + b];
            if (cell < 0) check::at_least("paged_attention", "block_table", cell, 0);
            if (cell >= n_blocks) check::at_least("paged_attention", "blocks in the pool", n_blocks, cell + 1);
        }
        n_tasks += ceil_div(length, kPagedChunk);
        tokens += length;
    }
    PagedAttention<S, T> shared{q,        k_pool, v_pool,       q_stride, k_block_stride, k_stride, v_block_stride,
                                v_stride, table,  table_stride, lengths,  block,          n_q,      n_kv,
                                d,        scale,  nullptr,      nullptr,  nullptr,        nullptr};
    const int64_t size = shared.partial_size();
    auto* tasks = static_cast<PagedTask*>(scratch(Slot::kShared, size_t(n_tasks + rows) * sizeof(PagedTask)));
    auto* partials = static_cast<float*>(scratch(Slot::kPartials, size_t(n_tasks * size) * sizeof(float)));
    PagedTask* ends = tasks + n_tasks;  // row m's tasks end before ends[m].key0
    int64_t at = 0;
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t j = 0; j < lengths[m]; j += kPagedChunk) tasks[at++] = {m, j};
        ends[m] = {m, at};
    }
    const size_t bytes = shared.place(nullptr);
#pragma omp parallel if (n_tasks > 1 && tokens * n_q * d > kSerialWork)
    {
        PagedAttention<S, T> mine = shared;
        mine.place(static_cast<char*>(scratch(Slot::kTile, bytes)));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_tasks; ++i) mine.run(tasks[i], partials + i * size);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; ++m) {
            const int64_t begin = m > 0 ? ends[m - 1].key0 : 0;
            mine.finish(partials + begin * size, ends[m].key0 - begin, out + m * out_stride);
        }
    }
}

}  // namespace mint
