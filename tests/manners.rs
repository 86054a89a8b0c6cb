//! A polite guest in the process: nothing is left behind, nothing of the VMM's is touched.

mod common;

use std::process::Command;

fn case(args: &[&str]) {
    let out =
        common::run(Command::new("timeout").args(["-k", "5", "240"]).arg(common::c_program("manners")).args(args));
    let text = common::words(&out);
    println!("{text}");
    assert!(text.ends_with(&format!("{} done\n", args[0])), "{text}");
}

#[test]
fn nothing_is_left_behind_and_nothing_is_touched() {
    case(&["leaves-nothing", "140"]);
}

#[test]
fn no_command_is_left() {
    case(&["commands"]);
}

#[test]
fn no_sigpipe_when_the_reader_leaves() {
    case(&["sigpipe"]);
}

#[test]
fn several_guests_share_nothing() {
    case(&["several"]);
}
