//! Every tracker keeps one property, over drawn schedules: see trackers/schedule.rs. `make check` runs some of them,
//! `make check-all` thousands.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[cfg(target_arch = "x86_64")]
#[path = "trackers/kvm.rs"]
mod kvm;
#[cfg(target_arch = "x86_64")]
#[path = "../src/sys/kvm_guest.rs"]
mod kvm_guest;
#[path = "trackers/memory.rs"]
mod memory;
#[path = "trackers/schedule.rs"]
mod schedule;
#[path = "trackers/source.rs"]
mod source;

use common::{Rng, points, skip};
use memory::{Kind, Memory};
use schedule::{Place, World, Writer, size};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmig::dirty::choice::Choice;
use vmig::dirty::{self, write_protect::WriteProtect};

/// Schedules of each tracker.
const ALL: usize = 400;
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
        let Some(mut world) = build(&mut rng) else { continue };
        if rng.below(3) == 0 {
            source::beside(&mut world, &mut rng);
        }
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
        // Some of it exists before, or nothing.
        let touched = rng.below(2) * rng.below(memory.pages + 1);
        (0..touched).filter(|page| page % 7 < 3).for_each(|page| memory.word(page).store(9, Ordering::SeqCst));
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

/// An emulator: writes, then marks.
struct Marking(Arc<vmig::ram::Ram>);

impl Writer for Marking {
    fn write(&mut self, place: &Place, page: usize, pages: usize, value: u64) {
        for page in page..place.memory.pages.min(page + pages) {
            place.memory.word(page).store(value, Ordering::SeqCst);
            self.0.mark(place.block.host_address(page as u64 * 4096) + 8, 8);
        }
    }
}

#[test]
fn marks_of_the_vmm() {
    let done = all_schedules("marks", |rng| {
        let choice = [Choice::Auto, Choice::Only(dirty::Kind::Callback)][rng.below(2)];
        let mut world = World { marked: choice == Choice::Auto, plug: Some(Kind::Private), ..World::empty(choice) };
        for n in 0..1 + rng.below(2) {
            world.add(Arc::new(Memory::new(Kind::Private, size(Kind::Private, rng), 0)?), format!("ram{n}"));
        }
        world.writers = vec![Box::new(Marking(Arc::clone(&world.ram))), Box::new(Marking(Arc::clone(&world.ram)))];
        Some(world)
    });
    assert!(done > 0);
}

#[test]
fn sources_that_forget_and_sources_that_are_cleared() {
    for clears in [false, true] {
        assert!(all_schedules(&format!("source {clears}"), |rng| source::world(clears, rng)) > 0);
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_kvm_guest_and_its_device_by_the_dirty_log() {
    if !common::without_kvm() {
        all_schedules("kvm-log", |rng| kvm::world(kvm::By::Log, rng));
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_kvm_guest_and_its_device_by_a_log_without_manual_protection() {
    if !common::without_kvm() {
        all_schedules("kvm-log, old", |rng| kvm::world(kvm::By::OldLog, rng));
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_kvm_guest_and_its_device_by_the_dirty_ring() {
    if common::without_kvm() || kvm::ring_entries() == 0 && skip("kvm", "this KVM has no dirty rings") {
        return;
    }
    all_schedules("kvm-ring", |rng| kvm::world(kvm::By::Ring, rng));
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_kvm_guest_and_its_device_by_write_protection() {
    if !common::without_kvm() && !without_write_protect() {
        all_schedules("kvm, protected", |rng| kvm::world(kvm::By::WriteProtect, rng));
    }
}
