// LD_PRELOAD library of tests/cli/resume.cpp and tests/data/test_prepare_faults.py. It counts the calls by which
// a program changes the disk under one folder, and causes a fault at the n-th call. The disk does not change
// between two calls, so a process that dies before call n + 1 has also died after call n.
//
//   FAULT_FOLDER  the folder's absolute path; without it, nothing is counted
//   FAULT_AT      n, counted from 1
//   FAULT_DO      signal  the process gets signal FAULT_VALUE before the call
//                 twice   the process gets it twice
//                 half    the call writes half of its bytes, and the process is killed
//                 error   the call fails with errno FAULT_VALUE
//                 full    the disk is full: this call writes half of its bytes, and all later calls that need
//                         space fail with ENOSPC
//                 stuck   from this call on, nothing can be deleted: the calls fail with errno FAULT_VALUE
//   FAULT_GONE    a file; when it has been opened for reading, its folder is renamed
//   FAULT_LOG     a file outside of the folder, to which each call adds a line: "write PATH"
//
// The functions call the kernel directly, so they cannot call each other by mistake.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum fate { GO_ON, FAIL, HALF, HALF_AND_DIE };

static const char* setting(const char* name) {
    const char* value = getenv(name);
    return value ? value : "";
}

// The full path of `path`, which is relative to the folder that is open as `fd`. If `path` is "", the path of
// the file that is open as `fd`.
static void full_path(char* out, size_t size, int fd, const char* path) {
    char link[64], base[PATH_MAX] = "";
    snprintf(link, sizeof(link), fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    if (path[0] != '/' && readlink(link, base, sizeof(base) - 1) < 0) base[0] = 0;
    snprintf(out, size, "%s%s%s", base, path[0] && path[0] != '/' ? "/" : "", path);
}

static void log_call(const char* call, const char* path) {
    if (!*setting("FAULT_LOG")) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, setting("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0666);
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof(line), "%s %s\n", call, path);
    if (fd < 0 || syscall(SYS_write, fd, line, length) != length) abort();
    close(fd);
}

// Counts a call, and returns what has to happen to it. Sets errno if the call has to fail.
static enum fate fate_of(const char* call, int needs_space, int fd, const char* path) {
    static atomic_int calls;
    char name[2 * PATH_MAX];
    const char* folder = setting("FAULT_FOLDER");
    size_t length = strlen(folder);
    if (length == 0) return GO_ON;
    full_path(name, sizeof(name), fd, path);
    if (strncmp(name, folder, length) != 0 || (name[length] != 0 && name[length] != '/')) return GO_ON;
    log_call(call, name);
    int count = ++calls, at = atoi(setting("FAULT_AT")), value = atoi(setting("FAULT_VALUE"));
    int writes = strcmp(call, "write") == 0;
    const char* what = setting("FAULT_DO");
    if (at == 0 || count < at) return GO_ON;
    if (strcmp(what, "full") == 0) {
        errno = ENOSPC;
        return count == at && writes ? HALF : needs_space ? FAIL : GO_ON;
    }
    if (strcmp(what, "stuck") == 0) {
        errno = value;
        return strcmp(call, "unlink") == 0 ? FAIL : GO_ON;
    }
    if (count > at) return GO_ON;
    if (strcmp(what, "error") == 0) {
        errno = value;
        return FAIL;
    }
    if (strcmp(what, "half") == 0) {
        if (writes) return HALF_AND_DIE;
        raise(SIGKILL);
    }
    if (strcmp(what, "signal") != 0 && strcmp(what, "twice") != 0) abort();
    raise(value);
    if (strcmp(what, "twice") == 0) raise(value);
    return GO_ON;
}

static void rename_folder_of(const char* path) {
    char folder[PATH_MAX], other[PATH_MAX + 8];
    snprintf(folder, sizeof(folder), "%s", path);
    *strrchr(folder, '/') = 0;
    snprintf(other, sizeof(other), "%s.gone", folder);
    syscall(SYS_renameat2, AT_FDCWD, folder, AT_FDCWD, other, 0);
}

#define CALL(name, needs_space, fd, path, system_call) \
    return fate_of(name, needs_space, fd, path) == FAIL ? -1 : (int)(system_call)

ssize_t write(int fd, const void* data, size_t size) {
    enum fate fate = fate_of("write", 1, fd, "");
    if (fate == FAIL) return -1;
    ssize_t written = syscall(SYS_write, fd, data, fate == GO_ON ? size : size / 2);
    if (fate == HALF_AND_DIE) raise(SIGKILL);
    return written;
}

int open(const char* path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (!(flags & (O_CREAT | O_TRUNC))) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);
        if (strcmp(path, setting("FAULT_GONE")) == 0) rename_folder_of(path);
        return fd;
    }
    CALL("open", 1, AT_FDCWD, path, syscall(SYS_openat, AT_FDCWD, path, flags, mode));
}

// Python calls open() by this name.
int open64(const char* path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return open(path, flags, mode);
}

int fsync(int fd) {
    CALL("fsync", 1, fd, "", syscall(SYS_fsync, fd));
}

int mkdir(const char* path, mode_t mode) {
    CALL("mkdir", 1, AT_FDCWD, path, syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}

int rename(const char* from, const char* to) {
    CALL("rename", 0, AT_FDCWD, to, syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

int unlinkat(int fd, const char* path, int flags) {
    CALL("unlink", 0, fd, path, syscall(SYS_unlinkat, fd, path, flags));
}

int unlink(const char* path) {
    return unlinkat(AT_FDCWD, path, 0);
}

int rmdir(const char* path) {
    return unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

int remove(const char* path) {
    int result = unlinkat(AT_FDCWD, path, 0);
    return result < 0 && errno == EISDIR ? rmdir(path) : result;
}
