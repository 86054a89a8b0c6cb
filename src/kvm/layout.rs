//! Rows of a device table from a `repr(C)` structure: name, offset and encoding follow the member itself.

use std::sync::Arc;

use kvm_bindings::{kvm_dtable, kvm_pit_channel_state, kvm_segment, kvm_xcr};

use crate::section::table::{Count, Field, Kind, Table};

/// A member's type, as the stream sees it.
pub(super) trait Cell {
    fn kind() -> Kind;
    fn count() -> Count {
        Count::One
    }
}

macro_rules! integers {
    ($($type:ty => $kind:ident),*) => { $(
        impl Cell for $type {
            fn kind() -> Kind {
                Kind::$kind(size_of::<$type>())
            }
        }
    )* };
}
integers!(u8 => Unsigned, u16 => Unsigned, u32 => Unsigned, u64 => Unsigned, i8 => Signed, i64 => Signed);

impl<T: Cell, const N: usize> Cell for [T; N] {
    fn kind() -> Kind {
        T::kind()
    }
    fn count() -> Count {
        Count::Fixed(u32::try_from(N).unwrap_or(u32::MAX))
    }
}

/// One row; `_member` only carries the member's type.
pub(super) fn row<T, C: Cell>(name: &str, offset: usize, _member: fn(&T) -> &C) -> Field {
    Field { name: name.to_owned(), kind: C::kind(), count: C::count(), since: 1, offset, pointer: false }
}

/// `rows!(Type: a, b.c)`: the rows of members `a` and `b.c`.
macro_rules! rows {
    ($type:ty: $($($part:ident).+),* $(,)?) => {
        vec![$($crate::kvm::layout::row::<$type, _>(
            stringify!($($part).+),
            std::mem::offset_of!($type, $($part).+),
            |all: &$type| &all.$($part).+,
        )),*]
    };
}
pub(super) use rows;

/// A table of version 1 without parts or hooks.
pub(super) fn table(name: &str, fields: Vec<Field>) -> Table {
    Table { fields, ..Table::new(name, 1) }
}

/// Makes array `name` as long as the earlier field `len` says.
pub(super) fn counted(mut fields: Vec<Field>, name: &str, len: &str) -> Vec<Field> {
    let index = fields.iter().position(|field| field.name == len);
    let array = fields.iter_mut().find(|field| field.name == name);
    match (index, array) {
        (Some(index), Some(array)) => {
            if let Count::Fixed(max) = array.count {
                array.count = Count::Field { index, max };
            }
        }
        _ => unreachable!("the array {name} and its length {len} are rows of the same table"),
    }
    fields
}

/// Structures of the kernel's ABI, field by field.
macro_rules! nested {
    ($($type:ty, $name:literal: $($member:ident),*;)*) => { $(
        impl Cell for $type {
            fn kind() -> Kind {
                Kind::Struct(Arc::new(table($name, rows!($type: $($member),*))), size_of::<$type>())
            }
        }
    )* };
}
pub(super) use nested;

nested! {
    kvm_segment, "segment": base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable;
    kvm_dtable, "dtable": base, limit;
    kvm_xcr, "xcr": xcr, value;
    kvm_pit_channel_state, "pit-channel": count, latched_count, count_latched, status_latched, status, read_state,
        write_state, write_latch, rw_mode, mode, bcd, gate, count_load_time;
}
