//! What a user types, as a request: `command key=value a.b=value`, or JSON as it is.

use serde_json::{Map, Value};

/// Dots in a key at most: deeper than anything QMP has.
const DEPTH_MAX: usize = 16;

/// Splits a line at its blanks; not inside quotes and brackets, so that JSON may have some.
pub(super) fn split(line: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let (mut quote, mut escaped, mut depth) = (None, false, 0_usize);
    for c in line.trim().chars() {
        match (c, quote) {
            (_, Some(_)) if escaped => escaped = false,
            ('\\', Some('"')) => escaped = true,
            (c, Some(open)) if c == open => quote = None,
            (_, Some(_)) => (),
            // In JSON, or where a value begins; elsewhere it is a letter, as in a path.
            ('"', None) if depth > 0 || word.is_empty() || word.ends_with('=') => quote = Some(c),
            ('\'', None) if depth == 0 && (word.is_empty() || word.ends_with('=')) => quote = Some(c),
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth = depth.saturating_sub(1),
            (c, None) if c.is_whitespace() && depth == 0 => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            _ => (),
        }
        word.push(c);
    }
    match (quote, depth) {
        (Some(quote), _) => Err(format!("the line ends inside of {quote}")),
        (None, 1..) => Err("the line ends inside of brackets".to_owned()),
        (None, 0) => {
            if !word.is_empty() {
                words.push(word);
            }
            Ok(words)
        }
    }
}

/// The request that a command and its arguments are.
pub(super) fn request(words: &[String]) -> Result<Value, String> {
    let Some((name, arguments)) = words.split_first() else { return Err("a command is missing".to_owned()) };
    if name.starts_with('{') {
        let text = words.join(" ");
        return match serde_json::from_str(&text) {
            Ok(request @ Value::Object(_)) => Ok(request),
            Ok(_) => Err("a request is a JSON object".to_owned()),
            Err(error) => Err(format!("not JSON: {error}")),
        };
    }
    let mut members = Map::new();
    for argument in arguments {
        let Some((key, text)) = argument.split_once('=') else {
            return Err(format!("'{argument}' is not KEY=VALUE"));
        };
        put(&mut members, key, value(text))?;
    }
    let mut request = Map::from_iter([("execute".to_owned(), Value::from(name.as_str()))]);
    if !members.is_empty() {
        request.insert("arguments".to_owned(), members.into());
    }
    Ok(request.into())
}

/// JSON if it is, else a text. Quotes make a text of what would be a number.
fn value(text: &str) -> Value {
    let quoted = text.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\''));
    match quoted {
        Some(text) => text.into(),
        None => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
    }
}

/// `a.b` is the member `b` of the object `a`.
fn put(members: &mut Map<String, Value>, key: &str, value: Value) -> Result<(), String> {
    let parts: Vec<&str> = key.split('.').collect();
    if parts.len() > DEPTH_MAX || parts.iter().any(|part| part.is_empty()) {
        return Err(format!("'{key}' is no key: names with dots between, at most {DEPTH_MAX}"));
    }
    let (last, above) = (parts[parts.len() - 1], &parts[..parts.len() - 1]);
    let mut at = members;
    for part in above {
        let below = at.entry((*part).to_owned()).or_insert_with(|| Map::new().into());
        at = below.as_object_mut().ok_or_else(|| format!("'{part}' in '{key}' has a value already"))?;
    }
    match at.insert(last.to_owned(), value) {
        None => Ok(()),
        Some(_) => Err(format!("'{key}' is given twice")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(line: &str) -> Result<Value, String> {
        request(&split(line)?)
    }

    #[test]
    fn words_become_requests() {
        let arguments = |line: &str| read(line).map(|mut request| request["arguments"].take());
        assert_eq!(read(" query-status "), Ok(json!({"execute": "query-status"})));
        assert_eq!(
            arguments("migrate uri=tcp:[::1]:4444 resume=true"),
            Ok(json!({"uri": "tcp:[::1]:4444", "resume": true}))
        );
        assert_eq!(
            arguments("x a.b.c=1 a.b.d=-2.5 a.e=null"),
            Ok(json!({"a": {"b": {"c": 1, "d": -2.5}, "e": null}}))
        );
        assert_eq!(
            arguments(r#"x a="5" b='5' c=5 d=it's e="#),
            Ok(json!({"a": "5", "b": "5", "c": 5, "d": "it's", "e": ""}))
        );
        assert_eq!(
            arguments(r#"x list=[{"a b": "] }"}, 2] text="a \" b" more='x y'"#),
            Ok(json!({"list": [{"a b": "] }"}, 2], "text": "a \" b", "more": "x y"}))
        );
        let raw = r#"{"execute": "a",  "id": [1, "x  y"]}"#;
        assert_eq!(read(raw), Ok(json!({"execute": "a", "id": [1, "x  y"]})));
    }

    #[test]
    fn what_is_none_is_refused() {
        for (line, word) in [
            ("", "missing"),
            ("x y", "not KEY=VALUE"),
            ("x a=1 a=2", "twice"),
            ("x a=1 a.b=2", "value already"),
            ("x a..b=2", "no key"),
            ("x =2", "no key"),
            ("x a=\"b", "inside of \""),
            ("x a=[1", "inside of brackets"),
            ("{\"a\":}", "not JSON"),
        ] {
            let said = read(line).unwrap_err();
            assert!(said.contains(word), "{line}: {said}");
        }
        assert!(read(&format!("x {}a=1", "a.".repeat(100))).unwrap_err().contains("at most 16"));
    }
}
