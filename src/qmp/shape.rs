//! What JSON a command takes and returns: checked by QEMU's rules and in its words, and told to clients that ask.

use serde_json::{Map, Value};

/// Characters of a client's text that an error repeats.
const SHOWN_MAX: usize = 100;

/// The shape of a JSON value.
#[derive(Clone, Debug)]
pub enum Shape {
    /// Anything.
    Any,
    /// true or false.
    Bool,
    /// A text.
    Str,
    /// A text, or null for none.
    StrOrNull,
    /// A whole number that fits into 64 bits with its sign.
    Int,
    /// A whole number from 0 to 255.
    U8,
    /// A whole number from 0 to 2^64 - 1.
    U64,
    /// Any number.
    Number,
    /// One of a few words; the second list is taken, too, but not told to clients that ask.
    Enum(Vec<&'static str>, Vec<&'static str>),
    /// A list of values of one shape.
    List(Box<Shape>),
    /// An object with these members and no others.
    Object(Vec<Field>),
    /// An object that has further members by the value of one.
    Union(Union),
}

/// A member of an object.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub shape: Shape,
    /// It may be missing.
    pub optional: bool,
    /// It is taken, but not told to clients that ask.
    pub hidden: bool,
}

/// An object whose member `tag` says which further members it has.
#[derive(Clone, Debug)]
pub struct Union {
    /// The member that decides; a word.
    pub tag: &'static str,
    /// For each of its words, an object or another union.
    pub cases: Vec<(&'static str, Shape)>,
}

/// A member that must be there.
pub fn must(name: &'static str, shape: Shape) -> Field {
    Field { name, shape, optional: false, hidden: false }
}

/// A member that may be missing.
pub fn may(name: &'static str, shape: Shape) -> Field {
    Field { name, shape, optional: true, hidden: false }
}

/// The object without members.
pub fn nothing() -> Shape {
    Shape::Object(Vec::new())
}

/// One of these words.
pub fn words(words: impl IntoIterator<Item = &'static str>) -> Shape {
    Shape::Enum(words.into_iter().collect(), Vec::new())
}

/// A list of these.
pub fn list(shape: Shape) -> Shape {
    Shape::List(Box::new(shape))
}

impl Shape {
    /// Whether the arguments of a command have this shape, or what is wrong with them.
    pub fn check_arguments(&self, arguments: &Map<String, Value>) -> Result<(), String> {
        self.check_members(arguments, "", &[])
    }

    fn check(&self, value: &Value, path: &str) -> Result<(), String> {
        let wrong = |expected: &str| Err(format!("Invalid parameter type for '{path}', expected: {expected}"));
        match self {
            Shape::Any => Ok(()),
            Shape::Bool if !value.is_boolean() => wrong("boolean"),
            Shape::Str if !value.is_string() => wrong("string"),
            Shape::StrOrNull if !value.is_string() && !value.is_null() => wrong("StrOrNull"),
            Shape::Int if !value.is_i64() => wrong("integer"),
            Shape::U64 if !value.is_u64() => Err(format!("Parameter '{path}' expects uint64")),
            Shape::Number if !value.is_number() => wrong("number"),
            Shape::Bool | Shape::Str | Shape::StrOrNull | Shape::Int | Shape::U64 | Shape::Number => Ok(()),
            Shape::U8 => match value.as_i64() {
                None => Err(format!("Parameter '{path}' expects uint64")),
                Some(0..=255) => Ok(()),
                Some(_) => Err(format!("Parameter '{path}' expects uint8_t")),
            },
            Shape::Enum(words, more) => match value.as_str() {
                None => wrong("string"),
                Some(word) => one_of(path, words.iter().chain(more).copied(), word),
            },
            Shape::List(element) => match value.as_array() {
                None => wrong("array"),
                Some(values) => {
                    values.iter().enumerate().try_for_each(|(i, v)| element.check(v, &format!("{path}[{i}]")))
                }
            },
            Shape::Object(_) | Shape::Union(_) => match value.as_object() {
                None => wrong("object"),
                Some(members) => self.check_members(members, path, &[]),
            },
        }
    }

