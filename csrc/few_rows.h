// Products of a few rows of x with a weight used transposed, each byte of the weight read once, from far away.
//
// The sums are gemm's, in gemm's order (gemm.h): a row's bits depend neither on how many others share the call nor on
// which of the two ran. What differs is the blocking. A panel of weight rows is transposed kDepth elements at a time
// into L1, where all rows of x meet it, while the next panel is fetched a few lines at a time. For more rows than a
// register tile has (few_rows_in_place.h) and in tiles (few_rows_tiles.h) the weight is not even transposed; where bf16
// has to be widened, a handful of rows meets it in registers (few_rows_straight.h); and a weight that is kept
// transposed is multiplied as it is (few_rows_words.h).
//
// Rows may go on into a tail of their own: groups of neighbouring rows have the columns of their adapter's B after W
// and their S after x, summed as if [W | B] lay in memory without gaps. A weight may be int8 with a scale for each row;
// its sums are scaled before the tail is added.
#pragma once
#include "few_rows_in_place.h"
#include "few_rows_words.h"

namespace mint {

constexpr int64_t kFewRows = 64;  // beyond, gemm's tiles are better

enum class Operands { kPanels, kTiles, kSplitTiles };
template <class S, class T>
constexpr Operands kOperands = Panel<S, T>::kSplit   ? Operands::kSplitTiles
                               : Panel<S, T>::kTiles ? Operands::kTiles
                                                     : Operands::kPanels;

template <class S, class T, Operands = kOperands<S, T>>
class FewRows;  // of tiles: few_rows_tiles.h, few_rows_split.h

// One thread's rows of x [rows, k], each with its tail behind it, and its scratch: until the next one is made.
template <class S, class T>
class FewRows<S, T, Operands::kPanels> {
    using Q = Panel<S, T>;
    using P = typename Q::P;
    using Straight = FewRowsStraight<S, T>;

  public:
    static constexpr int64_t C = Q::kCols;

    // `groups` hold all rows, in order. With a tail, k is even. `buffers`: how many panels' sums are kept at once.
    FewRows(const WeightRows<T>& w, const T* x, int64_t stride, int64_t k, const RowGroup<T>* groups, int64_t n_groups,
            int64_t buffers)
        : groups_(groups),
          n_groups_(n_groups),
          rows_(groups[n_groups - 1].end),
          k_(k),
          is_in_place_(in_place(w, rows_)) {
        if (is_in_place_) {
            in_place_.prepare(x, stride, k, groups, n_groups, buffers);
            return;
        }
        int64_t width = 0;
        for (int64_t g = 0; g < n_groups; ++g) width = max64(width, groups[g].width);
        x_ = left_rows<S, T>(x, stride, 1, rows_, k + width, Slot::kPanelsA);
        panel_ = panel_scratch<S, T>(Slot::kPanelsB, 2 * kDepth * C + C * kWide);
        unpacked_ = reinterpret_cast<T*>(panel_ + 2 * kDepth * C);
        sums_ = static_cast<float*>(scratch(Slot::kTile, size_t((buffers + 1) * rows_ * C) * 4));
        fits_straight_ = Straight::fits(w, k, groups, n_groups);
        if (fits_straight_) straight_.prepare(x_, k, groups, n_groups, sums(buffers));
    }

    float* sums(int64_t buffer = 0) const { return is_in_place_ ? in_place_.sums(buffer) : sums_ + buffer * rows_ * C; }
    static int64_t prefetch_calls(const WeightRows<T>& w, int64_t rows, int64_t k) {
        if (w.words != nullptr) return max64(k / (2 * kWordStep), 1);
        if (in_place(w, rows)) return FewRowsInPlace<S, T>::prefetch_calls(k);
        if (Straight::takes(w, rows)) return Straight::prefetch_calls(w, k);
        return ceil_div(Q::depth(k), S::W);
    }

    // c[i * C + j] (fp32) = x row i . weight row first + j, for j < cols <= C; columns are padded to whole vectors.
    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        if (is_in_place_) return in_place_.multiply(w, first, cols, c, next);
        if constexpr (kReadsWords<S, T>) {
            if (w.words != nullptr) return multiply_words(w, first, cols, c, next);
        }
        if constexpr (Straight::kPossible) {
            if (fits_straight_ && cols % S::W == 0) return straight_.multiply(w, first, cols, c, next);
        }
        const int64_t depth = Q::depth(k_), whole = depth / kDepth * kDepth;
        const bool odd = k_ % Q::kStep != 0;
        for (int64_t k0 = 0; k0 < whole; k0 += kDepth) {
            pack_weight(w, first, cols, k0, kDepth, next);
            tiles(0, rows_, cols, k0, kDepth, odd && k0 + kDepth == depth, panel_, c);
        }
        int64_t rest = depth - whole;
        if (rest > 0) pack_weight(w, first, cols, whole, rest, next);
        if (depth == 0) std::memset(c, 0, size_t(rows_ * C) * sizeof(float));
        if (w.scales != nullptr) {
            if (rest > 0) tiles(0, rows_, cols, whole, rest, odd, panel_, c);
            rest = 0;
            for (int64_t i = 0; i < rows_; ++i)
                for (int64_t j = 0; j < cols; ++j) c[i * C + j] *= w.scales[first + j];
        }
        go_on(first, cols, rest, c);
    }

