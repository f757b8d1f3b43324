// GPUDirect Storage: reads from files straight into a device's memory, by NVIDIA's libcufile, which is loaded when it
// is wanted. https://docs.nvidia.com/gpudirect-storage/api-reference-guide/
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace thl {

// Why files cannot be read directly here. One line.
class DirectStorageError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class DirectStorage {
public:
    // library: name or path of libcufile. files: read with O_DIRECT, named by their index. memory: on the device.
    // Throws DirectStorageError unless reads are sure to go past the host: the driver opens and does not allow its
    // compatibility mode, and takes each file and the memory.
    DirectStorage(const std::string& library, const std::vector<std::string>& files, void* memory, std::size_t nbytes);
    ~DirectStorage();
    DirectStorage(const DirectStorage&) = delete;
    DirectStorage& operator=(const DirectStorage&) = delete;

    // Reads the 4096-aligned range around file bytes [offset, offset + nbytes) to `place` of the memory. On return
    // work that is issued to the device from then on sees it. Throws ReadError, with `label`.
    void read(std::int64_t file, std::int64_t offset, std::int64_t nbytes, std::int64_t place,
              const std::string& label);

private:
    struct Library;
    struct File {
        std::string path;
        int descriptor = -1;
        void* handle = nullptr;
    };

    void open(const std::vector<std::string>& files);
    void close();

    const Library& library_;
    void* const memory_;
    const std::size_t nbytes_;
    std::vector<File> files_;
    bool registered_ = false;
};

}  // namespace thl
