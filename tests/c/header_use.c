/* Uses every macro of vmig.h, in C and in C++. Compiled by tests/header.rs, twice into one program with different UNIT,
 * so that the header is also seen to define nothing. Each unit returns the line of the first thing that is wrong. */
#include <vmig.h>
#include <vmig.h>
#include <string.h>

struct point {
    uint32_t x, y;
};

struct dev {
    uint32_t number;
    uint8_t u8, u8_array[3], u8_varray[4], *u8_ptr, *u8_ptr_varray;
    uint16_t u16, u16_array[3], u16_varray[4], *u16_ptr, *u16_ptr_varray;
    uint32_t u32, u32_array[3], u32_varray[4], *u32_ptr, *u32_ptr_varray;
    uint64_t u64, u64_array[3], u64_varray[4], *u64_ptr, *u64_ptr_varray;
    int8_t i8, i8_array[3], i8_varray[4], *i8_ptr, *i8_ptr_varray;
    int16_t i16, i16_array[3], i16_varray[4], *i16_ptr, *i16_ptr_varray;
    int32_t i32, i32_array[3], i32_varray[4], *i32_ptr, *i32_ptr_varray;
    int64_t i64, i64_array[3], i64_varray[4], *i64_ptr, *i64_ptr_varray;
    bool flag, flag_array[3], flag_varray[4], *flag_ptr, *flag_ptr_varray;
    uint64_t timer, timer_array[3], timer_varray[4], *timer_ptr, *timer_ptr_varray;
    struct point point, point_array[3], point_varray[4], *point_ptr, *point_ptr_varray;
    uint8_t bytes[6], bytes_varray[7], *bytes_ptr;
    int fd, fd_array[3], fd_varray[4];
};

static const vmig_field point_fields[] = {
    VMIG_U32(struct point, x),
    VMIG_SINCE(2),
    VMIG_U32(struct point, y),
    VMIG_END,
};

static const vmig_field fields[] = {
    VMIG_U32(struct dev, number),
    VMIG_U8(struct dev, u8),
    VMIG_U8_ARRAY(struct dev, u8_array),
    VMIG_U8_VARRAY(struct dev, u8_varray, number),
    VMIG_PTR_U8(struct dev, u8_ptr),
    VMIG_PTR_U8_VARRAY(struct dev, u8_ptr_varray, number, 5),
    VMIG_U16(struct dev, u16),
    VMIG_U16_ARRAY(struct dev, u16_array),
    VMIG_U16_VARRAY(struct dev, u16_varray, number),
    VMIG_PTR_U16(struct dev, u16_ptr),
    VMIG_PTR_U16_VARRAY(struct dev, u16_ptr_varray, number, 5),
    VMIG_U32(struct dev, u32),
    VMIG_U32_ARRAY(struct dev, u32_array),
    VMIG_U32_VARRAY(struct dev, u32_varray, number),
    VMIG_PTR_U32(struct dev, u32_ptr),
    VMIG_PTR_U32_VARRAY(struct dev, u32_ptr_varray, number, 5),
    VMIG_U64(struct dev, u64),
    VMIG_U64_ARRAY(struct dev, u64_array),
    VMIG_U64_VARRAY(struct dev, u64_varray, number),
    VMIG_PTR_U64(struct dev, u64_ptr),
    VMIG_PTR_U64_VARRAY(struct dev, u64_ptr_varray, number, 5),
    VMIG_I8(struct dev, i8),
    VMIG_I8_ARRAY(struct dev, i8_array),
    VMIG_I8_VARRAY(struct dev, i8_varray, number),
    VMIG_PTR_I8(struct dev, i8_ptr),
    VMIG_PTR_I8_VARRAY(struct dev, i8_ptr_varray, number, 5),
    VMIG_I16(struct dev, i16),
    VMIG_I16_ARRAY(struct dev, i16_array),
    VMIG_I16_VARRAY(struct dev, i16_varray, number),
    VMIG_PTR_I16(struct dev, i16_ptr),
    VMIG_PTR_I16_VARRAY(struct dev, i16_ptr_varray, number, 5),
    VMIG_I32(struct dev, i32),
    VMIG_I32_ARRAY(struct dev, i32_array),
    VMIG_I32_VARRAY(struct dev, i32_varray, number),
    VMIG_PTR_I32(struct dev, i32_ptr),
    VMIG_PTR_I32_VARRAY(struct dev, i32_ptr_varray, number, 5),
    VMIG_I64(struct dev, i64),
    VMIG_I64_ARRAY(struct dev, i64_array),
    VMIG_I64_VARRAY(struct dev, i64_varray, number),
    VMIG_PTR_I64(struct dev, i64_ptr),
    VMIG_PTR_I64_VARRAY(struct dev, i64_ptr_varray, number, 5),
    VMIG_BOOL(struct dev, flag),
    VMIG_BOOL_ARRAY(struct dev, flag_array),
    VMIG_BOOL_VARRAY(struct dev, flag_varray, number),
    VMIG_PTR_BOOL(struct dev, flag_ptr),
    VMIG_PTR_BOOL_VARRAY(struct dev, flag_ptr_varray, number, 5),
    VMIG_TIMER(struct dev, timer),
    VMIG_TIMER_ARRAY(struct dev, timer_array),
    VMIG_TIMER_VARRAY(struct dev, timer_varray, number),
    VMIG_PTR_TIMER(struct dev, timer_ptr),
    VMIG_PTR_TIMER_VARRAY(struct dev, timer_ptr_varray, number, 5),
    VMIG_FD(struct dev, fd),
    VMIG_FD_ARRAY(struct dev, fd_array),
    VMIG_FD_VARRAY(struct dev, fd_varray, number),
    VMIG_STRUCT(struct dev, point, struct point, NULL),
    VMIG_STRUCT_ARRAY(struct dev, point_array, struct point, NULL),
    VMIG_STRUCT_VARRAY(struct dev, point_varray, struct point, NULL, number),
    VMIG_PTR_STRUCT(struct dev, point_ptr, struct point, NULL),
    VMIG_PTR_STRUCT_VARRAY(struct dev, point_ptr_varray, struct point, NULL, number, 5),
    VMIG_BYTES(struct dev, bytes),
    VMIG_BYTES_VARRAY(struct dev, bytes_varray, number),
    VMIG_PTR_BYTES(struct dev, bytes_ptr, number, 8),
    VMIG_UNUSED(9),
    VMIG_END,
};

