/* Uses every macro for fields of a device table, and checks what each makes.
 *
 * Must compile without a warning as C99, C11, C17 and C++17 with -Wall -Wextra -Wpedantic -Werror, and run to status 0.
 * With -DWRONG=n, for n from 1 to WRONG_MAX, it must not compile: there a field is declared as what its member is not.
 * WRONG_MAX is printed by the program. */
#include <vmig.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define WRONG_MAX 33
#ifndef WRONG
#define WRONG 0
#endif

struct point {
    int32_t x, y;
};

struct all {
    uint8_t u8, u8s[3], *u8p;
    uint16_t u16, u16s[4], *u16p;
    uint32_t u32, u32s[5], *u32p;
    uint64_t u64, u64s[6], *u64p;
    int8_t i8, i8s[3], *i8p;
    int16_t i16, i16s[4], *i16p;
    int32_t i32, i32s[5], *i32p;
    int64_t i64, i64s[6], *i64p;
    bool flag, flags[7], *flagp;
    uint64_t timer, timers[2], *timerp;
    uint8_t blob[32], *blobp;
    struct point point, points[4], *pointp;
    uint32_t number;
    char text[8];
    float real;
    const uint32_t fixed;
};

static const vmig_field point_fields[] = {
    VMIG_I32(struct point, x),
    VMIG_I32(struct point, y),
    VMIG_END,
};
extern const vmig_device point_table;
const vmig_device point_table = {
    sizeof(vmig_device), "point", 1, 1, point_fields, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0,
};

#define KIND(K, one, many, pointer)                      \
    VMIG_##K(struct all, one),                           \
    VMIG_##K##_ARRAY(struct all, many),                  \
    VMIG_##K##_VARRAY(struct all, many, number),         \
    VMIG_PTR_##K(struct all, pointer),                   \
    VMIG_PTR_##K##_VARRAY(struct all, pointer, number, 9)

static const vmig_field all_fields[] = {
    VMIG_U32(struct all, number),
    KIND(U8, u8, u8s, u8p),
    KIND(U16, u16, u16s, u16p),
    KIND(U32, u32, u32s, u32p),
    KIND(U64, u64, u64s, u64p),
    KIND(I8, i8, i8s, i8p),
    KIND(I16, i16, i16s, i16p),
    KIND(I32, i32, i32s, i32p),
    KIND(I64, i64, i64s, i64p),
    KIND(BOOL, flag, flags, flagp),
    KIND(TIMER, timer, timers, timerp),
    VMIG_SINCE(2),
    VMIG_BYTES(struct all, blob),
    VMIG_BYTES_VARRAY(struct all, blob, number),
    VMIG_PTR_BYTES(struct all, blobp, number, 4096),
    VMIG_STRUCT(struct all, point, struct point, &point_table),
    VMIG_STRUCT_ARRAY(struct all, points, struct point, &point_table),
    VMIG_STRUCT_VARRAY(struct all, points, struct point, &point_table, number),
    VMIG_PTR_STRUCT(struct all, pointp, struct point, &point_table),
    VMIG_PTR_STRUCT_VARRAY(struct all, pointp, struct point, &point_table, number, 4),
    VMIG_UNUSED(12),
#if WRONG == 1
    VMIG_U8(struct all, u16),
#elif WRONG == 2
    VMIG_U16(struct all, i16), /* other sign */
#elif WRONG == 3
    VMIG_U32(struct all, u32s), /* array */
#elif WRONG == 4
    VMIG_U64(struct all, u64p), /* pointer */
#elif WRONG == 5
    VMIG_I8(struct all, u8),
#elif WRONG == 6
    VMIG_I16(struct all, i32),
#elif WRONG == 7
    VMIG_I32(struct all, real),
#elif WRONG == 8
    VMIG_I64(struct all, u64),
#elif WRONG == 9
    VMIG_BOOL(struct all, u8),
#elif WRONG == 10
    VMIG_TIMER(struct all, i64),
#elif WRONG == 11
    VMIG_U8_ARRAY(struct all, u16s),
#elif WRONG == 12
    VMIG_U8_ARRAY(struct all, u8p), /* a pointer is no array */
#elif WRONG == 13
    VMIG_U8_ARRAY(struct all, u8), /* one is no array */
#elif WRONG == 14
    VMIG_BOOL_ARRAY(struct all, u8s),
#elif WRONG == 15
    VMIG_U16_VARRAY(struct all, u16s, real), /* no integer */
#elif WRONG == 16
    VMIG_U16_VARRAY(struct all, u16s, nosuch),
#elif WRONG == 17
    VMIG_U16_VARRAY(struct all, u32s, number),
#elif WRONG == 18
    VMIG_PTR_U32(struct all, u32),
#elif WRONG == 19
    VMIG_PTR_U32(struct all, u32s),
#elif WRONG == 20
    VMIG_PTR_U32(struct all, i32p),
#elif WRONG == 21
    VMIG_PTR_I64_VARRAY(struct all, u64p, number, 9),
#elif WRONG == 22
    VMIG_PTR_I64_VARRAY(struct all, i64p, u8p, 9), /* no integer */
#elif WRONG == 23
    VMIG_BYTES(struct all, text), /* char is not uint8_t */
#elif WRONG == 24
    VMIG_BYTES(struct all, blobp),
#elif WRONG == 25
    VMIG_BYTES_VARRAY(struct all, u32s, number),
#elif WRONG == 26
    VMIG_PTR_BYTES(struct all, blob, number, 32),
#elif WRONG == 27
    VMIG_STRUCT(struct all, points, struct point, &point_table),
#elif WRONG == 28
    VMIG_STRUCT(struct all, point, struct all, &point_table),
#elif WRONG == 29
    VMIG_STRUCT_ARRAY(struct all, point, struct point, &point_table),
#elif WRONG == 30
    VMIG_STRUCT_VARRAY(struct all, pointp, struct point, &point_table, number),
#elif WRONG == 31
    VMIG_PTR_STRUCT(struct all, point, struct point, &point_table),
#elif WRONG == 32
    VMIG_PTR_STRUCT_VARRAY(struct all, u8p, struct point, &point_table, number, 4),
#elif WRONG == 33
    VMIG_U32(struct all, fixed), /* could not be loaded */
#endif
    VMIG_END,
};

