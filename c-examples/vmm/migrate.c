/* Everything that makes this VMM migratable: the one file to copy.                      SPDX: MIT OR Apache-2.0
 *
 * The VMM brings a way to pause and resume itself, a lock around its devices, and its state. It tells the library
 * once where all of that is (migrate_setup); then every move is one call. */
#define _GNU_SOURCE
#include "vmm.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <vmig.h>

/* ---- the hooks: called by the library's threads, big lock not held ---- */

static int stop(void *opaque)
{
    struct machine *vm = opaque;
    int err = machine_pause(vm);

    event_line(vm, "stopped %" PRIu64 "\n", now_ns());
    return err;
}

/* Runs the guest, here for the first time or again. An arriving guest is complete at this point and has not run, so
 * this is the moment to compare its memory with what the source sent. */
static int start(void *opaque)
{
    struct machine *vm = opaque;

    if (vm->hash_at_start) {
        uint64_t begin = now_ns();
        int err = hash_write(vm, vm->hash_at_start);
        if (err < 0)
            return err;                                 /* nothing ran: the source takes the guest back */
        vm->hash_at_start = NULL;
        event_line(vm, "hashed %" PRIu64 "\n", now_ns() - begin);
    }
    event_line(vm, "started %" PRIu64 "\n", now_ns());
    return machine_resume(vm);
}

static int throttle(void *opaque, uint32_t percent)
{
    machine_throttle(opaque, percent);
    return 0;
}

static void lock(void *opaque)
{
    pthread_mutex_lock(&((struct machine *)opaque)->lock);
}

static void unlock(void *opaque)
{
    pthread_mutex_unlock(&((struct machine *)opaque)->lock);
}

/* The guest came with its memory: keep that file instead of our own. Devices that know the memory by its file, such as
 * vhost-user's, would be told here. */
static int ram_replaced(void *opaque, const char *name, void *host, uint64_t len, int fd, uint64_t offset)
{
    struct machine *vm = opaque;
    int kept = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    (void)host, (void)len, (void)offset;
    if (kept < 0)
        return -errno;
    for (size_t i = 0; i < RAM_BLOCKS; i++)
        if (strcmp(vm->ram[i].name, name) == 0) {
            close(vm->ram[i].fd);
            vm->ram[i].fd = kept;
            return 0;
        }
    close(kept);
    return -ENOENT;
}

/* ---- the devices: one table each, for both directions ---- */

static int uart_loaded(void *dev, uint32_t version)
{
    (void)version;
    return ((struct uart *)dev)->rx_count <= sizeof ((struct uart *)dev)->rx ? 0 : -EINVAL;
}

static int probe_loaded(void *dev, uint32_t version)
{
    (void)version;
    return ((struct probe *)dev)->words <= PROBE_WORDS ? 0 : -EINVAL;
}

static int ticker_loaded(void *dev, uint32_t version)
{
    const struct ticker *t = dev;

    (void)version;
    return t->expiry == TIMER_OFF || t->period_us != 0 ? 0 : -EINVAL;       /* an armed timer has a period */
}

static const vmig_field uart_fields[] = {
    VMIG_U8(struct uart, ier), VMIG_U8(struct uart, fcr), VMIG_U8(struct uart, lcr), VMIG_U8(struct uart, mcr),
    VMIG_U8(struct uart, scratch), VMIG_U8(struct uart, dll), VMIG_U8(struct uart, dlm),
    VMIG_U8(struct uart, rx_count), VMIG_BYTES(struct uart, rx),
    VMIG_END,
};
static const vmig_device uart_kind = {
    .size = sizeof(vmig_device), .name = "uart", .version = 1, .oldest = 1, .fields = uart_fields,
    .post_load = uart_loaded,
};

static const vmig_field ticker_fields[] = {
    VMIG_U32(struct ticker, period_us), VMIG_U32(struct ticker, count), VMIG_TIMER(struct ticker, expiry),
    VMIG_END,
};
static const vmig_device ticker_kind = {
    .size = sizeof(vmig_device), .name = "ticker", .version = 1, .oldest = 1, .fields = ticker_fields,
    .post_load = ticker_loaded,
};

