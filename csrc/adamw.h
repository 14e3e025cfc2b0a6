// AdamW over flat fp32 buffers: one pass, 7 streams of memory (4 read, 3 written). T does not matter: the optimiser's
// state is always fp32.
#pragma once
#include "check.h"
#include "parallel.h"
#include "rms_norm.h"  // for_vectors

namespace mint {

// decay = 1 - lr * weight_decay; c1 = 1 - beta1; c2 = 1 - beta2; root = 1 / sqrt(1 - beta2^t);
// rate = lr / (1 - beta1^t): formed by the caller in double.
template <class S, class T>
void adamw(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n, float grad_scale, float decay,
           float c1, float beta2, float c2, float root, float eps, float rate) {
    check::at_least("adamw", "n", n, 0);
    constexpr int64_t kBlock = 4096;
    const int64_t blocks = ceil_div(n, kBlock);
    const auto vscale = S::set1(grad_scale), vdecay = S::set1(decay), vc1 = S::set1(c1), vb2 = S::set1(beta2);
    const auto vc2 = S::set1(c2), vroot = S::set1(root), veps = S::set1(eps), vrate = S::set1(-rate);
#pragma omp parallel if (n > kSerialWork)
    {
        const Range mine = my_rows(blocks);
        const int64_t begin = mine.begin * kBlock, end = min64(mine.end * kBlock, n);
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
}

}  // namespace mint
