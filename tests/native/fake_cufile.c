/* Stands in for libcufile, with host memory for the device's: reads with pread, and refuses what the real one may. */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

typedef struct {
    int error, cuda_error;
} Status;

typedef struct {
    int type;
    union {
        int descriptor;
        void *handle;
    } handle;
    const void *operations;
} Description;

typedef struct {
    struct {
        unsigned major, minor;
        size_t poll_threshold, max_direct_io;
        unsigned status, control;
    } driver;
    unsigned features, device_cache, buffer_cache, pinned, batch_size, batch_timeout;
} Properties;

int reads, files, buffers; /* read by the test */

static int refused(const char *what) {
    const char *value = getenv("FAKE_CUFILE");
    const char *a = value ? value : "";
    for (; *a && *a == *what; ++a, ++what) {
    }
    return !*a && !*what;
}

static Status status(int error) {
    Status result = {error, 0};
    return result;
}

Status cuFileDriverOpen(void) { return status(refused("driver") ? 5001 : 0); }

Status cuFileDriverGetProperties(Properties *properties) {
    properties->driver.control = refused("compatibility") ? 2 : 0;
    return status(0);
}

Status cuFileHandleRegister(void **handle, Description *description) {
    if (refused("file")) return status(5008);
    if (description->type != 1 || !(fcntl(description->handle.descriptor, F_GETFL) & O_DIRECT)) return status(5020);
    int *made = malloc(sizeof *made);
    *made = description->handle.descriptor;
    *handle = made;
    ++files;
    return status(0);
}

void cuFileHandleDeregister(void *handle) {
    free(handle);
    --files;
}

Status cuFileBufRegister(const void *memory, size_t length, int flags) {
    (void)memory, (void)length, (void)flags;
    if (refused("buffer")) return status(5016);
    ++buffers;
    return status(0);
}

Status cuFileBufDeregister(const void *memory) {
    (void)memory;
    --buffers;
    return status(0);
}

ssize_t cuFileRead(void *handle, void *memory, size_t size, off_t offset, off_t memory_offset) {
    ++reads;
    if (refused("read")) {
        errno = EIO;
        return -1;
    }
    if (size % 4096 || offset % 4096 || memory_offset % 4096 || (uintptr_t)memory % 4096) return -5022;
    if (refused("partly") && size > 4096) size = 4096;
    return pread(*(int *)handle, (char *)memory + memory_offset, size, offset);
}
