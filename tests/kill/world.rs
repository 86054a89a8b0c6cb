//! One guest's life: the process it lives in, the board that sees through every mistake (tests/c/mortal.c), and who must
//! have it after a migration that went wrong. Judged by what can be seen from outside: states and who runs.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::over::Over;
use super::relay::{Fault, Point, Relay};
use crate::program::Program;

/// States in which nobody may own the guest.
const UNDECIDED: [&str; 2] = ["switchover-unknown", "held"];
/// VMIG_STOPPED_BY_USER and nothing else.
const PAUSED: u32 = 1;
/// How long anything may take on a busy machine before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);
/// Bodies of tests/c/mortal.c and of the library's own sections.
pub(crate) const BODIES: [(&str, usize); 5] =
    [("timer", 24), ("globalstate", 104), ("rtc", 24), ("nic", 76), ("gpu", 0)];

/// The file all processes of a guest's life share; see `struct board`.
pub(crate) struct Board {
    path: PathBuf,
    file: File,
}

impl Board {
    fn new(dir: &Path, life: usize) -> Board {
        let path = dir.join(format!("board-{life}"));
        std::fs::write(&path, [0; 4096]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Board { path, file }
    }

    fn word(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, index * 8).unwrap();
        u64::from_ne_bytes(bytes)
    }

    pub(crate) fn runner(&self) -> u64 {
        self.word(0)
    }

    pub(crate) fn starts(&self) -> u64 {
        self.word(4)
    }

    /// What the guest or its disk found wrong.
    fn violation(&self) -> Option<String> {
        let mut words = [0; 512];
        self.file.read_exact_at(&mut words, 56).unwrap();
        let end = words.iter().position(|b| *b == 0).unwrap_or(words.len());
        (self.word(6) > 0).then(|| String::from_utf8_lossy(&words[..end]).into_owned())
    }

    /// A dead process holds no disk.
    fn release(&self) {
        self.file.write_all_at(&[0; 8], 0).unwrap();
    }
}

/// What a process says of itself.
#[derive(Clone, Debug)]
pub(crate) struct Look {
    pub(crate) state: String,
    /// Nothing goes on by itself any more.
    ended: bool,
    /// VMIG_SIDE_...: what the state is about may be an earlier migration that went the other way.
    side: u32,
    pub(crate) reasons: u32,
    pub(crate) runs: bool,
}

impl Look {
    /// What it says of a migration on this side.
    fn of_side(mut self, side: u32) -> Look {
        if self.side != side {
            self.state = "none".to_owned();
        }
        self
    }
}

/// Who had the guest in the end, and what it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// It ran on at the source.
    Stayed,
    /// It went to the destination.
    Moved,
    /// A named state was resolved to the source, or to the destination.
    ResolvedHere,
    ResolvedThere,
    /// It died with the process that held it.
    Lost,
}

/// How the two sides talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) channels: usize,
    pub(crate) over: Over,
    /// Hashes are compared before the guest may leave.
    pub(crate) verify: bool,
    /// The source goes on when a connection breaks.
    pub(crate) resume: bool,
}

/// What fails in one of the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The n-th call of this door (see tests/c/doors), from 1.
    Door(usize, usize),
    /// The n-th callback.
    Callback(usize),
}

/// What became of it.
pub(crate) struct Struck {
    pub(crate) hit: bool,
    pub(crate) outcome: Outcome,
    /// Calls of each door, or of callbacks, at the side that was to fail.
    pub(crate) calls: Vec<usize>,
    /// What both sides say, and whether it was the one that was struck that failed.
    pub(crate) words: String,
    pub(crate) failed: bool,
}

/// A guest, where it lives now, and its board.
pub(crate) struct World {
    dir: PathBuf,
    board: Board,
    program: PathBuf,
    doors: bool,
    pub(crate) source: Option<Program>,
    processes: usize,
    lives: usize,
}

impl World {
    pub(crate) fn new(dir: PathBuf, program: PathBuf) -> World {
        let board = Board::new(&dir, 0);
        World { dir, board, program, doors: false, source: None, processes: 0, lives: 0 }
    }

    /// With programs of `make c-fault`, whose system calls may fail.
    pub(crate) fn with_doors(dir: PathBuf, program: PathBuf) -> World {
        World { doors: true, ..World::new(dir, program) }
    }

