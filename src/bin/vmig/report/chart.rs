//! Lines over time and bars, as SVG in a page. Drawn for the width of a phone, which wider screens only scale.

use std::fmt::Write as _;

/// Size of a chart, and the room around it for the axes' words.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 190.0;
const LEFT: f64 = 54.0;
const RIGHT: f64 = 8.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 26.0;
/// Columns in which a line may go up and down: more are not seen.
const COLUMNS: usize = 400;
/// Marks of rounds that can be told from each other.
const MARKS_MAX: usize = 100;

/// Text that is shown as it is.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

#[expect(clippy::cast_precision_loss, reason = "a drawing")]
pub(crate) fn float(n: u64) -> f64 {
    n as f64
}

/// An amount with a unit that fits it.
pub(crate) fn bytes(n: f64) -> String {
    scaled(n, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// Nanoseconds as a time.
pub(crate) fn time(ns: f64) -> String {
    match ns {
        _ if ns >= 120e9 => format!("{}:{:02.0} min", (ns / 60e9).floor(), (ns / 1e9) % 60.0),
        _ if ns >= 1e9 => format!("{} s", short(ns / 1e9)),
        _ if ns >= 1e6 => format!("{} ms", short(ns / 1e6)),
        _ if ns > 0.0 => format!("{} µs", short(ns / 1e3)),
        _ => "0".to_owned(),
    }
}

fn scaled(mut n: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while n >= step * 0.9995 && unit + 1 < units.len() {
        (n, unit) = (n / step, unit + 1);
    }
    format!("{} {}", short(n), units[unit])
}

/// Three digits or so.
fn short(n: f64) -> String {
    match n {
        _ if n == 0.0 => "0".to_owned(),
        _ if n >= 99.95 => format!("{n:.0}"),
        _ if n >= 9.995 => format!("{n:.1}").trim_end_matches(".0").to_owned(),
        _ => format!("{n:.2}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

/// A line of a chart: what it shows, by time.
pub(crate) struct Line<'a> {
    /// Class for its colour, and its name.
    pub(crate) class: &'a str,
    pub(crate) points: Vec<(u64, u64)>,
    /// Filled below.
    pub(crate) area: bool,
}

/// Lines over the time from 0 to `end`, with a mark for each round and a shade from the moment the guest was stopped.
pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) end: u64,
    pub(crate) rounds: &'a [u64],
    pub(crate) stopped: Option<(u64, u64)>,
    pub(crate) lines: &'a [Line<'a>],
}

impl Chart<'_> {
    fn x(&self, t: u64) -> f64 {
        let end = float(self.end.max(1));
        LEFT + (float(t).min(end) / end) * (WIDTH - LEFT - RIGHT)
    }

    pub(crate) fn svg(&self) -> String {
        let most = self.lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value).max().unwrap_or(0);
        let step = power_of_two(float(most) / 3.0);
        let top = (float(most) / step).ceil().max(1.0) * step;
        let y = |value: f64| TOP + (1.0 - value / top) * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\"><title>{}</title>",
            escaped(self.title),
            escaped(self.title)
        );
        let floor = HEIGHT - BOTTOM;
        if let Some((from, to)) = self.stopped {
            let (from, to) = (self.x(from), self.x(to));
            let width = (to - from).max(1.0);
            let height = floor - TOP;
            let _ = write!(
                svg,
                "<rect class=\"stopped\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
            );
        }
        let mut value = 0.0;
        while value <= top * 1.001 {
            let at = y(value);
            let words = format!("{}{}", bytes(value), self.unit);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{words}</text>",
                WIDTH - RIGHT,
                LEFT - 4.0,
                at + 3.5
            );
            value += step;
        }
        self.times(&mut svg, floor);
        if self.rounds.len() <= MARKS_MAX {
            for round in self.rounds {
                let x = self.x(*round);
                let _ = write!(
                    svg,
                    "<line class=\"round\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{floor:.1}\"/>",
                    floor - 5.0
                );
            }
        }
        for line in self.lines {
            let points: Vec<_> =
                thinned(&line.points, self.end).iter().map(|(t, v)| (self.x(*t), y(float(*v)))).collect();
            let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let path = path.join(" ");
            if let (true, Some(first), Some(last)) = (line.area, points.first(), points.last()) {
                let (first, last) = (first.0, last.0);
                let _ = write!(
                    svg,
                    "<polygon class=\"area {}\" points=\"{first:.1},{floor:.1} {path} {last:.1},{floor:.1}\"/>",
                    line.class
                );
            }
            let _ = write!(svg, "<polyline class=\"line {}\" points=\"{path}\"/>", line.class);
        }
        svg + "</svg>"
    }

    /// The axis of time.
    fn times(&self, svg: &mut String, floor: f64) {
        let step = nice_step(float(self.end.max(1)) / 4.0);
        let mut at = 0.0;
        while at <= float(self.end) * 1.001 {
            let x = LEFT + at / float(self.end.max(1)) * (WIDTH - LEFT - RIGHT);
            let anchor = if x > WIDTH - 30.0 { "end" } else { "middle" };
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{floor:.1}\" y2=\"{:.1}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
                floor + 3.0,
                floor + 15.0,
                time(at)
            );
            at += step;
        }
    }
}

