/* How long it takes to stop vCPU threads that sleep in a system call, or run, through a gate. SPDX: MIT OR Apache-2.0
 *
 *   parking VCPUS TIMES [run]    prints one line of JSON: the median; `bare park` is the same without the library */
#include "program.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

enum { VCPUS_MAX = 64, SETTLE_US = 3000 };

static vmig_gate *gate;
static bool run;

static double now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* The signal is let in only while the thread sleeps, so none is lost; one that runs looks at its flag. */
static void *vcpu(void *opaque)
{
    unsigned index = (unsigned)(uintptr_t)opaque;
    sigset_t asleep;
    uint8_t flag = 0;

    pthread_sigmask(SIG_BLOCK, NULL, &asleep);
    sigdelset(&asleep, SIGUSR1);
    if (run)
        pthread_sigmask(SIG_SETMASK, &asleep, NULL);
    while (vmig_gate_enter(gate, index, run ? &flag : NULL) == 0) {
        while (run && !__atomic_load_n(&flag, __ATOMIC_SEQ_CST))
            continue;
        if (!run)
            sigsuspend(&asleep);
        vmig_gate_exit(gate, index);
    }
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    vmig_gate_config config = VMIG_SIZED(vmig_gate_config);
    unsigned long count = argc >= 3 ? strtoul(argv[1], NULL, 10) : 0, times = argc >= 3 ? strtoul(argv[2], NULL, 10) : 0;
    pthread_t threads[VCPUS_MAX];
    double *took = calloc(times ? times : 1, sizeof *took);
    sigset_t usr1;

    run = argc == 4 && strcmp(argv[3], "run") == 0;
    if (count < 1 || count > VCPUS_MAX || !times || !took || argc > 3 + run) {
        fprintf(stderr, "usage: parking VCPUS TIMES [run]\n");
        return 2;
    }
    sigemptyset(&usr1), sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, NULL);
    config.vcpus = (uint32_t)count, config.signal = SIGUSR1, config.flags = VMIG_GATE_INSTALL;
    need(vmig_gate_new(&config, &gate), "gate");
    for (unsigned long i = 0; i < count; i++)
        need(-pthread_create(&threads[i], NULL, vcpu, (void *)(uintptr_t)i), "thread");
    for (unsigned long n = 0; n < times; n++) {
        need(vmig_gate_open(gate), "open");
        usleep(SETTLE_US);
        double begin = now_us();
        need(vmig_gate_close(gate), "close");
        took[n] = now_us() - begin;
    }
    need(vmig_gate_end(gate), "end");
    for (unsigned long i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    vmig_gate_free(gate);
    qsort(took, times, sizeof *took, by_size);
    printf("{\"us\": %.2f}\n", took[times / 2]);
    free(took);
    return 0;
}
