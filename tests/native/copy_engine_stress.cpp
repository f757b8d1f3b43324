// Drives the copy engine over the host device at random, for the thread and address sanitizers: a file, and a seed.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <set>

#include "io/copy_engine.h"
#include "io/crc32c.h"
#include "host_copy_device.h"

namespace {

constexpr std::int64_t kSlot = 16384;
constexpr int kPlaces = 5;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

struct Page {
    std::int64_t offset, nbytes;
    std::uint32_t crc;
};

// One engine's life; ended in the middle of its work, or by a failing device, where `end` says so.
void live(const std::string& path, const std::vector<std::uint8_t>& content, std::uint64_t seed, int end) {
    std::mt19937_64 random(seed);
    thl::Reader reader({path}, 3, false, 4096);
    thl::Arena memory(kPlaces * kSlot);  // outlives the device, whose uses may still read it
    auto device = std::make_shared<thl::HostCopyDevice>(seed, 100);
    if (end == 2) device->fail_at(20);
    std::vector<std::int64_t> places;
    for (int i = 0; i < kPlaces; ++i) places.push_back(i * kSlot);
    thl::CopyEngine engine(reader, device, memory.data(), kPlaces * kSlot, places, kSlot, 2 + int(random() % 4),
                           thl::HostCopyDevice::kCompute, nullptr);
    std::map<int, Page> coming;
    std::vector<std::uint32_t> sums;
    const auto finish = [&](int i) {
        const Page page = coming.at(i);
        engine.finish(i * kSlot, thl::HostCopyDevice::kCompute);
        device->use(memory.data() + i * kSlot + page.offset % 4096, std::size_t(page.nbytes));
        engine.released(i * kSlot, thl::HostCopyDevice::kCompute);
        sums.push_back(page.crc);
        coming.erase(i);
    };
    for (int step = 0; step < 150; ++step) {
        const int i = int(random() % kPlaces);
        if (coming.count(i)) {
            finish(i);
            continue;
        }
        const auto offset = std::int64_t(random() % (content.size() - kSlot));
        const auto nbytes = std::int64_t(random() % std::uint64_t(kSlot - offset % 4096));
        const Page page{offset, nbytes, thl::crc32c(0, content.data() + offset, std::size_t(nbytes))};
        const bool checked = random() % 2;
        engine.start({0, offset, nbytes, checked ? std::optional(page.crc) : std::nullopt, "page"}, i * kSlot);
        coming[i] = page;
    }
    if (end == 1) {
        engine.close();
    } else {
        while (!coming.empty()) finish(coming.begin()->first);
    }
    expect(device->sums() == sums, "every use reads its page");
    expect(device->violations().empty(), "copies and uses are ordered");
}

}  // namespace

int main(int, char** arguments) {
    const std::string path = arguments[1];
    std::ifstream file(path, std::ios::binary);
    const std::vector<std::uint8_t> content((std::istreambuf_iterator<char>(file)), {});
    const std::uint64_t seed = std::strtoull(arguments[2], nullptr, 10);
    for (std::uint64_t i = 0; i < 6; ++i) {
        const int end = int(i % 3);
        try {
            live(path, content, seed + i, end);
            expect(end != 2, "a device that fails is noticed");
        } catch (const thl::DeviceError&) {
            expect(end == 2, "a device that works does not fail");
        }
    }
    std::puts("ok");
}
