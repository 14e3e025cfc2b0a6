// fp32 operands of a product in tiles (simd/amx.h): each element is the sum of three bf16, its high, mid and low part.
//
// The product of x and w is six of bf16: high * low, high * mid, mid * mid, mid * high, low * high, and high * high.
// The three that are left out are some 2^-26 of it (root mean square; at most 2^-23), less than what rounding it to
// fp32 costs. kSplitChunk units of k are summed from 0 at a time, the first five products before the last: a sum is
// rounded at its own size. Where all elements of a weight's unit are bf16, as in weights that were published so, their
// mid and low parts are 0: three products do, and the sums are the same. An infinite element makes its sums NaN;
// results below 1e-33 lose bits, as parts of theirs are subnormal.
//
// A unit is 32 k. Of a row of the left operand it is the 16 pairs (k, k + 16) of high parts, then those of mid parts,
// then those of low parts; of a panel of the right one 16 rows of 32 such pairs, three times.
#pragma once
#include "parallel.h"

namespace mint {

constexpr int64_t kSplitK = 32, kSplitWords = 48;  // of a unit: k, and words of one row or column
constexpr int64_t kSplitChunk = 6;                 // units whose small products are summed before their high ones

// Where the elements (r, kk) of an operand are, r < n and k of them in a unit that begins at `data`: at
// data[r * stride_r + kk * stride_k]. Elements beyond are zero.
struct SplitUnit {
    const float* data;
    int64_t stride_r, stride_k, n, k;

    // Rows r and on.
    SplitUnit from(int64_t r) const { return {data + r * stride_r, stride_r, stride_k, n - r, k}; }

    // Whether all of them are bf16.
    template <class S>
    bool is_bf16() const {
        const bool along = stride_k == 1;
        if (!along && stride_r != 1) return false;  // none that is looked at
        const int64_t lines = along ? n : min64(k, kSplitK), length = along ? min64(k, kSplitK) : n;
        const int64_t stride = along ? stride_r : stride_k;
        auto seen = S::zero();
        for (int64_t l = 0; l < lines; ++l) {
            const float* line = data + l * stride;
            if (length == kSplitK) {
                for (int64_t v = 0; v < kSplitK; v += S::W) seen = S::or_bits(seen, S::load(line + v));
            } else {
                for (int64_t v = 0; v < length; v += S::W)
                    seen = S::or_bits(seen, S::load_n(line + v, int(length - v)));
            }
            if (l == 0 && !S::is_bf16(seen)) return false;
        }
        return S::is_bf16(seen);
    }