  private:
    static constexpr int64_t kWide = S::W * Q::kStep;

    // The same where the weight's words are kept.
    void multiply_words(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        constexpr int64_t kElements = 2 / Q::kStep;  // of a word
        const int64_t depth = Q::depth(k_), whole = depth / kDepth * kDepth, nv = ceil_div(cols, S::W);
        const uint32_t* panel = w.panel(first);
        // Rows [begin, end) of to (+)= those of x from element k0 on * a run of words.
        const auto run = [&](int64_t begin, int64_t end, int64_t k0, const WordRun& words, float* to, bool accumulate,
                             const WordsAhead* ahead) {
            const Rows x{x_.data + 4 * k0, x_.stride, false};
            for (int64_t i = begin; i < end; i += kWordRows<S, T>)
                words_tile_of<S, T>(min64(kWordRows<S, T>, end - i), nv, x.at(i), words, to + i * C, C, accumulate,
                                    i == begin ? ahead : nullptr);
        };
        const auto chunk = [&](int64_t k0, int64_t count, float* to, bool accumulate) {
            const uint32_t* words = panel + k0 / kElements * C;
            const WordsAhead ahead(words, (depth - k0) / kElements, next);
            if (widens_once(rows_)) {
                words_to_panel<S, T>(words, count / kElements, panel_, ahead);
                return tiles(0, rows_, cols, k0, count, false, panel_, to);
            }
            run(0, rows_, k0, {words, count / kElements}, to, accumulate, &ahead);
        };
        bool tails = false, own = !widens_once(rows_);  // own: all tails are words too
        for (const RowGroup<T>* g = groups_; g < groups_ + n_groups_; ++g) {
            tails = tails || g->width > 0;
            own = own && (g->width == 0 || g->words != nullptr);
            g->fetch(w, first, cols, 1, C);
        }
        if (depth == 0) std::memset(c, 0, size_t(rows_ * C) * sizeof(float));
        for (int64_t k0 = 0; k0 < whole; k0 += kDepth) chunk(k0, kDepth, c, k0 > 0);
        const int64_t rest = depth - whole;
        if (rest > 0 && !tails) chunk(whole, rest, c, whole > 0);
        if (!tails) return;
        // What W leaves of a chunk of kDepth goes on with B.
        if (own) {
            const uint32_t* left = panel + whole / kElements * C;
            const WordsAhead ahead(left, rest / kElements, next);
            for (const RowGroup<T>* g = groups_; g < groups_ + n_groups_; ++g) {
                const int64_t tail = Q::depth(g->width), room = rest > 0 ? min64(kDepth - rest, tail) : 0;
                const uint32_t* more = tail > 0 ? g->panel(w, first) : nullptr;
                const Range mine = tail > 0 ? g->own(w, first, cols, 1) : Range{0, 0};
                // Those of a chunk, elements [t, end) of the tail.
                const auto of_chunk = [&](int64_t t, int64_t end) {
                    const int64_t from = max64(mine.begin, t / kElements);
                    return Range{from, max64(from, min64(mine.end, end / kElements))};
                };
                if (rest > 0) {
                    const Range r = of_chunk(0, room);
                    run(g->begin, g->end, whole, {left, rest / kElements, more + r.begin * C, r.end - r.begin, r.begin},
                        c, whole > 0, g == groups_ ? &ahead : nullptr);
                }
                for (int64_t t = room; t < tail; t += kDepth) {
                    const Range r = of_chunk(t, min64(t + kDepth, tail));
                    if (r.begin < r.end)
                        run(g->begin, g->end, depth + r.begin * kElements, {more + r.begin * C, r.end - r.begin}, c,
                            true, nullptr);
                }
            }
            return;
        }
        if constexpr (Q::kWidensWords) {
            if (fits_straight_ && cols % S::W == 0) {
                if (whole == 0) std::memset(c, 0, size_t(rows_ * C) * sizeof(float));
                if (rest > 0) chunk(whole, rest, straight_.begun(), false);
                for (int64_t g = 0; g < n_groups_; ++g) straight_.tail(groups_[g], first, nv, rest, c);
                return;
            }
        }
        if (rest > 0) {
            const uint32_t* words = panel + whole / kElements * C;
            words_to_panel<S, T>(words, rest / kElements, panel_, WordsAhead(words, rest / kElements, next));
        }
        go_on(first, cols, rest, c);
    }

