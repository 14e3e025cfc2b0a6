// few_rows.h where the weight's words are kept in panels (weight_words): pairs of bf16 that are neighbours in k, as the
// register tile or the tiles (few_rows_tiles.h) read them. Nothing is transposed, and memory is read in the order in
// which it lies.
#pragma once
#include "check.h"
#include "gemm.h"
#include "weight_rows.h"

namespace mint {

template <class S, class T>
constexpr bool kReadsWords = Panel<S, T>::kPairs || Panel<S, T>::kWidensWords;

// Words of a kept row of k elements.
template <class S, class T>
int64_t word_depth(int64_t k) {
    return Panel<S, T>::kPairs ? Panel<S, T>::depth(k) : k / 2;
}

// Rows of a tile: where words are widened the masks want registers, too, and of AVX2's sixteen none is left; one sum on
// the stack takes twice the time.
template <class S, class T>
constexpr int kWordRows = Panel<S, T>::kWidensWords && S::W == 8 ? S::kMr - 1 : S::kMr;

constexpr int64_t kWordStep = 4;     // words between two chances to fetch ahead
constexpr int64_t kWordsAhead = 32;  // so many words

// A panel that is read from `at` on, `left` words of it; then comes the one at `next.then`. It is fetched into L1 a few
// words before: a whole panel early, into L2, as other weights are, took 4 to 13 % longer.
class WordsAhead {  // inlined everywhere: see MINT_INLINE
  public:
    __attribute__((always_inline)) WordsAhead(const uint32_t* at, int64_t left, Prefetch* next)
        : at_(reinterpret_cast<const char*>(at)), left_(left), next_(next) {}

    // What `count` words of C columns from the w-th on need.
    template <int64_t C, int64_t count = kWordStep, int64_t ahead = kWordsAhead>
    __attribute__((always_inline)) void some(int64_t w) const {
        const int64_t to = w + ahead;
        const char* p = at_ + to * C * 4;
        if (to >= left_ && next_->then != nullptr) p = next_->then + (to - left_) * C * 4;
        for (int64_t b = 0; b < count * C * 4; b += 64) __builtin_prefetch(p + b, 0, 3);
        next_->also.some<false>();
    }

  private:
    const char* at_;
    int64_t left_;
    Prefetch* next_;
};

// `count` words of a panel; then, `skip` words of x further on, as many words of another.
struct WordRun {
    const uint32_t* panel;
    int64_t count;
    const uint32_t* more = nullptr;
    int64_t many = 0, skip = 0;
};

// c[M][ldc] (+)= M rows of x * Nv vectors of columns of a panel, over the words of a run. As register_tile sums them.
// `ahead`: null where the words are near already.
template <class S, class T, int M, int Nv>
void words_tile(Rows x, const WordRun& run, float* c, int64_t ldc, bool accumulate, const WordsAhead* ahead) {
    using Q = Panel<S, T>;
    typename S::F acc[M][Nv];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Nv; ++j) acc[i][j] = S::zero();
    const char* rows[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) rows[i] = x.data + i * x.stride;
    const uint32_t *panel = run.panel, *more = run.more;
    const int64_t count = run.count, end = count + run.many;
    const auto word = [&](int64_t w, const uint32_t* line) __attribute__((always_inline)) {
        if constexpr (Q::kPairs) {
            typename S::B b[Nv];
#pragma GCC unroll 16
            for (int j = 0; j < Nv; ++j) b[j] = S::load_pairs(line + j * S::W);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                uint32_t pair;
                std::memcpy(&pair, rows[i] + 4 * w, 4);
                const auto a = S::set1_pair(pair);
#pragma GCC unroll 16
                for (int j = 0; j < Nv; ++j) acc[i][j] = S::dot(acc[i][j], a, b[j]);
            }
        } else {
            const auto add = [&](auto element) __attribute__((always_inline)) {
                constexpr int e = decltype(element)::value;
                typename S::F b[Nv];
#pragma GCC unroll 16
                for (int j = 0; j < Nv; ++j) b[j] = S::template widened<bf16, e>(S::load_words(line + j * S::W));
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) {
                    float value;
                    std::memcpy(&value, rows[i] + 8 * w + 4 * e, 4);
                    const auto a = S::set1(value);
#pragma GCC unroll 16
                    for (int j = 0; j < Nv; ++j) acc[i][j] = S::fma(a, b[j], acc[i][j]);
                }
            };
            add(std::integral_constant<int, 0>());
            add(std::integral_constant<int, 1>());
        }
    };
    int64_t w = 0;
    for (; w + kWordStep <= count; w += kWordStep) {
        if (ahead != nullptr) ahead->some<Q::kCols>(w);
#pragma GCC unroll 16
        for (int64_t s = 0; s < kWordStep; ++s) word(w + s, panel + (w + s) * Q::kCols);
    }
    for (; w < count; ++w) word(w, panel + w * Q::kCols);
    for (; w < end; ++w) word(w + run.skip, more + (w - count) * Q::kCols);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < Nv; ++j) {
            float* p = c + i * ldc + j * S::W;
            S::store(p, accumulate ? S::add(S::load(p), acc[i][j]) : acc[i][j]);
        }
}

