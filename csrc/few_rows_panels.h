// few_rows.h in tiles where the weight's words are kept (few_rows_words.h): x's rows are the left operand, the panels
// the right one, both where they lie. Packed is only what W leaves of a step, as that goes on with an adapter's B. Or
// few rows meet an int8 weight in registers (few_rows_int8.h), and only B comes in panels.
#pragma once
#include "few_rows_int8.h"
#include "few_rows_words.h"

namespace mint {

constexpr int64_t kTileWords = 16;  // of a step
constexpr int64_t kStepsAhead = 4;

// Rows of x, each with its tail behind it; kept by its thread until the next ones are prepared.
template <class S, class T>
class FewRowsPanels {
    using Q = Panel<S, T>;
    static constexpr int64_t C = Q::kCols, kRows = Q::kRows, kK = 2 * kTileWords;  // kK: k of a step

  public:
    static bool takes(const WeightRows<T>& w, int64_t rows, int64_t k) {
        return w.words != nullptr || FewRowsInt8<S, T>::takes(w, rows, k);
    }

    // See FewRows.
    void prepare(const WeightRows<T>& w, const T* x, int64_t stride, int64_t k, const RowGroup<T>* groups,
                 int64_t n_groups, int64_t buffers) {
        groups_ = groups, n_groups_ = n_groups, rows_ = groups[n_groups - 1].end, k_ = base_ = k;
        for (int64_t g = 0; g < n_groups; ++g)
            if (groups[g].width > 0 && w.scales == nullptr) base_ = k / kK * kK;  // W's last step goes on with B
        int64_t elements = 0, widest = 0;
        for (int64_t g = 0; g < n_groups; ++g) {
            elements += (groups[g].end - groups[g].begin) * padded(groups[g]);
            widest = max64(widest, padded(groups[g]));
        }
        if (w.scales != nullptr) {
            int8_.prepare(x, stride, rows_, k);
        } else {
            left_ = left_rows<S, T>(x, stride, 1, rows_, base_, Slot::kPanelsA);
        }
        elements += (kRows - 1) * widest;  // tiles have whole rows of 16: what comes after the last is read
        tails_ = static_cast<T*>(scratch(Slot::kPanelsB, size_t(elements + (widest + kK) * C) * sizeof(T)));
        more_ = reinterpret_cast<uint32_t*>(tails_ + elements);
        kept_ = ceil_div(rows_, kRows) * kRows * C;
        sums_ = static_cast<float*>(scratch(Slot::kTile, size_t(buffers * kept_ + kRows * C) * sizeof(float)));
        own_ = sums_ + buffers * kept_;
        T* to = tails_;
        for (const RowGroup<T>* g = groups; g < groups + n_groups; ++g)
            for (int64_t i = g->begin; i < g->end && tail(*g) > 0; ++i, to += padded(*g))
                for (int64_t v = 0; v < padded(*g); v += kK) {  // whole steps, zeros beyond the tail
                    const auto step = S::load_pairs_n(x + i * stride + base_ + v, int(min64(kK, tail(*g) - v)));
                    std::memcpy(to + v, &step, kK * sizeof(T));
                }
    }

    float* sums(int64_t buffer) const { return sums_ + buffer * kept_; }

    // See FewRows.
    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        for (int64_t g = 0; g < n_groups_; ++g) groups_[g].fetch(w, first, cols, kTileWords, C);
        if (w.scales != nullptr) {
            int8_.multiply(w, first, cols, c, next);
        } else {
            multiply_words(w, first, cols, c, next);
        }
        const T* s = tails_;
        for (const RowGroup<T>* g = groups_; g < groups_ + n_groups_; ++g)
            if (tail(*g) > 0) {
                add_tail(w, *g, first, cols, s, c);
                s += (g->end - g->begin) * padded(*g);
            }
    }

  private:
    // c = the rows of x * a panel of words, as far as base_.
    void multiply_words(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        const uint32_t* panel = w.panel(first);
        const int64_t steps = ceil_div(base_, kK), blocks = ceil_div(rows_, kRows);
        // One block of rows reads the panel from memory. Of several all fetch the next one: else memory would rest
        // while all but the first multiply.
        const WordsAhead near(panel, w.words_depth, next);
        Lines far;
        if (blocks > 1 && next->then != nullptr) far = Lines(next->then, 1, 0, w.words_depth * C * 4, blocks * steps);
        for (int64_t i = 0; i < rows_; i += kRows) {
            int64_t word = 0;
            S::multiply_tiles(min64(kRows, rows_ - i), cols, left_.at(i), {panel, C}, c + i * C, C, steps, false,
                              [&]() __attribute__((always_inline)) {
                                  if (blocks == 1) {
                                      near.some<C, kTileWords, kStepsAhead * kTileWords>(word);
                                      word += kTileWords;
                                  } else {
                                      far.some<false>(), next->also.some<false>();
                                  }
                              });
        }
    }

    // Elements of a row of the group behind base_: what is left of x, and S.
    int64_t tail(const RowGroup<T>& g) const { return k_ - base_ + g.width; }
    int64_t padded(const RowGroup<T>& g) const { return ceil_div(tail(g), kK) * kK; }

    // The group's rows of c += their tails `s` * what is left of W and the group's B.
    void add_tail(const WeightRows<T>& w, const RowGroup<T>& g, int64_t first, int64_t cols, const T* s,
                  float* c) const {
        const int64_t stride = padded(g), rest = k_ - base_;
        const uint32_t* panel = more_;
        Range mine{0, stride / 2};  // words
        if (rest == 0 && g.words != nullptr) {
            mine = g.own(w, first, cols, kTileWords);
            panel = g.panel(w, first) + mine.begin * C;
        } else {
            // A panel of W's rest and of B, one after the other; zeros up to a whole step.
            if (rest > 0) std::memcpy(more_, w.panel(first) + base_ / 2 * C, size_t(rest / 2 * C) * 4);
            pack_panel<S, T>(g.b + first * g.stride, g.stride, 1, cols, g.width, more_ + rest / 2 * C);
            const int64_t packed = rest / 2 + Q::depth(g.width);
            if (packed < stride / 2) std::memset(more_ + packed * C, 0, size_t((stride / 2 - packed) * C) * 4);
        }
        for (int64_t i = g.begin; i < g.end; i += kRows, s += kRows * stride) {
            const int64_t n = min64(kRows, g.end - i);
            const Rows left{reinterpret_cast<const char*>(s + 2 * mine.begin), stride * int64_t(sizeof(T)), false};
            // A tile's other rows are those of another group.
            float* to = n % 16 == 0 ? c + i * C : own_;
            if (to == own_) std::memcpy(own_, c + i * C, size_t(n * C) * sizeof(float));
            S::multiply_tiles(n, cols, left, {panel, C}, to, C, (mine.end - mine.begin) / kTileWords, true, [] {});
            if (to == own_) std::memcpy(c + i * C, own_, size_t(n * C) * sizeof(float));
        }
    }

    const RowGroup<T>* groups_ = nullptr;
    int64_t n_groups_ = 0, rows_ = 0, k_ = 0;
    int64_t base_ = 0;  // k that all rows share: k, or its whole steps where W's last step goes on with a B
    int64_t kept_ = 0;  // elements of a buffer of sums
    Rows left_{};
    FewRowsInt8<S, T> int8_;
    T* tails_ = nullptr;        // of each group, rows of padded(group)
    uint32_t* more_ = nullptr;  // a panel
    float *sums_ = nullptr, *own_ = nullptr;
};

}  // namespace mint