static const vmig_field probe_fields[] = {
    VMIG_U32_ARRAY(struct probe, word), VMIG_U32(struct probe, words), VMIG_U32(struct probe, generation),
    VMIG_U64(struct probe, verified),
    VMIG_END,
};
static const vmig_device probe_kind = {
    .size = sizeof(vmig_device), .name = "probe", .version = 1, .oldest = 1, .fields = probe_fields,
    .post_load = probe_loaded,
};

/* ---- telling the library, once ---- */

static int add_ram(vmig *m, const struct ram_block *block)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    vmig_kvm_slot slot = VMIG_SIZED(vmig_kvm_slot);
    int err;

    ram.name = block->name, ram.host = block->host, ram.len = block->len, ram.gpa = block->gpa;
    if (block->fd >= 0)
        ram.flags = VMIG_RAM_FD, ram.fd = block->fd;    /* may be handed over, if the option says so */
    slot.slot = block->slot, slot.ram = block->name, slot.len = block->len, slot.gpa = block->gpa;
    if ((err = vmig_add_ram(m, &ram)) < 0)
        return err;
    return vmig_add_kvm_slot(m, &slot);
}

static int add_everything(vmig *m, struct machine *vm)  /* big lock held */
{
    int vcpu_fd[GUEST_MAX_VCPUS], err;

    for (size_t i = 0; i < vm->vcpus; i++)
        vcpu_fd[i] = vm->vcpu[i].fd;
    if ((err = vmig_use_kvm(m, vm->vm_fd, vcpu_fd, vm->vcpus)) < 0)
        return err;
    for (size_t i = 0; i < RAM_BLOCKS; i++)
        if ((err = add_ram(m, &vm->ram[i])) < 0)
            return err;
    for (size_t i = 0; i < vm->vcpus; i++)
        if ((err = vmig_add_device(m, &probe_kind, (uint32_t)i, &vm->vcpu[i].probe)) < 0)
            return err;
    if ((err = vmig_add_device(m, &uart_kind, 0, &vm->uart)) < 0)
        return err;
    return vmig_add_device(m, &ticker_kind, 0, &vm->ticker);
}

int migrate_setup(struct machine *vm)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    int err;

    ops.stop = stop, ops.start = start, ops.lock = lock, ops.unlock = unlock;
    ops.ram_replaced = ram_replaced, ops.throttle = throttle;
    if ((err = vmig_new(&ops, vm, &vm->migration)) >= 0) {
        vmig_bql_lock(vm->migration);
        err = add_everything(vm->migration, vm);
        vmig_bql_unlock(vm->migration);
    }
    if (err < 0)
        fprintf(stderr, "vmm: not migratable: %s\n", vmig_errmsg());
    return err;
}

void migrate_teardown(struct machine *vm)
{
    vmig_free(vm->migration);
    if (vm->quit_fd > 0)
        close(vm->quit_fd);
}

/* ---- QMP: the library serves its own commands; these are ours ---- */

static int qmp_quit(void *opaque, const char *arguments, vmig_reply *reply)
{
    struct machine *vm = opaque;
    uint64_t one = 1;

    (void)arguments, (void)reply;
    return write(vm->quit_fd, &one, sizeof one) == sizeof one ? 0 : -errno;
}

static int qmp_guest(void *opaque, const char *arguments, vmig_reply *reply)
{
    struct machine *vm = opaque;
    char json[128];

    if (strcmp(arguments, "{}") != 0) {
        vmig_reply_error(reply, "query-guest takes no arguments");
        return -EINVAL;
    }
    pthread_mutex_lock(&vm->lock);
    snprintf(json, sizeof json, "{\"vcpus\": %zu, \"ticks\": %" PRIu32 ", \"verified-pages\": %" PRIu64 "}", vm->vcpus,
             vm->ticker.count, vm->vcpu[0].probe.verified);
    pthread_mutex_unlock(&vm->lock);
    return vmig_reply_json(reply, json);
}

