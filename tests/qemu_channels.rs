//! Parallel channels (multifd) with a stock QEMU, in both directions: memory is compared byte by byte, and sides that
//! were not told the same fail within the time limits, the source's guest still running.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod qemu;

use common::{c_program, scratch, without_qemu};
use qemu::peer::{Peer, assert_same_memory, drawn_ram, path, saved};
use qemu::{Launch, Qemu};
use serde_json::json;
use std::{path::Path, process::Stdio};

const MIB: u64 = 1 << 20;
const RAM: u64 = 16 * MIB;
const ZEROS: [&str; 3] = ["none", "legacy", "multifd"];

/// One way to move.
#[derive(Clone, Copy, Debug)]
struct Way {
    transport: &'static str,
    channels: u8,
    zeros: &'static str,
    /// Meet at the end of every section, as QEMU did before 8.1.
    legacy: bool,
    return_path: bool,
}

/// Every kind of looking for zeros with both styles of meeting; the other choices take turns.
fn ways() -> Vec<Way> {
    let styles = ZEROS.iter().flat_map(|zeros| [(*zeros, false), (*zeros, true)]);
    let both = styles.flat_map(|style| [(style, 2), (style, 4)]).enumerate();
    both.map(|(n, ((zeros, legacy), channels))| Way {
        transport: if n / 2 % 2 == 0 { "tcp" } else { "unix" },
        channels,
        zeros,
        legacy,
        return_path: n % 3 != 0,
    })
    .collect()
}

impl Way {
    /// Where to listen.
    fn uri(&self, dir: &Path) -> String {
        match self.transport {
            "tcp" => "tcp:127.0.0.1:0".to_string(),
            _ => format!("unix:{}", dir.join("s").display()),
        }
    }

    /// What our side is told.
    fn settings(&self) -> Vec<String> {
        let mut all = multifd(self.channels);
        all.push(format!("zero-page-detection={}", self.zeros));
        all.push(format!("multifd-flush-after-each-section={}", on_off(self.legacy)));
        all
    }

