#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace mint {

namespace {
struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};

std::atomic<int64_t> calls_before_failure{0}, failures_left{0};

bool fails() {
    if (failures_left.load(std::memory_order_relaxed) <= 0) return false;
    return calls_before_failure-- <= 0 && failures_left-- > 0;
}
}  // namespace

void fail_scratch(int64_t good, int64_t bad) {
    failures_left = 0;
    calls_before_failure = good;
    failures_left = bad;
}

void out_of_memory() { throw std::bad_alloc(); }

void* scratch(Slot slot, size_t bytes) {
    if (fails()) out_of_memory();
    thread_local Buffer buffers[int(Slot::kCount)];
    Buffer& b = buffers[int(slot)];
    if (b.size < bytes) {
        std::free(b.data);
        b.size = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        b.data = std::aligned_alloc(64, rounded);
        if (b.data == nullptr) out_of_memory();
        b.size = rounded;
    }
    return b.data;
}

}  // namespace mint
