// Kernels of transformer.h in 16 float lanes, included by kernels.inl for each instruction set.

namespace thl {
namespace {

constexpr int kSums = 16 / kParts;  // accumulators of 16 lanes that stay in registers, but for some to load into

void rms_norm(const float* x, const float* addend, int64_t n, const float* weight, float eps, float* out) {
    Lanes sum = zero();
    const auto step = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const bool whole = count == kLanes;
        Lanes v = whole ? load(x + i) : load_tail(x + i, count);
        if (addend) {
            add(v, whole ? load(addend + i) : load_tail(addend + i, count));
            if (whole) store(out + i, v);
            else store_tail(out + i, v, count);
        }
        add_product(sum, v, v);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) step(i, kLanes);
    if (i < n) step(i, n - i);
    const float factor = 1.0f / __builtin_sqrtf(total(sum) / static_cast<float>(n) + eps);
    const float* source = addend ? out : x;
    if (weight)
        for (int64_t j = 0; j < n; ++j) out[j] = source[j] * factor * weight[j];
    else
        for (int64_t j = 0; j < n; ++j) out[j] = source[j] * factor;
}

// `out` is not x.
void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t d,
            float* __restrict out) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; ++i) out[i] = x[i] * cos[i] - x[half + i] * sin[i];
    for (int64_t i = half; i < d; ++i) out[i] = x[i] * cos[i] + x[i - half] * sin[i];
}

// out = body(x) for each register of n floats; the last one is filled up with zeros.
template <typename Body>
THL_INLINE void map(const float* x, int64_t n, float* out, const Body& body) {
    int64_t i = 0;
    const auto step = [&](int64_t count) __attribute__((always_inline)) {
        float in[kWidth] = {};
        if (count < kWidth) __builtin_memcpy(in, x + i, count * sizeof(float));
        const FloatV result = body(count < kWidth ? load_floats(in) : load_floats(x + i), i, count);
        __builtin_memcpy(out + i, &result, count * sizeof(float));
    };
    for (; i + kWidth <= n; i += kWidth) step(kWidth);
    if (i < n) step(n - i);
}

template <typename T>
THL_INLINE FloatV first_of(const T* x, int64_t count) {
    if (count == kWidth) return load_floats(x);
    T copy[kWidth] = {};
    __builtin_memcpy(copy, x, count * sizeof(T));
    return load_floats(copy);
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
    map(gate, n, out, [&](FloatV v, int64_t i, int64_t count) __attribute__((always_inline)) {
        return v * sigmoid_f32(v) * first_of(up + i, count);
    });
}

void gelu(const float* x, int64_t n, float* out) {
    map(x, n, out, [](FloatV v, int64_t, int64_t) __attribute__((always_inline)) { return v * normal_cdf_f32(v); });
}

void geglu(const float* gate, const float* up, const float* bound, int64_t n, float* out) {
    map(gate, n, out, [&](FloatV v, int64_t i, int64_t count) __attribute__((always_inline)) {
        if (bound) {
            v = v - *bound;
            v = v < 0.0f ? FloatV{} : v;
        }
        // (1 + tanh(z)) / 2 is the logistic function of 2 z.
        const FloatV twice = v * (0.0713548163f * (v * v) + 1.59576912f);
        return v * sigmoid_f32(twice) * first_of(up + i, count);
    });
}

float upper_bound(const float* x, int64_t n, float quantile) {
    const Moments m = moments(x, n);
    return m.mean + quantile * __builtin_sqrtf(m.variance);
}

// --- attention ----------------------------------------------------------------------------------------------------

// scores[r, k] = query r . key k for R rows of queries and `count` keys, transposed to [d, kKeyBlock]. Each sum runs
// in the lanes and the order of `total`, as if lane l added up features l, l + 16, ...: a lone query, whose product
// goes along the keys' features, gets the same bits. D is d, or 0 for a width that loops have not been unrolled for.
template <int R, int D>
THL_INLINE void lane_sums(const float* const* queries, const float* keys, int64_t d, int64_t lane, Lanes (&sum)[R]) {
    // Not 0 + the first product: that differs in the sign of a zero, which the softmax does not see.
    const Lanes first = load(keys + lane * kKeyBlock);
    THL_UNROLL for (int r = 0; r < R; ++r)
        THL_UNROLL for (int p = 0; p < kParts; ++p) sum[r].part[p] = first.part[p] * queries[r][lane];
    THL_UNROLL for (int64_t j = lane + kLanes; j < (D ? D : d); j += kLanes) {
        const Lanes key = load(keys + j * kKeyBlock);
        THL_UNROLL for (int r = 0; r < R; ++r) add_product(sum[r], key, queries[r][j]);
    }
}

