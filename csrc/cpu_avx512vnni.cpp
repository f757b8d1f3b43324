// x86-64 with AVX-512 VNNI: two dot products of bytes (high and low digits) for each 64 weights.
#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "cpu_kernels.h"
#include "cpu_target.h"

THL_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "cpu_math.h"

namespace thl {
namespace {

constexpr int kWidth = 16;
constexpr int64_t kPrefetchBytes = 4096;

inline int64_t wide_sum(__m512i v) {
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

// vpdpbusd multiplies unsigned by signed bytes, so the weights are raised by 128 (their top bit flipped) and
// 128 * sum of q is taken off the result. A lane gains at most 4 * 255 * 128 in each step of 64 columns.
template <int B>
void int8_dot(const int8_t* w, const PackedActivations& x, int64_t b0, int64_t begin, int64_t end,
              const int8_t* ahead, int64_t (&out)[B]) {
    const __m512i flip = _mm512_set1_epi8(-128);
    const int64_t padded = x.padded, count = end - begin;
    const int8_t* digits = x.digits.data() + 2 * (b0 * padded + begin);
    __m512i high[B], low[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) high[b] = low[b] = _mm512_setzero_si512();

    const auto step = [&](int64_t c, __mmask64 present) __attribute__((always_inline)) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + c), _MM_HINT_T0);
        const __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi8(present, w + c), flip);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const int8_t* at = digits + 2 * (b * padded + c);
            high[b] = _mm512_dpbusd_epi32(high[b], weights, _mm512_loadu_si512(at));
            low[b] = _mm512_dpbusd_epi32(low[b], weights, _mm512_loadu_si512(at + kDigitBlock));
        }
    };
    int64_t c = 0;
    for (; c + 64 <= count; c += 64) step(c, ~__mmask64{0});
    if (c < count) step(c, (__mmask64{1} << (count - c)) - 1);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
        out[b] = 256 * wide_sum(high[b]) + wide_sum(low[b]) - 128 * x.sum(b0 + b, begin, end);
}

bool supported() { return kAvx512.supported() && __builtin_cpu_supports("avx512vnni"); }

}  // namespace
}  // namespace thl

#include "cpu_kernels.inl"

namespace thl {
const Kernels kAvx512Vnni = table("avx512vnni", supported);
}
THL_TARGET_END
#endif
