// Operands of a matrix product as the register tile reads them.
//
// An element is one fp32 or, with a bf16 dot (S::kBf16Dot), the pair (k, k+1) of bf16; elsewhere bf16 is widened when
// it is packed. The right operand goes into panels of kCols columns, k-major: element (kk, j) at kk * kCols + j, zeros
// beyond the edge. The left operand is read row by row, from where it is if its k is contiguous (a row of bf16 is a row
// of pairs), else from a copy. Tiles (S::kTiles) come in whole ones: copies are padded with zeros to kUnit elements of
// k, and of rows that stay in place the last elements and the last rows are copied. There is room for kRows rows, but
// those beyond the last are undefined: so are their sums, which nobody reads. What tiles multiply of fp32 has an order
// of its own: split_panels.h.
#pragma once
#include <type_traits>

#include "prefetch.h"
#include "scratch.h"
#include "split_panels.h"

namespace mint {

constexpr int64_t kDepth =
    128;  // elements summed in registers at a time: with 256, fp32 errors were 1.2 to 1.4 times MKL's

template <class S, class T>
struct Panel {
    static constexpr bool kPairs = S::kBf16Dot && std::is_same_v<T, bf16>;
    static constexpr bool kTiles = S::kTiles && (kPairs || std::is_same_v<T, float>);
    static constexpr bool kSplit = kTiles && !kPairs;                                  // fp32 in three parts of bf16
    static constexpr bool kInPlace = kPairs || (std::is_same_v<T, float> && !kSplit);  // read from T as it is
    static constexpr bool kWidensWords = S::kWidensWords && std::is_same_v<T, bf16>;
    using P = std::conditional_t<kPairs || kSplit, uint32_t, float>;
    static constexpr int kStep = kPairs ? 2 : 1;                 // k per element; not of kSplit
    static constexpr int kUnit = kSplit ? 48 : kTiles ? 16 : 1;  // depths are multiples of it
    static constexpr int kUnitK = kTiles ? 32 : kStep;           // k of a unit
    static constexpr int kCalls = kSplit ? 2 : 1;                // of multiply_panel's each(), for a unit
    static constexpr int kRows = kTiles ? 32 : S::kMr;           // rows multiplied at a time
    static constexpr int kCols = kTiles ? 32 : S::kNv * S::W;    // columns of a panel
    static int64_t depth(int64_t k) { return ceil_div(k, kUnitK) * kUnit; }
    static int64_t k_of(int64_t depth) { return depth / kUnit * kUnitK; }
};

// Rows of the left operand: element kk of row r at data + r * stride + 4 * kk, in bytes. `half`: the last element of a
// row ends after its first k, and what follows it in memory is not ours to read.
struct Rows {
    const char* data;
    int64_t stride;
    bool half;
    const char* tail = nullptr;  // if not null, where the last kUnit elements are, rows of 64 bytes
    const char* edge = nullptr;  // if not null, where the rows from edge_from on are, padded
    int64_t edge_from = 0, edge_stride = 0;
    int64_t exact = 0;  // of a weight's rows in three parts: how many units, from the first on, have only high ones

