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
 *   [cb]    legal inside callbacks too
 * For a VMM with one thread (chapter 8) there are other rules. */
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
