//! One error type: an errno for C, a sentence for people, and the place it belongs to for programs.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::fmt;

/// Characters of a peer's text that are kept.
const TEXT_MAX: usize = 8192;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, where, and as which errno.
///
/// The structured parts travel to the peer and show up in both APIs; the text stands on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    errno: i32,
    text: String,
    place: Box<Place>,
}

/// Where an error belongs; every part is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// `source` or `destination`.
    pub side: Option<String>,
    /// Phase of the migration, such as `setup` or `complete`.
    pub phase: Option<String>,
    /// Section (device or RAM block) by name.
    pub section: Option<String>,
    /// Field within the section.
    pub field: Option<String>,
    /// What would have been right; of a difference: what the source has.
    pub expected: Option<String>,
    /// What was found; of a difference: what the destination has.
    pub got: Option<String>,
    /// The option that decides: whose time ran out, say.
    pub option: Option<String>,
    /// It is a difference between the two sides.
    pub compares: bool,
    /// Where in the stream, in bytes.
    pub byte: Option<u64>,
    /// The peer ended its connection in the middle of something: it may have said why. Does not travel.
    pub ended: bool,
}

impl Error {
    /// An error from a positive errno and a sentence.
    pub fn new(errno: i32, text: impl Into<String>) -> Self {
        debug_assert!(errno > 0, "errno values are positive here and negated once, at the C door");
        Self { errno, text: text.into(), place: Box::default() }
    }

