//! What is registered changes while another thread migrates: at every moment it is part of the migration, or it is refused.
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unsafe_code, reason = "guest memory is made, and a dirty source called as C would")]

mod common;

use common::{Rng, points, scratch};
use std::ffi::{c_int, c_void};
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vmig::bql::Bql;
use vmig::dirty::callback::{Source, vmig_dirty_bitmap, vmig_dirty_source};
use vmig::dirty::rate::Mode;
use vmig::error::Result;
use vmig::machine::{Machine, NEW_GUEST};
use vmig::ram::BlockSpec;
use vmig::status::State;
use vmig::vmm::log::Log;
use vmig::vmm::run::Hooks;
use vmig::vmm::{StopReason, Vmm};

const BYTES: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest head start of either thread: some times what it takes to begin a migration, and to end this one.
const HEAD_START_US: [usize; 3] = [60, 600, 6000];
const ALL: usize = 1500;
const SAMPLE: usize = 150;

struct Quiet;

impl Hooks for Quiet {
    fn stop(&self) -> Result<()> {
        Ok(())
    }

    fn start(&self) -> Result<()> {
        Ok(())
    }
}

/// What is added or removed meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    AddRam,
    RemoveRam,
    AddSource,
    RemoveSource,
}

/// A guest with one block, and its memory, which it leaves behind.
struct Side(Machine);

