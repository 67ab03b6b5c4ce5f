//! The two clocks.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`: the same count in every process of the machine, standing still in suspend.
#[must_use]
pub fn monotonic_ns() -> u64 {
    nanos(clock_gettime(ClockId::Monotonic))
}

/// Milliseconds since the Unix epoch.
#[must_use]
pub fn unix_ms() -> u64 {
    nanos(clock_gettime(ClockId::Realtime)) / 1_000_000
}

/// Milliseconds since a process started, from its start time in clock ticks since boot (proc_pid_stat(5)).
#[must_use]
pub fn age_ms(start_ticks: u64) -> u64 {
    // `USER_HZ`: 100 on every architecture that Rust's standard library runs on under Linux but Alpha and IA-64.
    const MS_PER_TICK: u64 = 10;
    let now = clock_gettime(ClockId::Boottime);
    (nanos(now) / 1_000_000).saturating_sub(start_ticks.saturating_mul(MS_PER_TICK))
}

fn nanos(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_clock_does_not_go_back() {
        let first = monotonic_ns();
        assert!(first > 0 && monotonic_ns() >= first);
        assert!(unix_ms() > 1_600_000_000_000);
    }
}
