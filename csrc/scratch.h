// Scratch memory that a thread keeps between calls: fresh pages would cost a fault per 4 KB on every call.
#pragma once
#include <cstddef>

namespace mint {

enum class Slot { kPanelsA, kPanelsB, kTile, kShared, kPartials, kLayer, kGroups, kTasks, kCount };

// At least `bytes` bytes, 64-byte aligned, this thread's own for `slot` until the thread asks for that slot again.
// The contents are undefined. Throws std::bad_alloc. Defined in scratch.cpp, compiled without -m flags.
void* scratch(Slot slot, size_t bytes);
void* try_scratch(Slot slot, size_t bytes) noexcept;  // null instead: inside parallel regions
[[noreturn]] void out_of_memory();

}  // namespace mint
