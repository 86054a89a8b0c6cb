//! Numbers in Prometheus' text format, as `vmig_metrics` returns them. Names and units follow its conventions: seconds,
//! bytes, `_total` for what only grows.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use crate::bql::BqlStats;
use crate::error::{Error, Result};
use crate::pacing::downtime::{Downtime, Parts};
use crate::status::watch::Tally;
use crate::status::{STATES, Side, Snapshot};

/// Longest list of labels a caller may give.
const LABELS_MAX: usize = 4096;

/// What is told, at one moment.
#[derive(Debug)]
pub struct Numbers {
    /// The present or last migration.
    pub now: Snapshot,
    /// Its blackout, or that of an earlier one.
    pub downtime: Downtime,
    /// How migrations ended.
    pub tally: Tally,
    /// What the big lock cost.
    pub bql: BqlStats,
    /// The library's threads.
    pub threads: usize,
}

/// Labels that stand in every line, such as `vm="web1"`; checked.
#[derive(Debug, Default)]
pub struct Labels<'a>(&'a str);

impl<'a> Labels<'a> {
    /// Takes `name="value",name="value"`; in values backslash, quote and line end stand as \\, \" and \n.
    pub fn new(text: &'a str) -> Result<Self> {
        let wrong = || {
            let shown: String = text.chars().take(80).collect();
            let shown = shown.escape_default();
            Error::invalid(format!(
                "labels are name=\"value\" with commas between, at most {LABELS_MAX} bytes, not '{shown}'"
            ))
        };
        let mut rest = text;
        if text.len() > LABELS_MAX {
            return Err(wrong());
        }
        while !rest.is_empty() {
            rest = label(rest).ok_or_else(wrong)?;
            rest = match rest.strip_prefix(',') {
                Some("") => return Err(wrong()),
                Some(more) => more,
                None if rest.is_empty() => rest,
                None => return Err(wrong()),
            };
        }
        Ok(Self(text))
    }
}

/// What follows the label that `text` begins with.
fn label(text: &str) -> Option<&str> {
    let (name, rest) = text.split_once("=\"")?;
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    let good = name.starts_with(first) && name.chars().all(|c| first(c) || c.is_ascii_digit());
    // Ours, and what Prometheus keeps for itself.
    if !good || name.starts_with("__") || OURS.contains(&name) {
        return None;
    }
    let mut chars = rest.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some(&rest[at + 1..]),
            '\\' if !matches!(chars.next(), Some((_, '\\' | '"' | 'n'))) => return None,
            c if c.is_control() => return None,
            _ => (),
        }
    }
    None
}

/// Names of labels that the library gives.
const OURS: [&str; 6] = ["state", "side", "part", "outcome", "kind", "version"];

/// A line: its label of ours, and its value.
type Row<'a> = (Option<(&'a str, &'a str)>, &'a dyn Display);

struct Text<'a> {
    out: String,
    labels: &'a str,
}

