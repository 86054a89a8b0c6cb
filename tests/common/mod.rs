//! What every test file shares: where things are, skips that are counted, the seed, running programs.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

pub mod hostile;
pub mod source;

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicUsize, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

/// The project's own directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo and make put what they build.
pub fn target() -> PathBuf {
    let exe = env::current_exe().unwrap();
    // <target>/<profile>/deps/<test>: three up.
    exe.ancestors().nth(3).unwrap().to_path_buf()
}

/// A new directory for files a test makes; tests/run removes them all before it starts.
pub fn scratch(name: &str) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = target().join("scratch").join(format!("{name}-{}-{count}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A C program built by make; the build under AddressSanitizer when VMIG_ASAN is 1.
pub fn c_program(name: &str) -> PathBuf {
    let dir = if env::var("VMIG_ASAN").is_ok_and(|v| v == "1") { "c-asan" } else { "c" };
    built(&format!("{dir}/{name}"))
}

/// A file that make has put under the target directory, such as `release/libvmig.a`.
pub fn built(name: &str) -> PathBuf {
    let path = target().join(name);
    assert!(path.exists(), "{} is missing: run `make check`, which builds it first", path.display());
    path
}

/// Says that a test cannot run here, and counts it. True: return from the test. One call for each test that skips.
/// VMIG_REQUIRE names the needs whose absence is a failure instead: `kvm,qemu`, or `all,-kvm`.
#[must_use]
pub fn skip(needs: &str, reason: &str) -> bool {
    let required = env::var("VMIG_REQUIRE").unwrap_or_default();
    assert!(!is_required(&required, needs), "VMIG_REQUIRE={required}, but {reason}");
    println!("SKIP: {needs}: {reason}");
    let test = std::thread::current().name().unwrap_or("?").to_string();
    let line = format!("{test}: {needs}: {reason}\n");
    let file = fs::OpenOptions::new().create(true).append(true).open(target().join("skips.txt"));
    file.and_then(|mut f| f.write_all(line.as_bytes())).unwrap();
    true
}

/// Whether a list such as `kvm,qemu` or `all,-kvm` demands `needs`.
pub fn is_required(list: &str, needs: &str) -> bool {
    let has = |word: &str| list.split(',').any(|r| r.trim() == word);
    (has(needs) || has("all")) && !has(&format!("-{needs}"))
}

/// True, with the skip counted, when there is no usable KVM.
pub fn without_kvm() -> bool {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.is_err_and(|e| skip("kvm", &format!("/dev/kvm: {e}")))
}

/// True, with the skip counted, when the kernel gives us no userfaultfd.
pub fn without_userfaultfd() -> bool {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    opened.is_err_and(|e| skip("userfaultfd", &format!("/dev/userfaultfd: {e}")))
}

/// True, with the skip counted, when stock QEMU 10 is not installed.
pub fn without_qemu() -> bool {
    let words = match Command::new("qemu-system-x86_64").arg("--version").output() {
        Ok(out) => String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or("").to_string(),
        Err(e) => format!("qemu-system-x86_64: {e}"),
    };
    let version = words.split("version ").nth(1).and_then(|v| v.split('.').next()?.parse::<u32>().ok());
    version.is_none_or(|v| v < 10) && skip("qemu", &format!("QEMU 10 or later is needed; found: {words}"))
}

/// The seed of this run: VMIG_SEED, else the clock. A test that draws prints it, so that a failure can be repeated.
pub fn seed() -> u64 {
    match env::var("VMIG_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("VMIG_SEED={text}: {e}")),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs(),
    }
}

/// Numbers drawn from a seed (splitmix64): the same everywhere, which is all a test needs.
pub struct Rng(u64);

impl Rng {
    /// Starts at the seed of this run, which it prints; `salt` keeps two tests from drawing the same numbers.
    pub fn new(salt: &str) -> Rng {
        let seed = seed();
        println!("VMIG_SEED={seed}");
        Rng(salt.bytes().fold(seed, |s, b| s.wrapping_mul(31).wrapping_add(b.into())))
    }

    /// Starts at this number, whatever the seed of the run.
    pub fn at(number: u64) -> Rng {
        Rng(number)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not zero.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

/// Which of `points` cases to run: all with VMIG_ALL=1, else `sample` of them, drawn, in ascending order.
/// The first and the last are always among them.
pub fn points(salt: &str, points: usize, sample: usize) -> Vec<usize> {
    if env::var("VMIG_ALL").is_ok_and(|v| v == "1") || points <= sample.max(2) {
        return (0..points).collect();
    }
    let mut rng = Rng::new(salt);
    let mut drawn = std::collections::BTreeSet::from([0, points - 1]);
    while drawn.len() < sample {
        drawn.insert(rng.below(points));
    }
    drawn.into_iter().collect()
}

/// Calls back when it is dropped, in a panic, too: threads that wait for a word get it.
pub struct AtEnd<F: Fn()>(pub F);

impl<F: Fn()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Runs a command to its end; its output, or a panic that shows it.
pub fn run(command: &mut Command) -> Output {
    let out = try_run(command);
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, words(&out));
    out
}

/// Runs a command to its end, whatever that is.
pub fn try_run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// What a command printed, for messages.
pub fn words(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Whether a program is installed.
pub fn have(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success())
}
