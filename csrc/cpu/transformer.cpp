#include "cpu/transformer.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace thl {
namespace {

// A thread gets at least this much work: some microseconds, the cost of starting a thread's share.
constexpr int64_t kGrainFloats = 8 * 1024;
constexpr int64_t kGrainGates = 1024;  // exponentials are dearer
constexpr int64_t kGrainProducts = 16 * 1024;  // about a microsecond
constexpr int64_t kGrainBytes = 16 * 1024;

constexpr int64_t kScoreFloats = 64 * 1024;  // of one thread's scores, unless a row is longer

int64_t share(int64_t grain, int64_t each) { return std::max<int64_t>(1, grain / std::max<int64_t>(1, each)); }

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Runs body(row, first, count) over runs of the elements of a [batch, d] tensor.
template <typename Body>
void parallel_elements(int64_t batch, int64_t d, const Body& body) {
    ThreadPool::instance().parallel_for(batch * d, kGrainGates, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t row = begin / d, first = begin % d;
            const int64_t count = std::min(end - begin, d - first);
            body(row, first, count);
            begin += count;
        }
    });
}

typedef int8_t Bytes __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

Bytes low_halves(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
Bytes high_halves(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
Floats low_halves(Floats a, Floats b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
Floats high_halves(Floats a, Floats b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }

// A square tile: each round interleaves row i with row i + n / 2, and log2(n) of them transpose.
template <typename V, typename T>
void transpose_tile(const T* w, int64_t stride, T* out, int64_t out_stride) {
    constexpr int n = 16 / sizeof(T);
    V tile[n], mixed[n];
    for (int i = 0; i < n; ++i) std::memcpy(&tile[i], w + i * stride, sizeof tile[i]);
    for (int round = 1; round < n; round *= 2) {
        for (int i = 0; i < n / 2; ++i) {
            mixed[2 * i] = low_halves(tile[i], tile[i + n / 2]);
            mixed[2 * i + 1] = high_halves(tile[i], tile[i + n / 2]);
        }
        std::memcpy(tile, mixed, sizeof tile);
    }
    for (int i = 0; i < n; ++i) std::memcpy(out + i * out_stride, &tile[i], sizeof tile[i]);
}

// out [columns, rows] from w [rows, columns].
template <typename V, typename T>
void transpose(const T* w, int64_t stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
    constexpr int64_t n = 16 / sizeof(T), kBlock = 16;
    const auto tile = [&](int64_t row, int64_t column) {
        const T* from = w + row * stride + column;
        T* to = out + column * out_stride + row;
        if (rows - row >= n && columns - column >= n) {
            transpose_tile<V>(from, stride, to, out_stride);
            return;
        }
        for (int64_t c = 0; c < std::min(n, columns - column); ++c)
            for (int64_t r = 0; r < std::min(n, rows - row); ++r) to[c * out_stride + r] = from[r * stride + c];
    };
    for (int64_t first = 0; first < rows; first += kBlock)  // a cache line of each row of `out` at a time
        for (int64_t column = 0; column < columns; column += n)
            for (int64_t row = first; row < std::min(rows, first + kBlock); row += n) tile(row, column);
}

}  // namespace

void rms_norm(const float* x, int64_t x_stride, const float* add, int64_t add_stride, int64_t batch, int64_t d,
              const float* weight, float eps, float* out, int64_t out_stride) {
    const auto kernel = kernels().transformer.rms_norm;
    ThreadPool::instance().parallel_for(batch, share(kGrainFloats, d), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            kernel(x + b * x_stride, add ? add + b * add_stride : nullptr, d, weight, eps, out + b * out_stride);
    });
}

void rotate(Grid x, const int64_t (&shape)[4], const float* cos, int64_t cos_stride, const float* sin,
            int64_t sin_stride, Grid out) {
    const auto kernel = kernels().transformer.rotate;
    const int64_t heads = shape[1], rows = shape[2];
    ThreadPool::instance().parallel_for(shape[0] * heads * rows, share(kGrainFloats, shape[3]),
                                        [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / rows / heads, h = i / rows % heads, t = i % rows;
            kernel(x.row(b, h, t), cos + t * cos_stride, sin + t * sin_stride, shape[3], out.row(b, h, t));
        }
    });
}

void swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t batch, int64_t d,
            float* out, int64_t out_stride) {
    const auto kernel = kernels().transformer.swiglu;
    parallel_elements(batch, d, [&](int64_t row, int64_t first, int64_t count) {
        kernel(gate + row * gate_stride + first, up + row * up_stride + first, count, out + row * out_stride + first);
    });
}

void gelu(const float* x, int64_t x_stride, int64_t batch, int64_t d, float* out, int64_t out_stride) {
    const auto kernel = kernels().transformer.gelu;
    parallel_elements(batch, d, [&](int64_t row, int64_t first, int64_t count) {
        kernel(x + row * x_stride + first, count, out + row * out_stride + first);
    });
}

void geglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t batch, int64_t d,
           const float* quantile, float* out, int64_t out_stride) {
    const auto& transformer = kernels().transformer;
    std::vector<float> bounds(quantile ? batch : 0);
    ThreadPool::instance().parallel_for(bounds.size(), share(kGrainFloats, d), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) bounds[b] = transformer.upper_bound(gate + b * gate_stride, d, *quantile);
    });
    parallel_elements(batch, d, [&](int64_t row, int64_t first, int64_t count) {
        transformer.geglu(gate + row * gate_stride + first, up + row * up_stride + first,
                          quantile ? &bounds[row] : nullptr, count, out + row * out_stride + first);
    });
}

void attention(const Attention& a) {
    const auto kernel = kernels().transformer.attention;
    // Query heads that share a key head are rows of the same block.
    const int64_t groups = a.heads / a.key_heads, rows = groups * a.rows;
    const int64_t most = std::clamp<int64_t>(kScoreFloats / a.keys / 4 * 4, 4, kQueryRows);
    const int64_t blocks = blocks_of(rows, most);
    const int64_t grain = share(kGrainProducts, std::min(most, rows) * a.keys * a.d);
    const auto turn = kernels().transformer.rotate;
    ThreadPool::instance().parallel_for(a.batch * a.key_heads * blocks, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(std::min(most, rows) * a.keys + a.d * kKeyBlock);
        std::vector<float> turned(a.cos ? (std::min(most, rows) + a.keys) * a.d : 0);
        const float* queries[kQueryRows];
        float* outs[kQueryRows];
        const uint8_t* blocked[kQueryRows];
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / blocks / a.key_heads, key_head = i / blocks % a.key_heads;
            const int64_t first = i % blocks * most, count = std::min(most, rows - first);
            for (int64_t r = 0; r < count; ++r) {
                const int64_t h = key_head * groups + (first + r) / a.rows, t = (first + r) % a.rows;
                queries[r] = a.query.row(b, h, t);
                if (a.cos) {
                    turn(queries[r], a.cos + t * a.d, a.sin + t * a.d, a.d, turned.data() + r * a.d);
                    queries[r] = turned.data() + r * a.d;
                }
                outs[r] = a.out.row(b, h, t);
                if (a.blocked)
                    blocked[r] =
                        a.blocked + b * a.blocked_stride[0] + h * a.blocked_stride[1] + t * a.blocked_stride[2];
            }
            const float* key = a.key.row(b, key_head, 0);
            if (a.cos) {
                float* keys = turned.data() + std::min(most, rows) * a.d;
                for (int64_t k = 0; k < a.keys; ++k)
                    turn(key + k * a.key.stride[2], a.cos + k * a.d, a.sin + k * a.d, a.d, keys + k * a.d);
                key = keys;
            }
            kernel({queries, outs, a.blocked ? blocked : nullptr, count, a.keys, a.d, key,
                    a.value.row(b, key_head, 0), a.cos ? a.d : a.key.stride[2], a.value.stride[2], a.scale,
                    scratch.data(), scratch.data() + std::min(most, rows) * a.keys});
        }
    });
}

namespace {

// Rows of T into memory for `rows` of them.
template <typename V, typename T>
void keep_rows(KeptMatrix& kept, int64_t start, int64_t count, const T* w, int64_t stride) {
    T* data = reinterpret_cast<T*>(kept.data.data());
    // Shares of a transposed matrix are runs of whole cache lines of its rows.
    const int64_t grain = share(kGrainBytes, kept.columns * sizeof(T)) + 63;
    ThreadPool::instance().parallel_for(count, grain / 64 * 64, [&](int64_t begin, int64_t end) {
        if (kept.transposed) {
            transpose<V>(w + begin * stride, stride, end - begin, kept.columns, data + start + begin, kept.rows);
            return;
        }
        for (int64_t r = begin; r < end; ++r)
            std::memcpy(data + (start + r) * kept.columns, w + r * stride, kept.columns * sizeof(T));
    });
}

// Rows [first, last) of the integrator, with all phases of a step on the calling thread, or spread over the pool.
class Integration {
public:
    Integration(const Integrate& arguments, const Controller& controller, int64_t first, int64_t last, bool spread)
        : a_(arguments), c_(controller), spread_(spread), first_(first), moved_((last - first) * c_.d),
          start_((last - first) * c_.hidden), hidden_((last - first) * c_.hidden), active_(last - first),
          converged_(last - first, 0) {
        std::iota(active_.begin(), active_.end(), 0);
    }

    // Returns the number of steps made.
    int64_t run() {
        for (const int64_t n : active_) {
            const float* start = a_.start + (first_ + n) * a_.start_stride;
            if (a_.norm_weight) kernels().layer_norm(start, c_.d, a_.norm_weight, a_.norm_bias, a_.norm_eps, x(n));
            else std::memcpy(x(n), start, c_.d * sizeof(float));
            std::fill_n(x(n) + c_.d, c_.d, 0.0f);
            a_.iterations[first_ + n] = 0;
        }
        products(true);
        int64_t made = 0;
        while (made < a_.steps && !active_.empty()) {
            products(false);
            step();
            test(++made > a_.first_check && a_.threshold >= 0.0f);
        }
        return made;
    }

private:
    float* x(int64_t n) const { return a_.values + (first_ + n) * 2 * c_.d; }

