//! How a device is tried as C sees it. The text of each item is what a C author reads in the header.
#![allow(unsafe_code, reason = "reads structs and calls callbacks of C")]
#![allow(non_camel_case_types, reason = "these are the names in C")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::ops::Range;

use super::{Memory, Plan, Reset, Sample, Say};
use crate::error::{Error, Result, returned};
use crate::sys::sized::{SizedStruct, sized_copy};

/// Members and samples read in search of the list's end before it is taken for missing.
const LIST_MAX: usize = 4096;
/// Longest sample.
const SAMPLE_MAX: usize = 256 << 20;

/// Flag of a test: two saves of one state may differ, as those of a device with VMIG_DEVICE_VARIES. They are not compared.
pub const VMIG_TEST_VARIES: u32 = 1;

/// A member of a device's struct: VMIG_MEMBER(type, member). A list of them ends with VMIG_MEMBER_END.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_member {
    /// Where it is in the struct, in bytes.
    pub offset: usize,
    /// Its size; 0 ends a list.
    pub len: usize,
}

/// What an earlier release saved, as `saved` of vmig_device_test got it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_sample {
    /// The bytes. NULL ends a list.
    pub bytes: *const c_void,
    /// How many; at most 256 MiB.
    pub len: usize,
    /// Version of the device in that release.
    pub version: u32,
    /// Zero.
    pub reserved: u32,
}

/// How vmig_test_device() tries a device. Start it with VMIG_SIZED(vmig_device_test); everything else is optional, and
/// each member makes the test find more. Callbacks run on the calling thread.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_device_test {
    /// Size of the struct, in bytes: VMIG_SIZED(vmig_device_test).
    pub size: usize,
    /// Of what is drawn where not every case is tried; 0: drawn as well. It is part of the log, and what was drawn once is
    /// drawn again with it.
    pub seed: u64,
    /// Truncations and bit flips tried, of each; 0: all for some KiB of state, and the fewer the more there is.
    pub cases: u64,
    /// sizeof of the struct that the device's pointer leads to: its bytes are compared, too, so that a member is found
    /// that is not in the table, and at the end they are what they were. 0: not looked at. Padding counts: allocate the
    /// struct zeroed.
    pub memory: usize,
    /// Members of it that are no state and may change when it is saved or loaded, ended by VMIG_MEMBER_END: caches,
    /// statistics, and every pointer that `reset`, `pre_load`, `post_load` or `load` replaces, for an old one would be put
    /// back. Pointers of the table's own VMIG_PTR_ rows need not be named. NULL: none.
    pub transient: *const vmig_member,
    /// What earlier releases saved, ended by one without bytes: each must load. For tables without VMIG_FD and sections
    /// that are not iterative. NULL: none.
    pub samples: *const vmig_sample,
    /// Makes the device what it is when it was just switched on. What loading does not bring back afterwards is found:
    /// give the device another state first. Without it a field that `load` forgets looks as if it had been loaded. Returns 0
    /// or more, or a negative errno. `[bql]`
    pub reset: Option<unsafe extern "C" fn(dev: *mut c_void) -> c_int>,
    /// Called once with what the device was saved as, unless it is iterative: kept, it is a sample for later releases.
    pub saved: Option<unsafe extern "C" fn(opaque: *mut c_void, version: u32, bytes: *const c_void, len: usize)>,
    /// Takes a line of log, `level` being one of VMIG_LOG_*: ERROR for what is wrong, WARNING for what looks wrong or could
    /// not be tried, INFO for each test that is over, DEBUG for each case that begins. The last of these is the case in
    /// which a device crashed. Valid during the call.
    pub log: Option<unsafe extern "C" fn(opaque: *mut c_void, level: c_int, line: *const c_char)>,
    /// What `saved` and `log` get.
    pub opaque: *mut c_void,
    /// Sum of VMIG_TEST_... flags.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: repr(C), begins with a usize; integers, raw pointers and optional function pointers, without padding.
unsafe impl SizedStruct for vmig_device_test {
    const NAME: &'static str = "vmig_device_test";
    const REQUIRED: usize = size_of::<usize>();
}

