// The table of one instruction set, made of everything above. Included by the source file of each.
#pragma once

#include "game.h"

namespace tokengame::INSTRUCTIONS {

// Calls a function; 1 if it threw, which it does without memory, or 2 in a debug build where an argument is not as
// csrc/interface.h says. No exception leaves the library.
template <auto function, class... Arguments>
int guarded(Arguments... arguments) {
    try {
        function(arguments...);
        return 0;
    } catch (const Violated&) {
        return 2;
    } catch (...) {
        return 1;
    }
}

template <class Number>
const Table<Number>* table() {
    static constexpr Table<Number> functions{
        sizeof(Operand<Number>), guarded<pack_weight<Number>>, guarded<normed_linear<Number>>, guarded<residual_linear<Number>>,
        guarded<residual_mlp<Number>>, guarded<embed<Number>>, guarded<attention<Number>>, guarded<class_attention<Number>>,
        guarded<observe<Number>>, guarded<absorb<Number>>, guarded<run_half_blocks<Number>>, guarded<last_block<Number>>,
        fused_workspace<Number>, guarded<fused_forward<Number>>};
    return &functions;
}

}  // namespace tokengame::INSTRUCTIONS
