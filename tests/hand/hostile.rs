//! Peers that hand over what they should not, played here against tests/c/hand.c.

#![allow(unsafe_code, reason = "makes files in memory, and seals them")]

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::Arc,
};

use vmig::sys::fdpass;
use vmig::wire::hello::{self, Answer, Device, Hello, Offer, Welcome};
use vmig::wire::stream::{SectionName, put_full, put_header};

use super::common::scratch;
use super::program::Program;
use super::{Before, counts_on, listen, number, running, value, vmm};

const BLOCK: u64 = 4 << 20;
const OFFSET: u64 = 2 << 20;
const SHAPE: [&str; 4] = ["memfd", "memfd", "4", "fds=1"];

fn memfd(len: u64, seals: i32) -> OwnedFd {
    // SAFETY: the name is a literal that ends with NUL.
    let fd = unsafe { libc::memfd_create(c"liar".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: the kernel just gave us this descriptor.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).unwrap();
    if seals != 0 {
        // SAFETY: F_ADD_SEALS takes an integer.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) }, 0);
    }
    file.into()
}

fn good() -> OwnedFd {
    memfd(BLOCK + OFFSET, 0)
}

fn offer(name: &str, offset: u64) -> Offer {
    Offer { name: name.into(), len: BLOCK, offset }
}

fn hello_of(hand_over: Option<Vec<Offer>>) -> Hello {
    let device = |name: &str, fds: &[&str]| Device {
        name: SectionName { name: name.into(), instance: 0, version: 1 },
        fds: fds.iter().map(|f| (*f).to_owned()).collect(),
        shape: Arc::default(),
    };
    Hello {
        machine: "none".into(),
        page_size: 4096,
        blocks: vec![("low".into(), BLOCK), ("high".into(), BLOCK)],
        sections: vec![device("nic", &["fds"]), device("gpu", &[])],
        hand_over,
        ..Hello::default()
    }
}

/// A connection that says hello and hears the answer.
fn greet(uri: &str, hello: &Hello, fds: &[BorrowedFd<'_>]) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(uri.strip_prefix("unix:").unwrap()).unwrap();
    let mut bytes = Vec::new();
    hello::put(&mut bytes, hello).unwrap();
    assert_eq!(fdpass::send(stream.as_fd(), &bytes, fds).unwrap(), Some(bytes.len()));
    let mut head = [0; 12];
    stream.read_exact(&mut head).unwrap();
    let mut text = vec![0; u32::from_be_bytes(head[8..].try_into().unwrap()) as usize];
    stream.read_exact(&mut text).unwrap();
    (stream, String::from_utf8(text).unwrap())
}

fn send(stream: &UnixStream, count: u32, fds: &[OwnedFd]) {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    assert_eq!(fdpass::send(stream.as_fd(), &count.to_be_bytes(), &fds).unwrap(), Some(4));
}

/// A destination against a source that plays `lie` with it: it fails with these words, and is what it was.
fn lied_to(dir: &Path, destination: &mut Program, what: &str, words: &str, lie: impl FnOnce(&str)) {
    let before = Before::of(destination);
    let uri = listen(dir, destination);
    lie(&uri);
    destination.must_end_in("failed");
    let error = destination.command("error");
    assert!(error.contains(words), "{what}: {error}");
    assert_eq!(Before::of(destination), before, "{what}: memory, mappings, descriptors");
}

#[test]
fn sources_that_pass_the_wrong_descriptors() {
    let dir = scratch("hand-liar");
    let mut destination = vmm("destination", &dir, &SHAPE, 5);
    let offers = || Some(vec![offer("low", OFFSET), offer("high", OFFSET)]);
    let read_only = || {
        let file = good();
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap().into()
    };
    let on_disk = || -> OwnedFd {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(dir.join("disk")).unwrap();
        file.set_len(BLOCK + OFFSET).unwrap();
        file.into()
    };
    let pipe = || std::io::pipe().unwrap().1.into();
    let cases: Vec<(&str, &str, u32, Vec<OwnedFd>)> = vec![
        ("another number", "another number of RAM blocks", 1, vec![good()]),
        ("too many", "another number of RAM blocks", u32::MAX, vec![good(), good()]),
        ("one missing", "fewer file descriptors", 2, vec![good()]),
        ("none", "fewer file descriptors", 2, vec![]),
        ("a pipe", "not a file in memory", 2, vec![good(), pipe()]),
        ("a socket", "not a file in memory", 2, vec![UnixStream::pair().unwrap().0.into(), good()]),
        ("a file on disk", "not a file in memory", 2, vec![on_disk(), good()]),
        ("a read-only file", "open for reading and writing", 2, vec![good(), read_only()]),
        ("a short file", "smaller than the block", 2, vec![good(), memfd(BLOCK + OFFSET - 1, 0)]),
        ("a sealed file", "sealed", 2, vec![memfd(BLOCK + OFFSET, libc::F_SEAL_FUTURE_WRITE), good()]),
    ];
    for (what, words, count, fds) in cases {
        lied_to(&dir, &mut destination, what, words, |uri| {
            let (stream, answer) = greet(uri, &hello_of(offers()), &[]);
            assert!(answer.contains(r#""hand-over":["low","high"]"#), "{answer}");
            send(&stream, count, &fds);
            let mut rest = Vec::new();
            let _ = (&stream).read_to_end(&mut rest);
            assert!(String::from_utf8_lossy(&rest).contains(words), "{what}: the source is told");
        });
    }
    let odd = [("unaligned", 1, "does not fit the file's pages"), ("far", u64::MAX - 4095, "smaller than the block")];
    for (what, offset, words) in odd {
        lied_to(&dir, &mut destination, what, words, |uri| {
            let offers = vec![offer("low", offset), offer("high", OFFSET)];
            let (stream, _) = greet(uri, &hello_of(Some(offers)), &[]);
            send(&stream, 2, &[memfd(1 << 40, 0), good()]);
            let _ = (&stream).read_to_end(&mut Vec::new());
        });
    }
    lied_to(&dir, &mut destination, "twice", "twice", |uri| {
        let offers = vec![offer("low", OFFSET), offer("low", OFFSET)];
        let (_stream, answer) = greet(uri, &hello_of(Some(offers)), &[]);
        assert!(answer.contains("twice"), "{answer}");
    });
    lied_to(&dir, &mut destination, "a plain stream", "does not use this library", |uri| {
        let mut stream = UnixStream::connect(uri.strip_prefix("unix:").unwrap()).unwrap();
        stream.write_all(b"QEVM\0\0\0\x03").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    // The right files, and then nothing: they were mapped already.
    lied_to(&dir, &mut destination, "silence", "load", |uri| {
        let (stream, _) = greet(uri, &hello_of(offers()), &[]);
        send(&stream, 2, &[good(), good()]);
        drop(stream);
    });
    destination.quit();
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let dir = scratch("hand-uninvited");
    let mut destination = vmm("destination", &dir, &SHAPE, 5);
    let many: Vec<OwnedFd> = (0..200).map(|_| good()).collect();
    let uninvited: Vec<BorrowedFd<'_>> = many.iter().map(AsFd::as_fd).collect();
    // With the hello, before anybody knows what it is about: they are not the ones that are agreed on later.
    lied_to(&dir, &mut destination, "early", "fewer file descriptors", |uri| {
        let offers = vec![offer("low", OFFSET), offer("high", OFFSET)];
        let (stream, _) = greet(uri, &hello_of(Some(offers)), &uninvited);
        send(&stream, 2, &[]);
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    // More and more of them.
    lied_to(&dir, &mut destination, "flood", "file descriptors", |uri| {
        let offers = vec![offer("low", OFFSET), offer("high", OFFSET)];
        let (stream, _) = greet(uri, &hello_of(Some(offers)), &[]);
        send(&stream, 2, &[good(), good()]);
        // In the middle of a body, where nobody looks at what came with it.
        let mut bytes = Vec::new();
        put_header(&mut bytes, "none").unwrap();
        let name = SectionName { name: "gpu".into(), instance: 0, version: 1 };
        put_full(&mut bytes, 20, &name).unwrap();
        bytes.extend(1_000_000u32.to_be_bytes());
        (&stream).write_all(&bytes).unwrap();
        for _ in 0..50 {
            match fdpass::send(stream.as_fd(), b"body", &uninvited) {
                Ok(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
                Err(_) => break,
            }
        }
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    // No room for them: some arrive, the rest is cut off by the kernel.
    let fds = number(&mut destination, "fds");
    destination.must(&format!("limit {}", fds + 4));
    lied_to(&dir, &mut destination, "truncated", "RLIMIT_NOFILE", |uri| {
        let offers = vec![offer("low", OFFSET), offer("high", OFFSET)];
        let (stream, _) = greet(uri, &hello_of(Some(offers)), &[]);
        assert_eq!(fdpass::send(stream.as_fd(), &2u32.to_be_bytes(), &uninvited[..50]).unwrap(), Some(4));
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    destination.quit();
    // A destination that hands nothing over and has no device with descriptors does not even look at them.
    let mut plain = Program::start("plain", &dir, &super::c_program("hand"), &["anon", "anon", "4", "fill=5"]);
    let fds = number(&mut plain, "fds");
    let uri = listen(&dir, &mut plain);
    let mut hello = hello_of(None);
    hello.sections.remove(0);
    let (stream, answer) = greet(&uri, &hello, &uninvited);
    assert!(answer.contains("features"), "{answer}");
    assert_eq!(fdpass::send(stream.as_fd(), b"QEVM", &uninvited).unwrap(), Some(4));
    drop(stream);
    plain.must_end_in("failed");
    assert_eq!(number(&mut plain, "fds"), fds);
    plain.quit();
}

/// A source against a destination that answers its hello with this and then does `then`.
fn answered(what: &str, welcome: &Welcome, words: &str, then: impl FnOnce(&UnixStream)) {
    let dir = scratch("hand-liar-there");
    let mut source = running(&dir, &SHAPE);
    let before = Before::of(&mut source);
    let path = dir.join("liar");
    let listener = UnixListener::bind(&path).unwrap();
    source.must(&format!("migrate unix:{}", path.display()));
    let (mut stream, _) = listener.accept().unwrap();
    let mut head = [0; 12];
    stream.read_exact(&mut head).unwrap();
    let mut text = vec![0; u32::from_be_bytes(head[8..].try_into().unwrap()) as usize];
    stream.read_exact(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains(r#""hand-over":[{"#) && text.contains(r#""fds":["fds"]"#), "{text}");
    let mut bytes = Vec::new();
    hello::put_answer(&mut bytes, &Answer::Welcome(welcome.clone())).unwrap();
    stream.write_all(&bytes).unwrap();
    then(&stream);
    drop(stream);
    source.must_end_in("failed");
    let error = source.command("error");
    assert!(error.contains(words), "{what}: {error}");
    assert_eq!(Before::of(&mut source), before, "{what}: memory, mappings, descriptors");
    assert!(value(&mut source, "hashes").starts_with("0 "), "{what}: the stop hook was not called");
    counts_on(&mut source);
    source.quit();
}

#[test]
fn destinations_that_take_the_wrong_things() {
    let takes = |names: &[&str]| Welcome {
        fds: true,
        hand_over: Some(names.iter().map(|n| (*n).into()).collect()),
        ..Welcome::default()
    };
    answered("unknown", &takes(&["middle"]), "which was not offered", |_| ());
    answered("twice", &takes(&["low", "low"]), "which was not offered", |_| ());
    answered("older", &Welcome { fds: true, ..Welcome::default() }, "knows nothing of option 'hand-over'", |_| ());
    answered(
        "no fds",
        &Welcome { fds: false, ..takes(&["low"]) },
        "does not take file descriptors of device 'nic'",
        |_| (),
    );
    // It takes the memory, looks at it, and leaves.
    answered("thief", &takes(&["low", "high"]), "\"side\":\"source\"", |stream| {
        let mut buf = [0; 4];
        let got = loop {
            match fdpass::receive(stream.as_fd(), &mut buf).unwrap() {
                Some(got) => break got,
                None => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        };
        assert_eq!((got.bytes, u32::from_be_bytes(buf), got.fds.len()), (4, 2, 2));
        for fd in got.fds {
            let facts = fdpass::facts(fd.as_fd()).unwrap();
            assert!(facts.regular && facts.size >= BLOCK + OFFSET && !facts.sealed);
        }
    });
}
