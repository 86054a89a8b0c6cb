/* Every function of the header, called with everything it must refuse. Prints "case NAME" for each function; tests/entry_points.rs
 * compares the names with the header's. Structs end at an unmapped page, so a read or write past them is fatal. */
#include "guest.h"

static struct guest g;
static vmig *m;
static uint8_t *edge;                   /* end of a page, behind which nothing is mapped */
static const char *long_text, *very_long_text, *bad_utf8 = "caf\xe9";

#define CASE(function) (printf("case %s\n", #function), (void)&(function))
#define REFUSES(error, words, call) \
    do { \
        int result_ = (call); \
        CHECK(result_ == -(error) && strstr(vmig_errmsg(), words), "%d, wanted %d and '%s'", result_, -(error), words); \
    } while (0)
#define REFUSES_TEXT(words, call) CHECK((call) == NULL && strstr(vmig_errmsg(), words), "wanted '%s'", words)

/* What a failed call must not change, as far as it can be seen from outside. */
static uint64_t fingerprint(void)
{
    static const char *const options[] = { "max-bandwidth", "machine", "return-path", "stall-timeout", "events" };
    vmig_status s = VMIG_SIZED(vmig_status);
    char *error = vmig_get_error(m), *threads = vmig_get_threads(m);
    uint64_t h = hash_bytes(1, error ? error : "", error ? strlen(error) : 0);
    int held = vmig_bql_held(m), reasons = vmig_get_stop_reasons(m);

    CHECK(vmig_get_status(m, &s) == 0 && threads, "status");
    h = hash_bytes(hash_bytes(h, &s.state, sizeof s.state), threads, strlen(threads));
    h = hash_bytes(hash_bytes(h, &held, sizeof held), &reasons, sizeof reasons);
    vmig_string_free(error), vmig_string_free(threads);
    for (unsigned i = 0; i < sizeof options / sizeof *options; i++) {
        char *value = vmig_get(m, options[i]);
        CHECK(value, "%s", options[i]);
        h = hash_bytes(h, value, strlen(value));
        vmig_string_free(value);
    }
    return h;
}

/* Calls `call` with a struct of every size there may be. `required`: of the oldest version; `fills`: the struct is an output. */
static void sizes(const char *name, int (*call)(void *), const void *good, size_t len, size_t required, bool fills)
{
    uint8_t before[4096 + 64], *p;
    char words[64];

    REFUSES(EINVAL, name, call(NULL));
    REFUSES(EINVAL, "aligned", call(edge - len - 1));
    snprintf(words, sizeof words, "VMIG_SIZED(%s)", name);
    for (size_t size = 0; size < len + 64; size++) {
        size_t room = size < sizeof size ? sizeof size : (size + 7) & ~(size_t)7;
        p = edge - room;
        memset(p, 0, room), memcpy(p, good, room < len ? room : len), memcpy(p, &size, sizeof size);
        memcpy(before, p, room);
        if (size == 0) {
            REFUSES(EINVAL, words, call(p));
        } else if (size < required || size % 8) {
            REFUSES(EINVAL, name, call(p));
        } else if (fills) {
            CHECK(call(p) >= 0 && memcmp(p, &size, sizeof size) == 0, "%s of %zu bytes", name, size);
            for (size_t i = len; i < size; i++)
                CHECK(p[i] == 0, "byte %zu", i);
            continue;
        } else {
            if (size >= len) {
                CHECK(call(p) >= 0, "%s with a zero tail of %zu bytes", name, size - len);
                for (size_t i = len; i < size; i++) {
                    p[i] = 1;
                    REFUSES(E2BIG, name, call(p));
                    p[i] = 0;
                }
            } else {
                call(p);
            }
        }
        CHECK(memcmp(before, p, room) == 0, "%s of %zu bytes was written to", name, size);
    }
    for (unsigned i = 0; i < 3; i++) {
        size_t huge[] = { 4104, 0xdeadbeef0, SIZE_MAX & ~(size_t)7 };
        p = edge - len;
        memcpy(p, good, len), memcpy(p, &huge[i], sizeof huge[i]);
        REFUSES(E2BIG, name, call(p));
    }
}

