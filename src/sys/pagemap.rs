//! Which pages exist: `PAGEMAP_SCAN`, /proc/self/pagemap for older kernels, and `SEEK_DATA` for files in memory.
#![allow(unsafe_code, reason = "system calls live here")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};

const PAGE: u64 = 4096;
/// Addresses of one question: the kernel holds the lock of our address space for 4 ms a GiB while it looks.
const SPAN: u64 = 256 << 20;
/// Answers of one question.
const REGIONS: usize = 256;

const WRITTEN: u64 = 1 << 1;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const ZERO_PAGE: u64 = 1 << 5;

/// Protect what matches, in the same step.
const WP_MATCHING: u64 = 1 << 0;
/// Fail where protection is not possible.
const CHECK_WPASYNC: u64 = 1 << 1;

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

impl ScanArg {
    /// For pages that are there; `vec_len` is still to be set.
    fn looking(range: Range<u64>, swapped: bool, regions: *mut Region) -> Self {
        Self {
            size: size_of::<Self>() as u64,
            start: range.start,
            end: range.end,
            vec: regions.expose_provenance() as u64,
            category_inverted: ZERO_PAGE,
            category_mask: ZERO_PAGE,
            category_anyof_mask: if swapped { PRESENT | SWAPPED } else { PRESENT },
            ..Self::default()
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// How the page tables are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The ioctl `PAGEMAP_SCAN` (Linux 6.7): knows the shared zero page.
    Scan,
    /// Eight bytes a page from /proc/self/pagemap.
    Entries,
}

/// Our page tables.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    way: Way,
}

/// How written pages of guarded memory (`userfaultfd::Guarded`) are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Protect what is found, in the same step.
    pub protect: bool,
    /// A page that is in no table was written, too. With `protect` the tables get a mark for it. Otherwise such a page, and
    /// the shared zero page that stands for one, was not written.
    pub absent: bool,
}

