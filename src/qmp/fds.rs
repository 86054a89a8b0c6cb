//! Descriptors that clients hand over: by name for `fd:NAME`, and in numbered sets.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::request::Refusal;
use super::shape::{Shape, list, may, must, shown};
use super::table::{Call, Outcome, done};
use crate::error::Error;
use crate::sys::io;
use crate::thread::lock;
use crate::transport::file::KeepsFdSets;

/// Descriptors kept for all clients together.
const FDS_MAX: usize = 128;
/// Bytes of a name and of an opaque text.
const WORDS_MAX: usize = 256;

/// What was handed over and not used yet.
#[derive(Debug, Default)]
pub struct Fds {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    named: BTreeMap<String, Arc<OwnedFd>>,
    sets: BTreeMap<u64, Vec<Member>>,
}

#[derive(Debug)]
struct Member {
    fd: OwnedFd,
    opaque: Option<String>,
}

impl Kept {
    fn check_room(&self) -> Result<(), Refusal> {
        match self.named.len() + self.sets.values().map(Vec::len).sum::<usize>() < FDS_MAX {
            true => Ok(()),
            false => Err(Refusal::new(format!(
                "{FDS_MAX} file descriptors are kept already: close some with closefd or remove-fd"
            ))),
        }
    }
}

impl Fds {
    /// Calls `f` with the number of a named descriptor, which is used up if that succeeds.
    pub fn consume<T>(&self, name: &str, f: impl FnOnce(i32) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let found = lock(&self.kept).named.get(name).cloned();
        let Some(fd) = found else {
            let text = format!("File descriptor named '{}' has not been found", shown(name));
            return Err(Refusal::new(text));
        };
        let done = f(fd.as_raw_fd())?;
        let mut kept = lock(&self.kept);
        if kept.named.get(name).is_some_and(|now| Arc::ptr_eq(now, &fd)) {
            kept.named.remove(name);
        }
        Ok(done)
    }
}

impl KeepsFdSets for Fds {
    fn open(&self, set: u64, writing: bool) -> Result<OwnedFd, Error> {
        let kept = lock(&self.kept);
        let Some(members) = kept.sets.get(&set) else {
            return Err(Error::new(libc::ENOENT, format!("there is no fd set {set}: add-fd makes one")));
        };
        let Some(member) = members.iter().find(|member| is_open_for(&member.fd, writing)) else {
            let way = if writing { "writing" } else { "reading" };
            return Err(Error::new(libc::EBADF, format!("no descriptor of fd set {set} is open for {way}")));
        };
        member.fd.try_clone().map_err(|e| Error::from_io(format_args!("fd set {set}"), &e))
    }
}

fn is_open_for(fd: &OwnedFd, writing: bool) -> bool {
    io::access_of(fd.as_fd()).is_ok_and(|(reads, writes)| if writing { writes } else { reads })
}

/// Whether a command is one that a descriptor comes with.
pub fn wants_fd(name: &str) -> bool {
    matches!(name, "getfd" | "add-fd")
}

fn check_words(name: &str, text: &str) -> Result<(), Refusal> {
    match text.len() <= WORDS_MAX {
        true => Ok(()),
        false => Err(Refusal::new(format!("Parameter '{name}' has at most {WORDS_MAX} bytes"))),
    }
}

fn supplied(call: &mut Call<'_>) -> Result<OwnedFd, Refusal> {
    call.fd.take().ok_or_else(|| Refusal::new("No file descriptor supplied via SCM_RIGHTS"))
}

/// What `getfd` and `closefd` take.
pub fn takes_name() -> Shape {
    Shape::Object(vec![must("fdname", Shape::Str)])
}

/// `getfd`: keeps the descriptor that came along; one of that name is closed.
pub fn get(call: &mut Call<'_>) -> Outcome {
    let fd = supplied(call)?;
    let name = call.text("fdname").unwrap_or_default();
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(Refusal::new("Parameter 'fdname' expects a name not starting with a digit"));
    }
    check_words("fdname", name)?;
    let mut kept = lock(&call.face.fds.kept);
    if !kept.named.contains_key(name) {
        kept.check_room()?;
    }
    kept.named.insert(name.to_owned(), Arc::new(fd));
    done()
}

