//! Fields that are file descriptors: saved, parsed, placed, given and taken back.
#![allow(unsafe_code, reason = "saves and loads a struct of the test")]

use std::ffi::c_int;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::codec::{parse_with_fds, save, save_with_fds};
use super::fds::{Inbox, NO_FD, Outbox};
use super::staged::describe;
use super::table::{Checked, Count, Field, Kind, Table};
use crate::wire::input::Slice;

#[repr(C)]
#[derive(Debug)]
struct Nic {
    count: u32,
    tap: c_int,
    queues: [c_int; 3],
    ring: [Ring; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Ring {
    head: u32,
    kick: c_int,
}

fn table() -> Checked {
    let ring = Table::new("ring", 1).with("head", Kind::Unsigned(4), 0).with("kick", Kind::Fd, 4);
    let mut table = Table::new("nic", 1).with("count", Kind::Unsigned(4), 0).with("tap", Kind::Fd, 4);
    let (queues, rings) = (offset_of!(Nic, queues), offset_of!(Nic, ring));
    let count = Count::Field { index: 0, max: 3 };
    table.fields.push(Field { count, ..Field::new("queues", Kind::Fd, queues) });
    let ring = Kind::Struct(Arc::new(ring), size_of::<Ring>());
    table.fields.push(Field { count: Count::Fixed(2), ..Field::new("ring", ring, rings) });
    table.checked().unwrap()
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn empty() -> Nic {
    Nic { count: 0, tap: -7, queues: [-7; 3], ring: [Ring { head: 0, kick: -7 }; 2] }
}

/// A saved body with four descriptors, two of which are none, and those descriptors.
fn saved(table: &Checked) -> (Vec<u8>, Vec<OwnedFd>) {
    let own: Vec<OwnedFd> = (0..3).map(|_| null()).collect();
    let ring = [Ring { head: 5, kick: own[2].as_raw_fd() }, Ring { head: 6, kick: -1 }];
    let mut nic = Nic { count: 2, tap: own[0].as_raw_fd(), queues: [-1, own[1].as_raw_fd(), 99_999], ring };
    let (mut body, mut fds) = (Vec::new(), Outbox::default());
    // SAFETY: the table describes Nic.
    unsafe { save_with_fds(table, (&raw mut nic).cast(), &mut body, &mut fds) }.unwrap();
    (body, fds.take())
}

fn is_open(fd: c_int) -> bool {
    std::fs::metadata(format!("/proc/self/fd/{fd}")).is_ok()
}

#[test]
fn they_are_numbered_and_described() {
    let table = table();
    let (body, fds) = saved(&table);
    let words: Vec<u32> = body.chunks(4).map(|b| u32::from_be_bytes(b.try_into().unwrap())).collect();
    assert_eq!((words, fds.len()), (vec![2, 0, NO_FD, 1, 5, 2, 6, NO_FD], 3));
    let fields = &describe(&table, &body).unwrap()["fields"];
    assert_eq!(fields[1], serde_json::json!({"name": "tap", "type": "fd", "size": 4}));
    assert_eq!(fields[2], serde_json::json!({"name": "queues", "type": "fd", "size": 4, "array_len": 2}));
    assert_eq!(table.fd_fields(1), ["tap", "queues", "ring.kick"]);
}

#[test]
fn they_are_placed_and_belong_to_the_device_once_given() {
    let table = table();
    for given in [true, false] {
        let (body, fds) = saved(&table);
        let (inbox, mut nic) = (Inbox::default(), empty());
        inbox.add(fds).unwrap();
        let staged = parse_with_fds(&table, 1, &mut Slice::new(&body), Some(&inbox)).unwrap();
        inbox.check_empty().unwrap();
        // SAFETY: the table describes Nic, which outlives the inbox's interest in it.
        unsafe { staged.apply_placing((&raw mut nic).cast(), &inbox) }.unwrap();
        let placed = [nic.tap, nic.queues[1], nic.ring[0].kick];
        assert!(placed.iter().all(|fd| is_open(*fd)), "{nic:?}");
        assert_eq!((nic.queues[0], nic.queues[2], nic.ring[1].kick, nic.ring[1].head), (-1, -7, -1, 6));
        if given {
            inbox.give();
            drop(inbox);
            for fd in placed {
                assert!(is_open(fd));
                // SAFETY: given to this device, so ours to close.
                drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
            }
        } else {
            nic.queues[1] = 12_345; // the VMM put another one there
            inbox.take_back();
            assert_eq!((nic.tap, nic.queues[1], nic.ring[0].kick), (-1, 12_345, -1));
        }
    }
}

#[test]
fn bodies_that_name_what_is_not_there_are_refused() {
    let table = table();
    for (at, number, field) in
        [(1, 3, "tap"), (3, 0, "queues"), (5, 1, "ring[0].kick"), (7, NO_FD - 1, "ring[1].kick")]
    {
        let (mut body, fds) = saved(&table);
        body[4 * at..][..4].copy_from_slice(&u32::to_be_bytes(number));
        let inbox = Inbox::default();
        inbox.add(fds).unwrap();
        let error = parse_with_fds(&table, 1, &mut Slice::new(&body), Some(&inbox)).unwrap_err();
        assert!(error.to_string().contains(&format!("field '{field}'")), "{error}");
    }
    let inbox = Inbox::default();
    inbox.add(vec![null()]).unwrap();
    assert_eq!(inbox.check_empty().unwrap_err().errno(), libc::EPROTO);
}

#[test]
fn what_is_no_descriptor_is_named() {
    let table = table();
    for wrong in [-2, 1_000_000] {
        let mut nic = empty();
        (nic.tap, nic.ring[0].kick, nic.ring[1].kick) = (-1, wrong, -1);
        let mut body = vec![9];
        // SAFETY: the table describes Nic.
        let error = unsafe { save_with_fds(&table, (&raw mut nic).cast(), &mut body, &mut Outbox::default()) };
        let error = error.unwrap_err();
        assert!(error.to_string().contains("field 'ring[0].kick'") && error.errno() == libc::EBADF, "{error}");
        assert_eq!(body, [9]);
    }
    let file = null();
    let mut nic = Nic { tap: file.as_raw_fd(), ring: [Ring { head: 0, kick: -1 }; 2], ..empty() };
    // SAFETY: the table describes Nic.
    let error = unsafe { save(&table, (&raw mut nic).cast(), &mut Vec::new()) }.unwrap_err();
    assert!(error.to_string().contains("cannot travel"), "{error}");
}

#[test]
fn none_stands_behind_a_pointer() {
    let refused = |field: Field| {
        let mut table = Table::new("nic", 1);
        table.fields.push(Field { pointer: true, ..field });
        let error = table.checked().unwrap_err();
        assert!(error.to_string().contains("behind a pointer"), "{error}");
    };
    refused(Field::new("tap", Kind::Fd, 0));
    let inner =
        Table::new("inner", 1).with("x", Kind::Struct(Arc::new(Table::new("in", 1).with("fd", Kind::Fd, 0)), 4), 0);
    refused(Field::new("rings", Kind::Struct(Arc::new(inner), 4), 0));
}
