//! Custom sections through their C callbacks.
#![allow(unsafe_code, reason = "plays the C side of custom sections")]

use std::ffi::{c_int, c_void};
use std::ptr::{from_ref, null, null_mut};

use super::check::BODY_MAX;
use super::custom::Custom;
use super::list::SectionList;
use super::ops::*;
use super::stream::{Reader, Writer, vmig_reader, vmig_writer};
use super::{Part, Pending, Section};
use crate::error::Result;
use crate::wire::input::Slice;

/// What the C side keeps behind `opaque`.
#[derive(Default)]
struct State {
    /// What the callbacks return, and what they put and take.
    result: c_int,
    body: Vec<u8>,
    want: usize,
    calls: Vec<&'static str>,
    loaded: Vec<(u32, u32, Vec<u8>)>,
    destroyed: u32,
}

/// # Safety
/// `opaque` is a `State` nobody else uses.
unsafe fn state<'a>(opaque: *mut c_void, call: &'static str) -> &'a mut State {
    // SAFETY: the tests register states that outlive their sections, and call from one thread.
    let state = unsafe { &mut *opaque.cast::<State>() };
    state.calls.push(call);
    state
}

macro_rules! callbacks {
    ($($name:ident)*) => { $(
        unsafe extern "C" fn $name(opaque: *mut c_void) -> c_int {
            // SAFETY: registered with a `State`.
            unsafe { state(opaque, stringify!($name)) }.result
        }
    )* };
}
callbacks!(is_active is_active_iterate prepare load_setup);

macro_rules! writers {
    ($($name:ident($($extra:ident: $ty:ty)?))*) => { $(
        unsafe extern "C" fn $name(opaque: *mut c_void, out: *mut vmig_writer $(, $extra: $ty)?) -> c_int {
            // SAFETY: registered with a `State`.
            let state = unsafe { state(opaque, stringify!($name)) };
            // SAFETY: the handle of this call.
            let out = unsafe { Writer::from_handle(out) }.unwrap();
            let _ = out.put(&state.body);
            state.result
        }
    )* };
}
writers!(setup() complete() iterate(_budget: u64));

unsafe extern "C" fn pending(opaque: *mut c_void, must_precopy: *mut u64, can_postcopy: *mut u64) -> c_int {
    // SAFETY: the library passes two numbers.
    unsafe { *must_precopy = 5 };
    // SAFETY: as above.
    unsafe { *can_postcopy += 6 };
    // SAFETY: registered with a `State`.
    unsafe { state(opaque, "pending") }.result
}

unsafe extern "C" fn cleanup(opaque: *mut c_void) {
    // SAFETY: registered with a `State`.
    unsafe { state(opaque, "cleanup") };
}

unsafe extern "C" fn load_cleanup(opaque: *mut c_void, ok: c_int) {
    // SAFETY: registered with a `State`.
    unsafe { state(opaque, if ok == 1 { "load_cleanup ok" } else { "load_cleanup failed" }) };
}

unsafe extern "C" fn destroy(opaque: *mut c_void) {
    // SAFETY: registered with a `State`.
    unsafe { state(opaque, "destroy") }.destroyed += 1;
}

unsafe extern "C" fn load(opaque: *mut c_void, part: u32, version: u32, input: *mut vmig_reader) -> c_int {
    // SAFETY: registered with a `State`.
    let state = unsafe { state(opaque, "load") };
    // SAFETY: the handle of this call.
    let input = unsafe { Reader::from_handle(input) }.unwrap();
    let mut bytes = vec![0; state.want];
    let _ = input.get(&mut bytes);
    state.loaded.push((part, version, bytes));
    state.result
}

fn iterative() -> vmig_section_ops {
    vmig_section_ops {
        size: size_of::<vmig_section_ops>(),
        instance: 0,
        oldest: 2,
        priority: 0,
        flags: 0,
        is_active: Some(is_active),
        is_active_iterate: Some(is_active_iterate),
        prepare: Some(prepare),
        setup: Some(setup),
        pending_estimate: Some(pending),
        pending_exact: None,
        iterate: Some(iterate),
        complete: Some(complete),
        cleanup: Some(cleanup),
        load_setup: Some(load_setup),
        load: Some(load),
        load_cleanup: Some(load_cleanup),
    }
}

fn full() -> vmig_section_ops {
    vmig_section_ops { is_active_iterate: None, setup: None, pending_estimate: None, iterate: None, ..iterative() }
}

fn custom(ops: &vmig_section_ops, state: &mut State) -> Result<Custom> {
    // SAFETY: the callbacks above take a `State`, and the tests keep it longer than the section.
    unsafe { Custom::new("gpu", 3, from_ref(ops), (&raw mut *state).cast(), Some(destroy)) }
}

