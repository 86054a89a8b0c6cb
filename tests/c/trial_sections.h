/* Devices with a format of their own for trial.c: correct ones, and each with one mistake. SPDX: MIT OR Apache-2.0 */
#ifndef TESTS_TRIAL_SECTIONS_H
#define TESTS_TRIAL_SECTIONS_H

#include "trial_tables.h"

/* ---- one body: be32 length, bytes, index --------------------------------------------------------------------- */

enum { BLOB = 64, CHUNK = 1000, CHUNKS = 8, BIG = 2 << 20 };

struct blob {
    uint32_t len;
    uint8_t bytes[BLOB];
    uint8_t at, mode;
    uint16_t busy;
};

static int blob_reset(void *opaque)
{
    memset(opaque, 0, sizeof(struct blob));
    return 0;
}

static void blob_fill(void *opaque)
{
    struct blob *b = opaque;

    b->len = 40, b->at = 39, b->mode = 2;
    for (unsigned i = 0; i < b->len; i++)
        b->bytes[i] = (uint8_t)(i * 7 + 1);
}

static int blob_save(void *opaque, vmig_writer *out)
{
    struct blob *b = opaque;

    vmig_put_u32(out, b->len);
    vmig_put(out, b->bytes, b->len);
    vmig_put_u8(out, b->at);
    return vmig_put_u8(out, b->mode);
}

static int blob_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct blob *b = opaque, got = { .len = vmig_get_u32(in) };

    (void)part, (void)version;
    if (got.len > BLOB || vmig_get_bytes(in, got.bytes, got.len) < 0)
        return -EINVAL;
    got.at = vmig_get_u8(in), got.mode = vmig_get_u8(in);
    if (got.at >= BLOB || got.mode > 3)
        return -EINVAL;
    *b = got;
    return 0;
}

static int loads_no_mode(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct blob *b = opaque;
    uint8_t was = b->mode;
    int err = blob_load(opaque, part, version, in);

    b->mode = was;                      /* read, checked, and forgotten */
    return err;
}

static int trusts_length(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct blob *b = opaque;

    (void)part, (void)version;
    b->len = vmig_get_u32(in);
    vmig_get_bytes(in, b->bytes, b->len);
    b->at = vmig_get_u8(in) % BLOB, b->mode = vmig_get_u8(in) & 3;
    return 0;
}

static int trusts_at(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct blob *b = opaque;
    uint32_t len = vmig_get_u32(in);

    (void)part, (void)version;
    if (len > BLOB || vmig_get_bytes(in, b->bytes, len) < 0)
        return -EINVAL;
    b->len = len, b->at = vmig_get_u8(in), b->mode = vmig_get_u8(in) & 3;
    return 0;
}

static int saves_what_at_says(void *opaque, vmig_writer *out)
{
    struct blob *b = opaque;

    blob_save(opaque, out);
    return vmig_put_u8(out, b->bytes[b->at]);
}

static int and_one_more(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    int err = trusts_at(opaque, part, version, in);

    vmig_get_u8(in);
    return err;
}

static int saves_an_address(void *opaque, vmig_writer *out)
{
    static uint64_t number;

    blob_save(opaque, out);
    return vmig_put_u64(out, ++number);
}

static int loads_an_address(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    int err = blob_load(opaque, part, version, in);

    vmig_get_u64(in);
    return err;
}

static int half_loads(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct blob *b = opaque;

    (void)part, (void)version;
    b->len = vmig_get_u32(in);          /* stays when the rest is refused */
    if (b->len > BLOB)
        return -EINVAL;
    vmig_get_bytes(in, b->bytes, b->len);
    b->at |= vmig_get_u8(in);           /* and this is never cleared */
    b->mode = vmig_get_u8(in) & 3;
    return b->at < BLOB ? 0 : -EINVAL;
}

static int stays_busy(void *opaque, vmig_writer *out)
{
    struct blob *b = opaque;

    if (b->busy)
        return -EBUSY;
    b->busy = 1;
    if (blob_save(opaque, out) < 0)
        return -EIO;                    /* and busy for ever */
    b->busy = 0;
    return 0;
}

static int saves_little(void *opaque, vmig_writer *out) { return vmig_put_u8(out, ((struct blob *)opaque)->at); }
static int refuses_two(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct blob *b = opaque;

    (void)part;
    b->at = vmig_get_u8(in);
    return version == 2 ? 0 : -EINVAL;
}

static int never(void *opaque) { (void)opaque; return 0; }

#define OPS(save, ...) &(const vmig_section_ops){ .size = sizeof(vmig_section_ops), .complete = save, .load = __VA_ARGS__ }
#define SECTION .version = 1, .size = sizeof(struct blob), .fill = blob_fill, .reset = blob_reset

/* ---- many bodies while the guest runs ------------------------------------------------------------------------ */

struct lots {
    uint8_t chunk[CHUNKS][CHUNK];
    unsigned left, got;                 /* of this migration */
    unsigned open, balance;             /* setups without a cleanup, of both kinds */
};

static int lots_reset(void *opaque)
{
    memset(((struct lots *)opaque)->chunk, 0, CHUNKS * CHUNK);
    return 0;
}

static void lots_fill(void *opaque)
{
    struct lots *l = opaque;

    for (unsigned i = 0; i < CHUNKS * CHUNK; i++)
        l->chunk[i / CHUNK][i % CHUNK] = (uint8_t)(i * 13 >> 3);
}

