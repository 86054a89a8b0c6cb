/* The demo: moves a running guest from one process to another and proves that it arrived whole.
 *                                                                                       SPDX: MIT OR Apache-2.0
 * Starts two VMMs, lets the guest of the first dirty its memory, migrates it to the second and checks: the guest's own
 * verification of its pages, its generations without a gap, its heartbeat, and a hash of every page on both sides.
 * Without /dev/kvm the software guest of minimal.c moves instead. */
#define _GNU_SOURCE
#include "harness.h"
#include "hashfile.h"
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_ARGS = 64, MAX_SETTINGS = 16, SHOWN_DIFFERENCES = 8 };
enum { START_MS = 20000, GENERATIONS_MS = 25000, STATUS_MS = 50, LINE_MS = 500 };

static struct {
    const char *mem, *vcpus, *pages, *burst, *fill, *uri, *setting[MAX_SETTINGS];
    size_t settings;
    unsigned warm_ms, timeout_ms;
    bool json, spin, shared, no_hash, software;
} opt = { .mem = "1024", .vcpus = "2", .pages = "32768", .burst = "64", .fill = "pattern", .uri = "tcp",
          .warm_ms = 3000, .timeout_ms = 40000 };

static FILE *out;                       /* for people; with --json standard error */
static bool terminal;                   /* quiet colours and a moving progress bar only there */
static bool bar_open;                   /* the bar's line is not ended yet */
static char folder[64];

