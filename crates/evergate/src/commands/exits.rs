//! `evergate exits`: how the processes of this state folder ended, oldest first. Works without a running gateway.

use std::io;
use std::path::{Path, PathBuf};

use evergate_core::inherit::code;
use evergate_supervisor::{EXITS_FILE, EXITS_OLD_FILE};
use serde_json::Value;

use super::{print, print_json};
use crate::cli::Form;
use crate::lives::host::{EXITS_SUFFIX, FOLDER, OLD_SUFFIX};
use crate::telemetry::ended::how;
use crate::telemetry::status::{age_text, printable, table};

/// Ids of lost requests shown in a row of the table; `--json` has them all.
const IDS_SHOWN: usize = 3;

/// Records whose last words are shown below the table, the newest; `--json` has those of all.
const WORDS_SHOWN: usize = 10;
/// Lines of each: a traceback's end, which says the most.
const LINES_SHOWN: usize = 20;

/// Prints all records; returns the exit code, 1 when they cannot be read.
#[must_use]
pub fn run(state_dir: &Path, form: Form) -> u8 {
    let records = match read(state_dir) {
        Ok(records) => records,
        Err(error) => {
            eprintln!("evergate: cannot read the exit records in {}: {error}", state_dir.display());
            return code::FAILED;
        }
    };
    match form {
        Form::Json => print_json(&records),
        Form::Text if records.is_empty() => {
            eprintln!("evergate: no exit records in {}", state_dir.display());
            code::OK
        }
        Form::Text => {
            let table = table(&HEAD, &records.iter().map(cells).collect::<Vec<_>>());
            print(&format!("{table}{}", last_words(&records)))
        }
    }
}

/// What the programs among them have written last, where a NOTE holds too little of it: a traceback, say.
fn last_words(records: &[Value]) -> String {
    let text =
        |record: &Value, key: &str| record.get(key).and_then(Value::as_str).unwrap_or_default().trim_end().to_owned();
    let mut told: Vec<String> = Vec::new();
    for record in records.iter().rev() {
        let stderr = text(record, "stderr");
        let lines: Vec<&str> = stderr.lines().collect();
        if lines.len() < 2 {
            continue;
        }
        if told.len() == WORDS_SHOWN {
            told.push("\nWhat earlier ones have said: --json\n".to_owned());
            break;
        }
        let at = record.get("at_ms").and_then(Value::as_u64).map_or_else(|| "-".to_owned(), utc);
        let pid = record.get("pid").and_then(Value::as_u64).unwrap_or(0);
        let mut words = format!("\n{at} program {} {pid} has said last:\n", printable(&text(record, "upstream")));
        let start = lines.len().saturating_sub(LINES_SHOWN);
        lines.iter().skip(start).for_each(|line| words.push_str(&format!("  {}\n", printable(line))));
        told.push(words);
    }
    told.into_iter().rev().collect()
}

/// The records of both files. Lines that are no records are left out with a word about it: a machine that lost its power
/// leaves half of one.
pub(super) fn read(state_dir: &Path) -> io::Result<Vec<Value>> {
    let mut records = Vec::new();
    let mut paths = vec![state_dir.join(EXITS_OLD_FILE), state_dir.join(EXITS_FILE)];
    paths.extend(of_programs(&state_dir.join(FOLDER))?);
    for path in paths {
        let name = path.display();
        // The open of a pipe could wait for ever.
        if std::fs::metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            eprintln!("evergate: {name} is no file, left out");
            continue;
        }
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for (line, number) in bytes.split(|byte| *byte == b'\n').zip(1_u64..).filter(|(line, _)| !line.is_empty()) {
            match serde_json::from_slice::<Value>(line) {
                Ok(record) if record.is_object() => records.push(record),
                _ => eprintln!("evergate: {name}:{number}: not a whole record, left out"),
            }
        }
    }
    // Each file is in order; the sort keeps that where two ends have the same time.
    records.sort_by_key(|record| record.get("at_ms").and_then(Value::as_u64).unwrap_or(0));
    Ok(records)
}

