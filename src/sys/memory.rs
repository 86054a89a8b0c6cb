//! What the kernel says about our address space, and madvise(2).
#![allow(unsafe_code, reason = "system calls live here")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::ptr;

use crate::error::{Error, Result};

/// Begins to fetch the memory of a value that is looked at soon; does nothing where the CPU cannot be told.
#[inline]
pub fn prefetch<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint that changes nothing and cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

/// One line of /proc/self/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses it covers.
    pub range: Range<u64>,
    /// May be written through this mapping.
    pub writable: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// Where in the file it begins.
    pub offset: u64,
    /// Device of the file, major and minor.
    pub device: (u32, u32),
    /// Inode of the file; 0: no file.
    pub inode: u64,
    /// Path, or a name in brackets, or nothing.
    pub path: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut rest = line;
        let mut word = || {
            rest = rest.trim_start_matches(' ');
            let (head, tail) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = tail;
            head
        };
        let (start, end) = word().split_once('-')?;
        let permissions = word().as_bytes();
        let offset = word();
        let (major, minor) = word().split_once(':')?;
        let inode = word();
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let part = |text| u32::from_str_radix(text, 16).ok();
        Some(Self {
            range: hex(start)?..hex(end)?,
            writable: *permissions.get(1)? == b'w',
            shared: *permissions.get(3)? == b's',
            offset: hex(offset)?,
            device: (part(major)?, part(minor)?),
            inode: inode.parse().ok()?,
            path: rest.trim_start_matches(' ').to_owned(),
        })
    }
}

/// Every mapping of this process, ascending.
pub fn mappings() -> Result<Vec<Mapping>> {
    let text = read_text("/proc/self/maps")?;
    text.lines().map(|line| Mapping::parse(line).ok_or_else(|| odd("/proc/self/maps", line))).collect()
}

/// The two-letter flags of each mapping (proc(5), `VmFlags`). Costs the kernel 18 ms for each populated GiB of small
/// pages, under the lock that faults may wait for: not for a guest that runs.
pub fn vm_flags() -> Result<Vec<(Range<u64>, String)>> {
    let text = read_text("/proc/self/smaps")?;
    let mut list = Vec::new();
    let mut range = 0..0;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            list.push((range.clone(), flags.trim().to_owned()));
        } else if let Some(mapping) = line.split(' ').next().filter(|w| !w.ends_with(':')).and(Mapping::parse(line)) {
            range = mapping.range;
        }
    }
    Ok(list)
}

/// Memory of this process a device may reach by its physical address: pinned, or locked in the way vfio accounts it.
/// In KiB; mlock(2) counts as well.
pub fn pinned_kib() -> Result<u64> {
    let text = read_text("/proc/self/status")?;
    let value = |line: &str| {
        let number = line.strip_prefix("VmPin:").or_else(|| line.strip_prefix("VmLck:"))?;
        number.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    let found: Vec<u64> = text.lines().filter_map(value).collect();
    match found[..] {
        [_, _] => Ok(found.iter().sum()),
        _ => Err(odd("/proc/self/status", "VmPin and VmLck")),
    }
}

/// The chosen word of a file like /sys/kernel/mm/transparent_hugepage/enabled; None where the kernel has no such file.
pub fn huge_page_policy(file: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{file}")).ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// /proc may name files in any bytes; what is not UTF-8 is replaced, and then matches no file.
fn read_text(path: &str) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| Error::from_io(path, &e))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn odd(file: &str, what: &str) -> Error {
    Error::new(libc::EPROTO, format!("{file} is not as proc(5) describes it: {what}"))
}

/// The file behind a shared mapping, if it lies in memory (tmpfs, shm, memfd); else why it could not be proven.
///
/// Always a descriptor of our own: seeking in the VMM's would move its position.
pub fn memory_file(mapping: &Mapping, given: Option<BorrowedFd<'_>>) -> std::result::Result<File, String> {
    let Range { start, end } = mapping.range;
    let candidates = given
        .map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .into_iter()
        .chain([format!("/proc/self/map_files/{start:x}-{end:x}"), mapping.path.clone()]);
    let mut why = "its file cannot be opened".to_owned();
    for path in candidates.filter(|path| path.starts_with('/')) {
        match open_same(&path, mapping) {
            Ok(Some(file)) => return lies_in_memory(&file).map(|()| file),
            Ok(None) => {}
            Err(e) => why = format!("its file cannot be opened: {e}"),
        }
    }
    Err(why)
}

/// Opens `path` if it is the regular file that `mapping` maps.
fn open_same(path: &str, mapping: &Mapping) -> io::Result<Option<File>> {
    let same = |meta: fs::Metadata| {
        let device = (libc::major(meta.dev()), libc::minor(meta.dev()));
        meta.is_file() && meta.ino() == mapping.inode && device == mapping.device
    };
    // Looked at first: opening what is not a regular file may wait, or do something.
    if !same(fs::metadata(path)?) {
        return Ok(None);
    }
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    Ok(same(file.metadata()?).then_some(file))
}

fn lies_in_memory(file: &File) -> std::result::Result<(), String> {
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: stat points to room for one struct statfs.
    if unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) } < 0 {
        return Err(format!("fstatfs: {}", io::Error::last_os_error()));
    }
    // SAFETY: fstatfs succeeded, so it filled the struct.
    match unsafe { stat.assume_init() }.f_type {
        libc::TMPFS_MAGIC => Ok(()),
        libc::HUGETLBFS_MAGIC => Err("it is a hugetlb file, which others may have populated".to_owned()),
        other => Err(format!("its file is not in memory (filesystem type {other:#x})")),
    }
}

