//! Commands that start and steer a migration.

use serde_json::Value;

use super::request::Refusal;
use super::shape::{Shape, Union, list, may, must, shown, words};
use super::table::{Call, Outcome, done};
use crate::machine::Machine;
use crate::status::{STATES, Side, State};
use crate::transport::uri::Uri;

const BUSY: &str = "There's a migration process in progress";
const KINDS: [&str; 2] = ["main", "cpr"];
/// VMIG_RUN and VMIG_DISCARD.
const DECISIONS: [&str; 2] = ["run", "discard"];

/// A host and a port, and what tools repeat that were told where a destination listens: it changes nothing, for all
/// addresses of a host are tried.
fn inet() -> Shape {
    let hint = |name| may(name, Shape::Bool);
    let hints = ["ipv4", "ipv6", "numeric", "keep-alive"].map(hint);
    Shape::Object([must("host", Shape::Str), must("port", Shape::Str)].into_iter().chain(hints).collect())
}

/// Addresses in their long form.
fn address() -> Shape {
    let object = |names: &[&'static str]| Shape::Object(names.iter().map(|name| must(name, Shape::Str)).collect());
    let socket = Union {
        tag: "type",
        cases: vec![
            ("inet", inet()),
            ("unix", object(&["path"])),
            ("vsock", object(&["cid", "port"])),
            ("fd", object(&["str"])),
        ],
    };
    let file = Shape::Object(vec![must("filename", Shape::Str), must("offset", Shape::U64)]);
    let exec = Shape::Object(vec![must("args", list(Shape::Str))]);
    let rdma = object(&["host", "port"]);
    let cases = vec![("socket", Shape::Union(socket)), ("exec", exec), ("rdma", rdma), ("file", file)];
    Shape::Union(Union { tag: "transport", cases })
}

fn destination() -> [super::shape::Field; 2] {
    let channel = Shape::Object(vec![must("channel-type", words(KINDS)), must("addr", address())]);
    [may("uri", Shape::Str), may("channels", list(channel))]
}

/// What `migrate` takes.
pub fn takes_migrate() -> Shape {
    let [uri, channels] = destination();
    Shape::Object(vec![uri, channels, may("detach", Shape::Bool), may("resume", Shape::Bool)])
}

/// `migrate`: starts to send the guest, and returns at once.
pub fn migrate(call: &mut Call<'_>) -> Outcome {
    let uri = where_to(call)?;
    let machine = &call.face.machine;
    let now = machine.status().snapshot();
    if call.flag("resume") && (now.state, now.side) == (State::Reconnecting, Some(Side::Source)) {
        machine.resume(&uri)?;
        return done();
    }
    if !now.state.is_final() {
        let arriving = now.side == Some(Side::Destination);
        return Err(Refusal::new(if arriving { "Guest is waiting for an incoming migration" } else { BUSY }));
    }
    if call.flag("resume") {
        return Err(Refusal::new("Cannot resume if there is no paused migration"));
    }
    if now.state == State::Completed && now.side == Some(Side::Source) {
        return Err(Refusal::new("Can't migrate the vm that was paused due to previous migration"));
    }
    with_uri(call, &uri, |uri| Ok(machine.outgoing(uri)?))?;
    done()
}

/// What `migrate-incoming` takes.
pub fn takes_incoming() -> Shape {
    let [uri, channels] = destination();
    Shape::Object(vec![uri, channels, may("exit-on-error", Shape::Bool)])
}

/// `migrate-incoming`: waits for a guest. A library does not end its program, whatever `exit-on-error` says.
pub fn incoming(call: &mut Call<'_>) -> Outcome {
    let uri = where_to(call)?;
    let machine = &call.face.machine;
    let now = machine.status().snapshot();
    if !now.state.is_final() {
        let arriving = now.side == Some(Side::Destination);
        return Err(Refusal::new(if arriving { "The incoming migration has already been started" } else { BUSY }));
    }
    with_uri(call, &uri, |uri| Ok(machine.incoming(uri)?))?;
    done()
}

/// The one address that a command names.
fn where_to(call: &Call<'_>) -> Result<String, Refusal> {
    let channels = call.arguments.get("channels").and_then(Value::as_array).filter(|list| !list.is_empty());
    let (uri, channels) = match (call.text("uri"), channels) {
        (Some(uri), None) => (uri.to_owned(), &Vec::new()),
        (None, Some(channels)) => (String::new(), channels),
        _ => return Err(Refusal::new("need either 'uri' or 'channels' argument")),
    };
    if channels.is_empty() {
        return Ok(uri);
    }
    let (mains, others): (Vec<_>, Vec<_>) = channels.iter().partition(|c| c["channel-type"] == "main");
    match (&mains[..], others.is_empty()) {
        ([main], true) => uri_of(&main["addr"]),
        ([_, _, ..], _) => Err(Refusal::new("Channel list has more than one main entry")),
        ([], _) => Err(Refusal::new("Channel list has no main entry")),
        (_, false) => Err(Refusal::new("channel type 'cpr' goes with mode cpr-transfer, which this library lacks")),
    }
}

/// The short form of an address that has the shape of [`address`].
fn uri_of(address: &Value) -> Result<String, Refusal> {
    let text = |name: &str| address[name].as_str().unwrap_or_default();
    let kind = match address["transport"].as_str() {
        Some("socket") | None => text("type"),
        Some(transport) => transport,
    };
    Ok(match kind {
        "inet" if text("host").contains(':') => format!("tcp:[{}]:{}", text("host"), text("port")),
        "inet" => format!("tcp:{}:{}", text("host"), text("port")),
        "unix" => format!("unix:{}", text("path")),
        "vsock" => format!("vsock:{}:{}", text("cid"), text("port")),
        "fd" => format!("fd:{}", text("str")),
        "exec" => format!("exec:{}", command_line(&address["args"])?),
        "rdma" => format!("rdma:{}:{}", text("host"), text("port")),
        _ => format!("file:{},offset={}", text("filename"), address["offset"]),
    })
}

/// A program and its arguments, as the shell that `exec:` asks wants them.
fn command_line(args: &Value) -> Result<String, Refusal> {
    let args: Vec<&str> = args.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let quoted = |arg: &&str| format!("'{}'", arg.replace('\'', r"'\''"));
    match args[..] {
        [] => Err(Refusal::new("Parameter 'args' is empty: a program and its arguments are needed")),
        ["/bin/sh", "-c", line] => Ok(line.to_owned()),
        _ => Ok(args.iter().map(quoted).collect::<Vec<_>>().join(" ")),
    }
}

/// Calls `start` with a URI that the library understands: named descriptors become numbers.
fn with_uri(call: &Call<'_>, uri: &str, start: impl FnOnce(&str) -> Result<(), Refusal>) -> Result<(), Refusal> {
    match uri.strip_prefix("fd:") {
        Some(name) if !name.starts_with(|c: char| c.is_ascii_digit()) => {
            call.face.fds.consume(name, |number| start(&format!("fd:{number}")))
        }
        _ => {
            let known =
                ["tcp:", "unix:", "fd:", "vsock:", "exec:", "file:"].iter().any(|scheme| uri.starts_with(scheme));
            if let (false, Err(_)) = (known, call.face.machine.checked(uri)) {
                return Err(Refusal::new(format!("unknown migration protocol: {}", shown(uri))));
            }
            start(uri)
        }
    }
}

/// `migrate_cancel`.
pub fn cancel(call: &mut Call<'_>) -> Outcome {
    call.face.machine.cancel()?;
    done()
}

/// What `migrate-continue` takes.
pub fn takes_continue() -> Shape {
    Shape::Object(vec![must("state", words(STATES.map(State::name)))])
}

/// `migrate-continue`: the user's word to a source that waits with its guest stopped.
pub fn go_on(call: &mut Call<'_>) -> Outcome {
    let machine = &call.face.machine;
    let expected = call.text("state").unwrap_or_default();
    let now = machine.status().state();
    if expected != now.name() || now != State::PreSwitchover {
        return Err(Refusal::new(format!("Migration not in expected state: {}", now.name())));
    }
    machine.go_on()?;
    done()
}

/// `migrate-pause`: breaks the connection of a postcopy, which does not exist here. A precopy's would be back at once.
pub fn pause(_: &mut Call<'_>) -> Outcome {
    Err(Refusal::new("migrate-pause is currently only supported during postcopy-active or postcopy-recover state"))
}

/// What `migrate-recover` takes.
pub fn takes_recover() -> Shape {
    Shape::Object(vec![must("uri", Shape::Str)])
}

/// `migrate-recover`: a migration whose connection broke goes on at this address. QEMU wants that said at the destination,
/// which listens anew; ours still listens where it did, and has nothing to do if that is what is asked for.
pub fn recover(call: &mut Call<'_>) -> Outcome {
    let machine = &call.face.machine;
    let uri = call.text("uri").unwrap_or_default();
    let now = machine.status().snapshot();
    match (now.state, now.side) {
        (State::Reconnecting, Some(Side::Source)) => machine.resume(uri)?,
        (State::Reconnecting, _) => {
            let address = machine.get("listen-address")?;
            if Uri::parse(uri)? != Uri::parse(&address)? {
                let text = format!("this side still listens at {address}: tell the source how to reach that");
                return Err(Refusal::new(text));
            }
        }
        _ => return Err(Refusal::new("Migrate recover can only be run when postcopy is paused.")),
    }
    done()
}

/// What `vmig-resolve` takes.
pub fn takes_resolve() -> Shape {
    Shape::Object(vec![must("decision", words(DECISIONS))])
}

/// `vmig-resolve`: the operator's word in the states `switchover-unknown` and `held`.
pub fn resolve(call: &mut Call<'_>) -> Outcome {
    let run = call.text("decision") == Some(DECISIONS[0]);
    call.face.machine.resolve(run)?;
    done()
}

/// `migrate-start-postcopy`.
pub fn start_postcopy(_: &mut Call<'_>) -> Outcome {
    Err(Refusal::new("postcopy does not exist in this library yet: the migration goes on as precopy"))
}

/// Where the guest is, for an error about starting it.
pub fn sides_word(machine: &Machine) -> &'static str {
    let now = machine.status().snapshot();
    match (now.side, now.state) {
        (Some(Side::Source), State::Completed) => "it was migrated",
        (Some(Side::Destination), state) if !state.is_final() => "it did not arrive yet, and starts when it has",
        _ => "it is not here",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn long_addresses_become_short_ones() {
        for (address, uri) in [
            (json!({"transport": "socket", "type": "inet", "host": "h", "port": "1"}), "tcp:h:1"),
            (json!({"transport": "socket", "type": "inet", "host": "::1", "port": "1"}), "tcp:[::1]:1"),
            (json!({"transport": "socket", "type": "unix", "path": "/a,b"}), "unix:/a,b"),
            (json!({"transport": "socket", "type": "vsock", "cid": "3", "port": "4"}), "vsock:3:4"),
            (json!({"transport": "socket", "type": "fd", "str": "x"}), "fd:x"),
            (json!({"transport": "exec", "args": ["/bin/sh", "-c", "cat > f"]}), "exec:cat > f"),
            (json!({"transport": "exec", "args": ["tee", "it's", "$c"]}), r"exec:'tee' 'it'\''s' '$c'"),
            (json!({"transport": "file", "filename": "f", "offset": 4096}), "file:f,offset=4096"),
            (json!({"transport": "file", "filename": "f,offset=1", "offset": 2}), "file:f,offset=1,offset=2"),
            (json!({"transport": "rdma", "host": "h", "port": "1"}), "rdma:h:1"),
        ] {
            assert_eq!(uri_of(&address).unwrap(), uri);
        }
    }
}