/// Files with the ends of models' programs, the older one of each first.
fn of_programs(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.to_string_lossy();
        if name.ends_with(EXITS_SUFFIX)
            || name.strip_suffix(OLD_SUFFIX).is_some_and(|name| name.ends_with(EXITS_SUFFIX))
        {
            paths.push(path.clone());
        }
    }
    // What is older first.
    paths.sort_unstable_by(|one, other| other.cmp(one));
    Ok(paths)
}

const HEAD: [&str; 14] =
    ["TIME", "CHILD", "PID", "GEN", "ENDED", "INITIATOR", "AGE", "BEAT", "RSS", "CPU", "LOST", "IDLE", "IDS", "NOTE"];

fn cells(record: &Value) -> Vec<String> {
    let text = |key: &str| printable(record.get(key).and_then(Value::as_str).unwrap_or_default());
    let number = |key: &str| record.get(key).and_then(Value::as_u64);
    let shown = |key: &str| number(key).map_or_else(|| "-".to_owned(), |number| number.to_string());
    let lost = record.get("lost").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let cells = vec![
        number("at_ms").map_or_else(|| "-".to_owned(), utc),
        match record.get("upstream").and_then(Value::as_str) {
            Some(upstream) => format!("{} {}", text("kind"), printable(upstream)),
            None => format!("{} {}", text("kind"), shown("slot")),
        },
        shown("pid"),
        shown("generation"),
        how(record),
        text("initiator"),
        number("age_ms").map_or_else(|| "-".to_owned(), age_text),
        number("last_beat_ms").map_or_else(|| "-".to_owned(), |ms| format!("{ms}ms")),
        number("rss_max_kib").filter(|kib| *kib > 0).map_or_else(|| "-".to_owned(), |kib| format!("{}MiB", kib / 1024)),
        number("cpu_ms").map_or_else(|| "-".to_owned(), |ms| format!("{ms}ms")),
        lost.len().to_string(),
        shown("connections_idle"),
        ids(lost),
        remarks(record),
    ];
    // An empty cell would move the ones after it for whoever splits at spaces.
    cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }).collect()
}

