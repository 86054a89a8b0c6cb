/* What must not compile: tests/header.rs builds this with CASE=0, which must succeed, and then once for each number below,
 * which must fail. The wrong member is nearly right: the same size with the other sign, the other kind of array. */
#include <vmig.h>

struct point {
    uint32_t x, y;
};
struct other {
    uint32_t x, y;
};
struct dev {
    uint32_t number;
    double real;
    uint8_t u8, u8_array[3], *u8_ptr;
    uint16_t u16, u16_array[3], *u16_ptr;
    uint32_t u32, u32_array[3], *u32_ptr;
    uint64_t u64, u64_array[3], *u64_ptr;
    int8_t i8, i8_array[3], *i8_ptr;
    int16_t i16, i16_array[3], *i16_ptr;
    int32_t i32, i32_array[3], *i32_ptr;
    int64_t i64, i64_array[3], *i64_ptr;
    struct point point, point_array[3], *point_ptr;
    long fd, fd_array[3];
    unsigned unsigned_fd;
};

#if CASE == 1
static struct point sized = VMIG_SIZED(struct point); /* has no size */
#else
static vmig_ops sized = VMIG_SIZED(vmig_ops);
#endif

#if CASE <= 1
#define ROW VMIG_STRUCT(struct dev, point, struct point, NULL)
#elif CASE == 2
#define ROW VMIG_U8(struct dev, i8)
#elif CASE == 3
#define ROW VMIG_U8_ARRAY(struct dev, i8_array)
#elif CASE == 4
#define ROW VMIG_U8_VARRAY(struct dev, i8_array, number)
#elif CASE == 5
#define ROW VMIG_PTR_U8(struct dev, i8_ptr)
#elif CASE == 6
#define ROW VMIG_PTR_U8_VARRAY(struct dev, i8_ptr, number, 5)
#elif CASE == 7
#define ROW VMIG_U16(struct dev, i16)
#elif CASE == 8
#define ROW VMIG_U16_ARRAY(struct dev, i16_array)
#elif CASE == 9
#define ROW VMIG_U16_VARRAY(struct dev, i16_array, number)
#elif CASE == 10
#define ROW VMIG_PTR_U16(struct dev, i16_ptr)
#elif CASE == 11
#define ROW VMIG_PTR_U16_VARRAY(struct dev, i16_ptr, number, 5)
#elif CASE == 12
#define ROW VMIG_U32(struct dev, i32)
#elif CASE == 13
#define ROW VMIG_U32_ARRAY(struct dev, i32_array)
#elif CASE == 14
#define ROW VMIG_U32_VARRAY(struct dev, i32_array, number)
#elif CASE == 15
#define ROW VMIG_PTR_U32(struct dev, i32_ptr)
#elif CASE == 16
#define ROW VMIG_PTR_U32_VARRAY(struct dev, i32_ptr, number, 5)
#elif CASE == 17
#define ROW VMIG_U64(struct dev, i64)
#elif CASE == 18
#define ROW VMIG_U64_ARRAY(struct dev, i64_array)
#elif CASE == 19
#define ROW VMIG_U64_VARRAY(struct dev, i64_array, number)
#elif CASE == 20
#define ROW VMIG_PTR_U64(struct dev, i64_ptr)
#elif CASE == 21
#define ROW VMIG_PTR_U64_VARRAY(struct dev, i64_ptr, number, 5)
#elif CASE == 22
#define ROW VMIG_I8(struct dev, u8)
#elif CASE == 23
#define ROW VMIG_I8_ARRAY(struct dev, u8_array)
#elif CASE == 24
#define ROW VMIG_I8_VARRAY(struct dev, u8_array, number)
#elif CASE == 25
#define ROW VMIG_PTR_I8(struct dev, u8_ptr)
#elif CASE == 26
#define ROW VMIG_PTR_I8_VARRAY(struct dev, u8_ptr, number, 5)
#elif CASE == 27
#define ROW VMIG_I16(struct dev, u16)
#elif CASE == 28
#define ROW VMIG_I16_ARRAY(struct dev, u16_array)
#elif CASE == 29
#define ROW VMIG_I16_VARRAY(struct dev, u16_array, number)
#elif CASE == 30
#define ROW VMIG_PTR_I16(struct dev, u16_ptr)
#elif CASE == 31
#define ROW VMIG_PTR_I16_VARRAY(struct dev, u16_ptr, number, 5)
#elif CASE == 32
#define ROW VMIG_I32(struct dev, u32)
#elif CASE == 33
#define ROW VMIG_I32_ARRAY(struct dev, u32_array)
#elif CASE == 34
#define ROW VMIG_I32_VARRAY(struct dev, u32_array, number)
#elif CASE == 35
#define ROW VMIG_PTR_I32(struct dev, u32_ptr)
#elif CASE == 36
#define ROW VMIG_PTR_I32_VARRAY(struct dev, u32_ptr, number, 5)
#elif CASE == 37
#define ROW VMIG_I64(struct dev, u64)
#elif CASE == 38
#define ROW VMIG_I64_ARRAY(struct dev, u64_array)
#elif CASE == 39
#define ROW VMIG_I64_VARRAY(struct dev, u64_array, number)
#elif CASE == 40
#define ROW VMIG_PTR_I64(struct dev, u64_ptr)
#elif CASE == 41
#define ROW VMIG_PTR_I64_VARRAY(struct dev, u64_ptr, number, 5)
#elif CASE == 42
#define ROW VMIG_BOOL(struct dev, u8)
#elif CASE == 43
#define ROW VMIG_BOOL_ARRAY(struct dev, u8_array)
#elif CASE == 44
#define ROW VMIG_BOOL_VARRAY(struct dev, u8_array, number)
#elif CASE == 45
#define ROW VMIG_PTR_BOOL(struct dev, u8_ptr)
#elif CASE == 46
#define ROW VMIG_PTR_BOOL_VARRAY(struct dev, u8_ptr, number, 5)
#elif CASE == 47
#define ROW VMIG_TIMER(struct dev, i64)
#elif CASE == 48
#define ROW VMIG_TIMER_ARRAY(struct dev, i64_array)
#elif CASE == 49
#define ROW VMIG_TIMER_VARRAY(struct dev, i64_array, number)
#elif CASE == 50
#define ROW VMIG_PTR_TIMER(struct dev, i64_ptr)
#elif CASE == 51
#define ROW VMIG_PTR_TIMER_VARRAY(struct dev, i64_ptr, number, 5)
#elif CASE == 52
#define ROW VMIG_STRUCT(struct dev, point, struct other, NULL)
#elif CASE == 53
#define ROW VMIG_STRUCT_ARRAY(struct dev, point_array, struct other, NULL)
#elif CASE == 54
#define ROW VMIG_STRUCT_VARRAY(struct dev, point_array, struct other, NULL, number)
#elif CASE == 55
#define ROW VMIG_PTR_STRUCT(struct dev, point_ptr, struct other, NULL)
#elif CASE == 56
#define ROW VMIG_PTR_STRUCT_VARRAY(struct dev, point_ptr, struct other, NULL, number, 5)
#elif CASE == 57
#define ROW VMIG_BYTES(struct dev, i8_array)
#elif CASE == 58
#define ROW VMIG_BYTES(struct dev, u8_ptr)
#elif CASE == 59
#define ROW VMIG_BYTES_VARRAY(struct dev, u16_array, number)
#elif CASE == 60
#define ROW VMIG_PTR_BYTES(struct dev, i8_ptr, number, 8)
#elif CASE == 61
#define ROW VMIG_U8(struct dev, u8_array)
#elif CASE == 62
#define ROW VMIG_U8(struct dev, u8_ptr)
#elif CASE == 63
#define ROW VMIG_U8(struct dev, missing)
#elif CASE == 64
#define ROW VMIG_U64(struct dev, number)
#elif CASE == 65
#define ROW VMIG_U8_ARRAY(struct dev, u8)
#elif CASE == 66
#define ROW VMIG_U8_ARRAY(struct dev, u8_ptr)
#elif CASE == 67
#define ROW VMIG_PTR_U8(struct dev, u8)
#elif CASE == 68
#define ROW VMIG_PTR_U8(struct dev, u8_array)
#elif CASE == 69
#define ROW VMIG_U8_VARRAY(struct dev, u8_ptr, number)
#elif CASE == 70
#define ROW VMIG_U8_VARRAY(struct dev, u8_array, real)
#elif CASE == 71
#define ROW VMIG_U8_VARRAY(struct dev, u8_array, u8_ptr)
#elif CASE == 72
#define ROW VMIG_PTR_U8_VARRAY(struct dev, u8_array, number, 5)
#elif CASE == 73
#define ROW VMIG_PTR_U8_VARRAY(struct dev, u8_ptr, real, 5)
#elif CASE == 74
#define ROW VMIG_U64(struct dev, real)
#elif CASE == 75
#define ROW VMIG_TIMER(struct dev, u8_ptr)
#elif CASE == 76
#define ROW VMIG_FD(struct dev, fd)
#elif CASE == 77
#define ROW VMIG_FD(struct dev, unsigned_fd)
#elif CASE == 78
#define ROW VMIG_FD_ARRAY(struct dev, fd_array)
#elif CASE == 79
#define ROW VMIG_FD_VARRAY(struct dev, fd_array, number)
#elif CASE == 80
#define ROW VMIG_FD_VARRAY(struct dev, i32_array, real)
#elif CASE == 81
#define ROW VMIG_FD(struct dev, i32_ptr)
#endif
static const vmig_field fields[] = {
    ROW,
    VMIG_END,
};

const void *wrong(int which);
const void *wrong(int which)
{
    return which ? (const void *)&sized : (const void *)fields;
}
