// Linear maps on all threads of the pool. Arguments have been checked by the caller (bind_linear.cpp).
#pragma once

#include "cpu_kernels.h"

namespace thl {

enum class Weight { i8, f32, bf16, f16 };

// Rows of x are `stride` floats apart. The memory of `packed` is kept from call to call.
void pack_activations(const float* x, int64_t stride, int64_t batch, int64_t columns, PackedActivations& packed);

// Of silu(gate) * up.
void pack_swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t batch,
                 int64_t columns, PackedActivations& packed);

void linear_int8(const Int8Linear& arguments, int64_t rows);
void linear_float(Weight type, const FloatLinear& arguments, int64_t rows);
void linear_transposed(Weight type, const Transposed& arguments, int64_t columns);

// Seconds that the pool's threads take to read `count` floats once.
double read_seconds(const float* data, int64_t count);

// Bytes per second at which the pool's threads read `nbytes` of memory once: the median of `repeats` passes.
double memory_bandwidth(int64_t nbytes, int repeats);

}  // namespace thl
