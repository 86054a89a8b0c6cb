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

#ifdef __cplusplus
extern "C" {
#endif

/* ---- 1. the guest ---------------------------------------------------------------------------------------------- */
/* Everything begins with a guest: a handle made from the VMM's hooks, and the pointer they are called with. A process
 * may have several guests; they share nothing. */

#define VMIG_LOG_ERROR 1         /* Level of a log line: something failed. */
#define VMIG_LOG_WARNING 2       /* Level of a log line: something is odd, and went on. */
#define VMIG_LOG_INFO 3          /* Level of a log line: what an operator wants to read afterwards. */
#define VMIG_LOG_DEBUG 4         /* Level of a log line: what a developer wants to read. */

/* A guest. Opaque. */
typedef struct vmig vmig;

/* A gate that vCPU threads go through. Opaque; see vmig_gate_new(). */
typedef struct vmig_gate vmig_gate;

/* A line of log. */
typedef struct vmig_log_record {
    /* sizeof(vmig_log_record) of the library: do not read members beyond it. */
    size_t size;
    /* One of VMIG_LOG_*. */
    uint32_t level;
    /* Kernel id of the thread. */
    uint32_t thread;
    /* CLOCK_MONOTONIC of this host, in nanoseconds. */
    uint64_t monotonic_ns;
    /* The part of the library that speaks: "outgoing", "incoming", "machine", "trace"; expect others. */
    const char *target;
    /* The line: no line end, no control characters, at most 1024 bytes. */
    const char *text;
} vmig_log_record;

/* What the library asks of the VMM.
 *
 * Start it with VMIG_SIZED(vmig_ops); a hook that is NULL is not given. The struct is copied. Every hook gets the
 * pointer `vm` that was given beside the struct. Hooks return 0 or more for success and a negative errno for failure;
 * they must not throw or longjmp. Except for `lock`, `unlock`, `held` and `log` they are called without the big lock. */
typedef struct vmig_ops {
    /* sizeof(vmig_ops) of the caller. 0 or less than the first two hooks is -EINVAL; more than the library knows is
     * -E2BIG unless the rest is zero. */
    size_t size;
    /* Required, unless `gate` is given. Return once no vCPU and no device runs and the last exit of each vCPU was handled.
     * On failure the guest must still run. Called on the thread that stops the guest: the caller of vmig_stop() or a
     * migration thread, never two at once and never when the guest is stopped already. Must not call vmig_stop() or
     * vmig_start() (-EDEADLK), nor wait for a thread that does. */
    int (*stop)(void *vm);
    /* Required, unless `gate` is given. Let the guest run. Fail only if it did not run a single instruction. Thread and
     * rules as for `stop`. */
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
     * Called without the big lock on a migration thread, or on one that limits a vCPU. Must not take that lock: who has
     * it may wait for the log. May wait for vCPUs, also for one in vmig_dirty_ring_full(). */
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
    /* The RAM block `name`, `len` bytes at `host`, shows other memory from now on: `fd` from `offset` on. Tell vhost,
     * vhost-user, VFIO and whoever else knows the memory by its file or its pages, and advise the kernel again (huge
     * pages, core dumps, locking: nothing of it holds for the new mapping). Optional. Called at the destination of
     * option `hand-over`, on a thread of the library, when the source's memory has taken the place of the block's own:
     * the source has let go of the guest, which is started next. A failure fails the migration: the guest goes on at the
     * source. The library then maps the block's own memory again and calls this once more for each block it was
     * called for, with the file given at registration. `fd` is the library's and open until the call returns: keep a
     * duplicate. Must not write to the memory, nor wait for the big lock's holder. */
    int (*ram_replaced)(void *vm, const char *name, void *host, uint64_t len, int fd, uint64_t offset);
    /* Give up what the guest holds besides its memory (disk locks, leases, addresses), which was acquired with `epoch`.
     * Optional, as the next two. Between two vmigs only. At the source: the guest is stopped and about to leave; what is
     * still to be written to a disk is written now. On failure half of it may be released: `reacquire` is called, and
     * the guest goes on here. At the destination: undoes `reacquire` after the guest did not come; on failure it is
     * called again, until `switchover-timeout`. Called on a migration thread. Must not wait for vmig_resolve(). */
    int (*release)(void *vm, uint64_t epoch);
    /* Acquire it with `epoch`, which is higher than any the guest had before: a lock that remembers the highest refuses
     * everybody who comes with a lower one. Must succeed for what was never released, and hold nothing when it fails.
     * At the destination: everything was loaded; on failure the guest goes on at the source. At the source: takes the
     * guest back; on failure it is called again, until `switchover-timeout`, then the state is `held`. Called on a
     * migration thread. Must not wait for vmig_resolve(). */
    int (*reacquire)(void *vm, uint64_t epoch);
    /* The destination was told to run the guest with `epoch`, and does not answer for `switchover-timeout`. Succeed only
     * if you know that it has not run and will not run the guest with that epoch: a destination that is dead now, but
     * ran the guest for a second, has written to its disks, and the memory here is older than they are. On success the
     * guest is taken back. On failure, and without this hook, the state is `switchover-unknown`. Called at the source,
     * on a migration thread. Must not wait for vmig_resolve(). */
    int (*fence)(void *vm, uint64_t epoch);
    /* A source is here and sent `len` bytes of configuration (its vmig_set_config()): build what it needs, and register
     * RAM, devices and KVM as usual, with the big lock. Optional; without it a configuration is ignored. Called at the
     * destination, on the thread `incoming`, before both sides compare what they have; for the length of the call
     * registering does not fail with -EBUSY. A failure refuses the source, which is told. What was registered stays if the
     * migration fails afterwards: the next source's configuration comes to a VMM that has it. `blob` is the library's,
     * valid during the call, and comes from the network: believe nothing in it. */
    int (*config)(void *vm, const void *blob, size_t len);
    /* The gate the vCPU threads go through. Optional: the library then closes it to stop the guest, and afterwards calls
     * `stop`, if given, for devices that run by themselves; to start, it calls `start`, if given, and opens the gate. It
     * keeps the gate, so that the handle may be freed before the guest. */
    vmig_gate *gate;
    /* Have the guest's vCPUs stand still for `percent` (0 to 99) of the time, so that it dirties less memory than the link
     * can send; 0: no longer. Optional: without it the gate does it, and without either option `auto-converge` is refused.
     * Called on a migration thread. */
    int (*throttle)(void *vm, uint32_t percent);
    /* Take one line of log with all that is known of it; comes instead of `log`. Optional. The record and what it leads to
     * are valid during the call. Threads and rules as for `log`. */
    void (*log_record)(void *vm, const vmig_log_record *record);
} vmig_ops;

/* What a run-state handler is told: one of VMIG_PREPARE_STOP, VMIG_STOPPED, VMIG_PREPARE_START, VMIG_STARTING.
 * Later versions may add more; return 0 for those you do not know. */
typedef uint32_t vmig_phase;

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

/* Makes a guest from the VMM's hooks and stores its handle in `*out`. [any]
 *
 * Whether the guest runs is up to the VMM at first. Let it run for the first time with vmig_start(), or start it by
 * other means: the library then finds out by stopping it, and calls the stop hook either way. From there on
 * vmig_stop() and vmig_start() are the way to pause and resume it. Before a guest arrives from elsewhere
 * (vmig_incoming()) it must not have run here, or be stopped.
 *
 * Fails with -EINVAL if a required hook is missing; then nothing was made, and `destroy` is not called. */
int vmig_new(const vmig_ops *ops, void *vm, vmig **out);

/* Ends a migration that runs, waits for the library's threads, forgets everything that was registered (every
 * `destroy` is called, that of vmig_ops last) and frees the guest. NULL is fine. [free]
 *
 * A migration whose guest was handed over already is not ended but waited for, at most for `switchover-timeout` (towards a
 * QEMU `stall-timeout`); in the states `switchover-unknown` and `held` nothing is decided. Waits, without a limit, for a
 * vCPU that is still inside KVM_RUN although the stop hook returned. Not from a callback. With the big lock held, or from
 * a command of QMP, it does nothing, which vmig_errmsg() says. The guest itself is not stopped or started. */
void vmig_free(vmig *m);

/* Version of the library at run time: major << 16 | minor << 8 | patch. [any][cb] */
uint32_t vmig_version(void);

/* Why this thread's last failed call failed, in a sentence; empty if none failed yet. Stays the library's, valid
 * until the thread's next failure. [any][cb] */
const char *vmig_errmsg(void);

/* Frees a string the library returned as `char *`. NULL is fine. [any][cb] */
void vmig_string_free(char *text);

/* Name and kernel thread id of each of the library's threads that run for this guest, as JSON:
 * [{"name": "live_migration", "thread-id": 1234}]. Free it with vmig_string_free(). NULL on failure. [any][cb] */
char *vmig_get_threads(vmig *m);

/* ---- 2. the big lock and the run state ------------------------------------------------------------------------- */
/* One big lock per guest, like QEMU's BQL, and one run state. The library holds the big lock while it calls device
 * callbacks and run-state handlers, never while it waits for a peer. It is fair (first come, first served) and not
 * recursive. The run state is a set of reasons to be stopped: a user's pause, a migration that switches over, an
 * error, a guest that is not here. The guest runs if there is none. */

#define VMIG_STOPPED_BY_USER 1   /* The guest is paused by the user. Reason of vmig_get_stop_reasons(). */
#define VMIG_STOPPED_BY_MIGRATION 2 /* A migration is switching over. Reason of vmig_get_stop_reasons(). */
#define VMIG_STOPPED_BY_ERROR 4  /* The guest cannot go on. Reason of vmig_get_stop_reasons(). */

/* The guest is not here: it left, or did not arrive yet. Reason of vmig_get_stop_reasons(). */
#define VMIG_STOPPED_NOT_OWNER 8

/* How the big lock was used since the guest was made. Times in nanoseconds. */
typedef struct vmig_bql_stats {
    /* Size of the struct: VMIG_SIZED(vmig_bql_stats). */
    size_t size;
    /* How often it was taken. */
    uint64_t acquisitions;
    /* How often somebody had to wait for it. */
    uint64_t contended;
    /* Time threads waited for it, all together. */
    uint64_t wait_ns;
    /* Longest such wait. */
    uint64_t wait_max_ns;
    /* Time it was held, all together. */
    uint64_t hold_ns;
    /* Longest time it was held at a stretch. */
    uint64_t hold_max_ns;
} vmig_bql_stats;

/* Takes the big lock; waits for it. -EDEADLK if this thread has it already. [free] */
int vmig_bql_lock(vmig *m);

/* Gives the big lock up. -EPERM if this thread does not have it. [bql] */
int vmig_bql_unlock(vmig *m);

/* Does this thread have the big lock? Returns 1 if it has, 0 if not. [any][cb] */
int vmig_bql_held(vmig *m);

/* Gives the big lock up, sleeps until vmig_bql_wake() or for `timeout_ms` milliseconds (negative: for ever), and takes
 * it again. Returns 1 if woken, 0 if the time was up. -EPERM without the lock. [bql] */
int vmig_bql_wait(vmig *m,
                  int timeout_ms);

/* Wakes every thread that sleeps in vmig_bql_wait(). [any][cb] */
int vmig_bql_wake(vmig *m);

/* Fills `*stats` with how the big lock was used since the guest was made. [any][cb] */
int vmig_get_bql_stats(vmig *m, vmig_bql_stats *stats);

/* Pauses the guest for the user: calls the stop hook and the run-state handlers on this thread, unless it is stopped
 * already. A pause during a migration travels: the guest arrives paused. -EBUSY for the moment between the saving of
 * the run state and the handover; -EDEADLK from inside a hook or a handler. [free] */
int vmig_stop(vmig *m);

/* Takes the user's pause back, and runs the guest if nothing else keeps it stopped: calls the run-state handlers and
 * the start hook on this thread. -EPERM if the guest is not here (it left, or did not arrive yet); -EDEADLK from
 * inside a hook or a handler. [free] */
int vmig_start(vmig *m);

/* Returns why the guest is stopped, a sum of VMIG_STOPPED_...; 0: it runs (or was never started or stopped through the
 * library). [any][cb] */
int vmig_get_stop_reasons(vmig *m);

/* Nanoseconds the guest has run, over all hosts it lived on: the clock for timers of devices. Stands still while the
 * guest is stopped, and travels with it. 0 on failure. [any][cb] */
uint64_t vmig_clock_ns(vmig *m);

/* Adds a run-state handler and returns its id, which is positive. `destroy(opaque)`, if given, is called once it is
 * removed or the guest is freed, and not if this call fails. -EBUSY while the guest is being stopped or started.
 * [bql] */
int vmig_on_run(vmig *m, int priority, vmig_run_fn run, void *opaque, void (*destroy)(void *opaque));

/* Removes a run-state handler by its id; it is not called any more. -ENOENT: there is none; -EBUSY while the guest is
 * being stopped or started. [bql] */
int vmig_remove_on_run(vmig *m, int id);

/* ---- 3. guest RAM and dirty pages ------------------------------------------------------------------------------ */
/* Guest RAM is registered in blocks: contiguous pieces of this process's memory, known to both sides by name. Every
 * write to it must be seen by the library: the vCPUs' by KVM's dirty log or ring (vmig_use_kvm(), vmig_add_kvm_slot()),
 * or by vmig_dirty() on an emulator's store path, or by the kernel's write protection, which needs nothing of the VMM;
 * a device's by vmig_dirty() or a dirty source. Option `dirty-tracker` chooses; docs/dirty-tracking.md says what each
 * sees. */

/* Flag of a block: every write to it is reported with vmig_dirty(); no other tracking is needed. */
#define VMIG_RAM_MARKED 1

/* Flag of a block: its storage is seen by both sides (a file on shared storage); its bytes are not sent. */
#define VMIG_RAM_SHARED_STORAGE 2

/* Flag of a block: `fd` and `fd_offset` say which file in memory (memfd, shm, tmpfs, hugetlb) the block is a shared,
 * writable mapping of. With option `hand-over` on at both sides of a unix socket the file is handed over instead of the
 * bytes. When a guest arrives that way, the library maps its file over the block (hook `ram_replaced`). */
#define VMIG_RAM_FD 4

/* Flag of a dirty source: it reports every write to guest memory, not just those of a device. RAM then needs no other
 * tracker. */
#define VMIG_SOURCE_ALL_WRITES 1

/* A block of guest RAM. */
typedef struct vmig_ram {
    /* Size of the struct: VMIG_SIZED(vmig_ram). */
    size_t size;
    /* Name, the same on both sides; 1 to 255 printable bytes. Copied. */
    const char *name;
    /* Start in this process, page aligned (4096 bytes). Must stay mapped until the block is removed. */
    void *host;
    /* Length in bytes, a multiple of 4096, the same on both sides. */
    uint64_t len;
    /* Guest-physical address, a multiple of 4096. */
    uint64_t gpa;
    /* Sum of VMIG_RAM_... flags. */
    uint32_t flags;
    /* With VMIG_RAM_FD the file behind the block, open for reading and writing; else 0. Duplicated; the caller keeps
     * its own. */
    int fd;
    /* With VMIG_RAM_FD where in the file the block begins, in bytes; else 0. */
    uint64_t fd_offset;
} vmig_ram;

/* Pages of a RAM block as a bitmap: bit n of word n / 64 is page `first` + n, of 4096 bytes. */
typedef struct vmig_dirty_bitmap {
    /* sizeof(vmig_dirty_bitmap) of the library: do not read members beyond it. */
    size_t size;
    /* Name of the block. */
    const char *ram;
    /* Where page `first` is in this process. */
    void *host;
    /* First page of the block that the bitmap is about; a multiple of 64. */
    uint64_t first;
    /* How many pages. */
    uint64_t pages;
    /* One bit for each, in words of 64. */
    uint64_t *bits;
} vmig_dirty_bitmap;

/* A source of dirty pages: a device in another process (vhost-user), a device behind an IOMMU (VFIO), an emulator's own
 * log.
 *
 * The struct is copied. Callbacks run on a thread of the library without the big lock, one at a time for each source.
 * They return 0 or more, or a negative errno, which fails the migration with an error that names source and block; the
 * guest goes on. They may call the vmig functions marked `[cb]`, and must not wait for the big lock's holder. What the
 * library passes is valid during the call. With option `dispatch=manual` each call is a callback of its own for
 * vmig_dispatch(). */
typedef struct vmig_dirty_source {
    /* Size of the struct: VMIG_SIZED(vmig_dirty_source). */
    size_t size;
    /* Name for errors and the status, 1 to 255 printable bytes. Copied. */
    const char *name;
    /* Sum of VMIG_SOURCE_... flags. */
    uint64_t flags;
    /* A migration begins: from here on writes are to be noted. NULL: they always are. */
    int (*start)(void *opaque);
    /* Set the bits of pages of one block that were written since `start`, or since they were last reported; with `clear`,
     * since they were last cleared. All bits are zero before the call; called for each block, and once more when the
     * guest is stopped. Too many bits cost time, a missing one is silent loss. Bits beyond `pages` are refused. A source
     * forgets what it reports before the call returns; what is written afterwards is reported by the next call. Required. */
    int (*sync)(void *opaque, const vmig_dirty_bitmap *bitmap);
    /* Pages whose bits are set are about to be read: writes to them from here on are to be reported anew. All of them were
     * reported by the last `sync`. NULL: reporting them clears them. For sources whose clearing makes the guest wait. */
    int (*clear)(void *opaque, const vmig_dirty_bitmap *bitmap);
    /* The migration is over. Once for each `start` that succeeded. NULL: nothing to do. */
    void (*stop)(void *opaque);
    /* The last call, when the source was removed or the guest is freed; not if adding it failed. NULL: nothing to do. */
    void (*destroy)(void *opaque);
} vmig_dirty_source;

/* A KVM memory slot: the part of a RAM block that it shows to the guest. */
typedef struct vmig_kvm_slot {
    /* Size of the struct: VMIG_SIZED(vmig_kvm_slot). */
    size_t size;
    /* Number of the slot; bits 16 and up are the address space, as in KVM_SET_USER_MEMORY_REGION. */
    uint32_t slot;
    /* KVM_MEM_... flags the VMM gave the slot, without KVM_MEM_LOG_DIRTY_PAGES. */
    uint32_t flags;
    /* Name of the RAM block. */
    const char *ram;
    /* Where in the block the slot starts, in bytes. */
    uint64_t offset;
    /* Length in bytes. */
    uint64_t len;
    /* Guest-physical address of the slot. */
    uint64_t gpa;
} vmig_kvm_slot;

/* How fast a vCPU dirties memory, and may. Known while a migration runs with KVM's dirty rings, or a limit is set; 0
 * otherwise. */
typedef struct vmig_vcpu_dirt {
    /* Size of the struct: VMIG_SIZED(vmig_vcpu_dirt). */
    size_t size;
    /* Bytes per second it may dirty, by vmig_set_vcpu_dirty_limit() or a migration: the lower one. 0: no limit. */
    uint64_t limit;
    /* Bytes per second it dirtied in the last whole second. */
    uint64_t rate;
    /* Percent of that second in which it stood at its full ring because of its limit. */
    uint64_t throttle;
} vmig_vcpu_dirt;

/* Registers a block of guest RAM. -EEXIST if the name is taken or the memory overlaps another block's; -EBUSY while a
 * migration runs; -EINVAL, -EACCES or -EPERM if the block is not a mapping of the file it names by VMIG_RAM_FD, or of
 * one that cannot be handed over; the text says what differs. [bql] */
int vmig_add_ram(vmig *m, const vmig_ram *ram);

/* Forgets a block and its KVM slots; the memory is not used any more once this returns. -ENOENT: there is no such
 * block; -EBUSY while a migration runs. [bql] */
int vmig_remove_ram(vmig *m, const char *name);

/* `len` bytes of guest RAM at `host` (an address in this process) were written by something whose writes nobody else
 * sees: a device, or an emulated CPU. Call it after the write. Wait-free; costs one atomic operation per block and
 * word of 64 pages. Memory that is in no block is ignored. [any][cb] */
void vmig_dirty(vmig *m, const void *host, uint64_t len);

/* Adds something else that knows which pages were written (a vhost-user device, VFIO, an emulator's own log): it is asked
 * at every sync, and what it reports is sent as well. `opaque` is what its callbacks get, and its name for
 * vmig_remove_dirty_source(). -EEXIST: there is one with this pointer; -EBUSY while a migration runs. [bql] */
int vmig_add_dirty_source(vmig *m,
                          const vmig_dirty_source *source,
                          void *opaque);

/* Forgets a dirty source; no callback of it comes after this returned. -ENOENT: there is none with this pointer; -EBUSY
 * while a migration runs. [bql] */
int vmig_remove_dirty_source(vmig *m,
                             void *opaque);

/* Takes over the KVM side of the guest: vCPU, interrupt controller, PIT and clock state migrate as ready sections, and the
 * dirty log is read from KVM. The fds are duplicated; the caller keeps its own. vCPU i is `vcpu_fds[i]`, on both sides.
 * Switches on KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 for the VM, unless the VMM enabled KVM's dirty rings: these are then used
 * instead, see vmig_dirty_ring_full(); the VMM must not switch that capability on with them. -EEXIST the second time;
 * -ENOSYS on architectures that are not supported yet. [bql] */
int vmig_use_kvm(vmig *m,
                 int vm_fd,
                 const int *vcpu_fds,
                 size_t vcpus);

/* Registers a KVM memory slot, after vmig_use_kvm() and its RAM block. Several slots may show one block, from any
 * offset. While a migration runs the slot's dirty log is on: switched by the hook `log_dirty`, or, without that hook,
 * by the library itself, which sets the slot again with the values given here. Do not change or delete the slot while
 * a migration runs: that is noticed where KVM lets us, and fails the migration. When the guest left, the log stays on
 * (switching it off can take 20 ms a GiB) until a guest is to arrive, or vmig_free(). When it stayed, the log is switched
 * off just after the state says so: change or delete the slot behind vmig_remove_kvm_slot(), which waits for that.
 * -EBUSY while a migration runs. [bql] */
int vmig_add_kvm_slot(vmig *m,
                      const vmig_kvm_slot *slot);

/* vCPU `vcpu` (as vmig_use_kvm() was given them) left KVM_RUN with KVM_EXIT_DIRTY_RING_FULL: makes room in its dirty ring,
 * so that it can go on. Only for VMMs that enabled KVM_CAP_DIRTY_LOG_RING, before they made their first vCPU:
 * vmig_use_kvm() finds the rings and takes them over, and nobody else may then take from them. Call it for every such exit,
 * whether a migration runs or not, on the vCPU's thread. A vCPU beyond its dirty limit waits here, 10 ms at most: KVM then
 * says again that the ring is full, and the VMM's loop may look in between whether the guest is to pause. -EINVAL: there
 * are no rings, or no such vCPU. [any][cb] */
int vmig_dirty_ring_full(vmig *m,
                         unsigned int vcpu);

/* Limits how fast a vCPU dirties memory, in bytes per second; 0: no longer. `vcpu` -1: all of them. With a migration or
 * without one: writes are logged as long as there is a limit, and the limit stays until it is lifted. vCPUs below their
 * limit are not slowed down; one beyond it stands at its full ring, some milliseconds at a time, and is to be stopped with
 * a kick of its thread as ever. Slots that are added meanwhile are limited when a limit is set again. A migration may
 * limit them further (option `dirty-limit`), for as long as it runs. Hook `log_dirty` is called on this thread. -EINVAL:
 * there are no rings, or no such vCPU; -EBUSY: a migration is just beginning or ending. [free] */
int vmig_set_vcpu_dirty_limit(vmig *m,
                              int vcpu,
                              uint64_t bytes_per_second);

/* Fills `*out`. -EINVAL: there are no dirty rings, or no such vCPU. [any][cb] */
int vmig_get_vcpu_dirt(vmig *m, unsigned int vcpu, vmig_vcpu_dirt *out);

/* Forgets a KVM memory slot. -ENOENT: it is not registered; -EBUSY while a migration runs. [bql] */
int vmig_remove_kvm_slot(vmig *m, uint32_t slot);

/* ---- 4. device state ------------------------------------------------------------------------------------------- */
/* A device's state is declared once, as a table of its struct's members; the same table saves, loads, describes and is
 * compared with the other side's. The macros check each member's type where they are used. */

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

/* int; a file descriptor, -1 for none. It travels over a unix socket between two processes that use this library, and
 * only there: another transport refuses a device that has one, before the guest is stopped. What arrives is a new
 * descriptor of the same open file, close-on-exec, and the VMM's once the migration has succeeded; if it fails after the
 * device was loaded the library closes the descriptor and sets the member to -1, so use it no earlier than in a
 * run-state handler or the start hook. What the member held before is overwritten, not closed. The source's descriptor
 * stays open and its own. Not behind a pointer. */
#define VMIG_KIND_FD 15

/* Flag of a field: the member is a pointer to the elements, not the elements. It must not be NULL when there are
 * elements to save or to load; `pre_load` is the place to allocate. */
#define VMIG_FIELD_POINTER 1

/* Flag of a device: its state is sent at setup, while the guest still runs, and loaded before RAM. */
#define VMIG_DEVICE_EARLY 1

/* Flag of a device: loading it writes guest RAM (a callback of it does). Memory that is handed over by its file is
 * read-only until the guest has arrived, so such a device refuses option `hand-over`; and memory that differs from the
 * source's, option `verify`. */
#define VMIG_DEVICE_WRITES_RAM 2

/* Flag of a device: saved again where it was just loaded it has other bytes, because it has something that goes on by
 * itself, as a clock. Option `verify` then compares only the bytes that travelled. */
#define VMIG_DEVICE_VARIES 4

/* One field of a device's state. Write it with the VMIG_... macros, which check the member's type and fill in every
 * member; a field written by hand must be zero where nothing is given. */
typedef struct vmig_field {
    /* Name in errors and descriptions; unique in its table, at most 255 bytes. May be NULL for unused space. */
    const char *name;
    /* One of VMIG_KIND_... */
    uint32_t kind;
    /* First version of the table that has the field; 0: that of the last VMIG_SINCE before it, or 1. */
    uint32_t since;
    /* Offset of the member in its struct, in bytes. */
    size_t offset;
    /* Size of one element in memory, in bytes. For unused space: its size on the wire. */
    size_t width;
    /* Number of elements; with `count_field` the room there is, in elements. */
    size_t count;
    /* Table of one element, for VMIG_KIND_STRUCT. It is always read at the version it has now, because nothing on
     * the wire names it: to change a nested struct, add to the outer table or add a part. */
    const struct vmig_device *nested;
    /* Name of the integer field, earlier in the same table, that holds the number of elements; NULL: `count` it is. */
    const char *count_field;
    /* VMIG_FIELD_POINTER or 0. */
    uint32_t flags;
    /* Zero. */
    uint32_t reserved32;
    /* Zero. */
    size_t reserved[2];
} vmig_field;

/* The state of a kind of device: one table saves, loads, describes and compares.
 *
 * Everything here is copied when the device is added (strings, fields, nested tables, parts); the callbacks must stay
 * callable until the device is removed. Callbacks run on a thread of the library, big lock held. They get the pointer
 * given to vmig_add_device, or in a nested table a pointer to the element. They return 0, or a negative errno, which fails
 * the migration with an error that names device and callback; the guest goes on at the source. They must not wait, throw
 * or longjmp, nor call vmig functions other than those marked `[cb]`. */
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
    const vmig_field *fields;
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
    /* Sum of VMIG_DEVICE_... flags. Not of parts and nested tables. */
    uint32_t flags;
    /* Devices are saved in descending priority, then in the order they were added. Not of parts and nested tables. */
    int32_t priority;
} vmig_device;

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

