// The kernels, written once in 16 float lanes. Included by each <isa>.cpp, which before it defines
//   kWidth                 floats in a native register: 4, 8 or 16
//   kPrefetchBytes         how far ahead of a stream of weights to prefetch
//   kColumnBlock           columns that an int8 product of one row takes at a time
//   int8_floats(x)         a register of floats from as many int8; compilers convert them one by one
//   int8_dot<B>(w, x, b0, begin, end, following, out)
//                          out[b] = exact sum over columns [begin, end) of w and row b0 + b of x, for at most
//                          kColumnBlock columns; `w` points to column `begin`, `following` to the weights needed next
//
// Everything has internal linkage, and what it uses of other headers is plain data or always inlined. A function that
// several objects define, such as an inline one of the standard library, is linked once for all of them: the copy that
// is kept may be that of an instruction set which the processor lacks. tests/native/test_symbols.py reads the objects.

namespace thl {
namespace {

constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;
constexpr int kBatchBlock = 4;  // rows of activations that share one load of weights

typedef float FloatV __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UintV __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfV __attribute__((vector_size(2 * kWidth)));

THL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

struct Lanes {
    FloatV part[kParts];
};

#define THL_UNROLL _Pragma("GCC unroll 16")

THL_INLINE Lanes zero() {
    Lanes r;
    THL_UNROLL for (int p = 0; p < kParts; ++p) r.part[p] = FloatV{};
    return r;
}

THL_INLINE FloatV load_floats(const float* x) {
    FloatV v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
}

THL_INLINE FloatV load_floats(const Bf16* x) {
    HalfV bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    return reinterpret_cast<FloatV>(__builtin_convertvector(bits, UintV) << 16);
}

THL_INLINE FloatV load_floats(const F16* x) {
    HalfV half;
    __builtin_memcpy(&half, x, sizeof half);
    const UintV bits = __builtin_convertvector(half, UintV);
    const UintV magnitude = (bits & 0x7FFF) << 13;
    // Multiplying by 2^112 mends the bias of the exponent, also of subnormal numbers; infinities and NaNs
    // (largest exponent) keep the largest exponent.
    const UintV special = reinterpret_cast<UintV>(magnitude >= 0x0F800000u) & 0x7F800000u;
    const FloatV value = reinterpret_cast<FloatV>(magnitude) * 0x1p112f;
    return reinterpret_cast<FloatV>(reinterpret_cast<UintV>(value) | special | ((bits & 0x8000) << 16));
}

THL_INLINE FloatV load_floats(const int8_t* x) { return int8_floats(x); }

template <typename T>
THL_INLINE Lanes load(const T* x) {
    Lanes r;
    THL_UNROLL for (int p = 0; p < kParts; ++p) r.part[p] = load_floats(x + p * kWidth);
    return r;
}

// The first n < 16 of the lanes; the others are zero. Reads nothing beyond them.
template <typename T>
THL_INLINE Lanes load_tail(const T* x, int64_t n) {
    T copy[kLanes] = {};
    __builtin_memcpy(copy, x, n * sizeof(T));
    return load(copy);
}

THL_INLINE void store(float* out, const Lanes& v) { __builtin_memcpy(out, &v, sizeof v); }

THL_INLINE void store_tail(float* out, const Lanes& v, int64_t n) { __builtin_memcpy(out, &v, n * sizeof(float)); }

THL_INLINE void add(Lanes& sum, const Lanes& x) {
    THL_UNROLL for (int p = 0; p < kParts; ++p) sum.part[p] += x.part[p];
}

THL_INLINE void add_product(Lanes& sum, const Lanes& x, const Lanes& y) {
    THL_UNROLL for (int p = 0; p < kParts; ++p) sum.part[p] += x.part[p] * y.part[p];
}

THL_INLINE void add_product(Lanes& sum, const Lanes& x, float y) {
    THL_UNROLL for (int p = 0; p < kParts; ++p) sum.part[p] += x.part[p] * y;
}

THL_INLINE float total(const Lanes& v) {
    float lane[kLanes];
    store(lane, v);
    THL_UNROLL for (int i = 0; i < 8; ++i) lane[i] += lane[i + 8];
    THL_UNROLL for (int i = 0; i < 4; ++i) lane[i] += lane[i + 4];
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// --- products with float weights --------------------------------------------------------------------------------

// Weight rows are taken one by one: several at a time are as many streams from memory, which on EPYC (Zen 5) reach
// 0.7 (two rows) and 0.6 (four) of the bandwidth of one stream.

template <typename T, int B>
void float_block(const FloatLinear& a, int64_t row, int64_t b0) {
    const T* w = static_cast<const T*>(a.w) + row * a.w_stride;
    const float* x = a.x + b0 * a.x_stride;
    const int64_t x_stride = a.x_stride, columns = a.columns;
    Lanes sum[B];
    THL_UNROLL for (int b = 0; b < B; ++b) sum[b] = zero();
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(w + c) + kPrefetchBytes);
        const Lanes weights = load(w + c);
        THL_UNROLL for (int b = 0; b < B; ++b) add_product(sum[b], load(x + b * x_stride + c), weights);
    }
    if (c < columns) {
        const Lanes weights = load_tail(w + c, columns - c);
        THL_UNROLL for (int b = 0; b < B; ++b) add_product(sum[b], load_tail(x + b * x_stride + c, columns - c), weights);
    }
    THL_UNROLL for (int b = 0; b < B; ++b)
        a.out[(b0 + b) * a.out_stride + row] = total(sum[b]) + (a.bias ? a.bias[row] : 0.0f);
}

template <typename T>
void linear_float(const FloatLinear& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t b = 0; b < a.batch; b += kBatchBlock) {
            switch (a.batch - b) {
                case 1: float_block<T, 1>(a, row, b); break;
                case 2: float_block<T, 2>(a, row, b); break;
                case 3: float_block<T, 3>(a, row, b); break;
                default: float_block<T, 4>(a, row, b);
            }
        }
    }
}

