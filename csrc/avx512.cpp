// x86 with AVX-512: vectors of 16 numbers.
#define INSTRUCTIONS avx512
#if defined(__AVX512F__)
#include "table.h"
#else
#include "interface.h"
#endif

namespace tokengame::avx512 {

#if defined(__AVX512F__)
const Table<float>* table_float() { return table<float>(); }
const Table<bf16>* table_bf16() { return table<bf16>(); }
#else
const Table<float>* table_float() { return nullptr; }
const Table<bf16>* table_bf16() { return nullptr; }
#endif

}  // namespace tokengame::avx512