/* Adds a device: the state at `dev`, described by `kind`. `instance` tells apart devices of one name, the same on both
 * sides. Every device says what it has: a table, none (`fields` NULL), or a reason not to migrate (vmig_block()).
 * -EEXIST: name and instance are taken; -EBUSY while a migration runs. [bql] */
int vmig_add_device(vmig *m,
                    const vmig_device *kind,
                    uint32_t instance,
                    void *dev);

/* Removes every device and section added with the pointer `dev`. -ENOENT: there is none; -EBUSY while a migration
 * runs. [bql] */
int vmig_remove_device(vmig *m, void *dev);

/* Adds a reason not to migrate and returns its id, which is positive. Until it is taken back vmig_outgoing() and
 * vmig_incoming() fail with -EBUSY and all reasons. `reason` is for people and says what cannot be migrated and why.
 * [any][cb] */
int vmig_block(vmig *m, const char *reason);

/* Takes a reason not to migrate back, by its id. -ENOENT: there is none. [any][cb] */
int vmig_unblock(vmig *m, int id);

/* ---- 5. migrating ---------------------------------------------------------------------------------------------- */
/* A migration is started on both sides, runs on threads of the library, and is watched by polling, by an eventfd, or by
 * waiting. Destination first: vmig_incoming() listens; then vmig_outgoing() at the source. */

