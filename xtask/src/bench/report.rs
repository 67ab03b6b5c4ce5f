//! The table: medians, ratios, targets.

use std::fmt::Write as _;
use std::path::Path;

use super::measure::{Measure, Samples};
use super::{Options, proc};

/// What issue 2 asks for; `None` where it only asks to know.
#[derive(Clone, Copy)]
enum Target {
    /// At most so many times the hyper proxy's.
    Ratio(f64),
    /// At most the hyper proxy's plus so much.
    Above(f64),
    /// At most so much.
    AtMost(f64),
}

struct Row {
    measure: Measure,
    name: &'static str,
    /// What a value is divided by before it is shown, and the digits it is shown with.
    unit: (f64, usize),
    /// Whether the direct column is taken off first.
    is_added: bool,
    target: Option<Target>,
}

const fn row(measure: Measure, name: &'static str, unit: (f64, usize), target: Option<Target>) -> Row {
    Row { measure, name, unit, is_added: false, target }
}

const fn added(measure: Measure, name: &'static str) -> Row {
    Row { measure, name, unit: (1.0, 0), is_added: true, target: None }
}

#[rustfmt::skip]
const ROWS: [Row; 13] = [
    row(Measure::UnaryCpu1, "CPU per 10,000 requests, one at a time (ms)", (1.0, 0), Some(Target::Ratio(1.15))),
    row(Measure::UnaryCpu64, "CPU per 10,000 requests, 64 at a time (ms)", (1.0, 0), Some(Target::Ratio(1.3))),
    row(Measure::ChunkCpuDense, "CPU per 10,000 chunks, back to back (ms)", (1.0, 1), Some(Target::Ratio(1.15))),
    row(Measure::ChunkCpuPaced, "CPU per 10,000 chunks, 5 ms apart (ms)", (1.0, 1), Some(Target::Ratio(1.15))),
    row(Measure::Rate, "requests/s of one core, 64 at a time", (1.0, 0), None),
    added(Measure::P50At1, "added median latency, one at a time (µs)"),
    added(Measure::P99At1, "added 99th percentile, one at a time (µs)"),
    added(Measure::P50At64, "added median latency, 64 at a time, upstream takes 20 ms (µs)"),
    added(Measure::P99At64, "added 99th percentile, 64 at a time, upstream takes 20 ms (µs)"),
    row(Measure::RssIdle, "RssAnon idle, whole tree (MiB)", (1024.0, 1), None),
    row(Measure::RssStream, "RssAnon per held stream, from 1,000 to 2,000 (KiB)", (1.0, 1), Some(Target::Above(12.0))),
    row(Measure::Pss, "PSS idle: master, clerk, 2 workers (MiB)", (1024.0, 1), Some(Target::AtMost(24.0))),
    row(Measure::FirstAnswer, "exec to first 200, an https upstream configured (ms)", (1.0, 1), Some(Target::AtMost(50.0))),
];

const COLUMNS: [&str; 4] = ["direct", "nginx", "hyper proxy", "Evergate"];
const BEGIN: &str = "<!-- bench: written by `cargo xtask bench --write` -->";
const END: &str = "<!-- /bench -->";

/// Prints the table, keeps it when asked to, and says whether every target was met.
pub fn show(options: &Options, samples: &Samples, root: &Path) -> Result<bool, String> {
    let mut text = format!("`{}` on {}; medians of {} pairs.\n\n", options.typed, proc::machine(), options.pairs);
    let (table, misses) = table(samples);
    text.push_str(&table);
    println!("{text}");
    if misses > 0 {
        eprintln!("bench: {misses} target(s) missed");
    }
    if options.is_write {
        keep(root, (BEGIN, END), &text)?;
    }
    Ok(misses == 0)
}

/// Puts a table between its markers in docs/performance.md.
pub fn keep(root: &Path, markers: (&str, &str), text: &str) -> Result<(), String> {
    let path = root.join("docs").join("performance.md");
    let name = |error| format!("docs/performance.md: {error}");
    let before = std::fs::read_to_string(&path).map_err(name)?;
    let after = place(&before, markers, text).ok_or("docs/performance.md has lost its bench markers")?;
    std::fs::write(&path, after).map_err(name)
}

/// The document with what is between its markers replaced.
fn place(document: &str, (begin, end): (&str, &str), text: &str) -> Option<String> {
    let (before, rest) = document.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{text}{end}{after}"))
}

