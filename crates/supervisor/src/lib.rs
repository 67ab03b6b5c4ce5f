//! The master: starts, watches, scales, replaces and buries the children, and stops them in order.
//!
//! Two halves. `step` holds every rule and does nothing; the shell ([`serve`]) makes the system calls and holds no
//! rule. It is one thread that waits in one poll(2), and for nothing
//! else for long; another one writes the state folder's files. LIFECYCLE.md beside this crate
//! tells who does what in which order.
#![forbid(unsafe_code)]

mod activation;
mod boot;
mod burial;
mod children;
pub mod client;
mod compile;
mod control;
mod diagnosis;
mod exits;
mod holder;
mod hosts;
mod listen;
mod master;
mod notify;
mod oom;
mod orphans;
mod plain;
mod runfile;
mod state_writer;
mod step;
mod strays;
mod succeed;
mod talk;
mod turned_away;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use evergate_board::{Board, Inflight};
use evergate_core::exit::{Initiator, Kind};

pub use exits::{EXITS_FILE, EXITS_OLD_FILE};
pub use runfile::{Run, RunChild};
pub use step::HostStart;

/// HTTP status, 0 for none, and cause of a request's end.
pub type StatusAndCause = (u16, &'static str);

/// What the master must be told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the lock, the run file, the control socket and the exit records; made if it is not there.
    pub state_dir: PathBuf,
    /// Arguments after `argv[0]` for the child that validates the configuration: `["compile", ...]`.
    pub compile_args: Vec<OsString>,
    /// The first child that fails to boot ends the start, even if other workers are ready. Otherwise the start fails only
    /// when every worker has.
    pub halt_on_boot_error: bool,
    /// The whole environment of all other children.
    pub child_env: Vec<(OsString, OsString)>,
    /// Called with the requests that a dead child has left, before the child's row is emptied: adds to the row's counters
    /// what the child has not added ([`Inflight::was_counted`]), and gives status and cause for the access record of each.
    /// [`Inflight::is_over`] tells a request that was answered from one that is lost.
    pub on_left: fn(&Board, row: u32, &[Inflight]) -> Vec<StatusAndCause>,
    /// Called for each child's end: counts it.
    pub on_exit: fn(&Board, Kind, Initiator),
    /// Called for each child that is started in place of another, with what made the other one go: counts it.
    pub on_respawn: fn(&Board, Kind, Initiator),
    /// Called when the start of a host is over, with its upstream's name, how it came out and how long it took: counts it.
    pub on_host_start: fn(&Board, &str, HostStart, Duration),
}

/// The start did not come off, or came to its end early.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code.
    code: u8,
    /// What to say about it; nothing if it has been said.
    text: String,
}

impl Failure {
    fn system(text: impl Into<String>) -> Self {
        Self { code: evergate_core::inherit::code::SYSTEM, text: text.into() }
    }

    fn internal(text: impl Into<String>) -> Self {
        Self { code: evergate_core::inherit::code::INTERNAL, text: text.into() }
    }
}

/// Runs the gateway until it is stopped: `evergate serve`. To be called in the main thread before any other exists. Talks
/// on standard error; returns the exit code (`evergate_core::inherit::code`).
#[must_use]
pub fn serve(options: &Options) -> u8 {
    match boot::boot(options).and_then(|mut master| master.run()) {
        Ok(code) => code,
        Err(failure) => {
            if !failure.text.is_empty() {
                talk::say(&failure.text);
            }
            failure.code
        }
    }
}
