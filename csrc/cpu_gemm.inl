// Products of int8 weights with many rows of activations, for AVX-512 VNNI. Included by cpu_avx512vnni.cpp after
// cpu_kernels.inl.
//
// A strip of 32 weight rows is interleaved so that one register holds 4 columns of 16 rows. A tile of up to 6 rows of
// activations then keeps all its sums in registers: each 4 digits, repeated in all lanes, serve two registers of
// weights, and each register of weights 12 products. The exact sums end in the same arithmetic as finish_int8, so
// the results have the bits of linear_int8.

namespace thl {
namespace {

constexpr int64_t kLaneRows = 16;              // weight rows in a register
constexpr int64_t kStripRows = 2 * kLaneRows;
constexpr int64_t kTileBatch = 6;              // 2 registers of rows * 2 digits * 6 = 24 of the 32 registers are sums
// Columns taken at a time: 16 KiB of interleaved weights, which stay in the first-level cache with a tile's digits.
// Read from the second level, weights cost up to half of the speed.
constexpr int64_t kStripColumns = 512;
constexpr int64_t kStripBatch = 16 * kTileBatch;  // rows of activations between two of these blocks

// 64 columns of `rows` <= 16 rows, raised by 128, to 16 registers that lie `step` bytes apart. Lanes beyond `rows`
// repeat the last row.
THL_INLINE void interleave(const int8_t* w, int64_t stride, int64_t rows, __mmask64 present, uint8_t* out,
                           int64_t step) {
    const __m512i flip = _mm512_set1_epi8(-128);
    __m512i row[16], pair[16], four[16];
    THL_UNROLL for (int i = 0; i < 16; ++i) {
        const int8_t* source = w + (i < rows ? i : rows - 1) * stride;
        row[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(present, source), flip);
    }
    THL_UNROLL for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    // four[4 * g + j]: in each 128-bit part p, columns 16 * p + 4 * j .. + 3 of rows 4 * g .. + 3.
    THL_UNROLL for (int i = 0; i < 16; i += 4) {
        four[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
        four[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
        four[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        four[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    THL_UNROLL for (int j = 0; j < 4; ++j) {
        const __m512i even_top = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88);
        const __m512i odd_top = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xDD);
        const __m512i even_bottom = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
        const __m512i odd_bottom = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xDD);
        _mm512_store_si512(out + j * step, _mm512_shuffle_i32x4(even_top, even_bottom, 0x88));
        _mm512_store_si512(out + (4 + j) * step, _mm512_shuffle_i32x4(odd_top, odd_bottom, 0x88));
        _mm512_store_si512(out + (8 + j) * step, _mm512_shuffle_i32x4(even_top, even_bottom, 0xDD));
        _mm512_store_si512(out + (12 + j) * step, _mm512_shuffle_i32x4(odd_top, odd_bottom, 0xDD));
    }
}

// Columns [begin, end) of weight rows [row, row + rows), rows <= 16 * V: [columns / 4][V][16 rows][4 columns].
template <int V>
void interleave_strip(const Int8Linear& a, int64_t row, int64_t rows, int64_t begin, int64_t end, uint8_t* out) {
    for (int64_t c = begin; c < end; c += kDigitBlock) {
        const __mmask64 present = end - c >= kDigitBlock ? ~__mmask64{0} : (__mmask64{1} << (end - c)) - 1;
        THL_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t first = v * kLaneRows;
            interleave(a.w + (row + first) * a.w_stride + c, a.w_stride,
                       rows - first < kLaneRows ? rows - first : kLaneRows, present, out + v * 64, V * 64);
        }
        out += kDigitBlock * kLaneRows * V;
    }
}

struct Strip {
    int64_t row, rows;      // of the weights; rows <= 16 * V
    int64_t begin, end;     // columns
    const uint8_t* weights; // interleaved
};

// One strip times M rows of activations from b on. `partial` [M, 32] carries the sums from one block of columns to the
// next.
template <int M, int V>
void strip_tile(const Int8Linear& a, const Strip& s, int64_t b, double* partial) {
    const int64_t blocks = a.x->padded / kDigitBlock;
    const auto* digits = reinterpret_cast<const int8_t*>(a.x->digits.data() + b * blocks + s.begin / kDigitBlock);
    const int64_t stride = blocks * sizeof(PackedActivations::Digits);
    const uint8_t* weights = s.weights;

    __m512i high[M][V], low[M][V];
    THL_UNROLL for (int m = 0; m < M; ++m)
        THL_UNROLL for (int v = 0; v < V; ++v) high[m][v] = low[m][v] = _mm512_setzero_si512();
    const auto step = [&](int64_t i) __attribute__((always_inline)) {
        __m512i w[V];
        THL_UNROLL for (int v = 0; v < V; ++v) w[v] = _mm512_load_si512(weights + (i * V + v) * 64);
        THL_UNROLL for (int m = 0; m < M; ++m) {
            int32_t four;
            __builtin_memcpy(&four, digits + m * stride + 4 * i, sizeof four);
            const __m512i h = _mm512_set1_epi32(four);
            __builtin_memcpy(&four, digits + m * stride + 4 * i + kDigitBlock, sizeof four);
            const __m512i l = _mm512_set1_epi32(four);
            THL_UNROLL for (int v = 0; v < V; ++v) {
                high[m][v] = _mm512_dpbusd_epi32(high[m][v], w[v], h);
                low[m][v] = _mm512_dpbusd_epi32(low[m][v], w[v], l);
            }
        }
    };
    int64_t left = s.end - s.begin;
    for (; left >= kDigitBlock; left -= kDigitBlock) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < kDigitBlock / 4; ++i) step(i);
        weights += kDigitBlock * kLaneRows * V;
        digits += sizeof(PackedActivations::Digits);
    }
    for (int64_t i = 0; 4 * i < left; ++i) step(i);