    /// `tags`: members that unions around this one have looked at.
    fn check_members(&self, members: &Map<String, Value>, path: &str, tags: &[&str]) -> Result<(), String> {
        let below = |name: &str| if path.is_empty() { shown(name) } else { format!("{path}.{}", shown(name)) };
        match self {
            Shape::Object(fields) => {
                for field in fields {
                    match members.get(field.name) {
                        Some(value) => field.shape.check(value, &below(field.name))?,
                        None if field.optional => (),
                        None => return Err(format!("Parameter '{}' is missing", below(field.name))),
                    }
                }
                let known = |name: &str| fields.iter().any(|f| f.name == name) || tags.contains(&name);
                match members.keys().find(|name| !known(name)) {
                    None => Ok(()),
                    Some(name) => Err(format!("Parameter '{}' is unexpected", below(name))),
                }
            }
            Shape::Union(union) => {
                let path_of_tag = below(union.tag);
                let Some(value) = members.get(union.tag) else {
                    return Err(format!("Parameter '{path_of_tag}' is missing"));
                };
                let words = words(union.cases.iter().map(|(word, _)| *word));
                words.check(value, &path_of_tag)?;
                let case = union.cases.iter().find(|(word, _)| value == word);
                let tags = [tags, &[union.tag]].concat();
                case.map_or(Ok(()), |(_, shape)| shape.check_members(members, path, &tags))
            }
            // Commands that take whatever there is.
            _ => Ok(()),
        }
    }
}

/// Refuses a word that is not among those known.
pub fn one_of<'a>(path: &str, mut words: impl Iterator<Item = &'a str>, word: &str) -> Result<(), String> {
    match words.any(|known| known == word) {
        true => Ok(()),
        false => {
            let name = path.rsplit('.').next().unwrap_or(path);
            Err(format!("Parameter '{name}' does not accept value '{}'", shown(word)))
        }
    }
}

/// A client's text as an error repeats it: printable, and not without end.
pub fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_MAX).is_some() {
        out.push_str("...");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(shape: &Shape, arguments: Value) -> String {
        shape.check_arguments(arguments.as_object().unwrap()).err().unwrap_or_default()
    }

    #[test]
    fn arguments_are_refused_in_qemus_words() {
        let address = Shape::Union(Union {
            tag: "transport",
            cases: vec![
                (
                    "socket",
                    Shape::Union(Union {
                        tag: "type",
                        cases: vec![("unix", Shape::Object(vec![must("path", Shape::Str)]))],
                    }),
                ),
                ("file", Shape::Object(vec![must("filename", Shape::Str), must("offset", Shape::U64)])),
            ],
        });
        let shape = Shape::Object(vec![
            may("uri", Shape::Str),
            may("list", list(Shape::Object(vec![must("state", Shape::Bool), may("addr", address)]))),
            may("channels", Shape::U8),
            may("kind", words(["a", "b"])),
            may("creds", Shape::StrOrNull),
        ]);
        let good = json!({"uri": "x", "list": [{"state": true, "addr": {"transport": "socket", "type": "unix",
            "path": "p"}}, {"state": false, "addr": {"transport": "file", "filename": "f", "offset": 0}}],
            "channels": 255, "kind": "b", "creds": null});
        assert_eq!(said(&shape, good), "");
        for (arguments, words) in [
            (json!({"uri": 5}), "Invalid parameter type for 'uri', expected: string"),
            (json!({"uri": null}), "Invalid parameter type for 'uri', expected: string"),
            (json!({"list": 5}), "Invalid parameter type for 'list', expected: array"),
            (json!({"list": [5]}), "Invalid parameter type for 'list[0]', expected: object"),
            (json!({"list": [{"state": true}, {}]}), "Parameter 'list[1].state' is missing"),
            (json!({"list": [{"state": 1}]}), "Invalid parameter type for 'list[0].state', expected: boolean"),
            (json!({"list": [{"state": true, "x": 1}]}), "Parameter 'list[0].x' is unexpected"),
            (json!({"list": [{"state": true, "addr": {}}]}), "Parameter 'list[0].addr.transport' is missing"),
            (
                json!({"list": [{"state": true, "addr": {"transport": "smoke"}}]}),
                "Parameter 'transport' does not accept value 'smoke'",
            ),
            (
                json!({"list": [{"state": true, "addr": {"transport": "socket"}}]}),
                "Parameter 'list[0].addr.type' is missing",
            ),
            (
                json!({"list": [{"state": true, "addr": {"transport": "socket", "type": "unix"}}]}),
                "Parameter 'list[0].addr.path' is missing",
            ),
            (json!({"channels": 256}), "Parameter 'channels' expects uint8_t"),
            (json!({"channels": -1}), "Parameter 'channels' expects uint8_t"),
            (json!({"channels": 1e30}), "Parameter 'channels' expects uint64"),
            (json!({"channels": "x"}), "Parameter 'channels' expects uint64"),
            (json!({"kind": "c"}), "Parameter 'kind' does not accept value 'c'"),
            (json!({"kind": 3}), "Invalid parameter type for 'kind', expected: string"),
            (json!({"creds": 5}), "Invalid parameter type for 'creds', expected: StrOrNull"),
            (json!({"foo": 1}), "Parameter 'foo' is unexpected"),
        ] {
            assert_eq!(said(&shape, arguments.clone()), words, "{arguments}");
        }
    }

    #[test]
    fn long_and_odd_texts_are_not_repeated_whole() {
        let words = said(&nothing(), json!({"é\n".repeat(1000): 1}));
        assert!(words.len() < 400 && words.contains("\\n") && words.ends_with("...' is unexpected"), "{words}");
    }
}
