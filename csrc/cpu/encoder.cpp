#include "cpu/encoder.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/thread_pool.h"

namespace thl {
namespace {

constexpr int64_t kGrainFloats = 4 * 1024;  // a microsecond or two, the cost of starting a thread's share

int64_t grain_rows(int64_t d) { return std::max<int64_t>(1, kGrainFloats / std::max<int64_t>(1, d)); }

template <typename Body>
void parallel_rows(int64_t count, int64_t d, const Body& body) {
    ThreadPool::instance().parallel_for(count, grain_rows(d), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) body(b);
    });
}

}  // namespace

void add_layer_norm(Rows x, Rows add, int64_t batch, int64_t d, const float* weight, const float* bias, float eps,
                    Rows sum, Rows out) {
    const Kernels& isa = kernels();
    parallel_rows(batch, d, [&](int64_t b) {
        const float *__restrict from = x.row(b), *__restrict more = add.row(b);
        float* __restrict to = sum.row(b);
        for (int64_t i = 0; i < d; ++i) to[i] = from[i] + more[i];
        isa.layer_norm(to, d, weight, bias, eps, out.row(b));
    });
}

void add_blend(Rows x, Rows fast, Rows slow, const float* gate, int64_t batch, int64_t d, Rows out) {
    std::vector<float> share(d);
    for (int64_t i = 0; i < d; ++i) share[i] = sigmoid_f32(gate[i]);
    parallel_rows(batch, d, [&](int64_t b) {
        const float *__restrict from = x.row(b), *__restrict quick = fast.row(b), *__restrict late = slow.row(b);
        const float* __restrict part = share.data();
        float* __restrict to = out.row(b);
        for (int64_t i = 0; i < d; ++i) to[i] = from[i] + (quick[i] + part[i] * (late[i] - quick[i]));
    });
}

void add_scaled(Rows x, Rows add, float scale, int64_t batch, int64_t d, Rows out) {
    parallel_rows(batch, d, [&](int64_t b) {
        const float *__restrict from = x.row(b), *__restrict more = add.row(b);
        float* __restrict to = out.row(b);
        for (int64_t i = 0; i < d; ++i) to[i] = from[i] + scale * more[i];
    });
}

void erase_then_add(Slots memory, Rows erase, Rows add, int64_t batch, int64_t slots, int64_t d, float eps, Slots out) {
    const Kernels& isa = kernels();
    const std::vector<float> ones(d, 1.0f), zeros(d, 0.0f);
    std::vector<float> keep(batch * d);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < d; ++i) keep[b * d + i] = sigmoid_f32(-erase.row(b)[i]);
    parallel_rows(batch * slots, d, [&](int64_t i) {
        const int64_t b = i / slots, j = i % slots;
        const float *from = memory.slot(b, j), *kept = keep.data() + b * d, *more = add.row(b);
        float* to = out.slot(b, j);
        for (int64_t k = 0; k < d; ++k) to[k] = from[k] * kept[k] + more[k];
        isa.layer_norm(to, d, ones.data(), zeros.data(), eps, to);
    });
}

}  // namespace thl