    /// `EINVAL` with a sentence.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(libc::EINVAL, text)
    }

    /// `EIO`: the peer ended its connection in the middle of something.
    pub fn ended(text: impl Into<String>) -> Self {
        let mut error = Self::new(libc::EIO, text);
        error.place.ended = true;
        error
    }

    /// The calling thread's errno, as `what: strerror`.
    pub fn last_os(what: impl fmt::Display) -> Self {
        Self::from_io(what, &std::io::Error::last_os_error())
    }

    /// An I/O error, as `what: strerror`; one without an errno becomes `EIO`.
    pub fn from_io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Self::new(errno, format!("{what}: {}", strerror(errno)))
    }

    /// Memory that follows guest, peer or file could not be had.
    pub fn no_memory(what: impl fmt::Display, bytes: u64) -> Self {
        Self::new(libc::ENOMEM, format!("no memory for {what} ({bytes} bytes)"))
    }

    /// `ETIMEDOUT`: `what`, which ends in "for" or "within", the time, and the option that sets it.
    pub fn timeout(option: &str, limit: std::time::Duration, what: impl fmt::Display) -> Self {
        let text = format!("{what} {} seconds (option '{option}')", limit.as_secs_f32());
        Self::new(libc::ETIMEDOUT, text).by_option(option)
    }

    /// The positive errno.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// The structured part.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The sentence, without its place.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Puts `prefix: ` before the sentence.
    pub fn context(mut self, prefix: impl fmt::Display) -> Self {
        self.text = format!("{prefix}: {}", self.text);
        self
    }

    /// Puts `: hint` behind the sentence.
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.text = format!("{}: {hint}", self.text);
        self
    }

    /// Names the side unless one is named already: the innermost knows best.
    pub fn on_side(mut self, side: &str) -> Self {
        self.place.side.get_or_insert_with(|| side.to_owned());
        self
    }

    /// Names the phase unless one is named already.
    pub fn in_phase(mut self, phase: &str) -> Self {
        self.place.phase.get_or_insert_with(|| phase.to_owned());
        self
    }

    /// Names the section unless one is named already.
    pub fn in_section(mut self, section: impl Into<String>) -> Self {
        self.place.section.get_or_insert_with(|| section.into());
        self
    }

    /// Names the field unless one is named already.
    pub fn in_field(mut self, field: impl Into<String>) -> Self {
        self.place.field.get_or_insert_with(|| field.into());
        self
    }

    /// Names the option that decides.
    pub fn by_option(mut self, option: &str) -> Self {
        self.place.option = Some(option.to_owned());
        self
    }

    /// The sentence without side and phase, for a list whose head names them.
    pub fn item(&self) -> String {
        let mut place = self.place.clone();
        (place.side, place.phase) = (None, None);
        Self { errno: self.errno, text: self.text.clone(), place }.to_string()
    }

    /// Adds what was expected and what was found.
    pub fn expected_got(mut self, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        self.place.expected = Some(expected.to_string());
        self.place.got = Some(got.to_string());
        self
    }

    /// Says that the two sides differ, and in what.
    pub fn differs(mut self, source: impl fmt::Display, destination: impl fmt::Display) -> Self {
        self.place.compares = true;
        self.expected_got(source, destination)
    }

    /// Names the byte of the stream that the sentence speaks of, unless one is named already.
    pub fn at_byte(mut self, at: u64) -> Self {
        self.place.byte.get_or_insert(at);
        self
    }

    /// Says where the body began in which this happened, unless the error knows better where it was.
    pub fn in_body_at(self, at: u64) -> Self {
        match self.place.byte {
            Some(_) => self,
            None => self.context(format_args!("body at byte {at:#x}")).at_byte(at),
        }
    }

    /// The error as a JSON object with the keys side, phase, section, field, expected, got, option, byte, errno,
    /// text; `compares` is true if expected is what the source has, and got what the destination has.
    pub fn to_json(&self) -> serde_json::Value {
        let mut map = serde_json::Map::new();
        let parts = [
            ("side", &self.place.side),
            ("phase", &self.place.phase),
            ("section", &self.place.section),
            ("field", &self.place.field),
            ("expected", &self.place.expected),
            ("got", &self.place.got),
            ("option", &self.place.option),
        ];
        for (key, value) in parts {
            if let Some(value) = value {
                map.insert(key.to_owned(), printable(value).into());
            }
        }
        if self.place.compares {
            map.insert("compares".to_owned(), true.into());
        }
        if let Some(byte) = self.place.byte {
            map.insert("byte".to_owned(), byte.into());
        }
        map.insert("errno".to_owned(), self.errno.into());
        map.insert("text".to_owned(), printable(&self.text).into());
        map.into()
    }

    /// The same, cut to what a peer takes.
    pub fn to_json_for_peer(&self) -> serde_json::Value {
        const PART_MAX: usize = 1000;
        let cut = |text: &str, most: usize| text.chars().take(most).collect::<String>();
        let mut error = Self { errno: self.errno, text: cut(&self.text, TEXT_MAX / 2), place: self.place.clone() };
        let place = &mut error.place;
        for part in [
            &mut place.side,
            &mut place.phase,
            &mut place.section,
            &mut place.field,
            &mut place.expected,
            &mut place.got,
            &mut place.option,
        ] {
            *part = part.as_deref().map(|text| cut(text, PART_MAX));
        }
        error.to_json()
    }

    /// Reads what [`to_json`](Self::to_json) wrote; strings of a peer are cut to a limit.
    pub fn from_json(value: &serde_json::Value) -> Option<Self> {
        let get = |key: &str| {
            let text = value.get(key)?.as_str()?;
            Some(text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect::<String>())
        };
        let errno = value.get("errno").and_then(serde_json::Value::as_i64).unwrap_or(0);
        let errno = i32::try_from(errno).ok().filter(|n| (1..4096).contains(n)).unwrap_or(libc::EIO);
        Some(Self {
            errno,
            text: get("text")?,
            place: Box::new(Place {
                side: get("side"),
                phase: get("phase"),
                section: get("section"),
                field: get("field"),
                expected: get("expected"),
                got: get("got"),
                option: get("option"),
                compares: value.get("compares").is_some_and(|v| v == true),
                byte: value.get("byte").and_then(serde_json::Value::as_u64),
                ended: false,
            }),
        })
    }
}

/// Names of a peer end up in texts, which end up on terminals: control characters are shown, not sent.
fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let show = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(show).collect())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.sentence(&mut text)?;
        f.write_str(&printable(&text))
    }
}

