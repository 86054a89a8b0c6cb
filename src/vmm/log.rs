//! Log lines: to the VMM's hook, or to stderr.

use std::fmt::{self, Display, Write as _};
use std::io::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::thread::fence;

/// The longest line, in bytes; names of peers and guests end up in lines.
pub const LINE_MAX: usize = 1024;

const CUT: &str = "...";

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Level {
    /// Something failed.
    Error = 1,
    /// Something is odd, and went on.
    Warning = 2,
    /// What an operator wants to read afterwards.
    Info = 3,
    /// What a developer wants to read.
    Debug = 4,
}

impl Level {
    /// The level of an index into its names, as option `log-level` has it.
    pub fn of(index: u64) -> Option<Self> {
        [Self::Error, Self::Warning, Self::Info, Self::Debug].into_iter().nth(usize::try_from(index).ok()?)
    }

    /// The word on stderr.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

/// Takes finished lines, with their level and target: no control characters, no line end. Any thread; the big lock may
/// be held.
pub type Sink = Box<dyn Fn(Level, &'static str, &str) + Send + Sync>;

/// The log of one guest.
pub struct Log {
    sink: Option<Sink>,
    most: AtomicU32,
}

impl Log {
    /// Lines up to `Info` to `sink`, or to stderr.
    pub fn new(sink: Option<Sink>) -> Self {
        Self { sink, most: AtomicU32::new(Level::Info as u32) }
    }

    /// The least important level that is still written.
    pub fn set_level(&self, most: Level) {
        self.most.store(most as u32, Ordering::Relaxed);
    }

    /// Whether lines of `level` are written, for lines that are costly to make.
    pub fn wants(&self, level: Level) -> bool {
        level as u32 <= self.most.load(Ordering::Relaxed)
    }

    /// The log for lines of one part of the library.
    pub fn to(&self, target: &'static str) -> Target<'_> {
        Target { log: self, target }
    }

    /// Writes one line. Never fails: a log that is gone is no reason to stop a migration.
    fn write(&self, level: Level, target: &'static str, text: impl Display) {
        if !self.wants(level) {
            return;
        }
        let line = line(text);
        match &self.sink {
            Some(sink) => {
                let _ = fence("the log hook", || {
                    sink(level, target, &line);
                    Ok(())
                });
            }
            None => {
                // One write per line, so that lines of several threads and processes do not mix.
                let whole = format!("vmig: {}: {target}: {line}\n", level.name());
                let _ = std::io::stderr().write_all(whole.as_bytes());
            }
        }
    }
}

/// See [`Log::to`].
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    log: &'a Log,
    target: &'static str,
}

impl Target<'_> {
    /// Writes a line at `Error`.
    pub fn error(&self, text: impl Display) {
        self.log.write(Level::Error, self.target, text);
    }

    /// Writes a line at `Warning`.
    pub fn warning(&self, text: impl Display) {
        self.log.write(Level::Warning, self.target, text);
    }

    /// Writes a line at `Info`.
    pub fn info(&self, text: impl Display) {
        self.log.write(Level::Info, self.target, text);
    }

    /// Writes a line at `Debug`.
    pub fn debug(&self, text: impl Display) {
        self.log.write(Level::Debug, self.target, text);
    }
}

impl Default for Log {
    fn default() -> Self {
        Self::new(None)
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("hook", &self.sink.is_some()).finish_non_exhaustive()
    }
}

/// Collects a line up to its limit; what a terminal or a log reader would act on is escaped.
struct Line {
    text: String,
    full: bool,
}

impl fmt::Write for Line {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        for c in part.chars() {
            let acts = c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            let escaped = acts.then(|| c.escape_default().to_string());
            let mut room = [0; 4];
            let piece = escaped.as_deref().unwrap_or_else(|| c.encode_utf8(&mut room));
            if self.text.len() + piece.len() + CUT.len() > LINE_MAX {
                self.full = true;
                // Ends the formatting, so that a huge text costs no more than a line.
                return Err(fmt::Error);
            }
            self.text.push_str(piece);
        }
        Ok(())
    }
}

fn line(text: impl Display) -> String {
    let mut line = Line { text: String::new(), full: false };
    let _ = write!(line, "{text}");
    if line.full {
        line.text.push_str(CUT);
    }
    line.text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn what_a_terminal_acts_on_is_escaped() {
        assert_eq!(line("block 'a\x1b[2J\0b'\n\u{202e}é"), "block 'a\\u{1b}[2J\\u{0}b'\\n\\u{202e}é");
    }

    #[test]
    fn a_line_has_a_limit_and_ends_between_characters() {
        for long in ["é".repeat(5000), "\n".repeat(5000), format!("a{}", "\u{1f600}".repeat(3000))] {
            let line = line(&long);
            assert!(line.len() <= LINE_MAX && line.len() > LINE_MAX - 10 && line.ends_with(CUT), "{}", line.len());
        }
        let fits = "x".repeat(LINE_MAX - CUT.len());
        assert_eq!(line(&fits), fits);
    }

    #[test]
    fn levels_filter_and_a_panicking_sink_is_survived() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&seen);
        let log = Log::new(Some(Box::new(move |level, target, text: &str| {
            into.lock().unwrap().push((level, target, text.to_owned()));
            assert_ne!(text, "boom");
        })));
        log.to("a").debug("no");
        log.set_level(Level::Debug);
        log.to("a").debug("yes");
        log.set_level(Level::Error);
        log.to("b").warning("no");
        log.to("b").error("boom");
        let expected = [(Level::Debug, "a", "yes".to_owned()), (Level::Error, "b", "boom".to_owned())];
        assert_eq!(*seen.lock().unwrap_or_else(|e| e.into_inner()), expected);
    }
}
