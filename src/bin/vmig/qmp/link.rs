//! The connection to a QMP server: requests go out, answers and events come in, and lines of the user beside them.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::printer::shown;
use vmig::transport::uri::Uri;

/// Longest line of a server: QEMU's schema has 0.3 MB.
const LINE_MAX: u64 = 4 << 20;
/// Longest line of a user.
const TYPED_MAX: u64 = 256 << 10;
/// Lines of a server that wait to be looked at; it waits then.
const WAITING_MAX: usize = 8;
/// Events that wait while an answer is waited for.
const EVENTS_MAX: usize = 1024;
/// How long a server may take to be there and to greet.
const GREETING: Duration = Duration::from_secs(10);
/// Of words that are not understood so much is shown.
const SHOWN_MAX: usize = 100;

/// What a user gave.
pub(super) enum Typed {
    /// A line, without its end.
    Line(String),
    /// It is longer than anything a server takes, or no text.
    Unreadable(&'static str),
    /// There is no more.
    End,
}

/// What came, whoever it is from.
pub(super) enum Came {
    /// A message of the server's.
    Said(Value),
    /// From the user.
    Typed(Typed),
    /// The connection is of no use any more, and why.
    Gone(String),
}

/// Why a command was not carried out, in the server's words.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) class: String,
    pub(super) text: String,
}

/// A server that greeted.
pub(super) struct Link {
    out: Box<dyn Write>,
    came: Receiver<Came>,
    /// Asks for one more line of the user.
    want: Option<SyncSender<()>>,
    wanted: bool,
    typed: Option<Typed>,
    events: VecDeque<Value>,
    last_id: u64,
    patience: Duration,
    gone: Option<String>,
}

impl Link {
    /// Connects and hears the greeting. `patience`: how long an answer may take. With `typing` lines of the user are read.
    pub(super) fn open(address: &str, patience: Duration, typing: bool) -> Result<Self, String> {
        let (input, out) = connect(address, patience).map_err(|e| format!("{address}: {e}"))?;
        let (sender, came) = sync_channel(WAITING_MAX);
        let mut want = None;
        if typing {
            let (ask, asked) = sync_channel(1);
            let sender = sender.clone();
            thread::spawn(move || read_user(&asked, &sender));
            want = Some(ask);
        }
        thread::spawn(move || read_server(input, &sender));
        let (typed, events, gone) = Default::default();
        let mut link = Self { out, came, want, wanted: false, typed, events, last_id: 0, patience, gone };
        link.negotiate().map_err(|e| format!("{address}: {e}"))?;
        Ok(link)
    }

    fn negotiate(&mut self) -> Result<(), String> {
        let greeting = match self.came.recv_timeout(GREETING) {
            Ok(Came::Said(value)) => value,
            Ok(Came::Gone(why)) => return Err(why),
            Ok(Came::Typed(_)) | Err(_) => {
                let secs = GREETING.as_secs();
                return Err(format!(
                    "no greeting within {secs} seconds: no QMP server, or one that serves another client"
                ));
            }
        };
        let Some(offered) = greeting["QMP"]["capabilities"].as_array() else {
            let error = greeting["error"]["desc"].as_str();
            return Err(match error {
                Some(text) => format!("the server says: {}", shown(text)),
                None => format!("this is no greeting of a QMP server: {}", beginning(&greeting.to_string())),
            });
        };
        let enable: Vec<&str> = if offered.iter().any(|name| name == "oob") { vec!["oob"] } else { Vec::new() };
        match self.ask(json!({"execute": "qmp_capabilities", "arguments": {"enable": enable}}))? {
            Ok(_) => Ok(()),
            Err(refused) => Err(format!("the server does not go on from its greeting: {}", shown(&refused.text))),
        }
    }

