//! What a running gateway is doing, read from the board alone.

use std::fmt::Write as _;

use evergate_board::{Board, ChildRow, Inflight, PermitsSeen, monotonic_ns};
use evergate_core::exit::Kind;
use serde::Serialize;
use serde_json::Value;

use super::ended::how;
use super::programs::{Program, programs};

/// Most requests in flight that are listed; all are counted.
const INFLIGHT_LISTED_MAX: usize = 1_000;

/// The whole gateway at one moment. Each value is true for itself; they are not from the same instant.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The master.
    pub master: Master,
    /// Its children, in the order of the board's rows.
    pub children: Vec<Child>,
    /// Upstreams with `in_flight_max`.
    pub upstreams: Vec<Upstream>,
    /// Upstreams that are programs of this machine.
    pub models: Vec<Program>,
    /// Requests in flight, at most 1,000, oldest first.
    pub inflight: Vec<Request>,
    /// The last ends of children, eight at most, newest first.
    pub exits: Vec<Value>,
}

/// The master's row.
#[derive(Clone, Debug, Serialize)]
pub struct Master {
    /// Process id.
    pub pid: i32,
    /// What it is doing, such as `serving`.
    pub phase: &'static str,
    /// Generation of the configuration that new children get.
    pub generation: u32,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// Milliseconds since its loop last turned.
    pub beat_age_ms: u64,
    /// Fewest workers.
    pub workers_min: u32,
    /// Most workers.
    pub workers_max: u32,
    /// Workers wanted at this moment.
    pub workers_target: u32,
    /// Slots whose child keeps dying.
    pub degraded: u32,
    /// Connections that wait to be accepted.
    pub queue: u32,
    /// Those, and requests that wait for a slot.
    pub backlog: u64,
    /// Whether a reload is under way.
    pub reloading: bool,
}

/// A child's row.
#[derive(Clone, Debug, Serialize)]
pub struct Child {
    /// What it is, such as `worker`.
    pub kind: &'static str,
    /// Its slot among its kind.
    pub slot: u32,
    /// A host's upstream; none for any other.
    pub upstream: Option<String>,
    /// Its row on the board.
    pub row: u32,
    /// Process id.
    pub pid: i32,
    /// Its number within the run.
    pub epoch: u32,
    /// Generation of its configuration.
    pub generation: u32,
    /// What it is doing, such as `ready`.
    pub phase: &'static str,
    /// Milliseconds since it was started.
    pub age_ms: u64,
    /// Milliseconds since its last beat; none before the first.
    pub beat_age_ms: Option<u64>,
    /// Whether it accepts connections.
    pub accepting: bool,
    /// Weighted requests it has.
    pub load: u32,
    /// Requests in flight.
    pub inflight: Inflights,
    /// Client connections open.
    pub connections: u32,
    /// Upstream connections open.
    pub upstream_connections: u32,
    /// Requests that wait for a slot.
    pub waiting: u32,
    /// How long the oldest of them has waited, milliseconds.
    pub waiting_oldest_ms: u64,
    /// Requests it has taken since its start.
    pub requests: u64,
    /// Of those, the ones that have ended with an error that was not their client's.
    pub errors: u64,
    /// How late its event loop was lately, microseconds.
    pub loop_lag_us: u32,
    /// Resident set, KiB.
    pub rss_kib: u64,
    /// What it says about itself.
    pub note: String,
}

/// Requests in flight, by shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Inflights {
    /// Answered whole.
    pub unary: u64,
    /// Answered as a stream.
    pub stream: u64,
}

impl Inflights {
    /// Counts one request.
    pub(crate) fn add(&mut self, request: &Inflight) {
        let count = if request.is_stream { &mut self.stream } else { &mut self.unary };
        *count = count.saturating_add(1);
    }
}

/// An upstream with a limit of calls under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Upstream {
    /// Its name.
    pub name: String,
    /// Calls under way, over all workers.
    pub in_flight: u32,
    /// The most there may be.
    pub in_flight_max: u32,
    /// Requests that wait for one of them to end.
    pub waiting: u64,
}

/// One request in flight.
#[derive(Clone, Debug, Serialize)]
pub struct Request {
    /// Our id.
    pub request_id: String,
    /// The client's id, empty if it gave none.
    pub client_id: String,
    /// Path as labelled.
    pub route: String,
    /// Model as labelled, empty before routing.
    pub model: String,
    /// Name of the key it came with, empty without.
    pub tenant: String,
    /// What it is doing, such as `stream`.
    pub phase: &'static str,
    /// Whether it is a stream.
    pub is_stream: bool,
    /// Milliseconds since its admission.
    pub age_ms: u64,
    /// Process that has it.
    pub pid: i32,
}

