//! The one table of options: parameters and capabilities, with QEMU's names, types and ranges where QEMU has them.
//!
//! The table feeds `vmig_set`/`vmig_get` (and whatever else speaks of options). A migration takes a copy when it
//! starts; options marked live are looked up while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::thread::lock;

/// What an option holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// `on`/`off` (also true/false, yes/no, 1/0).
    Bool,
    /// Bytes (or bytes per second), with an optional suffix K, M, G, T (powers of 1024).
    Size,
    /// A plain number.
    Number,
    /// A number of milliseconds.
    Millis,
    /// One of a few words; the value is its index.
    Choice(&'static [&'static str]),
    /// A text, kept beside the table.
    Text,
}

/// One row of the table.
#[derive(Debug)]
pub struct Row {
    /// Kebab-case name.
    pub name: &'static str,
    /// Type.
    pub kind: Type,
    /// Our default.
    pub default: u64,
    /// QEMU's default, used by `defaults=qemu`; the same number where QEMU has no such option.
    pub qemu: u64,
    /// Smallest and largest value.
    pub range: (u64, u64),
    /// May change while a migration runs.
    pub live: bool,
    /// One sentence.
    pub doc: &'static str,
}

/// An option by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
#[expect(missing_docs, reason = "each variant is a row of TABLE, which documents it")]
pub enum Opt {
    MaxBandwidth,
    AvailSwitchoverBandwidth,
    DowntimeLimit,
    ReturnPath,
    Events,
    SwitchoverAck,
    Multifd,
    MultifdChannels,
    MultifdFlushAfterEachSection,
    ZeroPageDetection,
    Autostart,
    Peer,
    HandOver,
    Checksum,
    Verify,
    ConnectTimeout,
    TotalTimeout,
    StallTimeout,
    StopTimeout,
    SwitchoverTimeout,
    ResumeTimeout,
    PauseBeforeSwitchover,
    Epoch,
    WorkerNice,
    ConvergenceRounds,
    ConvergenceTime,
    AllowFeatures,
    Machine,
    Defaults,
}

impl Opt {
    /// Its name.
    pub const fn name(self) -> &'static str {
        TABLE[self as usize].name
    }
}

const ANY: (u64, u64) = (0, u64::MAX);
const BOOL: (u64, u64) = (0, 1);
const HOUR: u64 = 3_600_000;

const fn row(name: &'static str, kind: Type, default: u64, range: (u64, u64), live: bool, doc: &'static str) -> Row {
    Row { name, kind, default, qemu: default, range, live, doc }
}

