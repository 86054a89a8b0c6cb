//! The VMM's hooks as C sees them. The texts are the header's: its reader writes C and reads nothing else.
#![allow(non_camel_case_types, reason = "these are C names")]
#![allow(unsafe_code, reason = "declares which structs may be copied from C")]

use std::ffi::{c_char, c_int, c_void};

use crate::sys::sized::SizedStruct;

/// A gate that vCPU threads go through. Opaque; see vmig_gate_new().
#[derive(Debug)]
pub struct vmig_gate {
    _private: [u8; 0],
}

/// What the library asks of the VMM.
///
/// Start it with VMIG_SIZED(vmig_ops); a hook that is NULL is not given. The struct is copied. Every hook gets the
/// pointer `vm` that was given beside the struct. Hooks return 0 or more for success and a negative errno for failure;
/// they must not throw or longjmp. Except for `lock`, `unlock`, `held` and `log` they are called without the big lock.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_ops {
    /// sizeof(vmig_ops) of the caller. 0 or less than the first two hooks is -EINVAL; more than the library knows is
    /// -E2BIG unless the rest is zero.
    pub size: usize,
    /// Required, unless `gate` is given. Return once no vCPU and no device runs and the last exit of each vCPU was handled.
    /// On failure the guest must still run. Called on the thread that stops the guest: the caller of vmig_stop() or a
    /// migration thread, never two at once and never when the guest is stopped already. Must not call vmig_stop() or
    /// vmig_start() (-EDEADLK), nor wait for a thread that does.
    pub stop: Option<unsafe extern "C" fn(vm: *mut c_void) -> c_int>,
    /// Required, unless `gate` is given. Let the guest run. Fail only if it did not run a single instruction. Thread and
    /// rules as for `stop`.
    pub start: Option<unsafe extern "C" fn(vm: *mut c_void) -> c_int>,
    /// The VMM's own big lock; give `lock` and `unlock` or neither, then the library brings one. Wait until this
    /// thread has it. Any thread. Must not call the library.
    pub lock: Option<unsafe extern "C" fn(vm: *mut c_void)>,
    /// Give up the VMM's own big lock. On the thread that took it. Must not call the library.
    pub unlock: Option<unsafe extern "C" fn(vm: *mut c_void)>,
    /// Does this thread hold the VMM's own big lock? 1 yes, 0 no. Optional, and only with `lock`: without it the
    /// library knows only of threads that locked through vmig_bql_lock(). Any thread. Must not call the library.
    pub held: Option<unsafe extern "C" fn(vm: *mut c_void) -> c_int>,
    /// Switch KVM's dirty log of memory slot `slot` on (1) or off (0): KVM_SET_USER_MEMORY_REGION with or without
    /// KVM_MEM_LOG_DIRTY_PAGES. Optional: the flags of a slot are the VMM's, and only this hook may change them.
    /// Called without the big lock on a migration thread, or on one that limits a vCPU. Must not take that lock: who has
    /// it may wait for the log. May wait for vCPUs, also for one in vmig_dirty_ring_full().
    pub log_dirty: Option<unsafe extern "C" fn(vm: *mut c_void, slot: u32, on: c_int) -> c_int>,
    /// The guest lives on this host now: tell the network, for example by a gratuitous ARP. Optional. Called on a
    /// migration thread, after the guest was started.
    pub announce: Option<unsafe extern "C" fn(vm: *mut c_void)>,
    /// Take one line of log, `level` being one of VMIG_LOG_*. The line has no line end and no control characters, is at
    /// most 1024 bytes long and valid during the call. Optional; without it lines go to stderr. Any thread, several at
    /// once, the big lock held or not: must not wait for it and must not call the library, except vmig_bql_held().
    pub log: Option<unsafe extern "C" fn(vm: *mut c_void, level: c_int, line: *const c_char)>,
    /// The last call ever made with `vm`. Optional. Comes once if the guest was made, and never if that failed.
    pub destroy: Option<unsafe extern "C" fn(vm: *mut c_void)>,
    /// The RAM block `name`, `len` bytes at `host`, shows other memory from now on: `fd` from `offset` on. Tell vhost,
    /// vhost-user, VFIO and whoever else knows the memory by its file or its pages, and advise the kernel again (huge
    /// pages, core dumps, locking: nothing of it holds for the new mapping). Optional. Called at the destination of
    /// option `hand-over`, on a thread of the library, when the source's memory has taken the place of the block's own:
    /// the source has let go of the guest, which is started next. A failure fails the migration: the guest goes on at the
    /// source. The library then maps the block's own memory again and calls this once more for each block it was
    /// called for, with the file given at registration. `fd` is the library's and open until the call returns: keep a
    /// duplicate. Must not write to the memory, nor wait for the big lock's holder.
    pub ram_replaced: Option<
        unsafe extern "C" fn(
            vm: *mut c_void,
            name: *const c_char,
            host: *mut c_void,
            len: u64,
            fd: c_int,
            offset: u64,
        ) -> c_int,
    >,
    /// Give up what the guest holds besides its memory (disk locks, leases, addresses), which was acquired with `epoch`.
    /// Optional, as the next two. Between two vmigs only. At the source: the guest is stopped and about to leave; what is
    /// still to be written to a disk is written now. On failure half of it may be released: `reacquire` is called, and
    /// the guest goes on here. At the destination: undoes `reacquire` after the guest did not come; on failure it is
    /// called again, until `switchover-timeout`. Called on a migration thread. Must not wait for vmig_resolve().
    pub release: Option<unsafe extern "C" fn(vm: *mut c_void, epoch: u64) -> c_int>,
    /// Acquire it with `epoch`, which is higher than any the guest had before: a lock that remembers the highest refuses
    /// everybody who comes with a lower one. Must succeed for what was never released, and hold nothing when it fails.
    /// At the destination: everything was loaded; on failure the guest goes on at the source. At the source: takes the
    /// guest back; on failure it is called again, until `switchover-timeout`, then the state is `held`. Called on a
    /// migration thread. Must not wait for vmig_resolve().
    pub reacquire: Option<unsafe extern "C" fn(vm: *mut c_void, epoch: u64) -> c_int>,
    /// The destination was told to run the guest with `epoch`, and does not answer for `switchover-timeout`. Succeed only
    /// if you know that it has not run and will not run the guest with that epoch: a destination that is dead now, but
    /// ran the guest for a second, has written to its disks, and the memory here is older than they are. On success the
    /// guest is taken back. On failure, and without this hook, the state is `switchover-unknown`. Called at the source,
    /// on a migration thread. Must not wait for vmig_resolve().
    pub fence: Option<unsafe extern "C" fn(vm: *mut c_void, epoch: u64) -> c_int>,
    /// A source is here and sent `len` bytes of configuration (its vmig_set_config()): build what it needs, and register
    /// RAM, devices and KVM as usual, with the big lock. Optional; without it a configuration is ignored. Called at the
    /// destination, on the thread `incoming`, before both sides compare what they have; for the length of the call
    /// registering does not fail with -EBUSY. A failure refuses the source, which is told. What was registered stays if the
    /// migration fails afterwards: the next source's configuration comes to a VMM that has it. `blob` is the library's,
    /// valid during the call, and comes from the network: believe nothing in it.
    pub config: Option<unsafe extern "C" fn(vm: *mut c_void, blob: *const c_void, len: usize) -> c_int>,
    /// The gate the vCPU threads go through. Optional: the library then closes it to stop the guest, and afterwards calls
    /// `stop`, if given, for devices that run by themselves; to start, it calls `start`, if given, and opens the gate. It
    /// keeps the gate, so that the handle may be freed before the guest.
    pub gate: *mut vmig_gate,
    /// Have the guest's vCPUs stand still for `percent` (0 to 99) of the time, so that it dirties less memory than the link
    /// can send; 0: no longer. Optional: without it the gate does it, and without either option `auto-converge` is refused.
    /// Called on a migration thread.
    pub throttle: Option<unsafe extern "C" fn(vm: *mut c_void, percent: u32) -> c_int>,
    /// Take one line of log with all that is known of it; comes instead of `log`. Optional. The record and what it leads to
    /// are valid during the call. Threads and rules as for `log`.
    pub log_record: Option<unsafe extern "C" fn(vm: *mut c_void, record: *const vmig_log_record)>,
}

