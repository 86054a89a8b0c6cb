//! An optional helper for a VMM whose vCPU threads nobody can stop yet: each goes through a gate, which the library closes,
//! opens and narrows. Give it as vmig_ops.gate, and the hooks `stop` and `start` may be NULL.
//!
//!     while (vmig_gate_enter(gate, i, &run->immediate_exit) == 0) {
//!         ioctl(vcpu_fd, KVM_RUN, 0);              /* comes back with EINTR when the gate is closed */
//!         handle_exit(run);                        /* still inside: a stopped guest has no exit left to handle */
//!         vmig_gate_exit(gate, i);
//!     }
//!
//! The gate is closed at first, so threads may be started at once: vmig_start() lets them run. Whoever closes it sets the
//! byte, sends the signal, and waits until every vCPU is outside. Either of the two is enough where it makes the run come
//! back: KVM wants both, an interpreter looks at the byte. A vCPU that comes out often by itself needs neither.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;
use std::time::Duration;

use super::enter;
use crate::error::{Error, Result};
use crate::sys::sized::{SizedStruct, sized_copy};
use crate::vmm::gate::{Gate, Kick};
use crate::vmm::ops::vmig_gate;

/// Flag of a gate: the library installs a handler for `signal` that does nothing, and takes it away with the gate. Without
/// this flag it installs none, and the VMM's must be there, without SA_RESTART.
pub const VMIG_GATE_INSTALL: u32 = 1;

/// What a gate is made of.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_gate_config {
    /// Size of the struct: VMIG_SIZED(vmig_gate_config).
    pub size: usize,
    /// vCPUs, 1 to 4096; they are numbered from 0.
    pub vcpus: u32,
    /// Signal sent to the thread of a vCPU that is to come out; 0: none.
    pub signal: c_int,
    /// Sum of VMIG_GATE_... flags.
    pub flags: u32,
    /// Milliseconds the vCPUs may take to come out; 0: 5000.
    pub timeout_ms: u32,
}

// SAFETY: repr(C) integers, size first, no padding.
unsafe impl SizedStruct for vmig_gate_config {
    const NAME: &'static str = "vmig_gate_config";
    const REQUIRED: usize = std::mem::offset_of!(vmig_gate_config, signal);
}

/// The gate behind a handle.
///
/// # Safety
/// `g` is NULL or came from `vmig_gate_new` and was not freed yet.
unsafe fn gate<'a>(g: *const vmig_gate) -> Result<&'a Arc<Gate>> {
    // SAFETY: vmig_gate_new made the pointer from a Box<Arc<Gate>>, and the caller says that it still lives.
    unsafe { g.cast::<Arc<Gate>>().as_ref() }.ok_or_else(|| Error::invalid("the gate handle is NULL"))
}

/// Makes a closed gate and stores its handle in `*out`. \[any\]
///
/// -EINVAL: no such number of vCPUs or signal, unknown flags, or a signal without a handler and without VMIG_GATE_INSTALL;
/// -EBUSY: VMIG_GATE_INSTALL for a signal that has a handler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_new(config: *const vmig_gate_config, out: *mut *mut vmig_gate) -> c_int {
    enter("vmig_gate_new", || {
        if out.is_null() {
            return Err(Error::invalid("out is NULL"));
        }
        // SAFETY: the C contract: NULL or a sized struct.
        let config = unsafe { sized_copy(config) }?;
        if config.flags & !VMIG_GATE_INSTALL != 0 {
            return Err(Error::invalid(format!("unknown flags {:#x} of a gate", config.flags)));
        }
        let kick = Kick { signal: config.signal, install: config.flags & VMIG_GATE_INSTALL != 0 };
        let timeout = if config.timeout_ms == 0 { 5000 } else { config.timeout_ms };
        let vcpus = usize::try_from(config.vcpus).unwrap_or(usize::MAX);
        let gate = Gate::new(vcpus, kick, Duration::from_millis(u64::from(timeout)))?;
        // SAFETY: not NULL; the C contract says it can be written.
        unsafe { out.write(Box::into_raw(Box::new(gate)).cast()) };
        Ok(0)
    })
}

