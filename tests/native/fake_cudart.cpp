// Stands in for the CUDA runtime that csrc/cuda/copy_device.cpp uses: checks what it is given and passes it on to the
// host device, which knows what has to be in order. Compiled together with that file; see test_cuda_copy_device.py.
#include <cuda_runtime_api.h>

#include "io/copy_device.h"
#include "cuda/copy_device.h"

namespace {

thl::CopyDevice* behind = nullptr;
int failing = 0;         // what every call returns from now on
bool capturing = false;  // some thread captures a graph
const cudaStream_t kCopies = reinterpret_cast<cudaStream_t>(0xC0);
constexpr int kDevice = 1;  // the one that is meant; threads begin with 0

thread_local int current = 0;
thread_local bool relaxed = false;
thread_local cudaError_t last = cudaSuccess;

cudaError_t done(bool right) {
    last = failing ? static_cast<cudaError_t>(failing) : right ? cudaSuccess : cudaErrorInvalidValue;
    return last;
}

template <typename Call>
cudaError_t pass(bool right, const Call& call) {
    if (done(right && current == kDevice) != cudaSuccess) return last;
    call();
    return cudaSuccess;
}

}  // namespace

extern "C" {

#define SHOWN __attribute__((visibility("default")))
SHOWN void fake_begin(void* device) { behind = static_cast<thl::CopyDevice*>(device); }
SHOWN void fake_fail(int error) {
    if (error) {  // a device that has failed copies nothing any more, so its memory may go
        const thl::CopyDevice::Event copied = behind->make_event();
        behind->record_copies(copied);
        behind->host_waits(copied);
        behind->free_event(copied);
    }
    failing = error;
}
SHOWN void fake_capture(int on) { capturing = on; }
SHOWN int fake_current() { return current; }
SHOWN int fake_last() { return last; }
SHOWN void* fake_device() { return new std::shared_ptr<thl::CopyDevice>(thl::cuda::copy_device(kDevice)); }
SHOWN void fake_end(void* device) { delete static_cast<std::shared_ptr<thl::CopyDevice>*>(device); }

cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return done(true);
}

cudaError_t cudaSetDevice(int device) {
    current = device;
    return done(true);
}

cudaError_t cudaGetLastError() {
    const cudaError_t before = last;
    if (!failing) last = cudaSuccess;
    return before;
}

const char* cudaGetErrorString(cudaError_t) { return "an error as was asked for"; }

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    relaxed = *mode == cudaStreamCaptureModeRelaxed;
    *mode = cudaStreamCaptureModeGlobal;
    return done(true);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return pass(flags == cudaStreamNonBlocking, [&] { *stream = kCopies; });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { return done(stream == kCopies); }

cudaError_t cudaHostRegister(void* memory, size_t nbytes, unsigned flags) {
    return pass(flags == cudaHostRegisterDefault, [&] { behind->lock(memory, nbytes); });
}

cudaError_t cudaHostUnregister(void* memory) {
    behind->unlock(memory);
    return done(true);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return pass(flags == (cudaEventDisableTiming | cudaEventBlockingSync),
                [&] { *event = static_cast<cudaEvent_t>(behind->make_event()); });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    behind->free_event(event);
    return done(true);
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t nbytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return pass(kind == cudaMemcpyHostToDevice && stream == kCopies, [&] { behind->copy(target, source, nbytes); });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return pass(true, [&] {
        if (stream == kCopies) {
            behind->record_copies(event);
        } else {
            behind->record_compute(event, reinterpret_cast<thl::CopyDevice::Stream>(stream));
        }
    });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return pass(flags == 0, [&] {
        if (stream == kCopies) {
            behind->copies_wait(event);
        } else {
            behind->compute_waits(event, reinterpret_cast<thl::CopyDevice::Stream>(stream));
        }
    });
}

// Only a thread that has said so may ask for events while a graph is captured.
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return pass(relaxed || !capturing, [&] { behind->host_waits(event); });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    bool passed = false;
    if (pass(relaxed || !capturing, [&] { passed = behind->passed(event); }) == cudaSuccess && !passed) last = cudaErrorNotReady;
    return last;
}

}  // extern "C"
