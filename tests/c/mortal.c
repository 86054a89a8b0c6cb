/* A VMM that may die at any moment, with a software guest that notices whatever should not be. SPDX: MIT OR Apache-2.0
 *
 *   mortal BOARD [guest]    BOARD: a file of at least 4096 zeros that all processes of one guest's life share; "guest":
 *                           the guest begins its life here
 *
 * The guest counts steps. Each step overwrites one of SLOTS pages, after a look whether the page holds what it should,
 * so that all of memory follows from the number of steps: a page that got lost, or is of another time, is found. Each
 * step is then written to the board, which is the guest's disk: it takes step n only after step n - 1 and only from the
 * process that holds it. Only a process that has the disk's lock may start the guest; the hooks release and reacquire move
 * it, and it refuses an epoch that is not higher than all before. So two guests at once, or an old copy that comes back, are found by the first step they make.
 * What is found goes to the board as words, and the process aborts.
 * Commands, beside those of program.h: look, check (pause, verify, resume), resolve 0|1, left (fds, threads, children: 1 if there is one, be it dead), fail N (the
 * N-th callback from now on fails), calls (callbacks since then). */
#include "program.h"
#include "own.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/wait.h>

enum { PAGE = 4096, PAGES = 512, BLOCK = PAGES / 2 * PAGE, SLOTS = 61, SLOT_PAGES = 8, WORDS = PAGE / 8 };
enum { CHUNKS = 4, CHUNK = 1000, STEP_US = 100 };

struct board {
    _Atomic uint64_t runner;            /* process that holds the disk, 0: none */
    _Atomic uint64_t disk;              /* last step written */
    _Atomic uint64_t hash;              /* of the guest at its last stop */
    _Atomic uint64_t stops, starts, starter;
    _Atomic uint64_t violations;
    char words[512];
    _Atomic uint64_t lock;              /* highest epoch << 32 | process that has it, 0: released */
};

struct rtc {
    uint64_t steps, check, due;
};

struct nic {
    uint32_t head;
    uint8_t ring[64];
    uint64_t sum;
};

static struct vmm {
    vmig *m;
    struct board *board;
    uint8_t *low, *high;
    struct rtc rtc;
    struct nic nic;
    uint8_t gpu[CHUNKS * CHUNK];
    unsigned gpu_left, gpu_got;
    pthread_t cpu;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, parked, quit;
    atomic_int calls, fail_at;
} vmm;

static _Noreturn __attribute__((format(printf, 1, 2))) void violation(const char *format, ...)
{
    char words[sizeof vmm.board->words];
    va_list args;

    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    if (atomic_fetch_add(&vmm.board->violations, 1) == 0)
        memcpy(vmm.board->words, words, sizeof words);
    fprintf(stderr, "mortal %d: %s\n", getpid(), words);
    abort();
}

/* Every callback comes through here: the chosen one fails. */
static int called(void)
{
    return atomic_fetch_add(&vmm.calls, 1) + 1 == atomic_load(&vmm.fail_at) ? -EDOM : 0;
}

/* ---- the guest --------------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t n)
{
    n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9;
    n = (n ^ (n >> 27)) * 0x94d049bb133111eb;
    return n ^ (n >> 31);
}

static uint64_t *page(unsigned number)
{
    uint8_t *block = number < PAGES / 2 ? vmm.low : vmm.high;

    return (uint64_t *)(void *)(block + (size_t)(number % (PAGES / 2)) * PAGE);
}

/* Page 0 holds the number of steps. */
static uint64_t steps(void)
{
    return page(0)[0];
}

static unsigned slot_of(uint64_t step)
{
    return (unsigned)(step * 7 % SLOTS);        /* each of SLOTS steps in a row another one */
}

static uint64_t *slot_page(unsigned slot)
{
    return page(1 + slot * SLOT_PAGES);
}

static void write_slot(uint64_t step)
{
    uint64_t *p = slot_page(slot_of(step));

    p[0] = step, p[200] = mix(step), p[WORDS - 1] = ~step;
    vmig_dirty(vmm.m, p, PAGE);
}

static void check_slot(uint64_t step, const char *when)
{
    const uint64_t *p = slot_page(slot_of(step));

    if (p[0] != step || p[200] != mix(step) || p[WORDS - 1] != ~step)
        violation("%s: the page of step %" PRIu64 " holds step %" PRIu64 " (%s)", when, step, p[0],
                  p[200] == mix(p[0]) && p[WORDS - 1] == ~p[0] ? "whole" : "torn");
}

static void set_devices(uint64_t step)
{
    vmm.rtc.steps = step, vmm.rtc.check = mix(step), vmm.rtc.due = step * 1000;
    vmm.nic.head = (uint32_t)step, vmm.nic.sum = mix(step + 1);
    memset(vmm.nic.ring, (int)(step & 0xff), sizeof vmm.nic.ring);
}

