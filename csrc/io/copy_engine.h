// Brings pages from files through a page-locked staging ring to a device's memory, on a thread of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "io/arena.h"
#include "io/copy_device.h"
#include "io/forks.h"
#include "io/gds.h"
#include "io/reader.h"

namespace thl {

// File bytes [offset, offset + nbytes), with the checksum to verify, if any, and a name for errors. home: where in the
// engine's host memory the page is kept, or -1; it is read from the file once.
struct CopyRequest {
    std::int64_t file = 0, offset = 0, nbytes = 0;
    std::optional<std::uint32_t> crc;
    std::string label;
    std::int64_t home = -1;
};

// Places are divisions of the device's memory, named by their offset in it, that hold a page each. `start` begins to
// fill one, `finish` lets compute issued from then on read it, `released` says that the compute that reads it has been
// issued; a later `start` may fill it again. All three belong to one thread and never wait for the device: waits
// between the streams are events. Copies are issued in the order of `start`, each as soon as its read is complete.
class CopyEngine {
public:
    // memory: nbytes on the device, whose earlier use is on `compute`. places: multiples of 4096, each up to the next
    // one. The ring holds `slots` pages of slot_bytes, the longest, or up to kFlights shorter ones. kept_bytes: host
    // memory for pages with a home. direct, if any, serves requests without checksum and home.
    // Throws std::invalid_argument, DeviceError where memory cannot be page-locked, ArenaError where there is none.
    CopyEngine(Reader& reader, std::shared_ptr<CopyDevice> device, std::uint8_t* memory, std::int64_t nbytes,
               const std::vector<std::int64_t>& places, std::int64_t slot_bytes, int slots,
               CopyDevice::Stream compute, std::unique_ptr<DirectStorage> direct, std::int64_t kept_bytes = 0);
    ~CopyEngine();
    CopyEngine(const CopyEngine&) = delete;
    CopyEngine& operator=(const CopyEngine&) = delete;

    static constexpr std::uint64_t kFlights = 32;  // pages between disk and device at a time

    // Throws std::invalid_argument for a place that is unknown or being filled, and for a page that does not fit.
    void start(CopyRequest request, std::int64_t place);
    // Blocks until the copy has been issued. Throws ReadError where the read failed, std::invalid_argument where
    // nothing was started or the engine is closed.
    void finish(std::int64_t place, CopyDevice::Stream compute);
    void released(std::int64_t place, CopyDevice::Stream compute);

    // Drops what waits, ends what is being read and copied, gives the staging ring back. What is in its place stays.
    void close();

    // In the child of a fork, where there is no device either: as with a reader.
    bool inherited() const { return origin_.inherited(); }
    void abandon() {}

    // Seconds that `copies` copies of nbytes take from a page-locked ring of `slots` to `target`, which holds nbytes on
    // the device, issued as an engine issues them: the ceiling for what it does.
    static double copy_seconds(CopyDevice& device, std::uint8_t* target, std::int64_t nbytes, int slots, int copies);

    std::int64_t bytes_copied() const { return bytes_copied_.load(); }  // over the link
    std::int64_t bytes_direct() const { return bytes_direct_.load(); }  // past the host's memory

private:
    class OwnedEvent {
    public:
        explicit OwnedEvent(CopyDevice& device) : device_(&device), event_(device.make_event()) {}
        OwnedEvent(OwnedEvent&& other) noexcept : device_(other.device_), event_(other.event_) {
            other.event_ = nullptr;
        }
        OwnedEvent& operator=(OwnedEvent&&) = delete;
        ~OwnedEvent() {
            if (event_) device_->free_event(event_);
        }
        operator CopyDevice::Event() const { return event_; }

    private:
        CopyDevice* device_;
        CopyDevice::Event event_;
    };

    // Page-locked memory. Reads that are still in flight keep the arena itself alive.
    class Staging {
    public:
        Staging(CopyDevice& device, std::size_t nbytes);
        ~Staging() { device_.unlock(arena_->data()); }
        const std::shared_ptr<Arena>& arena() const { return arena_; }

    private:
        CopyDevice& device_;
        std::shared_ptr<Arena> arena_;
    };

    struct Place {
        Place(CopyDevice& device, std::int64_t size) : room(size), copied(device), used(device) {}
        const std::int64_t room;
        enum State { kEmpty, kComing, kHere, kFailed } state = kEmpty;
        const OwnedEvent copied, used;  // after the last copy, after the compute's last use
        bool has_copy = false, has_use = false;
        std::exception_ptr failure;
    };

    // A part of the ring from its read to the end of its copy. Positions grow; the ring holds them modulo its size.
    struct Flight {
        OwnedEvent copied;
        bool has_copy = false;  // that may not have ended
        std::int64_t begin = 0;
    };

    struct Job {
        CopyRequest request;
        std::int64_t offset = 0;  // of the place
        Place* place = nullptr;
        std::optional<std::uint64_t> ticket;  // of its read; none where the page is at home already
        std::optional<std::uint64_t> number;  // of its flight; none where it has a home
    };

    template <typename Call>
    void noticing_failure(const Call& call);
    void run();
    void drain();
    void reclaim();
    void submit_reads();
    void read_into(Job& job, const Staging& target, std::int64_t at);
    void copy_next(std::unique_lock<std::mutex>& lock);
    void await_room(std::unique_lock<std::mutex>& lock);
    void read_directly(std::unique_lock<std::mutex>& lock);
    void end(Place& place, std::exception_ptr failure);
    bool goes_direct(const Job& job) const { return direct_ && !job.request.crc && job.request.home < 0; }
    std::int64_t room(std::int64_t nbytes);
    Flight& flight(std::uint64_t number) { return flights_[number % kFlights]; }
    Place& find(std::int64_t place);

    const Origin origin_;
    Reader& reader_;
    const std::shared_ptr<CopyDevice> device_;
    std::uint8_t* const memory_;
    const std::int64_t slot_bytes_, ring_bytes_, kept_bytes_;
    std::unique_ptr<DirectStorage> direct_;
    std::unique_ptr<Staging> staging_, kept_;
    std::map<std::int64_t, Place> places_;
    std::vector<Flight> flights_;
    std::atomic<std::int64_t> bytes_copied_{0}, bytes_direct_{0};

    std::mutex mutex_;  // guards everything below, and the state of places and flights
    std::condition_variable work_, arrived_;
    std::deque<Job> waiting_, reading_;
    std::set<std::int64_t> homes_;  // that a read was submitted to: what is copied from them later comes behind it
    std::uint64_t submitted_ = 0, freed_ = 0;  // flights so far; they begin and end in order
    std::uint64_t unread_ = 0;                 // of these in `reading_`
    std::int64_t head_ = 0;                    // of the ring, behind the last flight
    std::exception_ptr failure_;  // of the device: nothing works any more
    bool stop_ = false;

    std::mutex close_mutex_;
    std::thread thread_;
};

}  // namespace thl
