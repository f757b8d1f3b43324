#include "cpu/thread_pool.h"

#include <pthread.h>

#include <chrono>
#include <stdexcept>
#include <string>

namespace thl {
namespace {

// How long a waiting thread spins before it sleeps in the kernel. Waking a sleeper costs 5 to 50 us in a virtual
// machine; the pauses between the calls of a decode step are a few us, up to 100 where one thread suffices for some
// calls in a row, so spinning bridges them.
constexpr std::chrono::microseconds kSpin{200};

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns as soon as `value` differs from `old`.
template <typename T>
void wait_for_change(std::atomic<T>& value, T old) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
        // Where other programs keep the processors busy, the thread waited for may be queued behind this one.
        std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < deadline);
    value.wait(old, std::memory_order_acquire);
}

ThreadPool* pool = nullptr;
std::mutex* pool_mutex = new std::mutex;

// The child of a fork has none of the workers and may hold a copied lock: leave both behind.
void forget_pool() {
    pool = nullptr;
    pool_mutex = new std::mutex;
}

}  // namespace

ThreadPool& ThreadPool::instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
    std::lock_guard<std::mutex> lock(*pool_mutex);
    // Never destroyed: a worker may still be running while the process exits.
    if (!pool) pool = new ThreadPool;
    return *pool;
}

ThreadPool::ThreadPool() : threads_(static_cast<int>(std::thread::hardware_concurrency())) {
    if (threads_ < 1) threads_ = 1;
}

void ThreadPool::set_threads(int count) {
    if (count < 1 || count > 1024)
        throw std::invalid_argument("threads: expected 1 to 1024, found " + std::to_string(count));
    std::lock_guard<std::mutex> lock(mutex_);
    stop_workers();
    threads_ = count;
}

void ThreadPool::stop_workers() {
    stopping_ = true;
    for (auto& worker : workers_) {
        worker->started.fetch_add(1, std::memory_order_release);
        worker->started.notify_one();
        worker->thread.join();
    }
    workers_.clear();
    stopping_ = false;
}

void ThreadPool::Job::run_part(int part) const {
    const int64_t first = grains * part / parts * grain;
    const int64_t last = grains * (part + 1) / parts * grain;
    call(context, first, last < count ? last : count);
}

void ThreadPool::run(const Job& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int>(workers_.size()) < job.parts - 1) {
        workers_.push_back(std::make_unique<Worker>());
        Worker& worker = *workers_.back();
        const int part = static_cast<int>(workers_.size());
        worker.thread = std::thread([this, &worker, part] { work(worker, part); });
    }
    job_ = job;
    pending_.store(job.parts - 1, std::memory_order_relaxed);
    for (int i = 0; i < job.parts - 1; ++i) {
        workers_[i]->started.fetch_add(1, std::memory_order_release);
        workers_[i]->started.notify_one();
    }
    job.run_part(0);
    for (int left; (left = pending_.load(std::memory_order_acquire)) != 0;) wait_for_change(pending_, left);
}

void ThreadPool::work(Worker& worker, int part) {
    for (uint32_t seen = 0;; ++seen) {
        wait_for_change(worker.started, seen);
        if (stopping_.load(std::memory_order_acquire)) return;
        job_.run_part(part);
        if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
}

}  // namespace thl
