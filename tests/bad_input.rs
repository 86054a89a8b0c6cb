//! Streams and peers that are not what they should be: a clear error with its place, and everybody goes on.
//! The VMM is `c_program("hostile")`, which also makes tests/run repeat this file under AddressSanitizer.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::hostile::{Look, Vmm};
use common::{points, scratch};
use serde_json::{Value, json};

/// A stream as the library writes it to a file, and where it is.
fn good_stream(dir: &Path) -> (PathBuf, Vec<u8>) {
    let path = dir.join("good");
    // Idle from its first moment, so that the pages which are zero are the same every time.
    let mut source = Vmm::new(&[]);
    source.does("idle 1");
    source.does("start");
    source.does(&format!("save {}", path.display()));
    assert_eq!(source.wait().state, "completed");
    source.end();
    let bytes = fs::read(&path).unwrap();
    (path, bytes)
}

/// Loads damaged streams, each followed by the good one, into one guest.
fn sweep(good: &Path, lines: &[String]) -> Vec<Look> {
    let mut vmm = Vmm::new(&["fill=0"]);
    vmm.say(&format!("sweep {}", good.display()));
    let looks = lines.iter().map(|line| {
        vmm.say(line);
        Look::of(&vmm.hear())
    });
    let looks = looks.collect();
    assert!(vmm.ask("end").starts_with("swept "));
    vmm.end();
    looks
}

#[test]
fn a_stream_cut_anywhere_fails_and_says_where() {
    let dir = scratch("cuts");
    let (path, bytes) = good_stream(&dir);
    let cuts = points("cuts", bytes.len(), 60);
    let lines: Vec<String> = cuts.iter().map(|n| format!("cut {n}")).collect();
    // A part is known by what its name begins with: cut in there, it looks like a body that goes on too long.
    let part = bytes.windows(7).position(|w| w == b"\x05\x0auart/").unwrap();
    for (n, look) in cuts.iter().zip(sweep(&path, &lines)) {
        let (errno, place) = match (part + 1..part + 7).contains(n) {
            true => (libc::EINVAL, format!("section 'uart': byte {part:#x}:")),
            false => (libc::EIO, format!("the stream ends at byte {n:#x},")),
        };
        assert_eq!(
            (look.state.as_str(), &look.error["errno"]),
            ("failed", &json!(errno)),
            "cut at {n}: {}",
            look.error
        );
        assert!(look.message().contains(&place) && look.message().starts_with("destination: "), "{}", look.message());
    }
}

/// Reads a stream of ours with nothing but the format's rules, and says of each byte whether any change must be noticed.
struct Map<'a> {
    bytes: &'a [u8],
    at: usize,
    /// True: part of the frame.
    frame: Vec<bool>,
    /// Where each section begins, by name and part; and where records of pages begin.
    sections: Vec<(String, u8, usize, usize)>,
    records: Vec<(u64, usize)>,
}

