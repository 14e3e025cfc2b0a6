// Every op compiled for avx512 (its -m flags are in setup.py).
#include "../simd/avx512.h"

#include "../table.h"

#define MINT_SIMD Avx512

namespace mint {
const Table table_avx512 = {"avx512", MINT_OPS(MINT_ENTRY)};
}  // namespace mint
