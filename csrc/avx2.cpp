// x86 with AVX2 and FMA: vectors of 8 numbers.
#define INSTRUCTIONS avx2
#if defined(__AVX2__) && defined(__FMA__)
#include "table.h"
#else
#include "interface.h"
#endif

namespace tokengame::avx2 {

#if defined(__AVX2__) && defined(__FMA__)
const Table<float>* table_float() { return table<float>(); }
const Table<bf16>* table_bf16() { return table<bf16>(); }
#else
const Table<float>* table_float() { return nullptr; }
const Table<bf16>* table_bf16() { return nullptr; }
#endif

}  // namespace tokengame::avx2
