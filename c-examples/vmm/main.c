/* Options, and a line protocol on standard input and output.                            SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "vmm.h"
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: vmm [options], then one command per line on standard input\n"
    "  --mem MIB            guest memory, half of it above 4 GiB (default 256)\n"
    "  --vcpus N            1 to 16 (default 2)\n"
    "  --memfd, --shared    memory from a memfd instead of anonymous memory; with --set 'hand-over on' at both sides it\n"
    "                       is handed over, not copied, to a VMM at unix:PATH on the same host\n"
    "  --huge               with --memfd: huge pages (2 MiB), which must have been reserved\n"
    "  --ring N             each vCPU has a dirty ring of N entries (a power of two) instead of one dirty log for all\n"
    "  --fill KIND          what memory holds at boot: random, zero, untouched, pattern (default)\n"
    "  --pages N            working set of the guest in pages (default 16384)\n"
    "  --burst N            pages the guest writes per tick, 0: as fast as it can (default 64)\n"
    "  --tick US            microseconds between two heartbeats (default 1000)\n"
    "  --spin               the guest waits busily between ticks instead of napping\n"
    "  --firmware FILE      one vCPU boots this image (up to 64 KiB, below 1 MiB and below 4 GiB), no built-in guest\n"
    "  --tsc-khz N          how fast the guest's TSC is (default: as the host's)\n"
    "  --hide-cpuid BIT     a bit the guest does not see: LEAF,SUBLEAF,REGISTER,BIT, register 0 is eax\n"
    "  --set 'NAME VALUE'   an option of the library; may be given several times\n"
    "  --incoming URI       do not boot; wait for a guest (defer: until somebody says where, by command or QMP)\n"
    "  --migrate-at S,URI   migrate to URI after S seconds\n"
    "  --qmp URI            serve QMP there: unix:PATH or tcp:HOST:PORT; with it the end of standard input is not the end\n"
    "  --hash-at-start FILE write page hashes of a guest that arrived, before it runs\n"
    "  --serial FILE        the serial console (default: standard error)\n"
    "  --events-fd FD       heartbeats and generations, one line each\n"
    "commands: migrate URI, incoming URI, cancel, resolve here|there, status, downtime, set OPTION VALUE, get OPTION,\n"
    "          error, pause, resume, pauses N, info, hash FILE, hash-at-start FILE, corrupt ADDRESS, type TEXT, quit.\n"
    "          measure sampling|bitmap|ring MS, rate, forecast BYTES-PER-SECOND.\n"
    "          Every command is answered by one line.\n";

enum { MAX_SETTINGS = 16 };

struct options {
    struct machine_config machine;
    struct boot_info boot;
    enum machine_fill fill;
    unsigned tick_us;
    const char *incoming, *serial, *hash_at_start, *firmware, *qmp;
    const char *setting[MAX_SETTINGS];
    size_t settings;
    char *migrate_at;
    int events_fd;
};

static uint64_t number(const char *option, const char *text, uint64_t least, uint64_t most)
{
    char *end;
    uint64_t value;

    errno = 0;
    value = strtoull(text, &end, 0);
    if (errno || end == text || *end || *text == '-' || value < least || value > most) {
        fprintf(stderr, "vmm: --%s %s: not a number from %" PRIu64 " to %" PRIu64 "\n", option, text, least, most);
        exit(2);
    }
    return value;
}

static enum machine_fill fill_kind(const char *text)
{
    static const char *const names[] = { "untouched", "zero", "pattern", "random" };

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(text, names[i]) == 0)
            return (enum machine_fill)i;
    fprintf(stderr, "vmm: --fill %s: not random, zero, untouched or pattern\n", text);
    exit(2);
}

static void hide_bit(struct cpu_config *cpu, char *text)
{
    char *rest = text, *word;
    int n = 0;

    while ((word = strsep(&rest, ",")) && n < 4) {
        static const uint64_t most[] = { UINT32_MAX, UINT32_MAX, 3, 31 };
        cpu->hidden[n] = (uint32_t)number("hide-cpuid", word, 0, most[n]);
        n++;
    }
    cpu->hides = n == 4 && !word;
    if (!cpu->hides) {
        fprintf(stderr, "vmm: --hide-cpuid: not LEAF,SUBLEAF,REGISTER,BIT\n");
        exit(2);
    }
}

static void parse(int argc, char **argv, struct options *o)
{
    static const struct option names[] = {
        { "mem", 1, NULL, 'm' },      { "vcpus", 1, NULL, 'c' },      { "shared", 0, NULL, 's' },
        { "memfd", 0, NULL, 's' },    { "huge", 0, NULL, 'u' },
        { "fill", 1, NULL, 'f' },     { "pages", 1, NULL, 'p' },      { "burst", 1, NULL, 'b' },
        { "tick", 1, NULL, 't' },     { "spin", 0, NULL, 'S' },       { "incoming", 1, NULL, 'i' },
        { "migrate-at", 1, NULL, 'a' }, { "hash-at-start", 1, NULL, 'h' }, { "serial", 1, NULL, 'l' },
        { "events-fd", 1, NULL, 'e' }, { "firmware", 1, NULL, 'F' }, { "help", 0, NULL, 'H' },
        { "set", 1, NULL, 'o' },      { "tsc-khz", 1, NULL, 'k' },    { "hide-cpuid", 1, NULL, 'x' },
        { "qmp", 1, NULL, 'q' },      { "ring", 1, NULL, 'r' },
        { NULL, 0, NULL, 0 },
    };
    int c, index = 0;

    *o = (struct options){ .machine = { .mem_bytes = 256ull << 20, .vcpus = 2 }, .fill = FILL_PATTERN, .tick_us = 1000,
                           .boot = { .hot_pages = 16384, .burst = 64 }, .events_fd = -1 };
    while ((c = getopt_long(argc, argv, "", names, &index)) != -1) {
        const char *name = c == '?' ? "" : names[index].name;
        switch (c) {
        case 'm': o->machine.mem_bytes = number(name, optarg, 16, 65536) / 4 * 4 << 20; break;
        case 'c': o->machine.vcpus = (unsigned)number(name, optarg, 1, GUEST_MAX_VCPUS); break;
        case 's': o->machine.shared = true; break;
        case 'u': o->machine.huge = true; break;
        case 'f': o->fill = fill_kind(optarg); break;
        case 'p': o->boot.hot_pages = (uint32_t)number(name, optarg, 1, UINT32_MAX); break;
        case 'b': o->boot.burst = (uint32_t)number(name, optarg, 0, UINT32_MAX); break;
        case 't': o->tick_us = (unsigned)number(name, optarg, 100, 1000000); break;
        case 'S': o->boot.spin = 1; break;
        case 'i': o->incoming = optarg; break;
        case 'a': o->migrate_at = optarg; break;
        case 'h': o->hash_at_start = optarg; break;
        case 'l': o->serial = optarg; break;
        case 'e': o->events_fd = (int)number(name, optarg, 0, 1 << 20); break;
        case 'k': o->machine.cpu.tsc_khz = (uint32_t)number(name, optarg, 1, UINT32_MAX); break;
        case 'x': hide_bit(&o->machine.cpu, optarg); break;
        case 'F': o->firmware = optarg; break;
        case 'q': o->qmp = optarg; break;
        case 'r': o->machine.ring = (unsigned)number(name, optarg, 256, 65536); break;
        case 'o':
            if (o->settings == MAX_SETTINGS) {
                fprintf(stderr, "vmm: more than %d times --set\n", MAX_SETTINGS);
                exit(2);
            }
            o->setting[o->settings++] = optarg;
            break;
        case 'H': fputs(usage, stdout); exit(0);
        default: fputs(usage, stderr); exit(2);
        }
    }
    if (optind != argc) {
        fputs(usage, stderr);
        exit(2);
    }
}

static void use_firmware(struct options *o)
{
    static struct firmware firmware;
    int err;

    if (!o->firmware)
        return;
    if (o->machine.mem_bytes > RAM_LOW_MAX)
        machine_die(2, "--firmware: such a machine has no RAM above 4 GiB, so --mem is at most %llu",
                    RAM_LOW_MAX >> 20);
    if ((err = firmware_read(&firmware, o->firmware)) < 0)
        machine_die(2, "--firmware %s: %s (an image is whole pages, 64 KiB at most)", o->firmware, strerror(-err));
    o->machine.firmware = &firmware;
    o->machine.vcpus = 1;
}

/* ---- commands ---- */