#define STRINGS(what, CALL) \
    do { \
        REFUSES(EINVAL, what " is NULL", CALL(NULL)); \
        REFUSES(EINVAL, what " is not UTF-8", CALL(bad_utf8)); \
        REFUSES(EINVAL, what " is longer than 65536 bytes", CALL(very_long_text)); \
    } while (0)

/* ---- 1. the guest ------------------------------------------------------------------------------------------------ */

static int nothing(void *vm) { (void)vm; return 0; }
static void no_word(void *vm) { (void)vm; }
static unsigned gone;
static void count_gone(void *vm) { (void)vm; gone++; }

static int new_of(void *ops)
{
    vmig *made = (vmig *)&g;
    int result = vmig_new(ops, &g, &made);

    if (result == 0)
        vmig_free(made);
    else
        CHECK(made == (vmig *)&g, "an output was written by a call that failed");
    return result;
}

static void the_guest(void)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig *made;

    CASE(vmig_new);
    ops.stop = ops.start = nothing, ops.destroy = count_gone;
    sizes("vmig_ops", new_of, &ops, sizeof ops, offsetof(vmig_ops, lock), false);
    REFUSES(EINVAL, "out", vmig_new(&ops, NULL, NULL));
    gone = 0;
    ops.start = NULL;
    REFUSES(EINVAL, "start", new_of(&ops));
    ops.start = nothing, ops.stop = NULL;
    REFUSES(EINVAL, "stop", new_of(&ops));
    ops.stop = nothing, ops.lock = no_word;
    REFUSES(EINVAL, "unlock", new_of(&ops));
    ops.lock = NULL, ops.held = nothing;
    REFUSES(EINVAL, "lock", new_of(&ops));
    CHECK(gone == 0, "no destroy for a guest that was not made");
    ops.held = NULL;
    CHECK(vmig_new(&ops, NULL, &made) == 0, "a guest without a pointer");
    CASE(vmig_free);
    vmig_free(made);
    CHECK(gone == 1, "destroy comes once");
    vmig_free(NULL);
    CASE(vmig_version);
    CHECK(vmig_version() > 0 && vmig_version() >> 16 < 100, "%#x", vmig_version());
    CASE(vmig_errmsg);
    CHECK(vmig_errmsg() != NULL && *vmig_errmsg(), "the last failure's words");
    CASE(vmig_string_free);
    vmig_string_free(NULL);
    CASE(vmig_get_threads);
    REFUSES_TEXT("NULL", vmig_get_threads(NULL));
}

/* ---- 2. the big lock and the run state --------------------------------------------------------------------------- */

static int stats_of(void *p) { return vmig_get_bql_stats(m, p); }
static int run_nothing(void *o, vmig_phase p, const vmig_moment *at) { (void)o, (void)p, (void)at; return 0; }