static uint64_t background(unsigned number, unsigned word)
{
    return number % 3 == 1 && word % 64 == 5 ? mix(number * 1000ull + word) | 1 : 0;
}

static uint64_t lock_of(uint64_t epoch)
{
    return epoch << 32 | (uint32_t)getpid();
}

/* A guest that has lived for SLOTS steps, so that each slot was written. */
static void be_born(void)
{
    for (unsigned n = 1; n < PAGES; n++)
        for (unsigned w = 0; w < WORDS && n % SLOT_PAGES != 1; w++)
            if (background(n, w))
                page(n)[w] = background(n, w);
    for (uint64_t step = 1; step <= SLOTS; step++)
        write_slot(step);
    page(0)[0] = SLOTS;
    set_devices(SLOTS);
    for (size_t i = 0; i < sizeof vmm.gpu; i++)
        vmm.gpu[i] = (uint8_t)(i * 37 >> 3);
    vmm.board->disk = SLOTS;
    vmm.board->lock = lock_of(1);
}

/* All of the stopped guest is as its number of steps says. */
static void verify(const char *when)
{
    uint64_t now = steps();
    struct rtc rtc = vmm.rtc;
    struct nic nic = vmm.nic;

    if (now != vmm.board->disk)
        violation("%s: the guest is at step %" PRIu64 ", its disk at %" PRIu64, when, now, vmm.board->disk);
    for (uint64_t step = now - SLOTS + 1; step <= now; step++)
        check_slot(step, when);
    for (unsigned n = 0; n < PAGES; n++)
        for (unsigned w = n == 0; w < WORDS && n % SLOT_PAGES != 1; w++)
            if (page(n)[w] != background(n, w))
                violation("%s: page %u, word %u: 0x%" PRIx64 " instead of 0x%" PRIx64, when, n, w, page(n)[w],
                          background(n, w));
    set_devices(now);
    if (memcmp(&rtc, &vmm.rtc, sizeof rtc) || nic.head != vmm.nic.head || nic.sum != vmm.nic.sum ||
        memcmp(nic.ring, vmm.nic.ring, sizeof nic.ring))
        violation("%s: at step %" PRIu64 " the devices are those of step %" PRIu64, when, now, rtc.steps);
    for (size_t i = 0; i < sizeof vmm.gpu; i++)
        if (vmm.gpu[i] != (uint8_t)(i * 37 >> 3))
            violation("%s: byte %zu of the gpu", when, i);
}

static uint64_t whole_hash(void)
{
    return hash_bytes(vmm.low, BLOCK) * 31 + hash_bytes(vmm.high, BLOCK) + vmm.rtc.check + hash_bytes(vmm.gpu, sizeof vmm.gpu);
}

static void step(void)
{
    uint64_t now = steps(), next = now + 1, was = now;

    check_slot(next - SLOTS, "while it ran");
    page(0)[0] = next;
    vmig_dirty(vmm.m, page(0), 8);
    write_slot(next);
    set_devices(next);
    if (vmm.board->runner != (uint64_t)getpid())
        violation("step %" PRIu64 " of a guest whose disk process %" PRIu64 " holds", next, vmm.board->runner);
    if (!atomic_compare_exchange_strong(&vmm.board->disk, &was, next))
        violation("step %" PRIu64 " finds the disk at step %" PRIu64, next, was);
}

static void *cpu_thread(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&vmm.lock);
        while (!vmm.run && !vmm.quit) {
            vmm.parked = true;
            pthread_cond_broadcast(&vmm.changed);
            pthread_cond_wait(&vmm.changed, &vmm.lock);
        }
        vmm.parked = false;
        pthread_mutex_unlock(&vmm.lock);
        if (vmm.quit)
            return NULL;
        step();
        usleep(STEP_US);
    }
}

/* ---- hooks ------------------------------------------------------------------------------------------------------- */

static int stop(void *unused)
{
    uint64_t me = (uint64_t)getpid();
    int err = called();

    (void)unused;
    if (err)
        return err;
    pthread_mutex_lock(&vmm.lock);
    vmm.run = false;
    while (!vmm.parked)
        pthread_cond_wait(&vmm.changed, &vmm.lock);
    pthread_mutex_unlock(&vmm.lock);
    verify("at the stop");
    vmm.board->hash = whole_hash();
    vmm.board->stops++;
    if (!atomic_compare_exchange_strong(&vmm.board->runner, &me, 0))
        violation("a stop of a guest whose disk process %" PRIu64 " holds", me);
    return 0;
}

