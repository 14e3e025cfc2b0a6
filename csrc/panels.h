// Operands of a matrix product as the register tile reads them.
//
// An element is one fp32 or, with a bf16 dot (S::kBf16Dot), the pair (k, k+1) of bf16; elsewhere bf16 is widened when
// it is packed. The right operand goes into panels of kCols columns, k-major: element (kk, j) at kk * kCols + j, zeros
// beyond the edge. The left operand is read row by row, from where it is if its k is contiguous (a row of bf16 is a row
// of pairs), else from a copy.
#pragma once
#include <type_traits>

#include "parallel.h"
#include "scratch.h"

namespace mint {

template <class S, class T>
struct Panel {
    static constexpr bool kPairs = S::kBf16Dot && std::is_same_v<T, bf16>;
    static constexpr bool kInPlace = kPairs || std::is_same_v<T, float>;  // elements can be read from T as it is
    using P = std::conditional_t<kPairs, uint32_t, float>;
    static constexpr int kStep = kPairs ? 2 : 1;  // k per element
    static constexpr int kCols = S::kNv * S::W;   // columns of a panel
    static int64_t depth(int64_t k) { return (k + kStep - 1) / kStep; }
};

// Rows of the left operand: element kk of row r at data + r * stride + 4 * kk, in bytes. `half`: the last element of a
// row ends after its first k, and what follows it in memory is not ours to read.
struct Rows {
    const char* data;
    int64_t stride;
    bool half;
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

// One panel of a right operand whose element (kk, j) is src[j * stride_c + kk * stride_k], n columns of it real.
template <class S, class T>
void pack_panel(const T* src, int64_t stride_c, int64_t stride_k, int64_t n, int64_t k, typename Panel<S, T>::P* dst) {
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
            for (int j = 0; j < C; ++j)
                dst[kk * C + j] = panel_element<S, T>(src + j + kk * Q::kStep * stride_k, 0, false);
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
                    alignas(64) float wide[S::W * S::W];
                    for (int j = 0; j < S::W; ++j) S::store(wide + j * S::W, S::load(cols + j * stride_c + kk));
                    S::transpose(wide, S::W * 4, dst + kk * C + j0, C);
                }
            }
            for (; kk < depth; ++kk)
                for (int j = 0; j < S::W; ++j)
                    dst[kk * C + j0 + j] = panel_element<S, T>(cols + j * stride_c + kk * Q::kStep, 1, kk < whole);
        }
    }
    for (int64_t j = j0; j < C; ++j) {
        if (j >= n) {
            for (int64_t kk = 0; kk < depth; ++kk) dst[kk * C + j] = 0;
            continue;
        }
        const T* p = src + j * stride_c;
        for (int64_t kk = 0; kk < depth; ++kk)
            dst[kk * C + j] = panel_element<S, T>(p + kk * Q::kStep * stride_k, stride_k, kk < whole);
    }
}

// All panels of a right operand of n columns, one after the other, each depth(k) * kCols elements.
template <class S, class T>
void pack_panels(const T* src, int64_t stride_c, int64_t stride_k, int64_t n, int64_t k, typename Panel<S, T>::P* dst) {
    using Q = Panel<S, T>;
    for (int64_t j = 0; j < n; j += Q::kCols, dst += Q::depth(k) * Q::kCols)
        pack_panel<S, T>(src + j * stride_c, stride_c, stride_k, min64(Q::kCols, n - j), k, dst);
}

// n rows of a left operand whose element (r, kk) is src[r * stride_r + kk * stride_k], where they are or in `slot`.
template <class S, class T>
Rows left_rows(const T* src, int64_t stride_r, int64_t stride_k, int64_t n, int64_t k, Slot slot) {
    using Q = Panel<S, T>;
    constexpr int W = S::W;
    if (Q::kInPlace && stride_k == 1)
        return {reinterpret_cast<const char*>(src), stride_r * int64_t(sizeof(T)), k % Q::kStep != 0};
    const int64_t depth = Q::depth(k), whole = k / Q::kStep;
    auto* dst = panel_scratch<S, T>(slot, n * depth);
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
                    dst[(r + i) * depth + e] =
                        panel_element<S, T>(src + r + i + e * Q::kStep * stride_k, stride_k, e < whole);
        }
    }
    for (; r < n; ++r)
        for (int64_t e = 0; e < depth; ++e)
            dst[r * depth + e] = panel_element<S, T>(src + r * stride_r + e * Q::kStep * stride_k, stride_k, e < whole);
    return {reinterpret_cast<const char*>(dst), depth * 4, false};
}

}  // namespace mint