#[test]
fn bodies_are_framed_and_callbacks_run_as_asked() {
    let mut c = State { body: b"abc".to_vec(), result: 1, want: 3, ..State::default() };
    let section = custom(&iterative(), &mut c).unwrap();
    let mut out = vec![9];
    assert!(section.is_active() && section.is_active_iterate() && section.is_iterative());
    section.prepare().unwrap();
    section.setup(&mut out).unwrap();
    assert_eq!(section.pending_estimate().unwrap(), Pending { must_precopy: 5, can_postcopy: 6 });
    assert_eq!(section.pending_exact().unwrap(), Pending { must_precopy: 5, can_postcopy: 6 });
    assert!(section.iterate(&mut out, 1000).unwrap(), "a positive result means nothing is left");
    section.complete(&mut out).unwrap();
    section.cleanup();
    assert_eq!(out, b"\x09\0\0\0\x03abc\0\0\0\x03abc\0\0\0\x03abc");
    section.load_setup().unwrap();
    let mut input = Slice::new(&out[1..]);
    for part in [Part::Start, Part::Iterate, Part::End] {
        section.parse(part, 2, &mut input).unwrap()().unwrap();
    }
    section.load_cleanup(true);
    drop(section);
    let body = || b"abc".to_vec();
    let loaded = [(VMIG_PART_START, 2, body()), (VMIG_PART_ITERATE, 2, body()), (VMIG_PART_END, 2, body())];
    assert_eq!(c.loaded, loaded);
    let calls = "is_active is_active_iterate prepare setup pending pending iterate complete cleanup \
                 load_setup load load load load_cleanup ok";
    assert_eq!(c.calls.join(" "), calls, "and no destroy: no list took the section");
}

#[test]
fn a_load_that_reads_too_little_or_too_much_is_an_error_with_section_and_offset() {
    for (want, what) in [
        (2, "load leaves 1 bytes unread, from byte 0x2 of a body of 0x3 bytes"),
        (4, "load reads 4 bytes at byte 0x0 of a body of 0x3 bytes"),
    ] {
        for result in [0, -libc::EBADMSG] {
            let mut c = State { want, result, ..State::default() };
            let section = custom(&full(), &mut c).unwrap();
            let mut input = Slice::new(b"\0\0\0\x03abc");
            let error = section.parse(Part::Full, 3, &mut input).unwrap()().unwrap_err();
            assert_eq!(error.place().section.as_deref(), Some("gpu"));
            // An errno of a load that read within the body is its own.
            let own = want == 2 && result != 0;
            let what = if own { "load of section 'gpu' failed: Bad message" } else { what };
            assert!(error.text().contains(what) && error.text().contains("body at byte 0x4: "), "{error}");
            assert_eq!(input.rest().len(), 0, "the stream stays in step");
        }
    }
}

#[test]
fn what_the_stream_says_is_checked_before_the_device_sees_it() {
    let mut c = State::default();
    let section = custom(&full(), &mut c).unwrap();
    let said = |part, version, bytes: &[u8]| match section.parse(part, version, &mut Slice::new(bytes)) {
        Ok(_) => panic!("must be refused"),
        Err(error) => error.to_string(),
    };
    for part in [Part::Start, Part::Iterate, Part::End] {
        assert!(said(part, 3, b"\0\0\0\0").contains("cannot have a"));
    }
    assert!(said(Part::Full, 4, b"\0\0\0\0").contains("version 4 of 'gpu' is newer than version 3"));
    assert!(said(Part::Full, 1, b"\0\0\0\0").contains("version 1 of 'gpu' is older than version 2"));
    assert!(said(Part::Full, 3, b"\0\0\0\x04abc").contains("the stream ends"));
    assert!(said(Part::Full, 3, b"\0\0").contains("the stream ends"));
    assert!(said(Part::Full, 3, b"\x40\0\0\x01abc").contains("longer than its limit"));
    drop(section);
    assert!(c.calls.is_empty());
    let section = custom(&iterative(), &mut c).unwrap();
    assert!(section.parse(Part::Full, 3, &mut Slice::new(b"\0\0\0\0")).is_err());
}

#[test]
fn every_failing_callback_fails_with_its_name_and_leaves_no_bytes() {
    let mut c = State { result: -libc::ENOSPC, body: b"abc".to_vec(), ..State::default() };
    let section = custom(&iterative(), &mut c).unwrap();
    let mut out = vec![1, 2];
    let errors = [
        ("prepare", section.prepare().err()),
        ("setup", section.setup(&mut out).err()),
        ("pending_estimate", section.pending_estimate().err()),
        ("pending_exact", section.pending_exact().err()),
        ("iterate", section.iterate(&mut out, 1).err()),
        ("complete", section.complete(&mut out).err()),
        ("load_setup", section.load_setup().err()),
        ("load", section.parse(Part::Start, 3, &mut Slice::new(b"\0\0\0\0")).and_then(|apply| apply()).err()),
    ];
    for (name, error) in errors {
        // Without `pending_exact` the estimate is asked.
        let name = if name == "pending_exact" { "pending_estimate" } else { name };
        let error = error.unwrap_or_else(|| panic!("{name} must fail"));
        assert_eq!((error.errno(), error.place().section.as_deref()), (libc::ENOSPC, Some("gpu")));
        assert!(error.text().contains(&format!("{name} of section 'gpu' failed: No space left")), "{error}");
    }
    assert_eq!(out, [1, 2]);
}

