//! The example VMM moves its running KVM guest: back and forth, paused, cancelled, with a destination that dies.
//! The guest checks its own pages; the RAM of both sides is compared page by page as well.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;
#[path = "resume/relay.rs"]
mod relay;

use common::{Rng, c_program, points, scratch, without_kvm};
use program::Program;
use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

const TCP: &str = "tcp:127.0.0.1:0";
const PAGE: usize = 4096;

/// How a test wants its guest.
#[derive(Clone, Copy, Debug)]
struct Shape {
    mib: u32,
    vcpus: usize,
    shared: bool,
}

const SMALL: Shape = Shape { mib: 64, vcpus: 2, shared: false };

fn vmm(name: &str, dir: &Path, shape: Shape, more: &[&str]) -> Program {
    let (mib, vcpus) = (shape.mib.to_string(), shape.vcpus.to_string());
    let mut args = vec!["--mem", &mib, "--vcpus", &vcpus, "--events-fd", "1", "--pages", "4096"];
    if shape.shared {
        args.push("--shared");
    }
    args.extend(more);
    Program::start(name, dir, &c_program("vmm"), &args)
}

/// A VMM whose guest runs and has verified something.
fn running(dir: &Path, shape: Shape) -> Program {
    let source = vmm("source", dir, shape, &[]);
    assert_eq!(source.reply(), "running");
    (0..shape.vcpus).for_each(|cpu| source.await_generations(cpu, 2));
    source
}

/// A VMM that waits for a guest and will hash it, and its address.
fn waiting(dir: &Path, shape: Shape, uri: &str) -> (Program, String) {
    let hash = dir.join("there");
    let destination = vmm("destination", dir, shape, &["--incoming", uri, "--hash-at-start", hash.to_str().unwrap()]);
    let address = destination.listening();
    (destination, address)
}

/// Compares the RAM of the stopped source with what the destination's guest began with.
fn same_memory(dir: &Path, source: &mut Program, destination: &Program) {
    destination.await_news("hashed");
    let (here, there) = (dir.join("here"), dir.join("there"));
    source.must(&format!("hash {}", here.display()));
    compare(&here, &there);
}

fn compare(here: &PathBuf, there: &PathBuf) {
    let (a, b) = (std::fs::read(here).unwrap(), std::fs::read(there).unwrap());
    assert_eq!(a.len(), b.len(), "the machines have different RAM");
    let different: Vec<usize> = (0..a.len() / 8).filter(|i| a[i * 8..i * 8 + 8] != b[i * 8..i * 8 + 8]).collect();
    assert!(different.is_empty(), "{} pages differ, first words {:?}", different.len(), &different[..1]);
}

/// The guest goes on at `to` where it was at `from`: no generation twice, none left out, never on both sides.
fn goes_on(shape: Shape, from: &Program, to: &Program) {
    for index in 0..shape.vcpus {
        to.await_generations(index, 2);
        let (before, after) = (from.cpu(index), to.cpu(index));
        let all: Vec<u32> = before.generations.iter().chain(&after.generations).copied().collect();
        let first = before.generations[0];
        let wanted: Vec<u32> = (first..).take(all.len()).collect();
        assert_eq!(all, wanted, "generations of vCPU {index}");
        assert!(after.first_beat > before.last_beat, "vCPU {index} ran on both sides at once");
        // Interrupt controllers and timers go on as well; only the first vCPU has interrupts of the PIT.
        assert_eq!((before.interrupts[0] > 0, before.interrupts[1] > 0), (index == 0, true));
        to.await_interrupts(index, before.interrupts);
    }
}

/// The guest runs, after whatever happened, and finds its pages as it left them.
fn runs(shape: Shape, vmm: &Program) {
    (0..shape.vcpus).for_each(|index| vmm.await_generations(index, 3));
}

fn migrate(source: &mut Program, address: &str) {
    source.must(&format!("migrate {address}"));
}

/// From a VMM to a fresh one, and everything about it is right.
fn good_move(dir: &Path, shape: Shape, source: &mut Program, uri: &str) -> Program {
    let (mut destination, address) = waiting(dir, shape, uri);
    migrate(source, &address);
    source.must_end_in("completed");
    same_memory(dir, source, &destination);
    destination.must_end_in("completed");
    goes_on(shape, source, &destination);
    destination
}

