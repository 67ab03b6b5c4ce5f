//! What a fake upstream has seen, for tests to ask about.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use super::request::Request;
use super::steps::Step;
use crate::link::{EndHandle, Gone};

/// How a request's life at the fake ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The script was played to its end; the answer is with the kernel.
    Answered,
    /// The script itself ended the connection before the answer's end.
    Broken,
    /// The client closed in order before the end.
    Eof,
    /// The client reset, or a write found nobody.
    Reset,
}

impl From<Gone> for How {
    fn from(gone: Gone) -> Self {
        match gone {
            Gone::Eof => Self::Eof,
            Gone::Reset => Self::Reset,
        }
    }
}

/// The end of a request or of a connection.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// When the fake knew.
    pub at: Instant,
    /// How.
    pub how: How,
}

/// A request that came in whole.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// What was received.
    pub request: Request,
    /// Number of the connection it came on, from 0.
    pub connection: usize,
    /// When it was whole.
    pub arrived: Instant,
    /// How it ended, once it has.
    pub end: Option<End>,
}

/// A connection that was accepted.
#[derive(Clone, Debug)]
pub struct Connection {
    /// When it was accepted.
    pub opened: Instant,
    /// Requests that came on it.
    pub requests: usize,
    /// How it ended, once it has.
    pub end: Option<End>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) requests: Vec<Recorded>,
    pub(super) connections: Vec<Connection>,
    /// By connection, while it lives.
    pub(super) handles: Vec<Option<EndHandle>>,
    /// Answers that the test gave, by the model's name.
    pub(super) staged: std::collections::HashMap<String, Vec<Step>>,
    /// Requests being worked on, and the most there were at once.
    pub(super) working: usize,
    pub(super) working_most: usize,
    pub(super) is_released: bool,
    pub(super) is_over: bool,
}

/// Shared between the test, the accepting thread and each connection's thread.
#[derive(Default)]
pub(super) struct Log {
    state: Mutex<State>,
    changed: Condvar,
}

impl Log {
    pub(super) fn look<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.lock().expect("log"))
    }

    pub(super) fn change<T>(&self, write: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().expect("log");
        let result = write(&mut state);
        self.changed.notify_all();
        result
    }

    /// Waits until `look` gives a value; `None` when it does not within `limit`.
    pub(super) fn wait<T>(&self, limit: Duration, mut look: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        let mut state = self.state.lock().expect("log");
        loop {
            if let Some(value) = look(&state) {
                return Some(value);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).expect("log").0;
        }
    }
}
