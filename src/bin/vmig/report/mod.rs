//! `vmig report`: draws what option `trace-file` wrote as one page that needs nothing but itself.

mod chart;
mod page;
mod trace;

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// What is asked for.
#[derive(Default)]
pub(crate) struct Request {
    /// `-` is the standard input.
    pub(crate) file: PathBuf,
    /// Where the page goes; the standard output without it.
    pub(crate) out: Option<PathBuf>,
}

/// Makes the page.
pub(crate) fn run(request: &Request) -> Result<(), String> {
    let name = request.file.display().to_string();
    let reader: Box<dyn Read> = match request.file == Path::new("-") {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(&request.file).map_err(|e| format!("{name}: {e}"))?),
    };
    let trace = trace::read(BufReader::new(reader)).map_err(|e| format!("{name}: {e}"))?;
    if trace.runs.is_empty() {
        return Err(format!(
            "{name}: there is no migration in it; option 'trace-file' of the library writes such files"
        ));
    }
    let page = page::page(&trace);
    match &request.out {
        Some(path) => std::fs::write(path, page).map_err(|e| format!("{}: {e}", path.display())),
        None => match io::stdout().write_all(page.as_bytes()) {
            // A reader that is gone wants no more of it.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.map_err(|e| e.to_string()),
        },
    }
}
