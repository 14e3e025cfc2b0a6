// The multiply-add peak of this CPU, for the rooflines of benchmarks: what a product that never waits would reach.
#pragma once
#include "gemm.h"
#include "parallel.h"

namespace mint {

// One thread's share of peak: `rounds` rounds of independent multiply-adds. Returns a sum of them.
template <class S, class T>
typename S::F multiply_adds(int64_t rounds, double* flop) {
    constexpr int kSums = S::kMr * S::kNv;
    if constexpr (Panel<S, T>::kTiles) {
        constexpr int kProducts = Panel<S, T>::kSplit ? 6 : 1;  // split_panels.h
        const typename S::Tiles registers;
        alignas(64) float sums[16][16] = {};
        S::template load_tile<0>(sums, 64), S::template load_tile<1>(sums, 64), S::template load_tile<2>(sums, 64);
        S::template load_tile<3>(sums, 64), S::template load_tile<4>(sums, 64), S::template load_tile<6>(sums, 64);
        for (int64_t r = 0; r < rounds; ++r) {
            for (int part = 0; part < kProducts; ++part) {
                S::template multiply_tile<0, 4, 6>(), S::template multiply_tile<1, 4, 6>();
                S::template multiply_tile<2, 4, 6>(), S::template multiply_tile<3, 4, 6>();
            }
        }
        S::template store_tile<0>(sums, 64);
        *flop = 4 * 2.0 * 16 * 16 * 32 * double(rounds);
        return S::load(sums[0]);
    } else {
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
#pragma GCC unroll 32
        for (int i = 1; i < kSums; ++i) acc[0] = S::add(acc[0], acc[i]);
        *flop = 2.0 * kSums * S::W * Panel<S, T>::kStep * double(rounds);
        return acc[0];
    }
}

// Runs `rounds` rounds of independent multiply-adds (bf16 dots or tiles where the ISA has them) on every thread and
// adds the FLOP done to *flop. *sink gets a sum of them, so that no compiler leaves them out.
template <class S, class T>
void peak(T* sink, int64_t rounds, double* flop) {
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        alignas(64) float lanes[S::W];
        S::store(lanes, multiply_adds<S, T>(rounds, &total));
        if (omp_get_thread_num() == 0) put(sink, lanes[0]);
    }
    *flop += total;
}

}  // namespace mint