impl Plan<'_> {
    /// The plan at `test`; NULL: without anything optional. `levels` are those of a finding, a note, a step and a case.
    ///
    /// # Safety
    /// `test` is NULL or leads to a `vmig_device_test`, whose lists end, whose samples are as long as they say, and whose
    /// callbacks can be called as long as the plan is used. `memory` is as for [`Memory::new`].
    pub unsafe fn of_c(test: *const vmig_device_test, levels: [c_int; 4]) -> Result<Plan<'static>> {
        let mut plan = Plan {
            seed: 0,
            cases: 0,
            varies: false,
            memory: Memory::default(),
            transient: Vec::new(),
            samples: Vec::new(),
            reset: None,
            saved: Box::new(|_, _| ()),
            say: Box::new(|_, _| ()),
        };
        if test.is_null() {
            return Ok(plan);
        }
        // SAFETY: not NULL, and the caller vouches for the struct.
        let c = unsafe { sized_copy(test) }?;
        if c.flags & !VMIG_TEST_VARIES != 0 || c.reserved != 0 {
            return Err(Error::invalid(format!("unknown flags {:#x}, or reserved is not zero", c.flags)));
        }
        (plan.seed, plan.cases, plan.varies) = (c.seed, c.cases, c.flags & VMIG_TEST_VARIES != 0);
        // SAFETY: the caller vouches for the memory.
        plan.memory = unsafe { Memory::new(c.memory) };
        // SAFETY: the caller vouches for the list.
        plan.transient = unsafe { members(c.transient, c.memory) }?;
        // SAFETY: as above.
        plan.samples = unsafe { samples(c.samples) }?;
        plan.reset = c.reset.map(|reset| {
            // SAFETY: the caller vouches for the callback, which gets the device's own pointer.
            Box::new(move |dev: *mut u8| returned("the test", "reset", unsafe { reset(dev.cast()) }).map(drop))
                as Box<Reset<'static>>
        });
        if let Some(saved) = c.saved {
            plan.saved = Box::new(move |version, bytes: &[u8]| {
                // SAFETY: the caller vouches for the callback; the bytes live through the call.
                unsafe { saved(c.opaque, version, bytes.as_ptr().cast(), bytes.len()) }
            });
        }
        if let Some(log) = c.log {
            plan.say = Box::new(move |what, text| {
                let level = match what {
                    Say::Finding => levels[0],
                    Say::Note => levels[1],
                    Say::Step => levels[2],
                    Say::Case => levels[3],
                };
                let Ok(line) = CString::new(text) else { return };
                // SAFETY: the caller vouches for the callback; the line lives through the call.
                unsafe { log(c.opaque, level, line.as_ptr()) }
            });
        }
        Ok(plan)
    }
}

/// # Safety
/// `list` is NULL or ends.
unsafe fn members(list: *const vmig_member, memory: usize) -> Result<Vec<Range<usize>>> {
    let mut found = Vec::new();
    for at in 0..if list.is_null() { 0 } else { LIST_MAX } {
        // SAFETY: the caller vouches for the list up to its end, which was not seen yet.
        let vmig_member { offset, len } = unsafe { list.wrapping_add(at).read_unaligned() };
        if len == 0 {
            return Ok(found);
        }
        let range = offset..offset.saturating_add(len);
        if range.end > memory {
            return Err(Error::invalid(format!("member {at} of transient ends beyond the struct"))
                .expected_got(format!("at most byte {memory}"), range.end));
        }
        found.push(range);
    }
    if list.is_null() { Ok(found) } else { Err(no_end("transient", "VMIG_MEMBER_END")) }
}

/// # Safety
/// `list` is NULL or ends; what its entries lead to is as long as they say.
unsafe fn samples(list: *const vmig_sample) -> Result<Vec<Sample>> {
    let mut found = Vec::new();
    for at in 0..if list.is_null() { 0 } else { LIST_MAX } {
        // SAFETY: the caller vouches for the list up to its end, which was not seen yet.
        let vmig_sample { bytes, len, version, reserved } = unsafe { list.wrapping_add(at).read_unaligned() };
        if bytes.is_null() {
            return Ok(found);
        }
        if reserved != 0 || len > SAMPLE_MAX {
            let text = format!("sample {at} has {len} bytes, or its reserved member is not zero");
            return Err(Error::invalid(text).expected_got(format!("at most {SAMPLE_MAX} bytes"), len));
        }
        let mut copy = Vec::new();
        copy.try_reserve_exact(len).map_err(|_| Error::no_memory("a sample", len as u64))?;
        // SAFETY: not NULL, and the caller vouches for the length, which is far below isize::MAX.
        copy.extend_from_slice(unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), len) });
        found.push(Sample { version, bytes: copy });
    }
    if list.is_null() { Ok(found) } else { Err(no_end("samples", "NULL")) }
}

fn no_end(what: &str, end: &str) -> Error {
    Error::invalid(format!("no {end} within {LIST_MAX} entries of {what}"))
}
