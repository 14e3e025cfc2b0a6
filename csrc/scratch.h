// Scratch memory that a thread keeps between calls: fresh pages would cost a fault per 4 KB on every call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mint {

enum class Slot { kPanelsA, kPanelsB, kTile, kShared, kPartials, kLayer, kGroups, kTasks, kCount };

// At least `bytes` bytes, 64-byte aligned, this thread's own for `slot` until the thread asks for that slot again.
// The contents are undefined. Throws std::bad_alloc: in a parallel region only under Attempts (parallel.h). Defined in
// scratch.cpp, compiled without -m flags.
void* scratch(Slot slot, size_t bytes);
[[noreturn]] void out_of_memory();

// For tests: after `good` more calls of scratch, of all threads, the next `bad` ones throw.
void fail_scratch(int64_t good, int64_t bad);

}  // namespace mint
