//! Everything that can keep a guest from arriving, one by one: what the user reads, and that the guest never notices.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "mismatch/forger.rs"]
mod forger;
#[path = "common/program.rs"]
mod program;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use common::hostile::{Vmm, completed};
use common::{c_program, scratch, without_kvm};
use forger::Forger;
use program::Program;
use serde_json::{Value, json};

const TCP: &str = "tcp:127.0.0.1:0";

/// Both sides say these words; the guest runs on at the source, did not start at the destination, and moves elsewhere.
fn both_say(mut source: Vmm, mut there: Vmm, words: &str) {
    let (left, arrived) = (source.wait(), there.wait());
    assert_eq!((left.state.as_str(), left.message()), ("failed", words), "source");
    assert_eq!((arrived.state.as_str(), arrived.message()), ("failed", words), "destination");
    assert_eq!((left.error["side"].as_str(), left.error["phase"].as_str()), (Some("destination"), Some("hello")));
    assert_eq!(there.ask("starts"), "0");
    source.runs_on();
    source.moves_out();
    source.end();
    there.end();
}

fn refused(source: &[&str], there: &[&str], words: &str) {
    let mut source = Vmm::source(source);
    let (there, address) = Vmm::destination(there);
    source.does(&format!("out {address}"));
    both_say(source, there, words);
}

/// The same with a hello that somebody changes on the way.
fn forged(words: &str, change: fn(&mut Value)) {
    let mut source = Vmm::source(&[]);
    let (there, address) = Vmm::destination(&[]);
    let forger = Forger::new(&address, change);
    source.does(&format!("out {}", forger.uri));
    both_say(source, there, words);
}

#[test]
fn another_size_of_ram() {
    refused(
        &[],
        &["low=8"],
        "destination: hello: section 'ram' field 'low': RAM block 'low' has different lengths on the two sides \
         (source: 0x4000 bytes, destination: 0x8000 bytes)",
    );
}

#[test]
fn another_size_of_pages() {
    forged(
        "destination: hello: section 'ram' field 'page-size': the two sides have pages of different sizes \
         (source: 16384, destination: 4096)",
        |hello| hello["page-size"] = 16384.into(),
    );
}

#[test]
fn a_missing_device() {
    // A guest with one device more than its destination, and then the other way round.
    let (source, there) = (&["more=rng"][..], &[][..]);
    let mut source = Vmm::source(source);
    let (mut there, address) = Vmm::destination(there);
    source.does(&format!("out {address}"));
    let words = "destination: hello: section 'rng': the source has a device 'rng' (instance 0), the destination does \
                 not (source: version 1, destination: missing)";
    assert_eq!((source.wait().message(), there.wait().message()), (words, words));
    source.runs_on();
    let (mut good, address) = Vmm::destination(&["more=rng"]);
    source.moves_to(&mut good, &address);
    source.end();
    there.end();
    good.end();
}

#[test]
fn an_extra_device() {
    refused(
        &[],
        &["more=rng"],
        "destination: hello: section 'rng': the destination has a device 'rng' (instance 0), the source does not \
         (source: missing, destination: version 1)",
    );
}

#[test]
fn a_newer_device() {
    refused(
        &[],
        &["section=2"],
        "destination: hello: section 'gpu' field 'version': the version of device 'gpu' (instance 0) is newer than the \
         destination can read (source: 3, destination: 2 to 2)",
    );
}

#[test]
fn other_fields() {
    refused(
        &[],
        &["other=1"],
        "destination: hello: 2 differences: section 'uart' field 'control': device 'uart' (instance 7): the field is at \
         the source only (source: u32, destination: no such field); section 'uart' field 'extra': device 'uart' \
         (instance 7): the field is at the destination only (source: no such field, destination: u16)",
    );
}

#[test]
fn another_kind_of_field() {
    forged(
        "destination: hello: section 'uart' field 'fifo': device 'uart' (instance 7): the field is not the same on the \
         two sides (source: u8[count], at most 17, destination: u8[count], at most 16)",
        |hello| {
            for table in hello["tables"].as_array_mut().unwrap() {
                for field in table[0][2].as_array_mut().unwrap().iter_mut().filter(|f| f[0] == "fifo") {
                    field[2] = 17.into();
                }
            }
        },
    );
}

