// One decode step: every row is one token of its own cached sequence, all layers and the head in one call and one
// parallel region, so that between two products lie barriers and not calls from Python.
//
//     h1 = h + x               x1 = norm(h1)   [q k v] = x1 Wqkv   q, k rotated; k, v into the cache
//     delta = attention(q) Wo  h = h1 + delta  x2 = norm(h)        x = (silu(gate) * up) Wd, [gate up] = x2 Wgu
//     at last: logits = norm(h + x) Whead, fp32, of the rows that are asked for
//
// The products are few_rows.h's: gemm's sums. A row meets its own adapter only, as if that sat first in the border: x's
// tail is its S = scale * x A^T, and its weight [W | B] goes on with its B. So a row's bits depend on nobody else, and
// are those that the layer's ops give one by one. `next` of every product is what the thread reads after it.
#pragma once
#include <cstring>

#include "attention_tile.h"  // Bump
#include "check.h"
#include "few_rows.h"
#include "paged_attention.h"
#include "qk_norm_rope.h"
#include "rms_norm.h"
#include "scratch.h"
#include "swiglu.h"

namespace mint {

// A row of the table that Python fills: W [n, k] of m modules and the border's first B column and A row.
template <class T>
struct StepLinear {
    const void* w;
    int64_t stride;
    const float* scales;  // of int8 rows; null: W is T
    const T* bias;
    const T* a;
    int64_t a_stride;
    const T* b;
    int64_t b_stride;
    const uint32_t *words, *second;  // weight_words of the rows, or of either half of them; null: there are none
};

template <class T>
struct StepLayer {
    const T *attention_norm, *mlp_norm, *q_norm, *k_norm;
    StepLinear<T> qkv, o, gate_up, down;
};

template <class T>
struct StepHead {
    const T* norm;
    StepLinear<T> linear;
};

// Who sits in the border: segment s has the rows [0], [1], rank offset [2], rank [3], and trains the groups of the bits
// in [4].
struct StepAdapters {
    const int64_t* segments;
    const float* scales;
    int64_t count;
    const int64_t* words;  // null, or of each segment and linear the addresses of B's words: of W's two parts; 0: none
    int64_t linears;

    // Ranks of border, from its beginning, that some adapter uses for the group.
    int64_t reach(int64_t group) const {
        int64_t most = 0;
        for (int64_t s = 0; s < count; ++s)
            if (segments[s * 5 + 4] & group) most = max64(most, segments[s * 5 + 2] + segments[s * 5 + 3]);
        return most;
    }
    int64_t most_ranks() const {
        int64_t most = 0;
        for (int64_t s = 0; s < count; ++s) most = max64(most, segments[s * 5 + 3]);
        return most;
    }
};

// What the threads of a step share: the next piece of a product or of the attention is claimed.
struct StepTeam {
    Meeting meeting;
    Attempts attempts;
    std::atomic<int64_t> claimed{0};
    PagedTasks tasks;  // rows that attend together
};

template <class S, class T>
struct DecodeStep {
    using X = FewRows<S, T>;
    static constexpr int64_t C = X::C;

    StepTeam* team;
    StepAdapters adapters;
    bool reads_words;
    int64_t rows, hidden, ffn, n_q, n_kv, d;
    float eps;
    const float *cos, *sin;  // of position 0
    int64_t cos_stride, sin_stride;
    const int32_t* lengths;

    int64_t* cells;  // of the pools, where each row's k and v go
    T *x, *h, *x1, *projected, *rotated, *heads, *a;
    int64_t ranks, x1_stride, heads_stride, a_stride, qkv_width, qk_width;

