// few_rows.h for a handful of rows where a weight's elements have to be widened, bf16 without a dot of pairs or int8:
// blocks of the weight are turned in registers, widened and meet x there. A panel would be written and read for
// nothing, as hardly anybody else uses it.
#pragma once
#include "gemm.h"
#include "weight_rows.h"

namespace mint {

// Elements of k in a block: 16 bytes of each row.
template <class E>
constexpr int64_t straight_block = 16 / int64_t(sizeof(E));

// What multiplication I of a word of a weight's elements takes: an element of it, or with a dot of bf16 a pair.
template <class S, class T, class E, int I>
MINT_INLINE auto widened_operand(typename S::Words word) {
    if constexpr (Panel<S, T>::kPairs) {
        return S::template widened_pairs<E, I>(word);
    } else {
        return S::template widened<E, I>(word);
    }
}

// acc + 4 bytes of packed x, for all lanes, * what widened_operand gives.
template <class S, class T, class Operand>
MINT_INLINE typename S::F add_product(typename S::F acc, const char* x, Operand value) {
    if constexpr (Panel<S, T>::kPairs) {
        uint32_t pair;
        std::memcpy(&pair, x, 4);
        return S::dot(acc, S::set1_pair(pair), value);
    } else {
        float one;
        std::memcpy(&one, x, 4);
        return S::fma(S::set1(one), value, acc);
    }
}

// c[M][ldc] (+)= M rows of packed x with Nv * W rows of a weight (bf16 or int8) `stride` apart, over `count` elements
// of k, whole blocks, after the sums at `from`, if any. As register_tile sums them.
template <class S, class T, class E, int M, int Nv>
void straight_tile(Rows x, const E* w, int64_t stride, int64_t count, const float* from, float* c, int64_t ldc,
                   bool accumulate, Prefetch* next) {
    constexpr int kBlock = int(straight_block<E>), kPerWord = 4 / int(sizeof(E)) / Panel<S, T>::kStep;
    typename S::F acc[M][Nv];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < Nv; ++j) acc[i][j] = from == nullptr ? S::zero() : S::load(from + i * ldc + j * S::W);
    constexpr int kWords = 4, kTogether = M == 1 ? Nv : 1;  // of one row, sums that take turns
    const char* rows[M];
    for (int i = 0; i < M; ++i) rows[i] = x.data + i * x.stride;
    for (int64_t kk = 0; kk < count; kk += kBlock)
        for (int j0 = 0; j0 < Nv; j0 += kTogether) {
            typename S::Words words[kTogether][kWords];
            for (int j = 0; j < kTogether; ++j) {
                next->some();  // a line or two: more at once would wait for each other
                S::transpose_words(w + (j0 + j) * S::W * stride + kk, stride * int64_t(sizeof(E)), words[j]);
            }
            const int64_t at = kk / Panel<S, T>::kStep * 4;  // bytes of x
            const auto add = [&](int p, auto element) __attribute__((always_inline)) {
                constexpr int e = decltype(element)::value;
                for (int j = 0; j < kTogether; ++j) {
                    const auto value = widened_operand<S, T, E, e>(words[j][p]);
                    for (int i = 0; i < M; ++i)
                        acc[i][j0 + j] =
                            add_product<S, T>(acc[i][j0 + j], rows[i] + at + (p * kPerWord + e) * 4, value);
                }
            };
            for (int p = 0; p < kWords; ++p) {
                add(p, std::integral_constant<int, 0>());
                if constexpr (kPerWord > 1) add(p, std::integral_constant<int, 1>());
                if constexpr (kPerWord > 2) {
                    add(p, std::integral_constant<int, 2>());
                    add(p, std::integral_constant<int, 3>());
                }
            }
        }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < Nv; ++j) {
            float* p = c + i * ldc + j * S::W;
            S::store(p, accumulate ? S::add(S::load(p), acc[i][j]) : acc[i][j]);
        }
}

// Packed rows of x; kept by its thread until the next one is prepared.
template <class S, class T>
class FewRowsStraight {
    using Q = Panel<S, T>;
    static constexpr int64_t C = Q::kCols;

  public:
    static constexpr int64_t kMost = 8;                              // rows
    static constexpr bool kPossible = Q::kPairs || Q::kWidensWords;  // with a dot of pairs only for int8

    // Whether a group's tail can be added so: there are only whole blocks.
    static bool fits(const RowGroup<T>& g) {
        return Q::kWidensWords && g.end - g.begin <= kMost && g.width % straight_block<bf16> == 0;
    }
    // Whether so many rows of x meet the weight here if there are only whole blocks; and whether they all do.
    static bool takes(const WeightRows<T>& w, int64_t rows) {
        return kPossible && (Q::kWidensWords || w.scales != nullptr) && rows <= kMost;
    }
    static bool fits(const WeightRows<T>& w, int64_t k, const RowGroup<T>* groups, int64_t n_groups) {
        bool all = takes(w, groups[n_groups - 1].end) && k % straight_block<int8_t> == 0;
        for (int64_t g = 0; g < n_groups; ++g) all = all && groups[g].width % straight_block<bf16> == 0;
        return all;
    }

