// x86 with AMX: tiles multiply bfloat16.
#define INSTRUCTIONS amx
#if defined(__AMX_BF16__)
#include "table.h"
#else
#include "interface.h"
#endif

namespace tokengame::amx {

#if defined(__AMX_BF16__)
const Table<float>* table_float() { return nullptr; }  // as with AVX-512
const Table<bf16>* table_bf16() { return table<bf16>(); }
#else
const Table<float>* table_float() { return nullptr; }
const Table<bf16>* table_bf16() { return nullptr; }
#endif

}  // namespace tokengame::amx
