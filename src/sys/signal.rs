//! Signals to single threads, and the empty handler that a VMM may ask for.
#![allow(unsafe_code, reason = "system calls live here")]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr;

use crate::error::{Error, Result};

/// Sends a signal to a thread of this process. `ESRCH`: there is no such thread.
pub fn kill_thread(tid: i32, signal: c_int) -> Result<()> {
    // SAFETY: getpid takes no arguments and cannot fail.
    let pid = unsafe { libc::getpid() };
    // SAFETY: tgkill takes no pointers; the caller knows that the signal has a handler.
    if unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) } != 0 {
        return Err(Error::last_os(format_args!("sending signal {signal} to thread {tid}")));
    }
    Ok(())
}

/// Whether the signal has a handler, so that it interrupts system calls and does nothing worse. `EINVAL`: no signal.
pub fn has_handler(signal: c_int) -> Result<bool> {
    let mut now = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null second argument only asks; the third is room for the answer.
    if unsafe { libc::sigaction(signal, ptr::null(), now.as_mut_ptr()) } != 0 {
        return Err(Error::last_os(format_args!("asking for the handler of signal {signal}")));
    }
    // SAFETY: sigaction succeeded, so it filled the struct.
    let now = unsafe { now.assume_init() };
    Ok(!matches!(now.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN))
}

/// A handler that does nothing, for as long as this lives; then the signal is what it was.
pub struct EmptyHandler {
    signal: c_int,
    before: libc::sigaction,
}

extern "C" fn nothing(_: c_int) {}

impl EmptyHandler {
    /// Installs it. System calls are interrupted by the signal, not begun again.
    pub fn install(signal: c_int) -> Result<Self> {
        // SAFETY: a sigaction is numbers and a set, for all of which zero is a value.
        let mut empty = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
        empty.sa_sigaction = nothing as *const () as usize;
        let mut before = MaybeUninit::uninit();
        // SAFETY: both structs are live; the handler does nothing, so it may run anywhere.
        if unsafe { libc::sigaction(signal, &raw const empty, before.as_mut_ptr()) } != 0 {
            return Err(Error::last_os(format_args!("installing a handler for signal {signal}")));
        }
        // SAFETY: sigaction succeeded, so it filled the struct.
        Ok(Self { signal, before: unsafe { before.assume_init() } })
    }
}

impl Drop for EmptyHandler {
    fn drop(&mut self) {
        // SAFETY: the struct is the kernel's own answer. It fails only for a wrong signal, and this one was right.
        unsafe { libc::sigaction(self.signal, &raw const self.before, ptr::null_mut()) };
    }
}

impl std::fmt::Debug for EmptyHandler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EmptyHandler({})", self.signal)
    }
}

/// Sleeps until a signal was handled.
#[cfg(test)]
pub fn pause() {
    // SAFETY: pause takes no arguments.
    unsafe { libc::pause() };
}