    /// A QEMU that was told the same.
    fn qemu(&self, launch: Launch) -> Qemu {
        let global = format!("migration.multifd-flush-after-each-section={}", on_off(self.legacy));
        let more = [launch.more, &["-global", &global]].concat();
        let mut qemu = Launch { more: &more, ..launch }.start();
        let capabilities: &[&str] = if self.return_path { &["multifd", "return-path"] } else { &["multifd"] };
        qemu.capabilities(capabilities);
        qemu.parameters(json!({"multifd-channels": self.channels, "zero-page-detection": self.zeros}));
        qemu
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn multifd(channels: u8) -> Vec<String> {
    vec!["multifd=on".into(), format!("multifd-channels={channels}")]
}

/// The incoming side waits for `migrate-incoming`.
const DEFER: &[&str] = &["-incoming", "defer"];

/// Our destination, its memory full of garbage.
fn destination(uri: &str, settings: Vec<String>) -> Peer {
    let all = [vec![format!("ram={RAM}"), "fill=165".to_string()], settings].concat();
    Peer::start(&c_program("peer"), "in", uri, &all, Stdio::null())
}

/// Our source, towards QEMU.
fn source(uri: &str, settings: Vec<String>) -> Peer {
    let all = [vec![format!("ram={RAM}"), "peer=qemu".to_string()], settings].concat();
    Peer::start(&c_program("peer"), "out", uri, &all, Stdio::null())
}

#[test]
fn qemu_to_us() {
    if without_qemu() {
        return;
    }
    let dir = scratch("to-us");
    let ram = drawn_ram(&dir, RAM);
    for way in ways() {
        let (dir, what) = (scratch("way"), format!("{way:?}"));
        let arrived = dir.join("arrived");
        let peer = destination(&way.uri(&dir), [vec![path("save", &arrived)], way.settings()].concat());
        let mut qemu = way.qemu(Launch::loaded(RAM, &ram));
        qemu.migrate(&peer.address);
        let info = qemu.ended();
        assert_eq!(info["status"], "completed", "{what}: {info}");
        assert!(info["ram"]["multifd-bytes"].as_u64() > Some(RAM / 4), "{what}: {info}");
        let end = peer.end().completed();
        assert!(end.runs && (way.zeros == "none") == (end.zero_pages == 0), "{what}: {end:?}");
        assert_same_memory(&saved(&ram), &saved(&arrived), &what);
    }
}

#[test]
fn us_to_qemu() {
    if without_qemu() {
        return;
    }
    let dir = scratch("to-qemu");
    let ram = drawn_ram(&dir, RAM);
    for way in ways() {
        let (dir, what) = (scratch("way"), format!("{way:?}"));
        let left = dir.join("left");
        let mut qemu = way.qemu(Launch { more: DEFER, ..Launch::none(RAM) });
        let uri = qemu.incoming(&way.uri(&dir));
        let mut settings =
            vec![path("load", &ram), path("save", &left), "dirty=2048".into(), "max-bandwidth=64M".into()];
        settings.push(format!("return-path={}", on_off(way.return_path)));
        settings.extend(way.settings());
        let end = source(&uri, settings).end().completed();
        assert!(!end.runs && (way.zeros == "none") == (end.zero_pages == 0), "{what}: {end:?}");
        assert_eq!(qemu.ended()["status"], "completed", "{what}: {}", qemu.words());
        assert_eq!(qemu.run_state(), "running", "{what}");
        let left = saved(&left);
        assert!(left != saved(&ram), "{what}: the guest wrote nothing");
        assert_same_memory(&left, &qemu.memory(RAM), &what);
    }
}

fn usual(channels: u8) -> Way {
    Way { transport: "tcp", channels, zeros: "multifd", legacy: false, return_path: true }
}

#[test]
fn qemu_with_another_number_of_channels_than_ours() {
    if without_qemu() {
        return;
    }
    let dir = scratch("number");
    let ram = drawn_ram(&dir, RAM);
    // The last: multifd is off here, as it is for a QEMU unless somebody says otherwise.
    for (theirs, ours, words) in [
        (2, multifd(4), "not all channels of the source came in time (expected 4, got 2)"),
        (4, multifd(2), ""),
        (2, vec![], "multifd"),
    ] {
        let what = format!("{theirs} of QEMU, {ours:?}");
        let limits = vec!["connect-timeout=1000".into(), "stall-timeout=2000".into()];
        let peer = destination("tcp:127.0.0.1:0", [ours, limits].concat());
        let mut qemu = usual(theirs).qemu(Launch::loaded(RAM, &ram));
        qemu.migrate(&peer.address);
        let end = peer.end().failed(&[words]);
        assert!(!end.runs && end.error["side"] == "destination", "{what}: {end:?}");
        println!("{what}: {}", end.message());
        let info = qemu.ended();
        assert_eq!(
            (info["status"].as_str(), qemu.run_state().as_str()),
            (Some("failed"), "running"),
            "{what}: {info}"
        );
        assert_same_memory(&saved(&ram), &qemu.memory(RAM), &what);
    }
}

#[test]
fn our_source_with_another_number_of_channels_than_qemus() {
    if without_qemu() {
        return;
    }
    for (theirs, ours) in [(4, multifd(2)), (2, multifd(4)), (2, vec![])] {
        let what = format!("{theirs} of QEMU, {ours:?}");
        let mut qemu = usual(theirs).qemu(Launch { more: DEFER, ..Launch::none(RAM) });
        let uri = qemu.incoming("tcp:127.0.0.1:0");
        let settings =
            vec!["fill=7".into(), "dirty=64".into(), "stall-timeout=2000".into(), "connect-timeout=1000".into()];
        // QEMU itself may wait for ever then, so that only our side is asked.
        let end = source(&uri, [ours, settings].concat()).end().failed_and_runs_on(&[]);
        println!("{what}: {}", end.message());
        qemu.kill();
    }
}
