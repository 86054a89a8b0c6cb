//! Bytes worked out by hand, one rule at a time.
#![allow(unsafe_code, reason = "the devices of these tests are structs on the stack")]

use std::mem::offset_of;
use std::ptr::{from_mut, null_mut};
use std::sync::Arc;

use serde_json::json;

use super::codec::{parse, save};
use super::staged::describe;
use super::table::{Checked, Count, Field, Hooks, Kind, Table};
use crate::error::{Error, Result};
use crate::wire::input::{Input, Slice};

pub(super) fn saved<T>(table: &Checked, device: &mut T) -> Result<Vec<u8>> {
    assert!(table.extent() <= size_of::<T>() as u64);
    let mut out = vec![0xee];
    // SAFETY: the tests below pair each table with the struct it describes.
    let result = unsafe { save(table, from_mut(device).cast(), &mut out) };
    if result.is_err() {
        assert_eq!(out, [0xee], "a failed save leaves nothing behind");
    }
    result.map(|()| out.split_off(1))
}

pub(super) fn loaded<T>(table: &Checked, version: u32, body: &[u8], device: &mut T) -> Result<()> {
    let mut input = Slice::new(body);
    let staged = parse(table, version, &mut input)?;
    assert!(input.rest().is_empty(), "all of the body is taken");
    // SAFETY: as above.
    unsafe { staged.apply(from_mut(device).cast()) }
}

/// The error of `what`, as a person sees it.
fn said<T>(what: Result<T>) -> String {
    what.err().expect("must fail").to_string()
}

