// AdamW over flat fp32 buffers: one pass, 7 streams of memory (4 read, 3 written), 8 where the gradients are emptied.
#pragma once
#include <limits>

#include "check.h"
#include "parallel.h"
#include "rms_norm.h"  // for_vectors, row_sum
#include "scratch.h"

namespace mint {

// A step's numbers: decay = 1 - lr * weight_decay; c1 = 1 - beta1; c2 = 1 - beta2; root = 1 / sqrt(1 - beta2^t);
// rate = lr / (1 - beta1^t): formed by the caller in double.
struct AdamNumbers {
    float grad_scale, decay, c1, beta2, c2, root, eps, rate;
};

// Elements [begin, end).
template <class S>
MINT_INLINE void adam_elements(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t begin,
                               int64_t end, const AdamNumbers& h) {
    const auto vscale = S::set1(h.grad_scale), vdecay = S::set1(h.decay), vc1 = S::set1(h.c1), vb2 = S::set1(h.beta2);
    const auto vc2 = S::set1(h.c2), vroot = S::set1(h.root), veps = S::set1(h.eps), vrate = S::set1(-h.rate);
    for_vectors<S>(end - begin, [&](int64_t offset, int lanes) __attribute__((always_inline)) {
        const int64_t i = begin + offset;
        const auto g = S::mul(S::load_n(grad + i, lanes), vscale);
        const auto m0 = S::load_n(exp_avg + i, lanes);
        const auto m = S::fma(S::sub(g, m0), vc1, m0);
        const auto v = S::fma(S::mul(g, g), vc2, S::mul(S::load_n(exp_avg_sq + i, lanes), vb2));
        const auto p = S::mul(S::load_n(param + i, lanes), vdecay);
        const auto denominator = S::fma(S::sqrt(v), vroot, veps);
        S::store_n(exp_avg + i, m, lanes);
        S::store_n(exp_avg_sq + i, v, lanes);
        S::store_n(param + i, S::fma(S::div(m, denominator), vrate, p), lanes);
    });
}

// T does not matter here: the optimiser's state is always fp32.
template <class S, class T>
void adamw(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n, float grad_scale, float decay,
           float c1, float beta2, float c2, float root, float eps, float rate) {
    check::at_least("adamw", "n", n, 0);
    constexpr int64_t kBlock = 4096;
    const int64_t blocks = ceil_div(n, kBlock);
    const AdamNumbers numbers = {grad_scale, decay, c1, beta2, c2, root, eps, rate};
#pragma omp parallel if (n > kSerialWork)
    {
        const Range mine = my_rows(blocks);
        adam_elements<S>(param, grad, exp_avg, exp_avg_sq, mine.begin * kBlock, min64(mine.end * kBlock, n), numbers);
    }
}

// A block of elements of a flat buffer, and the view its piece goes to: a row of the tables that
// kernels/adamw/places.py makes.
struct Place {
    int64_t first, end, origin, columns, stride, address;  // end and origin: of the piece; address 0: it goes nowhere

    // Elements of the block: at most `block`.
    int64_t count(int64_t block) const { return min64(block, end - first); }
};

// The block's elements of `param`, rounded to T, to their place.
template <class S, class T>
MINT_INLINE void to_place(const float* param, const Place& place, int64_t block) {
    if (place.address == 0) return;
    const int64_t end = place.first + place.count(block);
    for (int64_t i = place.first; i < end;) {
        const int64_t line = (i - place.origin) / place.columns, column = (i - place.origin) % place.columns;
        const int64_t count = min64(place.columns - column, end - i);
        T* to = reinterpret_cast<T*>(place.address) + line * place.stride + column;
        for_vectors<S>(count, [&](int64_t v, int lanes) __attribute__((always_inline)) {
            S::store_n(to + v, S::load_n(param + i + v, lanes), lanes);
        });
        i += count;
    }
}

// The parameters of all blocks of a table to their places.
template <class S, class T>
void write_places(const float* param, const int64_t* table, int64_t blocks, int64_t block) {
    check::at_least("write_places", "block", block, 1);
    const auto* places = reinterpret_cast<const Place*>(table);
#pragma omp parallel for schedule(static) if (blocks * block > kSerialWork)
    for (int64_t t = 0; t < blocks; ++t) to_place<S, T>(param, places[t], block);
}

// The largest |param[i]|, i < n; NaN if one is not finite.
template <class S>
MINT_INLINE float largest(const float* param, int64_t n) {
    auto high = S::zero(), broken = S::zero();
    for_vectors<S>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const auto p = S::load_n(param + i, lanes);
        high = S::max(high, S::max(p, S::sub(S::zero(), p)));
        broken = S::fma(p, S::zero(), broken);  // 0 * inf and 0 * NaN are NaN
    });
    return S::hmax(high) + S::sum(broken);
}