#define VMIG_STATE_NONE 0        /* No migration yet. */
#define VMIG_STATE_SETUP 1       /* Connecting or listening, and preparing. */
#define VMIG_STATE_CANCELLING 2  /* A cancel is being carried out. */
#define VMIG_STATE_CANCELLED 3   /* Ended by a cancel; the guest runs on at the source. */
#define VMIG_STATE_ACTIVE 4      /* Data moves; at the source the guest runs. */
#define VMIG_STATE_DEVICE 5      /* The guest is stopped; devices and the last pages move. */

/* Ended well: the guest is at the destination. At the source its memory may be freed or used for another. */
#define VMIG_STATE_COMPLETED 6

/* Ended by an error (vmig_get_error()). At the source the guest runs on; at the destination nothing of it is left in
 * the memory that was written. */
#define VMIG_STATE_FAILED 7

/* At the source: the guest was handed over and the destination's answer got lost; it is asked again for
 * `switchover-timeout`, after which nobody but you can know where the guest runs. At the destination: the source was
 * lost before it said that the guest may run. Until this is decided the guest is stopped here. Find out, then call
 * vmig_resolve(); docs/switchover.md says what you must know. */
#define VMIG_STATE_SWITCHOVER_UNKNOWN 8

/* At the source, option `pause-before-switchover`: the guest is stopped and still owned here, until vmig_continue() or
 * vmig_cancel(). */
