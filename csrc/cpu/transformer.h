// Operations between the matrix products of INL, HIM and HRM: norms, rotary embedding, attention, activations, and
// INL's integrator. Arguments have been checked by the caller (bind/transformer.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/transformer_kernels.h"

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

// gelu(gate) * up in the tanh form; with a quantile, of what each row of gate exceeds its mean by that many deviations.
void geglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t batch, int64_t d,
           const float* quantile, float* out, int64_t out_stride);

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
    const float *norm_weight, *norm_bias;  // [D], of a layer normalisation of x before; null for none
    float norm_eps;
    const float* context;  // [N, D]
    int64_t context_stride;
    float* values;         // [N, 2 D], output: x and v of each row
    int64_t* iterations;   // [N], output
};

// A matrix in memory of its own, row by row or transposed: float32, or int8 with a scale for each row. The memory is
// kept from one matrix to the next.
struct KeptMatrix {
    explicit KeptMatrix(bool transposed) : transposed(transposed) {}

    // Rows [start, start + count) of a matrix [rows, columns], of which start 0 begins a new one.
    void take(int64_t rows, int64_t columns, int64_t start, int64_t count, const void* w, int64_t stride,
              const float* scales);
    const float* scale() const { return int8 ? scales.data() : nullptr; }

    const bool transposed;
    bool int8 = false;
    int64_t rows = 0, columns = 0;
    std::vector<char> data;
    std::vector<float> scales;
};

// Returns the number of steps made.
int64_t integrate(const Integrate& arguments, const Controller& controller);

}  // namespace thl