    size_t place(char* base) {
        ranks = adapters.most_ranks();
        qk_width = (n_q + n_kv) * d, qkv_width = qk_width + n_kv * d;
        x1_stride = hidden + 3 * ranks, heads_stride = n_q * d + ranks, a_stride = ffn + ranks;
        Bump b{base, 0};
        cells = take<int64_t>(b, rows);
        x = take<T>(b, rows * hidden);
        h = take<T>(b, rows * hidden);
        x1 = take<T>(b, rows * x1_stride);
        projected = take<T>(b, rows * max64(qkv_width, hidden));
        rotated = take<T>(b, rows * qk_width);
        heads = take<T>(b, rows * heads_stride);
        a = take<T>(b, rows * a_stride);
        return b.used;
    }

    // The rows of k elements of a weight from `from` on; their words, if they are there and may be read.
    WeightRows<T> weight_rows(const StepLinear<T>& w, int64_t k, int64_t from = 0) const {
        const uint32_t* words = from == 0 ? w.words : w.second;
        return {w.w, w.stride, w.scales, reads_words ? words : nullptr, from, word_depth<S, T>(k)};
    }

    // What a thread reads first of a product with n columns: its first panel of A and of W.
    Prefetch begin_of(const StepLinear<T>& w, int64_t group, int64_t m, int64_t n, int64_t k, int64_t calls) const {
        const int64_t j = omp_get_thread_num() * C;
        Prefetch first = j < n ? weight_rows(w, k).ahead(j, min64(C, n - j), k, calls) : Prefetch();
        first.also = factor(group, m, omp_get_thread_num()).lines(w, k, calls);
        return first;
    }

    // How often a product of `w` lets a Prefetch do some of its work, for each panel.
    int64_t calls_of(const StepLinear<T>& w, int64_t count, int64_t k) const {
        return X::prefetch_calls(weight_rows(w, k), count, k);
    }

    // A panel of an adapter's A: `cols` rows of it from row `row` of the border on, for rows of x from `first` on.
    struct Factor {
        int64_t row, cols, first, rows, column;  // column: of S; cols 0: there is none
        float scale;

        Lines lines(const StepLinear<T>& w, int64_t k, int64_t calls) const {
            if (cols == 0) return {};
            constexpr int64_t kSize = sizeof(T);
            return Lines(w.a + row * w.a_stride, cols, w.a_stride * kSize, k * kSize, calls);
        }
    };

    // The panel whose turn is the turn-th among those of the group.
    Factor factor(int64_t group, int64_t m, int64_t turn) const {
        for (int64_t s = 0; s < adapters.count; ++s) {
            const int64_t* segment = adapters.segments + s * 5;
            const int64_t rows = segment[1] - segment[0], width = m * segment[3], panels = ceil_div(width, C);
            if (!(segment[4] & group) || rows == 0) continue;
            const int64_t j = turn * C;
            if (turn < panels)
                return {m * segment[2] + j, min64(C, width - j), segment[0], rows, j, adapters.scales[s]};
            turn -= panels;
        }
        return {};
    }

    // S of every row whose adapter trains the group: into x's tail.
    void shrink(const StepLinear<T>& w, int64_t group, int64_t m, int64_t k, T* in, int64_t stride) {
        if (factor(group, m, 0).cols == 0) return;
        team->attempts.run([&] {
            const WeightRows<T> a{w.a, w.a_stride, nullptr};
            const int64_t threads = omp_get_num_threads();
            for (int64_t turn = omp_get_thread_num();; turn += threads) {
                const Factor f = factor(group, m, turn);
                if (f.cols == 0) break;
                const RowGroup<T> all{0, f.rows, nullptr, 0, 0};
                const X left(a, in + f.first * stride, stride, k, &all, 1, 1);
                Prefetch next;
                next.reads = factor(group, m, turn + threads).lines(w, k, X::prefetch_calls(a, f.rows, k));
                left.multiply(a, f.row, f.cols, left.sums(), &next);
                const auto scale = S::set1(f.scale);
                for (int64_t i = 0; i < f.rows; ++i) {
                    T* row = in + (f.first + i) * stride + k + f.column;
                    for_vectors<S>(f.cols, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                        S::store_n(row + v, S::mul(scale, S::load_n(left.sums() + i * C + v, lanes)), lanes);
                    });
                }
            }
        });
        team->meeting.wait();
    }

