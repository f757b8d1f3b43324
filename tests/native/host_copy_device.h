// A copy device made of host memory and two threads, to test what uses one: late, at random, and watchful.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "io/copy_device.h"

namespace thl {

// Both streams run behind what is issued to them, by up to `delay` microseconds at every step. A copy first spoils its
// target. Whether uses and copies are ordered is known from the events between the streams, whatever the timing.
class HostCopyDevice : public CopyDevice {
public:
    static constexpr Stream kCompute = 0x7e57;  // the one compute stream

    HostCopyDevice(std::uint64_t seed, int delay);
    ~HostCopyDevice() override;

    void begin_thread() override;
    void lock(void* memory, std::size_t nbytes) override;
    void unlock(void* memory) noexcept override;
    Event make_event() override;
    void free_event(Event event) noexcept override;
    void copy(void* target, const void* source, std::size_t nbytes) override;
    void record_copies(Event event) override;
    void copies_wait(Event event) override;
    void record_compute(Event event, Stream compute) override;
    void compute_waits(Event event, Stream compute) override;
    void host_waits(Event event) override;
    bool passed(Event event) override;

    // Issues compute that reads memory; its checksum is among those of the next `sums`.
    void use(const std::uint8_t* memory, std::size_t nbytes);
    // Waits for all compute; the checksums of its uses in order.
    std::vector<std::uint32_t> sums();
    // What was used before its copy, overwritten before its last use, or otherwise wrong.
    std::vector<std::string> violations() const;
    // The copy with this number, from 0, fails, and everything after it.
    void fail_at(std::int64_t copy);
    void refuse_locks() { refuse_locks_ = true; }
    std::size_t locked() const;  // bytes
    std::int64_t events() const;

private:
    // How much of each stream is done when something runs.
    struct Clock {
        std::uint64_t copies = 0, compute = 0;
    };
    struct Stop {
        std::uint64_t recorded = 0, passed = 0;
        Clock clock;
    };
    struct Line {
        std::deque<std::function<void(std::mt19937_64&)>> work;
        Clock clock;
        bool busy = false;
    };
    struct Touch {
        std::uintptr_t begin, end;
        std::uint64_t number;
    };

    void run(Line& line, std::uint64_t seed);
    void pause(std::mt19937_64& random) const;
    void check();
    void record(Line& line, Event event);
    void wait(Line& line, Event event);
    void check_stream(Stream compute);
    // Events may be freed while streams still wait for them.
    static std::shared_ptr<Stop> stop_of(Event event) { return *static_cast<std::shared_ptr<Stop>*>(event); }
    static bool overlaps(const Touch& touch, const Touch& other) {
        return touch.begin < other.end && other.begin < touch.end;
    }

    const int delay_;
    bool refuse_locks_ = false;

    mutable std::mutex mutex_;  // guards everything below
    std::condition_variable changed_;
    Line copies_, compute_;
    std::vector<Touch> written_, read_;
    std::vector<std::uint32_t> sums_;
    std::vector<std::string> violations_;
    std::vector<std::pair<void*, std::size_t>> locked_;
    std::int64_t events_ = 0, copied_ = 0, fail_at_ = -1;
    bool failed_ = false, stop_ = false;
    std::thread copier_, computer_;
};

}  // namespace thl
