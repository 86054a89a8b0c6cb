/* A VMM without pause logic: its vCPU threads go through a gate.                        SPDX: MIT OR Apache-2.0
 *
 *   gated guest VCPUS | empty VCPUS   commands as in program.h; "guest": the guest begins its life here
 *   gated misuse                      everything that is refused, then ends
 *   gated twins                       two threads enter as the same vCPU, again and again, then ends
 *
 * Every vCPU has its own part of RAM, over which it walks and adds one to each word; its register says what every word must
 * hold. Even ones compute until their flag is set, odd ones sleep in pause(2) now and then, until a signal comes.
 * Commands, beside those of program.h: run, counter, throttled, throttlers, check (the guest must stand still). */
#include "program.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

enum { PAGE = 4096, PART = 1 << 20, WORDS = PART / 8, VCPUS_MAX = 64 };

struct vcpu {
    pthread_t thread;
    unsigned index;
    uint8_t flag;
    uint64_t steps;
};

static struct vmm {
    vmig *m;
    vmig_gate *gate;
    uint64_t *ram;
    unsigned count;
    struct vcpu vcpu[VCPUS_MAX];
} vmm;

static void wrong(const char *what, int line)
{
    fprintf(stderr, "gated: line %d: not true: %s [%s]\n", line, what, vmig_errmsg());
    _exit(3);
}
#define MUST(ok) ((ok) ? (void)0 : wrong(#ok, __LINE__))

static uint64_t *word(const struct vcpu *c, uint64_t i)
{
    return vmm.ram + (uint64_t)c->index * WORDS + i;
}

static void check_word(const struct vcpu *c, uint64_t i)
{
    MUST(*word(c, i) == c->steps / WORDS + (i < c->steps % WORDS));
}

static void run_guest(struct vcpu *c)
{
    while (!__atomic_load_n(&c->flag, __ATOMIC_SEQ_CST)) {
        for (int n = 0; n < 100; n++) {
            uint64_t i = c->steps % WORDS;
            check_word(c, i);
            *word(c, i) += 1;
            vmig_dirty(vmm.m, word(c, i), 8);
            c->steps++;
        }
        if (c->index % 2) {
            pause();                    /* a signal that came just before does not end it */
            return;
        }
        usleep(100);
    }
}

static void *vcpu_thread(void *opaque)
{
    struct vcpu *c = opaque;
    int err;

    while ((err = vmig_gate_enter(vmm.gate, c->index, &c->flag)) == 0) {
        run_guest(c);
        MUST(vmig_gate_exit(vmm.gate, c->index) == 0);
    }
    MUST(err == -ECANCELED);
    return NULL;
}

static const vmig_field vcpu_fields[] = { VMIG_U64(struct vcpu, steps), VMIG_END };

static void build(unsigned count)
{
    vmig_gate_config config = VMIG_SIZED(vmig_gate_config);
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    vmig_device cpu = VMIG_SIZED(vmig_device);

    vmm.count = count, vmm.ram = map_ram((uint64_t)count * PART);
    config.vcpus = count, config.signal = SIGUSR1, config.flags = VMIG_GATE_INSTALL, config.timeout_ms = 60000;
    need(vmig_gate_new(&config, &vmm.gate), "gate");
    ops.gate = vmm.gate;                /* and no hook at all */
    need(vmig_new(&ops, &vmm, &vmm.m), "new");
    need(vmig_bql_lock(vmm.m), "lock");
    ram.name = "ram", ram.host = vmm.ram, ram.len = (uint64_t)count * PART, ram.flags = VMIG_RAM_MARKED;
    need(vmig_add_ram(vmm.m, &ram), "RAM");
    cpu.name = "cpu", cpu.version = 1, cpu.fields = vcpu_fields;
    for (unsigned i = 0; i < count; i++) {
        vmm.vcpu[i].index = i;
        need(vmig_add_device(vmm.m, &cpu, i, &vmm.vcpu[i]), "vCPU");
        need(-pthread_create(&vmm.vcpu[i].thread, NULL, vcpu_thread, &vmm.vcpu[i]), "thread");
    }
    need(vmig_bql_unlock(vmm.m), "unlock");
}

