//! The one place where the callbacks of a VMM's own connections are called.
#![allow(unsafe_code, reason = "calls function pointers that came through the C door")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::adapter::{Opaque, check_return};
use super::channel_ops::*;
use crate::error::{Error, Result, strerror};
use crate::sys::io::{Piece, Room};
use crate::sys::sized::sized_copy;
use crate::transport::custom::{Attempt, Entrance, Link, Scheme};

/// A scheme made of C callbacks. Its links and entrances share it, so `destroy` comes last.
#[derive(Debug)]
pub struct CScheme {
    name: String,
    ops: vmig_channel_ops,
    opaque: Opaque,
    destroy: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    /// Set once it was added: before that the pointer is still the caller's.
    ours: AtomicBool,
}

impl Drop for CScheme {
    fn drop(&mut self) {
        if let (true, Some(destroy)) = (*self.ours.get_mut(), self.destroy) {
            // SAFETY: the VMM's own function and pointer; this is the last owner, so no call is under way or to come.
            unsafe { destroy(self.opaque.0) };
        }
    }
}

impl CScheme {
    /// A scheme from the callbacks of C. Until [`Self::take`] the pointer stays the caller's.
    ///
    /// # Safety
    /// `ops` is NULL or leads to a `vmig_channel_ops`, whose callbacks accept `opaque` on any thread until `destroy`.
    pub unsafe fn new(
        name: &str,
        ops: *const vmig_channel_ops,
        opaque: *mut c_void,
        destroy: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
    ) -> Result<Self> {
        // SAFETY: the caller vouches for the pointer.
        let ops = unsafe { sized_copy(ops) }?;
        let missing = |what: &str| Error::invalid(format!("vmig_channel_ops.{what} is NULL"));
        let required = [
            (ops.read.is_some(), "read"),
            (ops.write.is_some(), "write"),
            (ops.shutdown.is_some(), "shutdown"),
            (ops.close.is_some(), "close"),
            (ops.connect.is_some() || ops.listen.is_some(), "connect, and listen too,"),
            (ops.listen.is_some() == ops.accept.is_some(), "one of listen and accept"),
            (ops.listen.is_some() == ops.unlisten.is_some(), "one of listen and unlisten"),
        ];
        if let Some((_, what)) = required.iter().find(|(given, _)| !given) {
            return Err(missing(what));
        }
        if ops.flags & !VMIG_CHANNEL_MANY != 0 || ops.reserved != 0 {
            let text =
                format!("vmig_channel_ops.flags ({:#x}) or reserved ({}) is not known", ops.flags, ops.reserved);
            return Err(Error::invalid(text));
        }
        let ours = AtomicBool::new(false);
        Ok(Self { name: name.to_owned(), ops, opaque: Opaque(opaque), destroy, ours })
    }

    /// From here on the pointer is ours.
    pub fn take(&self) {
        self.ours.store(true, Ordering::Release);
    }

    fn who(&self, callback: &str) -> String {
        format!("callback '{callback}' of channel '{}'", self.name)
    }

    /// What `connect` and `accept` return: done (true), or not yet.
    fn done(&self, callback: &str, value: c_int) -> Result<bool> {
        match value.checked_neg() {
            Some(libc::EAGAIN | libc::EINTR) => Ok(false),
            _ => check_return(&self.who(callback), value).map(|_| true),
        }
    }

    /// What `read` and `write` return.
    fn moved(&self, callback: &str, value: i64, most: usize) -> Result<Option<usize>> {
        let who = || self.who(callback);
        if let Ok(n) = usize::try_from(value) {
            return match n <= most {
                true => Ok(Some(n)),
                false => Err(Error::new(libc::EPROTO, format!("{} returned {n}, but had {most} bytes", who()))),
            };
        }
        match value.checked_neg().and_then(|errno| i32::try_from(errno).ok()).filter(|errno| *errno < 4096) {
            Some(libc::EAGAIN | libc::EINTR) => Ok(None),
            Some(errno) => Err(Error::new(errno, format!("{} failed: {}", who(), strerror(errno)))),
            None => Err(Error::new(libc::EIO, format!("{} returned {value}, which is no errno", who()))),
        }
    }
}

/// In the milliseconds of C, none of which is lost: a wait too short would be a busy loop.
fn millis(limit: Duration) -> c_int {
    c_int::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(c_int::MAX)
}

fn text(address: &str) -> Result<CString> {
    CString::new(address).map_err(|_| Error::invalid("an address contains a NUL"))
}

/// The adapter between a scheme and the library.
#[derive(Debug)]
pub struct CChannels(pub Arc<CScheme>);

impl Scheme for CChannels {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn has_channels(&self) -> bool {
        self.0.ops.flags & VMIG_CHANNEL_MANY != 0
    }

