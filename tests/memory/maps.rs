//! Mappings of every kind, touched from the outside as a VMM and its guest would.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmig::ram::presence::GRANULE;
use vmig::ram::{Block, BlockSpec, PAGE_BYTES, Ram};

use super::common;

/// Locked memory anywhere in the process changes how memory is made fresh, so these tests take turns.
pub(super) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Private,
    Locked,
    SharedAnonymous,
    SharedMemfd,
    SharedShm,
    PrivateMemfd,
    PrivateFile,
    SharedFile,
    HugePrivate,
    HugeShared,
}
pub(super) use Kind::*;

pub(super) const KINDS: [Kind; 10] = [
    Private,
    Locked,
    SharedAnonymous,
    SharedMemfd,
    SharedShm,
    PrivateMemfd,
    PrivateFile,
    SharedFile,
    HugePrivate,
    HugeShared,
];

/// A mapping of our own.
pub(super) struct Map {
    pub(super) start: *mut u8,
    len: usize,
    guard: usize,
    pub(super) file: Option<File>,
}

pub(super) fn mmap(len: usize, protection: i32, flags: i32, file: Option<&File>) -> Option<*mut u8> {
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: a new mapping at a place the kernel chooses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
    (start != libc::MAP_FAILED).then_some(start.cast())
}

pub(super) fn memfd(flags: u32) -> Option<File> {
    // SAFETY: the name is a literal that ends with NUL.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags | libc::MFD_CLOEXEC) };
    // SAFETY: a descriptor the kernel just gave us.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
}