/* Threads of the library that slow vCPUs down. */
static unsigned throttlers(void)
{
    struct dirent *task;
    DIR *tasks = opendir("/proc/self/task");
    unsigned found = 0;

    MUST(tasks);
    while ((task = readdir(tasks))) {
        char path[300], name[32] = "";
        FILE *file;
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", task->d_name);
        if ((file = fopen(path, "r"))) {
            found += fgets(name, sizeof name, file) && strncmp(name, "vcpu_throttle", 13) == 0;
            fclose(file);
        }
    }
    closedir(tasks);
    return found;
}

static bool command(void *opaque, const char *verb, char *rest)
{
    uint64_t sum = 0;

    (void)opaque, (void)rest;
    if (strcmp(verb, "run") == 0) {
        answer(verb, vmig_start(vmm.m));
    } else if (strcmp(verb, "counter") == 0) {
        for (unsigned i = 0; i < vmm.count; i++)
            sum += __atomic_load_n(&vmm.vcpu[i].steps, __ATOMIC_RELAXED);
        printf("value %" PRIu64 "\n", sum);
    } else if (strcmp(verb, "throttlers") == 0) {
        printf("value %u\n", throttlers());
    } else if (strcmp(verb, "throttled") == 0) {
        vmig_status s = VMIG_SIZED(vmig_status);
        need(vmig_get_status(vmm.m, &s), "status");
        printf("value %" PRIu64 "\n", s.throttle);
    } else if (strcmp(verb, "check") == 0) {
        for (unsigned i = 0; i < vmm.count; i++)
            for (uint64_t n = 0; n < WORDS; n++)
                check_word(&vmm.vcpu[i], n);
        printf("ok\n");
    } else {
        return false;
    }
    return true;
}

static void finish(void)
{
    need(vmig_gate_end(vmm.gate), "end");
    for (unsigned i = 0; i < vmm.count; i++)
        pthread_join(vmm.vcpu[i].thread, NULL);
    vmig_free(vmm.m);
    vmig_gate_free(vmm.gate);
}

/* ---- what is refused --------------------------------------------------------------------------------------------- */

static int hook_calls;
static int failing_hook(void *opaque) { (void)opaque; return hook_calls++ ? -EDOM : 0; }
static int fine(void *opaque) { (void)opaque; return 0; }

static void *enter_and_leave_for_good(void *opaque)
{
    MUST(vmig_gate_enter(opaque, 0, NULL) == 0);
    return NULL;
}

static void misuse(void)
{
    vmig_gate_config config = VMIG_SIZED(vmig_gate_config);
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    struct sigaction now;
    pthread_t gone;
    vmig_gate *g;
    vmig *m;

    config.vcpus = 2, config.signal = SIGUSR2;
    MUST(vmig_gate_new(&config, &g) == -EINVAL && strstr(vmig_errmsg(), "VMIG_GATE_INSTALL"));
    config.flags = VMIG_GATE_INSTALL, config.timeout_ms = 100;
    MUST(vmig_gate_new(&config, &g) == 0);
    MUST(vmig_gate_exit(g, 0) == -EINVAL && strstr(vmig_errmsg(), "vmig_gate_enter() comes first"));
    MUST(vmig_gate_open(g) == 0 && vmig_gate_enter(g, 0, NULL) == 0);
    MUST(vmig_gate_enter(g, 0, NULL) == -EBUSY && strstr(vmig_errmsg(), "inside the gate already"));
    MUST(vmig_gate_enter(g, 2, NULL) == -EINVAL && vmig_gate_exit(g, 2) == -EINVAL);
    MUST(vmig_gate_close(g) == -EDEADLK && strstr(vmig_errmsg(), "vCPU 0's own thread"));
    MUST(vmig_gate_exit(g, 0) == 0 && vmig_gate_exit(g, 0) == -EINVAL && vmig_gate_close(g) == 0);
    MUST(vmig_gate_open(g) == 0);
    need(-pthread_create(&gone, NULL, enter_and_leave_for_good, g), "thread");
    pthread_join(gone, NULL);
    ops.gate = g;
    need(vmig_new(&ops, NULL, &m), "new");
    MUST(vmig_stop(m) == -ESRCH && strstr(vmig_errmsg(), "ended inside the gate"));
    MUST(vmig_get_stop_reasons(m) == 0 && vmig_gate_exit(g, 0) == 0 && vmig_stop(m) == 0);
    vmig_gate_free(g);                  /* the guest has it still */
    MUST(vmig_start(m) == 0 && vmig_stop(m) == 0);
    vmig_free(m);
    MUST(sigaction(SIGUSR2, NULL, &now) == 0 && now.sa_handler == SIG_DFL);

    config.signal = 0, config.flags = 0;
    MUST(vmig_gate_new(&config, &g) == 0);
    ops.gate = g, ops.stop = failing_hook, ops.start = fine;
    need(vmig_new(&ops, NULL, &m), "new");
    MUST(vmig_start(m) == 0 && vmig_stop(m) == 0 && vmig_start(m) == 0);
    MUST(vmig_stop(m) == -EDOM && vmig_gate_enter(g, 1, NULL) == 0);       /* the guest still runs */
    MUST(vmig_stop(m) == -EDEADLK && vmig_gate_exit(g, 1) == 0);
    MUST(vmig_gate_throttle(g, 100) == -EINVAL && vmig_gate_throttle(g, 50) == 0 && vmig_gate_throttle(g, 0) == 0);
    MUST(vmig_gate_end(g) == 0 && vmig_gate_enter(g, 1, NULL) == -ECANCELED);
    vmig_free(m);
    vmig_gate_free(g);
    vmig_gate_free(NULL);
    ops.gate = NULL, ops.stop = NULL;
    MUST(vmig_new(&ops, NULL, &m) == -EINVAL);
}

