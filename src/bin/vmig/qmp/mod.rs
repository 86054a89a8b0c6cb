//! `vmig qmp`: a shell over a QMP socket, of a VMM that links vmig or of a QEMU.

mod help;
mod link;
mod progress;
mod screen;
mod words;

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::printer::shown;
use link::{Came, Link, Refused, Typed};
use progress::Now;
use screen::Screen;

/// Between two looks at a migration.
const LOOK: Duration = Duration::from_millis(200);
/// Where nobody watches, a line at least so often.
const LINE: Duration = Duration::from_secs(5);
/// With nothing to look at, how long a wait for the next thing takes.
const IDLE: Duration = Duration::from_secs(3600);
/// How long after an answer that it is over the event may come that says so.
const EVENT: Duration = Duration::from_millis(500);
/// Beyond a VMM's `switchover-timeout`, how long an unknown switchover may still decide itself.
const MARGIN: Duration = Duration::from_secs(10);

/// What is asked for.
pub(crate) struct Request {
    /// `unix:PATH`, a path, or `tcp:HOST:PORT`.
    pub(crate) address: String,
    /// A command and its arguments; empty: they are typed.
    pub(crate) words: Vec<String>,
    /// Follow the migration to its end afterwards.
    pub(crate) wait: bool,
    /// How long an answer may take.
    pub(crate) timeout: Duration,
}

/// Carries one command out, or what is typed.
pub(crate) fn run(request: &Request) -> Result<(), String> {
    let typing = request.words.is_empty() && !request.wait;
    let link = Link::open(&request.address, request.timeout, typing)?;
    let mut shell = Shell { link, screen: Screen::new(typing), followed: None, failed: 0, quits: false };
    let done = if typing { shell.interact() } else { shell.once(request) };
    shell.screen.clear()?;
    done
}

/// A migration that is watched.
struct Followed {
    next_look: Instant,
    next_line: Instant,
    last: Now,
    /// What the last event said of it.
    told: Option<String>,
    /// Since when nobody knows where the guest is.
    unknown: Option<Instant>,
    /// How long that may be so.
    unknown_max: Duration,
    /// Tell how it ended as an error.
    waited_for: bool,
}

struct Shell {
    link: Link,
    screen: Screen,
    followed: Option<Followed>,
    /// Commands that failed.
    failed: usize,
    /// The last command asked the server to end.
    quits: bool,
}

impl Shell {
    fn once(&mut self, request: &Request) -> Result<(), String> {
        let name = request.words.first().map_or("", String::as_str);
        match name {
            "" | "wait" => return self.wait(),
            "help" => self.help(&request.words[1..])?,
            _ => {
                let value = self.carry_out(words::request(&request.words)?)?;
                self.screen.say(&screen::json(&value))?;
            }
        }
        if request.wait { self.wait() } else { Ok(()) }
    }

    /// Until the user or the server has enough.
    fn interact(&mut self) -> Result<(), String> {
        if self.screen.has_prompt() {
            self.screen.say("connected; help lists what can be said, events come as they happen")?;
        }
        self.look_for_one(false)?;
        loop {
            self.tell_events()?;
            if self.followed.is_none() || !self.screen.is_terminal() {
                self.screen.prompt()?;
            }
            let until =
                self.followed.as_ref().map_or(IDLE, |f| f.next_look.saturating_duration_since(Instant::now()));
            match self.link.next(until)? {
                None => self.look()?,
                Some(Came::Said(message)) => self.hear(&message)?,
                Some(Came::Gone(why)) if self.quits => return self.screen.say(&why),
                Some(Came::Gone(why)) => return Err(why),
                Some(Came::Typed(Typed::End)) => return self.leave(),
                Some(Came::Typed(Typed::Unreadable(why))) => self.fail(why)?,
                Some(Came::Typed(Typed::Line(line))) => {
                    self.screen.entered();
                    if line.trim() == "exit" {
                        return self.leave();
                    }
                    if let Err(error) = self.obey(&line) {
                        self.fail(&error)?;
                    }
                }
            }
        }
    }

    /// There is nothing more to do. What failed is told to whoever started a script.
    fn leave(&mut self) -> Result<(), String> {
        self.tell_events()?;
        match self.failed {
            0 => Ok(()),
            _ if io::stdin().is_terminal() => Ok(()),
            n => Err(format!("{n} of the commands failed")),
        }
    }

    fn fail(&mut self, why: &str) -> Result<(), String> {
        self.failed += 1;
        self.screen.say(&format!("error: {why}"))
    }

    fn obey(&mut self, line: &str) -> Result<(), String> {
        let words = words::split(line)?;
        match words.first().map(String::as_str) {
            None => Ok(()),
            Some("help") => self.help(&words[1..]),
            Some("wait") if words.len() == 1 => self.wait(),
            Some(name) => {
                let value = self.carry_out(words::request(&words)?)?;
                self.quits = name == "quit";
                self.screen.say(&screen::json(&value))?;
                if name.starts_with("migrate") { self.look_for_one(false) } else { Ok(()) }
            }
        }
    }

    /// What a command gives; an error if it was refused or the connection broke.
    fn carry_out(&mut self, request: Value) -> Result<Value, String> {
        self.link.ask(request)?.map_err(|Refused { class, text }| match class.as_str() {
            "GenericError" => shown(&text),
            class => format!("{}: {}", shown(class), shown(&text)),
        })
    }

