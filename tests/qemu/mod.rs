//! A stock QEMU as the other side: launched without a CPU, driven through QMP, its memory written and read back.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

pub mod decode;
pub mod peer;

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// Longest a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(90);
const NAP: Duration = Duration::from_millis(5);

/// Waits until `ready` gives something.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(got) = ready() {
            return got;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        sleep(NAP);
    }
}

/// A line-by-line conversation over a unix socket.
struct Lines {
    reader: BufReader<UnixStream>,
}

impl Lines {
    fn connect(path: &Path) -> Lines {
        let stream = wait_for("QEMU's socket", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Lines { reader: BufReader::new(stream) }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.reader.get_mut(), "{line}").unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "QEMU closed its socket");
        line
    }
}

/// A running QEMU; killed when it goes out of scope.
pub struct Qemu {
    child: Child,
    qmp: Lines,
    dir: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What to launch.
pub struct Launch<'a> {
    /// `-M`.
    pub machine: &'a str,
    /// `-m`, in bytes.
    pub ram: u64,
    /// What the memory holds from address 0.
    pub load: Option<&'a Path>,
    /// Further arguments.
    pub more: &'a [&'a str],
    /// What its descriptor 0 is.
    pub stdin: Stdio,
}

impl<'a> Launch<'a> {
    /// A machine without a CPU.
    pub fn none(ram: u64) -> Launch<'a> {
        Launch { machine: "none", ram, load: None, more: &[], stdin: Stdio::null() }
    }

    /// One whose memory holds a file.
    pub fn loaded(ram: u64, file: &'a Path) -> Launch<'a> {
        Launch { load: Some(file), ..Launch::none(ram) }
    }

    pub fn start(self) -> Qemu {
        let dir = crate::common::scratch("qemu");
        let log = File::create(dir.join("stderr")).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", self.machine, "-nodefaults", "-no-user-config", "-display", "none"]);
        command.arg("-m").arg(format!("{}K", self.ram >> 10)).args(self.more);
        command.current_dir(&dir).stdin(self.stdin).stdout(Stdio::null()).stderr(log);
        command.args(["-qmp", "unix:qmp,server=on,wait=off"]);
        if let Some(file) = self.load {
            command.arg("-device").arg(format!("loader,file={},addr=0,force-raw=on", file.display()));
        }
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut qmp = Lines::connect(&dir.join("qmp"));
        qmp.hear();
        let mut qemu = Qemu { child, qmp, dir };
        qemu.ok("qmp_capabilities", json!({}));
        qemu
    }
}

impl Qemu {
    /// A command: what it returns, or the words of its error.
    pub fn try_run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.qmp.say(&json!({"execute": command, "arguments": arguments}).to_string());
        loop {
            let mut line: Value = serde_json::from_str(&self.qmp.hear()).unwrap();
            match (line.get("return"), line.get("error")) {
                (Some(_), _) => return Ok(line["return"].take()),
                (_, Some(error)) => return Err(error["desc"].as_str().unwrap_or("?").to_string()),
                _ => (), // an event
            }
        }
    }

    /// A command that must work.
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let result = self.try_run(command, arguments);
        result.unwrap_or_else(|e| panic!("QMP {command}: {e}\n{}", self.words()))
    }

    /// A file of its directory.
    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    /// What it wrote to its stderr.
    pub fn words(&self) -> String {
        std::fs::read_to_string(self.dir.join("stderr")).unwrap_or_default()
    }

    pub fn capabilities(&mut self, names: &[&str]) {
        let list: Vec<Value> = names.iter().map(|n| json!({"capability": n, "state": true})).collect();
        self.ok("migrate-set-capabilities", json!({"capabilities": list}));
    }

    pub fn parameters(&mut self, parameters: Value) {
        self.ok("migrate-set-parameters", parameters);
    }

    pub fn migrate(&mut self, uri: &str) {
        self.ok("migrate", json!({"uri": uri}));
    }

    /// Listens, and stays when the migration fails; where it listens. Needs `-incoming defer`.
    pub fn incoming(&mut self, uri: &str) -> String {
        self.ok("migrate-incoming", json!({"uri": uri, "exit-on-error": false}));
        if !uri.starts_with("tcp:") {
            return uri.to_string();
        }
        let info = self.ok("query-migrate", json!({}));
        let address = &info["socket-address"][0];
        format!("tcp:127.0.0.1:{}", address["port"].as_str().unwrap_or_else(|| panic!("no port in {info}")))
    }

    /// What query-migrate says once the migration has ended.
    pub fn ended(&mut self) -> Value {
        wait_for("the end of QEMU's migration", || {
            let info = self.ok("query-migrate", json!({}));
            matches!(info["status"].as_str(), Some("completed" | "failed" | "cancelled")).then_some(info)
        })
    }

    /// Waits until it has sent this many bytes of RAM.
    pub fn has_sent(&mut self, bytes: u64) {
        wait_for("QEMU to send RAM", || {
            let info = self.ok("query-migrate", json!({}));
            assert_ne!(info["status"], "failed", "{info}");
            info["ram"]["transferred"].as_u64().filter(|sent| *sent >= bytes)
        });
    }

    pub fn run_state(&mut self) -> String {
        self.ok("query-status", json!({}))["status"].as_str().unwrap().to_string()
    }

    /// Resets the machine, which writes what was loaded into its memory again and so makes those pages dirty: the one
    /// way to have a QEMU without a CPU write its memory.
    pub fn reset(&mut self) {
        self.ok("system_reset", json!({}));
    }

    /// The guest's memory from address 0.
    pub fn memory(&mut self, bytes: u64) -> Vec<u8> {
        let file = self.dir.join("memory");
        self.ok("pmemsave", json!({"val": 0, "size": bytes, "filename": file}));
        std::fs::read(file).unwrap()
    }

    /// Ends it in the middle of whatever it does.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
    }
}
