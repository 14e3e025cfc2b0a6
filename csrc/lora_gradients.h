// What the adapter of one bordered linear needs in the backward: dS = scale * dY B, dB += dYᵀ S, dA += dSᵀ X.
//
// Tokens go by in blocks that fit in L2, and all three products take their share of a block before the next one comes:
// dY and X pass through memory once. Sums of a block start from zero and are added to dB and dA in the order of the
// blocks, so no bit depends on the threads.
#pragma once
#include "check.h"
#include "matmul.h"
#include "outer_accumulate.h"

namespace mint {

constexpr int64_t kTokenBlock = 512;

// A row of `modules` for each of the `count` linears stacked on N: N_j, B_j's address and row stride, dB_j's address
// and row stride. x and da may be null.
template <class S, class T>
void lora_gradients(const T* dy, int64_t dy_stride, const T* s, int64_t s_stride, T* ds, int64_t ds_stride,
                    const int64_t* modules, int64_t count, float scale, const T* x, int64_t x_stride, int64_t k,
                    float* da, int64_t da_stride, int64_t rows, int64_t rank) {
    constexpr int64_t kFields = 5;
    for (int64_t m0 = 0; m0 < rows; m0 += kTokenBlock) {
        const int64_t m = min64(kTokenBlock, rows - m0);
        const T* y = dy + m0 * dy_stride;
        T* out = ds + m0 * ds_stride;
        for (int64_t j = 0; j < count; ++j) {
            const int64_t* p = modules + j * kFields;
            const int64_t n = p[0];
            matmul<S, T>(y, dy_stride, reinterpret_cast<const T*>(p[1]), 1, p[2], nullptr, out + j * rank, ds_stride, m,
                         rank, n, scale);
            outer_accumulate<S, T>(y, dy_stride, s + m0 * s_stride + j * rank, s_stride, reinterpret_cast<float*>(p[3]),
                                   p[4], m, n, rank, 1.0f);
            y += n;
        }
        if (x != nullptr)
            outer_accumulate<S, T>(out, ds_stride, x + m0 * x_stride, x_stride, da, da_stride, m, count * rank, k,
                                   1.0f);
    }
}

}  // namespace mint
