//! URIs of the migrate command.

use crate::error::{Error, Result};
use crate::options;

/// Where a migration goes to or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:host:port`; no host means loopback, never every interface. IPv6 addresses stand in brackets.
    Tcp {
        /// Name or address.
        host: String,
        /// Port; 0 lets the system choose when listening.
        port: u16,
    },
    /// `unix:path`.
    Unix {
        /// Path of the socket.
        path: String,
    },
    /// `vsock:cid:port`: between a host and its guests, by numbers.
    Vsock {
        /// Context: 2 is the host.
        cid: u32,
        /// Port; 0 lets the system choose when listening.
        port: u32,
    },
    /// `fd:number`: a connected socket, a pipe or a file the VMM opened. The library works on a copy of its own.
    Fd(i32),
    /// `exec:command`: what a shell runs, connected by its standard input and output.
    Exec(String),
    /// `file:path`, or `file:path,offset=bytes`.
    File {
        /// Path of the file.
        path: String,
        /// Where in it the stream begins.
        offset: u64,
    },
    /// Anything else of this form: perhaps a scheme the VMM added.
    Custom {
        /// What stands before the colon.
        scheme: String,
        /// What follows it.
        address: String,
    },
}

/// The schemes of the library itself.
pub const SCHEMES: [&str; 6] = ["tcp", "unix", "vsock", "fd", "exec", "file"];

impl Uri {
    /// Understands a URI.
    pub fn parse(text: &str) -> Result<Self> {
        let shown = text.escape_default();
        let bad = |what: &str| Error::invalid(format!("'{shown}' is not {what}"));
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(bad("a URI, such as tcp:HOST:PORT, unix:PATH, file:PATH or exec:COMMAND"));
        };
        if text.contains('\0') {
            return Err(bad("a URI: it contains a NUL"));
        }
        match scheme {
            "tcp" => tcp(rest).ok_or_else(|| bad("tcp:HOST:PORT (an IPv6 address stands in brackets)")),
            "unix" if !rest.is_empty() => Ok(Uri::Unix { path: rest.to_owned() }),
            "unix" => Err(bad("unix:PATH")),
            "vsock" => vsock(rest).ok_or_else(|| bad("vsock:CID:PORT, both of them numbers")),
            "fd" => match rest.parse() {
                Ok(fd) if fd >= 0 => Ok(Uri::Fd(fd)),
                _ => Err(bad("fd:NUMBER")),
            },
            "exec" if !rest.trim().is_empty() => Ok(Uri::Exec(rest.to_owned())),
            "exec" => Err(bad("exec:COMMAND")),
            "file" => file(rest),
            _ if is_scheme(scheme) => Ok(Uri::Custom { scheme: scheme.to_owned(), address: rest.to_owned() }),
            _ => Err(bad("a URI: no scheme has such a name")),
        }
    }
}

/// Whether a scheme may have this name.
pub fn is_scheme(name: &str) -> bool {
    let rest = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+.-".contains(&b);
    name.as_bytes().first().is_some_and(u8::is_ascii_lowercase) && name.len() <= 32 && name.bytes().all(rest)
}

fn vsock(rest: &str) -> Option<Uri> {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?;
    let (cid, port) = rest.split_once(':')?;
    Some(Uri::Vsock { cid: number(cid)?, port: number(port)? })
}

fn file(rest: &str) -> Result<Uri> {
    let (path, offset) = match rest.rsplit_once(",offset=") {
        None => (rest, 0),
        Some((path, text)) => {
            let bad = || Error::invalid(format!("file URI has bad offset {}", text.escape_default()));
            (path, offset(text).ok_or_else(bad)?)
        }
    };
    if path.is_empty() {
        return Err(Error::invalid("'file:' names no file"));
    }
    Ok(Uri::File { path: path.to_owned(), offset })
}

/// Bytes: decimal with an optional suffix, or hexadecimal. As far as a file can reach.
fn offset(text: &str) -> Option<u64> {
    let bytes = match text.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok()?,
        Some(_) => return None,
        None => options::size(text)?,
    };
    i64::try_from(bytes).is_ok().then_some(bytes)
}

fn tcp(rest: &str) -> Option<Uri> {
    let (host, port) = rest.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let port = port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok())??;
    let host = if host.is_empty() { "127.0.0.1" } else { host };
    Some(Uri::Tcp { host: host.to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_that_are_understood() {
        let tcp = |host: &str, port| Uri::Tcp { host: host.into(), port };
        let file = |path: &str, offset| Uri::File { path: path.into(), offset };
        for (text, uri) in [
            ("tcp:example.org:4444", tcp("example.org", 4444)),
            ("tcp::0", tcp("127.0.0.1", 0)),
            ("tcp:[::1]:65535", tcp("::1", 65535)),
            ("unix:/tmp/a:b", Uri::Unix { path: "/tmp/a:b".into() }),
            ("fd:7", Uri::Fd(7)),
            ("vsock:2:1234", Uri::Vsock { cid: 2, port: 1234 }),
            ("exec:cat >'a:b'", Uri::Exec("cat >'a:b'".into())),
            ("file:/tmp/a,b", file("/tmp/a,b", 0)),
            ("file:a,offset=4096", file("a", 4096)),
            ("file:a,offset=0x1000", file("a", 4096)),
            ("file:a,offset=10k", file("a", 10240)),
            ("file:a,offset=7,offset=1M", file("a,offset=7", 1 << 20)),
            ("carrier-pigeon:coop:3", Uri::Custom { scheme: "carrier-pigeon".into(), address: "coop:3".into() }),
        ] {
            assert_eq!(Uri::parse(text).unwrap(), uri);
        }
    }

    #[test]
    fn uris_that_are_not() {
        let bad =
            ["", "tcp", "tcp:", "tcp:1", "tcp:h:", "tcp:h:65536", "tcp:h:-1", "tcp:h:+1", "tcp:::1:5", "tcp:[::1:5"];
        let more =
            ["unix:", "unix:a\0b", "fd:", "fd:-1", "fd:x", "exec:", "exec: ", "exec:a\0", "file:", "file:,offset=1"];
        let offsets = ["", "0x20M", "0x", "-1", "+1", "1X", "8388608T", "0x8000000000000000"];
        let numbers = ["vsock:", "vsock:2", "vsock:2:", "vsock::1", "vsock:2:x", "vsock:-1:1", "vsock:4294967296:1"];
        let others = ["Pigeon:x", ":x", "a b:x", "1a:x"].into_iter().chain(more).chain(numbers);
        for text in bad.into_iter().chain(others) {
            assert_eq!(Uri::parse(text).unwrap_err().errno(), libc::EINVAL, "{text:?}");
        }
        for offset in offsets {
            let error = Uri::parse(&format!("file:x,offset={offset}")).unwrap_err();
            assert_eq!((error.errno(), error.text()), (libc::EINVAL, &*format!("file URI has bad offset {offset}")));
        }
    }
}