impl Text<'_> {
    /// A metric: what it is, and its lines, each with one label of ours or none.
    fn metric(&mut self, name: &str, kind: &str, help: &str, lines: &[Row<'_>]) {
        // Writing into a String cannot fail.
        let _ = writeln!(self.out, "# HELP vmig_{name} {help}\n# TYPE vmig_{name} {kind}");
        for (own, value) in lines {
            let own = own.map(|(label, value)| format!("{label}=\"{value}\"")).unwrap_or_default();
            let comma = if own.is_empty() || self.labels.is_empty() { "" } else { "," };
            let labels = format!("{}{comma}{own}", self.labels);
            let _ = match labels.is_empty() {
                true => writeln!(self.out, "vmig_{name} {value}"),
                false => writeln!(self.out, "vmig_{name}{{{labels}}} {value}"),
            };
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.metric(name, "gauge", help, &[(None, &value)]);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.metric(name, "counter", help, &[(None, &value)]);
    }

    fn parts(&mut self, name: &str, help: &str, parts: &Parts) {
        let all = [
            ("stop", parts.stop),
            ("devices", parts.devices),
            ("sync", parts.sync),
            ("ram", parts.ram),
            ("load", parts.load),
            ("start", parts.start),
            ("go", parts.go),
            ("verify", parts.verify),
        ];
        let seconds = all.map(|(part, time)| (part, time.as_secs_f64()));
        let lines: Vec<_> =
            seconds.iter().map(|(part, time)| (Some(("part", *part)), time as &dyn Display)).collect();
        self.metric(name, "gauge", help, &lines);
    }
}

fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

/// All of it.
pub fn text(numbers: &Numbers, labels: &Labels<'_>) -> String {
    let Numbers { now, downtime, tally, bql, threads } = numbers;
    let mut t = Text { out: String::new(), labels: labels.0 };
    t.metric("info", "gauge", "The library.", &[(Some(("version", env!("CARGO_PKG_VERSION"))), &1)]);
    let states = STATES.map(|state| (state.name(), u8::from(state == now.state)));
    let lines: Vec<_> = states.iter().map(|(state, on)| (Some(("state", *state)), on as &dyn Display)).collect();
    t.metric("migration_state", "gauge", "1 for the state of the present or last migration.", &lines);
    let sides = [Side::Source, Side::Destination].map(|side| (side.name(), u8::from(now.side == Some(side))));
    let lines: Vec<_> = sides.iter().map(|(side, on)| (Some(("side", *side)), on as &dyn Display)).collect();
    t.metric("migration_side", "gauge", "1 for the side of the guest that this is.", &lines);
    t.gauge("migration_iteration", "Round over the dirty pages.", now.iteration);
    t.gauge("migration_memory_bytes", "Guest RAM that migrates.", now.total);
    t.gauge("migration_remaining_bytes", "Guest RAM that is left to send.", now.remaining);
    t.gauge("migration_transferred_bytes", "Bytes sent or received.", now.transferred);
    let pages: [Row<'_>; 2] =
        [(Some(("kind", "normal")), &now.normal_pages), (Some(("kind", "zero")), &now.zero_pages)];
    t.metric("migration_pages", "gauge", "Pages sent or received, whole or as zero.", &pages);
    t.gauge(
        "migration_dirty_bytes_per_second",
        "How fast the guest dirtied pages in the last round.",
        now.dirty_rate,
    );
    t.gauge("migration_bandwidth_bytes_per_second", "How fast bytes went in the last 100 ms.", now.bandwidth);
    t.gauge("migration_elapsed_seconds", "Since the migration was started.", seconds(now.elapsed));
    t.gauge("migration_setup_seconds", "Until data began to move.", seconds(now.setup));
    let expected = "How long the guest would stand still if it were stopped now.";
    t.gauge("migration_expected_downtime_seconds", expected, seconds(now.expected_downtime));
    match now.eta {
        u64::MAX => t.gauge("migration_eta_seconds", "Until completion at the present rates.", "+Inf"),
        eta => t.gauge("migration_eta_seconds", "Until completion at the present rates.", seconds(eta)),
    }
    t.gauge("blackout_seconds", "How long the guest last stood still here.", downtime.total.as_secs_f64());
    t.parts("blackout_part_seconds", "What that was made of.", &downtime.actual);
    t.parts("blackout_predicted_part_seconds", "What had been predicted just before.", &downtime.expected);
    let outcomes: [Row<'_>; 3] = [
        (Some(("outcome", "completed")), &tally.completed),
        (Some(("outcome", "failed")), &tally.failed),
        (Some(("outcome", "cancelled")), &tally.cancelled),
    ];
    t.metric("migrations_total", "counter", "Migrations that ended, and how.", &outcomes);
    t.counter("big_lock_acquisitions_total", "Times the big lock was taken.", bql.acquisitions);
    t.counter("big_lock_contended_total", "Times it was not free.", bql.contended);
    t.counter("big_lock_wait_seconds_total", "Time spent waiting for it.", seconds(bql.wait_total_ns));
    t.counter("big_lock_hold_seconds_total", "Time it was held.", seconds(bql.hold_total_ns));
    t.gauge("big_lock_wait_max_seconds", "Longest wait for it.", seconds(bql.wait_max_ns));
    t.gauge("big_lock_hold_max_seconds", "Longest time it was held.", seconds(bql.hold_max_ns));
    t.gauge("threads", "Threads of the library that run for the guest.", threads);
    t.out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_checked() {
        for good in ["", "vm=\"web1\"", "_a=\"\",b2=\"x=,{}\"", r#"a="\\\"\n""#, "vm=\"é\""] {
            Labels::new(good).unwrap_or_else(|e| panic!("{good}: {e}"));
        }
        let long = format!("a=\"{}\"", "x".repeat(LABELS_MAX));
        let bad =
            ["vm", "vm=web1", "vm=\"web1", "=\"a\"", "1a=\"\"", "a-b=\"\"", "a=\"\",", ",a=\"\"", "a=\"\"b=\"\""];
        for bad in bad.into_iter().chain([r#"a="\x""#, "a=\"\n\"", "a=\"\\", "__a=\"\"", "state=\"\"", &long]) {
            assert_eq!(Labels::new(bad).unwrap_err().errno(), libc::EINVAL, "{bad}");
        }
    }
}