#define VMIG_STATE_PRE_SWITCHOVER 9

/* At the source: the guest runs nowhere, and could not be taken back because the `reacquire` hook fails. Call
 * vmig_resolve(). */
#define VMIG_STATE_HELD 10

/* Option `resume-timeout`: the connection broke, and both sides keep what they have. The guest runs on at the source,
 * which connects again and then goes on in state `active`; vmig_get_error() says what broke, or why the last try failed.
 * Give it another address with vmig_resume(), or end it with vmig_cancel(). */
#define VMIG_STATE_RECONNECTING 11

#define VMIG_DISCARD 0           /* This side gives the guest up. Argument of vmig_resolve(). */
#define VMIG_RUN 1               /* This side is to own the guest. Argument of vmig_resolve(). */
#define VMIG_SIDE_NONE 0         /* No migration yet. */
#define VMIG_SIDE_SOURCE 1       /* The guest leaves. */
#define VMIG_SIDE_DESTINATION 2  /* The guest arrives. */
#define VMIG_TRACKER_KVM_LOG 1   /* KVM's dirty log. */
#define VMIG_TRACKER_KVM_RING 2  /* KVM's dirty ring. */
#define VMIG_TRACKER_WRITE_PROTECT 4 /* The kernel's write protection, without KVM. */
#define VMIG_TRACKER_CALLBACK 8  /* The VMM: vmig_dirty() and dirty sources. */

/* Nobody: the guest is stopped before its memory is sent (option `dirty-tracker` is none). */
#define VMIG_TRACKER_NONE 16

/* Hashes of some pages, taken again: no tracker, next to no cost, but what is written seldom or in few places is not seen. */
#define VMIG_RATE_SAMPLING 0

#define VMIG_RATE_BITMAP 1       /* The trackers that option `dirty-tracker` chooses, switched on for the time. */
#define VMIG_RATE_RING 2         /* KVM's dirty rings, which the VMM enabled: each vCPU by itself, too. */
#define VMIG_RATE_NONE 0         /* Nothing was measured yet. */
#define VMIG_RATE_MEASURING 1    /* It is being measured. */
#define VMIG_RATE_MEASURED 2     /* It was measured. */
#define VMIG_RATE_FAILED 3       /* It could not be measured. */
#define VMIG_FORECAST_UNKNOWN 0  /* Nobody can say. */
#define VMIG_FORECAST_CONVERGES 1 /* The migration would come to its end. */
#define VMIG_FORECAST_DOES_NOT 2 /* It would go on for ever, or until `total-timeout`. */

/* Where the present (or last) migration stands. Amounts in bytes, rates in bytes per second, times in nanoseconds. */
typedef struct vmig_status {
    /* Size of the struct: VMIG_SIZED(vmig_status). */
    size_t size;
    /* One of VMIG_STATE_...; expect new values. */
    uint32_t state;
    /* One of VMIG_SIDE_... */
    uint32_t side;
    /* Round over the dirty pages; 1 is the first, over all pages. 0 at the destination. */
    uint64_t iteration;
    /* Guest RAM that migrates; blocks handed over by their file are not in it. */
    uint64_t total;
    /* Guest RAM that is left to send. */
    uint64_t remaining;
    /* Bytes sent or received. */
    uint64_t transferred;
    /* Pages sent or received whole. */
    uint64_t normal_pages;
    /* Pages of zeros, which travel as a few bytes. */
    uint64_t zero_pages;
    /* How fast the guest dirtied pages in the last round. */
    uint64_t dirty_rate;
    /* How fast bytes went in the last 100 ms. */
    uint64_t bandwidth;
    /* Since the migration was started; final once it ended. */
    uint64_t elapsed;
    /* Until data began to move. */
    uint64_t setup;
    /* How long the guest would be stopped if it were stopped now. */
    uint64_t expected_downtime;
    /* What the stop hook and the run-state handlers took. */
    uint64_t stop;
    /* How long the guest was stopped: from the stop hook's call to the destination's answer. */
    uint64_t downtime;
    /* Until completion, at the present rates; UINT64_MAX while the guest dirties faster than the link sends, or
     * nothing is known yet. */
    uint64_t eta;
    /* Percent of the time the source's vCPUs are made to stand still (option `auto-converge`). */
    uint64_t throttle;
    /* Sum of VMIG_TRACKER_...: who finds the pages that are written, of the last migration from here. 0 until there is
     * one, and in a destination. vmig_get(m, "dirty-tracker-in-use") names RAM blocks, too. */
    uint64_t trackers;
    /* Bytes per second that each vCPU may dirty, by this migration (option `dirty-limit`, or the ladder); 0: no limit. */
    uint64_t dirty_limit;
    /* How long the guest may be stopped: option `downtime-limit`, or longer by the ladder. */
    uint64_t downtime_limit;
    /* Steps of the ladder that were taken (option `ladder`). */
    uint64_t ladder;
} vmig_status;

/* How long a guest stands still at the switchover, in nanoseconds: the parts in their order, and all of it. */
typedef struct vmig_downtime {
    /* Size of the struct: VMIG_SIZED(vmig_downtime). */
    size_t size;
    /* The stop hook and the run-state handlers. */
    uint64_t stop;
    /* Saving device state, and sending it. */
    uint64_t devices;
    /* The last harvest of dirty pages. */
    uint64_t sync;
    /* Sending these pages. */
    uint64_t ram;
    /* From the last byte to the destination's word that it loaded everything. */
    uint64_t load;
    /* The destination's run-state handlers and start hook; 0 if it did not tell (a QEMU does not), or was not to start. */
    uint64_t start;
    /* Measured: from the stop hook's call to the destination's last word. Predicted: the sum of the parts. */
    uint64_t total;
    /* What of the total none of the parts accounts for. */
    uint64_t unexplained;
    /* With option `verify`: hashing and comparing everything, and hashing memory again. Predicted: twice what hashing
     * took while the guest still ran, and a round trip. Part of the total. */
    uint64_t verify;
    /* Between two vmigs: GO on its way to the destination and the answer on its way back, a round trip. Part of the total. */
    uint64_t go;
} vmig_downtime;

/* What vmig_check() measured. Times in nanoseconds. */
typedef struct vmig_check_report {
    /* Size of the struct: VMIG_SIZED(vmig_check_report). */
    size_t size;
    /* Time to connect. */
    uint64_t connect;
    /* From the hello to its answer: a round trip and the comparison. */
    uint64_t hello;
    /* The comparison at the destination. */
    uint64_t compare;
    /* Saving the devices that can be saved while the guest runs, all together, with the big lock held. */
    uint64_t devices;
    /* Bytes of their state. */
    uint64_t device_bytes;
    /* How many devices these were. */
    uint32_t devices_timed;
    /* How many could not be tried, because only a stopped guest's can be saved: tables with callbacks or descriptors,
     * custom sections, vCPUs and other state of KVM. */
    uint32_t devices_untimed;
    /* What the stop hook and the run-state handlers took when the guest was stopped here last; 0: it never was. */
    uint64_t stop;
    /* The same for the last start. */
    uint64_t start;
} vmig_check_report;

