//! Memory that is handed over by its file instead of being copied, and descriptors of devices: tests/c/hand.c in
//! separate processes, and the example VMM with its KVM guest.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "hand/hostile.rs"]
mod hostile;
#[path = "common/program.rs"]
mod program;
#[path = "hand/relay.rs"]
mod relay;

use common::{c_program, scratch, skip, without_kvm};
use program::Program;
use relay::Relay;
use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

/// tests/c/hand.c with the option on; `fill` tells source (3) and destination (5) apart.
pub(crate) fn vmm(name: &str, dir: &Path, shape: &[&str], fill: u32) -> Program {
    let fill = format!("fill={fill}");
    let mut vmm = Program::start(name, dir, &c_program("hand"), &[shape, &[fill.as_str()]].concat());
    vmm.must("set hand-over on");
    vmm
}

/// A source whose guest runs.
pub(crate) fn running(dir: &Path, shape: &[&str]) -> Program {
    let mut source = vmm("source", dir, shape, 3);
    source.must("resume");
    source
}

/// A destination that listens on a unix socket, and where.
pub(crate) fn waiting(dir: &Path, shape: &[&str]) -> (Program, String) {
    let mut destination = vmm("destination", dir, shape, 5);
    let uri = listen(dir, &mut destination);
    (destination, uri)
}

/// An address where a guest arrived is kept for questions, so each time it is another.
pub(crate) fn listen(dir: &Path, destination: &mut Program) -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    destination.send(&format!("incoming unix:{}", dir.join(format!("s{number}")).display()));
    destination.listening()
}

pub(crate) fn value(vmm: &mut Program, command: &str) -> String {
    let line = vmm.command(command);
    line.strip_prefix("value ").unwrap_or_else(|| panic!("{command}: {line}")).to_owned()
}

pub(crate) fn number(vmm: &mut Program, command: &str) -> u64 {
    value(vmm, command).parse().unwrap()
}

fn must_move(source: &mut Program, destination: &mut Program, uri: &str) {
    source.must(&format!("migrate {uri}"));
    source.must_end_in("completed");
    destination.must_end_in("completed");
}