static const vmig_field *row(const char *name, size_t nth)
{
    const vmig_field *f;

    for (f = all_fields; f->kind != VMIG_KIND_END; f++)
        if (f->name && !strcmp(f->name, name) && nth-- == 0)
            return f;
    return NULL;
}

static int failures;

static void expect(int line, const vmig_field *f, uint32_t kind, size_t offset, size_t width, size_t count,
                   const char *count_field, uint32_t flags)
{
    int same_count;

    if (!f) {
        printf("line %d: no such row\n", line);
        failures++;
        return;
    }
    same_count = count_field ? f->count_field && !strcmp(f->count_field, count_field) : !f->count_field;
    if (f->kind == kind && f->offset == offset && f->width == width && f->count == count && same_count &&
        f->flags == flags && f->since == 0 && f->reserved32 == 0 && f->reserved[0] == 0 && f->reserved[1] == 0)
        return;
    printf("line %d: row '%s' has kind %u offset %zu width %zu count %zu\n", line, f->name, (unsigned)f->kind, f->offset,
           f->width, f->count);
    failures++;
}

#define EXPECT(K, one, many, pointer, bytes, elements)                                                        \
    do {                                                                                                      \
        size_t at = offsetof(struct all, one), ats = offsetof(struct all, many);                              \
        size_t atp = offsetof(struct all, pointer);                                                           \
        expect(__LINE__, row(#one, 0), VMIG_KIND_##K, at, bytes, 1, NULL, 0);                                 \
        expect(__LINE__, row(#many, 0), VMIG_KIND_##K, ats, bytes, elements, NULL, 0);                        \
        expect(__LINE__, row(#many, 1), VMIG_KIND_##K, ats, bytes, elements, "number", 0);                    \
        expect(__LINE__, row(#pointer, 0), VMIG_KIND_##K, atp, bytes, 1, NULL, VMIG_FIELD_POINTER);           \
    } while (0)
#define EXPECT_PTR(K, pointer, nth, bytes, room)                                                              \
    expect(__LINE__, row(#pointer, nth), VMIG_KIND_##K, offsetof(struct all, pointer), bytes, room, "number", \
           VMIG_FIELD_POINTER)

int main(void)
{
    static vmig_device device = VMIG_SIZED(vmig_device);
    const vmig_field *last = &all_fields[sizeof(all_fields) / sizeof(all_fields[0]) - 1];

    EXPECT(U8, u8, u8s, u8p, 1, 3);
    EXPECT(U16, u16, u16s, u16p, 2, 4);
    EXPECT(U32, u32, u32s, u32p, 4, 5);
    EXPECT(U64, u64, u64s, u64p, 8, 6);
    EXPECT(I8, i8, i8s, i8p, 1, 3);
    EXPECT(I16, i16, i16s, i16p, 2, 4);
    EXPECT(I32, i32, i32s, i32p, 4, 5);
    EXPECT(I64, i64, i64s, i64p, 8, 6);
    EXPECT(BOOL, flag, flags, flagp, 1, 7);
    EXPECT(TIMER, timer, timers, timerp, 8, 2);
    EXPECT(STRUCT, point, points, pointp, sizeof(struct point), 4);
    EXPECT_PTR(U8, u8p, 1, 1, 9);
    EXPECT_PTR(U16, u16p, 1, 2, 9);
    EXPECT_PTR(U32, u32p, 1, 4, 9);
    EXPECT_PTR(U64, u64p, 1, 8, 9);
    EXPECT_PTR(I8, i8p, 1, 1, 9);
    EXPECT_PTR(I16, i16p, 1, 2, 9);
    EXPECT_PTR(I32, i32p, 1, 4, 9);
    EXPECT_PTR(I64, i64p, 1, 8, 9);
    EXPECT_PTR(BOOL, flagp, 1, 1, 9);
    EXPECT_PTR(TIMER, timerp, 1, 8, 9);
    EXPECT_PTR(STRUCT, pointp, 1, sizeof(struct point), 4);
    EXPECT_PTR(BYTES, blobp, 0, 1, 4096);
    expect(__LINE__, row("blob", 0), VMIG_KIND_BYTES, offsetof(struct all, blob), 32, 1, NULL, 0);
    expect(__LINE__, row("blob", 1), VMIG_KIND_BYTES, offsetof(struct all, blob), 1, 32, "number", 0);
    expect(__LINE__, row("number", 0), VMIG_KIND_U32, offsetof(struct all, number), 4, 1, NULL, 0);
    if (row("point", 0)->nested != &point_table || row("pointp", 1)->nested != &point_table || row("u8", 0)->nested)
        printf("nested tables are wrong\n"), failures++;
    if (last->kind != VMIG_KIND_END || last[-1].kind != VMIG_KIND_UNUSED || last[-1].width != 12 || last[-1].name)
        printf("the last rows are wrong\n"), failures++;
    if (all_fields[51].kind != VMIG_KIND_SINCE || all_fields[51].since != 2)
        printf("VMIG_SINCE is wrong\n"), failures++;
    if (device.size != sizeof(device) || device.name)
        printf("VMIG_SIZED is wrong\n"), failures++;
    printf("WRONG_MAX %d\n", WRONG_MAX);
    return failures != 0;
}
