/* A VMM without KVM whose threads write all over its RAM while it migrates, by any tracker that needs no KVM.
 *                                                                                       SPDX: MIT OR Apache-2.0
 *   tracked [private|shared|hugetlb] [WORD...]
 *     marks     writers report with vmig_dirty; blocks have VMIG_RAM_MARKED
 *     source    writers report to a bitmap of our own, which a dirty source of all writes hands over
 *     clear     the same, and that source has `clear`
 *     device    writers report nothing, but a device does, by a source of its own; it writes through another mapping
 *     silent    a source that adds nothing; for faults
 *     odd       "spare" ends within a word of a bitmap
 *     nobody    without privileges
 *     denied    without userfaultfd(2), by a seccomp filter
 *     incoming  prints what arrived, and does not write before
 *
 * Two blocks: "ram", which the threads write, and "spare", which nobody does. Commands: program.h and own_command(). Exit
 * status 77: the memory asked for is not to be had. */
#include "program.h"
#include <pthread.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

enum { PAGE = 4096, HUGE = 2 << 20, RAM_BYTES = 24 << 20, SPARE_BYTES = 8 << 20, THREADS = 3, BATCH = 256, ASLEEP_US = 200 };
enum { RAM_PAGES = RAM_BYTES / PAGE, WORDS = RAM_PAGES / 64, ODD_BYTES = 5000 * PAGE };
enum report { BY_NOBODY, BY_MARKS, BY_SOURCE, BY_DEVICE };

struct machine {
    vmig *m;
    uint8_t *ram, *alias, *spare;       /* the alias shows the same memory at another place */
    uint64_t spare_bytes;
    const char *kind;
    enum report report;
    bool arrived;
    pthread_t thread[THREADS];
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool go, quit;
    int parked;
    uint64_t hash;
    _Atomic uint64_t writes, bits[WORDS];
    _Atomic int starts, stops, syncs, clears, fail_start, fail_sync, fail_clear, lie, edge, hot;
};

static void *map(struct machine *vm, uint64_t len, uint8_t **alias)
{
    bool huge = strcmp(vm->kind, "hugetlb") == 0;
    int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    void *at;

    if (huge || strcmp(vm->kind, "shared") == 0) {
        fd = memfd_create("guest", huge ? MFD_HUGETLB : 0);
        flags = MAP_SHARED;
        if (fd < 0 || ftruncate(fd, (off_t)len) < 0)
            exit(77);
    }
    at = mmap(NULL, len, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED)
        exit(77);
    if (alias && fd >= 0) {
        *alias = mmap(NULL, len, PROT_READ | PROT_WRITE, flags, fd, 0);
        if (*alias == MAP_FAILED)
            exit(77);
    }
    if (fd >= 0)
        close(fd);
    return at;
}

/* ---- the guest: threads that write ---- */

static bool may_run(struct machine *vm)
{
    bool on;

    pthread_mutex_lock(&vm->lock);
    while (!vm->go && !vm->quit) {
        vm->parked++;
        pthread_cond_broadcast(&vm->changed);
        pthread_cond_wait(&vm->changed, &vm->lock);
        vm->parked--;
    }
    on = !vm->quit;
    pthread_mutex_unlock(&vm->lock);
    return on;
}

static void write_somewhere(struct machine *vm, uint64_t random)
{
    uint64_t page = (random >> 33) % (uint64_t)vm->hot, at = page * PAGE + (random & 511) * 8;
    bool device = vm->report == BY_DEVICE && (random >> 20) % 4 == 0;
    uint64_t *word = (void *)((device ? vm->alias : vm->ram) + at);

    __atomic_fetch_add(word, random | 1, __ATOMIC_RELAXED);
    if (vm->report == BY_MARKS)
        vmig_dirty(vm->m, word, 8);
    if (vm->report == BY_SOURCE || device)
        atomic_fetch_or(&vm->bits[page / 64], 1ull << page % 64);
}

