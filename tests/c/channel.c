/* Migrations over connections of the VMM's own making: callbacks over socket pairs, with an exchange where those who
 * connect find those who listen. The callbacks can be told to misbehave.                SPDX: MIT OR Apache-2.0 */
#include "guest.h"

enum { BACKLOG = 16, MANY = VMIG_CHANNEL_MANY };

struct listener {
    char address[32];
    int waiting[BACKLOG], count;
    struct listener *next;
};

/* What may go wrong; reset for every case. */
static struct {
    bool small;                         /* few bytes at a time, and every third call in vain */
    long cut_after, hush_after;         /* bytes written by anybody until the connections break, or fall silent */
    int refuse;                         /* errno of connect */
    bool slow;                          /* connect never comes to an end */
    bool liar;                          /* read says that it read more than there was room for */
} plot;

static pthread_mutex_t exchange = PTHREAD_MUTEX_INITIALIZER;
static struct listener *listeners;
static unsigned calls, opened, closed, destroyed, unlistened, connected;
static long written;

static int nap(int timeout_ms)
{
    usleep((useconds_t)timeout_ms * 1000);
    return -EAGAIN;
}

static void *conn_of(int fd)
{
    __atomic_add_fetch(&opened, 1, __ATOMIC_SEQ_CST);
    return (void *)(intptr_t)(fd + 1);
}

static int fd_of(void *conn)
{
    return (int)(intptr_t)conn - 1;
}

static struct listener *find(const char *address)
{
    struct listener *l = listeners;

    while (l && strcmp(l->address, address))
        l = l->next;
    return l;
}

