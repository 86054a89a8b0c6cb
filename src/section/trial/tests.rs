use std::sync::Arc;

use super::faults::{Faults, Moment, moments};
use crate::section::codec::{marks, save};
use crate::section::codec_tests::with_count;
use crate::section::table::{Count, Kind, Table};

#[test]
#[allow(unsafe_code, reason = "the device is an array of the test")]
fn fields_are_where_the_marks_say() {
    let inner = Arc::new(Table::new("lane", 1).with("credit", Kind::Unsigned(2), 0));
    let mut table = Table::new("dev", 1).with("a", Kind::Unsigned(4), 0).with("gap", Kind::Unused(3), 0);
    table.fields.push(with_count("lane", Kind::Struct(inner, 2), Count::Fixed(2), 4));
    table.parts.push(Arc::new(Table::new("dev/more", 1).with("b", Kind::Unsigned(1), 8)));
    let table = table.checked().unwrap();
    let (mut device, mut body) = ([1u8; 9], Vec::new());
    // SAFETY: the array is as large as the table's extent.
    unsafe { save(&table, device.as_mut_ptr(), &mut body) }.unwrap();
    let found = marks(&table, &body).unwrap();
    let found: Vec<(u64, &str, bool)> = found.iter().map(|m| (m.at, m.name.as_str(), m.unused)).collect();
    let header = "the header of a part of 'dev'";
    let wanted = [
        (0, "a", false),
        (4, "gap", true),
        (7, "lane[0].credit", false),
        (9, "lane[1].credit", false),
        (11, header, false),
        (25, "b", false),
    ];
    assert_eq!((found.as_slice(), body.len()), (wanted.as_slice(), 26));
}

#[test]
fn the_call_that_is_to_fail_fails_where_it_should() {
    let faults = Faults::default();
    let mut done = 0;
    let mut call = || {
        faults.around("device 'x'", "load", || {
            done += 1;
            Ok(())
        })
    };
    faults.arm(Some((1, Moment::Start)));
    assert!(call().is_ok() && call().unwrap_err().text().contains("load of device 'x' failed") && call().is_ok());
    faults.arm(Some((0, Moment::End)));
    assert!(call().is_err() && call().is_ok());
    assert_eq!((faults.count(), faults.made().len(), done), (2, 2, 4));
    assert_eq!((moments("pre_save"), moments("post_save")), ([Moment::Start].as_slice(), [Moment::End].as_slice()));
}