/// Reads the board.
#[must_use]
pub fn snapshot(board: &Board) -> Status {
    let now = monotonic_ns();
    let mut children = Vec::new();
    let mut inflight = Vec::new();
    // A row without a kind is empty, or about to be.
    for (row, child, kind) in board.children().filter_map(|(row, child)| Some((row, child, child.kind()?))) {
        let mut counts = Inflights::default();
        for found in board.inflight(row) {
            counts.add(&found);
            if inflight.len() < INFLIGHT_LISTED_MAX {
                inflight.push(request(board, &found, child.pid(), now));
            }
        }
        children.push(read_child(board, (row, child, kind), counts, now));
    }
    inflight.sort_by_key(|request| std::cmp::Reverse(request.age_ms));
    Status {
        master: read_master(board, now),
        children,
        upstreams: board.permits_seen().map(upstream).collect(),
        models: programs(board),
        inflight,
        exits: board.master().last_exits().iter().filter_map(|text| serde_json::from_str(text).ok()).collect(),
    }
}

fn upstream(seen: PermitsSeen) -> Upstream {
    let PermitsSeen { upstream: name, max: in_flight_max, held: in_flight, waiting } = seen;
    Upstream { name, in_flight, in_flight_max, waiting }
}

fn read_master(board: &Board, now: u64) -> Master {
    let row = board.master();
    Master {
        pid: row.pid(),
        phase: row.phase().name(),
        generation: row.generation(),
        uptime_ms: evergate_sys::unix_ms().saturating_sub(row.started_unix_ms()),
        beat_age_ms: ms_since(row.beat_ns(), now),
        workers_min: row.workers_min(),
        workers_max: row.workers_max(),
        workers_target: row.workers_target(),
        degraded: row.degraded(),
        queue: row.queue(),
        backlog: row.backlog(),
        reloading: row.reloading(),
    }
}

fn read_child(board: &Board, (row, child, kind): (u32, &ChildRow, Kind), inflight: Inflights, now: u64) -> Child {
    let beat = child.beat_ns();
    Child {
        kind: kind.name(),
        slot: child.slot(),
        upstream: (kind == Kind::Host).then(|| host_name(board, child.epoch())).flatten(),
        row,
        pid: child.pid(),
        epoch: child.epoch(),
        generation: child.generation(),
        phase: child.phase().name(),
        age_ms: ms_since(child.spawned_ns(), now),
        beat_age_ms: (beat > 0).then(|| ms_since(beat, now)),
        accepting: child.accepting(),
        load: child.load(),
        inflight,
        connections: child.connections(),
        upstream_connections: child.upstream_connections(),
        waiting: child.waiting(),
        waiting_oldest_ms: oldest_wait_ns(child, now) / 1_000_000,
        requests: child.requests(),
        errors: child.errors(),
        loop_lag_us: child.loop_lag_us(),
        rss_kib: child.rss_kib(),
        note: child.note(),
    }
}

/// The upstream that a host of this epoch serves.
fn host_name(board: &Board, epoch: u32) -> Option<String> {
    board.hosts().find(|(_, row)| row.fingerprint() != 0 && row.epoch() == epoch).map(|(_, row)| row.name())
}

fn request(board: &Board, found: &Inflight, pid: i32, now: u64) -> Request {
    Request {
        request_id: found.request_id(board.run_id()).to_string(),
        client_id: found.client_id.clone(),
        route: board.label_text(found.route),
        model: board.label_text(found.model),
        tenant: board.label_text(found.key),
        phase: found.phase.name(),
        is_stream: found.is_stream,
        age_ms: ms_since(found.started_ns, now),
        pid,
    }
}

/// How long the oldest waiting request of a child has waited: known from outside also when the child stands still.
pub(crate) fn oldest_wait_ns(child: &ChildRow, now: u64) -> u64 {
    let since = child.waiting_since_ns();
    if since == 0 { 0 } else { now.saturating_sub(since) }
}

/// A value from the board may be nonsense, so that a time in the future is no time ago.
fn ms_since(then: u64, now: u64) -> u64 {
    now.saturating_sub(then) / 1_000_000
}

