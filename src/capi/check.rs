//! Before the guest leaves: asking a destination, and telling it how to build itself.

use std::ffi::{CString, c_char, c_int, c_void};

use super::guest::vmig;
use super::migrate::{error_json, nanos};
use super::{enter, guest, string};
use crate::error::Error;
use crate::outgoing::Report;
use crate::sys::sized::{SizedStruct, sized_fill};

/// What vmig_check() measured. Times in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_check_report {
    /// Size of the struct: VMIG_SIZED(vmig_check_report).
    pub size: usize,
    /// Time to connect.
    pub connect: u64,
    /// From the hello to its answer: a round trip and the comparison.
    pub hello: u64,
    /// The comparison at the destination.
    pub compare: u64,
    /// Saving the devices that can be saved while the guest runs, all together, with the big lock held.
    pub devices: u64,
    /// Bytes of their state.
    pub device_bytes: u64,
    /// How many devices these were.
    pub devices_timed: u32,
    /// How many could not be tried, because only a stopped guest's can be saved: tables with callbacks or descriptors,
    /// custom sections, vCPUs and other state of KVM.
    pub devices_untimed: u32,
    /// What the stop hook and the run-state handlers took when the guest was stopped here last; 0: it never was.
    pub stop: u64,
    /// The same for the last start.
    pub start: u64,
}

// SAFETY: repr(C), size first, integers, no padding.
unsafe impl SizedStruct for vmig_check_report {
    const NAME: &'static str = "vmig_check_report";
    const REQUIRED: usize = size_of::<usize>();
}

/// Asks the destination that listens at `uri` whether the guest could go there, and measures what a migration would wait
/// for. The guest here runs on undisturbed; the destination is not touched and waits on. Waits at most for
/// `connect-timeout` and `stall-timeout`.
///
/// Returns how many differences there are, 0: none. Fills `*report` (NULL: not wanted), and stores in `*differences`
/// (NULL: not wanted) a JSON array of them, each as vmig_get_error() writes it; free it with vmig_string_free(). The
/// features, limits, RAM, devices and CPUs compared are those of vmig_outgoing(). A destination that would build itself
/// (vmig_ops.config) from a configuration given here is not asked to: then RAM, devices and CPUs are not compared. One more
/// in the list is a dirty tracker that would be refused here, with the reason (option `dirty-tracker`; the kernel or a sysctl
/// forbids write protection; nobody would see writes to a block). It is not started for this, so that a single block which
/// the kernel does not let it protect is found by vmig_outgoing() only.
///
/// Run-state handlers and what only a stopped guest can save are not tried, because nothing is stopped for this: of them
/// the report has what the last stop and start took. CPUID, TSC and MSRs are compared if the guest was last started by
/// vmig_start() or is stopped: vCPUs that run cannot be looked at.
///
/// -EBUSY: a migration runs here, another guest is arriving there, or something blocks migration; -ENOTSUP: nobody can be
/// asked at such an address (fd:, file:, exec:, or with peer=qemu); -EPERM: the guest is not here; also errors of
/// connecting. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_check(
    m: *mut vmig,
    uri: *const c_char,
    report: *mut vmig_check_report,
    differences: *mut *mut c_char,
) -> c_int {
    enter("vmig_check", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        let found = machine.check(unsafe { string("uri", uri) }?)?;
        let list: Vec<_> = found.differences.iter().map(error_json).collect();
        let text = CString::new(serde_json::Value::from(list).to_string())
            .map_err(|_| Error::new(libc::EIO, "a text contains NUL"))?;
        if !report.is_null() {
            // SAFETY: the C contract: a sized struct that can be written.
            unsafe { sized_fill(report, &report_of(&found)) }?;
        }
        if !differences.is_null() {
            // SAFETY: the C contract: not NULL means that it can be written.
            unsafe { differences.write(text.into_raw()) };
        }
        Ok(c_int::try_from(found.differences.len()).unwrap_or(c_int::MAX))
    })
}

fn report_of(found: &Report) -> vmig_check_report {
    vmig_check_report {
        size: size_of::<vmig_check_report>(),
        connect: nanos(found.connect),
        hello: nanos(found.hello),
        compare: nanos(found.compare),
        devices: nanos(found.devices.took),
        device_bytes: found.devices.bytes,
        devices_timed: found.devices.timed,
        devices_untimed: found.devices.untimed,
        stop: nanos(found.stop),
        start: nanos(found.start),
    }
}

/// Sets what a destination's hook vmig_ops.config gets before both sides compare what they have: whatever it needs to
/// build itself. At most 1 MiB, copied; `len` 0 takes it back. Travels to a vmig only. -EBUSY while a migration runs.
/// \[any\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_set_config(m: *mut vmig, blob: *const c_void, len: usize) -> c_int {
    enter("vmig_set_config", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        if blob.is_null() && len > 0 || isize::try_from(len).is_err() {
            return Err(Error::invalid(format!("the configuration is NULL, or {len} is no number of bytes")));
        }
        let blob = match len {
            0 => &[],
            // SAFETY: not NULL; the C contract says there are as many bytes, and nobody writes them during the call.
            _ => unsafe { std::slice::from_raw_parts(blob.cast::<u8>(), len) },
        };
        machine.set_config(blob)?;
        Ok(0)
    })
}
