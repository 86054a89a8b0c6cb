//! Guest RAM is registered in blocks: contiguous pieces of this process's memory, known to both sides by name. Every
//! write to it must be seen by the library: the vCPUs' by KVM's dirty log or ring (vmig_use_kvm(), vmig_add_kvm_slot()),
//! or by vmig_dirty() on an emulator's store path, or by the kernel's write protection, which needs nothing of the VMM;
//! a device's by vmig_dirty() or a dirty source. Option `dirty-tracker` chooses; docs/dirty-tracking.md says what each
//! sees.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use super::guest::vmig;
use super::{enter, guest, string};
use crate::dirty::callback::{Source, vmig_dirty_source};
use crate::error::{Error, Result};
use crate::machine::KvmSlot;
use crate::ram::BlockSpec;
use crate::ram::handed::MemoryFile;
use crate::sys::io;
use crate::sys::sized::{SizedStruct, sized_copy, sized_fill};

/// Flag of a block: every write to it is reported with vmig_dirty(); no other tracking is needed.
pub const VMIG_RAM_MARKED: u32 = 1;
/// Flag of a block: its storage is seen by both sides (a file on shared storage); its bytes are not sent.
pub const VMIG_RAM_SHARED_STORAGE: u32 = 2;
/// Flag of a block: `fd` and `fd_offset` say which file in memory (memfd, shm, tmpfs, hugetlb) the block is a shared,
/// writable mapping of. With option `hand-over` on at both sides of a unix socket the file is handed over instead of the
/// bytes. When a guest arrives that way, the library maps its file over the block (hook `ram_replaced`).
pub const VMIG_RAM_FD: u32 = 4;

/// A block of guest RAM.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_ram {
    /// Size of the struct: VMIG_SIZED(vmig_ram).
    pub size: usize,
    /// Name, the same on both sides; 1 to 255 printable bytes. Copied.
    pub name: *const c_char,
    /// Start in this process, page aligned (4096 bytes). Must stay mapped until the block is removed.
    pub host: *mut c_void,
    /// Length in bytes, a multiple of 4096, the same on both sides.
    pub len: u64,
    /// Guest-physical address, a multiple of 4096.
    pub gpa: u64,
    /// Sum of VMIG_RAM_... flags.
    pub flags: u32,
    /// With VMIG_RAM_FD the file behind the block, open for reading and writing; else 0. Duplicated; the caller keeps
    /// its own.
    pub fd: c_int,
    /// With VMIG_RAM_FD where in the file the block begins, in bytes; else 0.
    pub fd_offset: u64,
}

// SAFETY: repr(C), size first, integers and raw pointers, no padding.
unsafe impl SizedStruct for vmig_ram {
    const NAME: &'static str = "vmig_ram";
    const REQUIRED: usize = std::mem::offset_of!(vmig_ram, gpa);
}

/// Registers a block of guest RAM. -EEXIST if the name is taken or the memory overlaps another block's; -EBUSY while a
/// migration runs; -EINVAL, -EACCES or -EPERM if the block is not a mapping of the file it names by VMIG_RAM_FD, or of
/// one that cannot be handed over; the text says what differs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_add_ram(m: *mut vmig, ram: *const vmig_ram) -> c_int {
    enter("vmig_add_ram", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of sized structs.
        let ram = unsafe { sized_copy(ram) }?;
        let known = VMIG_RAM_MARKED | VMIG_RAM_SHARED_STORAGE | VMIG_RAM_FD;
        if ram.flags & !known != 0 {
            return Err(Error::invalid(format!("vmig_ram.flags {:#x} has unknown bits", ram.flags)));
        }
        // SAFETY: the C contract of strings.
        let name = unsafe { string("vmig_ram.name", ram.name) }?.to_owned();
        machine.add_ram(BlockSpec {
            name,
            host: ram.host.cast(),
            len: ram.len,
            gpa: ram.gpa,
            marked: ram.flags & VMIG_RAM_MARKED != 0,
            shared_storage: ram.flags & VMIG_RAM_SHARED_STORAGE != 0,
            file: file_of(&ram)?.map(Arc::new),
        })?;
        Ok(0)
    })
}

/// The file that a block names.
fn file_of(ram: &vmig_ram) -> Result<Option<MemoryFile>> {
    if ram.flags & VMIG_RAM_FD == 0 {
        return match (ram.fd, ram.fd_offset) {
            (0, 0) => Ok(None),
            _ => Err(Error::invalid("vmig_ram.fd and fd_offset need the flag VMIG_RAM_FD")),
        };
    }
    if ram.flags & VMIG_RAM_SHARED_STORAGE != 0 {
        return Err(Error::invalid("VMIG_RAM_SHARED_STORAGE excludes VMIG_RAM_FD: the bytes do not migrate at all"));
    }
    let fd = io::duplicate(ram.fd).map_err(|e| e.context("vmig_ram.fd"))?;
    Ok(Some(MemoryFile::new(fd, ram.fd_offset)))
}

