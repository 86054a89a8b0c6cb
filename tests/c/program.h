/* What the test programs share: commands on standard input, one reply each, as in c-examples/vmm. Lines that begin with
 * "note" or "event" come unasked.                                                       SPDX: MIT OR Apache-2.0 */
#ifndef PROGRAM_H
#define PROGRAM_H
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vmig.h>

static inline void need(int err, const char *what)
{
    if (err >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, vmig_errmsg());
    exit(1);
}

/* Reserved before guest RAM, and so above it, and given back before a part of RAM is unmapped: the kernel maps what is new at
 * the highest place with room, so nothing comes to lie in the hole. */
static inline void unmap_hole(void *at, size_t len)
{
    static void *room;
    const size_t bytes = (size_t)1 << 30;

    if (!at) {
        room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return;
    }
    if (room != MAP_FAILED)
        munmap(room, bytes);
    room = MAP_FAILED;
    munmap(at, len);
}

static inline void answer(const char *verb, int err)
{
    if (err < 0)
        printf("error %s: %s\n", verb, vmig_errmsg());
    else
        printf("ok\n");
}

static inline void answer_text(char *text)
{
    printf("value %s\n", text ? text : "none");
    vmig_string_free(text);
}

static inline void answer_status(vmig *m)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    need(vmig_get_status(m, &s), "status");
    printf("status state=%s iteration=%" PRIu64 " total=%" PRIu64 " remaining=%" PRIu64 " sent=%" PRIu64 " normal=%" PRIu64
           " zero=%" PRIu64 " stop=%" PRIu64 " downtime=%" PRIu64 " over=%d\n", vmig_state_name(s.state), s.iteration,
           s.total, s.remaining, s.transferred, s.normal_pages, s.zero_pages, s.stop, s.downtime,
           vmig_wait(m, 0));
}

/* How long GO and its answer were to be under way, and were. */
static inline void answer_go(vmig *m)
{
    vmig_downtime expected = VMIG_SIZED(vmig_downtime), actual = VMIG_SIZED(vmig_downtime);

    need(vmig_get_expected_downtime(m, &expected), "expected downtime");
    need(vmig_get_downtime(m, &actual), "downtime");
    printf("value %" PRIu64 " %" PRIu64 "\n", expected.go, actual.go);
}

/* How slow the guest is made, and why. */
static inline void answer_slow(vmig *m)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    need(vmig_get_status(m, &s), "status");
    printf("slow throttle=%" PRIu64 " dirty-limit=%" PRIu64 " downtime-limit=%" PRIu64 " ladder=%" PRIu64 "\n", s.throttle,
           s.dirty_limit, s.downtime_limit / 1000000, s.ladder);
}

static inline void answer_listening(vmig *m, const char *uri)
{
    char *address;

    if (vmig_incoming(m, uri) < 0) {
        answer("incoming", -1);
        return;
    }
    address = vmig_get(m, "listen-address");
    printf("listening %s\n", address ? address : uri);
    vmig_string_free(address);
}

static inline void answer_compare(vmig *m, const char *uri)
{
    char *list = NULL;
    int count = vmig_check(m, uri, NULL, &list);

    if (count < 0)
        answer("check", count);
    else
        printf("value %d %s\n", count, list);
    vmig_string_free(list);
}

static inline void answer_measure(vmig *m, char *rest)
{
    char *mode = strsep(&rest, " "), *ms = strsep(&rest, " ");

    answer("measure", vmig_measure_dirty_rate(m, (uint32_t)atoi(mode), ms ? strtoull(ms, NULL, 10) : 0,
                                              rest ? strtoull(rest, NULL, 10) : 0));
}

static inline void answer_rate(vmig *m)
{
    vmig_dirty_rate r = VMIG_SIZED(vmig_dirty_rate);
    uint64_t vcpu[16];
    char *why;
    int vcpus;

    need(vmig_get_dirty_rate(m, &r, &why), "rate");
    need(vcpus = vmig_get_vcpu_dirty_rates(m, vcpu, 16), "vcpu rates");
    printf("rate state=%" PRIu32 " mode=%" PRIu32 " period=%" PRIu64 " samples=%" PRIu64 " rate=%" PRIu64 " set=%" PRIu64
           " content=%" PRIu64 " complete=%" PRIu32 " steady=%" PRIu32 " vcpus=%" PRIu64, r.state, r.mode, r.period_ms,
           r.sample_pages, r.rate, r.working_set, r.content, r.complete, r.steady, r.vcpus);
    for (int i = 0; i < vcpus && i < 16; i++)
        printf(" vcpu.%d=%" PRIu64, i, vcpu[i]);
    printf(" why %s\n", why ? why : "none");
    vmig_string_free(why);
}

