// Elementary functions on floats, or on vectors of floats (GCC's vector_size), with the same bits: no branches, no
// table, no library call. Compilers do not always turn loops over the former into vector code. Coefficients from the
// Cephes library (Moshier), expf.c and tanhf.c; relative error below 3e-7.
#pragma once

#include <cstdint>

namespace thl {
namespace {

template <typename V>
struct Bits {
    typedef uint32_t type __attribute__((vector_size(sizeof(V))));
};

template <>
struct Bits<float> {
    using type = uint32_t;
};

// Saturates outside [-87.3, 88.3] instead of reaching 0 or infinity. NaN stays NaN.
template <typename V>
inline V exp_f32(V x) {
    x = x < -87.3f ? V{} - 87.3f : x;
    x = x > 88.3f ? V{} + 88.3f : x;
    // Adding 1.5 * 2^23 rounds to an integer n, which then stands in the low bits of the sum.
    const V shifted = x * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const auto exponent = __builtin_bit_cast(typename Bits<V>::type, shifted) - 0x4B400000u;  // n as an integer
    return p * __builtin_bit_cast(V, (exponent + 127u) << 23);
}

template <typename V>
inline V sigmoid_f32(V x) {
    return 1.0f / (1.0f + exp_f32(-x));
}

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

// log(1 + exp(x)), with relative accuracy where it is small too.
template <typename V>
inline V softplus_f32(V x) {
    const V u = exp_f32(x < 0.0f ? x : -x);
    // log(1 + u) = 2 artanh(s), s = u / (2 + u) <= 1/3: its power series.
    const V s = u / (2.0f + u);
    const V square = s * s;
    V p = 0.0769230769f * square + 0.0909090909f;
    p = p * square + 0.111111111f;
    p = p * square + 0.142857143f;
    p = p * square + 0.2f;
    p = p * square + 0.333333333f;
    return (x > 0.0f ? x : V{}) + 2.0f * (p * square * s + s);
}

// (1 + erf(x / sqrt(2))) / 2. erfc from Numerical Recipes (Press et al.), erfcc: relative error 1.2e-7 in exact
// arithmetic.
template <typename V>
inline V normal_cdf_f32(V x) {
    const V z = (x < 0.0f ? -x : x) * 0.707106781f;
    const V t = 1.0f / (1.0f + 0.5f * z);
    V p = 0.17087277f * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const V tail = 0.5f * t * exp_f32(p - z * z);
    return x < 0.0f ? tail : 1.0f - tail;
}

}  // namespace
}  // namespace thl