    fn run(&mut self, command: &str) -> Result<Value, String> {
        self.carry_out(json!({"execute": command}))
    }

    fn help(&mut self, words: &[String]) -> Result<(), String> {
        let text = match words {
            [] => help::names(&self.run("query-commands")?),
            [name] => {
                let schema = self.run("query-qmp-schema")?;
                help::command(&schema, name).ok_or_else(|| format!("the server has no command '{name}'"))?
            }
            _ => return Err("help [COMMAND]".to_owned()),
        };
        self.screen.say(&text)
    }

    fn tell_events(&mut self) -> Result<(), String> {
        while let Some(event) = self.link.event() {
            self.hear(&event)?;
        }
        Ok(())
    }

    /// A message that was not asked for.
    fn hear(&mut self, message: &Value) -> Result<(), String> {
        if message.get("event").is_none() {
            return Ok(());
        }
        self.screen.say(&screen::event(message))?;
        match &mut self.followed {
            Some(followed) => {
                followed.next_look = Instant::now();
                if message["event"] == "MIGRATION" {
                    followed.told = message["data"]["status"].as_str().map(str::to_owned);
                }
            }
            None if message["event"] == "MIGRATION" => self.look_for_one(false)?,
            None => (),
        }
        Ok(())
    }

    /// Follows a migration, if one runs.
    fn look_for_one(&mut self, waited_for: bool) -> Result<(), String> {
        // A server without migration has no such command.
        let Ok(answer) = self.link.ask(json!({"execute": "query-migrate"}))? else { return Ok(()) };
        let last = Now::of(&answer);
        if !last.runs() && !waited_for {
            return Ok(());
        }
        let now = Instant::now();
        let unknown_max = self.unknown_max()?;
        match &mut self.followed {
            Some(followed) => followed.waited_for |= waited_for,
            None => {
                let (next_look, next_line) = (now, now);
                let (last, told, unknown) = Default::default();
                self.followed = Some(Followed { next_look, next_line, last, told, unknown, unknown_max, waited_for });
            }
        }
        Ok(())
    }

    fn unknown_max(&mut self) -> Result<Duration, String> {
        let answer = self.link.ask(json!({"execute": "query-migrate-parameters"}))?;
        let limit = answer.ok().and_then(|parameters| parameters["switchover-timeout"].as_u64()).unwrap_or(0);
        Ok(Duration::from_millis(limit).saturating_add(MARGIN))
    }

    /// To the end, which must be a good one. What is typed meanwhile comes afterwards.
    fn wait(&mut self) -> Result<(), String> {
        self.look_for_one(true)?;
        if self.followed.is_none() {
            return Err("this server has no query-migrate".to_owned());
        }
        while self.followed.is_some() {
            if let Err(why) = self.look_or_hear() {
                self.tell_events()?;
                // A VMM whose guest has left may end at once.
                match self.followed.as_ref().and_then(|followed| followed.told.as_deref()) {
                    Some("completed") => return self.screen.say(&format!("completed; {why}")),
                    _ => return Err(why),
                }
            }
        }
        Ok(())
    }

    fn look_or_hear(&mut self) -> Result<(), String> {
        self.tell_events()?;
        let until = self.followed.as_ref().map_or(LOOK, |f| f.next_look.saturating_duration_since(Instant::now()));
        match self.link.hear(until)? {
            None => self.look(),
            Some(message) => self.hear(&message),
        }
    }

    /// It is over: the event that says so comes before our own words, where there are events.
    fn hear_of_end(&mut self, status: &str) -> Result<(), String> {
        let end = Instant::now() + EVENT;
        while self.followed.as_ref().is_some_and(|f| f.told.as_ref().is_some_and(|told| told != status)) {
            match self.link.hear(end.saturating_duration_since(Instant::now())) {
                Ok(Some(message)) => self.hear(&message)?,
                Ok(None) | Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    /// Looks how far the migration is that is followed, and shows it.
    fn look(&mut self) -> Result<(), String> {
        if self.followed.is_none() {
            return Ok(());
        }
        let answer = self.run("query-migrate")?;
        // What led to this comes first.
        self.tell_events()?;
        let (now, at) = (Now::of(&answer), Instant::now());
        if !now.runs() {
            self.hear_of_end(&now.status)?;
        }
        let Some(followed) = &mut self.followed else { return Ok(()) };
        followed.next_look = at + LOOK;
        followed.unknown = (now.status == "switchover-unknown").then(|| followed.unknown.unwrap_or(at));
        let stuck = followed.unknown.is_some_and(|since| since.elapsed() >= followed.unknown_max);
        if !now.runs() || stuck {
            let waited_for = followed.waited_for;
            self.followed = None;
            return match now.end() {
                Ok(words) => self.screen.say(&words),
                Err(words) if waited_for => Err(words),
                Err(words) => self.screen.say(&words),
            };
        }
        if self.screen.is_terminal() {
            let line = now.line(true);
            followed.last = now;
            return self.screen.bar(&line);
        }
        let news = (&now.status, now.iteration()) != (&followed.last.status, followed.last.iteration());
        if news || at >= followed.next_line {
            followed.next_line = at + LINE;
            let line = now.line(false);
            followed.last = now;
            self.screen.say(&line)?;
        }
        Ok(())
    }
}