/// Every option, in the order of [`Opt`].
pub static TABLE: [Row; Opt::Defaults as usize + 1] = [
    Row {
        qemu: 128 << 20,
        ..row(
            "max-bandwidth",
            Type::Size,
            0,
            ANY,
            true,
            "Bytes per second at most while the guest runs; 0 = no limit. QEMU's default is 128M, from the days of \
             gigabit networks.",
        )
    },
    row(
        "avail-switchover-bandwidth",
        Type::Size,
        0,
        ANY,
        true,
        "Bytes per second to expect at the switchover; 0 = what was measured.",
    ),
    row(
        "downtime-limit",
        Type::Millis,
        300,
        (0, 2_000_000),
        true,
        "The guest is stopped only when what is left should take at most this many milliseconds.",
    ),
    Row {
        qemu: 0,
        ..row(
            "return-path",
            Type::Bool,
            1,
            BOOL,
            false,
            "Let the destination answer. On by default: without it success means only that all bytes were written. A \
         command (exec:) is taken for a destination that answers only where this was switched on by name.",
        )
    },
    Row { qemu: 0, ..row("events", Type::Bool, 1, BOOL, false, "Queue events for vmig_next_event.") },
    row(
        "switchover-ack",
        Type::Bool,
        0,
        BOOL,
        false,
        "Stop the guest only after the destination agreed; needs return-path. A destination needs it only when the \
         source is a QEMU.",
    ),
    Row {
        qemu: 0,
        ..row(
            "multifd",
            Type::Bool,
            1,
            BOOL,
            false,
            "Send pages over connections of their own (tcp and unix). Between two vmigs it is on and the destination \
             follows the source; with a QEMU it is on only if set by name, alike on both sides and before they connect.",
        )
    },
    Row {
        qemu: 2,
        ..row(
            "multifd-channels",
            Type::Number,
            0,
            (0, 64),
            false,
            "Number of these connections; 0 = as many as there are processors, at most 4. One is as good as many where \
             a single connection fills the link.",
        )
    },
    row(
        "multifd-flush-after-each-section",
        Type::Bool,
        0,
        BOOL,
        false,
        "All connections meet at the end of every section instead of once a round, as QEMU did for machines before 8.1.",
    ),
    row(
        "zero-page-detection",
        Type::Choice(&["none", "legacy", "multifd"]),
        2,
        (0, 2),
        false,
        "Who looks for pages full of zeros, which travel as a few bytes: the parallel connections' threads, the \
         migration thread (legacy), or nobody.",
    ),
    row(
        "autostart",
        Type::Bool,
        1,
        BOOL,
        false,
        "Start the guest when it has arrived (unless it was paused); off: it waits for vmig_start.",
    ),
    row(
        "peer",
        Type::Choice(&["vmig", "qemu"]),
        0,
        (0, 1),
        false,
        "Who listens at the destination of an outgoing migration. vmig: both sides compare what they have before the \
         guest is touched; qemu: QEMU's own rules.",
    ),
    row(
        "hand-over",
        Type::Bool,
        0,
        BOOL,
        false,
        "Hand guest memory over to another process of this host instead of copying it: RAM blocks registered with \
         VMIG_RAM_FD go by their file, over a unix socket. On at both sides or at neither; needs return-path.",
    ),
    row(
        "checksum",
        Type::Choice(&["none", "crc32c"]),
        0,
        (0, 1),
        false,
        "Checksums over everything that travels between two vmigs: what arrives other than it was sent fails the attempt. \
         The source decides; a destination where it is set refuses a source where it is not. TLS has its own.",
    ),
    row(
        "verify",
        Type::Bool,
        0,
        BOOL,
        false,
        "With the guest stopped, hash all its memory and devices on both sides of a migration between two vmigs and compare, \
         and hash the source's memory once more before the guest may run elsewhere; the first page that differs is named, \
         and the guest stays. The guest stands still meanwhile, some 0.1 s a GiB and processor each time, which is \
         predicted and counts, but half of downtime-limit is always for pages. The source decides; a destination where it is set refuses a source where it is not. Devices with a \
         table are saved again at the destination, which calls their hooks. Needs return-path.",
    ),
    row(
        "connect-timeout",
        Type::Millis,
        10_000,
        (1, HOUR),
        false,
        "Milliseconds a source waits for its connection and then for a vmig's answer to its hello, together; and a \
         destination for the parallel connections that it was told of.",
    ),
    row(
        "total-timeout",
        Type::Millis,
        0,
        (0, 24 * HOUR),
        false,
        "Milliseconds from vmig_outgoing to the decision to stop the guest; after them the attempt fails, and the guest \
         runs on. 0 = no limit.",
    ),
    row(
        "stall-timeout",
        Type::Millis,
        30_000,
        (1, HOUR),
        false,
        "Milliseconds without a byte from or to the peer after which it counts as lost.",
    ),
    row(
        "stop-timeout",
        Type::Millis,
        5_000,
        (1, HOUR),
        false,
        "Milliseconds the vCPUs have to leave the guest after the stop hook returned.",
    ),
    row(
        "switchover-timeout",
        Type::Millis,
        30_000,
        (1, HOUR),
        false,
        "Milliseconds for each wait of the switchover between two vmigs: for READY and for OWNED, for an answer to a \
         repeated GO before the fence hook is asked, for GO at the destination before it refuses the guest, for a \
         reacquire or release hook that fails to succeed.",
    ),
    row(
        "resume-timeout",
        Type::Millis,
        0,
        (0, HOUR),
        false,
        "Milliseconds both sides keep what they have when a connection between two vmigs breaks before GO: the guest runs \
         at the source, which reconnects and sends only what the destination did not acknowledge; after them the attempt \
         fails. Set at the source; needs return-path, and a destination that listens. 0 = the attempt fails at once.",
    ),
    row(
        "pause-before-switchover",
        Type::Bool,
        0,
        BOOL,
        false,
        "Wait in state pre-switchover, with the guest stopped and still owned here, until vmig_continue.",
    ),
    row(
        "epoch",
        Type::Number,
        1,
        (1, 1 << 62),
        false,
        "The epoch the guest is owned with here, which the hooks are told; it grows by itself whenever the guest moves. \
         Set it, before the first migration, for a guest whose locks remember higher ones.",
    ),
    Row {
        qemu: 0,
        ..row(
            "worker-nice",
            Type::Number,
            10,
            (0, 19),
            false,
            "Nice value, relative to the VMM's, of the threads that move and prepare pages (channels, populating), so \
             that vCPUs on busy processors come first; see nice(2).",
        )
    },
    Row {
        qemu: 0,
        ..row(
            "convergence-rounds",
            Type::Number,
            8,
            (0, 1000),
            true,
            "Further rounds at most, beyond the first moment the guest might be stopped, while each shrinks what is left \
             by a tenth; 0 = stop at the first moment, as QEMU does.",
        )
    },
    row("convergence-time", Type::Millis, 2_000, (0, HOUR), true, "Milliseconds at most for these further rounds."),
    // Text options keep their value beside the table.
    row(
        "allow-features",
        Type::Text,
        0,
        ANY,
        false,
        "At the destination: what a source may ask for: all, none, or names with commas between (multifd, hand-over, \
         device-fds, zero-runs, crc32c, switchover, verify, resume). A source that needs another feature is refused, and the \
         feature named.",
    ),
    row("machine", Type::Text, 0, ANY, false, "Machine name in the stream; the same on both sides. Default none."),
    row(
        "defaults",
        Type::Choice(&["vmig", "qemu"]),
        0,
        (0, 1),
        false,
        "Setting it puts every option back to that default.",
    ),
];

