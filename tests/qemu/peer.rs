//! The C program on our side of the wire (tests/c/peer.c): starts it and reads what it says.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use serde_json::Value;

use crate::common::Rng;

/// A running peer; killed when it goes out of scope.
pub struct Peer {
    child: Child,
    out: BufReader<ChildStdout>,
    /// Where it listens, or where it sends to.
    pub address: String,
}

/// How it ended.
#[derive(Debug)]
pub struct End {
    pub state: String,
    /// Sum of VMIG_STOPPED_...
    pub reasons: u32,
    pub normal_pages: u64,
    pub zero_pages: u64,
    pub clock_ns: u64,
    /// The library's error; null without one.
    pub error: Value,
    pub runs: bool,
}

impl End {
    /// The error as one sentence.
    pub fn message(&self) -> &str {
        self.error["message"].as_str().unwrap_or("no error")
    }

    /// The migration went well.
    #[track_caller]
    pub fn completed(self) -> End {
        assert_eq!((self.state.as_str(), self.message()), ("completed", "no error"), "{self:?}");
        self
    }

    /// The migration failed, and the error says all of these.
    #[track_caller]
    pub fn failed(self, words: &[&str]) -> End {
        assert_eq!(self.state, "failed", "{self:?}");
        for word in words {
            assert!(self.message().contains(word), "'{word}' is not in: {}", self.message());
        }
        self
    }

    /// It failed and the source's guest goes on.
    #[track_caller]
    pub fn failed_and_runs_on(self, words: &[&str]) -> End {
        let end = self.failed(words);
        assert!(end.runs && end.reasons == 0, "{end:?}");
        end
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    /// Starts it, and waits until it listens or has begun to send. `stdin` is what `fd:0` is.
    pub fn start(program: &Path, way: &str, uri: &str, settings: &[String], stdin: impl Into<Stdio>) -> Peer {
        let mut command = Command::new(program);
        command.args([way, uri]).args(settings).stdin(stdin.into()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let address = line.strip_prefix("listening ").unwrap_or_else(|| panic!("{command:?} said '{line}'"));
        Peer { address: address.trim().to_string(), child, out }
    }

    /// Waits for its end; the program itself gives up after a while.
    pub fn end(mut self) -> End {
        let mut words = String::new();
        self.out.read_to_string(&mut words).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "peer: {status}\n{words}");
        let facts: HashMap<&str, &str> = words.lines().filter_map(|l| l.split_once(' ')).collect();
        let number = |name: &str, nth: usize| -> u64 {
            let value = facts.get(name).and_then(|v| v.split(' ').nth(nth)?.parse().ok());
            value.unwrap_or_else(|| panic!("no number '{name}' in\n{words}"))
        };
        End {
            state: facts["state"].to_string(),
            reasons: u32::try_from(number("reasons", 0)).unwrap(),
            normal_pages: number("pages", 0),
            zero_pages: number("pages", 1),
            clock_ns: number("clock", 0),
            error: facts.get("error").map_or(Value::Null, |e| serde_json::from_str(e).unwrap()),
            runs: facts["guest"] == "runs",
        }
    }
}

/// Memory with random pages, sparse pages and zero pages, all drawn from the seed; in a file.
pub fn drawn_ram(dir: &Path, bytes: u64) -> PathBuf {
    const PAGE: usize = 4096;
    let mut rng = Rng::new("ram of a peer");
    let mut ram = vec![0; usize::try_from(bytes).unwrap()];
    for page in ram.chunks_mut(PAGE) {
        match rng.below(4) {
            0 => (),
            1 => page[rng.below(PAGE)] = 1,
            _ => page.chunks_mut(8).for_each(|word| word.copy_from_slice(&rng.next().to_le_bytes())),
        }
    }
    let file = dir.join("ram.bin");
    fs::write(&file, ram).unwrap();
    file
}

/// A setting of the peer whose value is a path.
pub fn path(name: &str, value: &Path) -> String {
    format!("{name}={}", value.display())
}

/// Fails with the first difference, if there is one.
#[track_caller]
pub fn assert_same_memory(expected: &[u8], got: &[u8], what: &str) {
    assert_eq!(expected.len(), got.len(), "{what}: sizes");
    if let Some(at) = expected.iter().zip(got).position(|(a, b)| a != b) {
        let end = (at + 8).min(got.len());
        panic!("{what}: first difference at {at:#x}: {:02x?}, expected {:02x?}", &got[at..end], &expected[at..end]);
    }
}

/// The memory a peer saved.
pub fn saved(file: &Path) -> Vec<u8> {
    fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}
