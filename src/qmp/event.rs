//! News as events: what is told to every client unasked.

use std::time::UNIX_EPOCH;

use serde_json::{Value, json};

use super::shape::{Shape, must, nothing, words};
use crate::status::feed::{News, Told};
use crate::status::{STATES, State};

/// An event's name, and the shape of its data.
type Event = (&'static str, fn() -> Shape);

/// Every event and what comes with it.
pub const EVENTS: [Event; 4] = [
    ("STOP", nothing),
    ("RESUME", nothing),
    ("MIGRATION", || Shape::Object(vec![must("status", words(STATES.map(State::name)))])),
    ("MIGRATION_PASS", || Shape::Object(vec![must("pass", Shape::Int)])),
];

/// An event, on one line without its end.
pub fn line(told: &Told) -> String {
    let since = told.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = json!({"seconds": since.as_secs(), "microseconds": since.subsec_micros()});
    let (name, data) = match told.news {
        News::Stop => ("STOP", Value::Null),
        News::Resume => ("RESUME", Value::Null),
        News::State(state) => ("MIGRATION", json!({"status": state.name()})),
        News::Pass(pass) => ("MIGRATION_PASS", json!({"pass": pass})),
    };
    let mut event = json!({"timestamp": timestamp, "event": name});
    if !data.is_null() {
        event["data"] = data;
    }
    event.to_string()
}
