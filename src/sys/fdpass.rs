//! Descriptors that travel over a unix socket (`SCM_RIGHTS`), and what one that arrived is.
#![allow(unsafe_code, reason = "system calls live here")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::error::{Error, Result};

/// Descriptors in one message. The kernel takes 253.
pub const FDS_MAX: usize = 250;

/// Room for the control data of one message, aligned as the kernel wants it.
const CONTROL_BYTES: usize = 2048;

#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// What one read brought.
#[derive(Debug)]
pub struct Got {
    /// Bytes; 0 is the end.
    pub bytes: usize,
    /// Descriptors that came with them, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// There were more, which the kernel dropped: too many in one message, or no room in our table.
    pub dropped: bool,
}

/// Whether `fd` is a stream socket that descriptors can travel over.
pub fn can_pass(fd: BorrowedFd<'_>) -> bool {
    let option = |name| {
        let mut value: libc::c_int = -1;
        let mut len: libc::socklen_t = 4;
        // SAFETY: value has room for the int these options are, and len says so.
        let done = unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len)
        };
        (done == 0).then_some(value)
    };
    option(libc::SO_DOMAIN) == Some(libc::AF_UNIX) && option(libc::SO_TYPE) == Some(libc::SOCK_STREAM)
}

/// Writes bytes once, with descriptors that arrive together with the first of them; at most [`FDS_MAX`], and a byte at
/// least. `Ok(None)`: nothing went, the socket is full.
pub fn send(fd: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<Option<usize>> {
    if bytes.is_empty() || fds.len() > FDS_MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let size = u32::try_from(size_of_val(&numbers[..])).unwrap_or(u32::MAX);
    let mut control = Control([0; CONTROL_BYTES]);
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE only computes.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(size) } as usize;
        // SAFETY: msg_control has room for a header, so there is a first one.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: CMSG_LEN only computes.
        let len = unsafe { libc::CMSG_LEN(size) } as usize;
        // SAFETY: the header lies in `control`, which is aligned for it.
        unsafe {
            header.write(libc::cmsghdr { cmsg_len: len, cmsg_level: libc::SOL_SOCKET, cmsg_type: libc::SCM_RIGHTS })
        };
        // SAFETY: the data follows the header.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: FDS_MAX descriptors and their header fit into `control`; its bytes are our own.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr().cast::<u8>(), data, size as usize) };
    }
    // SAFETY: all that message points to lives through the call; sendmsg only reads.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    super::io::transferred(sent)
}

/// Reads once, and takes the descriptors that come along. `Ok(None)`: nothing there yet.
pub fn receive(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<Option<Got>> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut piece = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the piece and the control buffer are writable for the lengths given.
    let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    let Some(bytes) = super::io::transferred(got)? else { return Ok(None) };
    Ok(Some(Got { bytes, fds: taken(&message), dropped: message.msg_flags & libc::MSG_CTRUNC != 0 }))
}

/// The descriptors a received message carries: ours from here on, whatever is made of them.
fn taken(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: recvmsg filled in how much of the control buffer it used.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(std::ptr::from_ref(message)) };
    while !header.is_null() {
        // SAFETY: not null, so a whole header of the control buffer.
        let cmsghdr = unsafe { header.read() };
        if cmsghdr.cmsg_level == libc::SOL_SOCKET && cmsghdr.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: CMSG_LEN only computes.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: the data follows the header.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            for index in 0..cmsghdr.cmsg_len.saturating_sub(empty) / size_of::<RawFd>() {
                // SAFETY: the header's length says that this number is there; it need not be aligned.
                let number = unsafe { data.wrapping_add(index).read_unaligned() };
                // SAFETY: the kernel just put this descriptor into our table for us.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: message and header are the kernel's, as above.
        header = unsafe { libc::CMSG_NXTHDR(std::ptr::from_ref(message), header) };
    }
    fds
}

/// What a descriptor is, as far as memory is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// A regular file.
    pub regular: bool,
    /// Size in bytes.
    pub size: u64,
    /// Device, major and minor, and inode.
    pub device: (u32, u32),
    /// See above.
    pub inode: u64,
    /// Lies in memory: tmpfs, shm, memfd or hugetlb. What addresses, offsets and lengths must be multiples of; 0 if not.
    pub granule: u64,
    /// Sealed against shared writable mappings.
    pub sealed: bool,
    /// Open for reading and for writing.
    pub access: (bool, bool),
}

