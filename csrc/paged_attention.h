// Attention of single rows over a paged cache (decode), with the bits of the training kernel (attention.h): the same
// tiles of keys, counted from the sequence's beginning, and for every sum the same additions in the same order. So a
// row depends neither on its company nor on whether its token was part of a prompt that training saw.
//
// What differs is the layout. A task is some kv heads, each with its group of q heads, in a few neighbouring rows; it
// goes through the keys in order. A tile of K is transposed, so that a vector of scores is W keys of one head; V is
// zipped and is the right operand. Rows whose sequences begin with the same blocks (samples of a prompt, prompts with
// a common prefix) use a tile together. A step is a tile of one row or of rows that share it: all kv heads of the task
// meet it, one after the other, while the next step's cells are fetched.
//     S [rows, heads][keys]  = Q [rows, heads][d]  K^T [d][keys]
//     O [rows, heads][d]    += P [rows, heads][keys]  V [keys][d]
#pragma once
#include <cmath>
#include <type_traits>

#include "attention.h"  // kAttentionKeys, kAttentionPairs
#include "attention_tile.h"
#include "check.h"
#include "parallel.h"
#include "scratch.h"

namespace mint {

constexpr int64_t kPagedRows = 16;                  // of a task at most: their sums stay in L2
constexpr int64_t kStepBytes = int64_t(400) << 10;  // of K and V at most: this step's and the next one's are in L2

// Task t has the rows from begins[t] to begins[t + 1]; a thread claims `heads` kv heads of one at a time. (No
// std::vector: what the linker keeps of its code may be the copy of a unit for a newer CPU.)
struct PagedTasks {
    const int64_t* begins;
    int64_t count, heads;
};

template <class S, class T>
struct PagedAttention {
    static constexpr bool kPairs = kAttentionPairs<S, T>;
    using X = Tile<S, kPairs>;
    using F = typename S::F;
    static constexpr int64_t kKeys = kAttentionKeys, kLd = kAttentionKeys / X::per_word;
    static constexpr bool kInPlace = kPairs || sizeof(T) == 4;  // a row of the pool is a row of words

    const T *q, *k_pool, *v_pool;
    int64_t q_stride, k_block_stride, k_stride, v_block_stride, v_stride;
    const int32_t* table;
    int64_t table_stride;
    const int32_t* lengths;
    int64_t rows, block, n_q, n_kv, d;
    float scale;

    // Scratch of one thread. What a kv head keeps from step to step is there for each of a task.
    Word *query, *key_rows, *keys, *value_rows, *zip, *weights;
    float *scores, *output, *apart, *top, *sum, *shrink, *added;
    int64_t most;  // rows of a kv head's query, output, top and sum

