//! A migration is started on both sides, runs on threads of the library, and is watched by polling, by an eventfd, or by
//! waiting. Destination first: vmig_incoming() listens; then vmig_outgoing() at the source.

use std::ffi::{c_char, c_int};
use std::time::Duration;

use super::guest::vmig;
use super::run::time;
use super::{enter, enter_text, face, guest, string};
use crate::error::Error;
use crate::pacing::downtime::Parts;
use crate::status::{STATES, Side, Snapshot, State};
use crate::sys::sized::{SizedStruct, sized_fill};

/// No migration yet.
pub const VMIG_STATE_NONE: u32 = 0;
/// Connecting or listening, and preparing.
pub const VMIG_STATE_SETUP: u32 = 1;
/// A cancel is being carried out.
pub const VMIG_STATE_CANCELLING: u32 = 2;
/// Ended by a cancel; the guest runs on at the source.
pub const VMIG_STATE_CANCELLED: u32 = 3;
/// Data moves; at the source the guest runs.
pub const VMIG_STATE_ACTIVE: u32 = 4;
/// The guest is stopped; devices and the last pages move.
pub const VMIG_STATE_DEVICE: u32 = 5;
/// Ended well: the guest is at the destination. At the source its memory may be freed or used for another.
pub const VMIG_STATE_COMPLETED: u32 = 6;
/// Ended by an error (vmig_get_error()). At the source the guest runs on; at the destination nothing of it is left in
/// the memory that was written.
pub const VMIG_STATE_FAILED: u32 = 7;
/// At the source: the guest was handed over and the destination's answer got lost; it is asked again for
/// `switchover-timeout`, after which nobody but you can know where the guest runs. At the destination: the source was
/// lost before it said that the guest may run. Until this is decided the guest is stopped here. Find out, then call
/// vmig_resolve(); docs/switchover.md says what you must know.
pub const VMIG_STATE_SWITCHOVER_UNKNOWN: u32 = 8;
/// At the source, option `pause-before-switchover`: the guest is stopped and still owned here, until vmig_continue() or
/// vmig_cancel().
pub const VMIG_STATE_PRE_SWITCHOVER: u32 = 9;
/// At the source: the guest runs nowhere, and could not be taken back because the `reacquire` hook fails. Call
/// vmig_resolve().
pub const VMIG_STATE_HELD: u32 = 10;
/// Option `resume-timeout`: the connection broke, and both sides keep what they have. The guest runs on at the source,
/// which connects again and then goes on in state `active`; vmig_get_error() says what broke, or why the last try failed.
/// Give it another address with vmig_resume(), or end it with vmig_cancel().
pub const VMIG_STATE_RECONNECTING: u32 = 11;

// The header's generator reads only literals.
const _: () = {
    let numbers = [
        VMIG_STATE_NONE,
        VMIG_STATE_SETUP,
        VMIG_STATE_CANCELLING,
        VMIG_STATE_CANCELLED,
        VMIG_STATE_ACTIVE,
        VMIG_STATE_DEVICE,
        VMIG_STATE_COMPLETED,
        VMIG_STATE_FAILED,
        VMIG_STATE_SWITCHOVER_UNKNOWN,
        VMIG_STATE_PRE_SWITCHOVER,
        VMIG_STATE_HELD,
        VMIG_STATE_RECONNECTING,
    ];
    let mut i = 0;
    while i < STATES.len() {
        assert!(numbers[i] == STATES[i] as u32);
        i += 1;
    }
};

/// This side gives the guest up. Argument of vmig_resolve().
pub const VMIG_DISCARD: c_int = 0;
/// This side is to own the guest. Argument of vmig_resolve().
pub const VMIG_RUN: c_int = 1;

/// No migration yet.
pub const VMIG_SIDE_NONE: u32 = 0;
/// The guest leaves.
pub const VMIG_SIDE_SOURCE: u32 = 1;
/// The guest arrives.
pub const VMIG_SIDE_DESTINATION: u32 = 2;

/// KVM's dirty log.
pub const VMIG_TRACKER_KVM_LOG: u64 = 1;
/// KVM's dirty ring.
pub const VMIG_TRACKER_KVM_RING: u64 = 2;
/// The kernel's write protection, without KVM.
pub const VMIG_TRACKER_WRITE_PROTECT: u64 = 4;
/// The VMM: vmig_dirty() and dirty sources.
pub const VMIG_TRACKER_CALLBACK: u64 = 8;
/// Nobody: the guest is stopped before its memory is sent (option `dirty-tracker` is none).
pub const VMIG_TRACKER_NONE: u64 = 16;