/// The same two processes take turns: what the first move left behind must not matter to the second.
fn back_and_forth(dir: &Path, shape: Shape, uri: &str, moves: usize) {
    let mut from = running(dir, shape);
    let mut to = vmm("other", dir, shape, &["--incoming", uri]);
    let mut address = to.listening();
    let mut last = vec![0; shape.vcpus];
    for turn in 0..moves {
        let (here, there) = (dir.join(format!("{turn}.here")), dir.join(format!("{turn}.there")));
        to.must(&format!("hash-at-start {}", there.display()));
        to.forget_news();
        let beats: Vec<u64> = (0..shape.vcpus).map(|cpu| to.cpu(cpu).beats).collect();
        migrate(&mut from, &address);
        from.must_end_in("completed");
        from.must(&format!("hash {}", here.display()));
        to.await_news("hashed");
        compare(&here, &there);
        to.must_end_in("completed");
        for cpu in 0..shape.vcpus {
            to.await_generations(cpu, 1);
            assert!(to.cpu(cpu).beats > beats[cpu], "vCPU {cpu} has no heartbeat after move {turn}");
            // The same list serves both directions: what either process saw, merged, has no hole and no double.
            let mut all: Vec<u32> = from.cpu(cpu).generations;
            all.extend(to.cpu(cpu).generations);
            all.sort_unstable();
            let wanted: Vec<u32> = (1..).take(all.len()).collect();
            assert_eq!(all, wanted, "generations of vCPU {cpu} after move {turn}");
            assert!(all.len() > last[cpu]);
            last[cpu] = all.len();
        }
        // The address is kept by who has the guest, for questions: the other way takes another.
        let suffix = if uri.starts_with("unix:") { format!("-{turn}") } else { String::new() };
        from.send(&format!("incoming {uri}{suffix}"));
        address = from.listening();
        std::mem::swap(&mut from, &mut to);
        let _ = std::fs::remove_file(here);
        let _ = std::fs::remove_file(there);
    }
    to.must("cancel");
    from.quit();
    to.quit();
}

#[test]
fn twenty_moves_back_and_forth() {
    if without_kvm() {
        return;
    }
    let all = std::env::var("VMIG_ALL").is_ok_and(|v| v == "1");
    for index in points("shapes", 12, 3) {
        let dir = scratch("forth");
        let unix = format!("unix:{}", dir.join("s").display());
        let shape = Shape { mib: 64, vcpus: [1, 2, 4][index % 3], shared: index / 3 % 2 == 1 };
        let uri = if index < 6 { TCP } else { &unix };
        back_and_forth(&dir, shape, uri, if all { 20 } else { 5 });
    }
}

/// Memory and devices of a busy guest are hashed on both sides, and the state of KVM travels as it was sent.
#[test]
fn a_verified_move() {
    if without_kvm() {
        return;
    }
    for (channels, shared) in [(0, false), (2, true)] {
        let dir = scratch("verified");
        let shape = Shape { shared, ..SMALL };
        let mut source = running(&dir, shape);
        source.must("set verify on");
        source.must(if channels > 0 { "set multifd on" } else { "set multifd off" });
        source.must(&format!("set multifd-channels {channels}"));
        good_move(&dir, shape, &mut source, TCP).quit();
        source.quit();
    }
}

#[test]
fn a_paused_guest_arrives_paused() {
    if without_kvm() {
        return;
    }
    let dir = scratch("paused");
    let mut source = running(&dir, SMALL);
    let (mut destination, address) = waiting(&dir, SMALL, TCP);
    source.must("pause");
    migrate(&mut source, &address);
    source.must_end_in("completed");
    destination.must_end_in("completed");
    // The hash is written when the guest starts, which it does not before it is asked to.
    assert_eq!(destination.news("hashed"), [""; 0]);
    assert_eq!(destination.cpu(0).beats, 0);
    assert!(source.command("resume").contains("does not own"), "a guest that left cannot be resumed");
    destination.must("resume");
    same_memory(&dir, &mut source, &destination);
    goes_on(SMALL, &source, &destination);
    source.quit();
    destination.quit();
}

