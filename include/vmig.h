/* vmig.h - live migration for hypervisors and emulators written in C.          SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Generated from the Rust sources; edit those. Read it from top to bottom: each chapter needs only those before it.
 *
 * Results   int functions return >= 0 for success and a negative errno for failure; vmig_errmsg() then says why, in a
 *           sentence. A failed call changes nothing, and outputs are written on success only. Texts, and errno values
 *           that no comment names, may change between releases.
 * Structs   those that begin with `size` are sized: start with VMIG_SIZED(type), so that programs and libraries of
 *           different age may meet. Zero means "not given". The library takes a shorter struct as ending in zeros and
 *           refuses a longer one (-E2BIG) only if it does not understand a non-zero tail. In structs it fills, it
 *           fills as much as `size` says there is.
 * Pointers  NULL is -EINVAL where a thing is needed, and does nothing in functions that free. Strings and structs given
 *           to the library are copied before the call returns, unless said otherwise; guest memory and device pointers
 *           stay valid until they are removed. Every char * the library returns is the caller's and goes back through
 *           vmig_string_free(); a const char * stays the library's.
 * Callbacks get the pointer registered with them first. They must return: no longjmp, no C++ exception.
 * Memory    for what guest, peer or file decides the size of is taken fallibly (-ENOMEM); for small fixed amounts running
 *           out aborts, as in any Rust program.
 *
 * Marks say who may call, and each callback says on which thread it runs, with which lock and what it may call:
 *   [any]   any thread, any time, big lock held or not
 *   [bql]   any thread that holds the big lock
 *   [free]  any thread that does not hold the big lock; may wait
 *   [cb]    legal inside callbacks too */
#ifndef VMIG_H
#define VMIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Initial value of a sized struct: `size` set, all else zero. */
#ifdef __cplusplus
template <class T> inline T vmig_sized_()
{
    T t{};
    t.size = sizeof(T);
    return t;
}
#define VMIG_SIZED(type) vmig_sized_<type>()
#else
#define VMIG_SIZED(type) { .size = sizeof(type) }
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- 1. the guest ---------------------------------------------------------------------------------------------- */
/* Everything begins with a guest: a handle made from the VMM's hooks, and the pointer they are called with. */

#define VMIG_LOG_ERROR 1         /* Level of a log line: something failed. */
#define VMIG_LOG_WARNING 2       /* Level of a log line: something is odd, and went on. */
#define VMIG_LOG_INFO 3          /* Level of a log line: what an operator wants to read afterwards. */
#define VMIG_LOG_DEBUG 4         /* Level of a log line: what a developer wants to read. */

/* What a run-state handler is told: one of VMIG_PREPARE_STOP, VMIG_STOPPED, VMIG_PREPARE_START, VMIG_STARTING.
 * Later versions may add more; return 0 for those you do not know. */
typedef uint32_t vmig_phase;

/* What the library asks of the VMM.
 *
 * Start it with VMIG_SIZED(vmig_ops); a hook that is NULL is not given. The struct is copied. Every hook gets the
 * pointer `vm` that was given beside the struct. Hooks return 0 or more for success and a negative errno for failure;
 * they must not throw or longjmp. Except for `lock`, `unlock`, `held` and `log` they are called without the big lock. */
typedef struct vmig_ops {
    /* sizeof(vmig_ops) of the caller. 0 or less than the first two hooks is -EINVAL; more than the library knows is
     * -E2BIG unless the rest is zero. */
    size_t size;
    /* Required. Return once no vCPU and no device runs and the last exit of each vCPU was handled. On failure the
     * guest must still run. Called on the thread that stops the guest: the caller of vmig_stop() or a migration
     * thread, never two at once and never when the guest is stopped already. Must not call vmig_stop() or vmig_start()
     * (-EDEADLK), nor wait for a thread that does. */
    int (*stop)(void *vm);
    /* Required. Let the guest run. Fail only if it did not run a single instruction. Thread and rules as for `stop`. */
    int (*start)(void *vm);
    /* The VMM's own big lock; give `lock` and `unlock` or neither, then the library brings one. Wait until this
     * thread has it. Any thread. Must not call the library. */
    void (*lock)(void *vm);
    /* Give up the VMM's own big lock. On the thread that took it. Must not call the library. */
    void (*unlock)(void *vm);
    /* Does this thread hold the VMM's own big lock? 1 yes, 0 no. Optional, and only with `lock`: without it the
     * library knows only of threads that locked through vmig_bql_lock(). Any thread. Must not call the library. */
    int (*held)(void *vm);
    /* Switch KVM's dirty log of memory slot `slot` on (1) or off (0): KVM_SET_USER_MEMORY_REGION with or without
     * KVM_MEM_LOG_DIRTY_PAGES. Optional: the flags of a slot are the VMM's, and only this hook may change them.
     * Called on a migration thread. */
    int (*log_dirty)(void *vm, uint32_t slot, int on);
    /* The guest lives on this host now: tell the network, for example by a gratuitous ARP. Optional. Called on a
     * migration thread, after the guest was started. */
    void (*announce)(void *vm);
    /* Take one line of log, `level` being one of VMIG_LOG_*. The line has no line end and no control characters, is at
     * most 1024 bytes long and valid during the call. Optional; without it lines go to stderr. Any thread, several at
     * once, the big lock held or not: must not wait for it and must not call the library, except vmig_bql_held(). */
    void (*log)(void *vm, int level, const char *line);
    /* The last call ever made with `vm`. Optional. Comes once if the guest was made, and never if that failed. */
    void (*destroy)(void *vm);
} vmig_ops;

