// Products of int8 matrices with a few rows of activations, on a CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace thl::cuda {

enum class Float { f32, f16, bf16 };
enum class Gate { none, silu, gelu_tanh };

// Rows of floats at even distances; none where data is null. Distances count elements.
template <typename Pointer>
struct Rows {
    Pointer data = nullptr;
    Float type = Float::f32;
    int64_t row = 0;
};

// int8 rows with a float32 scale each, or one for each group of columns.
struct Int8Rows {
    const int8_t* data = nullptr;
    int64_t row = 0;
    const float* scales = nullptr;
    int64_t scales_row = 0;
};

// out [B, R] = x w^T + bias + residual or, with a gate, gate(x w^T + bias) * (x up^T) + residual; x [B, C], w and up
// [R, C], B and R at least 1.
struct GemvInt8 {
    Rows<const void*> x;
    Int8Rows w, up;
    const float* bias = nullptr;
    Rows<const void*> residual;
    Rows<void*> out;
    Gate gate = Gate::none;
    int batch = 0;
    int64_t rows = 0;
    int columns = 0;
    int group_shift = -1;  // 2^group_shift columns, at least 16, share a scale; negative: all of a row do
};

// How rows are shared out. Sums depend on `split` alone.
struct GemvShape {
    int rows;   // of weights that a warp reads at a time: 2 or 4; always 2 for 5 rows of activations or more
    int split;  // warps that share a row's columns: 1, 2, 4 or 8; at most 4 for 3 rows of activations, 2 for 5
};

// Queues the product. Throws std::runtime_error where the launch fails.
void gemv_int8(const GemvInt8& product, GemvShape shape, cudaStream_t stream);

}  // namespace thl::cuda
