//! Waiting for a condition: the only place in the tests where anything sleeps.

use std::time::{Duration, Instant};

/// Between two looks; short against the gateway's own 100 ms promises.
const POLL: Duration = Duration::from_millis(3);

/// Waits until `condition` holds, looking every few milliseconds.
///
/// # Panics
/// When it does not hold within `limit`; the message names `what`.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || condition().then_some(()));
}

/// Waits until `look` gives a value, and returns it.
///
/// # Panics
/// When there is none within `limit`; the message names `what`.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, look: impl FnMut() -> Option<T>) -> T {
    match try_wait_for(limit, look) {
        Some(value) => value,
        None => panic!("waited {limit:?} in vain: {what}"),
    }
}

/// Like [`wait_for`], with `None` when the time is up.
// Other processes and other machines' sockets cannot wake a test; looking again after a moment, with a deadline, is
// what is left.
#[allow(clippy::disallowed_methods)]
pub fn try_wait_for<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = look() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(POLL);
    }
}