static inline void answer_forecast(vmig *m, const char *bandwidth)
{
    vmig_forecast_report f = VMIG_SIZED(vmig_forecast_report);
    char *why;

    need(vmig_forecast(m, bandwidth ? strtoull(bandwidth, NULL, 10) : 0, &f, &why), "forecast");
    printf("forecast verdict=%" PRIu32 " throttle=%" PRIu32 " total=%" PRIu64 " rounds=%" PRIu64 " blackout=%" PRIu64
           " left=%" PRIu64 " sent=%" PRIu64 " why %s\n", f.verdict, f.throttle, f.total, f.rounds, f.blackout, f.left,
           f.sent, why);
    vmig_string_free(why);
}

static inline void set_option(vmig *m, char *rest)
{
    char *value = rest, *name = strsep(&value, " ");

    answer("set", vmig_set(m, name, value));
}

/* What every program can be told; false: not one of these. */
static inline bool common_command(vmig *m, const char *verb, char *rest)
{
    if (strcmp(verb, "migrate") == 0)
        answer(verb, vmig_outgoing(m, rest));
    else if (strcmp(verb, "incoming") == 0)
        answer_listening(m, rest);
    else if (strcmp(verb, "compare") == 0)
        answer_compare(m, rest);
    else if (strcmp(verb, "cancel") == 0)
        answer(verb, vmig_cancel(m));
    else if (strcmp(verb, "pause") == 0)
        answer(verb, vmig_stop(m));
    else if (strcmp(verb, "resume") == 0)
        answer(verb, vmig_start(m));
    else if (strcmp(verb, "status") == 0)
        answer_status(m);
    else if (strcmp(verb, "slow") == 0)
        answer_slow(m);
    else if (strcmp(verb, "go") == 0)
        answer_go(m);
    else if (strcmp(verb, "error") == 0)
        answer_text(vmig_get_error(m));
    else if (strcmp(verb, "qmp") == 0 && rest)
        answer_text(vmig_qmp(m, rest));
    else if (strcmp(verb, "measure") == 0 && rest)
        answer_measure(m, rest);
    else if (strcmp(verb, "rate") == 0)
        answer_rate(m);
    else if (strcmp(verb, "forecast") == 0)
        answer_forecast(m, rest);
    else if (strcmp(verb, "set") == 0 && rest)
        set_option(m, rest);
    else
        return false;
    return true;
}

/* Obeys until "quit" or the end of the input; own() takes what is not common and returns false for what it, too, does
 * not know. */
static inline void serve(vmig *m, bool (*own)(void *opaque, const char *verb, char *rest), void *opaque)
{
    char line[512];

    while (fgets(line, sizeof line, stdin)) {
        char *rest = line, *verb;
        line[strcspn(line, "\n")] = '\0';
        verb = strsep(&rest, " ");
        if (strcmp(verb, "quit") == 0)
            return;
        if (!own(opaque, verb, rest) && !common_command(m, verb, rest))
            printf("error %s: no such command\n", verb);
    }
}

/* Obeys the whole lines that came, without stdio between us and poll(2); false: it is over. */
static inline bool obey_input(vmig *m, bool (*own)(void *opaque, const char *verb, char *rest), void *opaque)
{
    static char line[512];
    static size_t have;
    ssize_t got = read(0, line + have, sizeof line - 1 - have);
    char *end;

    if (got <= 0)
        return false;
    line[have += (size_t)got] = '\0';
    while ((end = strchr(line, '\n'))) {
        char *rest = line, *verb;
        *end = '\0';
        verb = strsep(&rest, " ");
        if (strcmp(verb, "quit") == 0)
            return false;
        if (!own(opaque, verb, rest) && !common_command(m, verb, rest))
            printf("error %s: no such command\n", verb);
        have -= (size_t)(end + 1 - line);
        memmove(line, end + 1, have + 1);
    }
    return true;
}

/* One turn of a loop with dispatch=manual: waits for commands and callbacks, as poll(2) does, and serves them. */
static inline bool serve_some(vmig *m, bool (*own)(void *opaque, const char *verb, char *rest), void *opaque, int wait_ms)
{
    struct pollfd fds[] = { { .fd = 0, .events = POLLIN }, { .fd = vmig_dispatch_fd(m), .events = POLLIN } };

    if (poll(fds, 2, wait_ms) < 0)
        return errno == EINTR;
    if (fds[0].revents && !obey_input(m, own, opaque))
        return false;
    if (fds[1].revents)
        need(vmig_dispatch(m), "dispatch");
    return true;
}

static inline uint64_t hash_bytes(const void *bytes, uint64_t len)
{
    const uint64_t *word = bytes;
    uint64_t hash = 0x9e3779b97f4a7c15;

    for (uint64_t i = 0; i < len / 8; i++)
        hash = (hash ^ word[i]) * 0xff51afd7ed558ccd, hash ^= hash >> 29;
    return hash;
}

static inline void *map_ram(uint64_t len)
{
    void *host = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (host == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return host;
}
#endif
