/* The limits: what this machine can do at all, by programs that do nothing else.       SPDX: MIT OR Apache-2.0
 *
 * bare push MIB SOCKETS plain|ahead|huge
 *     pushes memory full of random numbers through so many TCP connections on loopback, a thread at each end, into fresh
 *     memory of another process:
 *     plain  the receivers read straight into memory nobody touched before
 *     ahead  a thread populates that memory ahead of the data
 *     huge   the same in huge pages
 *     Prints one line of JSON: time from the first connect to the receiver's word that all arrived, both sides' CPU.
 * bare read MIB THREADS
 *     reads memory full of zeros, one load to a cache line. Prints one line of JSON: time.
 * bare park THREADS TIMES [run]
 *     signals threads that sleep in a system call, or run and look at a number, and counts them as they come back and wait to go on. Prints one line of
 *     JSON: the median time until all are counted.
 * bare hold MIB
 *     populates memory, says "held", and lets it go when its input ends: what is fresh next comes from a kernel that has
 *     it, instead of from the host of a virtual machine that has to find it first. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define HUGE (2ull << 20)
enum { CALL = 1 << 20 };                /* bytes per system call: larger is no faster */
enum { SOCKETS_MAX = 64, CACHE_LINE = 64, READ_PASSES = 3 };

struct region {
    char *start;
    size_t len;
};

struct worker {
    pthread_t thread;
    struct region part;
    int fd;
    uint64_t sum;
};

static void die(const char *what)
{
    fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double cpu_of_self(void)
{
    struct rusage u;

    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static struct region map(size_t len)
{
    char *at = mmap(NULL, len + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED)
        die("mmap");
    return (struct region){ at + (-(uintptr_t)at & (HUGE - 1)), len };
}

/* The n-th of so many equal parts, in whole huge pages but for the last. */
static struct region part_of(struct region r, size_t n, size_t parts)
{
    size_t step = r.len / parts & ~(HUGE - 1), first = n * step;

    return (struct region){ r.start + first, n + 1 == parts ? r.len - first : step };
}

static void start(struct worker *w, void *(*body)(void *))
{
    if ((errno = pthread_create(&w->thread, NULL, body, w)) != 0)
        die("a thread");
}

/* ---- push ---- */

struct receiver {
    struct region all;
    size_t sockets;
};

static void *populate(void *opaque)
{
    const struct receiver *r = opaque;

    /* A huge page for each socket in turn: all of them find their memory ready. */
    for (size_t at = 0; at < r->all.len; at += HUGE)
        for (size_t n = 0; n < r->sockets; n++) {
            struct region part = part_of(r->all, n, r->sockets);
            size_t len = at >= part.len ? 0 : part.len - at < HUGE ? part.len - at : HUGE;
            if (len && madvise(part.start + at, len, MADV_POPULATE_WRITE) < 0)
                die("MADV_POPULATE_WRITE");
        }
    return NULL;
}

static void *receive_part(void *opaque)
{
    const struct worker *w = opaque;
    size_t len = w->part.len;
    ssize_t n = 0;

    for (size_t have = 0; have < len; have += (size_t)n)
        if ((n = recv(w->fd, w->part.start + have, len - have < CALL ? len - have : CALL, 0)) <= 0)
            die("recv");
    return NULL;
}

static int receive(int listener, size_t len, size_t sockets, bool ahead, bool huge)
{
    struct receiver r = { .all = map(len), .sockets = sockets };
    struct worker worker[SOCKETS_MAX];
    pthread_t populator;
    double cpu;

    for (size_t n = 0; n < sockets; n++) {
        worker[n] = (struct worker){ .part = part_of(r.all, n, sockets), .fd = accept(listener, NULL, NULL) };
        if (worker[n].fd < 0)
            die("accept");
        if (n)
            continue;
        cpu = cpu_of_self();
        if ((huge && madvise(r.all.start, len, MADV_HUGEPAGE) < 0) ||
            (ahead && (errno = pthread_create(&populator, NULL, populate, &r)) != 0))
            die("preparing memory");
    }
    for (size_t n = 0; n < sockets; n++)
        start(&worker[n], receive_part);
    for (size_t n = 0; n < sockets; n++)
        pthread_join(worker[n].thread, NULL);
    if (ahead)
        pthread_join(populator, NULL);
    cpu = cpu_of_self() - cpu;
    if (write(worker[0].fd, &cpu, sizeof cpu) != sizeof cpu)
        die("write");
    return 0;
}

static void fill(struct region r)
{
    uint64_t x = 0x9e3779b97f4a7c15, *word = (uint64_t *)(void *)r.start;

    for (size_t i = 0; i < r.len / 8; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        word[i] = x;
    }
}

static void *send_part(void *opaque)
{
    const struct worker *w = opaque;
    size_t len = w->part.len;
    ssize_t n;

    for (size_t sent = 0; sent < len; sent += (size_t)n)
        if ((n = send(w->fd, w->part.start + sent, len - sent < CALL ? len - sent : CALL, MSG_NOSIGNAL)) <= 0)
            die("send");
    return NULL;
}

static int push(size_t len, size_t sockets, bool ahead, bool huge)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct region r = map(len);
    struct worker worker[SOCKETS_MAX];
    double begin, cpu, peer_cpu;
    pid_t child;

    if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, SOCKETS_MAX) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &size) < 0)
        die("listen");
    child = fork();                     /* before memory is filled: nothing is shared, nothing copied on write */
    if (child < 0)
        die("fork");
    if (child == 0)
        return receive(listener, len, sockets, ahead, huge);
    fill(r);
    printf("filled\n");
    fflush(stdout);
    getchar();                          /* whoever measures says when */
    begin = seconds();
    cpu = cpu_of_self();
    for (size_t n = 0; n < sockets; n++) {      /* one after the other: they are accepted in this order */
        worker[n] = (struct worker){ .part = part_of(r, n, sockets), .fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) };
        if (connect(worker[n].fd, (struct sockaddr *)&address, size) < 0)
            die("connect");
        start(&worker[n], send_part);
    }
    for (size_t n = 0; n < sockets; n++)
        pthread_join(worker[n].thread, NULL);
    if (recv(worker[0].fd, &peer_cpu, sizeof peer_cpu, MSG_WAITALL) != sizeof peer_cpu)
        die("the receiver's word");
    printf("{\"seconds\": %.6f, \"cpu_s\": %.6f}\n", seconds() - begin, cpu_of_self() - cpu + peer_cpu);
    waitpid(child, NULL, 0);
    return 0;
}

