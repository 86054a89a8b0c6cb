//! The guest's run state.

use serde_json::json;

use super::migrate::sides_word;
use super::shape::{Shape, list, may, must, words};
use super::table::{Call, Outcome, done};
use crate::machine::Machine;
use crate::status::{Side, State};
use crate::vmm::StopReason;

const STATES: [&str; 6] = ["running", "paused", "inmigrate", "finish-migrate", "postmigrate", "internal-error"];

/// What `query-status` gives.
pub fn gives_status() -> Shape {
    Shape::Object(vec![must("running", Shape::Bool), must("status", words(STATES))])
}

/// `query-status`.
pub fn status(call: &mut Call<'_>) -> Outcome {
    let word = state(&call.face.machine);
    Ok(json!({"running": word == "running", "status": word}))
}

/// QEMU's word for why the guest is stopped, or that it runs.
fn state(machine: &Machine) -> &'static str {
    let reasons = machine.vmm().reasons();
    let status = machine.status().snapshot();
    match status.side {
        _ if reasons.is_empty() => "running",
        _ if reasons.contains(StopReason::Error) => "internal-error",
        Some(Side::Destination) if reasons.contains(StopReason::NotOwner) => "inmigrate",
        _ if reasons.contains(StopReason::NotOwner) => "postmigrate",
        _ if reasons.contains(StopReason::Migration) => match status.state {
            State::Completed => "postmigrate",
            _ => "finish-migrate",
        },
        _ => "paused",
    }
}

/// `stop`.
pub fn stop(call: &mut Call<'_>) -> Outcome {
    call.face.machine.vmm().stop(StopReason::User)?;
    done()
}

/// `cont`.
pub fn cont(call: &mut Call<'_>) -> Outcome {
    let machine = &call.face.machine;
    machine.vmm().start(StopReason::User).map_err(|error| match error.errno() {
        libc::EPERM => error.hint(sides_word(machine)),
        _ => error,
    })?;
    done()
}

/// What `announce-self` takes.
pub fn takes_announce() -> Shape {
    Shape::Object(vec![
        must("initial", Shape::U64),
        must("max", Shape::U64),
        must("rounds", Shape::U64),
        must("step", Shape::U64),
        may("interfaces", list(Shape::Str)),
        may("id", Shape::Str),
    ])
}

/// `announce-self`: how often and where is up to the VMM's hook, which knows its networks.
pub fn announce(call: &mut Call<'_>) -> Outcome {
    call.face.machine.vmm().announce();
    done()
}
