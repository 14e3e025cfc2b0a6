// How loops are shared between threads.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#include "scratch.h"
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

// Where a team may run out of memory: an exception that left a parallel region would end the process. All that takes
// scratch there is done in run(), with no barrier in it, since each thread of the team has to reach every barrier. Once
// one has run out, run() does nothing more, and finish(), behind the region, throws: what the region wrote is no
// result.
class Attempts {
  public:
    template <class Body>
    __attribute__((always_inline)) void run(Body body) noexcept {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            body();
        } catch (const std::bad_alloc&) {
            failed_.store(true, std::memory_order_relaxed);
        }
    }

    __attribute__((always_inline)) void finish() const {
        if (failed_.load(std::memory_order_relaxed)) out_of_memory();
    }

  private:
    std::atomic<bool> failed_{false};
};

// Calls body(t, next) for every t < n that this thread gets, one at a time as threads come free; next (n or more: none)
// is the one it will get if all are equally fast, so that it can fetch what that will read. It is not claimed: the
// others may be faster. `claimed` starts at 0 and is the team's, as `attempts` is, in which it is done.
template <class Body>
MINT_INLINE void for_claimed(int64_t n, std::atomic<int64_t>& claimed, Attempts& attempts, Body body) {
    attempts.run([&] {
        for (int64_t t; (t = claimed++) < n;) body(t, t + omp_get_num_threads());
    });
}

// Where a team meets many times in a millisecond. OpenMP's barrier spins for longer than a time slice: on a machine
// whose cores are taken, each one then costs that slice. This one lets others run after some 20 microseconds.
class Meeting {
  public:
    // All threads of the team call it; what they wrote before is seen by all after. The last to come calls last().
    template <class Last>
    void wait(Last last) {
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            last();
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins > 500) {
                std::this_thread::yield();
            } else {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
        }
    }

    void wait() {
        wait([] {});
    }

  private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

}  // namespace mint
