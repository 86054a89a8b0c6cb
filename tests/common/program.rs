//! Programs that speak the line protocol of c-examples/vmm: one command per line, one reply per line. Lines that begin
//! with one of NEWS come unasked.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

const NEWS: [&str; 8] = ["beat", "gen", "fault", "stopped", "started", "hashed", "event", "note"];
/// How long a program may take to answer a command.
pub const REPLY: Duration = Duration::from_secs(30);
/// How long a migration of these tests may take, on a busy machine and under AddressSanitizer.
pub const MOVE: Duration = Duration::from_secs(120);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// What a vCPU of the example guest said.
#[derive(Clone, Debug, Default)]
pub struct Cpu {
    /// Generations, in the order they were reported.
    pub generations: Vec<u32>,
    /// Interrupts the guest had taken when it reported the last one: of the PIT, of the APIC's timer.
    pub interrupts: [u64; 2],
    /// Heartbeats since the program began, and the longest time between two since `forget_gaps`.
    pub beats: u64,
    pub first_beat: u64,
    pub last_beat: u64,
    pub gap: u64,
}

#[derive(Debug, Default)]
struct Seen {
    replies: VecDeque<String>,
    news: Vec<String>,
    cpus: HashMap<usize, Cpu>,
    ended: bool,
}

/// A running program.
pub struct Program {
    pub name: String,
    child: Child,
    input: Option<ChildStdin>,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    reader: Option<JoinHandle<()>>,
    errors: std::path::PathBuf,
}

