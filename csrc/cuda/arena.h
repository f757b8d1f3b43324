// The memory budget of an engine on a CUDA device: one block from cudaMalloc, out of which torch's allocator is served.
#pragma once

#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>

#include "cuda/budget_arena.h"

namespace thl::cuda {

// The arenas of this process. Never destroyed: tensors may be freed while it ends.
BudgetArenas& arenas();

// An arena over `size` new bytes of a device. Throws std::runtime_error where the device has not as many.
std::int64_t open_arena(int device, std::size_t size);

}  // namespace thl::cuda

// What torch.cuda.memory.CUDAPluggableAllocator takes: memory of the arena that this thread has entered, or null where
// there is none or it is full, which torch reports as out of memory.
extern "C" __attribute__((visibility("default"))) void* thl_arena_alloc(ssize_t size, int device, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) void thl_arena_free(void* address, ssize_t size, int device,
                                                                      cudaStream_t stream);