// The sums of lanes lane, lane + stride, ... in the order of `total`: halves until single lanes are left.
template <int R, int D, int kStride>
THL_INLINE void tree_sums(const float* const* queries, const float* keys, int64_t d, int64_t lane, Lanes (&sum)[R]) {
    if constexpr (kStride == kLanes) {
        lane_sums<R, D>(queries, keys, d, lane, sum);
    } else {
        tree_sums<R, D, kStride * 2>(queries, keys, d, lane, sum);
        if (lane + kStride < (D ? D : d)) {
            Lanes other[R];
            tree_sums<R, D, kStride * 2>(queries, keys, d, lane + kStride, other);
            THL_UNROLL for (int r = 0; r < R; ++r) add(sum[r], other[r]);
        }
    }
}

template <int R, int D>
void score_block(const AttentionRows& a, int64_t row, int64_t first, int64_t count) {
    const float* queries[R];
    THL_UNROLL for (int r = 0; r < R; ++r) queries[r] = a.queries[row + r];
    for (int64_t k = 0; k < count; k += kLanes) {
        Lanes even[R], odd[R];
        // total() ends with (0 + 2) + (1 + 3).
        const auto pair = [&](int64_t lane, Lanes (&sum)[R]) __attribute__((always_inline)) {
            tree_sums<R, D, 4>(queries, a.transposed + k, a.d, lane, sum);
            if (lane + 2 < (D ? D : a.d)) {
                Lanes other[R];
                tree_sums<R, D, 4>(queries, a.transposed + k, a.d, lane + 2, other);
                THL_UNROLL for (int r = 0; r < R; ++r) add(sum[r], other[r]);
            }
        };
        pair(0, even);
        if ((D ? D : a.d) > 1) {
            pair(1, odd);
            THL_UNROLL for (int r = 0; r < R; ++r) add(even[r], odd[r]);
        }
        THL_UNROLL for (int r = 0; r < R; ++r) {
            float* out = a.scores + (row + r) * a.keys + first + k;
            if (count - k >= kLanes) store(out, even[r]);
            else store_tail(out, even[r], count - k);
        }
    }
}

template <int D>
void score_blocks(const AttentionRows& a, int64_t first, int64_t count) {
    int64_t r = 0;
    for (; r + 4 <= a.rows; r += 4) score_block<4, D>(a, r, first, count);
    for (; r < a.rows; ++r) score_block<1, D>(a, r, first, count);
}

typedef float Quad __attribute__((vector_size(16)));

// out [d, kKeyBlock] from `count` keys; in tiles of four by four.
void transpose_keys(const float* keys, int64_t stride, int64_t count, int64_t d, float* out) {
    for (int64_t k = 0; k < count; k += 4) {
        const int64_t rows = count - k < 4 ? count - k : 4;
        const float* from = keys + k * stride;
        float* to = out + k;
        int64_t j = 0;
        for (; rows == 4 && j + 4 <= d; j += 4) {
            Quad row[4], pair[4];
            for (int i = 0; i < 4; ++i) __builtin_memcpy(&row[i], from + i * stride + j, sizeof row[i]);
            for (int i = 0; i < 2; ++i) {
                pair[2 * i] = __builtin_shufflevector(row[i], row[i + 2], 0, 4, 1, 5);
                pair[2 * i + 1] = __builtin_shufflevector(row[i], row[i + 2], 2, 6, 3, 7);
            }
            for (int i = 0; i < 2; ++i) {
                row[2 * i] = __builtin_shufflevector(pair[i], pair[i + 2], 0, 4, 1, 5);
                row[2 * i + 1] = __builtin_shufflevector(pair[i], pair[i + 2], 2, 6, 3, 7);
            }
            for (int i = 0; i < 4; ++i) __builtin_memcpy(to + (j + i) * kKeyBlock, &row[i], sizeof row[i]);
        }
        for (; j < d; ++j)
            for (int64_t i = 0; i < rows; ++i) to[j * kKeyBlock + i] = from[i * stride + j];
    }
}

void attention_scores(const AttentionRows& a) {
    if (a.rows < 3) {  // not worth transposing the keys
        for (int64_t r = 0; r < a.rows; ++r) {
            const FloatLinear product{a.queries[r], 0, 1, a.d, a.key, a.key_stride, nullptr, a.scores + r * a.keys, 0};
            for (int64_t k = 0; k < a.keys; ++k) float_block<float, 1>(product, k, 0);
        }
        return;
    }
    for (int64_t first = 0; first < a.keys; first += kKeyBlock) {
        const int64_t count = a.keys - first < kKeyBlock ? a.keys - first : kKeyBlock;
        transpose_keys(a.key + first * a.key_stride, a.key_stride, count, a.d, a.transposed);
        switch (a.d) {
            case 16: score_blocks<16>(a, first, count); break;
            case 20: score_blocks<20>(a, first, count); break;
            case 32: score_blocks<32>(a, first, count); break;
            case 64: score_blocks<64>(a, first, count); break;
            default: score_blocks<0>(a, first, count);
        }
    }
}

