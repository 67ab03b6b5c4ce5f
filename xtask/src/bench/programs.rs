//! Programs of this machine as models: a process per request beside a loop that starts the same program with nothing between,
//! and a kept process beside the same one at the other end of two pipes.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::load::{self, Load, Outcome};
use super::report::{keep, median, number};
use super::subject::{self, Kind, Place, Subject};
use super::{Options, proc};

const BEGIN: &str = "<!-- programs: written by `cargo xtask bench --only programs --write` -->";
const END: &str = "<!-- /programs -->";

/// It gives back what it is given; as small as a program is that somebody else has made.
const COMMAND: &str = "/bin/cat";
/// What it is given: about what a short prompt has.
const TEXT_BYTES: usize = 712;

const COMMAND_1: Load = Load { model: "cat/x", connections: 1, requests: 1_000, events: 0 };
const COMMAND_8: Load = Load { model: "cat/x", connections: 8, requests: 1_000, events: 0 };
const KEPT_1: Load = Load { model: "kept/x", connections: 1, requests: 5_000, events: 0 };

/// Its rows: what is bare, what is Evergate's, and whether they are compared by their ratio or by what is added.
#[derive(Default)]
struct Row {
    name: &'static str,
    bare: Vec<f64>,
    evergate: Vec<f64>,
    is_added: bool,
}

/// Measures both, and shows the table.
pub async fn run(options: &Options, place: &Place, root: &Path) -> Result<(), String> {
    let config = format!(
        "[upstreams.cat]\nprocess = {{ mode = \"command\", argv = [\"{COMMAND}\"], in_flight_max = 8 }}\n\
         [upstreams.kept]\nprocess = {{ mode = \"stdio\", argv = [\"{}\", \"bench-kept\"] }}\n",
        own_program()?
    );
    let subject = Subject::start_with(Kind::Evergate { workers: 1 }, place, &config).await?;
    for load in [COMMAND_8, KEPT_1] {
        answered(&subject, Load { requests: 50, ..load }).await?;
    }
    let row = |name, is_added| Row { name, is_added, ..Row::default() };
    let mut rows = [
        row("command: requests/s of one core, one at a time", false),
        row("command: requests/s of one core, 8 at a time", false),
        row("stdio: median latency, one at a time (µs)", true),
        row("stdio: 99th percentile, one at a time (µs)", true),
    ];
    for pair in 0..options.pairs {
        let bare = subject::at_the_subjects(place, || per_second(COMMAND_1.requests, started_and_read))?;
        let kept = latencies(place, KEPT_1.requests)?;
        let (one, many) = (answered(&subject, COMMAND_1).await?, answered(&subject, COMMAND_8).await?);
        let through = answered(&subject, KEPT_1).await?;
        let micros = |outcome: &Outcome, percent| outcome.percentile(percent) as f64 / 1e3;
        let rate = |outcome: &Outcome| outcome.latencies.len() as f64 / outcome.elapsed.as_secs_f64();
        let values = [
            (bare, rate(&one)),
            (bare, rate(&many)),
            (micros(&kept, 50), micros(&through, 50)),
            (micros(&kept, 99), micros(&through, 99)),
        ];
        for (row, (bare, evergate)) in rows.iter_mut().zip(values) {
            row.bare.push(bare);
            row.evergate.push(evergate);
        }
        eprintln!("bench: programs, pair {} of {}", pair + 1, options.pairs);
    }
    subject.end();
    let text =
        format!("`{}` on {}; medians of {} pairs.\n\n{}", options.typed, proc::machine(), options.pairs, table(&rows));
    println!("{text}");
    if options.is_write { keep(root, (BEGIN, END), &text) } else { Ok(()) }
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from("| | bare | Evergate | |\n|---|--:|--:|--:|\n");
    for Row { name, bare, evergate, is_added } in rows {
        let pairs = evergate.iter().zip(bare);
        let against: Vec<f64> =
            pairs.map(|(evergate, bare)| if *is_added { evergate - bare } else { evergate / bare }).collect();
        let against = median(&against).unwrap_or(f64::NAN);
        let against = if *is_added { format!("{against:+.0}") } else { format!("{against:.2}×") };
        let [bare, evergate] = [bare, evergate].map(|values| number(median(values).unwrap_or(f64::NAN), 0));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {name} | {bare} | {evergate} | {against} |");
    }
    text
}

