//! A QMP client that speaks lines.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

pub const PATIENCE: Duration = Duration::from_secs(60);

/// A connection that speaks lines.
pub struct Client {
    pub lines: BufReader<UnixStream>,
}

impl Client {
    /// Connects, and reads the first line.
    pub fn connect(path: &Path) -> (Client, Value) {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut client = Client { lines: BufReader::new(stream) };
        let first = client.hear();
        (client, first)
    }

    /// The same, ready for commands.
    pub fn ready(path: &Path) -> Client {
        let (mut client, greeting) = Client::connect(path);
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        assert_eq!(client.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
        client
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.lines.get_mut().write_all(bytes).unwrap();
    }

    /// The next line that is no event.
    pub fn hear(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the server hung up");
            let value: Value = serde_json::from_str(&line).unwrap();
            if value.get("event").is_none() {
                return value;
            }
        }
    }

    pub fn ask(&mut self, line: &str) -> Value {
        self.say(format!("{line}\n").as_bytes());
        self.hear()
    }

    pub fn run(&mut self, command: &str) -> Value {
        let mut answer = self.ask(&json!({"execute": command}).to_string());
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    /// A command: what it returns, or the words of its error.
    pub fn try_run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut answer = self.ask(&json!({"execute": command, "arguments": arguments}).to_string());
        match answer.get("error") {
            Some(error) => Err(error["desc"].as_str().unwrap().to_owned()),
            None => Ok(answer["return"].take()),
        }
    }

    /// Where the migration stands.
    pub fn status(&mut self) -> String {
        self.run("query-migrate")["status"].as_str().unwrap_or("none").to_owned()
    }
}
