//! What the library tells while it migrates: option `trace-file` and the page that `vmig report` makes of it, metrics, log
//! records.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod qemu;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use common::{c_program, root, run, scratch, words};
use qemu::peer::{self, End, Peer};
use serde_json::{Value, json};

const RAM: u64 = 8 << 20;

fn settings(more: &[&str]) -> Vec<String> {
    [format!("ram={RAM}")].into_iter().chain(more.iter().map(ToString::to_string)).collect()
}

/// A migration over TCP whose both sides write traces; the files.
fn traced(source: &[&str], destination: &[&str]) -> (End, [PathBuf; 2]) {
    let dir = scratch("traced");
    let files = ["source", "destination"].map(|side| dir.join(side));
    let ram = peer::drawn_ram(&dir, RAM);
    let mut there = settings(destination);
    there.push(peer::path("trace-file", &files[1]));
    let there = Peer::start(&c_program("peer"), "in", "tcp::0", &there, Stdio::null());
    let mut here = settings(source);
    here.extend([peer::path("trace-file", &files[0]), peer::path("load", &ram)]);
    let here = Peer::start(&c_program("peer"), "out", &there.address, &here, Stdio::null());
    let end = here.end();
    there.end();
    (end, files)
}

fn lines(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn of<'a>(lines: &'a [Value], event: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["event"] == event).collect()
}

fn states(lines: &[Value]) -> Vec<&str> {
    of(lines, "state").into_iter().map(|line| line["state"].as_str().unwrap()).collect()
}

fn report(file: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmig")).arg("report").arg(file).output().unwrap()
}