/// 1, 2 or 5 times a power of ten.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1.0).log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|n| n * power).find(|step| *step >= least * 0.999).unwrap_or(10.0 * power)
}

/// What people count bytes by.
fn power_of_two(least: f64) -> f64 {
    2f64.powf(least.max(1.0).log2().ceil())
}

/// As many points as can be told from each other: of each column the lowest and the highest.
fn thinned(points: &[(u64, u64)], end: u64) -> Vec<(u64, u64)> {
    if points.len() <= 2 * COLUMNS {
        return points.to_vec();
    }
    let column = |t: u64| (float(t) / float(end.max(1)) * float(COLUMNS as u64)).floor();
    let mut out = Vec::new();
    for same in points.chunk_by(|a, b| column(a.0) == column(b.0)) {
        let extremes = [same.iter().min_by_key(|p| p.1), same.iter().max_by_key(|p| p.1)];
        let mut extremes: Vec<_> = extremes.into_iter().flatten().copied().collect();
        extremes.sort_unstable();
        out.extend(extremes);
    }
    out
}

/// A bar made of parts, in per cent of `whole`.
pub(crate) fn bar(label: &str, parts: &[(&str, u64)], whole: u64) -> String {
    let mut svg = format!(
        "<svg class=\"bar\" viewBox=\"0 0 {WIDTH} 22\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>",
        escaped(label)
    );
    let mut x = 0.0;
    for (class, part) in parts {
        let width = float(*part) / float(whole.max(1)) * WIDTH;
        if width > 0.0 {
            let _ = write!(
                svg,
                "<rect class=\"part {class}\" x=\"{x:.2}\" y=\"2\" width=\"{width:.2}\" height=\"18\"><title>{class} {}</title></rect>",
                time(float(*part))
            );
        }
        x += width;
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        let cases = [(0.0, "0 B"), (1023.9, "1 KiB"), (1536.0, "1.5 KiB"), (5e9, "4.66 GiB"), (1e18, "888 PiB")];
        cases.iter().for_each(|(n, text)| assert_eq!(bytes(*n), *text));
        let cases = [(0.0, "0"), (1500.0, "1.5 µs"), (2e6, "2 ms"), (12.34e9, "12.3 s"), (150e9, "2:30 min")];
        cases.iter().for_each(|(n, text)| assert_eq!(time(*n), *text));
    }

    #[test]
    fn steps_are_round() {
        let cases = [(3.0, 5.0), (30.0, 50.0), (60.0, 100.0), (0.0, 1.0), (0.26e9, 0.5e9)];
        cases.iter().for_each(|(least, step)| assert!((nice_step(*least) - step).abs() < 1e-6, "{least}"));
        let cases = [(0.0, 1.0), (3.0, 4.0), (1024.0, 1024.0), (1025.0, 2048.0)];
        cases.iter().for_each(|(least, step)| assert!((power_of_two(*least) - step).abs() < 1e-6, "{least}"));
    }

    #[test]
    fn a_long_line_keeps_its_peaks() {
        let mut points: Vec<(u64, u64)> = (0..100_000).map(|t| (t, 10)).collect();
        points[77_777].1 = 99;
        points[33_333].1 = 1;
        let thin = thinned(&points, 100_000);
        assert!(thin.len() <= 2 * COLUMNS + 2 && thin.is_sorted(), "{}", thin.len());
        assert!(thin.contains(&(77_777, 99)) && thin.contains(&(33_333, 1)));
    }
}