int migrate_serve(struct machine *vm, const char *uri)
{
    vmig *m = vm->migration;
    char *address;
    int err;

    if ((vm->quit_fd = eventfd(0, EFD_CLOEXEC)) < 0)
        return -errno;
    if ((err = vmig_qmp_add(m, "quit", qmp_quit, vm, NULL)) < 0 ||
        (err = vmig_qmp_add(m, "query-guest", qmp_guest, vm, NULL)) < 0 || (err = vmig_qmp_listen(m, uri)) < 0)
        return err;
    address = vmig_get(m, "qmp-address");
    printf("note qmp %s\n", address ? address : uri);
    vmig_string_free(address);
    return 0;
}

/* The VMM's own pause and resume, and the clock its timers follow, belong to the migration too. */
int migrate_pause(struct machine *vm)
{
    return vmig_stop(vm->migration);
}

int migrate_resume(struct machine *vm)
{
    return vmig_start(vm->migration);
}

uint64_t migrate_clock_ns(struct machine *vm)
{
    return vmig_clock_ns(vm->migration);
}

/* Only with --ring: a vCPU cannot go on before there is room in its dirty ring. */
void migrate_ring_full(struct machine *vm, unsigned vcpu)
{
    if (vmig_dirty_ring_full(vm->migration, vcpu) < 0)
        machine_die(EXIT_VMM_FAULT, "vCPU %u: %s", vcpu, vmig_errmsg());
}

/* ---- moving ---- */

/* Waits for a guest: a new one, or the one that left for elsewhere and comes back. */
int migrate_listen(struct machine *vm, const char *uri)
{
    int err = vmig_incoming(vm->migration, uri);
    char *address;

    if (err < 0) {
        printf("error incoming: %s\n", vmig_errmsg());
        return err;
    }
    address = vmig_get(vm->migration, "listen-address");
    printf("listening %s\n", address ? address : uri);
    vmig_string_free(address);
    return 0;
}

static void print_status(vmig *m)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    if (vmig_get_status(m, &s) < 0) {
        printf("error status: %s\n", vmig_errmsg());
        return;
    }
    printf("status state=%s iteration=%" PRIu64 " total=%" PRIu64 " remaining=%" PRIu64 " sent=%" PRIu64
           " dirty-rate=%" PRIu64 " bandwidth=%" PRIu64 " elapsed=%" PRIu64 " expected-downtime=%" PRIu64
           " downtime=%" PRIu64 " eta=%" PRIu64 " over=%d\n", vmig_state_name(s.state), s.iteration, s.total, s.remaining,
           s.transferred, s.dirty_rate, s.bandwidth, s.elapsed, s.expected_downtime, s.downtime, s.eta,
           vmig_wait(m, 0));
}

static void print_parts(const char *which, const vmig_downtime *d)
{
    printf(" %s: stop=%" PRIu64 " devices=%" PRIu64 " sync=%" PRIu64 " ram=%" PRIu64 " load=%" PRIu64 " start=%" PRIu64
           " go=%" PRIu64 " total=%" PRIu64 " unexplained=%" PRIu64 " verify=%" PRIu64, which, d->stop, d->devices,
           d->sync, d->ram, d->load, d->start, d->go, d->total, d->unexplained, d->verify);
}

static void print_downtime(vmig *m)
{
    vmig_downtime expected = VMIG_SIZED(vmig_downtime), actual = VMIG_SIZED(vmig_downtime);

    if (vmig_get_expected_downtime(m, &expected) < 0 || vmig_get_downtime(m, &actual) < 0) {
        printf("error downtime: %s\n", vmig_errmsg());
        return;
    }
    printf("downtime");
    print_parts("expected", &expected);
    print_parts("actual", &actual);
    printf("\n");
}

static int measure(vmig *m, const char *argument)
{
    static const char *const modes[] = { "sampling", "bitmap", "ring" };    /* VMIG_RATE_SAMPLING and so on */
    const char *ms = argument ? strchr(argument, ' ') : NULL;

    for (uint32_t i = 0; ms && i < 3; i++)
        if (strncmp(argument, modes[i], (size_t)(ms - argument)) == 0)
            return vmig_measure_dirty_rate(m, i, strtoull(ms, NULL, 10), 0);
    return vmig_measure_dirty_rate(m, UINT32_MAX, 0, 0);    /* let the library say what it misses */
}

