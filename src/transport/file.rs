//! `file:`: the stream in a file, from an offset on.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use super::channel::FdChannel;
use crate::error::{Error, Result};
use crate::sys::eventfd::Wake;

/// Opens `path` for writing from `offset` on. What stands before stays; what stands behind is gone.
pub fn create(path: &str, offset: u64, wake: &Arc<Wake>) -> Result<FdChannel> {
    let failed = |e: std::io::Error| Error::from_io(format_args!("writing to file:{path}"), &e);
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600);
    let mut file = open(path, &mut options).map_err(|e| e.context(format_args!("writing to file:{path}")))?;
    if file.metadata().map_err(failed)?.is_file() {
        file.set_len(offset).map_err(failed)?;
    }
    seek(&mut file, offset).map_err(failed)?;
    FdChannel::new(OwnedFd::from(file), wake)
}

/// Opens `path` for reading from `offset` on.
pub fn read(path: &str, offset: u64, wake: &Arc<Wake>) -> Result<FdChannel> {
    let failed = |e: std::io::Error| Error::from_io(format_args!("reading file:{path}"), &e);
    let mut file =
        open(path, OpenOptions::new().read(true)).map_err(|e| e.context(format_args!("reading file:{path}")))?;
    seek(&mut file, offset).map_err(failed)?;
    FdChannel::new(OwnedFd::from(file), wake)
}

/// A file without an end to wait for: opening a FIFO would wait for its other end, and what it gives is no file.
fn open(path: &str, options: &mut OpenOptions) -> Result<File> {
    let failed = |e: std::io::Error| Error::from_io("open", &e);
    let pipe = || Error::invalid("this is a pipe, not a file: open it yourself and take fd:NUMBER");
    // Opening a FIFO to write, without waiting, fails where nobody reads.
    if std::fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo()) {
        return Err(pipe());
    }
    let file = options.custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    match file.metadata().map_err(failed)?.file_type() {
        kind if kind.is_fifo() => Err(pipe()),
        kind if kind.is_dir() => Err(Error::from_io("open", &std::io::Error::from_raw_os_error(libc::EISDIR))),
        _ => Ok(file),
    }
}

fn seek(file: &mut File, offset: u64) -> std::io::Result<()> {
    match offset {
        // What cannot be sought, such as /dev/null, needs not be.
        0 => Ok(()),
        _ => file.seek(SeekFrom::Start(offset)).map(drop),
    }
}