impl<'a> Map<'a> {
    fn of(bytes: &'a [u8]) -> Map<'a> {
        let mut map = Map { bytes, at: 0, frame: vec![false; bytes.len()], sections: vec![], records: vec![] };
        map.take(9);
        map.blob();
        while map.element() {}
        map.take(1);
        map.take(4);
        map
    }

    /// Frame bytes, as a number.
    fn take(&mut self, n: usize) -> u64 {
        self.frame[self.at..self.at + n].fill(true);
        let value = self.bytes[self.at..self.at + n].iter().fold(0, |v, b| v << 8 | u64::from(*b));
        self.at += n;
        value
    }

    fn blob(&mut self) {
        let len = usize::try_from(self.take(4)).unwrap();
        self.take(len);
    }

    fn name(&mut self) -> String {
        let len = usize::try_from(self.take(1)).unwrap();
        let at = self.at;
        self.take(len);
        String::from_utf8(self.bytes[at..at + len].to_vec()).unwrap()
    }

    fn element(&mut self) -> bool {
        let start = self.at;
        let kind = u8::try_from(self.take(1)).unwrap();
        if kind == 0 {
            return false;
        }
        if kind == 8 {
            self.take(4);
            return true;
        }
        let id = self.take(4);
        let name = match kind {
            1 | 4 => {
                let name = self.name();
                self.take(8);
                name
            }
            _ => (if id == 1 { "ram" } else { "gpu" }).to_owned(),
        };
        self.sections.push((name.clone(), kind, start, self.at));
        match name.as_str() {
            "ram" => self.ram(),
            "gpu" => {
                let len = usize::try_from(self.take(4)).unwrap();
                self.at += len;
            }
            _ => {
                let footer = [&[0x7e][..], &u32::try_from(id).unwrap().to_be_bytes()].concat();
                self.at += self.bytes[self.at..].windows(5).position(|w| w == footer).unwrap();
            }
        }
        assert_eq!(self.take(5), 0x7e << 32 | id);
        true
    }

    fn ram(&mut self) {
        loop {
            let at = self.at;
            let word = self.take(8);
            self.records.push((word & 0xfff, at));
            // Another page of the same block is as good as this one.
            self.frame[at + 6] = false;
            match word & 0xfdf {
                0x10 => return self.frame[at..at + 8].fill(false),
                0x04 => {
                    self.frame[at..at + 8].fill(true);
                    let mut left = word & !0xfff;
                    while left > 0 {
                        self.name();
                        left -= self.take(8);
                    }
                }
                flags => {
                    if word & 0x20 == 0 {
                        self.name();
                    }
                    match flags {
                        2 => drop(self.take(1)),
                        8 => self.at += 4096,
                        _ => panic!("flags {flags:#x} at {at:#x}"),
                    }
                }
            }
        }
    }

    /// Whether a stream with this byte changed to `value` may still be one.
    fn may_pass(&self, at: usize, value: u8) -> bool {
        let kind = self.sections.iter().any(|s| s.2 == at && (1..=4).contains(&value));
        let setup = self.records.iter().any(|(flags, word)| *flags == 4 && word + 7 == at && value == 0x24);
        // SWITCHOVER_START may become another command without a body.
        let command = at > 2 && self.bytes[at - 2..=at] == [8, 0, 11];
        !self.frame[at] || kind || setup || command
    }
}

#[test]
fn a_changed_byte_of_the_frame_is_noticed_and_none_does_harm() {
    let dir = scratch("sets");
    let (path, bytes) = good_stream(&dir);
    let map = Map::of(&bytes);
    let frame: Vec<usize> = (0..bytes.len()).filter(|at| map.frame[*at]).collect();
    assert!(frame.len() > 300, "the map has found {} frame bytes", frame.len());
    let mut sets = Vec::new();
    let mut ways = |at: usize, way: usize| {
        let old = bytes[at];
        sets.push((at, [!old, old ^ 1 << (at % 8), old.wrapping_add(1)][way]));
    };
    points("frame", frame.len() * 3, 150).iter().for_each(|p| ways(frame[p / 3], p % 3));
    points("bytes", bytes.len(), 60).iter().for_each(|p| ways(*p, p % 3));
    let lines: Vec<String> = sets.iter().map(|(at, value)| format!("set {at} {value}")).collect();
    let mut failed = 0;
    for ((at, value), look) in sets.iter().zip(sweep(&path, &lines)) {
        let place = format!("byte {at:#x}: {:#04x} -> {value:#04x}: {} {}", bytes[*at], look.state, look.error);
        assert!(look.state == "failed" || map.may_pass(*at, *value), "{place}");
        if look.state == "failed" {
            failed += 1;
            let errno = look.error["errno"].as_i64().unwrap();
            assert!(errno > 0 && look.message().len() > 20 && !look.message().contains("panic"), "{place}");
        }
    }
    assert!(failed >= 100, "only {failed} of {} changes were noticed", sets.len());
}

#[test]
fn wrong_streams_are_named() {
    let dir = scratch("wrong");
    let (path, bytes) = good_stream(&dir);
    let map = Map::of(&bytes);
    let section = |name: &str, kind: u8| map.sections.iter().find(|s| s.0 == name && s.1 == kind).unwrap();
    let record = |flags: u64| map.records.iter().find(|r| r.0 == flags).unwrap().1;
    let (uart, gpu, ram) = (section("uart", 4).2, section("gpu", 1).2, section("ram", 1).3);
    let (page, zero, next) = (record(8), record(2), record(0x22));
    let end = map.at - 4;
    let edit = |at: usize, with: &[u8]| {
        let mut new = bytes.clone();
        new[at..at + with.len()].copy_from_slice(with);
        new
    };
    let huge = &[0xff; 4];
    let mut resized = edit(ram + 18, &[0x80]);
    resized[ram + 6] += 0x40;
    let cases: Vec<(&str, Vec<u8>, i32, Vec<String>)> = vec![
        ("empty", vec![], libc::EIO, vec!["ends at byte 0x0".into()]),
        ("magic", edit(0, b"HTTP"), libc::EINVAL, vec!["magic 0x5145564d".into(), "0x48545450".into()]),
        ("version", edit(7, &[2]), libc::ENOTSUP, vec!["version".into(), "expected 3, got 2".into()]),
        ("no configuration", edit(8, &[1]), libc::EINVAL, vec!["byte 0x8: configuration".into()]),
        ("machine", edit(13, b"pc98"), libc::EINVAL, vec!["machine".into(), "'none'".into(), "'pc98'".into()]),
        ("long machine", edit(9, huge), libc::EINVAL, vec!["machine name".into(), "4294967295".into()]),
        ("unknown section", edit(uart + 6, b"tape"), libc::EINVAL, vec!["section 'tape' instance 7".into()]),
        ("control characters", edit(uart + 6, b"a\x1b[m"), libc::EINVAL, vec![r"section 'a\u{1b}[m'".into()]),
        ("wrong instance", edit(uart + 13, &[9]), libc::EINVAL, vec!["instance 9".into(), "instance 7".into()]),
        ("wrong version", edit(uart + 17, &[9]), libc::EINVAL, vec!["uart".into(), "version".into(), "9".into()]),
        ("section version", edit(gpu + 16, &[1]), libc::EINVAL, vec!["gpu".into(), "version".into(), "1".into()]),
        (
            "ram version",
            edit(ram - 1, &[3]),
            libc::EINVAL,
            vec!["ram".into(), "version 4".into(), "version 3".into()],
        ),
        ("ram missing", edit(ram + 9, b"lox"), libc::ENOENT, vec!["RAM block 'lox'".into(), "ram".into()]),
        ("ram resized", resized, libc::EINVAL, vec!["low".into(), "0x8000".into(), "0x4000".into()]),
        ("list too long", edit(ram, huge), libc::EINVAL, vec!["RAM block".into(), "left".into()]),
        (
            "page outside",
            edit(page + 6, &[0x40]),
            libc::EINVAL,
            vec![format!("byte {page:#x}: a page outside of RAM block 'low'"), "0x4000".into()],
        ),
        ("page far outside", edit(page, huge), libc::EINVAL, vec!["outside of RAM block 'low'".into()]),
        ("page of no block", edit(page + 9, b"lox"), libc::ENOENT, vec![format!("byte {page:#x}"), "'lox'".into()]),
        ("flags", edit(page + 6, &[0x0f, 0xff]), libc::EINVAL, vec![format!("byte {page:#x}"), "flags 0xfff".into()]),
        ("xbzrle", edit(page + 7, &[0x40]), libc::EINVAL, vec![format!("byte {page:#x}"), "XBZRLE".into()]),
        ("fill", edit(next + 8, &[7]), libc::EINVAL, vec![format!("byte {next:#x}"), "filled with 0x07".into()]),
        ("fill of a named page", edit(zero + 13, &[9]), libc::EINVAL, vec!["filled with 0x09".into()]),
        ("huge body", edit(gpu + 17, huge), libc::EINVAL, vec!["gpu".into(), "longer than its limit".into()]),
        ("no START", edit(gpu + 4, &[99]), libc::EINVAL, vec!["gpu".into(), "id 99".into(), "id 18".into()]),
        ("footer", edit(end - 7, &[0x7f]), libc::EINVAL, vec!["'globalstate'".into(), "footer is missing".into()]),
        ("footer's id", edit(end - 3, &[0x55]), libc::EINVAL, vec!["footer is another section's".into()]),
        ("kind", edit(uart, &[0x42]), libc::EINVAL, vec![format!("byte {uart:#x}: unknown section type 0x42")]),
        ("description", edit(end - 1, &[9]), libc::EINVAL, vec!["description is missing".into()]),
        (
            "huge description",
            edit(end, huge),
            libc::EINVAL,
            vec!["description".into(), "longer than its limit".into()],
        ),
        (
            "extra",
            [&bytes[..], b"more"].concat(),
            libc::EINVAL,
            vec![format!("byte {:#x}", bytes.len()), "4 bytes follow".into()],
        ),
    ];
    let write = |(name, bytes, ..): &(&str, Vec<u8>, i32, Vec<String>)| {
        let path = dir.join(name.replace(' ', "-"));
        fs::write(&path, bytes).unwrap();
        format!("file {}", path.display())
    };
    let lines: Vec<String> = cases.iter().map(write).collect();
    for ((name, _, errno, words), look) in cases.iter().zip(sweep(&path, &lines)) {
        assert_eq!((look.state.as_str(), &look.error["errno"]), ("failed", &json!(errno)), "{name}: {}", look.error);
        for word in words {
            assert!(look.message().contains(word), "{name}: '{word}' is not in: {}", look.message());
        }
    }
}

#[test]
fn all_differences_are_told_at_once_on_both_sides() {
    let mut source = Vmm::source(&[]);
    let shape = ["low=8", "high-name=hide", "uart-name=uart16550", "section=2"];
    let (mut there, _) = Vmm::destination(&shape);
    there.does("cancel");
    assert_eq!(there.wait().state, "cancelled");
    there.does("set machine toaster");
    let address = there.listen("tcp::0");
    source.does(&format!("out {address}"));
    let wanted = [
        "7 differences: ",
        "option 'machine' differs",
        "(source: none, destination: toaster)",
        "RAM block 'low' has different lengths on the two sides (source: 0x4000 bytes, destination: 0x8000 bytes)",
        "the source has a RAM block 'high', the destination does not",
        "the destination has a RAM block 'hide', the source does not",
        "the source has a device 'uart' (instance 7), the destination does not",
        "the destination has a device 'uart16550' (instance 7), the source does not",
        "the version of device 'gpu' (instance 0) is newer than the destination can read (source: 3, destination: 2 to 2)",
    ];
    for (side, look) in [("source", source.wait()), ("destination", there.wait())] {
        assert_eq!((look.state.as_str(), look.error["side"].as_str()), ("failed", Some("destination")), "{side}");
        for words in wanted {
            assert!(look.message().contains(words), "{side}: '{words}' is not in: {}", look.message());
        }
    }
    assert_eq!(there.ask("starts"), "0");
    source.runs_on();
    source.moves_out();
    source.end();
    there.end();
}

fn frame(version: u32, json: &str) -> Vec<u8> {
    let len = u32::try_from(json.len()).unwrap();
    [b"VMIG", &version.to_be_bytes()[..], &len.to_be_bytes(), json.as_bytes()].concat()
}

/// Reads a whole stream, answering its pings: its last byte, the handover, closes the description.
fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    const PING: &[u8] = b"\x08\0\x02\0\x04";
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (mut heard, mut some, mut answered) = (Vec::new(), [0; 65536], 0);
    while !heard.ends_with(b"{}") {
        match stream.read(&mut some).unwrap() {
            0 => break,
            n => heard.extend(&some[..n]),
        }
        while let Some(at) = heard[answered..].windows(9).position(|w| w.starts_with(PING)) {
            let number = &heard[answered + at + 5..answered + at + 9];
            stream.write_all(&[b"\0\x02\0\x04", number].concat()).unwrap();
            answered += at + 9;
        }
    }
    heard
}