// --- products with int8 weights ---------------------------------------------------------------------------------

void pack(const float* x, int64_t b, PackedRows& packed) {
    const int64_t n = packed.columns;
    // Magnitudes of floats compare like their bits as integers; infinities and NaNs are the largest.
    uint32_t largest = 0;
    for (int64_t c = 0; c < n; ++c) {
        uint32_t bits;
        __builtin_memcpy(&bits, x + c, sizeof bits);
        bits &= 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    __builtin_memcpy(&magnitude, &largest, sizeof magnitude);
    const bool finite = largest < 0x7F800000u;
    // Below 1e-30 the reciprocal would overflow; such a row counts as zero.
    const bool usable = finite && magnitude >= 1e-30f;
    const float inverse = usable ? kLargestQ / magnitude : 0.0f;
    packed.scales[b] = finite ? (usable ? magnitude / kLargestQ : 0.0f) : __builtin_nanf("");

    int16_t* q = packed.q(b);
    if (usable) {
        for (int64_t c = 0; c < n; ++c) {
            // The sum is rounded to an integer, which then stands in its low 16 bits.
            const float shifted = x[c] * inverse + 12582912.0f;
            uint32_t bits;
            __builtin_memcpy(&bits, &shifted, sizeof bits);
            q[c] = static_cast<int16_t>(bits);
        }
    } else {
        __builtin_memset(q, 0, n * sizeof *q);
    }
    __builtin_memset(q + n, 0, (packed.padded - n) * sizeof *q);

    int64_t* prefix = packed.prefix + b * (packed.padded / kGroup + 1);
    prefix[0] = 0;
    for (int64_t g = 0; g < packed.padded / kGroup; ++g) {
        int32_t sum = 0;
        for (int64_t c = g * kGroup; c < (g + 1) * kGroup; ++c) sum += q[c];
        prefix[g + 1] = prefix[g] + sum;
    }
    const int64_t blocks = packed.padded / kDigitBlock;
    for (int64_t block = 0; block < blocks; ++block) {
        PackedRows::Digits& digits = packed.digits[b * blocks + block];
        for (int64_t i = 0; i < kDigitBlock; ++i) {
            const int value = q[block * kDigitBlock + i];
            const int high = (value + 128) >> 8;
            digits.high[i] = static_cast<int8_t>(high);
            digits.low[i] = static_cast<int8_t>(value - 256 * high);
        }
    }
}

THL_INLINE void finish_int8(const Int8Linear& a, int64_t row, int64_t b, float value) {
    if (a.bias) value += a.bias[row];
    a.out[b * a.out_stride + row] = value;
}

// Rows [row, row + rows) of the weights times up to 8 rows of activations. Long rows are cut into columns blocks
// whose activations stay in the first-level cache for all weight rows of the block.
constexpr int64_t kRowBlock = 8, kBatchChunk = 8;
constexpr int64_t kBatchColumnBlock = 2048;

template <int B>
THL_INLINE void int8_tile(const Int8Linear& a, int64_t row, int64_t rows, int64_t b0, int64_t begin, int64_t end,
                          int64_t next, int64_t* dots) {
    for (int64_t r = 0; r < rows; ++r) {
        const int8_t* w = a.w + (row + r) * a.w_stride + begin;
        // After this piece of a row comes that of the row below, after the last row's the next block of columns.
        const int8_t* following = r + 1 < rows ? w + a.w_stride : w - r * a.w_stride + next;
        int64_t partial[B];
        int8_dot<B>(w, *a.x, b0, begin, end, following, partial);
        for (int b = 0; b < B; ++b) dots[r * kBatchChunk + b] += partial[b];
    }
}

void int8_rows(const Int8Linear& a, int64_t row, int64_t rows, int64_t b0, int64_t batch) {
    int64_t dots[kRowBlock * kBatchChunk] = {};
    const int64_t columns = a.x->columns;
    const int64_t block = batch == 1 ? kColumnBlock : kBatchColumnBlock;
    for (int64_t begin = 0; begin < columns; begin += block) {
        const int64_t end = begin + block < columns ? begin + block : columns;
        // From the first row's piece to the one that is read after the last row's.
        const int64_t next = end < columns ? block : rows * a.w_stride - begin;
        for (int64_t b = 0; b < batch; b += kBatchBlock) {
            switch (batch - b) {
                case 1: int8_tile<1>(a, row, rows, b0 + b, begin, end, next, dots + b); break;
                case 2: int8_tile<2>(a, row, rows, b0 + b, begin, end, next, dots + b); break;
                case 3: int8_tile<3>(a, row, rows, b0 + b, begin, end, next, dots + b); break;
                default: int8_tile<4>(a, row, rows, b0 + b, begin, end, next, dots + b);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t b = 0; b < batch; ++b)
            finish_int8(a, row + r, b0 + b, static_cast<float>(dots[r * kBatchChunk + b]) * a.x->scales[b0 + b] *
                                                a.scales[(row + r) * a.scales_stride]);
}

template <int B>
void int8_grouped(const Int8Linear& a, int64_t row, int64_t b0) {
    const int8_t* w = a.w + row * a.w_stride;
    const float* scales = a.scales + row * a.scales_stride;
    const int64_t columns = a.x->columns;
    double sums[B] = {};
    for (int64_t begin = 0; begin < columns; begin += kGroup) {
        const int64_t end = begin + kGroup < columns ? begin + kGroup : columns;
        int64_t dots[B];
        int8_dot<B>(w + begin, *a.x, b0, begin, end, w + end, dots);
        for (int b = 0; b < B; ++b) sums[b] += static_cast<double>(dots[b]) * scales[begin / kGroup];
    }
    for (int b = 0; b < B; ++b) finish_int8(a, row, b0 + b, static_cast<float>(sums[b] * a.x->scales[b0 + b]));
}

void linear_int8(const Int8Linear& a, int64_t begin, int64_t end) {
    const int64_t batch = a.x->batch;
    if (!a.grouped) {
        for (int64_t row = begin; row < end; row += kRowBlock)
            for (int64_t b = 0; b < batch; b += kBatchChunk)
                int8_rows(a, row, row + kRowBlock < end ? kRowBlock : end - row, b,
                          b + kBatchChunk < batch ? kBatchChunk : batch - b);
        return;
    }
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t b = 0; b < batch; b += kBatchBlock) {
            switch (batch - b) {
                case 1: int8_grouped<1>(a, row, b); break;
                case 2: int8_grouped<2>(a, row, b); break;
                case 3: int8_grouped<3>(a, row, b); break;
                default: int8_grouped<4>(a, row, b);
            }
        }
    }
}

// --- transposed products ----------------------------------------------------------------------------------------

// Adds rows [row, row + R) to `count` <= 16 columns of out.
template <typename T, int R>
THL_INLINE void transposed_step(const T* w, int64_t w_stride, const float* factors, float* out, int64_t count,
                                bool fresh) {
    const bool whole = count == kLanes;
    Lanes sum = fresh ? zero() : whole ? load(out) : load_tail(out, count);
    THL_UNROLL for (int r = 0; r < R; ++r) {
        const T* source = w + r * w_stride;
        add_product(sum, whole ? load(source) : load_tail(source, count), factors[r]);
    }
    if (whole) store(out, sum);
    else store_tail(out, sum, count);
}

template <typename T, int R>
void transposed_rows(const Transposed& a, int64_t b, int64_t row, int64_t begin, int64_t end) {
    const T* w = static_cast<const T*>(a.w) + row * a.w_stride;
    const float* x = a.x + b * a.x_stride + row;
    float* out = a.out + b * a.out_stride;
    const bool fresh = row == 0 && !a.accumulate;
    const int64_t width = a.grouped ? kGroup : end - begin;
    for (int64_t c = begin; c < end; c += width) {
        float factors[R];
        for (int r = 0; r < R; ++r)
            factors[r] = a.scales ? x[r] * a.scales[(row + r) * a.scales_stride + (a.grouped ? c / kGroup : 0)] : x[r];
        const int64_t stop = c + width < end ? c + width : end;
        int64_t i = c;
        for (; i + kLanes <= stop; i += kLanes) transposed_step<T, R>(w + i, a.w_stride, factors, out + i, kLanes, fresh);
        if (i < stop) transposed_step<T, R>(w + i, a.w_stride, factors, out + i, stop - i, fresh);
    }
}

template <typename T>
void transposed(const Transposed& a, int64_t begin, int64_t end) {
    constexpr int kRows = 8;
    if (a.rows == 0 && !a.accumulate)
        for (int64_t b = 0; b < a.batch; ++b)
            __builtin_memset(a.out + b * a.out_stride + begin, 0, (end - begin) * sizeof(float));
    int64_t row = 0;
    for (; row + kRows <= a.rows; row += kRows)
        for (int64_t b = 0; b < a.batch; ++b) transposed_rows<T, kRows>(a, b, row, begin, end);
    for (; row < a.rows; ++row)
        for (int64_t b = 0; b < a.batch; ++b) transposed_rows<T, 1>(a, b, row, begin, end);
}

// --- state operations -------------------------------------------------------------------------------------------

float square_sum(const float* x, int64_t n) {
    Lanes sum = zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Lanes v = load(x + i);
        add_product(sum, v, v);
    }
    if (i < n) {
        const Lanes v = load_tail(x + i, n - i);
        add_product(sum, v, v);
    }
    return total(sum);
}

