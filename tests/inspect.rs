//! `vmig inspect`, the program itself: streams of stock QEMU, files, pipes and connections of our own, damaged and hostile
//! ones. (That no cut and no flipped bit makes it panic is tested beside it, in src/bin/vmig/inspect/tests.rs.)
#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(clippy::incompatible_msrv, reason = "tests are run by a recent compiler")]

mod common;
#[path = "common/program.rs"]
mod program;
mod qemu;

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, Output, Stdio},
    thread,
};

use common::{Rng, c_program, root, scratch, words};
use program::Program;
use qemu::peer::Peer;
use qemu::{decode, peer};
use serde_json::Value;

const PAGE: usize = 4096;
/// Memory that is plenty for `vmig inspect`, whatever a stream says; in KiB, for ulimit.
const MEMORY_KIB: usize = 400 << 10;

/// The program, which gets no more memory than it may need.
fn vmig(args: &[&str], stdin: impl Into<Stdio>) -> Output {
    let mut command = Command::new("sh");
    let limited = format!("ulimit -v {MEMORY_KIB}; exec \"$0\" \"$@\"");
    command.args(["-c", &limited, env!("CARGO_BIN_EXE_vmig")]).args(args).stdin(stdin);
    command.output().unwrap()
}

/// What it says of bytes that come through a pipe, a few at a time.
fn piped(bytes: &[u8], args: &[&str]) -> Output {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let bytes = bytes.to_vec();
    let feeder = thread::spawn(move || bytes.chunks(7001).try_for_each(|piece| writer.write_all(piece)));
    let out = vmig(&[&["inspect"][..], args, &["-"]].concat(), OwnedFd::from(reader));
    // A stream that makes no sense is not read to its end.
    let _ = feeder.join().unwrap();
    out
}

fn json_of(out: &Output) -> Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("not JSON: {e}\n{}", words(out)))
}

/// What it says of a whole stream.
#[track_caller]
fn whole(bytes: &[u8]) -> Value {
    let out = piped(bytes, &["--json"]);
    assert_eq!(out.status.code(), Some(0), "{}", words(&out));
    let json = json_of(&out);
    assert_eq!(json["ok"], true);
    json
}

/// What it says of a damaged one: the byte, and the message.
#[track_caller]
fn damaged(bytes: &[u8]) -> (u64, String) {
    let out = piped(bytes, &["--json"]);
    assert_eq!(out.status.code(), Some(1), "{}", words(&out));
    let json = json_of(&out);
    assert_eq!(json["ok"], false);
    (json["error"]["byte"].as_u64().unwrap(), String::from_utf8_lossy(&out.stderr).into_owned())
}

fn path_of(name: &str) -> PathBuf {
    root().join("tests/streams").join(name)
}

fn stream(name: &str) -> Vec<u8> {
    fs::read(path_of(name)).unwrap()
}

/// All nodes, children too.
fn nodes(json: &Value) -> Vec<&Value> {
    let mut found = Vec::new();
    let list = json["elements"].as_array().or(json["parts"].as_array());
    for node in list.into_iter().flatten() {
        found.push(node);
        found.extend(nodes(node));
    }
    found
}

/// The first node of a kind with a name.
#[track_caller]
fn node<'a>(json: &'a Value, kind: &str, name: &str) -> &'a Value {
    let found = nodes(json).into_iter().find(|n| n["kind"] == kind && n["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name} in {json:#}"))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// Pages of all memory: whole, zero, as deltas.
fn pages(json: &Value) -> [u64; 3] {
    ["whole", "zero", "delta"].map(|kind| number(&json["memory"][kind]))
}