/// `closefd`.
pub fn close(call: &mut Call<'_>) -> Outcome {
    let name = call.text("fdname").unwrap_or_default();
    match lock(&call.face.fds.kept).named.remove(name) {
        Some(_) => done(),
        None => Err(Refusal::new(format!("File descriptor named '{}' not found", shown(name)))),
    }
}

/// What `add-fd` takes.
pub fn takes_add() -> Shape {
    Shape::Object(vec![may("fdset-id", Shape::Int), may("opaque", Shape::Str)])
}

/// What `add-fd` gives.
pub fn gives_add() -> Shape {
    Shape::Object(vec![must("fdset-id", Shape::Int), must("fd", Shape::Int)])
}

/// `add-fd`: keeps the descriptor that came along in a set, which `file:/dev/fdset/SET` understands, and tells its number,
/// which `fd:NUMBER` understands.
pub fn add(call: &mut Call<'_>) -> Outcome {
    let fd = supplied(call)?;
    let asked = call.arguments.get("fdset-id");
    let id =
        asked.map(|id| id.as_u64().ok_or_else(|| Refusal::new("Parameter 'fdset-id' expects a non-negative value")));
    let id = id.transpose()?;
    let opaque = call.text("opaque").map(str::to_owned);
    check_words("opaque", opaque.as_deref().unwrap_or_default())?;
    let mut kept = lock(&call.face.fds.kept);
    kept.check_room()?;
    let id = id.unwrap_or_else(|| (0..).find(|id| !kept.sets.contains_key(id)).unwrap_or_default());
    let number = fd.as_raw_fd();
    kept.sets.entry(id).or_default().push(Member { fd, opaque });
    Ok(json!({"fdset-id": id, "fd": number}))
}

/// What `remove-fd` takes.
pub fn takes_remove() -> Shape {
    Shape::Object(vec![must("fdset-id", Shape::Int), may("fd", Shape::Int)])
}

/// `remove-fd`: closes one descriptor of a set, or all.
pub fn remove(call: &mut Call<'_>) -> Outcome {
    let number = call.arguments.get("fd").and_then(Value::as_i64);
    let shown_id = call.arguments.get("fdset-id").and_then(Value::as_i64).unwrap_or(-1);
    let missing = || {
        let which = number.map_or(String::new(), |fd| format!(", fd:{fd}"));
        Refusal::new(format!("File descriptor named 'fdset-id:{shown_id}{which}' not found"))
    };
    let id = call.number("fdset-id").ok_or_else(missing)?;
    let mut kept = lock(&call.face.fds.kept);
    let set = kept.sets.get_mut(&id).ok_or_else(missing)?;
    let before = set.len();
    set.retain(|member| number.is_some_and(|number| i64::from(member.fd.as_raw_fd()) != number));
    if set.len() == before {
        return Err(missing());
    }
    if set.is_empty() {
        kept.sets.remove(&id);
    }
    done()
}

/// What `query-fdsets` gives.
pub fn gives_sets() -> Shape {
    let member = Shape::Object(vec![must("fd", Shape::Int), may("opaque", Shape::Str)]);
    list(Shape::Object(vec![must("fdset-id", Shape::Int), must("fds", list(member))]))
}

/// `query-fdsets`.
pub fn sets(call: &mut Call<'_>) -> Outcome {
    let kept = lock(&call.face.fds.kept);
    let member = |member: &Member| match &member.opaque {
        Some(opaque) => json!({"fd": member.fd.as_raw_fd(), "opaque": opaque}),
        None => json!({"fd": member.fd.as_raw_fd()}),
    };
    let set = |(id, set): (&u64, &Vec<Member>)| json!({"fdset-id": id, "fds": set.iter().map(member).collect::<Vec<Value>>()});
    Ok(kept.sets.iter().map(set).collect::<Vec<Value>>().into())
}
