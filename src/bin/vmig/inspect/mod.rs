//! `vmig inspect`: walks a stream by the library's own readers and prints what is there.

mod device;
mod memory;
mod opening;
mod walk;

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use vmig::error::{Error, Result};

use crate::printer::{Fact, Printer};
use crate::source::Source;
use device::Description;
use walk::Walk;

/// What is asked for.
#[derive(Default)]
pub(crate) struct Request {
    /// `-` is the standard input.
    pub(crate) file: PathBuf,
    /// One JSON document instead of a tree.
    pub(crate) json: bool,
    /// Where in the file the stream begins.
    pub(crate) offset: u64,
    /// Whose description of devices to take.
    pub(crate) description: Option<PathBuf>,
}

/// Prints the stream. The error says what is wrong with it, and where.
pub(crate) fn run(request: &Request) -> std::result::Result<(), String> {
    let name = request.file.display().to_string();
    let lent = match &request.description {
        Some(path) => Some(description_of(path).map_err(|e| format!("{}: {e}", path.display()))?),
        None => None,
    };
    let (source, description) = open(request).map_err(|e| format!("{name}: {e}"))?;
    let out = Box::new(BufWriter::new(io::stdout().lock()));
    match print(source, out, request.json, &name, lent.or(description)) {
        // A reader of the output that is gone wants no more of it.
        Err(error) if error.errno() == libc::EPIPE => Ok(()),
        // The text names the byte that it is about.
        Err(error) if error.text().contains("byte 0x") => Err(format!("{name}: {error}")),
        Err(error) => Err(format!("{name}: byte {:#x}: {error}", error.place().byte.unwrap_or(0))),
        Ok(()) => Ok(()),
    }
}

/// The same into `out`. Every error says at which byte.
fn print<'a>(
    source: Source,
    out: Box<dyn Write + 'a>,
    json: bool,
    name: &str,
    description: Option<Description>,
) -> Result<()> {
    let mut walk = Walk::new(source, printed(Printer::new(out, json, name))?, description);
    let found = walk.stream();
    let at = walk.position();
    let summary = walk.summary();
    let found = found.map_err(|error| error.at_byte(at));
    let mut facts = vec![("memory", Fact::Value(summary)), ("ok", Fact::Value(found.is_ok().into()))];
    facts.extend(found.as_ref().err().map(|error| ("error", Fact::Value(error.to_json()))));
    found.and(printed(walk.into_printer().end(&facts)))
}

/// The bytes, and where the end of them can be looked at first the description found there.
fn open(request: &Request) -> Result<(Source, Option<Description>)> {
    if request.file == Path::new("-") {
        let mut source = Source::new(Box::new(io::stdin().lock()), 0);
        source.skip(request.offset)?;
        return Ok((source, None));
    }
    let mut file = File::open(&request.file).map_err(|e| Error::from_io("cannot open it", &e))?;
    let description = if file.metadata().is_ok_and(|m| m.is_file()) { at_the_end(&mut file)? } else { None };
    if request.offset > 0 {
        let sought = file.seek(SeekFrom::Start(request.offset));
        sought.map_err(|e| Error::from_io(format_args!("going to byte {:#x}", request.offset), &e))?;
    }
    Ok((Source::new(Box::new(file), request.offset), description))
}

/// The description at the end of a file, if there is one; leaves the file at its start.
fn at_the_end(file: &mut File) -> Result<Option<Description>> {
    let error = |e: &io::Error| Error::from_io("looking at its end", e);
    let end = file.seek(SeekFrom::End(0)).map_err(|e| error(&e))?;
    let tail = end.min(device::DESCRIPTION_MAX as u64 + 5);
    file.seek(SeekFrom::Start(end - tail)).map_err(|e| error(&e))?;
    let mut bytes = Vec::new();
    let len = usize::try_from(tail).unwrap_or(usize::MAX);
    bytes.try_reserve_exact(len).map_err(|_| Error::no_memory("the end of the file", tail))?;
    file.take(tail).read_to_end(&mut bytes).map_err(|e| error(&e))?;
    file.seek(SeekFrom::Start(0)).map_err(|e| error(&e))?;
    Ok(Description::find(&bytes))
}

fn description_of(path: &Path) -> std::result::Result<Description, String> {
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    let found = at_the_end(&mut file).map_err(|e| e.to_string())?;
    found.ok_or_else(|| "there is no description of devices at its end".to_owned())
}

/// Output that does not go out ends the walk as a damaged stream does.
fn printed<T>(result: io::Result<T>) -> Result<T> {
    result.map_err(|e| Error::from_io("printing", &e))
}

/// Where everything is printed to.
type Out<'a> = Printer<Box<dyn Write + 'a>>;

#[cfg(test)]
mod tests;

/// A list of texts as a fact.
fn texts<'a>(list: impl IntoIterator<Item = &'a str>) -> Fact {
    Fact::Value(list.into_iter().map(Value::from).collect())
}
