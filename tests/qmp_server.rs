//! The QMP server from C, and clients that mean no good: memory stays bounded, errors are clear, a migration that runs
//! is not disturbed.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/program.rs"]
mod program;
#[path = "common/qmp.rs"]
mod qmp;

use std::fs;
use std::io::{BufRead, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{c_program, run, scratch, without_kvm, words};
use program::Program;
use qmp::{Client, PATIENCE};
use serde_json::{Value, json};

fn case(name: &str) {
    let socket = scratch("qmp-c").join("qmp");
    let out = run(Command::new("timeout").args(["-k", "5", "120"]).arg(c_program("qmp")).arg(name).arg(socket));
    let text = words(&out);
    assert!(text.ends_with(&format!("{name} done\n")), "{text}");
}

#[test]
fn requests_are_strings() {
    case("strings");
}

#[test]
fn a_vmm_adds_commands() {
    case("commands");
}

#[test]
fn nothing_is_left_of_a_server() {
    case("leaves-nothing");
}

#[test]
fn a_command_cannot_free_its_guest() {
    case("inside");
}

#[test]
fn out_of_band_does_not_wait() {
    case("oob");
}

/// The example VMM with a guest that runs, and where it serves QMP.
fn vmm() -> (Program, PathBuf) {
    let dir = scratch("qmp-server");
    let socket = dir.join("qmp");
    let serve = format!("unix:{}", socket.display());
    let args = ["--mem", "64", "--qmp", &serve, "--serial", "/dev/null", "--events-fd", "1"];
    let vmm = Program::start("vmm", &dir, &c_program("vmm"), &args);
    vmm.await_news("note qmp");
    assert_eq!(vmm.reply(), "running");
    (vmm, socket)
}

/// Texts that are wrong, and a word of the answer to each.
fn hostile() -> Vec<(Vec<u8>, &'static str)> {
    let mut long = br#"{"execute":"migrate","arguments":{"uri":""#.to_vec();
    long.resize(3 << 20, b'x');
    let many = format!("{{\"execute\":\"x\",\"arguments\":{{\"a\":[{}", "0,".repeat(1 << 20));
    vec![
        (b"hello".to_vec(), "JSON parse error"),
        (b"\xff\xfe\x00 broken".to_vec(), "JSON parse error"),
        (b"{\"execute\":\"\xff\xfe\"}".to_vec(), "JSON parse error"),
        (b"{\"execute\":\"\xed\xa0\x80\"}".to_vec(), "JSON parse error"),
        (br#"{"execute":"\ud800"}"#.to_vec(), "JSON parse error"),
        (b"{\"execute\":\"stop".to_vec(), "a line ends inside of a string"),
        (br#"{"execute":1e999}"#.to_vec(), "JSON parse error"),
        (
            br#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":99999999999999999999999}}"#.to_vec(),
            "uint64",
        ),
        (br#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":-1}}"#.to_vec(), "uint64"),
        ("[".repeat(1 << 20).into_bytes(), "nesting depth"),
        (br#"{"a":"#.repeat(1 << 18), "nesting depth"),
        (long, "size limit"),
        (many.into_bytes(), "size limit"),
        (vec![b'x'; 3 << 20], "size limit"),
        (br#"{"execute":"query-status"}}"#.to_vec(), "JSON parse error"),
        (br#"{"execute":"a\u0000b"}"#.to_vec(), "has not been found"),
    ]
}

#[test]
fn nonsense_is_told_and_the_next_line_counts() {
    if without_kvm() {
        return;
    }
    let (vmm, socket) = vmm();
    let mut client = Client::ready(&socket);
    for (mut text, word) in hostile() {
        let shown = String::from_utf8_lossy(&text[..text.len().min(60)]).into_owned();
        text.push(b'\n');
        client.say(&text);
        let mut answer = client.hear();
        if answer["return"]["running"] == true {
            answer = client.hear(); // one bracket too many comes after a request that is right
        }
        assert!(
            answer["error"]["desc"].as_str().is_some_and(|d| d.contains(word) && d.len() < 500),
            "{shown}: {answer}"
        );
        assert_eq!(client.run("query-status")["running"], true, "after {shown}");
    }
    // A text that was begun can be forgotten, and a command may come byte by byte.
    for byte in b"{\"execute\":\n\"query-status\" ,\"id\"\t:[{\"}\":\"\\\"}\"}]}" {
        client.say(&[*byte]);
    }
    assert_eq!(client.hear()["id"], json!([{"}": "\"}"}]));
    vmm.quit();
}

#[test]
fn many_requests_at_once_are_answered_in_order() {
    if without_kvm() {
        return;
    }
    let (vmm, socket) = vmm();
    let mut clients: Vec<Client> = (0..8).map(|_| Client::ready(&socket)).collect();
    let all: String = (0..500).map(|n| format!("{{\"execute\":\"query-status\",\"id\":{n}}}")).collect();
    std::thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| {
                client.say(all.as_bytes());
                // It sends no more, and still hears every answer.
                client.lines.get_ref().shutdown(Shutdown::Write).unwrap();
                (0..500).for_each(|n| assert_eq!(client.hear()["id"], n));
                assert_eq!(client.lines.read_line(&mut String::new()).unwrap(), 0);
            });
        }
    });
    vmm.quit();
}

#[test]
fn tcp_is_served_only_where_it_is_asked_for() {
    if without_kvm() {
        return;
    }
    let dir = scratch("qmp-tcp");
    let args = ["--mem", "64", "--qmp", "tcp:127.0.0.1:0", "--serial", "/dev/null", "--events-fd", "1"];
    let vmm = Program::start("vmm", &dir, &c_program("vmm"), &args);
    let address = vmm.await_news("note qmp").strip_prefix("note qmp tcp:").unwrap().to_owned();
    let said_to = |words: &[u8]| {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(words).unwrap();
        let mut said = Vec::new();
        // One that is reset was closed with bytes unread.
        let ended = stream.read_to_end(&mut said);
        assert!(!ended.is_err_and(|e| e.kind() != ErrorKind::ConnectionReset), "the server goes on with it");
        String::from_utf8(said).unwrap()
    };
    // What a browser says for a page of somebody else's is not listened to.
    let request =
        b"POST / HTTP/1.1\r\nHost: a\r\n\r\n{\"execute\":\"qmp_capabilities\"}\r\n{\"execute\":\"quit\"}\r\n";
    assert!(!said_to(request).contains("return"));
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}").unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(said.contains("\"QMP\"") && said.matches("{\"return\":{}}").count() == 2, "{said}");
    let mut vmm = vmm;
    vmm.wait_end(0);
}

