#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // O_DIRECT
#endif
#include "io/gds.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "io/arena.h"
#include "io/reader.h"

namespace thl {
namespace {

constexpr std::int64_t kAlign = kIoAlignment;

// From libcufile's reference; no header is needed to build.
struct Status {  // CUfileError_t
    int error;
    int cuda_error;
};
constexpr int kOpaqueDescriptor = 1;         // CU_FILE_HANDLE_TYPE_OPAQUE_FD
constexpr unsigned kAllowCompatibility = 2;  // 1 << CU_FILE_ALLOW_COMPAT_MODE
struct Description {                         // CUfileDescr_t
    int type;
    union {
        int descriptor;
        void* handle;
    };
    const void* operations;
};
struct Properties {  // CUfileDrvProps_t
    struct {
        unsigned major, minor;
        std::size_t poll_threshold, max_direct_io;
        unsigned status, control;
    } driver;
    unsigned features, device_cache, buffer_cache, pinned;
    unsigned reserved[64];  // later versions may have more fields
};

std::string code(const Status& status) {
    return "error " + std::to_string(status.error) +
           (status.cuda_error ? ", CUDA error " + std::to_string(status.cuda_error) : "");
}

}  // namespace

// A libcufile and its open driver. Both stay for the life of the process, which may use them elsewhere too.
struct DirectStorage::Library {
    Status (*open_driver)();
    Status (*get_properties)(Properties*);
    Status (*register_file)(void**, Description*);
    void (*deregister_file)(void*);
    Status (*register_buffer)(const void*, std::size_t, int);
    Status (*deregister_buffer)(const void*);
    ssize_t (*read)(void*, void*, std::size_t, off_t, off_t);

    explicit Library(const std::string& name) {
        void* const handle = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!handle) throw DirectStorageError(std::string("libcufile cannot be loaded: ") + ::dlerror());
        find(handle, open_driver, "cuFileDriverOpen");
        find(handle, get_properties, "cuFileDriverGetProperties");
        find(handle, register_file, "cuFileHandleRegister");
        find(handle, deregister_file, "cuFileHandleDeregister");
        find(handle, register_buffer, "cuFileBufRegister");
        find(handle, deregister_buffer, "cuFileBufDeregister");
        find(handle, read, "cuFileRead");
        const Status opened = open_driver();
        if (opened.error) throw DirectStorageError("the driver of GPUDirect Storage does not open: " + code(opened));
    }

    static const Library& load(const std::string& name) {
        static std::mutex mutex;
        static std::map<std::string, std::unique_ptr<Library>> loaded;
        std::lock_guard<std::mutex> lock(mutex);
        auto& library = loaded[name];
        if (!library) library = std::make_unique<Library>(name);
        return *library;
    }

private:
    template <typename Function>
    static void find(void* handle, Function& function, const char* symbol) {
        function = reinterpret_cast<Function>(::dlsym(handle, symbol));
        if (!function) throw DirectStorageError(std::string("libcufile has no ") + symbol);
    }
};

DirectStorage::DirectStorage(const std::string& library, const std::vector<std::string>& files, void* memory,
                             std::size_t nbytes)
    : library_(Library::load(library)), memory_(memory), nbytes_(nbytes) {
    try {
        open(files);
    } catch (...) {
        close();
        throw;
    }
}

DirectStorage::~DirectStorage() { close(); }

void DirectStorage::open(const std::vector<std::string>& files) {
    Properties properties{};
    const Status known = library_.get_properties(&properties);
    if (known.error) throw DirectStorageError("cuFileDriverGetProperties: " + code(known));
    if (properties.driver.control & kAllowCompatibility) {
        throw DirectStorageError(
            "cuFile may fall back to reads through the host (compatibility mode); set properties.allow_compat_mode to "
            "false in /etc/cufile.json");
    }
    if (reinterpret_cast<std::uintptr_t>(memory_) % kAlign) {
        throw DirectStorageError("the device's memory does not begin at a multiple of 4096");
    }
    for (const std::string& path : files) {
        File& file = files_.emplace_back();
        file.path = path;
        file.descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
        if (file.descriptor < 0) {
            throw DirectStorageError(path + ": direct reads are refused: " + std::strerror(errno));
        }
        Description description{};
        description.type = kOpaqueDescriptor;
        description.descriptor = file.descriptor;
        const Status status = library_.register_file(&file.handle, &description);
        if (status.error) {
            file.handle = nullptr;
            throw DirectStorageError(path + ": cuFileHandleRegister: " + code(status));
        }
    }
    const Status status = library_.register_buffer(memory_, nbytes_, 0);
    if (status.error) {
        throw DirectStorageError("cuFileBufRegister of " + std::to_string(nbytes_) + " bytes: " + code(status));
    }
    registered_ = true;
}

void DirectStorage::close() {
    if (registered_) library_.deregister_buffer(memory_);
    for (const File& file : files_) {
        if (file.handle) library_.deregister_file(file.handle);
        if (file.descriptor >= 0) ::close(file.descriptor);
    }
}

void DirectStorage::read(std::int64_t index, std::int64_t offset, std::int64_t nbytes, std::int64_t place,
                         const std::string& label) {
    if (index < 0 || index >= static_cast<std::int64_t>(files_.size())) {
        throw std::invalid_argument("file " + std::to_string(index) + " is not one of the " +
                                    std::to_string(files_.size()) + " files");
    }
    const File& file = files_[static_cast<std::size_t>(index)];
    const std::int64_t begin = offset / kAlign * kAlign, needed = offset + nbytes - begin;
    const std::int64_t size = nbytes ? (needed + kAlign - 1) / kAlign * kAlign : 0;
    if (place < 0 || place % kAlign || size > static_cast<std::int64_t>(nbytes_) - place) {
        throw std::invalid_argument(std::to_string(size) + " bytes at " + std::to_string(place) +
                                    " are not within the device's memory");
    }
    const auto fail = [&](const std::string& cause) {
        throw ReadError(file.path + ": " + (label.empty() ? "" : label + ": ") + std::to_string(nbytes) +
                        " bytes at offset " + std::to_string(offset) + ": " + cause);
    };
    for (std::int64_t got = 0; got < needed && nbytes;) {
        errno = 0;
        const ssize_t count = library_.read(file.handle, memory_, static_cast<std::size_t>(size - got),
                                            static_cast<off_t>(begin + got), static_cast<off_t>(place + got));
        if (count < 0) {
            fail("cuFileRead: " + (count == -1 ? std::string(std::strerror(errno)) : "error " + std::to_string(-count)));
        }
        if (count == 0 || (got + count < needed && count % kAlign)) {
            fail("short read: expected " + std::to_string(nbytes) + " bytes, got " +
                 std::to_string(std::max<std::int64_t>(0, got + count - (offset - begin))) +
                 "; is the file truncated?");
        }
        got += count;
    }
}

}  // namespace thl
