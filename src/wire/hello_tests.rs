//! What hellos and their answers carry, and what is refused.

use super::*;
use crate::wire::input::Slice;

fn hello() -> Hello {
    Hello {
        machine: "none".into(),
        page_size: 4096,
        blocks: vec![("low".into(), 0x1000), ("high".into(), 0x4000)],
        sections: vec![Device {
            name: SectionName { name: "uart".into(), instance: 0, version: 2 },
            fds: vec!["tap".into()],
            shape: Arc::new(vec![shape::Table { name: "uart".into(), version: 2, oldest: 2, fields: Vec::new() }]),
        }],
        channels: 3,
        meet_each_section: true,
        memory: vec!["host/0:1/77".into()],
        hints: true,
        checksum: Some("crc32c".into()),
        hand_over: Some(vec![Offer { name: "low".into(), len: 0x1000, offset: 0x2000 }]),
        attempt: Some(Attempt { migration: MigrationId([7; 16]), epoch: 1 << 40 }),
        resume: Some(5000),
        cpu: Some(Cpu { arch: "x86_64".into(), ..Cpu::default() }),
        needs: vec!["multifd".into()],
        offers: vec!["zero-runs".into()],
        config: Some(5),
        check: true,
    }
}

#[test]
fn round_trip() {
    let mut out = Vec::new();
    put(&mut out, &hello()).unwrap();
    assert_eq!(read(&mut Slice::new(&out)).unwrap(), hello());
    for len in 0..out.len() {
        assert_eq!(read(&mut Slice::new(&out[..len])).unwrap_err().errno(), libc::EIO, "cut at {len}");
    }
}

#[test]
fn answers_carry_every_difference() {
    let errors = vec![
        Error::invalid("no RAM block 'x'").on_side("destination"),
        Error::invalid("missing").in_section("uart").on_side("destination"),
    ];
    let welcome = Answer::Welcome(Welcome {
        fds: true,
        zero_runs: true,
        checksum: true,
        verify: true,
        switchover: true,
        resume: true,
        hand_over: Some(vec!["low".into()]),
        channels: Some(2),
        max_bandwidth: Some(7),
    });
    let checked = Answer::Checked(errors.clone(), 9);
    for answer in [Answer::Welcome(Welcome::default()), welcome, Answer::Refused(errors.clone()), checked] {
        let mut out = Vec::new();
        put_answer(&mut out, &answer).unwrap();
        assert_eq!(read_answer(&mut Slice::new(&out)).unwrap(), answer);
    }
    assert_eq!(
        join(&errors).to_string(),
        "destination: hello: 2 differences: no RAM block 'x'; section 'uart': missing"
    );
}

#[test]
fn a_list_of_differences_fits_its_frame() {
    let long = Error::invalid("\u{1b}".repeat(4000)).in_section("x".repeat(4000));
    let mut out = Vec::new();
    put_answer(&mut out, &Answer::Refused(vec![long; 1000])).unwrap();
    let Answer::Refused(errors) = read_answer(&mut Slice::new(&out)).unwrap() else { panic!("refused") };
    let last = errors.last().unwrap().text().to_owned();
    assert_eq!(last, format!("and {} more differences", 1000 - (errors.len() - 1)));
}

#[test]
fn devices_of_one_kind_share_a_table() {
    let mut many = hello();
    many.sections = (0..1000)
        .map(|instance| {
            let mut device = hello().sections[0].clone();
            device.name.instance = instance;
            device
        })
        .collect();
    let mut out = Vec::new();
    put(&mut out, &many).unwrap();
    assert_eq!(String::from_utf8_lossy(&out).matches(r#"["uart",2,[]]"#).count(), 1);
    let read = read(&mut Slice::new(&out)).unwrap();
    assert!(read == many && Arc::ptr_eq(&read.sections[0].shape, &read.sections[999].shape));
}

#[test]
fn hints_are_as_long_as_the_block() {
    let mut hint = Hint::new(2 * 512 + 7).unwrap();
    hint.add(0..512);
    hint.add(600..601);
    hint.add(1024..1031);
    let mut out = Vec::new();
    put_hint(&mut out, &hint);
    assert_eq!(out, [255, 1, 4]);
    assert_eq!(read_hint(&mut Slice::new(&out), 1031).unwrap().counts(), [510, 2, 7]);
    assert!(read_hint(&mut Slice::new(&out), 2048).is_err());
}

#[test]
fn hostile_hellos_are_refused() {
    let frame = |json: &str| {
        let mut out = Vec::new();
        out.u32(MAGIC);
        out.u32(VERSION);
        out.u32(u32::try_from(json.len()).unwrap());
        out.bytes(json.as_bytes());
        read(&mut Slice::new(&out)).unwrap_err()
    };
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let with = |key: &str, value: &str| {
        format!(r#"{{"machine":"none","page-size":1,"ram":[],"devices":[],"{key}":{value}}}"#)
    };
    let odd = [
        with("tables", "7"),
        with("tables", "[[[]]]"),
        with("cpu", "[]"),
        with("needs", "{}"),
        with("offers", "[1]"),
        with("config", "-1"),
        with("hand-over", "[{}]"),
        with("needs", &format!("[\"{}\"]", "n".repeat(PATH_MAX + 1))),
        with("devices", r#"[{"name":"a","instance":0,"version":1,"table":0}]"#),
        with("ram", &format!(r#"[{{"name":"{}","length":4096}}]"#, "n".repeat(256))),
    ];
    for json in odd.iter().map(String::as_str).chain([
        "",
        "{",
        "[]",
        "{}",
        &deep,
        r#"{"machine":1,"page-size":1,"ram":[],"devices":[]}"#,
    ]) {
        assert_eq!(frame(json).errno(), libc::EINVAL);
    }
    let long = [MAGIC.to_be_bytes(), VERSION.to_be_bytes(), [0xff; 4]].concat();
    assert_eq!(read(&mut Slice::new(&long)).unwrap_err().errno(), libc::EINVAL);
}

/// Hellos of released libraries stay readable for ever: this is the first one's.
#[test]
fn the_first_hello_is_understood() {
    const FIRST: &str = include_str!("../../tests/golden/hello-1.json");
    let mut out = Vec::new();
    out.u32(MAGIC);
    out.u32(1);
    out.u32(u32::try_from(FIRST.len()).unwrap());
    out.bytes(FIRST.as_bytes());
    assert_eq!(read(&mut Slice::new(&out)).unwrap(), hello());
}
