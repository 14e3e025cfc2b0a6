// few_rows.h in tiles: the weight's rows are the left operand, straight from memory, x's rows the columns of the right
// one, packed once for a product. The sums are turned at the end. (Of a weight whose words are kept, and of few rows
// with an int8 weight: few_rows_panels.h.)
#pragma once
#include "few_rows.h"
#include "few_rows_panels.h"

namespace mint {

template <class S, class T>
class FewRows<S, T, Operands::kTiles> {
    using Q = Panel<S, T>;
    static constexpr int64_t kK = 32;      // k of a step, 16 pairs
    static constexpr int64_t kStaged = 8;  // steps that are copied at a time where the weight cannot be used in place

  public:
    static constexpr int64_t C = 32;  // rows of the weight, which are columns of the result

    FewRows(const WeightRows<T>& w, const T* x, int64_t stride, int64_t k, const RowGroup<T>* groups, int64_t n_groups,
            int64_t buffers)
        : groups_(groups),
          n_groups_(n_groups),
          rows_(groups[n_groups - 1].end),
          k_(k),
          base_(k),
          in_panels_(FewRowsPanels<S, T>::takes(w, rows_, k)) {
        if (in_panels_) {
            panels_.prepare(w, x, stride, k, groups, n_groups, buffers);
            return;
        }
        for (int64_t g = 0; g < n_groups; ++g)
            if (groups[g].width > 0 && w.scales == nullptr) base_ = k / kK * kK;  // W's last step goes on with B
        ld_ = ceil_div(rows_, 16) * 16;
        int64_t words = ceil_div(base_, kK) * 16 * ld_, most = 0;
        for (int64_t g = 0; g < n_groups; ++g) {
            words += ceil_div(tail(groups[g]), kK) * 16 * ceil_div(groups[g].end - groups[g].begin, 16) * 16;
            most = max64(most, ceil_div(tail(groups[g]), kK) * kK);
        }
        const int64_t wide = max64(ceil_div(base_, kK) * kK, most);
        const int64_t staged = max64(max64(2 * C * kStaged * kK, C * most), 16 * wide);
        packed_ = static_cast<uint32_t*>(scratch(Slot::kPanelsA, size_t(words) * 4));
        stage_ = static_cast<T*>(scratch(Slot::kPanelsB, size_t(staged + C * kK) * sizeof(T)));
        last_ = stage_ + staged;
        sums_ = static_cast<float*>(scratch(Slot::kTile, size_t((buffers + 1) * C * ld_ + C * 16) * 4));
        turned_ = sums_ + buffers * C * ld_;
        own_ = turned_ + C * ld_;
        uint32_t* to = packed_;
        for (int64_t i = 0; i < rows_; i += 2 * 16)
            to += pack(x + i * stride, stride, min64(32, rows_ - i), base_, 32, to);
        tails_ = to;
        for (int64_t g = 0; g < n_groups; ++g)
            for (int64_t i = groups[g].begin; i < groups[g].end && tail(groups[g]) > 0; i += 16)
                to += pack(x + i * stride + base_, stride, min64(16, groups[g].end - i), tail(groups[g]), 16, to);
    }

    float* sums(int64_t buffer = 0) const { return in_panels_ ? panels_.sums(buffer) : sums_ + buffer * C * ld_; }
    static int64_t prefetch_calls(const WeightRows<T>& w, int64_t rows, int64_t k) {
        if (FewRowsInt8<S, T>::takes(w, rows, k)) return FewRowsInt8<S, T>::prefetch_calls(k);
        return ceil_div(k, kK) * ceil_div(rows, 32);
    }

    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        if (in_panels_) return panels_.multiply(w, first, cols, c, next);
        const int64_t steps = ceil_div(base_, kK), m = cols > 16 ? 32 : 16;
        const auto each = [=]() __attribute__((always_inline)) { next->some(); };
        if (steps == 0) std::memset(turned_, 0, size_t(C * ld_) * sizeof(float));
        if (w.scales == nullptr && cols % 16 == 0) {
            const int64_t rest = base_ % kK;
            if (rest > 0) Staging(w, first, cols, base_ - rest, rest, kK, last_).all();
            const char* a = reinterpret_cast<const char*>(static_cast<const T*>(w.data) + first * w.stride);
            const char* tail = rest > 0 ? reinterpret_cast<const char*>(last_) : nullptr;
            columns(m, {a, w.stride * int64_t(sizeof(T)), false, tail}, 0, steps, false, each);
        } else {
            // While some steps are multiplied the next ones are copied: with few rows each instruction of a tile waits
            // for the one before.
            const auto staging = [&](int64_t s) {
                const int64_t count = max64(min64(kStaged, steps - s), 0), at = s * kK;
                return Staging(w, first, cols, at, min64(count * kK, base_ - at), count * kK,
                               stage_ + s / kStaged % 2 * (C * kStaged * kK));
            };
            Staging now = staging(0);
            now.all();
            for (int64_t s = 0; s < steps; s += kStaged) {
                Staging after = staging(s + kStaged);
                columns(m, {reinterpret_cast<const char*>(now.to), now.stride * int64_t(sizeof(T)), false}, s,
                        now.stride / kK, s > 0, [&]() __attribute__((always_inline)) { next->some(), after.some(); });
                after.all();
                now = after;
            }
        }
        if (w.scales != nullptr)
            for (int64_t j = 0; j < cols; ++j)
                for (int64_t i = 0; i < ld_; ++i) turned_[j * ld_ + i] *= w.scales[first + j];
        const uint32_t* b = tails_;
        for (const RowGroup<T>* g = groups_; g < groups_ + n_groups_; ++g)
            if (tail(*g) > 0) b = add_tail(w, *g, first, cols, m, b);
        turn<S>(turned_, ld_, m, rows_, c, C);
    }