/* ---- read ---- */

static void *read_part(void *opaque)
{
    struct worker *w = opaque;
    const volatile uint64_t *word = (const volatile uint64_t *)(const void *)w->part.start;
    uint64_t sum[4] = { 0 };            /* four chains: no load waits for the one before */

    for (size_t i = 0; i + 4 * CACHE_LINE / 8 <= w->part.len / 8; i += 4 * CACHE_LINE / 8)
        for (size_t k = 0; k < 4; k++)
            sum[k] |= word[i + k * CACHE_LINE / 8];
    w->sum = sum[0] | sum[1] | sum[2] | sum[3];
    return NULL;
}

static double read_once(struct region r, size_t threads)
{
    struct worker worker[SOCKETS_MAX];
    double begin = seconds();

    for (size_t n = 0; n < threads; n++) {
        worker[n] = (struct worker){ .part = part_of(r, n, threads) };
        start(&worker[n], read_part);
    }
    for (size_t n = 0; n < threads; n++) {
        pthread_join(worker[n].thread, NULL);
        if (worker[n].sum) {
            fprintf(stderr, "bare: zeros were written, something else was read\n");
            exit(1);
        }
    }
    return seconds() - begin;
}

/* The best of some passes: other work on the machine must not make a limit easy to reach. */
static int read_all(size_t len, size_t threads)
{
    struct region r = map(len);
    double least;

    for (size_t at = 0; at < len; at += CACHE_LINE)
        *(volatile char *)(r.start + at) = 0;
    least = read_once(r, threads);
    for (int pass = 1; pass < READ_PASSES; pass++) {
        double took = read_once(r, threads);
        least = took < least ? took : least;
    }
    printf("{\"seconds\": %.6f}\n", least);
    return 0;
}

/* ---- hold ---- */

