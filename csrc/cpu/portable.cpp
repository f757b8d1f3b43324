// Any processor with a GCC or Clang compiler.
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/math.h"

namespace thl {
namespace {

constexpr int kWidth = 4;
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kColumnBlock = 4096;

typedef float FloatQuad __attribute__((vector_size(16)));

inline FloatQuad int8_floats(const int8_t* x) {
    return FloatQuad{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]),
                     static_cast<float>(x[3])};
}

template <int B>
void int8_dot(const int8_t* w, const PackedRows& x, int64_t b0, int64_t begin, int64_t end, const int8_t*,
              int64_t (&out)[B]) {
    // |w * q| <= 128 * 32639, so that 512 products fit 32 bits.
    constexpr int64_t kSpan = 512;
    for (int b = 0; b < B; ++b) {
        const int16_t* q = x.q(b0 + b) + begin;
        out[b] = 0;
        for (int64_t from = 0; from < end - begin; from += kSpan) {
            const int64_t to = from + kSpan < end - begin ? from + kSpan : end - begin;
            int32_t sum = 0;
            for (int64_t c = from; c < to; ++c) sum += static_cast<int32_t>(w[c]) * q[c];
            out[b] += sum;
        }
    }
}

bool supported() { return true; }

}  // namespace
}  // namespace thl

#include "cpu/kernels.inl"

namespace thl {
const Kernels kPortable = table("portable", supported);
}