/* The type checks for a row of one's own; each is 0. */
static const size_t checks[] = {
    VMIG_IS(uint16_t, struct dev, u16),
    VMIG_IS_ARRAY(uint16_t, struct dev, u16_array),
    VMIG_IS_PTR(uint16_t, struct dev, u16_ptr),
    VMIG_IS_INT(struct dev, number),
};

#define ROWS(table) (sizeof(table) / sizeof(table[0]))
#define CHECK(what) if (!(what)) return __LINE__

static int row(const vmig_field *f, const char *name, uint32_t kind, size_t offset, size_t width, size_t count)
{
    return strcmp(f->name, name) == 0 && f->kind == kind && f->since == 0 && f->offset == offset &&
           f->width == width && f->count == count && f->reserved32 == 0 && f->reserved[0] == 0;
}

static const vmig_member members[] = { VMIG_MEMBER(struct dev, bytes), VMIG_MEMBER_END };

int UNIT(void);
int UNIT(void)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    static vmig_device device = VMIG_SIZED(vmig_device);
    const vmig_field *f = fields;
    size_t i;

    CHECK(ops.size == sizeof(ops) && !ops.stop && !ops.destroy && !ops.gate && VMIG_GATE_INSTALL == 1);
    CHECK(device.size == sizeof(device) && !device.name && !device.fields && !device.priority);
    for (i = 0; i < ROWS(checks); i++)
        CHECK(checks[i] == 0);
    for (i = 0; i + 2 < ROWS(fields); i++) /* but VMIG_UNUSED and VMIG_END */
        CHECK(f[i].name && f[i].kind && f[i].width && f[i].count && (i == 0 || f[i].offset));
    CHECK(row(&f[0], "number", VMIG_KIND_U32, 0, 4, 1));
    CHECK(row(&f[1], "u8", VMIG_KIND_U8, offsetof(struct dev, u8), 1, 1));
    CHECK(row(&f[2], "u8_array", VMIG_KIND_U8, offsetof(struct dev, u8_array), 1, 3));
    CHECK(row(&f[3], "u8_varray", VMIG_KIND_U8, offsetof(struct dev, u8_varray), 1, 4));
    CHECK(strcmp(f[3].count_field, "number") == 0 && f[3].flags == 0);
    CHECK(row(&f[4], "u8_ptr", VMIG_KIND_U8, offsetof(struct dev, u8_ptr), 1, 1));
    CHECK(!f[4].count_field && f[4].flags == VMIG_FIELD_POINTER);
    CHECK(row(&f[5], "u8_ptr_varray", VMIG_KIND_U8, offsetof(struct dev, u8_ptr_varray), 1, 5));
    CHECK(strcmp(f[5].count_field, "number") == 0 && f[5].flags == VMIG_FIELD_POINTER);
    f += ROWS(fields) - 5; /* bytes, bytes_varray, bytes_ptr, unused, end */
    CHECK(row(&f[0], "bytes", VMIG_KIND_BYTES, offsetof(struct dev, bytes), 6, 1));
    CHECK(row(&f[1], "bytes_varray", VMIG_KIND_BYTES, offsetof(struct dev, bytes_varray), 1, 7));
    CHECK(row(&f[2], "bytes_ptr", VMIG_KIND_BYTES, offsetof(struct dev, bytes_ptr), 1, 8));
    CHECK(!f[3].name && f[3].kind == VMIG_KIND_UNUSED && f[3].width == 9);
    CHECK(!f[4].name && f[4].kind == VMIG_KIND_END);
    CHECK(members[0].offset == offsetof(struct dev, bytes) && members[0].len == 6 && !members[1].len);
    CHECK(point_fields[1].kind == VMIG_KIND_SINCE && point_fields[1].since == 2);
    return 0;
}
