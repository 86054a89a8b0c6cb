/* Devices and sections of every kind, in a program that can be an old or a new release of itself.
 *                                                                                       SPDX: MIT OR Apache-2.0
 *   sections [incoming] [old] [extra]      old: tables and sections of version 1; extra: one more section
 *
 * Commands: see program.h and own_command(). A thread changes the bulk sections' state while the machine runs. */
#include "program.h"
#include <pthread.h>

enum { RAM_BYTES = 1 << 20, CHUNK = 4096, BULKS = 2, MAX_CHUNKS = 16384, ROOM = 9, BYTES_ROOM = 4096, ENTRY_MAX = 8 + CHUNK };
enum { DEFAULT_B = 77, DEFAULT_OPTION = 5 };

struct point {
    int32_t x, y;
};
/* One of each; macros.c checks what the macros make of them. */
#define KIND_MEMBERS(ctype, one) ctype one, one##s[3], one##v[3], *one##p, *one##q
struct all {
    uint32_t number;
    KIND_MEMBERS(uint8_t, u8);
    KIND_MEMBERS(uint16_t, u16);
    KIND_MEMBERS(uint32_t, u32);
    KIND_MEMBERS(uint64_t, u64);
    KIND_MEMBERS(int8_t, i8);
    KIND_MEMBERS(int16_t, i16);
    KIND_MEMBERS(int32_t, i32);
    KIND_MEMBERS(int64_t, i64);
    KIND_MEMBERS(bool, flag);
    KIND_MEMBERS(uint64_t, timer);
    KIND_MEMBERS(struct point, point);
    uint8_t blob[32], blobv[32], *blobq;
};
struct grown {
    uint32_t a, b, option;
    bool has_option;
};
struct machine;
struct bulk {                           /* much state, changed while the machine runs */
    struct machine *vm;
    uint32_t instance, chunks, left;    /* left: chunks to send */
    uint8_t *state;
    uint8_t dirty[MAX_CHUNKS];
    uint32_t bodies, last_bytes, cursor;
    pthread_mutex_t lock;
};
struct machine {
    vmig *m;
    uint64_t *ram;
    struct all all;
    struct grown grown;
    struct bulk bulk[BULKS];
    bool old, busy_quit;
    _Atomic bool running;
    int misread;                        /* bytes a load reads too many, or too few */
    pthread_t busy;
};

/* ---- tables ---- */

static const vmig_field point_fields[] = { VMIG_I32(struct point, x), VMIG_I32(struct point, y), VMIG_END };
static const vmig_device point_table = { .size = sizeof(vmig_device), .name = "point", .version = 1,
                                         .fields = point_fields };

#define KIND(K, one)                                     \
    VMIG_##K(struct all, one),                           \
    VMIG_##K##_ARRAY(struct all, one##s),                \
    VMIG_##K##_VARRAY(struct all, one##v, number),       \
    VMIG_PTR_##K(struct all, one##p),                    \
    VMIG_PTR_##K##_VARRAY(struct all, one##q, number, ROOM)

static const vmig_field all_fields[] = {
    VMIG_U32(struct all, number),
    KIND(U8, u8), KIND(U16, u16), KIND(U32, u32), KIND(U64, u64), KIND(I8, i8), KIND(I16, i16), KIND(I32, i32),
    KIND(I64, i64), KIND(BOOL, flag), KIND(TIMER, timer),
    VMIG_BYTES(struct all, blob),
    VMIG_BYTES_VARRAY(struct all, blobv, number),
    VMIG_PTR_BYTES(struct all, blobq, number, BYTES_ROOM),
    VMIG_UNUSED(12),
    VMIG_STRUCT(struct all, point, struct point, &point_table),
    VMIG_STRUCT_ARRAY(struct all, points, struct point, &point_table),
    VMIG_STRUCT_VARRAY(struct all, pointv, struct point, &point_table, number),
    VMIG_PTR_STRUCT(struct all, pointp, struct point, &point_table),
    VMIG_PTR_STRUCT_VARRAY(struct all, pointq, struct point, &point_table, number, ROOM),
    VMIG_END,
};
static const vmig_device all_kind = { .size = sizeof(vmig_device), .name = "all", .version = 1, .fields = all_fields,
                                      .priority = -7 };

static int option_needed(void *dev)
{
    return ((struct grown *)dev)->has_option;
}

static int option_loaded(void *dev, uint32_t version)
{
    (void)version;
    ((struct grown *)dev)->has_option = true;
    return 0;
}

static int grown_defaults(void *dev)
{
    *(struct grown *)dev = (struct grown){ .b = DEFAULT_B, .option = DEFAULT_OPTION };
    return 0;
}

static int grown_loaded(void *dev, uint32_t version)
{
    printf("note grown version %" PRIu32 "\n", version);
    return ((struct grown *)dev)->a ? 0 : -EINVAL;
}