    fn connect(&self, address: &str) -> Result<Box<dyn Attempt + '_>> {
        let Some(connect) = self.0.ops.connect else {
            let text = format!("channel '{}' has no callback 'connect': it can only be listened at", self.0.name);
            return Err(Error::new(libc::ENOTSUP, text));
        };
        Ok(Box::new(CAttempt { scheme: Arc::clone(&self.0), connect, address: text(address)?, conn: Opaque::NULL }))
    }

    fn listen(&self, address: &str) -> Result<Box<dyn Entrance>> {
        let Some(listen) = self.0.ops.listen else {
            let text = format!("channel '{}' has no callback 'listen': it can only be connected to", self.0.name);
            return Err(Error::new(libc::ENOTSUP, text));
        };
        let (address, mut listener) = (text(address)?, ptr::null_mut());
        // SAFETY: the VMM's own function and pointer; the string lives through the call, and the room is ours.
        let value = unsafe { listen(self.0.opaque.0, address.as_ptr(), &raw mut listener) };
        check_return(&self.0.who("listen"), value)?;
        Ok(Box::new(CEntrance { scheme: Arc::clone(&self.0), listener: Opaque(listener) }))
    }
}

type Connect = unsafe extern "C" fn(*mut c_void, *const c_char, c_int, *mut *mut c_void) -> c_int;

struct CAttempt {
    scheme: Arc<CScheme>,
    connect: Connect,
    address: CString,
    conn: Opaque,
}

impl Attempt for CAttempt {
    fn go_on(&mut self, limit: Duration) -> Result<Option<Box<dyn Link>>> {
        let (scheme, conn) = (&self.scheme, &raw mut self.conn.0);
        // SAFETY: the VMM's own function and pointer; the string and the room live through the call.
        let value = unsafe { (self.connect)(scheme.opaque.0, self.address.as_ptr(), millis(limit), conn) };
        if !scheme.done("connect", value)? {
            return Ok(None);
        }
        let conn = std::mem::replace(&mut self.conn, Opaque::NULL);
        Ok(Some(Box::new(CLink { scheme: Arc::clone(scheme), conn })))
    }
}

impl Drop for CAttempt {
    fn drop(&mut self) {
        if !self.conn.0.is_null() {
            let conn = std::mem::replace(&mut self.conn, Opaque::NULL);
            drop(CLink { scheme: Arc::clone(&self.scheme), conn });
        }
    }
}

#[derive(Debug)]
struct CEntrance {
    scheme: Arc<CScheme>,
    listener: Opaque,
}

impl Entrance for CEntrance {
    fn accept(&self, limit: Duration) -> Result<Option<Box<dyn Link>>> {
        let Some(accept) = self.scheme.ops.accept else { return Ok(None) };
        let mut conn = ptr::null_mut();
        // SAFETY: the VMM's own function and pointers, `listener` from its own `listen`; the room is ours.
        let value = unsafe { accept(self.scheme.opaque.0, self.listener.0, millis(limit), &raw mut conn) };
        match self.scheme.done("accept", value)? {
            false => Ok(None),
            true => Ok(Some(Box::new(CLink { scheme: Arc::clone(&self.scheme), conn: Opaque(conn) }))),
        }
    }
}

impl Drop for CEntrance {
    fn drop(&mut self) {
        if let Some(unlisten) = self.scheme.ops.unlisten {
            // SAFETY: as for accept; the entrance is gone, so nobody accepts there.
            unsafe { unlisten(self.scheme.opaque.0, self.listener.0) };
        }
    }
}

#[derive(Debug)]
struct CLink {
    scheme: Arc<CScheme>,
    conn: Opaque,
}

impl Link for CLink {
    fn read(&self, room: &Room<'_>, limit: Duration) -> Result<Option<usize>> {
        let Some(read) = self.scheme.ops.read else { return Ok(Some(0)) };
        let (opaque, conn) = (self.scheme.opaque.0, self.conn.0);
        // SAFETY: the VMM's own function and pointers; the room can be written for its length (its constructor's promise).
        let value = unsafe { read(opaque, conn, room.as_ptr().cast(), room.len(), millis(limit)) };
        self.scheme.moved("read", value, room.len())
    }

    fn write(&self, piece: &Piece<'_>, limit: Duration) -> Result<Option<usize>> {
        let Some(write) = self.scheme.ops.write else { return Ok(None) };
        let (opaque, conn) = (self.scheme.opaque.0, self.conn.0);
        // SAFETY: the VMM's own function and pointers; the piece can be read for its length (its constructor's promise).
        let value = unsafe { write(opaque, conn, piece.as_ptr().cast(), piece.len(), millis(limit)) };
        match self.scheme.moved("write", value, piece.len())? {
            // Not room for a byte, and no reason: asked again, with the deadline in view.
            Some(0) => Ok(None),
            moved => Ok(moved),
        }
    }

    fn shutdown(&self, both: bool) {
        if let Some(shutdown) = self.scheme.ops.shutdown {
            let how = if both { VMIG_SHUT_BOTH } else { VMIG_SHUT_WRITE };
            // SAFETY: the VMM's own function and pointers.
            unsafe { shutdown(self.scheme.opaque.0, self.conn.0, how) };
        }
    }
}

impl Drop for CLink {
    fn drop(&mut self) {
        if let Some(close) = self.scheme.ops.close {
            // SAFETY: as above; the link is gone, so no other call is under way.
            unsafe { close(self.scheme.opaque.0, self.conn.0) };
        }
    }
}
