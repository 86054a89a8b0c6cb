//! A VMM that has its own way to the other side adds it as a channel: callbacks that connect, listen, read and write.
//! From then on `scheme:address` is a URI like any other. c-examples/rdma.c does it for RDMA.

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use super::guest::vmig;
use super::{enter, guest, string};
use crate::vmm::channel::{CChannels, CScheme};
use crate::vmm::channel_ops::vmig_channel_ops;

/// Adds a kind of connection: `scheme` is what stands before the colon of its URIs, up to 32 small letters, digits, `+`,
/// `-` and `.`, a letter first. It stays until vmig_free(), which calls `destroy(opaque)`, if given,
/// once, after every other callback. If this call fails `destroy` is not called.
///
/// -EEXIST: there is such a scheme, or it is one of the library's own (tcp, unix, vsock, fd, exec, file); -EINVAL: not a
/// name for a scheme, or a required callback is missing. \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_add_channel(
    m: *mut vmig,
    scheme: *const c_char,
    ops: *const vmig_channel_ops,
    opaque: *mut c_void,
    destroy: Option<unsafe extern "C" fn(opaque: *mut c_void)>,
) -> c_int {
    enter("vmig_add_channel", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        let scheme = unsafe { string("scheme", scheme) }?;
        // SAFETY: the C contract: the callbacks accept opaque on any thread until destroy.
        let scheme = Arc::new(unsafe { CScheme::new(scheme, ops, opaque, destroy) }?);
        machine.add_scheme(Arc::new(CChannels(Arc::clone(&scheme))))?;
        scheme.take();
        Ok(0)
    })
}
