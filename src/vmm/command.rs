//! Commands the VMM adds to the QMP server. The text of each item is what a C author reads in the header.
#![allow(unsafe_code, reason = "calls function pointers that came through the C door")]
#![allow(non_camel_case_types, reason = "these are the names in C")]

use std::ffi::{CString, c_char, c_int, c_void};

use super::adapter::{Opaque, check_return};
use crate::error::{Error, Result};

/// What a command of the VMM answers. Valid only during the callback that got it.
#[derive(Debug)]
pub struct vmig_reply {
    _private: [u8; 0],
}

/// Carries out a command: `arguments` is a JSON object as the client sent it, `{}` if it sent none; nothing of it was
/// checked. Answer with vmig_reply_json(), or with vmig_reply_error(); without either the answer is `{}` for 0 or more,
/// and the words of the errno for a negative one. Runs on the library's thread `qmp_run`, or on that of a call of
/// vmig_qmp(), big lock not held; commands of all clients wait for one another, so it should not wait long. It may call
/// everything but vmig_free().
pub type vmig_qmp_fn =
    Option<unsafe extern "C" fn(opaque: *mut c_void, arguments: *const c_char, reply: *mut vmig_reply) -> c_int>;

/// What a command answered so far.
#[derive(Debug, Default)]
pub struct Reply(Option<std::result::Result<serde_json::Value, String>>);

impl Reply {
    /// The result, as JSON.
    pub fn json(&mut self, text: &str) -> Result<()> {
        let value = serde_json::from_str(text).map_err(|e| Error::invalid(format!("the answer is not JSON: {e}")))?;
        self.0 = Some(Ok(value));
        Ok(())
    }

    /// The error, in words.
    pub fn error(&mut self, text: &str) {
        self.0 = Some(Err(text.to_owned()));
    }

    /// The reply behind a handle; none for NULL.
    ///
    /// # Safety
    /// `handle` is NULL or was given to a callback that has not returned yet, on the thread of which this is called.
    pub unsafe fn from_handle<'a>(handle: *mut vmig_reply) -> Option<&'a mut Self> {
        // SAFETY: the caller vouches for the handle, which was a `Reply` before.
        unsafe { handle.cast::<Self>().as_mut() }
    }
}

/// Somebody who carries out a command.
pub trait Command: Send + Sync {
    /// The result, as JSON, for arguments that are a JSON object.
    fn run(&self, arguments: &str) -> Result<serde_json::Value>;
}

/// A callback of C.
#[derive(Debug)]
pub struct CCommand {
    name: String,
    run: unsafe extern "C" fn(*mut c_void, *const c_char, *mut vmig_reply) -> c_int,
    opaque: Opaque,
    destroy: Option<unsafe extern "C" fn(*mut c_void)>,
}

impl CCommand {
    /// `destroy(opaque)` is called when this is dropped.
    ///
    /// # Safety
    /// `run` and `destroy` may be called with `opaque` as the header promises.
    pub unsafe fn new(
        name: &str,
        run: unsafe extern "C" fn(*mut c_void, *const c_char, *mut vmig_reply) -> c_int,
        opaque: *mut c_void,
        destroy: Option<unsafe extern "C" fn(*mut c_void)>,
    ) -> Self {
        Self { name: name.to_owned(), run, opaque: Opaque(opaque), destroy }
    }
}

impl Command for CCommand {
    fn run(&self, arguments: &str) -> Result<serde_json::Value> {
        let arguments = CString::new(arguments).map_err(|_| Error::invalid("the arguments contain NUL"))?;
        let mut reply = Reply::default();
        // SAFETY: the VMM's own function and pointer, called as the header promises; text and reply outlive the call.
        let value = unsafe { (self.run)(self.opaque.0, arguments.as_ptr(), (&raw mut reply).cast()) };
        match (reply.0, check_return(&format!("command '{}'", self.name), value)) {
            (Some(Err(text)), Err(error)) => Err(Error::new(error.errno(), text)),
            (Some(Err(text)), Ok(_)) => Err(Error::new(libc::EIO, text)),
            (_, Err(error)) => Err(error),
            (Some(Ok(value)), Ok(_)) => Ok(value),
            (None, Ok(_)) => Ok(serde_json::json!({})),
        }
    }
}

impl Drop for CCommand {
    fn drop(&mut self) {
        if let Some(destroy) = self.destroy {
            // SAFETY: the VMM's own function and pointer; nobody else has this any more, so it is the last call.
            unsafe { destroy(self.opaque.0) };
        }
    }
}