const _: () = {
    use crate::dirty::{Kind, choice::NOTHING_BIT};
    assert!(VMIG_TRACKER_KVM_LOG == Kind::KvmLog.bit() as u64 && VMIG_TRACKER_KVM_RING == Kind::KvmRing.bit() as u64);
    assert!(VMIG_TRACKER_WRITE_PROTECT == Kind::WriteProtect.bit() as u64);
    assert!(VMIG_TRACKER_CALLBACK == Kind::Callback.bit() as u64 && VMIG_TRACKER_NONE == NOTHING_BIT as u64);
};

/// Where the present (or last) migration stands. Amounts in bytes, rates in bytes per second, times in nanoseconds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_status {
    /// Size of the struct: VMIG_SIZED(vmig_status).
    pub size: usize,
    /// One of VMIG_STATE_...; expect new values.
    pub state: u32,
    /// One of VMIG_SIDE_...
    pub side: u32,
    /// Round over the dirty pages; 1 is the first, over all pages. 0 at the destination.
    pub iteration: u64,
    /// Guest RAM that migrates; blocks handed over by their file are not in it.
    pub total: u64,
    /// Guest RAM that is left to send.
    pub remaining: u64,
    /// Bytes sent or received.
    pub transferred: u64,
    /// Pages sent or received whole.
    pub normal_pages: u64,
    /// Pages of zeros, which travel as a few bytes.
    pub zero_pages: u64,
    /// How fast the guest dirtied pages in the last round.
    pub dirty_rate: u64,
    /// How fast bytes went in the last 100 ms.
    pub bandwidth: u64,
    /// Since the migration was started; final once it ended.
    pub elapsed: u64,
    /// Until data began to move.
    pub setup: u64,
    /// How long the guest would be stopped if it were stopped now.
    pub expected_downtime: u64,
    /// What the stop hook and the run-state handlers took.
    pub stop: u64,
    /// How long the guest was stopped: from the stop hook's call to the destination's answer.
    pub downtime: u64,
    /// Until completion, at the present rates; UINT64_MAX while the guest dirties faster than the link sends, or
    /// nothing is known yet.
    pub eta: u64,
    /// Percent of the time the source's vCPUs are made to stand still (option `auto-converge`).
    pub throttle: u64,
    /// Sum of VMIG_TRACKER_...: who finds the pages that are written, of the last migration from here. 0 until there is
    /// one, and in a destination. vmig_get(m, "dirty-tracker-in-use") names RAM blocks, too.
    pub trackers: u64,
    /// Bytes per second that each vCPU may dirty, by this migration (option `dirty-limit`, or the ladder); 0: no limit.
    pub dirty_limit: u64,
    /// How long the guest may be stopped: option `downtime-limit`, or longer by the ladder.
    pub downtime_limit: u64,
    /// Steps of the ladder that were taken (option `ladder`).
    pub ladder: u64,
}

// SAFETY: repr(C), size first, integers, no padding.
unsafe impl SizedStruct for vmig_status {
    const NAME: &'static str = "vmig_status";
    const REQUIRED: usize = size_of::<usize>();
}

/// How long a guest stands still at the switchover, in nanoseconds: the parts in their order, and all of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmig_downtime {
    /// Size of the struct: VMIG_SIZED(vmig_downtime).
    pub size: usize,
    /// The stop hook and the run-state handlers.
    pub stop: u64,
    /// Saving device state, and sending it.
    pub devices: u64,
    /// The last harvest of dirty pages.
    pub sync: u64,
    /// Sending these pages.
    pub ram: u64,
    /// From the last byte to the destination's word that it loaded everything.
    pub load: u64,
    /// The destination's run-state handlers and start hook; 0 if it did not tell (a QEMU does not), or was not to start.
    pub start: u64,
    /// Measured: from the stop hook's call to the destination's last word. Predicted: the sum of the parts.
    pub total: u64,
    /// What of the total none of the parts accounts for.
    pub unexplained: u64,
    /// With option `verify`: hashing and comparing everything, and hashing memory again. Predicted: twice what hashing
    /// took while the guest still ran, and a round trip. Part of the total.
    pub verify: u64,
    /// Between two vmigs: GO on its way to the destination and the answer on its way back, a round trip. Part of the total.
    pub go: u64,
}

