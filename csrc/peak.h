// The multiply-add peak of this CPU, for the rooflines of benchmarks: what a product that never waits would reach.
#pragma once
#include "gemm.h"
#include "parallel.h"

namespace mint {

// Runs `rounds` rounds of independent multiply-adds (bf16 dots where the ISA has them) on every thread and adds the
// FLOP done to *flop. *sink gets a sum of them, so that no compiler leaves them out.
template <class S, class T>
void peak(T* sink, int64_t rounds, double* flop) {
    constexpr int kSums = S::kMr * S::kNv;
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        typename S::F acc[kSums];
#pragma GCC unroll 32
        for (int i = 0; i < kSums; ++i) acc[i] = S::set1(float(i));
        for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
            for (int i = 0; i < kSums; ++i) {
                if constexpr (Panel<S, T>::kPairs) {
                    acc[i] = S::dot(acc[i], S::set1_pair(0x3f003f00), S::set1_pair(0x3a003a00));
                } else {
                    acc[i] = S::fma(S::set1(0.5f), acc[i], S::set1(0.001f));
                }
            }
        }
        alignas(64) float lanes[S::W];
#pragma GCC unroll 32
        for (int i = 1; i < kSums; ++i) acc[0] = S::add(acc[0], acc[i]);
        S::store(lanes, acc[0]);
        if (omp_get_thread_num() == 0) put(sink, lanes[0]);
        total = 2.0 * kSums * S::W * Panel<S, T>::kStep * double(rounds);
    }
    *flop += total;
}

}  // namespace mint
