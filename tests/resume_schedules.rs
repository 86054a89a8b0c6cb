//! Drawn schedules of a guest that writes and of connections that break (option `resume-timeout`): the real source and the
//! real destination in one process, and a relay between them that knows when to let the guest write and when to cut, also
//! within a page or a packet. Afterwards the memory is equal, and what was sent after the last cut is no more than what was
//! not acknowledged and what was written.
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(unsafe_code, reason = "guest memory is made and touched from outside")]

mod common;
#[path = "resume/script.rs"]
mod script;

use common::{Rng, points, scratch};
use script::{Relay, Script, What};
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmig::bql::Bql;
use vmig::error::Result;
use vmig::machine::{Machine, NEW_GUEST};
use vmig::ram::BlockSpec;
use vmig::status::State;
use vmig::vmm::Vmm;
use vmig::vmm::log::Log;
use vmig::vmm::run::Hooks;

const PAGE: usize = 4096;
const PAGES: usize = 320;
/// Of every block.
const BLOCK: usize = PAGES / 2;
/// What a page costs on the wire besides itself, and what a connection costs: hello, first packets, headers, zero pages.
const PAGE_MORE: u64 = 64;
const CONNECTION: u64 = 32 << 10;
/// How long one migration may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Schedules in all, and how many are drawn of them.
const ALL: usize = 3000;
const SAMPLE: usize = 120;
const WORKERS: usize = 4;

/// Memory of a guest that only writes when it is told to.
pub(crate) struct Guest {
    base: *mut u8,
    runs: Mutex<bool>,
}

// SAFETY: the memory is only touched through atomics, and lives as long as the guest.
unsafe impl Send for Guest {}
// SAFETY: as above.
unsafe impl Sync for Guest {}

impl Guest {
    fn new(runs: bool) -> Arc<Guest> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at a place the kernel chooses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), PAGES * PAGE, protection, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        Arc::new(Guest { base: base.cast(), runs: Mutex::new(runs) })
    }

    fn byte(&self, page: usize, offset: usize) -> &AtomicU8 {
        assert!(page < PAGES && offset < PAGE);
        // SAFETY: within the mapping, which lives as long as the guest, and always touched as atomics.
        unsafe { AtomicU8::from_ptr(self.base.wrapping_add(page * PAGE + offset)) }
    }

    fn fill(&self, page: usize, value: u8) {
        for offset in (page % 64..PAGE).step_by(64) {
            self.byte(page, offset).store(value, Ordering::Relaxed);
        }
    }

    /// Writes pages, unless it is stopped, and reports them. How many it wrote.
    pub(crate) fn write(&self, machine: &Machine, pages: &[usize], value: u8) -> usize {
        let runs = self.runs.lock().unwrap();
        if !*runs {
            return 0;
        }
        for page in pages {
            self.fill(*page, value);
            machine.mark_dirty(self.base as u64 + (page * PAGE) as u64, PAGE as u64);
        }
        pages.len()
    }

    fn differs(&self, other: &Guest) -> Vec<usize> {
        let same = |page: &usize| {
            (0..PAGE)
                .all(|i| self.byte(*page, i).load(Ordering::Relaxed) == other.byte(*page, i).load(Ordering::Relaxed))
        };
        (0..PAGES).filter(|page| !same(page)).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nobody uses any more.
        assert_eq!(unsafe { libc::munmap(self.base.cast(), PAGES * PAGE) }, 0);
    }
}

struct Hook(Arc<Guest>);

impl Hooks for Hook {
    fn stop(&self) -> Result<()> {
        *self.0.runs.lock().unwrap() = false;
        Ok(())
    }

    fn start(&self) -> Result<()> {
        *self.0.runs.lock().unwrap() = true;
        Ok(())
    }
}

/// What both sides wrote to their logs, and when.
type Lines = Arc<Mutex<Vec<String>>>;

fn machine(side: &'static str, guest: &Arc<Guest>, lines: &Lines, options: &[(&str, &str)]) -> Arc<Machine> {
    let (lines, begin) = (Arc::clone(lines), Instant::now());
    let log = Arc::new(Log::new(Some(Box::new(move |_, _, line| {
        lines.lock().unwrap().push(format!("{side} after {:?}: {line}", begin.elapsed()));
    }))));
    let vmm = Vmm::new(Box::new(Hook(Arc::clone(guest))), Arc::new(Bql::new()), log, NEW_GUEST);
    let machine = Machine::new(vmm).unwrap();
    {
        let _bql = machine.vmm().bql().guard().unwrap();
        for (number, name) in ["low", "high"].into_iter().enumerate() {
            let start = number * BLOCK * PAGE;
            let (host, len, gpa) = (guest.base.wrapping_add(start), (BLOCK * PAGE) as u64, start as u64);
            let (name, file) = (name.into(), None);
            machine.add_ram(BlockSpec { name, host, len, gpa, marked: true, shared_storage: false, file }).unwrap();
        }
    }
    options.iter().for_each(|(name, value)| machine.set(name, value).unwrap());
    Arc::new(machine)
}

