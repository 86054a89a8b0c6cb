//! What a table's body looks like, and where two sides disagree about it.

use std::collections::HashMap;

use super::table::{Count, Kind, Table};
use crate::wire::shape::{self, Field, Shape, UNUSED};

/// One way in which two sides disagree about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The field, or the part.
    pub field: String,
    /// What is wrong.
    pub text: &'static str,
    /// What the source has.
    pub source: String,
    /// What this side has.
    pub here: String,
}

/// Where in a table a walk is: how its elements are repeated by what surrounds them.
#[derive(Clone)]
struct Place {
    path: String,
    times: u32,
    by: Option<String>,
}

impl Table {
    /// What a body of `version` looks like, parts at the versions that the peer has where they can be read here.
    pub fn shape(&self, version: u32, peer: Option<&Shape>) -> Shape {
        let mut shape = vec![self.empty(version)];
        let mut place = Place { path: String::new(), times: 1, by: None };
        self.fields_into(&mut shape, 0, version, peer, &mut place);
        shape
    }

    fn empty(&self, version: u32) -> shape::Table {
        shape::Table { name: self.name.clone(), version, oldest: self.oldest, fields: Vec::new() }
    }

    fn fields_into(&self, shape: &mut Shape, at: usize, version: u32, peer: Option<&Shape>, place: &mut Place) {
        for field in self.fields.iter().filter(|field| field.since <= version) {
            let (many, by) = match &field.count {
                Count::One | Count::Fixed(_) => (field.count.max(), place.by.clone()),
                Count::Field { index, max } => (*max, self.fields.get(*index).map(|f| f.name.clone())),
            };
            let name = format!("{}{}", place.path, field.name);
            let times = place.times.saturating_mul(many);
            let (kind, width) = match &field.kind {
                Kind::Struct(inner, _) => {
                    let array = if matches!(field.count, Count::One) { "" } else { "[]" };
                    let mut inside = Place { path: format!("{name}{array}."), times, by };
                    inner.fields_into(shape, at, inner.version, peer, &mut inside);
                    continue;
                }
                Kind::Unsigned(n) => (format!("u{}", 8 * n), 1),
                Kind::Signed(n) => (format!("i{}", 8 * n), 1),
                Kind::Bool => ("bool".to_owned(), 1),
                Kind::Bytes(n) => ("u8".to_owned(), *n),
                Kind::Timer => ("timer".to_owned(), 1),
                Kind::Fd => ("fd".to_owned(), 1),
                Kind::Unused(n) => (UNUSED.to_owned(), *n),
            };
            let count = times.saturating_mul(u32::try_from(width).unwrap_or(u32::MAX));
            shape[at].fields.push(Field { name, kind, count, counted_by: by });
        }
        for part in &self.parts {
            let theirs = peer.into_iter().flatten().find(|t| t.name == part.name).map(|t| t.version);
            let version = theirs.filter(|v| (part.oldest..=part.version).contains(v)).unwrap_or(part.version);
            shape.push(part.empty(version));
            let at = shape.len() - 1;
            let mut place = Place { path: String::new(), times: 1, by: None };
            part.fields_into(shape, at, version, peer, &mut place);
        }
    }
}

/// Where the source's bodies are not what is read here. Parts that only one side knows are none: they are sent when they
/// are needed, and refused then. Nor is room for more elements here, nor unused bytes in place of other fields.
pub fn differences(source: &Shape, here: &Shape) -> Vec<Difference> {
    let mut found = Vec::new();
    let ours: HashMap<&str, &shape::Table> = here.iter().rev().map(|t| (t.name.as_str(), t)).collect();
    for theirs in source {
        let Some(ours) = ours.get(theirs.name.as_str()) else { continue };
        // Ours is of the same version wherever that can be read.
        if theirs.version == ours.version {
            fields(&theirs.fields, &ours.fields, &mut found);
        } else {
            found.push(Difference {
                field: theirs.name.clone(),
                text: "this part comes in a version that cannot be read here",
                source: theirs.version.to_string(),
                here: format!("{} to {}", ours.oldest, ours.version),
            });
        }
    }
    found
}

fn fits(source: &Field, here: &Field) -> bool {
    let names = source.name == here.name || source.kind == UNUSED;
    let room = match &source.counted_by {
        Some(_) => source.count <= here.count,
        None => source.count == here.count,
    };
    names && source.kind == here.kind && source.counted_by == here.counted_by && room
}

/// How many of `fields` take exactly the place of the unused bytes `gap`.
fn in_place_of(gap: Option<&Field>, fields: &[Field]) -> Option<usize> {
    let mut left = gap.filter(|gap| gap.kind == UNUSED)?.size()?;
    for (n, field) in fields.iter().enumerate() {
        if left == 0 {
            return Some(n);
        }
        left = left.checked_sub(field.size()?)?;
    }
    (left == 0).then_some(fields.len())
}

fn fields(source: &[Field], here: &[Field], found: &mut Vec<Difference>) {
    let (mut theirs, mut ours) = (source, here);
    loop {
        match (theirs.first(), ours.first()) {
            (None, None) => return,
            (Some(a), Some(b)) if fits(a, b) => (theirs, ours) = (&theirs[1..], &ours[1..]),
            (a, b) => {
                if let Some(n) = in_place_of(a, ours) {
                    (theirs, ours) = (&theirs[1..], &ours[n..]);
                } else if let Some(n) = in_place_of(b, theirs) {
                    (theirs, ours) = (&theirs[n..], &ours[1..]);
                } else {
                    return name_them(theirs, ours, found);
                }
            }
        }
    }
}

