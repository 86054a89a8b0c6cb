//! KVM as far as every architecture has it: the VM fd, its memory slots and their dirty log.
#![allow(unsafe_code, reason = "raw ioctls and the guarded mapping the kernel copies the dirty log into")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_USER_MEMORY, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
    kvm_userspace_memory_region,
};

use super::thread_sys::with_signals_blocked;
use crate::error::{Error, Result, strerror};

/// `KVMIO`: the type byte of every KVM ioctl.
const KVMIO: u64 = 0xae;

/// An ioctl without an argument structure.
pub(super) const fn io(nr: u64) -> libc::c_ulong {
    (KVMIO << 8) | nr
}

/// An ioctl whose structure `T` the kernel reads.
pub(super) const fn iow<T>(nr: u64) -> libc::c_ulong {
    (1 << 30) | ((size_of::<T>() as u64) << 16) | io(nr)
}

/// An ioctl whose structure `T` the kernel writes.
#[cfg(target_arch = "x86_64")]
pub(super) const fn ior<T>(nr: u64) -> libc::c_ulong {
    (2 << 30) | ((size_of::<T>() as u64) << 16) | io(nr)
}

const GET_API_VERSION: libc::c_ulong = io(0x00);
const CHECK_EXTENSION: libc::c_ulong = io(0x03);
const GET_DIRTY_LOG: libc::c_ulong = iow::<kvm_dirty_log>(0x42);
const SET_USER_MEMORY_REGION: libc::c_ulong = iow::<kvm_userspace_memory_region>(0x46);
const ENABLE_CAP: libc::c_ulong = iow::<kvm_enable_cap>(0xa3);
/// Declared `_IOWR` by the kernel although nothing is written back.
const CLEAR_DIRTY_LOG: libc::c_ulong = iow::<kvm_clear_dirty_log>(0xc0) | (2 << 30);

const RESET_DIRTY_RINGS: libc::c_ulong = io(0xc7);

/// Flag of a memory slot: keep a dirty log.
pub const LOG_DIRTY_PAGES: u32 = KVM_MEM_LOG_DIRTY_PAGES;

/// Pages per word of a dirty bitmap; clearing starts at multiples of it.
pub const GROUP: u64 = 64;

/// Pages one call clears at most: 16 MiB. The kernel holds the lock that a vCPU needs to write a protected page all the
/// while, so this is what bounds the stall of a running guest.
pub const CLEAR_MAX: u32 = 4096;

/// Duplicates `fd`, close-on-exec, so that the caller may close its own at any time.
pub(super) fn dup(fd: RawFd, what: &str) -> Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer and touches no memory; a bad fd is an error.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(Error::last_os(format_args!("duplicating {what} fd {fd}")));
    }
    // SAFETY: the kernel just made `copy` for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Refuses an fd that the kernel shows to be something else. Where /proc is missing, or a kernel uses names of its own,
/// the check is left to the ioctls.
///
/// Asking a vCPU fd anything by ioctl waits while the vCPU runs, so a mix-up has to be found without one.
pub(super) fn check_kind(fd: RawFd, what: &str, name: &str) -> Result<()> {
    let Ok(link) = std::fs::read_link(format!("/proc/self/fd/{fd}")) else { return Ok(()) };
    let link = link.to_string_lossy();
    if link.starts_with("anon_inode:") && (link.contains(name) || !link.contains("kvm-")) {
        return Ok(());
    }
    Err(Error::invalid(format!("fd {fd} is not a {what}")).expected_got(format!("anon_inode:{name}"), link))
}

/// The VM fd of the caller, duplicated.
#[derive(Debug)]
pub struct Vm {
    fd: OwnedFd,
}

/// What the kernel gave of the flags we asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManualProtect {
    /// `KVM_GET_DIRTY_LOG` leaves pages writable until `KVM_CLEAR_DIRTY_LOG`, so reading the log does not stall.
    pub manual: bool,
    /// Switching logging on marks all pages dirty instead of write-protecting them in one go.
    pub initially_set: bool,
}

/// A memory slot, as the VMM registered it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Number, with the address space in the upper 16 bits.
    pub slot: u32,
    /// `KVM_MEM_*` flags.
    pub flags: u32,
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes; 0 removes the slot.
    pub len: u64,
    /// Address of the memory in this process.
    pub host: u64,
}

