//! Option `trace-file`: what happens in a migration, one JSON object to a line, for `vmig report` and other readers.
//!
//! The thread `trace` writes. Whoever has news hands it over without waiting, and what is too much is left out and counted:
//! a disk that hangs holds up nobody but this thread. The longer a migration takes, the fewer of its numbers are written,
//! so that a file grows with the logarithm of the time.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::pacing::downtime::Parts;
use crate::status::watch::{Event, Hearer};
use crate::status::{Side, Snapshot, Status};
use crate::sys::random::random;

/// Version of the lines' form.
pub const FORMAT: u64 = 1;
/// How often the numbers are written when nothing else happens.
const SAMPLE: Duration = Duration::from_millis(200);
/// Lines of numbers after which they are written half as often.
const LINES_EACH: u32 = 1000;
/// The least time between two of them from then on.
const FIRST_STEP: u64 = 10_000_000;
/// Lines of one migration, whatever happens.
const LINES_MAX: u32 = 100_000;

/// Opens the file, to write behind what it has. A pipe must have a reader.
pub fn open(path: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(|e| Error::from_io(format!("trace file '{}'", path.escape_default()), &e));
    file.map_err(|e| e.by_option("trace-file"))
}

/// Which lines of numbers are written.
#[derive(Debug, Default)]
struct Thinning {
    /// None before this time.
    next: u64,
    step: u64,
    lines: u32,
}

impl Thinning {
    fn takes(&mut self, at: u64) -> bool {
        if at < self.next {
            return false;
        }
        self.lines += 1;
        if self.lines == LINES_EACH {
            (self.lines, self.step) = (0, (self.step * 2).max(FIRST_STEP));
        }
        self.next = at.saturating_add(self.step);
        true
    }
}

/// Writes the lines of one migration.
#[derive(Debug)]
struct Writer<W> {
    out: W,
    /// In every line, for others may write to the same file.
    run: String,
    lines: u32,
    thinning: Thinning,
    left_out: u64,
}

impl<W: Write> Writer<W> {
    fn line(&mut self, event: &str, at: u64, more: Map<String, Value>) -> std::io::Result<()> {
        if self.lines == LINES_MAX {
            self.left_out += 1;
            return Ok(());
        }
        self.lines += 1;
        let mut line = Map::new();
        line.insert("event".to_owned(), event.into());
        line.insert("run".to_owned(), self.run.as_str().into());
        line.insert("t".to_owned(), at.into());
        line.extend(more);
        let mut text = Value::from(line).to_string();
        text.push('\n');
        // In one write, so that lines of several guests that share a file do not mix.
        self.out.write_all(text.as_bytes())
    }