#[test]
fn a_feature_that_is_not_allowed() {
    for (option, allowed, refused) in [
        ("checksum crc32c", "zero-runs,crc32c,switchover", "multifd"),
        ("checksum crc32c", "zero-runs,multifd", "crc32c"),
        ("verify on", "multifd,switchover", "verify"),
        ("verify on", "multifd,verify", "switchover"),
    ] {
        let mut source = Vmm::new(&[]);
        source.does(&format!("set {option}"));
        source.does("start");
        let mut there = Vmm::new(&["fill=0"]);
        there.does(&format!("set allow-features {allowed}"));
        let address = there.listen("tcp::0");
        source.does(&format!("out {address}"));
        both_say(
            source,
            there,
            &format!(
                "destination: hello: section 'features' field '{refused}': the source needs feature '{refused}', which \
                 the destination does not allow (option 'allow-features' there) (source: needed, destination: not \
                 allowed)"
            ),
        );
    }
}

/// Where votes were taken the address is kept, and says to others what for; where they are not allowed the last byte is
/// the handover, and nobody listens any more.
#[test]
fn nobody_is_expected_any_more() {
    for (allowed, kept) in [("multifd,switchover", true), ("multifd,zero-runs", false)] {
        let mut source = Vmm::source(&[]);
        let mut there = Vmm::new(&["fill=0"]);
        there.does(&format!("set allow-features {allowed}"));
        let address = there.listen("tcp::0");
        source.moves_to(&mut there, &address);
        let mut late = Vmm::source(&[]);
        late.does(&format!("out {address}"));
        let look = late.wait();
        let words = format!(
            "destination: hello: nobody expects a guest at {address} now: the address is only kept for questions about \
             one that was sent there"
        );
        assert_eq!((look.state.as_str(), &look.error["errno"]), ("failed", &json!(libc::ECONNREFUSED)));
        assert_eq!(look.message() == words, kept, "{}", look.message());
        late.runs_on();
        there.runs_on();
        source.end();
        late.end();
        there.end();
    }
}

#[test]
fn a_feature_of_the_future() {
    forged(
        "destination: hello: section 'features' field 'telepathy': the source needs feature 'telepathy', which this \
         destination does not know (source: needed, destination: unknown)",
        |hello| hello["needs"] = json!(["telepathy"]),
    );
}

/// What a newer source says beside, and offers, is no difference.
#[test]
fn more_than_is_understood_is_ignored() {
    let mut source = Vmm::source(&[]);
    let (mut there, address) = Vmm::destination(&[]);
    let forger = Forger::new(&address, |hello| {
        hello["mood"] = json!({"colour": [1, 2, {"deep": null}]});
        hello["offers"] = json!(["telepathy", "zero-runs"]);
        hello["devices"][0]["weight"] = 7.into();
    });
    source.moves_to(&mut there, &forger.uri);
    source.end();
    there.end();
}

