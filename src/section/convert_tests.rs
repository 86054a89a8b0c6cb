//! Tables as a C program would hand them over, good and hostile.
#![allow(unsafe_code, reason = "the devices of these tests are structs on the stack")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::mem::offset_of;
use std::ptr::{from_ref, null, null_mut};

use super::cdevice::*;
use super::convert::Declared;
use super::device::Device;
use super::list::Entry;
use super::table::{Checked, Count, Kind};
use super::{Part, Section};
use crate::error::{Error, Result};
use crate::wire::input::Slice;

const END: vmig_field = vmig_field {
    name: null(),
    kind: VMIG_KIND_END,
    since: 0,
    offset: 0,
    width: 0,
    count: 0,
    nested: null(),
    count_field: null(),
    flags: 0,
    reserved32: 0,
    reserved: [0; 2],
};

fn row(name: &'static CStr, kind: u32, offset: usize, width: usize) -> vmig_field {
    vmig_field { name: name.as_ptr(), kind, offset, width, count: 1, ..END }
}

fn device(name: &CStr, fields: &[vmig_field]) -> vmig_device {
    vmig_device {
        size: size_of::<vmig_device>(),
        name: name.as_ptr(),
        version: 1,
        oldest: 0,
        fields: fields.as_ptr(),
        parts: null(),
        needed: None,
        pre_save: None,
        post_save: None,
        pre_load: None,
        post_load: None,
        flags: 0,
        priority: 0,
    }
}

fn declared(device: &vmig_device) -> Result<(Declared, i32)> {
    // SAFETY: the tests hand over tables that end, or go on beyond the limits.
    unsafe { vmig_device::declared(device) }
}

fn table(device: &vmig_device) -> Result<Checked> {
    match declared(device)?.0 {
        Declared::State(table) => Ok(table),
        Declared::Stateless { .. } => panic!("has fields"),
    }
}

fn refused(device: &vmig_device, what: &str) -> Error {
    let error = table(device).err().unwrap_or_else(|| panic!("must be refused: {what}"));
    assert!(error.to_string().contains(what), "{what}: {error}");
    error
}

#[repr(C)]
#[derive(Default)]
struct Uart {
    ier: u8,
    divisor: u16,
    level: i32,
    on: bool,
    fifo: [u8; 16],
    expiry: u64,
    used: u8,
}

#[test]
fn every_kind_arrives() {
    type Is = fn(&Kind) -> bool;
    let kinds: &[(u32, usize, Is)] = &[
        (VMIG_KIND_U8, 1, |k| matches!(k, Kind::Unsigned(1))),
        (VMIG_KIND_U16, 2, |k| matches!(k, Kind::Unsigned(2))),
        (VMIG_KIND_U32, 4, |k| matches!(k, Kind::Unsigned(4))),
        (VMIG_KIND_U64, 8, |k| matches!(k, Kind::Unsigned(8))),
        (VMIG_KIND_I8, 1, |k| matches!(k, Kind::Signed(1))),
        (VMIG_KIND_I16, 2, |k| matches!(k, Kind::Signed(2))),
        (VMIG_KIND_I32, 4, |k| matches!(k, Kind::Signed(4))),
        (VMIG_KIND_I64, 8, |k| matches!(k, Kind::Signed(8))),
        (VMIG_KIND_BOOL, 1, |k| matches!(k, Kind::Bool)),
        (VMIG_KIND_TIMER, 8, |k| matches!(k, Kind::Timer)),
        (VMIG_KIND_FD, 4, |k| matches!(k, Kind::Fd)),
        (VMIG_KIND_BYTES, 5, |k| matches!(k, Kind::Bytes(5))),
        (VMIG_KIND_UNUSED, 6, |k| matches!(k, Kind::Unused(6))),
    ];
    for (kind, width, is) in kinds {
        let found = table(&device(c"dev", &[row(c"f", *kind, 3, *width), END])).unwrap();
        assert!(is(&found.fields[0].kind), "{kind}: {found:?}");
        assert_eq!(found.fields[0].offset, 3);
        if !matches!(*kind, VMIG_KIND_BYTES | VMIG_KIND_UNUSED) {
            refused(
                &device(c"dev", &[row(c"f", *kind, 3, *width + 1), END]),
                "the width does not belong to the kind",
            );
        }
    }
    refused(&device(c"dev", &[row(c"f", 99, 0, 1), END]), "unknown kind 99");
}

