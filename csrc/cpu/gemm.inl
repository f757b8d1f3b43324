// Products of int8 weights with many rows of activations, for AVX-512 VNNI. Included by avx512vnni.cpp after
// kernels.inl.
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

// One strip times M rows of activations from b on. `carried` [M, V, high and low, 16] keeps the sums from one block of
// columns to the next.
template <int M, int V>
void strip_tile(const Int8Linear& a, const Strip& s, int64_t b, int32_t* carried) {
    const int64_t blocks = a.x->padded / kDigitBlock;
    const auto* digits = reinterpret_cast<const int8_t*>(a.x->digits + b * blocks + s.begin / kDigitBlock);
    const int64_t stride = blocks * sizeof(PackedRows::Digits);
    const uint8_t* weights = s.weights;

    const bool first = s.begin == 0, last = s.end == a.x->columns;
    __m512i high[M][V], low[M][V];
    THL_UNROLL for (int m = 0; m < M; ++m) {
        THL_UNROLL for (int v = 0; v < V; ++v) {
            const int32_t* sums = carried + (m * V + v) * 2 * kLaneRows;
            high[m][v] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums);
            low[m][v] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums + kLaneRows);
        }
    }
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
        digits += sizeof(PackedRows::Digits);
    }
    for (int64_t i = 0; 4 * i < left; ++i) step(i);

    if (!last) {
        THL_UNROLL for (int m = 0; m < M; ++m) {
            THL_UNROLL for (int v = 0; v < V; ++v) {
                int32_t* sums = carried + (m * V + v) * 2 * kLaneRows;
                _mm512_store_si512(sums, high[m][v]);
                _mm512_store_si512(sums + kLaneRows, low[m][v]);
            }
        }
        return;
    }
    THL_UNROLL for (int v = 0; v < V; ++v) {
        const int64_t row = s.row + v * kLaneRows, rows = s.rows - v * kLaneRows;
        const __mmask16 present = rows >= kLaneRows ? 0xFFFF : (1u << rows) - 1;
        const __m512 scale = _mm512_maskz_loadu_ps(present, a.scales + row);
        const __m512 bias = a.bias ? _mm512_maskz_loadu_ps(present, a.bias + row) : _mm512_setzero_ps();
        THL_UNROLL for (int m = 0; m < M; ++m) {
            const int64_t offset = -128 * a.x->sum(b + m, 0, a.x->columns);
            __m512 value;
            if (s.end <= kStripColumns) {  // at most 512 * 128 * 32639: the sum fits 32 bits, its terms may wrap around
                const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[m][v], 8), low[m][v]);
                value = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_set1_epi32(static_cast<int32_t>(offset))));
            } else {  // whole numbers below 2^53: exact, fused or not
                __m256 half[2];
                THL_UNROLL for (int i = 0; i < 2; ++i) {
                    const auto doubles = [i](__m512i x) __attribute__((always_inline)) {
                        return _mm512_cvtepi32_pd(i ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
                    };
                    const __m512d sum = _mm512_fmadd_pd(doubles(high[m][v]), _mm512_set1_pd(256.0),
                                                        _mm512_set1_pd(static_cast<double>(offset)));
                    half[i] = _mm512_cvtpd_ps(_mm512_add_pd(sum, doubles(low[m][v])));
                }
                value = _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1);
            }
            value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(a.x->scales[b + m])), scale);
            if (a.bias) value = _mm512_add_ps(value, bias);
            _mm512_mask_storeu_ps(a.out + (b + m) * a.out_stride + row, present, value);
        }
    }
}

// Weights that will be needed next: columns [begin, end) of `rows` rows.
struct Coming {
    const int8_t* w;
    int64_t stride, rows, columns;

    void prefetch(int64_t first, int64_t last) const {
        for (int64_t r = first; r < last; ++r)
            for (int64_t c = 0; c < columns; c += 64) _mm_prefetch(w + r * stride + c, _MM_HINT_T0);
    }
};

template <int V>
void strip_batch(const Int8Linear& a, const Strip& s, int64_t first, int64_t last, int32_t* carried,
                 const Coming& coming) {
    // Tiles of nearly equal height: a low one does not keep the multipliers busy.
    const int64_t all = (last - first + kTileBatch - 1) / kTileBatch;
    for (int64_t tiles = all; tiles > 0; --tiles) {
        coming.prefetch(coming.rows * (all - tiles) / all, coming.rows * (all - tiles + 1) / all);
        const int64_t height = (last - first + tiles - 1) / tiles;
        switch (height) {
            case 1: strip_tile<1, V>(a, s, first, carried); break;
            case 2: strip_tile<2, V>(a, s, first, carried); break;
            case 3: strip_tile<3, V>(a, s, first, carried); break;
            case 4: strip_tile<4, V>(a, s, first, carried); break;
            case 5: strip_tile<5, V>(a, s, first, carried); break;
            default: strip_tile<6, V>(a, s, first, carried);
        }
        first += height;
        carried += height * V * 2 * kLaneRows;
    }
}

// `next`: rows that follow the strip.
template <int V>
void strip_product(const Int8Linear& a, int64_t row, int64_t rows, int64_t next, int64_t first, int64_t last) {
    alignas(64) uint8_t weights[V * kLaneRows * kStripColumns];
    alignas(64) int32_t carried[kStripBatch * V * 2 * kLaneRows];
    const int64_t columns = a.x->columns, batch = columns <= kStripColumns ? last - first : kStripBatch;
    for (int64_t b = first; b < last; b += batch) {
        const int64_t stop = least(last, b + batch);
        for (int64_t begin = 0; begin < columns; begin += kStripColumns) {
            const int64_t end = least(columns, begin + kStripColumns);
            const int8_t* w = a.w + row * a.w_stride;
            const Coming coming = end < columns
                ? Coming{w + end, a.w_stride, rows, least(columns - end, kStripColumns)}
                : Coming{w + rows * a.w_stride, a.w_stride, stop < last ? 0 : next, least(columns, kStripColumns)};
            interleave_strip<V>(a, row, rows, begin, end, weights);
            strip_batch<V>(a, {row, rows, begin, end, weights}, b, stop, carried, coming);
        }
    }
}

void int8_product(const Int8Linear& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t row = begin; row < end; row += kStripRows) {
        const int64_t rows = least(end - row, kStripRows), next = least(end - row - rows, kStripRows);
        if (rows > kLaneRows) strip_product<2>(a, row, rows, next, first, last);
        else strip_product<1>(a, row, rows, next, first, last);
    }
}

}  // namespace
}  // namespace thl
