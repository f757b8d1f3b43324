#include "io/copy_engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

namespace thl {
namespace {

constexpr std::int64_t kAlign = kIoAlignment;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::int64_t extent(const CopyRequest& request) {
    return (request.offset % kAlign + request.nbytes + kAlign - 1) / kAlign * kAlign;
}

std::int64_t ring_size(std::int64_t slot_bytes, int slots) {
    std::int64_t total = 0;
    if (slots < 2) refuse("a staging ring needs at least 2 slots, got " + std::to_string(slots));
    if (slot_bytes < kAlign || slot_bytes % kAlign || __builtin_mul_overflow(slot_bytes, slots, &total)) {
        refuse("slot_bytes must be a positive multiple of 4096, got " + std::to_string(slot_bytes));
    }
    return total;
}

}  // namespace

CopyEngine::Staging::Staging(CopyDevice& device, std::size_t nbytes)
    : device_(device), arena_(std::make_shared<Arena>(nbytes)) {
    try {
        device.lock(arena_->data(), arena_->nbytes());
    } catch (const DeviceError& error) {
        throw DeviceError(std::string(error.what()) + "; copies to the device go through " +
                          std::to_string(arena_->nbytes()) +
                          " bytes of page-locked host memory: raise the limit on it (ulimit -l unlimited; containers: "
                          "--ulimit memlock=-1) or leave more memory free");
    }
}

CopyEngine::CopyEngine(Reader& reader, std::shared_ptr<CopyDevice> device, std::uint8_t* memory, std::int64_t nbytes,
                       const std::vector<std::int64_t>& places, std::int64_t slot_bytes, int slots,
                       CopyDevice::Stream compute, std::unique_ptr<DirectStorage> direct, std::int64_t kept_bytes)
    : reader_(reader), device_(std::move(device)), memory_(memory), slot_bytes_(slot_bytes),
      ring_bytes_(ring_size(slot_bytes, slots)), kept_bytes_(kept_bytes), direct_(std::move(direct)) {
    if (kept_bytes < 0) refuse("kept_bytes must be at least 0, got " + std::to_string(kept_bytes));
    std::vector<std::int64_t> sorted(places);
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 0; i < sorted.size(); ++i) {
        const std::int64_t next = i + 1 < sorted.size() ? sorted[i + 1] : nbytes;
        if (sorted[i] < 0 || sorted[i] % kAlign || next <= sorted[i]) {
            refuse("place " + std::to_string(sorted[i]) + " is no multiple of 4096 with room before " +
                   std::to_string(next));
        }
        places_.try_emplace(sorted[i], *device_, next - sorted[i]);
    }
    flights_.reserve(kFlights);
    for (std::uint64_t i = 0; i < kFlights; ++i) flights_.push_back(Flight{OwnedEvent(*device_)});
    staging_ = std::make_unique<Staging>(*device_, static_cast<std::size_t>(ring_bytes_));
    if (kept_bytes) kept_ = std::make_unique<Staging>(*device_, static_cast<std::size_t>(kept_bytes));
    // The memory may come from a pool, and what used it before may still run.
    device_->record_compute(flights_[0].copied, compute);
    device_->copies_wait(flights_[0].copied);
    thread_ = std::thread(&CopyEngine::run, this);
}

CopyEngine::~CopyEngine() { close(); }

void CopyEngine::close() {
    if (inherited()) return;
    std::lock_guard<std::mutex> closing(close_mutex_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        waiting_.clear();
    }
    work_.notify_all();
    arrived_.notify_all();
    if (!thread_.joinable()) return;
    thread_.join();
    staging_.reset();
    kept_.reset();
    direct_.reset();
}

// The first that `start`, `finish` and `released` do.
CopyEngine::Place& CopyEngine::find(std::int64_t place) {
    if (inherited()) refuse("the copy engine was made by a process that this one is a fork of");
    const auto found = places_.find(place);
    if (found == places_.end()) refuse("there is no place at " + std::to_string(place));
    return found->second;
}