    // c (+)= what is left: `rest` elements of W, which are in panel_, and every group's B.
    void go_on(int64_t first, int64_t cols, int64_t rest, float* c) const {
        const int64_t depth = Q::depth(k_), whole = depth / kDepth * kDepth;
        for (const RowGroup<T>* g = groups_; g < groups_ + n_groups_; ++g) {
            const int64_t tail = Q::depth(g->width), room = rest > 0 ? min64(kDepth - rest, tail) : 0;
            const bool half = (g->width > 0 ? g->width : k_) % Q::kStep != 0;
            P* separate = panel_ + kDepth * C;
            if (rest > 0) {
                if (room > 0) pack_tail(*g, first, cols, 0, room, panel_ + rest * C);
                tiles(g->begin, g->end, cols, whole, rest + room, half && room == tail, panel_, c);
            }
            for (int64_t t = room; t < tail; t += kDepth) {
                const int64_t count = min64(kDepth, tail - t);
                pack_tail(*g, first, cols, t, count, separate);
                tiles(g->begin, g->end, cols, depth + t, count, half && t + count == tail, separate, c);
            }
        }
    }

    // A tile's worth of rows is better multiplied with a transposed weight: then the weight's own columns fill lanes.
    // And a weight that has to be widened for every panel of x is better widened once.
    static bool in_place(const WeightRows<T>& w, int64_t rows) {
        if (w.words != nullptr) return false;
        if (Q::kWidensWords && (rows <= Straight::kMost || rows > C)) return false;
        return FewRowsInPlace<S, T>::kPossible && rows > S::kMr;
    }

    // Whether words become a panel for many rows, instead of being widened by each tile.
    static bool widens_once(int64_t rows) { return Q::kWidensWords && rows > C; }

    // `count` elements of k from k0 on, W at a time.
    void pack_weight(const WeightRows<T>& w, int64_t first, int64_t cols, int64_t k0, int64_t count,
                     Prefetch* next) const {
        for (int64_t kk = 0; kk < count; kk += S::W) {
            const int64_t at = (k0 + kk) * Q::kStep, n = min64(min64(S::W, count - kk) * Q::kStep, k_ - at);
            const T* from = static_cast<const T*>(w.data) + first * w.stride + at;
            int64_t stride = w.stride;
            if (w.scales != nullptr) {
                for (int64_t j = 0; j < cols; ++j) w.copy(first + j, at, n, unpacked_ + j * kWide);
                from = unpacked_, stride = kWide;
            }
            pack_panel<S, T>(from, stride, 1, cols, n, panel_ + kk * C);
            next->some();
        }
    }

    void pack_tail(const RowGroup<T>& g, int64_t first, int64_t cols, int64_t k0, int64_t count, P* to) const {
        const int64_t at = k0 * Q::kStep;
        pack_panel<S, T>(g.b + first * g.stride + at, g.stride, 1, cols, min64(count * Q::kStep, g.width - at), to);
    }

    void tiles(int64_t begin, int64_t end, int64_t cols, int64_t k0, int64_t count, bool half, const P* panel,
               float* c) const {
        const int64_t nv = ceil_div(cols, S::W);
        for (int64_t i = begin; i < end; i += S::kMr)
            tile_of<S, T>(min64(S::kMr, end - i), nv, {x_.data + i * x_.stride + 4 * k0, x_.stride, half}, panel, count,
                          c + i * C, C, k0 > 0);
    }

    const RowGroup<T>* groups_;
    int64_t n_groups_, rows_, k_;
    bool is_in_place_;
    Rows x_;
    P* panel_;     // [2 kDepth][C]
    T* unpacked_;  // [C][kWide]
    float* sums_;
    FewRowsInPlace<S, T> in_place_;
    Straight straight_;
    bool fits_straight_ = false;
};

}  // namespace mint

#include "few_rows_split.h"
#include "few_rows_tiles.h"

namespace mint {

// out(i, j, count, values) for pieces of every row of x [rows, k] @ weight [n, k]^T, values padded to a vector. words:
// what is kept of the weight; what it goes on with is a tail of all rows.
template <class S, class T, class Out>
void few_rows(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t rows, int64_t n, int64_t k, Out out,
              KeptWords words = {}) {
    using X = FewRows<S, T>;
    const int64_t panels = ceil_div(n, X::C), border = words.data == nullptr ? 0 : k - words.k;
    k -= border;
    const RowGroup<T> all{0, rows, w + k, w_stride, border};
    const WeightRows<T> weight{w, w_stride, nullptr, words.data, 0, word_depth<S, T>(k)};
    Attempts attempts;
#pragma omp parallel if (panels > 1 && n * k > kSerialWork * 2)
    {
        const Range mine = my_rows(panels);
        attempts.run([&] {
            if (mine.begin == mine.end) return;
            const typename S::Tiles registers;
            const X left(weight, x, x_stride, k, &all, 1, 1);
            for (int64_t p = mine.begin; p < mine.end; ++p) {
                const int64_t j = p * X::C, ahead = j + X::C;
                Prefetch next;
                if (p + 1 < mine.end)
                    next = weight.ahead(ahead, min64(X::C, n - ahead), k, X::prefetch_calls(weight, rows, k));
                left.multiply(weight, j, min64(X::C, n - j), left.sums(), &next);
                for (int64_t i = 0; i < rows; ++i) out(i, j, min64(X::C, n - j), left.sums() + i * X::C);
            }
        });
    }
    attempts.finish();
}

}  // namespace mint
