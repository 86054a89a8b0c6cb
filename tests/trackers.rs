//! Every tracker keeps one property, over drawn schedules: see trackers/schedule.rs. `make check` runs some of them,
//! `make check-all` thousands.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "trackers/memory.rs"]
mod memory;
#[path = "trackers/schedule.rs"]
mod schedule;

use common::{Rng, points, skip};
use memory::{Kind, Memory};
use schedule::{Place, World, Writer, size};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmig::dirty::choice::Choice;
use vmig::dirty::{self, write_protect::WriteProtect};

/// Schedules of each tracker.
const ALL: usize = 2000;
const SAMPLE: usize = 60;

/// A thread that writes and tells nobody.
struct Plain;

impl Writer for Plain {
    fn write(&mut self, place: &Place, page: usize, pages: usize, value: u64) {
        let end = place.memory.pages.min(page + pages);
        (page..end).for_each(|page| place.memory.word(page).store(value, Ordering::SeqCst));
    }
}

/// Runs the schedules of one tracker; `build` makes a world, or tells why there is none.
fn all_schedules(name: &str, mut build: impl FnMut(&mut Rng) -> Option<World>) -> usize {
    let mut done = 0;
    for point in points(name, ALL, SAMPLE) {
        let mut rng = Rng::new(&format!("{name} {point}"));
        let Some(world) = build(&mut rng) else { continue };
        schedule::run(world, &mut rng, &format!("{name}, schedule {point}"));
        done += 1;
    }
    done
}

/// True, with the skip counted, when the kernel does not write-protect.
fn without_write_protect() -> bool {
    WriteProtect::new().is_err_and(|e| skip("userfaultfd", &e.to_string()))
}

fn protected(kind: Kind, rng: &mut Rng) -> Option<World> {
    let mut world = World::empty(Choice::Only(dirty::Kind::WriteProtect));
    world.plug = Some(kind);
    for n in 0..1 + rng.below(2) {
        let skip = if kind == Kind::Hugetlb { 0 } else { rng.below(3) };
        let memory = Memory::new(kind, size(kind, rng), skip)?;
        // Some of it exists before.
        (0..memory.pages).filter(|page| page % 7 < 3).for_each(|page| memory.word(page).store(9, Ordering::SeqCst));
        world.add(Arc::new(memory), format!("ram{n}"));
    }
    world.writers = vec![Box::new(Plain), Box::new(Plain)];
    Some(world)
}

#[test]
fn write_protection_of_private_memory() {
    if !without_write_protect() {
        all_schedules("private", |rng| protected(Kind::Private, rng));
    }
}

#[test]
fn write_protection_of_shared_memory() {
    if !without_write_protect() {
        all_schedules("shared", |rng| protected(Kind::Shared, rng));
    }
}

#[test]
fn write_protection_of_huge_pages() {
    if without_write_protect() {
        return;
    }
    if Memory::new(Kind::Hugetlb, 512, 0).is_none() && skip("hugetlb", "no huge pages are reserved (nr_hugepages)") {
        return;
    }
    assert!(all_schedules("hugetlb", |rng| protected(Kind::Hugetlb, rng)) > 0);
}

#[test]
fn write_protection_of_a_private_file() {
    if !without_write_protect() {
        all_schedules("file", |rng| protected(Kind::File, rng));
    }
}
