//! Planted faults for drills: only in debug builds, and only where `EVERGATE_FAULT=1` stands in the environment.

use http::HeaderMap;

/// A fault that a request asks for by `x-evergate-fault`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// Panic in the handler, after admission.
    Handler,
    /// Panic in the body, after the first piece.
    Stream,
}

/// The fault that this request plants.
#[must_use]
pub fn planted(headers: &HeaderMap) -> Option<Planted> {
    if !cfg!(debug_assertions) || std::env::var_os("EVERGATE_FAULT").is_none_or(|value| value != "1") {
        return None;
    }
    match headers.get("x-evergate-fault")?.as_bytes() {
        b"panic-handler" => Some(Planted::Handler),
        b"panic-stream" => Some(Planted::Stream),
        _ => None,
    }
}

/// Panics, if `planted` is `here`.
#[allow(clippy::panic, reason = "this is what the drill is for")]
pub fn strike(planted: Option<Planted>, here: Planted) {
    if planted == Some(here) {
        panic!("a planted fault: {here:?}");
    }
}