#[test]
fn a_device_goes_from_c_to_the_wire_and_back() {
    let fifo = vmig_field {
        count: 16,
        count_field: c"used".as_ptr(),
        ..row(c"fifo", VMIG_KIND_BYTES, offset_of!(Uart, fifo), 1)
    };
    let fields = [
        row(c"ier", VMIG_KIND_U8, offset_of!(Uart, ier), 1),
        row(c"divisor", VMIG_KIND_U16, offset_of!(Uart, divisor), 2),
        row(c"level", VMIG_KIND_I32, offset_of!(Uart, level), 4),
        row(c"on", VMIG_KIND_BOOL, offset_of!(Uart, on), 1),
        row(c"used", VMIG_KIND_U8, offset_of!(Uart, used), 1),
        fifo,
        vmig_field { name: null(), ..row(c"", VMIG_KIND_UNUSED, 0, 2) },
        row(c"expiry", VMIG_KIND_TIMER, offset_of!(Uart, expiry), 8),
        END,
    ];
    let table = table(&device(c"uart", &fields)).unwrap();
    let mut uart = Uart { ier: 1, divisor: 0x203, level: -1, on: true, expiry: 9, used: 2, ..Uart::default() };
    uart.fifo[..2].copy_from_slice(b"hi");
    // SAFETY: the table describes the struct, which outlives the device.
    let from = unsafe { Device::new(table.clone(), 0, (&raw mut uart).cast()) }.unwrap();
    let mut body = Vec::new();
    from.complete(&mut body).unwrap();
    assert_eq!(body, b"\x01\x02\x03\xff\xff\xff\xff\x01\x02hi\0\0\0\0\0\0\0\0\0\x09");
    assert_eq!(from.describe(&body)["fields"][5]["size"], 2);

    let mut other = Uart::default();
    // SAFETY: as above.
    let to = unsafe { Device::new(table, 0, (&raw mut other).cast()) }.unwrap();
    let apply = to.parse(Part::Full, 1, &mut Slice::new(&body)).unwrap();
    apply().unwrap();
    assert_eq!((other.ier, other.divisor, other.level, other.on, other.expiry), (1, 0x203, -1, true, 9));
    assert_eq!(&other.fifo[..3], b"hi\0");
    assert!(to.parse(Part::Start, 1, &mut Slice::new(&body)).is_err());
}

#[test]
fn since_rows_apply_to_what_follows() {
    let since = |since| vmig_field { kind: VMIG_KIND_SINCE, since, ..END };
    let own = vmig_field { since: 1, ..row(c"c", VMIG_KIND_U8, 2, 1) };
    let fields = [
        row(c"a", VMIG_KIND_U8, 0, 1),
        since(2),
        row(c"b", VMIG_KIND_U8, 1, 1),
        own,
        since(3),
        row(c"d", VMIG_KIND_U8, 3, 1),
        END,
    ];
    let made = table(&vmig_device { version: 3, oldest: 1, ..device(c"dev", &fields) }).unwrap();
    assert_eq!(made.fields.iter().map(|f| f.since).collect::<Vec<_>>(), [1, 2, 1, 3]);
    refused(&vmig_device { version: 2, ..device(c"dev", &fields) }, "field 'd'");
}

#[test]
fn arrays_pointers_structs_and_parts_arrive() {
    let inner_fields = [row(c"x", VMIG_KIND_U16, 2, 2), END];
    let inner = device(c"inner", &inner_fields);
    let part_fields = [row(c"p", VMIG_KIND_U8, 60, 1), END];
    let part = vmig_device { version: 4, oldest: 3, ..device(c"dev/part", &part_fields) };
    let list = vmig_field {
        count: 3,
        nested: from_ref(&inner),
        count_field: c"n".as_ptr(),
        flags: VMIG_FIELD_POINTER,
        ..row(c"list", VMIG_KIND_STRUCT, 8, 4)
    };
    let array = vmig_field { count: 6, ..row(c"array", VMIG_KIND_U32, 16, 4) };
    let fields = [row(c"n", VMIG_KIND_I16, 0, 2), list, array, END];
    let parts = [from_ref(&part), null()];
    let dev =
        vmig_device { parts: parts.as_ptr(), flags: VMIG_DEVICE_EARLY, priority: -7, ..device(c"dev", &fields) };
    let made = table(&dev).unwrap();
    assert!(made.fields[1].pointer && matches!(made.fields[1].kind, Kind::Struct(ref t, 4) if t.name == "inner"));
    assert!(matches!(made.fields[1].count, Count::Field { index: 0, max: 3 }));
    assert!(matches!(made.fields[2].count, Count::Fixed(6)));
    assert_eq!((made.parts[0].version, made.parts[0].oldest), (4, 3));
    assert!(made.early);
    assert_eq!(declared(&dev).unwrap().1, -7);

    let later = vmig_field { count_field: c"array".as_ptr(), ..list };
    refused(&device(c"dev", &[later, array, END]), "the field 'array' with the number of elements must come earlier");
    refused(&device(c"dev", &[vmig_field { nested: null(), ..list }, END]), "vmig_device is NULL");
    let flagged = vmig_device { flags: 1, ..inner };
    let nested = vmig_field { nested: from_ref(&flagged), count_field: null(), ..list };
    refused(&device(c"dev", &[nested, END]), "neither needed nor flags");
    refused(&device(c"dev", &[vmig_field { nested: from_ref(&inner), ..array }, END]), "for structs only");
}