impl Status {
    /// Text for a terminal: the master's line, a table of the children, a line of totals.
    #[must_use]
    pub fn to_table(&self) -> String {
        let master = &self.master;
        let mut out = format!(
            "master pid {}, {}, up {}, generation {}, workers {} wanted ({} to {})",
            master.pid,
            master.phase,
            age_text(master.uptime_ms),
            master.generation,
            master.workers_target,
            master.workers_min,
            master.workers_max
        );
        // Writing to a String cannot fail. What is well is not mentioned.
        if master.queue > 0 {
            let _ = write!(out, ", {} connections wait to be accepted", master.queue);
        }
        if master.reloading {
            out.push_str(", a reload is under way");
        }
        if master.degraded > 0 {
            let _ = write!(out, ", {} slots degraded: see \"evergate exits\"", master.degraded);
        }
        if master.beat_age_ms > 2_000 {
            let _ = write!(out, ", last beat {} ago", age_text(master.beat_age_ms));
        }
        out.push_str("\n\n");
        out.push_str(&table(&HEAD, &self.children.iter().map(cells).collect::<Vec<_>>()));
        let sum = |count: fn(&Inflights) -> u64| self.children.iter().map(|child| count(&child.inflight)).sum::<u64>();
        let _ = write!(out, "\nin flight: {} unary, {} streams", sum(|all| all.unary), sum(|all| all.stream));
        let waiting = self.children.iter().map(|child| u64::from(child.waiting)).sum::<u64>();
        if waiting > 0 {
            let oldest = self.children.iter().map(|child| child.waiting_oldest_ms).max().unwrap_or(0);
            let _ = write!(out, "; {waiting} waiting for a slot, the oldest for {}", age_text(oldest));
        }
        out.push('\n');
        for Upstream { name, in_flight, in_flight_max, waiting } in &self.upstreams {
            let _ = write!(out, "upstream {}: {in_flight} of {in_flight_max} calls under way", printable(name));
            if *waiting > 0 {
                let _ = write!(out, ", {waiting} waiting");
            }
            out.push('\n');
        }
        for program in &self.models {
            let _ = writeln!(out, "{}", program.line());
        }
        let now = evergate_sys::unix_ms();
        self.exits.iter().take(EXITS_SHOWN).for_each(|exit| out.push_str(&exit_line(exit, now)));
        out
    }
}

/// Ends that the text shows.
const EXITS_SHOWN: usize = 3;

fn exit_line(exit: &Value, now: u64) -> String {
    let text = |key: &str| exit.get(key).and_then(Value::as_str).map(printable);
    let number = |key: &str| exit.get(key).and_then(Value::as_u64).unwrap_or(0);
    let name = text("upstream").unwrap_or_else(|| number("slot").to_string());
    let (kind, initiator) = (text("kind").unwrap_or_default(), text("initiator").unwrap_or_default());
    let ago = age_text(now.saturating_sub(number("at_ms")));
    format!("{ago} ago {kind} {name} (pid {}) ended: {}, {initiator}\n", number("pid"), how(exit))
}

const HEAD: [&str; 14] = [
    "CHILD", "PID", "EPOCH", "GEN", "PHASE", "AGE", "BEAT", "LOAD", "UNARY", "STREAMS", "CONNS", "REQUESTS", "ERRORS",
    "RSS",
];

fn cells(child: &Child) -> Vec<String> {
    let mut phase = child.phase.to_owned();
    if !child.note.is_empty() {
        let _ = write!(phase, " ({})", printable(&child.note));
    }
    vec![
        match &child.upstream {
            Some(upstream) => format!("{} {}", child.kind, printable(upstream)),
            None => format!("{} {}", child.kind, child.slot),
        },
        child.pid.to_string(),
        child.epoch.to_string(),
        child.generation.to_string(),
        phase,
        age_text(child.age_ms),
        child.beat_age_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms}ms")),
        child.load.to_string(),
        child.inflight.unary.to_string(),
        child.inflight.stream.to_string(),
        child.connections.to_string(),
        child.requests.to_string(),
        child.errors.to_string(),
        mib_text(child.rss_kib),
    ]
}

/// A text for a terminal: nothing in it may move the cursor or end the line.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// `12.5M`; nothing known is a dash, since no process has no memory.
fn mib_text(kib: u64) -> String {
    if kib == 0 { "-".to_owned() } else { format!("{}.{}M", kib / 1024, kib % 1024 * 10 / 1024) }
}

