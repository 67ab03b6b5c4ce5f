//! Planted faults for drills: only in debug builds, and only where `EVERGATE_FAULT=1` stands in the environment.

use http::HeaderMap;

/// A fault that a request asks for by `x-evergate-fault`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// `panic-handler`: panic in the handler, after admission.
    PanicHandler,
    /// `panic-stream`: panic in the body, after the first piece.
    PanicStream,
    /// `double-panic`: panic while a panic unwinds, which ends the process.
    DoublePanic,
    /// `abort`: end the process by ABRT.
    Abort,
    /// `exit-N`: end the process with this code.
    Exit(u8),
    /// `eat`: take memory until somebody ends the process, at most [`EAT_BYTES_MAX`].
    Eat,
    /// `spin`: hold the event loop for ever.
    Spin,
    /// `spin-stream`: the same in the body, after the first piece.
    SpinStream,
}

/// Where a fault can strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// In the handler, after admission.
    Handler,
    /// In the body, after the first piece.
    Stream,
}

/// Where `eat` stops, so that a drill without a memory limit does not take the machine down.
const EAT_BYTES_MAX: usize = 1 << 30;

/// The fault that this request plants.
#[must_use]
pub fn planted(headers: &HeaderMap) -> Option<Planted> {
    if !cfg!(debug_assertions) || std::env::var_os("EVERGATE_FAULT").is_none_or(|value| value != "1") {
        return None;
    }
    Some(match headers.get("x-evergate-fault")?.to_str().ok()? {
        "panic-handler" => Planted::PanicHandler,
        "panic-stream" => Planted::PanicStream,
        "double-panic" => Planted::DoublePanic,
        "abort" => Planted::Abort,
        "eat" => Planted::Eat,
        "spin" => Planted::Spin,
        "spin-stream" => Planted::SpinStream,
        other => Planted::Exit(other.strip_prefix("exit-")?.parse().ok()?),
    })
}

/// Carries out the fault, if its moment is `here`.
#[allow(clippy::panic, clippy::exit, reason = "this is what the drill is for")]
pub fn strike(planted: Option<Planted>, here: Moment) {
    match (planted, here) {
        (Some(Planted::PanicHandler), Moment::Handler) | (Some(Planted::PanicStream), Moment::Stream) => {
            panic!("a planted fault: {here:?}");
        }
        (Some(Planted::DoublePanic), Moment::Handler) => {
            let _second = PanicsInDrop;
            panic!("a planted fault: the first panic");
        }
        (Some(Planted::Abort), Moment::Handler) => std::process::abort(),
        (Some(Planted::Exit(code)), Moment::Handler) => std::process::exit(code.into()),
        (Some(Planted::Eat), Moment::Handler) => eat(),
        (Some(Planted::Spin), Moment::Handler) | (Some(Planted::SpinStream), Moment::Stream) => spin(),
        _ => {}
    }
}

struct PanicsInDrop;

impl Drop for PanicsInDrop {
    #[allow(clippy::panic, reason = "this is what the drill is for")]
    fn drop(&mut self) {
        panic!("a planted fault: the second panic");
    }
}

fn eat() {
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    while eaten.len() < EAT_BYTES_MAX >> 20 {
        // Not zeros, which would take no memory.
        eaten.push(vec![1; 1 << 20]);
    }
    spin();
}

fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}
