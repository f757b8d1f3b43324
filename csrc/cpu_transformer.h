// Operations between the matrix products of INL, HIM and HRM: norms, rotary embedding, attention, activations, and
// INL's integrator. Arguments have been checked by the caller (bind_transformer.cpp).
#pragma once

#include <cstdint>

#include "cpu_transformer_kernels.h"

namespace thl {

// float32 [.., .., .., d] whose last dimension is contiguous; strides in elements.
struct Grid {
    float* data;
    int64_t stride[3];
    float* row(int64_t i, int64_t j, int64_t k) const { return data + i * stride[0] + j * stride[1] + k * stride[2]; }
};

// Of x + add where there is one; weight may be null.
void rms_norm(const float* x, int64_t x_stride, const float* add, int64_t add_stride, int64_t batch, int64_t d,
              const float* weight, float eps, float* out, int64_t out_stride);

// x and out [B, A, T, d], cos and sin [T, d].
void rotate(Grid x, const int64_t (&shape)[4], const float* cos, int64_t cos_stride, const float* sin,
            int64_t sin_stride, Grid out);

void swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t batch, int64_t d,
            float* out, int64_t out_stride);

void gelu(const float* x, int64_t x_stride, int64_t batch, int64_t d, float* out, int64_t out_stride);

struct Attention {
    int64_t batch, heads, key_heads, rows, keys, d;
    Grid query, key, value, out;
    const uint8_t* blocked;     // null for none
    int64_t blocked_stride[3];  // over batch, heads and rows; keys are contiguous
    float scale;
    const float *cos, *sin;     // tables [rows, d] by which queries and keys, as many, are rotated; null for none
};

void attention(const Attention& arguments);

struct Integrate {
    int64_t rows, steps;
    int64_t first_check;   // steps made before the first test for convergence
    float threshold;       // negative for none
    bool together;
    const float* start;    // x [N, D]
    int64_t start_stride;
    const float* context;  // [N, D]
    int64_t context_stride;
    float* values;         // [N, 2 D], output: x and v of each row
    int64_t* iterations;   // [N], output
};

// Returns the number of steps made. `second` [3 D, hidden] is transposed here, into memory of its own.
int64_t integrate(const Integrate& arguments, Controller controller, const void* second, int64_t second_stride);

}  // namespace thl
