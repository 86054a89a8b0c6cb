/* The smallest emulator that can move: one thread of software guest, RAM, one device.   SPDX: MIT OR Apache-2.0
 *
 *   minimal in tcp:127.0.0.1:0          prints where it listens, then waits for the guest
 *   minimal out tcp:127.0.0.1:PORT      runs a guest for a second, then moves it there
 *
 * No KVM: the emulator itself tells the library what it wrote (vmig_dirty). The glue is between the two lines. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <vmig.h>

enum { RAM_BYTES = 64 << 20, WORDS = RAM_BYTES / 8, BATCH = 10000, WAIT_MS = 60000, LOOK_MS = 20 };

struct machine {
    uint64_t *ram;
    uint64_t counter;                   /* the guest's only register: words incremented so far */
    vmig *m;
    bool arriving;
    uint64_t first_ns, last_ns;         /* when the guest worked here first and last; not its state */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, parked, quit;
};

/* The guest walks over its RAM and adds one to each word, so the counter says what every word must hold. */
static uint64_t word_at(const struct machine *vm, uint64_t i)
{
    return vm->counter / WORDS + (i < vm->counter % WORDS);
}

static void check(const struct machine *vm, uint64_t i)
{
    if (vm->ram[i] == word_at(vm, i))
        return;
    fprintf(stderr, "minimal: word %" PRIu64 " is %" PRIu64 ", expected %" PRIu64 "\n", i, vm->ram[i], word_at(vm, i));
    _exit(3);
}

static void guest_step(struct machine *vm)
{
    uint64_t i = vm->counter % WORDS;

    check(vm, i);
    __atomic_store_n(&vm->ram[i], vm->ram[i] + 1, __ATOMIC_RELAXED);
    vmig_dirty(vm->m, &vm->ram[i], sizeof vm->ram[i]);  /* after the write, never before */
    vm->counter++;
}

static bool may_run(struct machine *vm)
{
    bool go_on;

    pthread_mutex_lock(&vm->lock);
    while (!vm->run && !vm->quit) {
        vm->parked = true;
        pthread_cond_broadcast(&vm->changed);
        pthread_cond_wait(&vm->changed, &vm->lock);
    }
    vm->parked = false;
    go_on = !vm->quit;
    pthread_mutex_unlock(&vm->lock);
    return go_on;
}

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *cpu(void *opaque)
{
    struct machine *vm = opaque;

    while (may_run(vm)) {
        if (!vm->first_ns)
            vm->first_ns = now_ns();
        for (int i = 0; i < BATCH; i++)
            guest_step(vm);
        vm->last_ns = now_ns();
        usleep(1000);
    }
    return NULL;
}

/* The emulator's own pause and resume, as it would have them without migration. */
static void pause_cpu(struct machine *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->run = false;
    while (!vm->parked)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
}

static void resume_cpu(struct machine *vm)
{
    pthread_mutex_lock(&vm->lock);
    vm->run = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
}

/* A guest that just arrived has not run yet: all of its memory must be as the counter says. */
static void verify_arrival(struct machine *vm)
{
    uint64_t begin = now_ns();

    for (uint64_t i = 0; i < WORDS; i++)
        check(vm, i);
    printf("arrived at %" PRIu64 ": memory verified, %d words in %" PRIu64 " ns\n", vm->counter, WORDS,
           now_ns() - begin);
    vm->arriving = false;
}

static void show_status(vmig *m)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    if (vmig_get_status(m, &s) >= 0)
        printf("status state=%s iteration=%" PRIu64 " total=%" PRIu64 " remaining=%" PRIu64 " sent=%" PRIu64
               " dirty-rate=%" PRIu64 " bandwidth=%" PRIu64 " elapsed=%" PRIu64 " expected-downtime=%" PRIu64
               " downtime=%" PRIu64 " eta=%" PRIu64 "\n", vmig_state_name(s.state), s.iteration, s.total, s.remaining,
               s.transferred, s.dirty_rate, s.bandwidth, s.elapsed, s.expected_downtime, s.downtime, s.eta);
}

