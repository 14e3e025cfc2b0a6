// Every op compiled for avx2 (its -m flags are in setup.py).
#include "../simd/avx2.h"

#include "../table.h"

#define MINT_SIMD Avx2

namespace mint {
const Table table_avx2 = {"avx2", MINT_OPS(MINT_ENTRY)};
}  // namespace mint