    fn spawn(&mut self, guest: bool) -> Program {
        self.processes += 1;
        let name = format!("vmm-{}", self.processes);
        let board = self.board.path.to_str().unwrap().to_owned();
        let mut args: Vec<&str> = if guest { vec![&board, "guest"] } else { vec![&board] };
        let (doors, program) =
            (format!("VMIG_DOORS={}", self.dir.join(&name).display()), self.program.to_str().unwrap());
        let program = if self.doors {
            std::fs::write(self.dir.join(&name), [0; 4096]).unwrap();
            args.splice(0..0, [doors.as_str(), program]);
            Program::start(&name, &self.dir, Path::new("env"), &args)
        } else {
            Program::start(&name, &self.dir, &self.program, &args)
        };
        assert_eq!(program.reply(), "ready");
        program
    }

    /// The process in which the guest lives; a new guest if the last one died.
    fn source(&mut self) -> Program {
        self.source.take().unwrap_or_else(|| {
            self.lives += 1;
            self.board = Board::new(&self.dir, self.lives);
            self.spawn(true)
        })
    }

    /// One migration over a network that fails at this point. What was seen there; the outcome.
    pub(crate) fn suffer(&mut self, shape: Shape, point: Point) -> (bool, super::relay::Counts, usize, Outcome) {
        let mut source = Some(self.source());
        let mut destination = Some(self.spawn(false));
        for program in [&mut source, &mut destination].into_iter().flatten() {
            hasten(program);
        }
        let from = source.as_mut().unwrap();
        from.must(&format!("set resume-timeout {}", if shape.resume { time_to_resume(point.fault) } else { 0 }));
        if shape.resume && !is_lasting(point.fault) {
            // Only the network is to decide, and not how busy the machine is.
            for program in [&mut source, &mut destination].into_iter().flatten() {
                program.must("set stall-timeout 20000");
                program.must("set connect-timeout 20000");
                program.must("set switchover-timeout 20000");
            }
        }
        let from = source.as_mut().unwrap();
        from.must(if shape.channels > 0 { "set multifd on" } else { "set multifd off" });
        from.must(&format!("set multifd-channels {}", shape.channels));
        from.must(if shape.verify { "set verify on" } else { "set verify off" });
        from.must("set return-path on");
        let uri = self.listen(destination.as_mut().unwrap(), shape.over);
        let uri = uri.unwrap_or_else(|| panic!("{shape:?}: the destination does not listen"));
        let relay = Relay::new(&self.dir, &uri, point, &BODIES);
        let starts = self.board.starts();
        from.must(&format!("migrate {}", shape.over.leads(&relay.uri, &self.bridge())));
        self.watch(&relay, point.fault, &mut source, &mut destination);
        self.await_settled(&mut source, &mut destination);
        let seen = relay.seen();
        let what = format!("{shape:?} {point:?}");
        let outcome = self.judge(&what, &mut source, &mut destination, starts);
        drop(relay);
        self.go_on(&what, outcome, source, destination);
        (seen.0, seen.1, seen.2, outcome)
    }

    /// One migration in which something fails at the source or at the destination.
    pub(crate) fn strike(&mut self, at_source: bool, over: Over, multifd: bool, way: Way) -> Struck {
        let what = format!("{way:?} at the {}, over {over:?}", if at_source { "source" } else { "destination" });
        let (mut source, mut destination) = (self.source(), self.spawn(false));
        for program in [&mut source, &mut destination] {
            hasten(program);
            program.must(if multifd { "set multifd on" } else { "set multifd off" });
        }
        source.must("set return-path on");
        let before = [left(&mut source), left(&mut destination)];
        let victim = if at_source { &mut source } else { &mut destination };
        let doors = Doors::of(&self.dir, victim);
        match way {
            Way::Door(door, call) => doors.arm(door, call),
            Way::Callback(call) => victim.must(&format!("fail {call}")),
        }
        let mut words = String::new();
        if let Some(uri) = self.listen(&mut destination, over) {
            words = source.command(&format!("migrate {}", over.leads(&uri, &self.bridge())));
        }
        let (mut one, mut two) = (Some(source), Some(destination));
        self.await_settled(&mut one, &mut two);
        let (mut source, mut destination) = (one.unwrap(), two.unwrap());
        let victim = if at_source { &mut source } else { &mut destination };
        let (hit, calls) = match way {
            Way::Door(..) => doors.disarm(),
            Way::Callback(call) => {
                let calls = victim.command("calls").strip_prefix("value ").unwrap().parse().unwrap();
                victim.must("fail 0");
                (call > 0 && calls >= call, vec![calls])
            }
        };
        let mut failed = false;
        for (program, is_source) in [(&mut source, true), (&mut destination, false)] {
            let error = program.command("error");
            failed |= is_source == at_source && error != "value none";
            words = format!("{words}\n{}: {error}", program.name);
        }
        let (mut source, mut destination) = (Some(source), Some(destination));
        let outcome = self.judge(&what, &mut source, &mut destination, self.board.starts());
        // A side that does not know who has the guest goes on asking until it was told.
        if let (Some(source), Some(destination)) = (&mut source, &mut destination) {
            await_left(&what, source, before[0]);
            // Connections of the VMM's own making have a thread that takes them in.
            let threads = if over == Over::Own { 2 } else { 1 };
            await_left(&what, destination, [before[1][0] + 1, before[1][1] + threads, 0]);
        }
        self.go_on(&what, outcome, source, destination);
        Struck { hit, outcome, calls, words, failed }
    }