#[test]
fn a_busy_destination() {
    for multifd in ["on", "off"] {
        let mut first = Vmm::new(&[]);
        first.does(&format!("set multifd {multifd}"));
        first.does("set max-bandwidth 20K");
        first.does("start");
        let (mut there, address) = Vmm::destination(&[]);
        first.does(&format!("out {address}"));
        while first.ask("look").starts_with("setup") {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut second = Vmm::source(&[]);
        second.does(&format!("out {address}"));
        let words = format!("destination: hello: the destination {address} is busy: another guest is arriving there");
        let look = second.wait();
        assert_eq!(
            (look.state.as_str(), look.message(), &look.error["errno"]),
            ("failed", &*words, &json!(libc::EBUSY))
        );
        assert_eq!(second.refuses(&format!("check {address}")), (libc::EBUSY, words));
        second.runs_on();
        // The first one did not notice.
        first.does("set max-bandwidth 0");
        completed(&first.wait(), &there.wait());
        there.has_what_left(&mut first);
        second.moves_out();
        first.end();
        second.end();
        there.end();
    }
}

/// The source configures, the destination sets limits: so slow that it can be watched, over so many connections.
#[test]
fn a_destination_limits_what_it_takes() {
    let threads = |limits: &[&str]| -> u32 {
        let mut source = Vmm::new(&[]);
        source.does("set multifd-channels 3");
        source.does("start");
        let mut there = Vmm::new(&["fill=0"]);
        there.does("set max-bandwidth 2K");
        limits.iter().for_each(|limit| there.does(limit));
        let address = there.listen("tcp::0");
        source.does(&format!("out {address}"));
        while !source.ask("look").starts_with("active") {
            std::thread::sleep(Duration::from_millis(5));
        }
        let threads = source.ask("left").split(' ').nth(1).unwrap().parse().unwrap();
        assert!(source.ask("look").starts_with("active"), "2 KiB a second take their time");
        source.does("cancel");
        assert_eq!((source.wait().state.as_str(), there.wait().state.as_str()), ("cancelled", "failed"));
        source.moves_out();
        source.end();
        there.end();
        threads
    };
    let all = threads(&[]);
    assert_eq!(threads(&["set multifd-channels 1"]), all - 2);
    assert_eq!(threads(&["set multifd off"]), all - 3);
}

/// Number of differences, devices timed and not timed, their bytes, and the differences.
fn check(source: &mut Vmm, address: &str) -> (u32, u32, u32, u64, Vec<String>) {
    let line = source.ask(&format!("check {address}"));
    let words: Vec<&str> = line.splitn(5, ' ').collect();
    let list: Vec<Value> = serde_json::from_str(words.get(4).unwrap_or_else(|| panic!("{line}"))).unwrap();
    let list = list.iter().map(|e| e["message"].as_str().unwrap().to_owned()).collect();
    (words[0].parse().unwrap(), words[1].parse().unwrap(), words[2].parse().unwrap(), words[3].parse().unwrap(), list)
}

#[test]
fn a_check_touches_nothing_and_says_everything() {
    let mut source = Vmm::source(&[]);
    let (mut there, address) = Vmm::destination(&["low=8", "more=rng"]);
    for _ in 0..3 {
        let (found, _, _, _, words) = check(&mut source, &address);
        assert_eq!(
            (found, words),
            (
                2,
                vec![
                    "destination: hello: section 'ram' field 'low': RAM block 'low' has different lengths on the two \
                     sides (source: 0x4000 bytes, destination: 0x8000 bytes)"
                        .to_owned(),
                    "destination: hello: section 'rng': the destination has a device 'rng' (instance 0), the source \
                     does not (source: missing, destination: version 1)"
                        .to_owned(),
                ]
            )
        );
    }
    source.runs_on();
    there.does("cancel");
    assert_eq!((there.wait().state.as_str(), there.ask("starts").as_str()), ("cancelled", "0"));
    there.end();
    // Of its three devices the counter is a table without callbacks, eight bytes: that one can be saved while it runs.
    let (mut there, address) = Vmm::destination(&[]);
    assert_eq!(check(&mut source, &address), (0, 1, 2, 8, vec![]));
    assert_eq!(
        (source.ask("look").split(' ').next(), there.ask("look").split(' ').next()),
        (Some("none"), Some("setup"))
    );
    source.moves_to(&mut there, &address);
    assert_eq!(source.refuses(&format!("check {address}")).0, libc::EPERM, "the guest is not here any more");
    source.end();
    there.end();
}

#[test]
fn a_destination_builds_itself() {
    let mut source = Vmm::source(&[]);
    let (mut there, address) = Vmm::destination(&["build=1"]);
    source.does("config build");
    assert_eq!(check(&mut source, &address).0, 0, "what it would build is not compared");
    source.moves_to(&mut there, &address);
    source.end();
    there.end();
}

#[test]
fn a_destination_that_cannot_build_itself_says_so() {
    let mut source = Vmm::source(&[]);
    let (mut there, address) = Vmm::destination(&["build=1"]);
    source.does("config bogus");
    source.does(&format!("out {address}"));
    let (left, arrived) = (source.wait(), there.wait());
    let words = "destination: hello: the config hook returned -8 (Exec format error)";
    assert_eq!((left.message(), arrived.message()), (words, words));
    source.runs_on();
    // The next one says what is wanted.
    source.does("config build");
    let address = there.listen("tcp::0");
    source.moves_to(&mut there, &address);
    // Sections that the hook registered are freed once, too: the program looks at that.
    source.end();
    there.end();
}

/// A migration under way, which the caller ends on one side.
fn under_way(multifd: &str, checksum: &str) -> (Vmm, Vmm) {
    let mut source = Vmm::new(&[]);
    source.does(&format!("set multifd {multifd}"));
    source.does(&format!("set checksum {checksum}"));
    source.does("set max-bandwidth 20K");
    source.does("start");
    let (there, address) = Vmm::destination(&[]);
    source.does(&format!("out {address}"));
    while !source.ask("look").starts_with("active") {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(50));
    (source, there)
}

#[test]
fn a_source_that_gives_up_says_why() {
    for (multifd, checksum) in [("off", "none"), ("on", "none"), ("off", "crc32c"), ("on", "crc32c")] {
        let (mut source, mut there) = under_way(multifd, checksum);
        source.does("cancel");
        assert_eq!(source.wait().state, "cancelled");
        let look = there.wait();
        let seen = (look.state.as_str(), look.error["side"].as_str(), look.message());
        let words = "source: iterate: the migration was cancelled at the source";
        assert_eq!(seen, ("failed", Some("source"), words), "multifd {multifd}, checksum {checksum}");
        source.does("set max-bandwidth 0");
        source.moves_out();
        source.end();
        there.end();
    }
}

#[test]
fn a_destination_that_gives_up_says_why() {
    for multifd in ["off", "on"] {
        let (mut source, mut there) = under_way(multifd, "none");
        there.does("cancel");
        assert_eq!(there.wait().state, "cancelled");
        let look = source.wait();
        let seen = (look.state.as_str(), look.error["side"].as_str(), look.error["errno"].as_i64());
        assert_eq!(seen, ("failed", Some("destination"), Some(libc::ECANCELED.into())), "{}", look.error);
        source.runs_on();
        source.does("set max-bandwidth 0");
        source.moves_out();
        source.end();
        there.end();
    }
}

/// A hello that makes no sense is answered by words, and the destination by no means harmed.
#[test]
fn hostile_hellos_are_answered() {
    let deep = format!("{}{}", "[".repeat(500_000), "]".repeat(500_000));
    let names: Vec<Value> =
        (0..14_000).map(|n| json!({"name": format!("{n}"), "instance": 0, "version": 1})).collect();
    let fields: Vec<Value> = (0..40_000).map(|n| json!([format!("f{n}"), "u8"])).collect();
    let wide = json!([[["uart", 2, fields]]]);
    let twins: Vec<Value> =
        (0..5_000).map(|_| json!({"name": "uart", "instance": 7, "version": 2, "table": 0})).collect();
    let hello = |key: &str, value: Value| {
        let mut json = json!({"machine": "none", "page-size": 4096, "ram": [], "devices": []});
        json[key] = value;
        json
    };
    let mut crowd = hello("devices", twins.into());
    crowd["tables"] = wide;
    let msrs: Vec<u32> = (0..100_000).collect();
    let cases = [
        (deep, "is not JSON"),
        ("[]".into(), "something in it is not what it should be"),
        (hello("machine", json!({"a": 1})).to_string(), "something in it is not what it should be"),
        (hello("cpu", json!({"arch": []})).to_string(), "something in it is not what it should be"),
        (hello("tables", json!([[1]])).to_string(), "something in it is not what it should be"),
        (hello("config", json!(1u64 << 40)).to_string(), "the source's configuration"),
        (hello("devices", names.into()).to_string(), "more differences"),
        (crowd.to_string(), "the source names device 'uart' (instance 7) twice"),
        (
            hello(
                "cpu",
                json!({"arch": "x86_64", "vcpus": [], "msrs": msrs, "xsave-components": u64::MAX,
            "xsave-size": u64::MAX, "kvm-capabilities": [], "irqchip": "none"}),
            )
            .to_string(),
            "the source does not",
        ),
    ];
    let mut there = Vmm::new(&["fill=0"]);
    for (json, words) in cases {
        let address = there.listen("tcp::0");
        let mut stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
        let len = u32::try_from(json.len()).unwrap();
        let _ = stream.write_all(&[b"VMIG\0\0\0\x01", &len.to_be_bytes()[..], json.as_bytes()].concat());
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("VMIG") && answer.contains(words), "'{words}' is not in {answer:.2000}");
        assert_eq!((there.wait().state.as_str(), there.ask("starts").as_str()), ("failed", "0"));
    }
    let address = there.listen("tcp::0");
    let mut source = Vmm::source(&[]);
    source.moves_to(&mut there, &address);
    source.end();
    there.end();
}