// The same of what was found in blocks.
MINT_INLINE double largest_of(const float* found, int64_t blocks) {
    float high = 0.0f, broken = 0.0f;
    for (int64_t t = 0; t < blocks; ++t) {
        high = found[t] > high ? found[t] : high;
        broken += 0.0f * found[t];
    }
    return double(high) + double(broken);
}

// AdamW for the blocks of a table, which also empties the gradients and writes each new parameter to its place while it
// is in L1. *out = the largest of the new parameters' magnitudes, NaN if one is not finite.
template <class S, class T>
void adamw_places(float* param, float* grad, float* exp_avg, float* exp_avg_sq, const int64_t* table, int64_t blocks,
                  int64_t block, float grad_scale, float decay, float c1, float beta2, float c2, float root, float eps,
                  float rate, double* out) {
    check::at_least("adamw_places", "block", block, 1);
    float* found = static_cast<float*>(scratch(Slot::kPartials, size_t(blocks) * 4));
    const AdamNumbers numbers = {grad_scale, decay, c1, beta2, c2, root, eps, rate};
    const auto* places = reinterpret_cast<const Place*>(table);
#pragma omp parallel for schedule(static) if (blocks * block > kSerialWork)
    for (int64_t t = 0; t < blocks; ++t) {
        const int64_t first = places[t].first, count = places[t].count(block);
        adam_elements<S>(param, grad, exp_avg, exp_avg_sq, first, first + count, numbers);
        for_vectors<S>(count, [&](int64_t i, int lanes)
                                  __attribute__((always_inline)) { S::store_n(grad + first + i, S::zero(), lanes); });
        to_place<S, T>(param, places[t], block);
        found[t] = largest<S>(param + first, count);
    }
    *out = largest_of(found, blocks);
}

// *out = the L2 norm of grad [n]. Squares are summed in fp32 within blocks, in double across them and in their order,
// so threads change no bit.
template <class S, class T>
void adamw_norm(const float* grad, int64_t n, double* out) {
    check::at_least("adamw_norm", "n", n, 0);
    constexpr int64_t kBlock = 1024;
    const int64_t blocks = ceil_div(n, kBlock);
    float* sums = static_cast<float*>(scratch(Slot::kPartials, size_t(blocks) * 4));
#pragma omp parallel for schedule(static) if (n > kSerialWork)
    for (int64_t t = 0; t < blocks; ++t)
        sums[t] = row_sum<S>(min64(kBlock, n - t * kBlock), [&](int64_t i, int lanes) __attribute__((always_inline)) {
            const auto g = S::load_n(grad + t * kBlock + i, lanes);
            return S::mul(g, g);
        });
    double squares = 0.0;
    for (int64_t t = 0; t < blocks; ++t) squares += double(sums[t]);
    *out = std::sqrt(squares);
}

// *out = the largest |param[i]|, i < n; NaN if one is not finite.
template <class S, class T>
void adamw_largest(const float* param, int64_t n, double* out) {
    check::at_least("adamw_largest", "n", n, 0);
    constexpr int64_t kBlock = 4096;
    const int64_t blocks = ceil_div(n, kBlock);
    float* found = static_cast<float*>(scratch(Slot::kPartials, size_t(blocks) * 4));
#pragma omp parallel for schedule(static) if (n > kSerialWork)
    for (int64_t t = 0; t < blocks; ++t) found[t] = largest<S>(param + t * kBlock, min64(kBlock, n - t * kBlock));
    *out = largest_of(found, blocks);
}

}  // namespace mint
