//! `evergate models`: what the programs that serve models are doing; `load` and `unload` start and stop one by hand.

use std::path::Path;
use std::time::Duration;

use evergate_core::inherit::code;
use evergate_supervisor::client;
use serde::Serialize;
use serde_json::{Value, json};

use super::{board, exits, print, print_json, refuse};
use crate::cli::Form;
use crate::telemetry::ended::how;
use crate::telemetry::programs::{Program, programs};
use crate::telemetry::status::{age_text, printable, table};

/// A model may take long to load; Ctrl-C ends the waiting, not the order.
const PATIENCE: Duration = Duration::from_secs(3600);

const HEAD: [&str; 12] = [
    "MODEL",
    "STATE",
    "SINCE",
    "HOST",
    "PID",
    "ADDRESS",
    "INFLIGHT",
    "WAITING",
    "RESTARTS",
    "FAILED",
    "LAST_EXIT",
    "CAUSE",
];

/// What the board knows, and what is on record.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    program: Program,
    /// The record of its last end, or its host's; null when there is none.
    last_exit: Option<Value>,
}

/// Prints them; returns the exit code, 1 when no gateway runs.
#[must_use]
pub fn run(state_dir: &Path, form: Form) -> u8 {
    let board = match board(state_dir, form) {
        Ok(board) => board,
        Err(code) => return code,
    };
    // Only last exits are from there: without them there is still something to show.
    let records = exits::read(state_dir).unwrap_or_else(|error| {
        eprintln!("evergate: cannot read the exit records in {}: {error}", state_dir.display());
        Vec::new()
    });
    let last_exit = |name: &str| {
        let is_its = |record: &&Value| record.get("upstream").and_then(Value::as_str) == Some(name);
        records.iter().rfind(is_its).cloned()
    };
    let report = |program: Program| Report { last_exit: last_exit(&program.model), program };
    let models: Vec<Report> = programs(&board).into_iter().map(report).collect();
    match form {
        Form::Json => print_json(&models),
        Form::Text if models.is_empty() => {
            eprintln!("evergate: no upstream has a program");
            code::OK
        }
        Form::Text => print(&table(&HEAD, &models.iter().map(cells).collect::<Vec<_>>())),
    }
}

/// Starts or stops one, and waits for that; returns the exit code, 1 when it does not come about.
#[must_use]
pub fn order(state_dir: &Path, order: &str, name: &str, form: Form) -> u8 {
    match client::order(state_dir, &format!("{order} {name}"), PATIENCE) {
        Ok(_) => match form {
            Form::Text => print(&format!("{name} {order}ed\n")),
            Form::Json => print_json(&json!({ "model": name, "order": order })),
        },
        Err(error) => refuse(&error, state_dir, form, json!({ "model": name, "order": order })),
    }
}

fn cells(Report { program, last_exit }: &Report) -> Vec<String> {
    let pid = |pid: Option<i32>| pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    let text = |text: Option<&str>| text.map_or_else(|| "-".to_owned(), printable);
    // What is wrong with it now; else what was said at its last end.
    let note = last_exit.as_ref().and_then(|record| record.get("note")?.as_str()).filter(|note| !note.is_empty());
    vec![
        printable(&program.model),
        program.state_text(),
        program.since_ms.map_or_else(|| "-".to_owned(), age_text),
        pid(program.host_pid),
        pid(program.program_pid),
        text(program.address.as_deref()),
        program.in_flight.to_string(),
        program.waiting.to_string(),
        program.restarts.to_string(),
        program.failures.to_string(),
        last_exit.as_ref().map_or_else(|| "-".to_owned(), exit),
        text(program.cause.as_deref().or(note)),
    ]
}

/// `program signal 9 (SIGKILL), unknown, 12s ago`.
fn exit(record: &Value) -> String {
    let text = |key: &str| printable(record.get(key).and_then(Value::as_str).unwrap_or_default());
    let at_ms = record.get("at_ms").and_then(Value::as_u64).unwrap_or(0);
    let age = age_text(evergate_sys::unix_ms().saturating_sub(at_ms));
    format!("{} {}, {}, {age} ago", text("kind"), how(record), text("initiator"))
}
