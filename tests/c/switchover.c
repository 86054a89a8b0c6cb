/* A guest whose hooks are told epochs, and fail or wait as they are told; for switchover_words.rs, resume.rs, mismatch.rs.
 *
 *   switchover FILL [PAGES]         FILL 0: a destination; PAGES of high memory, if not a few
 *
 * Commands: set OPTION VALUE, get OPTION, in URI, out URI, resume URI, start, stop, cancel, continue, resolve N, qmp URI, status, error,
 * fail HOOK|none, hold HOOK|none (it waits there: "note held"), hooks (what was called since the last time), counts (1 if
 * the guest counts on), parts (of the last downtime), reasons, hash, arrival (the hash when the guest was last started), memory (how many bytes of it are not zero), poke N (writes a byte of the low block and
 * tells nobody), twist 0|1 (the uart does not load what it is given), cancels N (so many threads cancel at once: "value"
 * and the result that all have, or "differs"), unmap (the memory is gone), quit.   SPDX: MIT OR Apache-2.0 */
#include "guest.h"

static struct guest g;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static char calls[1024];
static const char *failing = "none", *held = "none";
static bool twisted;

static const char *name_of(enum callback c)
{
    switch (c) {
    case CB_RELEASE: return "release";
    case CB_REACQUIRE: return "reacquire";
    case CB_FENCE: return "fence";
    case CB_START: return "start";
    case CB_STOP: return "stop";
    case CB_ANNOUNCE: return "announce";
    default: return NULL;
    }
}

static int plot(struct guest *guest, enum callback c)
{
    const char *name = name_of(c);
    size_t used;
    int result;

    if (c == CB_POST_LOAD && twisted)
        guest->dev.control ^= 0x100;
    if (!name)
        return 0;
    pthread_mutex_lock(&lock);
    used = strlen(calls);
    snprintf(calls + used, sizeof calls - used, c == CB_RELEASE || c == CB_REACQUIRE || c == CB_FENCE ? " %s=%" PRIu64 : " %s",
             name, guest->epoch[c]);
    if (strcmp(held, name) == 0)
        printf("note held\n");
    while (strcmp(held, name) == 0)
        pthread_cond_wait(&changed, &lock);
    result = strcmp(failing, name) == 0 ? -TOLD_ERRNO : 0;
    pthread_mutex_unlock(&lock);
    return result;
}

static const char *known(const char *word)
{
    static const char *const names[] = { "release", "reacquire", "fence", "start", "stop", "announce" };

    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (word && strcmp(word, names[i]) == 0)
            return names[i];
    return "none";
}

static void tell(const char **what, const char *word)
{
    pthread_mutex_lock(&lock);
    *what = known(word);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    printf("ok\n");
}

static void print_calls(void)
{
    pthread_mutex_lock(&lock);
    printf("value%s\n", *calls ? calls : " none");
    *calls = 0;
    pthread_mutex_unlock(&lock);
}

static void print_status(void)
{
    vmig_status s = VMIG_SIZED(vmig_status);

    CHECK(vmig_get_status(g.m, &s) == 0, "status");
    printf("status state=%s over=%d round=%" PRIu64 " transferred=%" PRIu64 "\n", vmig_state_name(s.state), vmig_wait(g.m, 0),
           s.iteration, s.transferred);
}

/* What the last switchover was made of. */
static void print_parts(void)
{
    vmig_downtime d = VMIG_SIZED(vmig_downtime), expected = VMIG_SIZED(vmig_downtime);

    CHECK(vmig_get_downtime(g.m, &d) == 0 && vmig_get_expected_downtime(g.m, &expected) == 0, "downtime");
    printf("parts load=%" PRIu64 " start=%" PRIu64 " total=%" PRIu64 " unexplained=%" PRIu64 " verify=%" PRIu64
           " go=%" PRIu64 " expected=%" PRIu64 "\n", d.load, d.start, d.total, d.unexplained, d.verify, d.go,
           expected.verify);
}

static void print_text(char *text)
{
    printf("value %s\n", text ? text : "none");
    vmig_string_free(text);
}

static void answer(int err)
{
    if (err < 0)
        printf("error %d %s\n", -err, vmig_errmsg());
    else
        printf("ok\n");
}

static void listen_at(const char *uri)
{
    char *address;

    if (vmig_incoming(g.m, uri) < 0) {
        answer(-1);
        return;
    }
    address = vmig_get(g.m, "listen-address");
    printf("listening %s\n", address);
    vmig_string_free(address);
}

static unsigned not_zero(void)
{
    unsigned n = 0;

    for (size_t i = 0; i < g.low_bytes; i++)
        n += g.low[i] != 0;
    for (size_t i = 0; i < g.high_bytes; i++)
        n += g.high[i] != 0;
    return n;
}