/// A destination that says `first` after the hello, `then` after what follows, and closes unless it `stalls`.
struct Play {
    name: &'static str,
    first: Vec<u8>,
    then: Vec<u8>,
    stalls: bool,
    errno: i32,
    words: &'static str,
}

fn welcome() -> Vec<u8> {
    frame(1, "{\"features\":[]}")
}

fn plays() -> Vec<Play> {
    let play = |name, first: Vec<u8>, then: &[u8], errno, words| {
        let stalls = errno == libc::ETIMEDOUT;
        Play { name, first, then: then.to_vec(), stalls, errno, words }
    };
    let huge = [&b"VMIG\0\0\0\x01"[..], &[0xff; 4]].concat();
    let error = |json: &str| [&b"\x56\0\0\0"[..], &(json.len() as u64).to_be_bytes(), json.as_bytes()].concat();
    vec![
        play("closes", vec![], b"", libc::EIO, "the stream ends at byte 0x0"),
        play("stalls", vec![], b"", libc::ETIMEDOUT, "did not answer within 0.4 seconds (option 'connect-timeout')"),
        play("no vmig", b"HTTP/1.1 400 no".to_vec(), b"", libc::EPROTO, "did not answer as a vmig does"),
        play("other version", frame(2, "{}"), b"", libc::ENOTSUP, "another version of the hello"),
        play("huge length", huge, b"", libc::EINVAL, "longer than its limit"),
        play("not JSON", frame(1, "hello?"), b"", libc::EINVAL, "not JSON"),
        play("refuses without a reason", frame(1, "{\"errors\":[]}"), b"", libc::EPROTO, "without giving a reason"),
        play("refuses", frame(1, r#"{"errors":[{"text":"no room","errno":28}]}"#), b"", libc::ENOSPC, "no room"),
        play("leaves early", welcome(), b"", libc::ECONNRESET, "closed the connection without a reason"),
        play("is done early", welcome(), b"\0\x01\0\x04\0\0\0\0", libc::EPROTO, "before it had everything"),
        play("fails silently", welcome(), b"\0\x01\0\x04\0\0\0\x05", libc::EIO, "gave no reason (status 5)"),
        play("unknown reply", welcome(), b"\0\x77\0\0", libc::EINVAL, "unknown reply 0x77"),
        play("page request", welcome(), b"\0\x03\0\0", libc::EINVAL, "a page request outside of postcopy"),
        play("wrong length", welcome(), b"\0\x02\0\x09", libc::EINVAL, "reply 0x2 has the wrong length"),
        play("unreadable error", welcome(), &error("{]")[..], libc::EIO, "could not be read"),
        play("endless error", welcome(), b"\x56\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", libc::EINVAL, "limit"),
    ]
}

#[test]
fn a_source_outlives_any_destination() {
    let mut source = Vmm::source(&[]);
    source.does("set stall-timeout 400");
    source.does("set connect-timeout 400");
    for play in plays() {
        // Slow enough that the migration is still under way when the peer misbehaves.
        source.does("set max-bandwidth 20K");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        source.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; 12];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&play.first).unwrap();
        if !play.stalls {
            if play.first == welcome() {
                // The stream has begun, and goes on while we answer.
                let mut begun = [0; 600];
                stream.read_exact(&mut begun).unwrap();
            }
            stream.write_all(&play.then).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let look = source.wait();
        let seen = format!("{}: {} {}", play.name, look.state, look.error);
        assert_eq!((look.state.as_str(), &look.error["errno"]), ("failed", &json!(play.errno)), "{seen}");
        assert!(look.message().contains(play.words) && look.error["phase"].is_string(), "{seen}");
        source.runs_on();
    }
    source.does("set max-bandwidth 0");
    source.moves_out();
    source.end();
}

#[test]
fn an_answer_that_is_lost_is_left_to_the_operator() {
    let mut source = Vmm::source(&[]);
    let takes_all = |source: &mut Vmm| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        source.does(&format!("out tcp:{}", listener.local_addr().unwrap()));
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&welcome()).unwrap();
        assert!(read_all(&mut stream).ends_with(b"{}"), "all of the stream came");
        drop(stream);
        let look = source.wait();
        assert_eq!((look.state.as_str(), look.reasons & 8), ("switchover-unknown", 8), "{}", look.error);
        assert!(look.message().contains("vmig_resolve"), "{}", look.message());
        assert_eq!(source.refuses("start").0, libc::EPERM);
    };
    takes_all(&mut source);
    source.does("resolve 1");
    source.runs_on();
    takes_all(&mut source);
    source.does("resolve 0");
    assert_eq!((source.wait().state.as_str(), source.refuses("start").0), ("completed", libc::EPERM));
    source.end();
}