static int start(void *unused)
{
    uint64_t nobody = 0;
    int err = called();

    (void)unused;
    if (err)
        return err;
    if (!atomic_compare_exchange_strong(&vmm.board->runner, &nobody, (uint64_t)getpid()))
        violation("a second guest: its disk is held by process %" PRIu64, nobody);
    if ((uint32_t)vmm.board->lock != (uint32_t)getpid())
        violation("a start without the disk's lock, 0x%" PRIx64, vmm.board->lock);
    verify("at the start");
    if (vmm.board->stops && vmm.board->hash != whole_hash())
        violation("at the start the guest is not what it was at the stop");
    vmm.board->starts++;
    vmm.board->starter = (uint64_t)getpid();
    pthread_mutex_lock(&vmm.lock);
    vmm.run = true;
    pthread_cond_broadcast(&vmm.changed);
    pthread_mutex_unlock(&vmm.lock);
    return 0;
}

static int release(void *unused, uint64_t epoch)
{
    uint64_t mine = lock_of(epoch);
    int err = called();

    (void)unused;
    if (err)
        return err;
    if (vmm.run)
        violation("the lock of a running guest is released");
    /* Somebody with a higher epoch may have it by now. */
    atomic_compare_exchange_strong(&vmm.board->lock, &mine, epoch << 32);
    return 0;
}

static int reacquire(void *unused, uint64_t epoch)
{
    uint64_t was = vmm.board->lock;
    int err = called();

    (void)unused;
    if (err)
        return err;
    while (was >> 32 < epoch)
        if (atomic_compare_exchange_strong(&vmm.board->lock, &was, lock_of(epoch)))
            return 0;
    return -ESTALE;
}

/* Nobody here can know whether the other process ran the guest: that is for whoever looks at both. */
static int fence(void *unused, uint64_t epoch)
{
    int err = called();

    (void)unused, (void)epoch;
    return err ? err : -EAGAIN;
}

static void no_log(void *unused, int level, const char *line)
{
    (void)unused;
    printf("note log %d %s\n", level, line);
}

static int on_run(void *unused, vmig_phase phase, const vmig_moment *at)
{
    (void)unused, (void)phase, (void)at;
    return called();
}

/* ---- devices ----------------------------------------------------------------------------------------------------- */

static int before(void *unused)
{
    (void)unused;
    return called();
}

static int loaded(void *unused, uint32_t version)
{
    (void)unused;
    return version == 1 ? called() : -EINVAL;
}

static const vmig_field rtc_fields[] = {
    VMIG_U64(struct rtc, steps), VMIG_U64(struct rtc, check), VMIG_TIMER(struct rtc, due), VMIG_END,
};
static const vmig_device rtc_kind = {
    .size = sizeof(vmig_device), .name = "rtc", .version = 1, .fields = rtc_fields, .pre_save = before,
    .post_save = before, .pre_load = before, .post_load = loaded,
};
static const vmig_field nic_fields[] = {
    VMIG_U32(struct nic, head), VMIG_BYTES(struct nic, ring), VMIG_U64(struct nic, sum), VMIG_END,
};
static const vmig_device nic_kind = {
    .size = sizeof(vmig_device), .name = "nic", .version = 1, .fields = nic_fields, .pre_save = before,
    .post_load = loaded,
};

static int gpu_setup(void *unused, vmig_writer *out)
{
    (void)unused;
    vmm.gpu_left = CHUNKS;
    vmig_put_u32(out, CHUNKS);
    return called();
}

static int gpu_pending(void *unused, uint64_t *must, uint64_t *can)
{
    (void)unused;
    *must = vmm.gpu_left * CHUNK, *can = 0;
    return called();
}

static void put_chunk(vmig_writer *out)
{
    vmig_put_u8(out, (uint8_t)(CHUNKS - vmm.gpu_left));
    vmig_put(out, vmm.gpu + (CHUNKS - vmm.gpu_left) * CHUNK, CHUNK);
    vmm.gpu_left--;
}

static int gpu_iterate(void *unused, vmig_writer *out, uint64_t budget)
{
    int err = called();

    (void)unused, (void)budget;
    if (err)
        return err;
    if (vmm.gpu_left > 1)
        put_chunk(out);
    return vmm.gpu_left <= 1;
}

static int gpu_complete(void *unused, vmig_writer *out)
{
    (void)unused;
    while (vmm.gpu_left)
        put_chunk(out);
    return called();
}

static int gpu_load_setup(void *unused)
{
    (void)unused;
    vmm.gpu_got = 0;
    return called();
}

static int gpu_load(void *unused, uint32_t part, uint32_t version, vmig_reader *in)
{
    int err = called();

    (void)unused, (void)version;
    if (err)
        return err;
    if (part == VMIG_PART_START)
        return vmig_get_u32(in) == CHUNKS ? 0 : -EINVAL;
    while (vmig_reader_left(in)) {
        uint8_t which = vmig_get_u8(in);
        if (which >= CHUNKS)
            return -EINVAL;
        if (vmig_get_bytes(in, vmm.gpu + which * CHUNK, CHUNK) == 0)
            vmm.gpu_got++;
    }
    return part == VMIG_PART_END && vmm.gpu_got != CHUNKS ? -EINVAL : 0;
}