static int wait_and_show(vmig *m, bool show)
{
    uint64_t end = now_ns() + WAIT_MS * 1000000ull;
    int ended;

    do {
        ended = vmig_wait(m, LOOK_MS);
        if (show)
            show_status(m);
    } while (ended == 0 && now_ns() < end);
    return ended == 1 ? 0 : -1;
}

/* ---- the glue ------------------------------------------------------------------------------------------------ */

static int stop(void *vm)               /* returns when the guest stands still */
{
    pause_cpu(vm);
    return 0;
}

static int start(void *opaque)
{
    struct machine *vm = opaque;

    if (vm->arriving)
        verify_arrival(vm);
    resume_cpu(vm);
    return 0;
}

static const vmig_field cpu_fields[] = { VMIG_U64(struct machine, counter), VMIG_END };
static const vmig_device cpu_kind = {
    .size = sizeof(vmig_device), .name = "cpu", .version = 1, .oldest = 1, .fields = cpu_fields,
};

static int make_migratable(struct machine *vm)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    int err;

    ops.stop = stop, ops.start = start;
    ram.name = "ram", ram.host = vm->ram, ram.len = RAM_BYTES, ram.flags = VMIG_RAM_MARKED;
    if ((err = vmig_new(&ops, vm, &vm->m)) < 0)
        return err;
    vmig_bql_lock(vm->m);
    if ((err = vmig_add_ram(vm->m, &ram)) >= 0)
        err = vmig_add_device(vm->m, &cpu_kind, 0, vm);
    vmig_bql_unlock(vm->m);
    return err;
}

static int move(struct machine *vm, const char *uri)
{
    bool in = vm->arriving;
    int err = in ? vmig_incoming(vm->m, uri) : vmig_outgoing(vm->m, uri);
    char *text;

    if (err < 0)
        return err;
    if (in) {
        text = vmig_get(vm->m, "listen-address");
        printf("listening %s\n", text ? text : uri);
        vmig_string_free(text);
    }
    err = wait_and_show(vm->m, !in);
    if ((text = vmig_get_error(vm->m)))
        fprintf(stderr, "migration: %s\n", text), err = -1;
    vmig_string_free(text);
    return err;
}

/* -------------------------------------------------------------------------------------------------------------- */

static int run(struct machine *vm, const char *uri)
{
    int err;

    if (!vm->arriving) {
        if ((err = vmig_start(vm->m)) < 0)
            return err;
        sleep(1);
    }
    bool in = vm->arriving;
    if ((err = move(vm, uri)) < 0)
        return err;
    if (in) {
        sleep(1);
        if ((err = vmig_stop(vm->m)) < 0)
            return err;
        printf("went on to %" PRIu64 ", first at %" PRIu64 " ns\n", vm->counter, vm->first_ns);
    } else {
        printf("left at %" PRIu64 ", last at %" PRIu64 " ns\n", vm->counter, vm->last_ns);
    }
    return err;
}

int main(int argc, char **argv)
{
    static struct machine vm = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };
    int err;

    if (argc != 3 || (strcmp(argv[1], "in") && strcmp(argv[1], "out"))) {
        fprintf(stderr, "usage: minimal in|out URI\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    vm.arriving = strcmp(argv[1], "in") == 0;
    vm.ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (vm.ram == MAP_FAILED || (err = make_migratable(&vm)) < 0 ||
        pthread_create(&vm.thread, NULL, cpu, &vm) != 0 || (err = run(&vm, argv[2])) < 0) {
        fprintf(stderr, "minimal: %s\n", vmig_errmsg());
        return 1;
    }
    vmig_free(vm.m);
    pthread_mutex_lock(&vm.lock);
    vm.quit = true;
    pthread_cond_broadcast(&vm.changed);
    pthread_mutex_unlock(&vm.lock);
    pthread_join(vm.thread, NULL);
    return 0;
}
