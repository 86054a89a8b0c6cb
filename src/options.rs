//! The one table of options: parameters and capabilities, with QEMU's names, types and ranges where QEMU has them.
//!
//! The table feeds `vmig_set`/`vmig_get` (and whatever else speaks of options). A migration takes a copy when it
//! starts; options marked live are looked up while it runs.

mod table;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::thread::lock;
pub use table::{Opt, Row, TABLE, Type};

/// The values of one guest.
#[derive(Debug)]
pub struct Options {
    values: [AtomicU64; TABLE.len()],
    /// Bit n: option n was set by name, and not put back by `defaults`.
    set: AtomicU64,
    machine: std::sync::Mutex<String>,
    allow_features: std::sync::Mutex<String>,
    trace_file: std::sync::Mutex<String>,
}

impl Default for Options {
    fn default() -> Self {
        let values = std::array::from_fn(|i| AtomicU64::new(TABLE[i].default));
        let [machine, allow_features, trace_file] =
            [Opt::Machine, Opt::AllowFeatures, Opt::TraceFile].map(default_text);
        Self { values, set: AtomicU64::new(0), machine, allow_features, trace_file }
    }
}

impl Options {
    /// A copy for one migration.
    pub fn snapshot(&self) -> Self {
        let values = std::array::from_fn(|i| AtomicU64::new(self.values[i].load(Ordering::Acquire)));
        let set = AtomicU64::new(self.set.load(Ordering::Acquire));
        let text = |text: &std::sync::Mutex<String>| std::sync::Mutex::new(lock(text).clone());
        let [machine, allow_features, trace_file] = [&self.machine, &self.allow_features, &self.trace_file].map(text);
        Self { values, set, machine, allow_features, trace_file }
    }

    /// An option's number.
    pub fn get(&self, option: Opt) -> u64 {
        self.values[option as usize].load(Ordering::Acquire)
    }

    /// Whether an option was set by name.
    pub fn is_set(&self, option: Opt) -> bool {
        self.set.load(Ordering::Acquire) >> option as usize & 1 != 0
    }

    /// An on/off option.
    pub fn on(&self, option: Opt) -> bool {
        self.get(option) != 0
    }

    /// A time option.
    pub fn time(&self, option: Opt) -> std::time::Duration {
        std::time::Duration::from_millis(self.get(option))
    }

    /// See `worker-nice`.
    pub fn nice(&self) -> i32 {
        i32::try_from(self.get(Opt::WorkerNice)).unwrap_or(0)
    }