/* ---- two threads as one vCPU ------------------------------------------------------------------------------------- */

enum { ROUNDS = 3000 };

struct twin {
    pthread_t thread;
    vmig_gate *gate;
    uint8_t flag;
};
static _Atomic unsigned twins_ready, twins_done;        /* over all rounds */
static pthread_barrier_t twins_out;

static void *twin_thread(void *opaque)
{
    struct twin *t = opaque;
    char name[32];

    snprintf(name, sizeof name, "thread %d)", (int)gettid());
    for (unsigned round = 1; round <= ROUNDS; round++) {
        twins_ready++;
        while (twins_ready < 2 * round)
            sched_yield();
        int err = vmig_gate_enter(t->gate, 0, &t->flag);
        twins_done++;
        if (err == 0) {
            while (!__atomic_load_n(&t->flag, __ATOMIC_SEQ_CST))
                sched_yield();
            MUST(vmig_gate_exit(t->gate, 0) == 0);
        } else {
            MUST(err == -EBUSY && strstr(vmig_errmsg(), "inside the gate already") && !strstr(vmig_errmsg(), name));
        }
        pthread_barrier_wait(&twins_out);
    }
    return NULL;
}

static void twins(void)
{
    vmig_gate_config config = VMIG_SIZED(vmig_gate_config);
    static struct twin twin[2];
    vmig_gate *g;

    config.vcpus = 1, config.timeout_ms = 10000;
    need(vmig_gate_new(&config, &g), "gate");
    MUST(vmig_gate_open(g) == 0);
    pthread_barrier_init(&twins_out, NULL, 3);
    for (int i = 0; i < 2; i++) {
        twin[i].gate = g;
        need(-pthread_create(&twin[i].thread, NULL, twin_thread, &twin[i]), "thread");
    }
    for (unsigned round = 1; round <= ROUNDS; round++) {
        while (twins_done < 2 * round)
            sched_yield();
        MUST(vmig_gate_close(g) == 0);  /* tells the one that is inside */
        pthread_barrier_wait(&twins_out);
        MUST(vmig_gate_open(g) == 0);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(twin[i].thread, NULL);
    vmig_gate_free(g);
}

int main(int argc, char **argv)
{
    unsigned long count = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && strcmp(argv[1], "misuse") == 0) {
        misuse();
        printf("done\n");
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "twins") == 0) {
        twins();
        printf("done\n");
        return 0;
    }
    if (count < 1 || count > VCPUS_MAX) {
        fprintf(stderr, "usage: gated guest|empty VCPUS, or gated misuse|twins\n");
        return 2;
    }
    build((unsigned)count);
    if (strcmp(argv[1], "guest") == 0)
        need(vmig_start(vmm.m), "start");
    serve(vmm.m, command, NULL);
    finish();
    return 0;
}