#[test]
fn no_state_must_be_said_and_nothing_else() {
    let none = vmig_device { fields: null(), version: 2, ..device(c"none", &[]) };
    match declared(&none).unwrap().0 {
        Declared::Stateless { name, version, oldest } => assert_eq!((name.as_str(), version, oldest), ("none", 2, 2)),
        Declared::State(table) => panic!("{table:?}"),
    }
    unsafe extern "C" fn hook(_: *mut c_void) -> c_int {
        0
    }
    let parts = [null()];
    for bad in [
        vmig_device { pre_save: Some(hook), ..none },
        vmig_device { parts: parts.as_ptr(), ..none },
        vmig_device { flags: VMIG_DEVICE_EARLY, ..none },
    ] {
        assert!(declared(&bad).unwrap_err().to_string().contains("declares a device without state"));
    }
    let fields = [row(c"a", VMIG_KIND_U8, 0, 1), END];
    let made = table(&device(c"dev", &fields)).unwrap();
    // SAFETY: NULL is what is to be refused.
    assert!(unsafe { Device::new(made, 0, null_mut()) }.unwrap_err().to_string().contains("NULL"));
    refused(&vmig_device { needed: Some(hook), ..device(c"dev", &fields) }, "needed is for parts");
}

#[test]
fn hostile_structs_are_refused() {
    let fields = [row(c"a", VMIG_KIND_U8, 0, 1), END];
    let good = device(c"dev", &fields);
    // SAFETY: NULL is allowed.
    assert_eq!(unsafe { vmig_device::declared(null()) }.unwrap_err().errno(), libc::EINVAL);
    assert_eq!(refused(&vmig_device { size: 0, ..good }, "size is 0").errno(), libc::EINVAL);
    let longer: [vmig_device; 2] = [vmig_device { size: 2 * good.size, ..good }, good];
    assert_eq!(declared(&longer[0]).unwrap_err().errno(), libc::E2BIG);
    // An old program knew the struct up to `parts` only; the garbage behind it is not read.
    let old = vmig_device { size: offset_of!(vmig_device, needed), flags: 99, priority: 5, ..good };
    assert_eq!(declared(&old).unwrap().1, 0);

    refused(&vmig_device { name: null(), ..good }, "vmig_device.name is NULL");
    refused(&vmig_device { version: 0, ..good }, "1 <= oldest <= version");
    refused(&vmig_device { flags: 8, ..good }, "unknown flags");
    let long = CString::new("x".repeat(300)).unwrap();
    refused(&vmig_device { name: long.as_ptr(), ..good }, "longer than 255");
    refused(&vmig_device { name: c"\xff".as_ptr(), ..good }, "not UTF-8");
    refused(&device(c"dev", &[vmig_field { name: null(), ..fields[0] }, END]), "vmig_field.name is NULL");
    refused(&device(c"dev", &[vmig_field { reserved: [0, 1], ..fields[0] }, END]), "reserved");
    refused(&device(c"dev", &[vmig_field { flags: 2, ..fields[0] }, END]), "unknown flags");
    refused(&device(c"dev", &[vmig_field { count: 0, ..fields[0] }, END]), "no elements");
    refused(&device(c"dev", &[vmig_field { count: 1 << 40, ..fields[0] }, END]), "more than 2^32");
    refused(&device(c"dev", &vec![fields[0]; 4097]), "no VMIG_END within 4096 rows");
    let endless = vec![from_ref(&good); 257];
    refused(&vmig_device { parts: endless.as_ptr(), ..good }, "no NULL within 256 parts");
}

#[test]
fn cycles_end_in_errors_and_soon() {
    let mut fields = vec![END; 4001];
    let mut dev = device(c"loop", &[]);
    let at = &raw const dev;
    fields[..4000].fill(vmig_field { nested: at, ..row(c"again", VMIG_KIND_STRUCT, 0, 1) });
    dev.fields = fields.as_ptr();
    assert!(refused(&dev, "nested deeper").to_string().contains("does one contain itself?"));

    let leaf_fields = [row(c"x", VMIG_KIND_U8, 0, 1), END];
    let mut level = vec![device(c"leaf", &leaf_fields)];
    let mut all_fields = Vec::new();
    for _ in 0..8 {
        let below = Box::new(level.pop().unwrap());
        let rows: Vec<_> = [c"a", c"b", c"c", c"d", c"e", c"f", c"g", c"h"]
            .map(|n| vmig_field { nested: &raw const *below, ..row(n, VMIG_KIND_STRUCT, 0, 1) })
            .into();
        all_fields.push(([rows, vec![END]].concat(), below));
        level.push(device(c"level", &all_fields.last().unwrap().0));
    }
    refused(&level[0], "more than 65536 rows");
}