/// The values of one guest.
#[derive(Debug)]
pub struct Options {
    values: [AtomicU64; TABLE.len()],
    /// Bit n: option n was set by name, and not put back by `defaults`.
    set: AtomicU64,
    machine: std::sync::Mutex<String>,
    allow_features: std::sync::Mutex<String>,
}

impl Default for Options {
    fn default() -> Self {
        let values = std::array::from_fn(|i| AtomicU64::new(TABLE[i].default));
        let (machine, allow_features) = (default_text(Opt::Machine), default_text(Opt::AllowFeatures));
        Self { values, set: AtomicU64::new(0), machine, allow_features }
    }
}

impl Options {
    /// A copy for one migration.
    pub fn snapshot(&self) -> Self {
        let values = std::array::from_fn(|i| AtomicU64::new(self.values[i].load(Ordering::Acquire)));
        let set = AtomicU64::new(self.set.load(Ordering::Acquire));
        let text = |text: &std::sync::Mutex<String>| std::sync::Mutex::new(lock(text).clone());
        Self { values, set, machine: text(&self.machine), allow_features: text(&self.allow_features) }
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
        let value = parse(row, text)?;
        if row.name == "defaults" {
            for (slot, row) in self.values.iter().zip(&TABLE) {
                slot.store(if value == 1 { row.qemu } else { row.default }, Ordering::Release);
            }
            *lock(&self.allow_features) = "all".to_owned();
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

fn default_text(option: Opt) -> std::sync::Mutex<String> {
    std::sync::Mutex::new(if option == Opt::Machine { "none" } else { "all" }.to_owned())
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
