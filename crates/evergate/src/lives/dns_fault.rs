//! A planted resolver, for drills: only in debug builds, and only where `EVERGATE_FAULT_DNS` names a file.
//!
//! The file is read at each look-up: a line is a name, `after=MILLISECONDS` if its answer is to be late, and its addresses;
//! without one the look-up fails. Names that are not in it are the system's.

use std::ffi::OsStr;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use evergate_upstream::Resolver;
use evergate_upstream::clock::Clock;

/// The resolver of this process.
pub(crate) fn resolver(clock: &Clock) -> Resolver {
    match std::env::var_os("EVERGATE_FAULT_DNS").filter(|_| cfg!(debug_assertions)) {
        Some(path) => Resolver::new(clock.clone(), Arc::new(move |host| look_up(&path, host))),
        None => Resolver::system(clock.clone()),
    }
}

#[allow(clippy::disallowed_methods, reason = "a look-up that blocks is what the drill is for")]
fn look_up(path: &OsStr, host: &str) -> Result<Vec<IpAddr>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let mut lines = text.lines().map(str::split_whitespace);
    let Some(mut words) = lines.find_map(|mut words| (words.next() == Some(host)).then_some(words)) else {
        return evergate_upstream::look_up(host);
    };
    let mut found = Vec::new();
    for word in &mut words {
        match word.strip_prefix("after=") {
            Some(ms) => std::thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0))),
            None => found.push(word.parse().map_err(|_| format!("a planted fault: {word}"))?),
        }
    }
    Ok(found)
}
