// The single-threaded kernels of one instruction set, and the structures that they work on.
//
// kernels.inl holds one definition of all kernels; each <isa>.cpp compiles it with that instruction set.
// Sums run in the same 16 lanes, in the same order and without fused multiply-adds everywhere, and int8 products
// are exact integers, so every instruction set returns the same bits. No result depends on how rows are divided
// among calls or threads, nor on the other rows of a batch.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/transformer_kernels.h"

#define THL_INLINE inline __attribute__((always_inline))

namespace thl {

constexpr int64_t kGroup = 128;  // columns that share one scale where an int8 row has several
constexpr int64_t kDigitBlock = 64;
constexpr float kLargestQ = 32639;  // 127 * 256 + 127

// What lies `distance` bytes of reading behind position `c` of a piece of `count` weights and the one that follows it.
THL_INLINE const int8_t* ahead(const int8_t* w, const int8_t* following, int64_t c, int64_t count, int64_t distance) {
    return c + distance < count ? w + c + distance : following + (c + distance - count);
}

// Activations x [batch, columns] as 16-bit integers: x is about scale * q, |q| <= 32639, q = 256 * high + low with
// both digits signed int8. The error is at most half a step, scale / 2: for normally distributed x about 4e-5 of
// their norm. Columns are padded with zeros to a multiple of 128. The memory is that of a PackedActivations (linear.h).
struct PackedRows {
    // Cache lines, so that no load of 64 bytes takes two.
    struct alignas(64) Integers { int16_t q[kDigitBlock]; };
    struct alignas(64) Digits { int8_t high[kDigitBlock], low[kDigitBlock]; };

    int64_t batch = 0, columns = 0, padded = 0;
    Integers* integers = nullptr;  // [batch, padded / 64]
    Digits* digits = nullptr;      // [batch, padded / 64]
    int64_t* prefix = nullptr;     // [batch, padded / 128 + 1]: sum of q over the groups before
    float* scales = nullptr;       // [batch]; NaN where the row holds a NaN or an infinity

    THL_INLINE int16_t* q(int64_t b) const { return integers->q + b * padded; }

    // Sum of q over columns [begin, end); begin is a multiple of 128, and so is end unless it is the last column.
    THL_INLINE int64_t sum(int64_t b, int64_t begin, int64_t end) const {
        const int64_t* row = prefix + b * (padded / kGroup + 1);
        return row[(end + kGroup - 1) / kGroup] - row[begin / kGroup];
    }
};

// out[b, row] = x[b] . w[row] * scale + bias[row]; strides in elements.
struct Int8Linear {
    const PackedRows* x;
    const int8_t* w;
    int64_t w_stride;
    const float* scales;     // [rows], or [rows, groups]
    int64_t scales_stride;   // of a row
    bool grouped;
    const float* bias;       // may be null
    float* out;
    int64_t out_stride;
};

struct FloatLinear {
    const float* x;
    int64_t x_stride, batch, columns;
    const void* w;
    int64_t w_stride;
    const float* bias;  // may be null
    float* out;
    int64_t out_stride;
};

// out[b] (+)= sum over rows of x[b, row] * scale[row] * w[row], in ascending order of rows.
struct Transposed {
    const float* x;
    int64_t x_stride, batch, rows;
    const void* w;
    int64_t w_stride;
    const float* scales;    // null for float weights
    int64_t scales_stride;  // of a row
    bool grouped;
    float* out;
    int64_t out_stride;
    bool accumulate;
};

struct Kernels {
    const char* name;
    bool (*supported)();
    // One row of activations into row b of `packed`, whose memory has been reserved.
    void (*pack)(const float* x, int64_t b, PackedRows& packed);
    // Rows [begin, end) of the weights.
    void (*linear_int8)(const Int8Linear&, int64_t begin, int64_t end);
    void (*linear_f32)(const FloatLinear&, int64_t begin, int64_t end);
    void (*linear_bf16)(const FloatLinear&, int64_t begin, int64_t end);
    void (*linear_f16)(const FloatLinear&, int64_t begin, int64_t end);
    // Columns [begin, end) of the output; with grouped scales `begin` is a multiple of kGroup. int8 rows are read only
    // where x is not zero.
    void (*transposed_int8)(const Transposed&, int64_t begin, int64_t end);
    void (*transposed_f32)(const Transposed&, int64_t begin, int64_t end);
    void (*transposed_bf16)(const Transposed&, int64_t begin, int64_t end);
    void (*transposed_f16)(const Transposed&, int64_t begin, int64_t end);
    // Sum of squares of n floats.
    float (*square_sum)(const float* x, int64_t n);
    // x = decay * x + gate * add (add may be null), and the sum of squares of the result, as square_sum gives it.
    float (*decay_add)(float* x, int64_t n, float decay, float gate, const float* add);
    void (*layer_norm)(const float* x, int64_t n, const float* weight, const float* bias, float eps, float* out);
    void (*gru_reset)(const float* reset, const float* state, int64_t n, float* out);
    void (*gru_update)(const float* update, const float* candidate, int64_t n, float* state);
    // Sum of n floats read once, in 16 lanes: the plain read that bandwidth is measured with.
    float (*read)(const float* x, int64_t n);
    // out times the product, for rows [begin, end) of the weights; those for which out is zero are not read.
    void (*multiply_int8)(const Int8Linear&, int64_t begin, int64_t end);
    void (*multiply_f32)(const FloatLinear&, int64_t begin, int64_t end);
    void (*multiply_bf16)(const FloatLinear&, int64_t begin, int64_t end);
    void (*multiply_f16)(const FloatLinear&, int64_t begin, int64_t end);
    TransformerKernels transformer;
    // Rows [begin, end) of the weights, with one scale each, times rows [first, last) of many activations; same bits
    // as linear_int8. Null where that is as fast.
    void (*int8_product)(const Int8Linear&, int64_t begin, int64_t end, int64_t first, int64_t last);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Vnni;
#endif

// The instruction set in use: the best that this processor has, unless set_isa chose another.
const Kernels& kernels();
std::vector<const char*> available_isas();          // ascending
void set_isa(const char* name);                     // std::invalid_argument unless available

}  // namespace thl