pub(super) fn with_count(name: &str, kind: Kind, count: Count, offset: usize) -> Field {
    Field { count, ..Field::new(name, kind, offset) }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Plain {
    u8: u8,
    u16: u16,
    u32: u32,
    u64: u64,
    i8: i8,
    i16: i16,
    i32: i32,
    i64: i64,
    bool: bool,
    bytes: [u8; 3],
    timer: u64,
    words: [u16; 3],
}

fn plain_table() -> Table {
    let mut table = Table::new("plain", 1)
        .with("u8", Kind::Unsigned(1), offset_of!(Plain, u8))
        .with("u16", Kind::Unsigned(2), offset_of!(Plain, u16))
        .with("u32", Kind::Unsigned(4), offset_of!(Plain, u32))
        .with("u64", Kind::Unsigned(8), offset_of!(Plain, u64))
        .with("i8", Kind::Signed(1), offset_of!(Plain, i8))
        .with("i16", Kind::Signed(2), offset_of!(Plain, i16))
        .with("i32", Kind::Signed(4), offset_of!(Plain, i32))
        .with("i64", Kind::Signed(8), offset_of!(Plain, i64))
        .with("bool", Kind::Bool, offset_of!(Plain, bool))
        .with("bytes", Kind::Bytes(3), offset_of!(Plain, bytes))
        .with("gap", Kind::Unused(2), 0)
        .with("timer", Kind::Timer, offset_of!(Plain, timer));
    table.fields.push(with_count("words", Kind::Unsigned(2), Count::Fixed(3), offset_of!(Plain, words)));
    table
}

const PLAIN: Plain = Plain {
    u8: 0x12,
    u16: 0x1234,
    u32: 0x1234_5678,
    u64: 0x0123_4567_89ab_cdef,
    i8: -2,
    i16: -2,
    i32: -3,
    i64: i64::MIN,
    bool: true,
    bytes: [7, 8, 9],
    timer: u64::MAX,
    words: [1, 0x203, 0xffff],
};

#[rustfmt::skip]
const PLAIN_BODY: &[u8] = &[
    0x12,
    0x12, 0x34,
    0x12, 0x34, 0x56, 0x78,
    0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef,
    0xfe,
    0xff, 0xfe,
    0xff, 0xff, 0xff, 0xfd,
    0x80, 0, 0, 0, 0, 0, 0, 0,
    1,
    7, 8, 9,
    0, 0,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0, 1, 2, 3, 0xff, 0xff,
];

#[test]
fn plain_kinds_have_their_bytes() {
    let table = plain_table().checked().unwrap();
    assert_eq!(saved(&table, &mut PLAIN.clone()).unwrap(), PLAIN_BODY);
    let mut device = Plain::default();
    let mut body = PLAIN_BODY.to_vec();
    body[34..36].copy_from_slice(&[0xaa, 0xbb]);
    loaded(&table, 1, &body, &mut device).unwrap();
    assert_eq!(device, PLAIN, "unused space is ignored");
}

#[test]
fn every_truncation_names_the_field_it_ends_in() {
    let table = plain_table().checked().unwrap();
    let ends = [1, 3, 7, 15, 16, 18, 22, 30, 31, 34, 36, 44, 50];
    for len in 0..PLAIN_BODY.len() {
        let error = parse(&table, 1, &mut Slice::new(&PLAIN_BODY[..len])).unwrap_err();
        let field = &table.fields[ends.iter().position(|end| *end > len).unwrap()].name;
        assert_eq!(error.place().field.as_ref(), Some(field), "{len}: {error}");
        assert_eq!((error.errno(), error.place().section.as_deref()), (libc::EIO, Some("plain")));
    }
}

#[test]
fn a_bool_is_false_or_true() {
    let table = plain_table().checked().unwrap();
    let mut body = PLAIN_BODY.to_vec();
    body[30] = 2;
    let text = said(parse(&table, 1, &mut Slice::new(&body)));
    assert!(
        text.starts_with("section 'plain' field 'bool': ") && text.ends_with("(expected 0 or 1, got 2)"),
        "{text}"
    );
    let mut wild = [0xffu8; size_of::<Plain>()];
    assert!(said(saved(&table, &mut wild)).contains("field 'bool'"));
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Queue {
    head: u16,
    signed: i8,
    items: [u32; 4],
    points: [Point; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Point {
    x: u8,
    y: u16,
}

fn point() -> Arc<Table> {
    let table = Table::new("point", 1);
    Arc::new(table.with("x", Kind::Unsigned(1), 0).with("y", Kind::Unsigned(2), offset_of!(Point, y)))
}

fn queue_table() -> Table {
    let mut table = Table::new("queue", 1).with("head", Kind::Unsigned(2), 0).with("signed", Kind::Signed(1), 2);
    let points = Kind::Struct(point(), size_of::<Point>());
    let count = |index, max| Count::Field { index, max };
    table.fields.push(with_count("items", Kind::Unsigned(4), count(0, 4), offset_of!(Queue, items)));
    table.fields.push(with_count("points", points, count(1, 2), offset_of!(Queue, points)));
    table
}

#[test]
fn variable_arrays_follow_their_count() {
    let table = queue_table().checked().unwrap();
    let points = [Point { x: 5, y: 6 }, Point { x: 7, y: 8 }];
    let queue = Queue { head: 2, signed: 1, items: [1, 2, 3, 4], points };
    let body = saved(&table, &mut queue.clone()).unwrap();
    assert_eq!(body, [0, 2, 1, 0, 0, 0, 1, 0, 0, 0, 2, 5, 0, 6]);
    let mut other = Queue { items: [9; 4], ..Queue::default() };
    loaded(&table, 1, &body, &mut other).unwrap();
    assert_eq!(other.items, [1, 2, 9, 9], "what lies behind the count is left alone");
    assert_eq!(other.points, [Point { x: 5, y: 6 }, Point::default()]);
}

#[test]
fn a_count_beyond_its_room_is_refused_on_both_sides() {
    let table = queue_table().checked().unwrap();
    for (queue, field, got) in [
        (Queue { head: 5, ..Queue::default() }, "items", "got 5"),
        (Queue { head: 0xffff, ..Queue::default() }, "items", "got 65535"),
        (Queue { signed: 3, ..Queue::default() }, "points", "got 3"),
        (Queue { signed: -1, ..Queue::default() }, "points", "got a negative number"),
    ] {
        let text = said(saved(&table, &mut queue.clone()));
        assert!(text.contains(&format!("field '{field}'")) && text.contains(got), "{text}");
    }
    let mut body = vec![0, 5, 0];
    body.resize(64, 0);
    let text = said(parse(&table, 1, &mut Slice::new(&body)));
    assert!(text.contains("field 'items'") && text.contains("'head'") && text.contains("got 5"), "{text}");
    assert!(said(parse(&table, 1, &mut Slice::new(&[0, 0, 0xff]))).contains("negative"));
}

#[repr(C)]
struct Pointing {
    len: u32,
    data: *mut u8,
    point: *mut Point,
}

fn pointing_table() -> Checked {
    let mut table = Table::new("pointing", 1).with("len", Kind::Unsigned(4), 0);
    let count = Count::Field { index: 0, max: 4 };
    let data = with_count("data", Kind::Bytes(1), count, offset_of!(Pointing, data));
    table.fields.push(Field { pointer: true, ..data });
    let point = Field::new("point", Kind::Struct(point(), size_of::<Point>()), offset_of!(Pointing, point));
    table.fields.push(Field { pointer: true, ..point });
    table.checked().unwrap()
}

#[test]
fn pointers_are_followed_and_null_is_an_error() {
    let table = pointing_table();
    let (mut data, mut point) = ([1, 2, 3, 4], Point { x: 9, y: 10 });
    let mut device = Pointing { len: 3, data: data.as_mut_ptr(), point: &raw mut point };
    let body = saved(&table, &mut device).unwrap();
    assert_eq!(body, [0, 0, 0, 3, 1, 2, 3, 9, 0, 10]);

    let (mut data, mut point) = ([0xee; 4], Point::default());
    let mut other = Pointing { len: 0, data: data.as_mut_ptr(), point: &raw mut point };
    loaded(&table, 1, &body, &mut other).unwrap();
    assert_eq!((data, point), ([1, 2, 3, 0xee], Point { x: 9, y: 10 }));

    for (field, data, point) in [("data", null_mut(), &raw mut point), ("point", data.as_mut_ptr(), null_mut())] {
        let mut device = Pointing { len: 3, data, point };
        for error in [saved(&table, &mut device).err(), loaded(&table, 1, &body, &mut device).err()] {
            let error = error.unwrap();
            assert_eq!((error.errno(), error.place().field.as_deref()), (libc::EFAULT, Some(field)), "{error}");
        }
    }
    let mut device = Pointing { len: 0, data: null_mut(), point: &raw mut point };
    assert_eq!(saved(&table, &mut device).unwrap().len(), 7, "NULL is fine where nothing is kept");
}

/// Sent if the byte at this offset is set.
struct NeededAt(usize);

impl Hooks for NeededAt {
    fn needed(&self, device: *mut u8) -> Result<bool> {
        // SAFETY: the tests give offsets within their device.
        match unsafe { device.wrapping_add(self.0).read() } {
            2 => Err(Error::new(libc::EAGAIN, "needed cannot tell")),
            value => Ok(value == 1),
        }
    }
}

/// Bytes: a, b, c are state; the last two say which parts are needed.
fn parts_table() -> Checked {
    let part = |name: &str, at, needed: usize| {
        let table = Table::new(name, 3).with("v", Kind::Unsigned(1), at);
        Table { hooks: Some(Arc::new(NeededAt(needed))), oldest: 2, ..table }
    };
    let mut first = part("dev/first", 1, 3);
    first.parts.push(Arc::new(Table::new("dev/first/deep", 1).with("w", Kind::Unsigned(1), 2)));
    let mut table = Table::new("dev", 1).with("a", Kind::Unsigned(1), 0);
    table.parts = vec![Arc::new(first), Arc::new(part("dev/second", 2, 4))];
    table.checked().unwrap()
}

#[rustfmt::skip]
const FIRST: &[u8] = &[
    5, 9, b'd', b'e', b'v', b'/', b'f', b'i', b'r', b's', b't', 0, 0, 0, 3, 0xb,
    5, 14, b'd', b'e', b'v', b'/', b'f', b'i', b'r', b's', b't', b'/', b'd', b'e', b'e', b'p', 0, 0, 0, 1, 0xc,
];
const SECOND: &[u8] = &[5, 10, b'd', b'e', b'v', b'/', b's', b'e', b'c', b'o', b'n', b'd', 0, 0, 0, 3, 0xd];

#[test]
fn parts_are_sent_when_needed() {
    let table = parts_table();
    assert_eq!(saved(&table, &mut [0xau8, 0xb, 0xc, 0, 0]).unwrap(), [0xa]);
    assert_eq!(saved(&table, &mut [0xau8, 0xb, 0xc, 1, 0]).unwrap(), [&[0xa], FIRST].concat());
    assert_eq!(saved(&table, &mut [0xau8, 0xb, 0xd, 0, 1]).unwrap(), [&[0xa], SECOND].concat());
    let error = saved(&table, &mut [0xau8, 0xb, 0xd, 0, 2]).unwrap_err();
    assert_eq!((error.errno(), error.place().section.as_deref()), (libc::EAGAIN, Some("dev/second")));
}

#[test]
fn parts_load_in_any_order_once_and_by_name() {
    let table = parts_table();
    let mut device = [0u8; 5];
    loaded(&table, 1, &[&[0xa], SECOND, FIRST].concat(), &mut device).unwrap();
    assert_eq!(device, [0xa, 0xb, 0xc, 0, 0], "the part that came last was written last");
    let mut device = [9u8; 5];
    loaded(&table, 1, &[0xa], &mut device).unwrap();
    assert_eq!(device, [0xa, 9, 9, 9, 9], "a part that did not come is left at its default");

    let refuse = |body: &[u8]| parse(&table, 1, &mut Slice::new(body)).unwrap_err();
    let twice = refuse(&[&[0xa], SECOND, SECOND].concat());
    assert!(twice.text().contains("'dev/second' comes a second time"), "{twice}");
    let mut unknown = [&[0xa], SECOND].concat();
    unknown[7] = b'x';
    let unknown = refuse(&unknown);
    assert_eq!(unknown.errno(), libc::ENOENT);
    assert!(unknown.text().contains("dev/xecond"), "{unknown}");
    for (version, word) in [(1, "older"), (4, "newer")] {
        let mut body = [&[0xa], SECOND].concat();
        body[16] = version;
        let text = refuse(&body).to_string();
        assert!(text.contains(&format!("version {version} of 'dev/second' is {word}")), "{text}");
    }
}

#[test]
fn what_is_not_a_part_is_left_to_the_reader_of_the_footer() {
    let table = parts_table();
    for tail in [&[][..], &[5], &[5, 9], &[5, 9, b'd', b'e'], &[5, 3, b'd', b'e', b'v'], &[0x7e, 0, 0, 0, 1]] {
        let body = [&[0xa], tail].concat();
        let mut input = Slice::new(&body);
        parse(&table, 1, &mut input).unwrap();
        assert_eq!(input.rest(), tail);
    }
    let other = [0xa, 5, 9, b'x', b'e', b'v', b'/', b'f', b'i', b'r', b's', b't', 0, 0, 0, 3, 0xb];
    let mut input = Slice::new(&other);
    parse(&table, 1, &mut input).unwrap();
    assert_eq!(input.position(), 1);
}

/// A live stream that must not be asked for more than it will send.
struct Live<'a>(Slice<'a>);

impl Input for Live<'_> {
    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        self.0.read(buf)
    }
    fn peek(&mut self, n: usize) -> Result<&[u8]> {
        assert!(n <= self.0.rest().len(), "would wait for bytes that never come");
        self.0.peek(n)
    }
    fn position(&self) -> u64 {
        self.0.position()
    }
}

#[test]
fn looking_for_parts_never_waits_for_more_than_the_footer() {
    for tail in [&[0x7e, 0, 0, 0, 1][..], &[5, 0x7e, 0, 0, 0], &[5, 9, b'd', b'x', 0]] {
        let body = [&[0xa], tail].concat();
        parse(&parts_table(), 1, &mut Live(Slice::new(&body))).unwrap();
    }
}

#[test]
fn older_versions_lack_younger_fields() {
    let mut table = Table::new("aging", 3).with("a", Kind::Unsigned(1), 0);
    table.fields.push(Field { since: 2, ..Field::new("b", Kind::Unsigned(1), 1) });
    table.fields.push(Field { since: 3, ..Field::new("c", Kind::Unsigned(1), 2) });
    table.oldest = 2;
    let table = table.checked().unwrap();
    assert_eq!(saved(&table, &mut [1u8, 2, 3]).unwrap(), [1, 2, 3]);
    let mut device = [9u8; 3];
    loaded(&table, 2, &[1, 2], &mut device).unwrap();
    assert_eq!(device, [1, 2, 9]);
    let text = said(parse(&table, 4, &mut Slice::new(&[1, 2, 3])));
    assert!(text.contains("version 4") && text.contains("version 3"), "{text}");
    let text = said(parse(&table, 1, &mut Slice::new(&[1])));
    assert!(text.contains("version 1") && text.contains("version 2"), "{text}");
}

#[test]
fn errors_name_the_way_to_a_field() {
    let mut inner = Table::new("inner", 1);
    inner.fields.push(with_count("flags", Kind::Bool, Count::Fixed(2), 0));
    let mut table = Table::new("outer", 1);
    table.fields.push(with_count("channels", Kind::Struct(Arc::new(inner), 2), Count::Fixed(3), 0));
    let error = saved(&table.checked().unwrap(), &mut [0u8, 0, 0, 0, 0, 7]).unwrap_err();
    assert_eq!(error.place().field.as_deref(), Some("channels[2].flags"));
    assert_eq!(error.place().section.as_deref(), Some("outer"));
}

#[test]
fn data_that_looks_like_a_part_of_the_struct_before_it_is_refused_at_save() {
    let mut inner = Table::new("in", 1).with("x", Kind::Unsigned(1), 0);
    let part = Table::new("in/p", 1);
    inner.parts.push(Arc::new(Table { hooks: Some(Arc::new(NeededAt(0))), ..part }));
    let table = Table::new("outer", 1).with("in", Kind::Struct(Arc::new(inner), 1), 0);
    let table = table.with("guest", Kind::Bytes(6), 1).checked().unwrap();
    assert_eq!(saved(&table, &mut { *b"\0\x05\x04in.p" }).unwrap(), *b"\0\x05\x04in.p");
    assert!(said(saved(&table, &mut { *b"\0\x05\x04in/p" })).contains("look like a part"));
    assert_eq!(saved(&table, &mut { *b"\x01abcdef" }).unwrap(), *b"\x01\x05\x04in/p\0\0\0\x01abcdef");
}

#[test]
fn data_after_a_struct_without_parts_is_data_whatever_it_looks_like() {
    let inner = Table::new("in", 1).with("x", Kind::Unsigned(1), 0);
    let table = Table::new("outer", 1).with("in", Kind::Struct(Arc::new(inner), 1), 0);
    let table = table.with("guest", Kind::Bytes(6), 1).checked().unwrap();
    let mut device = [0u8; 7];
    loaded(&table, 1, b"\0\x05\x04in/p", &mut device).unwrap();
    assert_eq!(device, *b"\0\x05\x04in/p");
}

#[test]
fn descriptions_say_what_was_sent() {
    let table = queue_table().checked().unwrap();
    let points = |fields| json!({"vmsd_name": "point", "version": 1, "fields": fields});
    let xy = json!([{"name": "x", "type": "uint8", "size": 1}, {"name": "y", "type": "uint16", "size": 2}]);
    let expected = json!({"vmsd_name": "queue", "version": 1, "fields": [
        {"name": "head", "type": "uint16", "size": 2},
        {"name": "signed", "type": "int8", "size": 1},
        {"name": "items", "type": "uint32", "size": 4, "array_len": 2},
        {"name": "points", "type": "struct", "size": 3, "array_len": 1, "struct": points(xy)},
    ]});
    assert_eq!(describe(&table, &[0, 2, 1, 0, 0, 0, 1, 0, 0, 0, 2, 5, 0, 6]).unwrap(), expected);

    let table = parts_table();
    let value = describe(&table, &[&[0xa], SECOND].concat()).unwrap();
    assert_eq!(value["subsections"].as_array().unwrap().len(), 1, "{value}");
    assert_eq!(value["subsections"][0]["vmsd_name"], "dev/second");
    assert_eq!(value["subsections"][0]["version"], 3);
    assert_eq!(describe(&table, &[0xa]).unwrap().get("subsections"), None);
    let value = describe(&pointing_table(), &[0, 0, 0, 3, 1, 2, 3, 9, 0, 10]).unwrap();
    assert_eq!(value["fields"][1], json!({"name": "data", "type": "buffer", "size": 3}));
}

#[test]
fn elements_of_different_shape_are_described_one_by_one() {
    let mut inner = Table::new("inner", 1).with("n", Kind::Unsigned(1), 0);
    inner.fields.push(with_count("v", Kind::Unsigned(1), Count::Field { index: 0, max: 2 }, 1));
    let mut table = Table::new("outer", 1);
    table.fields.push(with_count("list", Kind::Struct(Arc::new(inner), 3), Count::Fixed(2), 0));
    let value = describe(&table.checked().unwrap(), &[0, 2, 7, 8]).unwrap();
    let list = value["fields"].as_array().unwrap();
    assert_eq!((&list[0]["index"], &list[0]["size"]), (&json!(0), &json!(1)));
    assert_eq!((&list[1]["index"], &list[1]["size"]), (&json!(1), &json!(3)));
    assert_eq!(list[1]["struct"]["fields"][1]["array_len"], 2);
}

#[test]
fn a_description_does_not_grow_without_limit() {
    let mut inner = Table::new("inner", 1).with("n", Kind::Unsigned(1), 0);
    inner.fields.push(with_count("v", Kind::Unsigned(1), Count::Field { index: 0, max: 2 }, 1));
    let mut table = Table::new("outer", 1);
    table.fields.push(with_count("list", Kind::Struct(Arc::new(inner), 3), Count::Fixed(100_000), 0));
    let table = table.checked().unwrap();
    assert_eq!(describe(&table, &[0; 100_000]).unwrap_err().errno(), libc::E2BIG);
}