/// Paused while pages move: the pause travels.
#[test]
fn a_pause_on_the_way_travels() {
    if without_kvm() {
        return;
    }
    let dir = scratch("pause-later");
    let mut source = running(&dir, SMALL);
    let (mut destination, address) = waiting(&dir, SMALL, TCP);
    source.must("set max-bandwidth 20M");
    migrate(&mut source, &address);
    source.await_news("event active");
    source.must("pause");
    source.must("set max-bandwidth 0");
    source.must_end_in("completed");
    destination.must_end_in("completed");
    assert_eq!((destination.cpu(0).beats, destination.news("started").len()), (0, 0));
    destination.must("resume");
    same_memory(&dir, &mut source, &destination);
    goes_on(SMALL, &source, &destination);
    source.quit();
    destination.quit();
}

#[test]
fn a_cancelled_move_can_be_made_again() {
    if without_kvm() {
        return;
    }
    let dir = scratch("cancel");
    let mut source = running(&dir, SMALL);
    let mut rng = Rng::new("cancel");
    for _ in points("cancels", 8, 3) {
        let (mut destination, address) = waiting(&dir, SMALL, TCP);
        source.must("set max-bandwidth 30M");
        migrate(&mut source, &address);
        std::thread::sleep(Duration::from_millis(rng.below(800) as u64));
        source.must("cancel");
        source.must_end_in("cancelled");
        destination.must_end_in("failed");
        assert_eq!(destination.cpu(0).beats, 0, "the guest ran at a destination that was given up");
        runs(SMALL, &source);
        source.must("set max-bandwidth 0");
    }
    good_move(&dir, SMALL, &mut source, TCP).quit();
    source.quit();
}

/// kill -9 while pages move: the source's guest runs on, and the next destination gets all of it.
#[test]
fn a_killed_destination_costs_nothing() {
    if without_kvm() {
        return;
    }
    let dir = scratch("kill");
    let mut source = running(&dir, SMALL);
    let mut rng = Rng::new("kill");
    source.must("set max-bandwidth 40M");
    for _ in points("kills", 12, 3) {
        let (mut destination, address) = waiting(&dir, SMALL, TCP);
        migrate(&mut source, &address);
        std::thread::sleep(Duration::from_millis(rng.below(1000) as u64));
        destination.kill();
        source.must_end_in("failed");
        let why = source.command("error");
        assert!(why.contains("\"errno\"") && why.contains("\"phase\""), "{why}");
        runs(SMALL, &source);
    }
    source.must("set max-bandwidth 0");
    good_move(&dir, SMALL, &mut source, TCP).quit();
    source.quit();
}

/// How the destination's vote begins: its word that it has the guest.
const VOTE: [u8; 4] = [0x56, 0x11, 0, 20];

/// Carries a connection to `address` but for the destination's last word; runs `instead` when that comes.
fn swallow_the_answer(address: &str, instead: impl FnOnce() + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
    let there = address.strip_prefix("tcp:").unwrap().to_owned();
    std::thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(there).unwrap();
        let (mut from, mut to) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        answers(&destination, &source);
        instead();
        let _ = source.shutdown(Shutdown::Both);
        let _ = destination.shutdown(Shutdown::Both);
    });
    here
}

/// Passes replies on until VOTE comes; what is written at once arrives at once here.
fn answers(mut destination: &TcpStream, mut source: &TcpStream) {
    let mut buffer = [0; PAGE];
    while let Ok(n) = destination.read(&mut buffer)
        && n > 0
    {
        if buffer[..n].windows(VOTE.len()).any(|bytes| bytes == VOTE) {
            return;
        }
        source.write_all(&buffer[..n]).unwrap();
    }
}

/// The guest was handed over and nobody heard what became of it: it must not run here before somebody says so.
fn unknown(dir: &Path, kill: bool) -> (Program, Program) {
    let mut source = running(dir, SMALL);
    let (mut destination, address) = waiting(dir, SMALL, TCP);
    let (tell, told) = std::sync::mpsc::channel();
    let (done, go_on) = std::sync::mpsc::channel();
    source.must("set multifd off"); // the proxy takes one connection
    source.must("set switchover-timeout 300"); // for which it is asked again, in vain
    let proxy = swallow_the_answer(&address, move || {
        tell.send(()).unwrap();
        go_on.recv().unwrap();
    });
    migrate(&mut source, &proxy);
    told.recv_timeout(program::MOVE).unwrap();
    if kill {
        destination.kill();
    }
    done.send(()).unwrap();
    source.must_end_in("switchover-unknown");
    let why = source.command("error");
    assert!(why.contains("vmig_resolve"), "{why}");
    let beats = source.cpu(0).beats;
    assert!(source.command("resume").starts_with("error"), "a guest that may run elsewhere was resumed");
    assert!(source.command(&format!("migrate {address}")).starts_with("error"));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(source.cpu(0).beats, beats, "the guest runs here although it may run there");
    (source, destination)
}

