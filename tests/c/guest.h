/* A small VMM for tests: one thread of software guest, RAM between guard pages, a device with a part, a section with
 * state of its own, a run-state handler; every callback counts its calls and can be told to misbehave. No KVM. */
#ifndef TESTS_GUEST_H
#define TESTS_GUEST_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vmig.h>

#define UNUSED __attribute__((unused))
/* Ends the program with the place and the library's last words. */
#define CHECK(ok, ...) ((ok) ? (void)0 : check_failed(__FILE__, __LINE__, #ok, __VA_ARGS__))

static UNUSED __attribute__((noreturn, format(printf, 4, 5))) void
check_failed(const char *file, int line, const char *what, const char *format, ...)
{
    va_list args;

    fflush(stdout);
    fprintf(stderr, "%s:%d: not true: %s; ", file, line, what);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, " [vmig_errmsg: %s]\n", vmig_errmsg());
    _exit(1);
}

/* Every callback there is, with the words by which an error names it ("" if it cannot fail). */
#define CALLBACKS(X) \
    X(STOP, "stop hook") X(START, "start hook") X(ANNOUNCE, "") \
    X(RELEASE, "release hook") X(REACQUIRE, "reacquire hook") X(FENCE, "fence hook") \
    X(PREPARE_STOP, "prepare-stop") X(STOPPED, "in stopped") X(PREPARE_START, "prepare-start") X(STARTING, "in starting") \
    X(NEEDED, "needed") X(PRE_SAVE, "pre_save") X(POST_SAVE, "post_save") X(PRE_LOAD, "pre_load") \
    X(POST_LOAD, "post_load") X(IS_ACTIVE, "is_active") X(IS_ACTIVE_ITERATE, "is_active_iterate") \
    X(PREPARE, "prepare") X(SETUP, "setup") X(PENDING_ESTIMATE, "pending_estimate") \
    X(PENDING_EXACT, "pending_exact") X(ITERATE, "iterate") X(COMPLETE, "complete") X(CLEANUP, "") \
    X(LOAD_SETUP, "load_setup") X(LOAD, "load") X(LOAD_CLEANUP, "")
enum callback {
#define X(name, words) CB_##name,
    CALLBACKS(X)
#undef X
    CB_COUNT
};
static UNUSED const char *const callback_words[CB_COUNT] = {
#define X(name, words) words,
    CALLBACKS(X)
#undef X
};
static UNUSED const char *const callback_names[CB_COUNT] = {
#define X(name, words) #name,
    CALLBACKS(X)
#undef X
};

enum { PAGE = 4096, LOW_PAGES = 4, HIGH_PAGES = 6, CHUNK = 64, CHUNKS = 3, TOLD_ERRNO = EDOM, WAIT_MS = 30000 };

struct dev {
    uint32_t control, count;
    uint8_t fifo[16];
    uint64_t due;
    uint16_t extra;
};

struct guest;
typedef int (*plot_fn)(struct guest *g, enum callback c);

struct guest {
    vmig *m;
    uint8_t *low, *high;
    size_t low_bytes, high_bytes;
    size_t span;                        /* so many of the last pages of high memory the guest writes; 0: all */
    uint64_t counter;                   /* what the software guest counts while it runs */
    struct dev dev;
    unsigned left;                      /* chunks of the section not sent yet */
    uint8_t blob[CHUNK * CHUNKS];       /* the section's state */
    unsigned got;
    bool idle;                          /* the guest runs but writes nothing */
    bool greedy;                        /* the vCPU keeps taking the big lock */
    uint64_t arrival_hash;              /* of everything, when the start hook was called the last time */
    unsigned calls[CB_COUNT];
    uint64_t epoch[CB_COUNT];           /* what the hook was told the last time */
    plot_fn plot;                       /* called in every callback; non-zero is what the callback returns */
    enum callback target;
    unsigned target_call;
    int fired, seen[4];
    unsigned destroyed[3];              /* guest, section, handler */
    int own_lock;                       /* 0: the library's; 1: ours; 2: ours, with `held` */
    pthread_mutex_t own;
    pthread_t own_holder;
    bool own_taken;
    pthread_t cpu;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, parked, quit;
};