/// From the first field on that does not fit.
fn name_them(source: &[Field], here: &[Field], found: &mut Vec<Difference>) {
    let before = found.len();
    let none = || "no such field".to_owned();
    let theirs: HashMap<&str, &Field> = source.iter().map(|f| (f.name.as_str(), f)).collect();
    let ours: HashMap<&str, &Field> = here.iter().map(|f| (f.name.as_str(), f)).collect();
    for field in source {
        let text = match ours.get(field.name.as_str()) {
            Some(other) if fits(field, other) => continue,
            Some(_) => "the field is not the same on the two sides",
            None => "the field is at the source only",
        };
        let here = ours.get(field.name.as_str()).map_or_else(none, ToString::to_string);
        found.push(Difference { field: field.name.clone(), text, source: field.to_string(), here });
    }
    for field in here.iter().filter(|f| !theirs.contains_key(f.name.as_str())) {
        let (field, here) = (field.name.clone(), field.to_string());
        found.push(Difference { field, text: "the field is at the destination only", source: none(), here });
    }
    if found.len() == before
        && let (Some(first), Some(ours)) = (source.first(), here.first())
    {
        found.push(Difference {
            field: first.name.clone(),
            text: "the fields come in another order",
            source: format!("'{}' next", first.name),
            here: format!("'{}' next", ours.name),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn table(rows: &[(&str, Kind)]) -> Table {
        rows.iter().fold(Table::new("uart", 1), |table, (name, kind)| table.with(*name, kind.clone(), 0))
    }

    fn between(source: &[(&str, Kind)], here: &[(&str, Kind)]) -> Vec<String> {
        let found = differences(&table(source).shape(1, None), &table(here).shape(1, None));
        found.iter().map(|d| format!("{}: {} ({} | {})", d.field, d.text, d.source, d.here)).collect()
    }

    const U16: Kind = Kind::Unsigned(2);
    const U32: Kind = Kind::Unsigned(4);

    #[test]
    fn each_difference_has_its_words() {
        let (a, b) = (("a", U32), ("b", U32));
        assert_eq!(between(&[a.clone(), b.clone()], &[a.clone(), b.clone()]), [""; 0]);
        assert_eq!(
            between(std::slice::from_ref(&a), &[("a", U16)]),
            ["a: the field is not the same on the two sides (u32 | u16)"]
        );
        let missing = ["b: the field is at the source only (u32 | no such field)"];
        assert_eq!(between(&[a.clone(), b.clone()], std::slice::from_ref(&a)), missing);
        let extra = ["b: the field is at the destination only (no such field | u32)"];
        assert_eq!(between(std::slice::from_ref(&a), &[a.clone(), b.clone()]), extra);
        let order = ["a: the fields come in another order ('a' next | 'b' next)"];
        assert_eq!(between(&[a.clone(), b.clone()], &[b, a]), order);
    }

    #[test]
    fn unused_bytes_stand_for_fields_of_their_size() {
        let rest = ("rest", U32);
        let old = [("a", U16), ("b", U32), rest.clone()];
        assert_eq!(between(&old, &[("gone", Kind::Unused(6)), rest.clone()]), [""; 0]);
        assert_eq!(between(&[("gone", Kind::Unused(6)), rest.clone()], &old), [""; 0]);
        assert_eq!(
            between(&[("x", Kind::Unused(6)), rest.clone()], &[("y", Kind::Unused(6)), rest.clone()]),
            [""; 0]
        );
        assert!(!between(&old, &[("gone", Kind::Unused(5)), rest]).is_empty());
    }

    #[test]
    fn arrays_nested_tables_and_parts() {
        let inner = Arc::new(table(&[("x", U16), ("y", U32)]));
        let mut source = table(&[("used", U16), ("lane", Kind::Struct(inner, 8)), ("ring", U32)]);
        source.fields[1].count = Count::Fixed(3);
        source.fields[2].count = Count::Field { index: 0, max: 8 };
        source.parts.push(Arc::new(Table { name: "uart/extra".into(), version: 2, ..table(&[("e", U32)]) }));
        let shown = |t: &Table| -> Vec<String> {
            let all = t.shape(1, None);
            all.iter().flat_map(|t| t.fields.iter()).map(|f| format!("{} {f}", f.name)).collect()
        };
        let all = ["used u16", "lane[].x u16[3]", "lane[].y u32[3]", "ring u32[used], at most 8", "e u32"];
        assert_eq!(shown(&source), all);
        let mut here = source.clone();
        here.fields[2].count = Count::Field { index: 0, max: 9 };
        assert_eq!(differences(&source.shape(1, None), &here.shape(1, None)), []);
        assert_eq!(differences(&here.shape(1, None), &source.shape(1, None))[0].field, "ring");
        here.parts.clear();
        assert_eq!(differences(&source.shape(1, None), &here.shape(1, None)), []);
        here.parts.push(Arc::new(Table { name: "uart/extra".into(), ..table(&[("e", U32)]) }));
        let peer = source.shape(1, None);
        let found = differences(&peer, &here.shape(1, Some(&peer)));
        assert_eq!((found.len(), found[0].field.as_str(), found[0].here.as_str()), (1, "uart/extra", "1 to 1"));
    }

    #[test]
    fn fields_of_later_versions_are_left_out() {
        let mut new = table(&[("a", U32), ("b", U32)]);
        (new.version, new.fields[1].since) = (2, 2);
        assert_eq!(differences(&table(&[("a", U32)]).shape(1, None), &new.shape(1, None)), []);
    }
}