static int pair_connect(void *opaque, const char *address, int timeout_ms, void **conn)
{
    int fds[2], err = -ECONNREFUSED;
    struct listener *l;

    CHECK(opaque == &plot && timeout_ms >= 0 && timeout_ms <= 50, "connect is asked for at most 50 ms: %d", timeout_ms);
    if (plot.refuse)
        return -plot.refuse;
    if (!*conn) {                       /* begins with the first call, and ends with the second */
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
        pthread_mutex_lock(&exchange);
        if ((l = find(address)) && l->count < BACKLOG)
            l->waiting[l->count++] = fds[1], err = -EAGAIN;
        pthread_mutex_unlock(&exchange);
        if (err != -EAGAIN)
            return close(fds[0]), close(fds[1]), err;
        *conn = conn_of(fds[0]);
        return nap(1);
    }
    if (plot.slow)
        return nap(timeout_ms);
    __atomic_add_fetch(&connected, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static int pair_listen(void *opaque, const char *address, void **listener)
{
    struct listener *l = calloc(1, sizeof *l);

    CHECK(l && opaque == &plot, "listen");
    snprintf(l->address, sizeof l->address, "%s", address);
    pthread_mutex_lock(&exchange);
    if (find(address)) {
        pthread_mutex_unlock(&exchange);
        free(l);
        return -EADDRINUSE;
    }
    l->next = listeners, listeners = l;
    pthread_mutex_unlock(&exchange);
    *listener = l;
    return 0;
}

static int pair_accept(void *opaque, void *listener, int timeout_ms, void **conn)
{
    struct listener *l = listener;
    int fd = -1;

    CHECK(opaque == &plot && timeout_ms <= 50, "accept");
    pthread_mutex_lock(&exchange);
    if (l->count > 0) {
        fd = l->waiting[0];
        memmove(l->waiting, l->waiting + 1, sizeof *l->waiting * (size_t)--l->count);
    }
    pthread_mutex_unlock(&exchange);
    if (fd < 0)
        return nap(timeout_ms);
    *conn = conn_of(fd);
    return 0;
}

static void pair_unlisten(void *opaque, void *listener)
{
    struct listener *l = listener, **at = &listeners;

    CHECK(opaque == &plot, "unlisten");
    pthread_mutex_lock(&exchange);
    while (*at != l)
        at = &(*at)->next;
    *at = l->next;
    pthread_mutex_unlock(&exchange);
    for (int i = 0; i < l->count; i++)
        close(l->waiting[i]);
    free(l);
    __atomic_add_fetch(&unlistened, 1, __ATOMIC_SEQ_CST);
}

/* 0: go on; else what the callback returns. */
static int64_t misbehave(size_t *len, int timeout_ms)
{
    long so_far = __atomic_load_n(&written, __ATOMIC_SEQ_CST);

    CHECK(*len > 0 && timeout_ms >= 0 && timeout_ms <= 50, "%zu bytes in %d ms", *len, timeout_ms);
    if (plot.cut_after && so_far >= plot.cut_after)
        return -ECONNRESET;
    if (plot.hush_after && so_far >= plot.hush_after)
        return nap(timeout_ms);
    if (plot.small && __atomic_fetch_add(&calls, 1, __ATOMIC_SEQ_CST) % 3 == 0)
        return calls % 2 ? -EINTR : -EAGAIN;
    if (plot.small && *len > 100)
        *len = 100;
    return 0;
}

static int64_t pair_read(void *opaque, void *conn, void *buf, size_t len, int timeout_ms)
{
    struct pollfd polled = { .fd = fd_of(conn), .events = POLLIN };
    int64_t err = misbehave(&len, timeout_ms);
    ssize_t n;

    CHECK(opaque == &plot, "read");
    if (err)
        return err;
    if (poll(&polled, 1, timeout_ms) <= 0)
        return -EAGAIN;
    n = recv(fd_of(conn), buf, len, MSG_DONTWAIT);
    return n < 0 ? -errno : plot.liar ? (int64_t)len + 1 : n;
}

static int64_t pair_write(void *opaque, void *conn, const void *buf, size_t len, int timeout_ms)
{
    struct pollfd polled = { .fd = fd_of(conn), .events = POLLOUT };
    int64_t err = misbehave(&len, timeout_ms);
    ssize_t n;

    CHECK(opaque == &plot, "write");
    if (err)
        return err;
    if (poll(&polled, 1, timeout_ms) <= 0)
        return -EAGAIN;
    n = send(fd_of(conn), buf, len, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0)
        __atomic_add_fetch(&written, n, __ATOMIC_SEQ_CST);
    return n < 0 ? -errno : n;
}

static void pair_shutdown(void *opaque, void *conn, int how)
{
    CHECK(opaque == &plot && (how == VMIG_SHUT_WRITE || how == VMIG_SHUT_BOTH), "shutdown(%d)", how);
    shutdown(fd_of(conn), how == VMIG_SHUT_WRITE ? SHUT_WR : SHUT_RDWR);
}

static void pair_close(void *opaque, void *conn)
{
    CHECK(opaque == &plot && destroyed < 2, "close comes before destroy");
    close(fd_of(conn));
    __atomic_add_fetch(&closed, 1, __ATOMIC_SEQ_CST);
}

static void pair_gone(void *opaque)
{
    CHECK(opaque == &plot, "destroy");
    __atomic_add_fetch(&destroyed, 1, __ATOMIC_SEQ_CST);
}

static vmig_channel_ops pair_ops(uint32_t flags)
{
    vmig_channel_ops ops = VMIG_SIZED(vmig_channel_ops);

    ops.flags = flags;
    ops.connect = pair_connect, ops.listen = pair_listen, ops.accept = pair_accept, ops.unlisten = pair_unlisten;
    ops.read = pair_read, ops.write = pair_write, ops.shutdown = pair_shutdown, ops.close = pair_close;
    return ops;
}

/* ---- cases ------------------------------------------------------------------------------------------------------- */

static struct guest src, dst;

static unsigned open_fds(void)
{
    unsigned n = 0;

    for (int fd = 0; fd < 1024; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static void begin(uint32_t flags)
{
    vmig_channel_ops ops = pair_ops(flags);

    memset(&plot, 0, sizeof plot);
    opened = closed = destroyed = unlistened = connected = 0, written = 0;
    guest_new(&src, NULL, 9), guest_new(&dst, NULL, 0);
    CHECK(vmig_add_channel(src.m, "pair", &ops, &plot, pair_gone) == 0, "add at the source");
    CHECK(vmig_add_channel(dst.m, "pair", &ops, &plot, pair_gone) == 0, "add at the destination");
    CHECK(vmig_start(src.m) == 0, "start");
}

static void end(void)
{
    guest_free(&src), guest_free(&dst);
    CHECK(opened == closed, "%u opened, %u closed", opened, closed);
    CHECK(destroyed == 2 && !listeners, "destroyed %u times", destroyed);
}

static void go(void)
{
    CHECK(vmig_incoming(dst.m, "pair:a") == 0, "incoming");
    CHECK(vmig_outgoing(src.m, "pair:a") == 0, "outgoing");
    end_pair(&src, &dst);
}

static void expect(uint32_t source, uint32_t destination, const char *words)
{
    char *error = vmig_get_error(src.m), *other = vmig_get_error(dst.m);

    CHECK(state_of(&src) == source, "source: %s (%s; %s)", vmig_state_name(state_of(&src)), error, other);
    CHECK(state_of(&dst) == destination, "destination: %s (%s)", vmig_state_name(state_of(&dst)), other);
    CHECK(!words || (error && strstr(error, words)), "'%s' in: %s", words, error);
    vmig_string_free(error), vmig_string_free(other);
    if (source == VMIG_STATE_COMPLETED)
        CHECK(guest_hash(&src) == dst.arrival_hash && counts_on(&dst), "it arrived as it was");
    else
        CHECK(counts_on(&src), "it runs on");
}

static void case_moves(void)
{
    for (int way = 0; way < 4; way++) {
        begin(way & 1 ? MANY : 0);
        plot.small = way & 2;
        CHECK(vmig_set(src.m, "multifd-channels", "3") == 0 && vmig_set(src.m, "checksum", "crc32c") == 0, "options");
        go();
        expect(VMIG_STATE_COMPLETED, VMIG_STATE_COMPLETED, NULL);
        CHECK(connected == (way & 1 ? 4u : 1u), "%u connections", connected);
        end();
        CHECK(unlistened == 1, "unlisten comes once");
    }
}

/* The address can be used again, a question is answered there, and somebody who comes too late is told so. */
static void case_address(void)
{
    struct guest third;
    vmig_channel_ops ops = pair_ops(MANY);
    char *found;

    begin(MANY);
    guest_new(&third, NULL, 5);
    CHECK(vmig_add_channel(third.m, "pair", &ops, &plot, pair_gone) == 0 && vmig_start(third.m) == 0, "a third");
    CHECK(vmig_incoming(dst.m, "pair:a") == 0, "incoming");
    CHECK((found = vmig_get(dst.m, "listen-address")) && !strcmp(found, "pair:a"), "listens at %s", found);
    vmig_string_free(found);
    CHECK(vmig_incoming(third.m, "pair:a") == -EADDRINUSE, "taken");
    CHECK(vmig_check(src.m, "pair:a", NULL, NULL) == 0, "a question");
    CHECK(vmig_set(src.m, "max-bandwidth", "20K") == 0 && vmig_outgoing(src.m, "pair:a") == 0, "slowly");
    for (int i = 0; i < WAIT_MS && state_of(&src) != VMIG_STATE_ACTIVE; i++)
        usleep(1000);
    CHECK(vmig_outgoing(third.m, "pair:a") == 0 && vmig_wait(third.m, WAIT_MS) == 1, "too late");
    CHECK((found = vmig_get_error(third.m)) && strstr(found, "another guest is arriving"), "%s", found);
    vmig_string_free(found);
    CHECK(vmig_set(src.m, "max-bandwidth", "0") == 0, "fast");
    end_pair(&src, &dst);
    expect(VMIG_STATE_COMPLETED, VMIG_STATE_COMPLETED, NULL);
    guest_free(&third);
    destroyed--;
    end();
}

/* A destination that lost a connection before it heard anything waits for the next one. */
static void end_either(void)
{
    CHECK(vmig_wait(src.m, WAIT_MS) == 1, "the source ends");
    if (state_of(&dst) == VMIG_STATE_SETUP)
        CHECK(vmig_cancel(dst.m) == 0, "nobody else comes");
    CHECK(vmig_wait(dst.m, WAIT_MS) == 1, "the destination ends");
}

static void case_breaks(void)
{
    unsigned broken = 0;

    /* In the hello, in the pages, near the end. */
    for (long at = 100; at < 60000; at += 7001) {
        begin(MANY);
        plot.cut_after = at;
        CHECK(vmig_set(src.m, "switchover-timeout", "100") == 0 && vmig_set(dst.m, "switchover-timeout", "100") == 0, "t");
        CHECK(vmig_set(dst.m, "connect-timeout", "300") == 0, "for channels that do not come");
        CHECK(vmig_incoming(dst.m, "pair:a") == 0 && vmig_outgoing(src.m, "pair:a") == 0, "begin");
        end_either();
        if (state_of(&src) == VMIG_STATE_FAILED) {
            char *error = vmig_get_error(src.m);
            CHECK(error && strstr(error, "Connection reset") && counts_on(&src), "cut at %ld: %s", at, error);
            vmig_string_free(error), broken++;
        }
        end();
    }
    CHECK(broken > 2, "only %u broke", broken);
}

/* The migration goes on over another connection, at the address that is named meanwhile. */
static void case_resume(void)
{
    vmig_channel_ops ops = pair_ops(0);

    for (int channels = 0; channels < 3; channels += 2) {
        begin(MANY);
        CHECK(vmig_set(src.m, "resume-timeout", "60000") == 0, "option");
        CHECK(vmig_set(src.m, "multifd-channels", channels ? "2" : "0") == 0, "channels");
        CHECK(vmig_add_channel(src.m, "single", &ops, &plot, NULL) == 0, "of which there is one");
        plot.cut_after = 30000;
        CHECK(vmig_incoming(dst.m, "pair:a") == 0 && vmig_outgoing(src.m, "pair:a") == 0, "begin");
        for (int i = 0; i < WAIT_MS && state_of(&src) != VMIG_STATE_RECONNECTING; i++)
            usleep(1000);
        CHECK(vmig_resume(src.m, "single:a") == -EINVAL && strstr(vmig_errmsg(), "at an address"), "%s", vmig_errmsg());
        CHECK(vmig_resume(src.m, "pair:nobody") == 0, "nobody there");
        plot.cut_after = 0;
        CHECK(vmig_resume(src.m, "pair:a") == 0, "here it is");
        end_pair(&src, &dst);
        expect(VMIG_STATE_COMPLETED, VMIG_STATE_COMPLETED, NULL);
        end();
    }
}

static void case_errors(void)
{
    vmig_channel_ops ops = pair_ops(0);
    char *error;

    begin(0);
    CHECK(vmig_outgoing(src.m, "pair:nobody") == 0 && vmig_wait(src.m, WAIT_MS) == 1, "nobody there");
    expect(VMIG_STATE_FAILED, VMIG_STATE_NONE, "connecting to pair:nobody: callback 'connect' of channel 'pair'");
    plot.refuse = ENETDOWN;
    CHECK(vmig_outgoing(src.m, "pair:a") == 0 && vmig_wait(src.m, WAIT_MS) == 1, "refused");
    expect(VMIG_STATE_FAILED, VMIG_STATE_NONE, "Network is down");
    plot.refuse = 0, plot.slow = true;
    CHECK(vmig_incoming(dst.m, "pair:a") == 0 && vmig_set(src.m, "connect-timeout", "100") == 0, "slow");
    CHECK(vmig_outgoing(src.m, "pair:a") == 0 && vmig_wait(src.m, WAIT_MS) == 1, "slow");
    expect(VMIG_STATE_FAILED, VMIG_STATE_SETUP, "no answer within 0.1 seconds (option 'connect-timeout')");
    plot.slow = false, plot.liar = true;
    CHECK(vmig_outgoing(src.m, "pair:a") == 0, "lies");
    end_either();
    error = vmig_get_error(src.m);
    CHECK(state_of(&src) == VMIG_STATE_FAILED && counts_on(&src), "a liar moves nothing: %s", error);
    vmig_string_free(error);
    end();

    begin(0);
    plot.hush_after = 3000;
    CHECK(vmig_set(src.m, "stall-timeout", "100") == 0 && vmig_set(dst.m, "stall-timeout", "100") == 0, "stall");
    go();
    expect(VMIG_STATE_FAILED, VMIG_STATE_FAILED, "option 'stall-timeout'");
    CHECK(vmig_add_channel(src.m, "pair", &ops, &plot, pair_gone) == -EEXIST, "twice");
    CHECK(vmig_add_channel(src.m, "tcp", &ops, &plot, pair_gone) == -EEXIST, "ours");
    CHECK(vmig_add_channel(src.m, "Pair", &ops, &plot, pair_gone) == -EINVAL, "a name");
    CHECK(vmig_outgoing(src.m, "trio:a") == -EINVAL && strstr(vmig_errmsg(), "protocol 'trio'"), "unknown");
    ops.unlisten = NULL;
    CHECK(vmig_add_channel(src.m, "half", &ops, &plot, pair_gone) == -EINVAL, "half a listener");
    ops.listen = NULL, ops.accept = NULL;
    CHECK(vmig_add_channel(src.m, "half", &ops, NULL, NULL) == 0, "one that only connects");
    CHECK(vmig_incoming(dst.m, "pair:b") == 0 && vmig_cancel(dst.m) == 0 && vmig_wait(dst.m, WAIT_MS) == 1, "cancelled");
    CHECK(!listeners, "not listened any more");
    ops.read = NULL;
    CHECK(vmig_add_channel(src.m, "mute", &ops, NULL, NULL) == -EINVAL, "no read");
    CHECK(destroyed == 0, "what failed was not taken");
    end();
}

/* Freed in the middle, whatever is going on. */
static void case_freed(void)
{
    unsigned before = open_fds();

    for (int way = 0; way < 8; way++) {
        begin(way & 1 ? MANY : 0);
        plot.slow = way == 6, plot.hush_after = way == 4 ? 500 : 0;
        CHECK(vmig_set(src.m, "max-bandwidth", "20K") == 0 && vmig_incoming(dst.m, "pair:a") == 0, "slowly");
        if (way != 7)
            CHECK(vmig_outgoing(src.m, "pair:a") == 0, "outgoing");
        usleep((useconds_t)way * 10000);
        if (way & 2)
            CHECK(vmig_cancel(src.m) == 0 && vmig_wait(src.m, WAIT_MS) == 1, "cancel");
        end();
    }
    CHECK(open_fds() == before, "%u fds before, %u after", before, open_fds());
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";

    if (!strcmp(name, "moves"))
        case_moves();
    else if (!strcmp(name, "address"))
        case_address();
    else if (!strcmp(name, "breaks"))
        case_breaks();
    else if (!strcmp(name, "resume"))
        case_resume();
    else if (!strcmp(name, "errors"))
        case_errors();
    else if (!strcmp(name, "freed"))
        case_freed();
    else
        return 2;
    printf("%s done\n", name);
    return 0;
}
