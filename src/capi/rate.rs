//! Before the guest leaves: how fast it dirties its memory, and what a migration would come to.

use std::ffi::{CString, c_char, c_int};

use super::guest::vmig;
use super::migrate::nanos;
use super::{enter, guest};
use crate::dirty::rate::{Mode, State};
use crate::error::{Error, Result};
use crate::pacing::forecast::Verdict;
use crate::sys::sized::{SizedStruct, sized_fill};

/// Hashes of some pages, taken again: no tracker, next to no cost, but what is written seldom or in few places is not seen.
pub const VMIG_RATE_SAMPLING: u32 = 0;
/// The trackers that option `dirty-tracker` chooses, switched on for the time.
pub const VMIG_RATE_BITMAP: u32 = 1;
/// KVM's dirty rings, which the VMM enabled: each vCPU by itself, too.
pub const VMIG_RATE_RING: u32 = 2;

/// Nothing was measured yet.
pub const VMIG_RATE_NONE: u32 = 0;
/// It is being measured.
pub const VMIG_RATE_MEASURING: u32 = 1;
/// It was measured.
pub const VMIG_RATE_MEASURED: u32 = 2;
/// It could not be measured.
pub const VMIG_RATE_FAILED: u32 = 3;

/// How fast the guest dirties its memory. Zeros where nothing was measured.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_dirty_rate {
    /// Size of the struct: VMIG_SIZED(vmig_dirty_rate).
    pub size: usize,
    /// Where it stands: VMIG_RATE_NONE, ...
    pub state: u32,
    /// How: VMIG_RATE_SAMPLING, ...
    pub mode: u32,
    /// For how long, in milliseconds.
    pub period_ms: u64,
    /// Pages sampled of each GiB; 0 in the other modes.
    pub sample_pages: u64,
    /// When it began, in nanoseconds of CLOCK_MONOTONIC.
    pub began: u64,
    /// Bytes per second that become dirty while all memory is clean: what a page written twice adds is not counted.
    pub rate: u64,
    /// Distinct bytes dirtied in the whole time.
    pub working_set: u64,
    /// Bytes that would have to be sent first: what exists and is not zero.
    pub content: u64,
    /// 1: the working set is all the guest goes round in, for nearly nothing new came in the second half of the time; 0: it
    /// is larger, or not known.
    pub complete: u32,
    /// 1: both halves of the time were alike; 0: the guest was not steady, and nothing can be forecast.
    pub steady: u32,
    /// vCPUs whose rates vmig_get_vcpu_dirty_rates() tells; 0: no dirty rings.
    pub vcpus: u64,
}

// SAFETY: repr(C), size first, integers, no padding.
unsafe impl SizedStruct for vmig_dirty_rate {
    const NAME: &'static str = "vmig_dirty_rate";
    const REQUIRED: usize = size_of::<usize>();
}

/// Starts to measure, for `period_ms` milliseconds (50 to 60000), how fast the guest dirties its memory, and returns at once;
/// the thread `dirty_rate` does the work, while the guest runs. `sample_pages` (128 to 16384) of each GiB are sampled, 0: 512;
/// with other modes it is 0. Forgets what was measured before. docs/dirty-rate.md says what each mode sees and costs.
///
/// While it is being measured nothing can be registered or removed (-EBUSY). A migration that begins ends it.
///
/// -EINVAL: no such mode, time or number of samples, no tracker (option `dirty-tracker` is none), no dirty rings; -EBUSY: a
/// migration runs, or it is being measured; -EPERM: the guest is not here. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_measure_dirty_rate(
    m: *mut vmig,
    mode: u32,
    period_ms: u64,
    sample_pages: u64,
) -> c_int {
    enter("vmig_measure_dirty_rate", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        let mode = match mode {
            VMIG_RATE_SAMPLING => Mode::Sampling,
            VMIG_RATE_BITMAP => Mode::Bitmap,
            VMIG_RATE_RING => Mode::Ring,
            _ => return Err(Error::invalid(format!("the dirty rate is not measured in mode {mode}: there is none"))),
        };
        machine.measure_dirty_rate(mode, period_ms, sample_pages)?;
        Ok(0)
    })
}

/// Fills `*rate` with what was measured last, or is being measured. Stores in `*why` (NULL: not wanted) why it failed, or
/// NULL if it did not; free it with vmig_string_free(). \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_dirty_rate(
    m: *mut vmig,
    rate: *mut vmig_dirty_rate,
    why: *mut *mut c_char,
) -> c_int {
    enter("vmig_get_dirty_rate", || {
        // SAFETY: the C contract of handles.
        let now = unsafe { guest(m) }?.dirty_rate();
        let found = now.found.as_deref();
        let flag = |flag: bool| u32::from(flag);
        let all = vmig_dirty_rate {
            size: size_of::<vmig_dirty_rate>(),
            state: match now.state {
                State::None => VMIG_RATE_NONE,
                State::Measuring => VMIG_RATE_MEASURING,
                State::Measured => VMIG_RATE_MEASURED,
                State::Failed => VMIG_RATE_FAILED,
            },
            mode: now.ask.map_or(0, |ask| match ask.mode {
                Mode::Sampling => VMIG_RATE_SAMPLING,
                Mode::Bitmap => VMIG_RATE_BITMAP,
                Mode::Ring => VMIG_RATE_RING,
            }),
            period_ms: now.ask.map_or(0, |ask| nanos(ask.period) / 1_000_000),
            sample_pages: now.ask.map_or(0, |ask| ask.samples),
            began: now.began_ns,
            rate: found.map_or(0, |found| found.rate()),
            working_set: found.map_or(0, |found| found.curve.working_set()),
            content: found.map_or(0, |found| found.content),
            complete: flag(found.is_some_and(|found| found.curve.is_flat())),
            steady: flag(found.is_some_and(|found| found.steady)),
            vcpus: found.map_or(0, |found| found.vcpus.len() as u64),
        };
        let text = now.error.map(|error| c_text(error.text())).transpose()?;
        // SAFETY: the C contract: a sized struct that can be written.
        unsafe { sized_fill(rate, &all) }?;
        // SAFETY: the C contract: NULL or a place for a pointer.
        unsafe { store(why, text) };
        Ok(0)
    })
}

