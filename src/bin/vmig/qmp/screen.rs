//! What is shown, and where: a bar at the bottom of a terminal, or line by line.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;

use crate::printer::shown;

/// Back to the first column, and the line emptied.
const ERASE: &str = "\r\u{1b}[K";
/// Around what is cut off at the right edge instead of going on in the next line.
const CUT: (&str, &str) = ("\u{1b}[?7l", "\u{1b}[?7h");
const PROMPT: &str = "vmig> ";
const DAY: u64 = 86_400;

/// The standard output.
pub(super) struct Screen {
    terminal: bool,
    /// Somebody types here.
    prompts: bool,
    /// Something stands in the last line that is not to stay: the bar, or the prompt.
    open: bool,
}

impl Screen {
    pub(super) fn new(typing: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        Self { terminal, prompts: terminal && typing && io::stdin().is_terminal(), open: false }
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.terminal
    }

    pub(super) fn has_prompt(&self) -> bool {
        self.prompts
    }

    /// What the user typed ended the line.
    pub(super) fn entered(&mut self) {
        if self.prompts {
            self.open = false;
        }
    }

    fn write(&mut self, text: &str) -> Result<(), String> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| format!("the standard output: {e}"))
    }

    /// Lines that stay.
    pub(super) fn say(&mut self, text: &str) -> Result<(), String> {
        let erase = if std::mem::take(&mut self.open) { ERASE } else { "" };
        let lines: String = text.lines().map(|line| shown(line) + "\n").collect();
        self.write(&format!("{erase}{lines}"))
    }

    /// The last line of a terminal, until something else is said.
    pub(super) fn bar(&mut self, line: &str) -> Result<(), String> {
        self.open = true;
        self.write(&format!("{ERASE}{}{}{}", CUT.0, shown(line), CUT.1))
    }

    /// Asks for a line.
    pub(super) fn prompt(&mut self) -> Result<(), String> {
        if !self.prompts || self.open {
            return Ok(());
        }
        self.open = true;
        self.write(PROMPT)
    }

    /// The bar is not needed any more.
    pub(super) fn clear(&mut self) -> Result<(), String> {
        match std::mem::take(&mut self.open) {
            true => self.write(ERASE),
            false => Ok(()),
        }
    }
}

/// An event as a line: when, what, and its data.
pub(super) fn event(event: &Value) -> String {
    let day = event["timestamp"]["seconds"].as_u64().unwrap_or(0) % DAY;
    let mut line = format!("{:02}:{:02}:{:02} UTC  ", day / 3600, day / 60 % 60, day % 60);
    line.push_str(event["event"].as_str().unwrap_or("?"));
    for (name, value) in event["data"].as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        line.push_str(&format!("  {name}={value}"));
    }
    shown(&line)
}

/// A value as JSON that can be read.
pub(super) fn json(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string())
}
