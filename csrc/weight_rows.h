// The operands of products with few rows (few_rows.h): a weight by its rows, and whose rows of x go on with what.
#pragma once
#include <cstring>

#include "prefetch.h"

namespace mint {

// Where the rows of a weight's modules begin: of q, k and v, or of gate and up.
struct Modules {
    int64_t count = 1, second = 0, third = 0;

    int64_t of_row(int64_t j) const { return count > 2 && j >= third ? 2 : count > 1 && j >= second ? 1 : 0; }
};

// A weight whose rows are `stride` elements apart: T, or with `scales` int8 times a scale for each row.
template <class T>
struct WeightRows {
    const void* data;
    int64_t stride;
    const float* scales;
    const uint32_t* words = nullptr;          // if not null, rows words_from and on are there too: weight_words
    int64_t words_from = 0, words_depth = 0;  // words of a row
    Modules modules = {};

    // Elements [k, k + n) of row j in T; where they lie, or in `to`.
    void copy(int64_t j, int64_t k, int64_t n, T* to) const {
        if (scales == nullptr) {
            std::memcpy(to, static_cast<const T*>(data) + j * stride + k, size_t(n) * sizeof(T));
            return;
        }
        const int8_t* from = static_cast<const int8_t*>(data) + j * stride + k;
        for (int64_t i = 0; i < n; ++i) put_exact(to + i, float(from[i]));
    }
    Prefetch ahead(int64_t j, int64_t n, int64_t k, int64_t calls) const {
        if (words != nullptr) {
            Prefetch next;
            next.then = reinterpret_cast<const char*>(panel(j));
            return next;
        }
        const int64_t size = scales != nullptr ? 1 : int64_t(sizeof(T));
        return Prefetch(static_cast<const char*>(data) + j * stride * size, n, stride * size, k * size, calls);
    }

    // The panel of words that begins with row j.
    const uint32_t* panel(int64_t j) const { return words + (j - words_from) * words_depth; }

  private:
    // What int8 holds is exact in T.
    MINT_INLINE void put_exact(float* p, float x) { *p = x; }
    MINT_INLINE void put_exact(bf16* p, float x) { p->bits = uint16_t(float_to_bits(x) >> 16); }
};

// Rows [begin, end) of x; their weight goes on with `width` columns at b, row j of it at b + j * stride.
template <class T>
struct RowGroup {
    int64_t begin, end;
    const T* b;
    int64_t stride, width;
    const uint32_t *words = nullptr, *second = nullptr;  // if not null: the words of b, of the rows of either part of W
    int64_t words_depth = 0;                             // words of a row

    // The panel of words that goes on with w's from row j on.
    const uint32_t* panel(const WeightRows<T>& w, int64_t j) const {
        return (w.words_from == 0 ? words : second) + (j - w.words_from) * words_depth;
    }

    // The words of that panel, of n rows, that may not be zero: a module's rows have nothing in the columns of another.
    // From and to multiples of `unit`.
    Range own(const WeightRows<T>& w, int64_t j, int64_t n, int64_t unit) const {
        const int64_t rank = width / w.modules.count, elements = 2 * unit;
        const int64_t first = w.modules.of_row(j) * rank, end = (w.modules.of_row(j + n - 1) + 1) * rank;
        return {first / elements * unit, ceil_div(end, elements) * unit};
    }

    // Asks for them, of so many columns: W's own panel takes long enough.
    void fetch(const WeightRows<T>& w, int64_t j, int64_t n, int64_t unit, int64_t columns) const {
        if (words == nullptr || width == 0) return;
        const Range mine = own(w, j, n, unit);
        const auto* from = reinterpret_cast<const char*>(panel(w, j) + mine.begin * columns);
        for (int64_t b = 0; b < (mine.end - mine.begin) * columns * 4; b += 64) __builtin_prefetch(from + b, 0, 2);
    }
};

}  // namespace mint