static void reply(int err, const char *what)
{
    if (err < 0)
        printf("error %s: %s\n", what, strerror(-err));
    else
        printf("ok\n");
}

/* Uneven distances, so that the pauses hit the vCPUs in the guest, in exits, in naps and between them. */
static int many_pauses(struct machine *vm, const char *count)
{
    long n = count ? strtol(count, NULL, 10) : 0;
    int err = 0;

    while (n-- > 0 && err >= 0) {
        struct timespec distance = { .tv_nsec = n * 7919 % 1500000 };
        nanosleep(&distance, NULL);
        if ((err = migrate_pause(vm)) >= 0)
            err = migrate_resume(vm);
    }
    return err;
}

/* For the next guest that arrives; one that runs already cannot be hashed before it starts. */
static int hash_at_start(struct machine *vm, const char *path)
{
    static char kept[256];

    if (!path || strlen(path) >= sizeof kept)
        return -EINVAL;
    strcpy(kept, path);
    vm->hash_at_start = kept;
    return 0;
}

static int corrupt(struct machine *vm, const char *address)
{
    uint8_t *at = address ? machine_host(vm, strtoull(address, NULL, 0)) : NULL;

    if (!at)
        return -EFAULT;
    *(volatile uint8_t *)at ^= 0x80;
    return 0;
}

