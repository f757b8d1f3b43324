// Reads pages of files into an Arena on worker threads, past the page cache where the file system allows it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "io/arena.h"
#include "io/forks.h"

namespace thl {

// A file cannot be opened or read, is shorter than it should be, or holds other bytes than its checksum says.
class ReadError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class Reader {
public:
    // Opens every file; throws ReadError where one cannot be opened, std::invalid_argument for bad arguments.
    // `threads` reads of up to `chunk_bytes` are in flight at a time; one more thread computes checksums.
    // With `direct`, files are read with O_DIRECT; a file system that refuses gets plain reads, see direct().
    Reader(std::vector<std::string> paths, int threads, bool direct, std::int64_t chunk_bytes);
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // Queues a read of file bytes [offset, offset + nbytes), first come first served, and returns its ticket.
    // The 4096-aligned range around them goes to the arena at `arena_offset` (4096-aligned), so the data starts
    // at arena_offset + offset % 4096. `crc` is checked over exactly the nbytes; `label` names them in errors.
    // The arena is kept alive until the read is over. Throws std::invalid_argument, with nothing queued, where
    // the range does not fit.
    std::uint64_t submit(std::int64_t file, std::int64_t offset, std::int64_t nbytes, std::shared_ptr<Arena> arena,
                         std::int64_t arena_offset, std::optional<std::uint32_t> crc, std::string label);

    // Blocks until the read is over, forgets the ticket and returns the seconds it blocked. Throws ReadError
    // where the read failed, std::invalid_argument for an unknown ticket or a closed reader.
    double wait(std::uint64_t ticket);
    bool done(std::uint64_t ticket);

    // Reads nbytes at `offset` to `out` on the calling thread, through a private aligned buffer.
    void read_now(std::int64_t file, std::int64_t offset, std::int64_t nbytes, std::uint8_t* out);

    std::vector<bool> direct() const;  // by file: O_DIRECT is in use
    bool refused() const { return refused_.load(); }  // O_DIRECT was wanted, and refused for at least one file
    std::int64_t bytes_read() const { return bytes_read_.load(); }  // what the system delivered, padding included

    // Drops what is queued, finishes what is being read, joins the workers: no arena is written afterwards.
    void close();

    // In the child of a fork a reader is of no use: calls throw std::invalid_argument, and `close` and
    // DeletedWhereMade, which owners outside of C++ use, close its descriptors and leave the rest behind.
    bool inherited() const { return origin_.inherited(); }
    void abandon();

private:
    struct File {
        std::string path;
        int fd = -1;
        std::atomic<bool> direct{false};
    };

    // Why a range could not be read. Kept as numbers, so that workers build no strings.
    struct Failure {
        enum Kind { kNone, kShort, kErrno, kChecksum } kind = kNone;
        std::int64_t position = 0;  // file offset of the first byte that is missing
        int error = 0;
        std::uint32_t found_crc = 0;
    };

    struct Request {
        File* file = nullptr;
        std::int64_t offset = 0, nbytes = 0;
        std::int64_t begin = 0, end = 0;  // the aligned range
        std::shared_ptr<Arena> arena;
        std::uint8_t* destination = nullptr;
        std::optional<std::uint32_t> crc;
        std::string label;
        std::vector<std::uint32_t> chunk_crcs;  // one a chunk, written by the checker
        std::size_t next_chunk = 0, chunks_left = 0;
        Failure failure;
        bool done = false;
    };

    struct Chunk {
        std::shared_ptr<Request> request;
        std::size_t index = 0;
    };

    // File bytes of a chunk: [start, end) is read, both aligned; of these [first, last) were asked for.
    struct Span {
        std::int64_t start, end, first, last;
    };

    void read_chunks();
    void check_chunks();
    Span span(const Request& request, std::size_t chunk) const;
    bool chunk_over(Request& request);
    Failure read_range(File& file, std::int64_t begin, std::int64_t end, std::int64_t needed_end, std::uint8_t* out);
    void finish(Request& request);
    void plain(File& file);
    File& file_at(std::int64_t file);
    std::shared_ptr<Request> find(std::uint64_t ticket);
    void refuse_inherited() const;
    void stop();
    static std::string describe(const Request& request);

    const Origin origin_;
    const std::int64_t chunk_bytes_;
    std::deque<File> files_;  // a deque: File holds an atomic and does not move
    std::atomic<std::int64_t> bytes_read_{0};
    std::atomic<bool> refused_{false}, abandoned_{false};

    std::mutex mutex_;  // guards everything below it, and every Request but its chunk_crcs and arena bytes
    std::condition_variable read_ready_, check_ready_, read_over_;
    std::deque<std::shared_ptr<Request>> queue_;  // to be read
    std::deque<Chunk> unchecked_;                 // arrived, to be summed
    std::unordered_map<std::uint64_t, std::shared_ptr<Request>> tickets_;
    std::uint64_t next_ticket_ = 1;
    bool closed_ = false;

    std::mutex now_mutex_;  // guards the buffer of read_now and, with it, the file descriptors against close()
    std::unique_ptr<Arena> now_buffer_;
    bool files_closed_ = false;

    std::mutex close_mutex_;
    std::vector<std::thread> workers_;
};

}  // namespace thl