void CopyEngine::start(CopyRequest request, std::int64_t place) {
    Place& target = find(place);
    if (request.offset < 0 || request.nbytes < 0 || request.nbytes > slot_bytes_ || extent(request) > slot_bytes_) {
        refuse(request.label + ": " + std::to_string(request.nbytes) + " bytes at offset " +
               std::to_string(request.offset) + " do not fit a staging slot of " + std::to_string(slot_bytes_));
    }
    if (extent(request) > target.room) {
        refuse(request.label + ": " + std::to_string(extent(request)) + " bytes do not fit place " +
               std::to_string(place) + " of " + std::to_string(target.room));
    }
    if (request.home >= 0 && (request.home % kAlign || request.home > kept_bytes_ - extent(request))) {
        refuse(request.label + ": " + std::to_string(extent(request)) + " bytes do not fit the host memory of " +
               std::to_string(kept_bytes_) + " at " + std::to_string(request.home));
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
    if (stop_) refuse("the copy engine is closed");
    if (target.state == Place::kComing) refuse("place " + std::to_string(place) + " is being filled already");
    target.state = Place::kComing;
    target.failure = nullptr;
    waiting_.push_back(Job{std::move(request), place, &target});
    submit_reads();  // here too: the thread may be waiting for an earlier read
    work_.notify_one();
}

// A call on the caller's thread, which may see that the device has failed before the engine's own thread does.
template <typename Call>
void CopyEngine::noticing_failure(const Call& call) {
    try {
        call();
    } catch (const DeviceError&) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        throw;
    }
}

void CopyEngine::finish(std::int64_t place, CopyDevice::Stream compute) {
    Place& target = find(place);
    {
        std::unique_lock<std::mutex> lock(mutex_);
        arrived_.wait(lock, [&] { return target.state != Place::kComing || failure_ || stop_; });
        if (failure_) std::rethrow_exception(failure_);
        if (target.state == Place::kComing) refuse("the copy engine is closed");
        if (target.state == Place::kEmpty) refuse("nothing was started at place " + std::to_string(place));
        if (target.state == Place::kFailed) std::rethrow_exception(target.failure);
    }
    if (target.has_copy) noticing_failure([&] { device_->compute_waits(target.copied, compute); });
}

void CopyEngine::released(std::int64_t place, CopyDevice::Stream compute) {
    Place& target = find(place);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (failure_) std::rethrow_exception(failure_);
        if (target.state != Place::kHere) refuse("place " + std::to_string(place) + " holds nothing to release");
        target.has_use = true;
    }
    noticing_failure([&] { device_->record_compute(target.used, compute); });
}

void CopyEngine::run() {
    std::unique_lock<std::mutex> lock(mutex_);
    try {
        device_->begin_thread();
        while (!stop_) {
            reclaim();
            submit_reads();
            if (!reading_.empty()) {
                copy_next(lock);
            } else if (waiting_.empty()) {
                work_.wait(lock);
            } else if (goes_direct(waiting_.front())) {
                read_directly(lock);
            } else {
                await_room(lock);
            }
        }
    } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        failure_ = std::current_exception();
        arrived_.notify_all();
    }
    lock.unlock();
    drain();
}

// Ends what uses the ring's memory, when nothing is started any more.
void CopyEngine::drain() {
    for (const Job& job : reading_) {
        try {
            if (job.ticket) reader_.wait(*job.ticket);
        } catch (const std::exception&) {
            // nobody asks for this page any more
        }
    }
    try {
        device_->record_copies(flights_[0].copied);
        device_->host_waits(flights_[0].copied);
    } catch (const DeviceError&) {
        // a device that has failed copies nothing any more
    }
}

// Notes which flights have ended. Called on the thread with mutex_ held, while no read is between the queues.
void CopyEngine::reclaim() {
    while (freed_ < submitted_ - unread_) {
        Flight& oldest = flight(freed_);
        if (oldest.has_copy && !device_->passed(oldest.copied)) return;
        oldest.has_copy = false;
        ++freed_;
    }
}

// Position of the next flight in the ring, whole, or -1 where there is no room before others end.
std::int64_t CopyEngine::room(std::int64_t nbytes) {
    if (submitted_ == freed_) return head_ = 0;
    if (submitted_ - freed_ == kFlights) return -1;
    const std::int64_t within = head_ % ring_bytes_;
    const std::int64_t begin = within + nbytes > ring_bytes_ ? head_ + ring_bytes_ - within : head_;
    return begin + nbytes - flight(freed_).begin > ring_bytes_ ? -1 : begin;
}