/// While the VMM stands still, so that it finds all of what `f` does at once.
fn behind_its_back<T>(vmm: &Program, f: impl FnOnce() -> T) -> T {
    let signal = |name: &str| run(Command::new("sh").arg("-c").arg(format!("kill -{name} {}", vmm.id())));
    let stands = |task: fs::DirEntry| {
        // One that has just ended stands still, too.
        fs::read_to_string(task.path().join("status")).map_or(true, |text| text.contains("State:\tT"))
    };
    let tasks = PathBuf::from(format!("/proc/{}/task", vmm.id()));
    signal("STOP");
    let end = Instant::now() + PATIENCE;
    while !fs::read_dir(&tasks).unwrap().all(|task| stands(task.unwrap())) {
        assert!(Instant::now() < end, "it does not stop");
        std::thread::sleep(Duration::from_millis(1));
    }
    let result = f();
    signal("CONT");
    result
}

#[test]
fn what_one_who_vanished_asked_for_is_done() {
    if without_kvm() {
        return;
    }
    let (vmm, socket) = vmm();
    let mut other = Client::ready(&socket);
    let vanish = |words: &str| {
        behind_its_back(&vmm, || UnixStream::connect(&socket).unwrap().write_all(words.as_bytes()).unwrap());
    };
    let mut until = |command: &str, done: &dyn Fn(&Value) -> bool| {
        let end = Instant::now() + PATIENCE;
        while !done(&other.run(command)) {
            assert!(Instant::now() < end, "{command}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    // Neither the greeting nor an answer is heard, and there are more requests than may wait.
    vanish(r#"{"execute":"qmp_capabilities"}{"execute":"stop"}"#);
    until("query-status", &|status| status["running"] == false);
    let many = r#"{"execute":"stop"}"#.repeat(40);
    vanish(&format!(r#"{{"execute":"qmp_capabilities"}}{many}{{"execute":"cont"}}"#));
    until("query-status", &|status| status["running"] == true);
    vmm.quit();
}

fn pass(client: &Client, bytes: &[u8], file: &fs::File) {
    let sent = vmig::sys::fdpass::send(client.lines.get_ref().as_fd(), bytes, &[file.as_fd()]).unwrap();
    assert_eq!(sent, Some(bytes.len()));
}

#[test]
fn a_descriptor_is_not_for_the_command_before() {
    if without_kvm() {
        return;
    }
    let (vmm, socket) = vmm();
    let mut client = Client::ready(&socket);
    let null = fs::File::open("/dev/null").unwrap();
    let status = b"{\"execute\":\"query-status\"}\n";
    let add = b"{\"execute\":\"add-fd\"}\n";
    // The kernel hands both messages over as one, with the descriptor.
    behind_its_back(&vmm, || (client.say(status), pass(&client, add, &null)));
    assert_eq!(client.hear()["return"]["running"], true);
    assert!(client.hear()["return"]["fd"].is_number());
    behind_its_back(&vmm, || (client.say(b"nonsense\n"), pass(&client, b" ", &null), client.say(add)));
    assert!(client.hear()["error"].is_object() && client.hear()["return"]["fd"].is_number());
    vmm.quit();
}

#[test]
fn a_descriptor_is_for_the_command_that_comes_next() {
    if without_kvm() {
        return;
    }
    let (vmm, socket) = vmm();
    let mut client = Client::ready(&socket);
    let null = fs::File::open("/dev/null").unwrap();
    let zero = fs::File::open("/dev/zero").unwrap();
    let getfd = r#"{"execute":"getfd","arguments":{"fdname":"a"}}"#;
    let out_of_band = getfd.replace("execute", "exec-oob");
    let others = [&b"nonsense\n"[..], b"{\"execute\":\"query-status\"}\n", b"{\"execute\":\"nothing\"}\n"];
    for bytes in others.into_iter().chain([out_of_band.as_bytes()]) {
        pass(&client, bytes, &null);
        assert!(client.hear().is_object());
        assert!(client.ask(getfd)["error"].is_object(), "the descriptor of {:?}", String::from_utf8_lossy(bytes));
    }
    pass(&client, b" ", &null);
    client.run("query-fdsets");
    pass(&client, b" ", &null);
    pass(&client, b" ", &zero);
    let added = client.run("add-fd");
    let link = fs::read_link(format!("/proc/{}/fd/{}", vmm.id(), added["fd"])).unwrap();
    assert_eq!(link, PathBuf::from("/dev/zero"), "the last one");
    assert!(client.ask(getfd)["error"].is_object());
    vmm.quit();
}

/// Bytes of memory that are the process's own.
fn memory_of(vmm: &Program) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.id())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn descriptors_of(vmm: &Program) -> usize {
    fs::read_dir(format!("/proc/{}/fd", vmm.id())).unwrap().count()
}

/// Waits until the process has at most so many descriptors.
fn settle(vmm: &Program, most: usize) {
    let end = Instant::now() + PATIENCE;
    while descriptors_of(vmm) > most {
        assert!(Instant::now() < end, "{} descriptors, {most} at most", descriptors_of(vmm));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends for as long as the server takes it, and reads nothing; how many bytes went.
fn stuff(client: &Client, bytes: &[u8]) -> usize {
    let mut stream = client.lines.get_ref();
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut sent = 0;
    while sent < 64 << 20 {
        match stream.write(bytes) {
            Ok(n) => sent += n,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return sent,
            Err(error) => panic!("the server hung up on one who does not read: {error}"),
        }
    }
    panic!("the server takes requests without end from one who does not read the answers");
}

#[test]
fn a_migration_goes_on_among_clients_that_mean_no_good() {
    /// Of 31 clients, what the server keeps for them; the kernel's socket buffers are not in it.
    const MEMORY_MAX: u64 = 48 << 20;
    if without_kvm() {
        return;
    }
    let (mut vmm, socket) = vmm();
    let dir = scratch("qmp-destination");
    let args = ["--mem", "64", "--incoming", "tcp:127.0.0.1:0", "--serial", "/dev/null", "--events-fd", "1"];
    let destination = Program::start("destination", &dir, &c_program("vmm"), &args);
    let uri = destination.listening();
    vmm.await_generations(0, 2);
    let (before, fds) = (memory_of(&vmm), descriptors_of(&vmm));
    let mut good = Client::ready(&socket);
    vmm.must("set max-bandwidth 1M");
    good.ask(&json!({"execute": "migrate", "arguments": {"uri": uri}}).to_string());
    while good.status() != "active" {
        std::thread::sleep(Duration::from_millis(5));
    }
    // Those who vanish in the middle of a word. What vanished leaves nothing behind, soon.
    for _ in 0..200 {
        let stream = UnixStream::connect(&socket).unwrap();
        let _ = (&stream).write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-qm");
    }
    settle(&vmm, fds + 16);
    // Those who ask much and read nothing, those who begin a text and never end it, those who just sit there.
    let mut held: Vec<Client> = (0..30).map(|_| Client::ready(&socket)).collect();
    let ask = br#"{"execute":"query-qmp-schema"}"#.repeat(100);
    let endless = [&b"{\"execute\":\""[..], &vec![b'x'; 200 << 10]].concat();
    std::thread::scope(|scope| {
        for (i, client) in held.iter_mut().enumerate() {
            let (ask, endless) = (&ask, &endless);
            scope.spawn(move || match i % 3 {
                0 => drop(stuff(client, ask)),
                1 => client.say(endless),
                _ => (),
            });
        }
    });
    // There is no room for more, which is said.
    let (_one_more, greeting) = Client::connect(&socket);
    let (_too_many, refused) = Client::connect(&socket);
    assert!(greeting.get("QMP").is_some(), "{greeting}");
    assert!(refused["error"]["desc"].as_str().is_some_and(|d| d.contains("32 clients")), "{refused}");
    let grown = memory_of(&vmm).saturating_sub(before);
    // AddressSanitizer keeps what was freed for a while.
    let sanitized = std::env::var("VMIG_ASAN").is_ok_and(|v| v == "1");
    assert!(sanitized || grown < MEMORY_MAX, "{grown} bytes more than without clients");
    assert_eq!(good.status(), "active", "the good client is served, and the migration goes on");
    drop(held);
    settle(&vmm, fds + 16);
    let unlimited = json!({"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 0}}).to_string();
    assert_eq!(good.ask(&unlimited), json!({"return": {}}));
    vmm.must_end_in("completed");
    assert_eq!(good.status(), "completed");
    destination.await_generations(0, 3);
    assert!(destination.news("fault").is_empty());
    vmm.quit();
    destination.quit();
}
