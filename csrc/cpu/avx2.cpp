// x86-64 with AVX2: weights widened to 16 bits, vpmaddwd with the 16-bit activations.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/target.h"

THL_TARGET("avx2")
#include "cpu/math.h"

namespace thl {
namespace {

constexpr int kWidth = 8;
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kColumnBlock = 4096;  // more would overflow the 32-bit sums

inline __m256 int8_floats(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

// Sums of 8 lanes as 64-bit integers.
inline int64_t wide_sum(__m256i v) {
    const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(v));
    const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1));
    const __m256i four = _mm256_add_epi64(low, high);
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return _mm_extract_epi64(two, 0) + _mm_extract_epi64(two, 1);
}

inline __m256i widen_int8(const int8_t* w, int64_t count) {
    if (count >= 16) return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    alignas(16) int8_t copy[16] = {};
    __builtin_memcpy(copy, w, count);
    return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(copy)));
}

// A lane gains at most 2 * 128 * 32639 in each step of 16 columns, less than 2^31 in kColumnBlock columns.
template <int B>
void int8_dot(const int8_t* w, const PackedRows& x, int64_t b0, int64_t begin, int64_t end,
              const int8_t* following, int64_t (&out)[B]) {
    const int64_t padded = x.padded, count = end - begin;
    const int16_t* q = x.q(b0) + begin;
    __m256i sum[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sum[b] = _mm256_setzero_si256();
    for (int64_t c = 0; c < count; c += 16) {
        if (c % 64 == 0) _mm_prefetch(ahead(w, following, c, end - begin, kPrefetchBytes), _MM_HINT_T0);
        const __m256i weights = widen_int8(w + c, count - c);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + b * padded + c));
            sum[b] = _mm256_add_epi32(sum[b], _mm256_madd_epi16(weights, values));
        }
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) out[b] = wide_sum(sum[b]);
}

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace
}  // namespace thl

#include "cpu/kernels.inl"

namespace thl {
const Kernels kAvx2 = table("avx2", supported);
}
THL_TARGET_END
#endif