    // The rows in groups of one adapter each, for a linear.
    int64_t groups_of(const StepLinear<T>& w, int64_t index, int64_t group, int64_t m, int64_t count,
                      RowGroup<T>* groups) const {
        int64_t n = 0, at = 0;
        for (int64_t s = 0; s < adapters.count; ++s) {
            const int64_t* segment = adapters.segments + s * 5;
            if (segment[0] > at) groups[n++] = {at, segment[0], w.b, 0, 0};
            const bool trains = segment[4] & group;
            groups[n++] = {segment[0], segment[1], w.b + m * segment[2], w.b_stride, trains ? m * segment[3] : 0};
            if (adapters.words != nullptr) {
                const int64_t* words = adapters.words + (s * adapters.linears + index) * 2;
                groups[n - 1].words = reinterpret_cast<const uint32_t*>(words[0]);
                groups[n - 1].second = reinterpret_cast<const uint32_t*>(words[1]);
                groups[n - 1].words_depth = word_depth<S, T>(groups[n - 1].width);
            }
            at = segment[1];
        }
        if (at < count || n == 0) groups[n++] = {at, count, w.b, 0, 0};
        return n;
    }

    // out(j, columns, c, c2) for every panel: c [count, C] = in W^T from column j on, and with `pairs` c2 = the same n
    // columns further on. It writes to `target`, whose lines are asked for before: claiming the next panel waits until
    // what has been stored is in the cache. All threads of the team call it; it ends with a barrier.
    template <class Out>
    void product(const StepLinear<T>& w, int64_t index, int64_t group, int64_t m, T* in, int64_t stride, int64_t count,
                 int64_t n, int64_t k, bool pairs, Prefetch after, Target target, Out out) {
        shrink(w, group, m, k, in, stride);
        team->attempts.run([&] {
            auto* groups =
                static_cast<RowGroup<T>*>(scratch(Slot::kGroups, size_t(2 * adapters.count + 1) * sizeof(RowGroup<T>)));
            const int64_t n_groups = groups_of(w, index, group, m, count, groups);
            const int64_t panels = ceil_div(n, C), threads = omp_get_num_threads();
            WeightRows<T> one = weight_rows(w, k), two = weight_rows(w, k, n);
            one.modules = two.modules = m == 3 ? Modules{3, n_q * d, qk_width} : m == 2 ? Modules{2, n} : Modules();
            // B is fetched with W: as one row where it follows W in memory and W's rows are what is read. (Its words:
            // RowGroup::fetch.)
            const int64_t tail = m * adapters.reach(group), calls = calls_of(w, count, k);
            const bool follows = w.scales == nullptr && w.b == static_cast<const T*>(w.w) + k && w.b_stride == w.stride;
            const auto fetch = [&](const WeightRows<T>& from, int64_t j, int64_t cols) {
                const bool together = follows && from.words == nullptr;
                Prefetch ahead = from.ahead(j, cols, k + (together ? tail : 0), calls);
                if (tail > 0 && !together && adapters.words == nullptr)
                    ahead.also = Lines(w.b + j * w.b_stride, cols, w.b_stride * int64_t(sizeof(T)),
                                       tail * int64_t(sizeof(T)), calls);
                return ahead;
            };
            if (omp_get_thread_num() < panels && count > 0) {
                const X left(one, in, stride, k, groups, n_groups, 2);
                float *c = left.sums(), *c2 = left.sums(1);
                for (int64_t p = omp_get_thread_num(), following; p < panels; p = following) {
                    following = threads + team->claimed++;  // the first of each thread is its own
                    const int64_t j = p * C, cols = min64(C, n - j), j1 = following * C;
                    Prefetch ahead = j1 < n ? fetch(one, j1, min64(C, n - j1)) : after;
                    if (count > 1) target.fetch(j, count, cols);
                    if (pairs) {
                        Prefetch second = fetch(two, n + j, cols);
                        left.multiply(one, j, cols, c, &second);
                        left.multiply(two, n + j, cols, c2, &ahead);
                    } else {
                        left.multiply(one, j, cols, c, &ahead);
                    }
                    out(j, cols, c, c2);
                }
            }
        });
        meet();
    }

