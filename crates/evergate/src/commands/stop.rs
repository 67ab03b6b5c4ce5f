//! `evergate stop`: asks the master to stop and waits until it is gone.

use std::path::Path;
use std::time::Duration;

use evergate_core::inherit::code;
use evergate_supervisor::Run;
use evergate_supervisor::client::{self, ClientError};
use serde_json::json;

use super::{fail, print, print_json, refuse};
use crate::cli::Form;

/// A drain may be configured to last for hours, and Ctrl-C ends the waiting, not the stop. A day is as good as for ever
/// and finite.
const PATIENCE: Duration = Duration::from_secs(86_400);
/// From the master's last word to its end, on a machine that has much to do.
const LAST_TIME: Duration = Duration::from_secs(60);

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Requests in flight may finish within the drain time.
    Graceful,
    /// They are cancelled.
    Now,
}

/// Stops and waits; returns the exit code, 1 when no gateway runs, or when its end was not the one that was ordered.
#[must_use]
pub fn run(state_dir: &Path, how: How, form: Form) -> u8 {
    let refuse = |error: &ClientError| refuse(error, state_dir, form, json!({ "stopped": false }));
    // Before the order: the file goes with the run.
    let run = match Run::read(state_dir) {
        Ok(Some(run)) => run,
        Ok(None) => return refuse(&ClientError::NotRunning),
        Err(error) => {
            let why = format!("cannot read {}: {error}", Run::path(state_dir).display());
            return fail(&why, code::FAILED, form, json!({ "stopped": false }));
        }
    };
    let order = if how == How::Now { "stop now" } else { "stop" };
    match client::stop(state_dir, order, PATIENCE) {
        Ok(ended) => ended_with(&run, ended, form),
        Err(error) => refuse(&error),
    }
}

/// The master has said its last word, or none.
fn ended_with(run: &Run, ended: Option<u8>, form: Form) -> u8 {
    let pid = run.pid;
    let fail = |why: String, told| fail(&why, code::FAILED, form, told);
    match (client::wait_gone(pid, run.start_ticks, LAST_TIME), ended) {
        (Ok(true), Some(code::OK)) => match form {
            Form::Text => print("stopped\n"),
            Form::Json => print_json(&json!({ "stopped": true, "pid": pid, "code": code::OK })),
        },
        (Ok(true), Some(code)) => fail(
            format!(
                "the gateway (pid {pid}) has ended with code {code}; what it said, and \"evergate exits\", tell why"
            ),
            json!({ "stopped": true, "pid": pid, "code": code }),
        ),
        (Ok(true), None) => fail(
            format!(
                "the gateway (pid {pid}) has ended, but was killed before its stop was over; its processes end by themselves"
            ),
            json!({ "stopped": false, "pid": pid }),
        ),
        (Ok(false), _) => {
            fail(format!("the gateway (pid {pid}) does not end"), json!({ "stopped": false, "pid": pid }))
        }
        (Err(error), _) => fail(
            format!("the gateway was told to stop, but its end cannot be waited for: {error}"),
            json!({ "stopped": false, "pid": pid }),
        ),
    }
}
