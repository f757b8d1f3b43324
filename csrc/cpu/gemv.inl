// Products of int8 weights with few rows of activations, for AVX-512 VNNI. Included by avx512vnni.cpp after
// kernels.inl, of whose linear_int8 it has the bits.
//
// A short row's products are soon made: what costs time is adding up the lanes of its sums and finishing them one by
// one. Here the sums of 16 pairs of rows are folded into one register and finished together.

namespace thl {
namespace {

// 16 sums. GCC keeps them in place in a loop if they have this type, and moves them about as __m512i.
typedef int32_t Sums __attribute__((vector_size(64)));

constexpr int kPairs = 16;  // of a row of weights and a row of activations
// Longer rows are left to linear_int8, which keeps the activations in the first-level cache.
constexpr int64_t kFoldedColumns = 4096;
// 512 * 128 * 32639: sums of so many columns fit 32 bits, their terms may wrap around.
constexpr int64_t kShortColumns = 512;

THL_INLINE void add_dots(Sums& sums, __m512i weights, const int8_t* digits) {
    sums = reinterpret_cast<Sums>(
        _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), weights, _mm512_load_si512(digits)));
}

// Each 128-bit part has a sum of one part of a, b, c and d.
THL_INLINE __m512i quarters(const Sums* x) {
    const auto a = reinterpret_cast<__m512i>(x[0]), b = reinterpret_cast<__m512i>(x[1]),
               c = reinterpret_cast<__m512i>(x[2]), d = reinterpret_cast<__m512i>(x[3]);
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

THL_INLINE __m512i halves(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// The total of each.
THL_INLINE __m512i totals(const Sums (&x)[kPairs]) {
    return halves(halves(quarters(x), quarters(x + 4)), halves(quarters(x + 8), quarters(x + 12)));
}

// Rows [row, row + rows) of the weights times B rows of activations; pair b * R + r is of row r and activations b.
template <int B>
void folded(const Int8Linear& a, int64_t row, int64_t rows, int64_t b0) {
    constexpr int R = kPairs / (B == 3 ? 4 : B);
    const __m512i flip = _mm512_set1_epi8(-128);
    const int64_t columns = a.x->columns, blocks = a.x->padded / kDigitBlock, whole = columns / kDigitBlock;
    const __mmask64 rest = (__mmask64{1} << columns % kDigitBlock) - 1;
    const PackedRows::Digits* digits = a.x->digits + b0 * blocks;
    Sums high[kPairs] = {}, low[kPairs] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const int8_t* w = a.w + (row + r) * a.w_stride;
        Sums h[B] = {}, l[B] = {};
        const auto step = [&](int64_t i, __mmask64 present) __attribute__((always_inline)) {
            _mm_prefetch(reinterpret_cast<const char*>(w + kDigitBlock * i + kPrefetchBytes), _MM_HINT_T0);
            const __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi8(present, w + kDigitBlock * i), flip);
            THL_UNROLL for (int b = 0; b < B; ++b) {
                add_dots(h[b], weights, digits[b * blocks + i].high);
                add_dots(l[b], weights, digits[b * blocks + i].low);
            }
        };
        for (int64_t i = 0; i < whole; ++i) step(i, ~__mmask64{0});
        if (rest) step(whole, rest);
        THL_UNROLL for (int b = 0; b < B; ++b) {
            high[b * R + r] = h[b];
            low[b * R + r] = l[b];
        }
    }

    alignas(64) int64_t offsets[kPairs] = {};
    alignas(64) float factors[kPairs] = {};
    THL_UNROLL for (int b = 0; b < B; ++b) {
        const int64_t offset = -128 * a.x->sum(b0 + b, 0, columns);
        THL_UNROLL for (int r = 0; r < R; ++r) {
            offsets[b * R + r] = offset;
            factors[b * R + r] = a.x->scales[b0 + b];
        }
    }
    const __m512i tops = totals(high), bottoms = totals(low);
    const __m512i offset[2] = {_mm512_load_si512(offsets), _mm512_load_si512(offsets + 8)};
    __m512 value;
    if (columns <= kShortColumns) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(tops, 8), bottoms);
        const __m512i taken = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(offset[0])),
                                                 _mm512_cvtepi64_epi32(offset[1]), 1);
        value = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, taken));
    } else {
        __m256 half[2];
        THL_UNROLL for (int i = 0; i < 2; ++i) {
            const auto wide = [i](__m512i x) __attribute__((always_inline)) {
                return _mm512_cvtepi32_epi64(i ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
            };
            const __m512i sum = _mm512_add_epi64(_mm512_slli_epi64(wide(tops), 8), wide(bottoms));
            half[i] = _mm512_cvtepi64_ps(_mm512_add_epi64(sum, offset[i]));
        }
        value = _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1);
    }

    const __mmask16 present = static_cast<__mmask16>((1u << rows) - 1);
    const auto of_rows = [&](const float* x) __attribute__((always_inline)) {
        const __m512 some = _mm512_maskz_loadu_ps(present, x + row);
        if constexpr (R == 16) return some;
        else if constexpr (R == 8) return _mm512_broadcast_f32x8(_mm512_castps512_ps256(some));
        else return _mm512_broadcast_f32x4(_mm512_castps512_ps128(some));
    };
    value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_load_ps(factors)), of_rows(a.scales));
    if (a.bias) value = _mm512_add_ps(value, of_rows(a.bias));
    alignas(64) float out[kPairs];
    _mm512_store_ps(out, value);
    THL_UNROLL for (int b = 0; b < B; ++b)
        _mm512_mask_storeu_ps(a.out + (b0 + b) * a.out_stride + row, present,
                              _mm512_maskz_loadu_ps(present, out + b * R));
}