static void lock_and_run(void)
{
    vmig_bql_stats stats = VMIG_SIZED(vmig_bql_stats);

    CASE(vmig_bql_lock), CASE(vmig_bql_unlock), CASE(vmig_bql_held), CASE(vmig_bql_wait), CASE(vmig_bql_wake);
    REFUSES(EINVAL, "NULL", vmig_bql_lock(NULL));
    REFUSES(EINVAL, "NULL", vmig_bql_unlock(NULL));
    REFUSES(EINVAL, "NULL", vmig_bql_held(NULL));
    REFUSES(EINVAL, "NULL", vmig_bql_wait(NULL, 0));
    REFUSES(EINVAL, "NULL", vmig_bql_wake(NULL));
    REFUSES(EPERM, "", vmig_bql_unlock(m));
    REFUSES(EPERM, "", vmig_bql_wait(m, 0));
    CHECK(vmig_bql_lock(m) == 0 && vmig_bql_held(m) == 1 && vmig_bql_wait(m, 1) == 0, "lock");
    REFUSES(EDEADLK, "", vmig_bql_lock(m));
    CHECK(vmig_bql_unlock(m) == 0 && vmig_bql_held(m) == 0 && vmig_bql_wake(m) == 0, "unlock");
    CASE(vmig_get_bql_stats);
    REFUSES(EINVAL, "handle", vmig_get_bql_stats(NULL, &stats));
    sizes("vmig_bql_stats", stats_of, &stats, sizeof stats, 8, true);
    CASE(vmig_stop), CASE(vmig_start), CASE(vmig_get_stop_reasons), CASE(vmig_clock_ns);
    REFUSES(EINVAL, "NULL", vmig_stop(NULL));
    REFUSES(EINVAL, "NULL", vmig_start(NULL));
    REFUSES(EINVAL, "NULL", vmig_get_stop_reasons(NULL));
    CHECK(vmig_clock_ns(NULL) == 0 && strstr(vmig_errmsg(), "NULL"), "clock");
    CHECK(vmig_bql_lock(m) == 0, "lock");
    REFUSES(EDEADLK, "lock", vmig_stop(m));
    REFUSES(EDEADLK, "lock", vmig_start(m));
    CASE(vmig_on_run), CASE(vmig_remove_on_run);
    gone = 0;
    REFUSES(EINVAL, "NULL", vmig_on_run(NULL, 0, run_nothing, NULL, count_gone));
    REFUSES(EINVAL, "", vmig_on_run(m, 0, NULL, NULL, count_gone));
    REFUSES(EINVAL, "NULL", vmig_remove_on_run(NULL, 1));
    REFUSES(ENOENT, "", vmig_remove_on_run(m, 0));
    REFUSES(ENOENT, "", vmig_remove_on_run(m, -1));
    REFUSES(ENOENT, "", vmig_remove_on_run(m, 999));
    CHECK(vmig_bql_unlock(m) == 0, "unlock");
    REFUSES(EPERM, "big lock", vmig_on_run(m, 0, run_nothing, NULL, count_gone));
    REFUSES(EPERM, "big lock", vmig_remove_on_run(m, 1));
    CHECK(gone == 0, "no destroy for what was not added");
}

/* ---- 3. guest RAM ------------------------------------------------------------------------------------------------ */

static uint8_t *page;

static int ram_of(void *p)
{
    int result = vmig_add_ram(m, p);

    if (result == 0)
        CHECK(vmig_remove_ram(m, "new") == 0, "it was added");
    else
        CHECK(vmig_remove_ram(m, "new") == -ENOENT && vmig_add_ram(m, p) == result, "it was not added");
    return result;
}

static int ram_named(const char *name)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);

    ram.name = name, ram.host = page, ram.len = PAGE, ram.flags = VMIG_RAM_MARKED;
    return vmig_add_ram(m, &ram);
}

static int remove_ram(const char *name) { return vmig_remove_ram(m, name); }
static int slot_of(void *p) { return vmig_add_kvm_slot(m, p); }

static void ram(void)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram), bad;
    vmig_kvm_slot slot = VMIG_SIZED(vmig_kvm_slot);
    int fd = 0;

    CASE(vmig_add_ram), CASE(vmig_remove_ram), CASE(vmig_dirty);
    ram.name = "new", ram.host = page, ram.len = PAGE, ram.flags = VMIG_RAM_MARKED;
    REFUSES(EPERM, "big lock", vmig_add_ram(m, &ram));
    REFUSES(EPERM, "big lock", vmig_remove_ram(m, "low"));
    CHECK(vmig_bql_lock(m) == 0, "lock");
    REFUSES(EINVAL, "handle", vmig_add_ram(NULL, &ram));
    sizes("vmig_ram", ram_of, &ram, sizeof ram, offsetof(vmig_ram, gpa), false);
    STRINGS("name", ram_named);
    REFUSES(EINVAL, "name", ram_named(""));
    REFUSES(EINVAL, "name", ram_named("a\nb"));
    REFUSES(EINVAL, "name", ram_named(long_text));
    REFUSES(EEXIST, "low", ram_named("low"));
