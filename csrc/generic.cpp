// Any processor, also of ARM: the vectors of the compiler, of 4 numbers.
#define INSTRUCTIONS generic
#include "table.h"

namespace tokengame::generic {

const Table<float>* table_float() { return table<float>(); }
const Table<bf16>* table_bf16() { return table<bf16>(); }

}  // namespace tokengame::generic