static const vmig_field option_fields[] = { VMIG_U32(struct grown, option), VMIG_END };
static const vmig_device option_part = { .size = sizeof(vmig_device), .name = "grown/option", .version = 1,
                                         .fields = option_fields, .needed = option_needed, .post_load = option_loaded };
static const vmig_device *const grown_parts[] = { &option_part, NULL };
static const vmig_field grown_fields[] = { VMIG_U32(struct grown, a), VMIG_SINCE(2), VMIG_U32(struct grown, b), VMIG_END };
static const vmig_device grown_new = { .size = sizeof(vmig_device), .name = "grown", .version = 2, .oldest = 1,
                                       .fields = grown_fields, .parts = grown_parts, .pre_load = grown_defaults,
                                       .post_load = grown_loaded };
static const vmig_field grown_old_fields[] = { VMIG_U32(struct grown, a), VMIG_END };
static const vmig_device grown_old = { .size = sizeof(vmig_device), .name = "grown", .version = 1,
                                       .fields = grown_old_fields, .pre_load = grown_defaults,
                                       .post_load = grown_loaded };

/* ---- bulk sections: version 1 sends index and bytes, version 2 a check of the bytes, too ---- */

static uint8_t *chunk(struct bulk *b, uint32_t index)
{
    return b->state + (size_t)index * CHUNK;
}

static uint32_t sum(const uint8_t *bytes)
{
    return (uint32_t)hash_bytes(bytes, CHUNK);
}

static uint32_t bulk_version(const struct bulk *b)
{
    return b->vm->old ? 1 : 2;
}

static int bulk_setup(void *opaque, vmig_writer *out)
{
    struct bulk *b = opaque;

    pthread_mutex_lock(&b->lock);
    memset(b->dirty, 1, b->chunks);
    b->left = b->chunks, b->bodies = b->cursor = 0;
    pthread_mutex_unlock(&b->lock);
    return vmig_put_u32(out, b->chunks);
}

static int bulk_pending(void *opaque, uint64_t *must_precopy, uint64_t *can_postcopy)
{
    struct bulk *b = opaque;

    (void)can_postcopy;
    pthread_mutex_lock(&b->lock);
    *must_precopy = (uint64_t)b->left * CHUNK;
    pthread_mutex_unlock(&b->lock);
    return 0;
}

/* Sends what is dirty, about `budget` bytes of it; the bytes sent. */
static uint32_t bulk_send(struct bulk *b, vmig_writer *out, uint64_t budget)
{
    uint32_t sent = 0;

    for (uint32_t n = 0; n < b->chunks && b->left && sent + ENTRY_MAX <= budget; n++) {
        uint32_t index = b->cursor++ % b->chunks;
        if (!b->dirty[index])
            continue;
        b->dirty[index] = 0, b->left--;
        vmig_put_u32(out, index);
        if (bulk_version(b) == 2)
            vmig_put_u32(out, sum(chunk(b, index)));
        vmig_put(out, chunk(b, index), CHUNK);
        sent += ENTRY_MAX;
    }
    return sent;
}

static int bulk_iterate(void *opaque, vmig_writer *out, uint64_t budget)
{
    struct bulk *b = opaque;
    int done;

    pthread_mutex_lock(&b->lock);
    b->bodies += bulk_send(b, out, budget) > 0;
    done = b->left == 0;
    pthread_mutex_unlock(&b->lock);
    return done;
}

static int bulk_complete(void *opaque, vmig_writer *out)
{
    struct bulk *b = opaque;

    if (b->vm->running)
        return -EBUSY;
    pthread_mutex_lock(&b->lock);
    b->last_bytes = bulk_send(b, out, UINT64_MAX);
    pthread_mutex_unlock(&b->lock);
    return b->left ? -EIO : 0;
}

static int bulk_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct bulk *b = opaque;
    size_t entry = CHUNK + 4 * (size_t)version;

    if (part == VMIG_PART_START)
        return vmig_get_u32(in) == b->chunks ? 0 : -EINVAL;
    while (vmig_reader_left(in) >= entry) {
        uint32_t index = vmig_get_u32(in), check = version == 2 ? vmig_get_u32(in) : 0;
        if (index >= b->chunks)
            return -ERANGE;
        vmig_get_bytes(in, chunk(b, index), CHUNK);
        if (version == 2 && check != sum(chunk(b, index)))
            return -EILSEQ;
        b->bodies++;
    }
    return 0;
}

/* ---- one body before everything else, and one that reads wrongly when told to ---- */

static int early_save(void *opaque, vmig_writer *out)
{
    struct machine *vm = opaque;

    return vm->running ? vmig_put_u16(out, 0xea51) : -EINVAL;
}

