/* A VMM with one thread: a poll loop in which the guest is interpreted, 50 ms at a time. SPDX: MIT OR Apache-2.0
 *
 *   single guest | empty    "guest": the guest begins its life here
 *   single misuse           everything that is refused, then ends
 *
 * The guest walks over its RAM and adds one to each word, so the counter says what every word must hold; it looks before
 * each step. Every callback checks that it is on the one thread, not amid guest code and not inside another, and that what
 * could wait is refused there. What is wrong ends the program with words.
 * What the guest writes is reported by vmig_dirty in even pages, and in odd ones by a dirty source.
 * Commands, beside those of program.h: run, hold (the next stop hook says "note stopped N" and waits for a line), wait (vmig_wait), counter, facts, throttled, listen URI (vmig_qmp_listen), sleepy N MS (after N more callbacks nothing is
 * dispatched for so long), check (all of memory; the guest must stand still). */
#include "program.h"

#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <time.h>

enum { PAGE = 4096, RAM_BYTES = 8 << 20, PAGES = RAM_BYTES / PAGE, WORDS = RAM_BYTES / 8, BUSY_MS = 50, CHUNKS = 5, CHUNK = 500 };

struct rtc {
    uint64_t steps;
    uint32_t ticks;
};

static struct vmm {
    vmig *m;
    uint64_t *ram;
    struct rtc rtc;
    struct rtc more[3];
    uint8_t gpu[CHUNKS * CHUNK];
    unsigned gpu_left, gpu_got;
    long tid;
    bool running, amid_guest, inside, hold, gpu_halted;
    uint64_t written[PAGES / 64];       /* odd pages, since the source was asked */
    unsigned calls, cleanups, setups, starts, stops, syncs, clears, records, halts;
    char throttled[256];                /* what the hook was told, in order */
    long stop_naps, saved_naps;         /* how often the migration's thread had slept then */
    unsigned sleepy_after, sleepy_ms;
    unsigned destroyed, built;
} vmm;

