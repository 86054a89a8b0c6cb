/* A polite guest in the process: what the library leaves behind, and what it leaves alone. Prints what it counted. */
#include "guest.h"

#include <dirent.h>
#include <locale.h>
#include <sys/wait.h>

static struct guest src, dst;

/* ---- what a process has ------------------------------------------------------------------------------------------ */

static unsigned entries(const char *path)
{
    DIR *dir = opendir(path);
    unsigned n = 0;

    CHECK(dir, "%s: %s", path, strerror(errno));
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static unsigned lines(const char *path)
{
    FILE *file = fopen(path, "re");
    unsigned n = 0;

    CHECK(file, "%s: %s", path, strerror(errno));
    for (int c; (c = getc(file)) != EOF;)
        n += c == '\n';
    fclose(file);
    return n;
}

static unsigned children(void)
{
    char path[64];
    unsigned n = 0;
    FILE *file;

    snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
    if (!(file = fopen(path, "re")))
        return 0;                       /* a kernel without CONFIG_PROC_CHILDREN */
    for (int c; (c = getc(file)) != EOF;)
        n += c == ' ';
    fclose(file);
    return n;
}

struct census {
    unsigned tasks, fds, maps, children;
};

static struct census census(void)
{
    return (struct census){ entries("/proc/self/task"), entries("/proc/self/fd"), lines("/proc/self/maps"), children() };
}

/* Everything about the process that a library has no business with. */
struct process {
    struct sigaction actions[65];
    sigset_t mask;
    char cwd[4096], locale[256];
    mode_t umask;
    int name;
};

static void look(struct process *p)
{
    memset(p, 0, sizeof *p);
    for (int i = 1; i < 65; i++)
        if (i != 32 && i != 33)         /* the C library keeps these two to itself */
            CHECK(sigaction(i, NULL, &p->actions[i]) == 0, "signal %d", i);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &p->mask) == 0 && getcwd(p->cwd, sizeof p->cwd), "mask, cwd");
    snprintf(p->locale, sizeof p->locale, "%s", setlocale(LC_ALL, NULL));
    p->umask = umask(0);
    umask(p->umask);
}

static void same_process(const struct process *before)
{
    static struct process after;

    look(&after);
    for (int i = 1; i < 65; i++)
        CHECK(before->actions[i].sa_handler == after.actions[i].sa_handler &&
              before->actions[i].sa_flags == after.actions[i].sa_flags, "the action of signal %d changed", i);
    CHECK(memcmp(&before->mask, &after.mask, sizeof before->mask) == 0, "the signal mask changed");
    CHECK(!strcmp(before->cwd, after.cwd) && !strcmp(before->locale, after.locale), "cwd or locale changed");
    CHECK(before->umask == after.umask, "umask changed");
}

/* ---- looking at the library from inside its own threads ---------------------------------------------------------- */

static unsigned first_fd, looked;

/* Asynchronous signals are the VMM's: none may land on a thread of the library. Faults are raised where they happen,
 * and must reach the VMM's handler, which may be what backs guest RAM. */
static void signals_blocked(void)
{
    static const int faults[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP };
    sigset_t mask;

    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &mask) == 0, "mask");
    for (int i = 1; i < 65; i++) {
        bool fault = false;
        for (unsigned f = 0; f < sizeof faults / sizeof *faults; f++)
            fault |= faults[f] == i;
        if (fault)
            CHECK(sigismember(&mask, i) == 0, "signal %d must reach the VMM's handler", i);
        else if (!fault && i != SIGKILL && i != SIGSTOP && i != 32 && i != 33)
            CHECK(sigismember(&mask, i) == 1, "signal %d may land on a thread of the library", i);
    }
}

static void close_on_exec(void)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;

    CHECK(dir, "%s", strerror(errno));
    while ((entry = readdir(dir))) {
        int fd = atoi(entry->d_name);
        if (*entry->d_name != '.' && (unsigned)fd >= first_fd)
            CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC, "fd %d would survive exec", fd);
    }
    closedir(dir);
}

static int plot_look(struct guest *g, enum callback c)
{
    (void)g;
    if (c == CB_ITERATE || c == CB_LOAD)
        signals_blocked(), close_on_exec(), looked++;
    return 0;
}

static int plot_fail(struct guest *g, enum callback c)
{
    return c == g->target && g->calls[c] == 1 ? -EIO : 0;
}