// The tile of m <= M rows and nv <= Nv vectors.
template <class S, class T, int M = kWordRows<S, T>, int Nv = S::kNv>
MINT_INLINE void words_tile_of(int64_t m, int64_t nv, Rows x, const WordRun& run, float* c, int64_t ldc,
                               bool accumulate, const WordsAhead* ahead) {
    if constexpr (M > 1) {
        if (m < M) return words_tile_of<S, T, M - 1, Nv>(m, nv, x, run, c, ldc, accumulate, ahead);
    }
    if constexpr (Nv > 1) {
        if (nv < Nv) return words_tile_of<S, T, M, Nv - 1>(m, nv, x, run, c, ldc, accumulate, ahead);
    }
    words_tile<S, T, M, Nv>(x, run, c, ldc, accumulate, ahead);
}

// `count` words of a panel as pack_panel would have made them.
template <class S, class T>
void words_to_panel(const uint32_t* words, int64_t count, typename Panel<S, T>::P* to, const WordsAhead& ahead) {
    using Q = Panel<S, T>;
    constexpr int64_t C = Q::kCols;
    for (int64_t w = 0; w < count; ++w, words += C) {
        if (w % kWordStep == 0) ahead.some<C>(w);
        if constexpr (Q::kPairs) {
            std::memcpy(to, words, size_t(C) * 4);
            to += C;
        } else {
            for (int64_t j = 0; j < C; j += S::W) {
                const auto both = S::load_words(words + j);
                S::store(to + j, S::template widened<bf16, 0>(both));
                S::store(to + C + j, S::template widened<bf16, 1>(both));
            }
            to += 2 * C;
        }
    }
}

// found[0] = the columns of a panel of words, 0 where products of few rows read none; found[1] = the words of a row of
// k elements.
template <class S, class T>
void word_panels(int64_t k, int64_t* found) {
    found[0] = kReadsWords<S, T> ? Panel<S, T>::kCols : 0;
    found[1] = word_depth<S, T>(k);
}

// The words of `real` rows of a panel: the first word of every row, the second of every row and so on.
template <class S>
void transposed_words(const char* rows, int64_t stride, int64_t real, int64_t words, int64_t columns, uint32_t* panel) {
    constexpr int64_t W = S::W;
    for (int64_t j = 0; j < columns; j += W) {
        int64_t w = 0;
        if (j + W <= real)
            for (; w + W <= words; w += W)
                S::transpose(rows + j * stride + 4 * w, stride, reinterpret_cast<float*>(panel + w * columns + j),
                             columns);
        for (; w < words; ++w)
            for (int64_t l = j; l < j + W; ++l) {
                panel[w * columns + l] = 0;
                if (l < real) std::memcpy(panel + w * columns + l, rows + l * stride + 4 * w, 4);
            }
    }
}

// to = the words of n weight rows of k elements, k even, panel by panel, each as pack_panel would make it: zeros where
// the last one has no row and, in tiles, beyond k.
template <class S, class T>
void weight_words(const T* weight, int64_t stride, int64_t n, int64_t k, uint32_t* to) {
    const char* op = "weight_words";
    check::row_stride(op, "weight", stride, n, k);
    check::multiple(op, "k", k, 2);
    if constexpr (!kReadsWords<S, T>) {
        check::at_least(op, "words that are read here", 0, 1);
    } else {
        constexpr int64_t C = Panel<S, T>::kCols, kSize = sizeof(T);
        const int64_t panels = ceil_div(n, C), size = C * word_depth<S, T>(k);
#pragma omp parallel for schedule(static) if (n * k > kSerialWork)
        for (int64_t p = 0; p < panels; ++p) {
            const char* rows = reinterpret_cast<const char*>(weight + p * C * stride);
            transposed_words<S>(rows, stride * kSize, min64(C, n - p * C), k / 2, C, to + p * size);
            std::memset(to + p * size + C * (k / 2), 0, size_t(size - C * (k / 2)) * 4);
        }
    }
}

}  // namespace mint
