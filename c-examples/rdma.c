/* Migration over RDMA: a channel of the VMM's own, from the rsockets of librdmacm.       SPDX: MIT OR Apache-2.0
 *
 *   make c RDMA=1                     (needs librdmacm's headers)
 *   rdma in  rdma:192.0.2.1:4444      waits for a guest's memory
 *   rdma out rdma:192.0.2.1:4444      sends it there
 *
 * UNTESTED on RDMA hardware: its authors had none. That it compiles is tested where the headers are; the callbacks'
 * contract is what tests/transports.rs and tests/c/channel.c run over socket pairs. Take add_rdma() into your VMM. */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <rdma/rsocket.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <vmig.h>

/* A connection or a listener: its rsocket, plus one, so that 0 is none. */
static int fd_of(void *conn)
{
    return (int)(intptr_t)conn - 1;
}

static void *conn_of(int fd)
{
    return (void *)(intptr_t)(fd + 1);
}

/* HOST:PORT */
static struct addrinfo *find(const char *address, int flags)
{
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = flags }, *found = NULL;
    char host[256];
    const char *port = strrchr(address, ':');

    if (!port || (size_t)(port - address) >= sizeof host)
        return NULL;
    memcpy(host, address, (size_t)(port - address));
    host[port - address] = '\0';
    return getaddrinfo(host, port + 1, &hints, &found) == 0 ? found : NULL;
}

static int new_socket(const struct addrinfo *a)
{
    int fd = rsocket(a->ai_family, SOCK_STREAM, 0);

    if (fd >= 0 && rfcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        int err = errno;
        rclose(fd);
        errno = err;
        return -1;
    }
    return fd;
}

/* 1: ready; 0: not in time; or a negative errno. */
static int await(int fd, short events, int timeout_ms)
{
    struct pollfd polled = { .fd = fd, .events = events };
    int n = rpoll(&polled, 1, timeout_ms);

    return n < 0 ? -errno : n;
}

/* The first call begins; this and further ones wait for the end of it. */
static int connect_rdma(void *opaque, const char *address, int timeout_ms, void **conn)
{
    int ready, err = 0;
    socklen_t len = sizeof err;

    (void)opaque;
    if (!*conn) {
        struct addrinfo *a = find(address, 0);
        int fd, failed;

        if (!a)
            return -EHOSTUNREACH;
        fd = new_socket(a);
        failed = fd < 0 || (rconnect(fd, a->ai_addr, a->ai_addrlen) < 0 && errno != EINPROGRESS) ? errno : 0;
        freeaddrinfo(a);
        if (fd >= 0)
            *conn = conn_of(fd);
        if (failed)
            return -failed;
    }
    ready = await(fd_of(*conn), POLLOUT, timeout_ms);
    if (ready <= 0)
        return ready < 0 ? ready : -EAGAIN;
    if (rgetsockopt(fd_of(*conn), SOL_SOCKET, SO_ERROR, &err, &len) < 0)
        return -errno;
    return -err;
}

static int listen_rdma(void *opaque, const char *address, void **listener)
{
    struct addrinfo *a = find(address, AI_PASSIVE);
    int fd, err = 0;

    (void)opaque;
    if (!a)
        return -EHOSTUNREACH;
    fd = new_socket(a);
    if (fd < 0 || rbind(fd, a->ai_addr, a->ai_addrlen) < 0 || rlisten(fd, 80) < 0)
        err = errno;
    freeaddrinfo(a);
    if (err && fd >= 0)
        rclose(fd);
    if (!err)
        *listener = conn_of(fd);
    return -err;
}

static int accept_rdma(void *opaque, void *listener, int timeout_ms, void **conn)
{
    int ready = await(fd_of(listener), POLLIN, timeout_ms), fd;

    (void)opaque;
    if (ready <= 0)
        return ready < 0 ? ready : -EAGAIN;
    fd = raccept(fd_of(listener), NULL, NULL);
    if (fd < 0)
        return -errno;
    if (rfcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        int err = errno;
        rclose(fd);
        return -err;
    }
    *conn = conn_of(fd);
    return 0;
}

static void close_rdma(void *opaque, void *conn)
{
    (void)opaque;
    rclose(fd_of(conn));
}

static int64_t read_rdma(void *opaque, void *conn, void *buf, size_t len, int timeout_ms)
{
    int ready = await(fd_of(conn), POLLIN, timeout_ms);
    ssize_t n;

    (void)opaque;
    if (ready <= 0)
        return ready < 0 ? ready : -EAGAIN;
    n = rrecv(fd_of(conn), buf, len, 0);
    return n < 0 ? -errno : n;
}

static int64_t write_rdma(void *opaque, void *conn, const void *buf, size_t len, int timeout_ms)
{
    int ready = await(fd_of(conn), POLLOUT, timeout_ms);
    ssize_t n;

    (void)opaque;
    if (ready <= 0)
        return ready < 0 ? ready : -EAGAIN;
    n = rsend(fd_of(conn), buf, len, 0);
    return n < 0 ? -errno : n;
}

/* Wakes nobody by itself: reads and writes come back by their time limit, which is short. */
static void shutdown_rdma(void *opaque, void *conn, int how)
{
    (void)opaque;
    rshutdown(fd_of(conn), how == VMIG_SHUT_WRITE ? SHUT_WR : SHUT_RDWR);
}

/* From here on rdma:HOST:PORT is a URI of this guest. */
static int add_rdma(vmig *m)
{
    vmig_channel_ops ops = VMIG_SIZED(vmig_channel_ops);

    ops.flags = VMIG_CHANNEL_MANY;
    ops.connect = connect_rdma, ops.listen = listen_rdma, ops.accept = accept_rdma, ops.unlisten = close_rdma;
    ops.read = read_rdma, ops.write = write_rdma, ops.shutdown = shutdown_rdma, ops.close = close_rdma;
    return vmig_add_channel(m, "rdma", &ops, NULL, NULL);
}

/* ---- a guest that is only memory --------------------------------------------------------------------------------- */

enum { RAM_BYTES = 64 << 20 };

static int stand(void *vm)
{
    (void)vm;
    return 0;
}

static int make(vmig **m)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    int err;

    ram.host = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram.host == MAP_FAILED)
        return -errno;
    ops.stop = stand, ops.start = stand;
    ram.name = "ram", ram.len = RAM_BYTES, ram.flags = VMIG_RAM_MARKED;
    if ((err = vmig_new(&ops, NULL, m)) < 0)
        return err;
    vmig_bql_lock(*m);
    err = vmig_add_ram(*m, &ram);
    vmig_bql_unlock(*m);
    return err < 0 ? err : add_rdma(*m);
}

int main(int argc, char **argv)
{
    vmig_status status = VMIG_SIZED(vmig_status);
    vmig *m = NULL;
    int out = argc == 3 && strcmp(argv[1], "out") == 0, err;

    if (argc != 3 || (!out && strcmp(argv[1], "in") != 0))
        return fprintf(stderr, "usage: rdma in|out rdma:HOST:PORT\n"), 2;
    if ((err = make(&m)) < 0 || (err = out ? vmig_outgoing(m, argv[2]) : vmig_incoming(m, argv[2])) < 0)
        return fprintf(stderr, "rdma: %s\n", vmig_errmsg()), vmig_free(m), 1;
    vmig_wait(m, -1);
    vmig_get_status(m, &status);
    printf("%s\n", vmig_state_name(status.state));
    vmig_free(m);
    return status.state == VMIG_STATE_COMPLETED ? 0 : 1;
}