// SAFETY: repr(C), size first, integers of 8 bytes, no padding.
unsafe impl SizedStruct for vmig_downtime {
    const NAME: &'static str = "vmig_downtime";
    const REQUIRED: usize = size_of::<usize>();
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn downtime_of(parts: &Parts, total: Duration) -> vmig_downtime {
    vmig_downtime {
        size: size_of::<vmig_downtime>(),
        stop: nanos(parts.stop),
        devices: nanos(parts.devices),
        sync: nanos(parts.sync),
        ram: nanos(parts.ram),
        load: nanos(parts.load),
        start: nanos(parts.start),
        total: nanos(total),
        unexplained: nanos(total.saturating_sub(parts.total())),
        verify: nanos(parts.verify),
        go: nanos(parts.go),
    }
}

pub(super) fn error_json(error: &Error) -> serde_json::Value {
    let mut json = error.to_json();
    json["message"] = error.to_string().into();
    json
}

fn status_of(now: &Snapshot, trackers: u32) -> vmig_status {
    vmig_status {
        size: size_of::<vmig_status>(),
        state: now.state as u32,
        side: match now.side {
            None => VMIG_SIDE_NONE,
            Some(Side::Source) => VMIG_SIDE_SOURCE,
            Some(Side::Destination) => VMIG_SIDE_DESTINATION,
        },
        iteration: now.iteration,
        total: now.total,
        remaining: now.remaining,
        transferred: now.transferred,
        normal_pages: now.normal_pages,
        zero_pages: now.zero_pages,
        dirty_rate: now.dirty_rate,
        bandwidth: now.bandwidth,
        elapsed: now.elapsed,
        setup: now.setup,
        expected_downtime: now.expected_downtime,
        stop: now.stop,
        downtime: now.downtime,
        eta: now.eta,
        throttle: now.throttle,
        trackers: u64::from(trackers),
        dirty_limit: now.dirty_limit,
        downtime_limit: now.downtime_limit,
        ladder: now.ladder,
    }
}

/// Starts to migrate the guest to `uri` and returns at once; the thread `live_migration` does the work. \[any\]
///
/// Where to:
/// - `tcp:HOST:PORT`: a socket; an IPv6 address stands in brackets; no host is loopback.
/// - `unix:PATH`, `vsock:CID:PORT`: a socket.
/// - `fd:NUMBER`: a connected socket, a pipe or a file the VMM opened. The library works on a duplicate; closing or not
///   closing yours is up to you.
/// - `file:PATH` or `file:PATH,offset=BYTES`: a file, made if it is not there, cut off at the offset, and written from
///   there on; what stands before is not touched. The offset may be 0x1000 or 10k.
/// - `exec:COMMAND`: the standard input of what `/bin/sh -c` runs.
/// - Anything that vmig_add_channel() added.
///
/// Over pipes and files nothing comes back, so success means only that all bytes were written; of a command, that it took
/// them and ended with status 0. One that fails before it has everything fails the migration, with its status and what it
/// said on standard error; one that fails afterwards leaves `switchover-unknown`. Where option `return-path` is switched on
/// by name, what a command writes is read as a destination's answers, as over a socket. A command has its own process
/// group, no signal blocked, and no descriptors but its three; it is killed if it goes on for more than a second when it
/// is not wanted any more.
///
/// -EINVAL: a URI that is not understood; -EBUSY: a migration runs, something blocks migration, or another thread is in
/// vmig_check(); -EPERM: the guest is not here. What happens later is in vmig_get_status() and vmig_get_error().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_outgoing(m: *mut vmig, uri: *const c_char) -> c_int {
    enter("vmig_outgoing", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        machine.outgoing(unsafe { string("uri", uri) }?)?;
        Ok(0)
    })
}

/// Listens at `uri` for a guest and returns at once; the thread `incoming` does the work. \[free\]
///
/// URIs as for vmig_outgoing(). With TCP port 0 the system chooses one: read it from vmig_get(m, "listen-address"). A
/// unix socket can be connected to by its owner only. A file is read, and a command's standard output; if it ends with
/// another status than 0 within a second of its last byte the guest is not taken. Accepts one source. When the guest has
/// arrived it is started through the start hook, on the library's thread, unless it was paused at the source or option
/// `autostart` is off.
///
/// If the migration is cancelled or fails before anything here was touched, the guest here is left as paused by the user,
/// and vmig_start() runs it. If it fails later nothing of either guest is left in the memory that was written.
///
/// Where a guest arrived from another vmig the address is kept until vmig_free(), to answer a source that did not hear
/// so. Calling this again with the same address takes another guest in there.
///
/// -EADDRINUSE and other errors of listening; -EINVAL: a URI that is not understood; -EBUSY: a migration runs,
/// something blocks migration, a guest runs here (vmig_stop() it) or is just being stopped or started, or another thread
/// is in vmig_check().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_incoming(m: *mut vmig, uri: *const c_char) -> c_int {
    enter("vmig_incoming", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        machine.incoming(unsafe { string("uri", uri) }?)?;
        Ok(0)
    })
}