static void print_rate(vmig *m)
{
    vmig_dirty_rate r = VMIG_SIZED(vmig_dirty_rate);
    char *why = NULL;

    vmig_get_dirty_rate(m, &r, &why);
    printf("rate state=%" PRIu32 " rate=%" PRIu64 " working-set=%" PRIu64 " content=%" PRIu64 " complete=%" PRIu32
           " steady=%" PRIu32 " why %s\n", r.state, r.rate, r.working_set, r.content, r.complete, r.steady,
           why ? why : "none");
    vmig_string_free(why);
}

static void print_forecast(vmig *m, const char *bandwidth)
{
    static const char *const verdicts[] = { "unknown", "converges", "does-not" };
    vmig_forecast_report f = VMIG_SIZED(vmig_forecast_report);
    char *why = NULL;

    vmig_forecast(m, bandwidth ? strtoull(bandwidth, NULL, 10) : 0, &f, &why);
    printf("forecast verdict=%s total=%" PRIu64 " rounds=%" PRIu64 " blackout=%" PRIu64 " left=%" PRIu64 " sent=%" PRIu64
           " why %s\n", verdicts[f.verdict], f.total, f.rounds, f.blackout, f.left, f.sent, why ? why : "none");
    vmig_string_free(why);
}

static void print_string(const char *label, char *value)
{
    printf("%s %s\n", label, value ? value : "none");
    vmig_string_free(value);
}

static void print_result(const char *verb, int err)
{
    if (err < 0)
        printf("error %s: %s\n", verb, vmig_errmsg());
    else
        printf("ok\n");
}

int migrate_set(struct machine *vm, const char *name_and_value)
{
    vmig *m = vm->migration;
    const char *space = name_and_value ? strchr(name_and_value, ' ') : NULL;
    char name[64];

    if (!space || (size_t)(space - name_and_value) >= sizeof name)
        return vmig_set(m, name_and_value, NULL);       /* let the library say what it misses */
    memcpy(name, name_and_value, (size_t)(space - name_and_value));
    name[space - name_and_value] = '\0';
    return vmig_set(m, name, space + 1);
}

int migrate_command(struct machine *vm, const char *verb, const char *argument)
{
    vmig *m = vm->migration;

    if (strcmp(verb, "migrate") == 0)
        print_result(verb, vmig_outgoing(m, argument));
    else if (strcmp(verb, "incoming") == 0)
        migrate_listen(vm, argument);
    else if (strcmp(verb, "cancel") == 0)
        print_result(verb, vmig_cancel(m));
    else if (strcmp(verb, "resolve") == 0)
        print_result(verb, vmig_resolve(m, argument && strcmp(argument, "here") == 0));
    else if (strcmp(verb, "pause") == 0)
        print_result(verb, migrate_pause(vm));
    else if (strcmp(verb, "resume") == 0)
        print_result(verb, migrate_resume(vm));
    else if (strcmp(verb, "set") == 0)
        print_result(verb, migrate_set(vm, argument));
    else if (strcmp(verb, "get") == 0)
        print_string("value", vmig_get(m, argument));
    else if (strcmp(verb, "error") == 0)
        print_string("failure", vmig_get_error(m));
    else if (strcmp(verb, "status") == 0)
        print_status(m);
    else if (strcmp(verb, "measure") == 0)
        print_result(verb, measure(m, argument));
    else if (strcmp(verb, "rate") == 0)
        print_rate(m);
    else if (strcmp(verb, "forecast") == 0)
        print_forecast(m, argument);
    else if (strcmp(verb, "downtime") == 0)
        print_downtime(m);
    else
        return -ENOENT;
    return 0;
}

const char *migrate_error(void)
{
    return vmig_errmsg();
}

/* The main loop polls this fd beside its own and then asks what happened. */
int migrate_event_fd(struct machine *vm)
{
    return vmig_event_fd(vm->migration);
}

void migrate_events(struct machine *vm)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    while (vmig_next_event(vm->migration, &s) == 1) {
        char *why = s.state == VMIG_STATE_FAILED ? vmig_get_error(vm->migration) : NULL;
        printf("event %s%s%s\n", vmig_state_name(s.state), why ? " " : "", why ? why : "");
        vmig_string_free(why);
    }
}