#[test]
fn every_capture_of_qemu_is_read() {
    let cases = [
        ("qemu10-none16.bin", true, [5, 4091, 0]),
        ("qemu10-none16-multifd.bin", true, [0, 0, 0]),
        ("qemu10-none16-multifd-zlib.bin", true, [0, 0, 0]),
        ("qemu10-none16-multifd-zstd.bin", true, [0, 0, 0]),
        ("qemu10-none512k-mapped-ram.bin", true, [4, 124, 0]),
        ("qemu10-none1-return-path.bin", true, [4, 252, 0]),
        ("qemu10-none1-switchover-ack.bin", true, [4, 252, 0]),
        ("qemu10-microvm16.bin", true, [260, 3981, 0]),
        ("qemu10-microvm16-postcopy.bin", true, [259, 3981, 0]),
        ("qemu10-microvm16-postcopy-lost.bin", false, [256, 226, 0]),
        ("qemu10-microvm16-postcopy-resumed.bin", true, [174, 3584, 0]),
    ];
    for (name, ok, expected) in cases {
        let file = path_of(name);
        let out = vmig(&["inspect", "--json", file.to_str().unwrap()], Stdio::null());
        assert_eq!(out.status.code(), Some(i32::from(!ok)), "{name}: {}", words(&out));
        let json = json_of(&out);
        assert_eq!((pages(&json), &json["ok"]), (expected, &ok.into()), "{name}");
        // A pipe, whose end cannot be looked at first, gives the same.
        let (mut of_pipe, mut of_file) = (json_of(&piped(&stream(name), &["--json"])), json);
        (of_pipe["file"], of_file["file"]) = (Value::Null, Value::Null);
        assert_eq!(of_pipe, of_file, "{name}");
        let files = files_in_streams();
        assert_eq!(files.len(), cases.len(), "a stream without a case here: {files:?}");
    }
}

fn files_in_streams() -> Vec<PathBuf> {
    let files = fs::read_dir(root().join("tests/streams")).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|e| e == "bin") && !path.ends_with("replies.bin"))
        .filter(|p| !p.to_str().unwrap().contains("replies"))
        .collect()
}

/// Fields of a device, in order: name, and where in the stream; of arrays the elements.
fn fields(device: &Value) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for field in nodes(device).into_iter().filter(|n| n["kind"] == "field") {
        let name = field["name"].as_str().unwrap().to_owned();
        for _ in 0..field["count"].as_u64().unwrap_or(1) {
            found.push((name.clone(), number(&field["at"])));
        }
    }
    found
}

#[test]
fn fields_are_what_an_independent_reader_finds() {
    for name in ["qemu10-none16.bin", "qemu10-microvm16.bin"] {
        let bytes = stream(name);
        let decoded = decode::decode(&bytes);
        let json = whole(&bytes);
        let devices: Vec<_> =
            json["elements"].as_array().unwrap().iter().filter(|e| e["kind"] == "full").cloned().collect();
        assert_eq!(devices.len(), decoded.devices.len(), "{name}");
        for (device, theirs) in devices.iter().zip(&decoded.devices) {
            assert_eq!(
                (&device["name"], number(&device["instance"])),
                (&theirs.name.as_str().into(), theirs.instance.into())
            );
            let ours = fields(device);
            assert_eq!(ours.len(), theirs.fields.len(), "{name}: {}", theirs.name);
            for ((field, at), (path, raw)) in ours.iter().zip(&theirs.fields) {
                let plain = path.rsplit('.').next().unwrap();
                let is_element = path.ends_with(']');
                assert!(is_element || field.ends_with(plain) || field.contains('['), "{field} {path}");
                let at = usize::try_from(*at).unwrap();
                assert!(is_element || bytes[at..].starts_with(raw), "{name}: {} {path} at {at:#x}", theirs.name);
            }
        }
        let clock = decoded.device("timer").u64("cpu_clock_offset");
        assert_eq!(number(&node(&json, "field", "cpu_clock_offset")["value"]), clock);
    }
    let json = whole(&stream("qemu10-microvm16.bin"));
    assert_eq!(node(&json, "field", "env.eip")["value"], 18);
    assert_eq!(node(&json, "field", "runstate")["text"], "running");
    assert_eq!(node(&json, "part", "cpu/tsc_khz")["version"], 1);
}

#[test]
fn postcopy_is_read_with_the_description_of_another_stream() {
    let file = path_of("qemu10-microvm16-postcopy.bin");
    let other = path_of("qemu10-microvm16.bin");
    let args = ["inspect", "--json", "--description", other.to_str().unwrap(), file.to_str().unwrap()];
    let out = vmig(&args, Stdio::null());
    assert!(out.status.success(), "{}", words(&out));
    let json = json_of(&out);
    let package = node(&json, "command", "PACKAGED");
    assert_eq!(number(&package["bytes"]), 2834);
    assert!(nodes(package).iter().all(|n| n["kind"] != "body"), "{package:#}");
    assert_eq!(node(package, "field", "env.hflags")["type"], "uint32");
    // Without it the bodies have lengths.
    let bare = whole(&stream("qemu10-microvm16-postcopy.bin"));
    let cpu = node(&bare, "full", "cpu");
    assert_eq!((number(&cpu["parts"][0]["bytes"]), &cpu["parts"][0]["kind"]), (1842, &"body".into()));
}