    fn bridge(&self) -> PathBuf {
        self.program.with_file_name("bridge")
    }

    /// Where somebody can connect; none: the destination failed before.
    fn listen(&self, destination: &mut Program, over: Over) -> Option<String> {
        let path = self.dir.join(format!("d{}", self.processes));
        let answer = destination.command(&format!("incoming {}", over.listens(&path, &self.bridge())));
        let address = answer.strip_prefix("listening ")?.to_owned();
        if over != Over::ListeningCommand {
            return Some(address);
        }
        let end = Instant::now() + PATIENCE;
        while !path.exists() {
            if self.look(destination).ended {
                return None;
            }
            if Instant::now() > end {
                destination.fail("its command does not listen");
            }
            std::thread::sleep(LOOK);
        }
        Some(format!("unix:{}", path.display()))
    }

    /// Until the source has settled or is dead; does at the point what the relay cannot.
    fn watch(&self, relay: &Relay, fault: Fault, source: &mut Option<Program>, destination: &mut Option<Program>) {
        let end = Instant::now() + PATIENCE;
        while let Some(from) = source {
            if relay.reached.recv_timeout(LOOK).is_ok() {
                match fault {
                    Fault::KillSource => {
                        self.bury(source.take());
                        relay.thaw();
                        return;
                    }
                    Fault::KillDestination => {
                        self.bury(destination.take());
                        relay.thaw();
                    }
                    Fault::Cancel => {
                        // Refused once the guest was handed over.
                        from.command("cancel");
                        relay.thaw();
                    }
                    _ => (),
                }
                continue;
            }
            if self.look(from).ended {
                break;
            }
            if Instant::now() > end {
                from.fail("the migration does not end");
            }
        }
        // What was frozen arrives after the source gave up waiting for it.
        relay.thaw();
    }

    fn bury(&self, program: Option<Program>) {
        if let Some(mut program) = program {
            let pid = program.id();
            program.kill();
            if self.board.runner() == u64::from(pid) {
                self.board.release();
            }
        }
    }

    /// What a process says; the guest's own complaints come first.
    pub(crate) fn look(&self, program: &mut Program) -> Look {
        if let Some(words) = self.board.violation() {
            program.fail(&words);
        }
        let line = program.command("look");
        let word = |key: &str| line.split(' ').find_map(|w| w.strip_prefix(key)?.strip_prefix('=')).unwrap_or("");
        let number = |key: &str| word(key).parse::<u32>().unwrap_or_else(|_| program.fail(&line));
        let (reasons, runs) = (number("reasons"), number("runs") != 0);
        Look { state: word("state").to_owned(), ended: number("ended") != 0, side: number("side"), reasons, runs }
    }

    /// Until neither side works any more. A destination nobody came to is called off; one whose source is dead is not
    /// waited for when it has said that it does not know.
    fn await_settled(&self, source: &mut Option<Program>, destination: &mut Option<Program>) {
        let alone = source.is_none();
        for (program, is_source) in [(source, true), (destination, false)] {
            let Some(program) = program else { continue };
            let end = Instant::now() + PATIENCE;
            loop {
                let look = self.look(program);
                if look.ended || alone && is_undecided(&look) {
                    break;
                }
                if !is_source && look.state == "setup" {
                    program.must("cancel");
                }
                if Instant::now() > end {
                    program.fail(&format!("it does not settle: {look:?}"));
                }
                std::thread::sleep(LOOK);
            }
        }
    }

