/* Two VMM processes, driven over their line protocol and watched through their events. SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "harness.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { REPLY_MS = 10000, QUIT_MS = 20000, POLL_MS = 100 };

struct peer source = { .name = "source", .in = -1, .out = -1, .events = -1 };
struct peer destination = { .name = "destination", .in = -1, .out = -1, .events = -1 };
struct peer *const peers[2] = { &source, &destination };
volatile sig_atomic_t interrupted;

uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void spawn(struct peer *p, const char **argv, bool with_events)
{
    int in[2], from[2], events[2] = { -1, -1 };
    char events_text[16];

    if (pipe2(in, O_CLOEXEC) < 0 || pipe2(from, O_CLOEXEC) < 0 || (with_events && pipe2(events, O_CLOEXEC) < 0))
        fail("pipe: %s", strerror(errno));
    p->pid = fork();
    if (p->pid < 0)
        fail("fork: %s", strerror(errno));
    if (p->pid == 0) {
        /* A child that outlives us ends by itself: its standard input ends. */
        if (dup2(in[0], 0) < 0 || dup2(from[1], 1) < 0 || (with_events && fcntl(events[1], F_SETFD, 0) < 0))
            _exit(126);
        snprintf(events_text, sizeof events_text, "%d", events[1]);
        for (const char **a = argv; *a; a++)
            if (strcmp(*a, "EVENTS") == 0)
                *a = events_text;
        execv(argv[0], (char *const *)(uintptr_t)argv);
        fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
        _exit(127);
    }
    close(in[0]), close(from[1]);
    p->in = in[1], p->out = from[0], p->events = events[0];
    if (with_events) {
        close(events[1]);
        fcntl(events[0], F_SETPIPE_SZ, 1 << 20);        /* no vCPU waits while we are busy; best effort */
    }
}

static void on_beat(struct vcpu_view *v, uint64_t at)
{
    if (!v->first_beat)
        v->first_beat = at;
    else if (at - v->last_beat > v->longest_gap)
        v->longest_gap = at - v->last_beat;
    v->last_beat = at;
}

static void on_generation(struct vcpu_view *v, uint32_t generation, uint32_t pages, uint32_t ticks)
{
    if (!v->first_generation)
        v->first_generation = generation, v->first_ticks = ticks;
    else if (generation != v->last_generation + 1 || ticks < v->last_ticks)
        v->gap = true;
    v->last_generation = generation;
    v->last_ticks = ticks;
    v->verified += pages;
}

static void on_event(struct peer *p, const char *line)
{
    char what[32], where[32], expected[32], found[32];
    uint32_t vcpu, generation, pages, ticks;
    uint64_t at;

    if (sscanf(line, "beat %" SCNu32 " %" SCNu64, &vcpu, &at) == 2 && vcpu < MAX_VCPUS)
        on_beat(&p->vcpu[vcpu], at);
    else if (sscanf(line, "gen %" SCNu32 " %" SCNu32 " %" SCNu32 " %" SCNu32, &vcpu, &generation, &pages, &ticks) == 4 &&
             vcpu < MAX_VCPUS)
        on_generation(&p->vcpu[vcpu], generation, pages, ticks);
    else if (sscanf(line, "fault %" SCNu32 " %31s %31s %31s %31s", &vcpu, what, where, expected, found) == 5)
        snprintf(p->fault, sizeof p->fault, "vCPU %" PRIu32 ", %s at %s: expected %s, found %s", vcpu, what, where,
                 expected, found);
    else
        sscanf(line, "hashed %" SCNu64, &p->hash_ns);
}

static void on_line(struct peer *p, const char *line)
{
    if (strncmp(line, "event ", 6) == 0)
        return;                         /* news come unasked; we ask for the status anyway */
    if (p->said - p->heard == QUEUE)
        fail("the %s talks too much: %s", p->name, line);
    snprintf(p->queue[p->said++ % QUEUE], sizeof p->queue[0], "%s", line);
}

static bool read_lines(struct peer *p, int fd, struct lines *l, void (*each)(struct peer *, const char *))
{
    ssize_t n = read(fd, l->text + l->have, sizeof l->text - l->have);
    char *line = l->text, *end;

    if (n <= 0)
        return n < 0 && errno == EINTR;
    l->have += (size_t)n;
    for (; (end = memchr(line, '\n', l->have - (size_t)(line - l->text))); line = end + 1) {
        *end = '\0';
        each(p, line);
    }
    l->have -= (size_t)(line - l->text);
    memmove(l->text, line, l->have);
    if (l->have == sizeof l->text)
        l->have = 0;                    /* no sane line is this long */
    return true;
}

