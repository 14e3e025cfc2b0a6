// How loops are shared between threads.
#pragma once
#include <omp.h>

#include <cstdint>

#include "simd/bf16.h"

namespace mint {

// A parallel region costs a few microseconds: worth it above about this many element operations.
constexpr int64_t kSerialWork = 1 << 15;

MINT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MINT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
MINT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [begin, end) of n for this thread. Call inside a parallel region; rows are independent, so the
// split never changes a result.
struct Range {
    int64_t begin, end;
};
MINT_INLINE Range my_rows(int64_t n) {
    const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
    return {n * t / count, n * (t + 1) / count};
}

}  // namespace mint
