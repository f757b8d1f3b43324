// Drives the reader from several threads at random, for the thread and address sanitizers: a file, and a seed.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "io/crc32c.h"
#include "io/reader.h"

namespace {

constexpr std::int64_t kRoom = 1 << 16;
constexpr int kPlaces = 4;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// One thread's reads: right ones, of a wrong checksum, beyond the end; waited for, or left. False once it is closed.
bool reads(thl::Reader& reader, const std::vector<std::uint8_t>& content, std::mt19937_64& random) {
    const auto arena = std::make_shared<thl::Arena>(kPlaces * kRoom);
    const auto size = std::int64_t(content.size());
    try {
        for (int turn = 0; turn < 40; ++turn) {
            struct Read {
                std::uint64_t ticket;
                std::int64_t offset, nbytes, place;
                bool good;
            };
            std::vector<Read> coming;
            for (int i = 0; i < kPlaces; ++i) {
                const auto offset = std::int64_t(random() % content.size());
                auto nbytes = std::min(std::int64_t(random() % (kRoom - 4096)), size - offset);
                const std::uint32_t sum = thl::crc32c(0, content.data() + offset, std::size_t(nbytes));
                std::optional<std::uint32_t> crc;
                bool good = true;
                switch (random() % 4) {
                    case 0: break;
                    case 1: crc = sum; break;
                    case 2: crc = ~sum; good = nbytes == 0 && sum == ~sum; break;
                    default:
                        if (size - offset < kRoom - 4096) nbytes = kRoom - 4096, good = offset + nbytes <= size;
                }
                coming.push_back({reader.submit(0, offset, nbytes, arena, i * kRoom, crc, "page"), offset, nbytes,
                                  i * kRoom, good});
            }
            for (const Read& read : coming) {
                if (random() % 16 == 0 && turn == 39) continue;  // nobody waits for it
                if (random() % 2) reader.done(read.ticket);
                bool good = true;
                try {
                    reader.wait(read.ticket);
                } catch (const thl::ReadError&) {
                    good = false;
                }
                expect(good == read.good, "a read fails where it must");
                const std::uint8_t* data = arena->data() + read.place + read.offset % 4096;
                if (good) {
                    expect(!std::memcmp(data, content.data() + read.offset, std::size_t(read.nbytes)), "its bytes");
                }
            }
            std::uint8_t row[100];
            const auto offset = std::int64_t(random() % (content.size() - sizeof row));
            reader.read_now(0, offset, sizeof row, row);
            expect(!std::memcmp(row, content.data() + offset, sizeof row), "a row's bytes");
        }
    } catch (const std::invalid_argument&) {
        return false;
    }
    return true;
}

void live(const std::string& path, const std::vector<std::uint8_t>& content, std::uint64_t seed, bool closed) {
    std::mt19937_64 random(seed);
    thl::Reader reader({path}, 1 + int(random() % 4), random() % 2, 4096 << random() % 3);
    std::vector<std::thread> threads;
    for (std::uint64_t i = 0; i < 3; ++i) {
        threads.emplace_back([&, i] {
            std::mt19937_64 own(seed * 10 + i);
            expect(reads(reader, content, own) || closed, "no read is refused before the end");
        });
    }
    if (closed) {  // in the middle of its work, by two at once
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 20000));
        threads.emplace_back([&] { reader.close(); });
        reader.close();
    }
    for (auto& thread : threads) thread.join();
    expect(reader.direct().size() == 1 && reader.bytes_read() >= 0, "it tells of itself");
}

}  // namespace

int main(int, char** arguments) {
    const std::string path = arguments[1];
    std::ifstream file(path, std::ios::binary);
    const std::vector<std::uint8_t> content((std::istreambuf_iterator<char>(file)), {});
    const std::uint64_t seed = std::strtoull(arguments[2], nullptr, 10);
    for (std::uint64_t i = 0; i < 8; ++i) live(path, content, seed + i, i % 2);
    std::puts("ok");
}
