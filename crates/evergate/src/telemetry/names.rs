//! Every counter on the board, and how its labels are packed.
//!
//! A counter's key is a metric number and three small label values; label texts are interned on the board. All label
//! values come from bounded sets: the configuration, the fault table, the buckets below.

use std::time::Duration;

use evergate_board::{Board, Inflight, Series, SeriesKey};
use evergate_core::exit::{Initiator, Kind};
use evergate_core::{Cause, Fault};
use evergate_supervisor::HostStart;
use evergate_upstream::LookUps;

/// Requests by model label (a), upstream label (b), status and cause (c, see `status_and_end`).
pub const REQUESTS: u8 = 1;
/// Time to the first token: model label (a), bucket index (b).
pub const FIRST_TOKEN_BUCKET: u8 = 2;
/// Sum of the times to the first token in microseconds: model label (a).
pub const FIRST_TOKEN_SUM_US: u8 = 3;
/// Prompt tokens: model label (a), key label (b).
pub const TOKENS_IN: u8 = 4;
/// Completion tokens: model label (a), key label (b).
pub const TOKENS_OUT: u8 = 5;
/// Answers whose token counts cannot be right: model label (a).
pub const USAGE_SUSPECT: u8 = 16;
/// Ends of processes: kind (a), initiator (b, index in `INITIATORS`). On the master's series.
pub const EXITS: u8 = 6;
/// Access records that could not be handed to the clerk.
pub const ACCESS_DROPPED: u8 = 7;
/// Panics.
pub const PANICS: u8 = 8;
/// Accepts that failed for want of descriptors or memory.
pub const ACCEPT_FAILURES: u8 = 15;
/// Client connections accepted.
pub const CONNECTIONS: u8 = 9;
/// Children started in place of another: kind (a), what made the other one go (b, index in `INITIATORS`). On the master's
/// series.
pub const RESPAWNS: u8 = 30;

/// Lateness of event loops: bucket index (a).
pub const LOOP_LAG_BUCKET: u8 = 10;
/// Sum of it in microseconds.
pub const LOOP_LAG_SUM_US: u8 = 11;

/// Attempts that failed and were followed by another: upstream label (b), cause (c, see `status_and_end`, status 0). The
/// last attempt of a request is among `REQUESTS`.
pub const ATTEMPTS: u8 = 12;
/// Look-ups of upstreams' names: how they ended (a, index in `LOOK_UPS`).
pub const DNS_LOOK_UPS: u8 = 40;

/// Ends of look-ups by their label index.
pub const LOOK_UPS: [&str; 3] = ["ok", "failed", "late"];

/// Time from a request's head to its answer's: bucket index (a).
pub const FIRST_BYTE_BUCKET: u8 = 13;
/// Sum of it in microseconds.
pub const FIRST_BYTE_SUM_US: u8 = 14;

/// Upper bounds of the first-byte buckets, milliseconds; one more bucket follows for everything above.
pub const FIRST_BYTE_BUCKETS_MS: [u64; 14] =
    [1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 5_000, 10_000, 60_000, 300_000];

/// Requests that an upstream's limit has kept from it: reason (a, a `Shed`), upstream label (b).
pub const SHED: u8 = 41;

/// Why a request got no permit of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Shed {
    /// As many waited as may.
    QueueFull = 0,
    /// It would have waited for longer than it had time.
    TooLate = 1,
    /// It waited in vain.
    OutOfTime = 2,
    /// It went on to the model's next target, without waiting.
    NextTarget = 3,
}

impl Shed {
    /// All of them, in their order.
    pub const ALL: [Self; 4] = [Self::QueueFull, Self::TooLate, Self::OutOfTime, Self::NextTarget];

    /// The label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::TooLate => "too_late",
            Self::OutOfTime => "out_of_time",
            Self::NextTarget => "next_target",
        }
    }
}

/// Starts of hosts that are over: upstream label (a), how they came out (b, index in `HostStart::ALL`). On the master's
/// series, like their times.
pub const HOST_STARTS: u8 = 50;
/// Time that the starts took which came to be ready: bucket index (a), upstream label (b).
pub const HOST_START_BUCKET: u8 = 51;
/// Sum of it in microseconds: upstream label (b).
pub const HOST_START_SUM_US: u8 = 52;
/// Time that requests waited for a host's start: bucket index (a), upstream label (b).
pub const HOST_WAIT_BUCKET: u8 = 53;
/// Sum of it in microseconds: upstream label (b).
pub const HOST_WAIT_SUM_US: u8 = 54;
/// Programs started: upstream label (a).
pub const PROGRAM_STARTS: u8 = 55;
/// Ends of programs: upstream label (a), cause (b, a `ProgramEnd`).
pub const PROGRAM_EXITS: u8 = 56;

/// Upper bounds of the buckets of hosts' times, milliseconds; one more bucket follows for everything above.
pub const HOST_BUCKETS_MS: [u64; 14] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 120_000, 300_000];

