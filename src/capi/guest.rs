//! Everything begins with a guest: a handle made from the VMM's hooks, and the pointer they are called with. A process
//! may have several guests; they share nothing.

use std::ffi::{CString, c_char, c_int, c_void};

use super::{enter, face, guest};
use crate::error::{Error, last_message};
use crate::machine::{Machine, NEW_GUEST};
use crate::qmp::Qmp;
use crate::vmm::Vmm;
use crate::vmm::ops::vmig_ops;

/// A guest. Opaque.
#[derive(Debug)]
pub struct vmig {
    _private: [u8; 0],
}

/// Makes a guest from the VMM's hooks and stores its handle in `*out`. \[any\]
///
/// Whether the guest runs is up to the VMM at first. Let it run for the first time with vmig_start(), or start it by
/// other means: the library then finds out by stopping it, and calls the stop hook either way. From there on
/// vmig_stop() and vmig_start() are the way to pause and resume it. Before a guest arrives from elsewhere
/// (vmig_incoming()) it must not have run here, or be stopped.
///
/// Fails with -EINVAL if a required hook is missing; then nothing was made, and `destroy` is not called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_new(ops: *const vmig_ops, vm: *mut c_void, out: *mut *mut vmig) -> c_int {
    enter("vmig_new", || {
        if out.is_null() {
            return Err(Error::invalid("out is NULL"));
        }
        // SAFETY: the C contract: ops is NULL or a sized struct whose hooks accept vm.
        let vmm = unsafe { Vmm::from_c(ops, vm, NEW_GUEST) }?;
        let made = Box::new(Qmp::new(Machine::new(vmm)?));
        // SAFETY: not NULL; the C contract says it can be written.
        unsafe { out.write(Box::into_raw(made).cast()) };
        Ok(0)
    })
}

/// Ends a migration that runs, waits for the library's threads, forgets everything that was registered (every
/// `destroy` is called, that of vmig_ops last) and frees the guest. NULL is fine. \[free\]
///
/// A migration whose guest was handed over already is not ended but waited for, at most for `switchover-timeout` (towards a
/// QEMU `stall-timeout`); in the states `switchover-unknown` and `held` nothing is decided. Waits, without a limit, for a
/// vCPU that is still inside KVM_RUN although the stop hook returned. Not from a callback. With the big lock held, or from
/// a command of QMP, it does nothing, which vmig_errmsg() says. The guest itself is not stopped or started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_free(m: *mut vmig) {
    if m.is_null() {
        return;
    }
    enter("vmig_free", || {
        // Its threads may want the big lock before they end: to wait for them with it would be for ever.
        // SAFETY: the C contract of handles.
        let face = unsafe { face(m) }?;
        face.machine().vmm().bql().require_free("free the guest")?;
        face.check_not_inside()?;
        // SAFETY: the C contract: m came from vmig_new, which made it from a Box, and is not used any more.
        drop(unsafe { Box::from_raw(m.cast::<Qmp>()) });
        Ok(0)
    });
}

/// Version of the library at run time: major << 16 | minor << 8 | patch. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub extern "C" fn vmig_version() -> u32 {
    const fn number(digits: &str) -> u32 {
        let (mut value, mut i) = (0, 0);
        while i < digits.len() {
            value = value * 10 + (digits.as_bytes()[i] - b'0') as u32;
            i += 1;
        }
        value
    }
    const {
        number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
            | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
            | number(env!("CARGO_PKG_VERSION_PATCH"))
    }
}

/// Why this thread's last failed call failed, in a sentence; empty if none failed yet. Stays the library's, valid
/// until the thread's next failure. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub extern "C" fn vmig_errmsg() -> *const c_char {
    last_message()
}

/// Frees a string the library returned as `char *`. NULL is fine. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_string_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: the C contract: the string came from the library, which made it with into_raw.
        drop(unsafe { CString::from_raw(text) });
    }
}

/// Name and kernel thread id of each of the library's threads that run for this guest, as JSON:
/// [{"name": "live_migration", "thread-id": 1234}]. Free it with vmig_string_free(). NULL on failure. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_threads(m: *mut vmig) -> *mut c_char {
    super::enter_text("vmig_get_threads", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        let one = |(name, tid): (String, i32)| serde_json::json!({"name": name, "thread-id": tid});
        let list: Vec<serde_json::Value> = machine.threads().list().into_iter().map(one).collect();
        Ok(Some(serde_json::Value::from(list).to_string()))
    })
}