/* A point in time, in nanoseconds. */
typedef struct vmig_moment {
    /* sizeof(vmig_moment) of the library: do not read members beyond it. */
    size_t size;
    /* Wall clock, since 1970. */
    uint64_t wall_ns;
    /* CLOCK_MONOTONIC of this host. */
    uint64_t monotonic_ns;
} vmig_moment;

/* A run-state handler. Called with the big lock held, on the thread that stops or starts the guest.
 *
 * `at` is the time of the stop (just after the `stop` hook returned) or of the start (before the first handler), the
 * same for all handlers, and valid during the call. On a stop handlers are called in descending order of priority, on
 * a start in ascending order; of equal priority the one registered first is the last to stop and the first to start.
 * May write guest memory; what it writes at the stop migrates. Must not call vmig_stop() or vmig_start() (-EDEADLK),
 * nor add or remove run-state handlers (-EBUSY).
 *
 * Returns 0 or more, or a negative errno. A failure at a stop fails the attempt: handlers that were told of the stop
 * are told of a start, and the guest runs on. A failure at a start leaves the guest stopped, and the handlers that
 * were told of the start are told of a stop. The handler that failed is not told to undo what it did not do. */
typedef int (*vmig_run_fn)(void *opaque, vmig_phase phase, const vmig_moment *at);

/* The guest has just stopped. Comes to every handler before any gets VMIG_STOPPED. */
#define VMIG_PREPARE_STOP 0

#define VMIG_STOPPED 1           /* The guest is stopped: what it may still find in its memory is written now. */

/* The guest is about to start; undoes VMIG_PREPARE_STOP. Comes to every handler before any gets VMIG_STARTING. */
#define VMIG_PREPARE_START 2

#define VMIG_STARTING 3          /* The guest starts next; undoes VMIG_STOPPED. */

/* Version of the library at run time: major << 16 | minor << 8 | patch. [any][cb] */
uint32_t vmig_version(void);

/* ---- 2. device state ------------------------------------------------------------------------------------------- */
/* Device tables as C sees them. The text of each item is what a C author reads in the header. */

#define VMIG_KIND_END 0          /* Ends a table of fields. Use VMIG_END. */
#define VMIG_KIND_U8 1           /* uint8_t; 1 byte. */
#define VMIG_KIND_U16 2          /* uint16_t; 2 bytes, big-endian on the wire. */
#define VMIG_KIND_U32 3          /* uint32_t; 4 bytes, big-endian on the wire. */
#define VMIG_KIND_U64 4          /* uint64_t; 8 bytes, big-endian on the wire. */
#define VMIG_KIND_BYTES 5        /* `width` raw bytes, sent as they are. */
#define VMIG_KIND_I8 6           /* int8_t; 1 byte. */
#define VMIG_KIND_I16 7          /* int16_t; 2 bytes, big-endian on the wire. */
#define VMIG_KIND_I32 8          /* int32_t; 4 bytes, big-endian on the wire. */
#define VMIG_KIND_I64 9          /* int64_t; 8 bytes, big-endian on the wire. */
#define VMIG_KIND_BOOL 10        /* bool; 1 byte. A value other than 0 and 1 is an error on both sides. */

/* Expiry of a timer: uint64_t, nanoseconds of the guest's clock; UINT64_MAX means not armed. */
#define VMIG_KIND_TIMER 11

/* A struct with a table of its own, `nested`; its fields (and parts) are sent in place. */
#define VMIG_KIND_STRUCT 12

/* `width` bytes on the wire that mean nothing: zero when sent, ignored when read. No memory belongs to them. */
#define VMIG_KIND_UNUSED 13

/* Not a field: the rows after it exist since version `since` of the table. Use VMIG_SINCE. */
#define VMIG_KIND_SINCE 14

