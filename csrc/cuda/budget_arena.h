// Division of one block of memory among allocations, by addresses alone: the memory itself is never touched, so that
// it may lie on a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace thl {

constexpr std::size_t kBudgetAlignment = 512;  // of allocations, as cudaMalloc and torch's allocator align

// Best fit over [base, base + size), neighbouring gaps joined at once: every call takes O(log n) of n gaps, or less.
// Thread-safe.
class BudgetArena {
public:
    // Throws std::invalid_argument where no aligned byte lies within.
    BudgetArena(std::uintptr_t base, std::size_t size);

    // Address of `nbytes`, rounded up to the alignment, or 0 where no gap is as large.
    std::uintptr_t allocate(std::size_t nbytes);

    // Ends an allocation. False where the address is that of none.
    bool release(std::uintptr_t address);

    struct Counts {
        std::size_t size, in_use, peak;  // bytes, after rounding
        std::size_t largest_gap;         // bytes that one allocation could still have
        std::size_t allocations;         // alive
        std::size_t refusals;            // allocations that found no gap
        std::size_t last_refused;        // bytes that the last of those asked for
    };
    Counts counts() const;

private:
    void add_gap(std::uintptr_t address, std::size_t nbytes);
    void remove_gap(std::map<std::uintptr_t, std::size_t>::iterator gap);

    mutable std::mutex mutex_;
    std::size_t size_;
    std::size_t in_use_ = 0, peak_ = 0, refusals_ = 0, last_refused_ = 0;
    std::map<std::uintptr_t, std::size_t> gaps_;               // address -> bytes
    std::set<std::pair<std::size_t, std::uintptr_t>> by_size_;  // the same gaps
    std::unordered_map<std::uintptr_t, std::size_t> taken_;
};

// The arenas of a process. An allocation takes from the arena that its thread has entered last; a release finds the
// arena by address. An arena that was closed gives its memory back when its last allocation is released, which may be
// long after: whoever holds a tensor may go on using it. Thread-safe.
class BudgetArenas {
public:
    using GiveBack = std::function<void(std::uintptr_t base)>;

    // A new arena over memory of a device, which `give_back` returns in the end. Its number, never used again.
    std::int64_t open(int device, std::uintptr_t base, std::size_t size, GiveBack give_back);
    void close(std::int64_t number);

    // What this thread allocates until `leave` comes from the arena. Nests. Throws std::invalid_argument of an arena
    // that was closed, std::logic_error of a `leave` without an `enter`.
    void enter(std::int64_t number);
    static void leave();

    // 0 where the thread has entered no arena, or one of another device, or where there is no room.
    std::uintptr_t allocate(std::size_t nbytes, int device);
    // False where the address belongs to no arena.
    bool release(std::uintptr_t address);

    // Throws std::invalid_argument of an arena that does not exist any more.
    BudgetArena::Counts counts(std::int64_t number) const;

private:
    struct Entry {
        Entry(int device, std::uintptr_t base, std::size_t size, GiveBack give_back)
            : arena(base, size), device(device), base(base), size(size), give_back(std::move(give_back)) {}
        BudgetArena arena;
        int device;
        std::uintptr_t base;
        std::size_t size;
        GiveBack give_back;
        bool closed = false;
    };
    Entry& find(std::int64_t number) const;

    mutable std::mutex mutex_;
    std::int64_t next_ = 1;
    std::map<std::int64_t, std::unique_ptr<Entry>> entries_;
    std::map<std::uintptr_t, std::int64_t> by_base_;
};

}  // namespace thl