static void lots_gone(void *opaque)
{
    struct lots *l = opaque;

    CHECK(l->open == 0 && l->balance == 0, "%u setups and %u load_setups without their cleanup", l->open, l->balance);
}

static int lots_setup(void *opaque, vmig_writer *out)
{
    struct lots *l = opaque;

    l->left = CHUNKS, l->open = 1;
    return vmig_put_u32(out, CHUNKS);
}

static void lots_cleanup(void *opaque) { ((struct lots *)opaque)->open = 0; }

static int lots_pending(void *opaque, uint64_t *must, uint64_t *can)
{
    (void)can;
    *must = (uint64_t)((struct lots *)opaque)->left * CHUNK;
    return 0;
}

static int put_chunk(struct lots *l, vmig_writer *out)
{
    l->left--;
    vmig_put_u32(out, l->left);
    return vmig_put(out, l->chunk[l->left], CHUNK);
}

static int lots_iterate(void *opaque, vmig_writer *out, uint64_t budget)
{
    struct lots *l = opaque;

    (void)budget;
    return l->left > 1 ? put_chunk(l, out) : 1;
}

static int lots_complete(void *opaque, vmig_writer *out)
{
    struct lots *l = opaque;
    int err = 0;

    while (l->left > 0 && err >= 0)
        err = put_chunk(l, out);
    return err;
}

static int lots_load_setup(void *opaque)
{
    struct lots *l = opaque;

    CHECK(l->balance == 0, "load_setup twice");
    l->balance = 1, l->got = 0;
    return 0;
}

static void lots_load_cleanup(void *opaque, int ok)
{
    (void)ok;
    ((struct lots *)opaque)->balance = 0;
}

static int lots_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct lots *l = opaque;

    (void)version;
    if (part == VMIG_PART_START)
        return vmig_get_u32(in) == CHUNKS ? 0 : -EINVAL;
    while (vmig_reader_left(in) > 0) {
        uint32_t index = vmig_get_u32(in);

        if (index >= CHUNKS || index != CHUNKS - 1 - l->got)
            return -EINVAL;
        if (vmig_get_bytes(in, l->chunk[index], CHUNK) < 0)
            return -EIO;
        l->got++;
    }
    return part == VMIG_PART_END && l->got < CHUNKS ? -EINVAL : 0;
}

static int trusts_chunk(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    struct lots *l = opaque;

    (void)version;
    if (part == VMIG_PART_START)
        return vmig_get_u32(in) == CHUNKS ? 0 : -EINVAL;
    while (vmig_reader_left(in) > 0) {
        uint32_t index = vmig_get_u32(in);

        vmig_get_bytes(in, l->chunk[index], CHUNK);
    }
    return 0;
}

#define LOTS(l) OPS(lots_complete, l, .setup = lots_setup, .pending_estimate = lots_pending, .iterate = lots_iterate, \
    .cleanup = lots_cleanup, .load_setup = lots_load_setup, .load_cleanup = lots_load_cleanup)
static const vmig_member lots_transient[] = {
    VMIG_MEMBER(struct lots, left), VMIG_MEMBER(struct lots, got), VMIG_MEMBER(struct lots, open),
    VMIG_MEMBER(struct lots, balance), VMIG_MEMBER_END,
};
#define MANY .version = 1, .size = sizeof(struct lots), .fill = lots_fill, .reset = lots_reset, .gone = lots_gone, \
    .transient = lots_transient

/* ---- some MiB ------------------------------------------------------------------------------------------------ */

struct big { uint8_t bytes[BIG]; };

static int big_reset(void *opaque)
{
    memset(opaque, 0, BIG);
    return 0;
}
static void big_fill(void *opaque) { memset(opaque, 0x5a, BIG); }
static int big_save(void *opaque, vmig_writer *out) { return vmig_put(out, opaque, BIG); }
static int big_load(void *opaque, uint32_t part, uint32_t version, vmig_reader *in)
{
    (void)part, (void)version;
    return vmig_reader_left(in) == BIG ? vmig_get_bytes(in, opaque, BIG) : -EINVAL;
}

static const struct subject sections[] = {
    { "blob", .ops = OPS(blob_save, blob_load), SECTION },
    { "lots", .ops = LOTS(lots_load), MANY },
    { "big", .ops = OPS(big_save, big_load), .version = 1, .size = BIG, .fill = big_fill, .reset = big_reset },
    { "declared-varying", .ops = OPS(saves_an_address, loads_an_address), SECTION, .flags = VMIG_TEST_VARIES },

    { "loads-no-mode", .ops = OPS(blob_save, loads_no_mode), SECTION },
    { "trusts-a-length", .ops = OPS(blob_save, trusts_length), SECTION },
    { "unchecked-index", .ops = OPS(saves_what_at_says, and_one_more), SECTION },
    { "saves-at-random", .ops = OPS(saves_an_address, loads_an_address), SECTION },
    { "half-loads", .ops = OPS(blob_save, half_loads), SECTION },
    { "busy-for-ever", .ops = OPS(stays_busy, blob_load), SECTION },
    { "new-format", .ops = OPS(blob_save, blob_load), SECTION, .earlier_ops = OPS(saves_little, blob_load) },
    { "refuses-old", .ops = OPS(saves_little, refuses_two, .oldest = 1), .version = 2, .size = sizeof(struct blob),
      .no_memory = true, .earlier_ops = OPS(saves_little, blob_load) },
    { "trusts-a-chunk", .ops = LOTS(trusts_chunk), MANY },
    { "never-active", .ops = OPS(blob_save, blob_load, .is_active = never), SECTION },
};
#endif