/* ---- what the guest is ------------------------------------------------------------------------------------------- */

static UNUSED uint64_t hash_bytes(uint64_t h, const void *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++)
        h = (h ^ ((const uint8_t *)bytes)[i]) * UINT64_C(0x100000001b3);
    return h;
}

/* Of all state that migrates, which must stand still. */
static UNUSED uint64_t guest_hash(const struct guest *g)
{
    uint64_t h = hash_bytes(UINT64_C(0xcbf29ce484222325), g->low, g->low_bytes);

    h = hash_bytes(hash_bytes(h, g->high, g->high_bytes), &g->counter, sizeof g->counter);
    h = hash_bytes(hash_bytes(h, g->blob, sizeof g->blob), &g->dev.control, sizeof g->dev.control);
    h = hash_bytes(hash_bytes(h, &g->dev.count, sizeof g->dev.count), g->dev.fifo, sizeof g->dev.fifo);
    return hash_bytes(hash_bytes(h, &g->dev.due, sizeof g->dev.due), &g->dev.extra, sizeof g->dev.extra);
}

/* Memory with unmapped pages before and behind it: whatever reads or writes past it dies. */
static UNUSED uint8_t *guarded(size_t bytes)
{
    uint8_t *at = mmap(NULL, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(at != MAP_FAILED && mprotect(at + PAGE, bytes, PROT_READ | PROT_WRITE) == 0, "mmap: %s", strerror(errno));
    return at + PAGE;
}

static UNUSED void unguard(uint8_t *at, size_t bytes)
{
    munmap(at - PAGE, bytes + 2 * PAGE);
}

static void own_lock(void *opaque)
{
    struct guest *g = opaque;

    pthread_mutex_lock(&g->own);
    g->own_holder = pthread_self();
    __atomic_store_n(&g->own_taken, true, __ATOMIC_SEQ_CST);
}

static void own_unlock(void *opaque)
{
    struct guest *g = opaque;

    __atomic_store_n(&g->own_taken, false, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&g->own);
}

static int own_held(void *opaque)
{
    struct guest *g = opaque;

    return __atomic_load_n(&g->own_taken, __ATOMIC_SEQ_CST) && pthread_equal(g->own_holder, pthread_self());
}

/* The VMM takes its big lock the way it always did, where the library can be told so. */
static UNUSED void big_lock(struct guest *g)
{
    if (g->own_lock == 2)
        own_lock(g);
    else
        CHECK(vmig_bql_lock(g->m) == 0, "lock");
}

static UNUSED void big_unlock(struct guest *g)
{
    if (g->own_lock == 2)
        own_unlock(g);
    else
        CHECK(vmig_bql_unlock(g->m) == 0, "unlock");
}

static bool may_run(struct guest *g)
{
    bool go_on;

    pthread_mutex_lock(&g->lock);
    while (!g->run && !g->quit) {
        g->parked = true;
        pthread_cond_broadcast(&g->changed);
        pthread_cond_wait(&g->changed, &g->lock);
    }
    g->parked = false;
    go_on = !g->quit;
    pthread_mutex_unlock(&g->lock);
    return go_on;
}

static void *cpu_thread(void *opaque)
{
    struct guest *g = opaque;

    while (may_run(g)) {
        if (!g->idle) {
            size_t pages = g->high_bytes / PAGE, span = g->span ? g->span : pages;
            uint8_t *page = g->high + (pages - span + g->counter % span) * PAGE + 16;
            __atomic_store_n((uint64_t *)page, g->counter, __ATOMIC_RELAXED);
            vmig_dirty(g->m, page, 8);
            __atomic_add_fetch(&g->counter, 1, __ATOMIC_SEQ_CST);
        }
        if (g->greedy) {
            big_lock(g);
            g->dev.control++;
            big_unlock(g);
        }
        usleep(20);
    }
    return NULL;
}

/* ---- callbacks --------------------------------------------------------------------------------------------------- */

static int called(struct guest *g, enum callback c)
{
    CHECK(!g->destroyed[0], "%s after the guest's destroy", callback_names[c]);
    g->calls[c]++;
    return g->plot ? g->plot(g, c) : 0;
}

static int guest_stop(void *opaque)
{
    struct guest *g = opaque;
    int err = called(g, CB_STOP);

    if (err < 0)
        return err;
    pthread_mutex_lock(&g->lock);
    g->run = false;
    while (!g->parked)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static int guest_start(void *opaque)
{
    struct guest *g = opaque;
    int err;

    g->arrival_hash = guest_hash(g);
    if ((err = called(g, CB_START)) < 0)
        return err;
    pthread_mutex_lock(&g->lock);
    g->run = true;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
    return 0;
}

static void guest_announce(void *opaque)
{
    called(opaque, CB_ANNOUNCE);
}

static int with_epoch(struct guest *g, enum callback c, uint64_t epoch)
{
    CHECK(vmig_bql_held(g->m) == 0, "%s is called without the big lock", callback_names[c]);
    CHECK(c == CB_RELEASE || epoch >= g->epoch[c], "%s: an epoch only grows", callback_names[c]);
    g->epoch[c] = epoch;
    return called(g, c);
}

static int guest_release(void *opaque, uint64_t epoch) { return with_epoch(opaque, CB_RELEASE, epoch); }
static int guest_reacquire(void *opaque, uint64_t epoch) { return with_epoch(opaque, CB_REACQUIRE, epoch); }
static int guest_fence(void *opaque, uint64_t epoch) { return with_epoch(opaque, CB_FENCE, epoch); }

static void guest_log(void *opaque, int level, const char *line)
{
    (void)opaque, (void)level, (void)line;
}

static void guest_gone(void *opaque)
{
    struct guest *g = opaque;

    CHECK(g->destroyed[0]++ == 0 && g->destroyed[1] == 1 && g->destroyed[2] == 1, "destroy comes once and last");
}

static void section_gone(void *opaque)
{
    struct guest *g = opaque;

    CHECK(g->destroyed[1]++ == 0 && !g->destroyed[0], "destroy comes once");
}

static void handler_gone(void *opaque)
{
    struct guest *g = opaque;

    CHECK(g->destroyed[2]++ == 0 && !g->destroyed[0], "destroy comes once");
}

/* A handler may write guest memory at the stop; what it writes must arrive. */
static int on_run(void *opaque, vmig_phase phase, const vmig_moment *at)
{
    static const enum callback which[] = { CB_PREPARE_STOP, CB_STOPPED, CB_PREPARE_START, CB_STARTING };
    struct guest *g = opaque;

    CHECK(phase < 4 && at->size >= sizeof *at && vmig_bql_held(g->m) == 1, "phase %u, lock held", phase);
    if (phase == VMIG_STOPPED) {
        memcpy(g->low + 32, &at->wall_ns, sizeof at->wall_ns);
        vmig_dirty(g->m, g->low + 32, sizeof at->wall_ns);
    }
    return called(g, which[phase]);
}

#define OF_DEV(p) ((struct guest *)((char *)(p) - offsetof(struct guest, dev)))
static int dev_needed(void *dev) { int r = called(OF_DEV(dev), CB_NEEDED); return r ? r : 1; }
static int dev_pre_save(void *dev) { return called(OF_DEV(dev), CB_PRE_SAVE); }
static int dev_post_save(void *dev) { return called(OF_DEV(dev), CB_POST_SAVE); }
static int dev_pre_load(void *dev) { return called(OF_DEV(dev), CB_PRE_LOAD); }
static int dev_post_load(void *dev, uint32_t version)
{
    CHECK(version == 2 && OF_DEV(dev)->dev.count <= 16, "post_load version %u", version);
    return called(OF_DEV(dev), CB_POST_LOAD);
}

static int sec_is_active(void *o) { int r = called(o, CB_IS_ACTIVE); return r ? r : 1; }
static int sec_is_active_iterate(void *o) { int r = called(o, CB_IS_ACTIVE_ITERATE); return r ? r : 1; }
static int sec_prepare(void *o) { return called(o, CB_PREPARE); }
static void sec_cleanup(void *o) { called(o, CB_CLEANUP); }
static int sec_load_setup(void *o)
{
    ((struct guest *)o)->got = 0;
    return called(o, CB_LOAD_SETUP);
}
static void sec_load_cleanup(void *o, int ok)
{
    struct guest *g = o;

    CHECK(ok == 0 || ok == 1, "load_cleanup(%d)", ok);
    called(g, CB_LOAD_CLEANUP);
}

static int sec_setup(void *opaque, vmig_writer *out)
{
    struct guest *g = opaque;

    g->left = CHUNKS;
    vmig_put_u32(out, CHUNKS);
    return called(g, CB_SETUP);
}

static int sec_estimate(void *opaque, uint64_t *must, uint64_t *can)
{
    struct guest *g = opaque;

    *must = g->left * CHUNK, *can = 0;
    return called(g, CB_PENDING_ESTIMATE);
}

static int sec_exact(void *opaque, uint64_t *must, uint64_t *can)
{
    struct guest *g = opaque;

    *must = g->left * CHUNK, *can = 0;
    return called(g, CB_PENDING_EXACT);
}

static void put_chunk(struct guest *g, vmig_writer *out)
{
    vmig_put_u8(out, (uint8_t)(CHUNKS - g->left));
    vmig_put(out, g->blob + (CHUNKS - g->left) * CHUNK, CHUNK);
    g->left--;
}

static int sec_iterate(void *opaque, vmig_writer *out, uint64_t budget)
{
    struct guest *g = opaque;
    int err = called(g, CB_ITERATE);

    if (err < 0)
        return err;
    if (g->left > 1 && budget > 0)
        put_chunk(g, out);
    return g->left <= 1;
}

static int sec_complete(void *opaque, vmig_writer *out)
{
    struct guest *g = opaque;

    while (g->left)
        put_chunk(g, out);
    return called(g, CB_COMPLETE);
}

static int sec_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct guest *g = opaque;
    int err = called(g, CB_LOAD);

    if (err < 0)
        return err;
    CHECK(version >= 1, "version %u", version);
    if (part == VMIG_PART_START)
        return vmig_get_u32(in) == CHUNKS ? 0 : -EINVAL;
    while (vmig_reader_left(in)) {
        uint8_t which = vmig_get_u8(in);
        if (which >= CHUNKS)
            return -EINVAL;
        if (vmig_get_bytes(in, g->blob + which * CHUNK, CHUNK) == 0)
            g->got++;
    }
    return part == VMIG_PART_END && g->got != CHUNKS ? -EINVAL : 0;
}

/* ---- putting it together ----------------------------------------------------------------------------------------- */

static const vmig_field extra_fields[] = { VMIG_U16(struct dev, extra), VMIG_END };
static const vmig_device extra_part = {
    .size = sizeof(vmig_device), .name = "uart/extra", .version = 1, .fields = extra_fields, .needed = dev_needed,
};
static const vmig_device *const uart_parts[] = { &extra_part, NULL };
static const vmig_field uart_fields[] = {
    VMIG_U32(struct dev, control), VMIG_U32(struct dev, count), VMIG_BYTES_VARRAY(struct dev, fifo, count),
    VMIG_SINCE(2), VMIG_TIMER(struct dev, due), VMIG_END,
};
static const vmig_field uart_other_fields[] = {     /* of another kind of device, that took the name */
    VMIG_U16(struct dev, extra), VMIG_U32(struct dev, count), VMIG_BYTES_VARRAY(struct dev, fifo, count),
    VMIG_SINCE(2), VMIG_TIMER(struct dev, due), VMIG_END,
};
static const vmig_field counter_fields[] = { VMIG_U64(struct guest, counter), VMIG_END };
static const vmig_device counter_kind = {
    .size = sizeof(vmig_device), .name = "counter", .version = 1, .fields = counter_fields,
};

/* What the two sides of a test may differ in. */
struct shape {
    size_t low_pages, high_pages;       /* 0: as usual */
    const char *high_name;
    const char *uart_name;
    uint32_t uart_version, section_version;
    int own_lock;
    const char *more;                   /* a further device of this name */
    int other_uart;                     /* other fields */
    int unbuilt;                        /* nothing is registered yet */
    int (*config)(void *, const void *, size_t);
};

static UNUSED void add_ram(struct guest *g, const char *name, uint8_t *host, size_t bytes, uint64_t gpa)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);

    ram.name = name, ram.host = host, ram.len = bytes, ram.gpa = gpa, ram.flags = VMIG_RAM_MARKED;
    CHECK(vmig_add_ram(g->m, &ram) == 0, "add RAM %s", name);
}