static const char *in_folder(const char *name)
{
    static char path[4][128];
    static unsigned next;
    char *p = path[next++ % 4];

    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void on_interrupt(int signal)
{
    (void)signal;
    interrupted = 1;
}

static void clean_up(void)
{
    static const char *const files[] = { "source.hash", "destination.hash", "source.serial", "destination.serial",
                                         "migration" };

    for (size_t i = 0; i < 2; i++)
        if (peers[i]->pid > 0 && !peers[i]->dead) {
            kill(peers[i]->pid, SIGKILL);
            waitpid(peers[i]->pid, NULL, 0);
        }
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        unlink(in_folder(files[i]));
    rmdir(folder);
}

static const char *paint(const char *code)
{
    return terminal ? code : "";
}

void fail(const char *format, ...)
{
    va_list args;

    fprintf(out, "%s%s  failed%s          ", bar_open ? "\n" : "", paint("\033[31m"), paint("\033[0m"));
    va_start(args, format);
    vfprintf(out, format, args);
    va_end(args);
    fputc('\n', out);
    fflush(out);
    if (opt.json)
        printf("{\"peer\": \"vmig\", \"ok\": false}\n");
    exit(1);
}

__attribute__((format(printf, 2, 3))) static void say(const char *label, const char *format, ...)
{
    va_list args;

    fprintf(out, "  %s%-16s%s", paint("\033[2m"), label, paint("\033[0m"));
    va_start(args, format);
    vfprintf(out, format, args);
    va_end(args);
    fputc('\n', out);
    fflush(out);
}

static const char *thousands(uint64_t value)
{
    static char text[4][32];
    static unsigned next;
    char *at = text[next++ % 4] + 31;

    *at = '\0';
    for (int digits = 0; value || !digits; value /= 10, digits++) {
        if (digits && digits % 3 == 0)
            *--at = ',';
        *--at = (char)('0' + value % 10);
    }
    return at;
}

/* ---- starting ---- */

static const char *beside_us(const char *name)
{
    static char path[2][4096];
    char *p = path[name[0] == 'v'];
    ssize_t n = readlink("/proc/self/exe", p, sizeof path[0] - 32);
    char *slash;

    p[n < 0 ? 0 : n] = '\0';
    slash = strrchr(p, '/');
    strcpy(slash ? slash + 1 : p, name);
    return p;
}

static void start_vmm(struct peer *p, const char *incoming, const char *hash, const char *serial)
{
    const char *argv[MAX_ARGS] = { beside_us("vmm"), "--mem", opt.mem, "--vcpus", opt.vcpus, "--events-fd", "EVENTS",
                                   "--serial", serial, "--pages", opt.pages, "--burst", opt.burst, "--fill", opt.fill };
    size_t n = 15;

    if (opt.spin)
        argv[n++] = "--spin";
    if (opt.shared)
        argv[n++] = "--shared";
    if (incoming)
        argv[n++] = "--incoming", argv[n++] = incoming;
    if (incoming && hash)
        argv[n++] = "--hash-at-start", argv[n++] = hash;
    for (size_t i = 0; i < opt.settings; i++)
        argv[n++] = "--set", argv[n++] = opt.setting[i];
    spawn(p, argv, true);
}

static const char *listen_address(const char *line)
{
    static char address[256];

    if (sscanf(line, "listening %255s", address) != 1)
        fail("the destination says: %s", line);
    return address;
}

static const char *start_both(void)
{
    static char unix_uri[160];
    const char *uri = "tcp:127.0.0.1:0", *address;

    snprintf(unix_uri, sizeof unix_uri, "unix:%s", in_folder("migration"));
    if (strcmp(opt.uri, "unix") == 0)
        uri = unix_uri;
    start_vmm(&destination, uri, opt.no_hash ? NULL : in_folder("destination.hash"), in_folder("destination.serial"));
    start_vmm(&source, NULL, NULL, in_folder("source.serial"));
    address = listen_address(await_line(&destination, START_MS, "where it listens"));
    if (strcmp(await_line(&source, START_MS, "that it runs"), "running") != 0)
        fail("the source says: %s", source.reply);
    return address;
}

static size_t vcpus(void)
{
    return (size_t)strtoul(opt.vcpus, NULL, 10);
}

static void await_generations(struct peer *p, uint32_t count)
{
    uint64_t end = now_ns() + GENERATIONS_MS * 1000000ull;

    for (size_t i = 0; i < vcpus();) {
        const struct vcpu_view *v = &p->vcpu[i];
        if (v->first_generation && v->last_generation - v->first_generation + 1 >= count) {
            i++;
            continue;
        }
        if (now_ns() > end)
            fail("vCPU %zu did not finish %" PRIu32 " generations on the %s within %d s", i, count, p->name,
                 GENERATIONS_MS / 1000);
        sleep_listening(STATUS_MS);
    }
}

/* ---- moving ---- */

struct status {
    char state[40];
    uint64_t iteration, total, remaining, sent, dirty_rate, bandwidth, elapsed, expected_downtime, downtime, eta;
};

static struct status read_status(const char *line)
{
    struct status s;

    if (sscanf(line, "status state=%39s iteration=%" SCNu64 " total=%" SCNu64 " remaining=%" SCNu64 " sent=%" SCNu64
               " dirty-rate=%" SCNu64 " bandwidth=%" SCNu64 " elapsed=%" SCNu64 " expected-downtime=%" SCNu64
               " downtime=%" SCNu64 " eta=%" SCNu64, s.state, &s.iteration, &s.total, &s.remaining, &s.sent,
               &s.dirty_rate, &s.bandwidth, &s.elapsed, &s.expected_downtime, &s.downtime, &s.eta) != 11)
        fail("the source says: %s", line);
    return s;
}

static struct status ask_status(void)
{
    return read_status(command(&source, "status"));
}

static void show_progress(const struct status *s, bool last)
{
    enum { WIDTH = 30 };
    static uint64_t shown;
    uint64_t percent = s->total ? 100 - s->remaining * 100 / s->total : 0;
    size_t full = (size_t)(percent * WIDTH / 100);
    char bar[WIDTH + 1], eta[16] = "   ?";

    if (!terminal && !last && now_ns() - shown < LINE_MS * 1000000ull)
        return;
    shown = now_ns();
    if (s->eta != UINT64_MAX)                           /* the library's word for "not known" */
        snprintf(eta, sizeof eta, "%4.1f", (double)s->eta / 1e9);
    memset(bar, '.', WIDTH);
    memset(bar, '#', full < WIDTH ? full : WIDTH);
    bar[WIDTH] = '\0';
    fprintf(out, "%s  [%s] %3" PRIu64 "%%  %5.2f GB/s  dirty %5.2f GB/s  iteration %2" PRIu64 "  ETA %s s%s",
            terminal ? "\r" : "", bar, percent, (double)s->bandwidth / 1e9, (double)s->dirty_rate / 1e9, s->iteration,
            eta, terminal && !last ? "  " : "\n");
    bar_open = terminal && !last;
    fflush(out);
}

static bool ended(const struct status *s)
{
    static const char *const ends[] = { "completed", "failed", "cancelled", "held", "switchover-unknown" };

    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++)
        if (strcmp(s->state, ends[i]) == 0)
            return true;
    return false;
}

