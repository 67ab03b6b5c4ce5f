//! What a host tells of its programs.

use evergate_sys::Pid;

use crate::program::{Ended, Failed};

/// Hears what happens to programs, as it happens; it must not block. What programs say may hold anything, secrets too:
/// redacting is the listener's business.
pub trait Report: Send + Sync + 'static {
    /// A program runs.
    fn started(&self, program: Pid);

    /// A program could not be started.
    fn failed(&self, failed: &Failed);

    /// A program is gone, with everything that it had started.
    fn ended(&self, ended: &Ended);

    /// Where a program with a server of its own takes requests from now on; none when it does not any more.
    fn listens(&self, address: Option<&str>);

    /// Whether any of several programs can take a request now, when that changes.
    fn serves(&self, is_any_ready: bool);

    /// Requests that programs work on, and those that wait for one.
    fn load(&self, in_flight: u32, waiting: u32);

    /// A line of a program's own output.
    fn line(&self, line: Line<'_>);
}

/// A line that a program wrote.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// Who.
    pub program: Pid,
    /// Where.
    pub stream: Stream,
    /// Without its end; any bytes.
    pub text: &'a [u8],
    /// Whether it was longer, and its rest is left out.
    pub is_cut: bool,
    /// Lines before it that were left out, because there were too many.
    pub dropped: u64,
}

/// Where a program wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, of a program whose output is a log.
    Output,
    /// Standard error.
    Error,
}