/// Forgets a block and its KVM slots; the memory is not used any more once this returns. -ENOENT: there is no such
/// block; -EBUSY while a migration runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_remove_ram(m: *mut vmig, name: *const c_char) -> c_int {
    enter("vmig_remove_ram", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        machine.remove_ram(unsafe { string("name", name) }?)?;
        Ok(0)
    })
}

/// `len` bytes of guest RAM at `host` (an address in this process) were written by something whose writes nobody else
/// sees: a device, or an emulated CPU. Call it after the write. Wait-free; costs one atomic operation per block and
/// word of 64 pages. Memory that is in no block is ignored. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_dirty(m: *mut vmig, host: *const c_void, len: u64) {
    // SAFETY: the C contract of handles. No fence: nothing in here can panic, and this is the hot path of devices.
    if let Ok(machine) = unsafe { guest(m) } {
        machine.mark_dirty(host as u64, len);
    }
}

/// Adds something else that knows which pages were written (a vhost-user device, VFIO, an emulator's own log): it is asked
/// at every sync, and what it reports is sent as well. `opaque` is what its callbacks get, and its name for
/// vmig_remove_dirty_source(). -EEXIST: there is one with this pointer; -EBUSY while a migration runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_add_dirty_source(
    m: *mut vmig,
    source: *const vmig_dirty_source,
    opaque: *mut c_void,
) -> c_int {
    enter("vmig_add_dirty_source", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract: the callbacks accept opaque on any thread until destroy.
        machine.add_dirty_source(unsafe { Source::new(source, opaque) }?)?;
        Ok(0)
    })
}

/// Forgets a dirty source; no callback of it comes after this returned. -ENOENT: there is none with this pointer; -EBUSY
/// while a migration runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_remove_dirty_source(m: *mut vmig, opaque: *mut c_void) -> c_int {
    enter("vmig_remove_dirty_source", || {
        // SAFETY: the C contract of handles.
        drop(unsafe { guest(m) }?.remove_dirty_source(opaque)?);
        Ok(0)
    })
}

/// Takes over the KVM side of the guest: vCPU, interrupt controller, PIT and clock state migrate as ready sections, and the
/// dirty log is read from KVM. The fds are duplicated; the caller keeps its own. vCPU i is `vcpu_fds[i]`, on both sides.
/// Switches on KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 for the VM, unless the VMM enabled KVM's dirty rings: these are then used
/// instead, see vmig_dirty_ring_full(); the VMM must not switch that capability on with them. -EEXIST the second time;
/// -ENOSYS on architectures that are not supported yet. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_use_kvm(m: *mut vmig, vm_fd: c_int, vcpu_fds: *const c_int, vcpus: usize) -> c_int {
    /// More vCPUs than any kernel has.
    const VCPUS_MAX: usize = 1 << 16;
    enter("vmig_use_kvm", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        if vcpu_fds.is_null() || vcpus == 0 || vcpus > VCPUS_MAX {
            return Err(Error::invalid(format!("vcpu_fds is NULL, or {vcpus} is no number of vCPUs")));
        }
        // SAFETY: not NULL; the C contract says there are as many.
        let fds = unsafe { std::slice::from_raw_parts(vcpu_fds, vcpus) };
        machine.use_kvm(vm_fd, fds)?;
        Ok(0)
    })
}

/// A KVM memory slot: the part of a RAM block that it shows to the guest.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_kvm_slot {
    /// Size of the struct: VMIG_SIZED(vmig_kvm_slot).
    pub size: usize,
    /// Number of the slot; bits 16 and up are the address space, as in KVM_SET_USER_MEMORY_REGION.
    pub slot: u32,
    /// KVM_MEM_... flags the VMM gave the slot, without KVM_MEM_LOG_DIRTY_PAGES.
    pub flags: u32,
    /// Name of the RAM block.
    pub ram: *const c_char,
    /// Where in the block the slot starts, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Guest-physical address of the slot.
    pub gpa: u64,
}

// SAFETY: repr(C), size first, integers and raw pointers, no padding.
unsafe impl SizedStruct for vmig_kvm_slot {
    const NAME: &'static str = "vmig_kvm_slot";
    const REQUIRED: usize = size_of::<vmig_kvm_slot>();
}

/// Registers a KVM memory slot, after vmig_use_kvm() and its RAM block. Several slots may show one block, from any
/// offset. While a migration runs the slot's dirty log is on: switched by the hook `log_dirty`, or, without that hook,
/// by the library itself, which sets the slot again with the values given here. Do not change or delete the slot while
/// a migration runs: that is noticed where KVM lets us, and fails the migration. When the guest left, the log stays on
/// (switching it off can take 20 ms a GiB) until a guest is to arrive, or vmig_free(). When it stayed, the log is switched
/// off just after the state says so: change or delete the slot behind vmig_remove_kvm_slot(), which waits for that.
/// -EBUSY while a migration runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_add_kvm_slot(m: *mut vmig, slot: *const vmig_kvm_slot) -> c_int {
    enter("vmig_add_kvm_slot", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of sized structs.
        let slot = unsafe { sized_copy(slot) }?;
        // SAFETY: the C contract of strings.
        let ram = unsafe { string("vmig_kvm_slot.ram", slot.ram) }?;
        machine.add_kvm_slot(&KvmSlot {
            number: slot.slot,
            flags: slot.flags,
            ram,
            offset: slot.offset,
            len: slot.len,
            gpa: slot.gpa,
        })?;
        Ok(0)
    })
}

