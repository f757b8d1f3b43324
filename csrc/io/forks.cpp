#include "io/forks.h"

#include <pthread.h>

#include <atomic>

namespace thl {
namespace {

std::atomic<unsigned> count{0};

void forked() { count.fetch_add(1, std::memory_order_relaxed); }

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forked);

}  // namespace

unsigned forks() { return count.load(std::memory_order_relaxed); }

}  // namespace thl
