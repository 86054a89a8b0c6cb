//! Comparing what the source says in its hello with what is here, all of it, before anything is touched.
//!
//! What this side has more of is no difference where the guest cannot notice: room in arrays, parts of devices, MSRs,
//! capabilities. Everything else must be the same.

use std::collections::{HashMap, HashSet};

use super::Job;
use super::hand::Hand;
use super::verify;
use crate::error::Error;
use crate::options::{FEATURES, Opt};
use crate::ram::survey::Survey;
use crate::ram::{PAGE, RamList};
use crate::section::list::Entry;
use crate::section::shape;
use crate::transport::Channel;
use crate::wire::checksum;
use crate::wire::hello::{Device, Hello};
use crate::wire::packet;

/// Fields of a device that are named; more would drown the other differences.
const FIELDS_NAMED_MAX: usize = 32;

/// Everything that differs between the two sides.
pub(super) fn everything(theirs: &Hello, job: &Job, channel: &dyn Channel, hand: &mut Hand<'_>) -> Vec<Error> {
    let mut found = Vec::new();
    features(theirs, job, &mut found);
    hand.compare(theirs, channel, &mut found);
    machine(theirs, job, &mut found);
    checksum(theirs, job, &mut found);
    verify::compare(theirs, job, &mut found);
    // A destination that would build itself has nothing to compare before it has.
    if !(theirs.check && theirs.config.is_some() && job.vmm.has_config()) {
        ram(theirs, &job.ram, hand, &mut found);
        sections(theirs, job, &mut found);
        cpu(theirs, job, &mut found);
    }
    found.into_iter().map(|e| e.on_side("destination").in_phase("hello")).collect()
}

fn features(theirs: &Hello, job: &Job, found: &mut Vec<Error>) {
    for name in &theirs.needs {
        let refused = |errno, text: String| Error::new(errno, text).in_section("features").in_field(name);
        if !FEATURES.contains(&name.as_str()) {
            let text = format!("the source needs feature '{name}', which this destination does not know");
            found.push(refused(libc::ENOTSUP, text).differs("needed", "unknown"));
        } else if !job.options.allows(name) {
            let text = format!(
                "the source needs feature '{name}', which the destination does not allow (option 'allow-features' there)"
            );
            found.push(refused(libc::EPERM, text).differs("needed", "not allowed"));
        }
    }
}

fn machine(theirs: &Hello, job: &Job, found: &mut Vec<Error>) {
    let machine = job.options.machine();
    if theirs.machine != machine {
        let text = "option 'machine' differs between source and destination";
        found.push(Error::invalid(text).differs(&theirs.machine, machine));
    }
    if theirs.page_size != PAGE {
        let text = "the two sides have pages of different sizes";
        found.push(Error::invalid(text).in_section("ram").in_field("page-size").differs(theirs.page_size, PAGE));
    }
    if theirs.channels > packet::CHANNELS_MAX {
        let text = "the source wants more channels than the destination allows";
        let most = format!("at most {}", packet::CHANNELS_MAX);
        found.push(Error::invalid(text).differs(theirs.channels, most));
    }
}

/// The source decides whether there are checksums, but a destination may insist.
fn checksum(theirs: &Hello, job: &Job, found: &mut Vec<Error>) {
    let got = theirs.checksum.as_deref().unwrap_or("none");
    let text = match got {
        checksum::NAME => return,
        "none" if !job.options.on(Opt::Checksum) => return,
        "none" => "option 'checksum' is set at the destination: set it at the source, too",
        _ => "the destination does not know the checksum that the source wants",
    };
    let error = Error::invalid(text).in_section("features").in_field(Opt::Checksum.name());
    found.push(error.by_option(Opt::Checksum.name()).differs(got, checksum::NAME));
}

fn ram(theirs: &Hello, ram: &RamList, hand: &Hand<'_>, found: &mut Vec<Error>) {
    let ours: HashMap<&str, u64> = ram.iter().filter(|b| b.is_sent()).map(|b| (b.name(), b.len())).collect();
    let mut named = HashSet::new();
    let error = |errno, name: &str, text: String| Error::new(errno, text).in_section("ram").in_field(name);
    for (name, len) in &theirs.blocks {
        if !named.insert(name.as_str()) {
            found.push(error(libc::EPROTO, name, format!("the source names RAM block '{name}' twice")));
            continue;
        }
        match ours.get(name.as_str()) {
            None => {
                let text = format!("the source has a RAM block '{name}', the destination does not");
                found.push(error(libc::ENOENT, name, text).differs(format!("{len:#x} bytes"), "missing"));
            }
            Some(here) if here != len => {
                let text = format!("RAM block '{name}' has different lengths on the two sides");
                let bytes = |len: u64| format!("{len:#x} bytes");
                found.push(error(libc::EINVAL, name, text).differs(bytes(*len), bytes(*here)));
            }
            Some(_) => (),
        }
    }
    let survey = Survey::new();
    for block in ram.iter().filter(|b| b.is_sent()) {
        let shared = |survey: &Survey| survey.identities(block).iter().any(|name| theirs.memory.contains(name));
        // Memory that changes hands may well have been here before.
        if !hand.takes(block) && survey.as_ref().is_ok_and(shared) {
            let text = format!(
                "RAM block '{}' is the same memory on both sides: map another file at the destination, or set \
                 VMIG_RAM_SHARED_STORAGE on both",
                block.name()
            );
            found.push(error(libc::EEXIST, block.name(), text));
        }
        if !named.contains(block.name()) {
            let text = format!("the destination has a RAM block '{}', the source does not", block.name());
            let here = format!("{:#x} bytes", block.len());
            found.push(error(libc::ENOENT, block.name(), text).differs("missing", here));
        }
    }
}

