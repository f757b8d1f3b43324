#include "host_copy_device.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "io/crc32c.h"

namespace thl {

HostCopyDevice::HostCopyDevice(std::uint64_t seed, int delay) : delay_(delay) {
    copier_ = std::thread([this, seed] { run(copies_, 2 * seed); });
    computer_ = std::thread([this, seed] { run(compute_, 2 * seed + 1); });
}

HostCopyDevice::~HostCopyDevice() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    changed_.notify_all();
    copier_.join();
    computer_.join();
}

void HostCopyDevice::run(Line& line, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        changed_.wait(lock, [&] { return stop_ || !line.work.empty(); });
        if (stop_) return;
        const auto work = std::move(line.work.front());
        line.work.pop_front();
        line.busy = true;
        lock.unlock();
        pause(random);
        work(random);
        lock.lock();
        line.busy = false;
        changed_.notify_all();
    }
}

void HostCopyDevice::pause(std::mt19937_64& random) const {
    if (delay_ && random() % 2) std::this_thread::sleep_for(std::chrono::microseconds(random() % delay_));
}

// Called with mutex_ held, by everything that can fail.
void HostCopyDevice::check() {
    if (failed_) throw DeviceError("host device: a copy failed, as was asked for");
}

void HostCopyDevice::begin_thread() {}

void HostCopyDevice::lock(void* memory, std::size_t nbytes) {
    if (refuse_locks_) throw DeviceError("host device: memory cannot be page-locked, as was asked for");
    std::lock_guard<std::mutex> lock(mutex_);
    locked_.emplace_back(memory, nbytes);
}

void HostCopyDevice::unlock(void* memory) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(locked_, [&](const auto& one) { return one.first == memory; });
}

CopyDevice::Event HostCopyDevice::make_event() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++events_;
    return new std::shared_ptr<Stop>(std::make_shared<Stop>());
}

void HostCopyDevice::free_event(Event event) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    --events_;
    delete static_cast<std::shared_ptr<Stop>*>(event);
}

void HostCopyDevice::copy(void* target, const void* source, std::size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    check();
    const auto address = reinterpret_cast<std::uintptr_t>(target);
    const Touch written{address, address + nbytes, ++copies_.clock.copies};
    for (const Touch& read : read_) {
        if (overlaps(read, written) && read.number > copies_.clock.compute) {
            violations_.push_back("copy " + std::to_string(written.number) + " may overwrite what use " +
                                  std::to_string(read.number) + " reads");
        }
    }
    const auto* from = static_cast<const std::uint8_t*>(source);
    const bool pinned = std::any_of(locked_.begin(), locked_.end(), [&](const auto& one) {
        const auto* begin = static_cast<const std::uint8_t*>(one.first);
        return begin <= from && from + nbytes <= begin + one.second;
    });
    if (!pinned) violations_.push_back("copy " + std::to_string(written.number) + " is from pageable memory");
    const auto covered = [&](const Touch& old) { return written.begin <= old.begin && old.end <= written.end; };
    std::erase_if(read_, covered);
    std::erase_if(written_, covered);
    written_.push_back(written);

    copies_.work.push_back([this, target, from, nbytes](std::mt19937_64& random) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (copied_++ == fail_at_) failed_ = true;
            if (failed_) return;
        }
        auto* to = static_cast<std::uint8_t*>(target);
        std::memset(to, 0xA5, nbytes);
        pause(random);
        const std::size_t cut = nbytes ? random() % nbytes : 0;
        std::memcpy(to + cut, from + cut, nbytes - cut);
        pause(random);
        std::memcpy(to, from, cut);
    });
    changed_.notify_all();
}

void HostCopyDevice::use(const std::uint8_t* memory, std::size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    check();
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const Touch read{address, address + nbytes, ++compute_.clock.compute};
    for (const Touch& written : written_) {
        if (overlaps(read, written) && written.number > compute_.clock.copies) {
            violations_.push_back("use " + std::to_string(read.number) + " may come before copy " +
                                  std::to_string(written.number));
        }
    }
    read_.push_back(read);
    compute_.work.push_back([this, memory, nbytes, number = read.number](std::mt19937_64& random) {
        const std::uint32_t sum = crc32c(0, memory, nbytes);
        pause(random);
        const bool changed = crc32c(0, memory, nbytes) != sum;
        std::lock_guard<std::mutex> lock(mutex_);
        sums_.push_back(sum);
        if (changed) violations_.push_back("memory changed during use " + std::to_string(number));
    });
    changed_.notify_all();
}

std::vector<std::uint32_t> HostCopyDevice::sums() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return compute_.work.empty() && !compute_.busy; });
    return std::exchange(sums_, {});
}

// Called with mutex_ held.
void HostCopyDevice::record(Line& line, Event event) {
    check();
    const std::shared_ptr<Stop> stop = stop_of(event);
    const std::uint64_t number = ++stop->recorded;
    stop->clock = line.clock;
    line.work.push_back([this, stop, number](std::mt19937_64&) {
        std::lock_guard<std::mutex> lock(mutex_);
        stop->passed = number;
    });
    changed_.notify_all();
}

// Called with mutex_ held. As with CUDA, the wait is for what was recorded by now.
void HostCopyDevice::wait(Line& line, Event event) {
    check();
    const std::shared_ptr<Stop> stop = stop_of(event);
    line.clock.copies = std::max(line.clock.copies, stop->clock.copies);
    line.clock.compute = std::max(line.clock.compute, stop->clock.compute);
    line.work.push_back([this, stop, number = stop->recorded](std::mt19937_64&) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return stop->passed >= number || stop_; });
    });
    changed_.notify_all();
}

void HostCopyDevice::check_stream(Stream compute) {
    if (compute != kCompute) violations_.push_back("compute stream " + std::to_string(compute) + " is unknown");
}

void HostCopyDevice::record_copies(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    record(copies_, event);
}

void HostCopyDevice::copies_wait(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    wait(copies_, event);
}

void HostCopyDevice::record_compute(Event event, Stream compute) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_stream(compute);
    record(compute_, event);
}

void HostCopyDevice::compute_waits(Event event, Stream compute) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_stream(compute);
    wait(compute_, event);
}

void HostCopyDevice::host_waits(Event event) {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::shared_ptr<Stop> stop = stop_of(event);
    changed_.wait(lock, [&, number = stop->recorded] { return stop->passed >= number; });
    check();
}

bool HostCopyDevice::passed(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    check();
    const std::shared_ptr<Stop> stop = stop_of(event);
    return stop->passed == stop->recorded;
}

std::vector<std::string> HostCopyDevice::violations() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return violations_;
}

void HostCopyDevice::fail_at(std::int64_t copy) {
    std::lock_guard<std::mutex> lock(mutex_);
    fail_at_ = copy;
}

std::size_t HostCopyDevice::locked() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::size_t total = 0;
    for (const auto& one : locked_) total += one.second;
    return total;
}

std::int64_t HostCopyDevice::events() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return events_;
}

}  // namespace thl