/// What a schedule showed.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    cuts: u64,
    /// The limit of what may be sent again was less than all memory.
    telling: bool,
}

/// One migration by the schedule with this number.
fn schedule(dir: &Path, number: usize) -> Seen {
    let mut rng = Rng::at(number as u64);
    let (here, there) = (Guest::new(true), Guest::new(false));
    for page in 0..PAGES {
        // Some were never touched, and some are zero.
        match rng.below(8) {
            0 => (),
            1 => here.fill(page, 0),
            _ => here.fill(page, u8::try_from(1 + rng.below(255)).unwrap()),
        }
    }
    let channels = rng.below(5);
    let script = Script::draw(&mut rng, channels, PAGES);
    let count = channels.to_string();
    let checksum = if rng.below(3) == 0 { "crc32c" } else { "none" };
    let lines = Lines::default();
    let source = machine(
        "source",
        &here,
        &lines,
        &[
            ("resume-timeout", "100000"),
            // A few dirty pages are too many to stop the guest for.
            ("avail-switchover-bandwidth", "1000000"),
            ("downtime-limit", "10"),
            ("checksum", checksum),
            if channels == 0 { ("multifd", "off") } else { ("multifd-channels", &count) },
        ],
    );
    let destination = machine("destination", &there, &lines, &[]);
    destination.incoming(&format!("unix:{}", dir.join(format!("{number}.d")).display())).unwrap();
    let path = dir.join(format!("{number}.s"));
    let address = destination.get("listen-address").unwrap();
    let relay = Relay::new(&path, address.strip_prefix("unix:").unwrap(), checksum == "none", script, &here, &source);
    source.outgoing(&format!("unix:{}", path.display())).unwrap();
    let ended =
        [&source, &destination].map(|side| (side.wait(Some(PATIENCE)), side.status().state(), side.status().error()));
    let what = || {
        let [source, destination] = &ended;
        let lines = lines.lock().unwrap().join("\n  ");
        format!(
            "schedule {number} (alone: VMIG_SCHEDULE={number}), {channels} channels, checksum {checksum}\n  \
             source (over, state, error): {source:?}\n  destination: {destination:?}\n  network: {relay:?}\n  {lines}\n"
        )
    };
    assert!(ended.iter().all(|(over, state, _)| *over && *state == State::Completed), "{}", what());
    let different = here.differs(&there);
    assert!(different.is_empty(), "{}: pages {different:?} differ", what());
    let (sent, most, cuts) = relay.after_last_cut();
    assert!(cuts == 0 || sent <= most, "{}: {sent} bytes after the last cut, at most {most} were due", what());
    Seen { cuts, telling: cuts > 0 && most < (PAGES * PAGE) as u64 }
}

#[test]
fn whatever_is_written_and_whenever_it_breaks_the_memory_is_equal_and_little_is_sent_again() {
    let dir = scratch("resume-schedules");
    // The schedules themselves are numbered, so one that fails can be run alone.
    let chosen = match std::env::var("VMIG_SCHEDULE") {
        Ok(number) => vec![number.parse().unwrap()],
        Err(_) => points("resume-schedules", ALL, SAMPLE),
    };
    let (next, cuts, telling) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(number) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let seen = schedule(&dir, *number);
                    cuts.fetch_add(usize::try_from(seen.cuts).unwrap(), Ordering::Relaxed);
                    telling.fetch_add(usize::from(seen.telling), Ordering::Relaxed);
                }
            });
        }
    });
    let (cuts, telling) = (cuts.into_inner(), telling.into_inner());
    println!("schedules: {}, connections cut: {cuts}, less than all memory was due: {telling}", chosen.len());
    assert!(
        chosen.len() < SAMPLE || (cuts > chosen.len() && telling > chosen.len() / 10),
        "the schedules are too tame"
    );
}

impl What {
    /// What happens at a point of the schedule, on the relay's thread.
    pub(crate) fn write(&self, guest: &Guest, machine: &Machine) -> usize {
        match self {
            What::Write(pages, value) => guest.write(machine, pages, *value),
            What::Cut(_) => 0,
        }
    }
}

/// Bytes that pages may cost.
pub(crate) fn cost(pages: usize, connections: u64) -> u64 {
    pages as u64 * (PAGE as u64 + PAGE_MORE) + connections * CONNECTION
}
