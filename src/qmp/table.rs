//! Every command of the library: its name, what it takes, what it gives, and who carries it out.

use std::os::fd::OwnedFd;

use serde_json::{Map, Value};

use super::request::Refusal;
use super::shape::{Shape, list, nothing};
use super::{Face, about, fds, migrate, rate, report, run, settings};

/// What a command leads to.
pub type Outcome = Result<Value, Refusal>;

/// One command.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// May be carried out while an earlier one still runs.
    pub oob: bool,
    /// A VMM with one thread carries it out on that thread, where it may wait and call back.
    pub home: bool,
    /// A client should not begin to use it.
    pub deprecated: bool,
    /// What it takes: an object.
    pub takes: fn() -> Shape,
    /// What it gives.
    pub gives: fn() -> Shape,
    /// Carries it out, with arguments that have the shape.
    pub run: fn(&mut Call<'_>) -> Outcome,
}

/// A command being carried out.
pub struct Call<'a> {
    /// The guest and what its clients share.
    pub face: &'a Face,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// A descriptor that came with it.
    pub fd: Option<OwnedFd>,
}

impl Call<'_> {
    /// An argument that is a text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.arguments.get(name)?.as_str()
    }

    /// An argument that is a whole number and not negative.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.arguments.get(name)?.as_u64()
    }

    /// An argument that is a switch; off if it is missing.
    pub fn flag(&self, name: &str) -> bool {
        self.arguments.get(name).is_some_and(|value| value == true)
    }
}

/// What a command returns that has nothing to say.
pub fn done() -> Outcome {
    Ok(Value::Object(Map::new()))
}

const fn command(
    name: &'static str,
    takes: fn() -> Shape,
    gives: fn() -> Shape,
    run: fn(&mut Call<'_>) -> Outcome,
) -> Command {
    Command { name, oob: false, home: false, deprecated: false, takes, gives, run }
}

const fn oob(command: Command) -> Command {
    Command { oob: true, ..command }
}

const fn home(command: Command) -> Command {
    Command { home: true, ..command }
}

/// All of them, by theme.
pub static COMMANDS: [Command; 32] = [
    command("qmp_capabilities", about::takes_enable, nothing, about::too_late),
    command("query-version", nothing, about::gives_version, about::version),
    command("query-commands", nothing, about::gives_names, about::commands),
    command("query-qmp-schema", nothing, || list(Shape::Any), about::schema),
    Command { deprecated: true, ..command("query-migrationthreads", nothing, about::gives_threads, about::threads) },
    command("query-status", nothing, run::gives_status, run::status),
    command("stop", nothing, nothing, run::stop),
    command("cont", nothing, nothing, run::cont),
    command("announce-self", run::takes_announce, nothing, run::announce),
    home(command("migrate", migrate::takes_migrate, nothing, migrate::migrate)),
    home(command("migrate-incoming", migrate::takes_incoming, nothing, migrate::incoming)),
    command("migrate_cancel", nothing, nothing, migrate::cancel),
    command("migrate-continue", migrate::takes_continue, nothing, migrate::go_on),
    oob(command("migrate-pause", nothing, nothing, migrate::pause)),
    oob(command("migrate-recover", migrate::takes_recover, nothing, migrate::recover)),
    command("migrate-start-postcopy", nothing, nothing, migrate::start_postcopy),
    home(command("vmig-resolve", migrate::takes_resolve, nothing, migrate::resolve)),
    command("query-migrate", nothing, report::gives, report::migrate),
    command("migrate-set-capabilities", settings::takes_capabilities, nothing, settings::set_capabilities),
    command("query-migrate-capabilities", nothing, settings::gives_capabilities, settings::capabilities),
    command("migrate-set-parameters", settings::takes_parameters, nothing, settings::set_parameters),
    command("query-migrate-parameters", nothing, settings::gives_parameters, settings::parameters),
    command("calc-dirty-rate", rate::takes_calc, nothing, rate::calc),
    command("query-dirty-rate", rate::takes_query, rate::gives_query, rate::query),
    command("set-vcpu-dirty-limit", rate::takes_limit, nothing, rate::set_limit),
    command("cancel-vcpu-dirty-limit", rate::takes_cancel, nothing, rate::cancel_limit),
    command("query-vcpu-dirty-limit", nothing, rate::gives_limits, rate::limits),
    command("getfd", fds::takes_name, nothing, fds::get),
    command("closefd", fds::takes_name, nothing, fds::close),
    command("add-fd", fds::takes_add, fds::gives_add, fds::add),
    command("remove-fd", fds::takes_remove, nothing, fds::remove),
    command("query-fdsets", nothing, fds::gives_sets, fds::sets),
];

/// The command of this name.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_arguments_are_objects() {
        for (i, command) in COMMANDS.iter().enumerate() {
            assert!(COMMANDS[..i].iter().all(|other| other.name != command.name), "{}", command.name);
            assert!(matches!((command.takes)(), Shape::Object(_)), "{}", command.name);
        }
    }
}
