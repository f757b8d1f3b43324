// gemv_int8 for ctypes. Types: 0 float32, 1 float16, 2 bfloat16. Gate: 0 none, 1 silu, 2 gelu_tanh.
#include "cuda/gemv_int8.h"

#include <cstdio>
#include <exception>

extern "C" int run_gemv(const void* x, int x_type, int64_t x_row, const int8_t* w, int64_t w_row, const float* scales,
                        int64_t scales_row, const int8_t* up, int64_t up_row, const float* up_scales,
                        int64_t up_scales_row, const float* bias, const void* residual, int residual_type,
                        int64_t residual_row, void* out, int out_type, int64_t out_row, int gate, int batch,
                        int64_t rows, int columns, int group_shift, int warp_rows, int split) {
    using namespace thl::cuda;
    GemvInt8 product;
    product.x = {x, static_cast<Float>(x_type), x_row};
    product.w = {w, w_row, scales, scales_row};
    product.up = {up, up_row, up_scales, up_scales_row};
    product.bias = bias;
    product.residual = {residual, static_cast<Float>(residual_type), residual_row};
    product.out = {out, static_cast<Float>(out_type), out_row};
    product.gate = static_cast<Gate>(gate);
    product.batch = batch;
    product.rows = rows;
    product.columns = columns;
    product.group_shift = group_shift;
    try {
        gemv_int8(product, {warp_rows, split}, nullptr);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
