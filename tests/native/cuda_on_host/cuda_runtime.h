// What device code and launches need: see cuda_runtime_api.h.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
// One copy for all blocks, which run in turn; poisoned between them. Linked in a section of their own to be found.
#define __shared__ static __attribute__((section("shared_memory")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T min(T a, T b) { return b < a ? b : a; }

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}

template <typename T>
T __ldcs(const T* from) { return *from; }

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    void* attrs = nullptr;
    unsigned numAttrs = 0;
};

namespace host {

extern dim3 thread_index, block_index;

void block_barrier();                       // __syncthreads
float exchange(float value, int lane_mask);  // __shfl_xor_sync of a whole warp
// Runs a kernel on every block. Throws std::logic_error where threads wait for one another forever.
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);

}  // namespace host

#define threadIdx host::thread_index
#define blockIdx host::block_index

inline void __syncthreads() { host::block_barrier(); }
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
    if (mask != 0xFFFFFFFFu) std::abort();
    return host::exchange(value, lane_mask);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    host::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
    return cudaSuccess;
}