#define WRONG(member, value, error, words) (bad = ram, bad.member = (value), CHECK(ram_of(&bad) == -(error) && \
        strstr(vmig_errmsg(), words), "%s = %s", #member, #value))
    WRONG(host, NULL, EINVAL, "new"), WRONG(host, page + 8, EINVAL, "new"), WRONG(len, 0, EINVAL, "new");
    WRONG(len, PAGE + 1, EINVAL, "new"), WRONG(len, UINT64_MAX - 4095, EINVAL, "new"), WRONG(gpa, 1, EINVAL, "new");
    WRONG(flags, 1u << 31, EINVAL, "flags"), WRONG(fd, 1, EINVAL, "VMIG_RAM_FD"), WRONG(fd_offset, 4096, EINVAL, "VMIG_RAM_FD"), WRONG(host, g.low, EEXIST, "low");
    STRINGS("name", remove_ram);
    REFUSES(ENOENT, "none", vmig_remove_ram(m, "none"));
    REFUSES(EINVAL, "handle", vmig_remove_ram(NULL, "low"));
    vmig_dirty(NULL, page, 1), vmig_dirty(m, NULL, 0), vmig_dirty(m, NULL, UINT64_MAX), vmig_dirty(m, page, UINT64_MAX);
    vmig_dirty(m, g.low - 1, 1), vmig_dirty(m, g.low + g.low_bytes - 1, UINT64_MAX), vmig_dirty(m, (void *)-1, 2);
    CASE(vmig_use_kvm), CASE(vmig_add_kvm_slot), CASE(vmig_remove_kvm_slot);
    REFUSES(EINVAL, "handle", vmig_use_kvm(NULL, 0, &fd, 1));
    REFUSES(EINVAL, "vcpu_fds", vmig_use_kvm(m, 0, NULL, 1));
    REFUSES(EINVAL, "vCPU", vmig_use_kvm(m, 0, &fd, 0));
    REFUSES(EINVAL, "vCPU", vmig_use_kvm(m, 0, &fd, SIZE_MAX));
    CHECK(vmig_use_kvm(m, -1, &fd, 1) < 0 && vmig_use_kvm(m, 0, &fd, 1) < 0, "these are no KVM fds");
    REFUSES(EINVAL, "handle", vmig_add_kvm_slot(NULL, &slot));
    slot.ram = "low", slot.len = PAGE;
    REFUSES(EINVAL, "vmig_use_kvm", slot_of(&slot));
    REFUSES(EINVAL, "NULL", slot_of(NULL));
    for (size_t size = 0; size < sizeof slot; size++) {
        slot.size = size;
        REFUSES(EINVAL, "vmig_kvm_slot", slot_of(&slot));
    }
    slot.size = sizeof slot + 4096;
    REFUSES(E2BIG, "vmig_kvm_slot", slot_of(&slot));
    slot.size = sizeof slot;
    slot.ram = NULL;
    REFUSES(EINVAL, "ram is NULL", slot_of(&slot));
    slot.ram = bad_utf8;
    REFUSES(EINVAL, "ram is not UTF-8", slot_of(&slot));
    REFUSES(EINVAL, "handle", vmig_remove_kvm_slot(NULL, 0));
    REFUSES(ENOENT, "slot", vmig_remove_kvm_slot(m, 3));
    CHECK(vmig_bql_unlock(m) == 0, "unlock");
}

static int destroyed;
static int no_pages(void *p, const vmig_dirty_bitmap *b) { return p && b ? 0 : -EINVAL; }
static void count_destroyed(void *p) { (void)p, destroyed++; }
static int source_of(void *p) { return vmig_add_dirty_source(m, p, &destroyed); }
static int source_once(void *p)
{
    int err = source_of(p);

    return err < 0 ? err : vmig_remove_dirty_source(m, &destroyed);
}

