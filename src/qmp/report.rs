//! `query-migrate`: where the migration stands, with the fields that QEMU has in each state.

use serde_json::{Map, Value, json};

use super::shape::{Shape, list, may, must, words};
use super::table::{Call, Outcome};
use crate::machine::Machine;
use crate::pacing::dirty_limit::Speed;
use crate::ram::PAGE;
use crate::status::{STATES, Side, Snapshot, State};
use crate::transport::uri::Uri;

const MILLI: u64 = 1_000_000;

/// What `query-migrate` gives.
pub fn gives() -> Shape {
    let mut ram: Vec<_> = RAM.iter().map(|(name, _)| must(name, Shape::Int)).collect();
    ram.push(must("mbps", Shape::Number));
    let mut socket = vec![must("type", words(["inet", "unix", "vsock"]))];
    socket.extend(["host", "port", "path", "cid"].map(|name| may(name, Shape::Str)));
    socket.extend(["ipv4", "ipv6"].map(|name| may(name, Shape::Bool)));
    let mut fields = vec![may("status", words(STATES.map(State::name))), may("ram", Shape::Object(ram))];
    fields.extend(["setup-time", "total-time", "expected-downtime", "downtime"].map(|name| may(name, Shape::Int)));
    fields.extend(SLOW.map(|name| may(name, Shape::Int)));
    let ladder = ["steps", "downtime-limit", "dirty-limit"].map(|name| must(name, Shape::Int));
    fields.push(may("x-ladder", Shape::Object(ladder.into())));
    fields.push(may("error-desc", Shape::Str));
    fields.push(may("blocked-reasons", list(Shape::Str)));
    fields.push(may("socket-address", list(Shape::Object(socket))));
    Shape::Object(fields)
}

/// What says how slow the guest is made.
const SLOW: [&str; 3] =
    ["cpu-throttle-percentage", "dirty-limit-throttle-time-per-round", "dirty-limit-ring-full-time"];

