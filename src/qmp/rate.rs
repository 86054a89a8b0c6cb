//! How fast the guest dirties its memory, measured without a migration, and how fast each vCPU may.

use serde_json::{Map, Value, json};

use super::request::Refusal;
use super::settings::NO_RING;
use super::shape::{Shape, list, may, must, words};
use super::table::{Call, Outcome, done};
use crate::dirty::kvm_ring::VcpuDirt;
use crate::dirty::rate::{Mode, PERIOD_MS, SAMPLES, State};
use crate::pacing::per_second;

const MODES: [(&str, Mode); 3] =
    [("page-sampling", Mode::Sampling), ("dirty-ring", Mode::Ring), ("dirty-bitmap", Mode::Bitmap)];

fn units() -> Shape {
    words(["second", "millisecond"])
}

fn modes() -> Shape {
    words(MODES.map(|(name, _)| name))
}

/// Milliseconds that a unit has.
fn unit(call: &Call<'_>) -> (&'static str, u64) {
    match call.text("calc-time-unit") {
        Some("millisecond") => ("millisecond", 1),
        _ => ("second", 1000),
    }
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

/// `calc-dirty-rate`: starts to measure, and returns at once.
pub fn calc(call: &mut Call<'_>) -> Outcome {
    let time = call.number("calc-time").and_then(|time| time.checked_mul(unit(call).1));
    let Some(time) = time.filter(|time| PERIOD_MS.contains(time)) else {
        return Err(Refusal::new("Calculation time is out of range [50ms, 60000ms]."));
    };
    let mode =
        MODES.iter().find(|(name, _)| call.text("mode") == Some(name)).map_or(Mode::Sampling, |(_, mode)| *mode);
    let samples = call.number("sample-pages");
    match (mode, samples) {
        (Mode::Sampling, Some(samples)) if !SAMPLES.contains(&samples) => {
            let (least, most) = (SAMPLES.start(), SAMPLES.end());
            return Err(Refusal::new(format!("sample-pages is out of range[{least}, {most}].")));
        }
        (Mode::Bitmap | Mode::Ring, Some(_)) => {
            return Err(Refusal::new("sample-pages is used only in page-sampling mode"));
        }
        _ => {}
    }
    call.face.machine.measure_dirty_rate(mode, time, samples.unwrap_or(0))?;
    done()
}

/// What `query-dirty-rate` takes.
pub fn takes_query() -> Shape {
    Shape::Object(vec![may("calc-time-unit", units())])
}

/// What `query-dirty-rate` gives.
pub fn gives_query() -> Shape {
    let vcpu = Shape::Object(vec![must("id", Shape::Int), must("dirty-rate", Shape::Int)]);
    Shape::Object(vec![
        must("status", words(["unstarted", "measuring", "measured"])),
        must("start-time", Shape::Int),
        must("calc-time", Shape::Int),
        must("calc-time-unit", units()),
        must("sample-pages", Shape::Int),
        must("mode", modes()),
        may("dirty-rate", Shape::Int),
        may("vcpu-dirty-rate", list(vcpu)),
    ])
}

/// `query-dirty-rate`: in MiB per second, by the distinct pages of the whole time; by rings, by what they all took.
pub fn query(call: &mut Call<'_>) -> Outcome {
    let now = call.face.machine.dirty_rate();
    if let Some(error) = now.error {
        return Err(Refusal::new(format!("the dirty rate could not be measured: {}", error.text())));
    }
    let (unit, scale) = unit(call);
    let mode = now.ask.map_or(Mode::Sampling, |ask| ask.mode);
    let name = MODES.iter().find(|(_, known)| *known == mode).map_or("page-sampling", |(name, _)| name);
    let status = match now.state {
        State::None | State::Failed => "unstarted",
        State::Measuring => "measuring",
        State::Measured => "measured",
    };
    let time = now.ask.map_or(0, |ask| u64::try_from(ask.period.as_millis()).unwrap_or(0));
    let mut answer = Map::new();
    let mut add = |name: &str, value: Value| drop(answer.insert(name.to_owned(), value));
    add("status", json!(status));
    add("start-time", json!(now.began_ns / 1_000_000_000));
    add("calc-time", json!(time / scale));
    add("calc-time-unit", json!(unit));
    add("sample-pages", json!(now.ask.map_or(0, |ask| ask.samples)));
    add("mode", json!(name));
    if let Some(found) = now.found {
        let mib = |bytes: u64| bytes >> 20;
        let rate = match mode {
            Mode::Ring => found.vcpus.iter().sum(),
            _ => per_second(found.curve.working_set(), found.curve.reach()),
        };
        add("dirty-rate", json!(mib(rate)));
        let vcpu = |(id, rate): (usize, &u64)| json!({"id": id, "dirty-rate": mib(*rate)});
        if mode == Mode::Ring {
            add("vcpu-dirty-rate", found.vcpus.iter().enumerate().map(vcpu).collect());
        }
    }
    Ok(Value::Object(answer))
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
    let machine = &call.face.machine;
    machine.ring().map_err(|_| Refusal::new(NO_RING))?;
    machine.limit_vcpu_there(vcpu(call)?, rate.saturating_mul(MB))?;
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