// SAFETY: its only pointer to data, the gate, is followed once, when the struct is copied, and never afterwards.
unsafe impl Send for vmig_ops {}
// SAFETY: as above.
unsafe impl Sync for vmig_ops {}
// SAFETY: repr(C), starts with its size, only pointer-sized members, and a null function pointer is None.
unsafe impl SizedStruct for vmig_ops {
    const NAME: &'static str = "vmig_ops";
    const REQUIRED: usize = std::mem::offset_of!(vmig_ops, lock);
}

/// A line of log.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_log_record {
    /// sizeof(vmig_log_record) of the library: do not read members beyond it.
    pub size: usize,
    /// One of VMIG_LOG_*.
    pub level: u32,
    /// Kernel id of the thread.
    pub thread: u32,
    /// CLOCK_MONOTONIC of this host, in nanoseconds.
    pub monotonic_ns: u64,
    /// The part of the library that speaks: "outgoing", "incoming", "machine", "trace"; expect others.
    pub target: *const c_char,
    /// The line: no line end, no control characters, at most 1024 bytes.
    pub text: *const c_char,
}

// SAFETY: repr(C), size first, integers and pointers without padding where both have 8 bytes; the library is 64-bit only.
unsafe impl SizedStruct for vmig_log_record {
    const NAME: &'static str = "vmig_log_record";
    const REQUIRED: usize = size_of::<vmig_log_record>();
}