/// A device of one byte whose callbacks return what it says.
#[repr(C)]
struct Callbacks {
    value: u8,
    result: c_int,
    version: u32,
}

unsafe extern "C" fn say(dev: *mut c_void) -> c_int {
    // SAFETY: registered with `Callbacks` only.
    unsafe { (*dev.cast::<Callbacks>()).result }
}

unsafe extern "C" fn say_version(dev: *mut c_void, version: u32) -> c_int {
    // SAFETY: registered with `Callbacks` only.
    unsafe { (*dev.cast::<Callbacks>()).version = version };
    // SAFETY: as above.
    unsafe { say(dev) }
}

#[test]
fn callbacks_keep_their_errno_and_are_named() {
    let fields = [row(c"value", VMIG_KIND_U8, 0, 1), END];
    let part = vmig_device { needed: Some(say), ..device(c"dev/part", &[END]) };
    let parts = [from_ref(&part), null()];
    let dev = device(c"dev", &fields);
    let save = [
        (vmig_device { pre_save: Some(say), ..dev }, "pre_save of device 'dev'"),
        (vmig_device { post_save: Some(say), ..dev }, "post_save of device 'dev'"),
        (vmig_device { parts: parts.as_ptr(), ..dev }, "needed of table 'dev/part'"),
    ];
    let run = |dev: &vmig_device, state: &mut Callbacks, load: bool| {
        // SAFETY: the table describes the first byte of the struct, which outlives the device.
        let device = unsafe { Device::new(table(dev).unwrap(), 0, (&raw mut *state).cast()) }.unwrap();
        let mut body = Vec::new();
        match load {
            true => device.parse(Part::Full, 1, &mut Slice::new(&[7])).and_then(|apply| apply()).map(|()| body),
            false => device.complete(&mut body).map(|()| body),
        }
    };
    let state = |result| Callbacks { value: 3, result, version: 0 };
    for (dev, what) in &save {
        let error = run(dev, &mut state(-libc::ENODEV), false).unwrap_err();
        assert_eq!(error.errno(), libc::ENODEV);
        assert!(error.text().contains(what) && error.text().contains("No such device"), "{error}");
        let error = run(dev, &mut state(c_int::MIN), false).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{error}");
        assert!(run(dev, &mut state(5), false).is_ok(), "what is not negative is fine");
    }
    assert_eq!(run(&save[2].0, &mut state(0), false).unwrap(), [3], "not needed");
    assert_eq!(run(&save[2].0, &mut state(1), false).unwrap().len(), 1 + 1 + 1 + 8 + 4, "needed");
    let load = [
        (vmig_device { pre_load: Some(say), ..dev }, "pre_load of device 'dev'", 3),
        (vmig_device { post_load: Some(say_version), ..dev }, "post_load of device 'dev'", 7),
    ];
    for (dev, what, value) in &load {
        let mut state = state(-libc::EPERM);
        let error = run(dev, &mut state, true).unwrap_err();
        assert!(error.errno() == libc::EPERM && error.text().contains(what), "{error}");
        assert_eq!(state.value, *value);
    }
    let mut fine = state(0);
    run(&load[1].0, &mut fine, true).unwrap();
    assert_eq!((fine.value, fine.version), (7, 1));
}

#[test]
fn entries_carry_what_the_table_says() {
    let fields = [row(c"value", VMIG_KIND_U8, 0, 1), END];
    let state = vmig_device { version: 5, oldest: 2, priority: 9, ..device(c"dev", &fields) };
    let mut value = 7u8;
    let dev: *mut c_void = (&raw mut value).cast();
    // SAFETY: the table describes one byte, which outlives the entry.
    let entry = unsafe { Entry::of_device(&raw const state, 3, dev) }.unwrap();
    let numbers = (entry.instance, entry.version, entry.oldest, entry.priority, entry.key);
    assert_eq!((entry.name.as_str(), numbers), ("dev", (3, 5, 2, 9, dev.addr())));
    let mut body = Vec::new();
    entry.section().unwrap().complete(&mut body).unwrap();
    assert_eq!(body, [7]);
    let none = vmig_device { fields: null(), ..state };
    // SAFETY: as above.
    let entry = unsafe { Entry::of_device(&raw const none, 0, null_mut()) }.unwrap();
    assert!(entry.section().is_none() && entry.version == 5 && entry.key == 0);
}
