/* The limit: pushes memory through one TCP connection on loopback into equally fresh memory, and nothing else.
 *                                                                                       SPDX: MIT OR Apache-2.0
 * usage: bare MIB plain|ahead|huge
 * plain  the receiver reads straight into memory nobody touched before
 * ahead  a thread populates that memory ahead of the data
 * huge   the same in huge pages: fast, unless the machine is itself a guest whose host has to find them first
 * Prints one line of JSON: time from the first byte to the receiver's word that all arrived, and both sides' CPU. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define HUGE (2ull << 20)
enum { CALL = 1 << 20 };                /* bytes per system call: larger is no faster */

struct region {
    char *start;
    size_t len;
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

static void *populate(void *opaque)
{
    const struct region *r = opaque;

    for (size_t at = 0; at < r->len; at += HUGE)
        if (madvise(r->start + at, r->len - at < HUGE ? r->len - at : HUGE, MADV_POPULATE_WRITE) < 0)
            die("MADV_POPULATE_WRITE");
    return NULL;
}

static int receive(int listener, size_t len, bool ahead, bool huge)
{
    int fd = accept(listener, NULL, NULL);
    double cpu = cpu_of_self();
    struct region r = map(len);
    pthread_t thread;
    ssize_t n = 0;

    if (fd < 0)
        die("accept");
    if ((huge && madvise(r.start, len, MADV_HUGEPAGE) < 0) ||
        (ahead && (errno = pthread_create(&thread, NULL, populate, &r)) != 0))
        die("preparing memory");
    for (size_t have = 0; have < len; have += (size_t)n)
        if ((n = recv(fd, r.start + have, len - have < CALL ? len - have : CALL, 0)) <= 0)
            die("recv");
    if (ahead)
        pthread_join(thread, NULL);
    cpu = cpu_of_self() - cpu;
    if (write(fd, &cpu, sizeof cpu) != sizeof cpu)
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

static void send_all(int fd, struct region r)
{
    ssize_t n;

    for (size_t sent = 0; sent < r.len; sent += (size_t)n)
        if ((n = send(fd, r.start + sent, r.len - sent < CALL ? r.len - sent : CALL, MSG_NOSIGNAL)) <= 0)
            die("send");
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    double begin, cpu, peer_cpu;
    struct region r;
    pid_t child;
    bool ahead, huge;

    huge = argc == 3 && strcmp(argv[2], "huge") == 0;
    ahead = huge || (argc == 3 && strcmp(argv[2], "ahead") == 0);
    if (argc != 3 || atol(argv[1]) <= 0 || (!ahead && strcmp(argv[2], "plain") != 0)) {
        fprintf(stderr, "usage: bare MIB plain|ahead|huge\n");
        return 2;
    }
    r = map((size_t)atol(argv[1]) << 20);
    if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 1) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &size) < 0)
        die("listen");
    child = fork();                     /* before memory is filled: nothing is shared, nothing copied on write */
    if (child < 0)
        die("fork");
    if (child == 0)
        return receive(listener, r.len, ahead, huge);
    fill(r);
    begin = seconds();
    cpu = cpu_of_self();
    if (connect(fd, (struct sockaddr *)&address, size) < 0)
        die("connect");
    send_all(fd, r);
    if (recv(fd, &peer_cpu, sizeof peer_cpu, MSG_WAITALL) != sizeof peer_cpu)
        die("the receiver's word");
    printf("{\"seconds\": %.6f, \"cpu_s\": %.6f}\n", seconds() - begin, cpu_of_self() - cpu + peer_cpu);
    waitpid(child, NULL, 0);
    return 0;
}