/* ---- putting it together ----------------------------------------------------------------------------------------- */

static void add_block(const char *name, uint8_t *host, uint64_t gpa)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);

    ram.name = name, ram.host = host, ram.len = BLOCK, ram.gpa = gpa, ram.flags = VMIG_RAM_MARKED;
    need(vmig_add_ram(vmm.m, &ram), name);
}

static void setup(void)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_section_ops gpu = VMIG_SIZED(vmig_section_ops);

    ops.stop = stop, ops.start = start, ops.log = no_log;
    ops.release = release, ops.reacquire = reacquire, ops.fence = fence;
    need(vmig_new(&ops, NULL, &vmm.m), "vmig_new");
    vmig_bql_lock(vmm.m);
    add_block("low", vmm.low, 0);
    add_block("high", vmm.high, BLOCK);
    need(vmig_add_device(vmm.m, &rtc_kind, 0, &vmm.rtc), "rtc");
    need(vmig_add_device(vmm.m, &nic_kind, 0, &vmm.nic), "nic");
    gpu.prepare = before, gpu.setup = gpu_setup, gpu.pending_estimate = gpu_pending, gpu.iterate = gpu_iterate;
    gpu.complete = gpu_complete, gpu.load_setup = gpu_load_setup, gpu.load = gpu_load;
    need(vmig_add_section(vmm.m, "gpu", 1, &gpu, &vmm.gpu, NULL), "gpu");
    need(vmig_on_run(vmm.m, 0, on_run, NULL, NULL), "run-state handler");
    vmig_bql_unlock(vmm.m);
    need(own_add(vmm.m, called), "channel");
}

static int entries(const char *path)
{
    DIR *dir = opendir(path);
    int count = 0;

    if (!dir)
        return -1;
    for (struct dirent *e; (e = readdir(dir));)
        count += e->d_name[0] != '.';
    closedir(dir);
    return count;
}

static int has_child(void)
{
    siginfo_t info;

    return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

static void look(void)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    need(vmig_get_status(vmm.m, &s), "status");
    printf("look state=%s side=%" PRIu32 " ended=%d reasons=%d runs=%d\n", vmig_state_name(s.state), s.side,
           vmig_wait(vmm.m, 0), vmig_get_stop_reasons(vmm.m), vmm.run);
}

/* The guest is paused, which verifies it, and runs again; only where it runs. */
static int check(void)
{
    int err = vmm.run ? vmig_stop(vmm.m) : -EPERM;

    return err < 0 ? err : vmig_start(vmm.m);
}

static void arm(int call)
{
    vmm.calls = 0;
    vmm.fail_at = call;
    answer("fail", 0);
}

static bool obey(void *unused, const char *verb, char *rest)
{
    (void)unused;
    if (strcmp(verb, "look") == 0)
        look();
    else if (strcmp(verb, "check") == 0)
        answer(verb, check());
    else if (strcmp(verb, "resolve") == 0 && rest)
        answer(verb, vmig_resolve(vmm.m, atoi(rest)));
    else if (strcmp(verb, "left") == 0)
        printf("left fds=%d threads=%d children=%d\n", entries("/proc/self/fd"), entries("/proc/self/task"), has_child());
    else if (strcmp(verb, "fail") == 0 && rest)
        arm(atoi(rest));
    else if (strcmp(verb, "calls") == 0)
        printf("value %d\n", vmm.calls);
    else
        return false;
    return true;
}

int main(int argc, char **argv)
{
    int fd;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 2 || (fd = open(argv[1], O_RDWR | O_CLOEXEC)) < 0) {
        fprintf(stderr, "mortal: a board is needed\n");
        return 1;
    }
    vmm.board = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (vmm.board == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    vmm.low = map_ram(BLOCK), vmm.high = map_ram(BLOCK);
    pthread_mutex_init(&vmm.lock, NULL), pthread_cond_init(&vmm.changed, NULL);
    setup();
    if (argc > 2)
        be_born();
    if (pthread_create(&vmm.cpu, NULL, cpu_thread, NULL) != 0)
        return 1;
    if (argc > 2)
        need(vmig_start(vmm.m), "start");
    printf("ready\n");
    serve(vmm.m, obey, NULL);
    /* The guest ends with its process: it takes no further step while the library goes. */
    pthread_mutex_lock(&vmm.lock);
    vmm.quit = true;
    pthread_cond_broadcast(&vmm.changed);
    pthread_mutex_unlock(&vmm.lock);
    pthread_join(vmm.cpu, NULL);
    vmm.parked = true;                  /* a migration that vmig_free ends may stop it */
    vmig_free(vmm.m);
    return 0;
}
