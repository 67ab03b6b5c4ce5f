//! `evergate scale N`: sets the number of workers.

use std::path::Path;

use evergate_supervisor::client;
use serde_json::json;

use super::{print, print_json, refuse};
use crate::cli::Form;

/// Orders and says how many are wanted now; returns the exit code, 1 when that many are not allowed.
#[must_use]
pub fn run(state_dir: &Path, workers: u32, form: Form) -> u8 {
    let reply = client::request(state_dir, &format!("scale {workers}"));
    let wanted = reply.map(|reply| reply.text.trim_start_matches("ok ").parse::<u32>().unwrap_or(workers));
    match (wanted, form) {
        (Ok(wanted), Form::Text) => print(&format!("{wanted} workers wanted\n")),
        (Ok(wanted), Form::Json) => print_json(&json!({ "scaled": true, "workers": wanted })),
        (Err(error), form) => refuse(&error, state_dir, form, json!({ "scaled": false })),
    }
}
