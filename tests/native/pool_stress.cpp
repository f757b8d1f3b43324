// Drives the thread pool from several threads at random, for the thread and address sanitizers: a seed.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/linear.h"
#include "cpu/thread_pool.h"

namespace {

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// Every item once, each part its own.
void counts(std::mt19937_64& random) {
    std::vector<int> done(random() % 3000);
    const auto grain = std::int64_t(random() % 70);
    thl::ThreadPool::instance().parallel_for(std::int64_t(done.size()), grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) ++done[std::size_t(i)];
    });
    for (int count : done) expect(count == 1, "every item is done once");
}

// A product of int8 weights, whose bits depend neither on threads nor on instruction sets.
struct Product {
    std::int64_t rows, columns, batch;
    std::vector<std::int8_t> w;
    std::vector<float> scales, x;

    explicit Product(std::mt19937_64& random)
        : rows(1 + std::int64_t(random() % 300)), columns(1 + std::int64_t(random() % 400)),
          batch(1 + std::int64_t(random() % 9)), w(std::size_t(rows * columns)), scales(std::size_t(rows)),
          x(std::size_t(batch * columns)) {
        for (auto& value : w) value = std::int8_t(random() % 255 - 127);
        for (auto& value : scales) value = float(random() % 1000 + 1) / 1000;
        for (auto& value : x) value = float(std::int64_t(random() % 2001) - 1000) / 500;
    }

    std::vector<float> computed() const {
        thl::PackedActivations packed;
        thl::pack_activations(x.data(), columns, batch, columns, {}, packed);
        std::vector<float> out(std::size_t(batch * rows));
        thl::linear_int8({&packed, w.data(), columns, scales.data(), 1, false, nullptr, out.data(), rows}, rows, {});
        return out;
    }
};

}  // namespace

int main(int, char** arguments) {
    const std::uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
    std::mt19937_64 random(seed);
    const Product product(random);
    thl::ThreadPool::instance().set_threads(1);
    const std::vector<float> wanted = product.computed();

    std::atomic<bool> over{false};
    std::thread changing([&] {  // as users may, at any time
        std::mt19937_64 own(seed + 100);
        const auto isas = thl::available_isas();
        while (!over) {
            thl::ThreadPool::instance().set_threads(1 + int(own() % 6));
            thl::set_isa(isas[own() % isas.size()]);
            std::this_thread::sleep_for(std::chrono::microseconds(own() % 500));
        }
    });
    std::vector<std::thread> callers;
    for (std::uint64_t i = 0; i < 4; ++i) {
        callers.emplace_back([&, i] {
            std::mt19937_64 own(seed + i);
            for (int turn = 0; turn < 150; ++turn) {
                if (own() % 4) {
                    counts(own);
                } else {
                    const std::vector<float> found = product.computed();
                    expect(!std::memcmp(found.data(), wanted.data(), found.size() * sizeof(float)), "same bits");
                }
            }
        });
    }
    for (auto& caller : callers) caller.join();
    over = true;
    changing.join();
    thl::ThreadPool::instance().set_threads(1);  // ends the workers
    std::puts("ok");
}
