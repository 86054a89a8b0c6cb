//! Capabilities and parameters: the table of options as QMP has it, with QEMU's words for what is refused.

use serde_json::{Map, Value, json};

use super::request::Refusal;
use super::shape::{Field, Shape, list, may, must, words};
use super::table::{Call, Outcome, done};
use crate::options::{Opt, Row, TABLE, Type};

/// Capabilities of QEMU's that nothing here has: they may be switched off, as tools do that switch all of them.
pub const ABSENT_CAPABILITIES: [&str; 15] = [
    "xbzrle",
    "rdma-pin-all",
    "zero-blocks",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "mapped-ram",
];

/// Said where KVM's dirty rings are needed and there are none.
pub const NO_RING: &str = "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set";

/// Said when the most by which vCPUs are throttled is less than the first step, too.
const THROTTLE_MAX: &str =
    "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99";

/// Parameters of QEMU's that nothing here obeys, with the value that they have there at first: it may be set again.
fn absent_parameters() -> Vec<(&'static str, Shape, Value)> {
    let number = |name, value: u64| (name, Shape::U64, json!(value));
    let text = |name| (name, Shape::StrOrNull, json!(""));
    vec![
        number("announce-initial", 50),
        number("announce-max", 550),
        number("announce-rounds", 5),
        number("announce-step", 100),
        text("tls-creds"),
        text("tls-hostname"),
        text("tls-authz"),
        number("x-checkpoint-delay", 20_000),
        ("multifd-compression", words(["none", "zlib", "zstd", "qatzip", "qpl", "uadk"]), json!("none")),
        number("multifd-zlib-level", 1),
        number("multifd-zstd-level", 1),
        number("multifd-qatzip-level", 1),
        number("xbzrle-cache-size", 64 << 20),
        number("max-postcopy-bandwidth", 0),
        ("block-bitmap-mapping", list(Shape::Any), json!([])),
        ("mode", words(["normal", "cpr-reboot", "cpr-transfer"]), json!("normal")),
        ("direct-io", Shape::Bool, json!(false)),
    ]
}

fn rows(capability: bool) -> impl Iterator<Item = &'static Row> {
    TABLE.iter().filter(move |row| row.capability == capability)
}

/// What `migrate-set-capabilities` takes.
pub fn takes_capabilities() -> Shape {
    let names = Shape::Enum(rows(true).map(|row| row.name).collect(), ABSENT_CAPABILITIES.into());
    let one = Shape::Object(vec![must("capability", names), must("state", Shape::Bool)]);
    Shape::Object(vec![must("capabilities", list(one))])
}

/// What `query-migrate-capabilities` gives.
pub fn gives_capabilities() -> Shape {
    let names = words(rows(true).map(|row| row.name));
    list(Shape::Object(vec![must("capability", names), must("state", Shape::Bool)]))
}

/// `query-migrate-capabilities`.
pub fn capabilities(call: &mut Call<'_>) -> Outcome {
    let mut out = Vec::new();
    for row in rows(true) {
        out.push(json!({"capability": row.name, "state": call.face.machine.get(row.name)? == "on"}));
    }
    Ok(out.into())
}

/// `migrate-set-capabilities`: all of the list or none of it.
pub fn set_capabilities(call: &mut Call<'_>) -> Outcome {
    let machine = &call.face.machine;
    if machine.status().check_idle().is_err() {
        return Err(Refusal::new("There's a migration process in progress"));
    }
    let mut settings = Vec::new();
    for one in call.arguments["capabilities"].as_array().into_iter().flatten() {
        let (name, on) = (one["capability"].as_str().unwrap_or_default(), one["state"] == true);
        match (ABSENT_CAPABILITIES.contains(&name), on) {
            (true, false) => (),
            (true, true) => {
                return Err(Refusal::new(format!(
                    "capability '{name}' is QEMU's, and this library does not have it"
                )));
            }
            (false, _) => settings.push((name, (if on { "on" } else { "off" }).to_owned())),
        }
    }
    machine.set_all(&settings, |options| {
        let refuse = |text: &str| Err(crate::error::Error::invalid(text));
        let sets = |names: &[Opt]| sets(&settings, names);
        let (ack, limit) = (options.on(Opt::SwitchoverAck), options.on(Opt::DirtyLimit));
        match () {
            () if ack && !options.on(Opt::ReturnPath) && sets(&[Opt::SwitchoverAck, Opt::ReturnPath]) => {
                refuse("Capability 'switchover-ack' requires capability 'return-path'")
            }
            () if limit && options.on(Opt::AutoConverge) && sets(&[Opt::DirtyLimit, Opt::AutoConverge]) => {
                refuse("dirty-limit conflicts with auto-converge either of then available currently")
            }
            () if limit && sets(&[Opt::DirtyLimit]) && machine.ring().is_err() => refuse(NO_RING),
            () => Ok(()),
        }
    })?;
    done()
}

/// Whether one of these is among the settings. What does not go together is refused to who sets one of it, not to a client
/// that sets something else after the VMM did.
fn sets(settings: &[(&str, String)], names: &[Opt]) -> bool {
    settings.iter().any(|(name, _)| names.iter().any(|opt| opt.name() == *name))
}

