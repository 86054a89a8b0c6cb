/* A VMM that records the order of everything the library calls, and whose devices read and write guest RAM at the
 * moments where it matters: at the stop, while saving, and while loading.                SPDX: MIT OR Apache-2.0
 *
 *   discipline                 runs a software guest; then commands, see program.h and own_command()
 *   discipline incoming        waits for the command "incoming URI" */
#include "program.h"
#include <pthread.h>
#include <time.h>

enum { BLOCKS = 2, BLOCK_BYTES = 8 << 20, WORDS = BLOCK_BYTES / 8, BATCH = 2000, HANDLERS = 3, DEVICES = 3 };
/* Pages of ram.b that the guest leaves alone: who writes them, and when. */
enum { MAILBOX = BLOCK_BYTES - 64 * 4096, AT_STOP = MAILBOX, AT_PRE_SAVE = MAILBOX + 4096, BY_ROGUE = MAILBOX + 9 * 4096 };

struct machine;
struct handler {
    struct machine *vm;
    int priority;
};
struct device {
    struct machine *vm;
    const char *name;
    uint64_t counter;                   /* of the guest, as it was at the stop: RAM must fit to it */
};
struct machine {
    vmig *m;
    uint64_t *ram[BLOCKS];
    uint64_t counter, random;           /* of the guest; guarded by being parked */
    struct handler handler[HANDLERS];
    struct device device[DEVICES], early;
    pthread_t guest, rogue;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, parked, quit;
    _Atomic bool rogue_writes, rogue_quit;
    bool forget_mark;                   /* write at the stop and say nothing: what that costs */
    int fail_priority;                  /* the handler that fails at the stop; 0: none */
};

static void note(struct machine *vm, const char *who, const char *what)
{
    printf("note %s%s%s%s\n", who, *what ? " " : "", what, vmig_bql_held(vm->m) ? " bql" : "");
}

static uint64_t *mailbox(struct machine *vm, uint64_t offset)
{
    return vm->ram[1] + offset / 8;
}

static void mail(struct machine *vm, uint64_t offset, uint64_t value)
{
    *mailbox(vm, offset) = value;
    if (!vm->forget_mark)
        vmig_dirty(vm->m, mailbox(vm, offset), 8);
}

/* ---- the guest ---- */

