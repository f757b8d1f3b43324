// Elementary functions on floats that compilers turn into vector code: no branches, no table, no library call.
// Coefficients from the Cephes library (Moshier), expf.c and tanhf.c; relative error below 3e-7.
#pragma once

#include <bit>
#include <cstdint>

namespace thl {
namespace {

// Saturates outside [-87.3, 88.3] instead of reaching 0 or infinity. NaN stays NaN.
inline float exp_f32(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    // Adding 1.5 * 2^23 rounds to an integer n, which then stands in the low bits of the sum.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - 0x4B400000u;  // n as an integer
    return p * std::bit_cast<float>((exponent + 127u) << 23);
}

inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

inline float tanh_f32(float x) {
    const float magnitude = x < 0.0f ? -x : x;
    const float square = x * x;
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float near_zero = p * square * x + x;
    const float far = 1.0f - 2.0f / (exp_f32(2.0f * magnitude) + 1.0f);
    const float signed_far = x < 0.0f ? -far : far;
    return magnitude < 0.625f ? near_zero : signed_far;
}

}  // namespace
}  // namespace thl
