//! What stands around a command and its answer.

use std::fmt::Display;

use serde_json::{Map, Value, json};

use super::shape::shown;
use crate::error::Error;

/// The version of QEMU whose QMP this is.
const DIALECT: (u32, u32, u32) = (10, 0, 0);

/// Why a request is not answered with what it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// QMP's class: one client in a thousand looks at it.
    pub class: &'static str,
    /// A sentence.
    pub text: String,
}

impl Refusal {
    /// One of the class that nearly all have.
    pub fn new(text: impl Into<String>) -> Self {
        Self { class: "GenericError", text: text.into() }
    }

    /// There is no such command, or not now.
    pub fn not_found(text: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", text: text.into() }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::new(error.to_string())
    }
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self::new(text)
    }
}

/// A request that is well formed.
#[derive(Debug)]
pub struct Request {
    /// The command.
    pub name: String,
    /// Asked for by `exec-oob`.
    pub oob: bool,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// What the answer repeats.
    pub id: Option<Value>,
}

/// Understands a request; an error goes with the id that was found.
pub fn read(text: &[u8]) -> Result<Request, (Refusal, Option<Value>)> {
    let wrong = |text: String| Refusal::new(text);
    let value = serde_json::from_slice(text).map_err(|e| (wrong(format!("JSON parse error, {e}")), None))?;
    let Value::Object(mut members) = value else {
        return Err((wrong("QMP input must be a JSON object".to_owned()), None));
    };
    let id = members.remove("id");
    let parts = parts(&mut members);
    match parts {
        Ok((name, oob, arguments)) => Ok(Request { name, oob, arguments, id }),
        Err(text) => Err((wrong(text), id)),
    }
}

fn parts(members: &mut Map<String, Value>) -> Result<(String, bool, Map<String, Value>), String> {
    let mut verb = |name: &str| match members.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("QMP input member '{name}' must be a string")),
    };
    let (in_band, oob) = (verb("execute")?, verb("exec-oob")?);
    let arguments = match members.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err("QMP input member 'arguments' must be an object".to_owned()),
    };
    if let Some(name) = members.keys().next() {
        return Err(format!("QMP input member '{}' is unexpected", shown(name)));
    }
    match (in_band, oob) {
        (Some(name), None) => Ok((name, false, arguments)),
        (None, Some(name)) => Ok((name, true, arguments)),
        (Some(_), Some(_)) => Err("QMP input member 'execute' clashes with 'exec-oob'".to_owned()),
        (None, None) => Err("QMP input lacks member 'execute'".to_owned()),
    }
}

/// The answer to a request, on one line without its end.
pub fn answer(outcome: Result<Value, Refusal>, id: Option<Value>) -> String {
    let mut answer = match outcome {
        Ok(value) => json!({"return": value}),
        Err(refusal) => json!({"error": {"class": refusal.class, "desc": refusal.text}}),
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    answer.to_string()
}

/// An answer to what could not be read.
pub fn complaint(text: impl Display) -> String {
    answer(Err(Refusal::new(text.to_string())), None)
}

/// What a client is told first.
pub fn greeting() -> String {
    json!({"QMP": {"version": version(), "capabilities": ["oob"]}}).to_string()
}

/// Which QMP this is, and whose.
pub fn version() -> Value {
    let (major, minor, micro) = DIALECT;
    json!({
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": concat!("vmig ", env!("CARGO_PKG_VERSION")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_refused_in_qemus_words() {
        let said = |text: &str| read(text.as_bytes()).map(|r| r.name).map_err(|(refusal, _)| refusal.text);
        assert_eq!(said(r#"{"execute":"a"}"#), Ok("a".into()));
        assert_eq!(said(r#"{"exec-oob":"b","arguments":{},"id":null}"#), Ok("b".into()));
        for (text, words) in [
            ("[1]", "QMP input must be a JSON object"),
            ("5", "QMP input must be a JSON object"),
            ("{}", "QMP input lacks member 'execute'"),
            (r#"{"execute":5}"#, "QMP input member 'execute' must be a string"),
            (r#"{"execute":"a","exec-oob":"b"}"#, "QMP input member 'execute' clashes with 'exec-oob'"),
            (r#"{"execute":"a","foo":1}"#, "QMP input member 'foo' is unexpected"),
            (r#"{"execute":"a","arguments":5}"#, "QMP input member 'arguments' must be an object"),
        ] {
            assert_eq!(said(text), Err(words.to_owned()), "{text}");
        }
        for text in ["hello", r#"{"execute" "x"}"#, "{\"execute\":1e999}", "}"] {
            assert!(said(text).is_err_and(|e| e.starts_with("JSON parse error, ")), "{text}");
        }
        assert!(read(b"{\"execute\":\"\xff\xfe\"}").is_err_and(|e| e.0.text.contains("unicode")));
        assert_eq!(read(br#"{"execute":5,"id":[1]}"#).unwrap_err().1, Some(json!([1])));
    }
}
