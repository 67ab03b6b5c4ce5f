//! Instructions per request, counted by callgrind: the guard against drift that a busy machine cannot blur.

use std::fmt::Write as _;
use std::path::Path;

use super::load::{self, Load};
use super::subject::{Kind, Place, Subject, find_program};
use super::{Options, mock, proc};

/// Drift that is not one: another compiler inlines differently, another C library has another `memcpy`.
const TOLERANCE_PERCENT: u64 = 5;
const REQUESTS: u64 = 400;
const CHUNKS: u64 = 100;
const STREAMS: u64 = 20;

const UNARY: Load = Load { model: "u0", connections: 1, requests: REQUESTS, events: 0 };
const STREAM: Load = Load { model: "s100x0", connections: 1, requests: STREAMS, events: CHUNKS + mock::CLOSING_EVENTS };

/// Counts, prints, and compares with the committed numbers; whether there was no drift.
pub async fn run(options: &Options, mut place: Place, root: &Path) -> Result<bool, String> {
    if find_program("valgrind").is_none() {
        eprintln!("SKIPPED instructions: valgrind is not installed (apt-get install valgrind)");
        return Ok(true);
    }
    let out = place.folder.join("callgrind.%p");
    let file = format!("--callgrind-out-file={}", out.display());
    place.under = ["valgrind", "--quiet", "--tool=callgrind", "--trace-children=yes", &file].map(String::from).into();
    // What both of two runs do (start, warm up, stop) falls out of their difference.
    let once = worker(&place, &[UNARY]).await?;
    let twice = worker(&place, &[UNARY, UNARY]).await?;
    let streamed = worker(&place, &[UNARY, STREAM]).await?;
    let counted = [
        ("unary", twice.saturating_sub(once) / REQUESTS),
        ("chunk", streamed.saturating_sub(once) / (STREAMS * CHUNKS)),
    ];
    println!("instructions of the worker on {}:", proc::machine());
    let path = root.join("xtask").join("instructions.txt");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let mut kept = String::from(
        "# Worker instructions per unary request and per chunk: cargo xtask bench --instructions --write\n",
    );
    let mut is_steady = true;
    for (name, count) in counted {
        let before = committed.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        let words = match before {
            None => "no committed number".to_string(),
            Some(before) => {
                let is_within = count.abs_diff(before) * 100 <= before * TOLERANCE_PERCENT;
                is_steady &= is_within;
                format!("committed {before}: {}", if is_within { "steady" } else { "DRIFTED" })
            }
        };
        println!("  per {name}: {count} ({words})");
        let _ = writeln!(kept, "{name} {count}");
    }
    if options.is_write {
        std::fs::write(&path, kept).map_err(|error| format!("xtask/instructions.txt: {error}"))?;
    }
    Ok(is_steady)
}

/// Instructions of the worker's whole life under some loads.
async fn worker(place: &Place, loads: &[Load]) -> Result<u64, String> {
    let subject = Subject::start(Kind::Evergate { workers: 1 }, place).await?;
    for load in loads {
        let outcome = load::run(subject.address, *load).await;
        if let Some(error) = outcome.errors.first() {
            return Err(format!("Evergate under callgrind: {error}"));
        }
    }
    let worker = subject.pid().and_then(|master| proc::tree(master).into_iter().find(|pid| is_worker(*pid)));
    let worker = worker.ok_or("Evergate under callgrind: no worker among its processes")?;
    // callgrind writes its file when the process ends.
    subject.end();
    let file = place.folder.join(format!("callgrind.{worker}"));
    let text =
        std::fs::read_to_string(&file).map_err(|error| format!("the worker was not followed by valgrind: {error}"))?;
    let totals = text.lines().find_map(|line| line.strip_prefix("totals:").or_else(|| line.strip_prefix("summary:")));
    totals.and_then(|text| text.trim().parse().ok()).ok_or_else(|| format!("{}: no totals", file.display()))
}

/// Whether a process's arguments say `worker`; under valgrind they stand behind valgrind's own.
fn is_worker(pid: u32) -> bool {
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    arguments.split(|byte| *byte == 0).any(|argument| argument == b"worker")
}
