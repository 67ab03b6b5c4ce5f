//! Hostile clients and hostile upstreams from files (`tests/hostile`): each input has its outcome, and harms nobody else.
//!
//! Every input runs on a connection of its own, a few at a time; behind each a good request on another new connection
//! must be answered. At the end: the same workers, no panic, nothing in flight.

mod clients;
mod upstreams;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use evergate_testkit::corpus::Case;
use evergate_testkit::{Evergate, wait_until};

use crate::support::{assert_alive, wait_ready};

/// As many inputs at once.
const AT_ONCE: usize = 16;

/// Runs every case, and a good request behind each; then looks at what the gateway says of itself. Every case that went
/// wrong is named.
#[track_caller]
fn run(gateway: &Evergate, cases: &[Case], least: usize, play: impl Fn(&Case) -> Result<(), String> + Sync) {
    assert!(cases.len() >= least, "only {} inputs", cases.len());
    let before = gateway.workers();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Named also when a shared assertion ends it, which says the rest.
                    let played = catch_unwind(AssertUnwindSafe(|| play(case)));
                    if let Err(reason) = played.unwrap_or_else(|_| Err("an assertion failed, see above".into())) {
                        wrong.lock().unwrap().push(format!("{}\n    {reason}", case.shown()));
                    }
                    assert_alive(gateway);
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} inputs:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert_unharmed(gateway, &before);
}

/// The same processes, no panic, nothing left in flight.
#[track_caller]
fn assert_unharmed(gateway: &Evergate, before: &[i32]) {
    wait_ready(gateway, before.len());
    assert_eq!(gateway.workers(), before, "a worker died");
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
    wait_until("nothing in flight", crate::support::LIMIT, || {
        let metrics = gateway.metrics();
        let is_idle = |kind: &str| metrics.contains(&format!("evergate_inflight_requests{{kind=\"{kind}\"}} 0\n"));
        is_idle("unary") && is_idle("stream")
    });
    assert!(gateway.metrics().contains("\nevergate_panics_total 0\n"), "a panic was caught");
}