impl Pagemap {
    /// Calls `f` with each address range of `range` that was written since it was protected, ascending. `step`: bytes asked
    /// for at once, whole pages of the mapping. On failure ranges may have been protected that `f` was not told of. `EPERM`:
    /// what is mapped there is not guarded.
    pub fn each_written(
        &self,
        range: &Range<u64>,
        step: u64,
        look: Look,
        f: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut regions = [Region::default(); REGIONS];
        let mut at = range.start;
        while at < range.end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: CHECK_WPASYNC | if look.protect { WP_MATCHING } else { 0 },
                start: at,
                end: range.end.min(at.saturating_add(step)),
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: REGIONS as u64,
                category_mask: WRITTEN,
                return_mask: WRITTEN,
                ..ScanArg::default()
            };
            if !look.absent {
                (arg.category_inverted, arg.category_anyof_mask) = (ZERO_PAGE, PRESENT | SWAPPED);
                arg.category_mask |= ZERO_PAGE;
            }
            let found = self.scan(&mut arg)?;
            regions.iter().take(found).for_each(|region| f(region.start..region.end));
            if arg.walk_end <= at {
                return Err(io::Error::other(format!("PAGEMAP_SCAN does not get beyond {at:#x}")));
            }
            at = arg.walk_end;
        }
        Ok(())
    }

    /// The best way this kernel has.
    pub fn open() -> Result<Self> {
        Self::open_with(Way::Scan).or_else(|_| Self::open_with(Way::Entries))
    }

    /// A given way.
    pub fn open_with(way: Way) -> Result<Self> {
        // SAFETY: sysconf takes no pointers.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if u64::try_from(page) != Ok(PAGE) {
            return Err(Error::new(libc::EOPNOTSUPP, format!("pages of this machine have {page} bytes, not {PAGE}")));
        }
        let file = File::open("/proc/self/pagemap").map_err(|e| Error::from_io("/proc/self/pagemap", &e))?;
        let map = Self { file, way };
        if way == Way::Scan {
            // An empty range: only tells whether the ioctl is there.
            let mut arg = ScanArg { size: size_of::<ScanArg>() as u64, ..ScanArg::default() };
            map.scan(&mut arg).map_err(|e| Error::from_io("PAGEMAP_SCAN", &e))?;
        }
        Ok(map)
    }

    /// The way in use.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Calls `f` with each address range of `range` whose pages are in our tables, ascending; `swapped`: or swapped
    /// out. The shared zero page counts as not there where the kernel tells it apart. A marker that stands for no page
    /// (userfaultfd's, for a page that never existed) counts as swapped.
    pub fn each(&self, range: Range<u64>, swapped: bool, f: &mut dyn FnMut(Range<u64>)) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + SPAN);
            match self.way {
                Way::Scan => self.each_scanned(at..end, swapped, f)?,
                Way::Entries => self.each_entry(at..end, swapped, f)?,
            }
            at = end;
        }
        Ok(())
    }

    fn each_scanned(&self, range: Range<u64>, swapped: bool, f: &mut dyn FnMut(Range<u64>)) -> Result<()> {
        let mut regions = [Region::default(); REGIONS];
        let mut at = range.start;
        while at < range.end {
            let mut arg = ScanArg::looking(at..range.end, swapped, regions.as_mut_ptr());
            arg.vec_len = REGIONS as u64;
            let found = self.scan(&mut arg).map_err(|e| Error::from_io("PAGEMAP_SCAN", &e))?;
            for region in regions.iter().take(found) {
                f(region.start..region.end);
            }
            if arg.walk_end <= at {
                return Err(Error::new(libc::EPROTO, format!("PAGEMAP_SCAN does not get beyond {at:#x}")));
            }
            at = arg.walk_end;
        }
        Ok(())
    }

    /// Whether [`each`](Self::each) would find something in `range`. Cheaper: looks no further than the first page.
    pub fn any(&self, range: Range<u64>, swapped: bool) -> Result<bool> {
        if self.way == Way::Entries {
            let mut any = false;
            self.each(range, swapped, &mut |_| any = true)?;
            return Ok(any);
        }
        let mut region = Region::default();
        let mut arg = ScanArg { vec_len: 1, max_pages: 1, ..ScanArg::looking(range, swapped, &raw mut region) };
        Ok(self.scan(&mut arg).map_err(|e| Error::from_io("PAGEMAP_SCAN", &e))? > 0)
    }

    fn scan(&self, arg: &mut ScanArg) -> io::Result<usize> {
        let request = libc::_IOWR::<ScanArg>(u32::from(b'f'), 16);
        // SAFETY: PAGEMAP_SCAN reads and fills one struct pm_scan_arg, which `arg` is; its vector is null with length
        // zero or a live array of the length it names. It only looks, or protects asynchronously what is guarded for that,
        // which no program can see.
        let found = unsafe { libc::ioctl(self.file.as_raw_fd(), request, std::ptr::from_mut(arg)) };
        usize::try_from(found).map_err(|_| io::Error::last_os_error())
    }

    fn each_entry(&self, range: Range<u64>, swapped: bool, f: &mut dyn FnMut(Range<u64>)) -> Result<()> {
        const ENTRIES: usize = 512;
        let wanted: u64 = if swapped { 0b11 << 62 } else { 1 << 63 };
        let mut bytes = [0u8; ENTRIES * 8];
        let mut at = range.start;
        let mut run: Option<u64> = None;
        while at < range.end {
            let pages = usize::try_from((range.end - at).div_ceil(PAGE)).unwrap_or(ENTRIES).min(ENTRIES);
            let buffer = &mut bytes[..pages * 8];
            let read = self.file.read_exact_at(buffer, at / PAGE * 8);
            read.map_err(|e| Error::from_io("/proc/self/pagemap", &e))?;
            for entry in buffer.chunks_exact(8) {
                let there = entry.try_into().map_or(0, u64::from_ne_bytes) & wanted != 0;
                match (there, run) {
                    (true, None) => run = Some(at),
                    (false, Some(start)) => {
                        f(start..at);
                        run = None;
                    }
                    _ => {}
                }
                at += PAGE;
            }
        }
        if let Some(start) = run {
            f(start..at);
        }
        Ok(())
    }
}

/// The first byte at or after `from` that the file has; None: nothing up to its end.
///
/// Where data ends is not asked: `SEEK_HOLE` walks to the next hole of the whole file, 40 ms a GiB.
pub fn next_data(file: &File, from: u64) -> Result<Option<u64>> {
    let from = i64::try_from(from).map_err(|_| Error::invalid(format!("no file has a byte {from:#x}")))?;
    // SAFETY: lseek takes no pointers, and the file position is ours alone.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from, libc::SEEK_DATA) };
    if let Ok(at) = u64::try_from(at) {
        return Ok(Some(at));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        _ => Err(Error::from_io("SEEK_DATA", &error)),
    }
}