#[test]
fn a_destination_outlives_any_source() {
    let mut there = Vmm::new(&["fill=0"]);
    there.does("set stall-timeout 400");
    let dir = scratch("liar");
    let (_, bytes) = good_stream(&dir);
    let ram = json!([{"name": "low", "length": 0x4000}, {"name": "high", "length": 0x6000}]);
    let devices = json!([{"name": "uart", "instance": 7, "version": 2}, {"name": "counter", "instance": 0, "version": 1},
        {"name": "gpu", "instance": 0, "version": 3}]);
    let hello = |ram: &Value, devices: &Value| {
        let json = json!({"machine": "none", "page-size": 4096, "ram": ram, "devices": devices});
        frame(1, &json.to_string())
    };
    let honest = hello(&ram, &devices);
    let names: Vec<Value> = (0..9000).map(|n| json!({"name": format!("\u{1b}[2J{n}"), "length": 4096})).collect();
    let mut liar = [&honest[..], &bytes].concat();
    let at = honest.len() + Map::of(&bytes).sections[0].3;
    liar[at + 9..at + 12].copy_from_slice(b"lie");
    let cases: Vec<(&str, Vec<u8>, bool, i32, &str)> = vec![
        ("closes after three bytes", b"QEV".to_vec(), false, libc::EIO, "ends at byte 0x3"),
        ("stalls", b"QEVM".to_vec(), true, libc::ETIMEDOUT, "sent no byte for 0.4 seconds"),
        ("stalls in the hello", honest[..20].to_vec(), true, libc::ETIMEDOUT, "hello"),
        ("stalls after the hello", honest.clone(), true, libc::ETIMEDOUT, "sent no byte"),
        ("stalls in the stream", [&honest[..], &bytes[..9000]].concat(), true, libc::ETIMEDOUT, "sent no byte"),
        (
            "neither hello nor stream",
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            false,
            libc::EINVAL,
            "not a migration stream",
        ),
        ("other version", frame(9, "{}"), false, libc::ENOTSUP, "expected 1, got 9"),
        ("huge", [&b"VMIG\0\0\0\x01"[..], &[0xff; 4]].concat(), false, libc::EINVAL, "longer than its limit"),
        ("not JSON", frame(1, "{"), false, libc::EINVAL, "not JSON"),
        ("not our JSON", frame(1, "{\"machine\":[]}"), false, libc::EINVAL, "lacks machine"),
        ("many", hello(&json!(names), &devices), false, libc::ENOENT, "9002 differences"),
        ("device twice removed", hello(&ram, &json!([])), false, libc::ENOENT, "the source does not"),
        ("says one thing, sends another", liar, false, libc::ENOENT, "RAM block 'lie'"),
        ("cut", [&honest[..], &bytes[..9000]].concat(), false, libc::EIO, "the stream ends at byte"),
    ];
    for (name, sent, stalls, errno, words) in cases {
        let address = there.listen("tcp:127.0.0.1:0");
        let mut stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
        stream.write_all(&sent).unwrap();
        if !stalls {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let look = there.wait();
        let seen = format!("{name}: {} {}", look.state, look.message());
        assert_eq!((look.state.as_str(), &look.error["errno"]), ("failed", &json!(errno)), "{seen}");
        assert!(look.message().contains(words), "{seen}");
        assert!(!look.message().contains(char::is_control) && look.message().len() < 100_000, "{seen}");
        assert_eq!((look.reasons != 0, there.ask("starts").as_str()), (true, "0"), "{name}: it did not start");
    }
    let address = there.listen("tcp::0");
    // Strangers who say nothing are not taken for a source: one leaves, one stays.
    let stranger = || TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    drop(stranger());
    let _silent = stranger();
    let mut source = Vmm::source(&[]);
    source.does(&format!("out {address}"));
    assert_eq!((source.wait().state, there.wait().state), ("completed".into(), "completed".into()));
    there.has_what_left(&mut source);
    there.runs_on();
    source.end();
    there.end();
}
