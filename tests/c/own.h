/* A connection of the VMM's own making: unix sockets behind callbacks. `called` is asked first, and may have a callback
 * fail.                                                                                 SPDX: MIT OR Apache-2.0 */
#ifndef OWN_H
#define OWN_H
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <vmig.h>

typedef int own_called(void);

static inline int own_fd(void *conn)
{
    return (int)(intptr_t)conn - 1;
}

static inline void *own_conn(int fd)
{
    return (void *)(intptr_t)(fd + 1);
}

static inline int own_ask(void *opaque)
{
    return ((own_called *)(intptr_t)opaque)();
}

static inline int own_socket(const char *path, struct sockaddr_un *at)
{
    *at = (struct sockaddr_un){ .sun_family = AF_UNIX };
    snprintf(at->sun_path, sizeof at->sun_path, "%s", path);
    return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

static inline int own_connect(void *opaque, const char *address, int timeout_ms, void **conn)
{
    struct sockaddr_un at;
    int err = own_ask(opaque), fd = err ? -1 : own_socket(address, &at);

    (void)timeout_ms;
    if (fd < 0)
        return err ? err : -errno;
    if (connect(fd, (struct sockaddr *)&at, sizeof at) < 0) {
        err = -errno;
        close(fd);
        return err;
    }
    *conn = own_conn(fd);
    return 0;
}

static inline int own_listen(void *opaque, const char *address, void **listener)
{
    struct sockaddr_un at;
    int err = own_ask(opaque), fd = err ? -1 : own_socket(address, &at);

    if (fd < 0)
        return err ? err : -errno;
    unlink(address);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, 64) < 0) {
        err = -errno;
        close(fd);
        return err;
    }
    *listener = own_conn(fd);
    return 0;
}

static inline int own_wait(void *conn, short events, int timeout_ms)
{
    struct pollfd polled = { .fd = own_fd(conn), .events = events };

    return poll(&polled, 1, timeout_ms) > 0 ? 0 : -EAGAIN;
}

static inline int own_accept(void *opaque, void *listener, int timeout_ms, void **conn)
{
    /* Nobody there is no call that could fail. */
    int err = own_wait(listener, POLLIN, timeout_ms), fd;

    if (err || (err = own_ask(opaque)))
        return err;
    if ((fd = accept4(own_fd(listener), NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) < 0)
        return -errno;
    *conn = own_conn(fd);
    return 0;
}

static inline void own_unlisten(void *opaque, void *listener)
{
    (void)opaque;
    close(own_fd(listener));
}

static inline int64_t own_read(void *opaque, void *conn, void *buf, size_t len, int timeout_ms)
{
    int err = own_wait(conn, POLLIN, timeout_ms);
    ssize_t n;

    if (err || (err = own_ask(opaque)))
        return err;
    n = recv(own_fd(conn), buf, len, MSG_DONTWAIT);
    return n < 0 ? -errno : n;
}

static inline int64_t own_write(void *opaque, void *conn, const void *buf, size_t len, int timeout_ms)
{
    int err = own_wait(conn, POLLOUT, timeout_ms);
    ssize_t n;

    if (err || (err = own_ask(opaque)))
        return err;
    n = send(own_fd(conn), buf, len, MSG_DONTWAIT | MSG_NOSIGNAL);
    return n < 0 ? -errno : n;
}

static inline void own_shutdown(void *opaque, void *conn, int how)
{
    (void)opaque;
    shutdown(own_fd(conn), how == VMIG_SHUT_WRITE ? SHUT_WR : SHUT_RDWR);
}

static inline void own_close(void *opaque, void *conn)
{
    (void)opaque;
    close(own_fd(conn));
}

/* own:PATH is a URI from now on. */
static inline int own_add(vmig *m, own_called *called)
{
    vmig_channel_ops ops = VMIG_SIZED(vmig_channel_ops);

    ops.flags = VMIG_CHANNEL_MANY;
    ops.connect = own_connect, ops.listen = own_listen, ops.accept = own_accept, ops.unlisten = own_unlisten;
    ops.read = own_read, ops.write = own_write, ops.shutdown = own_shutdown, ops.close = own_close;
    return vmig_add_channel(m, "own", &ops, (void *)(intptr_t)called, NULL);
}
#endif