    // x [rows, k + the widest tail]; `begun` is room for the sums of a panel.
    void prepare(Rows x, int64_t k, const RowGroup<T>* groups, int64_t n_groups, float* begun) {
        x_ = x, groups_ = groups, n_groups_ = n_groups, k_ = k, begun_ = begun;
        tails_ = false;
        for (int64_t g = 0; g < n_groups; ++g) tails_ = tails_ || groups[g].width > 0;
    }

    float* begun() const { return begun_; }
    static int64_t prefetch_calls(const WeightRows<T>& w, int64_t k) {
        return ceil_div(k, w.scales == nullptr ? straight_block<T> : straight_block<int8_t>) * S::kNv;
    }

    // See FewRows; cols are whole vectors.
    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        const int64_t rows = groups_[n_groups_ - 1].end, nv = cols / S::W, rest = k_ % kChunk;
        // What W leaves of a chunk goes on with B: those sums are begun, and not added yet.
        const bool goes_on = tails_ && rest > 0 && w.scales == nullptr;
        const int64_t finished = goes_on ? k_ - rest : k_;
        if (finished == 0) std::memset(c, 0, size_t(rows * C) * sizeof(float));
        for (int64_t k0 = 0; k0 < k_; k0 += kChunk) {
            const bool done = k0 < finished;
            const auto chunk = [&](const auto* data) __attribute__((always_inline)) {
                tiles(rows, nv, x_at(0, k0), data + first * w.stride + k0, w.stride, min64(kChunk, k_ - k0), nullptr,
                      done ? c : begun_, done && k0 > 0, next);
            };
            if constexpr (Q::kWidensWords) {
                if (w.scales == nullptr) {
                    chunk(static_cast<const T*>(w.data));
                    continue;
                }
            }
            chunk(static_cast<const int8_t*>(w.data));
        }
        if (w.scales != nullptr)
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < cols; ++j) c[i * C + j] *= w.scales[first + j];
        for (int64_t g = 0; g < n_groups_ && tails_; ++g) tail(groups_[g], first, nv, goes_on ? rest : 0, c);
    }

    // The group's rows of c: what is begun (`rest` elements of a chunk) goes on with the group's B, and is added.
    void tail(const RowGroup<T>& g, int64_t first, int64_t nv, int64_t rest, float* c) const {
        const int64_t many = g.end - g.begin, room = rest > 0 ? min64(kChunk - rest, g.width) : 0;
        Prefetch none;
        const auto add = [&](int64_t t, int64_t count, const float* from) {
            tiles(many, nv, x_at(g.begin, k_ + t), g.b + first * g.stride + t, g.stride, count, from, c + g.begin * C,
                  true, &none);
        };
        if (rest > 0) add(0, room, begun_ + g.begin * C);
        for (int64_t t = room; t < g.width; t += kChunk) add(t, min64(kChunk, g.width - t), nullptr);
    }

  private:
    static constexpr int64_t kChunk = kDepth * Q::kStep;  // of k, whose sums begin from 0

    Rows x_at(int64_t row, int64_t k) const { return {x_.data + row * x_.stride + k / Q::kStep * 4, x_.stride, false}; }

    // straight_tile for m <= M rows and nv vectors.
    template <class E, int M = kMost>
    void tiles(int64_t m, int64_t nv, Rows x, const E* w, int64_t stride, int64_t count, const float* from, float* c,
               bool accumulate, Prefetch* next) const {
        if constexpr (M > 1) {
            if (m < M) return tiles<E, M - 1>(m, nv, x, w, stride, count, from, c, accumulate, next);
        }
        if (m == 0) return;
        constexpr int Nv = M <= 2 ? S::kNv : 1;  // what the registers hold beside a block
        if (Nv == nv) return straight_tile<S, T, E, M, Nv>(x, w, stride, count, from, c, C, accumulate, next);
        for (int64_t j = 0; j < nv; ++j)
            straight_tile<S, T, E, M, 1>(x, w + j * S::W * stride, stride, count,
                                         from == nullptr ? nullptr : from + j * S::W, c + j * S::W, C, accumulate,
                                         next);
    }

    Rows x_{};
    int64_t k_ = 0, n_groups_ = 0;
    const RowGroup<T>* groups_ = nullptr;
    bool tails_ = false;
    float* begun_ = nullptr;
};

}  // namespace mint
