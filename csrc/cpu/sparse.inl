// Products of which most terms or most results are zero, and the weights for these not read. Included by
// kernels.inl.

namespace thl {
namespace {

// Rows looked through at a time: many for a lone row of activations, so that the weights stream; for several few
// enough for the weights that they share to stay in the second-level cache.
constexpr int64_t kScan = 2048, kScanTogether = 256;

// Of a batch of at least one.
THL_INLINE int64_t scan_rows(int64_t batch) {
    return kScan / batch > kScanTogether ? kScan / batch : kScanTogether;
}

// Where values[0..n) are not zero, offset by `first`; returns how many. NaN counts as not zero.
THL_INLINE int64_t nonzero(const float* values, int64_t n, int32_t first, int32_t* found) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        found[count] = first + static_cast<int32_t>(i);
        count += values[i] != 0.0f;
    }
    return count;
}

// Adds the R named rows to columns [begin, end) of out[b], as transposed_rows does, and fetches the rows `next`.
template <int R>
THL_INLINE void sparse_rows(const Transposed& a, int64_t b, const int32_t* rows, const int32_t* next, int64_t begin,
                            int64_t end) {
    const int8_t *w[R], *following[R];
    THL_UNROLL for (int r = 0; r < R; ++r) {
        w[r] = static_cast<const int8_t*>(a.w) + rows[r] * a.w_stride;
        following[r] = static_cast<const int8_t*>(a.w) + next[r] * a.w_stride;
    }
    float* out = a.out + b * a.out_stride;
    const int64_t width = a.grouped ? kGroup : end - begin;
    for (int64_t c = begin; c < end; c += width) {
        float factors[R];
        for (int r = 0; r < R; ++r)
            factors[r] = a.x[b * a.x_stride + rows[r]] * a.scales[rows[r] * a.scales_stride + (a.grouped ? c / kGroup : 0)];
        const int64_t stop = c + width < end ? c + width : end;
        const auto step = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            const bool whole = count == kLanes;
            Lanes sum = whole ? load(out + i) : load_tail(out + i, count);
            THL_UNROLL for (int r = 0; r < R; ++r)
                add_product(sum, whole ? load(w[r] + i) : load_tail(w[r] + i, count), factors[r]);
            if (whole) store(out + i, sum);
            else store_tail(out + i, sum, count);
        };
        int64_t i = c;
        for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
            THL_UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(following[r] + i);
            THL_UNROLL for (int j = 0; j < 4; ++j) step(i + j * kLanes, kLanes);
        }
        for (; i + kLanes <= stop; i += kLanes) step(i, kLanes);
        if (i < stop) step(i, stop - i);
    }
}

// transposed<int8_t> without the rows whose x is zero: the same bits, since a sum that begins with +0 is never -0.
void transposed_sparse(const Transposed& a, int64_t begin, int64_t end) {
    constexpr int kRows = 8;
    if (!a.accumulate)
        for (int64_t b = 0; b < a.batch; ++b)
            __builtin_memset(a.out + b * a.out_stride + begin, 0, (end - begin) * sizeof(float));
    if (a.batch == 0) return;
    const int64_t scan = scan_rows(a.batch);
    for (int64_t first = 0; first < a.rows; first += scan) {
        const int64_t n = first + scan < a.rows ? scan : a.rows - first;
        for (int64_t b = 0; b < a.batch; ++b) {
            int32_t rows[kScan];
            const int64_t count = nonzero(a.x + b * a.x_stride + first, n, static_cast<int32_t>(first), rows);
            int64_t i = 0;
            for (; i + kRows <= count; i += kRows)
                sparse_rows<kRows>(a, b, rows + i, i + 2 * kRows <= count ? rows + i + kRows : rows + i, begin, end);
            for (; i + 2 <= count; i += 2) sparse_rows<2>(a, b, rows + i, rows + i, begin, end);
            if (i < count) sparse_rows<1>(a, b, rows + i, rows + i, begin, end);
        }
    }
}

// Calls multiply(row, b, where) for the rows in [begin, end) for which out[b] is not zero; `where` is the row's place
// in a list that ends at `last` with the rows to come.
template <typename Multiply>
THL_INLINE void for_nonzero(const float* out, int64_t out_stride, int64_t batch, int64_t begin, int64_t end,
                            Multiply multiply) {
    if (batch == 0) return;
    const int64_t scan = scan_rows(batch);
    for (int64_t first = begin; first < end; first += scan) {
        const int64_t n = first + scan < end ? scan : end - first;
        for (int64_t b = 0; b < batch; ++b) {
            int32_t rows[kScan];
            const int64_t count = nonzero(out + b * out_stride + first, n, static_cast<int32_t>(first), rows);
            for (int64_t i = 0; i < count; ++i) multiply(rows[i], b, rows + i, rows + count - 1);
        }
    }
}

void multiply_int8(const Int8Linear& a, int64_t begin, int64_t end) {
    const int64_t columns = a.x->columns;
    const int64_t block = a.grouped ? kGroup : kColumnBlock;
    // int8_dot fetches what lies kPrefetchBytes ahead, as if the rows to come followed each other.
    const int64_t rows_ahead = columns < kPrefetchBytes ? kPrefetchBytes / (columns > 0 ? columns : 1) : 1;
    for_nonzero(a.out, a.out_stride, a.x->batch, begin, end,
                [&](int64_t row, int64_t b, const int32_t* at, const int32_t* last) __attribute__((always_inline)) {
        const int8_t* w = a.w + row * a.w_stride;
        const int8_t* later = a.w + (last - at < rows_ahead ? *last : at[rows_ahead]) * a.w_stride;
        double value = 0.0;
        int64_t sum = 0;
        for (int64_t c = 0; c < columns; c += block) {
            const int64_t stop = c + block < columns ? c + block : columns;
            const int64_t beyond = kPrefetchBytes - (stop - c);
            const int8_t* following = stop < columns ? w + stop : later - (beyond > 0 ? beyond : 0);
            int64_t dot[1];
            int8_dot<1>(w + c, *a.x, b, c, stop, following, dot);
            sum += dot[0];
            if (a.grouped) value += static_cast<double>(dot[0]) * a.scales[row * a.scales_stride + c / kGroup];
        }
        const float x_scale = a.x->scales[b];  // in the order of int8_rows and int8_grouped
        a.out[b * a.out_stride + row] *= a.grouped ? static_cast<float>(value * x_scale)
                                                   : static_cast<float>(sum) * x_scale * a.scales[row * a.scales_stride];
    });
}

template <typename T>
void multiply_float(const FloatLinear& a, int64_t begin, int64_t end) {
    for_nonzero(a.out, a.out_stride, a.batch, begin, end, [&](int64_t row, int64_t b, const int32_t*, const int32_t*) {
        float& out = a.out[b * a.out_stride + row];
        const float factor = out;
        float_block<T, 1>(a, row, b);  // writes out
        out *= factor;
    });
}

}  // namespace
}  // namespace thl
