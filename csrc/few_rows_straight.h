// few_rows.h for a handful of rows where bf16 has no dot of pairs: blocks of the weight are turned in registers,
// widened and meet x there. A panel would be written and read for nothing, as hardly anybody else uses it.
#pragma once
#include "gemm.h"
#include "weight_rows.h"

namespace mint {

// Elements of k in a block: 16 bytes of each row.
template <class E>
constexpr int64_t straight_block = 16 / int64_t(sizeof(E));

// c[M][ldc] (+)= M rows of x, widened, with Nv * W rows of a weight (bf16 or int8) `stride` apart, over `count`
// elements of k, whole blocks, after the sums at `from`, if any. As register_tile sums them.
template <class S, class E, int M, int Nv>
void straight_tile(const float* x, int64_t x_stride, const E* w, int64_t stride, int64_t count, const float* from,
                   float* c, int64_t ldc, bool accumulate, Prefetch* next) {
    constexpr int kBlock = int(straight_block<E>), kPerWord = 4 / int(sizeof(E));
    typename S::F acc[M][Nv];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < Nv; ++j) acc[i][j] = from == nullptr ? S::zero() : S::load(from + i * ldc + j * S::W);
    constexpr int kWords = kBlock / kPerWord, kTogether = M == 1 ? Nv : 1;  // of one row, sums that take turns
    const float* rows[M];
    for (int i = 0; i < M; ++i) rows[i] = x + i * x_stride;
    for (int64_t kk = 0; kk < count; kk += kBlock)
        for (int j0 = 0; j0 < Nv; j0 += kTogether) {
            typename S::Words words[kTogether][kWords];
            for (int j = 0; j < kTogether; ++j) {
                next->some();  // a line or two: more at once would wait for each other
                S::transpose_words(w + (j0 + j) * S::W * stride + kk, stride * int64_t(sizeof(E)), words[j]);
            }
            const auto add = [&](int p, auto element) __attribute__((always_inline)) {
                constexpr int e = decltype(element)::value;
                for (int j = 0; j < kTogether; ++j) {
                    const auto value = S::template widened<E, e>(words[j][p]);
                    for (int i = 0; i < M; ++i)
                        acc[i][j0 + j] = S::fma(S::set1(rows[i][kk + p * kPerWord + e]), value, acc[i][j0 + j]);
                }
            };
            for (int p = 0; p < kWords; ++p) {
                add(p, std::integral_constant<int, 0>());
                add(p, std::integral_constant<int, 1>());
                if constexpr (kPerWord == 4) {
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

// Rows of x, widened; kept by its thread until the next one is prepared.
template <class S, class T>
class FewRowsStraight {
    using Q = Panel<S, T>;
    static constexpr int64_t C = Q::kCols;

  public:
    static constexpr int64_t kMost = 8;  // rows

    // Whether a group's tail can be added so: there are only whole blocks.
    static bool fits(const RowGroup<T>& g) {
        return Q::kWidensWords && g.end - g.begin <= kMost && g.width % straight_block<bf16> == 0;
    }
    static bool fits(int64_t k, const RowGroup<T>* groups, int64_t n_groups) {
        bool all = groups[n_groups - 1].end <= kMost && k % straight_block<int8_t> == 0;
        for (int64_t g = 0; g < n_groups; ++g) all = all && fits(groups[g]);
        return all;
    }

    // x [rows, k + the widest tail], widened; `begun` is room for the sums of a panel.
    void prepare(const float* x, int64_t stride, int64_t k, const RowGroup<T>* groups, int64_t n_groups, float* begun) {
        x_ = x, x_stride_ = stride, groups_ = groups, n_groups_ = n_groups, k_ = k, begun_ = begun;
        tails_ = false;
        for (int64_t g = 0; g < n_groups; ++g) tails_ = tails_ || groups[g].width > 0;
    }

    float* begun() const { return begun_; }
    static int64_t prefetch_calls(int64_t k) { return ceil_div(k, straight_block<bf16>) * S::kNv; }

    // See FewRows; cols are whole vectors.
    void multiply(const WeightRows<T>& w, int64_t first, int64_t cols, float* c, Prefetch* next) const {
        const int64_t rows = groups_[n_groups_ - 1].end, nv = cols / S::W, rest = k_ % kDepth;
        // What W leaves of a chunk of kDepth goes on with B: those sums are begun, and not added yet.
        const bool goes_on = tails_ && rest > 0 && w.scales == nullptr;
        const int64_t finished = goes_on ? k_ - rest : k_;
        if (finished == 0) std::memset(c, 0, size_t(rows * C) * sizeof(float));
        for (int64_t k0 = 0; k0 < k_; k0 += kDepth) {
            const bool done = k0 < finished;
            const auto chunk = [&](const auto* data) __attribute__((always_inline)) {
                tiles(rows, nv, x_ + k0, data + first * w.stride + k0, w.stride, min64(kDepth, k_ - k0), nullptr,
                      done ? c : begun_, done && k0 > 0, next);
            };
            w.scales == nullptr ? chunk(static_cast<const T*>(w.data)) : chunk(static_cast<const int8_t*>(w.data));
        }
        if (w.scales != nullptr)
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < cols; ++j) c[i * C + j] *= w.scales[first + j];
        for (int64_t g = 0; g < n_groups_ && tails_; ++g) tail(groups_[g], first, nv, goes_on ? rest : 0, c);
    }

    // The group's rows of c: what is begun (`rest` elements of a chunk) goes on with the group's B, and is added.
    void tail(const RowGroup<T>& g, int64_t first, int64_t nv, int64_t rest, float* c) const {
        const int64_t many = g.end - g.begin, room = rest > 0 ? min64(kDepth - rest, g.width) : 0;
        Prefetch none;
        const auto add = [&](int64_t t, int64_t count, const float* from) {
            tiles(many, nv, x_ + g.begin * x_stride_ + k_ + t, g.b + first * g.stride + t, g.stride, count, from,
                  c + g.begin * C, true, &none);
        };
        if (rest > 0) add(0, room, begun_ + g.begin * C);
        for (int64_t t = room; t < g.width; t += kDepth) add(t, min64(kDepth, g.width - t), nullptr);
    }

  private:
    // straight_tile for m <= M rows and nv vectors.
    template <class E, int M = kMost>
    void tiles(int64_t m, int64_t nv, const float* x, const E* w, int64_t stride, int64_t count, const float* from,
               float* c, bool accumulate, Prefetch* next) const {
        if constexpr (M > 1) {
            if (m < M) return tiles<E, M - 1>(m, nv, x, w, stride, count, from, c, accumulate, next);
        }
        if (m == 0) return;
        constexpr int Nv = M <= 2 ? S::kNv : 1;  // what the registers hold beside a block
        if (Nv == nv) return straight_tile<S, E, M, Nv>(x, x_stride_, w, stride, count, from, c, C, accumulate, next);
        for (int64_t j = 0; j < nv; ++j)
            straight_tile<S, E, M, 1>(x, x_stride_, w + j * S::W * stride, stride, count,
                                      from == nullptr ? nullptr : from + j * S::W, c + j * S::W, C, accumulate, next);
    }

    const float* x_ = nullptr;
    int64_t x_stride_ = 0, k_ = 0, n_groups_ = 0;
    const RowGroup<T>* groups_ = nullptr;
    bool tails_ = false;
    float* begun_ = nullptr;
};

}  // namespace mint
