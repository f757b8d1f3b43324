// The single-threaded kernels behind transformer.h, part of the table of kernels.h; defined in
// transformer.inl.
#pragma once

#include <cstdint>

namespace thl {

// Scores of up to kQueryRows queries at a time, a block of kKeyBlock keys after the other.
constexpr int64_t kQueryRows = 64, kKeyBlock = 64;

// Queries that look at the same keys and values.
struct AttentionRows {
    const float* const* queries;     // [rows]: pointers to d floats
    float* const* outs;              // [rows]
    const uint8_t* const* blocked;   // [rows]: pointers to bytes, one per key, or null; the array may be null
    int64_t rows, keys, d;
    const float *key, *value;
    int64_t key_stride, value_stride;
    float scale;
    float* scores;       // scratch [rows, keys]
    float* transposed;   // scratch [d, kKeyBlock]; used where rows share the keys
};

// The integrator's matrices: T is float or int8 with a scale per row.
struct Controller {
    const void* first;           // [hidden, 3 D]
    const float* first_scales;   // [hidden], null for floats
    int64_t first_stride;
    const void* second;          // transposed: [hidden, 3 D], contiguous
    const float* second_scales;  // [3 D], null for floats
    const float *first_bias, *second_bias, *mu;
    int64_t hidden, d;
};

constexpr int64_t kTokens = 4;     // rows of the integrator that share one load of weights
constexpr int64_t kFeatures = 16;  // computed at a time

struct TransformerKernels {
    // x / sqrt(mean(x^2) + eps) * weight; weight may be null. With `add`, of x + add instead of x.
    void (*rms_norm)(const float* x, const float* add, int64_t n, const float* weight, float eps, float* out);
    void (*rotate)(const float* x, const float* cos, const float* sin, int64_t d, float* out);
    void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
    void (*gelu)(const float* x, int64_t n, float* out);
    // gelu(g) * up in the tanh form, g = gate, or max(0, gate - bound) where `bound` is not null.
    void (*geglu)(const float* gate, const float* up, const float* bound, int64_t n, float* out);
    float (*upper_bound)(const float* x, int64_t n, float quantile);  // mean + quantile * standard deviation
    void (*attention)(const AttentionRows&);
    // Rows [begin, end) of the first matrix, columns [column, column + count), times inputs x[t] of `tokens` <= kTokens
    // tokens: with a null `start` sums[t][row] = product + bias, otherwise relu(start[t][row] + product).
    void (*controller_int8)(const Controller&, int64_t begin, int64_t end, int64_t column, int64_t count,
                            const float* const* x, const float* const* start, float* const* sums, int64_t tokens);
    void (*controller_f32)(const Controller&, int64_t begin, int64_t end, int64_t column, int64_t count,
                           const float* const* x, const float* const* start, float* const* sums, int64_t tokens);
    // One step of features [begin, end) of the tokens' positions and velocities, and how far the positions moved.
    void (*integrate_int8)(const Controller&, int64_t begin, int64_t end, const float* const* hidden, float* const* x,
                           float* const* v, float* const* moved, int64_t tokens);
    void (*integrate_f32)(const Controller&, int64_t begin, int64_t end, const float* const* hidden, float* const* x,
                          float* const* v, float* const* moved, int64_t tokens);
};

}  // namespace thl
