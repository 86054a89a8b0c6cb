//! Random tables over random memory: what is saved is loaded, and nothing a stream says reaches beyond the device.
#![allow(unsafe_code, reason = "the devices of these tests are blocks with guards around them")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::sync::Arc;

use proptest::prelude::*;

use super::codec::{parse, save};
use super::table::{Checked, Count, Field, Hooks, Kind, Table};
use crate::error::Result;
use crate::wire::input::Slice;

const GUARD: usize = 64;
const FOOTER: [u8; 5] = [0x7e, 0, 0, 0, 1];

/// What to build a field from; offsets, names and count fields are filled in by `Build`.
#[derive(Clone, Debug)]
enum Shape {
    Plain(Kind),
    Unused(usize),
    Struct(Plan),
}

#[derive(Clone, Copy, Debug)]
enum Many {
    One,
    Fixed(u32),
    /// At most so many, counted by an integer of this width.
    Counted(u32, usize, bool),
}

#[derive(Clone, Debug)]
struct Plan {
    rows: Vec<(Shape, Many, bool, usize)>,
    parts: Vec<Plan>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let width = || prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let kind = prop_oneof![
        width().prop_map(Kind::Unsigned),
        width().prop_map(Kind::Signed),
        Just(Kind::Bool),
        Just(Kind::Timer),
        (1usize..9).prop_map(Kind::Bytes),
    ];
    let leaf = prop_oneof![9 => kind.prop_map(Shape::Plain), 1 => (1usize..5).prop_map(Shape::Unused)];
    let many = move || {
        let counted =
            (1u32..5, width(), any::<bool>()).prop_map(|(max, width, signed)| Many::Counted(max, width, signed));
        prop_oneof![2 => Just(Many::One), 1 => (1u32..4).prop_map(Many::Fixed), 1 => counted]
    };
    let row =
        |shape: BoxedStrategy<Shape>, many: BoxedStrategy<Many>| (shape, many, prop::bool::weighted(0.25), 0usize..4);
    let flat = prop::collection::vec(row(leaf.clone().boxed(), many().boxed()), 1..5)
        .prop_map(|rows| Plan { rows, parts: Vec::new() });
    flat.prop_recursive(3, 24, 4, move |inner| {
        let nested = inner.clone().prop_map(Shape::Struct);
        let shape = prop_oneof![2 => leaf.clone(), 1 => nested];
        let rows = prop::collection::vec(row(shape.boxed(), many().boxed()), 1..4);
        (rows, prop::collection::vec(inner, 0..3)).prop_map(|(rows, parts)| Plan { rows, parts })
    })
}

struct NeededAt(usize);

impl Hooks for NeededAt {
    fn needed(&self, device: *mut u8) -> Result<bool> {
        // SAFETY: the byte is a field of the table around the part.
        Ok(unsafe { device.wrapping_add(self.0).read() } & 1 == 1)
    }
}

#[derive(Default)]
struct Build {
    names: usize,
    /// Neither parts nor unused space anywhere: every accepted body is saved again as it came.
    exact: bool,
}

impl Build {
    /// The table of `plan` from offset `at` on, and where it ends.
    fn table(&mut self, plan: &Plan, name: String, mut at: usize) -> (Table, usize) {
        let mut table = Table::new(name, 1);
        for (shape, many, pointer, gap) in &plan.rows {
            at += gap;
            self.row(&mut table, shape, *many, *pointer, &mut at);
        }
        for part in &plan.parts {
            self.exact = false;
            let (name, needed) = (format!("{}/p{}", table.name, table.parts.len()), at);
            table.fields.push(Field::new(format!("needed{at}"), Kind::Unsigned(1), at));
            let (part, end) = self.table(part, name, at + 1);
            at = end;
            table.parts.push(Arc::new(Table { hooks: Some(Arc::new(NeededAt(needed))), ..part }));
        }
        (table, at)
    }

    fn row(&mut self, table: &mut Table, shape: &Shape, many: Many, pointer: bool, at: &mut usize) {
        let index = table.fields.len();
        let kind = match shape {
            Shape::Plain(kind) => kind.clone(),
            Shape::Struct(plan) => {
                self.names += 1;
                let (inner, end) = self.table(plan, format!("n{}", self.names), 0);
                Kind::Struct(Arc::new(inner), end + 1)
            }
            Shape::Unused(len) => {
                self.exact = false;
                return table.fields.push(Field::new(format!("f{index}"), Kind::Unused(*len), 0));
            }
        };
        let count = match many {
            Many::One => Count::One,
            Many::Fixed(n) => Count::Fixed(n),
            Many::Counted(max, width, signed) => {
                let number = if signed { Kind::Signed(width) } else { Kind::Unsigned(width) };
                table.fields.push(Field::new(format!("n{index}"), number, *at));
                *at += width;
                Count::Field { index, max }
            }
        };
        let size = if pointer { 8 } else { count.max() as usize * kind.memory_size() };
        let name = format!("f{index}");
        table.fields.push(Field { count, pointer, ..Field::new(name, kind, *at) });
        *at += size;
    }
}

