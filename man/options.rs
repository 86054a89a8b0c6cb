//! vmig-options(7), from docs/options.md, which is made from the table of options.

use super::prose::{cells, filled, tagged};
use super::roff::{self, Stamp};

pub(crate) fn page(table: &str, stamp: &Stamp) -> Result<String, String> {
    let mut out = roff::title("vmig-options", 7, stamp);
    out += &format!("{}vmig\\-options \\- options of a guest and its migrations\n", roff::section("NAME"));
    out += &format!("{}.nf\n.B #include <vmig.h>\n.PP\n", roff::section("SYNOPSIS"));
    out +=
        "\\fBvmig_set(\\fP\\fIm\\fP\\fB, \\(dq\\fP\\fIoption\\fP\\fB\\(dq, \\(dq\\fP\\fIvalue\\fP\\fB\\(dq);\\fP\n";
    out += "\\fBvmig_get(\\fP\\fIm\\fP\\fB, \\(dq\\fP\\fIoption\\fP\\fB\\(dq);\\fP\n.fi\n";
    out += &roff::section("DESCRIPTION");
    let intro = table.lines().find(|l| !l.is_empty() && !l.starts_with(['#', '|']));
    let intro = intro.ok_or("docs/options.md says nothing before its table")?;
    // Where the table comes from matters to who changes it, not to who reads a page.
    out += &filled(&intro.split(". ").filter(|s| !s.contains("src/options")).collect::<Vec<_>>().join(". "));
    out += &roff::section("OPTIONS");
    let rows: Vec<_> = table.lines().filter(|l| l.starts_with("| `")).collect();
    if rows.is_empty() {
        return Err("docs/options.md has no table".into());
    }
    for row in rows {
        out += &option(row).ok_or_else(|| format!("docs/options.md: a row without six cells: {row}"))?;
    }
    Ok(out + &format!("{}{},\n{}\n", roff::section("SEE ALSO"), roff::page("vmig", 7), roff::page("vmig_set", 3)))
}

/// One row: name, values, default, QEMU's default, live, meaning.
fn option(row: &str) -> Option<String> {
    let cells = cells(row);
    let [name, values, default, qemu, live, meaning] = &cells[..] else { return None };
    let (name, capability) = name.strip_suffix(" *c*").map_or((&name[..], false), |name| (name, true));
    let mut facts = format!("Values: {values}. Default: {default}");
    if qemu != default {
        facts += &format!(" (QEMU's: {qemu})");
    }
    facts += if live == "yes" { ". May change while a migration runs." } else { "." };
    facts += if capability { " A capability over QMP." } else { "" };
    Some(tagged(&roff::prose(name), &format!("{}.br\n{}", filled(meaning), filled(&facts))))
}