/// The example VMM with one vCPU.
fn vmm(name: &str, dir: &Path, more: &[&str]) -> Program {
    let usual = ["--mem", "64", "--vcpus", "1", "--events-fd", "1", "--pages", "256"];
    Program::start(name, dir, &c_program("vmm"), &[&usual, more].concat())
}

/// A guest that runs at a VMM with these arguments is refused by one with those, for this reason alone; and moves to a
/// VMM that is like its own.
fn cpu_refused(here: &[&str], there: &[&str], change: Option<fn(&mut Value)>, words: impl Fn(&str) -> bool) {
    let dir = scratch("cpu");
    let mut source = vmm("source", &dir, here);
    assert_eq!(source.reply(), "running");
    source.await_generations(0, 2);
    let mut destination = vmm("destination", &dir, &[there, &["--incoming", TCP]].concat());
    let address = destination.listening();
    let forger = change.map(|change| Forger::new(&address, change));
    source.must(&format!("migrate {}", forger.as_ref().map_or(&address, |f| &f.uri)));
    source.must_end_in("failed");
    destination.must_end_in("failed");
    for program in [&mut source, &mut destination] {
        let answer = program.command("error");
        let error: Value = serde_json::from_str(answer.strip_prefix("failure ").unwrap()).unwrap();
        assert!(words(error["message"].as_str().unwrap()), "{}: {error:#}", program.name);
    }
    assert_eq!((source.news("stopped").len(), destination.cpu(0).beats), (0, 0), "the guest never noticed");
    source.await_generations(0, 2);
    let mut good = vmm("good", &dir, &[here, &["--incoming", TCP]].concat());
    let address = good.listening();
    source.must(&format!("migrate {address}"));
    source.must_end_in("completed");
    good.must_end_in("completed");
    good.await_generations(0, 2);
    source.quit();
    destination.quit();
    good.quit();
}