template <int B>
void folded_rows(const Int8Linear& a, int64_t row, int64_t rows, int64_t b0) {
    constexpr int R = kPairs / (B == 3 ? 4 : B);
    for (int64_t r = 0; r < rows; r += R) folded<B>(a, row + r, least(R, rows - r), b0);
}

// Four groups of columns from w on, the first of them `group`: out[b][g] = dot product with row b0 + b.
template <int B>
void four_groups(const int8_t* w, const PackedRows& x, int64_t b0, int64_t group, int32_t (&out)[B][4]) {
    const __m512i flip = _mm512_set1_epi8(-128);
    const int64_t blocks = x.padded / kDigitBlock;
    const PackedRows::Digits* digits = x.digits + b0 * blocks + 2 * group;
    Sums sum[B][4];
    THL_UNROLL for (int g = 0; g < 4; ++g) {
        __m512i weights[2];
        THL_UNROLL for (int i = 0; i < 2; ++i) {
            const int8_t* block = w + kDigitBlock * (2 * g + i);
            _mm_prefetch(reinterpret_cast<const char*>(block + kPrefetchBytes), _MM_HINT_T0);
            weights[i] = _mm512_xor_si512(_mm512_loadu_si512(block), flip);
        }
        THL_UNROLL for (int b = 0; b < B; ++b) {
            Sums high{}, low{};
            THL_UNROLL for (int i = 0; i < 2; ++i) {
                add_dots(high, weights[i], digits[b * blocks + 2 * g + i].high);
                add_dots(low, weights[i], digits[b * blocks + 2 * g + i].low);
            }
            sum[b][g] = 256 * high + low;
        }
    }
    THL_UNROLL for (int b = 0; b < B; ++b) {
        const int64_t* prefix = x.prefix + (b0 + b) * (x.padded / kGroup + 1) + group;
        const __m256i raised = _mm256_sub_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(prefix + 1)),
                                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(prefix)));
        const __m512i parts = quarters(sum[b]);
        const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(parts), _mm512_extracti64x4_epi64(parts, 1));
        const __m128i dots = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out[b]),
                         _mm_sub_epi32(dots, _mm_slli_epi32(_mm256_cvtepi64_epi32(raised), 7)));
    }
}

template <int B>
void grouped_row(const Int8Linear& a, int64_t row, int64_t b0) {
    const int8_t* w = a.w + row * a.w_stride;
    const float* scales = a.scales + row * a.scales_stride;
    const int64_t columns = a.x->columns;
    double sums[B] = {};
    int64_t group = 0;
    for (; (group + 4) * kGroup <= columns; group += 4) {
        int32_t dots[B][4];
        four_groups<B>(w + group * kGroup, *a.x, b0, group, dots);
        THL_UNROLL for (int g = 0; g < 4; ++g)
            THL_UNROLL for (int b = 0; b < B; ++b) sums[b] += static_cast<double>(dots[b][g]) * scales[group + g];
    }
    for (; group * kGroup < columns; ++group) {
        const int64_t begin = group * kGroup, end = least(begin + kGroup, columns);
        int64_t dots[B];
        int8_dot<B>(w + begin, *a.x, b0, begin, end, w + end, dots);
        for (int b = 0; b < B; ++b) sums[b] += static_cast<double>(dots[b]) * scales[group];
    }
    for (int b = 0; b < B; ++b) finish_int8(a, row, b0 + b, static_cast<float>(sums[b] * a.x->scales[b0 + b]));
}

void int8_few(const Int8Linear& a, int64_t begin, int64_t end) {
    if (!a.grouped && a.x->columns > kFoldedColumns) return linear_int8(a, begin, end);
    const int64_t batch = a.x->batch;
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = a.grouped ? 1 : least(kPairs, end - row);
        for (int64_t b = 0; b < batch; b += kBatchBlock) {
            switch (batch - b) {
                case 1: a.grouped ? grouped_row<1>(a, row, b) : folded_rows<1>(a, row, rows, b); break;
                case 2: a.grouped ? grouped_row<2>(a, row, b) : folded_rows<2>(a, row, rows, b); break;
                case 3: a.grouped ? grouped_row<3>(a, row, b) : folded_rows<3>(a, row, rows, b); break;
                default: a.grouped ? grouped_row<4>(a, row, b) : folded_rows<4>(a, row, rows, b);
            }
        }
    }
}

}  // namespace
}  // namespace thl
