/* Callbacks that fail, cancel and ask for what they may not have, at every call there is.
 *
 *   callbacks CASE [own-lock 0|1|2] [greedy 0|1]     see `cases` at the end; greedy: a vCPU that keeps taking the big lock */
#include "guest.h"

#include <time.h>

static struct shape shape;
static bool greedy;
static struct guest src, dst;
static unsigned clean[2][CB_COUNT];     /* calls of a migration in which nothing goes wrong, by side */

static void make_pair(void)
{
    guest_new(&src, &shape, 33), guest_new(&dst, &shape, 0);
    CHECK(vmig_start(src.m) == 0, "start");
    src.greedy = dst.greedy = greedy;
    memset(src.calls, 0, sizeof src.calls), memset(dst.calls, 0, sizeof dst.calls);
}

static void free_pair(void)
{
    guest_free(&src), guest_free(&dst);
}

static bool completed(struct guest *g)
{
    return state_of(g) == VMIG_STATE_COMPLETED;
}

static void arrived(const char *what)
{
    CHECK(completed(&src) && completed(&dst), "%s: %s, %s: %s", what, vmig_state_name(state_of(&src)),
          vmig_state_name(state_of(&dst)), vmig_get_error(src.m) ? vmig_get_error(src.m) : vmig_get_error(dst.m));
    CHECK(guest_hash(&src) == dst.arrival_hash, "%s: memory and devices are identical", what);
    CHECK(vmig_get_stop_reasons(src.m) & VMIG_STOPPED_NOT_OWNER && vmig_start(src.m) == -EPERM, "%s: it left", what);
}

static void runs_on(struct guest *g, const char *what)
{
    CHECK(vmig_get_stop_reasons(g->m) == 0 && counts_on(g), "%s: reasons %d", what, vmig_get_stop_reasons(g->m));
}

/* The guest failed to move; now nothing is in the way. */
static void moves_after_all(const char *what)
{
    src.plot = dst.plot = NULL;
    begin_pair(&src, &dst), end_pair(&src, &dst);
    arrived(what);
    runs_on(&dst, what);
}

static void error_says(struct guest *g, const char *what, const char *words)
{
    char *error = vmig_get_error(g->m);

    CHECK(error && strstr(error, words) && strstr(error, "\"errno\":33"), "%s: wanted '%s' in %s", what, words, error);
    vmig_string_free(error);
}

static void measure(void)
{
    make_pair();
    begin_pair(&src, &dst), end_pair(&src, &dst);
    arrived("clean");
    runs_on(&dst, "clean");
    memcpy(clean[0], src.calls, sizeof src.calls), memcpy(clean[1], dst.calls, sizeof dst.calls);
    free_pair();
}

static bool hits(struct guest *g, enum callback c)
{
    if (c != g->target || g->calls[c] != g->target_call)
        return false;
    g->fired++;
    return true;
}

static int plot_fail(struct guest *g, enum callback c)
{
    return hits(g, c) ? -TOLD_ERRNO : 0;
}

/* Runs `check` after a migration in which `plot` hit the n-th call of every callback on either side, for all n. */
static void sweep(plot_fn plot, bool void_too, void (*check)(int side, enum callback c, const char *what))
{
    unsigned fired = 0;

    measure();
    for (int side = 0; side < 2; side++)
        for (enum callback c = 0; c < CB_COUNT; c++)
            for (unsigned n = 1; n <= clean[side][c] && (void_too || *callback_words[c]); n++) {
                char what[64];
                struct guest *g = side ? &dst : &src;
                /* How often the loop asks is up to its timing: the first calls and the last are enough of these. */
                if (n > 4 && n + 2 < clean[side][c])
                    continue;
                snprintf(what, sizeof what, "%s at call %u at the %s", callback_names[c], n, side ? "destination" : "source");
                make_pair();
                g->target = c, g->target_call = n, g->plot = plot;
                begin_pair(&src, &dst), end_pair(&src, &dst);
                if (g->fired)
                    fired++, check(side, c, what);
                else
                    arrived(what);
                free_pair();
            }
    printf("%u calls hit\n", fired);
}

/* ---- a callback fails -------------------------------------------------------------------------------------------- */

static void check_failed_callback(int side, enum callback c, const char *what)
{
    error_says(&dst, what, "errno");
    CHECK(state_of(&src) == VMIG_STATE_FAILED && state_of(&dst) == VMIG_STATE_FAILED, "%s", what);
    error_says(&src, what, callback_words[c]);
    error_says(&src, what, side ? "\"side\":\"destination\"" : "\"side\":\"source\"");
    CHECK(dst.calls[CB_START] == (c == CB_START) && vmig_get_stop_reasons(dst.m) != 0, "%s: not started", what);
    CHECK(vmig_start(dst.m) == -EPERM, "%s: the guest is not here", what);
    runs_on(&src, what);
    moves_after_all(what);
}

