// few_rows.h for more than a handful of rows: the weight's rows are the left operand, read where they lie, an element
// for all lanes at a time; x's rows are the columns of the right one, packed once for a product. The sums are turned at
// the end.
//
// Transposing a weight takes 64 shuffles a KB. For one row memory is slower still; from some rows on the multiply-adds
// are what takes time, and here hardly anything stands beside them.
#pragma once
#include "few_rows_straight.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

constexpr int64_t kInPlaceStep = 8;  // elements of k between two chances to fetch ahead

// to[r][ld] (+)= the products of R rows of a weight (a) with V vectors of packed x, after the sums at `from`, if any.
template <class S, class T, int R, int V>
void in_place_tile(Rows a, const typename Panel<S, T>::P* x, int64_t depth, const float* from, float* to, int64_t ld,
                   bool accumulate, Prefetch* next) {
    using Q = Panel<S, T>;
    typename S::F acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = from == nullptr ? S::zero() : S::load(from + r * ld + v * S::W);
    const char* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = a.data + r * a.stride;
    // One element of k of all rows: a word of both operands, or of a bf16 weight what widen(row) makes.
    const auto add = [&](int64_t kk, auto widen) __attribute__((always_inline)) {
        const auto* line = x + kk * Q::kCols;
        if constexpr (Q::kPairs) {
            typename S::B b[V];
            for (int v = 0; v < V; ++v) b[v] = S::load_pairs(line + v * S::W);
            for (int r = 0; r < R; ++r) {
                uint32_t pair;
                std::memcpy(&pair, rows[r] + 4 * kk, 4);
                const auto w = S::set1_pair(pair);
                for (int v = 0; v < V; ++v) acc[r][v] = S::dot(acc[r][v], w, b[v]);
            }
        } else {
            typename S::F b[V];
            for (int v = 0; v < V; ++v) b[v] = S::load(line + v * S::W);
            for (int r = 0; r < R; ++r) {
                const auto w = widen(reinterpret_cast<const T*>(rows[r]) + kk);
                for (int v = 0; v < V; ++v) acc[r][v] = S::fma(w, b[v], acc[r][v]);
            }
        }
    };
    const auto alone = [](const T* w) __attribute__((always_inline)) { return S::set1(to_float(*w)); };
    const auto after_another = [alone](const T* w) __attribute__((always_inline)) {
        if constexpr (Q::kWidensWords) {
            uint32_t word;  // with the element before: then a mask widens, which takes no scalar steps
            std::memcpy(&word, w - 1, 4);
            return S::template widened<bf16, 1>(S::set1_word(word));
        } else {
            return alone(w);
        }
    };
    const int64_t whole = depth - (a.half ? 1 : 0);
    int64_t kk = 0;
    if (!Q::kPairs && whole > 0) add(kk++, alone);
    for (int64_t k0 = 0; k0 < whole; k0 += kInPlaceStep) {
        next->some();
        for (const int64_t stop = min64(k0 + kInPlaceStep, whole); kk < stop; ++kk) add(kk, after_another);
    }
    if constexpr (Q::kPairs) {
        if (a.half)
            for (int r = 0; r < R; ++r) {
                uint16_t last;
                std::memcpy(&last, rows[r] + 4 * whole, 2);
                for (int v = 0; v < V; ++v)
                    acc[r][v] = S::dot(acc[r][v], S::set1_pair(last), S::load_pairs(x + whole * Q::kCols + v * S::W));
            }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            float* p = to + r * ld + v * S::W;
            S::store(p, accumulate ? S::add(S::load(p), acc[r][v]) : acc[r][v]);
        }
}

// The same for `rows` rows and nv <= V vectors.
template <class S, class T, int V = S::kNv>
void in_place_rows(int64_t rows, int64_t nv, Rows a, const typename Panel<S, T>::P* x, int64_t depth, const float* from,
                   float* to, int64_t ld, bool accumulate, Prefetch* next) {
    if constexpr (V > 1) {
        if (nv < V) return in_place_rows<S, T, V - 1>(rows, nv, a, x, depth, from, to, ld, accumulate, next);
    }
    int64_t r = 0;
    const auto some = [&](auto many) __attribute__((always_inline)) {
        constexpr int R = decltype(many)::value;
        for (; r + R <= rows; r += R)
            in_place_tile<S, T, R, V>({a.data + r * a.stride, a.stride, a.half}, x, depth,
                                      from == nullptr ? nullptr : from + r * ld, to + r * ld, ld, accumulate, next);
    };
    some(std::integral_constant<int, S::kMr>());  // twelve rows, streams of memory, were slower than eight
    some(std::integral_constant<int, 1>());
}

