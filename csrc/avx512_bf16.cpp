// x86 with AVX-512 that multiplies bfloat16.
#define INSTRUCTIONS avx512_bf16
#if defined(__AVX512BF16__)
#include "table.h"
#else
#include "interface.h"
#endif

namespace tokengame::avx512_bf16 {

#if defined(__AVX512BF16__)
const Table<float>* table_float() { return nullptr; }  // as with AVX-512
const Table<bf16>* table_bf16() { return table<bf16>(); }
#else
const Table<float>* table_float() { return nullptr; }
const Table<bf16>* table_bf16() { return nullptr; }
#endif

}  // namespace tokengame::avx512_bf16
