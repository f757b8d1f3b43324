// What the copy engine asks of a device: page-locked host memory, a stream for copies, and events. csrc/cuda/ has the
// one for CUDA, tests/native/ one made of host memory and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace thl {

// A device, its driver or what it needs of the host has failed. One line.
class DeviceError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Name of the capsule that carries a std::shared_ptr<CopyDevice> from one extension module to another. The number is
// that of this interface: modules of different builds refuse each other.
constexpr const char* kCopyDeviceCapsule = "thl_engine.CopyDevice.1";

// Every method may be called on two threads at a time, and throws DeviceError, sticky failures of earlier work
// included. A stream runs what is issued to it in order; `compute` is a handle in the device's own terms.
class CopyDevice {
public:
    using Event = void*;
    using Stream = std::uint64_t;

    virtual ~CopyDevice() = default;

    virtual void begin_thread() = 0;  // first call on a thread other than those of Python

    virtual void lock(void* memory, std::size_t nbytes) = 0;  // page-locks: copies from there are asynchronous
    virtual void unlock(void* memory) noexcept = 0;

    virtual Event make_event() = 0;
    virtual void free_event(Event event) noexcept = 0;

    // On the copy stream.
    virtual void copy(void* target, const void* source, std::size_t nbytes) = 0;
    virtual void record_copies(Event event) = 0;
    virtual void copies_wait(Event event) = 0;

    // On a compute stream.
    virtual void record_compute(Event event, Stream compute) = 0;
    virtual void compute_waits(Event event, Stream compute) = 0;

    // On the host. An event that was never recorded has passed.
    virtual void host_waits(Event event) = 0;
    virtual bool passed(Event event) = 0;
};

}  // namespace thl