// Scales scores in place, -inf where blocked; returns the largest.
float scaled_scores(float* scores, int64_t n, float scale, const int8_t* blocked) {
    const FloatV none = FloatV{} - __builtin_inff();
    FloatV largest = none;
    map(scores, n, scores, [&](FloatV v, int64_t i, int64_t count) __attribute__((always_inline)) {
        v *= scale;
        if (blocked) v = first_of(blocked + i, count) != 0.0f ? none : v;
        FloatV candidates = v;
        for (int64_t j = count; j < kWidth; ++j) candidates[j] = none[0];
        largest = candidates > largest ? candidates : largest;
        return v;
    });
    float lane[kLanes];
    THL_UNROLL for (int p = 0; p < kParts; ++p) __builtin_memcpy(lane + p * kWidth, &largest, sizeof largest);
    const auto halve = [&](int half) __attribute__((always_inline)) {
        THL_UNROLL for (int i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
    };
    halve(8), halve(4), halve(2), halve(1);
    return lane[0];
}

// exp(score - most) in place, 0 where blocked.
void exponentials(float* scores, int64_t n, float most, const int8_t* blocked) {
    map(scores, n, scores, [&](FloatV v, int64_t i, int64_t count) __attribute__((always_inline)) {
        v = exp_f32(v - most);
        if (blocked) v = first_of(blocked + i, count) != 0.0f ? FloatV{} : v;  // which exp_f32 does not reach
        return v;
    });
}

float sum_of(const float* x, int64_t n) {
    Lanes sum = zero();
    int64_t k = 0;
    for (; k + kLanes <= n; k += kLanes) add(sum, load(x + k));
    if (k < n) add(sum, load_tail(x + k, n - k));
    return total(sum);
}

// out[r] = sum over keys of scores[r, key] * value[key] in ascending order, for features [c, c + 16 * P), or the
// `tail` < 16 features of short heads.
template <int R, int P>
THL_INLINE void mix_block(const AttentionRows& a, int64_t row, int64_t c, int64_t tail, const float* inverse) {
    Lanes sum[R][P];
    THL_UNROLL for (int r = 0; r < R; ++r)
        THL_UNROLL for (int p = 0; p < P; ++p) sum[r][p] = zero();
    const float* weights = a.scores + row * a.keys;
    for (int64_t k = 0; k < a.keys; ++k) {
        const float* value = a.value + k * a.value_stride + c;
        Lanes values[P];
        THL_UNROLL for (int p = 0; p < P; ++p) values[p] = tail ? load_tail(value, tail) : load(value + p * kLanes);
        THL_UNROLL for (int r = 0; r < R; ++r)
            THL_UNROLL for (int p = 0; p < P; ++p) add_product(sum[r][p], values[p], weights[r * a.keys + k]);
    }
    THL_UNROLL for (int r = 0; r < R; ++r) {
        THL_UNROLL for (int p = 0; p < P; ++p) {
            THL_UNROLL for (int i = 0; i < kParts; ++i) sum[r][p].part[i] *= inverse[r];
            if (tail) store_tail(a.outs[row + r] + c, sum[r][p], tail);
            else store(a.outs[row + r] + c + p * kLanes, sum[r][p]);
        }
    }
}

template <int R>
void mix_rows(const AttentionRows& a, int64_t row, const float* inverse) {
    int64_t c = 0;
    if constexpr (4 * R <= kSums)
        for (; c + 4 * kLanes <= a.d; c += 4 * kLanes) mix_block<R, 4>(a, row, c, 0, inverse);
    if constexpr (2 * R <= kSums)
        for (; c + 2 * kLanes <= a.d; c += 2 * kLanes) mix_block<R, 2>(a, row, c, 0, inverse);
    for (; c + kLanes <= a.d; c += kLanes) mix_block<R, 1>(a, row, c, 0, inverse);
    if (c == a.d) return;
    if (a.d < kLanes) mix_block<R, 1>(a, row, 0, a.d, inverse);
    else mix_block<R, 1>(a, row, a.d - kLanes, 0, inverse);  // features in both blocks get the same bits twice
}

void attention(const AttentionRows& a) {
    attention_scores(a);
    // Each phase for all rows: within a row they wait for each other.
    const auto blocked = [&](int64_t r) {
        return a.blocked ? reinterpret_cast<const int8_t*>(a.blocked[r]) : nullptr;
    };
    float most[kQueryRows], inverse[kQueryRows];
    for (int64_t r = 0; r < a.rows; ++r) most[r] = scaled_scores(a.scores + r * a.keys, a.keys, a.scale, blocked(r));
    for (int64_t r = 0; r < a.rows; ++r) exponentials(a.scores + r * a.keys, a.keys, most[r], blocked(r));
    for (int64_t r = 0; r < a.rows; ++r) inverse[r] = 1.0f / sum_of(a.scores + r * a.keys, a.keys);
    int64_t r = 0;
    for (; r + 4 <= a.rows; r += 4) mix_rows<4>(a, r, inverse + r);
    for (; r < a.rows; ++r) mix_rows<1>(a, r, inverse + r);
}

// --- the integrator -------------------------------------------------------------------------------------------------

// Dot products of R rows of weights with B rows of inputs.
template <typename T, int R, int B>
void controller_block(const Controller& c, int64_t row, int64_t column, int64_t count, const float* const* x,
                      const float* const* start, float* const* sums) {
    const T* w = static_cast<const T*>(c.first) + row * c.first_stride + column;
    Lanes sum[R][B];
    THL_UNROLL for (int r = 0; r < R; ++r)
        THL_UNROLL for (int b = 0; b < B; ++b) sum[r][b] = zero();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        THL_UNROLL for (int r = 0; r < R; ++r) {
            const Lanes weights = load(w + r * c.first_stride + i);
            THL_UNROLL for (int b = 0; b < B; ++b) add_product(sum[r][b], load(x[b] + i), weights);
        }
    }
    if (i < count) {
        THL_UNROLL for (int r = 0; r < R; ++r) {
            const Lanes weights = load_tail(w + r * c.first_stride + i, count - i);
            THL_UNROLL for (int b = 0; b < B; ++b) add_product(sum[r][b], load_tail(x[b] + i, count - i), weights);
        }
    }
    THL_UNROLL for (int r = 0; r < R; ++r) {
        const float scale = c.first_scales ? c.first_scales[row + r] : 1.0f;
        THL_UNROLL for (int b = 0; b < B; ++b) {
            const float value = total(sum[r][b]) * scale;
            if (start) {
                const float drive = start[b][row + r] + value;
                sums[b][row + r] = drive < 0.0f ? 0.0f : drive;
            } else {
                sums[b][row + r] = value + c.first_bias[row + r];
            }
        }
    }
}

