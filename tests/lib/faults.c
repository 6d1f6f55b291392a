/* Makes the n-th call that changes something below a folder fail. The library is loaded with LD_PRELOAD.
 *
 * FAULT_ROOT  the folder; if it is not set, nothing happens
 * FAULT_AT    the number of the call, from 1; if it is 0, calls are only counted
 * FAULT_KIND  kill (SIGKILL before the call), torn (SIGKILL after half of the call), or the number of an errno
 * FAULT_STAYS if it is 1, all later calls fail too
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int calls;

int fault_calls(void) { return calls; }

static int below(const char *path) {
  const char *root = getenv("FAULT_ROOT");
  return root && !strncmp(path, root, strlen(root));
}

static int fd_below(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return below(path);
}

static int at_below(int dir, const char *path) {
  return path[0] == '/' || dir == AT_FDCWD ? below(path) : fd_below(dir);
}

enum { PASS, FAIL, TORN };

/* Counts a call, and returns whether it passes, fails or is torn. */
static int fault(int counts) {
  if (!counts) return PASS;
  const char *at = getenv("FAULT_AT"), *kind = getenv("FAULT_KIND");
  const char *stays = getenv("FAULT_STAYS");
  int n = at ? atoi(at) : 0;
  calls++;
  if (!n || calls < n || (calls > n && !(stays && *stays == '1'))) return PASS;
  if (!strcmp(kind, "kill")) kill(getpid(), SIGKILL);
  if (!strcmp(kind, "torn")) return TORN;
  errno = atoi(kind);
  return FAIL;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define CALL(counts, call)                       \
  do {                                           \
    int what = fault(counts);                    \
    if (what == FAIL) return -1;                 \
    __typeof__(call) result = call;              \
    if (what == TORN) kill(getpid(), SIGKILL);   \
    return result;                               \
  } while (0)

ssize_t write(int fd, const void *data, size_t n) {
  int what = fault(fd_below(fd));
  if (what == FAIL) return -1;
  if (what == TORN) {
    REAL(write)(fd, data, n / 2);
    kill(getpid(), SIGKILL);
  }
  return REAL(write)(fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) { CALL(fd_below(fd), REAL(writev)(fd, parts, n)); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { CALL(fd_below(fd), REAL(pwrite)(fd, data, n, at)); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { CALL(fd_below(fd), REAL(pwrite64)(fd, data, n, at)); }
/* Does not wait for the disk, because a killed process loses nothing that it has written, whether it is synced or not. */
int fsync(int fd) { CALL(fd_below(fd), 0); }
int ftruncate(int fd, off_t n) { CALL(fd_below(fd), REAL(ftruncate)(fd, n)); }
int ftruncate64(int fd, off64_t n) { CALL(fd_below(fd), REAL(ftruncate64)(fd, n)); }
int rename(const char *from, const char *to) { CALL(below(to), REAL(rename)(from, to)); }
int mkdir(const char *path, mode_t mode) { CALL(below(path), REAL(mkdir)(path, mode)); }
int unlink(const char *path) { CALL(below(path), REAL(unlink)(path)); }
int rmdir(const char *path) { CALL(below(path), REAL(rmdir)(path)); }
int unlinkat(int dir, const char *path, int flags) { CALL(at_below(dir, path), REAL(unlinkat)(dir, path, flags)); }

#define OPEN(name)                                                              \
  int name(const char *path, int flags, ...) {                                  \
    va_list more;                                                               \
    va_start(more, flags);                                                      \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;     \
    va_end(more);                                                               \
    int changes = flags & (O_CREAT | O_TRUNC) && below(path);                   \
    CALL(changes, REAL(name)(path, flags, mode));                               \
  }

OPEN(open)
OPEN(open64)
