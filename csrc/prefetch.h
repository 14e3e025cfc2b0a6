// Fetching the next block of memory while this one is computed on: a product reads a weight once, from far away.
#pragma once
#include "parallel.h"

namespace mint {

// Fetches a block into L2 a few lines at a time.
class Prefetch {  // inlined everywhere: see MINT_INLINE
  public:
    Prefetch() = default;  // nothing

    // `rows` rows of `bytes` bytes, `stride` bytes apart, in about `calls` calls of some().
    __attribute__((always_inline)) Prefetch(const void* first, int64_t rows, int64_t stride, int64_t bytes,
                                            int64_t calls)
        : row_(static_cast<const char*>(first)),
          rows_(rows),
          stride_(stride),
          bytes_(bytes),
          share_(ceil_div(rows * (bytes / 64 + 1), max64(calls, 1))) {}

    __attribute__((always_inline)) void some() {
        for (int64_t n = share_; n > 0 && rows_ > 0; --n) {
            __builtin_prefetch(row_ + at_, 0, 2);
            at_ += 64;
            if (at_ >= bytes_ + 63) --rows_, row_ += stride_, at_ = 0;
        }
    }

  private:
    const char* row_ = nullptr;
    int64_t rows_ = 0, stride_ = 0, bytes_ = 0, share_ = 0, at_ = 0;
};

// Where a product goes, so that its lines can be fetched while it is computed: a store that waits for its line costs as
// much as half of the multiplications of a tile.
struct Target {
    const void* data = nullptr;    // null: unknown
    int64_t stride = 0, size = 0;  // bytes of a row and of an element

    MINT_INLINE void touch(const Target& t, int64_t i, int64_t j, int64_t rows, int64_t cols) {
        if (t.data == nullptr) return;
        const char* row = static_cast<const char*>(t.data) + i * t.stride + j * t.size;
        for (int64_t r = 0; r < rows; ++r, row += t.stride)
            for (int64_t b = 0; b < cols * t.size; b += 64) __builtin_prefetch(row + b, 1);
    }
};

// n columns and k rows of a right operand (strides as in pack_panel).
template <class T>
MINT_INLINE Prefetch panels_ahead(const T* b, int64_t b_col, int64_t b_k, int64_t n, int64_t k, int64_t calls) {
    constexpr int64_t kSize = sizeof(T);
    return b_k == 1 ? Prefetch(b, n, b_col * kSize, k * kSize, calls) : Prefetch(b, k, b_k * kSize, n * kSize, calls);
}

}  // namespace mint
