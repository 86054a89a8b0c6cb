//! QMP with the real client (PyPI's `qemu.qmp`) and with the lines that stock QEMU understands; a KVM guest moves.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;
mod qemu;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{c_program, scratch, skip, try_run, without_kvm, without_qemu, words};
use program::Program;

/// A Python that has the client: VMIG_PYTHON, or what the gate installs under the target directory, or the system's.
fn python() -> Option<PathBuf> {
    let own = std::env::var("VMIG_PYTHON").map(PathBuf::from);
    let all = own.into_iter().chain([common::target().join("qmp-client/bin/python3"), "python3".into()]);
    let has = |python: &PathBuf| {
        let run = Command::new(python).args(["-c", "import qemu.qmp"]).output();
        run.is_ok_and(|out| out.status.success())
    };
    all.into_iter().find(has)
}

/// The same, with the skip counted where there is none.
fn client() -> Option<PathBuf> {
    let found = python();
    if found.is_none() && skip("qemu.qmp", "no Python with PyPI's qemu.qmp (VMIG_PYTHON names one)") {
        return None;
    }
    found
}

/// A script of tests/qmp, which says so when it is done.
fn script(python: &Path, name: &str, args: &[&str]) {
    let path = common::root().join("tests/qmp").join(name);
    let out = try_run(Command::new("timeout").args(["-k", "5", "240"]).arg(python).arg(path).args(args));
    let text = words(&out);
    assert!(out.status.success() && text.ends_with("done\n"), "{args:?}: {}\n{text}", out.status);
}

/// The example VMM, serving QMP at `NAME.qmp` of the directory.
fn vmm(dir: &Path, name: &str, more: &[&str]) -> Program {
    let socket = socket(dir, name);
    let serve = format!("unix:{socket}");
    let args = [&["--mem", "64", "--qmp", &serve, "--serial", "/dev/null", "--events-fd", "1"], more].concat();
    let vmm = Program::start(name, dir, &c_program("vmm"), &args);
    vmm.await_news("note qmp");
    vmm
}

fn socket(dir: &Path, name: &str) -> String {
    dir.join(format!("{name}.qmp")).to_str().unwrap().to_owned()
}

/// A source that runs and a destination that listens, driven through a scenario of tests/qmp/drive.py.
fn drive(scenario: &str) -> Option<(Program, Program)> {
    let python = if without_kvm() { return None } else { client()? };
    let dir = scratch("qmp");
    let source = vmm(&dir, "source", &[]);
    assert_eq!(source.reply(), "running");
    let destination = vmm(&dir, "destination", &["--incoming", "tcp:127.0.0.1:0"]);
    destination.listening();
    source.await_generations(0, 2);
    let (from, to) = (socket(&dir, "source"), socket(&dir, "destination"));
    script(&python, "drive.py", &[scenario, &from, &to]);
    Some((source, destination))
}

/// The guest went over, and checks its own memory there.
fn arrived(pair: Option<(Program, Program)>) {
    let Some((source, destination)) = pair else { return };
    destination.await_generations(0, 3);
    destination.await_generations(1, 1);
    assert!(destination.news("fault").is_empty() && source.news("fault").is_empty());
    source.quit();
    destination.quit();
}

#[test]
fn the_client_migrates_and_reads_every_number() {
    arrived(drive("migrate"));
}

#[test]
fn the_client_cancels_and_migrates_again() {
    arrived(drive("cancel"));
}

#[test]
fn the_client_pauses_before_the_switchover() {
    arrived(drive("pause"));
}

#[test]
fn the_client_changes_parameters_in_flight() {
    arrived(drive("parameters"));
}

#[test]
fn the_client_saves_to_a_file_of_an_fd_set() {
    arrived(drive("set_of_descriptors"));
}

#[test]
fn the_client_migrates_through_programs() {
    arrived(drive("commands"));
}

#[test]
fn the_client_hands_descriptors_over_and_speaks_out_of_band() {
    arrived(drive("descriptors"));
}

#[test]
fn a_guest_that_waits_to_leave_stays_when_cancelled() {
    let Some((source, destination)) = drive("pause_and_cancel") else { return };
    source.await_generations(0, 3);
    assert!(source.news("fault").is_empty());
    source.quit();
    destination.quit();
}

#[test]
fn the_shell_that_comes_with_the_client_works() {
    let Some(python) = (if without_kvm() { None } else { client() }) else { return };
    let dir = scratch("qmp-shell");
    let vmm = vmm(&dir, "shell", &[]);
    assert_eq!(vmm.reply(), "running");
    let lines =
        "query-status\nmigrate-set-parameters max-bandwidth=4096\nquery-migrate-parameters\nquery-nothing\nquit\n";
    let text = shell(&python, &dir, "shell", lines);
    for part in ["Connected to QEMU 10.0.0", "\"running\"", "\"max-bandwidth\": 4096", "CommandNotFound"] {
        assert!(text.contains(part), "no {part} in:\n{text}");
    }
    let mut vmm = vmm;
    vmm.wait_end(0);
}