impl Program {
    /// Starts a program; what it writes to stderr goes into a file of `dir` and is shown when something fails.
    pub fn start(name: &str, dir: &Path, program: &Path, args: &[&str]) -> Program {
        let errors = dir.join(format!("{name}.err"));
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors).unwrap());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let output = BufReader::new(child.stdout.take().unwrap());
        let seen: Arc<(Mutex<Seen>, Condvar)> = Arc::default();
        let shared = Arc::clone(&seen);
        let reader = std::thread::spawn(move || {
            let (seen, changed) = &*shared;
            for line in output.lines().map_while(Result::ok) {
                seen.lock().unwrap().take(line);
                changed.notify_all();
            }
            seen.lock().unwrap().ended = true;
            changed.notify_all();
        });
        Program { name: name.into(), input: child.stdin.take(), child, seen, reader: Some(reader), errors }
    }

    /// Ends the test with everything the program said.
    pub fn fail(&self, what: &str) -> ! {
        let seen = self.seen.0.lock().map(|s| format!("{:?}, {:?}", s.news.iter().rev().take(9), s.replies));
        let words = std::fs::read_to_string(&self.errors).unwrap_or_default();
        panic!("{}: {what}\nit said: {}\n{words}", self.name, seen.unwrap_or_default());
    }

    /// Waits until `found` finds something.
    fn wait<T>(&self, limit: Duration, what: &str, mut found: impl FnMut(&mut Seen) -> Option<T>) -> T {
        let end = Instant::now() + limit;
        let mut seen = self.seen.0.lock().unwrap();
        loop {
            if let Some(value) = found(&mut seen) {
                return value;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || seen.ended {
                let how = if seen.ended { "ended before" } else { "did not say in time" };
                drop(seen);
                self.fail(&format!("it {how}: {what}"));
            }
            seen = self.seen.1.wait_timeout(seen, left.min(Duration::from_secs(1))).unwrap().0;
        }
    }

    /// The next line that is no news.
    pub fn reply(&self) -> String {
        self.wait(REPLY, "a reply", |seen| seen.replies.pop_front())
    }

    /// Gives a command and returns its answer.
    pub fn command(&mut self, line: &str) -> String {
        self.send(line);
        self.wait(REPLY, line, |seen| seen.replies.pop_front())
    }

    /// Gives a command and does not wait for the answer.
    pub fn send(&mut self, line: &str) {
        if writeln!(self.input.as_mut().unwrap(), "{line}").is_err() {
            self.fail(&format!("it does not take the command '{line}'"));
        }
    }

    /// Gives a command that must succeed.
    pub fn must(&mut self, line: &str) {
        let answer = self.command(line);
        if answer != "ok" {
            self.fail(&format!("'{line}' was answered by '{answer}'"));
        }
    }

    /// Where the program listens, as it says in answer to `incoming URI` or at its start.
    pub fn listening(&self) -> String {
        let line = self.reply();
        match line.strip_prefix("listening ") {
            Some(address) => address.to_owned(),
            None => self.fail(&format!("not a listening address: {line}")),
        }
    }

    /// A number of the `status` line.
    pub fn status(&mut self, key: &str) -> u64 {
        let text = self.status_text(key);
        text.parse().unwrap_or_else(|e| panic!("status {key}={text}: {e}"))
    }

    /// A word of the `status` line.
    pub fn status_text(&mut self, key: &str) -> String {
        let line = self.command("status");
        let found = line.split(' ').find_map(|w| w.strip_prefix(key)?.strip_prefix('=').map(str::to_owned));
        found.unwrap_or_else(|| self.fail(&format!("no {key} in '{line}'")))
    }

    /// Waits until no migration runs any more; the state it ended in.
    pub fn ended_in(&mut self) -> String {
        let end = Instant::now() + MOVE;
        loop {
            let line = self.command("status");
            let word =
                |key: &str| line.split(' ').find_map(|w| w.strip_prefix(key)?.strip_prefix('=').map(str::to_owned));
            let state = word("state").unwrap_or_default();
            // From there a side may go on by itself; programs that know say when it does not.
            let stays = state == "switchover-unknown" && word("over").is_none_or(|over| over == "1");
            if stays || ["none", "completed", "failed", "cancelled", "held"].contains(&state.as_str()) {
                return state;
            }
            if Instant::now() > end {
                self.fail(&format!("the migration does not end, state {state}"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits for the end of a migration, which must be `state`.
    pub fn must_end_in(&mut self, state: &str) {
        let found = self.ended_in();
        if found != state {
            let why = self.command("error");
            self.fail(&format!("the migration ended as {found} instead of {state}: {why}"));
        }
    }

    /// What a vCPU said so far.
    pub fn cpu(&self, index: usize) -> Cpu {
        self.seen.0.lock().unwrap().cpus.get(&index).cloned().unwrap_or_default()
    }

    /// From here on gaps between heartbeats are measured anew.
    pub fn forget_gaps(&self) {
        self.seen.0.lock().unwrap().cpus.values_mut().for_each(|cpu| cpu.gap = 0);
    }

    /// Waits until vCPU `index` reported `more` generations beyond those of now.
    pub fn await_generations(&self, index: usize, more: usize) {
        let goal = self.cpu(index).generations.len() + more;
        self.wait(MOVE, &format!("{more} generations of vCPU {index}"), |seen| {
            (seen.cpus.get(&index)?.generations.len() >= goal).then_some(())
        });
    }

    /// Waits until vCPU `index` has taken more interrupts of each source that had any in `before`.
    pub fn await_interrupts(&self, index: usize, before: [u64; 2]) {
        self.wait(MOVE, &format!("interrupts of vCPU {index} beyond {before:?} (PIT, APIC timer)"), |seen| {
            let now = seen.cpus.get(&index)?.interrupts;
            (0..2).all(|i| before[i] == 0 || now[i] > before[i]).then_some(())
        });
    }

    /// Waits for news that begin with `start`; the first such line since the last `forget_news`.
    pub fn await_news(&self, start: &str) -> String {
        self.wait(MOVE, start, |seen| seen.news.iter().find(|n| n.starts_with(start)).cloned())
    }

    /// All news that begin with `start`, oldest first.
    pub fn news(&self, start: &str) -> Vec<String> {
        self.seen.0.lock().unwrap().news.iter().filter(|n| n.starts_with(start)).cloned().collect()
    }

    pub fn forget_news(&self) {
        self.seen.0.lock().unwrap().news.clear();
    }

    /// What it wrote to stderr.
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as kill -9 does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end, which it must do well (AddressSanitizer's complaints are an exit status, too).
    pub fn quit(mut self) {
        self.send("quit");
        self.wait_end(0);
    }

    /// Waits for its end with this status.
    pub fn wait_end(&mut self, status: i32) {
        let end = Instant::now() + REPLY;
        while Instant::now() < end {
            if let Some(found) = self.child.try_wait().unwrap() {
                if found.code() != Some(status) {
                    self.fail(&format!("it ended with {found}"));
                }
                return;
            }
            std::thread::sleep(LOOK);
        }
        self.fail("it does not end");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Seen {
    fn take(&mut self, line: String) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words.get(i).and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        let index = usize::try_from(number(1)).unwrap();
        match words[0] {
            "beat" => {
                let (cpu, at) = (self.cpus.entry(index).or_default(), number(2));
                if cpu.beats == 0 {
                    cpu.first_beat = at;
                } else {
                    cpu.gap = cpu.gap.max(at - cpu.last_beat);
                }
                (cpu.last_beat, cpu.beats) = (at, cpu.beats + 1);
            }
            "gen" => {
                let cpu = self.cpus.entry(index).or_default();
                cpu.generations.push(u32::try_from(number(2)).unwrap());
                cpu.interrupts = [number(6), number(7)];
            }
            word if NEWS.contains(&word) => self.news.push(line),
            _ => self.replies.push_back(line),
        }
    }
}
