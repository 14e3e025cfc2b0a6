#include "scratch.h"

#include <cstdlib>
#include <new>

namespace mint {

namespace {
struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};
}  // namespace

void* try_scratch(Slot slot, size_t bytes) noexcept {
    thread_local Buffer buffers[int(Slot::kCount)];
    Buffer& b = buffers[int(slot)];
    if (b.size < bytes) {
        std::free(b.data);
        b.size = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        b.data = std::aligned_alloc(64, rounded);
        if (b.data == nullptr) return nullptr;
        b.size = rounded;
    }
    return b.data;
}

void out_of_memory() { throw std::bad_alloc(); }

void* scratch(Slot slot, size_t bytes) {
    void* p = try_scratch(slot, bytes);
    if (p == nullptr) out_of_memory();
    return p;
}

}  // namespace mint
