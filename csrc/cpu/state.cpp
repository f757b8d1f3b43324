#include "cpu/state.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/math.h"
#include "cpu/thread_pool.h"

namespace thl {
namespace {

constexpr float kEmptyNorm = 1e-6f;  // a slot with a norm up to this counts as empty
constexpr float kNormEps = 1e-8f;
constexpr float kClipEps = 1e-6f;

// A thread gets at least this many floats of work: some microseconds, the cost of starting a thread's share.
constexpr int64_t kGrainFloats = 8 * 1024;
constexpr int64_t kGrainGates = 1024;  // exponentials are dearer

int64_t grain_rows(int64_t d) { return std::max<int64_t>(1, kGrainFloats / std::max<int64_t>(1, d)); }

// Runs body(b, first, count) over runs of the elements of a [batch, d] tensor.
template <typename Body>
void parallel_elements(int64_t batch, int64_t d, const Body& body) {
    ThreadPool::instance().parallel_for(batch * d, kGrainGates, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t b = begin / d, first = begin % d;
            const int64_t count = std::min(end - begin, d - first);
            body(b, first, count);
            begin += count;
        }
    });
}

// out[h, j] = x[h] . rows[j] on all threads.
void dot_products(const float* x, int64_t x_stride, int64_t heads, const float* rows, int64_t row_stride,
                  int64_t count, int64_t d, float* out) {
    const Kernels& isa = kernels();
    const FloatLinear product{x, x_stride, heads, d, rows, row_stride, nullptr, out, count};
    ThreadPool::instance().parallel_for(count, grain_rows(d), [&](int64_t begin, int64_t end) {
        isa.linear_f32(product, begin, end);
    });
}

// Softmax in place, over values of which values[0 .. n) has the maximum `largest`.
void softmax(float* values, int64_t n, float largest) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        values[i] = exp_f32(values[i] - largest);
        sum += values[i];
    }
    for (int64_t i = 0; i < n; ++i) values[i] /= sum;
}

// Indices of the k largest values in descending order, lower index first among equals. 1 <= k <= n. A NaN is
// never larger than anything, so the indices are valid whatever the values.
void top_indices(const float* values, int64_t n, int64_t k, int64_t* out) {
    int64_t found = 0;
    for (int64_t j = 0; j < n; ++j) {
        const float value = values[j];
        if (found == k && !(value > values[out[k - 1]])) continue;
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && value > values[out[at - 1]]; --at) out[at] = out[at - 1];
        out[at] = j;
    }
}

// The capacity rule: entries claim their slots in order of head and rank, and lose their weight to a full slot.
// Each head is then normalised again; one that has lost everything keeps its weights.
void cap(int64_t heads, int64_t slots, int64_t k, int64_t capacity, const int64_t* indices, float* alpha) {
    std::vector<int64_t> claimed(slots, 0);
    for (int64_t h = 0; h < heads; ++h) {
        std::vector<float> capped(alpha + h * k, alpha + (h + 1) * k);
        float sum = 0.0f;
        for (int64_t r = 0; r < k; ++r) {
            int64_t& count = claimed[indices[h * k + r]];
            if (count >= capacity) capped[r] = 0.0f;
            else ++count;
            sum += capped[r];
        }
        if (sum > 0.0f)
            for (int64_t r = 0; r < k; ++r) alpha[h * k + r] = capped[r] / sum;
    }
}

}  // namespace

void gru_reset(Rows reset, Rows state, int64_t batch, int64_t d, Rows out) {
    const Kernels& isa = kernels();
    parallel_elements(batch, d, [&](int64_t b, int64_t first, int64_t count) {
        isa.gru_reset(reset.row(b) + first, state.row(b) + first, count, out.row(b) + first);
    });
}

void gru_update(Rows update, Rows candidate, int64_t batch, int64_t d, Rows state) {
    const Kernels& isa = kernels();
    parallel_elements(batch, d, [&](int64_t b, int64_t first, int64_t count) {
        isa.gru_update(update.row(b) + first, candidate.row(b) + first, count, state.row(b) + first);
    });
}

