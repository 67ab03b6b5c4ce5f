//! Planted faults of a worker's boot and stop, and of a clerk, for drills: only in debug builds.
//!
//! `EVERGATE_FAULT_BOOT` names a file, which is read at each boot, so that a test can have the workers of one generation
//! fail and those of the next not: `fail` ends the boot with an error, `hang` lets it never come to its end; `fail 1` that of slot 1 only.
//!
//! `EVERGATE_FAULT_CLERK` names a file that says when the clerk dies, once: `before-write` or `after-write` of records; with
//! `stuck` the access log is never written, as on a disk that does not answer.
//!
//! `EVERGATE_FAULT_STOP` is what a resource does when it is to stop: `hang`, `panic`, `spin` (hold the event loop), or
//! `slow` (a while, but within its time).

use std::time::Duration;

use crate::lifespan::Stop;

/// What `slow` takes.
const SLOW: Duration = Duration::from_millis(50);

/// Meets the fault that is planted, if one is.
///
/// # Errors
/// What was planted.
pub(crate) async fn meet(slot: u32) -> Result<(), String> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let Some(path) = std::env::var_os("EVERGATE_FAULT_BOOT") else { return Ok(()) };
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let (fault, of) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    match fault {
        _ if !of.is_empty() && of != slot.to_string() => Ok(()),
        "fail" => Err("a planted fault".into()),
        "hang" => std::future::pending().await,
        _ => Ok(()),
    }
}

/// Meets the fault of a host's boot: `EVERGATE_FAULT_HOST` names a file, whose text is why it fails if there is any.
///
/// # Errors
/// What was planted.
pub(crate) fn meet_host() -> Result<(), String> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let Some(path) = std::env::var_os("EVERGATE_FAULT_HOST") else { return Ok(()) };
    match std::fs::read_to_string(path).unwrap_or_default().trim() {
        "" => Ok(()),
        why => Err(why.to_owned()),
    }
}

/// Ends the clerk, if that is planted for this moment.
pub(crate) fn carry(moment: &str) {
    if !cfg!(debug_assertions) {
        return;
    }
    let Some(path) = std::env::var_os("EVERGATE_FAULT_CLERK") else { return };
    // Only once: the next one finds no file.
    if std::fs::read_to_string(&path).is_ok_and(|text| text == moment) && std::fs::remove_file(path).is_ok() {
        std::process::abort();
    }
}

/// Never comes back, if that is planted for the thread that writes the access log.
pub(crate) fn write_log() {
    let path = std::env::var_os("EVERGATE_FAULT_CLERK").filter(|_| cfg!(debug_assertions));
    let is_stuck = path.is_some_and(|path| std::fs::read_to_string(path).is_ok_and(|text| text == "stuck"));
    if is_stuck {
        loop {
            std::thread::park();
        }
    }
}

/// The stop of a resource that has the fault that is planted, if one is.
pub(crate) fn stop() -> Stop {
    let fault = std::env::var("EVERGATE_FAULT_STOP").ok().filter(|_| cfg!(debug_assertions)).unwrap_or_default();
    Box::pin(async move {
        match fault.as_str() {
            "hang" => std::future::pending().await,
            #[allow(clippy::panic, reason = "this is what the drill is for")]
            "panic" => panic!("a planted fault in a stop"),
            "spin" => loop {
                std::hint::spin_loop();
            },
            "slow" => tokio::time::sleep(SLOW).await,
            _ => {}
        }
    })
}