static UNUSED void add_parts(struct guest *g, const struct shape *s)
{
    vmig_device uart = VMIG_SIZED(vmig_device);
    vmig_section_ops ops = VMIG_SIZED(vmig_section_ops);

    add_ram(g, "low", g->low, g->low_bytes, 0);
    add_ram(g, s->high_name ? s->high_name : "high", g->high, g->high_bytes, 1 << 20);
    uart.name = s->uart_name ? s->uart_name : "uart", uart.version = s->uart_version ? s->uart_version : 2;
    uart.fields = s->other_uart ? uart_other_fields : uart_fields, uart.oldest = 1;
    uart.pre_save = dev_pre_save, uart.post_save = dev_post_save;
    uart.pre_load = dev_pre_load, uart.post_load = dev_post_load;
    if (!s->uart_name)
        uart.parts = uart_parts;
    CHECK(vmig_add_device(g->m, &uart, 7, &g->dev) == 0, "add the device");
    CHECK(vmig_add_device(g->m, &counter_kind, 0, g) == 0, "counter");
    if (s->more) {
        vmig_device more = counter_kind;
        more.name = s->more;
        CHECK(vmig_add_device(g->m, &more, 0, g) == 0, "add %s", s->more);
    }
    ops.is_active = sec_is_active, ops.is_active_iterate = sec_is_active_iterate, ops.prepare = sec_prepare;
    ops.setup = sec_setup, ops.pending_estimate = sec_estimate, ops.pending_exact = sec_exact;
    ops.iterate = sec_iterate, ops.complete = sec_complete, ops.cleanup = sec_cleanup;
    ops.load_setup = sec_load_setup, ops.load = sec_load, ops.load_cleanup = sec_load_cleanup;
    CHECK(vmig_add_section(g->m, "gpu", s->section_version ? s->section_version : 3, &ops, g, section_gone) == 0, "gpu");
    CHECK(vmig_on_run(g->m, 5, on_run, g, handler_gone) > 0, "run-state handler");
}