static _Noreturn __attribute__((format(printf, 1, 2))) void wrong(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fprintf(stderr, "single: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, " [%s]\n", vmig_errmsg());
    _exit(3);
}

#define MUST(ok) ((ok) ? (void)0 : wrong("line %d: not true: %s", __LINE__, #ok))

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- the guest --------------------------------------------------------------------------------------------------- */

static void check_word(uint64_t i)
{
    uint64_t expected = vmm.rtc.steps / WORDS + (i < vmm.rtc.steps % WORDS);

    if (vmm.ram[i] != expected)
        wrong("word %" PRIu64 " is %" PRIu64 " after %" PRIu64 " steps", i, vmm.ram[i], vmm.rtc.steps);
}

static void interpret(void)
{
    uint64_t end = now_ms() + BUSY_MS;

    vmm.amid_guest = true;
    do {
        for (int n = 0; n < 200; n++) {
            uint64_t i = vmm.rtc.steps % WORDS;
            check_word(i);
            vmm.ram[i]++;
            uint64_t page = i * 8 / PAGE;
            if (page % 2)
                vmm.written[page / 64] |= 1ull << page % 64;
            else
                vmig_dirty(vmm.m, &vmm.ram[i], 8);
            vmm.rtc.steps++;
        }
    } while (now_ms() < end);
    vmm.amid_guest = false;
}

/* How often the migration's thread went to sleep so far, once it sleeps. While one callback of the queue runs it does not
 * wake up, so what runs between two equal numbers is one entry. -1: there is no such thread. */
static long naps(void)
{
    char *json = vmig_get_threads(vmm.m), *at = strstr(json, "\"live_migration\""), path[64], line[256];
    long count = -1;
    char state = 'R';

    if (!at)
        goto out;
    if (!(at = strstr(json, "\"thread-id\":")))
        goto out;
    snprintf(path, sizeof path, "/proc/self/task/%ld/status", strtol(at + 12, NULL, 10));
    for (int tries = 0; state != 'S' && tries < 1000; tries++) {
        FILE *f = fopen(path, "r");
        MUST(f);
        usleep(5000);                   /* a lock it waits for is had by then */
        while (fgets(line, sizeof line, f)) {
            sscanf(line, "State: %c", &state);
            sscanf(line, "voluntary_ctxt_switches: %ld", &count);
        }
        fclose(f);
    }
out:
    vmig_string_free(json);
    return count;
}

/* ---- callbacks --------------------------------------------------------------------------------------------------- */

/* Nothing that could wait may be called from here. */
static void refused_inside(void)
{
    MUST(vmig_dispatch(vmm.m) == -EDEADLK && vmig_wait(vmm.m, 0) == -EDEADLK);
    MUST(vmig_stop(vmm.m) == -EDEADLK && vmig_start(vmm.m) == -EDEADLK && vmig_resolve(vmm.m, 1) == -EDEADLK);
    MUST(vmig_outgoing(vmm.m, "tcp:127.0.0.1:1") == -EDEADLK && vmig_incoming(vmm.m, "tcp:127.0.0.1:0") == -EDEADLK);
    MUST(vmig_bql_wait(vmm.m, 0) == -EDEADLK && vmig_set(vmm.m, "dispatch", "auto") < 0);
    MUST(vmig_set_vcpu_dirty_limit(vmm.m, -1, 0) == -EDEADLK);
    vmig_free(vmm.m);                   /* does nothing */
    MUST(vmig_bql_held(vmm.m) == 1 && !vmig_qmp(vmm.m, "{\"execute\": \"query-status\"}"));
}

static int called(int result)
{
    if (syscall(SYS_gettid) != vmm.tid || vmm.amid_guest || vmm.inside)
        wrong("a callback on the wrong thread, or amid something else");
    vmm.inside = true;
    vmm.calls++;
    refused_inside();
    vmm.inside = false;
    return result;
}

static int stop(void *opaque)
{
    char c;

    (void)opaque;
    MUST(vmm.running);
    vmm.running = false, vmm.halts++, vmm.stop_naps = naps();
    if (vmm.hold) {
        printf("note stopped %u\n", vmm.halts);
        while (read(0, &c, 1) == 1 && c != '\n')
            continue;
        vmm.hold = false;
        MUST(vmig_set(vmm.m, "max-bandwidth", "4M") == 0);      /* not once more before it is told to */
        printf("ok\n");
    }
    return called(0);
}

static int start(void *opaque)
{
    (void)opaque;
    MUST(!vmm.running);
    MUST(!vmm.gpu_halted);              /* its cleanup comes before the guest runs on */
    vmm.running = true;
    return called(0);
}

/* A destination builds itself; what it takes away again is nothing that a callback waits for. */
static int config(void *opaque, const void *blob, size_t len)
{
    static const vmig_field fields[] = { VMIG_U64(struct rtc, steps), VMIG_END };
    vmig_device device = VMIG_SIZED(vmig_device);
    static struct rtc spare;

    (void)opaque;
    MUST(len == 5 && memcmp(blob, "build", 5) == 0);
    device.name = "spare", device.version = 1, device.fields = fields;
    MUST(vmig_add_device(vmm.m, &device, 0, &spare) == 0 && vmig_remove_device(vmm.m, &spare) == 0);
    vmm.built++;
    return called(0);
}

static int throttle(void *opaque, uint32_t percent)
{
    size_t used = strlen(vmm.throttled);

    (void)opaque;
    snprintf(vmm.throttled + used, sizeof vmm.throttled - used, " %" PRIu32, percent);
    return called(0);
}

static void announce(void *opaque) { (void)opaque, called(0); }
static int with_epoch(void *opaque, uint64_t epoch) { (void)opaque, (void)epoch; return called(0); }
static void log_record(void *opaque, const vmig_log_record *record)
{
    (void)opaque;
    MUST(syscall(SYS_gettid) == vmm.tid && record->level <= 3 && *record->target && record->thread);
    vmm.records++;
    fprintf(stderr, "log: %s: %s\n", record->target, record->text);
}

static int source_start(void *opaque) { (void)opaque, vmm.starts++; return called(0); }
static void source_stop(void *opaque) { (void)opaque, vmm.stops++, called(0); }
static int source_sync(void *opaque, const vmig_dirty_bitmap *map)
{
    (void)opaque, vmm.syncs++;
    MUST(strcmp(map->ram, "ram") == 0 && map->first == 0 && map->pages == PAGES);
    for (unsigned i = 0; i < PAGES / 64; i++)
        map->bits[i] |= vmm.written[i];
    return called(0);
}
static int source_clear(void *opaque, const vmig_dirty_bitmap *map)
{
    (void)opaque, vmm.clears++;
    for (uint64_t i = 0; i < (map->pages + 63) / 64; i++)
        vmm.written[map->first / 64 + i] &= ~map->bits[i];
    return called(0);
}

/* A command of QMP. */
static int double_it(void *opaque, const char *arguments, vmig_reply *reply)
{
    (void)opaque, (void)arguments;
    vmig_reply_json(reply, "{\"twice\": 2}");
    return called(0);
}
static void gone(void *opaque)
{
    (void)opaque;
    MUST(syscall(SYS_gettid) == vmm.tid && !vmm.inside);
    vmm.destroyed++;
}
static int on_run(void *opaque, vmig_phase phase, const vmig_moment *at)
{
    (void)opaque, (void)phase, (void)at;
    return called(0);
}

static int pre_save(void *dev) { (void)dev; vmm.saved_naps = naps(); return called(0); }
static int pre_load(void *dev) { (void)dev; return called(0); }
static int post_load(void *dev, uint32_t version) { (void)dev, (void)version; return called(0); }

static int gpu_active(void *opaque) { (void)opaque; return called(1); }
static int gpu_setup(void *opaque, vmig_writer *out)
{
    (void)opaque;
    vmm.gpu_left = CHUNKS, vmm.setups++;
    vmig_put_u32(out, CHUNKS);
    return called(0);
}
static int gpu_pending(void *opaque, uint64_t *must, uint64_t *can)
{
    (void)opaque;
    *must = vmm.gpu_left * CHUNK, *can = 0;
    return called(0);
}
static void put_chunk(vmig_writer *out)
{
    vmig_put_u8(out, (uint8_t)(CHUNKS - vmm.gpu_left));
    vmig_put(out, vmm.gpu + (CHUNKS - vmm.gpu_left--) * CHUNK, CHUNK);
}
static int gpu_iterate(void *opaque, vmig_writer *out, uint64_t budget)
{
    (void)opaque, (void)budget;
    if (vmm.gpu_left > 1)
        put_chunk(out);
    return called(vmm.gpu_left <= 1);
}
static int gpu_complete(void *opaque, vmig_writer *out)
{
    (void)opaque;
    vmm.gpu_halted = true;              /* until its cleanup, as a device that somebody else emulates may be */
    while (vmm.gpu_left)
        put_chunk(out);
    return called(0);
}
static void gpu_cleanup(void *opaque) { (void)opaque; vmm.cleanups++, vmm.gpu_halted = false; called(0); }
static int gpu_load_setup(void *opaque) { (void)opaque; vmm.setups++, vmm.gpu_got = 0; return called(0); }
static int gpu_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    (void)opaque, (void)version;
    if (part == VMIG_PART_START)
        return called(vmig_get_u32(in) == CHUNKS ? 0 : -EINVAL);
    while (vmig_reader_left(in)) {
        uint8_t which = vmig_get_u8(in);
        if (which >= CHUNKS)
            return -EINVAL;
        vmm.gpu_got += vmig_get_bytes(in, vmm.gpu + which * CHUNK, CHUNK) == 0;
    }
    return called(part == VMIG_PART_END && vmm.gpu_got != CHUNKS ? -EINVAL : 0);
}
static void gpu_load_cleanup(void *opaque, int ok) { (void)opaque, (void)ok; vmm.cleanups++; called(0); }

