// x86-64 with AVX-512 VNNI: two dot products of bytes (high and low digits) for each 64 weights.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/target.h"

THL_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "cpu/math.h"

namespace thl {
namespace {

constexpr int kWidth = 16;
constexpr int64_t kPrefetchBytes = 4096;
// The digits of so many activations, 24 KiB, stay in the first-level cache (48 KiB) while eight rows pass by. On EPYC
// (Zen 5, two threads) rows of 36,864 reach 0.79 of the read bandwidth of 73 GB/s so, and 0.63 in one piece.
constexpr int64_t kColumnBlock = 12288;

inline __m512 int8_floats(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

// The sums of the lanes of a, b, c and d.
inline __m128i fold(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// vpdpbusd multiplies unsigned by signed bytes, so the weights are raised by 128 (their top bit flipped) and
// 128 * sum of q is taken off the result. The sums over kColumnBlock columns, at most 12288 * 255 * 128, fit 32 bits.
template <int B>
void int8_dot(const int8_t* w, const PackedRows& x, int64_t b0, int64_t begin, int64_t end,
              const int8_t* following, int64_t (&out)[B]) {
    const __m512i flip = _mm512_set1_epi8(-128);
    const int64_t count = end - begin, blocks = x.padded / kDigitBlock;
    const PackedRows::Digits* digits = x.digits + b0 * blocks + begin / kDigitBlock;
    __m512i high[B], low[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) high[b] = low[b] = _mm512_setzero_si512();

    const auto step = [&](int64_t i, __mmask64 present, const int8_t* ahead) __attribute__((always_inline)) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
        const __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi8(present, w + kDigitBlock * i), flip);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            const PackedRows::Digits& at = digits[b * blocks + i];
            high[b] = _mm512_dpbusd_epi32(high[b], weights, _mm512_load_si512(at.high));
            low[b] = _mm512_dpbusd_epi32(low[b], weights, _mm512_load_si512(at.low));
        }
    };
    const int64_t whole = count / kDigitBlock, rest = count % kDigitBlock;
    const int64_t turn = count > kPrefetchBytes ? (count - kPrefetchBytes) / kDigitBlock : 0;
    int64_t i = 0;
    for (; i < turn; ++i) step(i, ~__mmask64{0}, w + kDigitBlock * i + kPrefetchBytes);
    for (; i < whole; ++i) step(i, ~__mmask64{0}, ahead(w, following, kDigitBlock * i, count, kPrefetchBytes));
    if (rest) step(whole, (__mmask64{1} << rest) - 1, following);
#pragma GCC unroll 4
    for (int b = 0; b < B; b += 2) {
        const int second = b + 1 < B ? b + 1 : b;
        const __m128i sums = fold(high[b], low[b], high[second], low[second]);
        const int64_t first_dot = 256 * int64_t{_mm_extract_epi32(sums, 0)} + _mm_extract_epi32(sums, 1);
        const int64_t second_dot = 256 * int64_t{_mm_extract_epi32(sums, 2)} + _mm_extract_epi32(sums, 3);
        out[b] = first_dot - 128 * x.sum(b0 + b, begin, end);
        if (second != b) out[second] = second_dot - 128 * x.sum(b0 + second, begin, end);
    }
}

bool supported() { return kAvx512.supported() && __builtin_cpu_supports("avx512vnni"); }

}  // namespace
}  // namespace thl

#include "cpu/kernels.inl"
#include "cpu/gemm.inl"
#include "cpu/gemv.inl"

namespace thl {
const Kernels kAvx512Vnni = table("avx512vnni", supported, int8_product, int8_few);
}
THL_TARGET_END
#endif