#[test]
fn a_lost_answer_resolved_to_here() {
    if without_kvm() {
        return;
    }
    let dir = scratch("here");
    let (mut source, _killed) = unknown(&dir, true);
    source.must("resolve here");
    source.must("set multifd on");
    runs(SMALL, &source);
    good_move(&dir, SMALL, &mut source, TCP).quit();
    source.quit();
}

#[test]
fn a_lost_answer_resolved_to_there() {
    if without_kvm() {
        return;
    }
    let dir = scratch("resolve-there");
    let (mut source, mut destination) = unknown(&dir, false);
    source.must("resolve there");
    same_memory(&dir, &mut source, &destination);
    destination.must_end_in("completed");
    goes_on(SMALL, &source, &destination);
    assert!(source.command("resume").starts_with("error"), "the guest is elsewhere");
    source.quit();
    destination.quit();
}

/// Switching logging on must not stall the guest: the log starts all set and nothing is protected. How long the
/// guest's heartbeat was silent is printed, not judged.
#[test]
fn setup_of_a_large_guest() {
    if without_kvm() {
        return;
    }
    let large = std::env::var("VMIG_ALL").is_ok_and(|v| v == "1") && std::env::var("VMIG_ASAN").is_err();
    let shape = Shape { mib: if large { 4096 } else { 256 }, vcpus: 1, shared: false };
    let dir = scratch("large");
    let mut source = vmm("source", &dir, shape, &["--pages", "4194304", "--burst", "0"]);
    assert_eq!(source.reply(), "running");
    source.await_generations(0, 2); // every page is mapped writable now
    let mut destination = vmm("destination", &dir, shape, &["--incoming", TCP]);
    let address = destination.listening();
    source.must("set max-bandwidth 1M");
    std::thread::sleep(Duration::from_millis(200));
    let before = source.cpu(0).gap;
    source.forget_gaps();
    migrate(&mut source, &address);
    source.await_news("event active");
    std::thread::sleep(Duration::from_millis(200));
    let during = source.cpu(0).gap;
    source.must("cancel");
    source.must_end_in("cancelled");
    destination.must_end_in("failed");
    #[expect(clippy::cast_precision_loss, reason = "shown to people")]
    let ms = |ns: u64| ns as f64 / 1e6;
    println!("{} MiB: longest silence {:.2} ms before, {:.2} ms at setup", shape.mib, ms(before), ms(during));
    source.await_generations(0, 1);
    source.quit();
    destination.quit();
}

/// A network that breaks again and again while the guest runs costs it nothing (option `resume-timeout`).
#[test]
fn a_running_guest_moves_over_a_network_that_breaks() {
    if without_kvm() {
        return;
    }
    let mut rng = Rng::new("kvm-resume");
    for channels in [0, 1, 2, 4] {
        let dir = scratch(&format!("kvm-resume-{channels}"));
        let mut source = running(&dir, SMALL);
        let (mut destination, address) = waiting(&dir, SMALL, TCP);
        source.must("set resume-timeout 100000");
        source.must("set max-bandwidth 40M");
        source.must(&match channels {
            0 => "set multifd off".to_owned(),
            n => format!("set multifd-channels {n}"),
        });
        let relay = relay::Relay::new(&address);
        migrate(&mut source, &relay.uri);
        let mut broken = 0;
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(20 + rng.below(150) as u64));
            let links = relay.links();
            match rng.below(3) {
                0 => relay.cut_all(),
                1 => relay.cut(links.saturating_sub(1 + rng.below(channels + 1))),
                _ => relay.cut_after(1 + rng.below(1 << 20) as u64),
            }
            broken += usize::from(links > 0);
        }
        source.must("set max-bandwidth 0");
        source.must_end_in("completed");
        same_memory(&dir, &mut source, &destination);
        destination.must_end_in("completed");
        goes_on(SMALL, &source, &destination);
        println!("{channels} channels: {broken} times broken, {} connections at the end", relay.links());
        source.quit();
        destination.quit();
    }
}
