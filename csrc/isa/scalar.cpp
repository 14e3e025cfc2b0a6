// Every op compiled for scalar (its -m flags are in setup.py).
#include "../simd/scalar.h"

#include "../table.h"

#define MINT_SIMD Scalar

namespace mint {
const Table table_scalar = {"scalar", MINT_OPS(MINT_ENTRY)};
}  // namespace mint
