//! `help`: what a server says of its commands, as lines to read.

use std::fmt::Write;

use serde_json::Value;

/// Objects within objects that are shown.
const DEPTH_MAX: usize = 6;
/// Words of an enumeration that are shown.
const WORDS_MAX: usize = 40;

/// The names that `query-commands` gave, and our own.
pub(super) fn names(commands: &Value) -> String {
    let mut names: Vec<&str> = commands.as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
    names.sort_unstable();
    let mut out =
        String::from("Commands of the server (help COMMAND says more; KEY=VALUE, A.B=VALUE, or JSON as it is):\n");
    for name in names {
        let _ = writeln!(out, "  {name}");
    }
    out + "Of this shell: help [COMMAND], wait (follows a migration to its end), exit\n"
}

/// What `query-qmp-schema` says of one command; none: there is no such command.
pub(super) fn command(schema: &Value, name: &str) -> Option<String> {
    let schema = Schema(schema.as_array()?);
    let command = schema.0.iter().find(|entity| entity["name"] == name && entity["meta-type"] == "command")?;
    let mut out = format!("{name}\n");
    if command["allow-oob"] == true {
        out.push_str("  may be sent out of band: {\"exec-oob\": ...}\n");
    }
    if command["features"].as_array().is_some_and(|list| list.iter().any(|f| f == "deprecated")) {
        out.push_str("  deprecated\n");
    }
    schema.members(&mut out, command["arg-type"].as_str().unwrap_or(""), "", 1);
    let gives = command["ret-type"].as_str().unwrap_or("");
    let _ = writeln!(out, "  gives {}", schema.kind(gives));
    let inside = schema.element(gives);
    schema.members(&mut out, inside, "", 2);
    Some(out)
}

struct Schema<'a>(&'a [Value]);

impl<'a> Schema<'a> {
    fn find(&self, name: &str) -> Option<&'a Value> {
        self.0.iter().find(|entity| entity["name"] == name && entity["meta-type"] != "command")
    }

    /// What an array holds; the type itself if it is none.
    fn element<'b>(&self, name: &'b str) -> &'b str
    where
        'a: 'b,
    {
        match self.find(name) {
            Some(entity) if entity["meta-type"] == "array" => entity["element-type"].as_str().unwrap_or(name),
            _ => name,
        }
    }

    /// A type in a word or a few.
    fn kind(&self, name: &str) -> String {
        let Some(entity) = self.find(name) else { return "?".to_owned() };
        let list = |key: &str| entity[key].as_array().into_iter().flatten();
        match entity["meta-type"].as_str().unwrap_or_default() {
            "builtin" => entity["json-type"].as_str().unwrap_or("?").to_owned(),
            "enum" => {
                let words: Vec<&str> = list("members").filter_map(|m| m["name"].as_str()).collect();
                let more = if words.len() > WORDS_MAX { "|..." } else { "" };
                words[..words.len().min(WORDS_MAX)].join("|") + more
            }
            "array" => {
                format!("[{}]", entity["element-type"].as_str().map_or_else(String::new, |name| self.flat(name)))
            }
            "alternate" => {
                let kinds: Vec<String> =
                    list("members").filter_map(|m| m["type"].as_str()).map(|n| self.flat(n)).collect();
                kinds.join(" or ")
            }
            "object" if list("members").next().is_none() && list("variants").next().is_none() => "{}".to_owned(),
            _ => "object".to_owned(),
        }
    }

    /// The same, without a look into arrays of arrays.
    fn flat(&self, name: &str) -> String {
        match self.find(name).map(|entity| entity["meta-type"].as_str().unwrap_or_default()) {
            Some("array") => "list".to_owned(),
            Some("alternate") => "value".to_owned(),
            _ => self.kind(name),
        }
    }

    /// The members of an object, one to a line, and those of what they hold.
    fn members(&self, out: &mut String, name: &str, path: &str, depth: usize) {
        let Some(entity) = self.find(name).filter(|entity| entity["meta-type"] == "object") else { return };
        for member in entity["members"].as_array().into_iter().flatten() {
            let (name, kind) = (member["name"].as_str().unwrap_or("?"), member["type"].as_str().unwrap_or(""));
            let optional = if member.get("default").is_some() { "  (optional)" } else { "" };
            let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
            let _ = writeln!(out, "{}{path}={}{optional}", "  ".repeat(depth), self.kind(kind));
            if depth < DEPTH_MAX {
                self.members(out, self.element(kind), &path, depth + 1);
            }
        }
        for variant in entity["variants"].as_array().into_iter().flatten() {
            let (case, kind) = (variant["case"].as_str().unwrap_or("?"), variant["type"].as_str().unwrap_or(""));
            let _ = writeln!(out, "{}with {}={case}:", "  ".repeat(depth), entity["tag"].as_str().unwrap_or("?"));
            if depth < DEPTH_MAX {
                self.members(out, kind, path, depth + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_schema_that_turns_in_circles_has_an_end() {
        let schema = json!([
            {"name": "c", "meta-type": "command", "arg-type": "o", "ret-type": "none", "features": ["deprecated"]},
            {"name": "o", "meta-type": "object", "members": [
                {"name": "again", "type": "l", "default": null}, {"name": "w", "type": "e"}]},
            {"name": "l", "meta-type": "array", "element-type": "o"},
            {"name": "e", "meta-type": "enum", "members": [{"name": "x"}, {"name": "y"}]},
        ]);
        let said = command(&schema, "c").unwrap();
        assert!(
            said.starts_with("c\n  deprecated\n  again=[object]  (optional)\n    again.again=[object]"),
            "{said}"
        );
        assert!(said.contains("\n  w=x|y\n") && said.contains("\n  gives ?\n"), "{said}");
        assert!(said.lines().count() < 20 && command(&schema, "o").is_none());
    }
}