/// The table, and how many targets were missed.
fn table(samples: &Samples) -> (String, usize) {
    let mut text = String::from("| |");
    for column in COLUMNS {
        let _ = write!(text, " {column} |");
    }
    text.push_str(" Evergate to proxy | target |\n|---|--:|--:|--:|--:|--:|---|\n");
    let mut misses = 0;
    for row in &ROWS {
        let columns: Vec<Vec<f64>> = COLUMNS.iter().map(|column| values(samples, row, column)).collect();
        if columns.iter().all(Vec::is_empty) {
            continue;
        }
        let _ = write!(text, "| {} |", row.name);
        for values in &columns {
            let _ = write!(text, " {} |", median(values).map_or_else(|| "—".into(), |value| number(value, row.unit.1)));
        }
        let [.., proxy, evergate] = columns.as_slice() else { continue };
        let (against, verdict, is_missed) = judge(row, proxy, evergate);
        misses += usize::from(is_missed);
        let _ = writeln!(text, " {against} | {verdict} |");
    }
    (text, misses)
}

/// A column's values in the row's unit; without the direct column's, pair by pair, for what is added.
fn values(samples: &Samples, row: &Row, column: &str) -> Vec<f64> {
    let values = samples.of(row.measure, column);
    let direct = samples.of(row.measure, "direct");
    if row.is_added {
        if column == "direct" {
            return Vec::new();
        }
        return values.iter().zip(direct).map(|(value, direct)| value - direct).collect();
    }
    // The mock alone: what it costs is no gateway's.
    let is_cost = column == "direct" && row.measure != Measure::Rate;
    if is_cost { Vec::new() } else { values.iter().map(|value| value / row.unit.0).collect() }
}

/// How Evergate stands against the proxy, the target's words, and whether it was missed.
fn judge(row: &Row, proxy: &[f64], evergate: &[f64]) -> (String, String, bool) {
    let pairs = || evergate.iter().zip(proxy);
    let ratio = median(&pairs().map(|(evergate, proxy)| evergate / proxy).collect::<Vec<_>>());
    let above = median(&pairs().map(|(evergate, proxy)| evergate - proxy).collect::<Vec<_>>());
    let against = match row.target {
        Some(Target::Above(_)) => above.map(|value| format!("{value:+.1}")),
        _ if row.is_added => above.map(|value| format!("{value:+.0}")),
        _ => ratio.map(|value| format!("{value:.2}×")),
    };
    let (value, limit, words) = match row.target {
        None => (None, 0.0, String::new()),
        Some(Target::Ratio(limit)) => (ratio, limit, format!("≤ {limit:.2}×")),
        Some(Target::Above(limit)) => (above, limit, format!("≤ +{limit:.0}")),
        Some(Target::AtMost(limit)) => (median(evergate), limit, format!("≤ {limit:.0}")),
    };
    let is_missed = value.is_some_and(|value| value > limit);
    let verdict = match value {
        None => words,
        Some(_) if is_missed => format!("{words}: **missed**"),
        Some(_) => format!("{words}: met"),
    };
    (against.unwrap_or_else(|| "—".into()), verdict, is_missed)
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = values.get(middle).copied()?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    values.get(middle - 1).map(|lower| f64::midpoint(*lower, upper))
}

/// With thousands set apart.
pub fn number(value: f64, digits: usize) -> String {
    let plain = format!("{value:.digits$}");
    let (whole, rest) = plain.split_at(plain.find('.').unwrap_or(plain.len()));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let mut out = String::from(sign);
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        let row = &ROWS[0];
        let (against, verdict, is_missed) = judge(row, &[100.0, 200.0, 300.0], &[120.0, 220.0, 330.0]);
        assert_eq!((against.as_str(), verdict.as_str(), is_missed), ("1.10×", "≤ 1.15×: met", false));
        assert!(judge(row, &[100.0], &[116.0]).2);
        assert!(!judge(row, &[100.0], &[]).2);
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(1_234_567.0, 0), "1,234,567");
        assert_eq!(number(-123.45, 1), "-123.5");
    }

    #[test]
    fn the_table_goes_between_its_markers() {
        let document = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        assert_eq!(place(&document, (BEGIN, END), "new\n"), Some(format!("a\n{BEGIN}\nnew\n{END}\nb\n")));
        assert_eq!(place("a", (BEGIN, END), "new"), None);
    }
}
