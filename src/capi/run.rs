//! One big lock per guest, like QEMU's BQL, and one run state. The library holds the big lock while it calls device
//! callbacks and run-state handlers, never while it waits for a peer. It is fair (first come, first served) and not
//! recursive. The run state is a set of reasons to be stopped: a user's pause, a migration that switches over, an
//! error, a guest that is not here. The guest runs if there is none.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use super::guest::vmig;
use super::{enter, guest};
use crate::error::Error;
use crate::sys::sized::{SizedStruct, sized_fill};
use crate::vmm::StopReason;
use crate::vmm::ops::vmig_run_fn;

/// Takes the big lock; waits for it. -EDEADLK if this thread has it already. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_bql_lock(m: *mut vmig) -> c_int {
    enter("vmig_bql_lock", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.vmm().bql().lock().map(|()| 0)
    })
}

/// Gives the big lock up. -EPERM if this thread does not have it. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_bql_unlock(m: *mut vmig) -> c_int {
    enter("vmig_bql_unlock", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.vmm().bql().unlock().map(|()| 0)
    })
}

/// Does this thread have the big lock? Returns 1 if it has, 0 if not. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_bql_held(m: *mut vmig) -> c_int {
    enter("vmig_bql_held", || {
        // SAFETY: the C contract of handles.
        Ok(c_int::from(unsafe { guest(m) }?.vmm().bql().held()))
    })
}

/// Gives the big lock up, sleeps until vmig_bql_wake() or for `timeout_ms` milliseconds (negative: for ever), and takes
/// it again. Returns 1 if woken, 0 if the time was up. -EPERM without the lock. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_bql_wait(m: *mut vmig, timeout_ms: c_int) -> c_int {
    enter("vmig_bql_wait", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.bql_wait(time(timeout_ms)).map(c_int::from)
    })
}

/// Wakes every thread that sleeps in vmig_bql_wait(). \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_bql_wake(m: *mut vmig) -> c_int {
    enter("vmig_bql_wake", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.vmm().bql().wake_all();
        Ok(0)
    })
}

/// How the big lock was used since the guest was made. Times in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_bql_stats {
    /// Size of the struct: VMIG_SIZED(vmig_bql_stats).
    pub size: usize,
    /// How often it was taken.
    pub acquisitions: u64,
    /// How often somebody had to wait for it.
    pub contended: u64,
    /// Time threads waited for it, all together.
    pub wait_ns: u64,
    /// Longest such wait.
    pub wait_max_ns: u64,
    /// Time it was held, all together.
    pub hold_ns: u64,
    /// Longest time it was held at a stretch.
    pub hold_max_ns: u64,
}

// SAFETY: repr(C) integers of 8 bytes, size first, no padding.
unsafe impl SizedStruct for vmig_bql_stats {
    const NAME: &'static str = "vmig_bql_stats";
    const REQUIRED: usize = size_of::<usize>();
}

/// Fills `*stats` with how the big lock was used since the guest was made. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_bql_stats(m: *mut vmig, stats: *mut vmig_bql_stats) -> c_int {
    enter("vmig_get_bql_stats", || {
        // SAFETY: the C contract of handles.
        let now = unsafe { guest(m) }?.vmm().bql().stats();
        let all = vmig_bql_stats {
            size: size_of::<vmig_bql_stats>(),
            acquisitions: now.acquisitions,
            contended: now.contended,
            wait_ns: now.wait_total_ns,
            wait_max_ns: now.wait_max_ns,
            hold_ns: now.hold_total_ns,
            hold_max_ns: now.hold_max_ns,
        };
        // SAFETY: the C contract: NULL or a sized struct that can be written.
        unsafe { sized_fill(stats, &all) }.map(|()| 0)
    })
}

/// Pauses the guest for the user: calls the stop hook and the run-state handlers on this thread, unless it is stopped
/// already. A pause during a migration travels: the guest arrives paused. -EBUSY for the moment between the saving of
/// the run state and the handover; -EDEADLK from inside a hook or a handler. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_stop(m: *mut vmig) -> c_int {
    enter("vmig_stop", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.pause(true).map(|()| 0)
    })
}

