//! TCP, unix and vsock sockets: connecting and listening.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use super::channel::FdChannel;
use super::uri::Uri;
use crate::error::{Error, Result};
use crate::sys::eventfd::Wake;
use crate::sys::io::{self, Ready};

/// Connections that may wait to be accepted: a source with all its channels, and a few strangers.
const BACKLOG: i32 = 80;

/// Addresses of a URI, each with words for it.
fn addresses(uri: &Uri) -> Result<Vec<(SockAddr, String)>> {
    match uri {
        Uri::Tcp { host, port } => {
            let found = (host.as_str(), *port).to_socket_addrs();
            let found = found.map_err(|e| Error::new(libc::EHOSTUNREACH, format!("host '{host}': {e}")))?;
            Ok(found.map(|a| (SockAddr::from(a), tcp_uri(a))).collect())
        }
        Uri::Unix { path } => {
            let address = SockAddr::unix(path).map_err(|e| Error::invalid(format!("unix:{path}: {e}")))?;
            Ok(vec![(address, format!("unix:{path}"))])
        }
        Uri::Vsock { cid, port } => Ok(vec![(SockAddr::vsock(*cid, *port), vsock_uri(*cid, *port))]),
        _ => Err(Error::invalid("this is not an address of a socket")),
    }
}

fn vsock_uri(cid: u32, port: u32) -> String {
    format!("vsock:{cid}:{port}")
}

fn tcp_uri(address: SocketAddr) -> String {
    format!("tcp:{address}")
}

fn socket(address: &SockAddr, words: &str) -> Result<Socket> {
    let make = || {
        let socket = Socket::new(address.domain(), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    make().map_err(|e: std::io::Error| Error::from_io(words, &e))
}

/// Small messages (replies, the last byte) must not wait for more data.
fn prepare(socket: &Socket) {
    // Unix and vsock sockets have neither; that is fine.
    let _ = socket.set_tcp_nodelay(true);
    // A host that is gone without a word is missed after two minutes, not after the system's two hours.
    let alive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));
    let _ = socket.set_tcp_keepalive(&alive.with_retries(4));
}

/// Connects, trying every address of the host.
pub fn connect(uri: &Uri, wake: &Arc<Wake>, limit: Duration) -> Result<FdChannel> {
    let deadline = Instant::now() + limit;
    let mut last = None;
    for (address, words) in addresses(uri)? {
        match connect_one(&address, &words, wake, (deadline, limit)) {
            Ok(socket) => {
                prepare(&socket);
                return FdChannel::new(OwnedFd::from(socket), wake);
            }
            Err(error) if error.errno() == libc::ECANCELED => return Err(error),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| Error::new(libc::EHOSTUNREACH, "the host has no address")))
}

fn connect_one(
    address: &SockAddr,
    words: &str,
    wake: &Wake,
    (deadline, limit): (Instant, Duration),
) -> Result<Socket> {
    let failed = |e: &std::io::Error| Error::from_io(format!("connecting to {words}"), e);
    let late = || Error::timeout(super::CONNECT, limit, format!("connecting to {words}: no answer within"));
    let socket = socket(address, words)?;
    loop {
        match socket.connect(address) {
            Ok(()) => return Ok(socket),
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => break,
            // A unix listener's backlog is full: no poll tells when it is not.
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                if Instant::now() >= deadline {
                    return Err(late());
                }
                io::sleep(wake, Duration::from_millis(5))?;
                wake.check()?;
            }
            Err(e) => return Err(failed(&e)),
        }
    }
    match io::wait(Some(socket.as_fd()), true, wake.as_fd(), Some(deadline))? {
        Ready::Woken => wake.check()?,
        Ready::TimedOut => return Err(late()),
        Ready::Fd => (),
    }
    match socket.take_error() {
        Ok(None) => Ok(socket),
        Ok(Some(e)) | Err(e) => Err(failed(&e)),
    }
}

/// A listening socket for one migration.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: String,
    _file: Option<SocketFile>,
}

/// The file of a unix socket, removed with it if it is still ours.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) == Some(self.id) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

impl Listener {
    /// Binds the first address of the URI that can be bound.
    pub fn new(uri: &Uri) -> Result<Self> {
        let mut last = None;
        for (address, words) in addresses(uri)? {
            match Self::bind(&address, words, uri) {
                Ok(listener) => return Ok(listener),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::new(libc::EADDRNOTAVAIL, "the host has no address")))
    }

    fn bind(address: &SockAddr, words: String, uri: &Uri) -> Result<Self> {
        // For vsock it is another number that lets the system choose.
        let any_port = match uri {
            Uri::Vsock { cid, port: 0 } => Some(SockAddr::vsock(*cid, libc::VMADDR_PORT_ANY)),
            _ => None,
        };
        let address = any_port.as_ref().unwrap_or(address);
        let failed = |e: std::io::Error| Error::from_io(format!("listening on {words}"), &e);
        let socket = socket(address, &words)?;
        if let Uri::Unix { path } = uri {
            remove_stale(Path::new(path), address);
            // Only the owner may connect; bind takes the mode from the socket, so there is no moment without it.
            io::set_mode(socket.as_fd(), 0o600)?;
        } else if let Uri::Tcp { .. } = uri {
            socket.set_reuse_address(true).map_err(failed)?;
            if address.domain() == Domain::IPV6 {
                socket.set_only_v6(true).map_err(failed)?;
            }
        }
        socket.bind(address).map_err(failed)?;
        let file = match uri {
            Uri::Unix { path } => identity(Path::new(path)).map(|id| SocketFile { path: path.into(), id }),
            _ => None,
        };
        socket.listen(BACKLOG).map_err(failed)?;
        let real = socket.local_addr().ok().and_then(|real| match real.as_vsock_address() {
            Some((cid, port)) => Some(vsock_uri(cid, port)),
            None => real.as_socket().map(tcp_uri),
        });
        let address = real.unwrap_or(words);
        Ok(Self { socket, address, _file: file })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether those who connect may be on other hosts.
    pub fn is_network(&self) -> bool {
        self.address.starts_with("tcp:")
    }

    /// Takes a connection that waits, if one does.
    pub fn accept(&self) -> Result<Option<OwnedFd>> {
        match self.socket.accept() {
            Ok((socket, _)) => {
                prepare(&socket);
                Ok(Some(OwnedFd::from(socket)))
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR | libc::ECONNABORTED)) => Ok(None),
            Err(e) => Err(Error::from_io(format!("accepting on {}", self.address), &e)),
        }
    }

    /// The listening socket, to wait for it beside others.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Removes a socket file nobody listens on any more; anything else is left, and bind says that it is in the way.
fn remove_stale(path: &Path, address: &SockAddr) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if !is_socket {
        return;
    }
    // A socket of another type is refused by whoever listens, who does not take it for a source and wake up.
    let Ok(probe) = Socket::new(Domain::UNIX, Type::DGRAM, None) else { return };
    if probe.connect(address).is_err_and(|e| e.raw_os_error() == Some(libc::ECONNREFUSED)) {
        let _ = std::fs::remove_file(path);
    }
}