  private:
    int64_t tail(const RowGroup<T>& g) const { return k_ - base_ + g.width; }

    // Rows of x as columns of tiles, `width` (16 or 32, less where the rows end) a row of pairs. Returns the words
    // written.
    int64_t pack(const T* x, int64_t stride, int64_t rows, int64_t k, int64_t most, uint32_t* to) const {
        const int64_t steps = ceil_div(k, kK), width = rows > 16 ? most : 16, padded = steps * kK;
        for (int64_t i = 0; i < width; i += 16) {
            const int64_t n = max64(0, min64(16, rows - i));
            for (int64_t r = 0; r < n; ++r) {
                std::memcpy(stage_ + r * padded, x + (i + r) * stride, size_t(k) * sizeof(T));
                std::memset(stage_ + r * padded + k, 0, size_t(padded - k) * sizeof(T));
            }
            std::memset(stage_ + n * padded, 0, size_t((16 - n) * padded) * sizeof(T));
            for (int64_t s = 0; s < steps; ++s)
                S::transpose(stage_ + s * kK, padded * int64_t(sizeof(T)), to + s * 16 * width + i, width);
        }
        return steps * 16 * width;
    }

    // A copy of elements [k, k + n) of weight rows, `stride` apart in `to`; zeros up to that and to C rows. `some` of
    // it at a time: as much as it takes to be ready when kStaged steps are.
    struct Staging {
        const WeightRows<T>* w;
        int64_t first, cols, k, n, stride;
        T* to;
        int64_t row;

        Staging(const WeightRows<T>& w, int64_t first, int64_t cols, int64_t k, int64_t n, int64_t stride, T* to)
            : w(&w), first(first), cols(cols), k(k), n(n), stride(stride), to(to), row(stride > 0 ? 0 : C) {}

        void all() {
            while (row < C) some();
        }
        __attribute__((always_inline)) void some() {
            for (const int64_t end = min64(row + C / kStaged, C); row < end; ++row) {
                T* p = to + row * stride;
                const int64_t real = row < cols ? n : 0;
                if (real > 0) w->copy(first + row, k, real, p);
                if (real < stride) std::memset(p + real, 0, size_t(stride - real) * sizeof(T));
            }
        }
    };

    // turned_ (+)= `steps` steps of m weight rows, from step s of x on, for all rows of x.
    template <class Each>
    void columns(int64_t m, Rows a, int64_t s, int64_t steps, bool accumulate, Each each) const {
        const uint32_t* b = packed_;
        for (int64_t i = 0; i < rows_; i += 32) {
            const int64_t width = rows_ - i > 16 ? 32 : 16;
            S::multiply_tiles(m, width, a, {b + s * 16 * width, width}, turned_ + i, ld_, steps, accumulate, each);
            b += ceil_div(base_, kK) * 16 * width;
        }
    }

    // The group's rows go on with what is left of W and with its B; returns the packed S of the next group.
    const uint32_t* add_tail(const WeightRows<T>& w, const RowGroup<T>& g, int64_t first, int64_t cols, int64_t m,
                             const uint32_t* b) const {
        const int64_t steps = ceil_div(tail(g), kK), stride = steps * kK;
        const Rows left{reinterpret_cast<const char*>(stage_), stride * int64_t(sizeof(T)), false};
        stage_tail(w, g, first, cols, m, stride);
        for (int64_t i = g.begin; i < g.end; i += 16, b += steps * 16 * 16) {
            const int n = int(min64(16, g.end - i));
            for (int64_t j = 0; j < m; ++j) S::store(own_ + j * 16, S::load_n(turned_ + j * ld_ + i, n));
            S::multiply_tiles(m, 16, left, {b, 16}, own_, 16, steps, true, [] {});
            for (int64_t j = 0; j < m; ++j) S::store_n(turned_ + j * ld_ + i, S::load(own_ + j * 16), n);
        }
        return b;
    }

    // What is left of m rows of W, and the group's B after it.
    void stage_tail(const WeightRows<T>& w, const RowGroup<T>& g, int64_t first, int64_t cols, int64_t m,
                    int64_t stride) const {
        const int64_t rest = k_ - base_;
        for (int64_t j = 0; j < cols; ++j) {
            const T* from = g.b + (first + j) * g.stride;
            T* to = stage_ + j * stride + rest;
            if (rest > 0) {
                w.copy(first + j, base_, rest, to - rest);
                std::memcpy(to, from, size_t(g.width) * sizeof(T));
                std::memset(to + g.width, 0, size_t(stride - rest - g.width) * sizeof(T));
                continue;
            }
            for (int64_t i = 0; i < stride; i += kK) {  // whole vectors, zeros beyond the width
                const auto step = S::load_pairs_n(from + i, int(g.width - i));
                std::memcpy(to + i, &step, kK * sizeof(T));
            }
        }
        std::memset(stage_ + cols * stride, 0, size_t((m - cols) * stride) * sizeof(T));
    }

    const RowGroup<T>* groups_;
    int64_t n_groups_, rows_, k_;
    int64_t base_;  // k that all rows share: k, or its whole steps where W's last step goes on with a B
    int64_t ld_;
    uint32_t *packed_, *tails_;
    T *stage_, *last_;
    float *sums_, *turned_, *own_;
    bool in_panels_;
    FewRowsPanels<S, T> panels_;
};

}  // namespace mint
