//! Streams of tests/streams cut everywhere and with bits flipped: no panic, an error with its place, and in the time that
//! the length of the stream allows. (Memory is limited in tests/inspect.rs, where the program runs.)

use std::fs;
use std::path::Path;

use serde_json::Value;
use vmig::error::Error;

use super::*;

/// Bytes of a stream around which nothing is left out: frames, names and devices, not the pages.
const EDGE: usize = 1200;

fn streams() -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/streams");
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut streams: Vec<_> = files
        .filter(|path| {
            path.extension().is_some_and(|e| e == "bin") && !path.display().to_string().contains("replies")
        })
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    streams.sort();
    assert!(streams.len() >= 8, "only {} streams", streams.len());
    streams
}

/// What is said of these bytes: the JSON, and the error.
fn inspect(bytes: &[u8]) -> (Vec<u8>, Option<Error>) {
    let mut out = Vec::new();
    let source = Source::new(Box::new(io::Cursor::new(bytes.to_vec())), 0);
    let result = print(source, Box::new(&mut out), true, "a stream", Description::find(bytes));
    (out, result.err())
}

fn json_of(out: &[u8]) -> Value {
    serde_json::from_slice(out).unwrap_or_else(|e| panic!("not JSON: {e}: {}", String::from_utf8_lossy(out)))
}

struct Rng(u64);

impl Rng {
    /// The seed of this run, which it prints: VMIG_SEED repeats it.
    fn new() -> Self {
        let clock = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let seed = std::env::var("VMIG_SEED").map_or_else(|_| clock(), |text| text.parse().unwrap());
        println!("VMIG_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// Points of a stream to harm: all of its edges, and some between.
fn points(rng: &mut Rng, len: usize, drawn: usize) -> Vec<usize> {
    let all = std::env::var("VMIG_ALL").is_ok_and(|v| v == "1");
    let edge = if all { 5 * EDGE } else { EDGE / 8 };
    let start = rng.below(EDGE);
    let mut points: Vec<_> =
        (0..edge).map(|n| start + n).chain((0..edge).map(|n| len.saturating_sub(n + 1))).collect();
    points.extend((0..if all { 20 * drawn } else { drawn }).map(|_| rng.below(len)));
    points.retain(|at| *at < len);
    points
}

#[test]
fn every_truncation_is_told_with_its_place() {
    let mut rng = Rng::new();
    for (name, bytes) in streams() {
        // The one that was cut while it was recorded ends with an error anyway.
        let whole = inspect(&bytes).1;
        assert_eq!(whole.is_some(), name.contains("lost"), "{name}: {whole:?}");
        let eof =
            json_of(&inspect(&bytes).0)["elements"].as_array().unwrap().iter().find(|e| e["kind"] == "eof").cloned();
        let eof = eof.and_then(|e| usize::try_from(e["at"].as_u64().unwrap()).ok());
        for len in points(&mut rng, bytes.len(), 40) {
            let (out, error) = inspect(&bytes[..len]);
            json_of(&out);
            // QEMU, too, takes a stream without a description for a whole one.
            if eof.is_some_and(|eof| len == eof + 1) {
                assert_eq!(error, None, "{name} cut at {len}");
                continue;
            }
            let error = error.unwrap_or_else(|| panic!("{name} cut at {len:#x} is called whole"));
            let at = error.place().byte.unwrap_or_else(|| panic!("{name} cut at {len:#x}: no place: {error}"));
            assert!(at <= len as u64, "{name} cut at {len:#x}: {error}");
        }
    }
}

#[test]
fn flipped_bits_never_panic() {
    let mut rng = Rng::new();
    let mut told = 0;
    for (name, mut bytes) in streams() {
        for at in points(&mut rng, bytes.len(), 40) {
            let bit = 1 << rng.below(8);
            bytes[at] ^= bit;
            let (out, error) = inspect(&bytes);
            json_of(&out);
            if let Some(error) = error {
                told += 1;
                let place = error.place().byte.unwrap_or_else(|| panic!("{name} byte {at:#x} bit {bit:#x}: {error}"));
                assert!(place <= bytes.len() as u64, "{name} byte {at:#x} bit {bit:#x}: {error}");
            }
            bytes[at] ^= bit;
        }
    }
    assert!(told > 100, "only {told} of these streams are called damaged");
}
