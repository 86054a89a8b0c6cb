//! QMP, QEMU's control protocol: the operations above as JSON, so that tools and fleet managers that drive QEMU can drive
//! a VMM. A server on a socket on request, and a function for VMMs that have a socket of their own. docs/qmp.md lists the
//! commands.

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use super::guest::vmig;
use super::{enter, enter_text, face, long_string, string};
use crate::error::Error;
use crate::qmp::frame::BYTES_MAX;
use crate::vmm::command::{CCommand, Reply, vmig_qmp_fn, vmig_reply};

/// Carries out one request, such as {"execute": "query-migrate"}, and returns its answer, also where that is an error:
/// NULL only if `request` is no string of at most 256 KiB, or the big lock is held. No capabilities are negotiated, and
/// there are no events (vmig_next_event()) or descriptors. Free it with vmig_string_free(). \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_qmp(m: *mut vmig, request: *const c_char) -> *mut c_char {
    enter_text("vmig_qmp", || {
        // SAFETY: the C contract of handles.
        let face = unsafe { face(m) }?;
        // SAFETY: the C contract of strings.
        let request = unsafe { long_string("request", request, BYTES_MAX) }?;
        face.request(request).map(Some)
    })
}

/// Serves QMP at `uri`, `unix:PATH` or `tcp:HOST:PORT`, until vmig_free(). A unix socket can be connected to by its owner
/// only; whoever reaches a TCP port may do everything, so give it an address that only operators reach. With port 0 the
/// system chooses one: read it from vmig_get(m, "qmp-address"). May be called at any time, for up to 8 addresses.
///
/// Commands run on the thread `qmp_run`, one after the other: `stop` and `cont` call the hooks there.
/// -EADDRINUSE and other errors of listening; -EINVAL: a URI that is not understood. \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_qmp_listen(m: *mut vmig, uri: *const c_char) -> c_int {
    enter("vmig_qmp_listen", || {
        // SAFETY: the C contract of handles.
        let face = unsafe { face(m) }?;
        // SAFETY: the C contract of strings.
        face.listen(unsafe { string("uri", uri) }?)?;
        Ok(0)
    })
}

/// Adds a command of the VMM's, such as `quit`, to those that clients may use. `destroy(opaque)`, if given, is called by
/// vmig_free(), and not if this call fails. -EEXIST: there is a command of that name; -EINVAL: a name has 1 to 64 letters,
/// digits, - and _. \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_qmp_add(
    m: *mut vmig,
    name: *const c_char,
    run: vmig_qmp_fn,
    opaque: *mut c_void,
    destroy: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
) -> c_int {
    enter("vmig_qmp_add", || {
        // SAFETY: the C contract of handles.
        let face = unsafe { face(m) }?;
        // SAFETY: the C contract of strings.
        let name = unsafe { string("name", name) }?;
        let run = run.ok_or_else(|| Error::invalid(format!("command '{name}' has no callback")))?;
        // SAFETY: the C contract: the callbacks accept opaque.
        face.add(name, || Arc::new(unsafe { CCommand::new(name, run, opaque, destroy) }))?;
        Ok(0)
    })
}

/// Answers a command of the VMM's with `json`, at most 256 KiB; the last call counts. -EINVAL: it is not JSON. \[cb\] of
/// the callback that got the reply.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_reply_json(reply: *mut vmig_reply, json: *const c_char) -> c_int {
    enter("vmig_reply_json", || {
        // SAFETY: the C contract of replies.
        let reply = unsafe { Reply::from_handle(reply) }.ok_or_else(|| Error::invalid("the reply is NULL"))?;
        // SAFETY: the C contract of strings.
        reply.json(unsafe { long_string("json", json, BYTES_MAX) }?)?;
        Ok(0)
    })
}

/// Answers it with an error, in a sentence for people. \[cb\] of the callback that got the reply.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_reply_error(reply: *mut vmig_reply, text: *const c_char) -> c_int {
    enter("vmig_reply_error", || {
        // SAFETY: the C contract of replies.
        let reply = unsafe { Reply::from_handle(reply) }.ok_or_else(|| Error::invalid("the reply is NULL"))?;
        // SAFETY: the C contract of strings.
        reply.error(unsafe { string("text", text) }?);
        Ok(0)
    })
}