template <typename T>
void controller(const Controller& c, int64_t begin, int64_t end, int64_t column, int64_t count, const float* const* x,
                const float* const* start, float* const* sums, int64_t tokens) {
    const auto rows = [&]<int B>() {
        int64_t row = begin;
        constexpr int kRows = kSums / B < 8 ? kSums / B : 8;
        for (; row + kRows <= end; row += kRows) controller_block<T, kRows, B>(c, row, column, count, x, start, sums);
        for (; row < end; ++row) controller_block<T, 1, B>(c, row, column, count, x, start, sums);
    };
    switch (tokens) {
        case 1: rows.template operator()<1>(); break;
        case 2: rows.template operator()<2>(); break;
        case 3: rows.template operator()<3>(); break;
        default: rows.template operator()<4>();
    }
}

constexpr float kIntegratorStep = 0.1f;

// The second matrix times the hidden features: 16 outputs or fewer in each third, of B tokens, for P runs of 16. The
// matrix is transposed, so that lanes are features.
template <typename T, int B, int P, bool whole>
THL_INLINE void gate_sums(const Controller& c, int64_t at, int64_t count, const float* const* hidden,
                          float (&raws)[P][B][3][kFeatures]) {
    const T* w = static_cast<const T*>(c.second) + at;
    const int64_t d = c.d, stride = 3 * d;
    Lanes sum[3][B][P];
    THL_UNROLL for (int k = 0; k < 3; ++k)
        THL_UNROLL for (int b = 0; b < B; ++b)
            THL_UNROLL for (int p = 0; p < P; ++p) sum[k][b][p] = zero();
    for (int64_t j = 0; j < c.hidden; ++j) {
        THL_UNROLL for (int k = 0; k < 3; ++k) {
            THL_UNROLL for (int p = 0; p < P; ++p) {
                const T* weights = w + j * stride + k * d + p * kFeatures;
                const Lanes lanes = whole ? load(weights) : load_tail(weights, count);
                THL_UNROLL for (int b = 0; b < B; ++b) add_product(sum[k][b][p], lanes, hidden[b][j]);
            }
        }
    }
    THL_UNROLL for (int k = 0; k < 3; ++k)
        THL_UNROLL for (int b = 0; b < B; ++b)
            THL_UNROLL for (int p = 0; p < P; ++p) store(raws[p][b][k], sum[k][b][p]);
}