    // Rows i and on, i a multiple of kRows.
    Rows at(int64_t i) const {
        if (edge != nullptr && i >= edge_from) return {edge + (i - edge_from) * edge_stride, edge_stride, false};
        return {data + i * stride, stride, half, tail == nullptr ? nullptr : tail + i * 64, nullptr, 0, 0, exact};
    }
};

template <class S, class T>
typename Panel<S, T>::P* panel_scratch(Slot slot, int64_t elements) {
    return static_cast<typename Panel<S, T>::P*>(scratch(slot, size_t(elements) * 4));
}

template <class S, class T>
MINT_INLINE typename Panel<S, T>::P panel_element(const T* p, int64_t stride_k, bool second) {
    if constexpr (Panel<S, T>::kPairs) {
        return uint32_t(p[0].bits) | (second ? uint32_t(p[stride_k].bits) << 16 : 0u);
    } else {
        (void)stride_k, (void)second;
        return to_float(*p);
    }
}

// Element kk of k values that are stride_k apart; zeros beyond them.
template <class S, class T>
MINT_INLINE typename Panel<S, T>::P padded_element(const T* p, int64_t stride_k, int64_t kk, int64_t k) {
    constexpr int kStep = Panel<S, T>::kStep;
    if (kk * kStep >= k) return 0;
    return panel_element<S, T>(p + kk * kStep * stride_k, stride_k, (kk + 1) * kStep <= k);
}

// W elements of neighbouring columns (or rows): those of one kk, k-stride apart in memory.
template <class S, class T>
MINT_INLINE void pack_across(const T* p, int64_t stride_k, typename Panel<S, T>::P* dst) {
    if constexpr (Panel<S, T>::kPairs) {
        S::interleave(p, p + stride_k, dst);
    } else {
        (void)stride_k;
        S::store(dst, S::load(p));
    }
}

// pack_panel (below) of elements that are not split.
template <class S, class T>
void pack_whole_panel(const T* src, int64_t stride_c, int64_t stride_k, int64_t n, int64_t k,
                      typename Panel<S, T>::P* dst) {
    using Q = Panel<S, T>;
    constexpr int C = Q::kCols, kAhead = 16;
    const int64_t depth = Q::depth(k), whole = k / Q::kStep;  // whole: elements without a k edge
    if (stride_c == 1 && n == C) {                            // columns contiguous: interleave or copy
        for (int64_t kk = 0; kk < whole; ++kk) {
            const T* p = src + kk * Q::kStep * stride_k;
            // The next rows are a stride away, where the hardware does not look.
            for (int s = 0; s < Q::kStep; ++s)
                for (int j = 0; j < C; j += 64 / int(sizeof(T))) __builtin_prefetch(p + j + (kAhead + s) * stride_k);
            for (int j = 0; j < C; j += S::W) pack_across<S, T>(p + j, stride_k, dst + kk * C + j);
        }
        for (int64_t kk = whole; kk < depth; ++kk)
            for (int j = 0; j < C; ++j) dst[kk * C + j] = padded_element<S, T>(src + j, stride_k, kk, k);
        return;
    }
    int64_t j0 = 0;
    if (stride_k == 1) {  // k contiguous: transpose W x W elements
        for (; j0 + S::W <= n; j0 += S::W) {
            const T* cols = src + j0 * stride_c;
            int64_t kk = 0;
            for (; kk + S::W <= whole; kk += S::W) {
                if constexpr (Q::kInPlace) {
                    S::transpose(cols + kk * Q::kStep, stride_c * int64_t(sizeof(T)), dst + kk * C + j0, C);
                } else {
                    S::widen_transposed(cols + kk, stride_c, dst + kk * C + j0, C);
                }
            }
            for (; kk < depth; ++kk)
                for (int j = 0; j < S::W; ++j)
                    dst[kk * C + j0 + j] = padded_element<S, T>(cols + j * stride_c, 1, kk, k);
        }
    }
    if (stride_c == 1) {  // fewer columns than a panel has, contiguous
        for (; j0 + S::W <= n; j0 += S::W) {
            for (int64_t kk = 0; kk < whole; ++kk)
                pack_across<S, T>(src + j0 + kk * Q::kStep * stride_k, stride_k, dst + kk * C + j0);
            for (int64_t kk = whole; kk < depth; ++kk)
                for (int j = 0; j < S::W; ++j)
                    dst[kk * C + j0 + j] = padded_element<S, T>(src + j0 + j, stride_k, kk, k);
        }
    }
    const int64_t vectors = ceil_div(n, S::W) * S::W;  // the columns that a product of n computes
    for (int64_t j = j0; j < vectors; ++j) {
        if (j >= n) {
            for (int64_t kk = 0; kk < depth; ++kk) dst[kk * C + j] = 0;
            continue;
        }
        const T* p = src + j * stride_c;
        for (int64_t kk = 0; kk < depth; ++kk) dst[kk * C + j] = padded_element<S, T>(p, stride_k, kk, k);
    }
}

// One panel of a right operand whose element (kk, j) is src[j * stride_c + kk * stride_k], n columns of it real. Of the
// first `exact` units of fp32 in parts only the high ones are written (split_panels.h).
template <class S, class T>
void pack_panel(const T* src, int64_t stride_c, int64_t stride_k, int64_t n, int64_t k, typename Panel<S, T>::P* dst,
                int64_t exact = 0) {
    if constexpr (Panel<S, T>::kSplit) {
        split_panel<S>(src, stride_c, stride_k, n, k, dst, exact);
    } else {
        (void)exact;
        pack_whole_panel<S, T>(src, stride_c, stride_k, n, k, dst);
    }
}

// All panels of a right operand of n columns, one after the other, each depth(k) * kCols elements. With `skip`: returns
// how many units of all of them are bf16, from the first on, of which only the high parts were written.
template <class S, class T>
int64_t pack_panels(const T* src, int64_t stride_c, int64_t stride_k, int64_t n, int64_t k,
                    typename Panel<S, T>::P* dst, bool skip = false) {
    using Q = Panel<S, T>;
    int64_t exact = 0;
    if constexpr (Q::kSplit) {
        if (skip) exact = exact_units<S>(src, stride_c, stride_k, n, k);
    }
    for (int64_t j = 0; j < n; j += Q::kCols, dst += Q::depth(k) * Q::kCols)
        pack_panel<S, T>(src + j * stride_c, stride_c, stride_k, min64(Q::kCols, n - j), k, dst, exact);
    return exact;
}

// Of n rows of k elements that stay in place: copies of the last elements where they do not fill a unit, and of the
// last rows where they do not fill kRows.
template <class S, class T>
Rows tile_rows(const T* src, int64_t stride_r, int64_t n, int64_t k, Slot slot) {
    using Q = Panel<S, T>;
    constexpr int64_t kUnit = Q::kUnit * Q::kStep;  // in k
    const int64_t depth = Q::depth(k), whole = k / kUnit * kUnit, edge = n % Q::kRows, padded = depth * Q::kStep;
    Rows rows{reinterpret_cast<const char*>(src), stride_r * int64_t(sizeof(T)), false};
    T* tail = static_cast<T*>(scratch(slot, size_t(n * kUnit + Q::kRows * padded) * sizeof(T)));
    if (whole < k && n >= Q::kRows) {
        for (int64_t r = 0; r < n - edge; ++r) {
            std::memset(tail + r * kUnit, 0, kUnit * sizeof(T));
            std::memcpy(tail + r * kUnit, src + r * stride_r + whole, size_t(k - whole) * sizeof(T));
        }
        rows.tail = reinterpret_cast<const char*>(tail);
    }
    if (edge != 0) {
        T* to = tail + n * kUnit;
        rows.edge = reinterpret_cast<const char*>(to);
        rows.edge_from = n - edge, rows.edge_stride = padded * int64_t(sizeof(T));
        for (int64_t r = 0; r < edge; ++r, to += padded) {
            std::memcpy(to, src + (n - edge + r) * stride_r, size_t(k) * sizeof(T));
            std::memset(to + k, 0, size_t(padded - k) * sizeof(T));
        }
    }
    return rows;
}

// left_rows (below) of elements that are not split.
template <class S, class T>
Rows whole_rows(const T* src, int64_t stride_r, int64_t stride_k, int64_t n, int64_t k, Slot slot) {
    using Q = Panel<S, T>;
    constexpr int W = S::W;
    if (Q::kInPlace && stride_k == 1) {
        if constexpr (Q::kTiles) return tile_rows<S, T>(src, stride_r, n, k, slot);
        return {reinterpret_cast<const char*>(src), stride_r * int64_t(sizeof(T)), k % Q::kStep != 0};
    }
    const int64_t depth = Q::depth(k), whole = k / Q::kStep;
    auto* dst = panel_scratch<S, T>(slot, ceil_div(n, Q::kRows) * Q::kRows * depth);
    int64_t r = 0;
    if (stride_r == 1) {  // rows contiguous: W elements of W rows at a time
        for (; r + W <= n; r += W) {
            int64_t kk = 0;
            for (; kk + W <= whole; kk += W) {
                alignas(64) typename Q::P block[W * W];
                for (int t = 0; t < W; ++t)
                    pack_across<S, T>(src + r + (kk + t) * Q::kStep * stride_k, stride_k, block + t * W);
                S::transpose(block, W * 4, dst + r * depth + kk, depth);
            }
            for (int i = 0; i < W; ++i)
                for (int64_t e = kk; e < depth; ++e)
                    dst[(r + i) * depth + e] = padded_element<S, T>(src + r + i, stride_k, e, k);
        }
    }
    for (; r < n; ++r)
        for (int64_t e = 0; e < depth; ++e)
            dst[r * depth + e] = padded_element<S, T>(src + r * stride_r, stride_k, e, k);
    return {reinterpret_cast<const char*>(dst), depth * 4, false};
}

// n rows of a left operand whose element (r, kk) is src[r * stride_r + kk * stride_k], where they are or in `slot`;
// `skip`: see pack_panels.
template <class S, class T>
Rows left_rows(const T* src, int64_t stride_r, int64_t stride_k, int64_t n, int64_t k, Slot slot, bool skip = false) {
    using Q = Panel<S, T>;
    if constexpr (Q::kSplit) {
        const int64_t depth = Q::depth(k);
        auto* to = panel_scratch<S, T>(slot, ceil_div(n, Q::kRows) * Q::kRows * depth);
        Rows rows{reinterpret_cast<const char*>(to), depth * 4, false};
        rows.exact = split_rows<S>(src, stride_r, stride_k, n, k, to, skip);
        return rows;
    } else {
        (void)skip;
        return whole_rows<S, T>(src, stride_r, stride_k, n, k, slot);
    }
}

// The words that are kept of a right operand's first k (few_rows_words.h): its panels, where elements are pairs.
struct KeptWords {
    const uint32_t* data = nullptr;  // null: none
    int64_t k = 0;
};

// A right operand in panels of some depth, packed one after the other; or the first `whole` elements of each are kept,
// and only what follows is packed.
template <class S, class T>
struct RightPanels {
    using Q = Panel<S, T>;
    using P = typename Q::P;