/// A time as a person says it: `850ms`, `12s`, `3m05s`, `2h10m`, `4d03h`.
pub(crate) fn age_text(ms: u64) -> String {
    let seconds = ms / 1_000;
    match seconds {
        0 => format!("{ms}ms"),
        1..=59 => format!("{seconds}s"),
        60..=3_599 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600..=86_399 => format!("{}h{:02}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// Columns as wide as their widest cell, two spaces between, nothing after the last.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(text, "{cell:<width$}  ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_board::{Claim, InflightPhase, InflightStart, Phase, Shape};
    use evergate_core::exit::{ExitRecord, Initiator};

    fn board() -> Board {
        let board = Board::create(Shape { children: 4, slots: 4, series: 8, labels: 16 }, 7).unwrap();
        let child = board.child(2).unwrap();
        let spawned_ns = monotonic_ns();
        child.claim(&Claim { kind: Kind::Worker, slot: 1, epoch: 9, generation: 1, spawned_ns });
        child.set_pid(4242);
        child.set_phase(Phase::Ready);
        child.set_note("a\u{1b}[2Jb");
        board
    }

    fn start(seq: u32, client_id: &str, route: u16) -> InflightStart<'_> {
        InflightStart { seq, epoch: 9, client_id, route, key: 0, method: 0, started_ns: monotonic_ns() }
    }

    #[test]
    fn empty_rows_are_left_out_and_requests_are_counted_by_shape() {
        let board = board();
        let rows = board.inflight_rows(2);
        let _unary = rows.admit(start(1, "mine", board.label("/v1/x"))).unwrap();
        let stream = rows.admit(start(2, "", 0)).unwrap();
        stream.set_stream(true);
        stream.set_phase(InflightPhase::Stream);
        let status = snapshot(&board);
        assert_eq!(status.children.len(), 1);
        assert_eq!(status.children[0].inflight, Inflights { unary: 1, stream: 1 });
        assert_eq!(status.children[0].beat_age_ms, None);
        let mine = status.inflight.iter().find(|request| request.client_id == "mine").unwrap();
        assert_eq!((mine.route.as_str(), mine.phase, mine.pid), ("/v1/x", "body", 4242));
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["children"][0]["kind"], "worker");
        assert_eq!(json["children"][0]["inflight"]["stream"], 1);
    }

    #[test]
    fn upstreams_with_a_limit_have_a_line() {
        let board = board();
        let permits = board.permits("gpu", (2, 9)).unwrap();
        permits.set_max(2);
        let _taken = permits.take().unwrap();
        assert!(snapshot(&board).to_table().ends_with("\nupstream gpu: 1 of 2 calls under way\n"));
        permits.show_waiting(5, 1);
        let status = snapshot(&board);
        assert!(status.to_table().ends_with("\nupstream gpu: 1 of 2 calls under way, 5 waiting\n"));
        assert_eq!(serde_json::to_value(&status).unwrap()["upstreams"][0]["waiting"], 5);
    }

    #[test]
    fn table_is_aligned_and_cannot_drive_the_terminal() {
        let text = snapshot(&board()).to_table();
        assert!(!text.contains('\u{1b}'));
        let lines: Vec<&str> = text.lines().collect();
        let head = lines.iter().position(|line| line.starts_with("CHILD")).unwrap();
        let at = lines[head].find("PID").unwrap();
        assert_eq!(&lines[head + 1][at..at + 4], "4242");
        assert!(lines.iter().all(|line| !line.ends_with(' ')));
    }

    #[test]
    fn the_last_ends_are_told_newest_first() {
        let board = board();
        for pid in 1..=10 {
            let status = evergate_core::exit::Status::Signal { number: 9, core: false };
            let record = ExitRecord { slot: 1, ..ExitRecord::new(Kind::Worker, pid, status, Initiator::Hang) };
            board.master().note_exit(&record.to_brief_json());
        }
        let status = snapshot(&board);
        let pids: Vec<_> = status.exits.iter().map(|exit| exit["pid"].as_u64().unwrap()).collect();
        assert_eq!(pids, [10, 9, 8, 7, 6, 5, 4, 3]);
        let text = status.to_table();
        let last: Vec<&str> = text.lines().filter(|line| line.contains("ended")).collect();
        assert_eq!(last.len(), 3);
        assert!(last[0].ends_with(" ago worker 1 (pid 10) ended: signal 9 (SIGKILL), hang"), "{last:?}");
        board.master().note_exit("nonsense");
        assert_eq!(snapshot(&board).exits.len(), 7);
    }

    #[test]
    fn nonsense_on_the_board_is_no_trouble() {
        let board = board();
        board.child(2).unwrap().set_beat_ns(u64::MAX);
        board.child(2).unwrap().set_rss_kib(u64::MAX);
        board.master().set_started_unix_ms(u64::MAX);
        assert_eq!(snapshot(&board).children[0].beat_age_ms, Some(0));
        let _ = snapshot(&board).to_table();
    }

    #[test]
    fn ages_are_short() {
        let texts: Vec<String> = [850, 12_000, 185_000, 7_800_000, 356_400_000].map(age_text).to_vec();
        assert_eq!(texts, ["850ms", "12s", "3m05s", "2h10m", "4d03h"]);
    }
}