/* Flag of a field: the member is a pointer to the elements, not the elements. It must not be NULL when there are
 * elements to save or to load; `pre_load` is the place to allocate. */
#define VMIG_FIELD_POINTER 1

/* Flag of a device: its state is sent at setup, while the guest still runs, and loaded before RAM. */
#define VMIG_DEVICE_EARLY 1

/* The state of a kind of device: one table saves, loads, describes and compares.
 *
 * Everything here is copied when the device is added (strings, fields, nested tables, parts); the callbacks must stay
 * callable until the device is removed. Callbacks run on a thread of the library, or inside vmig_dispatch() with
 * dispatch=manual, big lock held. They get the pointer given to vmig_add_device, or in a nested table a pointer to
 * the element. They return 0, or a negative errno, which fails the migration with an error that names device and
 * callback; the guest goes on at the source. They must not wait, throw or longjmp, nor call vmig functions other than
 * those marked `[cb]`. */
typedef struct vmig_device {
    /* Size of the struct, in bytes: VMIG_SIZED(vmig_device). */
    size_t size;
    /* Name of the section, the same on both sides, at most 255 bytes. A part is called "parent/tail", with no further
     * '/' in the tail. */
    const char *name;
    /* Version that is sent; from 1. */
    uint32_t version;
    /* Oldest version that is still read; 0: only `version`. */
    uint32_t oldest;
    /* Fields in the order of the stream, ended by VMIG_END. NULL declares that the device has no state at all, which
     * excludes parts and callbacks. */
    const struct vmig_field *fields;
    /* Optional parts (subsections), NULL-terminated; NULL: none. Their fields are relative to the same pointer. A
     * part is sent when `needed` says so, and absence means that what it describes has its default value: set it in
     * `pre_load`. */
    const struct vmig_device *const *parts;
    /* Of a part: > 0 to send it, 0 not to, negative errno to fail. NULL: always sent. Source. */
    int (*needed)(void *dev);
    /* Before the fields are read. Source. */
    int (*pre_save)(void *dev);
    /* After fields and parts were read; also when saving failed after `pre_save` succeeded. Source. */
    int (*post_save)(void *dev);
    /* Before the fields are written. All of the device's bytes have arrived and were checked. Destination. */
    int (*pre_load)(void *dev);
    /* After fields and parts were written; `version` is the one that arrived. Guest RAM is final, except for devices
     * with VMIG_DEVICE_EARLY. Destination. */
    int (*post_load)(void *dev, uint32_t version);
    /* VMIG_DEVICE_EARLY or 0. Not of parts and nested tables. */
    uint32_t flags;
    /* Devices are saved in descending priority, then in the order they were added. Not of parts and nested tables. */
    int32_t priority;
} vmig_device;

/* One field of a device's state. Write it with the VMIG_... macros, which check the member's type and fill in every
 * member; a field written by hand must be zero where nothing is given. */
typedef struct vmig_field {
    /* Name in errors and descriptions; unique in its table, at most 255 bytes. May be NULL for unused space. */
    const char *name;
    /* One of VMIG_KIND_... */
    uint32_t kind;
    /* First version of the table that has the field; 0: that of the last VMIG_SINCE before it, or 1. */
    uint32_t since;
    /* Of the member in its struct, in bytes. */
    size_t offset;
    /* Size of one element in memory, in bytes. For unused space: its size on the wire. */
    size_t width;
    /* Number of elements; with `count_field` the room there is, in elements. */
    size_t count;
    /* Table of one element, for VMIG_KIND_STRUCT. It is always read at the version it has now, because nothing on
     * the wire names it: to change a nested struct, add to the outer table or add a part. */
    const vmig_device *nested;
    /* Name of the integer field, earlier in the same table, that holds the number of elements; NULL: `count` it is. */
    const char *count_field;
    /* VMIG_FIELD_POINTER or 0. */
    uint32_t flags;
    /* Zero. */
    uint32_t reserved32;
    /* Zero. */
    size_t reserved[2];
} vmig_field;

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

#define VMIG_UNUSED(bytes) VMIG_ROW_(NULL, VMIG_KIND_UNUSED, 0, 0, bytes, 1, NULL, NULL, 0)
#define VMIG_SINCE(version) VMIG_ROW_(NULL, VMIG_KIND_SINCE, version, 0, 0, 0, NULL, NULL, 0)
#define VMIG_END VMIG_ROW_(NULL, VMIG_KIND_END, 0, 0, 0, 0, NULL, NULL, 0)

/* ---- 3. full control ------------------------------------------------------------------------------------------- */
/* The callbacks of a custom section as C sees them. The text of each item is what a C author reads in the header. */