/* A guest that does not run yet, with memory that tells apart the blocks and pages (`fill`) or is of no use (0). */
static UNUSED void guest_new(struct guest *g, const struct shape *shape, uint8_t fill)
{
    static const struct shape usual;
    const struct shape *s = shape ? shape : &usual;
    vmig_ops ops = VMIG_SIZED(vmig_ops);

    memset(g, 0, sizeof *g);
    pthread_mutex_init(&g->lock, NULL), pthread_cond_init(&g->changed, NULL), pthread_mutex_init(&g->own, NULL);
    g->low_bytes = (s->low_pages ? s->low_pages : LOW_PAGES) * PAGE, g->low = guarded(g->low_bytes);
    g->high_bytes = (s->high_pages ? s->high_pages : HIGH_PAGES) * PAGE, g->high = guarded(g->high_bytes);
    memset(g->low, 0x5a, g->low_bytes), memset(g->high, 0xa5, g->high_bytes);
    if (fill) {
        memset(g->low, 0, g->low_bytes), memset(g->high, 0, g->high_bytes);
        memset(g->low, fill, 100), memset(g->high + g->high_bytes - 100, fill, 100);
        memset(g->blob, fill + 1, sizeof g->blob), memset(g->dev.fifo, fill + 2, 9);
        g->dev.control = fill, g->dev.count = 9, g->dev.due = 77, g->dev.extra = 0x1234;
    }
    g->own_lock = s->own_lock;
    ops.stop = guest_stop, ops.start = guest_start, ops.announce = guest_announce, ops.log = guest_log;
    ops.destroy = guest_gone, ops.config = s->config;
    ops.release = guest_release, ops.reacquire = guest_reacquire, ops.fence = guest_fence;
    if (s->own_lock)
        ops.lock = own_lock, ops.unlock = own_unlock, ops.held = s->own_lock == 2 ? own_held : NULL;
    CHECK(vmig_new(&ops, g, &g->m) == 0, "vmig_new");
    big_lock(g);
    if (!s->unbuilt)
        add_parts(g, s);
    big_unlock(g);
    CHECK(pthread_create(&g->cpu, NULL, cpu_thread, g) == 0, "vCPU thread");
}

