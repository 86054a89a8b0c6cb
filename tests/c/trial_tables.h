/* Devices with tables for trial.c: correct ones, and each with one mistake.             SPDX: MIT OR Apache-2.0 */
#ifndef TESTS_TRIAL_TABLES_H
#define TESTS_TRIAL_TABLES_H

#include <vmig.h>

/* One device to try. */
struct subject {
    const char *name;
    const vmig_device *kind;            /* a table, or */
    const vmig_section_ops *ops;        /* a section, of version */
    uint32_t version;
    size_t size;
    void (*fill)(void *dev);            /* a state other than that after a reset */
    int (*reset)(void *dev);
    void (*gone)(void *dev);            /* what must be freed */
    const vmig_member *transient;
    const vmig_device *earlier;         /* what a release before had: its state is a sample */
    const vmig_section_ops *earlier_ops;
    uint32_t flags;
    bool no_memory;                     /* its bytes are not compared */
};

/* ---- a correct device with all there is ---------------------------------------------------------------------- */

enum { LANES = 3, RING = 16, TABLE = 8 };

struct lane {
    uint16_t credit;
    uint8_t id;                         /* fixed by the hardware: no state, and no field */
    bool open;
};

struct full {
    uint32_t control, used;
    uint8_t ring[RING];
    uint8_t head;
    bool level;                         /* follows from the rest */
    uint64_t due;
    struct lane lane[LANES];
    uint16_t words;
    uint32_t *word;                     /* made by pre_load, as many as `words` */
    uint32_t extra, speed;              /* parts */
    uint16_t young;                     /* since version 2 */
    int16_t younger;                    /* since version 3 */
    uint64_t saves;                     /* how often it was saved: for the author, not for the guest */
};

static int full_reset(void *opaque)
{
    struct full *f = opaque;

    free(f->word);
    memset(f, 0, offsetof(struct full, saves));
    f->due = UINT64_MAX, f->speed = 100;
    for (unsigned i = 0; i < LANES; i++)
        f->lane[i].id = (uint8_t)i;
    return 0;
}

static void full_fill(void *opaque)
{
    struct full *f = opaque;

    full_reset(f);
    f->control = 0xabcd, f->used = 5, f->head = 14, f->due = 99, f->words = 2, f->extra = 7, f->young = 3, f->younger = -3;
    memcpy(f->ring, "0123456789abcdef", RING);
    f->lane[1].credit = 77, f->lane[2].open = true;
    if (!(f->word = calloc(TABLE, sizeof *f->word)))
        abort();
    f->word[0] = 1, f->word[1] = 2;
    f->level = true;
}

static void full_gone(void *opaque) { free(((struct full *)opaque)->word); }

static int full_pre_save(void *opaque)
{
    ((struct full *)opaque)->saves++;
    return 0;
}

static int full_pre_load(void *opaque)
{
    struct full *f = opaque;

    f->extra = 0, f->speed = 100, f->young = 0, f->younger = 0;
    if (!f->word && !(f->word = calloc(TABLE, sizeof *f->word)))
        return -ENOMEM;
    return 0;
}

static int full_post_load(void *opaque, uint32_t version)
{
    struct full *f = opaque;

    (void)version;
    if (f->head >= RING)
        return -EINVAL;
    f->level = f->used > 0;
    return 0;
}

static int extra_needed(void *opaque) { return ((struct full *)opaque)->extra != 0; }
static int speed_needed(void *opaque) { return ((struct full *)opaque)->speed != 100; }
static int speed_check(void *opaque, uint32_t version)
{
    (void)version;
    return ((struct full *)opaque)->speed > 10000 ? -ERANGE : 0;
}

