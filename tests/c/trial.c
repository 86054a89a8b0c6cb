/* Tries devices with vmig_test_device(), correct ones and broken ones: `trial NAME [SEED [CASES]]`, `trial fds`,
 * `trial refuses`. Prints what the log says, what was found, and whether the device is what it was.
 *                                                                                       SPDX: MIT OR Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <vmig.h>

#define CHECK(ok, ...) ((ok) ? (void)0 : check_failed(__LINE__, #ok, __VA_ARGS__))
static __attribute__((noreturn, format(printf, 3, 4))) void check_failed(int line, const char *what, const char *format, ...)
{
    va_list args;

    fflush(stdout);
    fprintf(stderr, "trial.c:%d: not true: %s; ", line, what);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, " [vmig_errmsg: %s]\n", vmig_errmsg());
    _exit(1);
}

#include "trial_sections.h"
#include "trial_tables.h"

static vmig *m;
static char now[512];                   /* the case that is tried */
static unsigned long cases;
static struct { uint32_t version; size_t len; uint8_t bytes[4096]; } kept;

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));
static void died(void)
{
    fprintf(stderr, "died in: %s\n", now);
}

/* The same for UndefinedBehaviorSanitizer, which has a runtime of its own. */
void __ubsan_on_report(void);
void __ubsan_on_report(void)
{
    died();
}

static void take_line(void *opaque, int level, const char *line)
{
    CHECK(opaque == &kept, "the pointer given with the callback");
    if (level != VMIG_LOG_DEBUG)
        printf("%s %s\n", level == VMIG_LOG_ERROR ? "error" : level == VMIG_LOG_WARNING ? "note" : "step", line);
    else
        cases++, snprintf(now, sizeof now, "%s", line);
}

static void keep(void *opaque, uint32_t version, const void *bytes, size_t len)
{
    CHECK(opaque == &kept && kept.len == 0, "saved is called once");
    kept.version = version, kept.len = len;
    if (len <= sizeof kept.bytes)
        memcpy(kept.bytes, bytes, len);
}

static int no_guest(void *vm)
{
    (void)vm;
    return 0;
}

static void add(const vmig_device *kind, const vmig_section_ops *ops, const char *name, uint32_t version, void *dev)
{
    CHECK(vmig_bql_lock(m) == 0, "lock");
    if (kind)
        CHECK(vmig_add_device(m, kind, 0, dev) == 0, "%s", name);
    else
        CHECK(vmig_add_section(m, name, version, ops, dev, NULL) == 0, "%s", name);
    CHECK(vmig_bql_unlock(m) == 0, "unlock");
}

static void remove_device(void *dev)
{
    CHECK(vmig_bql_lock(m) == 0 && vmig_remove_device(m, dev) == 0 && vmig_bql_unlock(m) == 0, "remove");
}

/* What a release before saved, kept as a sample. */
static void make_sample(const struct subject *s, void *dev, vmig_sample *sample)
{
    vmig_device_test how = VMIG_SIZED(vmig_device_test);
    static uint8_t bytes[4096];
    const char *name = s->earlier ? s->earlier->name : s->name;

    add(s->earlier, s->earlier_ops, name, 1, dev);
    how.saved = keep, how.opaque = &kept, how.flags = VMIG_TEST_VARIES, how.cases = 2;
    vmig_test_device(m, name, 0, &how); /* of the device as it is now nobody knows whether its past was good */
    CHECK(kept.len > 0, "the release before is saved");
    remove_device(dev);
    memcpy(bytes, kept.bytes, kept.len);
    *sample = (vmig_sample){ bytes, kept.len, kept.version, 0 };
    kept.len = 0;
}

/* Whether the device is what it was: all of it but its pointers and what is no state. */
static bool same(const struct subject *s, const uint8_t *a, const uint8_t *b)
{
    for (size_t i = 0; i < s->size; i++) {
        bool state = a[i] != b[i];

        for (const vmig_member *t = s->transient; t && t->len; t++)
            state = state && !(i >= t->offset && i - t->offset < t->len);
        if (state && s->kind == &full_kind)
            state = i < offsetof(struct full, word) || i >= offsetof(struct full, word) + sizeof(void *);
        if (state)
            return false;
    }
    return true;
}

