// A block's threads as fibers: each runs until a barrier; which one goes on is drawn at random.
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

extern "C" {
__attribute__((weak)) extern char __start_shared_memory;
__attribute__((weak)) extern char __stop_shared_memory;
}

namespace host {

dim3 thread_index, block_index;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    State state = State::ready;
    dim3 index;
    float sent = 0;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
int current;
const std::function<void()>* body;
std::mt19937 random_order(0);

void wait(State barrier) {
    Fiber& fiber = fibers[current];
    fiber.state = barrier;
    swapcontext(&fiber.context, &scheduler);
}

void enter() {
    (*body)();
    fibers[current].state = State::done;
}

// Threads that have ended count as having arrived at the block's barrier, not at a warp's.
bool release(State barrier, int first, int last) {
    bool waiting = false;
    for (int i = first; i < last; ++i) {
        const bool ended = fibers[i].state == State::done && barrier == State::at_block_barrier;
        if (fibers[i].state != barrier && !ended) return false;
        waiting |= fibers[i].state == barrier;
    }
    for (int i = first; i < last; ++i)
        if (fibers[i].state == barrier) fibers[i].state = State::ready;
    return waiting;
}

void run_block(dim3 block, int threads) {
    if (&__start_shared_memory)
        std::memset(&__start_shared_memory, 0xFF, &__stop_shared_memory - &__start_shared_memory);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.state = State::ready;
        fiber.index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<int> ready;
    const int warps = threads / kLanes;
    int warp = 0;
    for (;;) {
        // One warp runs on for a while, so that it gets far ahead of others that nothing makes it wait for.
        if (random_order() % 8 == 0) warp = random_order() % warps;
        ready.clear();
        for (int tried = 0; tried < warps && ready.empty(); ++tried) {
            if (tried > 0) warp = (warp + 1) % warps;
            for (int i = warp * kLanes; i < (warp + 1) * kLanes; ++i)
                if (fibers[i].state == State::ready) ready.push_back(i);
        }
        std::shuffle(ready.begin(), ready.end(), random_order);
        for (int i : ready) {
            current = i;
            thread_index = fibers[i].index;
            swapcontext(&scheduler, &fibers[i].context);
        }
        const auto ended = [](const Fiber& fiber) { return fiber.state == State::done; };
        if (std::all_of(fibers.begin(), fibers.begin() + threads, ended)) return;
        bool moved = false;
        for (int first = 0; first < threads; first += kLanes)
            moved |= release(State::at_warp_barrier, first, std::min(first + kLanes, threads));
        if (!moved && ready.empty() && !release(State::at_block_barrier, 0, threads))
            throw std::logic_error("threads of a block wait at different barriers");
    }
}

}  // namespace

void block_barrier() { wait(State::at_block_barrier); }

float exchange(float value, int lane_mask) {
    const int self = current;
    fibers[self].sent = value;
    wait(State::at_warp_barrier);
    const float received = fibers[self ^ lane_mask].sent;
    wait(State::at_warp_barrier);  // nobody may send again before all have read
    return received;
}

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    const int threads = static_cast<int>(block.x * block.y * block.z);
    if (threads % kLanes) throw std::logic_error("a block of whole warps is expected");
    if (fibers.size() < static_cast<size_t>(threads)) fibers = std::vector<Fiber>(threads);
    body = &kernel;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = dim3(x, y, z);
                run_block(block, threads);
            }
}

}  // namespace host
