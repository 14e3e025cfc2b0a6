// Fetching the next block of memory while this one is computed on: a product reads a weight once, from far away.
#pragma once
#include "parallel.h"

namespace mint {

// Lines of a block, fetched a few at a time: `rows` rows of `bytes` bytes, `stride` bytes apart.
class Lines {  // inlined everywhere: see MINT_INLINE
  public:
    Lines() = default;  // nothing

    // In about `calls` calls of some().
    __attribute__((always_inline)) Lines(const void* first, int64_t rows, int64_t stride, int64_t bytes, int64_t calls)
        : row_(static_cast<const char*>(first)),
          rows_(rows),
          stride_(stride),
          bytes_(bytes),
          share_(ceil_div(rows * (bytes / 64 + 1), max64(calls, 1))) {}

    // Into L2 to be read, or into L1 to be written.
    template <bool Write>
    __attribute__((always_inline)) void some() {
        for (int64_t n = share_; n > 0 && rows_ > 0; --n) {
            __builtin_prefetch(row_ + at_, Write, Write ? 3 : 2);
            at_ += 64;
            if (at_ >= bytes_ + 63) --rows_, row_ += stride_, at_ = 0;
        }
    }

  private:
    const char* row_ = nullptr;
    int64_t rows_ = 0, stride_ = 0, bytes_ = 0, share_ = 0, at_ = 0;
};

// What a product fetches while it multiplies: what the next one reads, and where it will write its own results. (A
// store that waits for its line took as long as a third of the multiplications in tiles.)
struct Prefetch {
    Lines reads, also, writes;   // `also`: is read beside it
    const char* then = nullptr;  // where what is read in one piece begins (few_rows_words.h)

    Prefetch() = default;
    __attribute__((always_inline)) Prefetch(const void* first, int64_t rows, int64_t stride, int64_t bytes,
                                            int64_t calls)
        : reads(first, rows, stride, bytes, calls) {}
    __attribute__((always_inline)) void some() { reads.some<false>(), also.some<false>(), writes.some<true>(); }
};

// Where a product goes.
struct Target {
    void* data = nullptr;          // null: unknown
    int64_t stride = 0, size = 0;  // bytes of a row and of an element

    // The same from row i on.
    Target from(int64_t i) const {
        return {data == nullptr ? nullptr : static_cast<char*>(data) + i * stride, stride, size};
    }

    // Asks for the lines of columns [j, j + cols) of the first `rows` rows, to be written, at once. Where rows begin
    // inside a line, the last one is left out: the columns after these may be another thread's just now.
    __attribute__((always_inline)) void fetch(int64_t j, int64_t rows, int64_t cols) const {
        for (int64_t i = 0; i < rows; ++i) {
            const char* row = static_cast<const char*>(data) + i * stride + j * size;
            for (int64_t b = 0; b < cols * size; b += 64) __builtin_prefetch(row + b, 1, 3);
        }
    }

    // The block of `rows` x `cols` results at (i, j), fetched in about `calls` calls.
    __attribute__((always_inline)) Lines lines(int64_t i, int64_t j, int64_t rows, int64_t cols, int64_t calls) const {
        if (data == nullptr) return {};
        return {static_cast<char*>(data) + i * stride + j * size, rows, stride, cols * size, calls};
    }
};

// n columns and k rows of a right operand (strides as in pack_panel).
template <class T>
MINT_INLINE Lines panels_ahead(const T* b, int64_t b_col, int64_t b_k, int64_t n, int64_t k, int64_t calls) {
    constexpr int64_t kSize = sizeof(T);
    return b_k == 1 ? Lines(b, n, b_col * kSize, k * kSize, calls) : Lines(b, k, b_k * kSize, n * kSize, calls);
}

}  // namespace mint