fn map(bytes: usize) -> *mut u8 {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at a place the kernel chooses.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

impl Side {
    fn new(memory: usize, with_more: bool) -> Side {
        let vmm = Vmm::new(Box::new(Quiet), Arc::new(Bql::new()), Arc::new(Log::new(None)), NEW_GUEST);
        let side = Side(Machine::new(vmm).unwrap());
        side.add("ram", memory).unwrap();
        if with_more {
            side.add("more", memory + BYTES).unwrap();
        }
        side
    }

    fn add(&self, name: &str, host: usize) -> Result<()> {
        let _bql = self.0.vmm().bql().guard()?;
        self.0.add_ram(BlockSpec {
            name: name.to_owned(),
            host: std::ptr::with_exposed_provenance_mut(host),
            len: BYTES as u64,
            gpa: if name == "ram" { 0 } else { BYTES as u64 },
            marked: true,
            shared_storage: false,
            file: None,
        })
    }

    /// Whether it was refused because of a migration.
    fn change(&self, change: Change, memory: usize, starts: &AtomicU32) -> bool {
        let done = match change {
            Change::AddRam => self.add("more", memory + BYTES),
            Change::RemoveRam => {
                let _bql = self.0.vmm().bql().guard().unwrap();
                self.0.remove_ram("more")
            }
            Change::AddSource => {
                let _bql = self.0.vmm().bql().guard().unwrap();
                self.0.add_dirty_source(source(starts))
            }
            Change::RemoveSource => {
                let _bql = self.0.vmm().bql().guard().unwrap();
                self.0.remove_dirty_source(std::ptr::from_ref(starts).cast_mut().cast()).map(drop)
            }
        };
        done.is_err_and(|error| {
            assert_eq!(error.errno(), libc::EBUSY, "{error}");
            assert!(error.text().contains("now: a migration is in progress (state "), "{error}");
            true
        })
    }
}

unsafe extern "C" fn count(opaque: *mut c_void) -> c_int {
    // SAFETY: the number outlives the guest.
    unsafe { &*opaque.cast::<AtomicU32>() }.fetch_add(1, Ordering::SeqCst);
    0
}

unsafe extern "C" fn nothing_written(_opaque: *mut c_void, _bitmap: *const vmig_dirty_bitmap) -> c_int {
    0
}

fn source(starts: &AtomicU32) -> Source {
    let ops = vmig_dirty_source {
        size: size_of::<vmig_dirty_source>(),
        name: c"counted".as_ptr(),
        flags: 0,
        start: Some(count),
        sync: Some(nothing_written),
        clear: None,
        stop: None,
        destroy: None,
    };
    // SAFETY: the callbacks take the number, which outlives the guest.
    unsafe { Source::new(&raw const ops, std::ptr::from_ref(starts).cast_mut().cast()) }.unwrap()
}

fn spin(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// How a race went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Refused,
    Part,
    Afterwards,
}

/// One thread changes something at the source, or at the destination, while another begins to migrate.
fn race(dir: &Path, number: usize, change: Change, at_source: bool) -> Seen {
    let mut rng = Rng::at((number * 7 + 1) as u64);
    let memory: Vec<usize> = (0..2).map(|_| map(2 * BYTES).expose_provenance()).collect();
    let with_more = change == Change::RemoveRam;
    let (source, destination) = (Side::new(memory[0], with_more), Side::new(memory[1], with_more));
    let most = HEAD_START_US[rng.below(HEAD_START_US.len())];
    let head_starts = [most, 300].map(|most| Duration::from_micros(rng.below(most) as u64));
    let uri = format!("unix:{}", dir.join(format!("{number}-{at_source}")).display());
    let (changing, at) = if at_source { (&source, memory[0]) } else { (&destination, memory[1]) };
    let starts = AtomicU32::new(0);
    if change == Change::RemoveSource {
        assert!(!changing.change(Change::AddSource, at, &starts));
    }
    if at_source {
        destination.0.incoming(&uri).unwrap();
    }
    let (refused, state) = thread::scope(|scope| {
        let changer = scope.spawn(|| {
            spin(head_starts[0]);
            let refused = changing.change(change, at, &starts);
            (refused, changing.0.status().state())
        });
        spin(head_starts[1]);
        if !at_source {
            destination.0.incoming(&uri).unwrap();
        }
        source.0.outgoing(&uri).unwrap();
        changer.join().unwrap()
    });
    for side in [&source, &destination] {
        if !side.0.wait(Some(if side.0.status().state() == State::Setup { PATIENCE / 60 } else { PATIENCE })) {
            side.0.cancel().unwrap();
        }
        assert!(side.0.wait(Some(PATIENCE)));
    }
    let error = source.0.status().error();
    let what = format!("race {number}, {change:?}, source {at_source}: {error:?}");
    let ended = source.0.status().state();
    drop((source, destination));
    // SAFETY: the mappings of above, which nobody uses any more.
    memory.iter().for_each(|at| unsafe {
        libc::munmap(std::ptr::with_exposed_provenance_mut(*at), 2 * BYTES);
    });
    match (refused, change) {
        (true, _) => {
            let asked = u32::from(change == Change::RemoveSource);
            assert_eq!((ended, starts.into_inner()), (State::Completed, asked), "{what}");
            Seen::Refused
        }
        // It was over when it changed.
        (false, _) if state == State::Completed => Seen::Afterwards,
        (false, Change::AddSource) => {
            assert_eq!((ended, starts.into_inner()), (State::Completed, at_source.into()), "{what}");
            Seen::Part
        }
        (false, Change::RemoveSource) => {
            assert_eq!((ended, starts.into_inner()), (State::Completed, 0), "{what}: it was asked after it was gone");
            Seen::Part
        }
        (false, _) => {
            assert_eq!(ended, State::Failed, "{what}: the sides differ, and nobody noticed");
            assert!(error.unwrap().text().contains("more"), "{what}");
            Seen::Part
        }
    }
}

fn races(change: Change, at_source: bool) {
    let dir = scratch("changes");
    let mut seen = Vec::new();
    for number in points(&format!("changes {change:?} {at_source}"), ALL, SAMPLE) {
        seen.push(race(&dir, number, change, at_source));
    }
    let count = |what: Seen| seen.iter().filter(|seen| **seen == what).count();
    let [refused, part, afterwards] = [Seen::Refused, Seen::Part, Seen::Afterwards].map(count);
    println!("{change:?}, at the source {at_source}: refused {refused}, part of it {part}, afterwards {afterwards}");
    assert!(refused > 0 && part > 0, "the races are too tame");
}

#[test]
fn ram_that_is_added_is_part_of_the_migration_or_refused() {
    races(Change::AddRam, true);
    races(Change::AddRam, false);
}

#[test]
fn ram_that_is_removed_is_no_part_of_the_migration_or_the_removal_is_refused() {
    races(Change::RemoveRam, true);
    races(Change::RemoveRam, false);
}

#[test]
fn a_dirty_source_that_is_added_is_asked_or_refused() {
    races(Change::AddSource, true);
}

#[test]
fn a_dirty_source_that_is_removed_is_not_asked_or_the_removal_is_refused() {
    races(Change::RemoveSource, true);
}

#[test]
fn while_a_destination_is_asked_everything_stays() {
    let memory = map(2 * BYTES).expose_provenance();
    let side = Side::new(memory, true);
    side.0.vmm().start(StopReason::User).unwrap();
    // Who accepts and says nothing is waited for.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", silent.local_addr().unwrap());
    thread::scope(|scope| {
        let asking = scope.spawn(|| side.0.check(&uri).map(drop));
        let (mut connection, _) = silent.accept().unwrap();
        connection.read_exact(&mut [0]).unwrap();
        let starts = AtomicU32::new(0);
        let busy = |done: Result<()>| {
            let error = done.expect_err("it was not refused");
            assert_eq!(error.errno(), libc::EBUSY, "{error}");
            assert!(error.text().contains("a destination is being asked"), "{error}");
        };
        let with_bql = |f: &dyn Fn() -> Result<()>| {
            let _bql = side.0.vmm().bql().guard()?;
            f()
        };
        busy(with_bql(&|| side.0.remove_ram("more")));
        busy(with_bql(&|| side.0.add_dirty_source(source(&starts))));
        busy(side.0.measure_dirty_rate(Mode::Sampling, 100, 0));
        busy(side.0.outgoing(&uri));
        drop(connection);
        asking.join().unwrap().expect_err("there was no answer");
    });
    let _bql = side.0.vmm().bql().guard().unwrap();
    side.0.remove_ram("more").unwrap();
}