async fn answered(subject: &Subject, load: Load) -> Result<Outcome, String> {
    let outcome = load::run(subject.address, load).await;
    match outcome.errors.first() {
        None => Ok(outcome),
        Some(error) => Err(format!("{}: {} failed, the first: {error}", load.model, outcome.errors.len())),
    }
}

fn own_program() -> Result<String, String> {
    let path = std::fs::read_link("/proc/self/exe").map_err(words("own program"))?;
    path.into_os_string().into_string().map_err(|path| format!("own program: {} is not UTF-8", path.display()))
}

fn words<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error}")
}

fn per_second(count: u64, mut once: impl FnMut() -> Result<(), String>) -> Result<f64, String> {
    let start = Instant::now();
    for _ in 0..count {
        once()?;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// What anybody has to do for one request: start the program (the standard library does it by posix_spawn(3)), give it the
/// text, read what it says, and wait for its end.
fn started_and_read() -> Result<(), String> {
    let text = [b'x'; TEXT_BYTES];
    let mut command = Command::new(COMMAND);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(words(COMMAND))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(&text).map_err(words(COMMAND))?;
    }
    let output = child.wait_with_output().map_err(words(COMMAND))?;
    if output.stdout == text { Ok(()) } else { Err(format!("{COMMAND} gave back something else")) }
}

/// Frames to a kept process and back, one at a time; who asks is on the load's CPU, as a client of Evergate's is.
fn latencies(place: &Place, count: u64) -> Result<Outcome, String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("bench-kept").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = subject::at_the_subjects(place, || command.spawn()).map_err(words("bench-kept"))?;
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err("bench-kept has no pipes".into());
    };
    let mut output = BufReader::new(output);
    let mut line = String::new();
    output.read_line(&mut line).map_err(words("bench-kept"))?;
    let address = ([127, 0, 0, 1], 0).into();
    let request = load::request(address, "x", false);
    let body = request.split(|byte| *byte == b'\n').next_back().unwrap_or_default();
    let body = String::from_utf8_lossy(body).into_owned();
    let mut outcome = Outcome::default();
    let began = Instant::now();
    for id in 0..count {
        let start = Instant::now();
        let frame = format!("{{\"type\":\"request\",\"id\":\"{id}\",\"endpoint\":\"chat\",\"body\":{body}}}\n");
        input.write_all(frame.as_bytes()).map_err(words("bench-kept"))?;
        line.clear();
        output.read_line(&mut line).map_err(words("bench-kept"))?;
        outcome.latencies.push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
        if !line.contains("\"result\"") {
            return Err(format!("bench-kept said {line}"));
        }
    }
    outcome.elapsed = began.elapsed();
    outcome.latencies.sort_unstable();
    drop(input);
    child.wait().map_err(words("bench-kept"))?;
    Ok(outcome)
}

/// The life of a kept process: answers each request's frame with the same words (docs/stdio-protocol.md).
pub fn kept() -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    let mut say =
        |frame: &str| out.write_all(frame.as_bytes()).and_then(|()| out.flush()).map_err(words("standard output"));
    say("{\"type\":\"ready\",\"protocol\":1,\"in_flight\":1}\n")?;
    let text = "x".repeat(TEXT_BYTES);
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(words("standard input"))?;
        let frame: serde_json::Value = serde_json::from_str(&line).map_err(words("a frame"))?;
        let field = |name: &str| frame.get(name).and_then(serde_json::Value::as_str).unwrap_or_default();
        match field("type") {
            "request" => say(&format!("{{\"type\":\"result\",\"id\":\"{}\",\"text\":\"{text}\"}}\n", field("id")))?,
            "drain" => return say("{\"type\":\"drained\"}\n"),
            _ => {}
        }
    }
    Ok(())
}
