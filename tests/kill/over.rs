//! What source and destination are connected by, and the URIs of both sides.

use std::path::Path;

/// A kind of connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    Unix,
    Tcp,
    /// Of the VMM's own making (tests/c/own.h).
    Own,
    /// A command of the source that connects and carries the answers back (tests/c/bridge.c).
    Command,
    /// A command of the destination that lets one source in.
    ListeningCommand,
}
use Over::*;

impl Over {
    /// What the destination listens at; `path` is free for it.
    pub(crate) fn listens(self, path: &Path, bridge: &Path) -> String {
        let path = path.display();
        match self {
            Tcp => "tcp:127.0.0.1:0".to_owned(),
            Unix | Command => format!("unix:{path}"),
            Own => format!("own:{path}"),
            ListeningCommand => format!("exec:exec {} -l {path}", bridge.display()),
        }
    }

    /// Where the source goes that is to come out at `address`, a socket's or one of its own.
    pub(crate) fn leads(self, address: &str, bridge: &Path) -> String {
        match (self, address.strip_prefix("unix:")) {
            (Command, Some(path)) => format!("exec:exec {} {path}", bridge.display()),
            _ => address.to_owned(),
        }
    }
}
