// few_rows.h in tiles of fp32 in three parts (split_panels.h): the weight's rows are the left operand, split a few
// steps at a time, in L1, x's rows the columns of the right one, split once for a product. The sums are turned at the
// end.
#pragma once
#include "few_rows.h"

namespace mint {

template <class S, class T>
class FewRows<S, T, Operands::kSplitTiles> {
    using Q = Panel<S, T>;
    static constexpr int64_t kChunkK = kSplitChunk * kSplitK;
    static constexpr int64_t kChunkWords = Q::kRows * kSplitChunk * kSplitWords;  // 36 KB

  public:
    static constexpr int64_t C = Q::kCols;  // rows of the weight, which are columns of the result

    FewRows(const WeightRows<T>& w, const T* x, int64_t stride, int64_t k, const RowGroup<T>* groups, int64_t n_groups,
            int64_t buffers)
        : groups_(groups), n_groups_(n_groups), rows_(groups[n_groups - 1].end), k_(k), base_(k) {
        for (int64_t g = 0; g < n_groups; ++g)
            if (groups[g].width > 0 && w.scales == nullptr)
                base_ = k / kChunkK * kChunkK;  // W's last chunk goes on with B
        ld_ = ceil_div(rows_, 16) * 16;
        int64_t words = panels_of(rows_) * Q::depth(base_), widest = 2 * kSplitChunk;
        for (int64_t g = 0; g < n_groups; ++g) {
            words += panels_of(groups[g].end - groups[g].begin) * Q::depth(tail(groups[g]));
            widest = max64(widest, ceil_div(tail(groups[g]), kSplitK));
        }
        packed_ = panel_scratch<S, T>(Slot::kPanelsA, words * C);
        stage_ = panel_scratch<S, T>(Slot::kPanelsB, C * widest * (kSplitWords + kSplitK));
        whole_ = reinterpret_cast<T*>(stage_ + C * widest * kSplitWords);
        sums_ = static_cast<float*>(scratch(Slot::kTile, size_t((buffers + 1) * C * ld_ + C * C) * 4));
        turned_ = sums_ + buffers * C * ld_;
        own_ = turned_ + C * ld_;
        uint32_t* to = packed_;
        pack_panels<S, T>(x, stride, 1, rows_, base_, to);
        tails_ = to += panels_of(rows_) * Q::depth(base_) * C;
        for (const RowGroup<T>* g = groups; g < groups + n_groups; ++g) {
            pack_panels<S, T>(x + g->begin * stride + base_, stride, 1, g->end - g->begin, tail(*g), to);
            to += panels_of(g->end - g->begin) * Q::depth(tail(*g)) * C;
        }
    }

    float* sums(int64_t buffer = 0) const { return sums_ + buffer * C * ld_; }
    static int64_t prefetch_calls(const WeightRows<T>&, int64_t rows, int64_t k) {
        return ceil_div(k, kSplitK) * 2 * panels_of(rows);
    }

    // See FewRows. While a chunk is multiplied the next one is split: with few rows each instruction of a tile waits
    // for the one before.
    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        const int64_t steps = ceil_div(base_, kSplitK), depth = Q::depth(base_);
        if (steps == 0) std::memset(turned_, 0, size_t(C * ld_) * sizeof(float));
        Stage now(*this, w, first, cols, 0), after = now;
        while (!now.done()) now.some(), next->some();
        for (int64_t s = 0; s < steps; s += kSplitChunk) {
            after = Stage(*this, w, first, cols, s + kSplitChunk);
            for (int64_t i = 0; i < rows_; i += C)
                S::template multiply_split<true, kSplitChunk>(
                    cols, rows_ - i, now.rows(), packed_ + i * depth + s * kSplitWords * C, turned_ + i, ld_,
                    min64(kSplitChunk, steps - s), now.exact, s > 0,
                    [&]() __attribute__((always_inline)) { after.some(), next->some(); });
            while (!after.done()) after.some();
            now = after;
        }
        if (w.scales != nullptr)
            for (int64_t j = 0; j < cols; ++j)
                for (int64_t i = 0; i < ld_; ++i) turned_[j * ld_ + i] *= w.scales[first + j];
        const uint32_t* b = tails_;
        for (const RowGroup<T>* g = groups_; g < groups_ + n_groups_; ++g)
            if (tail(*g) > 0) b = add_tail(w, *g, first, cols, b);
        turn<S>(turned_, ld_, cols, rows_, c, C);
    }