static void check_failed_source(int side, enum callback c, const char *what)
{
    char *error = vmig_get_error(dst.m);

    /* The destination is told why, unless the source left before it said anything of its own. */
    if (side == 0) {
        bool told = c != CB_IS_ACTIVE && c != CB_PREPARE;
        CHECK(error && strstr(error, told ? "\"side\":\"source\"" : "\"side\":\"destination\""), "%s: %s", what, error);
        if (told)
            error_says(&dst, what, callback_words[c]);
        CHECK(state_of(&src) == VMIG_STATE_FAILED && state_of(&dst) == VMIG_STATE_FAILED, "%s", what);
        error_says(&src, what, callback_words[c]);
        error_says(&src, what, "\"side\":\"source\"");
        CHECK(dst.calls[CB_START] == 0 && vmig_get_stop_reasons(dst.m) != 0, "%s", what);
        runs_on(&src, what);
        moves_after_all(what);
    } else {
        check_failed_callback(side, c, what);
    }
    vmig_string_free(error);
}

static void case_fail(void)
{
    static const enum callback source[] = {
        CB_STOP, CB_RELEASE, CB_PREPARE_STOP, CB_STOPPED, CB_NEEDED, CB_PRE_SAVE, CB_POST_SAVE, CB_IS_ACTIVE, CB_IS_ACTIVE_ITERATE,
        CB_PREPARE, CB_SETUP, CB_PENDING_ESTIMATE, CB_PENDING_EXACT, CB_ITERATE, CB_COMPLETE, CB_CLEANUP,
    };
    static const enum callback destination[] = {
        CB_START, CB_REACQUIRE, CB_ANNOUNCE, CB_PREPARE_START, CB_STARTING, CB_PRE_LOAD, CB_POST_LOAD, CB_LOAD_SETUP, CB_LOAD,
        CB_LOAD_CLEANUP,
    };

    sweep(plot_fail, false, check_failed_source);
    for (unsigned i = 0; i < sizeof source / sizeof *source; i++)
        CHECK(clean[0][source[i]] > 0, "%s is called at the source", callback_names[source[i]]);
    for (unsigned i = 0; i < sizeof destination / sizeof *destination; i++)
        CHECK(clean[1][destination[i]] > 0, "%s is called at the destination", callback_names[destination[i]]);
}

/* ---- a callback cancels ------------------------------------------------------------------------------------------ */

static int plot_cancel(struct guest *g, enum callback c)
{
    if (hits(g, c))
        g->seen[0] = vmig_cancel(g->m);
    return 0;
}

static void check_cancelled(int side, enum callback c, const char *what)
{
    struct guest *g = side ? &dst : &src, *other = side ? &src : &dst;

    (void)c;
    if (g->seen[0] == -EBUSY) {
        arrived(what);
        runs_on(&dst, what);
        return;
    }
    CHECK(g->seen[0] == 0 && state_of(g) == VMIG_STATE_CANCELLED, "%s: %s", what, vmig_state_name(state_of(g)));
    CHECK(vmig_get_error(g->m) == NULL, "%s: a cancel is no error", what);
    CHECK(state_of(other) == VMIG_STATE_FAILED && dst.calls[CB_START] == 0, "%s: the other side fails", what);
    runs_on(&src, what);
    moves_after_all(what);
}

static void case_cancel(void)
{
    sweep(plot_cancel, true, check_cancelled);
}

/* ---- callbacks that ask for what they may not have --------------------------------------------------------------- */

static int plot_reenter(struct guest *g, enum callback c)
{
    bool hook = c == CB_STOP || c == CB_START, handler = c >= CB_PREPARE_STOP && c <= CB_STARTING;

    if (hook || handler) {
        CHECK(vmig_stop(g->m) == -EDEADLK && vmig_start(g->m) == -EDEADLK, "%s", callback_names[c]);
        g->fired++;
    }
    if (handler)
        CHECK(vmig_on_run(g->m, 0, on_run, g, NULL) == -EBUSY && vmig_remove_on_run(g->m, 1) == -EBUSY, "registering");
    if (c == CB_SETUP || c == CB_LOAD || c == CB_PRE_SAVE) {
        vmig_ram ram = VMIG_SIZED(vmig_ram);
        ram.name = "more", ram.host = g->low, ram.len = PAGE;
        CHECK(vmig_add_ram(g->m, &ram) == -EBUSY && vmig_remove_device(g->m, g) == -EBUSY, "registering");
        CHECK(vmig_bql_lock(g->m) == -EDEADLK && vmig_wait(g->m, 0) == -EDEADLK, "the big lock is held");
        CHECK(vmig_bql_held(g->m) == 1, "the big lock is held");
    }
    if (c == CB_ITERATE || hook)
        CHECK(vmig_bql_held(g->m) == 0, "%s is called without the big lock", callback_names[c]);
    return 0;
}