template <bool kAdd>
float decay_rows(float* x, int64_t n, float decay, float gate, const float* addend) {
    Lanes sum = zero();
    const auto step = [&](float* at, const float* extra, int64_t count) __attribute__((always_inline)) {
        const bool whole = count == kLanes;
        Lanes v = zero();
        add_product(v, whole ? load(at) : load_tail(at, count), decay);
        if (kAdd) add_product(v, whole ? load(extra) : load_tail(extra, count), gate);
        if (whole) store(at, v);
        else store_tail(at, v, count);
        add_product(sum, v, v);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) step(x + i, addend + i, kLanes);
    if (i < n) step(x + i, addend + i, n - i);
    return total(sum);
}

float decay_add(float* x, int64_t n, float decay, float gate, const float* addend) {
    return addend ? decay_rows<true>(x, n, decay, gate, addend) : decay_rows<false>(x, n, decay, gate, x);
}

struct Moments {
    float mean, variance;  // biased
};

THL_INLINE Moments moments(const float* x, int64_t n) {
    Lanes sum = zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add(sum, load(x + i));
    if (i < n) add(sum, load_tail(x + i, n - i));
    const float mean = total(sum) / static_cast<float>(n);

    sum = zero();
    for (i = 0; i + kLanes <= n; i += kLanes) {
        Lanes v = load(x + i);
        THL_UNROLL for (int p = 0; p < kParts; ++p) v.part[p] -= mean;
        add_product(sum, v, v);
    }
    float squares[kLanes];
    store(squares, sum);
    for (int64_t k = 0; i + k < n; ++k) squares[k] += (x[i + k] - mean) * (x[i + k] - mean);
    return {mean, total(load(squares)) / static_cast<float>(n)};
}

