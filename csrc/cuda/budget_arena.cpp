#include "cuda/budget_arena.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace thl {
namespace {

thread_local std::vector<std::int64_t> entered;  // arenas that this thread is in, the last one counts

std::uintptr_t round_up(std::uintptr_t value) {
    return (value + kBudgetAlignment - 1) / kBudgetAlignment * kBudgetAlignment;
}

}  // namespace

BudgetArena::BudgetArena(std::uintptr_t base, std::size_t size) {
    const std::uintptr_t begin = round_up(base);
    const std::uintptr_t end = (base + size) / kBudgetAlignment * kBudgetAlignment;
    if (base + size < base || begin < base || end <= begin)
        throw std::invalid_argument("no " + std::to_string(kBudgetAlignment) + " aligned bytes in an arena of " +
                                    std::to_string(size) + " bytes");
    size_ = end - begin;
    add_gap(begin, size_);
}

void BudgetArena::add_gap(std::uintptr_t address, std::size_t nbytes) {
    gaps_.emplace(address, nbytes);
    by_size_.emplace(nbytes, address);
}

void BudgetArena::remove_gap(std::map<std::uintptr_t, std::size_t>::iterator gap) {
    by_size_.erase({gap->second, gap->first});
    gaps_.erase(gap);
}

std::uintptr_t BudgetArena::allocate(std::size_t nbytes) {
    const std::lock_guard lock(mutex_);
    const std::size_t wanted = nbytes > size_ ? nbytes : round_up(std::max<std::size_t>(nbytes, 1));
    const auto best = wanted > size_ ? by_size_.end() : by_size_.lower_bound({wanted, 0});
    if (best == by_size_.end()) {
        ++refusals_;
        last_refused_ = nbytes;
        return 0;
    }
    const auto [gap, address] = *best;
    remove_gap(gaps_.find(address));
    if (gap > wanted) add_gap(address + wanted, gap - wanted);
    taken_.emplace(address, wanted);
    in_use_ += wanted;
    peak_ = std::max(peak_, in_use_);
    return address;
}

bool BudgetArena::release(std::uintptr_t address) {
    const std::lock_guard lock(mutex_);
    const auto taken = taken_.find(address);
    if (taken == taken_.end()) return false;
    std::size_t nbytes = taken->second;
    taken_.erase(taken);
    in_use_ -= nbytes;
    auto after = gaps_.lower_bound(address);
    if (after != gaps_.begin()) {
        const auto before = std::prev(after);
        if (before->first + before->second == address) {
            address = before->first;
            nbytes += before->second;
            remove_gap(before);
        }
    }
    if (after != gaps_.end() && after->first == address + nbytes) {
        nbytes += after->second;
        remove_gap(after);
    }
    add_gap(address, nbytes);
    return true;
}

BudgetArena::Counts BudgetArena::counts() const {
    const std::lock_guard lock(mutex_);
    return {size_, in_use_, peak_, by_size_.empty() ? 0 : by_size_.rbegin()->first,
            taken_.size(), refusals_, last_refused_};
}

std::int64_t BudgetArenas::open(int device, std::uintptr_t base, std::size_t size, GiveBack give_back) {
    auto entry = std::make_unique<Entry>(device, base, size, std::move(give_back));
    const std::lock_guard lock(mutex_);
    const std::int64_t number = next_++;
    by_base_.emplace(base, number);
    entries_.emplace(number, std::move(entry));
    return number;
}

BudgetArenas::Entry& BudgetArenas::find(std::int64_t number) const {
    const auto found = entries_.find(number);
    if (found == entries_.end()) throw std::invalid_argument("arena " + std::to_string(number) + " does not exist");
    return *found->second;
}

void BudgetArenas::close(std::int64_t number) {
    std::unique_ptr<Entry> gone;  // given back without the lock: that may wait for the device
    {
        const std::lock_guard lock(mutex_);
        Entry& entry = find(number);
        entry.closed = true;
        if (entry.arena.counts().allocations == 0) {
            gone = std::move(entries_.at(number));
            by_base_.erase(gone->base);
            entries_.erase(number);
        }
    }
    if (gone) gone->give_back(gone->base);
}

void BudgetArenas::enter(std::int64_t number) {
    const std::lock_guard lock(mutex_);
    if (find(number).closed) throw std::invalid_argument("arena " + std::to_string(number) + " is closed");
    entered.push_back(number);
}

void BudgetArenas::leave() {
    if (entered.empty()) throw std::logic_error("this thread has entered no arena");
    entered.pop_back();
}

std::uintptr_t BudgetArenas::allocate(std::size_t nbytes, int device) {
    if (entered.empty()) return 0;
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(entered.back());
    if (found == entries_.end() || found->second->closed || found->second->device != device) return 0;
    return found->second->arena.allocate(nbytes);
}

bool BudgetArenas::release(std::uintptr_t address) {
    std::unique_ptr<Entry> gone;
    {
        const std::lock_guard lock(mutex_);
        auto at = by_base_.upper_bound(address);
        if (at == by_base_.begin()) return false;
        --at;
        Entry& entry = *entries_.at(at->second);
        if (!entry.arena.release(address)) return false;
        if (entry.closed && entry.arena.counts().allocations == 0) {
            gone = std::move(entries_.at(at->second));
            entries_.erase(at->second);
            by_base_.erase(at);
        }
    }
    if (gone) gone->give_back(gone->base);
    return true;
}

BudgetArena::Counts BudgetArenas::counts(std::int64_t number) const {
    const std::lock_guard lock(mutex_);
    return find(number).arena.counts();
}

}  // namespace thl