#[test]
fn an_error_nobody_could_take_comes_with_the_next_step() {
    let mut c = State { result: -libc::EIO, ..State::default() };
    let ops = vmig_section_ops { setup: None, ..iterative() };
    let section = custom(&ops, &mut c).unwrap();
    assert!(section.is_active(), "stays in, to fail");
    assert!(section.setup(&mut Vec::new()).unwrap_err().text().contains("is_active of section 'gpu'"));
    section.setup(&mut Vec::new()).unwrap();
    assert!(section.is_active_iterate());
    section.cleanup();
    section.setup(&mut Vec::new()).unwrap();
}

#[test]
fn destroy_is_called_once_last_and_only_if_a_list_took_the_section() {
    let mut c = State::default();
    let pointer = &raw mut c;
    let list = SectionList::new();
    let entry = custom(&vmig_section_ops { instance: 4, priority: -1, ..full() }, &mut c).unwrap().entry();
    let numbers = (entry.instance, entry.version, entry.oldest, entry.priority, entry.key);
    assert_eq!(numbers, (4, 3, 2, -1, pointer.addr()));
    list.add(entry).unwrap();
    // SAFETY: the sections only keep the pointer while the state is looked at.
    let destroyed = || unsafe { (*pointer).destroyed };
    let mut twin = State::default();
    list.add(custom(&vmig_section_ops { instance: 4, ..full() }, &mut twin).unwrap().entry()).unwrap_err();
    assert_eq!(twin.destroyed, 0, "a failed call changes nothing: the pointer is still the caller's");

    let running = list.snapshot();
    drop(list.remove(pointer.addr()).unwrap());
    assert_eq!(destroyed(), 0, "a migration still has the section");
    drop(running);
    drop(list);
    assert_eq!(destroyed(), 1);
    assert_eq!(c.calls, ["destroy"]);
}

#[test]
fn ops_that_make_no_sense_are_refused() {
    let mut c = State::default();
    let mut refuse = |ops: vmig_section_ops, what: &str| {
        let error = custom(&ops, &mut c).unwrap_err();
        assert!(error.errno() == libc::EINVAL && error.to_string().contains(what), "{what}: {error}");
    };
    refuse(vmig_section_ops { size: 0, ..full() }, "size is 0");
    refuse(vmig_section_ops { load: None, ..full() }, "load is NULL");
    refuse(vmig_section_ops { complete: None, ..full() }, "complete is NULL");
    refuse(vmig_section_ops { oldest: 4, ..full() }, "1 <= oldest <= version");
    refuse(vmig_section_ops { flags: 4, ..full() }, "unknown flags 0x4");
    refuse(vmig_section_ops { pending_estimate: None, ..iterative() }, "pending_estimate is NULL");
    refuse(vmig_section_ops { flags: VMIG_SECTION_EARLY, ..iterative() }, "iterative section cannot");
    refuse(vmig_section_ops { setup: Some(setup), ..full() }, "setup is given, but iterate is not");
    // SAFETY: NULL is allowed.
    let null = unsafe { Custom::new("gpu", 1, null(), null_mut(), None) };
    assert_eq!(null.unwrap_err().errno(), libc::EINVAL);
    let early = custom(&vmig_section_ops { flags: VMIG_SECTION_EARLY, ..full() }, &mut c).unwrap();
    assert!(early.is_early());
}

#[test]
fn writers_and_readers_keep_their_first_error() {
    let huge = vec![0; usize::try_from(BODY_MAX).unwrap() + 1];
    let mut out = vec![1];
    let error = Writer::frame(&mut out, |writer| {
        writer.put(b"abc").unwrap();
        assert_eq!(writer.put(&huge).unwrap_err().errno(), libc::EFBIG);
        assert_eq!(writer.put(b"d").unwrap_err().errno(), libc::EFBIG);
        assert_eq!(writer.len(), 3);
        Ok(())
    });
    assert_eq!((error.unwrap_err().errno(), out), (libc::EFBIG, vec![1]));

    let mut reader = Reader::new(vec![0, 1, 2]);
    assert_eq!(u16::from_be_bytes(reader.take()), 1);
    assert_eq!((reader.left(), u32::from_be_bytes(reader.take())), (1, 0));
    assert_eq!(u8::from_be_bytes(reader.take()), 0, "nothing more is read after an error");
    assert_eq!(reader.error().unwrap().errno(), libc::EIO);
    assert!(reader.finish().unwrap_err().text().contains("4 bytes at byte 0x2 of a body of 0x3"));
    // SAFETY: NULL is allowed.
    assert!(unsafe { Writer::from_handle(null_mut()) }.is_none());
    // SAFETY: NULL is allowed.
    assert!(unsafe { Reader::from_handle(null_mut()) }.is_none());
}
