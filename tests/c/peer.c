/* A small VMM for tests with a foreign peer: RAM, no CPU but a thread that plays the guest.   SPDX: MIT OR Apache-2.0
 *
 *   peer in|out URI [NAME=VALUE]...
 *
 *   ram=BYTES    size of the RAM block           block=NAME   its name (default ram)
 *   load=FILE    what is in it at first          fill=BYTE    every byte of it at first
 *   save=FILE    where its contents go: at the source whenever the guest is stopped, at the destination when it arrived
 *   dirty=PAGES  the guest writes to so many pages, over and over; without it, it only counts
 *   pause=1      the source is paused before it leaves; pause=late: while its device is saved
 *   device=1     a device with a bit of everything
 *   records=1    log lines are printed, with level and target
 *   labels=TEXT  metrics with these labels are printed at the end
 *
 * Any other name is an option of the library. Prints one fact to a line: listening, state, reasons, pages, clock, error,
 * guest. Exit status 1: a call failed before anything could migrate. */
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vmig.h>

enum { PAGE = 4096, WAIT_MS = 90000, BATCH = 16, NAP_US = 200, PATIENCE_US = 10000000 };

struct lane {
    uint16_t credit;
    bool open;
};

struct device {
    uint8_t mode;
    int32_t level;
    bool on;
    uint32_t table[5];
    uint16_t used;
    uint64_t ring[8];
    uint8_t serial[16];
    uint64_t alarm;
    struct lane lanes[3];
    uint64_t extra;
};

struct machine {
    const char *block, *load, *save, *labels;
    uint8_t *ram;
    uint64_t bytes, dirty;
    bool arriving, arrived, pause, pause_late, has_device, records;
    int fill;
    vmig *m;
    struct device device;
    uint64_t steps;                     /* of the guest, since the program began */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, parked, quit;
};

/* ---- the guest ----------------------------------------------------------------------------------------------- */

