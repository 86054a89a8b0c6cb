//! Tables that differ a little from a device's own: of an older release, of a newer one, with faults between.

use std::ops::Range;
use std::sync::Arc;

use super::faults::{Faults, Faulty};
use crate::error::Result;
use crate::section::table::{Count, Field, Hooks, Kind, Table};

/// Elements of an array whose memory is looked at one by one; of the rest it is taken as a whole.
const ELEMENTS_MAX: u32 = 4096;

/// The table with `faults` around its hooks and all below it. A descriptor becomes a number, which a load puts back as
/// it was: a duplicate in its place would have to be closed by somebody.
pub(in crate::section) fn under_test(table: &Table, faults: &Arc<Faults>, depth: usize) -> Table {
    let owner = format!("{} '{}'", if depth == 0 { "device" } else { "table" }, table.name);
    let hooks = table.hooks.clone();
    let hooks = hooks.map(|hooks| Arc::new(Faulty { owner, hooks, faults: Arc::clone(faults) }) as Arc<dyn Hooks>);
    let fields = table.fields.iter().map(|field| {
        let kind = match &field.kind {
            Kind::Fd => Kind::Signed(size_of::<std::ffi::c_int>()),
            Kind::Struct(inner, stride) => Kind::Struct(Arc::new(under_test(inner, faults, depth + 1)), *stride),
            other => other.clone(),
        };
        Field { kind, ..field.clone() }
    });
    let parts = table.parts.iter().map(|part| Arc::new(under_test(part, faults, depth + 1)));
    Table { fields: fields.collect(), parts: parts.collect(), hooks, ..table.clone() }
}

/// The table as it was in `version`: the fields it had then.
pub(super) fn as_of(table: &Table, version: u32) -> Table {
    let mut old = Table { fields: Vec::new(), version, oldest: version, ..table.clone() };
    // Where each field went; a count is never younger than its array.
    let mut new_index = vec![0; table.fields.len()];
    for (index, field) in table.fields.iter().enumerate().filter(|(_, field)| field.since <= version) {
        new_index[index] = old.fields.len();
        let count = match &field.count {
            Count::Field { index, max } => Count::Field { index: new_index[*index], max: *max },
            other => other.clone(),
        };
        old.fields.push(Field { count, ..field.clone() });
    }
    old
}

/// A part that is sent whatever its `needed` says.
struct Always(Arc<dyn Hooks>);

impl Hooks for Always {
    fn needed(&self, _: *mut u8) -> Result<bool> {
        Ok(true)
    }

    fn pre_save(&self, device: *mut u8) -> Result<()> {
        self.0.pre_save(device)
    }

    fn post_save(&self, device: *mut u8) -> Result<()> {
        self.0.post_save(device)
    }
}

/// The part, to be sent in any case.
pub(super) fn needed(part: &Table) -> Table {
    let hooks = part.hooks.clone().map(|hooks| Arc::new(Always(hooks)) as Arc<dyn Hooks>);
    Table { hooks, ..part.clone() }
}

/// The table with these parts.
pub(super) fn with_parts(table: &Table, parts: impl IntoIterator<Item = Table>) -> Table {
    Table { parts: parts.into_iter().map(Arc::new).collect(), ..table.clone() }
}

/// The memory of a device that its table describes, from its base on: `values` that travel, `pointers` that do not, and
/// `loose` room for arrays, of which only the elements in use travel.
#[derive(Debug, Default)]
pub(super) struct Extent {
    pub(super) values: Vec<Range<usize>>,
    pub(super) pointers: Vec<Range<usize>>,
    pub(super) loose: Vec<Range<usize>>,
}

impl Extent {
    pub(super) fn of(table: &Table) -> Self {
        let mut extent = Self::default();
        extent.add(table, 0);
        extent
    }

    fn add(&mut self, table: &Table, base: usize) {
        for field in table.fields.iter().filter(|field| !matches!(field.kind, Kind::Unused(_))) {
            let (at, count) = (base + field.offset, field.count.max());
            match &field.kind {
                _ if field.pointer => self.pointers.push(at..at + size_of::<*mut u8>()),
                kind if matches!(field.count, Count::Field { .. }) => {
                    self.loose.push(at..at + count as usize * kind.memory_size());
                }
                Kind::Struct(inner, stride) if count <= ELEMENTS_MAX => {
                    (0..count as usize).for_each(|element| self.add(inner, at + element * stride));
                }
                kind => self.values.push(at..at + count as usize * kind.memory_size()),
            }
        }
        table.parts.iter().for_each(|part| self.add(part, base));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_table_counts_by_the_field_it_counted_by() {
        let field = |name: &str, since, count| Field { since, count, ..Field::new(name, Kind::Unsigned(2), 0) };
        let mut table = Table { oldest: 1, ..Table::new("t", 3) };
        table.fields.push(field("young", 2, Count::One));
        table.fields.push(field("n", 1, Count::One));
        table.fields.push(field("ring", 1, Count::Field { index: 1, max: 4 }));
        table.fields.push(field("younger", 3, Count::One));
        let old = as_of(&table, 1).checked().unwrap();
        assert_eq!(old.fields.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["n", "ring"]);
        assert!(matches!(old.fields[1].count, Count::Field { index: 0, .. }));
        assert_eq!(as_of(&table, 2).checked().unwrap().fields.len(), 3);
    }

    #[test]
    fn the_extent_is_what_the_fields_cover() {
        let inner = Arc::new(Table::new("i", 1).with("x", Kind::Unsigned(2), 2));
        let mut table = Table::new("t", 1).with("a", Kind::Unsigned(4), 0).with("gone", Kind::Unused(9), 0);
        table.fields.push(Field { count: Count::Fixed(2), ..Field::new("in", Kind::Struct(inner, 8), 8) });
        table
            .fields
            .push(Field { count: Count::Field { index: 0, max: 3 }, ..Field::new("v", Kind::Unsigned(2), 40) });
        table.fields.push(Field { pointer: true, ..Field::new("p", Kind::Unsigned(1), 32) });
        let extent = Extent::of(&table);
        assert_eq!(extent.values, [0..4, 10..12, 18..20]);
        assert_eq!((extent.pointers.first(), extent.loose.first()), (Some(&(32..40)), Some(&(40..46))));
    }
}
