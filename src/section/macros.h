/* ---- fields of a device table ----------------------------------------------------------------------------------
 *
 * Each macro makes one row of a vmig_field array: `type` is the device's struct, `member` a member of it. A member of
 * another type than the macro says does not compile. Names in the stream's description are the members' names.
 *
 *     VMIG_<KIND>(type, member)                            one element
 *     VMIG_<KIND>_ARRAY(type, member)                      an array in the struct, all of it
 *     VMIG_<KIND>_VARRAY(type, member, number)             an array in the struct, as many elements as the integer
 *                                                          member `number` says, a field earlier in the same table
 *     VMIG_PTR_<KIND>(type, member)                        a pointer to one element
 *     VMIG_PTR_<KIND>_VARRAY(type, member, number, room)   a pointer to as many elements as `number` says, at most
 *                                                          `room`, for which there is memory when the state is loaded
 *
 * with <KIND> one of U8 U16 U32 U64 I8 I16 I32 I64 BOOL TIMER (uint64_t: expiry in ns, UINT64_MAX: not armed). Structs
 * with a table of their own take their type and table after the member: VMIG_STRUCT(type, member, stype, table), and
 * so for VMIG_STRUCT_ARRAY, VMIG_STRUCT_VARRAY, VMIG_PTR_STRUCT, VMIG_PTR_STRUCT_VARRAY. Raw bytes (uint8_t arrays):
 * VMIG_BYTES(type, member), VMIG_BYTES_VARRAY(type, member, number), VMIG_PTR_BYTES(type, member, number, room).
 *
 * File descriptors (int, -1: none) stand in the struct itself: VMIG_FD(type, member), VMIG_FD_ARRAY(type, member),
 * VMIG_FD_VARRAY(type, member, number).
 *
 *     VMIG_UNUSED(bytes)       bytes on the wire without a meaning, where an old version had something
 *     VMIG_SINCE(version)      the rows below exist since this version of the table
 *     VMIG_END                 the last row
 */

/* 0, if the types agree; else it does not compile. C99 has no type test of its own, hence so many ways. The last one
 * is a constraint violation that every compiler reports, some as a warning. */
#if defined(__cplusplus)
extern "C++" {
template <class A, class B> struct vmig_same_;                  /* incomplete: the member is of another type */
template <class A> struct vmig_same_<A, A> { char same; };
}
#define VMIG_SAME_(pointer, expression) (0 * sizeof(vmig_same_<pointer, decltype(expression)>))
#define VMIG_BOOL_TYPE_ bool
#else
#define VMIG_BOOL_TYPE_ _Bool
#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
#define VMIG_SAME_(pointer, expression) (0 * sizeof(_Generic((expression), pointer: 0)))
#elif defined(__GNUC__)
#define VMIG_SAME_(pointer, expression) \
    (0 * sizeof(char[__builtin_types_compatible_p(pointer, __typeof__(expression)) ? 1 : -1]))
#else
#define VMIG_SAME_(pointer, expression) (0 * sizeof((pointer)0 == (expression)))
#endif
#endif

#define VMIG_COUNT_(type, member) (sizeof(((type *)0)->member) / sizeof(((type *)0)->member[0]))
/* The member is a ctype; an array of ctype (a pointer is not); a pointer to ctype. */
#define VMIG_IS(ctype, type, member) VMIG_SAME_(ctype *, &((type *)0)->member)
#define VMIG_IS_ARRAY(ctype, type, member) VMIG_SAME_(ctype(*)[VMIG_COUNT_(type, member)], &((type *)0)->member)
#define VMIG_IS_PTR(ctype, type, member) VMIG_SAME_(ctype **, &((type *)0)->member)
/* The member is an integer: only integers (and enums) have a remainder. Its kind is that of its own row. */
#define VMIG_IS_INT(type, member) (0 * sizeof(((type *)0)->member % 2))

#define VMIG_ROW_(name, kind, since, offset, width, count, nested, number, flags) \
    { name, kind, since, offset, width, count, nested, number, flags, 0, { 0, 0 } }
