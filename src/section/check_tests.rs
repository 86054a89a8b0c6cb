//! One broken rule at a time; each must be refused and say which.

use std::sync::Arc;

use super::check::{BODY_MAX, DEPTH_MAX, FIELDS_MAX};
use super::table::{Count, Field, Kind, Table};

fn good() -> Table {
    let inner = Table::new("inner", 1).with("x", Kind::Unsigned(2), 2);
    let mut table = Table::new("dev", 2).with("n", Kind::Unsigned(4), 0).with("b", Kind::Bool, 4).with(
        "in",
        Kind::Struct(Arc::new(inner), 4),
        8,
    );
    let array = Field { count: Count::Field { index: 0, max: 3 }, ..Field::new("array", Kind::Unsigned(8), 16) };
    table.fields.push(array);
    table.parts.push(Arc::new(Table::new("dev/part", 1).with("p", Kind::Unsigned(1), 5)));
    table
}

fn refused(what: &str, change: impl FnOnce(&mut Table)) {
    let mut table = good();
    change(&mut table);
    let error = table.checked().err().unwrap_or_else(|| panic!("must be refused: {what}"));
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.to_string().contains(what), "{what}: {error}");
}

#[test]
fn a_good_table_is_accepted() {
    let table = good().checked().unwrap();
    assert_eq!(table.extent(), 16 + 3 * 8);
}

#[test]
fn names_are_short_unique_and_say_whose_part_it_is() {
    refused("an empty name", |t| t.name.clear());
    refused("longer than 255", |t| t.name = "x".repeat(256));
    refused("control characters", |t| t.name = "a\nb".into());
    refused("an empty name", |t| t.fields[1].name.clear());
    refused("field 'n': table 'dev' has two fields", |t| t.fields[1].name = "n".into());
    for name in ["part", "de/part", "devx/part", "dev/", "dev", "dev/a/b"] {
        refused("a part of 'dev' is called 'dev/'", |t| t.parts[0] = Arc::new(Table::new(name, 1)));
    }
    refused("two parts are called", |t| t.parts.push(t.parts[0].clone()));
    refused("is named like a table around it", |t| {
        let mut inner = Table::new("dev", 1).with("x", Kind::Bool, 0);
        inner.parts.push(Arc::new(Table::new("dev/x", 1)));
        t.fields[2].kind = Kind::Struct(Arc::new(inner), 4);
    });
}

#[test]
fn versions_are_in_order() {
    refused("1 <= oldest <= version", |t| t.oldest = 0);
    refused("1 <= oldest <= version", |t| t.oldest = 3);
    refused("expected 1..=2, got 3", |t| t.fields[1].since = 3);
    refused("expected 1..=2, got 0", |t| t.fields[1].since = 0);
    refused("younger than the array", |t| t.fields[0].since = 2);
}

#[test]
fn kinds_and_counts_make_sense() {
    for width in [0, 3, 5, 16] {
        refused("integers are 1, 2, 4 or 8", |t| t.fields[0].kind = Kind::Unsigned(width));
        refused("integers are 1, 2, 4 or 8", |t| t.fields[1].kind = Kind::Signed(width));
    }
    for kind in [Kind::Bytes(0), Kind::Unused(0), Kind::Struct(Arc::new(Table::new("i", 1)), 0)] {
        refused("zero bytes", |t| t.fields[1].kind = kind);
    }
    refused("no elements", |t| t.fields[1].count = Count::Fixed(0));
    refused("room for at least one", |t| t.fields[3].count = Count::Field { index: 0, max: 0 });
    for index in [3, 4, usize::MAX] {
        refused("must come earlier", |t| t.fields[3].count = Count::Field { index, max: 3 });
    }
    refused("not a single integer", |t| t.fields[3].count = Count::Field { index: 1, max: 3 });
    refused("not a single integer", |t| t.fields[0].count = Count::Fixed(2));
    refused("unused space", |t| t.fields[1] = Field { pointer: true, ..Field::new("u", Kind::Unused(1), 0) });
}

#[test]
fn nested_tables_fit_their_struct() {
    refused("reaches beyond the end of its struct", |t| {
        let inner = Table::new("inner", 1).with("x", Kind::Unsigned(2), 3);
        t.fields[2].kind = Kind::Struct(Arc::new(inner), 4);
    });
    refused("has no fields", |t| t.fields[2].kind = Kind::Struct(Arc::new(Table::new("inner", 1)), 4));
}

#[test]
fn depth_width_and_size_are_limited() {
    refused("nested deeper", |t| {
        let mut inner = Table::new("i", 1).with("x", Kind::Bool, 0);
        for _ in 0..DEPTH_MAX {
            inner = Table::new("i", 1).with("x", Kind::Struct(Arc::new(inner), 1), 0);
        }
        t.fields[2].kind = Kind::Struct(Arc::new(inner), 1);
    });
    refused(&format!("more than {FIELDS_MAX} fields"), |t| {
        let mut inner = Arc::new(Table::new("i", 1).with("x", Kind::Bool, 0));
        for _ in 0..10 {
            let mut outer = Table::new("i", 1);
            for name in 0..10 {
                outer.fields.push(Field::new(name.to_string(), Kind::Struct(inner.clone(), 1), 0));
            }
            inner = Arc::new(outer);
        }
        t.fields[2].kind = Kind::Struct(inner, 1);
    });
    let giant = usize::try_from(BODY_MAX).unwrap();
    refused("larger than the limit", |t| t.fields[1].kind = Kind::Bytes(giant + 1));
    refused("larger than the limit", |t| t.fields[3].count = Count::Field { index: 0, max: u32::MAX });
    refused("larger than the limit", |t| t.fields[2].count = Count::Fixed(u32::MAX));
    refused("ends beyond", |t| t.fields[1].offset = giant);
    refused("ends beyond", |t| t.fields[1].offset = usize::MAX);
    refused("can exceed", |t| {
        let part = Table::new("dev/big", 1).with("u", Kind::Unused(giant), 0);
        t.parts.push(Arc::new(part));
    });
}

#[test]
fn no_value_from_a_stream_can_land_on_a_pointer() {
    let pointer = |offset| Field { pointer: true, ..Field::new("ptr", Kind::Bytes(4), offset) };
    for offset in [34, 36, 39] {
        refused("on top of the pointer 'ptr'", |t| t.fields.push(pointer(offset)));
    }
    refused("on top of the pointer 'ptr'", |t| {
        t.fields.push(pointer(64));
        t.parts.push(Arc::new(Table::new("dev/sly", 1).with("s", Kind::Unsigned(1), 71)));
    });
    let mut fine = good();
    fine.fields.push(pointer(40));
    fine.checked().unwrap();
}