    template <class P>
    static Target to(P* rows, int64_t stride) {
        return {rows, stride * int64_t(sizeof(P)), sizeof(P)};
    }

    // Ends what pieces were claimed of.
    void meet() {
        team->meeting.wait([&] { team->claimed = 0; });
    }

    // Rounds c (+ bias) to y [count, n] from column j on.
    static void store(const T* bias, const float* c, int64_t j, int64_t cols, T* y, int64_t y_stride, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            for_vectors<S>(cols, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                auto value = S::load_n(c + i * C + v, lanes);
                if (bias != nullptr) value = S::add(value, S::load_n(bias + j + v, lanes));
                S::store_n(y + i * y_stride + j + v, value, lanes);
            });
    }

    // Asks for row i of q, k and v, which the other threads have written, and for the cells it will write.
    void fetch_row(int64_t i, const T* k_cells, const T* v_cells) const {
        constexpr int64_t kSize = sizeof(T);
        const int64_t kv_width = n_kv * d;
        const auto* row = reinterpret_cast<const char*>(projected + i * qkv_width);
        for (int64_t b = 0; b < qkv_width * kSize; b += 64) __builtin_prefetch(row + b, 0, 3);
        for (const T* pool : {k_cells, v_cells}) {
            const auto* cell = reinterpret_cast<const char*>(pool + cells[i] * kv_width);
            for (int64_t b = 0; b < kv_width * kSize; b += 64) __builtin_prefetch(cell + b, 1, 3);
        }
    }

    // One layer, by the whole team. `first`: x is the stream. `following`: the layer after it, or null.
    void layer(const StepLayer<T>& l, int64_t index, bool first, const StepLayer<T>* following,
               PagedAttention<S, T> attention, T* k_cells, T* v_cells) {
        const Range mine = my_rows(rows);
        const int64_t n = mine.end - mine.begin, q_width = n_q * d, kv_width = n_kv * d;
        const auto norm = [&](const T* weight, bool add) {
            if (n == 0) return;
            T *stream = h + mine.begin * hidden, *delta = x + mine.begin * hidden;
            if (!add) std::memcpy(stream, delta, size_t(n * hidden) * sizeof(T));
            norm_rows<S>({0, n}, add ? delta : stream, hidden, add ? stream : nullptr, hidden, stream, hidden, weight,
                         eps, x1 + mine.begin * x1_stride, x1_stride, hidden);
        };
        norm(l.attention_norm, !first);
        team->meeting.wait();
        product(l.qkv, 4 * index, 1, 3, x1, x1_stride, rows, qkv_width, hidden, false,
                begin_of(l.o, 2, 1, hidden, q_width, calls_of(l.qkv, rows, hidden)), to(projected, qkv_width),
                [&](int64_t j, int64_t cols, const float* c, const float*) {
                    store(l.qkv.bias, c, j, cols, projected, qkv_width, rows);
                });
        attention.q = rotated, attention.k_pool = k_cells, attention.v_pool = v_cells;
        auto first_cells = paged_attention_first(attention, team->tasks, max64(n, 1));
        if (n > 0) {
            fetch_row(mine.begin, k_cells, v_cells);
        } else {
            first_cells.some();
        }
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            if (i + 1 < mine.end) fetch_row(i + 1, k_cells, v_cells);
            first_cells.some();
            const int64_t position = lengths[i] - 1;
            const T* qkv = projected + i * qkv_width;
            T* qk = rotated + i * qk_width;
            rotate_rows<S>({0, 1}, qkv, qkv_width, cos + position * cos_stride, cos_stride, sin + position * sin_stride,
                           sin_stride, n_q, n_kv, l.q_norm, l.k_norm, eps, qk, qk_width, d);
            std::memcpy(k_cells + cells[i] * kv_width, qk + q_width, size_t(kv_width) * sizeof(T));
            std::memcpy(v_cells + cells[i] * kv_width, qkv + qk_width, size_t(kv_width) * sizeof(T));
        }
        team->meeting.wait();
        paged_attention_share(attention, team->tasks, team->claimed, team->attempts, heads, heads_stride);
        meet();
        product(l.o, 4 * index + 1, 2, 1, heads, heads_stride, rows, hidden, q_width, false,
                begin_of(l.gate_up, 4, 2, ffn, hidden, calls_of(l.o, rows, q_width)), to(x, hidden),
                [&](int64_t j, int64_t cols, const float* c, const float*) {
                    store(l.o.bias, c, j, cols, x, hidden, rows);
                });
        norm(l.mlp_norm, true);
        team->meeting.wait();
        product(l.gate_up, 4 * index + 2, 4, 2, x1, x1_stride, rows, ffn, hidden, true,
                begin_of(l.down, 8, 1, hidden, ffn, calls_of(l.gate_up, rows, hidden)), to(a, a_stride),
                [&](int64_t j, int64_t cols, const float* gate, const float* up) {
                    alignas(64) T both[2 * C];
                    for (int64_t i = 0; i < rows; ++i) {
                        store(nullptr, gate + i * C, 0, cols, both, 0, 1);
                        store(nullptr, up + i * C, 0, cols, both + cols, 0, 1);
                        swiglu_rows<S>({0, 1}, both, 2 * cols, a + i * a_stride + j, a_stride, cols);
                    }
                });
        const Prefetch after = following == nullptr
                                   ? Prefetch()
                                   : begin_of(following->qkv, 1, 3, qkv_width, hidden, calls_of(l.down, rows, ffn));
        product(l.down, 4 * index + 3, 8, 1, a, a_stride, rows, hidden, ffn, false, after, to(x, hidden),
                [&](int64_t j, int64_t cols, const float* c, const float*) {
                    store(nullptr, c, j, cols, x, hidden, rows);
                });
    }

    // logits[w] of row wanted[w].
    void head(const StepHead<T>& head, const int64_t* wanted, int64_t n_wanted, float* logits, int64_t vocab) {
        const Range mine = my_rows(n_wanted);
        for (int64_t w = mine.begin; w < mine.end; ++w) {
            const int64_t i = wanted[w];
            T* sum = projected + w * hidden;  // as wide as a row of x, and free
            norm_rows<S>({0, 1}, x + i * hidden, hidden, h + i * hidden, hidden, sum, hidden, head.norm, eps,
                         x1 + w * x1_stride, x1_stride, hidden);
        }
        team->meeting.wait();
        product(head.linear, adapters.linears - 1, 16, 1, x1, x1_stride, n_wanted, vocab, hidden, false, Prefetch(),
                to(logits, vocab), [&](int64_t j, int64_t cols, const float* c, const float*) {
                    for (int64_t w = 0; w < n_wanted; ++w)
                        std::memcpy(logits + w * vocab + j, c + w * C, size_t(cols) * sizeof(float));
                });
    }
};