fn c_text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::new(libc::EIO, "a text contains NUL"))
}

/// # Safety
/// `to` is NULL or can be written.
unsafe fn store(to: *mut *mut c_char, text: Option<CString>) {
    if !to.is_null() {
        // SAFETY: not NULL; this function's contract.
        unsafe { to.write(text.map_or(std::ptr::null_mut(), CString::into_raw)) };
    }
}

/// Stores in `rates` the bytes per second that each of the first `count` vCPUs made dirty, in the order of vmig_use_kvm(), and
/// returns how many vCPUs there are; 0: nothing was measured, or without dirty rings. Here a page that was written again
/// after its ring had been emptied counts again, so they are more than the working set tells. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_vcpu_dirty_rates(m: *mut vmig, rates: *mut u64, count: usize) -> c_int {
    enter("vmig_get_vcpu_dirty_rates", || {
        // SAFETY: the C contract of handles.
        let now = unsafe { guest(m) }?.dirty_rate();
        let vcpus = now.found.map_or_else(Vec::new, |found| found.vcpus.clone());
        if rates.is_null() && count > 0 {
            return Err(Error::invalid("rates is NULL"));
        }
        for (n, rate) in vcpus.iter().take(count).enumerate() {
            // SAFETY: not NULL, and n is below count; the C contract says there is room for so many.
            unsafe { rates.wrapping_add(n).write(*rate) };
        }
        Ok(c_int::try_from(vcpus.len()).unwrap_or(c_int::MAX))
    })
}

/// Nobody can say.
pub const VMIG_FORECAST_UNKNOWN: u32 = 0;
/// The migration would come to its end.
pub const VMIG_FORECAST_CONVERGES: u32 = 1;
/// It would go on for ever, or until `total-timeout`.
pub const VMIG_FORECAST_DOES_NOT: u32 = 2;

/// What a migration would come to. Times in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_forecast_report {
    /// Size of the struct: VMIG_SIZED(vmig_forecast_report).
    pub size: usize,
    /// Whether it would converge: VMIG_FORECAST_UNKNOWN, ... If that is unknown the numbers below are the best guess there
    /// is, or 0.
    pub verdict: u32,
    /// Percent by which the guest would be throttled at last (option `auto-converge`).
    pub throttle: u32,
    /// From the beginning to the end; if it would not converge, until that was certain.
    pub total: u64,
    /// Rounds while the guest runs.
    pub rounds: u64,
    /// How long the guest would stand still; if it would not converge, how long it would have to.
    pub blackout: u64,
    /// Bytes left when the guest would be stopped, or left again and again.
    pub left: u64,
    /// Bytes sent altogether.
    pub sent: u64,
}

// SAFETY: repr(C), size first, integers, no padding.
unsafe impl SizedStruct for vmig_forecast_report {
    const NAME: &'static str = "vmig_forecast_report";
    const REQUIRED: usize = size_of::<usize>();
}

/// Works out what a migration would come to with the options as they are, if the way to the destination took `bandwidth`
/// bytes per second, from what was measured last (vmig_measure_dirty_rate()). Fills `*report`, and stores in `*why` (NULL: not
/// wanted) the reason in a sentence; free it with vmig_string_free(). Nothing is sent or stopped.
///
/// `bandwidth` is what the way and both sides' memory take; options `max-bandwidth` and `avail-switchover-bandwidth` count
/// besides. 0: not known, then `max-bandwidth` is all there is. What the last stop, the last migration and the last
/// vmig_check() took is counted into the blackout; what was never measured is not. Iterative sections are not counted.
/// \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_forecast(
    m: *mut vmig,
    bandwidth: u64,
    report: *mut vmig_forecast_report,
    why: *mut *mut c_char,
) -> c_int {
    enter("vmig_forecast", || {
        // SAFETY: the C contract of handles.
        let forecast = unsafe { guest(m) }?.forecast(bandwidth);
        let all = vmig_forecast_report {
            size: size_of::<vmig_forecast_report>(),
            verdict: match forecast.verdict {
                Verdict::Unknown => VMIG_FORECAST_UNKNOWN,
                Verdict::Converges => VMIG_FORECAST_CONVERGES,
                Verdict::DoesNot => VMIG_FORECAST_DOES_NOT,
            },
            throttle: forecast.throttle,
            total: nanos(forecast.total),
            rounds: forecast.rounds,
            blackout: nanos(forecast.downtime),
            left: forecast.left,
            sent: forecast.sent,
        };
        let text = c_text(&forecast.why)?;
        // SAFETY: the C contract: a sized struct that can be written.
        unsafe { sized_fill(report, &all) }?;
        // SAFETY: the C contract: NULL or a place for a pointer.
        unsafe { store(why, Some(text)) };
        Ok(0)
    })
}
