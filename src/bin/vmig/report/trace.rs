//! The lines of a trace, by migration.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read};

use serde_json::Value;

/// Longest line that is read; the library writes none that comes near.
const LINE_MAX: u64 = 256 << 10;
/// Migrations of one file that are shown: the last ones.
const RUNS_MAX: usize = 20;
/// Points, states, errors of one of them that are kept.
const POINTS_MAX: usize = 200_000;
const WORDS_MAX: usize = 1000;

/// The numbers at one moment.
#[derive(Clone, Copy, Default)]
pub(crate) struct Point {
    /// Nanoseconds since the migration was asked for.
    pub(crate) t: u64,
    pub(crate) iteration: u64,
    pub(crate) total: u64,
    pub(crate) remaining: u64,
    pub(crate) transferred: u64,
    pub(crate) dirty_rate: u64,
    pub(crate) bandwidth: u64,
    pub(crate) expected_downtime: u64,
    /// A round begins here.
    pub(crate) is_round: bool,
}

/// Parts of a blackout, in their order.
pub(crate) const PARTS: [&str; 8] = ["stop", "devices", "sync", "ram", "load", "start", "go", "verify"];

/// How long the guest stood still, in nanoseconds.
#[derive(Clone, Copy, Default)]
pub(crate) struct Blackout {
    pub(crate) at: u64,
    pub(crate) actual: [u64; PARTS.len()],
    pub(crate) total: u64,
    pub(crate) expected: [u64; PARTS.len()],
}

/// One migration.
#[derive(Default)]
pub(crate) struct Run {
    pub(crate) id: String,
    pub(crate) side: String,
    pub(crate) library: String,
    pub(crate) unix_ms: u64,
    pub(crate) points: Vec<Point>,
    /// When which state began.
    pub(crate) states: Vec<(u64, String)>,
    pub(crate) blackouts: Vec<Blackout>,
    pub(crate) errors: Vec<(u64, String)>,
    /// Last time of all.
    pub(crate) end: u64,
    /// Lines that the library did not write.
    pub(crate) left_out: u64,
}

/// A file.
#[derive(Default)]
pub(crate) struct Trace {
    pub(crate) runs: VecDeque<Run>,
    /// Lines that make no sense, of a full disk or another program.
    pub(crate) unreadable: u64,
    /// Migrations before those shown.
    pub(crate) earlier: u64,
}

/// Reads all of it.
pub(crate) fn read(mut input: impl BufRead) -> io::Result<Trace> {
    let mut trace = Trace::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.by_ref().take(LINE_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(trace);
        }
        let known = serde_json::from_slice(&line).ok().and_then(|line: Value| trace.take(&line));
        trace.unreadable += u64::from(known.is_none());
    }
}

impl Trace {
    fn take(&mut self, line: &Value) -> Option<()> {
        let (event, id, t) = (line["event"].as_str()?, line["run"].as_str()?, line["t"].as_u64()?);
        if event == "begin" {
            if self.runs.len() == RUNS_MAX {
                self.runs.pop_front();
                self.earlier += 1;
            }
            let text = |key: &str| line[key].as_str().unwrap_or("?").to_owned();
            self.runs.push_back(Run {
                id: id.to_owned(),
                side: text("side"),
                library: text("library"),
                unix_ms: line["unix-ms"].as_u64()?,
                ..Run::default()
            });
            return Some(());
        }
        let run = self.runs.iter_mut().rev().find(|run| run.id == id)?;
        run.end = run.end.max(t);
        match event {
            "state" => {
                keep(&mut run.states, WORDS_MAX, (t, line["state"].as_str()?.to_owned()));
                keep(&mut run.points, POINTS_MAX, point(line, t, false));
            }
            "iteration" | "sample" => keep(&mut run.points, POINTS_MAX, point(line, t, event == "iteration")),
            "blackout" => keep(&mut run.blackouts, WORDS_MAX, blackout(line, t)),
            "error" => {
                let text = line["message"].as_str().or(line["text"].as_str())?;
                keep(&mut run.errors, WORDS_MAX, (t, text.to_owned()));
            }
            "end" => run.left_out = line["left-out"].as_u64()?,
            // Of a newer library.
            _ => (),
        }
        Some(())
    }
}

fn keep<T>(list: &mut Vec<T>, most: usize, item: T) {
    if list.len() < most {
        list.push(item);
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn point(line: &Value, t: u64, is_round: bool) -> Point {
    Point {
        t,
        iteration: number(&line["iteration"]),
        total: number(&line["total"]),
        remaining: number(&line["remaining"]),
        transferred: number(&line["transferred"]),
        dirty_rate: number(&line["dirty-rate"]),
        bandwidth: number(&line["bandwidth"]),
        expected_downtime: number(&line["expected-downtime"]),
        is_round,
    }
}

fn blackout(line: &Value, at: u64) -> Blackout {
    let parts = |side: &str| PARTS.map(|part| number(&line[side][part]));
    Blackout { at, actual: parts("actual"), total: number(&line["actual"]["total"]), expected: parts("expected") }
}