/// What a program of ours writes with these settings.
fn written(file: File, settings: &[&str]) -> peer::End {
    let dir = scratch("inspect-ram");
    let ram = peer::drawn_ram(&dir, 4 << 20);
    let mut all = vec!["ram=4194304".to_owned(), peer::path("load", &ram), "device=1".to_owned()];
    all.extend(settings.iter().map(ToString::to_string));
    Peer::start(&c_program("peer"), "out", "fd:0", &all, file).end().completed()
}

#[track_caller]
fn is_the_gadget(json: &Value) {
    let gadget = node(json, "full", "gadget");
    assert_eq!((number(&gadget["instance"]), number(&gadget["version"])), (7, 3));
    let value = |name: &str| &node(gadget, "field", name)["value"];
    assert_eq!((value("mode"), value("level"), value("on")), (&7.into(), &(-5).into(), &true.into()));
    assert_eq!(value("table"), &serde_json::json!([1, 2, 3, 4, 5]));
    assert_eq!(value("ring"), &serde_json::json!([6, 7, 8]));
    assert_eq!(node(gadget, "field", "serial")["text"], "peer");
    assert_eq!((value("alarm"), value("extra")), (&u64::MAX.into(), &10.into()));
    assert_eq!(nodes(gadget).iter().filter(|n| n["kind"] == "struct").count(), 3, "{gadget:#}");
}

#[test]
fn files_and_pipes_of_our_own_are_read() {
    let file = scratch("inspect-file").join("stream");
    let end = written(File::create(&file).unwrap(), &["dirty=100"]);
    let bytes = fs::read(&file).unwrap();
    let json = whole(&bytes);
    assert_eq!(pages(&json), [end.normal_pages, end.zero_pages, 0]);
    is_the_gadget(&json);
    assert_eq!(node(&json, "field", "runstate")["text"], "running");
    let description = nodes(&json).into_iter().find(|n| n["kind"] == "description").unwrap();
    assert_eq!(description["written-by"], format!("vmig {}", env!("CARGO_PKG_VERSION")));
    // The same from the file, behind something else in it.
    let behind = file.with_extension("behind");
    fs::write(&behind, [&[0xa5; 5000][..], &bytes].concat()).unwrap();
    let out = vmig(&["inspect", "--json", "--offset", "0x1388", behind.to_str().unwrap()], Stdio::null());
    assert!(out.status.success(), "{}", words(&out));
    let moved = json_of(&out);
    assert_eq!((pages(&moved), &moved["elements"][0]["at"]), (pages(&json), &5000.into()));
    is_the_gadget(&moved);
    // Directly from the source into the tool.
    let (reader, writer) = std::io::pipe().unwrap();
    let source = thread::spawn(|| written(File::from(OwnedFd::from(writer)), &[]));
    let out = vmig(&["inspect", "--json", "-"], OwnedFd::from(reader));
    let end = source.join().unwrap();
    assert!(out.status.success(), "{}", words(&out));
    assert_eq!(pages(&json_of(&out)), [end.normal_pages, end.zero_pages, 0]);
    is_the_gadget(&json_of(&out));
}

/// Carries a connection to `destination` and keeps what the source said.
fn recorded(destination: &str) -> (String, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let there = destination.strip_prefix("tcp:").unwrap().to_owned();
    let carry = move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut forth = TcpStream::connect(there).unwrap();
        let (mut from, mut to) = (forth.try_clone().unwrap(), source.try_clone().unwrap());
        let back = thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
        let (mut said, mut room) = (Vec::new(), [0; 16384]);
        while let Ok(got @ 1..) = source.read(&mut room) {
            said.extend_from_slice(&room[..got]);
            if forth.write_all(&room[..got]).is_err() {
                break;
            }
        }
        let _ = forth.shutdown(Shutdown::Write);
        back.join().unwrap();
        said
    };
    (uri, thread::spawn(carry))
}