static void close_fd(int *fd)
{
    close(*fd);
    *fd = -1;
}

/* Listens to both processes for at most so long, or until something came. */
void listen_to_peers(int timeout_ms)
{
    struct pollfd fds[4];

    for (size_t i = 0; i < 2; i++) {
        fds[2 * i] = (struct pollfd){ .fd = peers[i]->out, .events = POLLIN };
        fds[2 * i + 1] = (struct pollfd){ .fd = peers[i]->events, .events = POLLIN };
    }
    if (interrupted)
        fail("interrupted");
    if (poll(fds, 4, timeout_ms) <= 0)
        return;
    for (size_t i = 0; i < 2; i++) {
        if (fds[2 * i + 1].revents && !read_lines(peers[i], peers[i]->events, &peers[i]->event_lines, on_event))
            close_fd(&peers[i]->events);
        if (fds[2 * i].revents && !read_lines(peers[i], peers[i]->out, &peers[i]->out_lines, on_line)) {
            close_fd(&peers[i]->out);
            waitpid(peers[i]->pid, &peers[i]->exit_status, 0);
            peers[i]->dead = true;
        }
    }
}

void no_deaths(void)
{
    for (size_t i = 0; i < 2; i++) {
        if (!peers[i]->dead || peers[i]->may_die || (peers[i]->may_end && peers[i]->exit_status == 0))
            continue;
        while (peers[i]->events >= 0)   /* its last words */
            listen_to_peers(POLL_MS);
        if (peers[i]->fault[0])
            fail("the guest found wrong data on the %s: %s", peers[i]->name, peers[i]->fault);
        fail("the %s ended with %s %d", peers[i]->name, WIFSIGNALED(peers[i]->exit_status) ? "signal" : "status",
             WIFSIGNALED(peers[i]->exit_status) ? WTERMSIG(peers[i]->exit_status) : WEXITSTATUS(peers[i]->exit_status));
    }
}

void sleep_listening(unsigned ms)
{
    for (uint64_t now, end = now_ns() + ms * 1000000ull; (now = now_ns()) < end; no_deaths())
        listen_to_peers((int)((end - now) / 1000000) + 1);
}

const char *await_line(struct peer *p, unsigned timeout_ms, const char *what)
{
    for (uint64_t end = now_ns() + timeout_ms * 1000000ull; p->said == p->heard; listen_to_peers(POLL_MS)) {
        no_deaths();
        if (p->dead || now_ns() > end)
            fail("the %s did not say within %u s: %s", p->name, timeout_ms / 1000, what);
    }
    snprintf(p->reply, sizeof p->reply, "%s", p->queue[p->heard++ % QUEUE]);
    return p->reply;
}

const char *command(struct peer *p, const char *format, ...)
{
    char line[512];
    va_list args;
    int n;

    va_start(args, format);
    n = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof line - 1)
        fail("command too long: %s", line);
    line[n] = '\n';
    if (write(p->in, line, (size_t)n + 1) != n + 1)
        fail("the %s does not take commands: %s", p->name, strerror(errno));
    line[n] = '\0';
    return await_line(p, REPLY_MS, line);
}

void must(struct peer *p, const char *reply)
{
    if (strcmp(reply, "ok") != 0)
        fail("the %s says: %s", p->name, reply);
}

double cpu_seconds(const struct peer *p)
{
    unsigned long user = 0, system = 0;
    char path[64];
    FILE *file;

    snprintf(path, sizeof path, "/proc/%d/stat", (int)p->pid);
    if ((file = fopen(path, "re"))) {
        if (fscanf(file, "%*d (%*[^)]) %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
            user = system = 0;
        fclose(file);
    }
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

void quit(struct peer *p)
{
    uint64_t end = now_ns() + QUIT_MS * 1000000ull;

    if (write(p->in, "quit\n", 5) != 5)
        fail("the %s does not take commands: %s", p->name, strerror(errno));
    while (!p->dead && now_ns() < end)
        listen_to_peers(POLL_MS);
    if (!p->dead || !WIFEXITED(p->exit_status) || WEXITSTATUS(p->exit_status) != 0)
        fail("the %s did not end well (%s, wait status 0x%x)", p->name, p->dead ? "ended" : "hangs",
             (unsigned)p->exit_status);
}
