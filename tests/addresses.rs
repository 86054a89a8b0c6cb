//! Addresses that cannot be used, and what may be found at those that can.
//! The VMM is `c_program("hostile")`, which also makes tests/run repeat this file under AddressSanitizer.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use common::hostile::Vmm;
use common::scratch;

/// What the system knows of TCP sockets that listen: (local address, port) in the kernel's hexadecimal.
fn listening() -> Vec<String> {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let lines = [read("/proc/net/tcp"), read("/proc/net/tcp6")].concat();
    let of_line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.get(3) == Some(&"0A")).then(|| words[1].to_owned())
    };
    lines.lines().filter_map(of_line).collect()
}

#[test]
fn tcp_addresses() {
    let mut vmm = Vmm::new(&["fill=0"]);
    let mut source = Vmm::source(&[]);
    let mut other = Vmm::new(&["fill=0"]);
    assert!(vmm.ask("get listen-address").contains("no incoming migration"));
    // No host is loopback, never every interface.
    let address = vmm.listen("tcp::0");
    let port: u16 = address.strip_prefix("tcp:127.0.0.1:").unwrap().parse().unwrap();
    let wanted = format!(":{port:04X}");
    let here: Vec<String> = listening().into_iter().filter(|a| a.ends_with(&wanted)).collect();
    assert_eq!(here, [format!("0100007F{wanted}")], "{port}");
    let (errno, text) = other.refuses(&format!("in {address}"));
    assert_eq!(errno, libc::EADDRINUSE, "{text}");
    assert!(text.contains(&address), "{text}");
    // That failed at once and changed nothing: the other one can still start its own guest.
    other.does("start");
    other.does("stop");
    assert_eq!(vmm.refuses(&format!("in {address}")).0, libc::EBUSY, "one migration at a time");
    vmm.does("cancel");
    assert_eq!(vmm.wait().state, "cancelled");
    for uri in [
        "",
        "tcp",
        "tcp:",
        "tcp::",
        "tcp:h:65536",
        "tcp:::1:0",
        "pigeon:coop",
        "unix:",
        "fd:",
        "fd:x",
        "fd:-1",
        "/tmp/x",
    ] {
        for verb in ["in", "out"] {
            let (errno, text) = source.refuses(&format!("{verb} {uri}"));
            assert!(errno == libc::EINVAL && text.len() > 15, "{verb} {uri}: {errno} {text}");
        }
    }
    // Nobody listens there now.
    source.does(&format!("out {address}"));
    let look = source.wait();
    assert_eq!(
        (look.error["errno"].as_i64(), look.error["phase"].as_str()),
        (Some(libc::ECONNREFUSED.into()), Some("connect"))
    );
    assert!(look.message().contains(&address), "{}", look.message());
    source.runs_on();
    let (errno, text) = vmm.refuses("in tcp:192.0.2.1:0");
    assert_eq!(errno, libc::EADDRNOTAVAIL, "{text}");
    let long = format!("tcp:{}.invalid:1", "x".repeat(60));
    source.does(&format!("out {long}"));
    let look = source.wait();
    assert!(look.state == "failed" && look.message().contains(".invalid"), "{}", look.message());
    source.runs_on();
    [vmm, source, other].into_iter().for_each(Vmm::end);
}

#[test]
fn descriptors() {
    let mut vmm = Vmm::source(&[]);
    assert_eq!(vmm.ask("fds"), "fds done");
    assert_eq!(vmm.ask("look").split(' ').next(), Some("failed"), "stdin is a pipe that still blocks");
    vmm.runs_on();
    vmm.end();
}

#[test]
fn ipv6_works() {
    if TcpListener::bind("[::1]:0").is_err() && common::skip("ipv6", "[::1] cannot be bound") {
        return;
    }
    let mut there = Vmm::new(&["fill=0"]);
    let mut source = Vmm::source(&[]);
    let address = there.listen("tcp:[::1]:0");
    assert!(address.starts_with("tcp:[::1]:") && !address.ends_with(":0"), "{address}");
    source.does(&format!("out {address}"));
    assert_eq!((source.wait().state, there.wait().state), ("completed".into(), "completed".into()));
    there.has_what_left(&mut source);
    source.end();
    there.end();
}

#[test]
fn unix_sockets() {
    let dir = scratch("unix");
    // Paths of sockets are short, scratch directories need not be.
    let short = PathBuf::from(format!("/tmp/vmig-{}", std::process::id()));
    let _ = fs::remove_file(&short);
    std::os::unix::fs::symlink(&dir, &short).unwrap();
    let path = short.join("s");
    let uri = format!("unix:{}", path.display());
    let mut there = Vmm::new(&["fill=0"]);
    let mut source = Vmm::source(&[]);
    // Something else is in the way, and stays.
    fs::write(&path, "a file").unwrap();
    assert_eq!(there.refuses(&format!("in {uri}")).0, libc::EADDRINUSE);
    assert_eq!(fs::read_to_string(&path).unwrap(), "a file");
    fs::remove_file(&path).unwrap();
    // A socket nobody listens at is taken over; one that somebody listens at is not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert_eq!(there.listen(&uri), uri);
    assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut other = Vmm::new(&["fill=0"]);
    let (errno, text) = other.refuses(&format!("in {uri}"));
    assert!(errno == libc::EADDRINUSE && text.contains(&uri), "{text}");
    other.end();
    source.does(&format!("out {uri}"));
    assert_eq!((source.wait().state, there.wait().state), ("completed".into(), "completed".into()));
    there.has_what_left(&mut source);
    // Kept for questions about the guest, and taken along by the handle.
    assert!(path.exists());
    there.end();
    assert!(!path.exists(), "the socket's file is gone");
    let mut more = Vmm::source(&[]);
    for (uri, errno) in [(format!("unix:/tmp/{}", "x".repeat(200)), libc::EINVAL), (uri, libc::ENOENT)] {
        more.does(&format!("out {uri}"));
        let look = more.wait();
        assert_eq!(look.error["errno"].as_i64(), Some(errno.into()), "{}", look.error);
        assert!(look.message().contains(&uri), "{}", look.message());
        more.runs_on();
    }
    more.does("stop");
    let (errno, text) = more.refuses(&format!("in unix:/tmp/{}", "x".repeat(200)));
    assert_eq!(errno, libc::EINVAL, "{text}");
    more.does("start");
    more.runs_on();
    [source, more].into_iter().for_each(Vmm::end);
    fs::remove_file(&short).unwrap();
}
