/* Options, and the poll loop.                                                           SPDX: MIT OR Apache-2.0 */
#include "emulator.h"
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <vmig.h>

static const char usage[] =
    "usage: emulator [options] [IMAGE], then one command per line on standard input\n"
    "  IMAGE                what to run: a raw binary, loaded to the start of RAM; none: wait for a guest\n"
    "  --mem MIB            guest memory, 1 to 1024 (default 16)\n"
    "  --tracker KIND       who finds the pages the guest writes while it is copied: marks (each store is reported; the\n"
    "                       default), bitmap (the emulator keeps a bitmap), write-protect, none, auto\n"
    "  --busy MS            how long the guest runs between two looks at everything else (default 2)\n"
    "  --set 'NAME VALUE'   an option of the library; may be given several times\n"
    "  --incoming URI       wait there for a guest\n"
    "  --console FILE       the guest's console, appended to (default: standard error)\n"
    "It ends with status 0 when told to, or when the guest switches off; 3: the guest found something wrong.\n";

enum { EXIT_USAGE = 2, EXIT_GUEST = 3, MAX_SETTINGS = 16 };

struct options {
    uint32_t mem_mib;
    unsigned busy_ms;
    const char *tracker, *incoming, *console, *image;
    char *setting[MAX_SETTINGS];
    size_t settings;
};

static unsigned number(const char *option, const char *text, unsigned least, unsigned most)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);

    if (end == text || *end || *text == '-' || value < least || value > most) {
        fprintf(stderr, "emulator: --%s %s: not a number from %u to %u\n", option, text, least, most);
        exit(EXIT_USAGE);
    }
    return (unsigned)value;
}

static void parse(int argc, char **argv, struct options *o)
{
    static const struct option names[] = {
        { "mem", 1, NULL, 'm' },      { "tracker", 1, NULL, 't' }, { "busy", 1, NULL, 'b' }, { "set", 1, NULL, 's' },
        { "incoming", 1, NULL, 'i' }, { "console", 1, NULL, 'c' }, { "help", 0, NULL, 'h' }, { NULL, 0, NULL, 0 },
    };
    int c;

    *o = (struct options){ .mem_mib = 16, .busy_ms = 2, .tracker = "marks" };
    while ((c = getopt_long(argc, argv, "", names, NULL)) != -1) {
        if (c == 's' && o->settings < MAX_SETTINGS)
            o->setting[o->settings++] = optarg;
        else if (c == 'm')
            o->mem_mib = number("mem", optarg, 1, 1024);
        else if (c == 'b')
            o->busy_ms = number("busy", optarg, 0, 1000);
        else if (c == 't')
            o->tracker = optarg;
        else if (c == 'i')
            o->incoming = optarg;
        else if (c == 'c')
            o->console = optarg;
        else {
            fputs(usage, c == 'h' ? stdout : stderr);
            exit(c == 'h' ? 0 : EXIT_USAGE);
        }
    }
    if (argc - optind > 1 || (argc > optind && o->incoming)) {
        fputs(usage, stderr);
        exit(EXIT_USAGE);
    }
    o->image = argv[optind];
}

/* Obeys the whole lines of what was typed; false: the end. Without stdio, which would keep lines from poll(2). */
static bool read_commands(struct machine *vm)
{
    static char buffer[1024];
    static size_t have;
    ssize_t n = read(STDIN_FILENO, buffer + have, sizeof buffer - have);
    char *line = buffer, *end;

    if (n <= 0)
        return n < 0 && errno == EINTR;
    have += (size_t)n;
    for (; (end = memchr(line, '\n', have - (size_t)(line - buffer))); line = end + 1) {
        *end = '\0';
        if (!command(vm, line))
            return false;
    }
    have -= (size_t)(line - buffer);
    memmove(buffer, line, have);
    return have < sizeof buffer;                /* a line without an end is no command */
}

/* The one thread: commands, the library's callbacks, and the guest, in turn. */
static int loop(struct machine *vm, unsigned busy_ms)
{
    struct pollfd fds[] = { { .fd = STDIN_FILENO, .events = POLLIN },
                            { .fd = vmig_dispatch_fd(vm->migration), .events = POLLIN } };
    int err;

    while (!vm->off) {
        if (poll(fds, 2, machine_wait_ms(vm)) < 0 && errno != EINTR)
            return -errno;
        if (fds[1].revents && (err = vmig_dispatch(vm->migration)) < 0)
            return err;
        if (fds[0].revents && !read_commands(vm))
            return 0;
        if (vm->running)
            machine_run(vm, busy_ms);
    }
    printf("note off %u\n", vm->off_code);
    return 0;
}

static int begin(struct machine *vm, const struct options *o)
{
    int err;

    for (size_t i = 0; i < o->settings; i++) {
        char *value = o->setting[i], *name = strsep(&value, " ");
        if ((err = vmig_set(vm->migration, name, value)) < 0)
            return err;
    }
    if (o->incoming)
        return arrive(vm, o->incoming);
    return o->image ? vmig_start(vm->migration) : 0;
}

int main(int argc, char **argv)
{
    static struct machine vm;
    struct options o;
    int console = STDERR_FILENO, err;

    parse(argc, argv, &o);
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);                   /* who drove us and went away is an error code, not the end */
    if (o.console && (console = open(o.console, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0) {
        fprintf(stderr, "emulator: --console %s: %s\n", o.console, strerror(errno));
        return EXIT_USAGE;
    }
    if ((err = machine_create(&vm, o.mem_mib << 20, console)) < 0) {
        fprintf(stderr, "emulator: no memory for a guest of %u MiB\n", o.mem_mib);
        return 1;
    }
    if (o.image && (err = machine_load(&vm, o.image)) < 0) {
        fprintf(stderr, "emulator: %s: %s\n", o.image, strerror(-err));
        return EXIT_USAGE;
    }
    if ((err = migratable(&vm, o.tracker)) < 0 || (err = begin(&vm, &o)) < 0 || (err = loop(&vm, o.busy_ms)) < 0)
        fprintf(stderr, "emulator: %s\n", vmig_errmsg());
    vmig_free(vm.migration);
    machine_destroy(&vm);
    return err < 0 ? 1 : vm.off_code ? EXIT_GUEST : 0;
}