/* ---- putting it together ----------------------------------------------------------------------------------------- */

static const vmig_field rtc_fields[] = { VMIG_U64(struct rtc, steps), VMIG_U32(struct rtc, ticks), VMIG_END };

static void build(void)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    vmig_device rtc = VMIG_SIZED(vmig_device);
    vmig_section_ops gpu = VMIG_SIZED(vmig_section_ops);
    vmig_dirty_source source = VMIG_SIZED(vmig_dirty_source);

    vmm.tid = syscall(SYS_gettid);
    vmm.ram = map_ram(RAM_BYTES);
    ops.stop = stop, ops.start = start, ops.config = config, ops.announce = announce, ops.log_record = log_record, ops.destroy = gone;
    ops.throttle = throttle, ops.release = with_epoch, ops.reacquire = with_epoch;
    need(vmig_new(&ops, &vmm, &vmm.m), "new");
    need(vmig_set(vmm.m, "dispatch", "manual"), "dispatch=manual");
    need(vmig_set_config(vmm.m, "build", 5), "configuration");
    ram.name = "ram", ram.host = vmm.ram, ram.len = RAM_BYTES, ram.flags = VMIG_RAM_MARKED;
    need(vmig_add_ram(vmm.m, &ram), "RAM");     /* without the big lock, which is not needed here */
    rtc.name = "rtc", rtc.version = 1, rtc.fields = rtc_fields;
    rtc.pre_save = pre_save, rtc.pre_load = pre_load, rtc.post_load = post_load;
    need(vmig_add_device(vmm.m, &rtc, 0, &vmm.rtc), "device");
    for (unsigned i = 0; i < 3; i++)
        need(vmig_add_device(vmm.m, &rtc, i + 1, &vmm.more[i]), "more devices");
    gpu.is_active = gpu_active, gpu.is_active_iterate = gpu_active, gpu.setup = gpu_setup;
    gpu.pending_estimate = gpu_pending, gpu.iterate = gpu_iterate, gpu.complete = gpu_complete;
    gpu.cleanup = gpu_cleanup, gpu.load_setup = gpu_load_setup, gpu.load = gpu_load;
    gpu.load_cleanup = gpu_load_cleanup;
    need(vmig_add_section(vmm.m, "gpu", 1, &gpu, &vmm, gone), "section");
    source.name = "odd pages", source.start = source_start, source.stop = source_stop;
    source.sync = source_sync, source.clear = source_clear, source.destroy = gone;
    need(vmig_add_dirty_source(vmm.m, &source, &vmm), "source");
    need(vmig_qmp_add(vmm.m, "double-it", double_it, &vmm, gone), "command");
    need(vmig_on_run(vmm.m, 0, on_run, &vmm, gone), "handler");
}

