// int8 weights times 1 to 8 rows of activations: reading the weights, once, is all that should take time.
//
// A warp takes 2 or 4 rows of weights; each lane reads 16 columns of every row with one load, so that 32 lanes pass over
// a row in chunks of 512 columns. The loads of the next chunk are under way while one is multiplied: 4 or 8 loads of 16
// bytes a thread, and with two blocks of 256 threads on a multiprocessor 32 to 64 KB, where 3.35 TB/s at 700 ns on 132
// multiprocessors (H100) want 18 KB and 4.8 TB/s (H200) 25 KB. Activations, as floats, are staged in shared memory:
// 32 KB, so that two blocks fit into the 64 KB of sm_75 and three into the 100 KB of sm_86 and sm_89. Registers are
// held to 128 for two blocks on every card, and to 80 for three where one row of activations needs no more.
//
// Sums have one order, whatever the number of rows at hand: a lane adds its chunks as they come, then a tree over lanes,
// then the warps that share the row in turn. No atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/check.h"
#include "cuda/gemv_int8.h"

namespace thl::cuda {

namespace {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kUnit = 16;              // columns that a lane loads at once
constexpr int kChunk = kLanes * kUnit;  // columns that a warp loads at once
constexpr int kStaged = 16 * kChunk;   // activations in shared memory, of all rows together

__device__ inline float load_float(const void* data, Float type, int64_t i) {
    switch (type) {
        case Float::f16: return __half2float(static_cast<const __half*>(data)[i]);
        case Float::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
        default: return static_cast<const float*>(data)[i];
    }
}

__device__ inline void store_float(void* data, Float type, int64_t i, float value) {
    switch (type) {
        case Float::f16: static_cast<__half*>(data)[i] = __float2half_rn(value); break;
        case Float::bf16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value); break;
        default: static_cast<float*>(data)[i] = value;
    }
}

// Four activations from column c, a multiple of 4; zeros from `columns` on.
__device__ inline float4 load_quad(const Rows<const void*>& x, int64_t row, int c, int columns, bool aligned) {
    const int64_t i = row * x.row + c;
    if (aligned && c + 4 <= columns) return *reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + i);
    float4 quad = make_float4(0, 0, 0, 0);
    if (c < columns) quad.x = load_float(x.data, x.type, i);
    if (c + 1 < columns) quad.y = load_float(x.data, x.type, i + 1);
    if (c + 2 < columns) quad.z = load_float(x.data, x.type, i + 2);
    if (c + 3 < columns) quad.w = load_float(x.data, x.type, i + 3);
    return quad;
}

template <bool ALIGNED>
__device__ inline uint4 load_unit(const int8_t* from) {
    if constexpr (ALIGNED) return __ldcs(reinterpret_cast<const uint4*>(from));
    uint32_t words[4];
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j)
        words[j] = bytes[4 * j] | bytes[4 * j + 1] << 8 | bytes[4 * j + 2] << 16 | uint32_t(bytes[4 * j + 3]) << 24;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Byte k of a word, whose sign bits are flipped: put behind the exponent of 2^23 it is that float and 128 too much.
// Conversion instructions would run at a quarter of this speed.
template <int K>
__device__ inline float widen(uint32_t flipped) {
    return __uint_as_float(__byte_perm(flipped, 0x4B000000u, 0x7650 | K)) - 8388736.0f;
}

__device__ inline float activate(Gate gate, float x) {
    if (gate == Gate::silu) return x / (1.0f + expf(-x));
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// Sums V values over the lanes of a warp. Each exchange halves what a lane has left, until lane l has value
// l / (32 / V); the order of sums is the same for every V.
template <int V>
__device__ inline float sum_over_lanes(float (&values)[V], int lane) {
    int left = V;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        const bool upper = lane & offset;
        if (left > 1) {
            left /= 2;
#pragma unroll
            for (int i = 0; i < V / 2; ++i) {
                if (i < left) {
                    const float sent = upper ? values[i] : values[i + left];
                    const float kept = upper ? values[i + left] : values[i];
                    values[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, sent, offset);
                }
            }
        } else {
            values[0] += __shfl_xor_sync(0xFFFFFFFFu, values[0], offset);
        }
    }
    return values[0];
}

