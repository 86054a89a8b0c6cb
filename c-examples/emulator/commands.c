/* What an operator may ask for, a line each, answered by a line.                        SPDX: MIT OR Apache-2.0
 *
 * A real emulator has a monitor, a window or a socket for this; none of it is needed to be migratable. */
#include "emulator.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vmig.h>

static void answer(const char *verb, int err)
{
    if (err < 0)
        printf("error %s: %s\n", verb, vmig_errmsg());
    else
        printf("ok\n");
}

static void answer_text(char *text)
{
    printf("value %s\n", text ? text : "none");
    vmig_string_free(text);
}

static void answer_status(vmig *m)
{
    vmig_status s = VMIG_SIZED(vmig_status);
    char *tracker = vmig_get(m, "dirty-tracker-in-use");
    int err = vmig_get_status(m, &s);

    if (err < 0)
        answer("status", err);
    else
        printf("status state=%s iteration=%" PRIu64 " total=%" PRIu64 " remaining=%" PRIu64 " sent=%" PRIu64 " normal=%" PRIu64
               " trackers=%" PRIu64 " downtime=%" PRIu64 " in-use=%s\n", vmig_state_name(s.state), s.iteration, s.total,
               s.remaining, s.transferred, s.normal_pages, s.trackers, s.downtime, tracker ? tracker : "none");
    vmig_string_free(tracker);
}

int arrive(struct machine *vm, const char *uri)
{
    int err = vmig_incoming(vm->migration, uri);
    char *address;

    if (err < 0)
        return err;
    address = vmig_get(vm->migration, "listen-address");
    printf("listening %s\n", address ? address : uri);
    vmig_string_free(address);
    return 0;
}

static void answer_info(const struct machine *vm)
{
    printf("value running=%d hash=%016" PRIx64 " retired=%" PRIu64 " clock-ns=%" PRIu64 " typed=%u\n", vm->running,
           machine_hash(vm), vm->cpu.retired, vm->clint.clock_ns, vm->uart.rx_count);
}

static void type(struct machine *vm, const char *text)
{
    for (; *text; text++)
        machine_type(vm, *text);
    answer("type", 0);
}

/* For whoever doubts that the guest notices: a bit of its memory changes, and nobody is told. */
static void corrupt(struct machine *vm, const char *address)
{
    uint8_t *at = machine_ram(vm, (uint32_t)strtoul(address, NULL, 0), 1);

    if (!at) {
        printf("error corrupt: there is no RAM at '%s'\n", address);
        return;
    }
    *at ^= 0x10;
    printf("ok\n");
}

bool command(struct machine *vm, char *line)
{
    char *rest = line, *verb = strsep(&rest, " "), *argument = rest ? rest : "";
    vmig *m = vm->migration;
    int err;

    if (strcmp(verb, "quit") == 0)
        return false;
    if (strcmp(verb, "migrate") == 0) {
        answer(verb, vmig_outgoing(m, argument));
    } else if (strcmp(verb, "incoming") == 0) {
        if ((err = arrive(vm, argument)) < 0)
            answer(verb, err);
    } else if (strcmp(verb, "cancel") == 0) {
        answer(verb, vmig_cancel(m));
    } else if (strcmp(verb, "pause") == 0) {
        answer(verb, vmig_stop(m));
    } else if (strcmp(verb, "resume") == 0) {
        answer(verb, vmig_start(m));
    } else if (strcmp(verb, "status") == 0) {
        answer_status(m);
    } else if (strcmp(verb, "error") == 0) {
        answer_text(vmig_get_error(m));
    } else if (strcmp(verb, "set") == 0) {
        char *value = argument, *name = strsep(&value, " ");
        answer(verb, vmig_set(m, name, value));
    } else if (strcmp(verb, "info") == 0) {
        answer_info(vm);
    } else if (strcmp(verb, "type") == 0) {
        type(vm, argument);
    } else if (strcmp(verb, "corrupt") == 0) {
        corrupt(vm, argument);
    } else {
        printf("error %s: no such command\n", verb);
    }
    return true;
}
