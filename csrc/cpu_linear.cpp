#include "cpu_linear.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "arena.h"
#include "thread_pool.h"

namespace thl {
namespace {

// A thread gets at least this many bytes of weights: about 2 us of reading, the cost of starting a thread's share.
constexpr int64_t kGrainBytes = 32 * 1024;

int64_t grain_rows(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

int64_t weight_bytes(Weight type) { return type == Weight::i8 ? 1 : type == Weight::f32 ? 4 : 2; }

}  // namespace

void pack_activations(const float* x, int64_t stride, int64_t batch, int64_t columns, PackedActivations& packed) {
    packed.batch = batch;
    packed.columns = columns;
    packed.padded = (columns + kGroup - 1) / kGroup * kGroup;
    packed.integers.resize(batch * packed.padded / kDigitBlock);
    packed.digits.resize(batch * packed.padded / kDigitBlock);
    packed.prefix.resize(batch * (packed.padded / kGroup + 1));
    packed.scales.resize(batch);
    const Kernels& isa = kernels();
    ThreadPool::instance().parallel_for(batch, grain_rows(columns * 4), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) isa.pack(x + b * stride, b, packed);
    });
}

void linear_int8(const Int8Linear& arguments, int64_t rows) {
    const Kernels& isa = kernels();
    ThreadPool::instance().parallel_for(rows, grain_rows(arguments.x->columns), [&](int64_t begin, int64_t end) {
        isa.linear_int8(arguments, begin, end);
    });
}

void linear_float(Weight type, const FloatLinear& arguments, int64_t rows) {
    const Kernels& isa = kernels();
    const auto kernel = type == Weight::f32 ? isa.linear_f32 : type == Weight::bf16 ? isa.linear_bf16 : isa.linear_f16;
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