/// Level of a log line: something failed.
pub const VMIG_LOG_ERROR: c_int = 1;
/// Level of a log line: something is odd, and went on.
pub const VMIG_LOG_WARNING: c_int = 2;
/// Level of a log line: what an operator wants to read afterwards.
pub const VMIG_LOG_INFO: c_int = 3;
/// Level of a log line: what a developer wants to read.
pub const VMIG_LOG_DEBUG: c_int = 4;

/// What a run-state handler is told: one of VMIG_PREPARE_STOP, VMIG_STOPPED, VMIG_PREPARE_START, VMIG_STARTING.
/// Later versions may add more; return 0 for those you do not know.
pub type vmig_phase = u32;

/// The guest has just stopped. Comes to every handler before any gets VMIG_STOPPED.
pub const VMIG_PREPARE_STOP: vmig_phase = 0;
/// The guest is stopped: what it may still find in its memory is written now.
pub const VMIG_STOPPED: vmig_phase = 1;
/// The guest is about to start; undoes VMIG_PREPARE_STOP. Comes to every handler before any gets VMIG_STARTING.
pub const VMIG_PREPARE_START: vmig_phase = 2;
/// The guest starts next; undoes VMIG_STOPPED.
pub const VMIG_STARTING: vmig_phase = 3;

/// A point in time, in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_moment {
    /// sizeof(vmig_moment) of the library: do not read members beyond it.
    pub size: usize,
    /// Wall clock, since 1970.
    pub wall_ns: u64,
    /// CLOCK_MONOTONIC of this host.
    pub monotonic_ns: u64,
}

// SAFETY: repr(C) integers of 8 bytes, size first, no padding where size_t has 8 bytes; the library is 64-bit only.
unsafe impl SizedStruct for vmig_moment {
    const NAME: &'static str = "vmig_moment";
    const REQUIRED: usize = size_of::<vmig_moment>();
}

/// A run-state handler. Called with the big lock held, on the thread that stops or starts the guest.
///
/// `at` is the time of the stop (just after the `stop` hook returned) or of the start (before the first handler), the
/// same for all handlers, and valid during the call. On a stop handlers are called in descending order of priority, on
/// a start in ascending order; of equal priority the one registered first is the last to stop and the first to start.
/// May write guest memory; what it writes at the stop migrates. Must not call vmig_stop() or vmig_start() (-EDEADLK),
/// nor add or remove run-state handlers (-EBUSY).
///
/// Returns 0 or more, or a negative errno. A failure at a stop fails the attempt: handlers that were told of the stop
/// are told of a start, and the guest runs on. A failure at a start leaves the guest stopped, and the handlers that
/// were told of the start are told of a stop. The handler that failed is not told to undo what it did not do.
pub type vmig_run_fn =
    Option<unsafe extern "C" fn(opaque: *mut c_void, phase: vmig_phase, at: *const vmig_moment) -> c_int>;
