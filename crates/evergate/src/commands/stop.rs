//! `evergate stop`: asks the master to stop and waits until it is gone.

use std::path::Path;
use std::time::Duration;

use evergate_core::inherit::code;
use evergate_supervisor::{Run, client};
use serde_json::json;

use super::{print, print_json, refuse};
use crate::cli::Form;

/// A drain may be configured to last for hours, and Ctrl-C ends the waiting, not the stop. A day is as good as for ever
/// and finite.
const PATIENCE: Duration = Duration::from_secs(86_400);

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Requests in flight may finish within the drain time.
    Graceful,
    /// They are cancelled.
    Now,
}

/// Stops and waits; returns the exit code, 1 when no gateway runs.
#[must_use]
pub fn run(state_dir: &Path, how: How, form: Form) -> u8 {
    // Before the order: the file goes with the run.
    let Ok(Some(run)) = Run::read(state_dir) else { return refuse(&client::ClientError::NotRunning, state_dir) };
    let command = if how == How::Now { "stop now" } else { "stop" };
    if let Err(error) = client::request(state_dir, command) {
        return refuse(&error, state_dir);
    }
    match client::wait_gone(run.pid, run.start_ticks, PATIENCE) {
        Ok(true) => match form {
            Form::Text => print("stopped\n"),
            Form::Json => print_json(&json!({ "stopped": true, "pid": run.pid })),
        },
        Ok(false) => {
            eprintln!("evergate: the gateway (pid {}) is still stopping after a day", run.pid);
            code::FAILED
        }
        Err(error) => {
            eprintln!("evergate: the gateway was told to stop, but its end cannot be waited for: {error}");
            code::FAILED
        }
    }
}