/* Frees the guest, wherever its migration is, and checks what must hold then. */
static UNUSED void guest_free(struct guest *g)
{
    g->plot = NULL;
    if (g->greedy) {                    /* the vCPU uses the handle: it must not outlive it */
        pthread_mutex_lock(&g->lock);
        g->greedy = false;
        pthread_mutex_unlock(&g->lock);
    }
    pthread_mutex_lock(&g->lock);
    g->quit = true;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
    pthread_join(g->cpu, NULL);
    pthread_mutex_lock(&g->lock);
    g->parked = true;                   /* a stop hook of the migration that vmig_free ends must not wait */
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
    vmig_free(g->m);
    CHECK(g->destroyed[0] == 1 && g->destroyed[1] == 1 && g->destroyed[2] == 1, "every destroy was called once");
    CHECK(g->calls[CB_SETUP] == g->calls[CB_CLEANUP], "%u setups, %u cleanups", g->calls[CB_SETUP], g->calls[CB_CLEANUP]);
    CHECK(g->calls[CB_LOAD_SETUP] == g->calls[CB_LOAD_CLEANUP], "load_cleanup for every load_setup");
    unguard(g->low, g->low_bytes), unguard(g->high, g->high_bytes);
    pthread_mutex_destroy(&g->lock), pthread_cond_destroy(&g->changed), pthread_mutex_destroy(&g->own);
}