/// Looks at a descriptor.
pub fn facts(fd: BorrowedFd<'_>) -> Result<FileFacts> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: stat has room for one struct stat.
    if unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) } < 0 {
        return Err(Error::last_os("fstat"));
    }
    // SAFETY: fstat succeeded, so it filled the struct.
    let stat = unsafe { stat.assume_init() };
    let mut statfs = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: statfs has room for one struct statfs.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), statfs.as_mut_ptr()) } < 0 {
        return Err(Error::last_os("fstatfs"));
    }
    // SAFETY: fstatfs succeeded, so it filled the struct.
    let statfs = unsafe { statfs.assume_init() };
    let granule = match statfs.f_type {
        libc::TMPFS_MAGIC => 4096,
        libc::HUGETLBFS_MAGIC => u64::try_from(statfs.f_bsize).unwrap_or(0),
        _ => 0,
    };
    // SAFETY: F_GET_SEALS takes no pointer; files that cannot be sealed answer with an error.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    Ok(FileFacts {
        regular: stat.st_mode & libc::S_IFMT == libc::S_IFREG,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        device: (libc::major(stat.st_dev), libc::minor(stat.st_dev)),
        inode: stat.st_ino,
        granule,
        sealed: seals > 0 && seals & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) != 0,
        access: super::io::access_of(fd)?,
    })
}

/// Maps `len` bytes of a file shared over whatever is mapped at `start`, for reading or for reading and writing.
///
/// # Safety
/// The addresses are memory whose mapping the caller may replace: nobody has a reference into it.
pub unsafe fn map_over(start: u64, len: u64, fd: BorrowedFd<'_>, offset: u64, writable: bool) -> io::Result<()> {
    let too_far = || io::Error::from_raw_os_error(libc::EINVAL);
    let address = std::ptr::with_exposed_provenance_mut(usize::try_from(start).map_err(|_| too_far())?);
    let len = usize::try_from(len).map_err(|_| too_far())?;
    let offset = libc::off_t::try_from(offset).map_err(|_| too_far())?;
    // Huge pages were reserved for the file when it was mapped first; to ask for them again could only fail.
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: this function's contract.
    let mapped = unsafe { libc::mmap(address, len, access, flags, fd.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets a mapping be written, too.
///
/// # Safety
/// The addresses are one mapping of the caller's.
pub unsafe fn make_writable(start: u64, len: u64) -> io::Result<()> {
    let too_far = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let address = std::ptr::with_exposed_provenance_mut(usize::try_from(start).map_err(too_far)?);
    let len = usize::try_from(len).map_err(too_far)?;
    // SAFETY: this function's contract; rights are only added.
    if unsafe { libc::mprotect(address, len, libc::PROT_READ | libc::PROT_WRITE) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_arrive_with_the_first_byte() {
        let (a, b) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let many: Vec<BorrowedFd<'_>> = (0..FDS_MAX).map(|_| null.as_fd()).collect();
        assert_eq!(send(a.as_fd(), b"hello", &many).unwrap(), Some(5));
        let mut buf = [0; 2];
        let got = receive(b.as_fd(), &mut buf).unwrap().unwrap();
        assert_eq!((got.bytes, got.fds.len(), got.dropped), (2, FDS_MAX, false));
        // SAFETY: F_GETFD takes no pointer.
        let flags = got.fds.iter().map(|fd| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) });
        assert!(flags.into_iter().all(|flags| flags & libc::FD_CLOEXEC != 0), "close-on-exec");
        assert!(receive(b.as_fd(), &mut buf).unwrap().unwrap().fds.is_empty());
        assert!(send(a.as_fd(), b"", &[]).is_err() && send(a.as_fd(), b"x", &[many[0]; FDS_MAX + 1]).is_err());
        assert!(can_pass(a.as_fd()) && !can_pass(null.as_fd()));
    }

    #[test]
    fn what_a_file_is() {
        let null = facts(File::open("/dev/null").unwrap().as_fd()).unwrap();
        assert_eq!((null.regular, null.access), (false, (true, false)));
        // SAFETY: the name is a literal that ends with NUL.
        let fd = unsafe { libc::memfd_create(c"x".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        // SAFETY: the kernel just gave us this descriptor.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(8192).unwrap();
        let memory = facts(file.as_fd()).unwrap();
        assert_eq!((memory.regular, memory.size, memory.granule, memory.sealed), (true, 8192, 4096, false));
        // SAFETY: F_ADD_SEALS takes an integer.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE) }, 0);
        assert!(facts(file.as_fd()).unwrap().sealed);
    }
}
