//! How a process ended, in a word or two, from its record.

use std::ops::RangeInclusive;

use serde_json::Value;

/// `code 0`, `signal 9 (SIGKILL)`, `not started`, or `unknown`.
pub(crate) fn how(record: &Value) -> String {
    let number = |key: &str| record.get(key).and_then(Value::as_u64);
    match (number("code"), number("signal")) {
        (Some(code), _) => format!("code {code}"),
        (None, Some(signal)) => {
            let core = record.get("core").and_then(Value::as_bool).unwrap_or(false);
            format!("signal {signal} ({}){}", signal_name(signal), if core { ", core dumped" } else { "" })
        }
        (None, None) if record.get("pid").is_some_and(Value::is_null) => "not started".to_owned(),
        (None, None) => "unknown".to_owned(),
    }
}

/// Linux's names (signal(7)) of the signals; x86 and ARM number these alike.
pub(crate) fn signal_name(number: u64) -> String {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
        "WINCH", "IO", "PWR", "SYS",
    ];
    // The C library keeps two of those for real time to itself.
    const REALTIME: RangeInclusive<u64> = 34..=64;
    let named = usize::try_from(number).ok().and_then(|number| NAMES.get(number.checked_sub(1)?));
    match named {
        Some(name) => format!("SIG{name}"),
        None if REALTIME.contains(&number) => format!("SIGRTMIN+{}", number - REALTIME.start()),
        None => "other".to_owned(),
    }
}