/// Why a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ProgramEnd {
    /// By itself, with exit code 0.
    Done = 0,
    /// By itself, with another code or a signal that a process's own mistake raises.
    Crash = 1,
    /// By its host.
    Host = 2,
    /// By a signal from outside, sender unknown.
    Unknown = 3,
    /// It could not be started.
    Boot = 4,
    /// With its host, which was told to go.
    Stopped = 5,
    /// By the kernel, for want of memory in its cgroup.
    OutOfMemory = 6,
}

impl ProgramEnd {
    /// All of them, in their order.
    pub const ALL: [Self; 7] =
        [Self::Done, Self::Crash, Self::Host, Self::Unknown, Self::Boot, Self::Stopped, Self::OutOfMemory];

    /// The label, and the initiator in the record.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Crash => "crash",
            Self::Host => "host",
            Self::Unknown => "unknown",
            Self::Boot => "boot",
            Self::Stopped => "stopped",
            Self::OutOfMemory => "out_of_memory",
        }
    }
}

/// Idle client connections that ended since others wanted their place.
pub const IDLE_SHED: u8 = 43;
/// What was given up for want of memory: what (a, a `Spared`).
pub const SPARED: u8 = 42;

/// What is given up for want of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Spared {
    /// A request with a large body was refused.
    LargeBody = 0,
    /// Any request was refused.
    Request = 1,
    /// A request under way was ended.
    UnderWay = 2,
}

impl Spared {
    /// All of them, in their order.
    pub const ALL: [Self; 3] = [Self::LargeBody, Self::Request, Self::UnderWay];

    /// The label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LargeBody => "large_body",
            Self::Request => "request",
            Self::UnderWay => "under_way",
        }
    }
}

/// Upper bounds of the lateness buckets, milliseconds; one more bucket follows for everything above. A timer is up to a
/// millisecond late by its own granularity.
pub const LOOP_LAG_BUCKETS_MS: [u64; 9] = [2, 5, 10, 20, 50, 100, 250, 1_000, 5_000];

/// Upper bounds of the first-token buckets, milliseconds; one more bucket follows for everything above.
pub const FIRST_TOKEN_BUCKETS_MS: [u64; 14] =
    [5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 120_000];

/// Initiators by their label index.
pub const INITIATORS: [Initiator; 16] = [
    Initiator::Operator,
    Initiator::Reload,
    Initiator::ScaleDown,
    Initiator::Requests,
    Initiator::Lifetime,
    Initiator::Rss,
    Initiator::Idle,
    Initiator::Group,
    Initiator::Hang,
    Initiator::Boot,
    Initiator::Crash,
    Initiator::OutOfMemory,
    Initiator::OutOfMemorySuspected,
    Initiator::Orphan,
    Initiator::Unknown,
    Initiator::Descriptors,
];

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Answered whole.
    Ok,
    /// The client left first.
    ClientGone,
    /// The client has read nothing for too long.
    ClientStalled,
    /// Its worker died.
    WorkerLost,
    /// With an error.
    Fault(Fault),
}

impl End {
    /// Whether it is an error that is not the client's: with a status of 500 or more, or what would have had one in place of a stream's
    /// error event.
    #[must_use]
    pub fn is_error(self) -> bool {
        matches!(self, Self::Fault(fault) if fault.row().status >= 500)
    }

    /// The name in records and labels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientGone => Cause::ClientGone.name(),
            Self::ClientStalled => Cause::ClientStalled.name(),
            Self::WorkerLost => "worker_lost",
            Self::Fault(fault) => fault.row().code,
        }
    }

    fn index(self) -> u16 {
        match self {
            Self::Ok => 0,
            Self::ClientGone => 1,
            Self::WorkerLost => 2,
            Self::ClientStalled => 3,
            Self::Fault(fault) => 8 + fault as u16,
        }
    }

    fn from_index(index: u16) -> Option<Self> {
        match index {
            0 => Some(Self::Ok),
            1 => Some(Self::ClientGone),
            2 => Some(Self::WorkerLost),
            3 => Some(Self::ClientStalled),
            _ => Fault::ALL.get(usize::from(index.checked_sub(8)?)).copied().map(Self::Fault),
        }
    }
}

/// Packs a status (below 1,024) and an end (below 64) into one label value.
#[must_use]
pub fn status_and_end(status: u16, end: End) -> u16 {
    (status & 0x3ff) << 6 | (end.index() & 0x3f)
}

/// Undoes `status_and_end`; `None` for a value that it never makes.
#[must_use]
pub fn split_status_and_end(packed: u16) -> Option<(u16, End)> {
    Some((packed >> 6, End::from_index(packed & 0x3f)?))
}

/// The bucket of a first-token time.
#[must_use]
pub fn first_token_bucket(ms: f64) -> u16 {
    let at = FIRST_TOKEN_BUCKETS_MS.iter().position(|bound| ms <= *bound as f64);
    at.unwrap_or(FIRST_TOKEN_BUCKETS_MS.len()) as u16
}

