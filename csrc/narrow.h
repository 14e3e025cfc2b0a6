// out += x w^T where the sums are short (a rank): what an adapter adds to its rows of a finished product.
//
// Such a product is all packing and adding, so both are kept in registers: panels of w are transposed through a padded
// copy of a few cache lines, and the sums of a register tile are added to rows of out that are in L1 or on their way.
#pragma once
#include <cstring>

#include "gemm.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

// A panel of n <= kCols columns of a right operand with k contiguous (column j at w + j * stride), in pairs: 16 pairs
// of W columns at a time, from a copy that is zero behind k. pack_panel takes elements one by one there.
template <class S, class T>
void pack_narrow(const T* w, int64_t stride, int64_t n, int64_t k, typename Panel<S, T>::P* dst) {
    using Q = Panel<S, T>;
    constexpr int W = S::W, C = Q::kCols;
    if constexpr (Q::kPairs) {
        const int64_t depth = Q::depth(k);
        if (depth % W == 0) {
            alignas(64) uint32_t words[W * W];
            for (int64_t j = 0; j < n; j += W)
                for (int64_t kk = 0; kk < depth; kk += W) {
                    const int64_t some = min64(W, n - j), left = max64(min64(2 * W, k - 2 * kk), 0);
                    for (int64_t c = 0; c < W; ++c) {
                        char* line = reinterpret_cast<char*>(words + c * W);
                        const size_t bytes = c < some ? size_t(left) * sizeof(T) : 0;
                        if (bytes == 32) {  // rank 16
                            std::memcpy(line, w + (j + c) * stride + 2 * kk, 32);
                            std::memset(line + 32, 0, size_t(W) * 4 - 32);
                        } else {
                            std::memset(line, 0, size_t(W) * 4);
                            if (bytes != 0) std::memcpy(line, w + (j + c) * stride + 2 * kk, bytes);
                        }
                    }
                    S::transpose(words, W * 4, dst + kk * C + j, C);
                }
            return;
        }
    }
    pack_panel<S, T>(w, stride, 1, n, k, dst);
}

// out[i, j] += sum_k x[i, k] * w[j * w_out + k * w_in], rounded once to T, for i < rows, j < n, k < depth; w_out or
// w_in is 1. By the calling thread.
template <class S, class T>
void add_narrow(const T* x, int64_t x_stride, const T* w, int64_t w_out, int64_t w_in, T* out, int64_t out_stride,
                int64_t rows, int64_t n, int64_t depth) {
    using Q = Panel<S, T>;
    constexpr int64_t C = Q::kCols;
    const int64_t elements = Q::depth(depth);
    const Rows left = left_rows<S, T>(x, x_stride, 1, rows, depth, Slot::kPanelsA);
    auto* panel = panel_scratch<S, T>(Slot::kPanelsB, C * elements);
    float* c = static_cast<float*>(scratch(Slot::kTile, size_t(Q::kRows * C) * 4));
    const typename S::Tiles registers;
    Prefetch none;
    for (int64_t j = 0; j < n; j += C) {
        const int64_t cols = min64(C, n - j);
        if (w_in == 1) {
            for (int64_t v = j + C; v < min64(j + 2 * C, n); ++v) __builtin_prefetch(w + v * w_out);
            pack_narrow<S, T>(w + j * w_out, w_out, cols, depth, panel);
        } else {
            pack_panel<S, T>(w + j, w_out, w_in, cols, depth, panel);
        }
        for (int64_t i = 0; i < rows; i += Q::kRows) {
            const int64_t count = min64(Q::kRows, rows - i);
            for (int64_t r = 0; r < count; ++r) __builtin_prefetch(out + (i + r) * out_stride + j, 1);
            multiply_rows<S, T>(left.at(i), count, panel, cols, elements, c, C, false, &none);
            for (int64_t r = 0; r < count; ++r) {
                T* row = out + (i + r) * out_stride + j;
                const float* sums = c + r * C;
                for_vectors<S>(cols, [&](int64_t v, int lanes) __attribute__((always_inline)) {
                    S::store_n(row + v, S::add(S::load_n(row + v, lanes), S::load_n(sums + v, lanes)), lanes);
                });
            }
        }
    }
}

}  // namespace mint