#define VMIG_ONE_(kind, ctype, type, member, nested) \
    VMIG_ROW_(#member, kind, 0, offsetof(type, member) + VMIG_IS(ctype, type, member), sizeof(ctype), 1, nested, NULL, 0)
#define VMIG_ARRAY_(kind, ctype, type, member, nested) \
    VMIG_ROW_(#member, kind, 0, offsetof(type, member) + VMIG_IS_ARRAY(ctype, type, member), sizeof(ctype), \
              VMIG_COUNT_(type, member), nested, NULL, 0)
#define VMIG_VARRAY_(kind, ctype, type, member, nested, number) \
    VMIG_ROW_(#member, kind, 0, offsetof(type, member) + VMIG_IS_ARRAY(ctype, type, member) + VMIG_IS_INT(type, number), \
              sizeof(ctype), VMIG_COUNT_(type, member), nested, #number, 0)
#define VMIG_PTR_(kind, ctype, type, member, nested) \
    VMIG_ROW_(#member, kind, 0, offsetof(type, member) + VMIG_IS_PTR(ctype, type, member), sizeof(ctype), 1, nested, \
              NULL, VMIG_FIELD_POINTER)
#define VMIG_PTR_VARRAY_(kind, ctype, type, member, nested, number, room) \
    VMIG_ROW_(#member, kind, 0, offsetof(type, member) + VMIG_IS_PTR(ctype, type, member) + VMIG_IS_INT(type, number), \
              sizeof(ctype), room, nested, #number, VMIG_FIELD_POINTER)

#define VMIG_U8(type, member) VMIG_ONE_(VMIG_KIND_U8, uint8_t, type, member, NULL)
#define VMIG_U8_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_U8, uint8_t, type, member, NULL)
#define VMIG_U8_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_U8, uint8_t, type, member, NULL, number)
#define VMIG_PTR_U8(type, member) VMIG_PTR_(VMIG_KIND_U8, uint8_t, type, member, NULL)
#define VMIG_PTR_U8_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_U8, uint8_t, type, member, NULL, number, room)

#define VMIG_U16(type, member) VMIG_ONE_(VMIG_KIND_U16, uint16_t, type, member, NULL)
#define VMIG_U16_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_U16, uint16_t, type, member, NULL)
#define VMIG_U16_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_U16, uint16_t, type, member, NULL, number)
#define VMIG_PTR_U16(type, member) VMIG_PTR_(VMIG_KIND_U16, uint16_t, type, member, NULL)
#define VMIG_PTR_U16_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_U16, uint16_t, type, member, NULL, number, room)

#define VMIG_U32(type, member) VMIG_ONE_(VMIG_KIND_U32, uint32_t, type, member, NULL)
#define VMIG_U32_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_U32, uint32_t, type, member, NULL)
#define VMIG_U32_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_U32, uint32_t, type, member, NULL, number)
#define VMIG_PTR_U32(type, member) VMIG_PTR_(VMIG_KIND_U32, uint32_t, type, member, NULL)
#define VMIG_PTR_U32_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_U32, uint32_t, type, member, NULL, number, room)

#define VMIG_U64(type, member) VMIG_ONE_(VMIG_KIND_U64, uint64_t, type, member, NULL)
#define VMIG_U64_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_U64, uint64_t, type, member, NULL)
#define VMIG_U64_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_U64, uint64_t, type, member, NULL, number)
#define VMIG_PTR_U64(type, member) VMIG_PTR_(VMIG_KIND_U64, uint64_t, type, member, NULL)
#define VMIG_PTR_U64_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_U64, uint64_t, type, member, NULL, number, room)

#define VMIG_I8(type, member) VMIG_ONE_(VMIG_KIND_I8, int8_t, type, member, NULL)
#define VMIG_I8_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_I8, int8_t, type, member, NULL)
#define VMIG_I8_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_I8, int8_t, type, member, NULL, number)
#define VMIG_PTR_I8(type, member) VMIG_PTR_(VMIG_KIND_I8, int8_t, type, member, NULL)
#define VMIG_PTR_I8_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_I8, int8_t, type, member, NULL, number, room)

#define VMIG_I16(type, member) VMIG_ONE_(VMIG_KIND_I16, int16_t, type, member, NULL)
#define VMIG_I16_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_I16, int16_t, type, member, NULL)
#define VMIG_I16_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_I16, int16_t, type, member, NULL, number)
#define VMIG_PTR_I16(type, member) VMIG_PTR_(VMIG_KIND_I16, int16_t, type, member, NULL)
#define VMIG_PTR_I16_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_I16, int16_t, type, member, NULL, number, room)

#define VMIG_I32(type, member) VMIG_ONE_(VMIG_KIND_I32, int32_t, type, member, NULL)
#define VMIG_I32_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_I32, int32_t, type, member, NULL)
#define VMIG_I32_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_I32, int32_t, type, member, NULL, number)
#define VMIG_PTR_I32(type, member) VMIG_PTR_(VMIG_KIND_I32, int32_t, type, member, NULL)
#define VMIG_PTR_I32_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_I32, int32_t, type, member, NULL, number, room)

#define VMIG_I64(type, member) VMIG_ONE_(VMIG_KIND_I64, int64_t, type, member, NULL)
#define VMIG_I64_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_I64, int64_t, type, member, NULL)
#define VMIG_I64_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_I64, int64_t, type, member, NULL, number)
#define VMIG_PTR_I64(type, member) VMIG_PTR_(VMIG_KIND_I64, int64_t, type, member, NULL)
#define VMIG_PTR_I64_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_I64, int64_t, type, member, NULL, number, room)

#define VMIG_BOOL(type, member) VMIG_ONE_(VMIG_KIND_BOOL, VMIG_BOOL_TYPE_, type, member, NULL)
#define VMIG_BOOL_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_BOOL, VMIG_BOOL_TYPE_, type, member, NULL)
#define VMIG_BOOL_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_BOOL, VMIG_BOOL_TYPE_, type, member, NULL, number)
#define VMIG_PTR_BOOL(type, member) VMIG_PTR_(VMIG_KIND_BOOL, VMIG_BOOL_TYPE_, type, member, NULL)
#define VMIG_PTR_BOOL_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_BOOL, VMIG_BOOL_TYPE_, type, member, NULL, number, room)

#define VMIG_TIMER(type, member) VMIG_ONE_(VMIG_KIND_TIMER, uint64_t, type, member, NULL)
#define VMIG_TIMER_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_TIMER, uint64_t, type, member, NULL)
#define VMIG_TIMER_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_TIMER, uint64_t, type, member, NULL, number)
#define VMIG_PTR_TIMER(type, member) VMIG_PTR_(VMIG_KIND_TIMER, uint64_t, type, member, NULL)
#define VMIG_PTR_TIMER_VARRAY(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_TIMER, uint64_t, type, member, NULL, number, room)

#define VMIG_STRUCT(type, member, stype, table) VMIG_ONE_(VMIG_KIND_STRUCT, stype, type, member, table)
#define VMIG_STRUCT_ARRAY(type, member, stype, table) VMIG_ARRAY_(VMIG_KIND_STRUCT, stype, type, member, table)
#define VMIG_STRUCT_VARRAY(type, member, stype, table, number) \
    VMIG_VARRAY_(VMIG_KIND_STRUCT, stype, type, member, table, number)
#define VMIG_PTR_STRUCT(type, member, stype, table) VMIG_PTR_(VMIG_KIND_STRUCT, stype, type, member, table)
#define VMIG_PTR_STRUCT_VARRAY(type, member, stype, table, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_STRUCT, stype, type, member, table, number, room)

#define VMIG_BYTES(type, member) \
    VMIG_ROW_(#member, VMIG_KIND_BYTES, 0, offsetof(type, member) + VMIG_IS_ARRAY(uint8_t, type, member), \
              sizeof(((type *)0)->member), 1, NULL, NULL, 0)
#define VMIG_BYTES_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_BYTES, uint8_t, type, member, NULL, number)
#define VMIG_PTR_BYTES(type, member, number, room) \
    VMIG_PTR_VARRAY_(VMIG_KIND_BYTES, uint8_t, type, member, NULL, number, room)

#define VMIG_FD(type, member) VMIG_ONE_(VMIG_KIND_FD, int, type, member, NULL)
#define VMIG_FD_ARRAY(type, member) VMIG_ARRAY_(VMIG_KIND_FD, int, type, member, NULL)
#define VMIG_FD_VARRAY(type, member, number) VMIG_VARRAY_(VMIG_KIND_FD, int, type, member, NULL, number)

#define VMIG_UNUSED(bytes) VMIG_ROW_(NULL, VMIG_KIND_UNUSED, 0, 0, bytes, 1, NULL, NULL, 0)
#define VMIG_SINCE(version) VMIG_ROW_(NULL, VMIG_KIND_SINCE, version, 0, 0, 0, NULL, NULL, 0)
#define VMIG_END VMIG_ROW_(NULL, VMIG_KIND_END, 0, 0, 0, 0, NULL, NULL, 0)