/// Counts how late an event loop was at a beat.
pub fn count_loop_lag(series: &Series<'_>, lag: Duration) {
    count_time(series, (LOOP_LAG_BUCKET, &LOOP_LAG_BUCKETS_MS), (LOOP_LAG_SUM_US, 0), lag);
}

/// Counts the time from a request's head to that of its answer.
pub fn count_first_byte(series: &Series<'_>, time: Duration) {
    count_time(series, (FIRST_BYTE_BUCKET, &FIRST_BYTE_BUCKETS_MS), (FIRST_BYTE_SUM_US, 0), time);
}

/// Counts how long a request has waited for the host of an upstream (its label) to start.
pub fn count_host_wait(series: &Series<'_>, upstream: u16, time: Duration) {
    count_time(series, (HOST_WAIT_BUCKET, &HOST_BUCKETS_MS), (HOST_WAIT_SUM_US, upstream), time);
}

fn count_time(series: &Series<'_>, (bucket, bounds_ms): (u8, &[u64]), (sum_us, label): (u8, u16), time: Duration) {
    let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let at = bounds_ms.iter().position(|bound| us <= bound * 1_000);
    series.add(key(bucket, at.unwrap_or(bounds_ms.len()) as u16, label, 0), 1);
    series.add(key(sum_us, 0, label, 0), us);
}

/// Counts look-ups of names.
pub fn count_look_ups(series: &Series<'_>, counts: LookUps) {
    for (index, count) in (0..).zip([counts.ok, counts.failed, counts.late]) {
        if count > 0 {
            series.add(key(DNS_LOOK_UPS, index, 0, 0), count);
        }
    }
}

/// A key.
#[must_use]
pub fn key(metric: u8, a: u16, b: u16, c: u16) -> SeriesKey {
    SeriesKey { metric, a, b, c }
}

/// Counts the requests that a dead worker has left, but for those that the worker has, and says how each ended: status and cause.
/// The master calls this at the burial.
pub fn count_left(board: &Board, row: u32, requests: &[Inflight]) -> Vec<(u16, &'static str)> {
    let ended = |request: &Inflight| match (request.is_over(), request.end.and_then(split_status_and_end)) {
        (true, Some(known)) => known,
        (true, None) => (0, End::Ok),
        (false, _) => (0, End::WorkerLost),
    };
    if let Some(series) = board.series(row) {
        let key_of = |request: &Inflight| {
            let (status, end) = ended(request);
            key(REQUESTS, request.model, request.backend, status_and_end(status, end))
        };
        // All are compared with the counters as the worker left them, before any is counted here.
        let uncounted: Vec<SeriesKey> = requests
            .iter()
            .map(|request| (request, key_of(request)))
            .filter(|(request, key)| !request.was_counted(series.get(*key)))
            .map(|(_, key)| key)
            .collect();
        uncounted.into_iter().for_each(|key| series.add(key, 1));
    }
    requests.iter().map(ended).map(|(status, end)| (status, end.name())).collect()
}

/// Counts a process's end; the master calls this at the burial.
pub fn count_exit(board: &Board, kind: Kind, initiator: Initiator) {
    count_process(board, EXITS, kind, initiator);
}

/// Counts a process that takes another's place; the master calls this when it is started.
pub fn count_respawn(board: &Board, kind: Kind, cause: Initiator) {
    count_process(board, RESPAWNS, kind, cause);
}

/// Counts the start of an upstream's host; the master calls this when it is over.
pub fn count_host_start(board: &Board, upstream: &str, outcome: HostStart, took: Duration) {
    let Some(series) = board.master_series() else { return };
    let label = board.label(upstream);
    series.add(key(HOST_STARTS, label, outcome as u16, 0), 1);
    if outcome == HostStart::Ready {
        count_time(&series, (HOST_START_BUCKET, &HOST_BUCKETS_MS), (HOST_START_SUM_US, label), took);
    }
}

fn count_process(board: &Board, metric: u8, kind: Kind, initiator: Initiator) {
    let index = INITIATORS.iter().position(|known| *known == initiator).unwrap_or(INITIATORS.len() - 1);
    if let Some(series) = board.master_series() {
        series.add(key(metric, kind as u16, index as u16, 0), 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_survives_packing() {
        let ends = [End::Ok, End::ClientGone, End::ClientStalled, End::WorkerLost];
        for end in ends.into_iter().chain(Fault::ALL.iter().copied().map(End::Fault)) {
            assert_eq!(split_status_and_end(status_and_end(599, end)), Some((599, end)));
        }
    }

    #[test]
    fn buckets_hold_their_bounds() {
        assert_eq!(first_token_bucket(5.0), 0);
        assert_eq!(first_token_bucket(5.1), 1);
        assert_eq!(first_token_bucket(1e9), 14);
    }
}