// B rows of activations at most, N rows of weights a warp; the first half of them is of w and the second of up where
// there is up. ALIGNED: all rows of weights begin at multiples of 16 bytes.
template <int B, int N, bool ALIGNED, bool GROUPED>
__global__ void __launch_bounds__(kThreads, B == 1 && !GROUPED ? 3 : 2) gemv(const __grid_constant__ GemvInt8 p, int split) {
    constexpr int V = N * B;
    constexpr int kTile = kStaged / kChunk / B;  // chunks that are staged at a time
    __shared__ float4 staged[kStaged / 4];
    float* const totals = reinterpret_cast<float*>(staged);  // once the activations are done with

    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int part = warp % split, team = warp / split, teams = kWarps / split;
    const bool gated = p.gate != Gate::none;
    const int own = gated ? N / 2 : N;  // rows of the result that a warp makes
    const int batches = (p.batch + B - 1) / B;  // blocks side by side share the weights that they read
    const int64_t first = (int64_t(blockIdx.x / batches) * teams + team) * own;
    const int b0 = blockIdx.x % batches * B;
    const int units = p.columns / kUnit, chunks = (units + kLanes - 1) / kLanes;

    // Beyond the last row of weights or activations the last one is read again; what comes of it is not kept.
    const int8_t* weights[N];
    const float* scales[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const Int8Rows& from = gated && n >= N / 2 ? p.up : p.w;
        const int64_t r = min(first + (gated ? n % (N / 2) : n), p.rows - 1);
        weights[n] = from.data + r * from.row;
        scales[n] = from.scales + r * from.scales_row;
    }

    uint4 held[N], next[N];
    float held_scale[N], next_scale[N];
    const auto load = [&](int chunk, uint4(&to)[N], float(&scale)[N]) {
        const int unit = chunk * kLanes + lane;
        const bool inside = unit < units;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            to[n] = inside ? load_unit<ALIGNED>(weights[n] + int64_t(unit) * kUnit) : make_uint4(0, 0, 0, 0);
            if constexpr (GROUPED) scale[n] = inside ? scales[n][unit * kUnit >> p.group_shift] : 0.0f;
        }
    };
    load(part, held, held_scale);

    float sums[V] = {};
    const auto row_of_x = [&](int b) { return int64_t(min(b0 + b, p.batch - 1)); };
    const int last = units * kUnit + lane;  // columns that fill no unit go to one lane each
    if (part == 0 && last < p.columns) {
#pragma unroll
        for (int b = 0; b < B; ++b) sums[b] = load_float(p.x.data, p.x.type, row_of_x(b) * p.x.row + last);
#pragma unroll
        for (int n = N - 1; n >= 0; --n) {
            const float w = weights[n][last];
            const float of_last = GROUPED ? scales[n][last >> p.group_shift] : 1.0f;
#pragma unroll
            for (int b = 0; b < B; ++b) sums[n * B + b] = of_last * (w * sums[b]);
        }
    }

    const bool aligned = p.x.type == Float::f32 && p.x.row % 4 == 0 && reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0;
    for (int tile = 0; tile < chunks; tile += kTile) {
        const int end = min(tile + kTile, chunks), quads = (end - tile) * (kChunk / 4);
        if (tile > 0) __syncthreads();
        // A unit's four quads go to four planes, so that lanes find theirs side by side; turning the lanes of each
        // plane spreads over the banks what neighbours write.
        for (int b = 0; b < B; ++b) {
            for (int q = threadIdx.x; q < quads; q += kThreads) {
                const int chunk = q / (kChunk / 4), j = q % 4, owner = q / 4 % kLanes;
                staged[(b * kTile + chunk) * (kChunk / 4) + j * kLanes + (owner ^ 2 * j)] =
                    load_quad(p.x, row_of_x(b), tile * kChunk + 4 * q, p.columns, aligned);
            }
        }
        __syncthreads();
        for (int chunk = tile + part; chunk < end; chunk += split) {
            load(chunk + split, next, next_scale);
            const float4* const at = staged + (chunk - tile) * (kChunk / 4);
            float unit_sums[V] = {};
            float* const into = GROUPED ? unit_sums : sums;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float w[N][4];
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const uint32_t word = (j == 0 ? held[n].x : j == 1 ? held[n].y : j == 2 ? held[n].z : held[n].w)
                                          ^ 0x80808080u;
                    w[n][0] = widen<0>(word);
                    w[n][1] = widen<1>(word);
                    w[n][2] = widen<2>(word);
                    w[n][3] = widen<3>(word);
                }
#pragma unroll
                for (int b = 0; b < B; ++b) {
                    const float4 x = at[b * kTile * (kChunk / 4) + j * kLanes + (lane ^ 2 * j)];
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        float& sum = into[n * B + b];
                        sum = fmaf(w[n][3], x.w, fmaf(w[n][2], x.z, fmaf(w[n][1], x.y, fmaf(w[n][0], x.x, sum))));
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if constexpr (GROUPED) {
#pragma unroll
                    for (int b = 0; b < B; ++b)
                        sums[n * B + b] = fmaf(held_scale[n], unit_sums[n * B + b], sums[n * B + b]);
                    held_scale[n] = next_scale[n];
                }
                held[n] = next[n];
            }
        }
    }

    const float total = sum_over_lanes<V>(sums, lane);
    __syncthreads();
    if (lane % (kLanes / V) == 0) totals[warp * V + lane / (kLanes / V)] = total;
    __syncthreads();
    const int i = threadIdx.x;
    if (i >= teams * own * B) return;

    const int mine = i / (own * B), n = i / B % own, b = b0 + i % B;
    const int64_t r = (int64_t(blockIdx.x / batches) * teams + mine) * own + n;
    if (r >= p.rows || b >= p.batch) return;
    const auto sum_over_parts = [&](const Int8Rows& from, int row) {
        float sum = 0.0f;
        for (int s = 0; s < split; ++s) sum += totals[(mine * split + s) * V + row * B + i % B];
        return GROUPED ? sum : sum * from.scales[r * from.scales_row];
    };
    float value = sum_over_parts(p.w, n);
    if (p.bias) value += p.bias[r];
    if (gated) value = activate(p.gate, value) * sum_over_parts(p.up, n + N / 2);
    if (p.residual.data) value += load_float(p.residual.data, p.residual.type, b * p.residual.row + r);
    store_float(p.out.data, p.out.type, b * p.out.row + r, value);
}

