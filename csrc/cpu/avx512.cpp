// x86-64 with AVX-512 (F, BW, DQ, VL): weights widened to 16 bits, vpmaddwd with the 16-bit activations.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/target.h"

THL_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#include "cpu/math.h"

namespace thl {
namespace {

constexpr int kWidth = 16;
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kColumnBlock = 4096;  // more would overflow the 32-bit sums

inline __m512 int8_floats(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

inline int64_t wide_sum(__m512i v) {
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(v));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

// A lane gains at most 2 * 128 * 32639 in each step of 32 columns, less than 2^31 in kColumnBlock columns.
template <int B>
void int8_dot(const int8_t* w, const PackedRows& x, int64_t b0, int64_t begin, int64_t end,
              const int8_t* following, int64_t (&out)[B]) {
    const int64_t padded = x.padded, count = end - begin;
    const int16_t* q = x.q(b0) + begin;
    __m512i sum[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sum[b] = _mm512_setzero_si512();
    for (int64_t c = 0; c < count; c += 32) {
        if (c % 64 == 0) _mm_prefetch(ahead(w, following, c, end - begin, kPrefetchBytes), _MM_HINT_T0);
        const __mmask32 present = count - c >= 32 ? ~0u : (1u << (count - c)) - 1;
        const __m512i weights = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(present, w + c));
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
            sum[b] = _mm512_add_epi32(sum[b], _mm512_madd_epi16(weights, _mm512_load_si512(q + b * padded + c)));
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) out[b] = wide_sum(sum[b]);
}

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace
}  // namespace thl

#include "cpu/kernels.inl"

namespace thl {
const Kernels kAvx512 = table("avx512", supported);
}
THL_TARGET_END
#endif
