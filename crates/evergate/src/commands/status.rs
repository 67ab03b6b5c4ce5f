//! `evergate status`: what the running gateway is doing, from its board.

use std::path::Path;

use evergate_supervisor::Run;
use serde::Serialize;

use super::{board, print, print_json};
use crate::cli::Form;
use crate::telemetry::status::{Status, snapshot};

/// The status and where the gateway can be reached, which is not on the board.
#[derive(Serialize)]
struct Report {
    listen: Vec<String>,
    admin: Option<String>,
    #[serde(flatten)]
    status: Status,
}

/// Asks for the board and prints it; returns the exit code, 1 when no gateway runs.
#[must_use]
pub fn run(state_dir: &Path, form: Form) -> u8 {
    let board = match board(state_dir, form) {
        Ok(board) => board,
        Err(code) => return code,
    };
    // Only the addresses are from there: without them there is still something to show.
    let run = Run::read(state_dir).ok().flatten().unwrap_or_default();
    let admin = Some(run.admin).filter(|address| !address.is_empty());
    let report = Report { listen: run.listen, admin, status: snapshot(&board) };
    match form {
        Form::Text => print(&text(&report)),
        Form::Json => print_json(&report),
    }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    if !report.listen.is_empty() {
        out.push_str(&format!("listening on {}", report.listen.join(", ")));
        out.push_str(&report.admin.as_ref().map(|admin| format!(", admin on {admin}")).unwrap_or_default());
        out.push('\n');
    }
    out.push_str(&report.status.to_table());
    out
}