impl Error {
    fn sentence(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        let place = &self.place;
        for part in [&place.side, &place.phase].into_iter().flatten() {
            write!(f, "{part}: ")?;
        }
        if let Some(section) = &place.section {
            write!(f, "section '{section}'")?;
            if let Some(field) = &place.field {
                write!(f, " field '{field}'")?;
            }
            write!(f, ": ")?;
        }
        f.write_str(&self.text)?;
        if let (Some(expected), Some(got)) = (&place.expected, &place.got) {
            match place.compares {
                true => write!(f, " (source: {expected}, destination: {got})")?,
                false => write!(f, " (expected {expected}, got {got})")?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// The text of an errno, without Rust's "(os error N)" tail.
pub fn strerror(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// The result of callback `callback` of `owner` (such as `device 'uart'`): its value, or its errno as an error.
pub fn returned(owner: &str, callback: &str, value: std::ffi::c_int) -> Result<std::ffi::c_int> {
    if value >= 0 {
        return Ok(value);
    }
    match value.checked_neg().filter(|errno| *errno < 4096) {
        Some(errno) => Err(Error::new(errno, format!("{callback} of {owner} failed: {}", strerror(errno)))),
        None => Err(Error::new(libc::EIO, format!("{callback} of {owner} failed with {value}, which is no errno"))),
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Keeps `error` as this thread's last message and returns its errno, negated.
pub fn set_last(error: &Error) -> i32 {
    let text: Vec<u8> = error.to_string().into_bytes().into_iter().filter(|b| *b != 0).collect();
    LAST.with(|last| *last.borrow_mut() = CString::new(text).unwrap_or_default());
    -error.errno()
}

/// This thread's last message; empty if nothing failed yet. Valid until the thread's next failure.
pub fn last_message() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// This thread's last message as Rust text.
pub fn last_text() -> String {
    LAST.with(|last| CStr::to_string_lossy(&last.borrow()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_names_its_place_once() {
        let error = Error::invalid("bad value").in_field("divisor").in_section("uart").in_section("outer");
        let error = error.expected_got(1, 2).in_phase("complete").on_side("destination");
        assert_eq!(
            error.to_string(),
            "destination: complete: section 'uart' field 'divisor': bad value (expected 1, got 2)"
        );
    }

    #[test]
    fn json_round_trip_keeps_everything() {
        let error = Error::new(libc::ENOENT, "no such block").in_section("ram").in_field("low").at_byte(77);
        let error = error.in_phase("load").on_side("destination").differs("a", "b").by_option("peer");
        assert_eq!(Error::from_json(&error.to_json()), Some(error));
    }

    #[test]
    fn a_body_is_named_only_by_errors_that_name_no_byte() {
        assert_eq!(Error::invalid("bad").in_body_at(16).to_string(), "body at byte 0x10: bad");
        assert_eq!(Error::invalid("byte 0x20: bad").at_byte(32).in_body_at(16).to_string(), "byte 0x20: bad");
        let says = Error::invalid("the VMM speaks of byte 0x7").in_body_at(16);
        assert_eq!(
            (says.to_string().as_str(), says.place().byte),
            ("body at byte 0x10: the VMM speaks of byte 0x7", Some(16))
        );
    }

    #[test]
    fn names_of_a_peer_cannot_steer_a_terminal() {
        let error = Error::invalid("no block '\u{1b}[2J'").in_section("a\nb").expected_got("\u{7}", "é");
        let text = r"section 'a\nb': no block '\u{1b}[2J' (expected \u{7}, got é)";
        assert_eq!((error.to_string().as_str(), error.to_json()["section"].as_str()), (text, Some(r"a\nb")));
    }

    #[test]
    fn json_of_a_peer_is_not_trusted() {
        let hostile = serde_json::json!({"errno": -7, "text": "a\u{1b}[2Jb\n".repeat(4000)});
        let error = Error::from_json(&hostile).unwrap();
        assert_eq!(error.errno(), libc::EIO);
        assert!(error.text().len() <= TEXT_MAX && !error.text().contains('\u{1b}'));
    }
}