// Rows of x, packed as columns of panels; kept by its thread until the next one is prepared.
template <class S, class T>
class FewRowsInPlace {
    using Q = Panel<S, T>;
    using P = typename Q::P;
    using Straight = FewRowsStraight<S, T>;
    static constexpr int64_t C = Q::kCols;

  public:
    static constexpr bool kPossible = (Q::kInPlace || Q::kWidensWords) && S::W >= 8;

    // See FewRows.
    void prepare(const T* x, int64_t stride, int64_t k, const RowGroup<T>* groups, int64_t n_groups, int64_t buffers) {
        groups_ = groups, n_groups_ = n_groups, rows_ = groups[n_groups - 1].end, k_ = k;
        ld_ = ceil_div(rows_, C) * C;
        int64_t elements = ld_ * Q::depth(k), widest = 0;  // `widest`: of the few rows' tails
        for (int64_t g = 0; g < n_groups; ++g) {
            elements += size_of(groups[g]);
            if (Straight::fits(groups[g])) widest = max64(widest, groups[g].width);
        }
        few_ = widest > 0;
        x_ = panel_scratch<S, T>(Slot::kPanelsA, elements + rows_ * widest);
        unpacked_ = reinterpret_cast<T*>(panel_scratch<S, T>(Slot::kPanelsB, C * kDepth));
        kept_ = ceil_div(rows_, S::W) * S::W * C;
        sums_ = static_cast<float*>(scratch(Slot::kTile, size_t((buffers + 1) * kept_ + 2 * C * ld_ + C * C) * 4));
        turned_ = sums_ + (buffers + 1) * kept_, begun_ = turned_ + C * ld_, own_ = begun_ + C * ld_;
        pack_panels<S, T>(x, stride, 1, rows_, k, x_);
        P* to = tails_ = x_ + ld_ * Q::depth(k);
        for (int64_t g = 0; g < n_groups; to += size_of(groups[g++]))
            if (groups[g].width > 0)
                pack_panels<S, T>(x + groups[g].begin * stride + k, stride, 1, groups[g].end - groups[g].begin,
                                  groups[g].width, to);
        if constexpr (Q::kWidensWords) {
            for (int64_t i = 0; i < rows_ && few_; ++i)
                for_vectors<S>(widest, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                    S::store_n(to + i * widest + v, S::load_n(x + i * stride + k + v, lanes), lanes);
                });
            few_begun_ = sums(buffers);
            straight_.prepare({reinterpret_cast<const char*>(to), widest * 4, false}, 0, groups, n_groups, few_begun_);
        }
    }

    float* sums(int64_t buffer) const { return sums_ + buffer * kept_; }
    static int64_t prefetch_calls(int64_t k) { return ceil_div(C, S::kMr) * ceil_div(Q::depth(k), kInPlaceStep); }

    // See FewRows.
    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        const int64_t depth = Q::depth(k_), rest = depth % kDepth;
        bool tails = false;
        for (int64_t g = 0; g < n_groups_; ++g) tails = tails || groups_[g].width > 0;
        // What W leaves of a chunk of kDepth goes on with B: those sums are begun, and not added yet.
        const bool goes_on = tails && rest > 0 && w.scales == nullptr;
        const int64_t finished = goes_on ? depth - rest : depth;
        if (finished == 0) std::memset(turned_, 0, size_t(C * ld_) * sizeof(float));
        for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
            const bool done = k0 < finished;
            weight(w, first, cols, k0, min64(kDepth, depth - k0), done ? turned_ : begun_, done && k0 > 0, next);
        }
        if (w.scales != nullptr)
            for (int64_t j = 0; j < cols; ++j)
                for (int64_t i = 0; i < ld_; ++i) turned_[j * ld_ + i] *= w.scales[first + j];
        const bool few = few_ && cols % S::W == 0;  // then tails of few rows come after the turn
        const P* x = tails_;
        for (int64_t g = 0; g < n_groups_ && tails; x += size_of(groups_[g++]))
            if (!(few && Straight::fits(groups_[g]))) add_tail(groups_[g], first, cols, goes_on ? rest : 0, x);
        const int64_t nv = ceil_div(cols, S::W);
        turn<S>(turned_, ld_, nv * S::W, rows_, c, C);
        if constexpr (Q::kWidensWords) {
            if (few && goes_on) turn<S>(begun_, ld_, nv * S::W, rows_, few_begun_, C);
            for (int64_t g = 0; g < n_groups_ && few; ++g)
                if (Straight::fits(groups_[g])) straight_.tail(groups_[g], first, nv, goes_on ? rest : 0, c);
        }
    }

  private:
    // Elements of the packed S of a group, which is in panels of its own.
    static int64_t size_of(const RowGroup<T>& g) { return ceil_div(g.end - g.begin, C) * C * Q::depth(g.width); }

    // to (+)= `count` elements of `cols` weight rows, from element k0 on, for all rows of x.
    void weight(const WeightRows<T>& w, int64_t first, int64_t cols, int64_t k0, int64_t count, float* to,
                bool accumulate, Prefetch* next) const {
        const int64_t at = k0 * Q::kStep, n = min64(count * Q::kStep, k_ - at);
        const T* from = static_cast<const T*>(w.data) + first * w.stride + at;
        int64_t stride = w.stride;
        if (w.scales != nullptr) {
            stride = kDepth * Q::kStep, from = unpacked_;
            for (int64_t j = 0; j < cols; ++j) w.copy(first + j, at, n, unpacked_ + j * stride);
        }
        const Rows a{reinterpret_cast<const char*>(from), stride * int64_t(sizeof(T)), n % Q::kStep != 0};
        Prefetch none;
        for (int64_t i = 0; i < rows_; i += C)
            in_place_rows<S, T>(cols, ceil_div(min64(C, rows_ - i), S::W), a, x_ + i * Q::depth(k_) + k0 * C, count,
                                nullptr, to + i, ld_, accumulate, i == 0 ? next : &none);
    }

    // The group's rows: what is begun (`rest` elements of a chunk) goes on with the group's B, and is added.
    void add_tail(const RowGroup<T>& g, int64_t first, int64_t cols, int64_t rest, const P* x) const {
        const int64_t depth = Q::depth(g.width), room = rest > 0 ? min64(kDepth - rest, depth) : 0;
        Prefetch none;
        for (int64_t i = g.begin; i < g.end; i += C, x += C * depth) {
            const int64_t n = min64(C, g.end - i), nv = ceil_div(n, S::W);
            const auto product = [&](int64_t t, int64_t count, const float* before) {
                const Rows b{reinterpret_cast<const char*>(g.b + first * g.stride + t * Q::kStep),
                             g.stride * int64_t(sizeof(T)), g.width % Q::kStep != 0 && t + count == depth};
                in_place_rows<S, T>(cols, nv, b, x + t * C, count, before, own_, C, false, &none);
            };
            const auto add = [&] {
                for (int64_t j = 0; j < cols; ++j)
                    for (int64_t l = 0; l < n; ++l) turned_[j * ld_ + i + l] += own_[j * C + l];
            };
            if (rest > 0) {
                for (int64_t j = 0; j < cols; ++j)
                    std::memcpy(own_ + j * C, begun_ + j * ld_ + i, size_t(n) * sizeof(float));
                if (room > 0) product(0, room, own_);
                add();
            }
            for (int64_t t = room; t < depth; t += kDepth) {
                product(t, min64(kDepth, depth - t), nullptr);
                add();
            }
        }
    }

    const RowGroup<T>* groups_ = nullptr;
    int64_t n_groups_ = 0, rows_ = 0, k_ = 0, ld_ = 0, kept_ = 0;
    P *x_ = nullptr, *tails_ = nullptr;
    Straight straight_;  // few rows' tails
    bool few_ = false;   // there are such
    float* few_begun_ = nullptr;
    T* unpacked_ = nullptr;                                                          // [C][kDepth * kStep]
    float *sums_ = nullptr, *turned_ = nullptr, *begun_ = nullptr, *own_ = nullptr;  // [C][ld_], own_ [C][C]
};

}  // namespace mint
