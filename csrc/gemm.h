// Matrix products with fp32 accumulation: packed panels, a register tile, and one blocked driver.
//
// A panel holds R rows of an operand k-major: element (kk, r) at kk * R + r, so that the register tile reads both
// operands in order. With a bf16 dot (S::kBf16Dot) an element is the pair (k, k+1) of bf16; elsewhere it is one fp32,
// and bf16 is widened while it is packed. Rows and k beyond the edge are zeros.
// A result element is always the same sum in the same order (k in chunks of kDepth, each summed in registers from 0,
// which also keeps rounding errors from growing with k): it does not depend on the tiling or the number of threads.
#pragma once
#include <type_traits>

#include "parallel.h"
#include "scratch.h"

namespace mint {

template <class S, class T>
struct Panel {
    static constexpr bool kPairs = S::kBf16Dot && std::is_same_v<T, bf16>;
    using P = std::conditional_t<kPairs, uint32_t, float>;
    static constexpr int kStep = kPairs ? 2 : 1;  // k per element
    static constexpr int kRows = 2 * S::kMr;      // rows of an A panel: two register tiles, and a multiple of W
    static constexpr int kCols = S::kNv * S::W;   // columns of a B panel
    static constexpr int64_t kDepth = 256;        // elements of a panel summed in registers at a time
    static int64_t depth(int64_t k) { return (k + kStep - 1) / kStep; }
};

template <class S, class T>
MINT_INLINE typename Panel<S, T>::P panel_element(const T* p, int64_t stride_k, bool second) {
    if constexpr (Panel<S, T>::kPairs) {
        return uint32_t(p[0].bits) | (second ? uint32_t(p[stride_k].bits) << 16 : 0u);
    } else {
        (void)stride_k, (void)second;
        return to_float(*p);
    }
}

// One panel of R rows (n of them real) of an operand whose element (r, k) is src[r * stride_r + k * stride_k].
template <class S, class T, int R>
void pack_panel(const T* src, int64_t stride_r, int64_t stride_k, int64_t n, int64_t k, typename Panel<S, T>::P* dst) {
    using Q = Panel<S, T>;
    static_assert(R % S::W == 0);
    constexpr int kAhead = 16;
    const int64_t depth = Q::depth(k), whole = k / Q::kStep;  // whole: elements without a k edge
    if (stride_r == 1 && n == R) {                            // rows contiguous: interleave or copy
        for (int64_t kk = 0; kk < whole; ++kk) {
            const T* p = src + kk * Q::kStep * stride_k;
            typename Q::P* d = dst + kk * R;
            // The next rows are a stride away, where the hardware does not look.
            for (int r = 0; r < R; r += 64 / int(sizeof(T))) __builtin_prefetch(p + r + kAhead * stride_k);
            for (int r = 0; r < R; r += S::W) {
                if constexpr (Q::kPairs) {
                    S::interleave(p + r, p + stride_k + r, d + r);
                    __builtin_prefetch(p + r + (kAhead + 1) * stride_k);
                } else {
                    S::store(d + r, S::load(p + r));
                }
            }
        }
        for (int64_t kk = whole; kk < depth; ++kk)
            for (int r = 0; r < R; ++r)
                dst[kk * R + r] = panel_element<S, T>(src + r + kk * Q::kStep * stride_k, 0, false);
        return;
    }
    int64_t r0 = 0;
    if (stride_k == 1) {  // k contiguous: transpose W x W words
        for (; r0 + S::W <= n; r0 += S::W) {
            const T* rows = src + r0 * stride_r;
            int64_t kk = 0;
            for (; kk + S::W <= whole; kk += S::W) {
                if constexpr (Q::kPairs || std::is_same_v<T, float>) {
                    S::transpose(rows + kk * Q::kStep, stride_r * int64_t(sizeof(T)), dst + kk * R + r0, R);
                } else {
                    alignas(64) float wide[S::W * S::W];
                    for (int r = 0; r < S::W; ++r) S::store(wide + r * S::W, S::load(rows + r * stride_r + kk));
                    S::transpose(wide, S::W * 4, dst + kk * R + r0, R);
                }
            }
            for (; kk < depth; ++kk)
                for (int r = 0; r < S::W; ++r)
                    dst[kk * R + r0 + r] = panel_element<S, T>(rows + r * stride_r + kk * Q::kStep, 1, kk < whole);
        }
    }
    for (int64_t r = r0; r < R; ++r) {
        if (r >= n) {
            for (int64_t kk = 0; kk < depth; ++kk) dst[kk * R + r] = 0;
            continue;
        }
        const T* p = src + r * stride_r;
        for (int64_t kk = 0; kk < depth; ++kk)
            dst[kk * R + r] = panel_element<S, T>(p + kk * Q::kStep * stride_k, stride_k, kk < whole);
    }
}

// All panels of an operand of n rows, one after the other, each depth(k) * R elements.
template <class S, class T, int R>
void pack(const T* src, int64_t stride_r, int64_t stride_k, int64_t n, int64_t k, typename Panel<S, T>::P* dst) {
    const int64_t size = Panel<S, T>::depth(k) * R;
    for (int64_t r = 0; r < n; r += R, dst += size)
        pack_panel<S, T, R>(src + r * stride_r, stride_r, stride_k, min64(R, n - r), k, dst);
}

// c[M rows][kCols] (+)= M rows of an A panel * B panel over `depth` elements.
template <class S, class T, int M>
MINT_INLINE void register_tile(const typename Panel<S, T>::P* a, const typename Panel<S, T>::P* b, int64_t depth,
                               float* c, int64_t ldc, bool accumulate) {
    using Q = Panel<S, T>;
    typename S::F acc[M][S::kNv];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < S::kNv; ++j) acc[i][j] = S::zero();
    for (int64_t kk = 0; kk < depth; ++kk, a += Q::kRows, b += Q::kCols) {
        if constexpr (Q::kPairs) {
            typename S::B bv[S::kNv];
            for (int j = 0; j < S::kNv; ++j) bv[j] = S::load_pairs(b + j * S::W);
            for (int i = 0; i < M; ++i) {
                const auto av = S::set1_pair(a[i]);
                for (int j = 0; j < S::kNv; ++j) acc[i][j] = S::dot(acc[i][j], av, bv[j]);
            }
        } else {
            typename S::F bv[S::kNv];
            for (int j = 0; j < S::kNv; ++j) bv[j] = S::load(b + j * S::W);
            for (int i = 0; i < M; ++i) {
                const auto av = S::set1(a[i]);
                for (int j = 0; j < S::kNv; ++j) acc[i][j] = S::fma(av, bv[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < S::kNv; ++j) {
            float* p = c + i * ldc + j * S::W;
            S::store(p, accumulate ? S::add(S::load(p), acc[i][j]) : acc[i][j]);
        }
}

template <class S, class T, int M>
MINT_INLINE void register_tile_of(int64_t m, const typename Panel<S, T>::P* a, const typename Panel<S, T>::P* b,
                                  int64_t depth, float* c, int64_t ldc, bool accumulate) {
    if constexpr (M > 1) {
        if (m < M) return register_tile_of<S, T, M - 1>(m, a, b, depth, c, ldc, accumulate);
    }
    register_tile<S, T, M>(a, b, depth, c, ldc, accumulate);
}

// c[rows][ldc] (+)= A * B for packed panels of `depth` elements each; columns come out padded to kCols.
template <class S, class T>
void multiply_panels(const typename Panel<S, T>::P* a, int64_t rows, const typename Panel<S, T>::P* b, int64_t cols,
                     int64_t depth, float* c, int64_t ldc, bool accumulate) {
    using Q = Panel<S, T>;
    for (int64_t k0 = 0; k0 < depth; k0 += Q::kDepth) {
        const int64_t step = min64(Q::kDepth, depth - k0);
        const bool add = accumulate || k0 > 0;
        for (int64_t i = 0; i < rows; i += S::kMr) {
            const auto* ap = a + i / Q::kRows * Q::kRows * depth + k0 * Q::kRows + i % Q::kRows;
            for (int64_t j = 0; j < cols; j += Q::kCols)
                register_tile_of<S, T, S::kMr>(min64(S::kMr, rows - i), ap, b + j * depth + k0 * Q::kCols, step,
                                               c + i * ldc + j, ldc, add);
        }
    }
}

template <class S, class T>
typename Panel<S, T>::P* panel_scratch(Slot slot, int64_t elements) {
    return static_cast<typename Panel<S, T>::P*>(scratch(slot, size_t(elements) * 4));
}

// C = A * B: A is [m, k] with element (i, kk) at a[i * a_row + kk * a_k], B is [k, n] with element (kk, j) at
// b[j * b_col + kk * b_k]. Each finished piece of a row goes to out(i, j, count, values), values padded to kCols.
// Threads share the tiles; a tile's panels and its fp32 result (about 600 KB) stay in a core's L2.
template <class S, class T, class Out>
void gemm(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_col, int64_t b_k, int64_t m, int64_t n,
          int64_t k, Out out) {
    using Q = Panel<S, T>;
    constexpr int64_t kTileRows = 256, kTileCols = 192 / Q::kCols * Q::kCols;
    if (m == 0 || n == 0) return;
    const int64_t row_tiles = ceil_div(m, kTileRows);
    const int64_t tile_rows = ceil_div(ceil_div(m, row_tiles), Q::kRows) * Q::kRows;  // equal tiles
    const int64_t wanted = 3 * int64_t(omp_get_max_threads());                        // tiles, for balance
    const int64_t split = ceil_div(ceil_div(n * row_tiles, wanted), Q::kCols) * Q::kCols;
    const int64_t tile_cols = min64(kTileCols, max64(Q::kCols, split));
    const int64_t tiles = row_tiles * ceil_div(n, tile_cols);
    constexpr int64_t kChunk = Q::kDepth * Q::kStep;
#pragma omp parallel for schedule(dynamic, 1) if (tiles > 1 && m * n * k > kSerialWork * 16)
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i0 = t % row_tiles * tile_rows, j0 = t / row_tiles * tile_cols;
        const int64_t rows = min64(tile_rows, m - i0), cols = min64(tile_cols, n - j0);
        auto* pa = panel_scratch<S, T>(Slot::kPanelsA, tile_rows * Q::kDepth);
        auto* pb = panel_scratch<S, T>(Slot::kPanelsB, tile_cols * Q::kDepth);
        float* c = static_cast<float*>(scratch(Slot::kTile, size_t(tile_rows * tile_cols) * 4));
        if (k == 0) std::memset(c, 0, size_t(tile_rows * tile_cols) * 4);  // an empty sum; scratch is undefined
        for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
            const int64_t step = min64(kChunk, k - k0);
            pack<S, T, Q::kRows>(a + i0 * a_row + k0 * a_k, a_row, a_k, rows, step, pa);
            pack<S, T, Q::kCols>(b + j0 * b_col + k0 * b_k, b_col, b_k, cols, step, pb);
            multiply_panels<S, T>(pa, rows, pb, cols, Q::depth(step), c, tile_cols, k0 > 0);
        }
        for (int64_t i = 0; i < rows; ++i) out(i0 + i, j0, cols, c + i * tile_cols);
    }
}

}  // namespace mint