static int try(const struct subject *s, char **args)
{
    vmig_device_test how = VMIG_SIZED(vmig_device_test);
    vmig_sample samples[2] = { { NULL, 0, 0, 0 }, { NULL, 0, 0, 0 } };
    const char *name = s->kind ? s->kind->name : s->name;
    uint8_t *dev = calloc(1, s->size), *before = malloc(s->size);
    int err;

    CHECK(dev && before, "memory");
    if (s->fill)
        s->fill(dev);
    if (s->earlier || s->earlier_ops)
        make_sample(s, dev, samples);
    memcpy(before, dev, s->size);
    add(s->kind, s->ops, name, s->version, dev);
    how.memory = s->no_memory ? 0 : s->size, how.reset = s->reset, how.transient = s->no_memory ? NULL : s->transient;
    how.samples = samples, how.saved = keep, how.log = take_line, how.opaque = &kept, how.flags = s->flags;
    how.seed = args[0] ? strtoull(args[0], NULL, 0) : 0;
    how.cases = args[0] && args[1] ? strtoull(args[1], NULL, 0) : 0;
    cases = 0;
    err = vmig_test_device(m, name, 0, &how);
    printf("%s %s\n", err == 0 ? "clean" : err == -EBADMSG ? "found" : "failed", err < 0 ? vmig_errmsg() : "");
    printf("cases %lu\nsaved %zu\n%s\n", cases, kept.len, same(s, before, dev) ? "kept" : "changed");
    CHECK(vmig_block(m, "still to be blocked") > 0, "nothing is left of the test");
    remove_device(dev);
    if (s->gone)
        s->gone(dev);
    free(before);
    free(dev);
    return 0;
}

/* ---- descriptors --------------------------------------------------------------------------------------------- */

struct holder { int fd; uint32_t id; };

static void fds(void)
{
    static const vmig_field fields[] = { VMIG_FD(struct holder, fd), VMIG_U32(struct holder, id), VMIG_END };
    static const vmig_device kind = { .size = sizeof(vmig_device), .name = "holder", .version = 1, .fields = fields };
    struct holder h = { open("/dev/null", O_RDONLY | O_CLOEXEC), 77 };
    vmig_device_test how = VMIG_SIZED(vmig_device_test);
    int fd = h.fd, next = dup(fd);

    close(next);

    add(&kind, NULL, "holder", 1, &h);
    how.memory = sizeof h, how.log = take_line, how.opaque = &kept;
    CHECK(vmig_test_device(m, "holder", 0, &how) == 0, "a device with a descriptor");
    CHECK(h.fd == fd && h.id == 77 && fcntl(fd, F_GETFD) >= 0, "it has what it had");
    fd = dup(fd);
    CHECK(next == fd, "no descriptor is left: the next one would be %d, not %d", fd, next);
    printf("cases %lu\nfds done\n", cases);
}

/* ---- what is refused ----------------------------------------------------------------------------------------- */

static void refused(int err, const char *words, int got)
{
    CHECK(got == -err && strstr(vmig_errmsg(), words), "%d, wanted %d and '%s'", got, -err, words);
}

static void refuses(void)
{
    struct plain p = { 0 };
    vmig_device_test how = VMIG_SIZED(vmig_device_test);
    const vmig_member beyond[] = { { sizeof p, 1 }, VMIG_MEMBER_END };
    static vmig_member endless[5000];

    for (unsigned i = 0; i < 5000; i++)
        endless[i].len = 1;
    add(KIND(plain_fields), NULL, "plain", 1, &p);
    refused(ENOENT, "'plain' with instance 1", vmig_test_device(m, "plain", 1, NULL));
    refused(ENOENT, "'other'", vmig_test_device(m, "other", 0, NULL));
    how.flags = 8, refused(EINVAL, "unknown flags 0x8", vmig_test_device(m, "plain", 0, &how)), how.flags = 0;
    how.reserved = 8, refused(EINVAL, "reserved", vmig_test_device(m, "plain", 0, &how)), how.reserved = 0;
    how.transient = beyond, how.memory = sizeof p;
    refused(EINVAL, "ends beyond the struct", vmig_test_device(m, "plain", 0, &how));
    how.transient = endless, refused(EINVAL, "no VMIG_MEMBER_END", vmig_test_device(m, "plain", 0, &how));
    CHECK(vmig_test_device(m, "plain", 0, NULL) == 0, "nothing is given");
    CHECK(vmig_bql_lock(m) == 0, "lock");
    refused(EDEADLK, "without the big lock", vmig_test_device(m, "plain", 0, NULL));
    CHECK(vmig_bql_unlock(m) == 0 && vmig_start(m) == 0, "the guest runs");
    refused(EBUSY, "vmig_stop it first", vmig_test_device(m, "plain", 0, NULL));
    CHECK(vmig_stop(m) == 0 && vmig_test_device(m, "plain", 0, NULL) == 0, "and is stopped");
    printf("refuses done\n");
}

int main(int argc, char **argv)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    const struct subject *found = NULL;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(died);
    ops.stop = no_guest, ops.start = no_guest;
    CHECK(argc > 1 && vmig_new(&ops, NULL, &m) == 0, "trial NAME");
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        found = strcmp(argv[1], tables[i].name) == 0 ? &tables[i] : found;
    for (size_t i = 0; i < sizeof sections / sizeof *sections; i++)
        found = strcmp(argv[1], sections[i].name) == 0 ? &sections[i] : found;
    if (strcmp(argv[1], "fds") == 0)
        fds();
    else if (strcmp(argv[1], "refuses") == 0)
        refuses();
    else {
        CHECK(found, "no device '%s'", argv[1]);
        try(found, argv + 2);
    }
    vmig_free(m);
    return 0;
}
