//! `evergate models`: what the programs that serve models are doing; `load` and `unload` start and stop one by hand.

use std::path::Path;
use std::time::Duration;

use evergate_board::{Board, HostRow, monotonic_ns};
use evergate_core::inherit::code;
use evergate_supervisor::client;
use serde_json::{Value, json};

use super::{print, print_json, refuse};
use crate::cli::Form;
use crate::telemetry::status::{age_text, printable, table};

/// A model may take long to load; Ctrl-C ends the waiting, not the order.
const PATIENCE: Duration = Duration::from_secs(3600);

const HEAD: [&str; 8] = ["MODEL", "STATE", "SINCE", "HOST", "INFLIGHT", "WAITING", "FAILED", "CAUSE"];

/// Prints them; returns the exit code, 1 when no gateway runs.
#[must_use]
pub fn run(state_dir: &Path, form: Form) -> u8 {
    let reply = match client::request(state_dir, "status") {
        Ok(reply) => reply,
        Err(error) => return refuse(&error, state_dir),
    };
    let Some(fd) = reply.fd else {
        eprintln!("evergate: the gateway sent no board");
        return code::FAILED;
    };
    let board = match Board::attach(fd) {
        Ok(board) => board,
        Err(error) => {
            eprintln!("evergate: {error}; is the running gateway of another version than this command?");
            return code::FAILED;
        }
    };
    let now = monotonic_ns();
    let rows = board.hosts().filter(|(_, row)| row.fingerprint() != 0);
    let models: Vec<Value> = rows.map(|(_, row)| model(&board, row, now)).collect();
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
        Err(error) => refuse(&error, state_dir),
    }
}

fn model(board: &Board, row: &HostRow, now: u64) -> Value {
    let ms = |from: u64, to: u64| to.saturating_sub(from) / 1_000_000;
    let child = board.child(row.child()).filter(|child| row.epoch() > 0 && child.epoch() == row.epoch());
    json!({
        "model": row.name(),
        "state": row.state().name(),
        "since_ms": (row.since_ns() > 0).then(|| ms(row.since_ns(), now)),
        "host_pid": child.map(|child| child.pid()),
        "program_pid": Some(row.pid()).filter(|pid| *pid > 0),
        "in_flight": row.in_flight(),
        "waiting": row.waiting(),
        "failures": row.failures(),
        "cause": row.cause(),
        "retry_ms": Some(ms(now, row.retry_ns())).filter(|ms| *ms > 0),
        "is_retired": row.is_retired(),
    })
}

fn cells(model: &Value) -> Vec<String> {
    let number = |key: &str| model.get(key).and_then(Value::as_u64);
    let text = |key: &str| printable(model.get(key).and_then(Value::as_str).unwrap_or_default());
    let shown = |key: &str| number(key).map_or_else(|| "-".to_owned(), |number| number.to_string());
    let is_retired = model.get("is_retired").and_then(Value::as_bool).unwrap_or(false);
    let state = if is_retired { format!("{} (old)", text("state")) } else { text("state") };
    let cause = Some(text("cause")).filter(|cause| !cause.is_empty()).unwrap_or_else(|| "-".to_owned());
    vec![
        text("model"),
        state,
        number("since_ms").map_or_else(|| "-".to_owned(), age_text),
        shown("host_pid"),
        shown("in_flight"),
        shown("waiting"),
        shown("failures"),
        cause,
    ]
}
