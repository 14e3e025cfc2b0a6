// AddressSanitizer does not see what masked instructions and tiles touch: they tell it. Nothing in any other build.
#pragma once
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __asan_loadN(uintptr_t address, uintptr_t bytes);
void __asan_storeN(uintptr_t address, uintptr_t bytes);
}
#endif

namespace mint {

// The next instruction reads (or writes) the first n of T at p; n may be negative, which is none.
template <class T>
static inline __attribute__((always_inline)) void reads(const T* p, int64_t n) {
#if defined(__SANITIZE_ADDRESS__)
    if (n > 0) __asan_loadN(reinterpret_cast<uintptr_t>(p), uintptr_t(n) * sizeof(T));
#else
    (void)p, (void)n;
#endif
}
template <class T>
static inline __attribute__((always_inline)) void writes(T* p, int64_t n) {
#if defined(__SANITIZE_ADDRESS__)
    if (n > 0) __asan_storeN(reinterpret_cast<uintptr_t>(p), uintptr_t(n) * sizeof(T));
#else
    (void)p, (void)n;
#endif
}

}  // namespace mint
