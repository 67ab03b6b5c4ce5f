//! What is known of a program with a server of its own: who wants it, and how far it is. One value under one lock, so that
//! a stop for being idle and a new request cannot miss each other (G24).

use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_core::{Error, Fault};
use evergate_sys::Pid;
use tokio::sync::watch;
use tokio::time::timeout_at;

use super::running::Running;
use crate::cause::Cause;

/// After an end that nobody ordered, and doubled with each one more (G21).
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A pause that is longer is not waited for: the host ends, and tells why.
pub(super) const WAITED_FOR: Duration = Duration::from_secs(1);
/// One that has served this long is not in a crash loop.
pub(super) const STABLE: Duration = Duration::from_secs(60);

/// How far a program is.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// Nothing of it is left, and nobody wants it.
    Down,
    /// It is executed, or will be, and does not answer yet.
    Starting,
    /// It serves.
    Ready(Running),
    /// It was told to end, because nobody wants it or because it is beyond help.
    Ending,
    /// It has ended by itself while it served; it is started again at that time, soon, and requests wait for it.
    Pausing(Instant),
    /// It did not come to serve, or not for long, again and again. Requests hear why, until it is worth another try.
    Failed(Cause, Instant),
    /// The host ends.
    Stopped,
}

/// How far a program is, for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It is not started: nobody has asked, or not since it was stopped.
    Down,
    /// It is being started.
    Starting,
    /// It serves.
    Ready(Pid),
    /// It is being stopped.
    Ending,
    /// It ended while it served, and is started again in a moment.
    Pausing,
    /// It cannot be started; it is tried again when it is asked for and a pause is over.
    Failed(Cause),
    /// For good.
    Stopped,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    /// Requests that wait for it or are at it.
    users: u32,
    /// Whether it runs without being asked for.
    preload: bool,
    /// Ends that nobody ordered, in a row.
    failures: u32,
}

/// One more user, until it is dropped.
#[derive(Debug)]
pub(super) struct User(Arc<watch::Sender<State>>);

impl Drop for User {
    fn drop(&mut self) {
        // Nobody waits for this.
        self.0.send_if_modified(|state| {
            state.users = state.users.saturating_sub(1);
            false
        });
    }
}

impl State {
    pub(super) fn new(preload: bool, failures: u32) -> Self {
        Self { phase: Phase::Down, users: 0, preload, failures }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.users > 0 || self.preload
    }

    pub(super) fn is_stopped(&self) -> bool {
        matches!(self.phase, Phase::Stopped)
    }

    /// Counts an end that nobody ordered, and says when the next start may be.
    pub(super) fn count_failure(&mut self, now: Instant, served: Duration) -> Instant {
        self.failures = if served >= STABLE { 1 } else { self.failures.saturating_add(1) };
        now + pause(self.failures)
    }

    pub(super) fn condition(&self) -> Condition {
        match &self.phase {
            Phase::Down => Condition::Down,
            Phase::Starting => Condition::Starting,
            Phase::Ready(running) => Condition::Ready(running.pid()),
            Phase::Ending => Condition::Ending,
            Phase::Pausing(_) => Condition::Pausing,
            Phase::Failed(cause, _) => Condition::Failed(cause.clone()),
            Phase::Stopped => Condition::Stopped,
        }
    }
}

/// The pause after that many failures in a row.
fn pause(failures: u32) -> Duration {
    PAUSE_MIN.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(PAUSE_MAX)
}

/// Enters a request; the first one wakes whoever starts the program.
pub(super) fn enter(state: &Arc<watch::Sender<State>>) -> User {
    state.send_if_modified(|state| {
        state.users = state.users.saturating_add(1);
        state.users == 1
    });
    User(Arc::clone(state))
}

/// Waits until the program serves.
///
/// # Errors
/// Why it does not, or `ModelLoading` when it did not until `until`; no program has seen anything of the request.
pub(super) async fn ready(state: &watch::Sender<State>, until: Instant) -> Result<Running, Error> {
    let mut states = state.subscribe();
    loop {
        match &states.borrow_and_update().phase {
            Phase::Ready(running) if running.fate().is_none() => return Ok(running.clone()),
            Phase::Failed(cause, next) if Instant::now() < *next => return Err(cause.error()),
            Phase::Stopped => return Err(stopping()),
            _ => {}
        }
        if timeout_at(until.into(), states.changed()).await.is_err() {
            return Err(loading());
        }
    }
}

pub(super) fn loading() -> Error {
    Error::new(Fault::ModelLoading, "this model is being started, and was not ready in the request's time")
}

pub(super) fn stopping() -> Error {
    Error::new(Fault::ServerShuttingDown, "this model is being stopped")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_half_a_minute_and_forget_what_was_long_ago() {
        let (mut state, now) = (State::new(false, 0), Instant::now());
        let mut pause = |served: u64| state.count_failure(now, Duration::from_secs(served)) - now;
        let pauses: Vec<u128> = (0..8).map(|_| pause(1).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(pause(60), PAUSE_MIN);
        assert_eq!(pause(0), PAUSE_MIN * 2);
    }
}