static void make_pair(void)
{
    guest_new(&src, NULL, 9), guest_new(&dst, NULL, 0);
    CHECK(vmig_start(src.m) == 0, "start");
}

static void under_way(void)
{
    CHECK(vmig_set(src.m, "max-bandwidth", "20K") == 0, "slow");
    begin_pair(&src, &dst);
    for (int i = 0; i < WAIT_MS && state_of(&src) != VMIG_STATE_ACTIVE; i++)
        usleep(1000);
    CHECK(state_of(&src) == VMIG_STATE_ACTIVE, "under way");
}

/* One of the ways a migration may go; the guests are freed after it, or in the middle of it. */
static void one(unsigned way)
{
    make_pair();
    switch (way % 7) {
    case 0:
        src.plot = dst.plot = plot_look;
        begin_pair(&src, &dst), end_pair(&src, &dst);
        CHECK(state_of(&src) == VMIG_STATE_COMPLETED && state_of(&dst) == VMIG_STATE_COMPLETED, "completed");
        break;
    case 1:
        src.target = CB_PRE_SAVE, src.plot = plot_fail;
        begin_pair(&src, &dst), end_pair(&src, &dst);
        CHECK(state_of(&src) == VMIG_STATE_FAILED, "failed");
        break;
    case 2:
        dst.target = CB_LOAD, dst.plot = plot_fail;
        begin_pair(&src, &dst), end_pair(&src, &dst);
        CHECK(state_of(&src) == VMIG_STATE_FAILED, "failed");
        break;
    case 3:
        under_way();
        CHECK(vmig_cancel(src.m) == 0, "cancel");
        end_pair(&src, &dst);
        CHECK(state_of(&src) == VMIG_STATE_CANCELLED, "cancelled");
        break;
    case 4:                             /* freed while it runs, source first */
        under_way();
        break;
    case 5:                             /* freed while it runs, destination first */
        under_way();
        guest_free(&dst), guest_free(&src);
        return;
    case 6:                             /* freed while it listens */
        CHECK(vmig_incoming(dst.m, "tcp::0") == 0, "listen");
        break;
    }
    guest_free(&src), guest_free(&dst);
}

static void case_leaves_nothing(unsigned rounds)
{
    struct process process;
    struct census before, after;

    look(&process);
    first_fd = (unsigned)dup(0);
    close((int)first_fd);
    /* The C library keeps stacks and arenas of threads that ended; after a few rounds it has all it wants. */
    for (unsigned i = 0; i < 42; i++)
        one(i);
    before = census();
    for (unsigned i = 0; i < rounds; i++)
        one(i);
    after = census();
    printf("tasks %u %u fds %u %u maps %u %u children %u %u looked %u\n", before.tasks, after.tasks, before.fds, after.fds,
           before.maps, after.maps, before.children, after.children, looked);
    CHECK(after.tasks == 3 && before.tasks == 3, "a thread is left: . and .. and %u", after.tasks - 2);
    CHECK(after.fds == before.fds && before.fds == first_fd + 3, "%u fds before, %u after", before.fds, after.fds);
    CHECK(after.children == 0 && before.children == 0, "a child is left");
#ifndef __SANITIZE_ADDRESS__            /* whose allocator keeps what was freed, in ever new mappings */
    CHECK(after.maps <= before.maps + rounds / 10, "%u mappings before, %u after", before.maps, after.maps);
#endif
    CHECK(looked > rounds / 7, "looked at threads from inside");
    same_process(&process);
}

/* Commands and files: the guests are freed while a command runs, which would go on for ever, or after it ended. */
static void with_command(unsigned way)
{
    make_pair();
    switch (way % 5) {
    case 0:
        src.plot = plot_look;
        CHECK(vmig_outgoing(src.m, "exec:cat >/dev/null") == 0 && vmig_wait(src.m, WAIT_MS) == 1, "a command");
        CHECK(state_of(&src) == VMIG_STATE_COMPLETED, "completed");
        break;
    case 1:
        CHECK(vmig_outgoing(src.m, "exec:exec sleep 1000") == 0, "one that takes nothing");
        break;
    case 2:
        CHECK(vmig_incoming(dst.m, "exec:sleep 1000 | sleep 1000") == 0, "one that gives nothing");
        usleep(20000);
        break;
    case 3:
        CHECK(vmig_outgoing(src.m, "exec:exit 7") == 0 && vmig_wait(src.m, WAIT_MS) == 1, "one that fails");
        CHECK(state_of(&src) == VMIG_STATE_FAILED && counts_on(&src), "failed");
        break;
    case 4:
        CHECK(vmig_outgoing(src.m, "file:/dev/null") == 0 && vmig_wait(src.m, WAIT_MS) == 1, "a file");
        CHECK(vmig_incoming(dst.m, "file:/dev/zero") == 0 && vmig_wait(dst.m, WAIT_MS) == 1, "zeros");
        break;
    }
    guest_free(&src), guest_free(&dst);
}

