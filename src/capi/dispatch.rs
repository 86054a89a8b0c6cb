//! A VMM with one thread and a poll loop, an interpreter for example, sets option `dispatch` to `manual` before it
//! registers anything. From there on all its callbacks (hooks, run-state handlers, devices, sections, dirty sources,
//! commands of QMP, log) wait in a queue until the thread that made the handle calls vmig_dispatch(), and run there;
//! nothing of the VMM is touched by another thread, but for guest RAM, and for connections of its own: the callbacks of
//! vmig_channel_ops run on threads of the library as ever, several at a time, while the loop is busy, because pages go
//! through them. They must not touch what the one thread works with. The big lock does nothing then: that thread always
//! has it, and need not take it.
//!
//! Functions of the guest that are marked \[bql\] or \[free\], and vmig_outgoing(), are for that thread only (-EPERM
//! elsewhere); those of a gate are for vCPU threads as ever. Those marked \[free\] run what waits in the queue
//! themselves as long as they wait, so the loop need not run then; what clients of QMP ask of that thread (`migrate`,
//! `migrate-incoming`, `vmig-resolve`) is done in vmig_dispatch() and vmig_wait() only. From inside a callback they are
//! -EDEADLK, and so is vmig_outgoing(). Those that remove something run first what waits in the queue; from inside a
//! callback they are -EBUSY then. While the guest runs each callback costs a turn of the loop. From the stop hook to the
//! last device's state all is one callback.

use std::ffi::c_int;

use super::guest::vmig;
use super::{enter, guest};

/// Runs the callbacks that wait, and returns how many. Call it when vmig_dispatch_fd() is readable, or whenever it suits:
/// often enough that no callback waits for `dispatch-timeout`, which would fail the migration. While the guest stands
/// still it waits for further ones for up to 50 ms.
///
/// -EINVAL: option `dispatch` is not `manual`; -EPERM: not the thread that made the handle; -EDEADLK from inside a
/// callback. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_dispatch(m: *mut vmig) -> c_int {
    enter("vmig_dispatch", || {
        // SAFETY: the C contract of handles.
        let ran = unsafe { guest(m) }?.dispatch()?;
        Ok(c_int::try_from(ran).unwrap_or(c_int::MAX))
    })
}

/// A descriptor that is readable while callbacks wait for vmig_dispatch(). Stays the library's; do not read it, only
/// poll it. -EINVAL: option `dispatch` is not `manual`. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_dispatch_fd(m: *mut vmig) -> c_int {
    enter("vmig_dispatch_fd", || {
        // SAFETY: the C contract of handles.
        Ok(unsafe { guest(m) }?.dispatch_fd()?.raw())
    })
}