/* How fast the guest dirties its memory. Zeros where nothing was measured. */
typedef struct vmig_dirty_rate {
    /* Size of the struct: VMIG_SIZED(vmig_dirty_rate). */
    size_t size;
    /* Where it stands: VMIG_RATE_NONE, ... */
    uint32_t state;
    /* How: VMIG_RATE_SAMPLING, ... */
    uint32_t mode;
    /* For how long, in milliseconds. */
    uint64_t period_ms;
    /* Pages sampled of each GiB; 0 in the other modes. */
    uint64_t sample_pages;
    /* When it began, in nanoseconds of CLOCK_MONOTONIC. */
    uint64_t began;
    /* Bytes per second that become dirty while all memory is clean: what a page written twice adds is not counted. */
    uint64_t rate;
    /* Distinct bytes dirtied in the whole time. */
    uint64_t working_set;
    /* Bytes that would have to be sent first: what exists and is not zero. */
    uint64_t content;
    /* 1: the working set is all the guest goes round in, for nearly nothing new came in the second half of the time; 0: it
     * is larger, or not known. */
    uint32_t complete;
    /* 1: both halves of the time were alike; 0: the guest was not steady, and nothing can be forecast. */
    uint32_t steady;
    /* vCPUs whose rates vmig_get_vcpu_dirty_rates() tells; 0: no dirty rings. */
    uint64_t vcpus;
} vmig_dirty_rate;

/* What a migration would come to. Times in nanoseconds. */
typedef struct vmig_forecast_report {
    /* Size of the struct: VMIG_SIZED(vmig_forecast_report). */
    size_t size;
    /* Whether it would converge: VMIG_FORECAST_UNKNOWN, ... If that is unknown the numbers below are the best guess there
     * is, or 0. */
    uint32_t verdict;
    /* Percent by which the guest would be throttled at last (option `auto-converge`). */
    uint32_t throttle;
    /* From the beginning to the end; if it would not converge, until that was certain. */
    uint64_t total;
    /* Rounds while the guest runs. */
    uint64_t rounds;
    /* How long the guest would stand still; if it would not converge, how long it would have to. */
    uint64_t blackout;
    /* Bytes left when the guest would be stopped, or left again and again. */
    uint64_t left;
    /* Bytes sent altogether. */
    uint64_t sent;
} vmig_forecast_report;

/* Starts to migrate the guest to `uri` and returns at once; the thread `live_migration` does the work. [any]
 *
 * Where to:
 * - `tcp:HOST:PORT`: a socket; an IPv6 address stands in brackets; no host is loopback.
 * - `unix:PATH`, `vsock:CID:PORT`: a socket.
 * - `fd:NUMBER`: a connected socket, a pipe or a file the VMM opened. The library works on a duplicate; closing or not
 *   closing yours is up to you.
 * - `file:PATH` or `file:PATH,offset=BYTES`: a file, made if it is not there, cut off at the offset, and written from
 *   there on; what stands before is not touched. The offset may be 0x1000 or 10k.
 * - `exec:COMMAND`: the standard input of what `/bin/sh -c` runs.
 * - Anything that vmig_add_channel() added.
 *
 * Over pipes and files nothing comes back, so success means only that all bytes were written; of a command, that it took
 * them and ended with status 0. One that fails before it has everything fails the migration, with its status and what it
 * said on standard error; one that fails afterwards leaves `switchover-unknown`. Where option `return-path` is switched on
 * by name, what a command writes is read as a destination's answers, as over a socket. A command has its own process
 * group, no signal blocked, and no descriptors but its three; it is killed if it goes on for more than a second when it
 * is not wanted any more.
 *
 * -EINVAL: a URI that is not understood; -EBUSY: a migration runs, something blocks migration, or another thread is in
 * vmig_check(); -EPERM: the guest is not here. What happens later is in vmig_get_status() and vmig_get_error(). */
int vmig_outgoing(vmig *m,
                  const char *uri);

/* Listens at `uri` for a guest and returns at once; the thread `incoming` does the work. [free]
 *
 * URIs as for vmig_outgoing(). With TCP port 0 the system chooses one: read it from vmig_get(m, "listen-address"). A
 * unix socket can be connected to by its owner only. A file is read, and a command's standard output; if it ends with
 * another status than 0 within a second of its last byte the guest is not taken. Accepts one source. When the guest has
 * arrived it is started through the start hook, on the library's thread, unless it was paused at the source or option
 * `autostart` is off.
 *
 * If the migration is cancelled or fails before anything here was touched, the guest here is left as paused by the user,
 * and vmig_start() runs it. If it fails later nothing of either guest is left in the memory that was written.
 *
 * Where a guest arrived from another vmig the address is kept until vmig_free(), to answer a source that did not hear
 * so. Calling this again with the same address takes another guest in there.
 *
 * -EADDRINUSE and other errors of listening; -EINVAL: a URI that is not understood; -EBUSY: a migration runs,
 * something blocks migration, a guest runs here (vmig_stop() it) or is just being stopped or started, or another thread
 * is in vmig_check(). */
int vmig_incoming(vmig *m,
                  const char *uri);

/* Asks a migration that runs to end; the guest goes on at the source. Returns at once, and 0 also if none runs; the
 * state becomes `cancelled` when it has ended. -EBUSY once the guest was handed over, or if it is `held`.
 * [any][cb] */
int vmig_cancel(vmig *m);

/* At the source in state `reconnecting`: tries `uri`, an address where its destination can listen, next, at once, and stays
 * with it. It must lead to the same destination: another one refuses, and the tries go on until `resume-timeout` is over.
 * -EINVAL in any other state, at the destination, and for a URI that is not understood. [any][cb] */
int vmig_resume(vmig *m,
                const char *uri);

/* Goes on from the state `pre-switchover`. -EINVAL in any other state. [any][cb] */
int vmig_continue(vmig *m);

/* Ends the states `switchover-unknown` and `held`, and waits until that is done, at most for a hook and
 * `switchover-timeout`. [free]
 *
 * With `run` VMIG_RUN this side owns the guest, which goes on here unless it was paused: you know that it does not and
 * will not run on the other side. With VMIG_DISCARD this side gives it up: its memory may be freed. docs/switchover.md
 * says what you must have found out; nobody can check it, and if it is wrong two guests run. Where memory was handed
 * over (option `hand-over`) the destination may have it mapped still: be certain that its process is gone before you say
 * VMIG_RUN at the source.
 *
 * -EINVAL in any other state; -EALREADY: it was decided otherwise before this call; the hook's error if it could not be
 * done, and the state is what it was. */
int vmig_resolve(vmig *m,
                 int run);

/* Waits until no migration runs or `timeout_ms` milliseconds have passed; negative waits for ever. Returns 1 if none runs
 * (also if only vmig_resolve() leads on), 0 if the time was up. [free] */
int vmig_wait(vmig *m,
              int timeout_ms);

/* Fills `*status` with where the present (or last) migration stands. [any][cb] */
int vmig_get_status(vmig *m, vmig_status *status);

/* Fills `*downtime` with how long the guest stood still when it last left from here: of an earlier migration until the
 * present one has stopped the guest. [any][cb] */
int vmig_get_downtime(vmig *m,
                      vmig_downtime *downtime);

/* Fills `*downtime` with what was predicted just before that: pages by the bandwidth, stop and start by what they took
 * here the last time, devices by an earlier attempt. What was never measured counts as 0. [any][cb] */
int vmig_get_expected_downtime(vmig *m,
                               vmig_downtime *downtime);

/* Name of a state, such as "active"; "unknown" for numbers this library does not know. Stays the library's.
 * [any][cb] */
const char *vmig_state_name(uint32_t state);

/* Why the present (or last) migration failed, on whichever side, as JSON with the keys text, errno and, as far as known,
 * side (where it failed), phase, section, field, expected, got, option (whose time ran out, where errno is ETIMEDOUT),
 * byte (of the stream); `message` is all of it as one sentence. With `compares` true it is a difference between the two
 * sides: expected is what the source has, got what the destination has. NULL if there is no error. Free it with
 * vmig_string_free(). [any][cb] */
char *vmig_get_error(vmig *m);

/* Returns a descriptor that is readable while vmig_next_event() has news: for the VMM's main loop. Stays the library's;
 * do not read it, only poll it. [any][cb] */
int vmig_event_fd(vmig *m);

/* Takes the next piece of news, oldest first. Returns 1, and the status at that moment in `*status`, or 0 if there is
 * none. There is news at every change of state and at every iteration; the oldest of more than 256 are dropped. Option
 * `events` switches it off.
 * [any][cb] */
int vmig_next_event(vmig *m,
                    vmig_status *status);

/* Sets an option by name, such as "max-bandwidth" to "1G". docs/options.md lists them. -ENOENT: there is none of this
 * name; -EINVAL: not a value for it; -EBUSY: it cannot change while a migration runs. [any][cb] */
int vmig_set(vmig *m, const char *option, const char *value);

/* The value of an option as text; also of "listen-address", the URI at which vmig_incoming() listens, and of
 * "qmp-address", that of the last vmig_qmp_listen(). NULL on failure (vmig_errmsg()). Free it with vmig_string_free().
 * [any][cb] */
char *vmig_get(vmig *m,
               const char *option);