    /// Threads for work that can be divided, where no option says otherwise.
    pub fn threads() -> usize {
        const MOST: usize = 4;
        std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST))
    }

    /// Connections for pages: 0 = the plain stream.
    pub fn channels(&self) -> u8 {
        if !self.on(Opt::Multifd) {
            return 0;
        }
        match self.get(Opt::MultifdChannels) {
            0 => u8::try_from(Self::threads()).unwrap_or(1),
            n => u8::try_from(n).unwrap_or(u8::MAX),
        }
    }

    /// The machine name.
    pub fn machine(&self) -> String {
        lock(&self.machine).clone()
    }

    /// Where migrations are traced to, if anywhere.
    pub fn trace_file(&self) -> Option<String> {
        let path = lock(&self.trace_file).clone();
        (path != NO_FILE).then_some(path)
    }

    /// Whether a source may ask for this feature.
    pub fn allows(&self, feature: &str) -> bool {
        let allowed = lock(&self.allow_features);
        *allowed == "all" || allowed.split(',').any(|name| name.trim() == feature)
    }

    /// Connections for pages that a destination takes at most: what was set there by name.
    pub fn channels_allowed(&self) -> u8 {
        match (self.on(Opt::Multifd), self.get(Opt::MultifdChannels)) {
            (false, _) if self.is_set(Opt::Multifd) => 0,
            (_, 0) => u8::MAX,
            (_, most) => u8::try_from(most).unwrap_or(u8::MAX),
        }
    }

    /// Sets an option from text. `busy`: a migration runs, so only live options may change.
    pub fn set_text(&self, name: &str, text: &str, busy: bool) -> Result<()> {
        let (index, row) = find(name)?;
        if busy && !row.live {
            return Err(Error::new(
                libc::EBUSY,
                format!("option '{name}' cannot change while a migration runs; set it before"),
            ));
        }
        if row.name == "machine" {
            if text.is_empty() || text.len() > 255 || !text.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(Error::invalid("option 'machine' takes 1 to 255 printable ASCII characters"));
            }
            *lock(&self.machine) = text.to_owned();
            return Ok(());
        }
        if row.name == "allow-features" {
            check_features(text)?;
            *lock(&self.allow_features) = text.to_owned();
            return Ok(());
        }
        if row.name == "trace-file" {
            if text.is_empty() || text.len() > PATH_MAX || text.contains('\0') {
                return Err(Error::invalid(format!(
                    "option 'trace-file' takes a path of 1 to {PATH_MAX} bytes, or none"
                )));
            }
            *lock(&self.trace_file) = text.to_owned();
            return Ok(());
        }
        let value = parse(row, text)?;
        if row.name == "defaults" {
            for (slot, row) in self.values.iter().zip(&TABLE) {
                slot.store(if value == 1 { row.qemu } else { row.default }, Ordering::Release);
            }
            let first = Self::default();
            for (text, first) in [
                (&self.allow_features, &first.allow_features),
                (&self.trace_file, &first.trace_file),
                (&self.machine, &first.machine),
            ] {
                *lock(text) = lock(first).clone();
            }
        }
        self.values[index].store(value, Ordering::Release);
        match row.name {
            "defaults" => self.set.store(0, Ordering::Release),
            _ => drop(self.set.fetch_or(1 << index, Ordering::AcqRel)),
        }
        Ok(())
    }

    /// An option as text that [`set_text`](Self::set_text) takes.
    pub fn get_text(&self, name: &str) -> Result<String> {
        let (index, row) = find(name)?;
        let value = self.values[index].load(Ordering::Acquire);
        Ok(match row.kind {
            Type::Text if row.name == "machine" => self.machine(),
            Type::Text if row.name == "trace-file" => lock(&self.trace_file).clone(),
            Type::Text => lock(&self.allow_features).clone(),
            Type::Bool => (if value == 0 { "off" } else { "on" }).to_owned(),
            Type::Choice(words) => {
                usize::try_from(value).ok().and_then(|i| words.get(i)).copied().unwrap_or_default().to_owned()
            }
            Type::Size | Type::Millis | Type::Number => value.to_string(),
        })
    }
}

/// The names that option `allow-features` knows.
pub const FEATURES: [&str; 8] =
    ["multifd", "hand-over", "device-fds", "zero-runs", "crc32c", "switchover", "verify", "resume"];

/// A path that is none.
const NO_FILE: &str = "none";
/// Longest path.
const PATH_MAX: usize = 4096;

fn default_text(option: Opt) -> std::sync::Mutex<String> {
    std::sync::Mutex::new(if option == Opt::AllowFeatures { "all" } else { NO_FILE }.to_owned())
}

fn check_features(text: &str) -> Result<()> {
    if matches!(text, "all" | "none") {
        return Ok(());
    }
    match text.split(',').map(str::trim).find(|name| !FEATURES.contains(name)) {
        None => Ok(()),
        Some(name) => {
            let known = FEATURES.join(", ");
            let text = format!(
                "option 'allow-features' takes all, none, or some of {known}, not '{}'",
                name.escape_default()
            );
            Err(Error::invalid(text))
        }
    }
}

fn find(name: &str) -> Result<(usize, &'static Row)> {
    TABLE
        .iter()
        .enumerate()
        .find(|(_, row)| row.name == name)
        .ok_or_else(|| Error::new(libc::ENOENT, format!("there is no option '{}'", name.escape_default())))
}

