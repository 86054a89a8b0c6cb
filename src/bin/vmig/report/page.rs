//! The page: one section for each migration, the last one first.

use std::fmt::Write as _;

use super::chart::{Chart, Line, bar, bytes, escaped, float, time};
use super::trace::{Blackout, PARTS, Run, Trace};

/// Rows of a table that people look at.
const ROWS_MAX: usize = 300;
/// Looks of the page; colours by class, so that charts need none of their own.
const STYLE: &str = include_str!("page.css");

/// All of it.
pub(super) fn page(trace: &Trace) -> String {
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Migration report</title><style>{STYLE}</style></head><body>\n<h1>Migration report</h1>\n"
    );
    for run in trace.runs.iter().rev() {
        section(&mut out, run);
    }
    for (count, what) in [
        (trace.earlier, "earlier migrations of the file are not shown."),
        (trace.unreadable, "lines of the file could not be read."),
    ] {
        if count > 0 {
            let _ = writeln!(out, "<p class=\"note\">{count} {what}</p>");
        }
    }
    out + "</body></html>\n"
}

fn section(out: &mut String, run: &Run) {
    let state = run.states.last().map_or("unknown", |(_, state)| state.as_str());
    let class = match state {
        "completed" => "good",
        "failed" | "cancelled" | "held" | "switchover-unknown" => "bad",
        _ => "open",
    };
    let _ = writeln!(
        out,
        "<section><h2><span class=\"state {class}\">{}</span> {} at the {}</h2>",
        escaped(state),
        date(run.unix_ms),
        escaped(&run.side)
    );
    facts(out, run);
    errors(out, run);
    charts(out, run);
    for blackout in &run.blackouts {
        standstill(out, blackout);
    }
    timeline(out, run);
    rounds(out, run);
    let _ = writeln!(out, "<p class=\"note\">Written by vmig {}, run {}.", escaped(&run.library), escaped(&run.id));
    if run.left_out > 0 {
        let _ = writeln!(out, "{} sets of numbers were left out, because they came too often.", run.left_out);
    }
    out.push_str("</p></section>\n");
}