static void info(struct machine *vm)
{
    pthread_mutex_lock(&vm->lock);
    printf("info ticks=%" PRIu32 " clock-ns=%" PRIu64, vm->ticker.count, migrate_clock_ns(vm));
    for (size_t i = 0; i < vm->vcpus; i++)
        printf(" generation.%zu=%" PRIu32 " verified.%zu=%" PRIu64, i, vm->vcpu[i].probe.generation, i,
               vm->vcpu[i].probe.verified);
    pthread_mutex_unlock(&vm->lock);
    putchar('\n');
}

static bool obey(struct machine *vm, char *line)         /* false: quit */
{
    char *rest = line, *verb = strsep(&rest, " ");
    int err;

    if (strcmp(verb, "quit") == 0)
        return false;
    if (strcmp(verb, "pauses") == 0)
        reply(many_pauses(vm, rest), verb);
    else if (strcmp(verb, "hash") == 0)
        reply(rest ? hash_write(vm, rest) : -EINVAL, verb);
    else if (strcmp(verb, "hash-at-start") == 0)
        reply(hash_at_start(vm, rest), verb);
    else if (strcmp(verb, "corrupt") == 0)
        reply(corrupt(vm, rest), verb);
    else if (strcmp(verb, "info") == 0)
        info(vm);
    else if (strcmp(verb, "type") == 0) {
        pthread_mutex_lock(&vm->lock);
        uart_type(vm, rest ? rest : "");
        pthread_mutex_unlock(&vm->lock);
        reply(0, verb);
    } else if ((err = migrate_command(vm, verb, rest)) == -ENOENT)
        printf("error %s: no such command\n", verb);
    return true;
}

/* ---- the main loop ---- */

enum said { SAID_MORE, SAID_QUIT, SAID_LAST };          /* LAST: nobody commands us any more */

static enum said read_commands(struct machine *vm)
{
    static char buffer[4096];
    static size_t have;
    ssize_t n = read(STDIN_FILENO, buffer + have, sizeof buffer - have);
    char *line = buffer, *end;

    if (n <= 0)
        return n < 0 && errno == EINTR ? SAID_MORE : SAID_LAST;
    have += (size_t)n;
    for (; (end = memchr(line, '\n', have - (size_t)(line - buffer))); line = end + 1) {
        *end = '\0';
        if (!obey(vm, line))
            return SAID_QUIT;
    }
    have -= (size_t)(line - buffer);
    memmove(buffer, line, have);
    return have < sizeof buffer ? SAID_MORE : SAID_QUIT;  /* a line without an end is no command */
}

static int split_migrate_at(char *text, uint64_t *when, char **uri)
{
    char *comma = text ? strchr(text, ',') : NULL, *end;
    double seconds;

    *when = UINT64_MAX;
    if (!text)
        return 0;                                       /* never */
    seconds = strtod(text, &end);
    if (!comma || end != comma || !(seconds >= 0 && seconds < 1e6))
        return -EINVAL;
    *when = now_ns() + (uint64_t)(seconds * 1e9);
    *uri = comma + 1;
    return 0;
}