static void case_reenter(void)
{
    make_pair();
    src.plot = dst.plot = plot_reenter;
    begin_pair(&src, &dst), end_pair(&src, &dst);
    arrived("reenter");
    CHECK(src.fired >= 3 && dst.fired >= 3, "%d %d", src.fired, dst.fired);
    CHECK(vmig_stop(dst.m) == 0 && vmig_start(dst.m) == 0, "stop and start");
    free_pair();
}

/* Names and thread ids as the library lists them, compared with the kernel's. */
static void list_has(struct guest *g, const char *name)
{
    char *list = vmig_get_threads(g->m), *at, path[64], comm[32] = "";
    char wanted[64];
    FILE *file;

    snprintf(wanted, sizeof wanted, "\"name\":\"%s\",\"thread-id\":", name);
    CHECK(list && (at = strstr(list, wanted)), "%s is not in %s", name, list);
    snprintf(path, sizeof path, "/proc/self/task/%ld/comm", atol(at + strlen(wanted)));
    file = fopen(path, "r");
    CHECK(file && fgets(comm, sizeof comm, file), "%s: %s", path, strerror(errno));
    fclose(file);
    comm[strcspn(comm, "\n")] = 0;
    CHECK(strlen(comm) > 4 && strncmp(comm, name, strlen(comm)) == 0, "%s is %s", path, comm);
    vmig_string_free(list);
}

static int plot_threads(struct guest *g, enum callback c)
{
    if (c == CB_ITERATE)
        list_has(g, "live_migration"), list_has(g, "return_path"), g->fired++;
    if (c == CB_LOAD)
        list_has(g, "incoming"), g->fired++;
    return 0;
}

static void no_threads(struct guest *g)
{
    for (int i = 0; i < 5000; i++) {
        char *list = vmig_get_threads(g->m);
        bool none = strcmp(list, "[]") == 0;
        vmig_string_free(list);
        if (none)
            return;
        usleep(1000);
    }
    CHECK(false, "threads are listed although nothing runs");
}

static void case_threads(void)
{
    make_pair();
    no_threads(&src);
    src.plot = dst.plot = plot_threads;
    begin_pair(&src, &dst), end_pair(&src, &dst);
    arrived("threads");
    CHECK(src.fired > 0 && dst.fired > 0, "looked");
    no_threads(&src), no_threads(&dst);
    free_pair();
}

/* ---- a migration that is under way ------------------------------------------------------------------------------- */

static void until(struct guest *g, uint32_t state)
{
    for (int i = 0; i < WAIT_MS && state_of(g) != state; i++)
        usleep(1000);
    CHECK(state_of(g) == state, "%s, wanted %s", vmig_state_name(state_of(g)), vmig_state_name(state));
}

/* A pair in a migration that does not end by itself. */
static void under_way(void)
{
    make_pair();
    CHECK(vmig_set(src.m, "max-bandwidth", "20K") == 0, "slow");
    begin_pair(&src, &dst);
    until(&src, VMIG_STATE_ACTIVE);
}