/// vCPU `vcpu` (as vmig_use_kvm() was given them) left KVM_RUN with KVM_EXIT_DIRTY_RING_FULL: makes room in its dirty ring,
/// so that it can go on. Only for VMMs that enabled KVM_CAP_DIRTY_LOG_RING, before they made their first vCPU:
/// vmig_use_kvm() finds the rings and takes them over, and nobody else may then take from them. Call it for every such exit,
/// whether a migration runs or not, on the vCPU's thread. A vCPU beyond its dirty limit waits here, 10 ms at most: KVM then
/// says again that the ring is full, and the VMM's loop may look in between whether the guest is to pause. -EINVAL: there
/// are no rings, or no such vCPU. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_dirty_ring_full(m: *mut vmig, vcpu: c_uint) -> c_int {
    enter("vmig_dirty_ring_full", || {
        let vcpu = usize::try_from(vcpu).unwrap_or(usize::MAX);
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.ring()?.ring_full(vcpu)?;
        Ok(0)
    })
}

/// Limits how fast a vCPU dirties memory, in bytes per second; 0: no longer. `vcpu` -1: all of them. With a migration or
/// without one: writes are logged as long as there is a limit, and the limit stays until it is lifted. vCPUs below their
/// limit are not slowed down; one beyond it stands at its full ring, some milliseconds at a time, and is to be stopped with
/// a kick of its thread as ever. Slots that are added meanwhile are limited when a limit is set again. A migration may
/// limit them further (option `dirty-limit`), for as long as it runs. Hook `log_dirty` is called on this thread. -EINVAL:
/// there are no rings, or no such vCPU; -EBUSY: a migration is just beginning or ending. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_set_vcpu_dirty_limit(m: *mut vmig, vcpu: c_int, bytes_per_second: u64) -> c_int {
    enter("vmig_set_vcpu_dirty_limit", || {
        let all = vcpu == -1;
        let one = usize::try_from(vcpu).ok();
        if one.is_none() && !all {
            return Err(Error::invalid(format!("there is no vCPU {vcpu}; -1 stands for all of them")));
        }
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.limit_vcpu(one, bytes_per_second)?;
        Ok(0)
    })
}

/// How fast a vCPU dirties memory, and may. Known while a migration runs with KVM's dirty rings, or a limit is set; 0
/// otherwise.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_vcpu_dirt {
    /// Size of the struct: VMIG_SIZED(vmig_vcpu_dirt).
    pub size: usize,
    /// Bytes per second it may dirty, by vmig_set_vcpu_dirty_limit() or a migration: the lower one. 0: no limit.
    pub limit: u64,
    /// Bytes per second it dirtied in the last whole second.
    pub rate: u64,
    /// Percent of that second in which it stood at its full ring because of its limit.
    pub throttle: u64,
}

// SAFETY: repr(C), size first, integers, no padding.
unsafe impl SizedStruct for vmig_vcpu_dirt {
    const NAME: &'static str = "vmig_vcpu_dirt";
    const REQUIRED: usize = size_of::<usize>();
}

/// Fills `*out`. -EINVAL: there are no dirty rings, or no such vCPU. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_vcpu_dirt(m: *mut vmig, vcpu: c_uint, out: *mut vmig_vcpu_dirt) -> c_int {
    enter("vmig_get_vcpu_dirt", || {
        // SAFETY: the C contract of handles.
        let all = unsafe { guest(m) }?.ring()?.dirt();
        let found = usize::try_from(vcpu).ok().and_then(|vcpu| all.get(vcpu));
        let dirt =
            found.ok_or_else(|| Error::invalid(format!("there is no vCPU {vcpu}: there are {}", all.len())))?;
        let now = vmig_vcpu_dirt {
            size: size_of::<vmig_vcpu_dirt>(),
            limit: dirt.limit,
            rate: dirt.speed.rate,
            throttle: dirt.speed.percent,
        };
        // SAFETY: the C contract: NULL or a sized struct.
        unsafe { sized_fill(out, &now) }?;
        Ok(0)
    })
}

/// Forgets a KVM memory slot. -ENOENT: it is not registered; -EBUSY while a migration runs. \[bql\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_remove_kvm_slot(m: *mut vmig, slot: u32) -> c_int {
    enter("vmig_remove_kvm_slot", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.remove_kvm_slot(slot)?;
        Ok(0)
    })
}