    /// Who must have the guest now; a named state is resolved as an operator would who looks at both sides.
    fn judge(
        &self,
        what: &str,
        source: &mut Option<Program>,
        destination: &mut Option<Program>,
        starts: u64,
    ) -> Outcome {
        let here = source.as_mut().map(|s| self.look(s).of_side(1));
        let there = destination.as_mut().map(|d| self.look(d).of_side(2));
        assert!(
            !(here.as_ref().is_some_and(|l| l.runs) && there.as_ref().is_some_and(|l| l.runs)),
            "{what}: two guests run, {here:?}, {there:?}"
        );
        for (program, look) in [(&mut *source, &here), (&mut *destination, &there)] {
            if let (Some(program), Some(look)) = (program, look)
                && look.ended
                && (look.state == "failed" || is_undecided(look))
            {
                let error = program.command("error");
                assert!(
                    error.contains("\"text\"") && error.contains("\"errno\""),
                    "{what}: {look:?} without a reason: {error}"
                );
            }
        }
        let ran_there = self.board.starts() > starts && !here.as_ref().is_some_and(|l| l.runs);
        match (source, destination) {
            (Some(source), Some(destination)) => {
                let (here, there) = (here.unwrap(), there.unwrap());
                self.both_live(what, (source, &here), (destination, &there))
            }
            (Some(source), None) => match here.unwrap() {
                look if look.state == "completed" => Outcome::Lost,
                look if is_undecided(&look) => {
                    source.must(if ran_there { "resolve 0" } else { "resolve 1" });
                    if ran_there { Outcome::Lost } else { Outcome::ResolvedHere }
                }
                _ => Outcome::Stayed,
            },
            (None, Some(destination)) => match there.unwrap() {
                look if look.state == "completed" => Outcome::Moved,
                // Its own deadline may come first: then it has refused the guest for ever.
                look if is_undecided(&look) && destination.command("resolve 1") == "ok" => Outcome::ResolvedThere,
                _ => Outcome::Lost,
            },
            (None, None) => panic!("{what}: both are dead"),
        }
    }

    fn both_live(
        &self,
        what: &str,
        (source, here): (&mut Program, &Look),
        (destination, there): (&mut Program, &Look),
    ) -> Outcome {
        if here.state == "completed" && there.state == "failed" {
            // It arrived and did not start: it is paused where it is, and nowhere else.
            assert!(!there.runs && there.reasons == PAUSED, "{what}: {here:?}, {there:?}");
            destination.must("resume");
            return Outcome::Moved;
        }
        if !here.runs && !there.runs {
            // Nobody runs: then one of them says so by its state.
            assert!(
                is_undecided(here) || is_undecided(there),
                "{what}: nobody runs and no state says so: {here:?}, {there:?}"
            );
        }
        let mut outcome = Outcome::Stayed;
        if is_undecided(there) {
            // Right in any order of events while the source lives.
            destination.must("resolve 0");
        }
        if is_undecided(here) {
            let moved = there.state == "completed";
            source.must(if moved { "resolve 0" } else { "resolve 1" });
            outcome = if moved { Outcome::ResolvedThere } else { Outcome::ResolvedHere };
        } else if here.state == "completed" {
            assert_eq!(there.state, "completed", "{what}: the source let go, {here:?}, {there:?}");
            outcome = Outcome::Moved;
        } else {
            assert!(
                here.runs && here.reasons == 0,
                "{what}: the guest does not run at the source, {here:?}, {there:?}"
            );
            assert_ne!(there.state, "completed", "{what}: both have it, {here:?}, {there:?}");
        }
        outcome
    }

    /// The survivor's guest is whole, runs, and can be moved to a fresh destination, where it lives from now on.
    fn go_on(&mut self, what: &str, outcome: Outcome, source: Option<Program>, destination: Option<Program>) {
        let (survivor, other) = match outcome {
            Outcome::Stayed | Outcome::ResolvedHere => (source, destination),
            Outcome::Moved | Outcome::ResolvedThere => (destination, source),
            Outcome::Lost => (None, source.or(destination)),
        };
        let alone = [usize::MAX, usize::MAX, 0];
        if let Some(mut other) = other {
            await_left(what, &mut other, alone);
            other.quit();
        }
        let Some(mut survivor) = survivor else { return };
        await_left(what, &mut survivor, alone);
        self.check(what, &mut survivor);
        self.source = Some(self.move_on(what, survivor));
    }

