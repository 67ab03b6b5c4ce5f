//! `evergate reload`: has the master read its configuration again and waits for what comes of it.

use std::path::Path;
use std::time::Duration;

use evergate_supervisor::client;
use serde_json::json;

use super::{print, print_json, refuse};
use crate::cli::Form;

/// The master gives up by itself: after 30 s of validating, or `boot_timeout` of starting, with 30 s of waiting for room
/// between. Another reload that goes before takes as long. An hour is more than both and finite.
const PATIENCE: Duration = Duration::from_secs(3_600);

/// Reloads and waits; returns the exit code: 78 for a configuration with mistakes, 1 for one that cannot be brought into
/// force, or when no gateway runs.
#[must_use]
pub fn run(state_dir: &Path, form: Form) -> u8 {
    match (client::reload(state_dir, PATIENCE), form) {
        (Ok(reply), Form::Text) => print(&format!("generation {} serves\n", reply.text.trim_start_matches("ok "))),
        (Ok(reply), Form::Json) => {
            let generation = reply.text.trim_start_matches("ok ").parse::<u32>().ok();
            print_json(&json!({ "reloaded": true, "generation": generation }))
        }
        (Err(error), form) => refuse(&error, state_dir, form, json!({ "reloaded": false })),
    }
}
