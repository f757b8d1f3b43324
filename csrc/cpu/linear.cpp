#include "cpu/linear.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "io/arena.h"
#include "cpu/thread_pool.h"

namespace thl {
namespace {

// A thread gets at least this many bytes of weights: about 2 us of reading, the cost of starting a thread's share.
constexpr int64_t kGrainBytes = 32 * 1024;

// Bytes of weights read from memory in the time of packing one activation, and with a gate before that.
constexpr int64_t kPackCost = 4, kGateCost = 8;

int64_t grain_rows(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

// From this many rows of activations on, the products outweigh the rearrangement of the weights.
constexpr int64_t kManyRows = 8;
// Their sums of each digit stay within 32 bits for so many columns.
constexpr int64_t kManyColumns = 65536;
// A thread gets at least this many products there, again about 2 us, and parts that begin at a register's rows.
constexpr int64_t kGrainProducts = 256 * 1024, kGrainRows = 16;
// Rows of activations that repay a second rearrangement of the same weights, where threads outnumber weight rows.
constexpr int64_t kLeastShare = 24;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads share the rows of the weights, and where these are few, the rows of activations too: part p of `shares`
// takes activations [batch * p / shares, batch * (p + 1) / shares).
void int8_product(const Kernels& isa, const Int8Linear& arguments, int64_t rows) {
    ThreadPool& pool = ThreadPool::instance();
    const int64_t batch = arguments.x->batch;
    const int64_t units = ceil_div(rows, kGrainRows);
    const int64_t work = batch * rows * std::max<int64_t>(1, arguments.x->columns);
    const int64_t parts = std::clamp<int64_t>(work / kGrainProducts, 1, pool.threads());
    const int64_t shares = std::clamp<int64_t>(parts / units, 1, std::max<int64_t>(1, batch / kLeastShare));
    // One sequence of work: all units of rows for the first share of activations, then for the next.
    pool.parallel_for(units * shares, ceil_div(units * shares, parts), [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t share = begin / units, first = begin % units;
            const int64_t last = std::min(units, first + end - begin);
            isa.int8_product(arguments, first * kGrainRows, std::min(rows, last * kGrainRows), batch * share / shares,
                             batch * (share + 1) / shares);
            begin += last - first;
        }
    });
}

// Columns [begin, end) of the outputs [first, last), which one product or more have written.
void finish(const Epilogue& epilogue, float* out, int64_t stride, int64_t first, int64_t last, int64_t begin,
            int64_t end) {
    for (int64_t b = first; b < last; ++b) {
        float* row = out + b * stride;
        if (epilogue.gelu) kernels().transformer.gelu(row + begin, end - begin, row + begin);
        if (!epilogue.addend) continue;
        const float* addend = epilogue.addend + b * epilogue.addend_stride;
        for (int64_t r = begin; r < end; ++r) row[r] += addend[r];
    }
}

int64_t weight_bytes(Weight type) { return type == Weight::i8 ? 1 : type == Weight::f32 ? 4 : 2; }

template <typename T>
T* fit(std::vector<T>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
    return memory.data();
}

}  // namespace

void PackedActivations::reshape(int64_t new_batch, int64_t new_columns) {
    batch = new_batch;
    columns = new_columns;
    padded = (columns + kGroup - 1) / kGroup * kGroup;
    integers = fit(integers_, batch * padded / kDigitBlock);
    digits = fit(digits_, batch * padded / kDigitBlock);
    prefix = fit(prefix_, batch * (padded / kGroup + 1));
    scales = fit(scales_, batch);
}

void pack_activations(const float* x, int64_t stride, int64_t batch, int64_t columns, const Norm& norm,
                      PackedActivations& packed) {
    packed.reshape(batch, columns);
    const Kernels& isa = kernels();
    ThreadPool::instance().parallel_for(batch, grain_rows(kPackCost * columns), [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> normalised;
        if (norm.weight) normalised.resize(columns);
        for (int64_t b = begin; b < end; ++b) {
            const float* row = x + b * stride;
            if (norm.weight) isa.layer_norm(row, columns, norm.weight, norm.bias, norm.eps, normalised.data());
            isa.pack(norm.weight ? normalised.data() : row, b, packed);
        }
    });
}

void pack_swiglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t batch,
                 int64_t columns, PackedActivations& packed) {
    packed.reshape(batch, columns);
    const Kernels& isa = kernels();
    ThreadPool::instance().parallel_for(batch, grain_rows(kGateCost * columns), [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> inner;
        inner.resize(columns);
        for (int64_t b = begin; b < end; ++b) {
            isa.transformer.swiglu(gate + b * gate_stride, up + b * up_stride, columns, inner.data());
            isa.pack(inner.data(), b, packed);
        }
    });
}