    /// The guest runs and all of it is what it should be.
    pub(crate) fn check(&self, what: &str, program: &mut Program) {
        let look = self.look(program);
        if !look.runs || look.reasons != 0 {
            program.fail(&format!("{what}: the guest does not run where it survived: {look:?}"));
        }
        program.must("check");
        let disk = self.board.word(1);
        let end = Instant::now() + PATIENCE;
        while self.board.word(1) == disk {
            if Instant::now() > end {
                program.fail(&format!("{what}: the guest takes no step"));
            }
            std::thread::sleep(LOOK / 10);
        }
        self.look(program);
    }

    /// To a fresh destination, over a network that works.
    pub(crate) fn move_on(&mut self, what: &str, mut survivor: Program) -> Program {
        let mut fresh = self.spawn(false);
        for program in [&mut survivor, &mut fresh] {
            program.must("set stall-timeout 30000");
            program.must("set connect-timeout 10000");
            program.command("set switchover-timeout 30000");
            program.command("set resume-timeout 0");
        }
        let uri = self.listen(&mut fresh, Over::Unix).unwrap_or_else(|| fresh.fail("it does not listen"));
        survivor.must(&format!("migrate {uri}"));
        let (mut one, mut two) = (Some(survivor), Some(fresh));
        self.await_settled(&mut one, &mut two);
        let (mut survivor, mut fresh) = (one.unwrap(), two.unwrap());
        for program in [&mut survivor, &mut fresh] {
            let look = self.look(program);
            if look.state != "completed" {
                let error = program.command("error");
                program.fail(&format!("{what}: the next attempt ended {look:?}: {error}"));
            }
        }
        survivor.quit();
        self.check(what, &mut fresh);
        fresh
    }
}

/// The file by which a process is told to fail.
struct Doors(File);

impl Doors {
    fn of(dir: &Path, program: &Program) -> Doors {
        let path = dir.join(&program.name);
        Doors(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap())
    }

    fn arm(&self, door: usize, call: usize) {
        let mut bytes = [0; 8 * (8 + DOORS)];
        bytes[..8].copy_from_slice(&door.to_ne_bytes());
        bytes[8..16].copy_from_slice(&call.to_ne_bytes());
        self.0.write_all_at(&bytes, 0).unwrap();
    }

    /// Whether the call was made, and how many there were of each door.
    fn disarm(&self) -> (bool, Vec<usize>) {
        self.0.write_all_at(&[0; 8], 8).unwrap();
        let mut bytes = [0; 8 * (8 + DOORS)];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        let words: Vec<usize> = bytes.chunks(8).map(|w| usize::from_ne_bytes(w.try_into().unwrap())).collect();
        (words[2] > 0, words[8..].to_vec())
    }
}

/// Kinds of calls in tests/c/doors.
pub(crate) const DOORS: usize = 10;

/// Descriptors, threads and children of a process.
fn left(program: &mut Program) -> [usize; 3] {
    let line = program.command("left");
    let number = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key)?.parse().ok());
    ["fds=", "threads=", "children="].map(|key| number(key).unwrap())
}

/// Nothing of a migration that ended is left behind, but what answers a source that asks what became of its guest: a
/// descriptor and a thread at the destination. The last thread of a migration may take a moment.
fn await_left(what: &str, program: &mut Program, most: [usize; 3]) {
    let end = Instant::now() + PATIENCE / 4;
    loop {
        let now = left(program);
        if now.iter().zip(most).all(|(now, most)| *now <= most) {
            return;
        }
        if Instant::now() > end {
            let text = "descriptors, threads and children may be left";
            program.fail(&format!("{what}: at most {most:?} {text}, not {now:?}"));
        }
        std::thread::sleep(LOOK);
    }
}

/// Nobody comes back after this.
fn is_lasting(fault: Fault) -> bool {
    matches!(fault, Fault::KillSource | Fault::KillDestination | Fault::CutForGood)
}

/// Milliseconds: long where the migration is to go on, short where that is to be given up.
fn time_to_resume(fault: Fault) -> u32 {
    if is_lasting(fault) { 300 } else { 30_000 }
}

fn is_undecided(look: &Look) -> bool {
    UNDECIDED.contains(&look.state.as_str())
}

/// Silence is noticed soon.
fn hasten(program: &mut Program) {
    program.must("set stall-timeout 250");
    program.must("set connect-timeout 250");
    // Unknown to versions without it.
    program.command("set switchover-timeout 250");
}