// Starts reads, in order, as far as the ring is known to be free. Called with mutex_ held.
void CopyEngine::submit_reads() {
    while (!waiting_.empty() && !goes_direct(waiting_.front())) {
        const CopyRequest& next = waiting_.front().request;
        const std::int64_t begin = next.home >= 0 ? -1 : room(extent(next));
        if (next.home < 0 && begin < 0) return;
        Job job = std::move(waiting_.front());
        waiting_.pop_front();
        const std::int64_t home = job.request.home;
        try {
            if (home < 0) read_into(job, *staging_, begin % ring_bytes_);
            else if (homes_.insert(home).second) read_into(job, *kept_, home);
        } catch (const std::exception&) {
            homes_.erase(home);
            end(*job.place, std::current_exception());
            continue;
        }
        if (home < 0) {
            head_ = begin + extent(job.request);
            job.number = submitted_++;
            flight(*job.number).begin = begin;
            ++unread_;
        }
        reading_.push_back(std::move(job));
    }
}

void CopyEngine::read_into(Job& job, const Staging& target, std::int64_t at) {
    job.ticket = reader_.submit(job.request.file, job.request.offset, job.request.nbytes, target.arena(), at,
                                job.request.crc, job.request.label);
}

// Waits for the oldest read, if it was not made before, and issues its copy.
void CopyEngine::copy_next(std::unique_lock<std::mutex>& lock) {
    const Job job = std::move(reading_.front());
    reading_.pop_front();
    Place& place = *job.place;
    const CopyRequest& request = job.request;
    Flight* const from = job.number ? &flight(*job.number) : nullptr;
    if (from) --unread_;
    const bool lost = !from && !homes_.count(request.home);
    lock.unlock();

    std::exception_ptr failure;
    try {
        if (job.ticket) reader_.wait(*job.ticket);
        if (lost) throw std::runtime_error(request.label + ": an earlier read of it failed");
    } catch (const std::exception&) {
        failure = std::current_exception();
    }
    if (!failure) {
        const std::int64_t head = request.offset % kAlign;
        const std::uint8_t* source = from ? staging_->arena()->data() + from->begin % ring_bytes_
                                          : kept_->arena()->data() + request.home;
        if (place.has_use) device_->copies_wait(place.used);
        device_->copy(memory_ + job.offset + head, source + head, static_cast<std::size_t>(request.nbytes));
        device_->record_copies(place.copied);
        if (from) device_->record_copies(from->copied);
        bytes_copied_ += request.nbytes;
    }

    lock.lock();
    if (!failure) {
        place.has_copy = true;
        place.has_use = false;
        if (from) from->has_copy = true;
    } else if (!from) {
        homes_.erase(request.home);
    }
    end(place, failure);
}

// Waits for the oldest copy, when the ring holds nothing else.
void CopyEngine::await_room(std::unique_lock<std::mutex>& lock) {
    const CopyDevice::Event copied = flight(freed_).copied;
    lock.unlock();
    device_->host_waits(copied);
    lock.lock();
}

// Such reads are no part of any stream: the host waits for what touched the place before.
void CopyEngine::read_directly(std::unique_lock<std::mutex>& lock) {
    const Job job = std::move(waiting_.front());
    waiting_.pop_front();
    Place& place = *job.place;
    lock.unlock();

    if (place.has_copy) device_->host_waits(place.copied);
    if (place.has_use) device_->host_waits(place.used);
    std::exception_ptr failure;
    try {
        direct_->read(job.request.file, job.request.offset, job.request.nbytes, job.offset, job.request.label);
        bytes_direct_ += job.request.nbytes;
    } catch (const std::exception&) {
        failure = std::current_exception();
    }

    lock.lock();
    place.has_copy = place.has_use = false;
    end(place, failure);
}

// Called with mutex_ held.
void CopyEngine::end(Place& place, std::exception_ptr failure) {
    place.state = failure ? Place::kFailed : Place::kHere;
    place.failure = std::move(failure);
    arrived_.notify_all();
}

double CopyEngine::copy_seconds(CopyDevice& device, std::uint8_t* target, std::int64_t nbytes, int slots, int copies) {
    const Staging staging(device, static_cast<std::size_t>(ring_size(nbytes, slots)));
    const OwnedEvent copied(device);
    const auto run = [&](int count) {
        for (int i = 0; i < count; ++i) {
            device.copy(target, staging.arena()->data() + i % slots * nbytes, static_cast<std::size_t>(nbytes));
        }
        device.record_copies(copied);
        device.host_waits(copied);
    };
    run(slots);
    const auto started = std::chrono::steady_clock::now();
    run(copies);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

}  // namespace thl
