// Operations between the matrix products of HIM's encoder: residual sums, the two-speed blend, the slot memory.
// Arguments have been checked by the caller (bind/encoder.cpp).
#pragma once

#include <cstdint>

#include "cpu/state.h"

namespace thl {

// sum = x + add, and its layer normalisation.
void add_layer_norm(Rows x, Rows add, int64_t batch, int64_t d, const float* weight, const float* bias, float eps,
                    Rows sum, Rows out);

// out = x + fast + sigmoid(gate) * (slow - fast); gate [d].
void add_blend(Rows x, Rows fast, Rows slow, const float* gate, int64_t batch, int64_t d, Rows out);

// out = x + scale * add.
void add_scaled(Rows x, Rows add, float scale, int64_t batch, int64_t d, Rows out);

// out[b, j] = memory[b, j] * (1 - sigmoid(erase[b])) + add[b], normalised to zero mean and unit variance.
void erase_then_add(Slots memory, Rows erase, Rows add, int64_t batch, int64_t slots, int64_t d, float eps, Slots out);

}  // namespace thl
