// Argument checks of the kernels. The Python faces check shapes and dtypes by name; these guard the raw pointers.
// Defined in check.cpp, which is compiled without -m flags: they may be called from any translation unit.
#pragma once
#include <cstdint>

namespace mint::check {

// Each throws std::invalid_argument ("name: expected ..., got ... (op)").
void pointer(const char* op, const char* name, const void* p);                    // not null
void at_least(const char* op, const char* name, int64_t value, int64_t low);      // value >= low
void multiple(const char* op, const char* name, int64_t value, int64_t divisor);  // value % divisor == 0
void row_stride(const char* op, const char* name, int64_t stride, int64_t rows,
                int64_t columns);  // rows do not overlap

}  // namespace mint::check