/// Frees the handle; the gate itself lives as long as a guest has it. Its vCPU threads must have returned from
/// vmig_gate_enter() and vmig_gate_exit() for good; see vmig_gate_end(). NULL is fine. \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_free(gate: *mut vmig_gate) {
    if !gate.is_null() {
        // SAFETY: the C contract: the handle came from vmig_gate_new, which made it from a Box, and is not used any more.
        let gate = unsafe { Box::from_raw(gate.cast::<Arc<Gate>>()) };
        // The thread that throttles may be about to write a flag, which need not be there after this.
        let _ = gate.throttle(0);
    }
}

/// Called by the thread of vCPU `vcpu` before it runs the guest: waits while the gate is closed or the vCPU is throttled,
/// and returns 0 when it may run.
///
/// `flag` (NULL: none) is set to 0 here and to 1 when the vCPU is to come out; `immediate_exit` of its kvm_run, for example.
/// It must stay valid until the gate was entered with another one, or freed. The run may come back without a reason.
///
/// -ECANCELED after vmig_gate_end(): the thread is to return. -EINVAL: no such vCPU; -EBUSY: it is inside already.
/// The big lock must not be held: whoever closes the gate may have to wait for this thread. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_enter(g: *mut vmig_gate, vcpu: c_uint, flag: *mut u8) -> c_int {
    enter("vmig_gate_enter", || {
        // SAFETY: the C contract of handles.
        let gate = unsafe { gate(g) }?;
        // SAFETY: the C contract of the flag.
        unsafe { gate.enter(usize::try_from(vcpu).unwrap_or(usize::MAX), flag) }.map(|()| 0)
    })
}

/// Called by the same thread when it has handled what the run came back with. -EINVAL: the vCPU is not inside. \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_exit(g: *mut vmig_gate, vcpu: c_uint) -> c_int {
    enter("vmig_gate_exit", || {
        // SAFETY: the C contract of handles.
        unsafe { gate(g) }?.exit(usize::try_from(vcpu).unwrap_or(usize::MAX)).map(|()| 0)
    })
}

/// Closes the gate, as the library does to stop the guest: returns when every vCPU is outside. For a VMM that stops its
/// guest by itself, or in a stop hook of its own; else vmig_stop() does it.
///
/// -ETIMEDOUT: vCPUs did not come out in time; -ESRCH: the thread of one ended inside; -EDEADLK: called by a vCPU's own
/// thread from inside. The text names the first of them, and the gate is open then, as before. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_close(g: *mut vmig_gate) -> c_int {
    enter("vmig_gate_close", || {
        // SAFETY: the C contract of handles.
        unsafe { gate(g) }?.close().map(|()| 0)
    })
}

/// Opens the gate, as the library does to start the guest. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_open(g: *mut vmig_gate) -> c_int {
    enter("vmig_gate_open", || {
        // SAFETY: the C contract of handles.
        unsafe { gate(g) }?.open();
        Ok(0)
    })
}

/// Has each vCPU stand still for `percent` of the time, 1 to 99, in turns of at least 10 ms; 0: no longer. \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_throttle(g: *mut vmig_gate, percent: c_uint) -> c_int {
    enter("vmig_gate_throttle", || {
        // SAFETY: the C contract of handles.
        unsafe { gate(g) }?.throttle(percent).map(|()| 0)
    })
}

/// Tells every vCPU's thread to come out, and has vmig_gate_enter() return -ECANCELED from now on: then the threads can be
/// joined. It waits for nobody and sends the signal once. A run that does not look at its byte and lets the signal in before
/// it sleeps may miss it: then call vmig_gate_close() before you join, which tells again until every vCPU is outside. \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_gate_end(g: *mut vmig_gate) -> c_int {
    enter("vmig_gate_end", || {
        // SAFETY: the C contract of handles.
        unsafe { gate(g) }?.end();
        Ok(0)
    })
}
