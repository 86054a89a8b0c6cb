//! URIs of the migrate command.

use crate::error::{Error, Result};

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
    /// `fd:number`: a connected socket, a pipe or a file the VMM opened. The library works on a copy of its own.
    Fd(i32),
}

impl Uri {
    /// Understands a URI.
    pub fn parse(text: &str) -> Result<Self> {
        let shown = text.escape_default();
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(Error::invalid(format!(
                "'{shown}' is not a URI; take tcp:HOST:PORT, unix:PATH or fd:NUMBER"
            )));
        };
        match scheme {
            "tcp" => tcp(rest).ok_or_else(|| {
                Error::invalid(format!("'{shown}' is not tcp:HOST:PORT (an IPv6 address stands in brackets)"))
            }),
            "unix" if !rest.is_empty() && !rest.contains('\0') => Ok(Uri::Unix { path: rest.to_owned() }),
            "unix" => Err(Error::invalid(format!("'{shown}' names no socket path"))),
            "fd" => match rest.parse() {
                Ok(fd) if fd >= 0 => Ok(Uri::Fd(fd)),
                _ => Err(Error::invalid(format!("'{shown}' is not fd:NUMBER"))),
            },
            _ => Err(Error::invalid(format!(
                "unknown migration protocol '{}'; take tcp, unix or fd",
                scheme.escape_default()
            ))),
        }
    }
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
        for (text, uri) in [
            ("tcp:example.org:4444", tcp("example.org", 4444)),
            ("tcp::0", tcp("127.0.0.1", 0)),
            ("tcp:[::1]:65535", tcp("::1", 65535)),
            ("unix:/tmp/a:b", Uri::Unix { path: "/tmp/a:b".into() }),
            ("fd:7", Uri::Fd(7)),
        ] {
            assert_eq!(Uri::parse(text).unwrap(), uri);
        }
    }

    #[test]
    fn uris_that_are_not() {
        let bad =
            ["", "tcp", "tcp:", "tcp:1", "tcp:h:", "tcp:h:65536", "tcp:h:-1", "tcp:h:+1", "tcp:::1:5", "tcp:[::1:5"];
        for text in bad.into_iter().chain(["unix:", "unix:a\0b", "fd:", "fd:-1", "fd:x", "carrier-pigeon:coop"]) {
            assert_eq!(Uri::parse(text).unwrap_err().errno(), libc::EINVAL, "{text:?}");
        }
        let error = Uri::parse("xmpp:me").unwrap_err();
        assert_eq!(error.to_string(), "unknown migration protocol 'xmpp'; take tcp, unix or fd");
    }
}
