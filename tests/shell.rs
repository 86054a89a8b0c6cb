//! `vmig qmp`: the shell over QMP, with our own server, with stock QEMU, and with servers that are none.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;
mod qemu;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use common::{c_program, scratch, try_run, without_qemu, words};
use program::Program;
use serde_json::{Value, json};

const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;

fn tool() -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "120", env!("CARGO_BIN_EXE_vmig"), "qmp"]);
    command
}

fn shell(args: &[&str]) -> Output {
    try_run(tool().args(args).stdin(Stdio::null()))
}

/// What a command gives, which must work.
fn gives(socket: &str, command: &[&str]) -> Value {
    let out = shell(&[&[socket], command].concat());
    assert!(out.status.success(), "{command:?}: {}", words(&out));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// The words of a failure: exit status 1, and nothing but a line on stderr.
fn fails(args: &[&str]) -> String {
    let out = shell(args);
    assert_eq!(out.status.code(), Some(1), "{args:?}: {}", words(&out));
    String::from_utf8(out.stderr).unwrap()
}

/// Lines from a file or a pipe.
fn script(socket: &str, input: &[u8]) -> Output {
    let mut child =
        tool().arg(socket).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // One that ends early does not read the rest.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A VMM without KVM that serves QMP.
fn vmm(name: &str, dir: &Path, fill: &str) -> (Program, String) {
    let mut program = Program::start(name, dir, &c_program("switchover"), &[fill, "4096"]);
    let socket = dir.join(format!("{name}.qmp")).to_str().unwrap().to_owned();
    program.must(&format!("qmp unix:{socket}"));
    (program, socket)
}

struct Pair {
    source: Program,
    destination: Program,
    here: String,
    there: String,
    uri: String,
}

fn pair(name: &str) -> Pair {
    let dir = scratch(name);
    let (mut source, here) = vmm("source", &dir, "33");
    let (destination, there) = vmm("destination", &dir, "0");
    source.must("start");
    gives(&there, &["migrate-incoming", "uri=tcp:127.0.0.1:0"]);
    let address = gives(&there, &["query-migrate"])["socket-address"][0].take();
    let uri = format!("uri=tcp:{}:{}", address["host"].as_str().unwrap(), address["port"].as_str().unwrap());
    Pair { source, destination, here, there, uri }
}

fn quit(pair: Pair) {
    pair.source.quit();
    pair.destination.quit();
}

#[test]
fn a_command_is_carried_out_and_a_refusal_is_an_exit_status() {
    let (mut vmm, socket) = vmm("vmm", &scratch("shell-once"), "33");
    vmm.must("start");
    assert_eq!(gives(&socket, &["query-status"]), json!({"running": true, "status": "running"}));
    assert_eq!(gives(&format!("unix:{socket}"), &["stop"]), json!({}));
    assert_eq!(gives(&socket, &["query-status"])["status"], "paused");
    assert_eq!(gives(&socket, &[r#"{"execute": "cont", "id": "x"}"#]), json!({}));
    gives(
        &socket,
        &["migrate-set-parameters", "downtime-limit=77", "log-level=\"error\"", "x-checkpoint-delay=20000"],
    );
    let now = gives(&socket, &["query-migrate-parameters"]);
    assert!(now["downtime-limit"] == 77 && now["log-level"] == "error", "{now}");
    assert_eq!(fails(&[&socket, "migrate"]), "vmig: need either 'uri' or 'channels' argument\n");
    assert_eq!(fails(&[&socket, "cont", "a.b=1"]), "vmig: Parameter 'a' is unexpected\n");
    assert!(fails(&[&socket, "nope"]).starts_with("vmig: CommandNotFound: "));
    assert!(fails(&[&socket, "migrate", "tcp:"]).contains("not KEY=VALUE"));
    assert!(fails(&[&socket, "wait"]).contains("there is no migration"));
    assert!(fails(&["nothing/there", "stop"]).contains("No such file"));
    assert_eq!(shell(&["--what"]).status.code(), Some(2));
    let help = said(&shell(&[&socket, "help"]));
    assert!(help.contains("\n  vmig-resolve\n") && help.contains("wait (follows"), "{help}");
    let help = said(&shell(&[&socket, "help", "migrate"]));
    assert!(help.contains("\n  uri=string  (optional)\n") && help.contains("channels.addr.path=string"), "{help}");
    assert!(fails(&[&socket, "help", "nope"]).contains("no command 'nope'"));
    vmm.quit();
}

#[test]
fn a_script_goes_on_after_a_failure_and_ends_with_it() {
    let (mut vmm, socket) = vmm("vmm", &scratch("shell-script"), "33");
    vmm.must("start");
    let long = "x".repeat(300 << 10);
    let lines = format!("stop\n\nnope\n{long}\n\u{e9}=[\n{{\"execute\": \"query-status\"}}\nexit\nnope");
    let out = script(&socket, lines.as_bytes());
    let text = said(&out);
    for word in [
        "STOP\n",
        "error: CommandNotFound",
        "error: this line is longer",
        "error: the line ends inside",
        "\"paused\"",
    ] {
        assert!(text.contains(word), "no {word} in {text}");
    }
    assert!(out.status.code() == Some(1) && words(&out).ends_with("3 of the commands failed\n"), "{}", words(&out));
    let out = script(&socket, b"\xff\n");
    assert!(said(&out).contains("not UTF-8"), "{}", words(&out));
    let out = script(&socket, b"cont\nquery-status");
    assert!(out.status.success() && said(&out).contains("RESUME\n"), "{}", words(&out));
    vmm.quit();
}

#[test]
fn a_migration_is_followed_to_its_end() {
    let pair = pair("shell-wait");
    assert!(fails(&["--wait", &pair.here, "migrate", "uri=tcp:127.0.0.1:1"]).contains("the migration is failed: "));
    gives(&pair.here, &["migrate-set-parameters", "max-bandwidth=1048576"]);
    let mut follow = tool();
    follow.args(["--wait", &pair.here, "migrate", &pair.uri]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut follow = follow.spawn().unwrap();
    let mut out = follow.stdout.take().unwrap();
    let mut text = String::new();
    // It tells while the migration runs, which does not end at this speed.
    while !text.contains("\nactive  ") || !text.contains(" left  ") {
        let mut more = [0; 200];
        let n = out.read(&mut more).unwrap();
        assert!(n > 0, "it ended: {text}");
        text += std::str::from_utf8(&more[..n]).unwrap();
    }
    gives(&pair.here, &["migrate-set-parameters", "max-bandwidth=0"]);
    out.read_to_string(&mut text).unwrap();
    assert!(follow.wait().unwrap().success(), "{text}");
    let order = ["{}\n", "MIGRATION  status=setup\n", "active  ", "STOP\n", "\ncompleted  in "];
    let mut rest = &text[..];
    for part in order {
        let at = rest.find(part).unwrap_or_else(|| panic!("no {part}, in its order, in {text}"));
        rest = &rest[at + part.len()..];
    }
    assert!(!text.contains('\u{1b}'), "{text}");
    // At the destination, afterwards and by a script.
    let out = script(&pair.there, b"wait\nquery-status\n");
    assert!(out.status.success() && said(&out).starts_with("completed\n"), "{}", words(&out));
    quit(pair);
}

#[test]
fn a_terminal_gets_a_bar() {
    let pair = pair("shell-bar");
    gives(&pair.here, &["migrate-set-parameters", "max-bandwidth=4194304"]);
    let line = format!("{} qmp {}", env!("CARGO_BIN_EXE_vmig"), pair.here);
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", "120", "script", "-qec", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut terminal = command.spawn().unwrap();
    let mut typed = terminal.stdin.take().unwrap();
    writeln!(typed, "migrate {}", pair.uri).unwrap();
    let mut out = terminal.stdout.take().unwrap();
    let (mut seen, mut more) = (String::new(), [0; 500]);
    let mut until = |word: &str| {
        while !seen.contains(word) {
            let n = out.read(&mut more).unwrap();
            assert!(n > 0, "it ended before {word}: {seen}");
            seen += &String::from_utf8_lossy(&more[..n]);
        }
        seen.clone()
    };
    let seen = until("%  ");
    assert!(seen.contains("vmig> ") && seen.contains("\r\u{1b}[K\u{1b}[?7lactive  ["), "{seen}");
    // What is typed while the bar is shown counts, and the prompt is there again at the end.
    writeln!(typed, "migrate-set-parameters max-bandwidth=0").unwrap();
    until("\ncompleted  in ");
    writeln!(typed, "exit").unwrap();
    assert!(terminal.wait().unwrap().success());
    quit(pair);
}

#[test]
fn stock_qemu_is_spoken_with_alike() {
    if without_qemu() {
        return;
    }
    let second = ["-qmp", "unix:shell,server=on,wait=off"];
    let incoming = [&second[..], &["-incoming", "defer"]].concat();
    let from = qemu::Launch { more: &second, ..qemu::Launch::none(64 << 20) }.start();
    let to = qemu::Launch { more: &incoming, ..qemu::Launch::none(64 << 20) }.start();
    let (here, there) = (from.path("shell"), to.path("shell"));
    let uri = format!("uri=unix:{}", to.path("guest"));
    assert!(fails(&[&here, "nope"]).starts_with("vmig: CommandNotFound: "));
    let help = said(&shell(&[&here, "help", "migrate"]));
    assert!(help.contains("\n  uri=string  (optional)\n") && help.contains("channels.addr.path=string"), "{help}");
    gives(&there, &["migrate-incoming", &uri]);
    gives(&here, &["migrate-set-capabilities", r#"capabilities=[{"capability": "events", "state": true}]"#]);
    let out = script(&here, format!("migrate {uri}\nwait\nquery-status\n").as_bytes());
    let text = said(&out);
    // The run state becomes postmigrate a little later.
    for word in ["MIGRATION  status=setup\n", "MIGRATION  status=completed\n", "completed  in ", "\"running\": false"]
    {
        assert!(text.contains(word), "no {word} in {}", words(&out));
    }
    assert!(out.status.success());
    let out = shell(&["--wait", &there]);
    assert!(out.status.success() && said(&out).ends_with("completed\n"), "{}", words(&out));
    assert!(fails(&["--wait", &here, "migrate", &uri]).contains("was paused due to previous migration"));
    // A second client waits for the first, which holds the connection.
    let _first = UnixStream::connect(&here).unwrap();
    assert_eq!(gives(&there, &["quit"]), json!({}));
}

/// A server that says this first, and then answers whatever it hears with `answers`, one after the other, and hangs up.
fn server(name: &str, first: &[u8], answers: &[&[u8]]) -> String {
    let path: PathBuf = scratch(name).join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let (first, answers) = (first.to_vec(), answers.iter().map(|a| a.to_vec()).collect::<Vec<_>>());
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(&first);
        for answer in answers {
            let mut heard = [0; 4096];
            if stream.read(&mut heard).unwrap_or(0) == 0 {
                return;
            }
            let _ = stream.write_all(&answer);
        }
    });
    path.to_str().unwrap().to_owned()
}

/// A name, what the server says first, its answers, and a word of the error.
type Case<'a> = (&'a str, &'a [u8], Vec<&'a [u8]>, &'a str);

#[test]
fn what_is_no_server_or_goes_away_is_an_error() {
    let greeting = format!("{GREETING}\r\n").into_bytes();
    let agreed: &[u8] = b"{\"return\": {}, \"id\": 1}\r\n";
    let endless = vec![b'x'; 5 << 20];
    let deep = [&b"{\"return\": "[..], &vec![b'['; 100_000], b"\n"].concat();
    let event: &[u8] =
        b"{\"event\": \"A\\u001b[2J\\u202eB\", \"timestamp\": {\"seconds\": 1e300}, \"data\": {\"x\": \"\\n\"}}\n";
    let flood =
        [&event.repeat(3000)[..], b"{\"id\": 77, \"return\": 5}\n{\"return\": {\"ok\": 1}, \"id\": 2}\n"].concat();
    let cases: [Case<'_>; 11] = [
        ("silent", b"", vec![], "closed the connection"),
        ("smtp", b"220 mail\r\n", vec![], "does not speak QMP: 220 mail"),
        ("binary", b"\xff\x00\x1b[2J\n", vec![], "does not speak QMP: "),
        ("list", b"[1]\n", vec![], "does not speak QMP"),
        ("object", b"{\"a\": 1}\n", vec![], "no greeting of a QMP server"),
        (
            "full",
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"32 clients\"}}\n",
            vec![],
            "says: 32 clients",
        ),
        ("endless", &endless, vec![], "a line of more than 4 MiB"),
        ("refuses", &greeting, vec![b"{\"error\": {\"desc\": 5}}\n"], "does not go on from its greeting"),
        ("garbage", &greeting, vec![agreed, b"}{\n"], "does not speak QMP: }{"),
        ("deep", &greeting, vec![agreed, &deep], "does not speak QMP"),
        ("cut", &greeting, vec![agreed, b"{\"return\""], "in the middle of a message"),
    ];
    for (name, first, answers, word) in cases {
        let said = fails(&[&server(name, first, &answers), "query-status"]);
        assert!(said.contains(word) && said.len() < 600 && !said.contains('\u{1b}'), "{name}: {said:?}");
    }
    let said = fails(&["--timeout", "1", &server("mute", &greeting, &[agreed, b"", b""]), "query-status"]);
    assert!(said.contains("did not answer within 1 seconds"), "{said}");
    // Events that nobody asked for, and answers to others: the right one is found, and nothing acts on the terminal.
    let flooding = server("flood", &greeting, &[agreed, &flood]);
    assert_eq!(gives(&flooding, &["query-status"]), json!({"ok": 1}));
    let flooding = server("flood-script", &greeting, &[agreed, &flood, b""]);
    let out = script(&flooding, b"query-status\n");
    let text = words(&out);
    assert!(text.contains("UTC  A\\u{1b}[2J\\u{202e}B  x=\\n\n") && !text.contains('\u{1b}'), "{text:.500}");
}

#[test]
fn a_server_that_ends_with_its_migration_is_no_failure() {
    let greeting = format!("{GREETING}\n").into_bytes();
    let events = |last: &str| {
        let one = |status: &str| format!("{{\"event\": \"MIGRATION\", \"data\": {{\"status\": \"{status}\"}}}}\n");
        ["setup", "active", last].map(one).concat().into_bytes()
    };
    let answer = |id: u32, value: &str| format!("{{\"id\": {id}, \"return\": {value}}}\n").into_bytes();
    for (last, good) in [("completed", true), ("device", false)] {
        let answers = [
            answer(1, "{}"),
            answer(2, "{\"status\": \"active\"}"),
            answer(3, "{}"),
            [answer(4, "{\"status\": \"active\"}"), events(last)].concat(),
        ];
        let socket = server("ends", &greeting, &answers.each_ref().map(|a| &a[..]));
        let out = shell(&[&socket, "wait"]);
        assert_eq!(out.status.success(), good, "{}", words(&out));
        assert_eq!(said(&out).contains("completed; the server closed the connection\n"), good, "{}", words(&out));
    }
}

#[test]
fn a_server_that_vanishes_ends_the_wait() {
    let mut pair = pair("shell-vanish");
    gives(&pair.here, &["migrate-set-parameters", "max-bandwidth=1048576"]);
    gives(&pair.here, &["migrate", &pair.uri]);
    let mut follow = tool();
    follow.args([&pair.here, "wait"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut follow = follow.spawn().unwrap();
    let mut first = [0; 6];
    follow.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    pair.source.kill();
    let out = follow.wait_with_output().unwrap();
    assert!(out.status.code() == Some(1) && words(&out).contains("vmig: the "), "{}", words(&out));
    let _ = fs::remove_file(&pair.here);
    pair.destination.quit();
}
