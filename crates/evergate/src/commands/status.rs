//! `evergate status`: what the running gateway is doing, from its board.

use std::path::Path;

use evergate_board::Board;
use evergate_core::inherit::code;
use evergate_supervisor::{Run, client};
use serde::Serialize;

use super::{print, print_json, refuse};
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