fn sections(theirs: &Hello, job: &Job, found: &mut Vec<Error>) {
    let is_active = |e: &&Entry| e.section().is_some_and(|s| s.is_active());
    let ask = || Ok(job.sections.iter().filter(is_active).collect::<Vec<_>>());
    let active = match job.vmm.dispatch().run("the sections' is_active", ask) {
        Ok(active) => active,
        Err(error) => return found.push(error),
    };
    let ours: HashMap<(&str, u32), &Entry> = active.iter().map(|e| ((e.name.as_str(), e.instance), *e)).collect();
    let mut named = HashSet::new();
    for device in &theirs.sections {
        let (name, instance) = (device.name.name.as_str(), device.name.instance);
        if !named.insert((name, instance)) {
            let text = format!("the source names device '{name}' (instance {instance}) twice");
            found.push(Error::new(libc::EPROTO, text).in_section(name));
            continue;
        }
        match ours.get(&(name, instance)) {
            None => {
                let text =
                    format!("the source has a device '{name}' (instance {instance}), the destination does not");
                let theirs = format!("version {}", device.name.version);
                found.push(Error::new(libc::ENOENT, text).in_section(name).differs(theirs, "missing"));
            }
            Some(entry) => section(device, entry, found),
        }
    }
    let mut missing: Vec<_> = ours.values().filter(|e| !named.contains(&(e.name.as_str(), e.instance))).collect();
    missing.sort_by_key(|entry| entry.id);
    for entry in missing {
        let (name, instance) = (&entry.name, entry.instance);
        let text = format!("the destination has a device '{name}' (instance {instance}), the source does not");
        let here = format!("version {}", entry.version);
        found.push(Error::new(libc::ENOENT, text).in_section(name).differs("missing", here));
    }
}

/// A device that both sides have.
fn section(theirs: &Device, entry: &Entry, found: &mut Vec<Error>) {
    let (name, instance, version) = (&entry.name, entry.instance, theirs.name.version);
    let device = format!("device '{name}' (instance {instance})");
    if version > entry.version || version < entry.oldest {
        let newer = match version > entry.version {
            true => "newer than the destination can read",
            false => "older than the destination can read",
        };
        let here = format!("{} to {}", entry.oldest, entry.version);
        let text = format!("the version of {device} is {newer}");
        found.push(Error::invalid(text).in_section(name).in_field("version").differs(version, here));
        return;
    }
    if !same_fds(entry, version, &theirs.fds, found) {
        return;
    }
    let ours = entry.section().map_or_else(Vec::new, |section| section.shape(version, Some(&theirs.shape)));
    if theirs.shape.is_empty() || ours.is_empty() {
        // A section of the VMM's own code says nothing of its body.
        return;
    }
    let differences = shape::differences(&theirs.shape, &ours);
    let more = differences.len().saturating_sub(FIELDS_NAMED_MAX);
    for difference in differences.into_iter().take(FIELDS_NAMED_MAX) {
        let error = Error::invalid(format!("{device}: {}", difference.text)).in_section(name);
        found.push(error.in_field(difference.field).differs(difference.source, difference.here));
    }
    if more > 0 {
        found.push(Error::invalid(format!("{device}: {more} more fields differ")).in_section(name));
    }
}

/// A descriptor on one side and a number on the other have the same size on the wire, and nothing else in common.
fn same_fds(entry: &Entry, version: u32, theirs: &[String], found: &mut Vec<Error>) -> bool {
    let ours = entry.section().map_or_else(Vec::new, |section| section.fd_fields(version));
    if ours != theirs {
        let field = ours.iter().find(|f| !theirs.contains(f)).or(theirs.iter().find(|f| !ours.contains(f)));
        let list = |fields: &[String]| if fields.is_empty() { "none".to_owned() } else { fields.join(", ") };
        let text = format!(
            "device '{}' (instance {}) has other fields that are file descriptors at the source",
            entry.name, entry.instance
        );
        let error = Error::invalid(text).in_section(entry.name.clone()).differs(list(theirs), list(&ours));
        found.push(match field {
            Some(field) => error.in_field(field),
            None => error,
        });
    }
    ours == theirs
}

fn cpu(theirs: &Hello, job: &Job, found: &mut Vec<Error>) {
    let (Some(theirs), Some(kvm)) = (&theirs.cpu, &job.kvm) else { return };
    // Nobody runs here yet, so the vCPUs can be looked at.
    match kvm.facts(true) {
        Ok(here) => found.extend(kvm.compare(theirs, &here)),
        Err(error) => found.push(error.context("the destination cannot tell what its CPUs are").in_section("cpu")),
    }
}