/// The few numbers that matter.
fn facts(out: &mut String, run: &Run) {
    let last = run.points.last().copied().unwrap_or_default();
    let rounds = run.points.iter().map(|p| p.iteration).max().unwrap_or(0);
    let mean = if run.end > 0 { float(last.transferred) / (float(run.end) / 1e9) } else { 0.0 };
    let mut facts = vec![
        ("total time", time(float(run.end))),
        ("guest memory", bytes(float(last.total))),
        (if run.side == "source" { "sent" } else { "received" }, bytes(float(last.transferred))),
        ("on average", format!("{}/s", bytes(mean))),
    ];
    if rounds > 0 {
        facts.push(("rounds", rounds.to_string()));
    }
    if let Some(blackout) = run.blackouts.last() {
        facts.push(("guest stood still", time(float(blackout.total))));
    }
    out.push_str("<dl class=\"facts\">");
    for (name, value) in facts {
        let _ = write!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    out.push_str("</dl>\n");
}

fn errors(out: &mut String, run: &Run) {
    if run.errors.is_empty() {
        return;
    }
    out.push_str("<h3>Errors</h3><ul class=\"errors\">");
    for (at, text) in run.errors.iter().take(ROWS_MAX) {
        let _ = write!(out, "<li><b>{}</b> {}</li>", time(float(*at)), escaped(text));
    }
    out.push_str("</ul>\n");
}

fn charts(out: &mut String, run: &Run) {
    if run.points.iter().all(|p| p.remaining == 0 && p.transferred == 0) {
        return;
    }
    let series =
        |value: fn(&super::trace::Point) -> u64| run.points.iter().map(|p| (p.t, value(p))).collect::<Vec<_>>();
    let rounds: Vec<u64> = run.points.iter().filter(|p| p.is_round).map(|p| p.t).collect();
    // The guest stands still from the state that says so; what comes after the blackout was taken note of is cleaning up.
    let stopped = run.states.iter().find(|(_, state)| matches!(state.as_str(), "device" | "pre-switchover"));
    let stopped = stopped.map(|(from, _)| (*from, run.blackouts.last().map_or(run.end, |b| b.at.max(*from))));
    let figure = |out: &mut String, title: &str, legend: &str, unit: &str, lines: &[Line<'_>]| {
        let chart = Chart { title, unit, end: run.end, rounds: &rounds, stopped, lines };
        let _ = writeln!(out, "<figure><figcaption><b>{title}</b> {legend}</figcaption>{}</figure>", chart.svg());
    };
    out.push_str("<div class=\"charts\">\n");
    if run.side == "source" {
        let left = [Line { class: "remaining", points: series(|p| p.remaining), area: true }];
        figure(out, "Left to send", "", "", &left);
        // A guest that was stopped just now dirtied what it did in no time at all.
        let before = stopped.map_or(u64::MAX, |(from, _)| from);
        let dirtied = series(|p| p.dirty_rate).into_iter().filter(|(t, _)| *t < before).collect();
        let rates = [
            Line { class: "bandwidth", points: series(|p| p.bandwidth), area: false },
            Line { class: "dirty", points: dirtied, area: false },
        ];
        let legend =
            "<span class=\"key bandwidth\">bandwidth</span> <span class=\"key dirty\">dirtied by the guest</span>";
        figure(out, "Rates", legend, "/s", &rates);
    } else {
        let got = [Line { class: "bandwidth", points: series(|p| p.transferred), area: true }];
        figure(out, "Received", "", "", &got);
    }
    out.push_str("</div>\n");
    if !rounds.is_empty() {
        out.push_str(
            "<p class=\"note\">Small marks: rounds over the dirty pages. Shaded: the guest stands still.</p>\n",
        );
    }
}

/// The blackout with its parts, beside what was predicted.
fn standstill(out: &mut String, blackout: &Blackout) {
    let expected: u64 = blackout.expected.iter().fold(0, |sum, part| sum.saturating_add(*part));
    let known: u64 = blackout.actual.iter().fold(0, |sum, part| sum.saturating_add(*part));
    let whole = blackout.total.max(known).max(expected);
    let named = |parts: &[u64; PARTS.len()]| PARTS.into_iter().zip(*parts).collect::<Vec<_>>();
    let mut actual = named(&blackout.actual);
    let other = blackout.total.saturating_sub(known);
    actual.push(("other", other));
    let _ = write!(
        out,
        "<h3>The guest stood still for {}</h3><figure class=\"wide\"><figcaption>as it was: {}</figcaption>{}\
         <figcaption>as predicted: {}</figcaption>{}</figure>",
        time(float(blackout.total)),
        time(float(blackout.total)),
        bar("the blackout by its parts", &actual, whole),
        time(float(expected)),
        bar("the predicted blackout by its parts", &named(&blackout.expected), whole),
    );
    out.push_str("<table><thead><tr><th>part</th><th>was</th><th>predicted</th></tr></thead><tbody>");
    let meanings = [
        "stop hook and handlers",
        "saving and sending devices",
        "last look at the dirty log",
        "the last pages",
        "the destination loads and answers",
        "start at the destination",
    ];
    for (index, meaning) in meanings.into_iter().enumerate() {
        let _ = write!(
            out,
            "<tr><td><span class=\"key {0}\">{0}</span> <small>{meaning}</small></td><td>{1}</td><td>{2}</td></tr>",
            PARTS[index],
            time(float(blackout.actual[index])),
            time(float(blackout.expected[index]))
        );
    }
    let _ = writeln!(
        out,
        "<tr><td><span class=\"key other\">other</span> <small>of none of these</small></td><td>{}</td><td></td></tr></tbody></table>",
        time(float(other))
    );
}

/// States, with how long each took.
fn timeline(out: &mut String, run: &Run) {
    out.push_str("<h3>States</h3><table><thead><tr><th>state</th><th>since</th><th>for</th></tr></thead><tbody>");
    for (index, (at, state)) in run.states.iter().enumerate().take(ROWS_MAX) {
        let until = run.states.get(index + 1).map_or(run.end, |(next, _)| *next);
        let took = match index + 1 == run.states.len() {
            true => String::new(),
            false => time(float(until.saturating_sub(*at))),
        };
        let _ = write!(out, "<tr><td>{}</td><td>{}</td><td>{took}</td></tr>", escaped(state), time(float(*at)));
    }
    out.push_str("</tbody></table>\n");
}

/// What was known when each round began.
fn rounds(out: &mut String, run: &Run) {
    let all: Vec<_> = run.points.iter().filter(|p| p.is_round).collect();
    if all.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<details><summary>Rounds after the first, over the dirty pages: {}</summary><table><thead><tr><th>round</th><th>at</th>\
         <th>dirty</th><th>dirtied</th><th>bandwidth</th><th>would stand still</th></tr></thead><tbody>",
        all.len()
    );
    for point in all.iter().take(ROWS_MAX) {
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}/s</td><td>{}/s</td><td>{}</td></tr>",
            point.iteration,
            time(float(point.t)),
            bytes(float(point.remaining)),
            bytes(float(point.dirty_rate)),
            bytes(float(point.bandwidth)),
            time(float(point.expected_downtime))
        );
    }
    out.push_str("</tbody></table>");
    if all.len() > ROWS_MAX {
        let _ = write!(out, "<p class=\"note\">{} more.</p>", all.len() - ROWS_MAX);
    }
    out.push_str("</details>\n");
}

/// Milliseconds since 1970 as a date in UTC.
fn date(unix_ms: u64) -> String {
    let (days, of_day) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    // The calendar of eras of 400 years, which begin in March.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + 400 * era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendars() {
        let cases = [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399_000, "2000-02-28 23:59:59 UTC"),
            (951_782_400_000, "2000-02-29 00:00:00 UTC"),
            (1_798_761_599_000, "2026-12-31 23:59:59 UTC"),
            (4_107_542_400_999, "2100-03-01 00:00:00 UTC"),
        ];
        cases.iter().for_each(|(ms, text)| assert_eq!(date(*ms), *text));
    }
}
