//! What an operator calls. Data goes to standard output, talk to standard error.

use std::io::Write;
use std::path::Path;

use evergate_board::Board;
use evergate_core::inherit::code;
use evergate_supervisor::client::{self, ClientError};

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
fn board(state_dir: &Path) -> Result<Board, u8> {
    let reply = client::request(state_dir, "status").map_err(|error| refuse(&error, state_dir))?;
    let fd = reply.fd.ok_or_else(|| {
        eprintln!("evergate: the gateway sent no board");
        code::FAILED
    })?;
    Board::attach(fd).map_err(|error| {
        eprintln!("evergate: {error}; is the running gateway of another version than this command?");
        code::FAILED
    })
}

/// Says why the master did not answer; returns the exit code.
fn refuse(error: &ClientError, state_dir: &Path) -> u8 {
    let folder = state_dir.display();
    match error {
        ClientError::Failed { code, .. } => {
            eprintln!("evergate: {error}");
            return *code;
        }
        ClientError::NotRunning => eprintln!("evergate: no gateway runs with the state folder {folder}"),
        ClientError::Io(source) => eprintln!("evergate: {error} with the state folder {folder}: {source}"),
        ClientError::Refused(_) | ClientError::Silent { .. } => eprintln!("evergate: {error}"),
    }
    code::FAILED
}
