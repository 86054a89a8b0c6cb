//! Migrations over connections of the VMM's own making; the VMM is `c_program("channel")`.

mod common;

use std::process::Command;

fn case(name: &str) {
    let mut command = Command::new("timeout");
    let out = common::run(command.args(["-k", "5", "120"]).arg(common::c_program("channel")).arg(name));
    let text = common::words(&out);
    assert!(text.ends_with(&format!("{name} done\n")), "{text}");
}

#[test]
fn a_guest_moves_over_one_connection_or_several() {
    case("moves");
}

#[test]
fn an_address_is_an_address_like_any_other() {
    case("address");
}

#[test]
fn a_connection_may_break_anywhere() {
    case("breaks");
}

#[test]
fn one_that_breaks_is_made_again() {
    case("resume");
}

#[test]
fn what_goes_wrong_is_told() {
    case("errors");
}

#[test]
fn nothing_is_left_whenever_the_guest_is_freed() {
    case("freed");
}
