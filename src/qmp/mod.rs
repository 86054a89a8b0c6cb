//! QMP: the same operations as the C API, as JSON, for the tools and fleet managers that speak it.
//!
//! [`Face`] turns a request into an answer: a table of commands, each a shape to check its arguments by and a function
//! to carry it out. [`server`] brings requests and answers over sockets, and events to everybody connected.

pub mod about;
pub mod client;
pub mod event;
pub mod fds;
pub mod frame;
pub mod migrate;
pub mod rate;
pub mod report;
pub mod request;
pub mod run;
pub mod schema;
pub mod server;
pub mod settings;
pub mod shape;
pub mod table;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::thread::{fence, lock};
use crate::transport::socket::Listener;
use crate::transport::uri::Uri;
use crate::vmm::command::Command;
use request::{Refusal, Request, answer};
use server::Server;
use shape::shown;
use table::{Call, Outcome};

/// Names of the threads that serve QMP: the one that speaks with clients, and the one that carries commands out.
pub const THREADS: [&str; 2] = ["qmp", "qmp_run"];
/// Commands that a VMM may add.
const OWN_MAX: usize = 256;
/// Bytes of the name of such a command.
const NAME_MAX: usize = 64;

/// What all clients of a guest share.
pub struct Face {
    /// Commands of the VMM. Before the guest: their `destroy` comes before the VMM's own.
    own: Mutex<BTreeMap<String, Arc<dyn Command>>>,
    fds: Arc<fds::Fds>,
    machine: Arc<Machine>,
}

impl fmt::Debug for Face {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Face").field("own", &self.own_names()).finish_non_exhaustive()
    }
}

impl Face {
    /// The names of the VMM's commands.
    fn own_names(&self) -> Vec<String> {
        lock(&self.own).keys().cloned().collect()
    }

    /// The answer to a request, whatever it is.
    fn answer(&self, text: &[u8], fd: Option<OwnedFd>) -> String {
        match request::read(text) {
            Ok(request) => {
                let id = request.id.clone();
                answer(self.carry_out(request, fd), id)
            }
            Err((refusal, id)) => answer(Err(refusal), id),
        }
    }

    fn carry_out(&self, request: Request, fd: Option<OwnedFd>) -> Outcome {
        let name = shown(&request.name);
        let done = fence(format_args!("command '{name}'"), || Ok(self.run(request, fd)));
        done.unwrap_or_else(|panic| Err(panic.into()))
    }

    fn run(&self, request: Request, fd: Option<OwnedFd>) -> Outcome {
        let Request { name, arguments, oob, .. } = request;
        if let Some(command) = table::find(&name) {
            if oob && !command.oob {
                return Err(Refusal::new(format!("The command {name} does not support OOB")));
            }
            (command.takes)().check_arguments(&arguments)?;
            let mut call = Call { face: self, arguments, fd };
            if command.home {
                let what = format!("command '{name}'");
                return self.machine.vmm().dispatch().errand(&what, || Ok((command.run)(&mut call)))?;
            }
            return (command.run)(&mut call);
        }
        let own = lock(&self.own).get(&name).cloned();
        match own {
            Some(_) if oob => Err(Refusal::new(format!("The command {name} does not support OOB"))),
            Some(command) => {
                let arguments = Value::Object(arguments).to_string();
                let what = format!("command '{name}'");
                Ok(self.machine.vmm().dispatch().run(&what, || command.run(&arguments))?)
            }
            None => Err(Refusal::not_found(format!("The command {} has not been found", shown(&name)))),
        }
    }
}

/// A guest that can be spoken with.
#[derive(Debug)]
pub struct Qmp {
    /// Once somebody asked for a server.
    server: Mutex<Option<Server>>,
    face: Arc<Face>,
}

impl Qmp {
    /// Nobody serves it yet.
    pub fn new(machine: Machine) -> Self {
        let (own, fds) = <(_, Arc<fds::Fds>)>::default();
        machine.keep_fd_sets(Arc::clone(&fds) as Arc<_>);
        Self { server: Mutex::default(), face: Arc::new(Face { own, fds, machine: Arc::new(machine) }) }
    }

    /// The guest.
    pub fn machine(&self) -> &Machine {
        &self.face.machine
    }

    /// The answer to a request. \[free\]
    pub fn request(&self, text: &str) -> Result<String> {
        self.machine().vmm().bql().require_free("carry out a QMP command")?;
        Ok(self.face.answer(text.as_bytes(), None))
    }

    /// Serves clients at `uri`, from now until the guest is freed.
    pub fn listen(&self, uri: &str) -> Result<()> {
        let uri = Uri::parse(uri)?;
        if !matches!(uri, Uri::Tcp { .. } | Uri::Unix { .. }) {
            return Err(Error::invalid("a QMP server listens at unix:PATH or tcp:HOST:PORT"));
        }
        let listener = Listener::new(&uri)?;
        let mut server = lock(&self.server);
        match &*server {
            Some(server) => server.add(listener),
            None => {
                *server = Some(Server::start(&self.face, listener)?);
                Ok(())
            }
        }
    }

    /// Where clients are served last asked for, with the real port.
    pub fn address(&self) -> Result<String> {
        let address = lock(&self.server).as_ref().and_then(Server::address);
        address.ok_or_else(|| Error::new(libc::ENOTCONN, "no QMP server listens"))
    }

    /// Adds a command of the VMM's, which `make` makes once its name is found to be free.
    pub fn add(&self, name: &str, make: impl FnOnce() -> Arc<dyn Command>) -> Result<()> {
        let letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(letter) {
            let text = format!("the name of a command has 1 to {NAME_MAX} letters, digits, - and _");
            return Err(Error::invalid(text));
        }
        let mut own = lock(&self.face.own);
        if own.contains_key(name) || table::find(name).is_some() {
            return Err(Error::new(libc::EEXIST, format!("there is a command '{name}' already")));
        }
        if own.len() == OWN_MAX {
            return Err(Error::new(libc::ENOSPC, format!("{OWN_MAX} commands were added already")));
        }
        own.insert(name.to_owned(), make());
        Ok(())
    }

    /// `EDEADLK` on a thread of the server, which cannot wait for its own end.
    pub fn check_not_inside(&self) -> Result<()> {
        lock(&self.server).as_ref().map_or(Ok(()), Server::check_not_inside)
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // Not under the lock: the command that is waited for may ask for the server's address.
        let server = lock(&self.server).take();
        if let Some(server) = server {
            server.stop();
        }
    }
}

#[cfg(test)]
impl Qmp {
    /// Of a guest that does nothing.
    fn of_nothing() -> Self {
        struct Nothing;
        impl crate::vmm::Hooks for Nothing {
            fn stop(&self) -> Result<()> {
                Ok(())
            }
            fn start(&self) -> Result<()> {
                Ok(())
            }
        }
        let vmm = crate::vmm::Vmm::new(Box::new(Nothing), Arc::default(), Arc::default(), crate::machine::NEW_GUEST);
        Self::new(Machine::new(vmm).unwrap())
    }
}