static void guest_step(struct machine *vm)
{
    uint64_t *word;

    vm->random = vm->random * 6364136223846793005 + 1442695040888963407;
    word = vm->ram[vm->random >> 63] + (vm->random >> 20) % (MAILBOX / 8);
    __atomic_store_n(word, *word + vm->random, __ATOMIC_RELAXED);
    vmig_dirty(vm->m, word, 8);
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

static void *guest(void *opaque)
{
    struct machine *vm = opaque;

    while (may_run(vm)) {
        for (int i = 0; i < BATCH; i++)
            guest_step(vm);
        usleep(1000);
    }
    return NULL;
}

/* A device that does not stop with the others. */
static void *rogue(void *opaque)
{
    struct machine *vm = opaque;

    while (!vm->rogue_quit) {
        if (vm->rogue_writes) {
            __atomic_fetch_add(mailbox(vm, BY_ROGUE), 1, __ATOMIC_RELAXED);
            vmig_dirty(vm->m, mailbox(vm, BY_ROGUE), 8);
        }
        usleep(50);
    }
    return NULL;
}

/* ---- what the library calls ---- */

static int stop(void *opaque)
{
    struct machine *vm = opaque;

    note(vm, "stop", "");
    pthread_mutex_lock(&vm->lock);
    vm->run = false;
    while (!vm->parked)
        pthread_cond_wait(&vm->changed, &vm->lock);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

static uint64_t hash_ram(struct machine *vm)
{
    return hash_bytes(vm->ram[0], BLOCK_BYTES) ^ hash_bytes(vm->ram[1], BLOCK_BYTES) * 3;
}

static int start(void *opaque)
{
    struct machine *vm = opaque;

    note(vm, "start", "");
    printf("hashed %" PRIx64 " counter %" PRIu64 "\n", hash_ram(vm), vm->counter);
    pthread_mutex_lock(&vm->lock);
    vm->run = true;
    pthread_cond_broadcast(&vm->changed);
    pthread_mutex_unlock(&vm->lock);
    return 0;
}

static int on_run(void *opaque, vmig_phase phase, const vmig_moment *at)
{
    static const char *const phases[] = { "prepare-stop", "stopped", "prepare-start", "starting" };
    struct handler *h = opaque;
    char who[32];

    if (phase > VMIG_STARTING || at->wall_ns == 0 || at->monotonic_ns == 0)
        return -EINVAL;
    snprintf(who, sizeof who, "handler %d", h->priority);
    note(h->vm, who, phases[phase]);
    if (phase == VMIG_STOPPED && h->priority == 7)
        mail(h->vm, AT_STOP, h->vm->counter);
    return phase == VMIG_STOPPED && h->vm->fail_priority == h->priority ? -ENODEV : 0;
}

static int pre_save(void *opaque)
{
    struct device *d = opaque;

    note(d->vm, d->name, "pre_save");
    d->counter = d->vm->counter;
    if (d == &d->vm->device[1])
        mail(d->vm, AT_PRE_SAVE, d->counter);
    return 0;
}

static int post_save(void *opaque)
{
    struct device *d = opaque;

    note(d->vm, d->name, "post_save");
    return 0;
}

/* The point of it all: a device that loads sees the RAM as it was when the guest had stopped and all was saved. */
static int check_ram(struct machine *vm, const char *who, uint64_t counter)
{
    if (*mailbox(vm, AT_STOP) == counter && *mailbox(vm, AT_PRE_SAVE) == counter)
        return 0;
    fprintf(stderr, "%s saw old RAM: counter %" PRIu64 ", from the stop %" PRIu64 ", from pre_save %" PRIu64 "\n", who,
            counter, *mailbox(vm, AT_STOP), *mailbox(vm, AT_PRE_SAVE));
    return -EILSEQ;
}

static int post_load(void *opaque, uint32_t version)
{
    struct device *d = opaque;

    (void)version;
    note(d->vm, d->name, "post_load");
    return d == &d->vm->early ? 0 : check_ram(d->vm, d->name, d->counter);
}

static int notes_prepare(void *vm)
{
    note(vm, "notes", "prepare");
    return 0;
}

static int notes_setup(void *vm, vmig_writer *out)
{
    note(vm, "notes", "setup");
    return vmig_put_u8(out, 1);
}

static int notes_pending(void *vm, uint64_t *must_precopy, uint64_t *can_postcopy)
{
    (void)vm, (void)must_precopy, (void)can_postcopy;
    return 0;
}

static int notes_iterate(void *vm, vmig_writer *out, uint64_t budget)
{
    (void)vm, (void)out, (void)budget;
    return 1;
}

static int notes_complete(void *opaque, vmig_writer *out)
{
    struct machine *vm = opaque;

    note(vm, "notes", "complete");
    return vmig_put_u64(out, vm->counter);
}

static int notes_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct machine *vm = opaque;

    (void)version;
    note(vm, "notes", part == VMIG_PART_START ? "load-start" : "load-end");
    return part == VMIG_PART_START ? (vmig_get_u8(in), 0) : check_ram(vm, "notes", vmig_get_u64(in));
}

static void notes_cleanup(void *vm)
{
    note(vm, "notes", "cleanup");
}

static int notes_load_setup(void *vm)
{
    note(vm, "notes", "load_setup");
    return 0;
}

static void notes_load_cleanup(void *vm, int ok)
{
    note(vm, "notes", ok ? "load_cleanup ok" : "load_cleanup failed");
}

/* ---- registering ---- */

static const vmig_field device_fields[] = { VMIG_U64(struct device, counter), VMIG_END };
static const vmig_field cpu_fields[] = { VMIG_U64(struct machine, counter), VMIG_U64(struct machine, random), VMIG_END };
static const vmig_device cpu_kind = { .size = sizeof(vmig_device), .name = "cpu", .version = 1, .fields = cpu_fields };

static void add_device(struct machine *vm, struct device *d, const char *name, int priority, uint32_t flags)
{
    vmig_device kind = VMIG_SIZED(vmig_device);

    kind.name = d->name = name, kind.version = 1, kind.fields = device_fields;
    kind.priority = priority, kind.flags = flags;
    kind.pre_save = pre_save, kind.post_save = post_save, kind.post_load = post_load;
    d->vm = vm;
    need(vmig_add_device(vm->m, &kind, 0, d), name);
}

static void add_notes(struct machine *vm)
{
    vmig_section_ops ops = VMIG_SIZED(vmig_section_ops);

    ops.prepare = notes_prepare, ops.setup = notes_setup, ops.pending_estimate = notes_pending;
    ops.iterate = notes_iterate, ops.complete = notes_complete, ops.cleanup = notes_cleanup;
    ops.load_setup = notes_load_setup, ops.load = notes_load, ops.load_cleanup = notes_load_cleanup;
    need(vmig_add_section(vm->m, "notes", 1, &ops, vm, NULL), "notes");
}

static void register_all(struct machine *vm)
{
    static const int priority[HANDLERS] = { -5, 7, 100 };
    static const char *const name[BLOCKS] = { "ram.a", "ram.b" };

    vmig_bql_lock(vm->m);
    for (size_t i = 0; i < BLOCKS; i++) {
        vmig_ram ram = VMIG_SIZED(vmig_ram);
        ram.name = name[i], ram.host = vm->ram[i], ram.len = BLOCK_BYTES, ram.gpa = i << 32;
        ram.flags = VMIG_RAM_MARKED;
        need(vmig_add_ram(vm->m, &ram), ram.name);
    }
    for (size_t i = 0; i < HANDLERS; i++) {
        vm->handler[i] = (struct handler){ .vm = vm, .priority = priority[i] };
        need(vmig_on_run(vm->m, priority[i], on_run, &vm->handler[i], NULL), "handler");
    }
    /* Registered in another order than they are to be saved in. */
    add_device(vm, &vm->device[0], "last", -3, 0);
    add_device(vm, &vm->device[1], "middle", 5, 0);
    need(vmig_add_device(vm->m, &cpu_kind, 0, vm), "cpu");
    add_device(vm, &vm->device[2], "first", 1000, 0);
    add_device(vm, &vm->early, "early", -1000, VMIG_DEVICE_EARLY);
    add_notes(vm);
    vmig_bql_unlock(vm->m);
}

static bool own_command(void *opaque, const char *verb, char *rest)
{
    struct machine *vm = opaque;

    if (strcmp(verb, "rogue") == 0) {
        vm->rogue_writes = strcmp(rest, "on") == 0;
        usleep(10000);
        printf("ok\n");
    } else if (strcmp(verb, "forget-mark") == 0) {
        vm->forget_mark = strcmp(rest, "on") == 0;
        printf("ok\n");
    } else if (strcmp(verb, "fail-handler") == 0) {
        vm->fail_priority = atoi(rest);
        printf("ok\n");
    } else if (strcmp(verb, "hash") == 0) {
        printf("hash %" PRIx64 " counter %" PRIu64 "\n", hash_ram(vm), vm->counter);
    } else if (strcmp(verb, "counter") == 0) {
        printf("counter %" PRIu64 "\n", __atomic_load_n(&vm->counter, __ATOMIC_RELAXED));
    } else {
        return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    static struct machine vm = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    bool arrives = argc == 2 && strcmp(argv[1], "incoming") == 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; i < BLOCKS; i++)
        vm.ram[i] = map_ram(BLOCK_BYTES);
    ops.stop = stop, ops.start = start;
    need(vmig_new(&ops, &vm, &vm.m), "vmig_new");
    register_all(&vm);
    if (pthread_create(&vm.guest, NULL, guest, &vm) || pthread_create(&vm.rogue, NULL, rogue, &vm))
        return 1;
    if (!arrives)
        need(vmig_start(vm.m), "vmig_start");
    printf("ready\n");
    serve(vm.m, own_command, &vm);
    vm.rogue_quit = true;
    pthread_join(vm.rogue, NULL);
    pthread_mutex_lock(&vm.lock);
    vm.quit = true;
    pthread_cond_broadcast(&vm.changed);
    pthread_mutex_unlock(&vm.lock);
    pthread_join(vm.guest, NULL);
    vmig_free(vm.m);
    return 0;
}