// 16 features or fewer of B tokens.
template <int B>
THL_INLINE void integrate_block(const Controller& c, int64_t at, int64_t count, const float (&raws)[B][3][kFeatures],
                                float* const* x, float* const* v, float* const* moved) {
    const int64_t d = c.d;
    float scale[3][kFeatures], bias[3][kFeatures] = {}, mu[kFeatures] = {};
    for (int k = 0; k < 3; ++k) {
        for (int i = 0; i < kFeatures; ++i) scale[k][i] = 1.0f;
        if (c.second_scales) __builtin_memcpy(scale[k], c.second_scales + k * d + at, count * sizeof(float));
        __builtin_memcpy(bias[k], c.second_bias + k * d + at, count * sizeof(float));
    }
    __builtin_memcpy(mu, c.mu + at, count * sizeof(float));
    for (int b = 0; b < B; ++b) {
        const float (&raw)[3][kFeatures] = raws[b];
        float position[kFeatures] = {}, velocity[kFeatures] = {}, change[kFeatures];
        __builtin_memcpy(position, x[b] + at, count * sizeof(float));
        __builtin_memcpy(velocity, v[b] + at, count * sizeof(float));
        for (int i = 0; i < kFeatures; i += kWidth) {
            const auto output = [&](int k) {
                return load_floats(raw[k] + i) * load_floats(scale[k] + i) + load_floats(bias[k] + i);
            };
            const FloatV from = load_floats(position + i);
            const FloatV speed = sigmoid_f32(output(0)) * load_floats(velocity + i) -
                                 softplus_f32(output(1)) * (from - load_floats(mu + i));
            const FloatV to = from + kIntegratorStep * sigmoid_f32(output(2)) * speed;
            const FloatV difference = to - from;
            __builtin_memcpy(position + i, &to, sizeof to);
            __builtin_memcpy(velocity + i, &speed, sizeof speed);
            __builtin_memcpy(change + i, &difference, sizeof difference);
        }
        __builtin_memcpy(x[b] + at, position, count * sizeof(float));
        __builtin_memcpy(v[b] + at, velocity, count * sizeof(float));
        __builtin_memcpy(moved[b] + at, change, count * sizeof(float));
    }
}

template <typename T>
void integrate(const Controller& c, int64_t begin, int64_t end, const float* const* hidden, float* const* x,
               float* const* v, float* const* moved, int64_t tokens) {
    const auto features = [&]<int B>() {
        constexpr int P = kSums / (3 * B) < 1 ? 1 : kSums / (3 * B) < 4 ? kSums / (3 * B) : 4;
        int64_t at = begin;
        for (; at + P * kFeatures <= end; at += P * kFeatures) {
            float raws[P][B][3][kFeatures];
            gate_sums<T, B, P, true>(c, at, kFeatures, hidden, raws);
            for (int p = 0; p < P; ++p)
                integrate_block<B>(c, at + p * kFeatures, kFeatures, raws[p], x, v, moved);
        }
        for (; at < end; at += kFeatures) {
            float raws[1][B][3][kFeatures];
            const int64_t count = end - at < kFeatures ? end - at : kFeatures;
            if (count == kFeatures) gate_sums<T, B, 1, true>(c, at, count, hidden, raws);
            else gate_sums<T, B, 1, false>(c, at, count, hidden, raws);
            integrate_block<B>(c, at, count, raws[0], x, v, moved);
        }
    };
    // Three sums for each token.
    constexpr int64_t kMost = kSums / 3 < 4 ? kSums / 3 : 4;
    for (; tokens > 0; tokens -= kMost, hidden += kMost, x += kMost, v += kMost, moved += kMost) {
        switch (tokens < kMost ? tokens : kMost) {
            case 1: features.template operator()<1>(); break;
            case 2: features.template operator()<2>(); break;
            case 3: features.template operator()<3>(); break;
            default: features.template operator()<4>();
        }
    }
}

constexpr TransformerKernels transformer_table() {
    return {rms_norm,    rotate,    swiglu,
            gelu,        geglu,     upper_bound,
            attention,   controller<int8_t>, controller<float>,
            integrate<int8_t>,  integrate<float>};
}

}  // namespace
}  // namespace thl
