//! The rules a device table must keep before anything walks it.

use std::collections::HashSet;
use std::sync::Arc;

use super::table::{Checked, Count, Field, Kind, Table};
use crate::error::{Error, Result};

/// Longest name, in bytes: the wire has one byte for its length.
pub const NAME_MAX: usize = 255;
/// Deepest nesting of tables, structs and parts together. Also what ends a cycle in hostile tables.
pub const DEPTH_MAX: usize = 16;
/// Most fields of a table and everything below it, counted once per use.
pub const FIELDS_MAX: usize = 65536;
/// Largest body of a device section, in memory and on the wire.
pub const BODY_MAX: u64 = 1 << 30;

/// What a table adds up to.
struct Sum {
    /// Largest body, parts and their headers included.
    wire: u64,
    /// End of the memory it describes, counted from the base, without what is behind pointers.
    extent: u64,
}

/// How a table is reached.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Device,
    Part,
    Nested,
}

impl Table {
    /// Checks every rule of this table and of all below it, and freezes it.
    ///
    /// Names: not empty, at most 255 bytes, unique among siblings, no control characters; a part is called
    /// `parent/tail`. Versions: `1 <= oldest <= version`, `1 <= since <= version`. Integers are 1, 2, 4 or 8 bytes
    /// wide. A count is a single integer field, earlier in the table and not younger than the array. Nested structs
    /// fit into their stride and have a field. Depth, number of fields and sizes stay below the limits of this module.
    pub fn checked(self) -> Result<Checked> {
        let name = self.name.clone();
        let mut walk = Walk { fields: 0, above: Vec::new() };
        walk.table(&self, Role::Device).map_err(|e| e.in_section(name))?;
        Ok(Checked(Arc::new(self)))
    }

    /// End of the memory the table and its parts describe, counted from the base; 0 for none.
    pub fn extent(&self) -> u64 {
        let own = self.fields.iter().map(field_end).max().unwrap_or(0);
        self.parts.iter().map(|part| part.extent()).max().unwrap_or(0).max(own)
    }
}

struct Walk<'t> {
    fields: usize,
    above: Vec<&'t Table>,
}

impl<'t> Walk<'t> {
    fn table(&mut self, table: &'t Table, role: Role) -> Result<Sum> {
        name("the table", &table.name)?;
        let what = &table.name;
        if self.above.len() >= DEPTH_MAX {
            return Err(Error::invalid(format!("tables are nested deeper than {DEPTH_MAX} at '{what}'")));
        }
        if table.oldest == 0 || table.oldest > table.version {
            return Err(Error::invalid(format!(
                "table '{what}' has version {} and oldest version {}; 1 <= oldest <= version must hold",
                table.version, table.oldest
            )));
        }
        if role == Role::Nested && table.fields.is_empty() {
            return Err(Error::invalid(format!("the nested table '{what}' has no fields")));
        }
        // A reader that looks for parts after the inner struct would take the outer table's parts for unknown ones.
        let prefix = format!("{what}/");
        let clash = |t: &&Table| format!("{}/", t.name).starts_with(&prefix);
        if role == Role::Nested && !table.parts.is_empty() && self.above.iter().any(clash) {
            return Err(Error::invalid(format!(
                "the nested table '{what}' has parts and is named like a table around it; give it another name"
            )));
        }
        self.above.push(table);
        let sum = self.rows(table).and_then(|sum| self.parts(table, sum));
        self.above.pop();
        let sum = sum?;
        pointers_are_alone(table)?;
        Ok(sum)
    }

    fn rows(&mut self, table: &'t Table) -> Result<Sum> {
        let mut names = HashSet::new();
        let mut sum = Sum { wire: 0, extent: 0 };
        for (index, field) in table.fields.iter().enumerate() {
            let in_field = |e: Error| e.in_field(&field.name);
            self.fields += 1;
            if self.fields > FIELDS_MAX {
                return Err(in_field(Error::invalid(format!("more than {FIELDS_MAX} fields in one device"))));
            }
            name("a field", &field.name).map_err(in_field)?;
            if !names.insert(field.name.as_str()) {
                return Err(in_field(Error::invalid(format!("table '{}' has two fields of this name", table.name))));
            }
            row(table, index, field).map_err(in_field)?;
            let element = self.element(field).map_err(in_field)?;
            sum.wire = bounded(sum.wire, element, field).map_err(in_field)?;
            bounded(0, field.kind.memory_size() as u64, field).map_err(in_field)?;
            sum.extent = sum.extent.max(field_end(field));
            if sum.extent > BODY_MAX {
                return Err(in_field(Error::invalid(format!(
                    "the field ends beyond {BODY_MAX} bytes from the base"
                ))));
            }
        }
        Ok(sum)
    }

    /// Largest size of one element on the wire.
    fn element(&mut self, field: &'t Field) -> Result<u64> {
        let Kind::Struct(inner, stride) = &field.kind else {
            return Ok(field.kind.wire_size().unwrap_or(0) as u64);
        };
        let sum = self.table(inner, Role::Nested)?;
        if sum.extent > *stride as u64 {
            return Err(Error::invalid(format!("table '{}' reaches beyond the end of its struct", inner.name))
                .expected_got(format!("at most {stride} bytes"), sum.extent));
        }
        Ok(sum.wire)
    }