static int main_loop(struct machine *vm, char *migrate_at, bool stays)
{
    struct pollfd fds[3] = { { .fd = STDIN_FILENO, .events = POLLIN },
                             { .fd = migrate_event_fd(vm), .events = POLLIN },
                             { .fd = vm->quit_fd, .events = POLLIN } };
    uint64_t when;
    char *uri = NULL;

    if (split_migrate_at(migrate_at, &when, &uri) < 0) {
        fprintf(stderr, "vmm: --migrate-at %s: not SECONDS,URI\n", migrate_at);
        return -EINVAL;
    }
    for (;;) {
        uint64_t now = now_ns();
        enum said said;
        int wait_ms = when == UINT64_MAX ? -1 : when > now ? (int)((when - now) / 1000000) + 1 : 0;

        if (poll(fds, 3, wait_ms) < 0 && errno != EINTR)
            return -errno;
        if (fds[2].revents)
            return 0;
        if (fds[1].revents & POLLIN)
            migrate_events(vm);
        said = fds[0].revents ? read_commands(vm) : SAID_MORE;
        if (said == SAID_QUIT || (said == SAID_LAST && !stays))
            return 0;
        if (said == SAID_LAST)
            fds[0].fd = -1;                             /* QMP goes on */
        if (now_ns() >= when) {
            migrate_command(vm, "migrate", uri);
            when = UINT64_MAX;
        }
    }
}

static int start_guest(struct machine *vm, const struct options *o)
{
    int err;

    for (size_t i = 0; i < o->settings; i++)            /* most options are fixed once somebody listens */
        if ((err = migrate_set(vm, o->setting[i])) < 0) {
            fprintf(stderr, "vmm: --set '%s': %s\n", o->setting[i], migrate_error());
            return err;
        }
    if (o->qmp && (err = migrate_serve(vm, o->qmp)) < 0) {
        fprintf(stderr, "vmm: --qmp %s: %s\n", o->qmp, migrate_error());
        return err;
    }
    if (o->incoming && strcmp(o->incoming, "defer") == 0) {
        if ((err = migrate_pause(vm)) >= 0)             /* not booted: nobody may take it for a guest that runs */
            printf("deferred\n");
        return err;
    }
    if (o->incoming)
        return migrate_listen(vm, o->incoming);
    if (o->machine.firmware)
        firmware_boot(vm, o->machine.firmware);
    else if ((err = machine_boot(vm, &o->boot, o->fill, o->tick_us)) < 0)
        return err;
    if ((err = migrate_resume(vm)) < 0)
        return err;
    printf("running\n");
    return 0;
}

int main(int argc, char **argv)
{
    static struct machine vm;
    struct options o;
    int err;

    parse(argc, argv, &o);
    use_firmware(&o);
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);                           /* a harness that went away is an error code, not the end */
    vm.events_fd = o.events_fd;
    vm.hash_at_start = o.hash_at_start;
    vm.quit_fd = -1;
    vm.serial_fd = o.serial ? open(o.serial, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : STDERR_FILENO;
    if (vm.serial_fd < 0)
        machine_die(EXIT_VMM_FAULT, "--serial %s: %s", o.serial, strerror(errno));
    if ((err = machine_create(&vm, &o.machine)) < 0)
        machine_die(EXIT_VMM_FAULT, "cannot create the machine: %s", strerror(-err));
    if ((err = migrate_setup(&vm)) < 0 || (err = ticker_start_thread(&vm)) < 0 ||
        (err = vcpus_start_threads(&vm)) < 0 || (err = start_guest(&vm, &o)) < 0)
        machine_die(EXIT_VMM_FAULT, "cannot start the guest: %s", strerror(-err));
    err = main_loop(&vm, o.migrate_at, o.qmp);
    vcpus_end_threads(&vm);                             /* these ask for the guest's clock, so they end first */
    ticker_end_thread(&vm);
    migrate_teardown(&vm);                              /* may still call our hooks; after it nobody does */
    machine_destroy(&vm);
    return err < 0 ? EXIT_VMM_FAULT : 0;
}
