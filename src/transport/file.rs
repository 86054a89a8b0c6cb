//! `file:`: the stream in a file, from an offset on. The file may be a descriptor of a numbered set (`/dev/fdset/N`).

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, OnceLock};

use super::channel::FdChannel;
use crate::error::{Error, Result};
use crate::sys::eventfd::Wake;

/// How the paths begin that are numbers of sets.
const SETS: &str = "/dev/fdset/";

/// Whoever keeps numbered sets of descriptors for a guest, as QMP's add-fd makes them.
pub trait KeepsFdSets: Send + Sync + std::fmt::Debug {
    /// A copy of a descriptor of this set that is open for writing, or else for reading.
    fn open(&self, set: u64, writing: bool) -> Result<OwnedFd>;
}

/// The numbered sets of a guest, once somebody keeps some.
#[derive(Clone, Debug, Default)]
pub struct FdSets(Arc<OnceLock<Arc<dyn KeepsFdSets>>>);

impl FdSets {
    /// From now on they are kept by this one; false: somebody does already.
    pub fn keep(&self, keeper: Arc<dyn KeepsFdSets>) -> bool {
        self.0.set(keeper).is_ok()
    }

    /// Refuses a path that is the number of a set where there are none, or no number.
    pub fn check(&self, path: &str) -> Result<()> {
        self.find(path).map(drop)
    }

    /// None: the path is a file's name.
    fn find(&self, path: &str) -> Result<Option<(&dyn KeepsFdSets, u64)>> {
        let Some(number) = path.strip_prefix(SETS) else { return Ok(None) };
        let Some(keeper) = self.0.get() else {
            let text = format!("'{path}': this guest has no fd sets; open the file yourself and take fd:NUMBER");
            return Err(Error::new(libc::ENOTSUP, text));
        };
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        let number = number.parse().ok().filter(|_| digits);
        let number = number.ok_or_else(|| Error::invalid(format!("'{path}' is not {SETS} and a number")))?;
        Ok(Some((&**keeper, number)))
    }
}

/// Opens `path` for writing from `offset` on. What stands before stays; what stands behind is gone.
pub fn create(path: &str, offset: u64, sets: &FdSets, wake: &Arc<Wake>) -> Result<FdChannel> {
    let failed = |e: std::io::Error| Error::from_io(format_args!("writing to file:{path}"), &e);
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600);
    let opened = open(path, &mut options, true, sets);
    let mut file = opened.map_err(|e| e.context(format_args!("writing to file:{path}")))?;
    if file.metadata().map_err(failed)?.is_file() {
        file.set_len(offset).map_err(failed)?;
    }
    seek(&mut file, offset).map_err(failed)?;
    FdChannel::new(OwnedFd::from(file), wake)
}

/// Opens `path` for reading from `offset` on.
pub fn read(path: &str, offset: u64, sets: &FdSets, wake: &Arc<Wake>) -> Result<FdChannel> {
    let failed = |e: std::io::Error| Error::from_io(format_args!("reading file:{path}"), &e);
    let opened = open(path, OpenOptions::new().read(true), false, sets);
    let mut file = opened.map_err(|e| e.context(format_args!("reading file:{path}")))?;
    seek(&mut file, offset).map_err(failed)?;
    FdChannel::new(OwnedFd::from(file), wake)
}

/// A file without an end to wait for: opening a FIFO would wait for its other end, and what it gives is no file.
fn open(path: &str, options: &mut OpenOptions, writing: bool, sets: &FdSets) -> Result<File> {
    if let Some((keeper, set)) = sets.find(path)? {
        return keeper.open(set, writing).map(File::from);
    }
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
    match file.seek(SeekFrom::Start(offset)) {
        // What cannot be sought, such as a terminal, needs not be.
        Err(_) if offset == 0 => Ok(()),
        sought => sought.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl KeepsFdSets for Nobody {
        fn open(&self, set: u64, writing: bool) -> Result<OwnedFd> {
            Err(Error::new(libc::EBADF, format!("set {set}, {writing}")))
        }
    }

    #[test]
    fn a_set_is_asked_for_by_number_and_only_where_there_are_sets() {
        let (sets, wake) = (FdSets::default(), Arc::new(Wake::new().unwrap()));
        assert!(sets.check("/dev/fdset").is_ok(), "a file's name");
        assert_eq!(sets.check("/dev/fdset/3").unwrap_err().errno(), libc::ENOTSUP);
        assert!(sets.keep(Arc::new(Nobody)) && !sets.keep(Arc::new(Nobody)));
        for bad in ["", "x", "-1", "+1", "3x", "18446744073709551616"] {
            assert_eq!(sets.check(&format!("/dev/fdset/{bad}")).unwrap_err().errno(), libc::EINVAL, "{bad}");
        }
        let error = create("/dev/fdset/3", 0, &sets, &wake).unwrap_err();
        assert_eq!((error.errno(), error.text()), (libc::EBADF, "writing to file:/dev/fdset/3: set 3, true"));
        assert!(read("/dev/fdset/3", 0, &sets, &wake).unwrap_err().text().ends_with("set 3, false"));
    }
}