/// Device of the kernel's own files in memory, which no path leads to: memfds, System V and anonymous shared memory;
/// or the same for huge pages of the default size. None where there are none.
pub fn own_device(hugetlb: bool) -> Option<(u32, u32)> {
    let flags = libc::MFD_CLOEXEC | if hugetlb { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: the name is a literal that ends with NUL.
    let fd = unsafe { libc::memfd_create(c"vmig".as_ptr(), flags) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let device = file.metadata().ok()?.dev();
    Some((libc::major(device), libc::minor(device)))
}

/// What madvise(2) is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Drop the pages; private anonymous memory reads as zero afterwards.
    DontNeed,
    /// Punch a hole into the file of a shared mapping.
    Remove,
    /// Make the pages readable without a fault.
    PopulateRead,
    /// Make the pages writable without a fault; their contents stay.
    PopulateWrite,
    /// Use huge pages.
    HugePage,
    /// Use no huge pages.
    NoHugePage,
}

/// madvise(2); `EINTR` and `EAGAIN` are tried again a bounded number of times.
///
/// # Safety
/// `start..start + len` is memory whose contents the caller may have the advice change: `DontNeed` and `Remove` drop
/// them; the others never do.
pub unsafe fn advise(start: u64, len: u64, advice: Advice) -> io::Result<()> {
    const TRIES: usize = 100;
    let number = match advice {
        Advice::DontNeed => libc::MADV_DONTNEED,
        Advice::Remove => libc::MADV_REMOVE,
        Advice::PopulateRead => libc::MADV_POPULATE_READ,
        Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
        Advice::HugePage => libc::MADV_HUGEPAGE,
        Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
    };
    let too_far = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let address = ptr::with_exposed_provenance_mut(usize::try_from(start).map_err(too_far)?);
    let len = usize::try_from(len).map_err(too_far)?;
    let mut tries = 0;
    loop {
        // SAFETY: the kernel checks the range, and by this function's contract what it does to the contents is wanted.
        if unsafe { libc::madvise(address, len, number) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        tries += 1;
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) || tries == TRIES {
            return Err(error);
        }
    }
}

/// A page of our own that nobody else knows.
#[derive(Debug)]
pub struct OwnPage {
    at: *mut libc::c_void,
    accessible: bool,
}

// SAFETY: the pointer is only an address of a page that this owns and nobody refers to.
unsafe impl Send for OwnPage {}
// SAFETY: as above; it is written by volatile accesses alone.
unsafe impl Sync for OwnPage {}

impl OwnPage {
    const BYTES: usize = 4096;

    /// A new one, which can be read and written or not at all.
    pub fn new(accessible: bool) -> Result<Self> {
        let protection = if accessible { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at a place the kernel chooses changes nothing that exists.
        let at = unsafe { libc::mmap(ptr::null_mut(), Self::BYTES, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED { Err(Error::last_os("mmap")) } else { Ok(Self { at, accessible }) }
    }

    /// Where it is.
    pub fn range(&self) -> Range<u64> {
        let start = self.at.expose_provenance() as u64;
        start..start + Self::BYTES as u64
    }

    /// Writes to it.
    pub fn write(&self) {
        assert!(self.accessible, "the page cannot be written");
        // SAFETY: the page is ours, mapped and writable; it has no reference.
        unsafe { self.at.cast::<u8>().write_volatile(1) };
    }
}

impl Drop for OwnPage {
    fn drop(&mut self) {
        // SAFETY: the page is ours and nobody else knows it.
        unsafe { libc::munmap(self.at, Self::BYTES) };
    }
}

/// Whether every byte of `range` is mapped just now: msync(2) says so in the time of its mappings, and with these flags
/// does nothing else.
pub fn is_mapped(range: &Range<u64>) -> bool {
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let start = ptr::with_exposed_provenance_mut(usize::try_from(range.start).unwrap_or(usize::MAX));
    // SAFETY: MS_ASYNC neither reads nor writes the memory; the kernel checks the range.
    unsafe { libc::msync(start, len, libc::MS_ASYNC) == 0 }
}

/// Size of the pages that the kernel maps at `address`; None: nothing is mapped there, or it does not say.
pub fn page_size_at(address: u64) -> Option<u64> {
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        size: u64,
        flags: u64,
        address: u64,
        range: [u64; 2],
        vma_flags: u64,
        page_size: u64,
        offset: u64,
        inode: u64,
        device: [u32; 2],
        name_sizes: [u32; 2],
        names: [u64; 2],
    }
    let mut query = Query { size: size_of::<Query>() as u64, address, ..Query::default() };
    if let Ok(maps) = File::open("/proc/self/maps") {
        // SAFETY: PROCMAP_QUERY (Linux 6.11) reads and fills one struct procmap_query, which `query` is; without flags it
        // only looks, and without sizes of names it writes nowhere else.
        if unsafe { libc::ioctl(maps.as_raw_fd(), libc::_IOWR::<Query>(u32::from(b'f'), 17), &raw mut query) } >= 0 {
            return Some(query.page_size);
        }
    }
    // As slow as `vm_flags`, on older kernels only.
    let mut here = false;
    for line in read_text("/proc/self/smaps").ok()?.lines() {
        if let Some(size) = line.strip_prefix("KernelPageSize:").filter(|_| here) {
            return size.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024);
        }
        if let Some(mapping) = line.split(' ').next().filter(|w| !w.ends_with(':')).and(Mapping::parse(line)) {
            here = mapping.range.contains(&address);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_read() {
        let line = "7f0000000000-7f0000200000 rw-s 00001000 00:1a 1234                       /dev/shm/a b (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        let want = Mapping {
            range: 0x7f00_0000_0000..0x7f00_0020_0000,
            writable: true,
            shared: true,
            offset: 4096,
            device: (0, 0x1a),
            inode: 1234,
            path: "/dev/shm/a b (deleted)".to_owned(),
        };
        assert_eq!(mapping, want);
        let bare = Mapping::parse("1000-2000 r--p 00000000 00:00 0 ").unwrap();
        assert!(bare.path.is_empty() && !bare.writable && !bare.shared);
        for bad in ["", "1000 rw-p", "1000-2000 r", "1000-2000 rw-p 0 0 0 "] {
            assert!(Mapping::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn our_own_mappings_have_flags() {
        let maps = mappings().unwrap();
        let flags = vm_flags().unwrap();
        let stack = maps.iter().find(|m| m.path == "[stack]").unwrap();
        let (_, words) = flags.iter().find(|(range, _)| range.end == stack.range.end).unwrap();
        assert!(words.split(' ').any(|w| w == "gd"), "a stack grows down: {words}");
        pinned_kib().unwrap();
    }
}
