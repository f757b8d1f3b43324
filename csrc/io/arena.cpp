#include "io/arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace thl {
namespace {

constexpr std::size_t kHugePage = std::size_t(2) << 20;

[[noreturn]] void refuse(std::size_t nbytes, const char* reason) {
    throw ArenaError("cannot allocate " + std::to_string(nbytes) + " bytes for an arena: " + reason);
}

}  // namespace

Arena::Arena(std::size_t nbytes) {
    if (nbytes == 0) throw std::invalid_argument("an arena needs at least one byte");
    if (nbytes > std::numeric_limits<std::size_t>::max() / 2) refuse(nbytes, "more than the address space");
    nbytes_ = (nbytes + kIoAlignment - 1) / kIoAlignment * kIoAlignment;

    // Huge pages make a direct read pin 2 MiB at a time instead of 4 KiB, but only where the mapping itself
    // starts on such a boundary: map one huge page more and give back what lies outside.
    const std::size_t spare = nbytes_ >= kHugePage ? kHugePage : 0;
    void* mapped = mmap(nullptr, nbytes_ + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) refuse(nbytes, std::strerror(errno));
    data_ = static_cast<std::uint8_t*>(mapped);
    if (spare) {
        const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(mapped) % kHugePage) % kHugePage;
        if (before) munmap(mapped, before);
        data_ += before;
        if (spare > before) munmap(data_ + nbytes_, spare - before);
#ifdef MADV_HUGEPAGE
        madvise(data_, nbytes_, MADV_HUGEPAGE);  // advice: a kernel without huge pages refuses, which is fine
#endif
    }
}

Arena::~Arena() { munmap(data_, nbytes_); }

}  // namespace thl