    /// Sends a request and waits for its answer; events and a line of the user's that come meanwhile are kept. Fails if
    /// the connection does.
    pub(super) fn ask(&mut self, mut request: Value) -> Result<Result<Value, Refused>, String> {
        let id = match request.get("id") {
            Some(id) => id.clone(),
            None => {
                self.last_id += 1;
                request["id"] = self.last_id.into();
                self.last_id.into()
            }
        };
        self.send(&request)?;
        let end = Instant::now() + self.patience;
        loop {
            match self.receive(end.saturating_duration_since(Instant::now()))? {
                None => {
                    let secs = self.patience.as_secs_f32();
                    return Err(format!("the server did not answer within {secs} seconds (--timeout)"));
                }
                Some(Came::Typed(typed)) => self.typed = Some(typed),
                Some(Came::Said(mut message)) => {
                    let failed = message.get("error").is_some();
                    if message.get("event").is_some() {
                        self.keep(message);
                    } else if message.get("id") == Some(&id) || (message.get("id").is_none() && failed) {
                        return Ok(match failed {
                            false => Ok(message["return"].take()),
                            true => Err(refused(&message["error"])),
                        });
                    }
                    // Else it is the answer to something that was given up.
                }
                Some(Came::Gone(why)) => return Err(why),
            }
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn send(&mut self, request: &Value) -> Result<(), String> {
        let line = format!("{request}\n");
        self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush()).map_err(|error| {
            // Its last words: what happened before, and often why it hung up.
            while let Ok(last) = self.came.recv_timeout(Duration::from_millis(100)) {
                match last {
                    Came::Gone(why) => return why,
                    Came::Said(message) if message.get("event").is_some() => self.keep(message),
                    Came::Said(_) | Came::Typed(_) => (),
                }
            }
            format!("the server does not take what it is told: {error}")
        })
    }

    fn receive(&mut self, limit: Duration) -> Result<Option<Came>, String> {
        if let Some(why) = &self.gone {
            return Err(why.clone());
        }
        match self.came.recv_timeout(limit) {
            Ok(Came::Gone(why)) => {
                self.gone = Some(why.clone());
                Ok(Some(Came::Gone(why)))
            }
            Ok(came) => {
                self.wanted &= !matches!(came, Came::Typed(_));
                Ok(Some(came))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err("nothing can come any more".to_owned()),
        }
    }

    /// The next event that came while an answer was waited for.
    pub(super) fn event(&mut self) -> Option<Value> {
        self.events.pop_front()
    }

    /// What comes next, within this time; a line of the user's is asked for.
    pub(super) fn next(&mut self, limit: Duration) -> Result<Option<Came>, String> {
        if let Some(typed) = self.typed.take() {
            return Ok(Some(Came::Typed(typed)));
        }
        if let (Some(want), false) = (&self.want, self.wanted) {
            self.wanted = want.try_send(()).is_ok();
        }
        self.receive(limit)
    }

    /// The next message, within this time; a line of the user's that comes meanwhile is kept.
    pub(super) fn hear(&mut self, limit: Duration) -> Result<Option<Value>, String> {
        match self.receive(limit)? {
            None => Ok(None),
            Some(Came::Said(message)) => Ok(Some(message)),
            Some(Came::Gone(why)) => Err(why),
            Some(Came::Typed(typed)) => {
                self.typed = Some(typed);
                Ok(None)
            }
        }
    }
}

fn refused(error: &Value) -> Refused {
    let text = |name: &str| error[name].as_str().unwrap_or("?").to_owned();
    Refused { class: text("class"), text: text("desc") }
}

fn beginning(text: &str) -> String {
    let mut out = shown(&text.chars().take(SHOWN_MAX).collect::<String>());
    if text.chars().nth(SHOWN_MAX).is_some() {
        out.push_str("...");
    }
    out
}

type Ends = (Box<dyn Read + Send>, Box<dyn Write>);

/// `unix:PATH`, a path, or `tcp:HOST:PORT`.
fn connect(address: &str, patience: Duration) -> io::Result<Ends> {
    if !address.starts_with("tcp:") {
        let path = address.strip_prefix("unix:").unwrap_or(address);
        let stream = UnixStream::connect(Path::new(path))?;
        stream.set_write_timeout(Some(patience))?;
        return Ok((Box::new(stream.try_clone()?), Box::new(stream)));
    }
    let Ok(Uri::Tcp { host, port }) = Uri::parse(address) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not tcp:HOST:PORT"));
    };
    let mut error = io::Error::new(io::ErrorKind::NotFound, "this host has no address");
    for place in (host.as_str(), port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&place, GREETING) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(patience))?;
                return Ok((Box::new(stream.try_clone()?), Box::new(stream)));
            }
            Err(refused) => error = refused,
        }
    }
    Err(error)
}

const CLOSED: &str = "the server closed the connection";

/// Reads messages until the server is gone or talks nonsense.
fn read_server(input: Box<dyn Read + Send>, sender: &SyncSender<Came>) {
    let mut input = BufReader::new(input);
    loop {
        let mut line = Vec::new();
        let came = match input.by_ref().take(LINE_MAX + 1).read_until(b'\n', &mut line) {
            // Reset: it closed without having read all that we said.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset && line.is_empty() => {
                Came::Gone(CLOSED.into())
            }
            Err(error) => Came::Gone(format!("the connection broke: {error}")),
            Ok(0) => Came::Gone(CLOSED.into()),
            Ok(n) if n as u64 > LINE_MAX => {
                Came::Gone(format!("the server sent a line of more than {} MiB", LINE_MAX >> 20))
            }
            Ok(_) if !line.ends_with(b"\n") => {
                Came::Gone("the server closed the connection in the middle of a message".to_owned())
            }
            Ok(_) if line.trim_ascii().is_empty() => continue,
            Ok(_) => match serde_json::from_slice(&line) {
                Ok(message @ Value::Object(_)) => Came::Said(message),
                _ => {
                    let words = String::from_utf8_lossy(line.trim_ascii_end());
                    Came::Gone(format!("the server does not speak QMP: {}", beginning(&words)))
                }
            },
        };
        let gone = matches!(came, Came::Gone(_));
        if sender.send(came).is_err() || gone {
            return;
        }
    }
}

/// Reads a line whenever one is wanted.
fn read_user(asked: &Receiver<()>, sender: &SyncSender<Came>) {
    let mut input = io::stdin().lock();
    while asked.recv().is_ok() {
        let mut line = Vec::new();
        let typed = match input.by_ref().take(TYPED_MAX + 1).read_until(b'\n', &mut line) {
            Err(_) | Ok(0) => Typed::End,
            Ok(n) if n as u64 > TYPED_MAX => {
                skip_line(&mut input);
                Typed::Unreadable("this line is longer than any server takes")
            }
            Ok(_) => match String::from_utf8(line) {
                Ok(line) => Typed::Line(line),
                Err(_) => Typed::Unreadable("this line is not UTF-8"),
            },
        };
        let end = matches!(typed, Typed::End);
        if sender.send(Came::Typed(typed)).is_err() || end {
            return;
        }
    }
}

fn skip_line(input: &mut impl BufRead) {
    let mut rest = Vec::new();
    while matches!(input.by_ref().take(TYPED_MAX).read_until(b'\n', &mut rest), Ok(n) if n > 0) {
        if rest.ends_with(b"\n") {
            return;
        }
        rest.clear();
    }
}
