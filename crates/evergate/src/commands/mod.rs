//! What an operator calls. Data goes to standard output, talk to standard error.

use std::io::Write;
use std::path::Path;

use evergate_board::Board;
use evergate_core::inherit::code;
use evergate_supervisor::client::{self, ClientError};
use serde_json::{Value, json};

use crate::cli::Form;

pub mod access;
pub mod check;
pub mod exits;
pub mod logs;
pub mod models;
pub mod reload;
pub mod scale;
pub mod state_dir;
pub mod status;
pub mod stop;

/// Prints data. A reader that has seen enough (`| head`) is no failure; returns the exit code.
fn print(text: &str) -> u8 {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("evergate: cannot write to standard output: {error}");
            code::FAILED
        }
        _ => code::OK,
    }
}

/// Prints a value as one line of JSON; returns the exit code.
fn print_json(value: &impl serde::Serialize) -> u8 {
    match serde_json::to_string(value) {
        Ok(text) => print(&format!("{text}\n")),
        Err(error) => {
            eprintln!("evergate: cannot write this as JSON: {error}");
            code::INTERNAL
        }
    }
}

/// The running gateway's board; an exit code, when it was said why there is none.
fn board(state_dir: &Path, form: Form) -> Result<Board, u8> {
    let reply = client::request(state_dir, "status").map_err(|error| refuse(&error, state_dir, form, json!({})))?;
    let board = match reply.fd.map(Board::attach) {
        Some(Ok(board)) => return Ok(board),
        Some(Err(error)) => format!("{error}; is the running gateway of another version than this command?"),
        None => "the gateway sent no board".to_owned(),
    };
    Err(fail(&board, code::FAILED, form, json!({})))
}

/// Says why the master did not answer; returns the exit code. As JSON it is `told`, an object, with the words as `error`.
fn refuse(error: &ClientError, state_dir: &Path, form: Form, told: Value) -> u8 {
    let folder = state_dir.display();
    let code = if let ClientError::Failed { code, .. } = error { *code } else { code::FAILED };
    let why = match error {
        ClientError::NotRunning => format!("no gateway runs with the state folder {folder}"),
        ClientError::Io(source) => format!("{error} with the state folder {folder}: {source}"),
        ClientError::Failed { .. } | ClientError::Refused(_) | ClientError::Silent { .. } => error.to_string(),
    };
    fail(&why, code, form, told)
}

/// Says what went wrong, where it is looked for: JSON on standard output, words on standard error. Returns `code`.
fn fail(why: &str, code: u8, form: Form, mut told: Value) -> u8 {
    if form == Form::Text {
        eprintln!("evergate: {why}");
        return code;
    }
    if let Some(fields) = told.as_object_mut() {
        fields.insert("error".into(), why.into());
    }
    // The code tells of the failure, whatever becomes of the output.
    let _ = print_json(&told);
    code
}