pub(super) fn file_in(dir: &str) -> File {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = format!("{dir}/vmig-memory-{}-{n}", std::process::id());
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

// SAFETY: the pointer is only an address; every access through it is volatile, as a guest's would be.
unsafe impl Sync for Map {}

impl Map {
    /// None: this machine has no such memory to spare.
    pub(super) fn new(kind: Kind, pages: usize) -> Option<Self> {
        let len = pages * PAGE_BYTES;
        let file = match kind {
            SharedMemfd | PrivateMemfd => memfd(0),
            SharedShm => Some(file_in("/dev/shm")),
            PrivateFile | SharedFile => Some(file_in(common::scratch("memory").to_str().unwrap())),
            HugeShared => Some(memfd(libc::MFD_HUGETLB)?),
            _ => None,
        };
        if let Some(file) = &file {
            file.set_len(len as u64).unwrap();
        }
        let flags = match kind {
            Private | Locked => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            HugePrivate => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            SharedAnonymous => libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            PrivateMemfd | PrivateFile => libc::MAP_PRIVATE,
            SharedMemfd | SharedShm | SharedFile | HugeShared => libc::MAP_SHARED,
        };
        // What follows is inaccessible, or two mappings of this kind would be one to the kernel.
        let guard = if matches!(kind, Private | Locked) { GRANULE * PAGE_BYTES } else { 0 };
        let start = mmap(len + guard, libc::PROT_READ | libc::PROT_WRITE, flags, file.as_ref())?;
        let map = Self { start, len, guard, file };
        // SAFETY: changes our own mapping only.
        assert_eq!(unsafe { libc::mprotect(start.wrapping_add(len).cast(), guard, libc::PROT_NONE) }, 0);
        if kind == Locked {
            // SAFETY: locks our own mapping.
            assert_eq!(unsafe { libc::mlock(start.cast(), len) }, 0);
        }
        Some(map)
    }

    pub(super) fn pages(&self) -> usize {
        self.len / PAGE_BYTES
    }

    pub(super) fn word(&self, page: usize) -> *mut u64 {
        assert!(page < self.pages());
        self.start.wrapping_add(page * PAGE_BYTES + 8 * (page % 512)).cast()
    }

    pub(super) fn write(&self, page: usize, value: u64) {
        // SAFETY: a word of our own mapping.
        unsafe { self.word(page).write_volatile(value) };
    }

    pub(super) fn read(&self, page: usize) -> u64 {
        // SAFETY: a word of our own mapping.
        unsafe { self.word(page).read_volatile() }
    }

    pub(super) fn advise(&self, pages: Range<usize>, advice: i32) {
        let start = self.start.wrapping_add(pages.start * PAGE_BYTES).cast();
        // SAFETY: changes our own mapping only.
        let done = unsafe { libc::madvise(start, pages.len() * PAGE_BYTES, advice) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Advice that may be refused, and leaves contents alone.
    pub(super) fn collapse(&self, granule: usize) {
        const MADV_COLLAPSE: i32 = 25;
        let start = self.start.wrapping_add(granule * GRANULE * PAGE_BYTES).cast();
        // SAFETY: leaves the contents of our own mapping alone.
        unsafe { libc::madvise(start, GRANULE * PAGE_BYTES, MADV_COLLAPSE) };
    }

    pub(super) fn protect(&self, protection: i32) {
        // SAFETY: changes our own mapping only.
        assert_eq!(unsafe { libc::mprotect(self.start.cast(), self.len, protection) }, 0);
    }

    pub(super) fn block(&self) -> Arc<Block> {
        self.block_as(false)
    }

    pub(super) fn block_as(&self, shared_storage: bool) -> Arc<Block> {
        let spec = BlockSpec {
            name: "ram".into(),
            host: self.start,
            len: self.len as u64,
            gpa: 0,
            marked: true,
            shared_storage,
            file: None,
        };
        Ram::default().add(spec).unwrap()
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// The same file, mapped once more.
    pub(super) fn again(&self) -> Self {
        let start = mmap(self.len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, self.file.as_ref()).unwrap();
        Self { start, len: self.len, guard: 0, file: None }
    }

    /// Bytes of memory this costs, whoever's tables show them.
    pub(super) fn cost(&self) -> usize {
        use std::os::unix::fs::MetadataExt;
        let blocks = self.file.as_ref().map_or(0, |file| file.metadata().unwrap().blocks());
        self.smaps("Rss").max(usize::try_from(blocks).unwrap() * 512)
    }

    /// A field of /proc/self/smaps in bytes, summed over the mapping.
    pub(super) fn smaps(&self, field: &str) -> usize {
        let (start, end) = (self.start.addr(), self.start.addr() + self.len);
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut inside, mut sum) = (false, 0);
        for line in text.lines() {
            let first = line.split(' ').next().unwrap();
            if let Some((from, _)) = first.split_once('-') {
                inside = usize::from_str_radix(from, 16).is_ok_and(|at| (start..end).contains(&at));
            } else if inside && first.strip_suffix(':') == Some(field) {
                sum += line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024;
            }
        }
        sum
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.start.cast(), self.len + self.guard) };
    }
}

/// Huge pages set aside for a test, when there were none.
pub(super) struct Pool(bool);

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl Pool {
    pub(super) fn new(pages: usize) -> Self {
        let none = std::fs::read_to_string(POOL).is_ok_and(|n| n.trim() == "0");
        Self(none && std::fs::write(POOL, pages.to_string()).is_ok())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.0 {
            std::fs::write(POOL, "0").unwrap();
        }
    }
}

/// A userfaultfd as a VMM might hold it.
pub(super) struct Uffd(File);

impl Uffd {
    pub(super) fn new() -> Self {
        // SAFETY: userfaultfd takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
        // SAFETY: a descriptor the kernel just gave us.
        let fd = Self(unsafe { File::from_raw_fd(i32::try_from(fd).unwrap()) });
        fd.ioctl(0x3F, &mut [0xAA, 0, 0]);
        fd
    }

    pub(super) fn ioctl<const N: usize>(&self, number: u32, words: &mut [u64; N]) {
        // SAFETY: each ioctl used here reads and fills a struct of N words.
        let done =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::_IOWR::<[u64; N]>(0xAA, number), words.as_mut_ptr()) };
        assert!(done >= 0, "{}", std::io::Error::last_os_error());
    }

    pub(super) fn register(&self, map: &Map, mode: u64) {
        self.ioctl(0, &mut [map.start.addr() as u64, map.len as u64, mode, 0]);
    }

    pub(super) fn unregister(&self, map: &Map) {
        let mut range = [map.start.addr() as u64, map.len as u64];
        // SAFETY: UFFDIO_UNREGISTER reads a struct of two words.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::_IOR::<[u64; 2]>(0xAA, 1), range.as_mut_ptr()) };
        assert!(done >= 0, "{}", std::io::Error::last_os_error());
    }
}
