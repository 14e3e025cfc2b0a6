// A table of function pointers per ISA, filled by its translation unit in isa/.
#pragma once
#include "ops.h"

namespace mint {

struct AnyIsa;  // names the functions' types; never instantiated

struct Table {
    const char* isa;
#define MINT_MEMBER(op)                    \
    decltype(&op<AnyIsa, float>) op##_f32; \
    decltype(&op<AnyIsa, bf16>) op##_bf16;
    MINT_OPS(MINT_MEMBER)
#undef MINT_MEMBER
};

#define MINT_ENTRY(op) &op<MINT_SIMD, float>, &op<MINT_SIMD, bf16>,

extern const Table table_scalar;
#if defined(__x86_64__)
extern const Table table_avx2, table_avx512, table_avx512_bf16, table_amx;
#endif

}  // namespace mint
