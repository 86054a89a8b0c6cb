//! How far a migration is, from what `query-migrate` gives: a bar for a terminal, a line for a file.

use serde_json::Value;

use crate::printer::shown;

const BAR: u64 = 20;

/// What matters of an answer to `query-migrate`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Now {
    /// Empty: there was no migration.
    pub(super) status: String,
    error: Option<String>,
    ram: Option<Ram>,
    total_ms: Option<u64>,
    downtime_ms: Option<u64>,
    expected_ms: Option<u64>,
    throttle: u64,
}

#[derive(Clone, Debug, PartialEq)]
struct Ram {
    total: u64,
    remaining: u64,
    transferred: u64,
    iteration: u64,
    dirty: u64,
    speed: u64,
}

/// Bits of a megabit that make a byte.
const BYTES_PER_MEGABIT: f64 = 125_000.0;

impl Now {
    pub(super) fn of(answer: &Value) -> Self {
        let number = |name: &str| answer[name].as_u64();
        let ram = answer.get("ram").map(|ram| {
            let number = |name: &str| ram[name].as_u64().unwrap_or(0);
            Ram {
                total: number("total"),
                remaining: number("remaining"),
                transferred: number("transferred"),
                iteration: number("dirty-sync-count"),
                dirty: number("dirty-pages-rate").saturating_mul(number("page-size")),
                speed: rate(ram["mbps"].as_f64().unwrap_or(0.0)),
            }
        });
        let text = |name: &str| answer[name].as_str().map(shown);
        Self {
            status: text("status").unwrap_or_default(),
            error: text("error-desc"),
            ram,
            total_ms: number("total-time"),
            downtime_ms: number("downtime"),
            expected_ms: number("expected-downtime"),
            throttle: number("cpu-throttle-percentage").unwrap_or(0),
        }
    }

    /// Whether it goes on.
    pub(super) fn runs(&self) -> bool {
        !matches!(self.status.as_str(), "" | "none" | "completed" | "failed" | "cancelled" | "held")
    }

    /// The round over the dirty pages.
    pub(super) fn iteration(&self) -> u64 {
        self.ram.as_ref().map_or(0, |ram| ram.iteration)
    }

    /// One line for people, while it goes on; with `bar` a picture, too.
    pub(super) fn line(&self, bar: bool) -> String {
        let mut words = vec![self.status.clone()];
        if let Some(ram) = &self.ram {
            let share = done(ram);
            if bar {
                let full = usize::try_from(share * BAR / 100).unwrap_or(0);
                let empty = usize::try_from(BAR).unwrap_or(0).saturating_sub(full);
                words.push(format!("[{}{}]", "#".repeat(full), "-".repeat(empty)));
            }
            words.push(format!("{share}%"));
            words.push(format!("{} of {} left", bytes(ram.remaining), bytes(ram.total)));
            words.push(format!("{:.1} MiB/s", mib(ram.speed)));
            words.push(format!("dirty {:.1} MiB/s", mib(ram.dirty)));
            words.push(format!("iteration {}", ram.iteration));
        }
        if let Some(expected) = self.expected_ms {
            words.push(format!("downtime {expected} ms expected"));
        }
        if self.throttle > 0 {
            words.push(format!("guest slowed by {}%", self.throttle));
        }
        words.extend(self.error.clone());
        words.extend(self.advice().map(str::to_owned));
        words.join("  ")
    }

    /// What a user may do who wonders why it does not go on.
    fn advice(&self) -> Option<&'static str> {
        match self.status.as_str() {
            "pre-switchover" => Some("(migrate-continue state=pre-switchover, or migrate_cancel)"),
            "reconnecting" => Some("(migrate-recover uri=... gives another address)"),
            "held" | "switchover-unknown" => Some("(vmig-resolve decision=run or discard)"),
            _ => None,
        }
    }

    /// How it ended: well, or why not.
    pub(super) fn end(&self) -> Result<String, String> {
        match self.status.as_str() {
            "completed" => {
                let mut words = vec!["completed".to_owned()];
                words.extend(self.total_ms.map(|ms| format!("in {ms} ms")));
                words.extend(self.downtime_ms.map(|ms| format!("downtime {ms} ms")));
                words.extend(self.ram.as_ref().map(|ram| format!("{} sent", bytes(ram.transferred))));
                Ok(words.join("  "))
            }
            "" | "none" => Err("there is no migration".to_owned()),
            status => {
                let advice = self.advice().map(|advice| format!(" {advice}")).unwrap_or_default();
                Err(match &self.error {
                    Some(error) => format!("the migration is {status}: {error}{advice}"),
                    None => format!("the migration is {status}{advice}"),
                })
            }
        }
    }
}

/// Bytes per second. A number that makes no sense is none.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people, and casts saturate")]
fn rate(megabits: f64) -> u64 {
    (megabits * BYTES_PER_MEGABIT) as u64
}

fn done(ram: &Ram) -> u64 {
    let left = ram.remaining.min(ram.total);
    let share = u128::from(ram.total - left) * 100 / u128::from(ram.total.max(1));
    u64::try_from(share).unwrap_or(100)
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{} KiB", count >> 10),
        1_048_576..10_737_418_240 => format!("{} MiB", count >> 20),
        _ => format!("{} GiB", count >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn active() -> Value {
        json!({"status": "active", "total-time": 5, "expected-downtime": 30, "cpu-throttle-percentage": 20,
            "ram": {"total": 1 << 30, "remaining": 256 << 20, "transferred": 1, "dirty-sync-count": 3, "page-size": 4096,
                "dirty-pages-rate": 256, "mbps": 838.8608}})
    }

    #[test]
    fn a_line_has_all_the_numbers() {
        let line = Now::of(&active()).line(true);
        let wanted = "active  [###############-----]  75%  256 MiB of 1024 MiB left  100.0 MiB/s  dirty 1.0 MiB/s  \
                      iteration 3  downtime 30 ms expected  guest slowed by 20%";
        assert_eq!(line, wanted);
        assert!(!Now::of(&active()).line(false).contains('['));
        assert!(Now::of(&active()).runs() && !Now::of(&json!({})).runs());
    }

    #[test]
    fn numbers_that_make_no_sense_do_no_harm() {
        let odd = json!({"status": "act\u{1b}[2Jive", "ram": {"total": 0, "remaining": u64::MAX, "mbps": -1e300,
            "page-size": u64::MAX, "dirty-pages-rate": u64::MAX, "dirty-sync-count": "x"}, "error-desc": 5});
        let line = Now::of(&odd).line(true);
        assert!(line.contains("0%") && !line.contains('\u{1b}'), "{line}");
        assert_eq!(Now::of(&json!([1])), Now::default());
    }

    #[test]
    fn an_end_is_good_or_says_why_not() {
        let end = |answer: Value| Now::of(&answer).end();
        assert_eq!(end(json!({"status": "completed", "total-time": 7})), Ok("completed  in 7 ms".to_owned()));
        assert!(end(json!({"status": "failed", "error-desc": "a leak"})).unwrap_err().ends_with("failed: a leak"));
        assert!(end(json!({"status": "held"})).unwrap_err().contains("vmig-resolve"));
        assert!(end(json!({})).unwrap_err().contains("no migration"));
    }
}