static void *writer(void *opaque)
{
    struct machine *vm = opaque;
    uint64_t random = (uint64_t)(uintptr_t)&random | 1;

    while (may_run(vm)) {
        for (int i = 0; i < BATCH && vm->hot > 0; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            write_somewhere(vm, random);
        }
        vm->writes += vm->hot > 0 ? BATCH : 0;
        usleep(ASLEEP_US);
    }
    return NULL;
}

static int stop(void *opaque)
{
    struct machine *vm = opaque;

    pthread_mutex_lock(&vm->lock);
    vm->go = false;
    while (vm->parked < THREADS)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
    vm->hash = hash_bytes(vm->ram, RAM_BYTES);
    return 0;
}

static int start(void *opaque)
{
    struct machine *vm = opaque;

    if (vm->arrived)
        printf("note arrived %" PRIx64 "\n", hash_bytes(vm->ram, RAM_BYTES));
    vm->arrived = false;
    pthread_mutex_lock(&vm->lock);
    vm->go = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

#include "tracked_source.h"

static int add_ram(struct machine *vm, const char *name, void *host, uint64_t len)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);

    ram.name = name, ram.host = host, ram.len = len;
    ram.flags = vm->report == BY_MARKS ? VMIG_RAM_MARKED : 0;
    return vmig_add_ram(vm->m, &ram);
}

static void answer_tracker(struct machine *vm)
{
    vmig_status s = VMIG_SIZED(vmig_status);
    char *text = vmig_get(vm->m, "dirty-tracker-in-use");

    need(vmig_get_status(vm->m, &s), "status");
    printf("tracker %" PRIu64 " %s\n", s.trackers, text);
    vmig_string_free(text);
}

/* A huge page of "spare": the one `mib` MiB from its start, else the first that was never written. */
static void remap(struct machine *vm, const char *mib, bool again)
{
    uint8_t *at = vm->spare + (mib ? (SPARE_BYTES - 1) & strtoul(mib, NULL, 10) << 20 : SPARE_BYTES / 2);

    unmap_hole(at, HUGE);
    if (again && mmap(at, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != at)
        exit(1);
    printf("ok\n");
}

/* Whether the memory is guarded by anybody's userfaultfd just now: that is tried by guarding it. */
static int guard(struct machine *vm)
{
    struct { uint64_t api, features, ioctls; } api = { 0xaa, 0, 0 };
    struct { uint64_t start, len, mode, ioctls; } reg = { (uintptr_t)vm->ram, RAM_BYTES, 2, 0 };
    int fd = (int)syscall(SYS_userfaultfd, 1);

    if (fd < 0 || ioctl(fd, 0xc018aa3f, &api) < 0)
        return -1;
    if (ioctl(fd, 0xc020aa00, &reg) == 0)
        return fd;
    close(fd);
    return -1;
}

static bool own_command(void *opaque, const char *verb, char *rest)
{
    struct machine *vm = opaque;
    static int guarding;

    if (strcmp(verb, "hash") == 0)
        printf("hash %" PRIx64 "\n", vm->hash);
    else if (strcmp(verb, "writes") == 0)
        printf("writes %" PRIu64 "\n", vm->writes);
    else if (strcmp(verb, "hot") == 0 && rest) {
        vm->hot = atoi(rest);           /* pages that are written, from the first on; 0: none */
        printf("ok\n");
    } else if (strcmp(verb, "tracker") == 0)
        answer_tracker(vm);
    else if (strcmp(verb, "unmap") == 0 || strcmp(verb, "replace") == 0)
        remap(vm, rest, *verb == 'r');
    else if (strcmp(verb, "touch") == 0) {          /* the whole block is said to be written */
        vmig_dirty(vm->m, vm->spare, vm->spare_bytes);
        printf("ok\n");
    } else if (strcmp(verb, "guard") == 0)
        printf("guard %d\n", (guarding = guard(vm)) >= 0);
    else if (strcmp(verb, "unguard") == 0) {
        close(guarding);
        printf("ok\n");
    } else if (strcmp(verb, "add") == 0 || strcmp(verb, "remove") == 0) {
        vmig_bql_lock(vm->m);
        answer(verb, *verb == 'a' ? add_ram(vm, rest, vm->spare, vm->spare_bytes) : vmig_remove_ram(vm->m, rest));
        vmig_bql_unlock(vm->m);
    } else
        return source_command(vm, verb, rest);
    return true;
}

/* As the rules of a container may be. */
static void deny_userfaultfd(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = { sizeof code / sizeof *code, code };

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) < 0)
        exit(77);
}

