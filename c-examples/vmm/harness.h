/* Two VMM processes, driven over their line protocol and watched through their events. SPDX: MIT OR Apache-2.0 */
#ifndef HARNESS_H
#define HARNESS_H
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { MAX_VCPUS = 16, QUEUE = 4 };

struct lines {
    char text[8192];
    size_t have;
};

struct vcpu_view {                      /* what a guest's vCPU did in this process; times in ns */
    uint64_t first_beat, last_beat, longest_gap, verified;
    uint32_t first_generation, last_generation, first_ticks, last_ticks;
    bool gap;
};

struct peer {
    const char *name;
    pid_t pid;
    int in, out, events;                /* pipes; -1: closed */
    struct lines out_lines, event_lines;
    char queue[QUEUE][2048];                /* lines it said and nobody read yet */
    unsigned said, heard;
    char reply[2048], fault[256];
    bool may_end, may_die, dead;        /* ending with status 0, or at all, is no failure for now */
    int exit_status;
    uint64_t hash_ns;                   /* time it spent hashing before its guest started */
    struct vcpu_view vcpu[MAX_VCPUS];
};

extern struct peer source, destination;
extern struct peer *const peers[2];
extern volatile sig_atomic_t interrupted;       /* set by the program's signal handler */

/* Everything below ends the program through fail() when a process dies or does not answer. */
__attribute__((format(printf, 1, 2), noreturn)) void fail(const char *format, ...);     /* brought by the program */
uint64_t now_ns(void);                                                                  /* CLOCK_MONOTONIC */
void spawn(struct peer *p, const char **argv, bool with_events);        /* "EVENTS" in argv becomes the events fd */
void listen_to_peers(int timeout_ms);
void no_deaths(void);
void sleep_listening(unsigned ms);
const char *await_line(struct peer *p, unsigned timeout_ms, const char *what);
__attribute__((format(printf, 2, 3))) const char *command(struct peer *p, const char *format, ...);
void must(struct peer *p, const char *reply);                           /* be "ok" */
void quit(struct peer *p);                                              /* and end with status 0 */
double cpu_seconds(const struct peer *p);                               /* user and system, so far */
#endif