static void sources(void)
{
    vmig_dirty_source source = VMIG_SIZED(vmig_dirty_source);
    vmig_vcpu_dirt dirt = VMIG_SIZED(vmig_vcpu_dirt);

    CASE(vmig_add_dirty_source), CASE(vmig_remove_dirty_source), CASE(vmig_dirty_ring_full);
    CASE(vmig_set_vcpu_dirty_limit), CASE(vmig_get_vcpu_dirt);
    source.name = "device", source.sync = no_pages, source.destroy = count_destroyed;
    REFUSES(EPERM, "big lock", source_of(&source));
    REFUSES(EPERM, "big lock", vmig_remove_dirty_source(m, &source));
    CHECK(vmig_bql_lock(m) == 0, "lock");
    REFUSES(EINVAL, "handle", vmig_add_dirty_source(NULL, &source, NULL));
    REFUSES(EINVAL, "handle", vmig_remove_dirty_source(NULL, NULL));
    REFUSES(EINVAL, "NULL", source_of(NULL));
    sizes("vmig_dirty_source", source_once, &source, sizeof source, offsetof(vmig_dirty_source, clear), false);
    destroyed = 0;
    source.name = NULL;
    REFUSES(EINVAL, "name is NULL", source_of(&source));
    source.name = bad_utf8;
    REFUSES(EINVAL, "printable", source_of(&source));
    source.name = "";
    REFUSES(EINVAL, "printable", source_of(&source));
    source.name = "device", source.flags = 2;
    REFUSES(EINVAL, "unknown bits", source_of(&source));
    source.flags = 0, source.sync = NULL;
    REFUSES(EINVAL, "no sync", source_of(&source));
    source.sync = no_pages;
    CHECK(source_of(&source) == 0, "a good one");
    REFUSES(EEXIST, "opaque", source_of(&source));
    REFUSES(ENOENT, "opaque", vmig_remove_dirty_source(m, &source));
    CHECK(destroyed == 0, "not before it is removed");
    CHECK(vmig_remove_dirty_source(m, &destroyed) == 0 && destroyed == 1, "once");
    REFUSES(ENOENT, "opaque", vmig_remove_dirty_source(m, &destroyed));
    REFUSES(EINVAL, "handle", vmig_dirty_ring_full(NULL, 0));
    REFUSES(EINVAL, "no dirty rings", vmig_dirty_ring_full(m, 0));
    REFUSES(EINVAL, "handle", vmig_set_vcpu_dirty_limit(NULL, 0, 1));
    REFUSES(EINVAL, "no dirty rings", vmig_set_vcpu_dirty_limit(m, -1, 1));
    REFUSES(EINVAL, "no vCPU -2", vmig_set_vcpu_dirty_limit(m, -2, 1));
    REFUSES(EINVAL, "handle", vmig_get_vcpu_dirt(NULL, 0, &dirt));
    REFUSES(EINVAL, "no dirty rings", vmig_get_vcpu_dirt(m, 0, &dirt));
    CHECK(vmig_bql_unlock(m) == 0, "unlock");
}

/* ---- 4. devices -------------------------------------------------------------------------------------------------- */

static uint32_t word;
static const vmig_field one[] = { { .name = "w", .kind = VMIG_KIND_U32, .width = 4, .count = 1 }, VMIG_END };

static int device_of(void *p)
{
    int result = vmig_add_device(m, p, 0, &word);

    CHECK(vmig_remove_device(m, &word) == (result == 0 ? 0 : -ENOENT), "added if and only if the call says so");
    return result == 0 ? 0 : vmig_add_device(m, p, 0, &word);   /* once more, for its words */
}

static int device_named(const char *name)
{
    vmig_device d = VMIG_SIZED(vmig_device);

    d.name = name, d.version = 1, d.fields = one;
    return device_of(&d);
}

static void wrong_field(const char *words, vmig_field field)
{
    const vmig_field fields[] = { field, VMIG_END };
    vmig_device d = VMIG_SIZED(vmig_device);

    d.name = "odd", d.version = 1, d.fields = fields;
    REFUSES(EINVAL, words, device_of(&d));
    CHECK(strstr(vmig_errmsg(), "odd"), "it names the device");
}

static int block(const char *reason) { return vmig_block(m, reason); }

