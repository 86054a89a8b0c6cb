//! The callbacks of a VMM's own connections as C sees them.
#![allow(non_camel_case_types, reason = "these are the names in C")]
#![allow(unsafe_code, reason = "vouches for the struct's layout")]

use std::ffi::{c_char, c_int, c_void};

use crate::sys::sized::SizedStruct;

/// Flag of a channel: several connections to one address are possible, so pages can travel on some of their own (option
/// `multifd`), and a source whose connection broke can ask what became of the guest.
pub const VMIG_CHANNEL_MANY: u32 = 1;

/// For `shutdown`: nothing more is written; the peer reads the end behind what was.
pub const VMIG_SHUT_WRITE: c_int = 1;
/// For `shutdown`: nothing more is written or read.
pub const VMIG_SHUT_BOTH: c_int = 2;

/// Callbacks of a kind of connection: reliable, in order, both ways, with an end in each direction, as TCP is.
///
/// They are called on threads of the library, with option `dispatch=manual`, too, and without the big lock; `listen`, and
/// what vmig_check() needs, on the thread that called. They must not throw or longjmp. A `timeout_ms` is how long a call may
/// wait; 0 is not at all; the library never asks for more than 50, and looks at cancels and limits (options
/// `connect-timeout`, `stall-timeout`) between two calls: so no callback needs to know of these. What does not happen in
/// time is -EAGAIN (or -EINTR), after which the call is repeated; any other negative errno ends the connection and is part
/// of the migration's error.
///
/// They may call the vmig functions marked `[cb]`. On one connection at most one `read` and one `write` run at a time, on
/// two threads; `shutdown` may come on a third while they run. `close` comes last, once, when no other call runs. The
/// struct is copied when the channel is added.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_channel_ops {
    /// Size of the struct, in bytes: VMIG_SIZED(vmig_channel_ops).
    pub size: usize,
    /// Sum of VMIG_CHANNEL_... flags.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
    /// Connects to `address`, what follows the colon of the URI. `*conn` is NULL before the first call for a connection;
    /// what is stored there is handed to the other callbacks. After -EAGAIN the call is repeated with what was stored;
    /// after an error, or if it is not wanted any more, `close` is called with it, unless it is NULL. NULL: this side
    /// can only listen.
    pub connect: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            address: *const c_char,
            timeout_ms: c_int,
            conn: *mut *mut c_void,
        ) -> c_int,
    >,
    /// Listens at `address`, and stores what `accept` is called with. Called by vmig_incoming(), on its thread. NULL:
    /// this side can only connect.
    pub listen: Option<
        unsafe extern "C" fn(opaque: *mut c_void, address: *const c_char, listener: *mut *mut c_void) -> c_int,
    >,
    /// Takes a connection and stores it in `*conn`.
    pub accept: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            listener: *mut c_void,
            timeout_ms: c_int,
            conn: *mut *mut c_void,
        ) -> c_int,
    >,
    /// Listens no more. The last call with this listener; connections it gave go on.
    pub unlisten: Option<unsafe extern "C" fn(opaque: *mut c_void, listener: *mut c_void)>,
    /// Reads at least one byte and at most `len`, of which there is at least one, and returns how many; 0: the peer has
    /// ended. `buf` may be guest memory. Required.
    pub read: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            conn: *mut c_void,
            buf: *mut c_void,
            len: usize,
            timeout_ms: c_int,
        ) -> i64,
    >,
    /// Writes at least one byte and at most `len`, of which there is at least one, and returns how many. `buf` may be
    /// guest memory, which may change meanwhile; it is not to be used after the return. Required.
    pub write: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            conn: *mut c_void,
            buf: *const c_void,
            len: usize,
            timeout_ms: c_int,
        ) -> i64,
    >,
    /// Ends one direction, or both; `how` is VMIG_SHUT_WRITE or VMIG_SHUT_BOTH. Calls that wait in that direction must
    /// come back, as they do anyway when their time is up. Does not wait. Required.
    pub shutdown: Option<unsafe extern "C" fn(opaque: *mut c_void, conn: *mut c_void, how: c_int)>,
    /// Ends the connection, if it has not ended, and frees it. Required.
    pub close: Option<unsafe extern "C" fn(opaque: *mut c_void, conn: *mut c_void)>,
}

// SAFETY: repr(C), begins with a usize; integers without padding and optional function pointers.
unsafe impl SizedStruct for vmig_channel_ops {
    const NAME: &'static str = "vmig_channel_ops";
    const REQUIRED: usize = size_of::<vmig_channel_ops>();
}
