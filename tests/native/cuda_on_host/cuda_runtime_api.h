// The part of the CUDA runtime that csrc/cuda's kernels use, on the host: compiled against these headers by an ordinary
// C++ compiler, a .cu file runs here, one block at a time, its threads being fibers that take turns at barriers.
//
// What it shows: wrong results, missing barriers (threads run in random order, and shared memory holds NaN when a block
// begins), barriers that not all threads reach, and, with UBSan, misaligned loads. What it does not: speed, and anything
// that depends on warps running in step, which since sm_70 they need not.
#pragma once

#include <cstddef>
#include <cstdint>

enum cudaError_t { cudaSuccess, cudaErrorUnknown };
using cudaStream_t = struct CUstream_st*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "unknown"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
