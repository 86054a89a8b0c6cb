//! What this is and what it can do.

use serde_json::{Value, json};

use super::request::{self, Refusal};
use super::schema;
use super::shape::{Shape, list, may, must, words};
use super::table::{COMMANDS, Call, Outcome};

/// What `qmp_capabilities` takes.
pub fn takes_enable() -> Shape {
    Shape::Object(vec![may("enable", list(words(["oob"])))])
}

/// `qmp_capabilities`, where it is no longer asked for: a connection sees to the first one itself.
pub fn too_late(_: &mut Call<'_>) -> Outcome {
    Err(Refusal::not_found("Capabilities negotiation is already complete, command ignored"))
}

/// What `query-version` gives.
pub fn gives_version() -> Shape {
    let numbers = ["major", "minor", "micro"].map(|name| must(name, Shape::Int));
    Shape::Object(vec![must("qemu", Shape::Object(numbers.into())), must("package", Shape::Str)])
}

/// `query-version`.
pub fn version(_: &mut Call<'_>) -> Outcome {
    Ok(request::version())
}

/// What `query-commands` gives.
pub fn gives_names() -> Shape {
    list(Shape::Object(vec![must("name", Shape::Str)]))
}

/// `query-commands`.
pub fn commands(call: &mut Call<'_>) -> Outcome {
    let own = call.face.own_names();
    let names = COMMANDS.iter().map(|command| command.name).chain(own.iter().map(String::as_str));
    Ok(names.map(|name| json!({"name": name})).collect())
}

/// `query-qmp-schema`.
pub fn schema(call: &mut Call<'_>) -> Outcome {
    Ok(schema::all(&call.face.own_names()))
}

/// What `query-migrationthreads` gives.
pub fn gives_threads() -> Shape {
    list(Shape::Object(vec![must("name", Shape::Str), must("thread-id", Shape::Int)]))
}

/// `query-migrationthreads`: those of the library that are not QMP's own.
pub fn threads(call: &mut Call<'_>) -> Outcome {
    let all = call.face.machine.threads().list().into_iter();
    let migrating = all.filter(|(name, _)| !super::THREADS.contains(&name.as_str()));
    Ok(migrating.map(|(name, id)| json!({"name": name, "thread-id": id})).collect::<Vec<Value>>().into())
}