  private:
    static int64_t panels_of(int64_t rows) { return ceil_div(rows, C); }
    int64_t tail(const RowGroup<T>& g) const { return k_ - base_ + g.width; }

    // A chunk of `cols` weight rows from unit `from` on, split half a unit at a time. Two that follow each other have a
    // buffer each.
    struct Stage {
        const T* data;
        int64_t stride, cols, n, half = 0, exact = 0;  // n: elements of a row
        uint32_t* to;
        bool bare = false;

        Stage(const FewRows& f, const WeightRows<T>& w, int64_t first, int64_t cols, int64_t from) : cols(cols) {
            const int64_t k = from * kSplitK;
            n = max64(min64(kChunkK, f.base_ - k), 0);
            to = f.stage_ + from / kSplitChunk % 2 * kChunkWords;
            if (w.scales == nullptr) {
                data = static_cast<const T*>(w.data) + first * w.stride + k, stride = w.stride;
                return;
            }
            if (n > 0)
                for (int64_t j = 0; j < cols; ++j) w.copy(first + j, k, n, f.whole_ + j * n);
            data = f.whole_, stride = n;
        }

        bool done() const { return half >= 2 * ceil_div(n, kSplitK); }
        Rows rows() const { return {reinterpret_cast<const char*>(to), Q::depth(n) * 4, false}; }
        __attribute__((always_inline)) void some() {
            if (done()) return;
            const int64_t u = half / 2, r0 = half % 2 * 16;
            const SplitUnit unit{data + u * kSplitK, stride, 1, cols, n - u * kSplitK};
            if (r0 == 0) {
                bare = exact == u && unit.template is_bf16<S>();
                if (bare) ++exact;
            }
            if (r0 < cols)
                split_unit_rows<S>(unit.from(r0), to + r0 * Q::depth(n) + u * kSplitWords, Q::depth(n), bare);
            ++half;
        }
    };

    // What is left of the weight's rows, and the group's B after it, in parts.
    Rows stage_tail(const WeightRows<T>& w, int64_t first, int64_t cols, const RowGroup<T>& g) const {
        const int64_t n = k_ - base_, stride = n + g.width;
        for (int64_t j = 0; j < cols; ++j) {
            if (n > 0) w.copy(first + j, base_, n, whole_ + j * stride);
            if (g.width > 0)
                std::memcpy(whole_ + j * stride + n, g.b + (first + j) * g.stride, size_t(g.width) * sizeof(T));
        }
        Rows rows{reinterpret_cast<const char*>(stage_), Q::depth(stride) * 4, false};
        rows.exact = split_rows<S>(whole_, stride, 1, cols, stride, stage_, true);
        return rows;
    }

    // The group's rows go on with what is left of W and with its B; returns the packed S of the next group.
    const uint32_t* add_tail(const WeightRows<T>& w, const RowGroup<T>& g, int64_t first, int64_t cols,
                             const uint32_t* b) const {
        const Rows left = stage_tail(w, first, cols, g);
        const int64_t depth = Q::depth(tail(g));
        for (int64_t i = g.begin; i < g.end; i += C, b += depth * C) {
            const int64_t n = min64(C, g.end - i);
            for (int64_t j = 0; j < cols; ++j)
                for (int64_t v = 0; v < n; v += S::W)
                    S::store(own_ + j * C + v, S::load_n(turned_ + j * ld_ + i + v, int(n - v)));
            S::template multiply_split<true, kSplitChunk>(cols, n, left, b, own_, C, depth / Q::kUnit, left.exact, true,
                                                          [] {});
            for (int64_t j = 0; j < cols; ++j)
                for (int64_t v = 0; v < n; v += S::W)
                    S::store_n(turned_ + j * ld_ + i + v, S::load(own_ + j * C + v), int(n - v));
        }
        return b;
    }

    const RowGroup<T>* groups_;
    int64_t n_groups_, rows_, k_;
    int64_t base_;  // k that all rows share: k, or its whole chunks where W's last chunk goes on with a B
    int64_t ld_;
    uint32_t *packed_, *tails_, *stage_;
    T* whole_;  // rows that are put together before they are split
    float *sums_, *turned_, *own_;
};

}  // namespace mint
