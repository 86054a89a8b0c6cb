//! The static tracepoints: where they are, and, under a debugger, when they are passed and with what.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use common::{built, root, run, scratch, skip, try_run, words};

/// All of them by name, and how the debugger is to print their arguments.
const POINTS: [(&str, &str); 7] = [
    ("blackout", r#""%d %d\n", $_probe_arg0 > 0, $_probe_arg1 >= 0"#),
    ("error", r#""%d\n", $_probe_arg0"#),
    ("iteration", r#""%d\n", $_probe_arg0"#),
    ("ladder", r#""%d\n", $_probe_arg0"#),
    ("phase_begin", r#""%s\n", (char *)$_probe_arg0"#),
    ("phase_end", r#""%s\n", (char *)$_probe_arg0"#),
    ("state", r#""%d %d\n", $_probe_arg0, $_probe_arg1"#),
];

#[test]
fn tracepoints_are_in_the_libraries() {
    let library = built("release/libvmig.so");
    for file in [library, built("c/peer")] {
        let out = run(Command::new("readelf").args(["-n", "--wide"]).arg(&file));
        let text = String::from_utf8(out.stdout).unwrap();
        let ours = text.split("Provider: vmig").skip(1);
        let names: BTreeSet<_> =
            ours.filter_map(|rest| rest.split("Name: ").nth(1)?.split_whitespace().next()).collect();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), POINTS.map(|(name, _)| name), "in {}", file.display());
        // Off, each is an instruction that does nothing; nobody looks whether one is on.
        let bytes = fs::read(&file).unwrap();
        let headers =
            String::from_utf8(run(Command::new("readelf").args(["-l", "--wide"]).arg(&file)).stdout).unwrap();
        let places: Vec<u64> =
            text.split("Provider: vmig").skip(1).map(|point| hex_after(point, "Location: ")).collect();
        assert!(places.len() >= 7 && text.split("Provider: vmig").skip(1).all(|p| hex_after(p, "Semaphore: ") == 0));
        for place in places {
            assert_eq!(bytes[in_file(&headers, place)], 0x90, "at {place:#x} of {}", file.display());
        }
    }
}

fn hex_after(text: &str, words: &str) -> u64 {
    let digits = text.split(words).nth(1).and_then(|rest| rest.strip_prefix("0x")).unwrap();
    u64::from_str_radix(digits.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap(), 16).unwrap()
}

/// Where in the file an address lies, by its segments.
fn in_file(headers: &str, address: u64) -> usize {
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
    let segments = headers.lines().filter_map(|line| line.trim().strip_prefix("LOAD"));
    let found = segments.map(|line| line.split_whitespace().take(5).map(number).collect::<Vec<_>>()).find_map(|s| {
        let (offset, start, length) = (s[0], s[1], s[3]);
        (start..start + length).contains(&address).then(|| offset + address - start)
    });
    usize::try_from(found.unwrap()).unwrap()
}

#[test]
fn the_document_names_every_tracepoint() {
    let text = fs::read_to_string(root().join("docs/tool.md")).unwrap();
    for (point, _) in POINTS {
        assert!(text.contains(&format!("`{point}`")), "{point} is not in docs/tool.md");
    }
}

/// Before the first page.
const PREPARATION: [&str; 6] = [
    "phase_begin prepare",
    "phase_end prepare",
    "phase_begin hello",
    "phase_end hello",
    "phase_begin setup",
    "phase_end setup",
];

/// True, with the skip counted, when no debugger can run a program here.
fn without_gdb() -> bool {
    let out = Command::new("gdb").args(["-nx", "-batch", "-ex", "run", "true"]).output();
    let runs = out.is_ok_and(|out| words(&out).contains("exited normally"));
    !runs && skip("gdb", "no gdb that can run a program")
}

/// What a run of tests/c/peer.c passes: a line for each tracepoint.
fn passed(dir: &Path, args: &[&str]) -> Vec<String> {
    let mut script = "set pagination off\nset confirm off\nhandle SIGPIPE nostop noprint pass\n".to_owned();
    for (name, arguments) in POINTS {
        let arguments = arguments.replacen('"', &format!("\"@{name} "), 1);
        script += &format!("break -probe-stap vmig:{name}\ncommands\nsilent\nprintf {arguments}\ncontinue\nend\n");
    }
    let file = dir.join("script");
    fs::write(&file, script + "run\n").unwrap();
    let mut gdb = Command::new("timeout");
    gdb.args(["-k", "5", "120", "gdb", "-nx", "-batch", "-x"]).arg(file).arg("--args").arg(built("c/peer"));
    let said = words(&try_run(gdb.args(args).args(["ram=1048576", "fill=7"])));
    assert!(said.contains("@state"), "{said}");
    said.lines().filter_map(|line| line.strip_prefix('@')).map(str::to_owned).collect()
}

#[test]
fn a_debugger_sees_every_phase_of_a_migration() {
    if without_gdb() {
        return;
    }
    let dir = scratch("tracepoints");
    let uri = format!("file:{}", dir.join("stream").display());
    let left = passed(&dir, &["out", &uri]);
    // How many rounds there are before the last is the pacing's business.
    let rounds: Vec<usize> =
        left.iter().filter_map(|line| line.strip_prefix("iteration ")).map(|n| n.parse().unwrap()).collect();
    assert!(rounds.len() > 1 && rounds.iter().copied().eq(1..=rounds.len()), "{left:#?}");
    let others: Vec<_> = left.iter().map(String::as_str).filter(|line| !line.starts_with("iteration ")).collect();
    let expected = [
        &["state 0 1"][..],
        &PREPARATION,
        &["state 1 4", "phase_begin iterate", "phase_end iterate", "phase_begin complete", "phase_begin stop"],
        &["phase_end stop", "state 4 5", "phase_begin save", "phase_end save", "phase_begin last-pages"],
        &["phase_end last-pages", "blackout 1 1", "phase_end complete", "state 5 6"],
    ];
    assert_eq!(others, expected.concat());
    let arrived = passed(&dir, &["in", &uri]);
    assert_eq!(arrived, ["state 0 1", "state 1 4", "phase_begin load", "phase_end load", "state 4 6"]);
    let refused = passed(&dir, &["out", "unix:/nowhere/at/all"]);
    assert_eq!(refused, ["state 0 1", &format!("error {}", libc::ENOENT), "state 1 7"]);
}