static void devices(void)
{
    vmig_device d = VMIG_SIZED(vmig_device), bad;
    vmig_field field = one[0];

    CASE(vmig_add_device), CASE(vmig_remove_device);
    d.name = "new", d.version = 1, d.fields = one;
    REFUSES(EPERM, "big lock", vmig_add_device(m, &d, 0, &word));
    REFUSES(EPERM, "big lock", vmig_remove_device(m, &g.dev));
    CHECK(vmig_bql_lock(m) == 0, "lock");
    REFUSES(EINVAL, "handle", vmig_add_device(NULL, &d, 0, &word));
    REFUSES(EINVAL, "", vmig_add_device(m, &d, 0, NULL));
    sizes("vmig_device", device_of, &d, sizeof d, offsetof(vmig_device, oldest) + 4, false);
    REFUSES(EINVAL, "name is NULL", device_named(NULL));
    REFUSES(EINVAL, "UTF-8", device_named(bad_utf8));
    REFUSES(EINVAL, "255", device_named(long_text));
    REFUSES(EINVAL, "name", device_named(""));
    bad = d, bad.name = "ram";
    REFUSES(EEXIST, "library", device_of(&bad));
    bad = d, bad.version = 0;
    REFUSES(EINVAL, "version", device_of(&bad));
    bad = d, bad.oldest = 2;
    REFUSES(EINVAL, "oldest", device_of(&bad));
    bad = d, bad.flags = 1u << 30;
    REFUSES(EINVAL, "flags", device_of(&bad));
    bad = d, bad.fields = NULL, bad.pre_save = nothing;
    REFUSES(EINVAL, "new", device_of(&bad));
    field.kind = 99, wrong_field("kind", field), field = one[0];
    field.width = 3, wrong_field("w", field), field = one[0];
    field.flags = 64, wrong_field("flags", field), field = one[0];
    field.reserved32 = 1, wrong_field("reserved", field), field = one[0];
    field.name = NULL, wrong_field("name", field), field = one[0];
    field.count_field = "none", wrong_field("none", field), field = one[0];
    field.kind = VMIG_KIND_STRUCT, wrong_field("NULL", field), field = one[0];
    field.count = SIZE_MAX, wrong_field("w", field), field = one[0];
    REFUSES(EINVAL, "handle", vmig_remove_device(NULL, &word));
    REFUSES(EINVAL, "NULL", vmig_remove_device(m, NULL));
    REFUSES(ENOENT, "", vmig_remove_device(m, &word));
    CHECK(vmig_bql_unlock(m) == 0, "unlock");
    CASE(vmig_block), CASE(vmig_unblock);
    STRINGS("reason", block);
    REFUSES(EINVAL, "reason", block(""));
    REFUSES(EINVAL, "handle", vmig_block(NULL, "x"));
    REFUSES(EINVAL, "handle", vmig_unblock(NULL, 1));
    REFUSES(ENOENT, "", vmig_unblock(m, 77));
    REFUSES(ENOENT, "", vmig_unblock(m, -1));
}

/* ---- 6. sections ------------------------------------------------------------------------------------------------- */

static int save(void *o, vmig_writer *w) { (void)o, (void)w; return 0; }
static int load(void *o, uint32_t p, uint32_t v, vmig_reader *r) { (void)o, (void)p, (void)v, (void)r; return 0; }

static int section_of(void *p)
{
    int result = vmig_add_section(m, "new", 1, p, &word, count_gone);
    unsigned before = gone;

    if (result == 0)
        CHECK(vmig_remove_device(m, &word) == 0 && gone == before + 1, "added, and destroyed once");
    else
        CHECK(vmig_remove_device(m, &word) == -ENOENT && gone == before, "not added, not destroyed");
    return result == 0 ? 0 : vmig_add_section(m, "new", 1, p, &word, count_gone);
}

static char *metrics_of(const char *labels) { return vmig_metrics(m, labels); }

static void observing(void)
{
    char *text;

    CASE(vmig_metrics);
    CHECK(!vmig_metrics(NULL, NULL) && strstr(vmig_errmsg(), "handle"), "no guest");
    CHECK(!metrics_of("vm=web1") && strstr(vmig_errmsg(), "labels are name="), "%s", vmig_errmsg());
    CHECK(!metrics_of(very_long_text) && strstr(vmig_errmsg(), "longer"), "%s", vmig_errmsg());
    CHECK(!metrics_of("\xff") && strstr(vmig_errmsg(), "UTF-8"), "%s", vmig_errmsg());
    text = metrics_of("");
    CHECK(text && strstr(text, "\nvmig_migration_remaining_bytes 0\n"), "metrics without labels");
    vmig_string_free(text);
}

