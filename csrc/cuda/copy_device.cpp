#include "cuda/copy_device.h"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/check.h"

namespace thl::cuda {
namespace {

cudaEvent_t event_of(CopyDevice::Event event) { return static_cast<cudaEvent_t>(event); }

cudaStream_t stream_of(CopyDevice::Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Handles of torch serve here as well: the runtime that is linked in shares the device's primary context with it. A
// stream's handle 0 is the default stream of the current device, so every call makes its own device current.
class CudaCopyDevice : public CopyDevice {
public:
    explicit CudaCopyDevice(int index) : index_(index) {
        call("cudaStreamCreateWithFlags",
             [&] { return cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking); });
    }

    ~CudaCopyDevice() override { attempt(cudaStreamDestroy(copies_)); }

    void begin_thread() override {
        report([&] { check(cudaSetDevice(index_), "cudaSetDevice"); });
        // While another thread captures a graph, events must not be waited for here, unless the thread says that
        // what it does is no part of that.
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        call("cudaThreadExchangeStreamCaptureMode", [&] { return cudaThreadExchangeStreamCaptureMode(&mode); });
    }

    void lock(void* memory, std::size_t nbytes) override {
        call("cudaHostRegister", [&] { return cudaHostRegister(memory, nbytes, cudaHostRegisterDefault); });
    }

    void unlock(void* memory) noexcept override { attempt(cudaHostUnregister(memory)); }

    Event make_event() override {
        cudaEvent_t event = nullptr;
        call("cudaEventCreateWithFlags", [&] {  // a thread that waits for an event sleeps
            return cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync);
        });
        return event;
    }

    void free_event(Event event) noexcept override { attempt(cudaEventDestroy(event_of(event))); }

    void copy(void* target, const void* source, std::size_t nbytes) override {
        call("cudaMemcpyAsync",
             [&] { return cudaMemcpyAsync(target, source, nbytes, cudaMemcpyHostToDevice, copies_); });
    }

    void record_copies(Event event) override { record(event, copies_); }
    void copies_wait(Event event) override { wait(copies_, event); }
    void record_compute(Event event, Stream compute) override { record(event, stream_of(compute)); }
    void compute_waits(Event event, Stream compute) override { wait(stream_of(compute), event); }

    void host_waits(Event event) override {
        call("cudaEventSynchronize", [&] { return cudaEventSynchronize(event_of(event)); });
    }

    bool passed(Event event) override {
        cudaError_t status = cudaSuccess;
        call("cudaEventQuery", [&] {
            status = cudaEventQuery(event_of(event));
            if (status != cudaErrorNotReady) return status;
            cudaGetLastError();  // it would be reported by the next launch
            return cudaSuccess;
        });
        return status == cudaSuccess;
    }

private:
    // Giving something back can only fail where the device has; whoever uses it next is told.
    static void attempt(cudaError_t status) noexcept {
        if (status != cudaSuccess) cudaGetLastError();
    }

    template <typename Call>
    void call(const char* name, const Call& function) const {
        report([&] {
            const OnDevice on(index_);
            check(function(), name);
        });
    }

    template <typename Checked>
    void report(const Checked& function) const {
        try {
            function();
        } catch (const std::runtime_error& error) {
            throw DeviceError("device cuda:" + std::to_string(index_) + ": " + error.what());
        }
    }

    void record(Event event, cudaStream_t stream) {
        call("cudaEventRecord", [&] { return cudaEventRecord(event_of(event), stream); });
    }

    void wait(cudaStream_t stream, Event event) {
        call("cudaStreamWaitEvent", [&] { return cudaStreamWaitEvent(stream, event_of(event), 0); });
    }

    const int index_;
    cudaStream_t copies_ = nullptr;
};

}  // namespace

std::shared_ptr<CopyDevice> copy_device(int index) { return std::make_shared<CudaCopyDevice>(index); }

}  // namespace thl::cuda
