//! A host that serves a pool.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_core::config::process::{Frames, Stdio as Config};
use evergate_host::Plan;
use evergate_host::stdio::{Bounds, Stdio};
use serde_json::Value;

use super::support::{House, LONG, exists, sim, until};
use super::wire::{Host, serve_mode};

/// How a pool is set up in a test.
pub(crate) struct Setup {
    pub(crate) plan: Plan,
    pub(crate) config: Config,
    pub(crate) bounds: Bounds,
}

pub(crate) fn setup(plan: Plan) -> Setup {
    Setup {
        plan,
        config: Config {
            min: 1,
            max: 1,
            frames: Frames::Lines,
            first_output: LONG,
            idle: LONG,
            requests_max: 0,
            lifetime_max: Duration::ZERO,
            rss_max: 0,
        },
        bounds: Bounds { start_timeout: LONG, output_bytes_max: 1 << 20, in_flight_max: 64, queue: 8 },
    }
}

/// The misbehaving program as a model.
pub(crate) fn model(options: &str) -> Setup {
    setup(sim(&[&format!("model:{options}")]))
}

pub(crate) fn serve(house: &House, setup: Setup) -> (Host, Arc<Stdio>) {
    let stdio = Stdio::new(house.programs.clone(), setup.plan, &setup.config, setup.bounds, house.ear.clone());
    let stdio = Arc::new(stdio);
    (serve_mode(stdio.clone(), 32 << 20), stdio)
}

/// Stops a pool, which must leave nothing.
pub(crate) async fn stop(house: &House, stdio: &Stdio) {
    assert!(stdio.stop(Instant::now() + LONG).await, "the pool does not stop");
    until("nothing is left", || house.programs.live() == 0).await;
    for ended in house.ear.ended.lock().unwrap().iter() {
        assert!(!exists(ended.pid.as_raw_nonzero().get()), "{ended:?}");
    }
}

/// Waits for a line on standard error.
pub(crate) async fn said(house: &House, word: &str, count: usize) -> Vec<String> {
    let found = || -> Vec<String> {
        let lines = house.ear.lines.lock().unwrap().clone();
        lines.into_iter().filter(|line| line.starts_with(word)).collect()
    };
    until(word, || found().len() >= count).await;
    found()
}

pub(crate) fn streamed(text: &str) -> Value {
    let mut body = super::wire::chat(text);
    body["stream"] = true.into();
    body
}