static const vmig_section_ops *good_section;
static int section_named(const char *name) { return vmig_add_section(m, name, 1, good_section, &word, count_gone); }

static void sections(void)
{
    vmig_section_ops ops = VMIG_SIZED(vmig_section_ops), bad;
    uint8_t buf[8] = { 9 };

    CASE(vmig_add_section);
    ops.complete = save, ops.load = load, good_section = &ops;
    REFUSES(EPERM, "big lock", section_named("new"));
    CHECK(vmig_bql_lock(m) == 0, "lock");
    gone = 0;
    REFUSES(EINVAL, "handle", vmig_add_section(NULL, "new", 1, &ops, &word, count_gone));
    sizes("vmig_section_ops", section_of, &ops, sizeof ops, offsetof(vmig_section_ops, is_active), false);
    gone = 0;
    STRINGS("name", section_named);
    REFUSES(EINVAL, "255", section_named(long_text));
    REFUSES(EEXIST, "library", section_named("timer"));
    REFUSES(EEXIST, "gpu", section_named("gpu"));
    REFUSES(EINVAL, "oldest", vmig_add_section(m, "new", 0, &ops, &word, count_gone));
    bad = ops, bad.complete = NULL;
    REFUSES(EINVAL, "complete", section_of(&bad));
    bad = ops, bad.load = NULL;
    REFUSES(EINVAL, "load", section_of(&bad));
    bad = ops, bad.setup = save;
    REFUSES(EINVAL, "setup", section_of(&bad));
    bad = ops, bad.flags = 128;
    REFUSES(EINVAL, "flags", section_of(&bad));
    bad = ops, bad.oldest = 5;
    REFUSES(EINVAL, "oldest", section_of(&bad));
    CHECK(gone == 0 && vmig_bql_unlock(m) == 0, "nothing was destroyed that was not added");
    CASE(vmig_put), CASE(vmig_put_u8), CASE(vmig_put_u16), CASE(vmig_put_u32), CASE(vmig_put_u64), CASE(vmig_get_bytes);
    CASE(vmig_get_u8), CASE(vmig_get_u16), CASE(vmig_get_u32), CASE(vmig_get_u64), CASE(vmig_reader_left);
    REFUSES(EINVAL, "writer is NULL", vmig_put(NULL, buf, 1));
    REFUSES(EINVAL, "writer is NULL", vmig_put_u8(NULL, 1));
    REFUSES(EINVAL, "writer is NULL", vmig_put_u16(NULL, 1));
    REFUSES(EINVAL, "writer is NULL", vmig_put_u32(NULL, 1));
    REFUSES(EINVAL, "writer is NULL", vmig_put_u64(NULL, 1));
    REFUSES(EINVAL, "reader is NULL", vmig_get_bytes(NULL, buf, 1));
    CHECK(buf[0] == 9 && vmig_get_u8(NULL) == 0 && vmig_get_u16(NULL) == 0 && vmig_get_u32(NULL) == 0, "no reader");
    CHECK(vmig_get_u64(NULL) == 0 && vmig_reader_left(NULL) == 0, "no reader");
}

/* ---- QMP --------------------------------------------------------------------------------------------------------- */

static char *ask(const char *request) { return vmig_qmp(m, request); }
static int serve(const char *uri) { return vmig_qmp_listen(m, uri); }
static unsigned replied;

/* What a reply refuses can only be tried inside a command. */
static int reply_wrongly(void *opaque, const char *arguments, vmig_reply *reply)
{
    (void)opaque, (void)arguments;
    CHECK(vmig_reply_json(reply, "{\"a\": 1}") == 0, "an answer");
    REFUSES(EINVAL, "json is NULL", vmig_reply_json(reply, NULL));
    REFUSES(EINVAL, "json is not UTF-8", vmig_reply_json(reply, bad_utf8));
    REFUSES(EINVAL, "not JSON", vmig_reply_json(reply, "{"));
    REFUSES(EINVAL, "text is NULL", vmig_reply_error(reply, NULL));
    REFUSES(EINVAL, "reply is NULL", vmig_reply_json(NULL, "{}"));
    REFUSES(EINVAL, "reply is NULL", vmig_reply_error(NULL, "x"));
    replied++;
    return 0;
}

