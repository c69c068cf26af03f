/* Counts the calls that change files below a folder, and makes one of them fail or sends a signal at it.
   Loaded with LD_PRELOAD; does nothing until `faults_arm` is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, ONCE, FULL, BEFORE, AFTER };

static char folder[4096];
static atomic_long seen;
static long target;
static int action = COUNT, number;

/* action: COUNT; ONCE: call `at` fails with ENOSPC; FULL: so do all later ones that need space;
   BEFORE, AFTER: `signal_number` is sent at either side of call `at`. */
void faults_arm(const char *path, long at, int what, int signal_number) {
    snprintf(folder, sizeof folder, "%s", path);
    seen = 0;
    target = at;
    action = what;
    number = signal_number;
}

long faults_seen(void) { return seen; }

static int below(const char *path) {
    size_t length = strlen(folder);
    return length && path && !strncmp(path, folder, length) && path[length] == '/';
}

static int opened_below(int fd) {
    char link[64], path[4096];
    if (!*folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size > 0 ? size : 0] = 0;
    return below(path);
}

/* Counts a call; true where it must fail. */
static int fails(long *call, int needs_space) {
    *call = ++seen;
    if (*call == target && action == BEFORE) kill(getpid(), number);
    if ((*call == target && action == ONCE) || (*call >= target && action == FULL && needs_space)) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

static void after(long call) {
    if (call == target && action == AFTER) kill(getpid(), number);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ATTACKED(mine, needs_space, error, type, expression)         \
    do {                                                             \
        long call = 0;                                               \
        int saved = errno, attacked = (mine);                        \
        errno = saved;                                               \
        if (attacked && fails(&call, needs_space)) return error;     \
        type result = expression;                                    \
        if (attacked) { saved = errno; after(call); errno = saved; } \
        return result;                                               \
    } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    ATTACKED(opened_below(fd), 1, -1, ssize_t, REAL(write)(fd, data, size));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    ATTACKED(opened_below(fd), 1, -1, ssize_t, REAL(writev)(fd, parts, count));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    ATTACKED(opened_below(fd), 1, -1, ssize_t, REAL(pwrite)(fd, data, size, at));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    ATTACKED(opened_below(fd), 1, -1, ssize_t, REAL(pwrite64)(fd, data, size, at));
}
int ftruncate(int fd, off_t size) { ATTACKED(opened_below(fd), 1, -1, int, REAL(ftruncate)(fd, size)); }
int ftruncate64(int fd, off64_t size) { ATTACKED(opened_below(fd), 1, -1, int, REAL(ftruncate64)(fd, size)); }
int fsync(int fd) { ATTACKED(opened_below(fd), 0, -1, int, REAL(fsync)(fd)); }
int fdatasync(int fd) { ATTACKED(opened_below(fd), 0, -1, int, REAL(fdatasync)(fd)); }
int rename(const char *old, const char *new) { ATTACKED(below(new), 0, -1, int, REAL(rename)(old, new)); }
int renameat(int from, const char *old, int to, const char *new) {
    ATTACKED(below(new), 0, -1, int, REAL(renameat)(from, old, to, new));
}
int mkdir(const char *path, mode_t mode) { ATTACKED(below(path), 1, -1, int, REAL(mkdir)(path, mode)); }

static int creates(const char *path, int flags) { return (flags & O_CREAT) && below(path); }
static int is_new(const char *path) { return access(path, F_OK) != 0; }

#define MODE(flags)                                                      \
    mode_t mode = 0;                                                     \
    if (flags & O_CREAT) {                                               \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        mode = va_arg(rest, mode_t);                                     \
        va_end(rest);                                                    \
    }

int open(const char *path, int flags, ...) {
    MODE(flags)
    ATTACKED(creates(path, flags), is_new(path), -1, int, REAL(open)(path, flags, mode));
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    ATTACKED(creates(path, flags), is_new(path), -1, int, REAL(open64)(path, flags, mode));
}
int openat(int at, const char *path, int flags, ...) {
    MODE(flags)
    ATTACKED(creates(path, flags), is_new(path), -1, int, REAL(openat)(at, path, flags, mode));
}
int openat64(int at, const char *path, int flags, ...) {
    MODE(flags)
    ATTACKED(creates(path, flags), is_new(path), -1, int, REAL(openat64)(at, path, flags, mode));
}
FILE *fopen(const char *path, const char *mode) {
    ATTACKED(*mode != 'r' && below(path), is_new(path), NULL, FILE *, REAL(fopen)(path, mode));
}
FILE *fopen64(const char *path, const char *mode) {
    ATTACKED(*mode != 'r' && below(path), is_new(path), NULL, FILE *, REAL(fopen64)(path, mode));
}
