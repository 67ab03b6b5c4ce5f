//! Waiting for a condition within a runtime that must go on turning.

use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

/// Waits until `holds` does; looks every few milliseconds.
///
/// # Panics
/// When it does not within `limit`; the message names `what`.
pub(crate) async fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let (mut looks, end) = (tokio::time::interval(Duration::from_millis(2)), Instant::now() + limit);
    // A look that takes long leaves the runtime its turn all the same.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !holds() {
        assert!(Instant::now() < end, "waited {limit:?} in vain: {what}");
        looks.tick().await;
    }
}