// tokens [rows] of an embedding [.., hidden]; layers: n_layers StepLayer, head: a StepHead; pools [n_layers, n_blocks,
// block, n_kv d] contiguous; a row's own token is the last of its length, and its k and v go to that cell; cos and sin
// [positions, ..]; word_columns: of the panels in which words are kept, W's and,
// in `words`, B's (StepAdapters); logits [n_wanted, vocab] of the rows `wanted`,
// ascending. head_segments: the segments of those rows.
template <class S, class T>
void decode_step(const int64_t* tokens, const T* embedding, int64_t embedding_stride, const int64_t* layers,
                 int64_t n_layers, const int64_t* head, int64_t word_columns, const float* cos, int64_t cos_stride,
                 const float* sin, int64_t sin_stride, int64_t positions, T* k_pool, T* v_pool, int64_t n_blocks,
                 int64_t block, const int32_t* table, int64_t table_stride, int64_t max_blocks, const int32_t* lengths,
                 const int64_t* segments, const int64_t* head_segments, const float* scales, int64_t n_segments,
                 const int64_t* words, const int64_t* wanted, int64_t n_wanted, float* logits, int64_t rows,
                 int64_t hidden, int64_t ffn, int64_t n_q, int64_t n_kv, int64_t d, int64_t vocab, float eps,
                 float scale) {
    const char* op = "decode_step";
    check::multiple(op, "d", d, 2);
    check::multiple(op, "hidden", hidden, 2);
    check::multiple(op, "ffn", ffn, 2);
    for (int64_t i = 0; i < rows; ++i) {
        check::at_least(op, "tokens", tokens[i], 0);
        check::at_least(op, "V", vocab, tokens[i] + 1);
        check::at_least(op, "lengths", lengths[i], 1);
        check::at_least(op, "positions of cos and sin", positions, lengths[i]);
    }
    for (int64_t w = 0; w < n_wanted; ++w) {  // ascending: there is room for no more than all rows
        check::at_least(op, "wanted", wanted[w], w > 0 ? wanted[w - 1] + 1 : 0);
        check::at_least(op, "rows", rows, wanted[w] + 1);
    }
    if (rows == 0) return;
    const auto* all = reinterpret_cast<const StepLayer<T>*>(layers);
    const int64_t kv_width = n_kv * d, pool = n_blocks * block * kv_width;
    PagedAttention<S, T> attention{};
    attention.k_stride = attention.v_stride = kv_width;
    attention.k_block_stride = attention.v_block_stride = block * kv_width;
    attention.table = table, attention.table_stride = table_stride, attention.lengths = lengths;
    attention.rows = rows, attention.block = block, attention.n_q = n_q, attention.n_kv = n_kv, attention.d = d,
    attention.scale = scale;
    StepTeam team;
    DecodeStep<S, T> step{};
    step.team = &team;
    step.reads_words = kReadsWords<S, T> && word_columns == FewRows<S, T>::C;
    step.adapters = {segments, scales, n_segments, step.reads_words ? words : nullptr, 4 * n_layers + 1};
    step.rows = rows, step.hidden = hidden, step.ffn = ffn, step.n_q = n_q, step.n_kv = n_kv, step.d = d;
    step.eps = eps, step.cos = cos, step.sin = sin, step.cos_stride = cos_stride, step.sin_stride = sin_stride;
    step.lengths = lengths;
    attention.validate(n_blocks, max_blocks);
    team.tasks = attention.tasks(omp_get_max_threads());
    const size_t bytes = step.place(nullptr);
    step.place(static_cast<char*>(scratch(Slot::kLayer, bytes)));
    attention.q_stride = step.qk_width;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t position = lengths[i] - 1;
        step.cells[i] = table[i * table_stride + position / block] * block + position % block;
        std::memcpy(step.x + i * hidden, embedding + tokens[i] * embedding_stride, size_t(hidden) * sizeof(T));
    }
#pragma omp parallel
    {
        const typename S::Tiles registers;
        DecodeStep<S, T> mine = step;
        for (int64_t i = 0; i < n_layers; ++i)
            mine.layer(all[i], i, i == 0, i + 1 < n_layers ? all + i + 1 : nullptr, attention, k_pool + i * pool,
                       v_pool + i * pool);
        mine.adapters.segments = head_segments;
        mine.head(*reinterpret_cast<const StepHead<T>*>(head), wanted, n_wanted, logits, vocab);
    }
    team.attempts.finish();
}

}  // namespace mint