    const P* packed = nullptr;
    const P* kept = nullptr;
    int64_t kept_depth = 0, whole = 0;
    int64_t exact = 0;  // of a weight in three parts: how many units of each panel have only high ones

    RightPanels(const P* packed) : packed(packed) {}

    // Element kk of the panel that begins with column j.
    const P* at(int64_t j, int64_t kk, int64_t depth) const {
        if (kk < whole) return kept + j * kept_depth + kk * Q::kCols;
        return packed + j * (depth - whole) + (kk - whole) * Q::kCols;
    }
};

// A right operand [k, n] as gemm has it (gemm.h), by blocks.
template <class S, class T>
struct RightOperand {
    using Q = Panel<S, T>;
    const T* data;
    int64_t stride_c, stride_k, k;
    KeptWords words;

    // `cols` columns from j on, and of them elements [k0, k0 + step) of k: what is not kept is packed into `to`.
    // is_weight: which operand it is (Rows::exact).
    RightPanels<S, T> block(int64_t j, int64_t cols, int64_t k0, int64_t step, typename Q::P* to,
                            bool is_weight) const {
        RightPanels<S, T> panels(to);
        panels.whole = whole(k0, step);
        if constexpr (Q::kPairs) {
            if (panels.whole > 0) {
                panels.kept_depth = Q::depth(words.k);
                panels.kept = words.data + j * panels.kept_depth + k0 / Q::kStep * Q::kCols;
            }
        }
        const int64_t from = panels.whole * Q::kStep;
        if (panels.whole == 0 || from < step)
            panels.exact = pack_panels<S, T>(data + j * stride_c + (k0 + from) * stride_k, stride_c, stride_k, cols,
                                             step - from, to, is_weight);
        return panels;
    }