/* Asks the destination that listens at `uri` whether the guest could go there, and measures what a migration would wait
 * for. The guest here runs on undisturbed; the destination is not touched and waits on. Waits at most for
 * `connect-timeout` and `stall-timeout`.
 *
 * Returns how many differences there are, 0: none. Fills `*report` (NULL: not wanted), and stores in `*differences`
 * (NULL: not wanted) a JSON array of them, each as vmig_get_error() writes it; free it with vmig_string_free(). The
 * features, limits, RAM, devices and CPUs compared are those of vmig_outgoing(). A destination that would build itself
 * (vmig_ops.config) from a configuration given here is not asked to: then RAM, devices and CPUs are not compared. One more
 * in the list is a dirty tracker that would be refused here, with the reason (option `dirty-tracker`; the kernel or a sysctl
 * forbids write protection; nobody would see writes to a block). It is not started for this, so that a single block which
 * the kernel does not let it protect is found by vmig_outgoing() only.
 *
 * Run-state handlers and what only a stopped guest can save are not tried, because nothing is stopped for this: of them
 * the report has what the last stop and start took. CPUID, TSC and MSRs are compared if the guest was last started by
 * vmig_start() or is stopped: vCPUs that run cannot be looked at.
 *
 * -EBUSY: a migration runs here, another guest is arriving there, or something blocks migration; -ENOTSUP: nobody can be
 * asked at such an address (fd:, file:, exec:, or with peer=qemu); -EPERM: the guest is not here; also errors of
 * connecting. [free] */
int vmig_check(vmig *m,
               const char *uri,
               vmig_check_report *report,
               char **differences);

/* Sets what a destination's hook vmig_ops.config gets before both sides compare what they have: whatever it needs to
 * build itself. At most 1 MiB, copied; `len` 0 takes it back. Travels to a vmig only. -EBUSY while a migration runs.
 * [any] */
int vmig_set_config(vmig *m, const void *blob, size_t len);

/* Starts to measure, for `period_ms` milliseconds (50 to 60000), how fast the guest dirties its memory, and returns at once;
 * the thread `dirty_rate` does the work, while the guest runs. `sample_pages` (128 to 16384) of each GiB are sampled, 0: 512;
 * with other modes it is 0. Forgets what was measured before. docs/dirty-rate.md says what each mode sees and costs.
 *
 * While it is being measured nothing can be registered or removed (-EBUSY). A migration that begins ends it.
 *
 * -EINVAL: no such mode, time or number of samples, no tracker (option `dirty-tracker` is none), no dirty rings; -EBUSY: a
 * migration runs, or it is being measured; -EPERM: the guest is not here. [any][cb] */
int vmig_measure_dirty_rate(vmig *m,
                            uint32_t mode,
                            uint64_t period_ms,
                            uint64_t sample_pages);

/* Fills `*rate` with what was measured last, or is being measured. Stores in `*why` (NULL: not wanted) why it failed, or
 * NULL if it did not; free it with vmig_string_free(). [any][cb] */
int vmig_get_dirty_rate(vmig *m,
                        vmig_dirty_rate *rate,
                        char **why);

/* Stores in `rates` the bytes per second that each of the first `count` vCPUs made dirty, in the order of vmig_use_kvm(), and
 * returns how many vCPUs there are; 0: nothing was measured, or without dirty rings. Here a page that was written again
 * after its ring had been emptied counts again, so they are more than the working set tells. [any][cb] */
int vmig_get_vcpu_dirty_rates(vmig *m,
                              uint64_t *rates,
                              size_t count);

/* Works out what a migration would come to with the options as they are, if the way to the destination took `bandwidth`
 * bytes per second, from what was measured last (vmig_measure_dirty_rate()). Fills `*report`, and stores in `*why` (NULL: not
 * wanted) the reason in a sentence; free it with vmig_string_free(). Nothing is sent or stopped.
 *
 * `bandwidth` is what the way and both sides' memory take; options `max-bandwidth` and `avail-switchover-bandwidth` count
 * besides. 0: not known, then `max-bandwidth` is all there is. What the last stop, the last migration and the last
 * vmig_check() took is counted into the blackout; what was never measured is not. Iterative sections are not counted.
 * [any][cb] */
int vmig_forecast(vmig *m,
                  uint64_t bandwidth,
                  vmig_forecast_report *report,
                  char **why);

/* ---- 6. QMP ---------------------------------------------------------------------------------------------------- */
/* QMP, QEMU's control protocol: the operations above as JSON, so that tools and fleet managers that drive QEMU can drive
 * a VMM. A server on a socket on request, and a function for VMMs that have a socket of their own. docs/qmp.md lists the
 * commands. */

/* What a command of the VMM answers. Valid only during the callback that got it. */
typedef struct vmig_reply vmig_reply;

/* Carries out a command: `arguments` is a JSON object as the client sent it, `{}` if it sent none; nothing of it was
 * checked. Answer with vmig_reply_json(), or with vmig_reply_error(); without either the answer is `{}` for 0 or more,
 * and the words of the errno for a negative one. Runs on the library's thread `qmp_run`, or on that of a call of
 * vmig_qmp(), big lock not held; commands of all clients wait for one another, so it should not wait long. It may call
 * everything but vmig_free(). */
typedef int (*vmig_qmp_fn)(void *opaque, const char *arguments, vmig_reply *reply);

/* Carries out one request, such as {"execute": "query-migrate"}, and returns its answer, also where that is an error:
 * NULL only if `request` is no string of at most 256 KiB, or the big lock is held. No capabilities are negotiated, and
 * there are no events (vmig_next_event()) or descriptors. Free it with vmig_string_free(). [free] */
char *vmig_qmp(vmig *m,
               const char *request);

/* Serves QMP at `uri`, `unix:PATH` or `tcp:HOST:PORT`, until vmig_free(). A unix socket can be connected to by its owner
 * only; whoever reaches a TCP port may do everything, so give it an address that only operators reach. With port 0 the
 * system chooses one: read it from vmig_get(m, "qmp-address"). May be called at any time, for up to 8 addresses.
 *
 * Commands run on the thread `qmp_run`, one after the other: `stop` and `cont` call the hooks there.
 * -EADDRINUSE and other errors of listening; -EINVAL: a URI that is not understood. [any] */
int vmig_qmp_listen(vmig *m,
                    const char *uri);

/* Adds a command of the VMM's, such as `quit`, to those that clients may use. `destroy(opaque)`, if given, is called by
 * vmig_free(), and not if this call fails. -EEXIST: there is a command of that name; -EINVAL: a name has 1 to 64 letters,
 * digits, - and _. [any] */
int vmig_qmp_add(vmig *m,
                 const char *name,
                 vmig_qmp_fn run,
                 void *opaque,
                 void (*destroy)(void *opaque));

/* Answers a command of the VMM's with `json`, at most 256 KiB; the last call counts. -EINVAL: it is not JSON. [cb] of
 * the callback that got the reply. */
int vmig_reply_json(vmig_reply *reply,
                    const char *json);

/* Answers it with an error, in a sentence for people. [cb] of the callback that got the reply. */
int vmig_reply_error(vmig_reply *reply, const char *text);

/* ---- 7. a gate for vCPUs --------------------------------------------------------------------------------------- */
/* An optional helper for a VMM whose vCPU threads nobody can stop yet: each goes through a gate, which the library closes,
 * opens and narrows. Give it as vmig_ops.gate, and the hooks `stop` and `start` may be NULL.
 *
 *     while (vmig_gate_enter(gate, i, &run->immediate_exit) == 0) {
 *         ioctl(vcpu_fd, KVM_RUN, 0);              / * comes back with EINTR when the gate is closed * /
 *         handle_exit(run);                        / * still inside: a stopped guest has no exit left to handle * /
 *         vmig_gate_exit(gate, i);
 *     }
 *
 * The gate is closed at first, so threads may be started at once: vmig_start() lets them run. Whoever closes it sets the
 * byte, sends the signal, and waits until every vCPU is outside. Either of the two is enough where it makes the run come
 * back: KVM wants both, an interpreter looks at the byte. A vCPU that comes out often by itself needs neither. */

/* Flag of a gate: the library installs a handler for `signal` that does nothing, and takes it away with the gate. Without
 * this flag it installs none, and the VMM's must be there, without SA_RESTART. */
#define VMIG_GATE_INSTALL 1

/* What a gate is made of. */
typedef struct vmig_gate_config {
    /* Size of the struct: VMIG_SIZED(vmig_gate_config). */
    size_t size;
    /* vCPUs, 1 to 4096; they are numbered from 0. */
    uint32_t vcpus;
    /* Signal sent to the thread of a vCPU that is to come out; 0: none. */
    int signal;
    /* Sum of VMIG_GATE_... flags. */
    uint32_t flags;
    /* Milliseconds the vCPUs may take to come out; 0: 5000. */
    uint32_t timeout_ms;
} vmig_gate_config;

/* Makes a closed gate and stores its handle in `*out`. [any]
 *
 * -EINVAL: no such number of vCPUs or signal, unknown flags, or a signal without a handler and without VMIG_GATE_INSTALL;
 * -EBUSY: VMIG_GATE_INSTALL for a signal that has a handler. */
int vmig_gate_new(const vmig_gate_config *config,
                  vmig_gate **out);

/* Frees the handle; the gate itself lives as long as a guest has it. Its vCPU threads must have returned from
 * vmig_gate_enter() and vmig_gate_exit() for good; see vmig_gate_end(). NULL is fine. [any] */
