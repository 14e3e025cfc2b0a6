// Every op compiled for AMX (its -m flags are in setup.py).
#include "../simd/amx.h"

#include "../table.h"

#define MINT_SIMD Amx

namespace mint {
const Table table_amx = {"amx", MINT_OPS(MINT_ENTRY)};
}  // namespace mint
