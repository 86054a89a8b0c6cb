//! Writes the man pages from the header, the pages of options and of the tool, and the README, which tests compare with the sources:
//! a page for each chapter of the header, links to it for each function and type, vmig(7), vmig-options(7), and vmig(1).
//!
//! It has no dependencies: `make` compiles it with rustc alone. tests/man.rs uses its modules, too.

pub(crate) mod header;
pub(crate) mod options;
pub(crate) mod overview;
pub(crate) mod pages;
pub(crate) mod prose;
pub(crate) mod roff;
pub(crate) mod tool;

use std::{env, fs, path::Path, process::ExitCode};

const USAGE: &str = "usage: pages DIRECTORY VERSION DATE (in the project's own directory)";

fn main() -> ExitCode {
    match write() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("man pages: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Into an empty directory: man1, man3 and man7, all pages.
fn write() -> Result<(), String> {
    let [directory, version, date] = &env::args().skip(1).collect::<Vec<_>>()[..] else { return Err(USAGE.into()) };
    let read = |file: &str| fs::read_to_string(file).map_err(|e| format!("{file}: {e}"));
    let (header, options) = (read("include/vmig.h")?, read("docs/options.md")?);
    let (readme, tool) = (read("README.md")?, read("docs/tool.md")?);
    let texts = pages::Texts { header: &header, options: &options, readme: &readme, tool: &tool };
    let stamp = roff::Stamp { version, date };
    for (name, text) in pages::all(&texts, &stamp)? {
        let path = Path::new(directory).join(name);
        let made = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, text));
        made.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
