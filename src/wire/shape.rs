//! What a device's body looks like, as two vmigs tell each other in the hello.

use std::fmt;

use serde_json::{Value, json};

/// Longest name of a table or path of a field: nested tables add up.
const NAME_MAX: usize = 1024;

/// A device's table, and behind it its parts, those of nested tables too.
pub type Shape = Vec<Table>;

/// The fields of a table in the order of the stream, those of nested tables in line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Name.
    pub name: String,
    /// Version.
    pub version: u32,
    /// Oldest version that is read here; the peer is told only the version.
    pub oldest: u32,
    /// Fields.
    pub fields: Vec<Field>,
}

/// A field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Path; `[]` behind the name of an array of structs.
    pub name: String,
    /// Kind of one element: u8 to u64, i8 to i64, bool, timer, fd, unused.
    pub kind: String,
    /// Number of elements; at most, if it is counted.
    pub count: u32,
    /// The field that says how many there are.
    pub counted_by: Option<String>,
}

/// Kind of bytes that mean nothing.
pub const UNUSED: &str = "unused";

impl Field {
    /// Bytes on the wire, where they are always as many.
    pub fn size(&self) -> Option<u64> {
        let one = match self.kind.as_str() {
            "u8" | "i8" | "bool" | UNUSED => 1,
            "u16" | "i16" => 2,
            "u32" | "i32" | "fd" => 4,
            "u64" | "i64" | "timer" => 8,
            _ => return None,
        };
        self.counted_by.is_none().then(|| one * u64::from(self.count))
    }
}

/// As its kind: `u32`, `u16[8]`, `u8[used], at most 16`.
impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.counted_by, self.count) {
            (Some(by), most) => write!(f, "{}[{by}], at most {most}", self.kind),
            (None, 1) => f.write_str(&self.kind),
            (None, count) => write!(f, "{}[{count}]", self.kind),
        }
    }
}

/// A shape as JSON: tables as [name, version, [field...]], fields as [name, kind, count, counted by].
pub(super) fn to_json(shape: &[Table]) -> Value {
    let field = |f: &Field| match (&f.counted_by, f.count) {
        (Some(by), count) => json!([f.name, f.kind, count, by]),
        (None, 1) => json!([f.name, f.kind]),
        (None, count) => json!([f.name, f.kind, count]),
    };
    let table = |t: &Table| json!([t.name, t.version, t.fields.iter().map(field).collect::<Vec<_>>()]);
    shape.iter().map(table).collect()
}

/// Reads what [`to_json`] wrote; what follows in a row is of a newer version, and ignored.
pub(super) fn from_json(json: &Value) -> Option<Shape> {
    json.as_array()?.iter().map(table).collect()
}

fn table(json: &Value) -> Option<Table> {
    let version = u32::try_from(json.get(1)?.as_u64()?).ok()?;
    let fields = json.get(2)?.as_array()?.iter().map(field).collect::<Option<_>>()?;
    Some(Table { name: name(json.get(0)?)?, version, oldest: version, fields })
}

fn field(json: &Value) -> Option<Field> {
    let count = json.get(2).map_or(Some(1), |n| u32::try_from(n.as_u64()?).ok())?;
    let counted_by = json.get(3).map(|by| name(by).ok_or(())).transpose().ok()?;
    Some(Field { name: name(json.get(0)?)?, kind: name(json.get(1)?)?, count, counted_by })
}

fn name(json: &Value) -> Option<String> {
    json.as_str().filter(|text| text.len() <= NAME_MAX).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let field = |name: &str, count, by: Option<&str>| Field {
            name: name.into(),
            kind: "u16".into(),
            count,
            counted_by: by.map(str::to_owned),
        };
        let fields = vec![field("a", 1, None), field("b[].c", 5, None), field("d", 9, Some("a"))];
        let shown: Vec<String> = fields.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["u16", "u16[5]", "u16[a], at most 9"]);
        let sizes: Vec<_> = fields.iter().map(Field::size).collect();
        assert_eq!(sizes, [Some(2), Some(10), None]);
        let shape = vec![Table { name: "uart".into(), version: 3, oldest: 3, fields }];
        assert_eq!(from_json(&to_json(&shape)), Some(shape));
        let long = "n".repeat(NAME_MAX + 1);
        for bad in [
            json!({}),
            json!([7]),
            json!([["a"]]),
            json!([["a", -1, []]]),
            json!([["a", 1, [["x"]]]]),
            json!([["a", 1, [["x", "u8", 1u64 << 32]]]]),
            json!([["a", 1, [["x", "u8", 1, 7]]]]),
            json!([[long, 1, []]]),
        ] {
            assert_eq!(from_json(&bad), None, "{bad}");
        }
    }
}