static void case_commands(void)
{
    struct process process;
    struct census before, after;

    look(&process);
    first_fd = (unsigned)dup(0);
    close((int)first_fd);
    for (unsigned i = 0; i < 5; i++)
        with_command(i);
    before = census();
    for (unsigned i = 0; i < 20; i++)
        with_command(i);
    after = census();
    CHECK(after.tasks == 3 && after.children == 0, "%u tasks, %u children", after.tasks - 2, after.children);
    CHECK(after.fds == before.fds && after.fds == first_fd + 3, "%u fds before, %u after", before.fds, after.fds);
    CHECK(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "no child, not even a dead one");
    CHECK(looked > 0, "looked at threads from inside");
    same_process(&process);
}

/* SIGPIPE has its default action here: one of them ends the program. */
static void case_sigpipe(void)
{
    char uri[32];

    make_pair();
    for (unsigned i = 0; i < 20; i++) {
        int fds[2], unix_socket = i % 2;
        uint8_t some[512];

        if (unix_socket)
            CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
        else
            CHECK(pipe2(fds, O_CLOEXEC) == 0, "pipe");
        CHECK(vmig_set(src.m, "peer", "qemu") == 0 && vmig_set(src.m, "max-bandwidth", "20K") == 0, "options");
        snprintf(uri, sizeof uri, "fd:%d", fds[1]);
        CHECK(vmig_outgoing(src.m, uri) == 0, "outgoing");
        CHECK(read(fds[0], some, 1 + i * 20) > 0, "the stream begins");
        close(fds[1]), close(fds[0]);
        CHECK(vmig_wait(src.m, WAIT_MS) == 1 && state_of(&src) == VMIG_STATE_FAILED, "the reader is gone");
        CHECK(vmig_get_stop_reasons(src.m) == 0 && counts_on(&src), "the guest runs on");
    }
    guest_free(&src), guest_free(&dst);
}

struct couple {
    struct guest a, b;
    pthread_t thread;
};

/* There and back, and there again. */
static void *couple(void *opaque)
{
    struct couple *c = opaque;

    for (int i = 0; i < 5; i++) {
        struct guest *from = i % 2 ? &c->b : &c->a, *to = i % 2 ? &c->a : &c->b;
        begin_pair(from, to), end_pair(from, to);
        CHECK(state_of(from) == VMIG_STATE_COMPLETED && state_of(to) == VMIG_STATE_COMPLETED, "move %d: %s", i,
              vmig_get_error(from->m) ? vmig_get_error(from->m) : vmig_get_error(to->m));
        CHECK(guest_hash(from) == to->arrival_hash, "move %d: identical", i);
        CHECK(counts_on(to), "move %d: it runs", i);
    }
    return NULL;
}

static void case_several(void)
{
    static struct couple couples[4];

    for (int i = 0; i < 4; i++) {
        guest_new(&couples[i].a, NULL, (uint8_t)(20 + i)), guest_new(&couples[i].b, NULL, 0);
        CHECK(vmig_start(couples[i].a.m) == 0, "start");
        CHECK(pthread_create(&couples[i].thread, NULL, couple, &couples[i]) == 0, "thread");
    }
    for (int i = 0; i < 4; i++)
        pthread_join(couples[i].thread, NULL);
    for (int i = 0; i < 4; i++)
        guest_free(&couples[i].a), guest_free(&couples[i].b);
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";

    signal(SIGPIPE, SIG_DFL);
    syscall(SYS_close_range, 3, ~0U, 0);    /* what we inherited is not the library's doing */
    if (!strcmp(name, "leaves-nothing"))
        case_leaves_nothing(argc > 2 ? (unsigned)atoi(argv[2]) : 70);
    else if (!strcmp(name, "commands"))
        case_commands();
    else if (!strcmp(name, "sigpipe"))
        case_sigpipe();
    else if (!strcmp(name, "several"))
        case_several();
    else
        return 2;
    printf("%s done\n", name);
    return 0;
}