#[test]
fn connections_between_two_of_us_are_read() {
    for more in [vec![], vec!["checksum=crc32c"]] {
        let settings = |own: &[&str]| {
            let all = ["ram=4194304", "device=1", "multifd=off"].iter().chain(own).chain(&more);
            all.map(ToString::to_string).collect::<Vec<_>>()
        };
        let destination = Peer::start(&c_program("peer"), "in", "tcp::0", &settings(&[]), Stdio::null());
        let (uri, said) = recorded(&destination.address);
        let source = Peer::start(&c_program("peer"), "out", &uri, &settings(&["dirty=50"]), Stdio::null());
        let end = source.end().completed();
        destination.end().completed();
        let said = said.join().unwrap();
        let json = whole(&said);
        let memory = pages(&json);
        assert_eq!(memory, [end.normal_pages, end.zero_pages, 0], "{more:?}");
        let hello = nodes(&json)[0];
        assert_eq!((&hello["kind"], &hello["devices"]), (&"hello".into(), &1.into()));
        // No description comes: the tables were compared before.
        let body = &node(&json, "full", "gadget")["parts"][0];
        assert_eq!((&body["kind"], &body["starts"]), (&"body".into(), &"07fffffffb0100000001000000020000".into()));
        node(&json, "command", "PREPARE");
        node(&json, "command", "GO");
        if !more.is_empty() {
            let mut altered = said;
            let at = altered.len() / 2;
            altered[at] ^= 0x10;
            let (byte, words) = damaged(&altered);
            assert!(words.contains("checksum (CRC32C) differs") && byte < at as u64, "{byte:#x}: {words}");
        }
    }
}

#[test]
fn hashes_that_are_compared_are_read() {
    let settings =
        |own: &[&str]| ["ram=4194304", "device=1"].iter().chain(own).map(ToString::to_string).collect::<Vec<_>>();
    let destination = Peer::start(&c_program("peer"), "in", "tcp::0", &settings(&["multifd=off"]), Stdio::null());
    let (uri, said) = recorded(&destination.address);
    let source =
        Peer::start(&c_program("peer"), "out", &uri, &settings(&["multifd=off", "verify=on"]), Stdio::null());
    source.end().completed();
    destination.end().completed();
    let said = said.join().unwrap();
    let json = whole(&said);
    node(&json, "command", "HASH");
    let hashes = node(&json, "command", "HASHES")["parts"].as_array().unwrap();
    assert_eq!((&hashes[0]["kind"], &hashes[0]["granules"]), (&"block".into(), &2.into()), "{hashes:?}");
    let gadget = node(&json, "full", "gadget");
    let of_it = hashes.iter().find(|h| h["kind"] == "section" && h["name"] == "gadget").unwrap();
    assert_eq!(of_it["id"], gadget["id"]);

    // What a source says when the destination found a granule that differs.
    let at = usize::try_from(number(&node(&json, "command", "PREPARE")["at"])).unwrap();
    let told = |pages: u32| {
        let mut stream = said[..at].to_vec();
        stream.extend([&[8, 0x56, 0x22, 0, 0], &pages.to_be_bytes()[..]].concat());
        stream.extend([7; 8 * 513]);
        stream.truncate(at + 9 + 8 * pages as usize);
        stream.extend(&said[at..]);
        stream
    };
    assert_eq!(node(&whole(&told(512)), "command", "PAGE_HASHES")["pages"], 512);
    let (byte, words) = damaged(&told(513));
    assert!(byte == at as u64 + 5 && words.contains("more pages than a granule has"), "{byte:#x}: {words}");
}

/// A listener that takes everything and says nothing, as a file does.
fn taker() -> (String, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let take = move || {
        let mut said = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut said).unwrap();
        said
    };
    (uri, thread::spawn(take))
}

#[test]
fn sections_with_much_state_are_read() {
    let dir = scratch("inspect-sections");
    let mut source = Program::start("source", &dir, &c_program("sections"), &[]);
    assert_eq!(source.reply(), "ready");
    for setting in ["peer qemu", "return-path off", "multifd off", "convergence-time 60000"] {
        source.must(&format!("set {setting}"));
    }
    let (uri, said) = taker();
    source.must(&format!("migrate {uri}"));
    source.must_end_in("completed");
    source.quit();
    let said = said.join().unwrap();
    let json = whole(&said);
    let bulk = |kind: &str| {
        let mine = |n: &&Value| n["kind"] == kind && n["name"] == "bulk";
        nodes(&json).into_iter().filter(mine).map(|n| number(&n["parts"][0]["bytes"])).collect::<Vec<_>>()
    };
    let sent = [bulk("start"), bulk("part"), bulk("end")];
    assert!(sent[0].len() == 2 && sent[1].len() > 4 && sent[2].len() == 2, "{sent:?}");
    assert!(sent[1].iter().sum::<u64>() > 64 << 20, "{sent:?}");
    // Two devices with every kind of field there is.
    let fields = nodes(&json).iter().filter(|n| n["kind"] == "field").count();
    assert!(fields > 70, "{fields}");
    assert!(nodes(&json).iter().all(|n| n["ends"].is_null()), "a body of ours whose end was guessed");
}

