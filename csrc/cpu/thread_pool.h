// The threads that share one kernel call: a contiguous share of the rows each.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace thl {

class ThreadPool {
public:
    // The process's pool. After fork() the child gets a new one: threads do not survive a fork.
    static ThreadPool& instance();

    int threads() const { return threads_.load(std::memory_order_relaxed); }

    // Throws std::invalid_argument unless 1 <= count <= 1024. Threads start with the first call that needs them.
    void set_threads(int count);

    // Runs body(begin, end) over [0, count), cut into at most threads() contiguous parts of at least `grain`
    // items (boundaries are multiples of `grain`). The calling thread takes the first part. `body` must not throw.
    template <typename Body>
    void parallel_for(int64_t count, int64_t grain, const Body& body) {
        if (count <= 0) return;
        if (grain < 1) grain = 1;
        const int64_t grains = (count + grain - 1) / grain;
        const int parts = static_cast<int>(grains < threads() ? grains : threads());
        if (parts <= 1) {
            body(int64_t{0}, count);
            return;
        }
        const Job job{
            [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
            &body, count, grain, grains, parts};
        run(job);
    }

private:
    struct Job {
        void (*call)(const void* context, int64_t begin, int64_t end);
        const void* context;
        int64_t count, grain, grains;
        int parts;
        void run_part(int part) const;
    };
    // One cache line each, so that starting one worker does not disturb the others.
    struct alignas(64) Worker {
        std::atomic<uint32_t> started{0};  // jobs handed to this worker so far
        std::thread thread;
    };

    ThreadPool();
    void run(const Job& job);
    void work(Worker& worker, int part);
    void stop_workers();

    std::atomic<int> threads_;
    std::mutex mutex_;  // one parallel call at a time
    std::vector<std::unique_ptr<Worker>> workers_;
    Job job_{};
    alignas(64) std::atomic<int> pending_{0};  // workers that have not finished the current job
    std::atomic<bool> stopping_{false};
};

}  // namespace thl