static struct status migrate(const char *address)
{
    uint64_t end = now_ns() + opt.timeout_ms * 1000000ull;
    struct status s;

    for (size_t i = 0; i < vcpus(); i++)
        source.vcpu[i].longest_gap = 0;                 /* from here on it says what the migration did to the guest */
    must(&source, command(&source, "migrate %s", address));
    for (s = ask_status(); !ended(&s); s = ask_status()) {
        show_progress(&s, false);
        if (now_ns() > end)
            fail("not finished after %u s, state %s", opt.timeout_ms / 1000, s.state);
        sleep_listening(STATUS_MS);
    }
    show_progress(&s, true);
    if (strcmp(s.state, "completed") != 0) {
        say("source says", "%s", command(&source, "error"));
        destination.may_die = false;
        sleep_listening(LINE_MS);                       /* when the destination died, that is the better reason */
        fail("the migration ended in state %s", s.state);
    }
    return s;
}

/* ---- checking ---- */

static void show_difference(const char *block, uint64_t gpa, uint64_t offset)
{
    static unsigned shown;

    if (shown++ < SHOWN_DIFFERENCES)
        say("different", "%s: the page at 0x%" PRIx64 " (offset 0x%" PRIx64 " of the block)", block, gpa, offset);
}

static void await_destination_hash(void)
{
    for (uint64_t end = now_ns() + START_MS * 1000000ull; !destination.hash_ns; listen_to_peers(STATUS_MS))
        if (now_ns() > end || (destination.dead && destination.events < 0))
            fail("the destination did not hash its memory before it started the guest");
}

static uint64_t compare_memory(void)
{
    uint64_t pages, different;

    if (hash_compare(in_folder("source.hash"), in_folder("destination.hash"), show_difference, &pages, &different) < 0)
        fail("the page hash files are missing, cut short or of different machines");
    if (different)
        fail("memory differs: %s of %s pages", thousands(different), thousands(pages));
    return pages;
}

struct verdict {
    struct status status;
    double cpu_s;
    uint64_t blackout, source_gap, destination_gap, verified, verified_there, hashed_pages;
};

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void check_vcpu(size_t i, struct verdict *v)
{
    const struct vcpu_view *here = &source.vcpu[i], *there = &destination.vcpu[i];

    if (there->first_beat <= here->last_beat)
        fail("vCPU %zu ran on both sides at once: a heartbeat of the destination is older than one of the source", i);
    if (here->gap || there->gap || there->first_generation != here->last_generation + 1)
        fail("vCPU %zu: generation %" PRIu32 " of the source was followed by %" PRIu32 " on the destination%s", i,
             here->last_generation, there->first_generation, here->gap || there->gap ? ", with a gap on one side" : "");
    if (there->first_ticks < here->last_ticks)
        fail("vCPU %zu: the ticker went back from %" PRIu32 " to %" PRIu32, i, here->last_ticks, there->first_ticks);
    v->blackout = larger(v->blackout, there->first_beat - here->last_beat);
    v->source_gap = larger(v->source_gap, here->longest_gap);
    v->destination_gap = larger(v->destination_gap, there->longest_gap);
    v->verified += here->verified + there->verified;
    v->verified_there += there->verified;
}

static void report_transfer(const struct status *s)
{
    const double seconds = (double)s->elapsed / 1e9;

    say("total time", "%.0f ms in %" PRIu64 " iterations", seconds * 1e3, s->iteration);
    say("throughput", "%.2f GB/s (%.2f GB sent for %" PRIu64 " MiB of guest memory)", (double)s->sent / 1e9 / seconds,
        (double)s->sent / 1e9, s->total >> 20);
}