void linear_int8(const Int8Linear& arguments, int64_t rows, const Epilogue& epilogue) {
    const Kernels& isa = kernels();
    const int64_t batch = arguments.x->batch;
    float* out = arguments.out;
    if (isa.int8_product && batch >= kManyRows && arguments.x->columns <= kManyColumns && rows > 0 &&
        !arguments.grouped) {
        int8_product(isa, arguments, rows);
        if (!epilogue.gelu && !epilogue.addend) return;
        ThreadPool::instance().parallel_for(batch, grain_rows(rows), [&](int64_t first, int64_t last) {
            finish(epilogue, out, arguments.out_stride, first, last, 0, rows);
        });
        return;
    }
    ThreadPool::instance().parallel_for(rows, grain_rows(arguments.x->columns), [&](int64_t begin, int64_t end) {
        isa.linear_int8(arguments, begin, end);
        finish(epilogue, out, arguments.out_stride, 0, batch, begin, end);
    });
}

void linear_float(Weight type, const FloatLinear& arguments, int64_t rows, const Epilogue& epilogue) {
    const Kernels& isa = kernels();
    const auto kernel = type == Weight::f32 ? isa.linear_f32 : type == Weight::bf16 ? isa.linear_bf16 : isa.linear_f16;
    ThreadPool::instance().parallel_for(rows, grain_rows(arguments.columns * weight_bytes(type)),
                                        [&](int64_t begin, int64_t end) {
        kernel(arguments, begin, end);
        finish(epilogue, arguments.out, arguments.out_stride, 0, arguments.batch, begin, end);
    });
}

void multiply_int8(const Int8Linear& arguments, int64_t rows) {
    const Kernels& isa = kernels();
    ThreadPool::instance().parallel_for(rows, grain_rows(arguments.x->columns), [&](int64_t begin, int64_t end) {
        isa.multiply_int8(arguments, begin, end);
    });
}

void multiply_float(Weight type, const FloatLinear& arguments, int64_t rows) {
    const Kernels& isa = kernels();
    const auto kernel = type == Weight::f32 ? isa.multiply_f32 : type == Weight::bf16 ? isa.multiply_bf16 : isa.multiply_f16;
    ThreadPool::instance().parallel_for(rows, grain_rows(arguments.columns * weight_bytes(type)),
                                        [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void linear_transposed(Weight type, const Transposed& arguments, int64_t columns) {
    const Kernels& isa = kernels();
    const auto kernel = type == Weight::i8     ? isa.transposed_int8
                        : type == Weight::f32  ? isa.transposed_f32
                        : type == Weight::bf16 ? isa.transposed_bf16
                                               : isa.transposed_f16;
    // Shares begin at multiples of a group of scales.
    const int64_t grain = (grain_rows(arguments.rows * weight_bytes(type)) + kGroup - 1) / kGroup * kGroup;
    ThreadPool::instance().parallel_for(columns, grain,
                                        [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

double read_seconds(const float* data, int64_t count) {
    const Kernels& isa = kernels();
    std::atomic<float> sink{0.0f};
    const auto start = std::chrono::steady_clock::now();
    ThreadPool::instance().parallel_for(
        count, 1024, [&](int64_t begin, int64_t end) { sink = isa.read(data + begin, end - begin); });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double memory_bandwidth(int64_t nbytes, int repeats) {
    const Arena arena(nbytes);
    auto* data = reinterpret_cast<float*>(arena.data());
    const int64_t count = nbytes / static_cast<int64_t>(sizeof(float));
    ThreadPool& pool = ThreadPool::instance();
    // Untouched memory is one shared page of zeros: write it, each thread the part that it will read.
    pool.parallel_for(count, 1024, [&](int64_t begin, int64_t end) { std::fill(data + begin, data + end, 1.0f); });

    std::vector<double> seconds(repeats);
    for (double& time : seconds) time = read_seconds(data, count);
    std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
    return static_cast<double>(count * sizeof(float)) / seconds[repeats / 2];
}

}  // namespace thl