void layer_norm(Rows x, int64_t batch, int64_t d, const float* weight, const float* bias, float eps, Rows out) {
    const Kernels& isa = kernels();
    ThreadPool::instance().parallel_for(batch, grain_rows(d), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) isa.layer_norm(x.row(b), d, weight, bias, eps, out.row(b));
    });
}

void window_mix(Rows query, Slots buffer, int64_t batch, int64_t valid, int64_t d, float scale, Rows out) {
    const Kernels& isa = kernels();
    std::vector<float> weights(valid);
    for (int64_t b = 0; b < batch; ++b) {
        if (valid > 0) {
            dot_products(query.row(b), 0, 1, buffer.slot(b, 0), buffer.slot_stride, valid, d, weights.data());
            for (float& weight : weights) weight *= scale;
            softmax(weights.data(), valid, *std::max_element(weights.begin(), weights.end()));
        }
        const Transposed sum{weights.data(), 0, 1, valid, buffer.slot(b, 0), buffer.slot_stride, nullptr, 0, false,
                             out.row(b), 0, false};
        ThreadPool::instance().parallel_for(d, std::max<int64_t>(kGroup, kGrainFloats / std::max<int64_t>(1, valid)),
                                            [&](int64_t begin, int64_t end) { isa.transposed_f32(sum, begin, end); });
    }
}

void slot_scores(Slots query, Slots memory, const float* read_ema, int64_t batch, int64_t heads, int64_t slots,
                 int64_t d, float scale, float penalty, float* out) {
    for (int64_t b = 0; b < batch; ++b) {
        float* scores = out + b * heads * slots;
        dot_products(query.slot(b, 0), query.slot_stride, heads, memory.slot(b, 0), memory.slot_stride, slots, d,
                     scores);
        const float* ema = read_ema + b * slots;
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t j = 0; j < slots; ++j) scores[h * slots + j] = scores[h * slots + j] * scale - penalty * ema[j];
    }
}

void slot_topk(const float* scores, int64_t batch, int64_t heads, int64_t slots, int64_t k, int64_t capacity,
               int64_t* indices, float* alpha) {
    ThreadPool::instance().parallel_for(batch, std::max<int64_t>(1, 16 * 1024 / (heads * slots)), [&](int64_t begin,
                                                                                                     int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            for (int64_t h = 0; h < heads; ++h) {
                const float* values = scores + (b * heads + h) * slots;
                int64_t* chosen = indices + (b * heads + h) * k;
                float* weights = alpha + (b * heads + h) * k;
                top_indices(values, slots, k, chosen);
                for (int64_t r = 0; r < k; ++r) weights[r] = values[chosen[r]];
                softmax(weights, k, weights[0]);
            }
            if (capacity >= 0) cap(heads, slots, k, capacity, indices + b * heads * k, alpha + b * heads * k);
        }
    });
}

void slot_mix(const float* alpha, const int64_t* indices, Slots memory, int64_t batch, int64_t heads, int64_t k,
              int64_t d, Slots out) {
    const Kernels& isa = kernels();
    const int64_t grain = std::max<int64_t>(1, kGrainFloats / (k * d));
    ThreadPool::instance().parallel_for(batch * heads, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t r = 0; r < k; ++r) {
                const float* slot = memory.slot(i / heads, indices[i * k + r]);
                const Transposed term{alpha + i * k + r, 0, 1, 1, slot, d, nullptr, 0, false,
                                      out.slot(i / heads, i % heads), 0, r > 0};
                isa.transposed_f32(term, 0, d);
            }
        }
    });
}

void read_metadata(const float* alpha, const int64_t* indices, int64_t batch, int64_t entries, int64_t slots,
                   double decay, int64_t t, float* read_ema, int64_t* last_read) {
    std::vector<float> added(slots);
    const float keep = static_cast<float>(decay), share = static_cast<float>(1.0 - decay);
    for (int64_t b = 0; b < batch; ++b) {
        std::fill(added.begin(), added.end(), 0.0f);
        for (int64_t i = b * entries; i < (b + 1) * entries; ++i) {
            added[indices[i]] += alpha[i];
            last_read[b * slots + indices[i]] = t;
        }
        float* ema = read_ema + b * slots;
        for (int64_t j = 0; j < slots; ++j) ema[j] = keep * ema[j] + share * added[j];
    }
}