static void cancel(struct guest *g, const char *what)
{
    struct timespec a, b;

    clock_gettime(CLOCK_MONOTONIC, &a);
    CHECK(vmig_cancel(g->m) == 0 && vmig_cancel(g->m) == 0 && vmig_wait(g->m, WAIT_MS) == 1, "cancel %s", what);
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("cancel in %s: %.2f ms\n", what, (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6);
    CHECK(state_of(g) == VMIG_STATE_CANCELLED && vmig_get_error(g->m) == NULL, "%s", vmig_state_name(state_of(g)));
    CHECK(vmig_cancel(g->m) == 0 && state_of(g) == VMIG_STATE_CANCELLED, "nothing more to cancel");
}

static void case_cancel_states(void)
{
    int fds[2];
    char uri[32];

    make_pair();
    CHECK(vmig_incoming(dst.m, "tcp::0") == 0 && state_of(&dst) == VMIG_STATE_SETUP, "listening");
    cancel(&dst, "setup (listening)");
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
    snprintf(uri, sizeof uri, "fd:%d", fds[0]);
    CHECK(vmig_outgoing(src.m, uri) == 0 && state_of(&src) == VMIG_STATE_SETUP, "waiting for the other's hello");
    cancel(&src, "setup (hello)");
    snprintf(uri, sizeof uri, "fd:%d", fds[1]);
    close(fds[0]);
    moves_after_all("cancelled in setup");
    close(fds[1]);
    CHECK(vmig_cancel(src.m) == 0 && vmig_cancel(dst.m) == 0 && completed(&src) && completed(&dst), "too late is fine");
    free_pair();
    under_way();
    cancel(&src, "active (source)");
    CHECK(vmig_wait(dst.m, WAIT_MS) == 1 && state_of(&dst) == VMIG_STATE_FAILED, "the source left");
    runs_on(&src, "cancelled");
    begin_pair(&src, &dst);
    until(&src, VMIG_STATE_ACTIVE), until(&dst, VMIG_STATE_ACTIVE);
    cancel(&dst, "active (destination)");
    CHECK(vmig_wait(src.m, WAIT_MS) == 1 && state_of(&src) == VMIG_STATE_FAILED, "the destination left");
    runs_on(&src, "cancelled by the destination");
    CHECK(vmig_set(src.m, "max-bandwidth", "0") == 0, "fast");
    moves_after_all("cancelled");
    free_pair();
}

static void case_pause_travels(void)
{
    under_way();
    CHECK(vmig_wait(src.m, 20) == 0, "a wait has an end");
    CHECK(vmig_stop(src.m) == 0 && vmig_get_stop_reasons(src.m) == VMIG_STOPPED_BY_USER, "pause");
    CHECK(vmig_set(src.m, "max-bandwidth", "0") == 0, "fast");
    end_pair(&src, &dst);
    CHECK(completed(&src) && completed(&dst) && dst.calls[CB_START] == 0, "it arrives paused");
    CHECK(vmig_get_stop_reasons(dst.m) == VMIG_STOPPED_BY_USER, "%d", vmig_get_stop_reasons(dst.m));
    CHECK(vmig_start(dst.m) == 0 && guest_hash(&src) == dst.arrival_hash, "identical");
    runs_on(&dst, "a pause that travelled");
    free_pair();
}

static void case_busy(void)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    vmig_section_ops ops = VMIG_SIZED(vmig_section_ops);
    static uint64_t word;

    under_way();
    ram.name = "more", ram.host = src.low, ram.len = PAGE, ops.complete = sec_complete, ops.load = sec_load;
    for (int side = 0; side < 2; side++) {
        vmig *m = side ? dst.m : src.m;
        big_lock(side ? &dst : &src);
        CHECK(vmig_add_ram(m, &ram) == -EBUSY && vmig_remove_ram(m, "low") == -EBUSY, "RAM");
        CHECK(vmig_add_device(m, &counter_kind, 9, &word) == -EBUSY, "device");
        CHECK(vmig_remove_device(m, side ? &dst.dev : &src.dev) == -EBUSY, "device");
        CHECK(vmig_add_section(m, "more", 1, &ops, &word, NULL) == -EBUSY, "section");
        big_unlock(side ? &dst : &src);
        CHECK(vmig_set(m, "return-path", "off") == -EBUSY && strstr(vmig_errmsg(), "return-path"), "option");
        CHECK(vmig_incoming(m, "tcp::0") == -EBUSY, "one at a time");
    }
    CHECK(vmig_outgoing(src.m, "tcp::1") == -EBUSY && vmig_outgoing(dst.m, "tcp::1") < 0, "one at a time");
    CHECK(vmig_set(src.m, "max-bandwidth", "0") == 0, "an option that may change at any time");
    end_pair(&src, &dst);
    arrived("busy");
    free_pair();
}

static void case_blockers(void)
{
    int a, b;

    make_pair();
    a = vmig_block(src.m, "the tape drive holds a tape"), b = vmig_block(src.m, "an audit is under way");
    CHECK(a > 0 && b > 0 && a != b, "ids");
    for (int i = 0; i < 2; i++) {
        CHECK((i ? vmig_incoming(src.m, "tcp::0") : vmig_outgoing(src.m, "tcp::1")) == -EBUSY, "blocked");
        CHECK(strstr(vmig_errmsg(), "holds a tape") && strstr(vmig_errmsg(), "an audit"), "all reasons");
    }
    CHECK(vmig_unblock(src.m, a) == 0 && vmig_unblock(src.m, a) == -ENOENT, "unblock");
    CHECK(vmig_outgoing(src.m, "tcp::1") == -EBUSY && !strstr(vmig_errmsg(), "tape"), "one is left");
    CHECK(vmig_unblock(src.m, b) == 0 && state_of(&src) == VMIG_STATE_NONE, "nothing happened");
    moves_after_all("unblocked");
    free_pair();
}