    template <typename Body>
    void parallel(int64_t count, int64_t grain, const Body& body) const {
        if (spread_) ThreadPool::instance().parallel_for(count, grain, body);
        else body(int64_t{0}, count);
    }

    // Runs body(rows, how many <= kTokens, begin, end) over groups of active rows x [0, each) of a matrix.
    template <typename Body>
    void over_groups(int64_t each, int64_t cost, const Body& body) const {
        const int64_t count = static_cast<int64_t>(active_.size());
        parallel(blocks_of(count, kTokens) * each, share(kGrainProducts, cost), [&](int64_t begin, int64_t end) {
            while (begin < end) {
                const int64_t group = begin / each * kTokens, from = begin % each;
                const int64_t to = std::min(each, from + end - begin);
                body(active_.data() + group, std::min(kTokens, count - group), from, to);
                begin += to - from;
            }
        });
    }

    // The first matrix with the context, which every step starts from, or with position and velocity.
    void products(bool context) {
        const auto kernel = c_.first_scales ? kernels().transformer.controller_int8
                                             : kernels().transformer.controller_f32;
        const int64_t column = context ? 0 : c_.d, count = context ? c_.d : 2 * c_.d;
        over_groups(c_.hidden, count, [&](const int64_t* rows, int64_t n, int64_t begin, int64_t end) {
            const float *inputs[kTokens], *from[kTokens];
            float* to[kTokens];
            for (int64_t i = 0; i < n; ++i) {
                inputs[i] = context ? a_.context + (first_ + rows[i]) * a_.context_stride : x(rows[i]);
                from[i] = start_.data() + rows[i] * c_.hidden;
                to[i] = (context ? start_.data() : hidden_.data()) + rows[i] * c_.hidden;
            }
            kernel(c_, begin, end, column, count, inputs, context ? nullptr : from, to, n);
        });
    }

    void step() {
        const auto kernel = c_.second_scales ? kernels().transformer.integrate_int8
                                              : kernels().transformer.integrate_f32;
        over_groups(blocks_of(c_.d, kFeatures), 3 * kFeatures * c_.hidden,
                    [&](const int64_t* rows, int64_t n, int64_t begin, int64_t end) {
            const float* inputs[kTokens];
            float *positions[kTokens], *velocities[kTokens], *changes[kTokens];
            for (int64_t i = 0; i < n; ++i) {
                inputs[i] = hidden_.data() + rows[i] * c_.hidden;
                positions[i] = x(rows[i]);
                velocities[i] = positions[i] + c_.d;
                changes[i] = moved_.data() + rows[i] * c_.d;
            }
            kernel(c_, begin * kFeatures, std::min(c_.d, end * kFeatures), inputs, positions, velocities, changes, n);
        });
    }

    // Counts the step and, from the first check on, takes out the rows that have converged.
    void test(bool checks) {
        parallel(static_cast<int64_t>(active_.size()), share(kGrainFloats, c_.d), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t n = active_[i];
                a_.iterations[first_ + n] += !converged_[n];
                if (checks)
                    converged_[n] |= std::sqrt(kernels().square_sum(moved_.data() + n * c_.d, c_.d)) < a_.threshold;
            }
        });
        const auto stopped = [&](int64_t n) { return converged_[n] != 0; };
        if (!a_.together) std::erase_if(active_, stopped);
        else if (std::all_of(active_.begin(), active_.end(), stopped)) active_.clear();
    }

    const Integrate& a_;
    const Controller& c_;
    bool spread_;
    int64_t first_;
    std::vector<float> moved_, start_, hidden_;
    std::vector<int64_t> active_;  // rows still moving, counted from `first`
    std::vector<char> converged_;
};

}  // namespace

void KeptMatrix::take(int64_t of_rows, int64_t of_columns, int64_t start, int64_t count, const void* w, int64_t stride,
                      const float* w_scales) {
    if (start == 0) {
        rows = of_rows;
        columns = of_columns;
        int8 = w_scales != nullptr;
        data.resize(rows * columns * (int8 ? 1 : sizeof(float)));
        scales.resize(int8 ? rows : 0);
    }
    if (int8) {
        std::copy_n(w_scales, count, scales.data() + start);
        keep_rows<Bytes>(*this, start, count, static_cast<const int8_t*>(w), stride);
    } else {
        keep_rows<Floats>(*this, start, count, static_cast<const float*>(w), stride);
    }
}

int64_t integrate(const Integrate& a, const Controller& c) {
    // Rows that do not wait for each other need no barrier between the phases of a step.
    ThreadPool& pool = ThreadPool::instance();
    const int64_t groups = blocks_of(a.rows, kTokens);
    if ((a.together && a.threshold >= 0.0f) || groups < pool.threads())
        return Integration(a, c, 0, a.rows, true).run();
    std::atomic<int64_t> made{0};
    pool.parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            const int64_t first = group * kTokens, last = std::min(a.rows, first + kTokens);
            const int64_t steps = Integration(a, c, first, last, false).run();
            for (int64_t most = made; most < steps && !made.compare_exchange_weak(most, steps);) {}
        }
    });
    return made;
}

}  // namespace thl
