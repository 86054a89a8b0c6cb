//! Order, names, ids and reasons.

use std::sync::Arc;

use super::list::{BLOCKERS_MAX, Bindings, Content, Entry, SectionList};
use super::{Apply, Part, Section};
use crate::error::{Error, Result};
use crate::wire::input::Input;

/// A section that is only ever looked up.
struct Still;

impl Section for Still {
    fn complete(&self, _: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }
    fn parse<'a>(&'a self, _: Part, _: u32, _: &mut dyn Input) -> Result<Apply<'a>> {
        Ok(Box::new(|| Ok(())))
    }
}

fn entry(name: &str, instance: u32) -> Entry {
    Entry::new(name, instance, 1, Content::State(Arc::new(Still)))
}

fn names(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|e| format!("{}{}:{}", e.name, e.instance, e.id)).collect()
}

#[test]
fn order_is_priority_then_registration_and_ids_count_registrations() {
    let list = SectionList::new();
    for (count, (name, priority)) in [("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5)].into_iter().enumerate() {
        assert_eq!(list.snapshot().len(), count);
        list.add(Entry { priority, ..entry(name, 0) }).unwrap();
    }
    assert_eq!(names(&list.snapshot()), ["b0:1", "e0:4", "a0:0", "c0:2", "d0:3"]);
}

#[test]
fn name_and_instance_are_unique_together() {
    let list = SectionList::new();
    list.add(entry("a", 0)).unwrap();
    list.add(entry("a", 1)).unwrap();
    let error = list.add(entry("a", 1)).unwrap_err();
    assert_eq!((error.errno(), error.place().section.as_deref()), (libc::EEXIST, Some("a")));
    assert_eq!(list.add(entry("", 0)).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(list.add(entry(&"x".repeat(256), 0)).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(list.add(Entry { oldest: 2, ..entry("b", 0) }).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(names(&list.snapshot()), ["a0:0", "a1:1"]);
}

#[test]
fn removal_takes_all_of_a_pointer_and_leaves_snapshots_alone() {
    let list = SectionList::new();
    for (instance, key) in [(0, 7), (1, 8), (2, 7)] {
        list.add(Entry { key, ..entry("a", instance) }).unwrap();
    }
    list.add(entry("fixed", 0)).unwrap();
    let before = list.snapshot();
    assert_eq!(names(&list.remove(7).unwrap()), ["a0:0", "a2:2"]);
    assert_eq!(names(&list.snapshot()), ["a1:1", "fixed0:3"]);
    assert_eq!(before.len(), 4);
    assert_eq!(list.remove(7).unwrap_err().errno(), libc::ENOENT);
    assert_eq!(names(&list.snapshot()), ["a1:1", "fixed0:3"], "a failed removal removes nothing");
    assert_eq!(list.remove(0).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(list.add(entry("a", 0)).unwrap(), 4, "ids are not used again");
}

fn bindings() -> Bindings {
    let list = SectionList::new();
    list.add(Entry { version: 4, oldest: 2, ..entry("ram", 0) }).unwrap();
    list.add(entry("uart", 3)).unwrap();
    list.add(Entry::new("rng", 0, 1, Content::None)).unwrap();
    Bindings::new(list.snapshot())
}

fn said<T>(result: Result<T>) -> Error {
    let error = result.err().expect("must be refused");
    assert_eq!(error.errno(), libc::EINVAL);
    error
}

#[test]
fn unknown_sections_and_versions_are_refused_by_name_and_number() {
    let mut bindings = bindings();
    let text = said(bindings.bind(1, "usb", 0, 1)).to_string();
    assert!(text.contains("unknown section 'usb' instance 0"), "{text}");
    let text = said(bindings.bind(1, "uart", 0, 1)).to_string();
    assert!(text.contains("unknown instance 0 of section 'uart'") && text.contains("instance 3"), "{text}");
    let text = said(bindings.bind(1, "ram", 0, 5)).to_string();
    assert!(text.contains("version 5 of 'ram' is newer than version 4"), "{text}");
    let text = said(bindings.bind(1, "ram", 0, 1)).to_string();
    assert!(text.contains("version 1 of 'ram' is older than version 2"), "{text}");
    assert!(said(bindings.bind(1, "rng", 0, 1)).to_string().contains("declared without state"));
    assert!(said(bindings.find(1)).to_string().contains("section id 1 was not introduced"), "nothing was bound");
}

#[test]
fn ids_of_the_stream_lead_to_their_section() {
    let mut bindings = bindings();
    bindings.bind(1000, "ram", 0, 3).unwrap();
    bindings.bind(7, "uart", 3, 1).unwrap();
    let found = |b: &Bindings, id| b.find(id).map(|(entry, _, version)| (entry.name.clone(), version)).ok();
    assert_eq!(found(&bindings, 1000), Some(("ram".into(), 3)));
    assert_eq!(found(&bindings, 7), Some(("uart".into(), 1)));
    assert_eq!(found(&bindings, 0), None);
    bindings.bind(1000, "uart", 3, 1).unwrap();
    assert_eq!(found(&bindings, 1000), Some(("ram".into(), 3)), "of two with one id the first in order");
    assert_eq!(found(&bindings, 7), None, "an entry has the id it was given last");
}

#[test]
fn reasons_not_to_migrate_come_and_go() {
    let list = SectionList::new();
    list.check_unblocked().unwrap();
    let (first, second) = (list.block("vfio 0000:01:00.0").unwrap(), list.block("a tap is open").unwrap());
    assert!(first > 0 && second > first);
    let error = list.check_unblocked().unwrap_err();
    assert_eq!(
        (error.errno(), error.text()),
        (libc::EBUSY, "migration is blocked: vfio 0000:01:00.0; a tap is open")
    );
    list.unblock(first).unwrap();
    assert_eq!(list.blockers().iter().map(|b| b.id).collect::<Vec<_>>(), [second]);
    assert_eq!(list.unblock(first).unwrap_err().errno(), libc::ENOENT);
    for reason in ["".to_owned(), "x".repeat(1025)] {
        assert_eq!(list.block(&reason).unwrap_err().errno(), libc::EINVAL);
    }
    for _ in 1..BLOCKERS_MAX {
        list.block("more").unwrap();
    }
    assert_eq!(list.block("too many").unwrap_err().errno(), libc::ENOSPC);
}
