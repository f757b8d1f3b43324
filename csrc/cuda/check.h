// What every use of the CUDA runtime here shares: errors as exceptions, and the device that a call is meant for.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace thl::cuda {

// Throws std::runtime_error (RuntimeError in Python) that says which call failed and why.
inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // it would be reported again by the next launch
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current, and the one before when it goes out of scope.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device == before_) return;
        check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace thl::cuda
