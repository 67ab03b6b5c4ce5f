//! The programs that serve models, read from the board: one for each section of a configuration that is in use.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use evergate_board::{Board, HostRow, HostState, InflightPhase, monotonic_ns};
use evergate_core::inherit::host_socket;
use serde::Serialize;

use super::status::{age_text, printable};

/// An upstream whose model is a program of this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// The upstream's name.
    pub model: String,
    /// What its host is to be taken for, such as `ready`.
    #[serde(serialize_with = "by_name")]
    pub state: HostState,
    /// Milliseconds since it is that; none for one that was never asked for.
    pub since_ms: Option<u64>,
    /// Process id of its host; none while there is none.
    pub host_pid: Option<i32>,
    /// Process id of its program, the first if there are several; none while there is none.
    pub program_pid: Option<i32>,
    /// Where its program listens, if it does so by itself.
    pub address: Option<String>,
    /// The host's socket, a file in the state folder's `hosts`.
    pub socket: String,
    /// Requests that its program works on.
    pub in_flight: u32,
    /// Requests that wait: for a place, or, in their workers, for its start.
    pub waiting: u64,
    /// Programs that its host has started in place of others.
    pub restarts: u64,
    /// How often a start or a life of its host has come to a bad end.
    pub failures: u64,
    /// Why the last of them did; none after a good start.
    pub cause: Option<String>,
    /// Milliseconds until a failed one is tried again.
    pub retry_ms: Option<u64>,
    /// Whether the configuration in force has another section of this name, or none.
    pub is_retired: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn by_name<S: serde::Serializer>(state: &HostState, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// All of them, in the order of their rows.
#[must_use]
pub fn programs(board: &Board) -> Vec<Program> {
    let rows: Vec<&HostRow> = board.hosts().map(|(_, row)| row).filter(|row| row.fingerprint() != 0).collect();
    // Most gateways have none: then nobody's requests are looked through.
    if rows.is_empty() {
        return Vec::new();
    }
    let now = monotonic_ns();
    let mut parked = parked(board);
    let mut programs: Vec<Program> = rows.into_iter().map(|row| read(board, row, now)).collect();
    for program in programs.iter_mut().filter(|program| !program.is_retired) {
        let count = parked.remove(&program.model).unwrap_or(0);
        program.waiting = program.waiting.saturating_add(count);
    }
    programs
}

/// Requests that wait in their workers for a host's start, by upstream.
fn parked(board: &Board) -> BTreeMap<String, u64> {
    let mut counts: BTreeMap<u16, u64> = BTreeMap::new();
    for (row, _) in board.children().filter(|(_, child)| child.kind().is_some()) {
        for request in board.inflight(row).filter(|request| request.phase == InflightPhase::Start) {
            let count = counts.entry(request.backend).or_default();
            *count = count.saturating_add(1);
        }
    }
    counts.into_iter().map(|(label, count)| (board.label_text(label), count)).collect()
}

fn read(board: &Board, row: &HostRow, now: u64) -> Program {
    let ms = |from: u64, to: u64| to.saturating_sub(from) / 1_000_000;
    let told = |text: String| Some(text).filter(|text| !text.is_empty());
    let (since, state) = (row.since_ns(), row.shown(row.state()));
    let child = board.child(row.child()).filter(|child| row.epoch() > 0 && child.epoch() == row.epoch());
    Program {
        model: row.name(),
        state,
        since_ms: (since > 0).then(|| ms(since, now)),
        host_pid: child.map(evergate_board::ChildRow::pid),
        // What a dead host has said last is nobody's.
        program_pid: Some(row.pid()).filter(|pid| *pid > 0 && child.is_some()),
        address: told(row.address()).filter(|_| child.is_some()),
        socket: host_socket(row.fingerprint()),
        in_flight: if child.is_some() { row.in_flight() } else { 0 },
        waiting: if child.is_some() { row.waiting().into() } else { 0 },
        restarts: row.restarts(),
        failures: row.failures(),
        cause: told(row.cause()),
        retry_ms: (state == HostState::Failed).then(|| ms(now, row.retry_ns())),
        is_retired: row.is_retired(),
    }
}

impl Program {
    /// The state's word, and whether a reload has left this one behind.
    pub(crate) fn state_text(&self) -> String {
        format!("{}{}", self.state.name(), if self.is_retired { " (old)" } else { "" })
    }

    /// A line of `evergate status`.
    pub(crate) fn line(&self) -> String {
        let mut out = format!("program {}: {}", printable(&self.model), self.state_text());
        // Writing to a String cannot fail.
        if let Some(since) = self.since_ms {
            let _ = write!(out, " for {}", age_text(since));
        }
        if self.in_flight > 0 || matches!(self.state, HostState::Ready | HostState::Restarting) {
            let _ = write!(out, ", {} in flight", self.in_flight);
        }
        if self.waiting > 0 {
            let _ = write!(out, ", {} waiting", self.waiting);
        }
        if let Some(cause) = &self.cause {
            let _ = write!(out, ": {}", printable(cause));
        }
        if let Some(retry) = self.retry_ms {
            let when = if retry > 0 { format!("in {} at the soonest", age_text(retry)) } else { "now".to_owned() };
            let _ = write!(out, "; tried again {when}, if it is asked for");
        }
        out
    }
}