static UNUSED uint32_t state_of(struct guest *g)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    CHECK(vmig_get_status(g->m, &s) == 0, "status");
    return s.state;
}

/* Whether the guest counts on: it runs, whatever the library says. */
static UNUSED bool counts_on(struct guest *g)
{
    uint64_t before = __atomic_load_n(&g->counter, __ATOMIC_SEQ_CST);

    for (int i = 0; i < 5000; i++) {
        if (__atomic_load_n(&g->counter, __ATOMIC_SEQ_CST) != before)
            return true;
        usleep(1000);
    }
    return false;
}

/* Connects source and destination over a socket pair and waits for both ends; the fds are closed at once, for the
 * library works on its own. */
static UNUSED void begin_pair(struct guest *src, struct guest *dst)
{
    int fds[2];
    char uri[32];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
    snprintf(uri, sizeof uri, "fd:%d", fds[1]);
    CHECK(vmig_incoming(dst->m, uri) == 0, "incoming");
    snprintf(uri, sizeof uri, "fd:%d", fds[0]);
    CHECK(vmig_outgoing(src->m, uri) == 0, "outgoing");
    close(fds[0]), close(fds[1]);
}

static UNUSED void end_pair(struct guest *src, struct guest *dst)
{
    CHECK(vmig_wait(src->m, WAIT_MS) == 1, "the source ends, state %s", vmig_state_name(state_of(src)));
    CHECK(vmig_wait(dst->m, WAIT_MS) == 1, "the destination ends, state %s", vmig_state_name(state_of(dst)));
}

#endif
