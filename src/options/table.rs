//! What options there are: each a row with its name, type, range and defaults.

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
    /// QMP has it among the capabilities, not the parameters.
    pub capability: bool,
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
    Dispatch,
    DispatchTimeout,
    AutoConverge,
    ThrottleTrigger,
    ThrottleInitial,
    ThrottleIncrement,
    ThrottleTailslow,
    ThrottleMax,
    DirtyLimit,
    VcpuDirtyLimit,
    DirtyLimitPeriod,
    Ladder,
    LadderDowntimeMax,
    LadderTime,
    ConvergenceRounds,
    ConvergenceTime,
    DirtyTracker,
    AllowFeatures,
    Machine,
    TraceFile,
    LogLevel,
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
    Row { name, kind, default, qemu: default, range, live, capability: false, doc }
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
        capability: true,
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
    Row {
        qemu: 0,
        capability: true,
        ..row(
            "events",
            Type::Bool,
            1,
            BOOL,
            false,
            "Queue events for vmig_next_event, and send MIGRATION and MIGRATION_PASS to QMP clients.",
        )
    },
    Row {
        capability: true,
        ..row(
            "switchover-ack",
            Type::Bool,
            0,
            BOOL,
            false,
            "Stop the guest only after the destination agreed; needs return-path. A destination needs it only when the \
             source is a QEMU.",
        )
    },
    Row {
        qemu: 0,
        capability: true,
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
    Row {
        capability: true,
        ..row(
            "pause-before-switchover",
            Type::Bool,
            0,
            BOOL,
            false,
            "Wait in state pre-switchover, with the guest stopped and still owned here, until vmig_continue.",
        )
    },
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
    row(
        "dispatch",
        Type::Choice(&["auto", "manual"]),
        0,
        (0, 1),
        false,
        "Where the VMM is called back. auto: on whatever thread needs it; manual: for a VMM with one thread, in \
         vmig_dispatch() on the thread that made the handle, which sets this.",
    ),
    row(
        "dispatch-timeout",
        Type::Millis,
        10_000,
        (1, HOUR),
        true,
        "Milliseconds a callback waits for vmig_dispatch(); after them the migration fails, and the guest goes on.",
    ),
    Row {
        capability: true,
        ..row(
            "auto-converge",
            Type::Bool,
            0,
            BOOL,
            false,
            "Slow the guest's vCPUs down, in steps, while it dirties more than is sent; needs the hook throttle or a gate.",
        )
    },
    row(
        "throttle-trigger-threshold",
        Type::Number,
        50,
        (1, 100),
        true,
        "Percent of the bytes sent: a second or more in which the guest dirtied more counts, and every other one is a step.",
    ),
    row(
        "cpu-throttle-initial",
        Type::Number,
        20,
        (1, 99),
        true,
        "Percent of the time the vCPUs stand still at first.",
    ),
    row("cpu-throttle-increment", Type::Number, 10, (1, 99), true, "Percent more with each further step."),
    row(
        "cpu-throttle-tailslow",
        Type::Bool,
        0,
        BOOL,
        true,
        "The last steps are smaller: the guest is slowed down no further than it seems to need.",
    ),
    row(
        "max-cpu-throttle",
        Type::Number,
        99,
        (1, 99),
        true,
        "Percent of the time the vCPUs stand still at most; the first step is taken whole.",
    ),
    Row {
        capability: true,
        ..row(
            "dirty-limit",
            Type::Bool,
            0,
            BOOL,
            false,
            "Limit how fast each vCPU dirties memory once the guest dirties more than is sent (throttle-trigger-threshold); \
             vCPUs below the limit are not slowed down. Needs KVM's dirty rings.",
        )
    },
    Row {
        qemu: 1,
        ..row(
            "vcpu-dirty-limit",
            Type::Number,
            0,
            (0, 1 << 40),
            true,
            "Megabytes (2^20 bytes) per second that each vCPU may dirty then; 0 = its share of throttle-trigger-threshold \
             percent of what is sent.",
        )
    },
    row(
        "x-vcpu-dirty-limit-period",
        Type::Millis,
        1000,
        (1, 1000),
        false,
        "Milliseconds over which each vCPU's dirty rate is measured while a migration runs.",
    ),
    row(
        "ladder",
        Type::Bool,
        0,
        BOOL,
        false,
        "Do what helps with a guest that does not converge, step by step: allow a longer downtime if one would do, else \
         slow the guest down (by dirty limits where KVM's dirty rings are in use, by the throttle hook or a gate \
         elsewhere), and fail when nothing is left. Instead of auto-converge and dirty-limit. docs/convergence.md.",
    ),
    row(
        "ladder-downtime-max",
        Type::Millis,
        2_000,
        (0, 2_000_000),
        true,
        "Milliseconds that the ladder may allow the guest to stand still; each of its steps doubles downtime-limit.",
    ),
    row(
        "ladder-time",
        Type::Millis,
        300_000,
        (0, 24 * HOUR),
        true,
        "Milliseconds from the ladder's first step after which the migration fails if the guest still does not converge; \
         0 = when no step is left.",
    ),
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
    row(
        "dirty-tracker",
        Type::Choice(&["auto", "kvm-log", "kvm-ring", "write-protect", "callback", "none"]),
        0,
        (0, 5),
        false,
        "Who finds the pages that the guest writes while it is copied. auto: KVM (its log, or its ring where the VMM enabled \
         that) for what its slots show, the VMM where it says that it reports all writes, the kernel's write protection for \
         the rest. callback: the VMM alone, by vmig_dirty and dirty sources. none: nobody, so the guest is stopped before \
         its memory is sent. docs/dirty-tracking.md.",
    ),
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
        "trace-file",
        Type::Text,
        0,
        ANY,
        false,
        "File to which everything that happens in a migration is appended, a JSON object to a line, on either side; none = \
         no such file. `vmig report` draws it (docs/tool.md).",
    ),
    row(
        "log-level",
        Type::Choice(&["error", "warning", "info", "debug"]),
        2,
        (0, 3),
        true,
        "The least important lines that are still given to the log hook, or written to stderr.",
    ),
    row(
        "defaults",
        Type::Choice(&["vmig", "qemu"]),
        0,
        (0, 1),
        false,
        "Setting it puts every option back to that default.",
    ),
];
