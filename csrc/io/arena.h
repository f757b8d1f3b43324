// Page-aligned anonymous memory that files are read into and kernels read from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>

namespace thl {

// Direct reads need file offset, length and address on this boundary: the largest block size in common use.
constexpr std::size_t kIoAlignment = 4096;

// Derives from bad_alloc, so that Python sees a MemoryError that states the size.
class ArenaError : public std::bad_alloc {
public:
    explicit ArenaError(std::string message) : message_(std::move(message)) {}
    const char* what() const noexcept override { return message_.c_str(); }

private:
    std::string message_;
};

// `nbytes` (rounded up to 4096) of zeroed memory, returned to the system by the destructor.
// Pages take physical memory when first written. Throws ArenaError, or std::invalid_argument for zero bytes.
class Arena {
public:
    explicit Arena(std::size_t nbytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    std::uint8_t* data() const { return data_; }
    std::size_t nbytes() const { return nbytes_; }

private:
    std::uint8_t* data_ = nullptr;
    std::size_t nbytes_ = 0;
};

}  // namespace thl
