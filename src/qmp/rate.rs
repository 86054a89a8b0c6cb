//! How fast the guest dirties its memory, measured without a migration (what can be said of it so far), and how fast each
//! vCPU may.

use serde_json::json;

use super::request::Refusal;
use super::settings::NO_RING;
use super::shape::{Shape, list, may, must, words};
use super::table::{Call, Outcome, done};
use crate::dirty::kvm_ring::VcpuDirt;

/// Milliseconds a measurement may take.
const TIME: std::ops::RangeInclusive<u64> = 50..=60_000;

fn units() -> Shape {
    words(["second", "millisecond"])
}

fn modes() -> Shape {
    words(["page-sampling", "dirty-ring", "dirty-bitmap"])
}

/// What `calc-dirty-rate` takes.
pub fn takes_calc() -> Shape {
    Shape::Object(vec![
        must("calc-time", Shape::U64),
        may("calc-time-unit", units()),
        may("sample-pages", Shape::U64),
        may("mode", modes()),
    ])
}

/// `calc-dirty-rate`: refused until a tracker can be read beside a migration.
pub fn calc(call: &mut Call<'_>) -> Outcome {
    let scale = if call.text("calc-time-unit") == Some("millisecond") { 1 } else { 1000 };
    let time = call.number("calc-time").and_then(|time| time.checked_mul(scale));
    if time.is_none_or(|time| !TIME.contains(&time)) {
        return Err(Refusal::new("Calculation time is out of range [50ms, 60000ms]."));
    }
    Err(Refusal::new(
        "this library does not measure the dirty rate without a migration yet; during one it is ram.dirty-pages-rate of \
         query-migrate",
    ))
}

/// What `query-dirty-rate` takes.
pub fn takes_query() -> Shape {
    Shape::Object(vec![may("calc-time-unit", units())])
}

/// What `query-dirty-rate` gives.
pub fn gives_query() -> Shape {
    Shape::Object(vec![
        must("status", words(["unstarted", "measuring", "measured"])),
        must("start-time", Shape::Int),
        must("calc-time", Shape::Int),
        must("calc-time-unit", units()),
        must("sample-pages", Shape::Int),
        must("mode", modes()),
        may("dirty-rate", Shape::Int),
    ])
}

/// `query-dirty-rate`: no measurement was ever started.
pub fn query(call: &mut Call<'_>) -> Outcome {
    let unit = call.text("calc-time-unit").unwrap_or("second");
    Ok(json!({"status": "unstarted", "start-time": 0, "calc-time": 0, "calc-time-unit": unit, "sample-pages": 0,
        "mode": "page-sampling"}))
}

/// What `set-vcpu-dirty-limit` takes.
pub fn takes_limit() -> Shape {
    Shape::Object(vec![may("cpu-index", Shape::Int), must("dirty-rate", Shape::U64)])
}

/// Bytes in a megabyte of QMP's rates.
const MB: u64 = 1 << 20;

/// The vCPU that a command is about; none: all.
fn vcpu(call: &Call<'_>) -> Result<Option<usize>, Refusal> {
    let Some(index) = call.arguments.get("cpu-index") else { return Ok(None) };
    match index.as_i64() {
        // What tools say for all.
        Some(-1) => Ok(None),
        _ => match call.number("cpu-index").and_then(|index| usize::try_from(index).ok()) {
            Some(index) => Ok(Some(index)),
            None => Err(Refusal::new(format!("there is no vCPU {index}"))),
        },
    }
}

fn limit(call: &Call<'_>, rate: u64) -> Outcome {
    let ring = call.face.machine.ring().map_err(|_| Refusal::new(NO_RING))?;
    ring.set_limit(vcpu(call)?, rate.saturating_mul(MB))?;
    done()
}

/// `set-vcpu-dirty-limit`; megabytes per second, 0 lifts it.
pub fn set_limit(call: &mut Call<'_>) -> Outcome {
    limit(call, call.number("dirty-rate").unwrap_or(0))
}

/// What `cancel-vcpu-dirty-limit` takes.
pub fn takes_cancel() -> Shape {
    Shape::Object(vec![may("cpu-index", Shape::Int)])
}

/// `cancel-vcpu-dirty-limit`. Where none can be there is none to cancel.
pub fn cancel_limit(call: &mut Call<'_>) -> Outcome {
    match call.face.machine.ring() {
        Ok(_) => limit(call, 0),
        Err(_) => done(),
    }
}

/// What `query-vcpu-dirty-limit` gives.
pub fn gives_limits() -> Shape {
    let names = ["cpu-index", "limit-rate", "current-rate"];
    list(Shape::Object(names.map(|name| must(name, Shape::Int)).into()))
}

/// `query-vcpu-dirty-limit`: vCPUs, if any has a limit. Rates are rounded up: a limit is never shown as none.
pub fn limits(call: &mut Call<'_>) -> Outcome {
    let dirt = call.face.machine.vcpu_dirt();
    if dirt.iter().all(|vcpu| vcpu.limit == 0) {
        return Ok(json!([]));
    }
    let of = |(index, vcpu): (usize, &VcpuDirt)| json!({"cpu-index": index, "limit-rate": vcpu.limit.div_ceil(MB), "current-rate": vcpu.speed.rate.div_ceil(MB)});
    Ok(dirt.iter().enumerate().map(of).collect())
}