/// A device and what its pointers lead to, each block between guards.
struct Memory {
    blocks: Vec<Box<[u8]>>,
    random: u64,
}

impl Memory {
    fn new(table: &Table, seed: u64) -> Self {
        let mut memory = Self { blocks: Vec::new(), random: seed | 1 };
        let base = memory.block(table.extent() as usize);
        memory.fill(table, base);
        memory
    }

    fn base(&mut self) -> *mut u8 {
        self.blocks[0].as_mut_ptr().wrapping_add(GUARD)
    }

    fn block(&mut self, len: usize) -> *mut u8 {
        let mut block = vec![0xa5; len + 2 * GUARD].into_boxed_slice();
        block[GUARD..GUARD + len].fill(0);
        self.blocks.push(block);
        let block = self.blocks.last_mut().unwrap();
        block.as_mut_ptr().wrapping_add(GUARD)
    }

    fn guards_hold(&self) -> bool {
        let whole = |b: &[u8]| b.iter().all(|b| *b == 0xa5);
        self.blocks.iter().all(|b| whole(&b[..GUARD]) && whole(&b[b.len() - GUARD..]))
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Valid random state: counts within their room, bools false or true, pointers to blocks of their own.
    fn fill(&mut self, table: &Table, base: *mut u8) {
        for (index, field) in table.fields.iter().enumerate() {
            let mut at = base.wrapping_add(field.offset);
            let (max, size) = (field.count.max() as usize, field.kind.memory_size());
            if field.pointer {
                let target = self.block(max * size);
                // SAFETY: tables of `Build` lie within the block made for them.
                unsafe { at.cast::<*mut u8>().write_unaligned(target) };
                at = target;
            }
            if let Kind::Struct(inner, stride) = &field.kind {
                (0..max).for_each(|i| self.fill(inner, at.wrapping_add(i * stride)));
                continue;
            }
            let counts = |f: &&Field| matches!(f.count, Count::Field { index: i, .. } if i == index);
            let room = table.fields.iter().find(counts).map(|f| u64::from(f.count.max()));
            let mut bytes: Vec<u8> = (0..max * size).map(|_| self.next() as u8).collect();
            if let Some(room) = room {
                let value = (self.next() % (room + 1)).to_ne_bytes();
                bytes.copy_from_slice(if cfg!(target_endian = "little") {
                    &value[..size]
                } else {
                    &value[8 - size..]
                });
            } else if matches!(field.kind, Kind::Bool) {
                bytes.iter_mut().for_each(|b| *b &= 1);
            }
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        }
        for part in &table.parts {
            self.fill(part, base);
        }
    }

    fn save(&mut self, table: &Checked) -> Vec<u8> {
        let mut out = Vec::new();
        // SAFETY: `new` made the memory for this table.
        unsafe { save(table, self.base(), &mut out) }.unwrap();
        out
    }

    /// Whether `body` was taken, all of it but a footer.
    fn load(&mut self, table: &Checked, body: &[u8]) -> Result<bool> {
        let mut input = Slice::new(body);
        let staged = parse(table, 1, &mut input)?;
        staged.describe().unwrap();
        // SAFETY: `new` made the memory for this table.
        unsafe { staged.apply(self.base()) }?;
        Ok(input.rest() == FOOTER)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn saved_parsed_applied_and_saved_again_is_the_same(plan in plan(), seed in any::<u64>()) {
        let table = Build::default().table(&plan, "dev".into(), 0).0.checked().unwrap();
        let body = Memory::new(&table, seed).save(&table);
        let mut other = Memory::new(&table, !seed);
        prop_assert!(other.load(&table, &[&body[..], &FOOTER].concat()).unwrap());
        prop_assert!(other.guards_hold());
        prop_assert_eq!(other.save(&table), body);
    }

    #[test]
    fn truncated_or_flipped_bodies_are_refused_or_harmless(plan in plan(), seed in any::<u64>()) {
        let mut build = Build { exact: true, ..Build::default() };
        let table = build.table(&plan, "dev".into(), 0).0.checked().unwrap();
        let mut body = Memory::new(&table, seed).save(&table);
        prop_assume!(body.len() < 4096);
        let mut other = Memory::new(&table, !seed);
        for len in 0..body.len() {
            // A cut between parts leaves a whole body of another device state, but never a footer after it.
            prop_assert!(!matches!(other.load(&table, &body[..len]), Ok(true)));
        }
        prop_assert!(other.guards_hold());
        body.extend(FOOTER);
        let end = body.len() - FOOTER.len();
        for bit in 0..end * 8 {
            body[bit / 8] ^= 1 << (bit % 8);
            let taken = matches!(other.load(&table, &body), Ok(true));
            if taken && build.exact {
                prop_assert_eq!(&other.save(&table), &body[..end]);
            }
            body[bit / 8] ^= 1 << (bit % 8);
        }
        prop_assert!(other.guards_hold());
    }
}