/// What explains the end, most telling first: the request that was running, the last panic, why a host ended it, what the
/// process said, what tells who sent a KILL.
fn remarks(record: &Value) -> String {
    let text = |path: &str| {
        let text = record.pointer(path).and_then(Value::as_str).map(printable);
        text.filter(|text| !text.is_empty())
    };
    let running = text("/running").map(|id| format!("running {id}"));
    let panic = text("/panic/place").map(|place| {
        let age = record.pointer("/panic/age_ms").and_then(Value::as_u64);
        format!("panic at {place}{}", age.map_or_else(String::new, |ms| format!(" ({ms} ms before)")))
    });
    let remarks = [running, panic, text("/why"), text("/note"), text("/evidence")];
    remarks.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

fn ids(lost: &[Value]) -> String {
    let id = |lost: &Value| lost.get("request_id").and_then(Value::as_str).map(printable);
    let shown: Vec<String> = lost.iter().filter_map(id).take(IDS_SHOWN).collect();
    let more = lost.len().saturating_sub(shown.len());
    let tail = if more > 0 { format!(",+{more}") } else { String::new() };
    format!("{}{tail}", shown.join(","))
}

/// Unix milliseconds as `2026-11-21T06:05:45.123Z`. The calendar is Howard Hinnant's `civil_from_days`
/// (howardhinnant.github.io/date_algorithms.html), for days from 1970 on.
pub(super) fn utc(at_ms: u64) -> String {
    let (days, rest) = (at_ms / 86_400_000, at_ms % 86_400_000);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (seconds, ms) = (rest / 1_000, rest % 1_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::ended::signal_name;
    use evergate_core::exit::{ExitRecord, Initiator, Kind, Lost, Status};

    fn record(status: Status, lost: u32) -> String {
        let lost_one = |number: u32| Lost { request_id: format!("req_{number}"), ..Lost::default() };
        let record = ExitRecord {
            at_ms: 1_795_241_145_123,
            slot: 1,
            generation: 3,
            age_ms: 61_000,
            rss_max_kib: 20_480,
            connections_idle: 4,
            running: (lost > 0).then(|| "req_1".into()),
            lost: (0..lost).map(lost_one).collect(),
            ..ExitRecord::new(Kind::Worker, 77, status, Initiator::Unknown)
        };
        record.to_json()
    }

    #[test]
    fn both_files_are_read_in_order_and_a_broken_line_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), Vec::<Value>::new());
        let killed = record(Status::Signal { number: 9, core: false }, 5);
        let ended = record(Status::Code(0), 0);
        std::fs::write(folder.path().join(EXITS_OLD_FILE), format!("{killed}\n")).unwrap();
        let half = ended.get(..40).unwrap();
        std::fs::write(folder.path().join(EXITS_FILE), format!("{ended}\n{half}")).unwrap();
        let records = read(folder.path()).unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!(
            cells(&records[0]),
            [
                "2026-11-21T06:05:45.123Z",
                "worker 1",
                "77",
                "3",
                "signal 9 (SIGKILL)",
                "unknown",
                "1m01s",
                "-",
                "20MiB",
                "0ms",
                "5",
                "4",
                "req_0,req_1,req_2,+2",
                "running req_1"
            ]
        );
        assert_eq!(cells(&records[1])[4], "code 0");
    }

    #[test]
    fn a_master_that_nobody_reaped_is_unknown() {
        let value: Value = serde_json::from_str(&record(Status::Unknown, 0)).unwrap();
        assert_eq!(how(&value), "unknown");
    }

    #[test]
    fn every_signal_has_a_name() {
        let named: Vec<String> = [1, 9, 15, 16, 24, 25, 31, 32, 34, 64, 65, 0].map(signal_name).into();
        let names = [
            "SIGHUP",
            "SIGKILL",
            "SIGTERM",
            "SIGSTKFLT",
            "SIGXCPU",
            "SIGXFSZ",
            "SIGSYS",
            "other",
            "SIGRTMIN+0",
            "SIGRTMIN+30",
            "other",
            "other",
        ];
        assert_eq!(named, names);
    }

    #[test]
    fn last_words_of_several_lines_are_shown_below_the_table() {
        let record =
            |pid: u64, stderr: &str| serde_json::json!({ "at_ms": 0, "upstream": "m", "pid": pid, "stderr": stderr });
        assert_eq!(last_words(&[record(1, "one line\n"), record(2, "")]), "");
        let long: String = (0..30).map(|line| format!("line {line}\u{1b}\n")).collect();
        let shown = last_words(&[record(3, "a\nb\n"), record(4, &long)]);
        let head = "\n1970-01-01T00:00:00.000Z program m 3 has said last:\n  a\n  b\n";
        assert!(shown.starts_with(head) && shown.ends_with("  line 28 \n  line 29 \n"), "{shown}");
        assert_eq!(shown.lines().filter(|line| line.starts_with("  line ")).count(), LINES_SHOWN);
        let many: Vec<Value> = (1..20).map(|pid| record(pid, "a\nb")).collect();
        let shown = last_words(&many);
        assert!(
            shown.contains("program m 19 ") && !shown.contains("program m 9 ") && shown.contains("--json"),
            "{shown}"
        );
    }

    #[test]
    fn times_are_utc() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (1_709_251_200_000, "2024-03-01T00:00:00.000Z"),
            (4_102_444_799_000, "2099-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(utc(ms), text);
        }
        let _ = utc(u64::MAX);
    }
}
