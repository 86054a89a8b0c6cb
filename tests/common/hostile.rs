//! Steering tests/c/hostile.c, a VMM with a software guest.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

use super::c_program;

/// tests/c/hostile.c: a VMM with a running guest, steered by lines.
pub struct Vmm {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// What `look` and `wait` answer.
pub struct Look {
    pub state: String,
    pub reasons: i32,
    pub error: Value,
}

impl Look {
    pub fn of(line: &str) -> Look {
        let mut words = line.splitn(3, ' ');
        let (state, reasons) = (words.next().unwrap().to_owned(), words.next().unwrap().parse().unwrap());
        Look { state, reasons, error: serde_json::from_str(words.next().unwrap()).unwrap() }
    }

    pub fn message(&self) -> &str {
        self.error["message"].as_str().unwrap_or("")
    }
}

/// Both sides say that all went well.
#[track_caller]
pub fn completed(left: &Look, came: &Look) {
    let states = (left.state.as_str(), came.state.as_str());
    assert_eq!(states, ("completed", "completed"), "{} {}", left.error, came.error);
}

impl Vmm {
    pub fn new(shape: &[&str]) -> Vmm {
        let mut command = Command::new(c_program("hostile"));
        let mut child = command.args(shape).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Vmm { child, input, output }
    }

    /// With its guest running.
    pub fn source(shape: &[&str]) -> Vmm {
        let mut vmm = Vmm::new(shape);
        vmm.does("set multifd off"); // these destinations take one connection
        vmm.does("start");
        vmm
    }

    /// Waiting for a guest at the address returned.
    pub fn destination(shape: &[&str]) -> (Vmm, String) {
        let mut vmm = Vmm::new(&[&["fill=0"], shape].concat());
        let address = vmm.listen("tcp::0");
        (vmm, address)
    }

    pub fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the VMM died: {:?}", self.child.wait());
        line.trim_end().to_owned()
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.hear()
    }

    pub fn does(&mut self, line: &str) {
        let answer = self.ask(line);
        assert!(answer.parse::<i32>().is_ok_and(|n| n >= 0), "{line}: {answer}");
    }

    /// A call that must fail: its errno and what it says.
    pub fn refuses(&mut self, line: &str) -> (i32, String) {
        let answer = self.ask(line);
        let (number, text) = answer.split_once(' ').unwrap_or_else(|| panic!("{line}: {answer}"));
        (-number.parse::<i32>().unwrap(), text.to_owned())
    }

    pub fn listen(&mut self, uri: &str) -> String {
        self.does(&format!("in {uri}"));
        self.ask("get listen-address")
    }

    pub fn wait(&mut self) -> Look {
        Look::of(&self.ask("wait 30000"))
    }

    /// A migration out of here failed, and nothing happened to the guest.
    pub fn runs_on(&mut self) {
        let look = Look::of(&self.ask("look"));
        assert_eq!((look.reasons, self.ask("counts").as_str()), (0, "1"), "{} {}", look.state, look.error);
    }

    /// Sends the guest there; how that ends on both sides.
    pub fn leaves_for(&mut self, there: &mut Vmm, address: &str) -> (Look, Look) {
        self.does(&format!("out {address}"));
        (self.wait(), there.wait())
    }

    /// Moves the guest there, where it is as it was, and runs.
    #[track_caller]
    pub fn moves_to(&mut self, there: &mut Vmm, address: &str) {
        let (left, came) = self.leaves_for(there, address);
        completed(&left, &came);
        there.has_what_left(self);
        there.runs_on();
    }

    /// Moves the guest to a destination that is as it should be.
    pub fn moves_out(&mut self) {
        let (mut good, address) = Vmm::destination(&[]);
        self.moves_to(&mut good, &address);
        good.end();
    }

    pub fn has_what_left(&mut self, source: &mut Vmm) {
        let (left, arrived) = (source.ask("hash"), self.ask("hash"));
        assert_eq!(left.split(' ').next(), arrived.split(' ').nth(1), "memory and devices are identical");
    }

    /// Frees the guest; the program checks that nothing is left, AddressSanitizer what it can.
    pub fn end(mut self) {
        self.input = None;
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
