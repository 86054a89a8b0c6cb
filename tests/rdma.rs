//! c-examples/rdma.c compiles and links where librdmacm's headers are, and says what is wrong where no device is. Its data
//! path is untested: that needs RDMA hardware.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::process::Command;

use common::{built, root, run, scratch, skip, try_run, words};

#[test]
fn the_example_compiles_and_says_what_is_wrong() {
    let header = Command::new("sh").args(["-c", "echo '#include <rdma/rsocket.h>' | cc -E - >/dev/null"]).output();
    if !header.is_ok_and(|out| out.status.success()) {
        let _ = skip("rdma", "librdmacm's headers are not installed");
        return;
    }
    let program = scratch("rdma").join("rdma");
    let mut cc = Command::new("cc");
    cc.current_dir(root()).args([
        "-std=c11",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-Iinclude",
    ]);
    cc.arg("-o").arg(&program).arg("c-examples/rdma.c").arg(built("lib/libvmig.a"));
    run(cc.args(["-lrdmacm", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-pthread"]));
    let out = try_run(Command::new("timeout").arg("60").arg(&program).args(["in", "rdma:nowhere"]));
    assert_eq!(out.status.code(), Some(1), "{}", words(&out));
    assert!(words(&out).contains("listening on rdma:nowhere: callback 'listen'"), "{}", words(&out));
}
