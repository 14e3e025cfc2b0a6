// Every op compiled for avx512_bf16 (its -m flags are in setup.py).
#include "../simd/avx512_bf16.h"

#include "../table.h"

#define MINT_SIMD Avx512Bf16

namespace mint {
const Table table_avx512_bf16 = {"avx512_bf16", MINT_OPS(MINT_ENTRY)};
}  // namespace mint