static int early_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct machine *vm = opaque;
    uint16_t value = vmig_get_u16(in);

    (void)version;
    printf("note early %s\n", vm->ram[0] ? "after RAM" : "before RAM");
    return part == VMIG_PART_FULL && value == 0xea51 ? 0 : -EINVAL;
}

static int plain_save(void *opaque, vmig_writer *out)
{
    (void)opaque;
    vmig_put_u8(out, 1), vmig_put_u16(out, 2), vmig_put_u32(out, 3), vmig_put_u64(out, 4);
    return vmig_put(out, "plain", 5);
}

static int plain_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct machine *vm = opaque;
    char text[8] = "";

    (void)part, (void)version;
    if (vmig_get_u8(in) != 1 || vmig_get_u16(in) != 2 || vmig_get_u32(in) != 3 || vmig_get_u64(in) != 4)
        return -EINVAL;
    vmig_get_bytes(in, text, (size_t)(5 + vm->misread));
    return vm->misread || strcmp(text, "plain") == 0 ? 0 : -EINVAL;
}

/* ---- the machine ---- */

static void *busy(void *opaque)
{
    struct machine *vm = opaque;
    uint64_t random = 1;

    while (!__atomic_load_n(&vm->busy_quit, __ATOMIC_RELAXED)) {
        struct bulk *b = &vm->bulk[random >> 63];
        uint32_t index = (uint32_t)((random >> 20) % b->chunks);
        pthread_mutex_lock(&b->lock);
        if (vm->running) {
            chunk(b, index)[random >> 52] += 1;
            b->left += !b->dirty[index], b->dirty[index] = 1;
        }
        pthread_mutex_unlock(&b->lock);
        random = random * 6364136223846793005 + 1442695040888963407;
        if (random >> 58 == 0)
            usleep(1000);
    }
    return NULL;
}

static int stop(void *opaque)
{
    struct machine *vm = opaque;

    vm->running = false;
    for (size_t i = 0; i < BULKS; i++) {                /* a change that is under way ends first */
        pthread_mutex_lock(&vm->bulk[i].lock);
        pthread_mutex_unlock(&vm->bulk[i].lock);
    }
    return 0;
}

static int start(void *opaque)
{
    ((struct machine *)opaque)->running = true;
    return 0;
}

static void add_section(struct machine *vm, const char *name, const vmig_section_ops *ops, uint32_t version, void *opaque)
{
    need(vmig_add_section(vm->m, name, version, ops, opaque, NULL), name);
}

static void add_bulk(struct machine *vm, uint32_t instance, uint32_t chunks)
{
    vmig_section_ops ops = VMIG_SIZED(vmig_section_ops);
    struct bulk *b = &vm->bulk[instance];

    b->vm = vm, b->instance = instance, b->chunks = chunks, b->state = map_ram((uint64_t)chunks * CHUNK);
    pthread_mutex_init(&b->lock, NULL);
    ops.instance = instance, ops.oldest = 1, ops.priority = instance ? 50 : 10;
    ops.setup = bulk_setup, ops.pending_estimate = bulk_pending, ops.iterate = bulk_iterate;
    ops.complete = bulk_complete, ops.load = bulk_load;
    add_section(vm, "bulk", &ops, bulk_version(b), b);
}

static void register_all(struct machine *vm, bool extra)
{
    vmig_section_ops early = VMIG_SIZED(vmig_section_ops), plain = VMIG_SIZED(vmig_section_ops);
    vmig_ram ram = VMIG_SIZED(vmig_ram);

    ram.name = "ram", ram.host = vm->ram, ram.len = RAM_BYTES, ram.flags = VMIG_RAM_MARKED;
    early.flags = VMIG_SECTION_EARLY, early.complete = early_save, early.load = early_load;
    plain.complete = plain_save, plain.load = plain_load;
    vmig_bql_lock(vm->m);
    need(vmig_add_ram(vm->m, &ram), "ram");
    need(vmig_add_device(vm->m, &all_kind, 3, &vm->all), "all");
    need(vmig_add_device(vm->m, vm->old ? &grown_old : &grown_new, 0, &vm->grown), "grown");
    add_bulk(vm, 0, MAX_CHUNKS);
    add_bulk(vm, 1, 256);
    add_section(vm, "early", &early, 1, vm);
    add_section(vm, "plain", &plain, 1, vm);
    if (extra)
        add_section(vm, "extra", &plain, 1, vm);
    vmig_bql_unlock(vm->m);
}

static void fill(void *bytes, size_t len, uint64_t seed)
{
    for (size_t i = 0; i < len; i++)
        ((uint8_t *)bytes)[i] = (uint8_t)((seed = seed * 6364136223846793005 + 1442695040888963407) >> 56);
}