bool aligned(const Int8Rows& w) { return reinterpret_cast<uintptr_t>(w.data) % kUnit == 0 && w.row % kUnit == 0; }

template <int B, int N, bool ALIGNED, bool GROUPED>
void launch(const GemvInt8& p, int split, cudaStream_t stream) {
    const int64_t rows = int64_t(kWarps / split) * (p.gate == Gate::none ? N : N / 2);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((p.rows + rows - 1) / rows * ((p.batch + B - 1) / B));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, gemv<B, N, ALIGNED, GROUPED>, p, split), "launch of gemv_int8");
}

template <int B, bool GROUPED>
void launch(const GemvInt8& p, GemvShape shape, cudaStream_t stream) {
    const int split = std::min(shape.split, kStaged / kChunk / B);
    if (!aligned(p.w) || !aligned(p.up)) launch<B, 2, false, GROUPED>(p, split, stream);
    else if (B == 8 || shape.rows == 2) launch<B, 2, true, GROUPED>(p, split, stream);
    else launch<B, B == 8 ? 2 : 4, true, GROUPED>(p, split, stream);
}

template <bool GROUPED>
void launch(const GemvInt8& p, GemvShape shape, cudaStream_t stream) {
    if (p.batch <= 1) launch<1, GROUPED>(p, shape, stream);
    else if (p.batch <= 2) launch<2, GROUPED>(p, shape, stream);
    else if (p.batch <= 4 || GROUPED) launch<4, GROUPED>(p, shape, stream);  // 8 with groups would want more registers
    else launch<GROUPED ? 4 : 8, GROUPED>(p, shape, stream);
}

}  // namespace

void gemv_int8(const GemvInt8& product, GemvShape shape, cudaStream_t stream) {
    if (product.group_shift >= 0) launch<true>(product, shape, stream);
    else launch<false>(product, shape, stream);
}

}  // namespace thl::cuda