static const vmig_field lane_fields[] = { VMIG_U16(struct lane, credit), VMIG_BOOL(struct lane, open), VMIG_END };
static const vmig_device lane_kind = { .size = sizeof(vmig_device), .name = "lane", .version = 1, .fields = lane_fields };
static const vmig_field extra_fields[] = { VMIG_U32(struct full, extra), VMIG_END };
static const vmig_device extra_part = {
    .size = sizeof(vmig_device), .name = "full/extra", .version = 3, .oldest = 2, .fields = extra_fields,
    .needed = extra_needed,
};
static const vmig_field speed_fields[] = { VMIG_U32(struct full, speed), VMIG_END };
static const vmig_device speed_part = {
    .size = sizeof(vmig_device), .name = "full/speed", .version = 1, .fields = speed_fields, .needed = speed_needed,
    .post_load = speed_check,
};
static const vmig_device *const full_parts[] = { &extra_part, &speed_part, NULL };
static const vmig_field full_fields[] = {
    VMIG_U32(struct full, control), VMIG_U32(struct full, used), VMIG_U8_VARRAY(struct full, ring, used),
    VMIG_UNUSED(3), VMIG_U8(struct full, head), VMIG_TIMER(struct full, due),
    VMIG_STRUCT_ARRAY(struct full, lane, struct lane, &lane_kind), VMIG_U16(struct full, words),
    VMIG_PTR_U32_VARRAY(struct full, word, words, TABLE),
    VMIG_SINCE(2), VMIG_U16(struct full, young), VMIG_SINCE(3), VMIG_I16(struct full, younger), VMIG_END,
};
static const vmig_device full_kind = {
    .size = sizeof(vmig_device), .name = "full", .version = 3, .oldest = 1, .fields = full_fields, .parts = full_parts,
    .pre_save = full_pre_save, .pre_load = full_pre_load, .post_load = full_post_load,
};
static const vmig_member full_transient[] = { VMIG_MEMBER(struct full, saves), VMIG_MEMBER_END };
#define FULL .size = sizeof(struct full), .fill = full_fill, .reset = full_reset, .gone = full_gone, \
    .transient = full_transient
/* The first release had only what version 1 has. */
static const vmig_device full_earlier = {
    .size = sizeof(vmig_device), .name = "full", .version = 1, .fields = (const vmig_field[]){
        VMIG_U32(struct full, control), VMIG_U32(struct full, used), VMIG_U8_VARRAY(struct full, ring, used),
        VMIG_UNUSED(3), VMIG_U8(struct full, head), VMIG_TIMER(struct full, due),
        VMIG_STRUCT_ARRAY(struct full, lane, struct lane, &lane_kind), VMIG_U16(struct full, words),
        VMIG_PTR_U32_VARRAY(struct full, word, words, TABLE), VMIG_END },
};

/* ---- a small device, and what can be wrong with it ----------------------------------------------------------- */

struct plain {
    uint32_t a, b;
    uint8_t buf[16];
    uint8_t at, sum;                    /* `sum` is of `buf` and follows from it */
    uint16_t busy;
    uint64_t clock;
};

static int plain_reset(void *opaque)
{
    memset(opaque, 0, sizeof(struct plain));
    return 0;
}

static uint8_t sum_of(const struct plain *p)
{
    uint8_t sum = 0;

    for (unsigned i = 0; i < sizeof p->buf; i++)
        sum = (uint8_t)(sum + p->buf[i]);
    return sum;
}

static void plain_fill(void *opaque)
{
    struct plain *p = opaque;

    p->a = 0x11223344, p->b = 0x55667788, p->at = 15, p->clock = 1;
    memcpy(p->buf, "a state of bytes", sizeof p->buf);
    p->sum = sum_of(p);
}

static int plain_post_load(void *opaque, uint32_t version)
{
    struct plain *p = opaque;

    (void)version;
    if (p->at >= sizeof p->buf)
        return -EINVAL;
    p->sum = sum_of(p);
    return 0;
}

static int trusting_post_load(void *opaque, uint32_t version)
{
    struct plain *p = opaque;

    (void)version;
    p->buf[p->at] |= 1;                 /* beyond the struct for an `at` nobody looked at */
    p->sum = sum_of(p);
    return 0;
}

static int strict_post_load(void *opaque, uint32_t version)
{
    (void)version;
    return ((struct plain *)opaque)->at < 15 ? 0 : -EINVAL;     /* 15 is a place, too */
}

static int new_only_post_load(void *opaque, uint32_t version)
{
    return version < 2 ? -EINVAL : plain_post_load(opaque, version);
}

static int stale_post_load(void *opaque, uint32_t version)
{
    (void)version;
    return ((struct plain *)opaque)->at < 16 ? 0 : -EINVAL;     /* and `sum` is that of what was there before */
}

static int draining_post_save(void *opaque)
{
    memset(((struct plain *)opaque)->buf, 0, 4);
    return 0;
}