    fn parts(&mut self, table: &'t Table, mut sum: Sum) -> Result<Sum> {
        let mut names = HashSet::new();
        for part in &table.parts {
            let tail = part.name.strip_prefix(&table.name).and_then(|rest| rest.strip_prefix('/'));
            if tail.is_none_or(|tail| tail.is_empty() || tail.contains('/')) {
                let rule = format!("a part of '{0}' is called '{0}/' and a tail without '/'", table.name);
                return Err(Error::invalid(rule).expected_got(format!("{}/...", table.name), &part.name));
            }
            if !names.insert(part.name.as_str()) {
                return Err(Error::invalid(format!("two parts are called '{}'", part.name)));
            }
            let below = self.table(part, Role::Part)?;
            sum.wire = sum.wire.saturating_add(below.wire + 6 + part.name.len() as u64);
            sum.extent = sum.extent.max(below.extent);
            if sum.wire > BODY_MAX {
                return Err(Error::invalid(format!("a body of '{}' can exceed {BODY_MAX} bytes", table.name)));
            }
        }
        Ok(sum)
    }
}

fn row(table: &Table, index: usize, field: &Field) -> Result<()> {
    match field.kind {
        Kind::Unsigned(n) | Kind::Signed(n) if !matches!(n, 1 | 2 | 4 | 8) => {
            return Err(Error::invalid("integers are 1, 2, 4 or 8 bytes wide").expected_got("1, 2, 4 or 8", n));
        }
        Kind::Bytes(0) | Kind::Unused(0) | Kind::Struct(_, 0) => {
            return Err(Error::invalid("an element of zero bytes cannot be migrated"));
        }
        Kind::Fd if field.pointer => return Err(behind_pointer()),
        Kind::Struct(ref inner, _) if field.pointer && inner.has_fds() => return Err(behind_pointer()),
        Kind::Unused(_) if field.pointer || !matches!(field.count, Count::One) => {
            return Err(Error::invalid("unused space is a single run of bytes, without memory behind it"));
        }
        _ => (),
    }
    if field.since == 0 || field.since > table.version {
        return Err(Error::invalid("the field's first version lies outside the table's versions")
            .expected_got(format!("1..={}", table.version), field.since));
    }
    match field.count {
        Count::Fixed(0) => Err(Error::invalid("an array of no elements cannot be migrated")),
        Count::Field { max: 0, .. } => Err(Error::invalid("a variable array needs room for at least one element")),
        Count::Field { index: at, .. } => count_field(table, index, at),
        _ => Ok(()),
    }
}

/// After a migration that failed the member must be found again, to be set to -1.
fn behind_pointer() -> Error {
    Error::invalid("a file descriptor cannot stand behind a pointer; put it into the device's own struct")
}

fn count_field(table: &Table, index: usize, at: usize) -> Result<()> {
    let field = &table.fields[index];
    let Some(count) = table.fields[..index].get(at) else {
        return Err(Error::invalid("the field with the number of elements must come earlier in the same table"));
    };
    if !matches!(count.kind, Kind::Unsigned(_) | Kind::Signed(_)) || !matches!(count.count, Count::One) {
        return Err(Error::invalid(format!("the number of elements, '{}', is not a single integer", count.name)));
    }
    if count.since > field.since {
        return Err(Error::invalid(format!("the number of elements, '{}', is younger than the array", count.name)));
    }
    Ok(())
}

/// A value from the stream must never land on a pointer that is followed later.
fn pointers_are_alone(table: &Table) -> Result<()> {
    let all: Vec<&Field> = table.fields.iter().chain(table.parts.iter().flat_map(|part| &part.fields)).collect();
    for pointer in all.iter().filter(|f| f.pointer) {
        let (start, end) = (pointer.offset as u64, field_end(pointer));
        let writes = |f: &&&Field| !f.pointer && !matches!(f.kind, Kind::Struct(..) | Kind::Unused(_));
        if let Some(other) = all.iter().filter(writes).find(|f| (f.offset as u64) < end && start < field_end(f)) {
            return Err(Error::invalid(format!("the field lies on top of the pointer '{}'", pointer.name))
                .in_field(&other.name));
        }
    }
    Ok(())
}

fn field_end(field: &Field) -> u64 {
    let bytes = match (field.pointer, &field.kind) {
        (_, Kind::Unused(_)) => return 0,
        (true, _) => size_of::<*mut u8>() as u64,
        (false, kind) => u64::from(field.count.max()).saturating_mul(kind.memory_size() as u64),
    };
    (field.offset as u64).saturating_add(bytes)
}

fn bounded(before: u64, element: u64, field: &Field) -> Result<u64> {
    let all = u64::from(field.count.max()).saturating_mul(element).saturating_add(before);
    if all > BODY_MAX {
        return Err(Error::invalid("the fields so far can be larger than the limit")
            .expected_got(format!("at most {BODY_MAX} bytes"), all));
    }
    Ok(all)
}

/// The rule for every name that may reach the wire.
pub(super) fn name(what: &str, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid(format!("{what} has an empty name")));
    }
    if name.len() > NAME_MAX {
        return Err(Error::invalid(format!("{what} has a name longer than {NAME_MAX} bytes")));
    }
    if name.chars().any(char::is_control) {
        return Err(Error::invalid(format!("{what} has a name with control characters: {name:?}")));
    }
    Ok(())
}