#[test]
fn another_cpuid() {
    if without_kvm() {
        return;
    }
    // A bit of KVM's own: some hosts show the guest the machine's leaves, whatever the VMM sets.
    cpu_refused(&[], &["--hide-cpuid", "0x40000001,0,0,3"], None, |message| {
        let start = "destination: hello: section 'cpu' field 'CPUID leaf 0x40000001 eax': vCPU 0: bit 3 (kvmclock2) is \
                     set at the source only (source: 0x";
        message.starts_with(start) && message.contains(", destination: 0x") && !message.contains("differences")
    });
}

#[test]
fn another_tsc() {
    if without_kvm() {
        return;
    }
    let scales = kvm_ioctls::Kvm::new().unwrap().check_extension_raw(kvm_bindings::KVM_CAP_TSC_CONTROL.into()) > 0;
    if scales && common::skip("fixed-tsc", "this host's CPU can run a guest with a TSC of any frequency") {
        return;
    }
    cpu_refused(
        &[],
        &[],
        Some(|hello| {
            let khz = &mut hello["cpu"]["vcpus"][0]["tsc-khz"];
            *khz = (khz.as_u64().unwrap() * 2).into();
        }),
        |message| {
            message.starts_with(
                "destination: hello: section 'cpu' field 'TSC frequency': vCPU 0: the TSC is not equally fast, and this \
                 host cannot scale it (source: ",
            ) && message.ends_with(" kHz)")
        },
    );
}

#[test]
fn a_missing_msr() {
    if without_kvm() {
        return;
    }
    let words = "destination: hello: section 'cpu' field 'MSR 0x4b564dee': the destination's KVM does not have this MSR \
                 (source: present, destination: missing)";
    let adds = |hello: &mut Value| hello["cpu"]["msrs"].as_array_mut().unwrap().push(0x4b56_4dee_u32.into());
    cpu_refused(&[], &[], Some(adds), |message| message == words);
}