/// The page, which must be one: every element is closed, and nothing comes from elsewhere.
#[track_caller]
fn page(file: &Path) -> String {
    let out = report(file);
    assert!(out.status.success(), "{}", words(&out));
    let page = String::from_utf8(out.stdout).unwrap();
    let mut open = Vec::new();
    for tag in page.split('<').skip(1) {
        let tag = tag.split_once('>').expect("a tag ends").0;
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        match tag {
            _ if tag.starts_with('!') || ["meta"].contains(&name) || tag.ends_with('/') => (),
            _ if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "closed in the wrong order"),
            _ => open.push(name),
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
    for elsewhere in ["http", "src=", "href", "url(", "@import", "<script", "<link", "NaN", "inf"] {
        assert!(!page.contains(elsewhere), "{elsewhere} is in the page");
    }
    assert!(page.contains("name=\"viewport\" content=\"width=device-width"));
    page
}

#[test]
fn a_migration_is_traced_and_drawn_on_both_sides() {
    let (end, [source, destination]) = traced(&["dirty=200", "max-bandwidth=40M"], &[]);
    let end = end.completed();
    let here = lines(&source);
    assert_eq!(states(&here), ["setup", "active", "device", "completed"]);
    assert_eq!(
        here.iter().map(|line| line["run"].as_str().unwrap()).collect::<std::collections::BTreeSet<_>>().len(),
        1
    );
    let (begin, last) = (&here[0], of(&here, "state").pop().unwrap());
    assert_eq!((&begin["event"], &begin["side"], &begin["format"]), (&json!("begin"), &json!("source"), &json!(1)));
    assert_eq!(here.last().unwrap()["event"], "end");
    assert_eq!((&last["normal-pages"], &last["zero-pages"]), (&json!(end.normal_pages), &json!(end.zero_pages)));
    assert_eq!((&last["total"], &last["remaining"]), (&json!(RAM), &json!(0)));
    let rounds: Vec<_> = of(&here, "iteration").iter().map(|line| line["iteration"].as_u64().unwrap()).collect();
    assert!(!rounds.is_empty() && rounds.iter().enumerate().all(|(n, round)| *round == n as u64 + 2), "{rounds:?}");
    assert!(
        of(&here, "iteration").iter().any(|line| line["dirty-rate"].as_u64() > Some(0)),
        "the guest dirtied nothing"
    );
    let blackout = of(&here, "blackout").pop().unwrap();
    let part = |side: &str, name: &str| blackout[side][name].as_u64().unwrap();
    let names = ["stop", "devices", "sync", "ram", "load", "start"];
    assert!(names.iter().map(|name| part("actual", name)).sum::<u64>() <= part("actual", "total"), "{blackout}");
    assert!(part("actual", "stop") > 0 && part("actual", "load") > 0 && part("expected", "ram") > 0, "{blackout}");
    let times: Vec<_> = here.iter().map(|line| line["t"].as_u64().unwrap()).collect();
    assert!(times.is_sorted(), "{times:?}");

    let there = lines(&destination);
    assert_eq!(states(&there), ["setup", "active", "completed"]);
    assert_eq!((&there[0]["side"], of(&there, "blackout").len()), (&json!("destination"), 0));
    assert_eq!(of(&there, "state").pop().unwrap()["normal-pages"], json!(end.normal_pages));

    let drawn = page(&source);
    for words in
        ["Left to send", "Rates", "at the source", ">completed<", "8 MiB", "The guest stood still for", "saving and"]
    {
        assert!(drawn.contains(words), "{words} is not in the page");
    }
    assert_eq!(drawn.matches("<polyline").count(), 3);
    assert_eq!(drawn.matches("<details").count(), 1);
    // Every part of the blackout that took time is in the bar.
    let parts = names.iter().filter(|name| part("actual", name) > 0).count();
    let bar = drawn.split("as it was").nth(1).unwrap().split("</svg>").next().unwrap();
    assert!(bar.matches("class=\"part ").count() >= parts, "{bar}");
    let drawn = page(&destination);
    assert!(drawn.contains("at the destination") && drawn.contains("<b>Received</b>"));
}

#[test]
fn what_failed_is_traced_and_drawn_with_its_reason() {
    let (end, [source, destination]) = traced(&["device=1"], &[]);
    end.failed(&["gadget"]);
    for file in [&source, &destination] {
        let lines = lines(file);
        assert_eq!(states(&lines).last(), Some(&"failed"));
        let error = of(&lines, "error").pop().unwrap();
        assert_eq!((&error["section"], &error["errno"]), (&json!("gadget"), &json!(2)));
        let page = page(file);
        let item = page.split("<ul class=\"errors\">").nth(1).unwrap();
        assert!(item.contains("destination: hello: section &#39;gadget&#39;"), "{item}");
    }
    // A second attempt goes behind the first one.
    fs::write(&source, [fs::read(&destination).unwrap(), fs::read(&source).unwrap()].concat()).unwrap();
    assert_eq!(page(&source).matches("<section>").count(), 2);
}

/// A trace with one migration whose lines are these.
fn trace_of(name: &str, lines: &[Value]) -> PathBuf {
    let file = scratch(name).join("trace");
    let begin = json!({"event": "begin", "run": "x", "t": 0, "format": 1, "library": "0.1.0", "side": "source", "unix-ms": 0});
    let text: Vec<_> = [&begin].into_iter().chain(lines).map(ToString::to_string).collect();
    fs::write(&file, text.join("\n")).unwrap();
    file
}

#[test]
fn nothing_of_a_trace_gets_into_the_page_as_it_is() {
    let evil = "</li><script>alert('1')</script>\u{7}&\"";
    let file = trace_of(
        "evil",
        &[
            json!({"event": "error", "run": "x", "t": 5, "text": evil}),
            json!({"event": "state", "run": "x", "t": 6, "state": evil, "remaining": u64::MAX, "bandwidth": u64::MAX}),
            json!({"event": "blackout", "run": "x", "t": u64::MAX, "actual": {"stop": u64::MAX, "total": u64::MAX}}),
            json!({"event": "iteration", "run": "x", "t": 7, "iteration": -1, "remaining": "much"}),
            json!({"event": "iteration", "run": "nobody's", "t": 7}),
            json!({"event": "from the future", "run": "x", "t": 8}),
            json!([1]),
        ],
    );
    let mut text = fs::read(&file).unwrap();
    text.extend(b"\n{\"event\": \"state\", \"run\": \"x\", \"t\": \xff\n");
    text.extend(vec![b'['; 1 << 20]);
    fs::write(&file, &text).unwrap();
    let page = page(&file);
    assert!(
        page.contains("&lt;script&gt;alert(&#39;1&#39;)") && page.contains("lines of the file could not be read")
    );
    for text in [&b""[..], b"hello\n", b"{}\n"] {
        fs::write(&file, text).unwrap();
        let out = report(&file);
        assert_eq!(out.status.code(), Some(1), "{}", words(&out));
        assert!(words(&out).contains("there is no migration in it"), "{}", words(&out));
    }
}

#[test]
fn a_long_trace_makes_a_page_of_bearable_size() {
    let sample = |t: u64| json!({"event": "iteration", "run": "x", "t": t * 1_000_000, "iteration": t, "total": RAM, "remaining": t % 977 * 4096});
    let file = trace_of("long", &(1..60_000).map(sample).collect::<Vec<_>>());
    let page = page(&file);
    assert!(page.len() < 200_000, "{}", page.len());
    assert!(page.contains("59699 more."));
    let out = file.with_extension("html");
    run(Command::new(env!("CARGO_BIN_EXE_vmig")).args(["report", "-o"]).args([&out, &file]));
    assert_eq!(fs::read_to_string(&out).unwrap(), page);
}

/// Runs the peer as a source that writes into a file, and returns what it says.
fn source_into_a_file(more: &[&str]) -> Output {
    let file = fs::File::create(scratch("observed").join("stream")).unwrap();
    let mut command = Command::new(c_program("peer"));
    command.args(["out", "fd:0"]).args(settings(more)).stdin(file).output().unwrap()
}

#[test]
fn a_trace_that_cannot_be_written_disturbs_nothing() {
    let out = source_into_a_file(&["trace-file=/dev/full", "records=1"]);
    let said = words(&out);
    assert!(out.status.success() && said.contains("state completed\n"), "{said}");
    let record = said.lines().find(|line| line.starts_with("record ")).unwrap_or_else(|| panic!("no record: {said}"));
    assert_eq!(record, "record 2 trace the trace ends early: No space left on device");
    // Less important lines are left out.
    let quiet = words(&source_into_a_file(&["trace-file=/dev/full", "records=1", "log-level=error"]));
    assert!(quiet.contains("state completed\n") && !quiet.contains("record "), "{quiet}");
    let plain = words(&source_into_a_file(&["trace-file=/dev/full"]));
    assert!(plain.contains("vmig: warning: trace: the trace ends early"), "{plain}");
    let refused = source_into_a_file(&["trace-file=/nowhere/at/all"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(words(&refused).contains("trace file '/nowhere/at/all': No such file"), "{}", words(&refused));
}

/// Metrics by name with labels, checked for their form.
fn metrics(text: &str) -> BTreeMap<String, f64> {
    let (mut found, mut typed) = (BTreeMap::new(), String::new());
    for line in text.lines().skip_while(|line| !line.starts_with("# HELP")) {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["gauge", "counter"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            typed = name.to_owned();
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert_eq!(name.split('{').next().unwrap(), typed, "{line}");
            assert!(found.insert(name.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
        }
    }
    found
}

#[test]
fn metrics_are_those_of_the_migration() {
    let out = source_into_a_file(&[r#"labels=vm="a\"b",host="x""#]);
    let said = words(&out);
    let all = metrics(&said);
    let get = |name: &str, own: &str| {
        let comma = if own.is_empty() { "" } else { "," };
        let name = format!(r#"{name}{{vm="a\"b",host="x"{comma}{own}}}"#);
        *all.get(&name).unwrap_or_else(|| panic!("no {name} in {all:#?}"))
    };
    assert_eq!(
        (get("vmig_migration_state", "state=\"completed\""), get("vmig_migration_state", "state=\"active\"")),
        (1.0, 0.0)
    );
    assert_eq!(get("vmig_migrations_total", "outcome=\"completed\""), 1.0);
    assert_eq!(get("vmig_migrations_total", "outcome=\"failed\""), 0.0);
    assert_eq!(get("vmig_migration_side", "side=\"source\""), 1.0);
    assert_eq!(
        (get("vmig_migration_memory_bytes", ""), get("vmig_migration_remaining_bytes", "")),
        (8_388_608.0, 0.0)
    );
    let pages = said.lines().find_map(|line| line.strip_prefix("pages ")).unwrap();
    let sent = ["normal", "zero"].map(|kind| get("vmig_migration_pages", &format!("kind=\"{kind}\"")));
    assert_eq!(format!("{} {}", sent[0], sent[1]), pages);
    assert!(
        get("vmig_blackout_seconds", "") > 0.0
            && get("vmig_blackout_seconds", "") < get("vmig_migration_elapsed_seconds", "")
    );
    assert!(get("vmig_blackout_part_seconds", "part=\"devices\"") > 0.0);
    assert!(get("vmig_big_lock_acquisitions_total", "") > 0.0);
    assert!(said.contains("vmig_info{vm=\"a\\\"b\",host=\"x\",version=\"0.1.0\"} 1\n"), "{said}");
    assert!(words(&source_into_a_file(&["labels=vm"])).contains("labels are name="));
}

#[test]
fn the_document_names_every_metric() {
    let text = fs::read_to_string(root().join("docs/tool.md")).unwrap();
    let out = source_into_a_file(&["labels="]);
    for name in metrics(&words(&out)).keys() {
        let name = name.split('{').next().unwrap();
        assert!(text.contains(&format!("`{name}`")), "{name} is not in docs/tool.md");
    }
}

#[test]
fn guests_may_share_a_file() {
    let file = scratch("shared").join("trace");
    let line = |event: &str, run: &str, key: &str, value: Value| json!({"event": event, "run": run, "t": 1, "unix-ms": 0, key: value});
    let lines = [
        line("begin", "one", "side", json!("source")),
        line("begin", "two", "side", json!("destination")),
        line("error", "one", "message", json!("the first one's")),
        line("error", "two", "message", json!("the second one's")),
    ];
    fs::write(&file, lines.map(|line| line.to_string()).join("\n")).unwrap();
    let page = page(&file);
    let sections: Vec<_> = page.split("<section>").skip(1).collect();
    for (section, side, error) in [(sections[0], "destination", "the second"), (sections[1], "source", "the first")] {
        assert!(section.contains(&format!("at the {side}")) && section.contains(error), "{section}");
        assert_eq!(section.matches("<li>").count(), 1, "{section}");
    }
}