    const bool first = s.begin == 0, last = s.end == a.x->columns;
    THL_UNROLL for (int v = 0; v < V; ++v) {
        const int64_t row = s.row + v * kLaneRows, rows = s.rows - v * kLaneRows;
        const __mmask16 present = rows >= kLaneRows ? 0xFFFF : (1u << rows) - 1;
        __m512 scale = _mm512_setzero_ps(), bias = scale;
        if (last) {
            scale = _mm512_maskz_loadu_ps(present, a.scales + row);
            if (a.bias) bias = _mm512_maskz_loadu_ps(present, a.bias + row);
        }
        THL_UNROLL for (int m = 0; m < M; ++m) {
            __m256 out[2];
            const double offset = -128.0 * static_cast<double>(a.x->sum(b + m, s.begin, s.end));
            THL_UNROLL for (int half = 0; half < 2; ++half) {
                const auto doubles = [half](__m512i v) __attribute__((always_inline)) {
                    return _mm512_cvtepi32_pd(half ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v));
                };
                const auto widened = [half](__m512 v) __attribute__((always_inline)) {
                    return _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(v, 1) : _mm512_castps512_ps256(v));
                };
                double* carried = partial + m * kStripRows + v * kLaneRows + half * 8;
                // Whole numbers below 2^53: exact, fused or not.
                __m512d sum = _mm512_fmadd_pd(doubles(high[m][v]), _mm512_set1_pd(256.0), _mm512_set1_pd(offset));
                sum = _mm512_add_pd(sum, doubles(low[m][v]));
                if (!first) sum = _mm512_add_pd(sum, _mm512_load_pd(carried));
                if (!last) {
                    _mm512_store_pd(carried, sum);
                    continue;
                }
                sum = _mm512_mul_pd(_mm512_mul_pd(sum, widened(scale)), _mm512_set1_pd(a.x->scales[b + m]));
                if (a.bias) sum = _mm512_add_pd(sum, widened(bias));
                out[half] = _mm512_cvtpd_ps(sum);
            }
            if (last)
                _mm512_mask_storeu_ps(a.out + (b + m) * a.out_stride + row, present,
                                      _mm512_insertf32x8(_mm512_castps256_ps512(out[0]), out[1], 1));
        }
    }
}

template <int V>
void strip_batch(const Int8Linear& a, const Strip& s, int64_t first, int64_t last, double* partial) {
    // Tiles of nearly equal height: a low one does not keep the multipliers busy.
    for (int64_t tiles = (last - first + kTileBatch - 1) / kTileBatch; tiles > 0; --tiles) {
        const int64_t height = (last - first + tiles - 1) / tiles;
        switch (height) {
            case 1: strip_tile<1, V>(a, s, first, partial); break;
            case 2: strip_tile<2, V>(a, s, first, partial); break;
            case 3: strip_tile<3, V>(a, s, first, partial); break;
            case 4: strip_tile<4, V>(a, s, first, partial); break;
            case 5: strip_tile<5, V>(a, s, first, partial); break;
            default: strip_tile<6, V>(a, s, first, partial);
        }
        first += height;
        partial += height * kStripRows;
    }
}

template <int V>
void strip_product(const Int8Linear& a, int64_t row, int64_t rows, int64_t first, int64_t last) {
    alignas(64) uint8_t weights[V * kLaneRows * kStripColumns];
    const int64_t columns = a.x->columns;
    if (columns <= kStripColumns) {
        interleave_strip<V>(a, row, rows, 0, columns, weights);
        strip_batch<V>(a, {row, rows, 0, columns, weights}, first, last, nullptr);
        return;
    }
    alignas(64) double partial[kStripBatch * kStripRows];
    for (int64_t b = first; b < last; b += kStripBatch) {
        for (int64_t begin = 0; begin < columns; begin += kStripColumns) {
            const int64_t end = begin + kStripColumns < columns ? begin + kStripColumns : columns;
            interleave_strip<V>(a, row, rows, begin, end, weights);
            strip_batch<V>(a, {row, rows, begin, end, weights}, b, b + kStripBatch < last ? b + kStripBatch : last,
                           partial);
        }
    }
}

void int8_product(const Int8Linear& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t row = begin; row < end; row += kStripRows) {
        const int64_t rows = end - row < kStripRows ? end - row : kStripRows;
        if (rows > kLaneRows) strip_product<2>(a, row, rows, first, last);
        else strip_product<1>(a, row, rows, first, last);
    }
}

}  // namespace
}  // namespace thl