    // rows[r][kk] of the first 16 rows and 32 k.
    template <class S>
    void gather(float (*rows)[kSplitK]) const {
        constexpr int W = S::W;
        const int some = int(n), more = int(min64(k, kSplitK));
        if (stride_k == 1) {
            for (int r = 0; r < W; ++r)
                for (int v = 0; v < kSplitK; v += W)
                    S::store(rows[r] + v,
                             r < some && v < more ? S::load_n(data + r * stride_r + v, more - v) : S::zero());
        } else if (stride_r == 1) {
            alignas(64) float columns[kSplitK][W];
            for (int kk = 0; kk < kSplitK; ++kk)
                S::store(columns[kk], kk < more ? S::load_n(data + kk * stride_k, some) : S::zero());
            for (int v = 0; v < kSplitK; v += W) S::transpose(columns[v], W * 4, rows[0] + v, kSplitK);
        } else {
            for (int r = 0; r < W; ++r)
                for (int kk = 0; kk < kSplitK; ++kk)
                    rows[r][kk] = r < some && kk < more ? data[r * stride_r + kk * stride_k] : 0.0f;
        }
    }
};

// The pairs (a[i], b[i]) of high parts at `to`, of mid and low parts `part` and 2 * part words on; with `bare` only the
// high ones.
template <class S>
MINT_INLINE void split_pairs(typename S::F a, typename S::F b, uint32_t* to, int64_t part, bool bare) {
    if (bare) return S::high_pairs(a, b, to);
    S::split(a, b, to, to + part, to + 2 * part);
}

// A unit of up to 16 rows, `stride` words apart at `to`; bare: see split_pairs.
template <class S>
MINT_INLINE void split_unit_rows(const SplitUnit& unit, uint32_t* to, int64_t stride, bool bare) {
    alignas(64) float rows[S::W][kSplitK];
    const bool whole = unit.stride_k == 1 && unit.k >= kSplitK;
    if (!whole) unit.gather<S>(rows);
    const float* row = whole ? unit.data : rows[0];
    const int64_t step = whole ? unit.stride_r : kSplitK;
    for (int64_t r = 0; r < min64(unit.n, S::W); ++r, row += step, to += stride)
        split_pairs<S>(S::load(row), S::load(row + S::W), to, S::W, bare);
}

// to [n][units of k][48]: rows of a left operand whose element (r, kk) is src[r * stride_r + kk * stride_k], as
// multiply_split takes them. With `skip` only the high parts are written of the first units, as long as they are bf16
// in every row. Returns how many those are.
template <class S>
int64_t split_rows(const float* src, int64_t stride_r, int64_t stride_k, int64_t n, int64_t k, uint32_t* to,
                   bool skip) {
    const int64_t units = ceil_div(k, kSplitK), stride = units * kSplitWords;
    const auto unit = [=](int64_t r, int64_t count, int64_t u) {
        return SplitUnit{src + r * stride_r + u * kSplitK * stride_k, stride_r, stride_k, count, k - u * kSplitK};
    };
    if (!skip) {  // by rows, as they lie
        const int64_t most = stride_k == 1 ? 1 : S::W;
        for (int64_t r = 0; r < n; r += most)
            for (int64_t u = 0; u < units; ++u)
                split_unit_rows<S>(unit(r, min64(n - r, most), u), to + r * stride + u * kSplitWords, stride, false);
        return 0;
    }
    int64_t exact = 0;
    for (int64_t u = 0; u < units; ++u) {
        const bool bare = exact == u && unit(0, n, u).template is_bf16<S>();
        if (bare) ++exact;
        for (int64_t r = 0; r < n; r += S::W)
            split_unit_rows<S>(unit(r, n - r, u), to + r * stride + u * kSplitWords, stride, bare);
    }
    return exact;
}

// How many units of a right operand, from the first on, are bf16 in all of n columns.
template <class S>
int64_t exact_units(const float* src, int64_t stride_c, int64_t stride_k, int64_t n, int64_t k) {
    int64_t exact = 0;
    for (int64_t kk = 0; kk < k; kk += kSplitK, ++exact)
        if (!SplitUnit{src + kk * stride_k, stride_c, stride_k, n, k - kk}.is_bf16<S>()) break;
    return exact;
}

// One panel of a right operand whose element (kk, j) is src[j * stride_c + kk * stride_k], n <= 32 columns of it real,
// those up to a multiple of 16 zero. Of the first `exact` units only the high parts are written.
template <class S>
void split_panel(const float* src, int64_t stride_c, int64_t stride_k, int64_t n, int64_t k, uint32_t* to,
                 int64_t exact) {
    constexpr int W = S::W, C = 2 * W;
    constexpr int64_t kPart = W * C;
    const int64_t units = ceil_div(k, kSplitK);
    alignas(64) float rows[W][kSplitK];
    alignas(64) uint32_t parts[3][W * W];
    for (int64_t u = 0; u < units; ++u, to += 3 * kPart) {
        const SplitUnit unit{src + u * kSplitK * stride_k, stride_c, stride_k, n, k - u * kSplitK};
        const bool bare = u < exact, whole = unit.k >= kSplitK;
        for (int64_t j = 0; j < n; j += W) {
            const SplitUnit some = unit.from(j);
            if (stride_c == 1 && whole && some.n >= W) {
                for (int64_t i = 0; i < W; ++i) {
                    const float* p = some.data + i * stride_k;
                    // The next rows are a stride away, where the hardware does not look.
                    __builtin_prefetch(p + kSplitK * stride_k), __builtin_prefetch(p + (kSplitK + W) * stride_k);
                    split_pairs<S>(S::load(p), S::load(p + W * stride_k), to + i * C + j, kPart, bare);
                }
                continue;
            }
            const bool there = stride_k == 1 && whole && some.n >= W;
            if (!there) some.gather<S>(rows);
            const float* row = there ? some.data : rows[0];
            const int64_t step = there ? stride_c : kSplitK;
            for (int64_t i = 0; i < W; ++i, row += step)
                split_pairs<S>(S::load(row), S::load(row + W), parts[0] + i * W, W * W, bare);
            for (int64_t part = 0; part < (bare ? 1 : 3); ++part)
                S::transpose(parts[part], W * 4, to + part * kPart + j, C);
        }
    }
}

}  // namespace mint
