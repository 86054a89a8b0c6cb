//! What is found in a stream, as it is found: a tree for people or one JSON document, neither of them kept in memory.

use std::io::{self, Write};

use serde_json::Value;

/// A fact about a node.
pub(crate) enum Fact {
    /// A number.
    Number(u64),
    /// An address or a flag word, shown in hexadecimal.
    Address(u64),
    /// A share, shown in percent.
    Share(f64),
    /// Anything else.
    Value(Value),
}

impl From<&str> for Fact {
    fn from(text: &str) -> Self {
        Fact::Value(text.into())
    }
}

impl Fact {
    fn json(&self) -> Value {
        match self {
            Fact::Number(n) | Fact::Address(n) => (*n).into(),
            Fact::Share(share) => ((share * 10_000.0).round() / 10_000.0).into(),
            Fact::Value(value) => value.clone(),
        }
    }

    fn text(&self) -> String {
        match self {
            Fact::Number(n) => n.to_string(),
            Fact::Address(n) => format!("{n:#x}"),
            Fact::Share(share) => format!("{:.1}%", share * 100.0),
            Fact::Value(Value::String(text)) => shown(text),
            Fact::Value(value) => value.to_string(),
        }
    }
}

/// Names of a stream end up on terminals: what these act on is shown, not sent.
pub(crate) fn shown(text: &str) -> String {
    let acts = |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if acts(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Facts by name.
pub(crate) type Facts<'a> = &'a [(&'a str, Fact)];

/// What stands at a place of the stream.
pub(crate) struct Node<'a> {
    /// Its first byte.
    pub(crate) at: u64,
    /// What it is.
    pub(crate) kind: &'a str,
    /// Its name, if it has one.
    pub(crate) name: Option<&'a str>,
    /// What is known of it when it begins.
    pub(crate) facts: Facts<'a>,
}

/// Writes nodes as a tree of lines or as JSON.
pub(crate) struct Printer<W> {
    out: W,
    json: bool,
    /// Of each open node, whether it has children so far.
    open: Vec<bool>,
}

/// In JSON a node's children are the array `parts`.
impl<W: Write> Printer<W> {
    /// Begins the document.
    pub(crate) fn new(mut out: W, json: bool, file: &str) -> io::Result<Self> {
        if json {
            write!(out, "{{\"file\":{},\"elements\":[", Value::from(file))?;
        }
        Ok(Self { out, json, open: vec![false] })
    }

    /// A node with children, which follow until [`close`](Self::close).
    pub(crate) fn begin(&mut self, node: &Node<'_>) -> io::Result<()> {
        self.node(node)?;
        if self.json {
            write!(self.out, ",\"parts\":[")?;
        }
        self.open.push(false);
        Ok(())
    }

    /// The last open node has no more children.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        if self.json {
            write!(self.out, "]}}")?;
        }
        self.open.pop();
        Ok(())
    }

    /// A node without children.
    pub(crate) fn leaf(&mut self, node: &Node<'_>) -> io::Result<()> {
        self.node(node)?;
        if self.json {
            write!(self.out, "}}")?;
        }
        Ok(())
    }

    fn node(&mut self, node: &Node<'_>) -> io::Result<()> {
        let more = self.open.last_mut().map(|more| std::mem::replace(more, true));
        if !self.json {
            write!(self.out, "{:08x} {}{}", node.at, "  ".repeat(self.open.len() - 1), node.kind)?;
            if let Some(name) = node.name {
                write!(self.out, " {}", shown(name))?;
            }
            for (name, fact) in node.facts {
                write!(self.out, "  {name} {}", fact.text())?;
            }
            return writeln!(self.out);
        }
        if more == Some(true) {
            write!(self.out, ",")?;
        }
        write!(self.out, "\n{{\"at\":{},\"kind\":{}", node.at, Value::from(node.kind))?;
        if let Some(name) = node.name {
            write!(self.out, ",\"name\":{}", Value::from(name))?;
        }
        for (name, fact) in node.facts {
            write!(self.out, ",{}:{}", Value::from(*name), fact.json())?;
        }
        Ok(())
    }

    /// Ends the document, whatever is open; `summary` is more keys for the JSON.
    pub(crate) fn end(&mut self, summary: Facts<'_>) -> io::Result<()> {
        while self.open.len() > 1 {
            self.close()?;
        }
        if self.json {
            write!(self.out, "\n]")?;
            for (name, fact) in summary {
                write!(self.out, ",\n{}:{}", Value::from(*name), fact.json())?;
            }
            writeln!(self.out, "}}")?;
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(json: bool) -> String {
        let mut out = Vec::new();
        let mut printer = Printer::new(&mut out, json, "a\"b").unwrap();
        fn node<'a>(at: u64, kind: &'a str, name: Option<&'a str>, facts: Facts<'a>) -> Node<'a> {
            Node { at, kind, name, facts }
        }
        printer.leaf(&node(0, "header", None, &[("version", Fact::Number(3))])).unwrap();
        printer.begin(&node(8, "full", Some("u\u{1b}rt"), &[("flags", Fact::Address(16))])).unwrap();
        printer.leaf(&node(9, "field", Some("x"), &[("value", "y\n".into())])).unwrap();
        printer.begin(&node(10, "field", Some("z"), &[("zero", Fact::Share(0.25))])).unwrap();
        printer.end(&[("ok", Fact::Value(false.into()))]).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_tree_shows_what_a_terminal_would_act_on() {
        let lines = [
            "00000000 header  version 3",
            "00000008 full u\\u{1b}rt  flags 0x10",
            "00000009   field x  value y\\n",
            "0000000a   field z  zero 25.0%",
        ];
        assert_eq!(print(false), lines.join("\n") + "\n");
    }

    #[test]
    fn json_is_json_wherever_it_ends() {
        let json: Value = serde_json::from_str(&print(true)).unwrap();
        assert_eq!((&json["file"], &json["ok"]), (&"a\"b".into(), &false.into()));
        assert_eq!(json["elements"][1]["parts"][0]["value"], "y\n");
        assert_eq!(json["elements"][1]["parts"][1]["zero"], 0.25);
    }
}