    // Fetches what block() reads, in about `calls` calls.
    void fetch(Prefetch* next, int64_t j, int64_t cols, int64_t k0, int64_t step, int64_t calls) const {
        const int64_t kept = whole(k0, step), from = kept * Q::kStep;
        Lines packed;
        if (from < step)
            packed = panels_ahead(data + j * stride_c + (k0 + from) * stride_k, stride_c, stride_k, cols, step - from,
                                  calls);
        if (kept == 0) {
            next->reads = packed;
            return;
        }
        const int64_t depth = Q::depth(words.k);
        next->reads = Lines(words.data + j * depth + k0 / Q::kStep * Q::kCols, ceil_div(cols, Q::kCols),
                            depth * Q::kCols * 4, kept * Q::kCols * 4, calls);
        next->also = packed;
    }

  private:
    // Elements of a block that are kept. Where the operand goes on behind what is kept (with a border), sums do within
    // a chunk: it is packed as one.
    int64_t whole(int64_t k0, int64_t step) const {
        if (!Q::kPairs || words.data == nullptr) return 0;
        constexpr int64_t kChunk = Q::kTiles ? Q::kUnit : kDepth;
        const int64_t kept = words.k == k ? Q::depth(k) : words.k / Q::kStep / kChunk * kChunk;
        return max64(min64(kept - k0 / Q::kStep, Q::depth(step)), 0);
    }
};

}  // namespace mint
