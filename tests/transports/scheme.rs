//! Callbacks as a C program has them: a channel over socket pairs. An address is a descriptor's number.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::{Error, ErrorKind};
use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmig::vmm::channel_ops::{VMIG_SHUT_WRITE, vmig_channel_ops};

/// What the callbacks are called with: they count, and every third call comes back without having done anything.
#[derive(Default)]
pub(crate) struct Counts {
    calls: AtomicUsize,
    pub(crate) opened: AtomicUsize,
    pub(crate) closed: AtomicUsize,
    pub(crate) destroyed: AtomicUsize,
}

unsafe fn counts<'a>(opaque: *mut c_void) -> &'a Counts {
    // SAFETY: the test passes a leaked Counts.
    unsafe { &*opaque.cast::<Counts>() }
}

/// As a signal would: nothing happened, try again.
fn interrupted(opaque: *mut c_void) -> bool {
    // SAFETY: as above.
    unsafe { counts(opaque) }.calls.fetch_add(1, Ordering::Relaxed) % 3 == 2
}

fn stream(conn: *mut c_void) -> ManuallyDrop<UnixStream> {
    let fd = i32::try_from(conn as usize).unwrap();
    // SAFETY: connect stored an open descriptor there, which only close closes.
    ManuallyDrop::new(unsafe { UnixStream::from_raw_fd(fd) })
}

fn errno(error: &Error) -> i64 {
    match error.kind() {
        ErrorKind::WouldBlock => -i64::from(libc::EAGAIN),
        _ => -i64::from(error.raw_os_error().unwrap()),
    }
}

fn wait(stream: &UnixStream, events: i16, timeout_ms: c_int) {
    use std::os::fd::AsRawFd;
    assert!((0..=50).contains(&timeout_ms), "{timeout_ms}");
    let mut polled = libc::pollfd { fd: stream.as_raw_fd(), events, revents: 0 };
    // SAFETY: one live entry.
    unsafe { libc::poll(&raw mut polled, 1, timeout_ms) };
}

unsafe extern "C" fn connect(
    opaque: *mut c_void,
    address: *const c_char,
    _timeout_ms: c_int,
    conn: *mut *mut c_void,
) -> c_int {
    // SAFETY: the library passes a string.
    let fd = unsafe { CStr::from_ptr(address) }.to_str().unwrap().parse().unwrap();
    // SAFETY: the test passes the number of a descriptor that stays open meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().unwrap();
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(true).unwrap();
    // SAFETY: the test passes a leaked Counts.
    unsafe { counts(opaque) }.opened.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the library passes room for a pointer.
    unsafe { *conn = OwnedFd::from(stream).into_raw_fd() as usize as *mut c_void };
    0
}

unsafe extern "C" fn read(o: *mut c_void, conn: *mut c_void, buf: *mut c_void, len: usize, timeout_ms: c_int) -> i64 {
    if interrupted(o) {
        return -i64::from(libc::EINTR);
    }
    let stream = stream(conn);
    wait(&stream, libc::POLLIN, timeout_ms);
    use std::io::Read;
    // SAFETY: the library passes room of this length.
    let room = unsafe { std::slice::from_raw_parts_mut(buf.cast::<u8>(), len.min(3000)) };
    (&*stream).read(room).map_or_else(|e| errno(&e), |n| n as i64)
}

unsafe extern "C" fn write(o: *mut c_void, conn: *mut c_void, buf: *const c_void, len: usize, ms: c_int) -> i64 {
    if interrupted(o) {
        return -i64::from(libc::EAGAIN);
    }
    use std::os::fd::AsRawFd;
    let stream = stream(conn);
    wait(&stream, libc::POLLOUT, ms);
    // SAFETY: the library passes bytes of this length.
    let sent = unsafe { libc::send(stream.as_raw_fd(), buf, len.min(3000), libc::MSG_NOSIGNAL) };
    if sent < 0 { errno(&Error::last_os_error()) } else { sent as i64 }
}

unsafe extern "C" fn shutdown(_: *mut c_void, conn: *mut c_void, how: c_int) {
    let how = if how == VMIG_SHUT_WRITE { Shutdown::Write } else { Shutdown::Both };
    let _ = stream(conn).shutdown(how);
}

unsafe extern "C" fn close(opaque: *mut c_void, conn: *mut c_void) {
    // SAFETY: the test passes a leaked Counts.
    unsafe { counts(opaque) }.closed.fetch_add(1, Ordering::Relaxed);
    drop(ManuallyDrop::into_inner(stream(conn)));
}

pub(crate) unsafe extern "C" fn destroy(opaque: *mut c_void) {
    // SAFETY: the test passes a leaked Counts.
    unsafe { counts(opaque) }.destroyed.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn ops() -> vmig_channel_ops {
    vmig_channel_ops {
        size: size_of::<vmig_channel_ops>(),
        flags: 0,
        reserved: 0,
        connect: Some(connect),
        listen: None,
        accept: None,
        unlisten: None,
        read: Some(read),
        write: Some(write),
        shutdown: Some(shutdown),
        close: Some(close),
    }
}