void vmig_gate_free(vmig_gate *gate);

/* Called by the thread of vCPU `vcpu` before it runs the guest: waits while the gate is closed or the vCPU is throttled,
 * and returns 0 when it may run.
 *
 * `flag` (NULL: none) is set to 0 here and to 1 when the vCPU is to come out; `immediate_exit` of its kvm_run, for example.
 * It must stay valid until the gate was entered with another one, or freed. The run may come back without a reason.
 *
 * -ECANCELED after vmig_gate_end(): the thread is to return. -EINVAL: no such vCPU; -EBUSY: it is inside already.
 * The big lock must not be held: whoever closes the gate may have to wait for this thread. [free] */
int vmig_gate_enter(vmig_gate *g,
                    unsigned int vcpu,
                    uint8_t *flag);

/* Called by the same thread when it has handled what the run came back with. -EINVAL: the vCPU is not inside. [any] */
int vmig_gate_exit(vmig_gate *g, unsigned int vcpu);

/* Closes the gate, as the library does to stop the guest: returns when every vCPU is outside. For a VMM that stops its
 * guest by itself, or in a stop hook of its own; else vmig_stop() does it.
 *
 * -ETIMEDOUT: vCPUs did not come out in time; -ESRCH: the thread of one ended inside; -EDEADLK: called by a vCPU's own
 * thread from inside. The text names the first of them, and the gate is open then, as before. [free] */
int vmig_gate_close(vmig_gate *g);

/* Opens the gate, as the library does to start the guest. [free] */
int vmig_gate_open(vmig_gate *g);

/* Has each vCPU stand still for `percent` of the time, 1 to 99, in turns of at least 10 ms; 0: no longer. [any] */
int vmig_gate_throttle(vmig_gate *g, unsigned int percent);

/* Tells every vCPU's thread to come out, and has vmig_gate_enter() return -ECANCELED from now on: then the threads can be
 * joined. It waits for nobody and sends the signal once. A run that does not look at its byte and lets the signal in before
 * it sleeps may miss it: then call vmig_gate_close() before you join, which tells again until every vCPU is outside. [any] */
int vmig_gate_end(vmig_gate *g);

/* ---- 8. a VMM with one thread ---------------------------------------------------------------------------------- */
/* A VMM with one thread and a poll loop, an interpreter for example, sets option `dispatch` to `manual` before it
 * registers anything. From there on all its callbacks (hooks, run-state handlers, devices, sections, dirty sources,
 * commands of QMP, log) wait in a queue until the thread that made the handle calls vmig_dispatch(), and run there;
 * nothing of the VMM is touched by another thread, but for guest RAM, and for connections of its own: the callbacks of
 * vmig_channel_ops run on threads of the library as ever, several at a time, while the loop is busy, because pages go
 * through them. They must not touch what the one thread works with. The big lock does nothing then: that thread always
 * has it, and need not take it.
 *
 * Functions of the guest that are marked [bql] or [free], and vmig_outgoing(), are for that thread only (-EPERM
 * elsewhere); those of a gate are for vCPU threads as ever. Those marked [free] run what waits in the queue
 * themselves as long as they wait, so the loop need not run then; what clients of QMP ask of that thread (`migrate`,
 * `migrate-incoming`, `vmig-resolve`) is done in vmig_dispatch() and vmig_wait() only. From inside a callback they are
 * -EDEADLK, and so is vmig_outgoing(). Those that remove something run first what waits in the queue; from inside a
 * callback they are -EBUSY then. While the guest runs each callback costs a turn of the loop. From the stop hook to the
 * last device's state all is one callback. */

/* Runs the callbacks that wait, and returns how many. Call it when vmig_dispatch_fd() is readable, or whenever it suits:
 * often enough that no callback waits for `dispatch-timeout`, which would fail the migration. While the guest stands
 * still it waits for further ones for up to 50 ms.
 *
 * -EINVAL: option `dispatch` is not `manual`; -EPERM: not the thread that made the handle; -EDEADLK from inside a
 * callback. [free] */
int vmig_dispatch(vmig *m);

/* A descriptor that is readable while callbacks wait for vmig_dispatch(). Stays the library's; do not read it, only
 * poll it. -EINVAL: option `dispatch` is not `manual`. [any][cb] */
int vmig_dispatch_fd(vmig *m);

/* ---- 9. observing ---------------------------------------------------------------------------------------------- */
/* For people and machines that watch many guests: numbers in a form that monitoring systems read. The log is a hook of
 * vmig_ops, a trace of each migration is written with option `trace-file`, and tracepoints (USDT, provider `vmig`) are
 * in the library for bpftrace, perf and SystemTap: docs/tool.md. */

/* All numbers of the guest and its migrations in Prometheus' text format, for the VMM to serve. `labels` stands in every
 * line, to tell guests apart: name="value" with commas between, values escaped as that format wants them; NULL for
 * none. Free it with vmig_string_free(). NULL on failure: labels that make no sense. [any][cb] */
char *vmig_metrics(vmig *m,
                   const char *labels);

/* ---- 10. connections of your own ------------------------------------------------------------------------------- */
/* A VMM that has its own way to the other side adds it as a channel: callbacks that connect, listen, read and write.
 * From then on `scheme:address` is a URI like any other. c-examples/rdma.c does it for RDMA. */

/* Flag of a channel: several connections to one address are possible, so pages can travel on some of their own (option
 * `multifd`), and a source whose connection broke can ask what became of the guest. */
#define VMIG_CHANNEL_MANY 1

/* For `shutdown`: nothing more is written; the peer reads the end behind what was. */
#define VMIG_SHUT_WRITE 1

#define VMIG_SHUT_BOTH 2         /* For `shutdown`: nothing more is written or read. */

/* Callbacks of a kind of connection: reliable, in order, both ways, with an end in each direction, as TCP is.
 *
 * They are called on threads of the library, with option `dispatch=manual`, too, and without the big lock; `listen`, and
 * what vmig_check() needs, on the thread that called. They must not throw or longjmp. A `timeout_ms` is how long a call may
 * wait; 0 is not at all; the library never asks for more than 50, and looks at cancels and limits (options
 * `connect-timeout`, `stall-timeout`) between two calls: so no callback needs to know of these. What does not happen in
 * time is -EAGAIN (or -EINTR), after which the call is repeated; any other negative errno ends the connection and is part
 * of the migration's error.
 *
 * They may call the vmig functions marked `[cb]`. On one connection at most one `read` and one `write` run at a time, on
 * two threads; `shutdown` may come on a third while they run. `close` comes last, once, when no other call runs. The
 * struct is copied when the channel is added. */
typedef struct vmig_channel_ops {
    /* Size of the struct, in bytes: VMIG_SIZED(vmig_channel_ops). */
    size_t size;
    /* Sum of VMIG_CHANNEL_... flags. */
    uint32_t flags;
    /* 0. */
    uint32_t reserved;
    /* Connects to `address`, what follows the colon of the URI. `*conn` is NULL before the first call for a connection;
     * what is stored there is handed to the other callbacks. After -EAGAIN the call is repeated with what was stored;
     * after an error, or if it is not wanted any more, `close` is called with it, unless it is NULL. NULL: this side
     * can only listen. */
    int (*connect)(void *opaque, const char *address, int timeout_ms, void **conn);
    /* Listens at `address`, and stores what `accept` is called with. Called by vmig_incoming(), on its thread. NULL:
     * this side can only connect. */
    int (*listen)(void *opaque, const char *address, void **listener);
    /* Takes a connection and stores it in `*conn`. */
    int (*accept)(void *opaque, void *listener, int timeout_ms, void **conn);
    /* Listens no more. The last call with this listener; connections it gave go on. */
    void (*unlisten)(void *opaque, void *listener);
    /* Reads at least one byte and at most `len`, of which there is at least one, and returns how many; 0: the peer has
     * ended. `buf` may be guest memory. Required. */
    int64_t (*read)(void *opaque, void *conn, void *buf, size_t len, int timeout_ms);
    /* Writes at least one byte and at most `len`, of which there is at least one, and returns how many. `buf` may be
     * guest memory, which may change meanwhile; it is not to be used after the return. Required. */
    int64_t (*write)(void *opaque, void *conn, const void *buf, size_t len, int timeout_ms);
    /* Ends one direction, or both; `how` is VMIG_SHUT_WRITE or VMIG_SHUT_BOTH. Calls that wait in that direction must
     * come back, as they do anyway when their time is up. Does not wait. Required. */
    void (*shutdown)(void *opaque, void *conn, int how);
    /* Ends the connection, if it has not ended, and frees it. Required. */
    void (*close)(void *opaque, void *conn);
} vmig_channel_ops;

/* Adds a kind of connection: `scheme` is what stands before the colon of its URIs, up to 32 small letters, digits, `+`,
 * `-` and `.`, a letter first. It stays until vmig_free(), which calls `destroy(opaque)`, if given,
 * once, after every other callback. If this call fails `destroy` is not called.
 *
 * -EEXIST: there is such a scheme, or it is one of the library's own (tcp, unix, vsock, fd, exec, file); -EINVAL: not a
 * name for a scheme, or a required callback is missing. [any] */
int vmig_add_channel(vmig *m,
                     const char *scheme,
                     const vmig_channel_ops *ops,
                     void *opaque,
                     void (*destroy)(void *opaque));