    size_t place(char* base, int64_t kv_heads) {
        const int64_t w = X::row_words(d);
        most = X::round_up(kPagedRows * (n_q / n_kv), X::kRowUnit) + X::kRowUnit;
        Bump b{base, 0};
        query = take<Word>(b, kv_heads * most * w);
        key_rows = take<Word>(b, kKeys * w);
        keys = take<Word>(b, kKeys * w);
        value_rows = take<Word>(b, kKeys * w);
        zip = take<Word>(b, kLd * X::pad(d));
        weights = take<Word>(b, most * kLd);
        scores = take<float>(b, most * kKeys);
        output = take<float>(b, kv_heads * most * X::pad(d));
        apart = take<float>(b, most * X::pad(d));
        top = take<float>(b, kv_heads * most + S::W);
        sum = take<float>(b, kv_heads * most);
        shrink = take<float>(b, most + S::W);
        added = take<float>(b, most);
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

    // Whether rows a and b have the tile of keys from j0 on in common, all of it.
    bool share(int64_t a, int64_t b, int64_t j0) const {
        const int64_t end = j0 + kKeys;
        if (lengths[a] < end || lengths[b] < end) return false;
        const int64_t from = j0 / block, blocks = ceil_div(end, block) - from;
        return std::memcmp(table + a * table_stride + from, table + b * table_stride + from, size_t(blocks) * 4) == 0;
    }

    // In the calling thread's scratch, until it asks again.
    PagedTasks tasks(int64_t threads) const {
        const int64_t most = max64(1, min64(kPagedRows, rows * n_kv / (2 * threads)));
        auto* begins = static_cast<int64_t*>(scratch(Slot::kTasks, size_t(rows + 1) * sizeof(int64_t)));
        int64_t count = 0;
        for (int64_t m = 0; m < rows; ++m)
            if (m == 0 || m - begins[count - 1] == most || !share(m - 1, m, 0)) begins[count++] = m;
        begins[count] = rows;
        if (count < 4 * threads) return {begins, count, 1};
        // A cell holds all heads: where there are tasks enough, one thread reads as much of it as its L2 has room for.
        int64_t heads = n_kv;
        while (heads > 1 && (n_kv % heads != 0 || 2 * kKeys * heads * d * int64_t(sizeof(T)) > kStepBytes)) --heads;
        return {begins, count, heads};
    }

    // Cells that will be read, asked for some lines at a time, into L2: they lie wherever there was room, and weights
    // have swept the caches since they were last read.
    class Ahead {
      public:
        Ahead() = default;  // nothing

        // Keys and values from j0 on of a row's tile, of some heads, in about `calls` calls of some().
        Ahead(const PagedAttention& all, int64_t row, int64_t kv_head, int64_t heads, int64_t j0, int64_t calls)
            : all_(&all), row_(row), at_(kv_head * all.d), token_(j0), end_(min64(j0 + kKeys, all.lengths[row])) {
            const int64_t width = heads * all.d;
            neighbours_ = width == all.k_stride && width == all.v_stride;
            bytes_ = width * int64_t(sizeof(T));
            share_ = ceil_div((end_ - j0) * (bytes_ / 64 + (neighbours_ ? 0 : 1)), max64(calls, 1));
            begin_piece();
        }

        __attribute__((always_inline)) void some() {
            for (int64_t n = share_; n > 0 && left_ > 0; --n) {
                __builtin_prefetch(key_, 0, 2), __builtin_prefetch(value_, 0, 2);
                key_ += 64, value_ += 64, left_ -= 64;
                if (left_ <= 0) begin_piece();
            }
        }

      private:
        // What lies in one piece: a block's cells, where all of a cell is wanted; else one.
        void begin_piece() {
            if (token_ >= end_) return;
            key_ = reinterpret_cast<const char*>(
                all_->cell(all_->k_pool, all_->k_block_stride, all_->k_stride, row_, token_) + at_);
            value_ = reinterpret_cast<const char*>(
                all_->cell(all_->v_pool, all_->v_block_stride, all_->v_stride, row_, token_) + at_);
            const int64_t cells = neighbours_ ? min64(all_->block - token_ % all_->block, end_ - token_) : 1;
            left_ = cells * bytes_, token_ += cells;
        }

        const PagedAttention* all_ = nullptr;
        int64_t row_ = 0, at_ = 0, token_ = 0, end_ = 0, bytes_ = 0, share_ = 0, left_ = 0;
        const char *key_ = nullptr, *value_ = nullptr;
        bool neighbours_ = false;
    };

    // Keys [j0, j0 + n) of a row, transposed.
    void load_keys(int64_t row, int64_t kv_head, int64_t j0, int64_t n, Ahead& ahead) {
        const int64_t w = X::row_words(d);
        const bool whole = kInPlace && w == X::words(d) && w * X::per_word == d;
        for (int64_t j = 0; j < n; j += S::W) {
            ahead.some();
            if (whole && (j0 + j) % block + S::W <= block) {  // in one block; what lies behind the n keys is masked
                const T* from = cell(k_pool, k_block_stride, k_stride, row, j0 + j) + kv_head * d;
                for (int64_t c = 0; c < w; c += S::W)
                    S::transpose(from + c * X::per_word, k_stride * int64_t(sizeof(T)), keys + c * kKeys + j, kKeys);
                continue;
            }
            const int64_t here = min64(S::W, n - j);
            for (int64_t i = 0; i < here; ++i)
                X::copy_row(cell(k_pool, k_block_stride, k_stride, row, j0 + j + i) + kv_head * d, d, key_rows + i * w);
            std::memset(key_rows + here * w, 0, size_t(S::W - here) * w * sizeof(Word));
            X::transpose(key_rows, w, S::W, w, keys + j, kKeys);
        }
    }

    // Values [j0, j0 + n) of a row, zipped.
    const Word* load_values(int64_t row, int64_t kv_head, int64_t j0, int64_t n, Ahead& ahead) {
        const int64_t w = X::row_words(d);
        const auto value = [&](int64_t j) { return cell(v_pool, v_block_stride, v_stride, row, j0 + j) + kv_head * d; };
        const int64_t last = X::depth(n) * X::per_word;
        if constexpr (kPairs) {
            const int64_t width = d;  // not read again after every store
            if (width % S::W == 0) {
                T* zeros = reinterpret_cast<T*>(value_rows);
                if (n < last) std::memset(zeros, 0, size_t(width) * sizeof(T));
                Word* to = zip;
                for (int64_t j = 0; j < last; j += 2, to += width) {
                    ahead.some();
                    const T *even = j < n ? value(j) : zeros, *odd = j + 1 < n ? value(j + 1) : zeros;
                    for (int64_t c = 0; c < width; c += S::W) S::interleave(even + c, odd + c, to + c);
                }
                return zip;
            }
        }
        for (int64_t j = 0; j < n; ++j) {
            if (j % 2 == 0) ahead.some();
            X::copy_row(value(j), d, value_rows + j * w);
        }
        X::clear_rows(value_rows, n, last, w);
        return X::zipped(value_rows, last, d, zip);
    }

    // output (+)= weights values, for the heads [begin, begin + count) of those kept. Tiles compute whole ones: where
    // rows of others follow, the sums are made apart.
    void accumulate(const Word* values, int64_t begin, int64_t count, int64_t n, bool first, bool others_follow) {
        const int64_t ldo = X::pad(d);
        float* sums = output + begin * ldo;
        const bool move = others_follow && count % X::kRowUnit != 0;
        float* to = move ? apart : sums;
        if (move && !first) std::memcpy(to, sums, size_t(count * ldo) * sizeof(float));
        X::gemm(weights, kLd, values, ldo, to, ldo, count, ldo, X::depth(n), !first);
        if (move) std::memcpy(sums, to, size_t(count * ldo) * sizeof(float));
    }

    // Weights exp(s - max) of n keys, in place and rounded as the second product takes them. h: a row's head, of all
    // that share the tile; its maximum is `most`.
    void weigh(int64_t h, int64_t n, float most) {
        float* s = scores + h * kKeys;
        const F vscale = S::set1(scale), shift = S::set1(-most);
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
        if constexpr (kPairs)
            for (int64_t j = n; j < X::round_up(n, X::kUnit); ++j) rounded[j] = T{};
    }

    // totals[h] = the sum of the n weights of each of `count` heads. A sum waits for itself: some heads' side by side.
    void add_weights(int64_t count, int64_t n, float* totals) const {
        int64_t h = 0;
        const auto some = [&](auto many) __attribute__((always_inline)) {
            constexpr int H = decltype(many)::value;
            for (; h + H <= count; h += H) {
                const float* s = scores + h * kKeys;
                float total[H] = {};
                for (int64_t j = 0; j + 2 <= n; j += 2)
                    for (int i = 0; i < H; ++i) total[i] += s[i * kKeys + j] + s[i * kKeys + j + 1];
                for (int i = 0; i < H; ++i) totals[h + i] = n % 2 != 0 ? total[i] + s[i * kKeys + n - 1] : total[i];
            }
        };
        some(std::integral_constant<int, 8>());
        some(std::integral_constant<int, 4>());
        some(std::integral_constant<int, 2>());
        some(std::integral_constant<int, 1>());
    }

    // Of the heads [begin, begin + count) of those kept, whose scores of n keys are there.
    void softmax(int64_t begin, int64_t count, int64_t n, bool first, Ahead& ahead) {
        const int64_t ldo = X::pad(d);
        float *highest = top + begin, *total = sum + begin, *less = shrink;
        for (int64_t h = 0; h < count; ++h) {
            float* s = scores + h * kKeys;
            for (int64_t j = n; j < X::pad(n); ++j) s[j] = -INFINITY;
            F most = S::load(s);
            for (int64_t j = S::W; j < n; j += S::W) most = S::max(most, S::load(s + j));
            const float now = S::hmax(most) * scale;
            less[h] = highest[h];
            highest[h] = !first && highest[h] > now ? highest[h] : now;
        }
        if (!first)
            for (int64_t h = 0; h < count; h += S::W)
                S::store(less + h, S::exp_fast(S::sub(S::load(less + h), S::load(highest + h))));
        for (int64_t h = 0; h < count; ++h) {
            ahead.some();
            weigh(h, n, highest[h]);
        }
        if (first) return add_weights(count, n, total);
        add_weights(count, n, added);
        for (int64_t h = 0; h < count; ++h) {
            const float earlier = total[h] * less[h];  // rounded on its own
            total[h] = earlier + added[h];
            for (int64_t i = 0; i < ldo; i += S::W) {
                float* o = output + (begin + h) * ldo + i;
                S::store(o, S::mul(S::load(o), S::set1(less[h])));
            }
        }
    }

    // Rows [begin, end) and keys from j0 on.
    struct Step {
        int64_t begin, end, j0;
    };

    // The first step of rows [begin, end) at tile j0 or later, of its rows from m on; its begin is `end`: there is
    // none.
    Step step(int64_t begin, int64_t end, int64_t m, int64_t j0, int64_t longest) const {
        for (; j0 < longest; m = begin, j0 += kKeys) {
            while (m < end && lengths[m] <= j0) ++m;
            if (m == end) continue;
            int64_t next = m + 1;
            while (next < end && share(m, next, j0)) ++next;
            return {m, next, j0};
        }
        return {end, end, j0};
    }

    // A task's rows [begin, end) and kv heads [first, first + kv_heads). Then comes one that begins with row next_row
    // and head next_head, if that is a row.
    void run(int64_t begin, int64_t end, int64_t first, int64_t kv_heads, T* out, int64_t out_stride, int64_t next_row,
             int64_t next_head) {
        const int64_t w = X::row_words(d), g = n_q / n_kv, ldo = X::pad(d), heads = (end - begin) * g;
        int64_t longest = 0;
        for (int64_t m = begin; m < end; ++m) longest = max64(longest, lengths[m]);
        for (int64_t v = 0; v < kv_heads; ++v) {
            for (int64_t m = begin; m < end; ++m)
                for (int64_t h = 0; h < g; ++h)
                    X::copy_row(q + m * q_stride + ((first + v) * g + h) * d, d,
                                query + (v * most + (m - begin) * g + h) * w);
        }
        for (int64_t h = 0; h < kv_heads * most + S::W; ++h) top[h] = 0.0f;
        for (int64_t h = 0; h < most + S::W; ++h) shrink[h] = 0.0f;
        Step next = step(begin, end, begin, 0, longest);
        for (Step now = next; now.begin < end; now = next) {
            next = step(begin, end, now.end, now.j0, longest);
            const int64_t n = min64(kKeys, lengths[now.begin] - now.j0), count = (now.end - now.begin) * g;
            const int64_t calls = kv_heads * (ceil_div(n, S::W) + ceil_div(n, 2) + count);
            Ahead ahead;
            if (next.begin < end) {
                ahead = Ahead(*this, next.begin, first, kv_heads, next.j0, calls);
            } else if (next_row < rows) {
                ahead = Ahead(*this, next_row, next_head, kv_heads, 0, calls);
            }
            for (int64_t v = 0; v < kv_heads; ++v) {
                const int64_t kept = v * most + (now.begin - begin) * g;
                load_keys(now.begin, first + v, now.j0, n, ahead);
                const Word* values = load_values(now.begin, first + v, now.j0, n, ahead);
                X::gemm(query + kept * w, w, keys, kKeys, scores, kKeys, count, X::pad(n), X::depth(d), false);
                softmax(kept, count, n, now.j0 == 0, ahead);
                accumulate(values, kept, count, n, now.j0 == 0, now.end < end);
            }
        }
        for (int64_t v = 0; v < kv_heads; ++v)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t m = begin + h / g;
                T* to = out + m * out_stride + ((first + v) * g + h % g) * d;
                if (lengths[m] == 0) {
                    std::memset(to, 0, size_t(d) * sizeof(T));
                    continue;
                }
                const F inverse = S::div(S::set1(1.0f), S::set1(sum[v * most + h]));
                float* o = output + (v * most + h) * ldo;
                for (int64_t i = 0; i < ldo; i += S::W) S::store(o + i, S::mul(S::load(o + i), inverse));
                X::write_row(o, d, to);
            }
    }
};

// The cells that this thread will need first, to be asked for in about `calls` calls.
template <class S, class T>
typename PagedAttention<S, T>::Ahead paged_attention_first(const PagedAttention<S, T>& attention, PagedTasks tasks,
                                                           int64_t calls) {
    const int64_t t = omp_get_thread_num(), pieces = attention.n_kv / tasks.heads;
    if (t >= tasks.count * pieces) return {};
    return {attention, tasks.begins[t / pieces], t % pieces * tasks.heads, tasks.heads, 0, calls};
}

// A thread's share of all rows, in these tasks; the caller holds the tile registers. `claimed` starts at 0 and is the
// team's, as `attempts` is; out is complete when all have come back.
template <class S, class T>
void paged_attention_share(PagedAttention<S, T> mine, PagedTasks tasks, std::atomic<int64_t>& claimed,
                           Attempts& attempts, T* out, int64_t out_stride) {
    const int64_t heads = tasks.heads, pieces = mine.n_kv / heads;
    const size_t bytes = mine.place(nullptr, heads);
    for_claimed(tasks.count * pieces, claimed, attempts, [&](int64_t t, int64_t next) {
        mine.place(static_cast<char*>(scratch(Slot::kTile, bytes)), heads);
        const int64_t begin = tasks.begins[t / pieces], end = tasks.begins[t / pieces + 1];
        mine.run(begin, end, t % pieces * heads, heads, out, out_stride,
                 tasks.begins[min64(next / pieces, tasks.count)], next % pieces * heads);
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
    const PagedTasks tasks = shared.tasks(omp_get_max_threads());
    int64_t tokens = 0;
    for (int64_t m = 0; m < rows; ++m) tokens += lengths[m];
    std::atomic<int64_t> claimed{0};
    Attempts attempts;
#pragma omp parallel if (rows * n_kv > 1 && tokens * n_q * d > kSerialWork)
    {
        const typename S::Tiles registers;
        paged_attention_share(shared, tasks, claimed, attempts, out, out_stride);
    }
    attempts.finish();
}

}  // namespace mint