void slot_norms(Slots memory, int64_t batch, int64_t slots, int64_t d, float* out) {
    const Kernels& isa = kernels();
    ThreadPool::instance().parallel_for(batch * slots, grain_rows(d), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            out[i] = std::sqrt(isa.square_sum(memory.slot(i / slots, i % slots), d));
    });
}

void novelty_write(const NoveltyWrite& a, const WriteRule& rule) {
    const Kernels& isa = kernels();
    const auto theta = static_cast<float>(rule.theta);
    std::vector<float> affinity(a.slots), scores(a.slots);
    std::vector<char> chosen(a.slots);
    for (int64_t b = 0; b < a.batch; ++b) {
        float* vector = a.vector.row(b);
        const float length = std::sqrt(isa.square_sum(a.candidate.row(b), a.d));
        const float clip = std::min(1.0f, static_cast<float>(rule.clip_max) / (length + kClipEps));
        for (int64_t i = 0; i < a.d; ++i) vector[i] = a.candidate.row(b)[i] * clip;
        const float vector_norm = std::sqrt(isa.square_sum(vector, a.d)) + kNormEps;

        float* norms = a.norms + b * a.slots;
        dot_products(vector, 0, 1, a.memory.slot(b, 0), a.memory.slot_stride, a.slots, a.d, affinity.data());
        for (int64_t j = 0; j < a.slots; ++j) affinity[j] /= vector_norm * (norms[j] + kNormEps);

        const float novelty = 1.0f - *std::max_element(affinity.begin(), affinity.end());
        const bool novel = novelty > theta;
        const float gate = novel ? sigmoid_f32(static_cast<float>(rule.beta) * (novelty - theta)) : 1.0f;
        const bool any_empty = std::any_of(norms, norms + a.slots, [](float norm) { return norm <= kEmptyNorm; });
        const Branch branch = !novel ? kUpdate : any_empty ? kEmpty : kLeastUseful;

        const float* by = affinity.data();
        if (branch != kUpdate) {
            by = scores.data();
            const float* read_ema = a.read_ema + b * a.slots;
            const int64_t* last_write = a.last_write + b * a.slots;
            for (int64_t j = 0; j < a.slots; ++j) {
                // In float32 on purpose: the sums of staleness and disuse tie where the published model's do.
                scores[j] = branch == kEmpty
                                ? (norms[j] <= kEmptyNorm ? 1e4f : 0.0f) - static_cast<float>(j)
                                : static_cast<float>(rule.stale_weight) * static_cast<float>(a.t - last_write[j]) +
                                      static_cast<float>(rule.underuse_weight) / (kNormEps + read_ema[j]);
            }
        }
        int64_t* indices = a.indices + b * a.write_slots;
        top_indices(by, a.slots, a.write_slots, indices);
        std::fill(chosen.begin(), chosen.end(), 0);
        for (int64_t i = 0; i < a.write_slots; ++i) chosen[indices[i]] = 1;

        const auto decay = static_cast<float>(rule.decay);
        ThreadPool::instance().parallel_for(a.slots, grain_rows(a.d), [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j)
                norms[j] = std::sqrt(isa.decay_add(a.memory.slot(b, j), a.d, decay, gate, chosen[j] ? vector : nullptr));
        });
        const auto keep = static_cast<float>(rule.ema_decay), share = static_cast<float>(1.0 - rule.ema_decay);
        for (int64_t j = 0; j < a.slots; ++j) {
            const int64_t at = b * a.slots + j;
            a.write_ema[at] = keep * a.write_ema[at] + (chosen[j] ? share : 0.0f);
            if (chosen[j]) a.last_write[at] = a.t;
        }
        a.gate[b] = gate;
        a.novelty[b] = novelty;
        a.branch[b] = branch;
    }
}

}  // namespace thl