static bool command(void *opaque, const char *verb, char *rest)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    (void)opaque;
    if (strcmp(verb, "run") == 0) {
        answer(verb, vmig_start(vmm.m));
    } else if (strcmp(verb, "wait") == 0) {
        int over = vmig_wait(vmm.m, 60000);
        answer(verb, over == 1 ? 0 : -1);
    } else if (strcmp(verb, "counter") == 0) {
        printf("value %" PRIu64 "\n", vmm.rtc.steps);
    } else if (strcmp(verb, "facts") == 0) {
        printf("value running=%d one-go=%d built=%u records=%u syncs=%u clears=%u source-on=%u halts=%u setups=%u "
               "cleanups=%u\n", vmm.running, vmm.stop_naps > 0 && vmm.stop_naps == vmm.saved_naps, vmm.built, vmm.records,
               vmm.syncs, vmm.clears, vmm.starts - vmm.stops, vmm.halts, vmm.setups, vmm.cleanups);
    } else if (strcmp(verb, "listen") == 0) {
        answer(verb, vmig_qmp_listen(vmm.m, rest));
    } else if (strcmp(verb, "sleepy") == 0) {
        vmm.sleepy_after = vmm.calls + (unsigned)strtoul(rest, &rest, 10), vmm.sleepy_ms = (unsigned)strtoul(rest, NULL, 10);
        printf("ok\n");
    } else if (strcmp(verb, "throttled") == 0) {
        need(vmig_get_status(vmm.m, &s), "status");
        printf("value%s, now %" PRIu64 "\n", vmm.throttled, s.throttle);
    } else if (strcmp(verb, "hold") == 0) {
        vmm.hold = true;
        printf("ok\n");
    } else if (strcmp(verb, "check") == 0) {
        for (uint64_t i = 0; i < WORDS; i++)
            check_word(i);
        printf("ok\n");
    } else if (strcmp(verb, "status") == 0) {      /* without vmig_wait, which would run callbacks */
        need(vmig_get_status(vmm.m, &s), "status");
        printf("status state=%s\n", vmig_state_name(s.state));
    } else {
        return false;
    }
    return true;
}

static void loop(void)
{
    static uint64_t asleep_until;
    bool on = true;

    while (on) {
        if (vmm.sleepy_ms && vmm.calls >= vmm.sleepy_after)
            asleep_until = now_ms() + vmm.sleepy_ms, vmm.sleepy_ms = 0;
        if (now_ms() < asleep_until) {
            struct pollfd commands = { .fd = 0, .events = POLLIN };
            MUST(poll(&commands, 1, vmm.running ? 0 : 10) >= 0);
            on = !commands.revents || obey_input(vmm.m, command, NULL);
        } else {
            on = serve_some(vmm.m, command, NULL, vmm.running ? 0 : -1);
        }
        if (on && vmm.running)
            interpret();
    }
}

/* ---- what is refused --------------------------------------------------------------------------------------------- */