fn shape(row: &Row) -> Shape {
    match row.kind {
        Type::Bool => Shape::Bool,
        Type::Choice(names) => words(names.iter().copied()),
        Type::Text => Shape::Str,
        Type::Size | Type::Number | Type::Millis if row.range.1 <= u64::from(u8::MAX) => Shape::U8,
        Type::Size | Type::Number | Type::Millis => Shape::U64,
    }
}

/// What `migrate-set-parameters` takes.
pub fn takes_parameters() -> Shape {
    let mut fields: Vec<Field> = rows(false).map(|row| may(row.name, shape(row))).collect();
    let absent = absent_parameters().into_iter().map(|(name, shape, _)| Field { hidden: true, ..may(name, shape) });
    fields.extend(absent);
    Shape::Object(fields)
}

/// What `query-migrate-parameters` gives.
pub fn gives_parameters() -> Shape {
    Shape::Object(rows(false).map(|row| must(row.name, shape(row))).collect())
}

/// `query-migrate-parameters`.
pub fn parameters(call: &mut Call<'_>) -> Outcome {
    let mut out = Map::new();
    for row in rows(false) {
        let text = call.face.machine.get(row.name)?;
        let value = match row.kind {
            Type::Bool => (text == "on").into(),
            Type::Choice(_) | Type::Text => text.into(),
            Type::Size | Type::Number | Type::Millis => text.parse::<u64>().map_or(Value::Null, Value::from),
        };
        out.insert(row.name.to_owned(), value);
    }
    Ok(out.into())
}

/// `migrate-set-parameters`: all of them or none; `defaults` comes before the others.
pub fn set_parameters(call: &mut Call<'_>) -> Outcome {
    for (name, _, first) in absent_parameters() {
        match call.arguments.get(name) {
            Some(value) if *value != first && !(value.is_null() && first == "") => {
                let text =
                    format!("parameter '{name}' is QEMU's, and this library does not obey it: it stays {first}");
                return Err(Refusal::new(text));
            }
            _ => (),
        }
    }
    let mut settings = Vec::new();
    let last_first = rows(false).filter(|row| row.name == Opt::Defaults.name());
    for row in last_first.chain(rows(false).filter(|row| row.name != Opt::Defaults.name())) {
        if let Some(value) = call.arguments.get(row.name) {
            settings.push((row.name, setting(row, value)?));
        }
    }
    let throttle = [Opt::ThrottleInitial, Opt::ThrottleMax, Opt::Defaults];
    call.face.machine.set_all(&settings, |options| match options.get(Opt::ThrottleMax) {
        max if max < options.get(Opt::ThrottleInitial) && sets(&settings, &throttle) => {
            Err(crate::error::Error::invalid(THROTTLE_MAX))
        }
        _ => Ok(()),
    })?;
    done()
}

/// A value that has the row's shape as the table takes it, if it is in range.
fn setting(row: &Row, value: &Value) -> Result<String, Refusal> {
    let (min, max) = row.range;
    match value {
        Value::Bool(on) => Ok((if *on { "on" } else { "off" }).to_owned()),
        Value::String(text) => Ok(text.clone()),
        _ if value.as_u64().is_some_and(|n| (min..=max).contains(&n)) => Ok(value.to_string()),
        _ => Err(Refusal::new(out_of_range(row))),
    }
}

/// QEMU's words, which it chose one by one.
fn out_of_range(row: &Row) -> String {
    let (min, max) = row.range;
    let name = if row.name.starts_with("x-") { row.name.to_owned() } else { row.name.replace('-', "_") };
    let range = match row.kind {
        _ if row.name == Opt::ThrottleMax.name() => return THROTTLE_MAX.to_owned(),
        Type::Millis if max > 1000 && max % 1000 == 0 => {
            format!("an integer in the range of {min} to ({} * 1000) ms", max / 1000)
        }
        Type::Number if max <= 100 && row.name.contains("throttle") => {
            format!("an integer in the range of {min} to {max}")
        }
        _ => format!("a value between {min} and {max}"),
    };
    format!("Parameter '{name}' expects {range}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_is_not_in_the_table() {
        let there = |name: &str| TABLE.iter().any(|row| row.name == name);
        assert!(!ABSENT_CAPABILITIES.iter().any(|name| there(name)));
        assert_eq!(rows(true).count() + ABSENT_CAPABILITIES.len(), 22, "each capability of QEMU 10.0 is known");
        assert!(!absent_parameters().iter().any(|(name, ..)| there(name)));
        let said = |arguments: Value| takes_parameters().check_arguments(arguments.as_object().unwrap());
        for (name, _, first) in absent_parameters() {
            assert_eq!(said(json!({name: first})), Ok(()), "{name}");
        }
    }

    #[test]
    fn every_option_has_a_shape_that_its_values_have() {
        let options = crate::options::Options::default();
        for row in &TABLE {
            let whole = matches!(row.kind, Type::Size | Type::Number | Type::Millis);
            assert_eq!(matches!(shape(row), Shape::U8 | Shape::U64), whole, "{}", row.name);
            assert_eq!(row.kind == Type::Bool, matches!(options.get_text(row.name).as_deref(), Ok("on" | "off")));
        }
    }
}
