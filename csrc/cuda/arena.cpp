#include "cuda/arena.h"

#include "cuda/check.h"

namespace thl::cuda {

BudgetArenas& arenas() {
    static BudgetArenas* all = new BudgetArenas;
    return *all;
}

std::int64_t open_arena(int device, std::size_t size) {
    const OnDevice here(device);
    void* base = nullptr;
    check(cudaMalloc(&base, size), "cudaMalloc");
    // The device is given explicitly: the last tensor may be freed by a thread that has another one current. Nothing
    // may throw here, since that thread may be in a destructor.
    const auto give_back = [device](std::uintptr_t address) {
        int before = 0;
        if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return;
        cudaFree(reinterpret_cast<void*>(address));
        cudaSetDevice(before);
    };
    try {
        return arenas().open(device, reinterpret_cast<std::uintptr_t>(base), size, give_back);
    } catch (...) {
        cudaFree(base);
        throw;
    }
}

}  // namespace thl::cuda

void* thl_arena_alloc(ssize_t size, int device, cudaStream_t) {
    if (size < 0) return nullptr;
    return reinterpret_cast<void*>(thl::cuda::arenas().allocate(static_cast<std::size_t>(size), device));
}

void thl_arena_free(void* address, ssize_t, int device, cudaStream_t) {
    if (address == nullptr) return;
    // torch gives segments back without waiting for kernels that use them, since cudaFree does.
    int before = 0;
    if (cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) {
        cudaDeviceSynchronize();
        cudaSetDevice(before);
    }
    thl::cuda::arenas().release(reinterpret_cast<std::uintptr_t>(address));
}