/// Asks a migration that runs to end; the guest goes on at the source. Returns at once, and 0 also if none runs; the
/// state becomes `cancelled` when it has ended. -EBUSY once the guest was handed over, or if it is `held`.
/// \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_cancel(m: *mut vmig) -> c_int {
    enter("vmig_cancel", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.cancel()?;
        Ok(0)
    })
}

/// At the source in state `reconnecting`: tries `uri`, an address where its destination can listen, next, at once, and stays
/// with it. It must lead to the same destination: another one refuses, and the tries go on until `resume-timeout` is over.
/// -EINVAL in any other state, at the destination, and for a URI that is not understood. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_resume(m: *mut vmig, uri: *const c_char) -> c_int {
    enter("vmig_resume", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        machine.resume(unsafe { string("uri", uri) }?)?;
        Ok(0)
    })
}

/// Goes on from the state `pre-switchover`. -EINVAL in any other state. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_continue(m: *mut vmig) -> c_int {
    enter("vmig_continue", || {
        // SAFETY: the C contract of handles.
        unsafe { guest(m) }?.go_on()?;
        Ok(0)
    })
}

/// Ends the states `switchover-unknown` and `held`, and waits until that is done, at most for a hook and
/// `switchover-timeout`. \[free\]
///
/// With `run` VMIG_RUN this side owns the guest, which goes on here unless it was paused: you know that it does not and
/// will not run on the other side. With VMIG_DISCARD this side gives it up: its memory may be freed. docs/switchover.md
/// says what you must have found out; nobody can check it, and if it is wrong two guests run. Where memory was handed
/// over (option `hand-over`) the destination may have it mapped still: be certain that its process is gone before you say
/// VMIG_RUN at the source.
///
/// -EINVAL in any other state; -EALREADY: it was decided otherwise before this call; the hook's error if it could not be
/// done, and the state is what it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_resolve(m: *mut vmig, run: c_int) -> c_int {
    enter("vmig_resolve", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        match run {
            0 | 1 => machine.resolve(run == 1).map(|()| 0),
            _ => Err(Error::invalid(format!("run is {run}; it can be 1 (run here) or 0 (it runs there)"))),
        }
    })
}

/// Waits until no migration runs or `timeout_ms` milliseconds have passed; negative waits for ever. Returns 1 if none runs
/// (also if only vmig_resolve() leads on), 0 if the time was up. \[free\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_wait(m: *mut vmig, timeout_ms: c_int) -> c_int {
    enter("vmig_wait", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        machine.vmm().bql().require_free("wait for a migration")?;
        Ok(c_int::from(machine.wait(time(timeout_ms))))
    })
}

/// Fills `*status` with where the present (or last) migration stands. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_status(m: *mut vmig, status: *mut vmig_status) -> c_int {
    enter("vmig_get_status", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        let now = status_of(&machine.status().snapshot(), machine.trackers().0);
        // SAFETY: the C contract: NULL or a sized struct that can be written.
        unsafe { sized_fill(status, &now) }.map(|()| 0)
    })
}

/// Fills `*downtime` with how long the guest stood still when it last left from here: of an earlier migration until the
/// present one has stopped the guest. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_downtime(m: *mut vmig, downtime: *mut vmig_downtime) -> c_int {
    enter("vmig_get_downtime", || {
        // SAFETY: the C contract of handles.
        let last = unsafe { guest(m) }?.status().downtime();
        // SAFETY: the C contract: NULL or a sized struct that can be written.
        unsafe { sized_fill(downtime, &downtime_of(&last.actual, last.total)) }.map(|()| 0)
    })
}

/// Fills `*downtime` with what was predicted just before that: pages by the bandwidth, stop and start by what they took
/// here the last time, devices by an earlier attempt. What was never measured counts as 0. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_expected_downtime(m: *mut vmig, downtime: *mut vmig_downtime) -> c_int {
    enter("vmig_get_expected_downtime", || {
        // SAFETY: the C contract of handles.
        let expected = unsafe { guest(m) }?.status().downtime().expected;
        // SAFETY: the C contract: NULL or a sized struct that can be written.
        unsafe { sized_fill(downtime, &downtime_of(&expected, expected.total())) }.map(|()| 0)
    })
}