void layer_norm(const float* x, int64_t n, const float* weight, const float* bias, float eps, float* out) {
    const Moments m = moments(x, n);
    const float factor = 1.0f / __builtin_sqrtf(m.variance + eps);
    for (int64_t j = 0; j < n; ++j) out[j] = (x[j] - m.mean) * factor * weight[j] + bias[j];
}

void gru_reset(const float* reset, const float* state, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = sigmoid_f32(reset[i]) * state[i];
}

void gru_update(const float* update, const float* candidate, int64_t n, float* state) {
    for (int64_t i = 0; i < n; ++i) {
        const float z = sigmoid_f32(update[i]);
        state[i] = (1.0f - z) * state[i] + z * tanh_f32(candidate[i]);
    }
}

float read(const float* x, int64_t n) {
    Lanes sum[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i + 4 * kLanes <= n; i += 4 * kLanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kPrefetchBytes);
        THL_UNROLL for (int j = 0; j < 4; ++j) add(sum[j], load(x + i + j * kLanes));
    }
    for (int j = 1; j < 4; ++j) add(sum[0], sum[j]);
    return total(sum[0]);
}

}  // namespace
}  // namespace thl

#include "cpu/sparse.inl"
#include "cpu/transformer.inl"

namespace thl {
namespace {

constexpr Kernels table(const char* name, bool (*supported)(),
                        decltype(Kernels::int8_product) int8_product = nullptr,
                        decltype(Kernels::linear_int8) int8_linear = linear_int8) {
    return {name,
            supported,
            pack,
            int8_linear,
            linear_float<float>,
            linear_float<Bf16>,
            linear_float<F16>,
            transposed_sparse,
            transposed<float>,
            transposed<Bf16>,
            transposed<F16>,
            square_sum,
            decay_add,
            layer_norm,
            gru_reset,
            gru_update,
            read,
            multiply_int8,
            multiply_float<float>,
            multiply_float<Bf16>,
            multiply_float<F16>,
            transformer_table(),
            int8_product};
}

}  // namespace
}  // namespace thl