/// What qmp-shell prints for these lines.
fn shell(python: &Path, dir: &Path, name: &str, lines: &str) -> String {
    let input = dir.join("input");
    std::fs::write(&input, lines).unwrap();
    let main = "from qemu.qmp.qmp_shell import main; main()";
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "60"]).arg(python).args(["-c", main, &socket(dir, name)]);
    words(&try_run(command.stdin(std::fs::File::open(&input).unwrap()).env("HOME", dir)))
}

#[test]
fn the_shell_cancels_and_then_moves_a_guest_with_a_pause() {
    let Some(python) = (if without_kvm() { None } else { client() }) else { return };
    let dir = scratch("qmp-shell-moves");
    let (mut source, mut destination) =
        (vmm(&dir, "source", &[]), vmm(&dir, "destination", &["--incoming", "defer"]));
    assert_eq!((source.reply().as_str(), destination.reply().as_str()), ("running", "deferred"));
    source.await_generations(0, 2);
    let uri = format!("unix:{}", dir.join("guest").display());
    let pause = r#"migrate-set-capabilities capabilities=[{"capability":"pause-before-switchover","state":true}]"#;
    let text = shell(&python, &dir, "destination", &format!("migrate-incoming uri={uri}\n"));
    assert!(text.contains("\"return\": {}"), "{text}");
    let text = shell(
        &python,
        &dir,
        "source",
        &format!(
            "{pause}\nmigrate-set-parameters max-bandwidth=65536\nmigrate uri={uri}\nquery-migrate\nmigrate_cancel\n"
        ),
    );
    assert!(text.matches("\"return\": {}").count() == 4 && text.contains("\"status\""), "{text}");
    source.must_end_in("cancelled");
    destination.ended_in();
    assert!(shell(&python, &dir, "destination", &format!("migrate-incoming uri={uri}\n")).contains("\"return\": {}"));
    shell(&python, &dir, "source", &format!("migrate-set-parameters max-bandwidth=0\nmigrate uri={uri}\n"));
    let end = std::time::Instant::now() + program::MOVE;
    while source.status_text("state") != "pre-switchover" {
        assert!(std::time::Instant::now() < end, "{}", source.command("status"));
    }
    let text = shell(&python, &dir, "source", "query-status\nmigrate-continue state=pre-switchover\n");
    assert!(text.contains("finish-migrate"), "{text}");
    source.must_end_in("completed");
    destination.must_end_in("completed");
    arrived(Some((source, destination)));
}

#[test]
fn qemu_and_we_answer_the_same_lines_alike() {
    if without_kvm() || without_qemu() {
        return;
    }
    let dir = scratch("qmp-lines");
    let qemu =
        qemu::Launch { more: &["-qmp", "unix:lines,server=on,wait=off"], ..qemu::Launch::none(16 << 20) }.start();
    let ours = vmm(&dir, "ours", &["--set", "defaults qemu"]);
    assert_eq!(ours.reply(), "running");
    let file = common::root().join("tests/qmp/lines.jsonl");
    let args = ["lines", file.to_str().unwrap(), &qemu.path("lines"), &socket(&dir, "ours")];
    script(Path::new("python3"), "same_lines.py", &args);
    ours.quit();
}

#[test]
fn qemu_and_we_migrate_by_the_same_lines() {
    if without_kvm() || without_qemu() {
        return;
    }
    let dir = scratch("qmp-move");
    let guest = dir.join("guest");
    std::fs::write(&guest, vec![7; 8 << 20]).unwrap();
    let second = ["-qmp", "unix:lines,server=on,wait=off"];
    let from = qemu::Launch { more: &second, ..qemu::Launch::loaded(16 << 20, &guest) }.start();
    let incoming = [&second[..], &["-incoming", "defer"]].concat();
    let to = qemu::Launch { more: &incoming, ..qemu::Launch::none(16 << 20) }.start();
    let source = vmm(&dir, "source", &["--set", "defaults qemu"]);
    assert_eq!(source.reply(), "running");
    let destination = vmm(&dir, "destination", &["--incoming", "defer", "--set", "defaults qemu"]);
    assert_eq!(destination.reply(), "deferred");
    source.await_generations(0, 2);
    let paths = [from.path("lines"), to.path("lines"), socket(&dir, "source"), socket(&dir, "destination")];
    let args = ["move", &paths[0], &paths[1], &paths[2], &paths[3]];
    script(Path::new("python3"), "same_lines.py", &args);
    arrived(Some((source, destination)));
}
