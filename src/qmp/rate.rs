//! How fast the guest dirties its memory, measured without a migration: what can be said of it so far.

use serde_json::json;

use super::request::Refusal;
use super::shape::{Shape, list, may, must, words};
use super::table::{Call, Outcome, done};

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

/// `set-vcpu-dirty-limit`.
pub fn set_limit(_: &mut Call<'_>) -> Outcome {
    Err(Refusal::new(
        "dirty page limit feature is not there: this library slows all vCPUs down alike (auto-converge)",
    ))
}

/// What `cancel-vcpu-dirty-limit` takes.
pub fn takes_cancel() -> Shape {
    Shape::Object(vec![may("cpu-index", Shape::Int)])
}

/// `cancel-vcpu-dirty-limit`: there is none.
pub fn cancel_limit(_: &mut Call<'_>) -> Outcome {
    done()
}

/// What `query-vcpu-dirty-limit` gives.
pub fn gives_limits() -> Shape {
    let names = ["cpu-index", "limit-rate", "current-rate"];
    list(Shape::Object(names.map(|name| must(name, Shape::Int)).into()))
}

/// `query-vcpu-dirty-limit`: there is none.
pub fn limits(_: &mut Call<'_>) -> Outcome {
    Ok(json!([]))
}