static int hold(size_t len)
{
    struct region r = map(len);

    if (madvise(r.start, len, MADV_HUGEPAGE) < 0 || madvise(r.start, len, MADV_POPULATE_WRITE) < 0)
        die("MADV_POPULATE_WRITE");
    printf("held\n");
    fflush(stdout);
    while (getchar() != EOF)
        continue;
    return 0;
}

/* ---- park ---- */

static struct {
    unsigned epoch, left;               /* epoch: odd while the threads are to stand still */
    bool run;
} park;

static void sleep_on(unsigned *word, unsigned value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(unsigned *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void on_signal(int signal) { (void)signal; }

static void *parked(void *opaque)
{
    sigset_t asleep;
    unsigned epoch = 0;

    pthread_sigmask(SIG_BLOCK, NULL, &asleep);
    sigdelset(&asleep, SIGUSR1);
    if (park.run)
        pthread_sigmask(SIG_SETMASK, &asleep, NULL);
    for (;; epoch += 2) {
        while (__atomic_load_n(&park.epoch, __ATOMIC_SEQ_CST) == epoch)
            if (!park.run)
                sigsuspend(&asleep);
        if (__atomic_sub_fetch(&park.left, 1, __ATOMIC_SEQ_CST) == 0)
            wake(&park.left);
        while (__atomic_load_n(&park.epoch, __ATOMIC_SEQ_CST) == epoch + 1)
            sleep_on(&park.epoch, epoch + 1);
    }
    return opaque;
}

static double park_once(pthread_t *threads, size_t count)
{
    unsigned left;
    double begin;

    usleep(3000);
    begin = seconds();
    __atomic_store_n(&park.left, (unsigned)count, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&park.epoch, 1, __ATOMIC_SEQ_CST);
    for (size_t i = 0; i < count; i++)
        pthread_kill(threads[i], SIGUSR1);
    while ((left = __atomic_load_n(&park.left, __ATOMIC_SEQ_CST)))
        sleep_on(&park.left, left);
    begin = seconds() - begin;
    __atomic_add_fetch(&park.epoch, 1, __ATOMIC_SEQ_CST);
    wake(&park.epoch);
    return begin;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static int park_all(size_t count, size_t times, bool run)
{
    struct sigaction action = { .sa_handler = on_signal };
    pthread_t threads[SOCKETS_MAX];
    double *took = calloc(times, sizeof *took);
    sigset_t usr1;

    if (!took)
        die("calloc");
    park.run = run;
    sigemptyset(&usr1), sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, NULL);
    sigaction(SIGUSR1, &action, NULL);
    for (size_t i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, parked, NULL))
            die("pthread_create");
    for (size_t n = 0; n < times; n++)
        took[n] = park_once(threads, count);
    qsort(took, times, sizeof *took, by_size);
    printf("{\"us\": %.2f}\n", took[times / 2] * 1e6);
    return 0;
}

static size_t number(const char *text, size_t most)
{
    long n = text ? atol(text) : 0;

    return n > 0 && (size_t)n <= most ? (size_t)n : 0;
}

int main(int argc, char **argv)
{
    const char *verb = argc > 2 ? argv[1] : "", *kind = argc == 5 ? argv[4] : "";
    size_t mib = number(argc > 2 ? argv[2] : NULL, 1 << 20), count = number(argc > 3 ? argv[3] : NULL, SOCKETS_MAX);
    bool huge = strcmp(kind, "huge") == 0, ahead = huge || strcmp(kind, "ahead") == 0;

    if (mib && count && strcmp(verb, "push") == 0 && (ahead || strcmp(kind, "plain") == 0))
        return push(mib << 20, count, ahead, huge);
    if (mib && count && argc == 4 && strcmp(verb, "read") == 0)
        return read_all(mib << 20, count);
    if (mib && mib <= SOCKETS_MAX && (argc == 4 || strcmp(kind, "run") == 0) && strcmp(verb, "park") == 0)
        return park_all(mib, number(argv[3], 1 << 20), argc == 5);
    if (mib && argc == 3 && strcmp(verb, "hold") == 0)
        return hold(mib << 20);
    fprintf(stderr, "usage: bare push MIB SOCKETS plain|ahead|huge, bare read MIB THREADS, bare park THREADS TIMES [run], bare hold MIB\n");
    return 2;
}
