// Preloaded into a process, makes the system calls that write below a folder fail after a number of them.
//
//   fault_arm(after, error, what, folder)   what: 1 writes, 2 fsync, 4 new names (open, mkdir), 8 rename
//   fault_count()                           calls that would have counted since
//   fault_early()                           whether one failed before FOLDER/2, a step or version, had its name
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kWrite = 1, kSync = 2, kName = 4, kRename = 8 };

static char folder[4096];
static atomic_long calls, limit;
static atomic_int error, kinds, early, named;

void fault_arm(long after, int code, int what, const char* below) {
  kinds = 0;
  if (what) early = named = 0;
  snprintf(folder, sizeof folder, "%s", below);
  calls = 0;
  limit = after;
  error = code;
  kinds = what;
}

long fault_count(void) { return calls; }
int fault_early(void) { return early; }

static int fails_at(const char* path, int kind) {
  if (!(kinds & kind) || strncmp(path, folder, strlen(folder)) != 0) return 0;
  if (atomic_fetch_add(&calls, 1) < limit) return 0;
  if (!named) early = 1;
  errno = error;
  return 1;
}

static int renamed(int result, const char* to) {
  size_t n = strlen(folder);
  if (!result && !strncmp(to, folder, n) && !strcmp(to + n, "/2")) named = 1;
  return result;
}

static int fails(int fd, int kind) {
  if (!(kinds & kind)) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails_at(path, kind);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void* data, size_t n) {
  return fails(fd, kWrite) ? -1 : REAL(write)(fd, data, n);
}
ssize_t writev(int fd, const struct iovec* parts, int n) {
  return fails(fd, kWrite) ? -1 : REAL(writev)(fd, parts, n);
}
ssize_t pwrite(int fd, const void* data, size_t n, off_t at) {
  return fails(fd, kWrite) ? -1 : REAL(pwrite)(fd, data, n, at);
}
ssize_t pwrite64(int fd, const void* data, size_t n, off64_t at) {
  return fails(fd, kWrite) ? -1 : REAL(pwrite64)(fd, data, n, at);
}
int ftruncate(int fd, off_t n) { return fails(fd, kWrite) ? -1 : REAL(ftruncate)(fd, n); }
int fsync(int fd) { return fails(fd, kSync) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fails(fd, kSync) ? -1 : REAL(fdatasync)(fd); }
int mkdir(const char* path, mode_t mode) { return fails_at(path, kName) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char* from, const char* to) { return fails_at(to, kRename) ? -1 : renamed(REAL(rename)(from, to), to); }
int renameat(int a, const char* from, int b, const char* to) {
  return fails_at(to, kRename) ? -1 : renamed(REAL(renameat)(a, from, b, to), to);
}

#define OPEN(name)                                                    \
  int name(const char* path, int flags, ...) {                       \
    va_list rest;                                                     \
    va_start(rest, flags);                                            \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                     \
    if ((flags & O_CREAT) && fails_at(path, kName)) return -1;        \
    return REAL(name)(path, flags, mode);                             \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                  \
  int name(int at, const char* path, int flags, ...) {               \
    va_list rest;                                                     \
    va_start(rest, flags);                                            \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                     \
    if ((flags & O_CREAT) && fails_at(path, kName)) return -1;        \
    return REAL(name)(at, path, flags, mode);                         \
  }
OPENAT(openat)
OPENAT(openat64)
