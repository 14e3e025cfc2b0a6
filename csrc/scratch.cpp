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

void* scratch(Slot slot, size_t bytes) {
    thread_local Buffer buffers[int(Slot::kCount)];
    Buffer& b = buffers[int(slot)];
    if (b.size < bytes) {
        std::free(b.data);
        b.size = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        b.data = std::aligned_alloc(64, rounded);
        if (b.data == nullptr) throw std::bad_alloc();
        b.size = rounded;
    }
    return b.data;
}

}  // namespace mint
