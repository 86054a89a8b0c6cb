//! Cuts what a client sends into JSON texts, one byte after the other, whatever it sends.
//!
//! A text ends where its brackets close, so several may stand on a line and one may take many lines. What is wrong is
//! told once and skipped up to the end of its line.

/// Bytes of one text.
pub const BYTES_MAX: usize = 256 << 10;
/// Brackets within brackets.
pub const DEPTH_MAX: usize = 64;

/// What was cut off.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A whole text, which may still be nonsense.
    Text(Vec<u8>),
    /// Why there is none.
    Wrong(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between two texts.
    Between,
    /// Inside brackets.
    Inside,
    /// Inside a string inside brackets; the last byte was a backslash that escapes.
    String { escaped: bool },
    /// Something without brackets, up to the end of its line.
    Word,
    /// The rest of a line that is wrong.
    Skipping,
}

/// The state between two bytes.
#[derive(Debug)]
pub struct Framer {
    state: State,
    depth: usize,
    text: Vec<u8>,
}

impl Default for Framer {
    fn default() -> Self {
        Self { state: State::Between, depth: 0, text: Vec::new() }
    }
}

impl Framer {
    /// Takes a byte; gives what it completes.
    pub fn push(&mut self, byte: u8) -> Option<Frame> {
        match (self.state, byte) {
            (State::Skipping, b'\n') => self.state = State::Between,
            // 0xff is what clients send to say "forget what I began".
            (State::Skipping, _) | (State::Between, b' ' | b'\t' | b'\r' | b'\n' | 0xff) => (),
            (State::Word, b'\n') => return self.done(),
            (State::String { .. }, b'\n') => {
                self.reset(State::Between);
                return Some(Frame::Wrong("JSON parse error, a line ends inside of a string"));
            }
            _ => return self.keep(byte),
        }
        None
    }

    /// Bytes kept.
    pub fn held(&self) -> usize {
        self.text.len()
    }

    fn keep(&mut self, byte: u8) -> Option<Frame> {
        if self.text.len() == BYTES_MAX {
            self.reset(State::Skipping);
            return Some(Frame::Wrong("JSON token size limit exceeded"));
        }
        self.text.push(byte);
        self.state = match (self.state, byte) {
            (State::String { escaped: false }, b'"') => State::Inside,
            (State::String { escaped }, b'\\') => State::String { escaped: !escaped },
            (State::String { .. }, _) => State::String { escaped: false },
            (State::Inside, b'"') => State::String { escaped: false },
            (State::Between | State::Inside, b'{' | b'[') => {
                self.depth += 1;
                if self.depth > DEPTH_MAX {
                    self.reset(State::Skipping);
                    return Some(Frame::Wrong("JSON nesting depth limit exceeded"));
                }
                State::Inside
            }
            (State::Inside, b'}' | b']') => {
                self.depth -= 1;
                if self.depth == 0 {
                    return self.done();
                }
                State::Inside
            }
            (State::Between, _) => State::Word,
            (state, _) => state,
        };
        None
    }

    fn done(&mut self) -> Option<Frame> {
        let text = std::mem::take(&mut self.text);
        self.reset(State::Between);
        Some(Frame::Text(text))
    }

    fn reset(&mut self, state: State) {
        // Not cleared but dropped: a client that was long once need not be so again.
        (self.state, self.depth, self.text) = (state, 0, Vec::new());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(bytes: &[u8]) -> Vec<Result<String, &'static str>> {
        let mut framer = Framer::default();
        let mut found = Vec::new();
        for byte in bytes {
            found.extend(framer.push(*byte));
            assert!(framer.held() <= BYTES_MAX);
        }
        let words = |frame| match frame {
            Frame::Text(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
            Frame::Wrong(why) => Err(why),
        };
        found.into_iter().map(words).collect()
    }

    #[test]
    fn texts_end_where_their_brackets_do() {
        let text = |text: &str| Ok(text.to_owned());
        assert_eq!(cut(b"{}{\"a\":\n[1]\n} [2]\r\n\xff{"), [text("{}"), text("{\"a\":\n[1]\n}"), text("[2]")]);
        assert_eq!(cut(br#"{"a":"}\"{\\"}{}"#), [text(r#"{"a":"}\"{\\"}"#), text("{}")]);
        assert_eq!(cut(b"hello\n5\n{}"), [text("hello"), text("5"), text("{}")]);
        assert_eq!(cut(b"}\n]{\n{}"), [text("}"), text("]{"), text("{}")]);
    }

    #[test]
    fn what_is_wrong_is_told_once_and_the_next_line_counts() {
        let deep = "[".repeat(100_000) + "\n{}";
        assert_eq!(cut(deep.as_bytes()), [Err("JSON nesting depth limit exceeded"), Ok("{}".to_owned())]);
        let just = "[".repeat(DEPTH_MAX) + &"]".repeat(DEPTH_MAX);
        assert_eq!(cut(just.as_bytes()), [Ok(just.clone())]);
        for long in ["{\"a\":\"", "{", "x"] {
            let long = format!("{long}{}\n{{}}", "y".repeat(3 * BYTES_MAX));
            assert_eq!(cut(long.as_bytes()), [Err("JSON token size limit exceeded"), Ok("{}".to_owned())]);
        }
        assert_eq!(
            cut(b"{\"a\nb\"}\n{}"),
            [Err("JSON parse error, a line ends inside of a string"), Ok("b\"}".into()), Ok("{}".into())]
        );
    }
}
