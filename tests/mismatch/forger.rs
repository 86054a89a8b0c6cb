//! Somebody between source and destination who changes the hello, and passes everything else on.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use serde_json::Value;

pub(crate) struct Forger {
    /// Where the source connects.
    pub(crate) uri: String,
}

impl Forger {
    /// In front of `destination`, for one connection.
    pub(crate) fn new(destination: &str, change: fn(&mut Value)) -> Forger {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let there = destination.strip_prefix("tcp:").unwrap().to_owned();
        std::thread::spawn(move || {
            let (mut source, _) = listener.accept().unwrap();
            let mut destination = TcpStream::connect(there).unwrap();
            let mut head = [0; 12];
            source.read_exact(&mut head).unwrap();
            let mut json = vec![0; u32::from_be_bytes(head[8..].try_into().unwrap()) as usize];
            source.read_exact(&mut json).unwrap();
            let mut hello: Value = serde_json::from_slice(&json).unwrap();
            change(&mut hello);
            let json = hello.to_string();
            head[8..].copy_from_slice(&u32::try_from(json.len()).unwrap().to_be_bytes());
            destination.write_all(&[&head[..], json.as_bytes()].concat()).unwrap();
            let back = (destination.try_clone().unwrap(), source.try_clone().unwrap());
            std::thread::spawn(move || pass(back.0, back.1));
            pass(source, destination);
        });
        Forger { uri }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