/// Name of a state, such as "active"; "unknown" for numbers this library does not know. Stays the library's.
/// \[any\]\[cb\]
#[unsafe(no_mangle)]
pub extern "C" fn vmig_state_name(state: u32) -> *const c_char {
    let known = usize::try_from(state).ok().and_then(|i| STATES.get(i));
    let name = match known {
        Some(State::None) => c"none",
        Some(State::Setup) => c"setup",
        Some(State::Cancelling) => c"cancelling",
        Some(State::Cancelled) => c"cancelled",
        Some(State::Active) => c"active",
        Some(State::Device) => c"device",
        Some(State::Completed) => c"completed",
        Some(State::Failed) => c"failed",
        Some(State::SwitchoverUnknown) => c"switchover-unknown",
        Some(State::PreSwitchover) => c"pre-switchover",
        Some(State::Held) => c"held",
        Some(State::Reconnecting) => c"reconnecting",
        None => c"unknown",
    };
    name.as_ptr()
}

/// Why the present (or last) migration failed, on whichever side, as JSON with the keys text, errno and, as far as known,
/// side (where it failed), phase, section, field, expected, got, option (whose time ran out, where errno is ETIMEDOUT),
/// byte (of the stream); `message` is all of it as one sentence. With `compares` true it is a difference between the two
/// sides: expected is what the source has, got what the destination has. NULL if there is no error. Free it with
/// vmig_string_free(). \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get_error(m: *mut vmig) -> *mut c_char {
    enter_text("vmig_get_error", || {
        // SAFETY: the C contract of handles.
        let error = unsafe { guest(m) }?.status().error();
        Ok(error.map(|error| error_json(&error).to_string()))
    })
}

/// Returns a descriptor that is readable while vmig_next_event() has news: for the VMM's main loop. Stays the library's;
/// do not read it, only poll it. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_event_fd(m: *mut vmig) -> c_int {
    enter("vmig_event_fd", || {
        // SAFETY: the C contract of handles.
        Ok(unsafe { guest(m) }?.status().event_fd().raw())
    })
}

/// Takes the next piece of news, oldest first. Returns 1, and the status at that moment in `*status`, or 0 if there is
/// none. There is news at every change of state and at every iteration; the oldest of more than 256 are dropped. Option
/// `events` switches it off.
/// \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_next_event(m: *mut vmig, status: *mut vmig_status) -> c_int {
    enter("vmig_next_event", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // The struct is checked before news is taken out of the queue: a failed call changes nothing.
        // SAFETY: the C contract: NULL or a sized struct that can be written.
        unsafe { sized_fill(status, &status_of(&machine.status().snapshot(), machine.trackers().0)) }?;
        let Some(news) = machine.status().next_news() else { return Ok(0) };
        // SAFETY: as above.
        unsafe { sized_fill(status, &status_of(&news, machine.trackers().0)) }.map(|()| 1)
    })
}

/// Sets an option by name, such as "max-bandwidth" to "1G". docs/options.md lists them. -ENOENT: there is none of this
/// name; -EINVAL: not a value for it; -EBUSY: it cannot change while a migration runs. \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_set(m: *mut vmig, option: *const c_char, value: *const c_char) -> c_int {
    enter("vmig_set", || {
        // SAFETY: the C contract of handles.
        let machine = unsafe { guest(m) }?;
        // SAFETY: the C contract of strings.
        let option = unsafe { string("option", option) }?;
        // SAFETY: as above.
        machine.set(option, unsafe { string("value", value) }?)?;
        Ok(0)
    })
}

/// The value of an option as text; also of "listen-address", the URI at which vmig_incoming() listens, and of
/// "qmp-address", that of the last vmig_qmp_listen(). NULL on failure (vmig_errmsg()). Free it with vmig_string_free().
/// \[any\]\[cb\]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmig_get(m: *mut vmig, option: *const c_char) -> *mut c_char {
    enter_text("vmig_get", || {
        // SAFETY: the C contract of handles.
        let face = unsafe { face(m) }?;
        // SAFETY: the C contract of strings.
        match unsafe { string("option", option) }? {
            "qmp-address" => face.address().map(Some),
            option => face.machine().get(option).map(Some),
        }
    })
}