/// Puts `with` in place of the bytes at `at`.
fn patched(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    out[at..at + with.len()].copy_from_slice(with);
    out
}

#[test]
fn damage_is_named_with_its_place() {
    let good = stream("qemu10-none16.bin");
    whole(&good);
    let cases: [(Vec<u8>, u64, &str); 15] = [
        (Vec::new(), 0, "the stream ends at byte 0x0"),
        (patched(&good, 0, b"HTTP"), 0, "this is not a migration stream"),
        (patched(&good, 7, &[2]), 4, "unsupported version of the migration stream"),
        (patched(&good, 8, &[9]), 8, "configuration section missing"),
        (patched(&good, 0x11, &[0x55]), 0x11, "unknown section type 0x55"),
        (good[..0x30].to_vec(), 0x30, "the stream ends at byte 0x30"),
        (patched(&good, 0x2a, b"\x03xyz"), 0x48, "RAM block 'ram' is not in the list of blocks"),
        (
            patched(&good, 0x2e, &[0, 0, 0, 0, 2]),
            0x2a,
            "RAM block 'ram' has 33554432 bytes, of 16777216 that are left",
        ),
        (patched(&good, 0x3e, &[0x7d]), 0x3e, "the section's footer is missing"),
        (patched(&good, 0x42, &[7]), 0x3e, "the footer is another section's (expected id 1, got id 7)"),
        (patched(&good, 0x47, &[9]), 0x43, "section id 9 was not introduced"),
        (patched(&good, 0x48, &[0, 0, 0, 1]), 0x48, "page 0x100000000 is outside of RAM block 'ram'"),
        (patched(&good, 0x4f, &[0x22, 0]), 0x48, "the first page names no RAM block"),
        (patched(&good, 0xe056, &[99]), 0xe055, "command 0x63"),
        ([&good[..], b"more"].concat(), good.len() as u64, "bytes follow the end of the stream"),
    ];
    for (bytes, at, text) in cases {
        let (byte, said) = damaged(&bytes);
        assert!(said.contains(text), "expected '{text}' at {at:#x}: {said}");
        assert_eq!(byte, at, "{said}");
    }
    // What the description says is not what is there.
    let text = String::from_utf8_lossy(&good).into_owned();
    let longer = text.rfind("\"size\": 66").unwrap();
    let at = good.len() - (text.len() - longer);
    let (_, said) = damaged(&patched(&good, at, b"\"size\": 99"));
    assert!(said.contains("section 'globalstate'"), "{said}");
    let (_, said) = damaged(&patched(&good, at, b"\"size\": -9"));
    assert!(said.contains("section 'globalstate' field 'unused': ") && said.contains("makes no sense"), "{said}");
    let mut open = good.clone();
    *open.last_mut().unwrap() = b']';
    let (_, said) = damaged(&open);
    assert!(said.contains("the stream's description is not JSON"), "{said}");
    assert!(damaged(&stream("qemu10-none1-return-path.replies.bin")).1.contains("not a migration stream"));
    assert!(damaged(b"\x11\x22\x33\x44\0\0\0\x01").1.contains("a parallel channel (multifd)"));
}

/// A stream whose device `evil` has this description; nothing is in its body.
fn described(fields: &str) -> Vec<u8> {
    let json = format!(
        "{{\"devices\": [{{\"name\": \"evil\", \"instance_id\": 0, \"version\": 1, \"fields\": [{fields}]}}]}}"
    );
    let mut out =
        b"QEVM\0\0\0\x03\x07\0\0\0\x04none\x04\0\0\0\x07\x04evil\0\0\0\0\0\0\0\x01\x7e\0\0\0\x07\0\x06".to_vec();
    out.extend(u32::try_from(json.len()).unwrap().to_be_bytes());
    out.extend(json.as_bytes());
    out
}

