//! The tool `vmig`: looks into streams, draws what the library wrote while it migrated, and speaks QMP.

mod inspect;
mod printer;
mod qmp;
mod report;
mod source;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};

const USAGE: &str = "\
usage: vmig inspect [--json] [--offset N] [--description FILE] FILE|-
       vmig report [-o PAGE] TRACE|-
       vmig qmp [--wait] [--timeout SECONDS] SOCKET [COMMAND [KEY=VALUE...]]
       vmig --help | --version

inspect   prints a migration stream, of vmig or of QEMU 10.0, as a tree: sections, guest memory in numbers, the
          fields of devices as the stream describes them. For a damaged one it says where and what is wrong.
            --json              one JSON document instead of a tree
            --offset N          the stream begins at byte N of the file (file:PATH,offset=N)
            --description FILE  take the description of devices from another stream of the same machine; one of a
                                postcopy migration has none of its own

report    draws what the library wrote to its option trace-file as one HTML page that needs nothing from elsewhere
            -o PAGE, --output PAGE   where to; without it the page goes to the standard output

qmp       speaks with the QMP server at SOCKET, a VMM's or a QEMU's: a path, unix:PATH or tcp:HOST:PORT. Without a command it
          reads lines: COMMAND KEY=VALUE..., JSON as it is, help [COMMAND], wait, exit. Values are JSON if they look it;
          A.B=VALUE is a member of an object. Events are printed as they come, and while a migration runs how far it is.
            wait, --wait        follow the migration to its end; it must be a good one
            --timeout SECONDS   how long an answer may take (60)

Exit status: 0 all is well; 1 the stream is damaged, a file could not be read or written, a command of QMP was refused, or the
migration that was waited for did not complete; 2 the command line makes no sense.
";

/// Seconds that an answer over QMP may take.
const QMP_TIMEOUT: u64 = 60;
const NO_FILE: &str = "a file is missing; - is the standard input";

/// What the command line asks for.
enum Command {
    Say(String),
    Inspect(inspect::Request),
    Report(report::Request),
    Qmp(qmp::Request),
}

fn main() -> ExitCode {
    let command = match parse(Parser::from_env()) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("vmig: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = match command {
        // A reader that is gone wants no more of it.
        Command::Say(text) => std::io::stdout().write_all(text.as_bytes()).map_err(|e| e.to_string()),
        Command::Inspect(request) => inspect::run(&request),
        Command::Report(request) => report::run(&request),
        Command::Qmp(request) => qmp::run(&request),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmig: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut args: Parser) -> Result<Command, lexopt::Error> {
    let Some(arg) = args.next()? else { return Err("a command is missing".into()) };
    match arg {
        Arg::Long("help") | Arg::Short('h') => Ok(Command::Say(USAGE.to_owned())),
        Arg::Long("version") | Arg::Short('V') => Ok(Command::Say(format!("vmig {}\n", env!("CARGO_PKG_VERSION")))),
        Arg::Value(name) if name == "inspect" => parse_inspect(args).map(Command::Inspect),
        Arg::Value(name) if name == "report" => parse_report(args).map(Command::Report),
        Arg::Value(name) if name == "qmp" => parse_qmp(args).map(Command::Qmp),
        Arg::Value(name) => Err(format!("there is no command '{}'", name.to_string_lossy()).into()),
        other => Err(other.unexpected()),
    }
}

fn parse_inspect(mut args: Parser) -> Result<inspect::Request, lexopt::Error> {
    let (mut file, mut request) = (None, inspect::Request::default());
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Long("json") => request.json = true,
            Arg::Long("offset") => request.offset = number(&args.value()?)?,
            Arg::Long("description") => request.description = Some(args.value()?.into()),
            Arg::Value(value) if file.is_none() => file = Some(PathBuf::from(value)),
            other => return Err(other.unexpected()),
        }
    }
    request.file = file.ok_or(NO_FILE)?;
    Ok(request)
}

fn parse_report(mut args: Parser) -> Result<report::Request, lexopt::Error> {
    let (mut file, mut request) = (None, report::Request::default());
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Short('o') | Arg::Long("output") => request.out = Some(args.value()?.into()),
            Arg::Value(value) if file.is_none() => file = Some(PathBuf::from(value)),
            other => return Err(other.unexpected()),
        }
    }
    request.file = file.ok_or(NO_FILE)?;
    Ok(request)
}

/// Options stand before the socket: behind it everything is the server's.
fn parse_qmp(mut args: Parser) -> Result<qmp::Request, lexopt::Error> {
    let (mut wait, mut secs) = (false, QMP_TIMEOUT);
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Long("wait") => wait = true,
            Arg::Long("timeout") => secs = number(&args.value()?)?,
            Arg::Value(address) => {
                let address = address.string()?;
                let words = args.raw_args()?.map(|word| word.string()).collect::<Result<_, _>>()?;
                return Ok(qmp::Request {
                    address,
                    words,
                    wait,
                    timeout: Duration::from_secs(secs.clamp(1, 86_400)),
                });
            }
            other => return Err(other.unexpected()),
        }
    }
    Err("a socket is missing: a path, unix:PATH or tcp:HOST:PORT".into())
}

/// A number, decimal or after `0x`.
fn number(text: &OsString) -> Result<u64, lexopt::Error> {
    text.parse_with(|text| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    })
}