/* Writes into a page, or empties it: pages become zero and stop being zero while they are on their way. */
static void step(struct machine *vm)
{
    uint64_t n = __atomic_add_fetch(&vm->steps, 1, __ATOMIC_RELAXED);
    uint64_t mixed = n * UINT64_C(0x9e3779b97f4a7c15);

    if (!vm->dirty)
        return;
    uint8_t *page = vm->ram + (mixed >> 24) % vm->dirty * PAGE;
    if (n % 8 == 0)
        memset(page, 0, PAGE);
    else
        memcpy(page + (mixed >> 56) * 8, &mixed, sizeof mixed);
    vmig_dirty(vm->m, page, PAGE);
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

static void *guest(void *opaque)
{
    struct machine *vm = opaque;

    while (may_run(vm)) {
        for (int i = 0; i < BATCH; i++)
            step(vm);
        usleep(NAP_US);
    }
    return NULL;
}

/* ---- its memory in files ------------------------------------------------------------------------------------- */

static int save_ram(struct machine *vm)
{
    FILE *file = vm->save ? fopen(vm->save, "wb") : NULL;
    size_t written;

    if (!vm->save)
        return 0;
    if (!file)
        return perror(vm->save), -1;
    written = fwrite(vm->ram, 1, vm->bytes, file);
    return fclose(file) == 0 && written == vm->bytes ? 0 : -1;
}

static int load_ram(struct machine *vm)
{
    FILE *file;

    if (vm->fill)
        memset(vm->ram, vm->fill, vm->bytes);
    if (!vm->load)
        return 0;
    if (!(file = fopen(vm->load, "rb")))
        return perror(vm->load), -1;
    size_t got = fread(vm->ram, 1, vm->bytes, file);
    fclose(file);
    return got == vm->bytes ? 0 : -1;
}

/* ---- hooks --------------------------------------------------------------------------------------------------- */

static int stop(void *opaque)
{
    struct machine *vm = opaque;

    pthread_mutex_lock(&vm->lock);
    vm->run = false;
    while (!vm->parked)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
    return vm->arriving ? 0 : save_ram(vm);
}

static int start(void *opaque)
{
    struct machine *vm = opaque;

    if (vm->arriving && !vm->arrived && save_ram(vm) < 0)
        return -1;
    vm->arrived = true;
    pthread_mutex_lock(&vm->lock);
    vm->run = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

static void print_record(void *opaque, const vmig_log_record *record)
{
    (void)opaque;
    printf("record %u %s %s%s\n", record->level, record->target, record->text,
           record->size >= sizeof *record && record->thread && record->monotonic_ns ? "" : " (incomplete)");
}

/* ---- the device ---------------------------------------------------------------------------------------------- */

static int extra_needed(void *opaque)
{
    return ((struct device *)opaque)->extra != 0;
}

static struct machine vm = {
    .block = "ram", .bytes = 16 << 20, .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER,
    .device = { 7, -5, true, { 1, 2, 3, 4, 5 }, 3, { 6, 7, 8 }, "peer", UINT64_MAX, { { 9, true } }, 10 },
};

static void *pause_now(void *opaque)
{
    struct machine *paused = opaque;

    return vmig_stop(paused->m) < 0 ? opaque : NULL;
}

/* Somebody pauses the guest just now: it is stopped already, so that takes no time. */
static int before_saving(void *opaque)
{
    pthread_t thread;
    void *failed;

    (void)opaque;
    if (!vm.pause_late)
        return 0;
    if (pthread_create(&thread, NULL, pause_now, &vm) != 0 || pthread_join(thread, &failed) != 0 || failed)
        return -1;
    return 0;
}

static const vmig_field lane_fields[] = { VMIG_U16(struct lane, credit), VMIG_BOOL(struct lane, open), VMIG_END };
static const vmig_device lane_kind = {
    .size = sizeof(vmig_device), .name = "lane", .version = 1, .fields = lane_fields,
};
static const vmig_field extra_fields[] = { VMIG_U64(struct device, extra), VMIG_END };
static const vmig_device extra_kind = {
    .size = sizeof(vmig_device), .name = "gadget/extra", .version = 1, .fields = extra_fields,
    .needed = extra_needed,
};
static const vmig_device *const parts[] = { &extra_kind, NULL };
static const vmig_field fields[] = {
    VMIG_U8(struct device, mode), VMIG_I32(struct device, level), VMIG_BOOL(struct device, on),
    VMIG_U32_ARRAY(struct device, table), VMIG_U16(struct device, used),
    VMIG_U64_VARRAY(struct device, ring, used), VMIG_UNUSED(6), VMIG_BYTES(struct device, serial),
    VMIG_TIMER(struct device, alarm), VMIG_STRUCT_ARRAY(struct device, lanes, struct lane, &lane_kind), VMIG_END,
};
static const vmig_device kind = {
    .size = sizeof(vmig_device), .name = "gadget", .version = 3, .oldest = 1, .fields = fields, .parts = parts,
    .pre_save = before_saving,
};

static int make(struct machine *vm)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    int err;

    ops.stop = stop, ops.start = start, ops.log_record = vm->records ? print_record : NULL;
    ram.name = vm->block, ram.host = vm->ram, ram.len = vm->bytes, ram.flags = VMIG_RAM_MARKED;
    if ((err = vmig_new(&ops, vm, &vm->m)) < 0)
        return err;
    vmig_bql_lock(vm->m);
    err = vmig_add_ram(vm->m, &ram);
    if (err >= 0 && vm->has_device)
        err = vmig_add_device(vm->m, &kind, 7, &vm->device);
    vmig_bql_unlock(vm->m);
    return err;
}

/* ---- the program --------------------------------------------------------------------------------------------- */

/* Does the guest get on with its work? Waits until it does, but not for ever. */
static bool guest_runs(struct machine *vm)
{
    uint64_t before = __atomic_load_n(&vm->steps, __ATOMIC_RELAXED);

    for (int waited = 0; vmig_get_stop_reasons(vm->m) == 0 && waited < PATIENCE_US; waited += NAP_US) {
        if (__atomic_load_n(&vm->steps, __ATOMIC_RELAXED) > before)
            return true;
        usleep(NAP_US);
    }
    return false;
}

static int report(struct machine *vm)
{
    vmig_status s = VMIG_SIZED(vmig_status);
    int err = vmig_get_status(vm->m, &s);
    char *error = vmig_get_error(vm->m);

    if (err >= 0 && vm->arriving && !vm->arrived && s.state == VMIG_STATE_COMPLETED)
        err = save_ram(vm);
    printf("state %s\n", vmig_state_name(s.state));
    printf("reasons %d\n", vmig_get_stop_reasons(vm->m));
    printf("pages %" PRIu64 " %" PRIu64 "\n", s.normal_pages, s.zero_pages);
    printf("clock %" PRIu64 "\n", vmig_clock_ns(vm->m));
    if (error)
        printf("error %s\n", error);
    vmig_string_free(error);
    printf("guest %s\n", guest_runs(vm) ? "runs" : "stands");
    if (vm->labels) {
        char *metrics = vmig_metrics(vm->m, vm->labels);
        printf("%s", metrics ? metrics : vmig_errmsg());
        vmig_string_free(metrics);
    }
    return err;
}

static int move(struct machine *vm, const char *uri)
{
    char *address;
    int err;

    if (!vm->arriving && ((err = vmig_start(vm->m)) < 0 || !guest_runs(vm) || (vm->pause && (err = vmig_stop(vm->m)) < 0)))
        return -1;
    if ((err = vm->arriving ? vmig_incoming(vm->m, uri) : vmig_outgoing(vm->m, uri)) < 0)
        return err;
    address = vm->arriving ? vmig_get(vm->m, "listen-address") : NULL;
    printf("listening %s\n", address ? address : uri);
    vmig_string_free(address);
    if ((err = vmig_wait(vm->m, WAIT_MS)) == 0)
        fprintf(stderr, "peer: no end in sight\n");
    return err > 0 ? report(vm) : -1;
}

/* True: the program's own; false: an option of the library. */
static bool own_setting(struct machine *vm, const char *name, const char *value)
{
    if (strcmp(name, "ram") == 0)
        vm->bytes = strtoull(value, NULL, 0);
    else if (strcmp(name, "block") == 0)
        vm->block = value;
    else if (strcmp(name, "load") == 0)
        vm->load = value;
    else if (strcmp(name, "save") == 0)
        vm->save = value;
    else if (strcmp(name, "fill") == 0)
        vm->fill = atoi(value);
    else if (strcmp(name, "dirty") == 0)
        vm->dirty = strtoull(value, NULL, 0);
    else if (strcmp(name, "pause") == 0)
        *(strcmp(value, "late") == 0 ? &vm->pause_late : &vm->pause) = true;
    else if (strcmp(name, "device") == 0)
        vm->has_device = true;
    else if (strcmp(name, "records") == 0)
        vm->records = true;
    else if (strcmp(name, "labels") == 0)
        vm->labels = value;
    else
        return false;
    return true;
}

static int run(struct machine *vm, char **settings, const char *uri)
{
    int err;

    vm->ram = mmap(NULL, vm->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (vm->ram == MAP_FAILED || load_ram(vm) < 0 || (err = make(vm)) < 0)
        return -1;
    for (; *settings; settings++)
        if (**settings && (err = vmig_set(vm->m, *settings, *settings + strlen(*settings) + 1)) < 0)
            return err;
    if (pthread_create(&vm->thread, NULL, guest, vm) != 0)
        return -1;
    err = move(vm, uri);
    if (err < 0)
        fprintf(stderr, "peer: %s\n", vmig_errmsg());
    pthread_mutex_lock(&vm->lock);      /* the guest first: it calls vmig_dirty() as long as it runs */
    vm->quit = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    pthread_join(vm->thread, NULL);
    vmig_free(vm->m);
    munmap(vm->ram, vm->bytes);
    return err;
}

int main(int argc, char **argv)
{
    if (argc < 3 || (strcmp(argv[1], "in") && strcmp(argv[1], "out"))) {
        fprintf(stderr, "usage: peer in|out URI [NAME=VALUE]...\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    vm.arriving = strcmp(argv[1], "in") == 0;
    for (char **arg = argv + 3; *arg; arg++) {
        char *value = strchr(*arg, '=');
        if (!value)
            return fprintf(stderr, "peer: '%s' is not NAME=VALUE\n", *arg), 2;
        *value++ = '\0';
        if (own_setting(&vm, *arg, value))
            *arg = "";
    }
    if (run(&vm, argv + 3, argv[2]) < 0)
        return fprintf(stderr, "peer: %s\n", vmig_errmsg()), 1;
    return 0;
}
