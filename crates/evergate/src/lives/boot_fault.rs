//! A planted fault of a worker's boot, for drills: only in debug builds, and only where `EVERGATE_FAULT_BOOT` names a file.
//!
//! The file is read at each boot, so that a test can have the workers of one generation fail and those of the next not:
//! `fail` ends the boot with an error, `hang` lets it never come to its end.

/// Meets the fault that is planted, if one is.
///
/// # Errors
/// What was planted.
pub(crate) async fn meet() -> Result<(), String> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let Some(path) = std::env::var_os("EVERGATE_FAULT_BOOT") else { return Ok(()) };
    match std::fs::read_to_string(path).unwrap_or_default().trim() {
        "fail" => Err("a planted fault".into()),
        "hang" => std::future::pending().await,
        _ => Ok(()),
    }
}
