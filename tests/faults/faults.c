// Preloaded into a process: makes its reads and writes of chosen files fail, come short, or be interrupted.
//
// faults_set("read", EIO, 3, 1, "model") lets three reads of files whose path contains "model" pass and fails one after
// them. Instead of an errno: SHORT transfers a part, a different one each time; CUT cuts the file to half its length
// before the call. With a count of -1 it goes on for ever, with 0 it only counts.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SHORT = -1, CUT = -2, BLOCK = 4096 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char fault_call[16], fault_path[256];
static int fault_kind, fault_after, fault_times, seen, done;
static uint64_t random_state = 1;

void faults_set(const char* call, int kind, int after, int times, const char* path) {
    pthread_mutex_lock(&mutex);
    snprintf(fault_call, sizeof fault_call, "%s", call);
    snprintf(fault_path, sizeof fault_path, "%s", path);
    fault_kind = kind, fault_after = after, fault_times = times, seen = done = 0;
    pthread_mutex_unlock(&mutex);
}

int faults_seen(void) { return seen; }  // calls that it could have been

int faults_done(void) { return done; }  // and those that it was

// 0: the call goes on, with *size bytes at most. Otherwise -1, and errno is set.
static int strike(const char* call, int fd, const char* path, size_t* size) {
    char link[64], target[4096];
    int result = 0;
    pthread_mutex_lock(&mutex);
    if (strcmp(call, fault_call)) goto out;
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, target, sizeof target - 1);
        if (length < 0) goto out;
        target[length] = 0;
        path = target;
    }
    if (!strstr(path, fault_path)) goto out;
    if (seen++ < fault_after || !fault_times) goto out;
    if (fault_kind == SHORT) {
        // Direct transfers end between blocks, all others anywhere.
        const int flags = fcntl(fd, F_GETFL);
        const size_t unit = flags >= 0 && (flags & O_DIRECT) ? BLOCK : 1;
        if (*size <= unit) goto out;
        random_state = random_state * 6364136223846793005u + 1442695040888963407u;
        const size_t part = 1 + (random_state >> 33) % (*size / unit);
        if (part * unit >= *size) goto out;
        *size = part * unit;
    } else if (fault_kind == CUT) {
        struct stat found;
        if (stat(path, &found) || truncate(path, found.st_size / 2)) goto out;
    } else {
        errno = fault_kind;
        result = -1;
    }
    if (fault_times > 0) --fault_times;
    ++done;
out:
    pthread_mutex_unlock(&mutex);
    return result;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define TRANSFER(name, call, pointer) \
    ssize_t name(int fd, pointer data, size_t size, off_t offset) { \
        REAL(name); \
        return strike(call, fd, NULL, &size) ? -1 : real(fd, data, size, offset); \
    }
TRANSFER(pread, "read", void*)
TRANSFER(pread64, "read", void*)
TRANSFER(pwrite, "write", const void*)
TRANSFER(pwrite64, "write", const void*)

// Of one buffer, which is all that is used here. Python has os.preadv call the second.
#define VECTOR(name) \
    ssize_t name(int fd, const struct iovec* parts, int count, off_t offset, int flags) { \
        REAL(name); \
        struct iovec first = parts[0]; \
        if (count != 1) return real(fd, parts, count, offset, flags); \
        return strike("read", fd, NULL, &first.iov_len) ? -1 : real(fd, &first, 1, offset, flags); \
    }
ssize_t preadv(int fd, const struct iovec* parts, int count, off_t offset) {
    return preadv2(fd, parts, count, offset, 0);
}
ssize_t preadv64(int fd, const struct iovec* parts, int count, off64_t offset) {
    return preadv64v2(fd, parts, count, offset, 0);
}
VECTOR(preadv2)
VECTOR(preadv64v2)

ssize_t read(int fd, void* data, size_t size) {
    REAL(read);
    return strike("read", fd, NULL, &size) ? -1 : real(fd, data, size);
}

ssize_t write(int fd, const void* data, size_t size) {
    REAL(write);
    return strike("write", fd, NULL, &size) ? -1 : real(fd, data, size);
}

int fsync(int fd) {
    REAL(fsync);
    size_t size = 0;
    return strike("sync", fd, NULL, &size) ? -1 : real(fd);
}

int rename(const char* from, const char* to) {
    REAL(rename);
    size_t size = 0;
    return strike("rename", -1, to, &size) ? -1 : real(from, to);
}