#define EACH_KIND(X) X(u8) X(u16) X(u32) X(u64) X(i8) X(i16) X(i32) X(i64) X(flag) X(timer) X(point)

static void make_all(struct all *all, bool filled)
{
#define ALLOCATE(k)                                                              \
    all->k##p = calloc(1, sizeof *all->k##p), all->k##q = calloc(ROOM, sizeof *all->k##q);
#define FILL(k)                                                                  \
    fill(all->k##p, sizeof *all->k##p, offsetof(struct all, k##p));              \
    fill(all->k##q, ROOM * sizeof *all->k##q, offsetof(struct all, k##q));
    if (filled)
        fill(all, sizeof *all, 12345);                  /* the pointers, too, which are set next */
    EACH_KIND(ALLOCATE)
    all->blobq = calloc(1, BYTES_ROOM);
    all->number = filled ? 2 : 0;
    if (!filled)
        return;
    EACH_KIND(FILL)
    fill(all->blobq, BYTES_ROOM, 99);
    memset(&all->flag, 1, 1), memset(all->flags, 1, 2), memset(all->flags + 2, 0, 1), memset(all->flagv, 1, 3);
    memset(all->flagp, 1, 1), memset(all->flagq, 0, ROOM), memset(all->flagq + 1, 1, 1);
}

static void free_all(struct all *all)
{
#define RELEASE(k) free(all->k##p), free(all->k##q);
    EACH_KIND(RELEASE)
    free(all->blobq);
}

static uint64_t add(uint64_t hash, const void *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++)
        hash = hash * 131 + ((const uint8_t *)bytes)[i] + 7;
    return hash;
}

/* Members and what the pointers lead to, as far as `number` goes; not the pointers. */
static uint64_t digest_all(const struct all *all)
{
    uint64_t hash = all->number;
    size_t n = all->number;

#define DIGEST(k)                                                                \
    hash = add(hash, &all->k, sizeof all->k), hash = add(hash, all->k##s, sizeof all->k##s), \
    hash = add(hash, all->k##v, n * sizeof all->k), hash = add(hash, all->k##p, sizeof all->k), \
    hash = add(hash, all->k##q, n * sizeof all->k);
    EACH_KIND(DIGEST)
    hash = add(hash, all->blob, sizeof all->blob), hash = add(hash, all->blobv, n);
    return add(hash, all->blobq, n);
}

static void answer_digest(struct machine *vm)
{
    printf("digest all=%" PRIx64 " a=%" PRIu32 " b=%" PRIu32 " option=%" PRIu32, digest_all(&vm->all), vm->grown.a,
           vm->grown.b, vm->grown.option);
    for (size_t i = 0; i < BULKS; i++)
        printf(" bulk%zu=%" PRIx64, i, hash_bytes(vm->bulk[i].state, (uint64_t)vm->bulk[i].chunks * CHUNK));
    putchar('\n');
}

static bool own_command(void *opaque, const char *verb, char *rest)
{
    struct machine *vm = opaque;

    if (strcmp(verb, "digest") == 0) {
        answer_digest(vm);
    } else if (strcmp(verb, "bulk") == 0) {
        printf("bulk %" PRIu32 " %" PRIu32 "\n", vm->bulk[0].bodies, vm->bulk[0].last_bytes);
    } else if (strcmp(verb, "option") == 0) {
        vm->grown.has_option = strcmp(rest, "on") == 0;
        printf("ok\n");
    } else if (strcmp(verb, "misread") == 0) {
        vm->misread = atoi(rest);
        printf("ok\n");
    } else {
        return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    static struct machine vm;
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    bool arrives = false, extra = false;

    for (int i = 1; i < argc; i++) {
        arrives |= strcmp(argv[i], "incoming") == 0;
        vm.old |= strcmp(argv[i], "old") == 0;
        extra |= strcmp(argv[i], "extra") == 0;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    vm.ram = map_ram(RAM_BYTES);
    make_all(&vm.all, !arrives);
    ops.stop = stop, ops.start = start;
    need(vmig_new(&ops, &vm, &vm.m), "vmig_new");
    register_all(&vm, extra);
    if (!arrives) {
        vm.ram[0] = 1;
        vm.grown = (struct grown){ .a = 11, .b = 22, .option = 33 };
        for (size_t i = 0; i < BULKS; i++)
            fill(vm.bulk[i].state, (size_t)vm.bulk[i].chunks * CHUNK, i);
        need(vmig_start(vm.m), "vmig_start");
    }
    if (pthread_create(&vm.busy, NULL, busy, &vm))
        return 1;
    printf("ready\n");
    serve(vm.m, own_command, &vm);
    __atomic_store_n(&vm.busy_quit, true, __ATOMIC_RELAXED);
    pthread_join(vm.busy, NULL);
    vmig_free(vm.m);
    free_all(&vm.all);
    return 0;
}