/* Everything not marked [cb] is for the other thread. */
static void *stranger(void *opaque)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    vmig_device rtc = VMIG_SIZED(vmig_device);
    vmig_status s = VMIG_SIZED(vmig_status);
    vmig *m = vmm.m;

    (void)opaque;
    ram.name = "x", ram.host = vmm.ram, ram.len = PAGE;
    rtc.name = "x", rtc.version = 1, rtc.fields = rtc_fields;
    MUST(vmig_dispatch(m) == -EPERM && strstr(vmig_errmsg(), "the thread that made the handle"));
    MUST(vmig_wait(m, 0) == -EPERM && vmig_stop(m) == -EPERM && vmig_start(m) == -EPERM);
    MUST(vmig_outgoing(m, "tcp:127.0.0.1:1") == -EPERM && vmig_incoming(m, "tcp:127.0.0.1:0") == -EPERM);
    MUST(vmig_check(m, "tcp:127.0.0.1:1", NULL, NULL) == -EPERM && vmig_resolve(m, 1) == -EPERM);
    MUST(vmig_bql_lock(m) == -EPERM && vmig_bql_unlock(m) == -EPERM && vmig_bql_wait(m, 0) == -EPERM);
    MUST(vmig_add_ram(m, &ram) == -EPERM && vmig_add_device(m, &rtc, 0, &vmm.rtc) == -EPERM);
    MUST(vmig_remove_device(m, &vmm.rtc) == -EPERM && vmig_on_run(m, 0, on_run, NULL, NULL) == -EPERM);
    MUST(vmig_set(m, "dispatch", "auto") == -EPERM && vmig_set_vcpu_dirty_limit(m, -1, 0) == -EPERM);
    vmig_free(m);                       /* does nothing */
    MUST(vmig_bql_held(m) == 0 && vmig_get_status(m, &s) == 0 && vmig_get_stop_reasons(m) >= 0);
    MUST(vmig_cancel(m) == 0 && vmig_bql_wake(m) == 0 && vmig_dispatch_fd(m) >= 0 && vmig_clock_ns(m) != 1);
    vmig_dirty(m, vmm.ram, 8);
    return NULL;
}

static void *wake_soon(void *opaque)
{
    usleep(20000);
    MUST(vmig_bql_wake(opaque) == 0);
    return NULL;
}

static int locked, unlocked;
static void own_lock(void *opaque) { (void)opaque; locked++; }
static void own_unlock(void *opaque) { (void)opaque; unlocked++; }

static void misuse(void)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    pthread_t other;
    char *text;
    vmig *m;

    need(pthread_create(&other, NULL, stranger, NULL), "thread");
    pthread_join(other, NULL);
    MUST(vmig_dispatch(vmm.m) == 0);
    MUST(vmig_bql_lock(vmm.m) == 0 && vmig_bql_lock(vmm.m) == 0 && vmig_bql_held(vmm.m) == 1);
    MUST(vmig_start(vmm.m) == 0 && vmig_stop(vmm.m) == 0);         /* a lock that does nothing hinders nobody */
    MUST(vmig_bql_unlock(vmm.m) == 0 && vmig_bql_unlock(vmm.m) == 0);
    MUST(vmig_bql_wait(vmm.m, 1) == 0);
    need(pthread_create(&other, NULL, wake_soon, vmm.m), "thread");
    MUST(vmig_bql_wait(vmm.m, 30000) == 1);
    pthread_join(other, NULL);
    MUST((text = vmig_get(vmm.m, "dispatch")) && strcmp(text, "manual") == 0);
    vmig_string_free(text);
    MUST(vmig_set(vmm.m, "defaults", "vmig") == 0 && vmig_dispatch(vmm.m) == 0);   /* says how the VMM is built */

    ops.stop = stop, ops.start = start;
    need(vmig_new(&ops, &vmm, &m), "new");
    MUST(vmig_dispatch(m) == -EINVAL && vmig_dispatch_fd(m) == -EINVAL && strstr(vmig_errmsg(), "not manual"));
    MUST(vmig_bql_lock(m) == 0 && vmig_set(m, "dispatch", "manual") == -EBUSY && vmig_bql_unlock(m) == 0);
    MUST(vmig_set(m, "dispatch", "sometimes") == -EINVAL);
    MUST(vmig_set(m, "dispatch", "manual") == 0 && vmig_set(m, "dispatch", "auto") == 0 && vmig_dispatch(m) == -EINVAL);
    MUST(vmig_bql_lock(m) == 0 && vmig_bql_lock(m) == -EDEADLK && vmig_bql_unlock(m) == 0);
    vmig_free(m);
    ops.lock = own_lock, ops.unlock = own_unlock;
    need(vmig_new(&ops, &vmm, &m), "new");
    MUST(vmig_set(m, "dispatch", "manual") == -EBUSY && strstr(vmig_errmsg(), "vmig_ops.lock"));
    vmig_free(m);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 2) {
        fprintf(stderr, "usage: single guest|empty|misuse\n");
        return 2;
    }
    build();
    if (strcmp(argv[1], "misuse") == 0) {
        misuse();
    } else {
        if (strcmp(argv[1], "guest") == 0)
            need(vmig_start(vmm.m), "start");
        loop();
    }
    vmig_free(vmm.m);
    MUST(vmm.destroyed == 5 && vmm.setups == vmm.cleanups && vmm.starts == vmm.stops);
    printf("done\n");
    return 0;
}
