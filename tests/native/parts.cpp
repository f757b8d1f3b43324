// Parts of csrc/ that no extension shows by themselves, and the host's copy device, for ctypes; native_parts.py wraps
// them. What can fail returns 0, or what failed, whose message `part_error` gives.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/budget_arena.h"
#include "host_copy_device.h"
#include "io/crc32c.h"

#define SHOWN extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string message;

enum Failure { kNone, kArgument, kDevice, kOther };

template <typename Body>
int guarded(const Body& body) {
    try {
        body();
        return kNone;
    } catch (const std::invalid_argument& error) {
        message = error.what();
        return kArgument;
    } catch (const thl::DeviceError& error) {
        message = error.what();
        return kDevice;
    } catch (const std::exception& error) {
        message = error.what();
        return kOther;
    }
}

void copy_counts(const thl::BudgetArena::Counts& counts, std::size_t* out) {
    for (const std::size_t count : {counts.size, counts.in_use, counts.peak, counts.largest_gap, counts.allocations,
                                    counts.refusals, counts.last_refused})
        *out++ = count;
}

// The device as itself and as what a capsule of thl_engine._native holds.
struct Held {
    std::shared_ptr<thl::HostCopyDevice> device;
    std::shared_ptr<thl::CopyDevice> shared = device;
};

}  // namespace

SHOWN const char* part_error() { return message.c_str(); }

SHOWN std::uint32_t part_crc32c_portable(std::uint32_t crc, const void* data, std::size_t nbytes) {
    return thl::crc32c_portable(crc, data, nbytes);
}

SHOWN int arena_make(std::uintptr_t base, std::size_t size, thl::BudgetArena** made) {
    return guarded([&] { *made = new thl::BudgetArena(base, size); });
}
SHOWN void arena_free(thl::BudgetArena* arena) { delete arena; }
SHOWN std::uintptr_t arena_allocate(thl::BudgetArena* arena, std::size_t nbytes) { return arena->allocate(nbytes); }
SHOWN bool arena_release(thl::BudgetArena* arena, std::uintptr_t address) { return arena->release(address); }
SHOWN void arena_counts(thl::BudgetArena* arena, std::size_t* out) { copy_counts(arena->counts(), out); }

SHOWN thl::BudgetArenas* arenas_make() { return new thl::BudgetArenas; }
SHOWN void arenas_free(thl::BudgetArenas* arenas) { delete arenas; }
SHOWN int arenas_open(thl::BudgetArenas* arenas, int device, std::uintptr_t base, std::size_t size,
                      void (*give_back)(std::uintptr_t), std::int64_t* number) {
    return guarded([&] { *number = arenas->open(device, base, size, give_back); });
}
SHOWN int arenas_close(thl::BudgetArenas* arenas, std::int64_t number) {
    return guarded([&] { arenas->close(number); });
}
SHOWN int arenas_enter(thl::BudgetArenas* arenas, std::int64_t number) {
    return guarded([&] { arenas->enter(number); });
}
SHOWN int arenas_leave() { return guarded([] { thl::BudgetArenas::leave(); }); }
SHOWN std::uintptr_t arenas_allocate(thl::BudgetArenas* arenas, std::size_t nbytes, int device) {
    return arenas->allocate(nbytes, device);
}
SHOWN bool arenas_release(thl::BudgetArenas* arenas, std::uintptr_t address) { return arenas->release(address); }
SHOWN int arenas_counts(thl::BudgetArenas* arenas, std::int64_t number, std::size_t* out) {
    return guarded([&] { copy_counts(arenas->counts(number), out); });
}

SHOWN Held* host_make(std::uint64_t seed, int delay) {
    return new Held{std::make_shared<thl::HostCopyDevice>(seed, delay)};
}
SHOWN void host_free(Held* held) { delete held; }
SHOWN void* host_shared(Held* held) { return &held->shared; }
SHOWN void* host_device(Held* held) { return held->shared.get(); }
SHOWN std::uint64_t host_compute() { return thl::HostCopyDevice::kCompute; }
SHOWN int host_use(Held* held, const std::uint8_t* memory, std::size_t nbytes) {
    return guarded([&] { held->device->use(memory, nbytes); });
}
// Waits for all compute; how many sums there are, which `host_take_sums` then copies.
SHOWN std::vector<std::uint32_t>* host_sums(Held* held, std::size_t* count) {
    auto* sums = new std::vector<std::uint32_t>(held->device->sums());
    *count = sums->size();
    return sums;
}
SHOWN void host_take_sums(std::vector<std::uint32_t>* sums, std::uint32_t* out) {
    std::copy(sums->begin(), sums->end(), out);
    delete sums;
}
// One a line.
SHOWN const char* host_violations(Held* held) {
    message.clear();
    for (const std::string& violation : held->device->violations()) message += violation + "\n";
    return message.c_str();
}
SHOWN void host_fail_at(Held* held, std::int64_t copy) { held->device->fail_at(copy); }
SHOWN void host_refuse_locks(Held* held) { held->device->refuse_locks(); }
SHOWN std::size_t host_locked(Held* held) { return held->device->locked(); }
SHOWN std::int64_t host_events(Held* held) { return held->device->events(); }