/// Takes the user's pause back, and runs the guest if nothing else keeps it stopped: calls the run-state handlers and
/// the start hook on this thread. -EPERM if the guest is not here (it left, or did not arrive yet); -EDEADLK from
/// inside a hook or a handler. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_start(m: *mut vmig) -> c_int {
    enter("vmig_start", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.pause(false).map(|()| 0)
    })
}

/// The guest is paused by the user. Reason of vmig_get_stop_reasons().
pub const VMIG_STOPPED_BY_USER: c_int = 1;
/// A migration is switching over. Reason of vmig_get_stop_reasons().
pub const VMIG_STOPPED_BY_MIGRATION: c_int = 2;
/// The guest cannot go on. Reason of vmig_get_stop_reasons().
pub const VMIG_STOPPED_BY_ERROR: c_int = 4;
/// The guest is not here: it left, or did not arrive yet. Reason of vmig_get_stop_reasons().
pub const VMIG_STOPPED_NOT_OWNER: c_int = 8;

/// Returns why the guest is stopped, a sum of VMIG_STOPPED_...; 0: it runs (or was never started or stopped through the
/// library). \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_stop_reasons(m: *mut vmig) -> c_int {
    enter("vmig_get_stop_reasons", || {
        // SAFETY: the C contract of handles.
        let reasons = unsafe { guest(m) }?.vmm().reasons();
        let all = [
            (StopReason::User, VMIG_STOPPED_BY_USER),
            (StopReason::Migration, VMIG_STOPPED_BY_MIGRATION),
            (StopReason::Error, VMIG_STOPPED_BY_ERROR),
            (StopReason::NotOwner, VMIG_STOPPED_NOT_OWNER),
        ];
        Ok(all.iter().filter(|(reason, _)| reasons.contains(*reason)).map(|(_, bit)| bit).sum())
    })
}

/// Nanoseconds the guest has run, over all hosts it lived on: the clock for timers of devices. Stands still while the
/// guest is stopped, and travels with it. 0 on failure. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_clock_ns(m: *mut vmig) -> u64 {
    let mut now = 0;
    enter("vmig_clock_ns", || {
        // SAFETY: the C contract of handles.
        now = unsafe { guest(m) }?.vmm().clock_ns();
        Ok(0)
    });
    now
}

/// Adds a run-state handler and returns its id, which is positive. `destroy(opaque)`, if given, is called once it is
/// removed or the guest is freed, and not if this call fails. -EBUSY while the guest is being stopped or started.
/// \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_on_run(
    m: *mut vmig,
    priority: c_int,
    run: vmig_run_fn,
    opaque: *mut c_void,
    destroy: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
) -> c_int {
    enter("vmig_on_run", || {
        // SAFETY: the C contract of handles.
        let vmm = unsafe { guest(m) }?.vmm();
        vmm.bql().require_held("add a run-state handler")?;
        // SAFETY: the C contract: the callbacks accept opaque.
        let id = unsafe { vmm.add_c_handler(priority, run, opaque, destroy) }?;
        c_int::try_from(id).map_err(|_| Error::new(libc::ENOSPC, "no ids are left for run-state handlers"))
    })
}

/// Removes a run-state handler by its id; it is not called any more. -ENOENT: there is none; -EBUSY while the guest is
/// being stopped or started. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_remove_on_run(m: *mut vmig, id: c_int) -> c_int {
    enter("vmig_remove_on_run", || {
        // SAFETY: the C contract of handles.
        let vmm = unsafe { guest(m) }?.vmm();
        vmm.bql().require_held("remove a run-state handler")?;
        let id = u32::try_from(id).map_err(|_| Error::new(libc::ENOENT, "no run-state handler has this id"))?;
        vmm.remove_handler(id).map(|()| 0)
    })
}

/// A time limit of C: negative is none.
pub(super) fn time(timeout_ms: c_int) -> Option<Duration> {
    u64::try_from(timeout_ms).ok().map(Duration::from_millis)
}