static int counting_pre_save(void *opaque)
{
    ((struct plain *)opaque)->busy++;
    return 0;
}

static int locking_pre_save(void *opaque)
{
    struct plain *p = opaque;

    if (p->busy)
        return -EBUSY;
    p->busy = 1;
    return 0;
}

static int ticking_pre_save(void *opaque)
{
    ((struct plain *)opaque)->clock++;
    return 0;
}

static int latching_post_load(void *opaque, uint32_t version)
{
    static uint32_t seen;
    struct plain *p = opaque;

    seen |= p->b;
    p->b = seen;                        /* what was there once never goes */
    return plain_post_load(opaque, version);
}

static int leaking_pre_load(void *opaque)
{
    /* Written through, or the compiler sees that nobody needs it. */
    volatile uint8_t *lost = malloc(32);

    if (lost)
        *lost = ((struct plain *)opaque)->at;
    return 0;
}

#define PLAIN_ROWS VMIG_U32(struct plain, a), VMIG_U32(struct plain, b), VMIG_BYTES(struct plain, buf), \
    VMIG_U8(struct plain, at)
static const vmig_field plain_fields[] = { PLAIN_ROWS, VMIG_END };
static const vmig_field busy_fields[] = { PLAIN_ROWS, VMIG_U16(struct plain, busy), VMIG_END };
static const vmig_field clock_fields[] = { PLAIN_ROWS, VMIG_U64(struct plain, clock), VMIG_END };
static const vmig_field second_fields[] = { PLAIN_ROWS, VMIG_SINCE(2), VMIG_U64(struct plain, clock), VMIG_END };
static const vmig_field without_a[] = {
    VMIG_U32(struct plain, b), VMIG_BYTES(struct plain, buf), VMIG_U8(struct plain, at), VMIG_END,
};
static const vmig_member clock_member[] = { VMIG_MEMBER(struct plain, clock), VMIG_MEMBER_END };
static const vmig_member busy_member[] = { VMIG_MEMBER(struct plain, busy), VMIG_MEMBER(struct plain, clock), VMIG_MEMBER_END };

#define KIND(...) &(const vmig_device){ .size = sizeof(vmig_device), .name = "plain", .version = 1, \
    .post_load = plain_post_load, .fields = __VA_ARGS__ }
/* The clock travels only in the tables that have it. */
#define PLAIN .size = sizeof(struct plain), .fill = plain_fill, .reset = plain_reset, .transient = clock_member

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"    /* KIND has a post_load unless another is given */
static const struct subject tables[] = {
    { "full", &full_kind, FULL, .earlier = &full_earlier },
    { "plain", KIND(plain_fields), PLAIN },
    { "no-state", KIND(NULL, .post_load = NULL), PLAIN },
    { "varies", KIND(clock_fields, .pre_save = ticking_pre_save, .flags = VMIG_DEVICE_VARIES), PLAIN },
    { "early", KIND(plain_fields, .flags = VMIG_DEVICE_EARLY), PLAIN },
    { "grown", KIND(second_fields, .version = 2, .oldest = 1), PLAIN, .earlier = KIND(plain_fields) },

    { "forgets-a-field", KIND(without_a), PLAIN },
    { "trusts-an-index", KIND(plain_fields, .post_load = trusting_post_load), PLAIN },
    { "refuses-itself", KIND(plain_fields, .post_load = strict_post_load), PLAIN },
    { "same-version", KIND(clock_fields), PLAIN, .earlier = KIND(plain_fields) },
    { "no-old-version", KIND(second_fields, .version = 2, .oldest = 1, .post_load = new_only_post_load), PLAIN },
    { "stale", KIND(plain_fields, .post_load = stale_post_load), PLAIN },
    { "drains", KIND(plain_fields, .post_save = draining_post_save), PLAIN },
    { "counts", KIND(plain_fields, .pre_save = counting_pre_save), PLAIN },
    { "stays-busy", KIND(plain_fields, .pre_save = locking_pre_save), PLAIN, .transient = busy_member },
    { "ticks", KIND(clock_fields, .pre_save = ticking_pre_save), PLAIN },
    { "latches", KIND(plain_fields, .post_load = latching_post_load), PLAIN },
    { "leaks", KIND(plain_fields, .pre_load = leaking_pre_load), PLAIN },
};
#pragma GCC diagnostic pop
#endif