fn parse(row: &Row, text: &str) -> Result<u64> {
    let (min, max) = row.range;
    let wrong =
        |what: &str| Error::invalid(format!("option '{}' takes {what}, not '{}'", row.name, text.escape_default()));
    let value = match row.kind {
        Type::Bool => match text {
            "on" | "true" | "yes" | "1" => 1,
            "off" | "false" | "no" | "0" => 0,
            _ => return Err(wrong("on or off")),
        },
        Type::Choice(words) => {
            let index = words.iter().position(|w| *w == text);
            index.ok_or_else(|| wrong(&format!("one of {}", words.join(", "))))? as u64
        }
        Type::Text => return Err(wrong("a text")),
        Type::Number => text.parse().map_err(|_| wrong("a whole number"))?,
        Type::Millis => text.parse().map_err(|_| wrong("a whole number of milliseconds"))?,
        Type::Size => size(text).ok_or_else(|| wrong("a whole number, with K, M, G or T behind it if you like"))?,
    };
    if value < min || value > max {
        return Err(wrong(&format!("a value between {min} and {max}")));
    }
    Ok(value)
}

/// A number of bytes with an optional suffix.
/// A number of bytes with an optional suffix.
pub fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        b't' | b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        let last = TABLE[Opt::Defaults as usize].name;
        assert_eq!((last, Opt::Defaults as usize + 1), ("defaults", TABLE.len()));
        assert_eq!(TABLE[Opt::DowntimeLimit as usize].name, "downtime-limit");
        assert_eq!(TABLE[Opt::StopTimeout as usize].name, "stop-timeout");
        assert_eq!(TABLE[Opt::Machine as usize].name, "machine");
    }

    #[test]
    fn what_get_returns_set_takes() {
        let options = Options::default();
        for row in &TABLE {
            let text = options.get_text(row.name).unwrap();
            options.set_text(row.name, &text, false).unwrap();
            assert_eq!(options.get_text(row.name).unwrap(), text, "{}", row.name);
        }
    }

    #[test]
    fn values_are_checked() {
        let options = Options::default();
        options.set_text("max-bandwidth", "10G", false).unwrap();
        assert_eq!(options.get(Opt::MaxBandwidth), 10 << 30);
        for (name, text) in [
            ("max-bandwidth", "-1"),
            ("max-bandwidth", "+1"),
            ("max-bandwidth", ""),
            ("max-bandwidth", "99999999999T"),
            ("downtime-limit", "2000001"),
            ("downtime-limit", "3 "),
            ("return-path", "maybe"),
            ("peer", "xen"),
            ("machine", ""),
            ("machine", "a b"),
            ("allow-features", ""),
            ("allow-features", "multifd,warp"),
        ] {
            let error = options.set_text(name, text, false).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{name}={text}: {error}");
        }
        assert_eq!(options.set_text("colour", "red", false).unwrap_err().errno(), libc::ENOENT);
    }

    #[test]
    fn features_are_allowed_by_name() {
        let options = Options::default();
        let allowed = || FEATURES.map(|name| options.allows(name));
        assert_eq!(allowed(), [true; FEATURES.len()]);
        options.set_text("allow-features", "multifd, zero-runs", false).unwrap();
        assert_eq!(allowed(), [true, false, false, true, false, false, false, false]);
        assert_eq!(options.snapshot().get_text("allow-features").unwrap(), "multifd, zero-runs");
        options.set_text("allow-features", "none", false).unwrap();
        assert_eq!(allowed(), [false; FEATURES.len()]);
        options.set_text("defaults", "vmig", false).unwrap();
        assert_eq!(allowed(), [true; FEATURES.len()]);
    }

    #[test]
    fn a_destination_takes_what_was_set_by_name() {
        let options = Options::default();
        assert_eq!(options.channels_allowed(), u8::MAX);
        options.set_text("multifd-channels", "3", false).unwrap();
        assert_eq!(options.channels_allowed(), 3);
        options.set_text("multifd", "off", false).unwrap();
        assert_eq!(options.channels_allowed(), 0);
    }

    #[test]
    fn only_live_options_change_while_a_migration_runs() {
        let options = Options::default();
        options.set_text("max-bandwidth", "1M", true).unwrap();
        assert_eq!(options.set_text("peer", "qemu", true).unwrap_err().errno(), libc::EBUSY);
    }

    #[test]
    fn defaults_of_qemu() {
        let options = Options::default();
        options.set_text("defaults", "qemu", false).unwrap();
        assert_eq!((options.get(Opt::MaxBandwidth), options.on(Opt::ReturnPath)), (128 << 20, false));
        options.set_text("defaults", "vmig", false).unwrap();
        assert_eq!((options.get(Opt::MaxBandwidth), options.on(Opt::ReturnPath)), (0, true));
    }
}
