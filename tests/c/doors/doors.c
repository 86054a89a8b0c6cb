/* The doors between the library and the kernel, for tests: the n-th call of a kind fails. In `make c-fault` the library's
 * own references to these functions are renamed to door_...; the VMM's are not.                   SPDX: MIT OR Apache-2.0
 *
 * VMIG_DOORS names a file of at least 4096 zeros, read and written by the test: which door, which call of it (0: none),
 * whether it was hit, and how often each door was used. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* In the order of DOORS in tests/faults.rs. */
enum door { READ, WRITE, POLL, MMAP, IOCTL, OPEN, STAT, SOCKET, THREAD, SPAWN, DOORS };

static const int error_of[DOORS] = { EIO, EIO, ENOMEM, ENOMEM, EIO, EMFILE, EIO, ENOBUFS, EAGAIN, ENOMEM };

struct plan {
    _Atomic uint64_t door, call, hits, unused[5];
    _Atomic uint64_t calls[DOORS];
};

static struct plan *plan;

static void __attribute__((constructor)) open_plan(void)
{
    const char *path = getenv("VMIG_DOORS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (fd >= 0)
        close(fd);
    if (map != MAP_FAILED)
        plan = map;
}

/* Whether this call is the one that fails. */
static int fails(enum door door)
{
    if (!plan || atomic_fetch_add(&plan->calls[door], 1) + 1 != plan->call || plan->door != door)
        return 0;
    plan->hits++;
    errno = error_of[door];
    return 1;
}

/* An eventfd has no device that could break. */
static int can_break(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && (st.st_mode & S_IFMT) != 0;
}

#define DOOR(door, type, name, parameters, arguments, ...) \
    type door_##name parameters; \
    type door_##name parameters { return fails(door) ? __VA_ARGS__ : name arguments; }
#define DOOR_FD(door, name, parameters, arguments) \
    ssize_t door_##name parameters; \
    ssize_t door_##name parameters { return can_break(fd) && fails(door) ? -1 : name arguments; }

DOOR_FD(READ, read, (int fd, void *buf, size_t len), (fd, buf, len))
DOOR_FD(READ, readv, (int fd, const struct iovec *iov, int count), (fd, iov, count))
DOOR_FD(READ, recv, (int fd, void *buf, size_t len, int flags), (fd, buf, len, flags))
DOOR_FD(READ, recvmsg, (int fd, struct msghdr *msg, int flags), (fd, msg, flags))
DOOR_FD(READ, pread64, (int fd, void *buf, size_t len, off64_t at), (fd, buf, len, at))
DOOR_FD(WRITE, write, (int fd, const void *buf, size_t len), (fd, buf, len))
DOOR_FD(WRITE, writev, (int fd, const struct iovec *iov, int count), (fd, iov, count))
DOOR_FD(WRITE, sendmsg, (int fd, const struct msghdr *msg, int flags), (fd, msg, flags))
DOOR(POLL, int, poll, (struct pollfd *fds, nfds_t count, int timeout), (fds, count, timeout), -1)
DOOR(MMAP, void *, mmap, (void *at, size_t len, int prot, int flags, int fd, off_t off), (at, len, prot, flags, fd, off),
     MAP_FAILED)
DOOR(MMAP, void *, mmap64, (void *at, size_t len, int prot, int flags, int fd, off64_t off),
     (at, len, prot, flags, fd, off), MAP_FAILED)
DOOR(MMAP, int, mprotect, (void *at, size_t len, int prot), (at, len, prot), -1)
DOOR(MMAP, int, madvise, (void *at, size_t len, int advice), (at, len, advice), -1)
DOOR(OPEN, int, socket, (int domain, int type, int protocol), (domain, type, protocol), -1)
DOOR(OPEN, int, accept4, (int fd, struct sockaddr *at, socklen_t *len, int flags), (fd, at, len, flags), -1)
DOOR(OPEN, int, eventfd, (unsigned count, int flags), (count, flags), -1)
DOOR(OPEN, int, memfd_create, (const char *name, unsigned flags), (name, flags), -1)
DOOR(STAT, int, fstat, (int fd, struct stat *st), (fd, st), -1)
DOOR(STAT, int, fstat64, (int fd, struct stat64 *st), (fd, st), -1)
DOOR(STAT, int, stat64, (const char *path, struct stat64 *st), (path, st), -1)
DOOR(STAT, int, lstat64, (const char *path, struct stat64 *st), (path, st), -1)
DOOR(STAT, int, fstatfs, (int fd, struct statfs *st), (fd, st), -1)
DOOR(STAT, int, statx, (int dir, const char *path, int flags, unsigned mask, struct statx *st),
     (dir, path, flags, mask, st), -1)
DOOR(STAT, ssize_t, readlink, (const char *path, char *buf, size_t len), (path, buf, len), -1)
DOOR(STAT, off_t, lseek, (int fd, off_t at, int whence), (fd, at, whence), -1)
DOOR(STAT, off64_t, lseek64, (int fd, off64_t at, int whence), (fd, at, whence), -1)
DOOR(SOCKET, int, bind, (int fd, const struct sockaddr *at, socklen_t len), (fd, at, len), -1)
DOOR(SOCKET, int, connect, (int fd, const struct sockaddr *at, socklen_t len), (fd, at, len), -1)
DOOR(SOCKET, int, listen, (int fd, int backlog), (fd, backlog), -1)
DOOR(SOCKET, int, getsockname, (int fd, struct sockaddr *at, socklen_t *len), (fd, at, len), -1)
DOOR(SOCKET, int, getsockopt, (int fd, int level, int name, void *value, socklen_t *len), (fd, level, name, value, len), -1)
DOOR(SOCKET, int, setsockopt, (int fd, int level, int name, const void *value, socklen_t len),
     (fd, level, name, value, len), -1)
DOOR(SOCKET, int, fchmod, (int fd, mode_t mode), (fd, mode), -1)
DOOR(THREAD, int, pthread_create,
     (pthread_t *thread, const pthread_attr_t *attr, void *(*body)(void *), void *opaque),
     (thread, attr, body, opaque), EAGAIN)

DOOR(OPEN, int, pipe2, (int fds[2], int flags), (fds, flags), -1)
DOOR(STAT, int, ftruncate64, (int fd, off64_t len), (fd, len), -1)
DOOR(SPAWN, int, posix_spawn_file_actions_init, (posix_spawn_file_actions_t *actions), (actions), ENOMEM)
DOOR(SPAWN, int, posix_spawn_file_actions_adddup2, (posix_spawn_file_actions_t *actions, int fd, int as),
     (actions, fd, as), ENOMEM)
DOOR(SPAWN, int, posix_spawn_file_actions_addclosefrom_np, (posix_spawn_file_actions_t *actions, int from),
     (actions, from), ENOMEM)
DOOR(SPAWN, int, posix_spawn,
     (pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions, const posix_spawnattr_t *attributes,
      char *const *argv, char *const *envp),
     (pid, path, actions, attributes, argv, envp), ENOMEM)

/* A child of ours is there to be waited for: only a signal can come in between. */
int door_waitid(idtype_t type, id_t id, siginfo_t *info, int options);
int door_waitid(idtype_t type, id_t id, siginfo_t *info, int options)
{
    if (!fails(SPAWN))
        return waitid(type, id, info, options);
    errno = EINTR;
    return -1;
}

/* Rust's standard library, too, goes through it. */
long door_syscall(long number, ...);
long door_syscall(long number, ...)
{
    va_list args;
    long a[6];

    va_start(args, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(args, long);
    va_end(args);
    return number == SYS_pidfd_open && fails(OPEN) ? -1 : syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int door_ioctl(int fd, unsigned long request, ...);
int door_ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    void *argument;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    return fails(IOCTL) ? -1 : ioctl(fd, request, argument);
}

int door_fcntl(int fd, int command, ...);
int door_fcntl(int fd, int command, ...)
{
    va_list args;
    long argument;

    va_start(args, command);
    argument = va_arg(args, long);
    va_end(args);
    return fails(command == F_DUPFD_CLOEXEC ? OPEN : SOCKET) ? -1 : fcntl(fd, command, argument);
}

#define DOOR_OPEN(name) \
    int door_##name(const char *path, int flags, ...); \
    int door_##name(const char *path, int flags, ...) \
    { \
        va_list args; \
        mode_t mode; \
        va_start(args, flags); \
        mode = va_arg(args, mode_t); \
        va_end(args); \
        return fails(OPEN) ? -1 : name(path, flags, mode); \
    }
DOOR_OPEN(open)
DOOR_OPEN(open64)
