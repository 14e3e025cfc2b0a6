#include "check.h"

#include <stdexcept>
#include <string>

namespace mint::check {

namespace {
[[noreturn]] void fail(const char* op, const char* name, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + got + " (" + op + ")");
}
}  // namespace

void pointer(const char* op, const char* name, const void* p) {
    if (p == nullptr) fail(op, name, "an address", "null");
}

void at_least(const char* op, const char* name, int64_t value, int64_t low) {
    if (value < low) fail(op, name, std::to_string(low) + " or more", std::to_string(value));
}

void multiple(const char* op, const char* name, int64_t value, int64_t divisor) {
    if (value % divisor != 0) fail(op, name, "a multiple of " + std::to_string(divisor), std::to_string(value));
}

void row_stride(const char* op, const char* name, int64_t stride, int64_t rows, int64_t columns) {
    if (rows > 1 && stride < columns) {
        fail(op, name, "a row stride of at least " + std::to_string(columns), std::to_string(stride));
    }
}

}  // namespace mint::check