/* What the library's count is made of, and what it had expected of each part. */
static void report_parts(void)
{
    static const char *const names[] = { "stop", "devices", "last sync", "RAM", "peer load", "start", "go" };
    const char *reply = command(&source, "downtime");
    double ms[2][7], unexplained;
    char text[256] = "";

    if (sscanf(reply, "downtime expected: stop=%lf devices=%lf sync=%lf ram=%lf load=%lf start=%lf go=%lf "
               "total=%*s unexplained=%*s verify=%*s actual: stop=%lf devices=%lf sync=%lf ram=%lf load=%lf start=%lf "
               "go=%lf total=%*s unexplained=%lf",
               &ms[0][0], &ms[0][1], &ms[0][2], &ms[0][3], &ms[0][4], &ms[0][5], &ms[0][6], &ms[1][0], &ms[1][1],
               &ms[1][2], &ms[1][3], &ms[1][4], &ms[1][5], &ms[1][6], &unexplained) != 15)
        fail("the source says: %s", reply);
    if (destination.hash_ns)
        ms[1][5] -= (double)destination.hash_ns;
    for (size_t i = 0, n = 0; i < sizeof names / sizeof names[0]; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s %.2f (%.2f), ", names[i], ms[1][i] / 1e6, ms[0][i] / 1e6);
    say("", "%sunexplained %.2f; in brackets as predicted", text, unexplained / 1e6);
}

/* The destination's guest has to wait while its memory is hashed; without this proof it would not. */
static void report_blackout(struct verdict *v)
{
    uint64_t silence = v->blackout;

    v->blackout -= destination.hash_ns < silence ? destination.hash_ns : 0;
    /* Hashing is a part of the destination's start hook here. */
    v->status.downtime -= destination.hash_ns < v->status.downtime ? destination.hash_ns : 0;
    say("blackout", "%.1f ms felt by the guest's heartbeat, %.1f ms downtime by the library's count",
        (double)v->blackout / 1e6, (double)v->status.downtime / 1e6);
    report_parts();
    if (destination.hash_ns)
        say("", "(%.1f ms of silence less %.1f ms spent hashing the stopped guest's memory for this demo)",
            (double)silence / 1e6, (double)destination.hash_ns / 1e6);
}

static void report(struct verdict *v)
{
    report_transfer(&v->status);
    report_blackout(v);
    for (size_t i = 0; i < vcpus(); i++)
        say(i ? "" : "generations", "vCPU %zu: %" PRIu32 " -> %" PRIu32 ", without a gap", i,
            source.vcpu[i].last_generation, destination.vcpu[i].first_generation);
    say("pages verified", "%s by the guest itself, %s of them after the move", thousands(v->verified),
        thousands(v->verified_there));
    if (!opt.no_hash)
        say("memory verified", "%sall %s pages%s of the stopped source and the not yet started destination are the same",
            paint("\033[32m"), thousands(v->hashed_pages), paint("\033[0m"));
}

static void print_json(const struct verdict *v)
{
    const double bytes = strtod(opt.mem, NULL) * 1048576, seconds = (double)v->status.elapsed / 1e9;

    printf("{\"peer\": \"vmig\", \"ok\": true, \"mem_mib\": %s, \"vcpus\": %s, \"uri\": \"%s\", \"fill\": \"%s\", "
           "\"burst\": %s, \"pages\": %s, \"status\": \"%s\", \"iterations\": %" PRIu64 ", \"total_ms\": %.1f, "
           "\"reported_downtime_ms\": %.2f, \"blackout_ms\": %.2f, \"hash_ms\": %.2f, \"longest_source_gap_ms\": %.2f, "
           "\"longest_destination_gap_ms\": %.2f, \"transferred_gb\": %.3f, \"cpu_s\": %.2f, \"gb_per_s\": %.3f, "
           "\"wire_gb_per_s\": %.3f, \"pages_verified\": %" PRIu64 ", \"memory_verified\": %s, \"generations\": [",
           opt.mem, opt.vcpus, opt.uri, opt.fill, opt.burst, opt.pages, v->status.state, v->status.iteration,
           seconds * 1e3, (double)v->status.downtime / 1e6, (double)v->blackout / 1e6,
           (double)destination.hash_ns / 1e6, (double)v->source_gap / 1e6, (double)v->destination_gap / 1e6,
           (double)v->status.sent / 1e9, v->cpu_s, bytes / 1e9 / seconds, (double)v->status.sent / 1e9 / seconds,
           v->verified, v->hashed_pages ? "true" : "null");
    for (size_t i = 0; i < vcpus(); i++)
        printf("%s[%" PRIu32 ", %" PRIu32 "]", i ? ", " : "", source.vcpu[i].last_generation,
               destination.vcpu[i].first_generation);
    printf("]}\n");
}

static void hardware_demo(void)
{
    struct verdict v = { .blackout = 0 };
    const char *address = start_both();

    say("guest", "%s vCPUs, %s MiB (%s), writing %s pages per ms over a working set of %s", opt.vcpus, opt.mem,
        opt.fill, strcmp(opt.burst, "0") ? opt.burst : "any number of", opt.pages);
    sleep_listening(opt.warm_ms);
    await_generations(&source, 2);
    say("migrating", "to %s", address);
    v.cpu_s = -cpu_seconds(&source) - cpu_seconds(&destination);
    destination.may_die = true;         /* a guest that finds wrong data ends it; then all wrong pages shall be named */
    v.status = migrate(address);
    v.cpu_s += cpu_seconds(&source) + cpu_seconds(&destination);
    if (!opt.no_hash) {
        must(&source, command(&source, "hash %s", in_folder("source.hash")));
        await_destination_hash();
        v.hashed_pages = compare_memory();
    }
    destination.may_die = false;
    await_generations(&destination, 2);                 /* the second one was written and verified there alone */
    for (size_t i = 0; i < vcpus(); i++)
        check_vcpu(i, &v);
    report(&v);
    quit(&source);
    quit(&destination);
    if (opt.json)
        print_json(&v);
}

/* ---- without KVM ---- */

/* Shows the source's progress until its guest left: at which count, and when it had counted last. */
static struct status watch_software(uint64_t *left, uint64_t *last_ns)
{
    struct status s = { .state = "none" };

    for (;;) {
        const char *line = await_line(&source, opt.timeout_ms, "that its guest left");
        if (sscanf(line, "left at %" SCNu64 ", last at %" SCNu64, left, last_ns) == 2)
            break;
        s = read_status(line);
        show_progress(&s, ended(&s));
    }
    if (strcmp(s.state, "completed") != 0)
        fail("the migration ended in state %s", s.state);
    return s;
}

static void software_demo(void)
{
    const char *receive[] = { beside_us("minimal"), "in", "tcp:127.0.0.1:0", NULL };
    const char *send[] = { receive[0], "out", NULL, NULL };
    uint64_t left, last_ns, arrived, words, check_ns, went_on, first_ns, silence;
    struct status s;

    say("guest", "no usable /dev/kvm here (%s): moving the software guest of minimal.c", opt.software ? "--software" :
        strerror(errno));
    source.may_end = destination.may_end = true;
    spawn(&destination, receive, false);
    send[2] = listen_address(await_line(&destination, START_MS, "where it listens"));
    spawn(&source, send, false);
    say("migrating", "to %s", send[2]);
    s = watch_software(&left, &last_ns);
    if (sscanf(await_line(&destination, START_MS, "that the guest arrived"), "arrived at %" SCNu64
               ": memory verified, %" SCNu64 " words in %" SCNu64, &arrived, &words, &check_ns) != 3)
        fail("the destination says: %s", destination.reply);
    if (sscanf(await_line(&destination, START_MS, "that the guest went on"), "went on to %" SCNu64 ", first at %" SCNu64,
               &went_on, &first_ns) != 2)
        fail("the destination says: %s", destination.reply);
    if (arrived != left || went_on <= arrived || first_ns <= last_ns)
        fail("the guest left at %" PRIu64 ", arrived at %" PRIu64 " and got to %" PRIu64, left, arrived, went_on);
    silence = first_ns - last_ns;
    report_transfer(&s);
    say("blackout", "%.1f ms felt by the guest's counter, %.1f ms downtime by the library's count",
        (double)(silence - (check_ns < silence ? check_ns : 0)) / 1e6, (double)s.downtime / 1e6);
    say("", "(%.1f ms of silence less %.1f ms spent checking the stopped guest's memory)", (double)silence / 1e6,
        (double)check_ns / 1e6);
    say("counter", "left at %s, went on to %s without a gap", thousands(left), thousands(went_on));
    say("memory verified", "%sall %s words%s of the not yet started destination are as the counter says",
        paint("\033[32m"), thousands(words), paint("\033[0m"));
    if (opt.json)
        printf("{\"peer\": \"vmig\", \"ok\": true, \"guest\": \"software\", \"status\": \"%s\", \"iterations\": %" PRIu64
               ", \"total_ms\": %.1f, \"reported_downtime_ms\": %.2f, \"blackout_ms\": %.2f, \"memory_verified\": true}\n",
               s.state, s.iteration, (double)s.elapsed / 1e6, (double)s.downtime / 1e6,
               (double)(silence - (check_ns < silence ? check_ns : 0)) / 1e6);
}

/* ---- options ---- */

static const char usage[] =
    "usage: demo [--mem MIB] [--vcpus N] [--uri tcp|unix] [--fill random|zero|untouched|pattern] [--pages N]\n"
    "            [--burst N] [--idle] [--spin] [--shared] [--downtime MS] [--set 'OPTION VALUE']... [--warm MS]\n"
    "            [--timeout S] [--no-hash] [--software] [--json]\n";

static void parse(int argc, char **argv)
{
    static const struct option names[] = {
        { "mem", 1, NULL, 'm' },  { "vcpus", 1, NULL, 'c' },    { "uri", 1, NULL, 'u' },     { "fill", 1, NULL, 'f' },
        { "pages", 1, NULL, 'p' }, { "burst", 1, NULL, 'b' },   { "idle", 0, NULL, 'i' },    { "spin", 0, NULL, 'S' },
        { "shared", 0, NULL, 's' }, { "downtime", 1, NULL, 'd' }, { "set", 1, NULL, 'o' },   { "warm", 1, NULL, 'w' },
        { "timeout", 1, NULL, 't' }, { "no-hash", 0, NULL, 'n' }, { "software", 0, NULL, 'x' }, { "json", 0, NULL, 'j' },
        { NULL, 0, NULL, 0 },
    };
    static char downtime[64];
    int c;

    while ((c = getopt_long(argc, argv, "", names, NULL)) != -1)
        switch (c) {
        case 'm': opt.mem = optarg; break;
        case 'c': opt.vcpus = optarg; break;
        case 'u': opt.uri = optarg; break;
        case 'f': opt.fill = optarg; break;
        case 'p': opt.pages = optarg; break;
        case 'b': opt.burst = optarg; break;
        case 'i': opt.pages = opt.burst = "1"; break;
        case 'S': opt.spin = true; break;
        case 's': opt.shared = true; break;
        case 'd':
            snprintf(downtime, sizeof downtime, "downtime-limit %s", optarg);
            optarg = downtime;
            /* fall through */
        case 'o':
            if (opt.settings < MAX_SETTINGS)
                opt.setting[opt.settings++] = optarg;
            break;
        case 'w': opt.warm_ms = (unsigned)strtoul(optarg, NULL, 10); break;
        case 't': opt.timeout_ms = (unsigned)strtoul(optarg, NULL, 10) * 1000; break;
        case 'n': opt.no_hash = true; break;
        case 'x': opt.software = true; break;
        case 'j': opt.json = true; break;
        default: fputs(usage, stderr); exit(2);
        }
    if (optind != argc || vcpus() < 1 || vcpus() > MAX_VCPUS || (strcmp(opt.uri, "tcp") && strcmp(opt.uri, "unix"))) {
        fputs(usage, stderr);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    const char *tmp = getenv("TMPDIR");
    int kvm;

    parse(argc, argv);
    out = opt.json ? stderr : stdout;
    terminal = isatty(fileno(out)) == 1;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, on_interrupt);       /* so that nothing is left behind in the temporary folder */
    signal(SIGTERM, on_interrupt);
    snprintf(folder, sizeof folder, "%s/vmig-demo-XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
    if (!mkdtemp(folder))
        fail("%s: %s", folder, strerror(errno));
    atexit(clean_up);
    kvm = opt.software ? -1 : open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm >= 0) {
        close(kvm);
        hardware_demo();
    } else {
        software_demo();
    }
    return 0;
}