impl Vm {
    /// Duplicates the caller's VM fd, after asking it whether it is one.
    pub fn dup(fd: RawFd) -> Result<Self> {
        let vm = Self { fd: dup(fd, "the VM")? };
        check_kind(fd, "KVM VM", "kvm-vm")?;
        let wrong = |why: &str| Error::invalid(format!("fd {fd} is not a KVM VM: {why}"));
        // /dev/kvm itself answers KVM_CHECK_EXTENSION too, but only it knows the API version.
        if vm.ioctl(GET_API_VERSION, 0).is_ok() {
            return Err(wrong("it is /dev/kvm; pass what KVM_CREATE_VM returned"));
        }
        match vm.extension(KVM_CAP_USER_MEMORY) {
            Ok(n) if n > 0 => Ok(vm),
            Ok(_) => Err(wrong("it does not report KVM_CAP_USER_MEMORY")),
            Err(error) => Err(wrong(error.text())),
        }
    }

    /// `KVM_CHECK_EXTENSION` on the VM: 0 is "no".
    pub fn extension(&self, cap: u32) -> Result<i32> {
        self.ioctl(CHECK_EXTENSION, u64::from(cap))
            .map_err(|errno| Error::new(errno, format!("KVM_CHECK_EXTENSION {cap}: {}", strerror(errno))))
    }

    /// Asks for clearing by hand and for logs that start all set; reports what the kernel has.
    ///
    /// Holds for logging switched on *afterwards*, so call it before the first slot is logged.
    pub fn enable_manual_protect(&self) -> Result<ManualProtect> {
        let has = self.extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)?;
        let flags = u32::try_from(has).unwrap_or(0);
        let flags = flags & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        if flags != 0 {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args[0] = u64::from(flags);
            self.with(ENABLE_CAP, &cap).map_err(|errno| {
                Error::new(errno, format!("enabling KVM's manual dirty log protection: {}", strerror(errno)))
            })?;
        }
        Ok(ManualProtect {
            manual: flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
            initially_set: flags & KVM_DIRTY_LOG_INITIALLY_SET != 0,
        })
    }

    /// `KVM_SET_USER_MEMORY_REGION`. The VMM answers for `host`: pass what it registered, to change flags.
    pub fn set_slot(&self, slot: &Slot) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: slot.flags,
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        self.with(SET_USER_MEMORY_REGION, &region).map_err(|errno| {
            Error::new(
                errno,
                format!(
                    "KVM_SET_USER_MEMORY_REGION slot {} at {:#x}, {:#x} bytes, flags {:#x}: {}",
                    slot.slot,
                    slot.gpa,
                    slot.len,
                    slot.flags,
                    strerror(errno)
                ),
            )
        })
    }

    /// Reads the slot's dirty log into `log`, whose size is the number of pages the caller believes in.
    ///
    /// `ENOENT`: the slot has no log (or is gone). `ESTALE`: the slot has another size than it had.
    pub fn get_dirty_log(&self, slot: u32, log: &mut DirtyLog) -> Result<()> {
        let request = kvm_dirty_log {
            slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: log.start.as_ptr().cast() },
        };
        self.with(GET_DIRTY_LOG, &request).map_err(|errno| match errno {
            libc::EFAULT => resized(slot, log.pages, "it is larger now"),
            libc::ENOENT => Error::new(
                errno,
                format!("slot {slot} has no dirty log: it was set without KVM_MEM_LOG_DIRTY_PAGES or deleted"),
            ),
            libc::ENXIO => Error::new(
                errno,
                format!("slot {slot}: this VM tracks dirty pages by dirty ring alone, KVM_GET_DIRTY_LOG is off"),
            ),
            _ => Error::new(errno, format!("KVM_GET_DIRTY_LOG slot {slot}: {}", strerror(errno))),
        })?;
        self.check_slot_size(slot, log.pages)
    }

    /// Clears `bits` of pages `first..first + pages` in the slot's log and protects them again.
    ///
    /// `first` is a multiple of [`GROUP`]; `pages` too, unless the range ends with the slot. More than [`CLEAR_MAX`] pages
    /// are refused.
    pub fn clear_dirty_log(&self, slot: u32, first: u64, pages: u32, bits: &[u64]) -> Result<()> {
        if pages > CLEAR_MAX {
            return Err(Error::invalid(format!("clearing {pages} pages at once would stall the guest"))
                .expected_got(format!("at most {CLEAR_MAX}"), pages));
        }
        if (bits.len() as u64) < u64::from(pages).div_ceil(GROUP) {
            return Err(Error::invalid(format!("{pages} pages need more than {} bitmap words", bits.len())));
        }
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr().cast_mut().cast() },
        };
        self.with(CLEAR_DIRTY_LOG, &request).map_err(|errno| match errno {
            libc::ENOENT => Error::new(errno, format!("slot {slot} has no dirty log any more")),
            _ => Error::new(
                errno,
                format!("KVM_CLEAR_DIRTY_LOG slot {slot} pages {first}+{pages}: {}", strerror(errno)),
            ),
        })
    }

    /// Protects the pages of all ring entries that were taken, and gives the entries back to KVM; how many.
    ///
    /// Signals wait meanwhile: for one, newer kernels end early, leave entries taken, and do not protect all pages of
    /// those they gave back.
    pub fn reset_dirty_rings(&self) -> Result<usize> {
        let done = with_signals_blocked(|| self.ioctl(RESET_DIRTY_RINGS, 0))?;
        done.map(|entries| usize::try_from(entries).unwrap_or(0))
            .map_err(|errno| Error::new(errno, format!("KVM_RESET_DIRTY_RINGS: {}", strerror(errno))))
    }

    /// `ESTALE` unless the slot has exactly `pages` pages; costs one ioctl and changes nothing.
    ///
    /// A range that does not end with the slot must end on a group, and one that ends behind it is refused: clearing
    /// no bit of the last group succeeds only if that is where the slot ends (or, if the last group is full, where it
    /// may have grown; then [`get_dirty_log`](Self::get_dirty_log) finds out).
    pub fn check_slot_size(&self, slot: u32, pages: u64) -> Result<()> {
        let first = pages.saturating_sub(1) / GROUP * GROUP;
        let rest = u32::try_from(pages - first).unwrap_or(0);
        match self.clear_dirty_log(slot, first, rest, &[0]) {
            Err(error) if error.errno() == libc::EINVAL => Err(resized(slot, pages, "it has another size now")),
            // Kernels without manual protection cannot be asked.
            Err(error) if error.errno() == libc::ENOTTY => Ok(()),
            done => done,
        }
    }

    fn with<T>(&self, request: libc::c_ulong, value: &T) -> std::result::Result<(), i32> {
        // `request` encodes the size of T, so the kernel reads just `value`; a bitmap it points to is checked above.
        self.ioctl(request, std::ptr::from_ref(value) as u64).map(drop)
    }

    fn ioctl(&self, request: libc::c_ulong, argument: u64) -> std::result::Result<i32, i32> {
        // SAFETY: `argument` is an integer or the address of a live structure of the size `request` encodes; buffers
        // such a structure names end at a guard page or are checked to be long enough.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) };
        if done >= 0 { Ok(done) } else { Err(errno()) }
    }
}