/* ---- 11. full control: sections of your own -------------------------------------------------------------------- */
/* A device with much state sends it while the guest runs: its own callbacks write and read bodies in a format of its
 * own, which the library frames, so that a body read too short or too long is an error with a name and an offset. */

#define VMIG_PART_START 1        /* First body of an iterative section, from `setup`. */
#define VMIG_PART_ITERATE 2      /* Body sent while the guest runs, from `iterate`. */
#define VMIG_PART_END 3          /* Last body of an iterative section, from `complete`. */
#define VMIG_PART_FULL 4         /* Whole state in one body, from `complete` of a section that is not iterative. */

/* Flag of a section that is not iterative: it is sent at setup, while the guest still runs, and loaded before RAM. */
#define VMIG_SECTION_EARLY 1

/* Flag of a section: its `load` writes guest RAM. Memory that is handed over by its file is read-only until the guest
 * has arrived, so such a section refuses option `hand-over`. */
#define VMIG_SECTION_WRITES_RAM 2

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
 * The struct is copied when the section is added. All callbacks run on a thread of the library;
 * `[bql]` says the big lock is held, `[free]` that it is not. They return 0 or
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
    /* Sum of VMIG_SECTION_... flags. */
    uint32_t flags;
    /* Positive: takes part in this migration, 0: not. NULL: always. Source. `[bql]` or `[free]` */
    int (*is_active)(void *opaque);
    /* Positive: `iterate` is worth calling now, 0: not. NULL: always. Source. `[free]` */
    int (*is_active_iterate)(void *opaque);
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
    /* Writes the next body, about `budget` bytes at most; a body without a byte is not sent. Positive: nothing left for
     * now, 0: more to come. Source. `[free]` */
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
} vmig_section_ops;

/* Adds a section with a format of its own, for devices with much state that is sent while the guest runs. `name` is
 * the same on both sides; `version` is what is sent. `destroy(opaque)`, if given, is called once, after every other
 * callback, and not if this call fails. vmig_remove_device(m, opaque) removes the section. -EEXIST: name and instance
 * are taken; -EBUSY while a migration runs. [bql] */
int vmig_add_section(vmig *m,
                     const char *name,
                     uint32_t version,
                     const vmig_section_ops *ops,
                     void *opaque,
                     void (*destroy)(void *opaque));

/* Appends `len` bytes to the body. -EFBIG: it is longer than 1 GiB; -ENOMEM: no memory is left. The first error stays
 * and fails the body, so that results need not be checked one by one. Writers and readers work only in the callback
 * that got them. [cb] */
int vmig_put(vmig_writer *out, const void *bytes, size_t len);

/* Appends one byte; fails as vmig_put() does. [cb] */
int vmig_put_u8(vmig_writer *out, uint8_t value);

/* Appends two bytes, big-endian; fails as vmig_put() does. [cb] */
int vmig_put_u16(vmig_writer *out, uint16_t value);

/* Appends four bytes, big-endian; fails as vmig_put() does. [cb] */
int vmig_put_u32(vmig_writer *out, uint32_t value);

/* Appends eight bytes, big-endian; fails as vmig_put() does. [cb] */
int vmig_put_u64(vmig_writer *out, uint64_t value);

/* Fills `buf` with the next `len` bytes of the body. -EIO if there are fewer; `buf` is zero then, and the error stays
 * and fails the body. [cb] */
int vmig_get_bytes(vmig_reader *input, void *buf, size_t len);

/* The next byte; 0 after an error, which stays and fails the body. [cb] */
uint8_t vmig_get_u8(vmig_reader *input);

/* The next two bytes as a big-endian number; 0 after an error. [cb] */
uint16_t vmig_get_u16(vmig_reader *input);

/* The next four bytes as a big-endian number; 0 after an error. [cb] */
uint32_t vmig_get_u32(vmig_reader *input);

/* The next eight bytes as a big-endian number; 0 after an error. [cb] */
uint64_t vmig_get_u64(vmig_reader *input);

/* Bytes of the body that can still be read: those that were not read yet; 0 after an error, so that a loop over what is
 * left ends; 0 for NULL. [cb] */
size_t vmig_reader_left(vmig_reader *input);

/* ---- 12. testing your devices ---------------------------------------------------------------------------------- */
/* For the tests of a VMM: tries a registered device with everything a migration could do to it, and says what is wrong.
 * Nothing is stopped, sent or received, so a test needs a guest with two hooks and the device, and no second process. It is
 * in every build of the library, so that a device is tried with the code that will migrate it. */

/* Flag of a test: two saves of one state may differ, as those of a device with VMIG_DEVICE_VARIES. They are not compared. */
#define VMIG_TEST_VARIES 1

/* A member of a device's struct: VMIG_MEMBER(type, member). A list of them ends with VMIG_MEMBER_END. */
typedef struct vmig_member {
    /* Where it is in the struct, in bytes. */
    size_t offset;
    /* Its size; 0 ends a list. */
    size_t len;
} vmig_member;

/* What an earlier release saved, as `saved` of vmig_device_test got it. */
typedef struct vmig_sample {
    /* The bytes. NULL ends a list. */
    const void *bytes;
    /* How many; at most 256 MiB. */
    size_t len;
    /* Version of the device in that release. */
    uint32_t version;
    /* Zero. */
    uint32_t reserved;
} vmig_sample;

/* How vmig_test_device() tries a device. Start it with VMIG_SIZED(vmig_device_test); everything else is optional, and
 * each member makes the test find more. Callbacks run on the calling thread. */
typedef struct vmig_device_test {
    /* Size of the struct, in bytes: VMIG_SIZED(vmig_device_test). */
    size_t size;
    /* Of what is drawn where not every case is tried; 0: drawn as well. It is part of the log, and what was drawn once is
     * drawn again with it. */
    uint64_t seed;
    /* Truncations and bit flips tried, of each; 0: all for some KiB of state, and the fewer the more there is. */
    uint64_t cases;
    /* sizeof of the struct that the device's pointer leads to: its bytes are compared, too, so that a member is found
     * that is not in the table, and at the end they are what they were. 0: not looked at. Padding counts: allocate the
     * struct zeroed. */
    size_t memory;
    /* Members of it that are no state and may change when it is saved or loaded, ended by VMIG_MEMBER_END: caches,
     * statistics, and every pointer that `reset`, `pre_load`, `post_load` or `load` replaces, for an old one would be put
     * back. Pointers of the table's own VMIG_PTR_ rows need not be named. NULL: none. */
    const vmig_member *transient;
    /* What earlier releases saved, ended by one without bytes: each must load. For tables without VMIG_FD and sections
     * that are not iterative. NULL: none. */
    const vmig_sample *samples;
    /* Makes the device what it is when it was just switched on. What loading does not bring back afterwards is found:
     * give the device another state first. Without it a field that `load` forgets looks as if it had been loaded. Returns 0
     * or more, or a negative errno. `[bql]` */
    int (*reset)(void *dev);
    /* Called once with what the device was saved as, unless it is iterative: kept, it is a sample for later releases. */
    void (*saved)(void *opaque, uint32_t version, const void *bytes, size_t len);
    /* Takes a line of log, `level` being one of VMIG_LOG_*: ERROR for what is wrong, WARNING for what looks wrong or could
     * not be tried, INFO for each test that is over, DEBUG for each case that begins. The last of these is the case in
     * which a device crashed. Valid during the call. */
    void (*log)(void *opaque, int level, const char *line);
    /* What `saved` and `log` get. */
    void *opaque;
    /* Sum of VMIG_TEST_... flags. */
    uint32_t flags;
    /* Zero. */
    uint32_t reserved;
} vmig_device_test;

/* A row of vmig_device_test.transient, and the last one. */
#define VMIG_MEMBER(type, member) { offsetof(type, member), sizeof(((type *)0)->member) }
#define VMIG_MEMBER_END { 0, 0 }

/* Tries the device or section that was added with this name and instance. `how` NULL: with nothing but its callbacks.
 *
 * What is tried: that it is saved twice alike; that it takes what it was saved as, and is then saved alike, also after a
 * `reset`; that a state which is cut off or has a bit changed, anywhere, is refused or does no harm (the device takes it, can
 * be saved, takes that, and is saved alike); that versions it does not read are refused, and each it reads loads, made from
 * the fields it had then; its parts absent, present, of other versions, and one nobody knows; samples of earlier releases;
 * and that after each of its callbacks has failed once, and after vmig_put() has for lack of memory, it is as good as
 * before and the error names it. For what a device does in its own memory run this with AddressSanitizer: a device that
 * crashes is not caught, and the last DEBUG line of the log names the case. docs/devices-testing.md has more.
 *
 * Returns 0 if nothing is wrong. -EBADMSG: something is, the first such thing; vmig_errmsg() names the device, the test
 * and, where it applies, byte, bit and field, bytes counted from the start of what the device was saved as. Either way the
 * device is put back afterwards: loaded from what it was saved as at first, and its `memory` written as it was.
 *
 * Until it returns no other thread may use the device or add, remove or migrate anything; the guest must stand still.
 * -ENOENT: there is no such device; -EOPNOTSUPP: it is the library's own (KVM's); -EINVAL: its is_active says no; -EBUSY:
 * the guest runs (vmig_stop() it, or do not start it), or a migration does. [free] */
int vmig_test_device(vmig *m,
                     const char *name,
                     uint32_t instance,
                     const vmig_device_test *how);

#ifdef __cplusplus
}
#endif
#endif /* VMIG_H */