/// A member and where it comes from.
type Amount = (&'static str, fn(&Snapshot) -> u64);

/// Whole numbers of the member `ram`. What has no part in any of our streams is zero.
const RAM: [Amount; 16] = [
    ("transferred", |now| now.transferred),
    ("remaining", |now| if now.state == State::Completed { 0 } else { now.remaining }),
    ("total", |now| now.total),
    ("duplicate", |now| now.zero_pages),
    ("normal", |now| now.normal_pages),
    ("normal-bytes", |now| now.normal_pages.saturating_mul(PAGE)),
    ("dirty-pages-rate", |now| if now.state == State::Completed { 0 } else { now.dirty_rate / PAGE }),
    ("dirty-sync-count", |now| now.iteration),
    ("postcopy-requests", |_| 0),
    ("page-size", |_| PAGE),
    ("multifd-bytes", |now| now.channel_bytes),
    ("pages-per-second", pages_per_second),
    ("precopy-bytes", |now| now.precopy),
    ("downtime-bytes", |now| now.transferred.saturating_sub(now.precopy)),
    ("postcopy-bytes", |_| 0),
    ("dirty-sync-missed-zero-copy", |_| 0),
];

fn per_second(amount: u64, now: &Snapshot) -> u64 {
    let rate = u128::from(amount) * 1_000_000_000 / u128::from(now.elapsed.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

fn pages_per_second(now: &Snapshot) -> u64 {
    match now.state {
        State::Completed => per_second(now.normal_pages.saturating_add(now.zero_pages), now),
        _ => now.bandwidth / PAGE,
    }
}

/// Megabits per second: of the last moments, or of the whole once it is over.
#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn mbps(now: &Snapshot) -> f64 {
    let rate = if now.state == State::Completed { per_second(now.transferred, now) } else { now.bandwidth };
    rate as f64 * 8.0 / 1e6
}

/// `query-migrate`.
pub fn migrate(call: &mut Call<'_>) -> Outcome {
    let machine = &call.face.machine;
    let now = machine.status().snapshot();
    let mut out = Map::new();
    if let (Some(side), true) = (now.side, now.state != State::None) {
        out.insert("status".into(), now.state.name().into());
        match side {
            Side::Source => {
                source(&now, &mut out);
                limited(machine, &now, &mut out);
            }
            Side::Destination => destination(machine, &now, &mut out),
        }
        let error = machine.status().error().filter(|_| tells_error(now.state));
        if let Some(error) = error {
            out.insert("error-desc".into(), error.to_string().into());
        }
    }
    let reasons: Vec<Value> = machine.sections().blockers().iter().map(|b| b.reason.clone().into()).collect();
    if !reasons.is_empty() {
        out.insert("blocked-reasons".into(), reasons.into());
    }
    Ok(out.into())
}

fn tells_error(state: State) -> bool {
    matches!(state, State::Failed | State::SwitchoverUnknown | State::Held | State::Reconnecting)
}

fn source(now: &Snapshot, out: &mut Map<String, Value>) {
    if matches!(now.state, State::Setup | State::Failed | State::Cancelled) {
        return;
    }
    out.insert("setup-time".into(), (now.setup / MILLI).into());
    out.insert("total-time".into(), (now.elapsed / MILLI).into());
    match now.state {
        State::Completed => out.insert("downtime".into(), (now.downtime / MILLI).into()),
        _ => out.insert("expected-downtime".into(), (now.expected_downtime / MILLI).into()),
    };
    if now.throttle > 0 && !now.state.is_final() {
        out.insert(SLOW[0].into(), now.throttle.into());
    }
    let mut ram: Map<String, Value> = RAM.iter().map(|(name, get)| ((*name).to_owned(), get(now).into())).collect();
    ram.insert("mbps".into(), mbps(now).into());
    out.insert("ram".into(), ram.into());
}

/// How long vCPUs stand at their full rings, and what the ladder did.
fn limited(machine: &Machine, now: &Snapshot, out: &mut Map<String, Value>) {
    if now.state.is_final() || now.state == State::Setup {
        return;
    }
    if now.dirty_limit > 0 {
        // Of the vCPU that stands longest; in microseconds for each time that it fills its ring.
        let dirt = machine.vcpu_dirt();
        let slowest = dirt.iter().filter(|vcpu| vcpu.speed.pages > 0).max_by_key(|vcpu| vcpu.speed.stood);
        let [stood, filled] = slowest.map_or([0, 0], |vcpu| {
            let Speed { stood, pages, period, .. } = vcpu.speed;
            [stood, period.saturating_sub(stood)]
                .map(|time| u64::try_from(time.as_micros() * vcpu.entries as u128 / u128::from(pages)).unwrap_or(0))
        });
        out.insert(SLOW[1].into(), stood.into());
        out.insert(SLOW[2].into(), filled.into());
    }
    if now.ladder > 0 {
        let limits = json!({"steps": now.ladder, "downtime-limit": now.downtime_limit / MILLI, "dirty-limit": now.dirty_limit});
        out.insert("x-ladder".into(), limits);
    }
}

fn destination(machine: &Machine, now: &Snapshot, out: &mut Map<String, Value>) {
    if now.state.is_final() {
        return;
    }
    let address = machine.get("listen-address").ok().and_then(|uri| Uri::parse(&uri).ok());
    let address = match address {
        Some(Uri::Tcp { host, port }) => {
            let family = if host.contains(':') { "ipv6" } else { "ipv4" };
            json!({"type": "inet", "host": host, "port": port.to_string(), family: true})
        }
        Some(Uri::Vsock { cid, port }) => json!({"type": "vsock", "cid": cid.to_string(), "port": port.to_string()}),
        Some(Uri::Unix { path }) => json!({"type": "unix", "path": path}),
        _ => return,
    };
    out.insert("socket-address".into(), json!([address]));
}