static void build(struct machine *vm, int argc, char **argv, vmig_ops *ops)
{
    uint32_t source = 0;
    bool has_source = false, clear = false;

    vm->kind = argc > 1 ? argv[1] : "private";
    for (int i = 2; i < argc; i++) {
        clear |= strcmp(argv[i], "clear") == 0;
        vm->arrived |= strcmp(argv[i], "incoming") == 0;
        if (strcmp(argv[i], "marks") == 0)
            vm->report = BY_MARKS;
        if (strcmp(argv[i], "source") == 0 || strcmp(argv[i], "clear") == 0)
            vm->report = BY_SOURCE, has_source = true, source = VMIG_SOURCE_ALL_WRITES;
        if (strcmp(argv[i], "device") == 0)
            vm->report = BY_DEVICE, has_source = true;
        has_source |= strcmp(argv[i], "silent") == 0;
        if (strcmp(argv[i], "odd") == 0)
            vm->spare_bytes = ODD_BYTES;
        /* A process that was always nobody's may read its own /proc; one that became it must ask. */
        if (strcmp(argv[i], "nobody") == 0 && (setuid(65534) < 0 || prctl(PR_SET_DUMPABLE, 1) < 0))
            exit(77);
        if (strcmp(argv[i], "denied") == 0)
            deny_userfaultfd();
    }
    unmap_hole(NULL, 0);
    vm->ram = map(vm, RAM_BYTES, &vm->alias), vm->spare = map(vm, vm->spare_bytes, NULL);
    if (!vm->arrived)
        memset(vm->ram, 1, RAM_BYTES), memset(vm->spare, 2, SPARE_BYTES / 2);
    need(vmig_new(ops, vm, &vm->m), "vmig_new");
    vmig_bql_lock(vm->m);
    need(add_ram(vm, "ram", vm->ram, RAM_BYTES), "ram");
    need(add_ram(vm, "spare", vm->spare, vm->spare_bytes), "spare");
    if (has_source)
        need(add_source(vm, source, clear), "source");
    vmig_bql_unlock(vm->m);
}

int main(int argc, char **argv)
{
    static struct machine vm = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER,
                                 .hot = RAM_PAGES, .spare_bytes = SPARE_BYTES };
    vmig_ops ops = VMIG_SIZED(vmig_ops);

    setvbuf(stdout, NULL, _IOLBF, 0);
    ops.stop = stop, ops.start = start;
    build(&vm, argc, argv, &ops);
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&vm.thread[i], NULL, writer, &vm) != 0)
            return 1;
    if (!vm.arrived)
        need(vmig_start(vm.m), "start");
    printf("ready\n");
    serve(vm.m, own_command, &vm);
    (void)vmig_stop(vm.m);              /* who writes reports it, and there is nobody to report to soon */
    vmig_free(vm.m);
    printf("note freed starts=%d stops=%d\n", vm.starts, vm.stops);
    pthread_mutex_lock(&vm.lock);
    vm.quit = true;
    pthread_cond_broadcast(&vm.changed);
    pthread_mutex_unlock(&vm.lock);
    for (int i = 0; i < THREADS; i++)
        pthread_join(vm.thread[i], NULL);
    return 0;
}