#[test]
fn lengths_and_counts_of_a_stream_are_not_believed() {
    let head = &b"QEVM\0\0\0\x03\x07\0\0\0\x04none"[..];
    let huge = [0xff; 8];
    let with = |rest: &[&[u8]]| [head, &rest.concat()].concat();
    let start = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04";
    let mapped = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram";
    let cases = [
        with(&[b"\0\x06\xff\xff\xff\xff{"]),
        with(&[b"\0\x06\x03\xff\xff\xff{"]),
        with(&[b"\x08\0\x07\0\x04\xff\xff\xff\xff"]),
        with(&[b"\x08\x56\0\0\0", &huge]),
        with(&[b"\x04\0\0\0\x07\x04evil\0\0\0\0\0\0\0\x01\x01\xff\xff\xff"]),
        with(&[b"\x04\0\0\0\x07\x04evil\0\0\0\0\0\0\0\x01\xff\xff\xff\xff"]),
        with(&[start, b"\xff\xff\xff\xff\xff\xff\xf0\x04\x01a\xff\xff\xff\xff\xff\xff\xf0\0"]),
        with(&[
            mapped,
            start,
            b"\x7f\xff\xff\xff\xff\xff\xf0\x04\x01a\x7f\xff\xff\xff\xff\xff\xf0\0\0\0\0\x01\0\0\0\0\0\0\x10\0\
            \0\0\0\0\0\0\0\xff\x10\0\0\0\0\0\0\0",
        ]),
        b"VMIG\0\0\0\x01\xff\xff\xff\xff{".to_vec(),
        described(
            r#"{"name": "x", "type": "uint8", "size": 18446744073709551615, "array_len": 18446744073709551615}"#,
        ),
        described(r#"{"name": "x", "type": "buffer", "size": 9223372036854775807}"#),
        described(
            r#"{"name": "x", "type": "uint8", "size": 0, "array_len": 18446744073709551615}, 7, {}, {"name": 7}"#,
        ),
        described(r#"{"name": "x", "array_len": 18446744073709551615, "struct": {"fields": []}}"#),
        described(
            r#"{"name": "x", "array_len": 4294967295, "struct": {"fields": [{"name": "y", "array_len": 4294967295, "struct": {}}]}}"#,
        ),
    ];
    for (index, bytes) in cases.iter().enumerate() {
        let (byte, said) = damaged(bytes);
        assert!(byte <= bytes.len() as u64, "case {index}: {said}");
    }
    let nested =
        (0..38).fold(String::new(), |inner, _| format!(r#"{{"name": "x", "struct": {{"fields": [{inner}]}}}}"#));
    assert!(damaged(&described(&nested)).1.contains("nested deeper than"));
}

/// Says how many bytes of pages it was given, and the source of them takes no memory either.
fn pages_through_a_pipe(mib: usize) -> Output {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let feeder = thread::spawn(move || -> std::io::Result<()> {
        let blocks = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\x10\0\x04\x03ram\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01";
        writer.write_all(&[&b"QEVM\0\0\0\x03\x07\0\0\0\x04none"[..], blocks].concat())?;
        let mut part = b"\x02\0\0\0\x01".to_vec();
        for page in 0..256u64 {
            part.extend(((page * PAGE as u64) | if page == 0 { 8 } else { 0x28 }).to_be_bytes());
            part.extend(if page == 0 { &b"\x03ram"[..] } else { b"" });
            part.extend([0x5a; PAGE]);
        }
        part.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
        (0..mib).try_for_each(|_| writer.write_all(&part))?;
        writer.write_all(b"\0\x06\0\0\0\x02{}")
    });
    let out = vmig(&["inspect", "--json", "-"], OwnedFd::from(reader));
    feeder.join().unwrap().unwrap();
    out
}

#[test]
fn a_long_stream_takes_no_more_memory_than_a_short_one() {
    let mib = 2 * (MEMORY_KIB >> 10);
    let out = pages_through_a_pipe(mib);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(pages(&json_of(&out)), [256 * mib as u64, 0, 0]);
}

#[test]
fn names_of_a_stream_cannot_steer_a_terminal() {
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x04\x1b[2J\x04\0\0\0\x07\x04a\x1b[H\0\0\0\0\0\0\0\x01".to_vec();
    bytes.extend([1; 40]);
    let out = piped(&bytes, &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        out.stdout.starts_with(b"00000000 header  version 3\n00000008 configuration \\u{1b}[2J\n"),
        "{}",
        words(&out)
    );
    assert!(!out.stdout.contains(&0x1b) && !out.stderr.contains(&0x1b), "{}", words(&out));
}

#[test]
fn damage_drawn_at_random_is_survived_by_the_program() {
    let mut rng = Rng::new("inspect");
    for name in ["qemu10-none16-multifd.bin", "qemu10-microvm16-postcopy.bin", "qemu10-none1-return-path.bin"] {
        let good = stream(name);
        for _ in 0..25 {
            let mut bytes = good.clone();
            for _ in 0..=rng.below(3) {
                // Where the frame is rather than the pages.
                let at = if rng.below(2) == 0 { rng.below(1000) } else { bytes.len() - 1 - rng.below(1000) };
                bytes[at] ^= 1 << rng.below(8);
            }
            bytes.truncate(bytes.len() - rng.below(40) * rng.below(2));
            let out = piped(&bytes, &[]);
            let status = out.status.code();
            assert!(matches!(status, Some(0 | 1)), "{name}: {}", words(&out));
            assert_eq!(status == Some(1), out.stderr.starts_with(b"vmig: -: "), "{name}: {}", words(&out));
        }
    }
}

#[test]
fn the_command_line_is_checked() {
    let said = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_vmig")).args(args).stdin(Stdio::null()).output().unwrap();
        (out.status.code(), words(&out))
    };
    for (args, text) in [
        (&[][..], "a command is missing"),
        (&["dance"], "there is no command 'dance'"),
        (&["inspect"], "a file is missing"),
        (&["inspect", "a", "b"], "unexpected argument"),
        (&["inspect", "--offset", "x", "a"], "x"),
        (&["inspect", "--colour", "a"], "--colour"),
    ] {
        let (status, words) = said(args);
        assert_eq!(status, Some(2), "{words}");
        assert!(words.contains(text) && words.contains("usage: vmig inspect"), "{words}");
    }
    assert_eq!(said(&["--version"]), (Some(0), format!("vmig {}\n", env!("CARGO_PKG_VERSION"))));
    assert!(said(&["--help"]).1.starts_with("usage: vmig inspect"));
    let (status, words) = said(&["inspect", "/nowhere/at all"]);
    assert_eq!((status, words.contains("/nowhere/at all: cannot open it: No such file")), (Some(1), true), "{words}");
    assert_eq!(said(&["inspect", root().join("src").to_str().unwrap()]).0, Some(1));
}

#[test]
fn parts_that_are_empty_are_counted_in_their_place() {
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x04none".to_vec();
    bytes.extend(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04\x03ram\0\0\0\0\0\0\x10\0");
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01";
    bytes.extend(end);
    let empty = [&b"\x02\0\0\0\x01"[..], end].concat();
    bytes.extend(empty.repeat(2460));
    bytes.extend(b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x02\x03ram\0");
    bytes.extend([&end[..], &empty, b"\0"].concat());
    let json = whole(&bytes);
    let parts: Vec<_> = nodes(&json).into_iter().filter(|n| n["kind"] == "part").map(|n| &n["empty"]).collect();
    assert_eq!(parts, [&Value::from(2460), &Value::Null, &1.into()]);
    let places: Vec<_> = nodes(&json).into_iter().map(|n| number(&n["at"])).collect();
    assert!(places.is_sorted(), "{places:?}");
}

#[test]
fn what_only_looks_like_a_footer_is_none() {
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x04none\x04\0\0\0\x07\x04what\0\0\0\0\0\0\0\x01".to_vec();
    bytes.extend(b"\x99abc\x7e\0\0\0\x07\x55 \x7e\0\0\0\x07\x08\0\x63\0\0 \x7e\0\0\0\x07\x04\0\0\0\x09\x02\x01\x02");
    bytes.extend([0x33; 200_000]);
    bytes.extend(b"\x7e\0\0\0\x07\0");
    let json = whole(&bytes);
    assert_eq!(number(&node(&json, "full", "what")["parts"][0]["bytes"]), 35 + 200_000);
}

#[test]
fn a_reader_of_the_output_may_go() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmig"));
    command.arg("inspect").arg(path_of("qemu10-microvm16.bin")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", words(&out));
}