static bool look(const char *verb, char *rest)
{
    if (!strcmp(verb, "status"))
        print_status();
    else if (!strcmp(verb, "error"))
        print_text(vmig_get_error(g.m));
    else if (!strcmp(verb, "get"))
        print_text(vmig_get(g.m, rest));
    else if (!strcmp(verb, "parts"))
        print_parts();
    else if (!strcmp(verb, "hooks"))
        print_calls();
    else if (!strcmp(verb, "counts"))
        printf("value %d\n", counts_on(&g));
    else if (!strcmp(verb, "reasons"))
        printf("value %d\n", vmig_get_stop_reasons(g.m));
    else if (!strcmp(verb, "hash"))
        printf("value %" PRIx64 "\n", guest_hash(&g));
    else if (!strcmp(verb, "arrival"))
        printf("value %" PRIx64 "\n", g.arrival_hash);
    else if (!strcmp(verb, "memory"))
        printf("value %u\n", not_zero());
    else
        return false;
    return true;
}

static pthread_barrier_t together;

static void *cancel_thread(void *unused)
{
    (void)unused;
    pthread_barrier_wait(&together);
    return (void *)(intptr_t)vmig_cancel(g.m);
}

/* Many threads cancel at the same moment, and none may wait for another. */
static void cancels(unsigned count)
{
    pthread_t threads[16];
    void *first = NULL, *result;
    bool same = true;

    CHECK(count > 0 && count <= 16 && pthread_barrier_init(&together, NULL, count) == 0, "cancels %u", count);
    for (unsigned i = 0; i < count; i++)
        CHECK(pthread_create(&threads[i], NULL, cancel_thread, NULL) == 0, "a thread");
    for (unsigned i = 0; i < count; i++) {
        CHECK(pthread_join(threads[i], &result) == 0, "join");
        if (i == 0)
            first = result;
        same = same && result == first;
    }
    pthread_barrier_destroy(&together);
    if (same)
        printf("value %d\n", (int)(intptr_t)first);
    else
        printf("value differs\n");
}

/* The guest completed elsewhere: whoever touches its memory here now dies. */
static void unmap(void)
{
    CHECK(mprotect(g.low, g.low_bytes, PROT_NONE) == 0 && mprotect(g.high, g.high_bytes, PROT_NONE) == 0, "mprotect");
    printf("ok\n");
}

static bool harm(const char *verb, char *rest)
{
    if (!strcmp(verb, "poke")) {
        g.low[strtoul(rest, NULL, 0)] ^= 0xff;
        printf("ok\n");
    } else if (!strcmp(verb, "twist")) {
        twisted = atoi(rest);
        printf("ok\n");
    } else if (!strcmp(verb, "cancels"))
        cancels((unsigned)atoi(rest));
    else if (!strcmp(verb, "unmap"))
        unmap();
    else
        return false;
    return true;
}

static void obey(const char *verb, char *rest)
{
    if (!strcmp(verb, "set")) {
        char *value = rest, *name = strsep(&value, " ");
        answer(vmig_set(g.m, name, value));
    } else if (!strcmp(verb, "in"))
        listen_at(rest);
    else if (!strcmp(verb, "out"))
        answer(vmig_outgoing(g.m, rest));
    else if (!strcmp(verb, "resume"))
        answer(vmig_resume(g.m, rest));
    else if (!strcmp(verb, "qmp"))
        answer(vmig_qmp_listen(g.m, rest));
    else if (!strcmp(verb, "start"))
        answer(vmig_start(g.m));
    else if (!strcmp(verb, "stop"))
        answer(vmig_stop(g.m));
    else if (!strcmp(verb, "cancel"))
        answer(vmig_cancel(g.m));
    else if (!strcmp(verb, "continue"))
        answer(vmig_continue(g.m));
    else if (!strcmp(verb, "resolve"))
        answer(vmig_resolve(g.m, !strcmp(rest, "run") ? VMIG_RUN : VMIG_DISCARD));
    else if (!strcmp(verb, "fail"))
        tell(&failing, rest);
    else if (!strcmp(verb, "hold"))
        tell(&held, rest);
    else
        printf("error 0 no such command\n");
}

int main(int argc, char **argv)
{
    struct shape shape = { .high_pages = argc > 2 ? (unsigned)atoi(argv[2]) : 0 };
    char line[512];

    setvbuf(stdout, NULL, _IOLBF, 0);
    guest_new(&g, &shape, (uint8_t)(argc > 1 ? atoi(argv[1]) : 0));
    g.plot = plot;
    g.span = shape.high_pages / 4;      /* the others travel once: one that gets lost is not made good */
    for (size_t page = 0; argc > 2 && atoi(argv[1]) && page < shape.high_pages - 1; page++)
        memset(g.high + page * PAGE, (int)(1 + page % 255), PAGE);
    while (fgets(line, sizeof line, stdin)) {
        char *rest = line, *verb;
        line[strcspn(line, "\n")] = '\0';
        verb = strsep(&rest, " ");
        if (!strcmp(verb, "quit"))
            break;
        if (!look(verb, rest) && !harm(verb, rest))
            obey(verb, rest);
    }
    guest_free(&g);
    return 0;
}