static bool readable(struct guest *g)
{
    struct pollfd p = { .fd = vmig_event_fd(g->m), .events = POLLIN };

    CHECK(p.fd >= 0 && poll(&p, 1, 0) >= 0, "poll");
    return p.revents & POLLIN;
}

/* Takes all news and compares the order of states. */
static void news(struct guest *g, const uint32_t *wanted)
{
    vmig_status s = VMIG_SIZED(vmig_status);
    uint32_t last = VMIG_STATE_NONE;
    uint64_t iteration = 0;

    for (; readable(g); last = s.state) {
        CHECK(vmig_next_event(g->m, &s) == 1, "readable means news");
        CHECK(s.state == last || s.state == *wanted++, "%s after %s", vmig_state_name(s.state), vmig_state_name(last));
        CHECK(s.iteration >= iteration, "iterations count up");
        iteration = s.iteration;
    }
    CHECK(*wanted == VMIG_STATE_NONE && vmig_next_event(g->m, &s) == 0, "%s is missing", vmig_state_name(*wanted));
}

static void case_events(void)
{
    static const uint32_t source[] = { VMIG_STATE_SETUP, VMIG_STATE_ACTIVE, VMIG_STATE_DEVICE, VMIG_STATE_COMPLETED, 0 };
    static const uint32_t destination[] = { VMIG_STATE_SETUP, VMIG_STATE_ACTIVE, VMIG_STATE_COMPLETED, 0 };
    static const uint32_t failed[] = { VMIG_STATE_SETUP, VMIG_STATE_ACTIVE, VMIG_STATE_FAILED, 0 };
    static const uint32_t cancelled[] = { VMIG_STATE_SETUP, VMIG_STATE_CANCELLING, VMIG_STATE_CANCELLED, 0 };

    make_pair();
    CHECK(!readable(&src) && !readable(&dst), "no news yet");
    CHECK(vmig_incoming(dst.m, "tcp::0") == 0 && vmig_cancel(dst.m) == 0 && vmig_wait(dst.m, WAIT_MS) == 1, "cancel");
    news(&dst, cancelled);
    src.plot = plot_fail, src.target = CB_STOP, src.target_call = 1;
    begin_pair(&src, &dst), end_pair(&src, &dst);
    news(&src, failed);
    while (readable(&dst)) {
        vmig_status s = VMIG_SIZED(vmig_status);
        CHECK(vmig_next_event(dst.m, &s) == 1, "news");
    }
    moves_after_all("events");
    news(&src, source), news(&dst, destination);
    CHECK(!readable(&src) && !readable(&dst), "all was told");
    free_pair();
    make_pair();
    CHECK(vmig_set(src.m, "events", "off") == 0 && vmig_set(dst.m, "events", "off") == 0, "off");
    moves_after_all("no events");
    CHECK(!readable(&src) && !readable(&dst), "events are off");
    free_pair();
}

static void case_stats(void)
{
    vmig_bql_stats a = VMIG_SIZED(vmig_bql_stats), b = a;

    guest_new(&src, &shape, 1);
    CHECK(vmig_get_bql_stats(src.m, &a) == 0, "stats");
    for (int i = 0; i < 10; i++) {
        CHECK(vmig_bql_lock(src.m) == 0, "lock");
        usleep(100);
        CHECK(vmig_bql_unlock(src.m) == 0, "unlock");
    }
    CHECK(vmig_get_bql_stats(src.m, &b) == 0, "stats");
    CHECK(b.acquisitions == a.acquisitions + 10 && b.contended == a.contended, "%" PRIu64, b.acquisitions - a.acquisitions);
    CHECK(b.hold_ns > a.hold_ns && b.hold_max_ns <= b.hold_ns && b.wait_max_ns <= b.wait_ns, "times");
    guest_free(&src);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } cases[] = {
        { "fail", case_fail }, { "cancel", case_cancel }, { "reenter", case_reenter }, { "threads", case_threads },
        { "cancel-states", case_cancel_states }, { "pause", case_pause_travels }, { "busy", case_busy },
        { "blockers", case_blockers }, { "events", case_events }, { "stats", case_stats },
    };
    const char *name = argc > 1 ? argv[1] : "";

    shape.own_lock = argc > 2 ? atoi(argv[2]) : 0;
    greedy = argc > 3 && atoi(argv[3]);
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(cases[i].name, name)) {
            cases[i].run();
            printf("%s done\n", name);
            return 0;
        }
    return 2;
}