    fn begin(&mut self, side: Side) -> std::io::Result<()> {
        let since = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_millis());
        let more = json!({"format": FORMAT, "library": env!("CARGO_PKG_VERSION"), "side": side.name(),
            "pid": std::process::id(), "unix-ms": u64::try_from(since).unwrap_or(u64::MAX)});
        self.line("begin", 0, object(more))
    }

    fn event(&mut self, event: &Event) -> std::io::Result<()> {
        match event {
            Event::State(now) => self.line("state", now.elapsed, numbers(now)),
            Event::Iteration(now) => self.numbers("iteration", now),
            Event::Step(at, step) => {
                self.line("ladder", *at, object(json!({"step": step.name(), "value": step.value()})))
            }
            Event::Blackout(at, downtime) => {
                let mut actual = parts(&downtime.actual);
                actual["total"] = nanos(downtime.total).into();
                let more = json!({"actual": actual, "expected": parts(&downtime.expected)});
                self.line("blackout", *at, object(more))
            }
            Event::Error(at, error) => {
                let mut more = error.to_json_for_peer();
                more["message"] = error.to_string().into();
                self.line("error", *at, object(more))
            }
        }
    }

    fn numbers(&mut self, event: &str, now: &Snapshot) -> std::io::Result<()> {
        match self.thinning.takes(now.elapsed) {
            true => self.line(event, now.elapsed, numbers(now)),
            false => {
                self.left_out += 1;
                Ok(())
            }
        }
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn numbers(now: &Snapshot) -> Map<String, Value> {
    object(json!({
        "state": now.state.name(),
        "iteration": now.iteration,
        "total": now.total,
        "remaining": now.remaining,
        "transferred": now.transferred,
        "normal-pages": now.normal_pages,
        "zero-pages": now.zero_pages,
        "dirty-rate": now.dirty_rate,
        "bandwidth": now.bandwidth,
        "expected-downtime": now.expected_downtime,
    }))
}

fn parts(parts: &Parts) -> Value {
    json!({"stop": nanos(parts.stop), "devices": nanos(parts.devices), "sync": nanos(parts.sync),
        "ram": nanos(parts.ram), "load": nanos(parts.load), "start": nanos(parts.start),
        "go": nanos(parts.go), "verify": nanos(parts.verify), "total": nanos(parts.total())})
}

/// Writes until the migration has ended; the body of the thread `trace`.
pub fn write(out: impl Write, side: Side, hearer: &Hearer, status: &Arc<Status>) -> Result<()> {
    let run = format!("{:016x}", u64::from_be_bytes(random()?));
    let mut writer = Writer { out, run, lines: 0, thinning: Thinning::default(), left_out: 0 };
    let mut written = writer.begin(side);
    let mut last = 0;
    while written.is_ok() {
        written = match hearer.from.recv_timeout(SAMPLE) {
            Ok(event) => writer.event(&event),
            Err(RecvTimeoutError::Timeout) => {
                let now = status.snapshot();
                last = now.elapsed;
                writer.numbers("sample", &now)
            }
            Err(RecvTimeoutError::Disconnected) => {
                let left_out = writer.left_out + hearer.lost();
                // The line that says so must fit.
                writer.lines = writer.lines.min(LINES_MAX - 1);
                written =
                    writer.line("end", status.snapshot().elapsed.max(last), object(json!({"left-out": left_out})));
                break;
            }
        }
    }
    written.map_err(|e| Error::from_io("the trace ends early", &e).by_option("trace-file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::watch;
    use crate::sys::eventfd::Wake;

    /// The lines of a migration that `live` lives through.
    fn lines(live: impl FnOnce(&Status)) -> Vec<Value> {
        let status = Arc::new(Status::new().unwrap());
        let (teller, hearer) = watch::pair();
        status.begin_watched(Side::Source, true, &Arc::new(Wake::new().unwrap()), Some(teller)).unwrap();
        live(&status);
        let mut out = Vec::new();
        write(&mut out, Side::Source, &hearer, &status).unwrap();
        let text = String::from_utf8(out).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn words<'a>(lines: &'a [Value], key: &str) -> Vec<&'a str> {
        lines.iter().filter_map(|line| line[key].as_str()).collect()
    }

    #[test]
    fn everything_is_told_in_its_order() {
        let lines = lines(|status| {
            status.advance(crate::status::State::Active).unwrap();
            status.counters.remaining.store(77, std::sync::atomic::Ordering::Relaxed);
            status.tell();
            status.tell_step(crate::pacing::ladder::Step::Throttle(20));
            status.set_downtime(crate::pacing::downtime::Downtime {
                total: Duration::from_millis(3),
                ..Default::default()
            });
            status.end(Err(Error::invalid("broken\nin two").in_section("uart")));
        });
        let events = ["begin", "state", "state", "iteration", "ladder", "blackout", "error", "state", "end"];
        assert_eq!(words(&lines, "event"), events);
        assert_eq!(words(&lines, "state"), ["setup", "active", "active", "failed"]);
        assert_eq!((&lines[3]["remaining"], &lines[5]["actual"]["total"]), (&77.into(), &3_000_000.into()));
        assert_eq!((&lines[4]["step"], &lines[4]["value"]), (&"throttle".into(), &20.into()));
        assert_eq!((&lines[6]["section"], &lines[8]["left-out"]), (&"uart".into(), &0.into()));
        let times: Vec<_> = lines.iter().map(|line| line["t"].as_u64().unwrap()).collect();
        assert!(times.is_sorted(), "{times:?}");
    }

    #[test]
    fn nobody_waits_for_a_writer_who_does_not_come() {
        let lines = lines(|status| {
            status.advance(crate::status::State::Active).unwrap();
            (0..5000).for_each(|_| status.tell());
            status.end(Ok(()));
        });
        let end = lines.last().unwrap();
        // What came first is there: the rest did not fit, the end of it neither.
        assert_eq!(end["left-out"].as_u64().unwrap() + lines.len() as u64 - 2, 5003, "{end}");
        assert!(lines.len() > 500 && lines.len() < 1100, "{}", lines.len());
    }

    #[test]
    fn the_longer_it_takes_the_less_often() {
        let mut thinning = Thinning::default();
        // A line each millisecond, for three hours.
        let taken = (0..3 * 3_600_000u64).filter(|ms| thinning.takes(ms * 1_000_000)).count();
        assert!((5_000..20_000).contains(&taken), "{taken}");
        let mut thinning = Thinning::default();
        assert!((0..900).all(|n| thinning.takes(n)), "a short one is written whole");
    }

    #[test]
    fn a_file_that_cannot_be_is_refused_by_name() {
        let error = open("/nowhere/at/all").unwrap_err();
        assert_eq!((error.errno(), error.place().option.as_deref()), (libc::ENOENT, Some("trace-file")));
        assert!(error.to_string().contains("trace file '/nowhere/at/all': No such file"), "{error}");
    }
}