/// The guest counts, here.
pub(crate) fn counts_on(vmm: &mut Program) {
    assert_eq!(value(vmm, "reasons"), "0", "the guest of the {} is stopped", vmm.name);
    let before = number(vmm, "counts");
    let end = std::time::Instant::now() + program::REPLY;
    while number(vmm, "counts") == before {
        assert!(std::time::Instant::now() < end, "the guest of the {} does not run", vmm.name);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What both sides are before a migration that must leave no trace.
pub(crate) struct Before {
    here: (String, String, String),
    there: (String, String, String),
}

impl Before {
    pub(crate) fn of(vmm: &mut Program) -> (String, String, String) {
        (value(vmm, "hash"), value(vmm, "maps"), value(vmm, "fds"))
    }

    pub(crate) fn look(source: &mut Program, destination: &mut Program) -> Before {
        Before { here: Before::of(source), there: Before::of(destination) }
    }

    /// The source's guest runs on with its memory and descriptors.
    fn source_unharmed(&self, source: &mut Program, what: &str) {
        assert_eq!(Before::of(source), self.here, "{what}: the source's memory, mappings, descriptors");
        counts_on(source);
    }

    /// The destination has its own memory again, and nobody else's descriptors.
    fn destination_unharmed(&self, destination: &mut Program, what: &str) {
        assert_eq!(Before::of(destination), self.there, "{what}: the destination's memory, mappings, descriptors");
    }
}

/// Huge pages reserved for a test, given back after it.
struct Reserved(u64);

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl Reserved {
    fn new(pages: u64) -> Option<Reserved> {
        let read = || fs::read_to_string(POOL).ok()?.trim().parse::<u64>().ok();
        let before = read()?;
        fs::write(POOL, (before + pages).to_string()).ok()?;
        let reserved = Reserved(before);
        (read()? >= before + pages).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = fs::write(POOL, self.0.to_string());
    }
}

/// There and back, with memory of this kind in both processes.
fn changes_hands(kind: &str, mib: &str) {
    let dir = scratch("hand");
    // Nobody would see writes of "high": it can only move because no log is needed.
    let shape = [kind, kind, mib, "fds=5", "unmarked"];
    let mut source = running(&dir, &shape);
    let mut destination = vmm("destination", &dir, &shape, 5);
    destination.must("close-tap");
    let (maps, fds) = (value(&mut source, "maps"), number(&mut destination, "fds"));
    let poke = "4096";
    let mut wrote = 100;
    for turn in 0..3 {
        let uri = listen(&dir, &mut destination);
        must_move(&mut source, &mut destination, &uri);
        let (left, arrived) = (value(&mut source, "hashes"), value(&mut destination, "hashes"));
        assert_eq!(left.split(' ').next(), arrived.split(' ').nth(1), "{kind}, turn {turn}: the same bytes");
        assert_eq!(value(&mut destination, "maps"), maps, "{kind}: the same file, shared and writable");
        let seen = value(&mut destination, "seen");
        assert!(seen.starts_with("r--s "), "{kind}: read-only while devices load, not {seen}");
        assert_eq!(value(&mut destination, "tap"), "id=3 count=5 good=4 none=1 cloexec=4");
        assert!(
            value(&mut destination, "replaced").starts_with(&format!("{} ", turn / 2 * 2 + 2)),
            "both blocks told"
        );
        counts_on(&mut destination);
        // The same pages: what is written there is seen here, where nobody runs.
        wrote += 1;
        destination.must(&format!("poke {poke} {wrote}"));
        assert_eq!(number(&mut source, &format!("peek {poke}")), wrote);
        assert_eq!((source.status("normal"), source.status("zero"), source.status("total")), (0, 0, 0));
        assert!(source.status("sent") < 16 << 10, "no memory travels");
        if turn == 0 {
            assert_eq!(number(&mut destination, "fds"), fds + 4, "the device's, and no other");
        }
        // What was here before is the VMM's to close.
        source.must("close-tap");
        std::mem::swap(&mut source, &mut destination);
    }
    source.quit();
    destination.quit();
}

#[test]
fn memfd_memory_changes_hands() {
    changes_hands("memfd", "16");
}

#[test]
fn shm_memory_changes_hands() {
    changes_hands("shm", "16");
}

#[test]
fn huge_pages_change_hands() {
    // Two processes with two blocks of 4 MiB, each file 2 MiB longer.
    let Some(_reserved) = Reserved::new(16) else {
        let _ = skip("hugetlb", "16 huge pages cannot be reserved (vm.nr_hugepages)");
        return;
    };
    changes_hands("hugetlb", "4");
}

/// A block that only one side has a file for travels page by page, beside one that changes hands.
#[test]
fn blocks_are_decided_one_by_one() {
    for (here, there) in [("memfd", "anon"), ("anon", "memfd")] {
        let dir = scratch("hand-mixed");
        let mut source = running(&dir, &["memfd", here, "4"]);
        let (mut destination, uri) = waiting(&dir, &["memfd", there, "4"]);
        must_move(&mut source, &mut destination, &uri);
        let (left, arrived) = (value(&mut source, "hashes"), value(&mut destination, "hashes"));
        assert_eq!(left.split(' ').next(), arrived.split(' ').nth(1), "{here} to {there}: the same bytes");
        assert_eq!(source.status("total"), 4 << 20, "{here} to {there}: one block travels");
        let maps = |vmm: &mut Program| value(vmm, "maps").split(" / ").map(str::to_owned).collect::<Vec<_>>();
        let (source_maps, destination_maps) = (maps(&mut source), maps(&mut destination));
        assert!(source_maps[0] == destination_maps[0] && source_maps[1] != destination_maps[1]);
        counts_on(&mut destination);
        source.quit();
        destination.quit();
    }
}

/// Memory that left with its guest is not overwritten by the next guest that comes page by page.
#[test]
fn memory_that_left_is_not_overwritten() {
    let dir = scratch("hand-given");
    let shape = ["memfd", "memfd", "4"];
    let mut first = running(&dir, &shape);
    let (mut second, uri) = waiting(&dir, &shape);
    must_move(&mut first, &mut second, &uri);
    let hash = value(&mut second, "hash");
    let mut stranger = vmm("stranger", &dir, &shape, 7);
    stranger.must("resume");
    stranger.must("set hand-over off");
    first.must("set hand-over off");
    let uri = listen(&dir, &mut first);
    stranger.must(&format!("migrate {uri}"));
    stranger.must_end_in("failed");
    assert!(stranger.command("error").contains("was handed over"), "{}", stranger.command("error"));
    counts_on(&mut stranger);
    assert_eq!(value(&mut second, "hash"), hash, "the guest that left keeps its memory");
    counts_on(&mut second);
    [first, second, stranger].into_iter().for_each(Program::quit);
}

/// A migration that is refused in the hello: the words at the source, and no trace.
fn refused(source_shape: &[&str], shape: &[&str], set: &[(bool, &str)], words: &[&str]) {
    let dir = scratch("hand-refused");
    let (mut source, mut destination) = (running(&dir, source_shape), vmm("destination", &dir, shape, 5));
    set.iter().for_each(|(here, line)| if *here { source.must(line) } else { destination.must(line) });
    let before = Before::look(&mut source, &mut destination);
    let uri = listen(&dir, &mut destination);
    source.must(&format!("migrate {uri}"));
    source.must_end_in("failed");
    // A source that refuses itself did not even say hello: the destination waits for another one.
    destination.must("cancel");
    destination.ended_in();
    let error = source.command("error");
    assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    assert!(value(&mut source, "hashes").starts_with("0 "), "the stop hook was not called");
    before.source_unharmed(&mut source, "refused");
    before.destination_unharmed(&mut destination, "refused");
    source.quit();
    destination.quit();
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let shape = ["memfd", "memfd", "4"];
    refused(&shape, &shape, &[(true, "set hand-over off")], &["'hand-over'", "off at the source"]);
    refused(&shape, &shape, &[(false, "set hand-over off")], &["'hand-over'", "on at the source"]);
    let writer = [&shape[..], &["fds=1", "writes-ram"]].concat();
    refused(&[&shape[..], &["fds=1"]].concat(), &writer, &[], &["'nic'", "writes guest RAM", "hand-over"]);
    refused(&shape, &shape, &[(false, "remap")], &["'high'", "the mapping is private"]);
    refused(&shape, &shape, &[(true, "remap")], &["'high'", "the mapping is private"]);
    let (fds, numbers) = ([&shape[..], &["fds=3"]].concat(), [&shape[..], &["fds=3", "other-fds"]].concat());
    refused(&fds, &numbers, &[], &["'nic'", "\"field\":\"fds\"", "file descriptors"]);
    refused(&numbers, &fds, &[], &["'nic'", "\"field\":\"fds\"", "file descriptors"]);
    let dir = scratch("hand-return-path");
    let mut source = running(&dir, &shape);
    source.must("set return-path off");
    let answer = source.command("migrate unix:/nowhere");
    assert!(answer.contains("return-path"), "{answer}");
    source.quit();
}

/// What the VMM says of a block's file is checked where it says so.
#[test]
fn wrong_files_are_refused_at_registration() {
    let dir = scratch("hand-register");
    let mut source = vmm("source", &dir, &["memfd", "memfd", "4"], 3);
    let fds = number(&mut source, "fds");
    let cases = [
        ("private", "the mapping is private"),
        ("read-only", "the mapping is not writable"),
        ("other", "another file is mapped"),
        ("offset", "another part of the file is mapped (expected 0x1000, got 0x0)"),
        ("odd-offset", "the offset does not fit the file's pages"),
        ("far", "smaller than the block"),
        ("beyond", "smaller than the block"),
        ("part", "at offset 0x8000 another part"),
        ("hole", "at offset 0x8000 nothing is mapped"),
        ("pipe", "not a file in memory"),
        ("read-only-fd", "open for reading and writing"),
        ("closed", "vmig_ram.fd"),
        ("storage", "VMIG_RAM_SHARED_STORAGE"),
    ];
    for (how, words) in cases {
        let answer = source.command(&format!("register {how}"));
        assert!(answer.starts_with("error") && answer.contains(words), "{how}: {answer}");
    }
    assert_eq!(source.command("register right"), "ok", "and what is right is taken");
    assert_eq!(number(&mut source, "fds"), fds + 1, "the library's duplicate of that, and nothing else");
    source.quit();
}

/// Where descriptors cannot travel, the guest is not even stopped.
#[test]
fn other_transports_are_refused_before_the_guest_is_stopped() {
    let dir = scratch("hand-tcp");
    let shape = ["memfd", "memfd", "4", "fds=2"];
    for hand_over in [true, false] {
        let mut source = running(&dir, &shape);
        let mut destination = vmm("destination", &dir, &shape, 5);
        if !hand_over {
            source.must("set hand-over off");
            destination.must("set hand-over off");
        }
        let hashes = value(&mut source, "hashes");
        destination.send("incoming tcp:127.0.0.1:0");
        let uri = destination.listening();
        let words: [&str; 3] = ["'nic'", "\"field\":\"fds\"", "unix socket"];
        let fails = |source: &mut Program, uri: &str| {
            source.must(&format!("migrate {uri}"));
            source.must_end_in("failed");
            let error = source.command("error");
            assert!(words.iter().all(|word| error.contains(word)), "{uri}: {error}");
            assert_eq!(value(source, "hashes"), hashes, "the stop hook was not called");
            counts_on(source);
        };
        fails(&mut source, &uri);
        source.must("set peer qemu");
        let qemu = std::os::unix::net::UnixListener::bind(dir.join(format!("q-{hand_over}"))).unwrap();
        fails(&mut source, &format!("unix:{}", dir.join(format!("q-{hand_over}")).display()));
        drop(qemu);
        source.quit();
        destination.quit();
    }
}

/// Descriptors of devices travel over any unix socket, more than fit into one message, of an early device too.
#[test]
fn descriptors_travel_without_handing_over_memory() {
    for more in [&[][..], &["early"][..]] {
        let dir = scratch("hand-fds");
        let shape = [&["anon", "anon", "4", "fds=300"][..], more].concat();
        let (mut source, mut destination) = (running(&dir, &shape), vmm("destination", &dir, &shape, 0));
        source.must("set hand-over off");
        destination.must("set hand-over off");
        let fds = number(&mut destination, "fds");
        for turn in 0..4 {
            let uri = listen(&dir, &mut destination);
            must_move(&mut source, &mut destination, &uri);
            assert_eq!(value(&mut destination, "tap"), "id=3 count=300 good=299 none=1 cloexec=299", "turn {turn}");
            source.must("close-tap");
            assert_eq!(
                (number(&mut source, "fds"), number(&mut destination, "fds")),
                (fds, fds + 299),
                "turn {turn}"
            );
            std::mem::swap(&mut source, &mut destination);
        }
        source.quit();
        destination.quit();
    }
}

/// Either side is killed, or the connection cut, at every message of the exchange.
#[test]
fn death_at_every_message_leaves_the_source_as_it_was() {
    let shape = ["memfd", "memfd", "4", "fds=3"];
    for victim in ["destination", "source", "connection"] {
        // Messages may come in one piece where the machine is busy: only a few runs without one more say that there is none.
        let (mut stop_at, mut in_vain, mut unknown) = (0, 0, 0);
        while in_vain < 3 {
            assert!(stop_at < 200, "the exchange has more messages than were looked at");
            let dir = scratch("hand-kill");
            let (mut source, mut destination) = (running(&dir, &shape), vmm("destination", &dir, &shape, 5));
            destination.must("close-tap"); // or the members would hide whether they are -1 again
            source.must("set switchover-timeout 200");
            destination.must("set switchover-timeout 200");
            let before = Before::look(&mut source, &mut destination);
            let uri = listen(&dir, &mut destination);
            let mut relay = Relay::new(&dir, &uri, stop_at);
            source.must(&format!("migrate {}", relay.uri));
            let what = format!("{victim} at message {stop_at}");
            let end = std::time::Instant::now() + program::MOVE;
            let reached = loop {
                if relay.reached.recv_timeout(Duration::from_millis(10)).is_ok() {
                    break true;
                }
                if source.status_text("state") == "completed" {
                    break false;
                }
                assert!(std::time::Instant::now() < end, "{what}: nothing happens");
            };
            if !reached {
                destination.must_end_in("completed");
                counts_on(&mut destination);
                relay.cut();
                in_vain += 1;
                continue;
            }
            (stop_at, in_vain) = (stop_at + 1, 0);
            match victim {
                "destination" => destination.kill(),
                "source" => source.kill(),
                _ => (),
            }
            relay.cut();
            if victim != "source" {
                match source.ended_in().as_str() {
                    "failed" => before.source_unharmed(&mut source, &what),
                    // The last byte went out, or may have: nobody can know. The bytes are what they were all the same.
                    "switchover-unknown" => {
                        unknown += 1;
                        assert_ne!(value(&mut source, "reasons"), "0", "{what}: it may run elsewhere");
                        if victim == "destination" {
                            assert_eq!(value(&mut source, "hash"), before.here.0, "{what}");
                        }
                    }
                    // What was cut came after the destination's word that it has the guest.
                    "completed" => assert!(unknown > 0, "{what}: completed before it could be"),
                    other => panic!("{what}: the source ended as {other}"),
                }
            }
            if victim != "destination" {
                if stop_at == 1 {
                    destination.must("cancel"); // a connection that said nothing: it waits for another one
                }
                let state = destination.ended_in();
                // The connection may be cut behind the destination's last word.
                if state == "failed" || state == "cancelled" {
                    before.destination_unharmed(&mut destination, &what);
                } else {
                    assert!(state == "completed", "{what}: the destination ended as {state}");
                    counts_on(&mut destination);
                }
            }
        }
        assert!(victim == "source" || (1..=10).contains(&unknown), "{victim}: {unknown} times unknown");
    }
}

/// Every callback of either side fails.
#[test]
fn failing_callbacks_leave_both_sides_as_they_were() {
    let dir = scratch("hand-callbacks");
    let shape = ["memfd", "memfd", "4", "fds=3"];
    let mut source = running(&dir, &shape);
    let callbacks = [
        (true, "stop"),
        (true, "pre_save"),
        (true, "post_save"),
        (true, "complete"),
        (false, "pre_load"),
        (false, "post_load"),
        (false, "load"),
        (false, "ram_replaced"),
        (false, "ram_replaced-high"),
        (false, "start"),
    ];
    for (here, callback) in callbacks {
        let mut destination = vmm("destination", &dir, &shape, 5);
        destination.must("close-tap");
        let before = Before::look(&mut source, &mut destination);
        let uri = listen(&dir, &mut destination);
        let side = if here { &mut source } else { &mut destination };
        side.must(&format!("fail {callback}"));
        source.must(&format!("migrate {uri}"));
        source.must_end_in("failed");
        destination.must_end_in("failed");
        let error = source.command("error");
        assert!(error.contains(callback.trim_end_matches("-high")), "{callback}: {error}");
        before.source_unharmed(&mut source, callback);
        before.destination_unharmed(&mut destination, callback);
        assert!(value(&mut destination, "tap").contains("good=0 none=3"), "{callback}: members are -1 again");
        // Whoever was told of the new memory was told of the old one again.
        let replaced = number_of(&value(&mut destination, "replaced"));
        let told = match callback {
            "ram_replaced" => 2,
            "ram_replaced-high" | "start" => 4,
            _ => 0,
        };
        assert_eq!(replaced, told, "{callback}");
        source.must("fail none");
        destination.quit();
    }
    source.quit();
}

fn number_of(line: &str) -> u64 {
    line.split(' ').next().unwrap().parse().unwrap()
}

/// A destination that is killed inside of each of its callbacks, when the source's memory is mapped there.
#[test]
fn a_destination_that_dies_in_a_callback_harms_nothing() {
    let dir = scratch("hand-dies");
    let shape = ["memfd", "memfd", "4", "fds=3"];
    let mut source = running(&dir, &shape);
    for callback in ["pre_load", "post_load", "load"] {
        let mut destination = vmm("destination", &dir, &shape, 5);
        let before = Before::look(&mut source, &mut destination);
        let uri = listen(&dir, &mut destination);
        destination.must(&format!("die {callback}"));
        source.must(&format!("migrate {uri}"));
        let state = source.ended_in();
        assert_eq!(value(&mut source, "hash"), before.here.0, "{callback}");
        // The last byte was on its way already, or was not.
        assert!(state == "failed" || state == "switchover-unknown", "{callback}: {state}");
        if state == "failed" {
            before.source_unharmed(&mut source, callback);
        } else {
            source.kill();
            source = running(&dir, &shape);
        }
    }
    source.quit();
}

/// After many rounds, good and bad, both processes have the descriptors they had.
#[test]
fn no_descriptor_is_left_behind() {
    let dir = scratch("hand-rounds");
    let shape = ["memfd", "memfd", "4", "fds=20"];
    let (mut source, mut destination) = (running(&dir, &shape), vmm("destination", &dir, &shape, 5));
    destination.must("close-tap");
    let (here, there) = (number(&mut source, "fds"), number(&mut destination, "fds"));
    for round in 0..12 {
        let uri = listen(&dir, &mut destination);
        if round % 3 == 2 {
            destination.must("fail load");
            source.must(&format!("migrate {uri}"));
            source.must_end_in("failed");
            destination.must_end_in("failed");
            destination.must("fail none");
        } else {
            must_move(&mut source, &mut destination, &uri);
            source.must("close-tap");
            std::mem::swap(&mut source, &mut destination);
        }
        assert_eq!((number(&mut source, "fds"), number(&mut destination, "fds")), (here, there), "round {round}");
    }
    source.quit();
    destination.quit();
}

/// The example VMM's KVM guest goes there and back with its memory, which it checks itself.
#[test]
fn a_kvm_guest_takes_its_memory_along() {
    if without_kvm() {
        return;
    }
    let dir = scratch("hand-kvm");
    let start = |name: &str, more: &[&str]| {
        let base = ["--mem", "64", "--vcpus", "2", "--events-fd", "1", "--pages", "4096", "--memfd"];
        Program::start(name, &dir, &c_program("vmm"), &[&base[..], &["--set", "hand-over on"], more].concat())
    };
    let mut uri = format!("unix:{}", dir.join("s").display());
    let mut from = start("first", &[]);
    assert_eq!(from.reply(), "running");
    (0..2).for_each(|cpu| from.await_generations(cpu, 2));
    let mut to = start("second", &["--incoming", &uri]);
    to.listening();
    for turn in 0..4 {
        from.must(&format!("migrate {uri}"));
        from.must_end_in("completed");
        to.must_end_in("completed");
        assert_eq!(from.status("total"), 0, "turn {turn}: no page travels");
        (0..2).for_each(|cpu| to.await_generations(cpu, 3));
        for cpu in 0..2 {
            let mut all = [from.cpu(cpu).generations, to.cpu(cpu).generations].concat();
            all.sort_unstable();
            assert_eq!(all, (1..).take(all.len()).collect::<Vec<u32>>(), "turn {turn}: generations of vCPU {cpu}");
        }
        uri = format!("unix:{}", dir.join(format!("s{turn}")).display());
        from.send(&format!("incoming {uri}"));
        from.listening();
        std::mem::swap(&mut from, &mut to);
    }
    to.must("cancel");
    from.quit();
    to.quit();
}