static int add_named(const char *name) { return vmig_qmp_add(m, name, reply_wrongly, NULL, count_gone); }

static void qmp(void)
{
    char *answer, *huge = malloc((256 << 10) + 2);

    CASE(vmig_qmp), CASE(vmig_qmp_listen), CASE(vmig_qmp_add), CASE(vmig_reply_json), CASE(vmig_reply_error);
    REFUSES_TEXT("handle", vmig_qmp(NULL, "{}"));
    REFUSES_TEXT("request is NULL", ask(NULL));
    REFUSES_TEXT("request is not UTF-8", ask(bad_utf8));
    memset(huge, 'x', (256 << 10) + 1), huge[(256 << 10) + 1] = 0;
    REFUSES_TEXT("request is longer than 262144 bytes", ask(huge));
    free(huge);
    vmig_bql_lock(m);
    REFUSES_TEXT("big lock", ask("{\"execute\": \"query-status\"}"));
    vmig_bql_unlock(m);
    REFUSES(EINVAL, "handle", vmig_qmp_listen(NULL, "tcp::0"));
    STRINGS("uri", serve);
    REFUSES(EINVAL, "fd:1", serve("fd:1x"));
    REFUSES(EINVAL, "unix:PATH or tcp:HOST:PORT", serve("fd:1"));
    REFUSES(ENOENT, "listening", serve("unix:/no/such/directory/socket"));
    REFUSES_TEXT("no QMP server", vmig_get(m, "qmp-address"));
    gone = 0;
    REFUSES(EINVAL, "handle", vmig_qmp_add(NULL, "x", reply_wrongly, NULL, count_gone));
    REFUSES(EINVAL, "no callback", vmig_qmp_add(m, "x", NULL, NULL, count_gone));
    STRINGS("name", add_named);
    REFUSES(EINVAL, "letters", add_named(""));
    REFUSES(EINVAL, "letters", add_named("a b"));
    REFUSES(EINVAL, "letters", add_named(long_text));
    REFUSES(EEXIST, "'migrate'", add_named("migrate"));
    CHECK(add_named("reply-wrongly") == 0, "a command");
    REFUSES(EEXIST, "'reply-wrongly'", add_named("reply-wrongly"));
    CHECK(gone == 0, "destroy is not called by a call that failed");
    answer = ask("{\"execute\": \"reply-wrongly\"}");
    CHECK(answer && replied == 1 && strcmp(answer, "{\"return\":{\"a\":1}}") == 0, "%s", answer);
    vmig_string_free(answer);
}

#include "entry_migrating.h"
#include "entry_channels.h"
#include "entry_trial.h"

int main(void)
{
    static void (*const chapters[])(void) = { the_guest, lock_and_run, ram, sources, devices, before_migrating, migrating,
                                              observing, sections, tests, qmp, channels };
    char *text = malloc(1000), *very = malloc(70000);
    uint64_t before;

    memset(text, 'x', 999), text[999] = 0, long_text = text;
    memset(very, 'x', 69999), very[69999] = 0, very_long_text = very;
    edge = guarded(2 * PAGE) + 2 * PAGE, page = guarded(PAGE);
    guest_new(&g, NULL, 3);
    m = g.m;
    before = fingerprint();
    for (unsigned i = 0; i < sizeof chapters / sizeof *chapters; i++) {
        chapters[i]();
        CHECK(fingerprint() == before, "chapter %u: a failed call changed something", i + 1);
    }
    gone = 0;
    guest_free(&g);
    CHECK(gone == 1, "destroy of a QMP command comes once, by vmig_free");
    unguard(edge - 2 * PAGE, 2 * PAGE), unguard(page, PAGE);
    free(text), free(very);
    return 0;
}