#define VMIG_PART_START 1        /* First body of an iterative section, from `setup`. */
#define VMIG_PART_ITERATE 2      /* Body sent while the guest runs, from `iterate`. */
#define VMIG_PART_END 3          /* Last body of an iterative section, from `complete`. */
#define VMIG_PART_FULL 4         /* Whole state in one body, from `complete` of a section that is not iterative. */

/* Flag of a section that is not iterative: it is sent at setup, while the guest still runs, and loaded before RAM. */
#define VMIG_SECTION_EARLY 1

/* Where a section's callback gets its bytes from. Valid only during the callback that got it. */
typedef struct vmig_reader vmig_reader;

/* Where a section's callback puts its bytes. Valid only during the callback that got it. */
typedef struct vmig_writer vmig_writer;

/* Callbacks of a section with a format of its own.
 *
 * A section is iterative if `iterate` is given: `setup` writes the first body, `iterate` further ones while the guest
 * runs, `complete` the last one with the guest stopped. Otherwise `complete` writes the only body. Each body is framed
 * by the library (be32 length, bytes), at most 1 GiB: `load` must read exactly what was written, or the migration
 * fails with an error that names section and offset.
 *
 * The struct is copied when the section is added. All callbacks run on a thread of the library, or inside
 * vmig_dispatch() with dispatch=manual; `[bql]` says the big lock is held, `[free]` that it is not. They return 0 or
 * more, or a negative errno, which fails the migration with an error that names section and callback; the guest goes
 * on at the source. They must not throw or longjmp; those marked `[bql]` must not wait. They may call the vmig
 * functions marked `[cb]`, and use their writer or reader until they return. */
typedef struct vmig_section_ops {
    /* Size of the struct, in bytes: VMIG_SIZED(vmig_section_ops). */
    size_t size;
    /* Which of several sections of this name. */
    uint32_t instance;
    /* Oldest version that is still read; 0: only the version given when the section is added. */
    uint32_t oldest;
    /* Sections are walked in descending priority, then in the order they were added. */
    int32_t priority;
    /* VMIG_SECTION_EARLY or 0. */
    uint32_t flags;
    /* Positive: takes part in this migration, 0: not. NULL: always. Source. `[bql]` or `[free]` */
    int (*is_active)(void *opaque);
    /* Positive: `iterate` is worth calling now, 0: not. NULL: always. Source. `[free]` */
    int (*is_active_iterate)(void *opaque);
    /* Positive: what is left may also be sent after the guest runs on the destination. NULL: no. Source. `[free]` */
    int (*has_postcopy)(void *opaque);
    /* Before anything is sent; an error refuses the migration. Source. `[bql]` */
    int (*prepare)(void *opaque);
    /* Writes the first body. Source. `[bql]` */
    int (*setup)(void *opaque, vmig_writer *out);
    /* Cheap guess of the bytes left, called in every loop: those that must be sent before the guest may run on the
     * destination, and those that may also follow. Both are zero before the call. Required if iterative. Source.
     * `[free]` */
    int (*pending_estimate)(void *opaque, uint64_t *must_precopy, uint64_t *can_postcopy);
    /* The same, exactly; called when the estimate lets the guest be stopped. NULL: the estimate is exact. Source.
     * `[free]` */
    int (*pending_exact)(void *opaque, uint64_t *must_precopy, uint64_t *can_postcopy);
    /* Writes the next body, about `budget` bytes at most. Positive: nothing left for now, 0: more to come. Source.
     * `[free]` */
    int (*iterate)(void *opaque, vmig_writer *out, uint64_t budget);
    /* Writes the last or only body; the guest is stopped, unless VMIG_SECTION_EARLY. Required. Source. `[bql]` */
    int (*complete)(void *opaque, vmig_writer *out);
    /* Undoes `setup`; exactly once for each `setup` that was tried, however the migration ended. Source. `[bql]` */
    void (*cleanup)(void *opaque);
    /* Before the first body arrives. Destination. `[bql]` */
    int (*load_setup)(void *opaque);
    /* Reads one body, all of which has arrived; `part` is one of VMIG_PART_..., `version` the sender's. Required.
     * Destination. `[bql]` */
    int (*load)(void *opaque, uint32_t part, uint32_t version, vmig_reader *input);
    /* Undoes `load_setup`; exactly once, told whether (1) or not (0) the migration succeeded. Destination. `[bql]` */
    void (*load_cleanup)(void *opaque, int ok);
    /* Positive: the source must wait for this section's approval before it stops the guest. NULL: no. Destination. `[bql]` */
    int (*switchover_ack_needed)(void *opaque);
} vmig_section_ops;

#ifdef __cplusplus
}
#endif
#endif /* VMIG_H */
