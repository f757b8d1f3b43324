// Linear maps on all threads of the pool. Arguments have been checked by the caller (bind/linear.cpp).
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace thl {

enum class Weight { i8, f32, bf16, f16 };

// A layer normalisation; none without a weight.
struct Norm {
    const float *weight = nullptr, *bias = nullptr;
    float eps = 0.0f;
};

// Memory for packed activations, kept from one use to the next.
class PackedActivations : public PackedRows {
public:
    PackedActivations() = default;
    PackedActivations(const PackedActivations&) = delete;
    PackedActivations& operator=(const PackedActivations&) = delete;

    // Room for a batch, whose values are whatever was there. Memory that is too large is kept too: growing back would
    // fill it with zeros.
    void reshape(int64_t new_batch, int64_t new_columns);

private:
    std::vector<Integers> integers_;
    std::vector<Digits> digits_;
    std::vector<int64_t> prefix_;
    std::vector<float> scales_;
};

// Rows of x, normalised first, are `stride` floats apart.
void pack_activations(const float* x, int64_t stride, int64_t batch, int64_t columns, const Norm& norm,
                      PackedActivations& packed);

// Of silu(gate) * up.
void pack_swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t batch,
                 int64_t columns, PackedActivations& packed);

// What follows a product while it is in the cache: out = addend + gelu(out), each where asked for.
struct Epilogue {
    bool gelu = false;
    const float* addend = nullptr;
    int64_t addend_stride = 0;
};

void linear_int8(const Int8Linear& arguments, int64_t rows, const Epilogue& epilogue);
void linear_float(Weight type, const FloatLinear& arguments, int64_t rows, const Epilogue& epilogue);
// out times these products; rows of weights for which out is zero are not read. No bias.
void multiply_int8(const Int8Linear& arguments, int64_t rows);
void multiply_float(Weight type, const FloatLinear& arguments, int64_t rows);
void linear_transposed(Weight type, const Transposed& arguments, int64_t columns);

// Seconds that the pool's threads take to read `count` floats once.
double read_seconds(const float* data, int64_t count);

// Bytes per second at which the pool's threads read `nbytes` of memory once: the median of `repeats` passes.
double memory_bandwidth(int64_t nbytes, int repeats);

}  // namespace thl