/// This thread's errno; `EIO` in the odd case that there is none.
pub(super) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn resized(slot: u32, pages: u64, how: &str) -> Error {
    Error::new(
        libc::ESTALE,
        format!("slot {slot} no longer has the {pages} pages it was registered with ({how}): the VMM re-set it"),
    )
}

/// A buffer for one slot's dirty log, reused from round to round.
///
/// Its last word ends where an inaccessible page begins: KVM copies as many words as the slot has *now*, and a slot
/// that grew behind our back must fail that copy instead of overrunning us.
#[derive(Debug)]
pub struct DirtyLog {
    map: NonNull<u8>,
    map_len: usize,
    start: NonNull<u64>,
    words: usize,
    pages: u64,
}

// SAFETY: the mapping belongs to the value alone and is not tied to the thread that made it.
unsafe impl Send for DirtyLog {}
// SAFETY: shared access only reads.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// A log for `pages` pages, all clean.
    pub fn new(pages: u64) -> Result<Self> {
        let words = usize::try_from(pages.div_ceil(GROUP)).map_err(|_| Error::no_memory("a dirty log", pages))?;
        if words == 0 {
            return Err(Error::invalid("a slot without pages has no dirty log"));
        }
        let page = host_page_size();
        let no_memory = || Error::no_memory("a dirty log", pages.div_ceil(8));
        let body = words.checked_mul(8).and_then(|n| n.checked_next_multiple_of(page)).ok_or_else(no_memory)?;
        let map_len = body.checked_add(page).ok_or_else(no_memory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), map_len, libc::PROT_NONE, flags, -1, 0) };
        let map = NonNull::new(map.cast::<u8>()).filter(|_| map != libc::MAP_FAILED).ok_or_else(no_memory)?;
        // SAFETY: words * 8 <= body < map_len, so the address stays inside the mapping.
        let start = unsafe { map.add(body - words * 8) };
        // From here on Drop unmaps.
        let log = Self { map, map_len, start: start.cast(), words, pages };
        // SAFETY: the first `body` bytes are ours and nothing refers to them yet.
        if unsafe { libc::mprotect(map.as_ptr().cast(), body, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(no_memory());
        }
        Ok(log)
    }

    /// Pages covered.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The same, to be changed.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as for `words`; the exclusive borrow of the log is one of the words.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.words) }
    }

    /// The bitmap of the last successful read, one bit per page, lowest first.
    pub fn words(&self) -> &[u64] {
        // SAFETY: `words` readable, aligned (page end minus a multiple of 8), zero-initialised words start there; the
        // kernel writes them only through &mut self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, this is its only unmapping, and borrows of it have ended.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.map_len) };
    }
}

fn host_page_size() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}
