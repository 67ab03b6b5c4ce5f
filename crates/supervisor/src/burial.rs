//! What is done at a child's death, in this order: its row is read, its end recorded,
//! its requests accounted for, its row emptied.
//!
//! Holds INV-EXIT-1, INV-EXIT-2 (ARCHITECTURE.md).

use evergate_board::{Board, ChildRow, Inflight, Phase, monotonic_ns};
use evergate_core::count;
use evergate_core::exit::{ExitRecord, Initiator, Lost, Panicked, Status};
use evergate_core::ids::RequestId;
use evergate_core::record::Access;
use evergate_sys::{Exit, unix_ms};

use crate::Options;
use crate::children::{Estate, Running};
use crate::state_writer::StateWriter;
use crate::talk;

/// Buries one child.
pub(crate) fn bury(estate: &Estate, writer: &mut StateWriter, options: &Options, dead: &Running, initiator: Initiator) {
    let board = &estate.board;
    // What is over was answered, or was about to be: only the record may be missing.
    let (over, lost): (Vec<_>, Vec<_>) = board.inflight(dead.birth.row).partition(Inflight::is_over);
    let record = record(board, dead, estate.upstream(dead.birth), initiator, (&lost, &over));
    writer.exit(&record);
    board.master().note_exit(&record.to_brief_json());
    (options.on_exit)(board, record.kind, record.initiator);
    let left: Vec<Inflight> = lost.into_iter().chain(over).collect();
    let ends = (options.on_left)(board, dead.birth.row, &left);
    let written = board.records_written(dead.birth.row);
    for (inflight, (status, cause)) in left.iter().zip(ends).filter(|(inflight, _)| !inflight.was_recorded(written)) {
        let detail = match inflight.phase {
            _ if !inflight.is_over() => "",
            _ if inflight.is_ending() => "its last bytes were the client's, or on their way, when the worker died",
            _ => "over; the worker died before its record was written",
        };
        write_access(estate, inflight, &Left { pid: record.pid, status, cause, detail });
    }
    board.bury(dead.birth.row);
    announce(&record, &estate.name(dead.birth));
}

/// How the rules and the records see what the kernel said.
pub(crate) fn status(exit: Option<Exit>) -> Status {
    match exit.map(|exit| exit.status) {
        Some(evergate_sys::Status::Code(code)) => Status::Code(code),
        Some(evergate_sys::Status::Signal { number, core }) => Status::Signal { number, core },
        None => Status::Unknown,
    }
}

fn record(
    board: &Board,
    dead: &Running,
    upstream: &str,
    initiator: Initiator,
    (lost, over): (&[Inflight], &[Inflight]),
) -> ExitRecord {
    let now = monotonic_ns();
    let row = board.child(dead.birth.row);
    let ms_since = |then: u64| now.saturating_sub(then) / 1_000_000;
    let beat = row.map_or(0, ChildRow::beat_ns);
    let panicked = row.map_or(0, ChildRow::panic_ns);
    let finding = dead.finding.as_ref();
    // What tells who sent a KILL is stronger than what the rules conclude from our own doings.
    let initiator = finding.and_then(|finding| finding.initiator).unwrap_or(initiator);
    let pid = dead.pid.as_raw_nonzero().get();
    let line = |inflight: &Inflight| lost_line(board, inflight, now);
    let lost: Vec<_> = lost.iter().map(line).collect();
    let ending: Vec<_> = over.iter().filter(|inflight| inflight.is_ending()).map(line).collect();
    // Not those of `ending`: a client may have its answer, and have asked for more on the same connection.
    let busy = u32::try_from(lost.len()).unwrap_or(0);
    ExitRecord {
        at_ms: unix_ms(),
        slot: dead.birth.slot,
        upstream: upstream.to_owned(),
        epoch: dead.birth.epoch,
        generation: dead.birth.generation,
        age_ms: ms_since(dead.spawned_ns),
        last_beat_ms: (beat > 0).then(|| ms_since(beat)),
        phase: dead.given_up.or(row.map(ChildRow::phase)).map_or("empty", Phase::name).to_owned(),
        rss_max_kib: dead.exit.map_or(0, |exit| exit.rss_max_kib),
        cpu_ms: dead.exit.map_or(0, |exit| exit.cpu_ms),
        note: row.map(ChildRow::note).unwrap_or_default(),
        sent: dead.sent.clone(),
        running: row.and_then(|row| running(board, dead, row)),
        panic: row.filter(|_| panicked > 0).map(|row| Panicked {
            place: row.panic_place(),
            offsets: row.panic_offsets(),
            age_ms: ms_since(panicked),
        }),
        oom_kills: finding.and_then(|finding| finding.kills),
        evidence: match finding {
            Some(finding) => finding.evidence.clone(),
            None if dead.exit.is_none() => "it was killed and hangs in the kernel; nobody waits for it".to_owned(),
            None => String::new(),
        },
        connections_idle: row.map_or(0, ChildRow::connections).saturating_sub(busy),
        lost,
        ending,
        ..ExitRecord::new(dead.birth.kind, pid, status(dead.exit), initiator)
    }
}

/// Our id of the request that was being polled.
fn running(board: &Board, dead: &Running, row: &ChildRow) -> Option<String> {
    let seq = u32::try_from(row.running()).ok().filter(|seq| *seq > 0)?;
    Some(RequestId { run: board.run_id(), epoch: dead.birth.epoch, seq }.to_string())
}

/// Model as the client named it, or as labelled where that did not come to the board.
fn model(board: &Board, inflight: &Inflight) -> String {
    if inflight.model_name.is_empty() { board.label_text(inflight.model) } else { inflight.model_name.clone() }
}

fn lost_line(board: &Board, inflight: &Inflight, now: u64) -> Lost {
    Lost {
        request_id: inflight.request_id(board.run_id()).to_string(),
        client_id: inflight.client_id.clone(),
        method: board.label_text(inflight.method),
        route: board.label_text(inflight.route),
        model: model(board, inflight),
        backend: board.label_text(inflight.backend),
        phase: inflight.phase.name().to_owned(),
        age_ms: now.saturating_sub(inflight.started_ns) / 1_000_000,
    }
}

/// What is said of a request that its process left behind.
struct Left<'a> {
    pid: i32,
    status: u16,
    cause: &'a str,
    detail: &'a str,
}

/// The access record that the dead worker cannot write any more.
fn write_access(estate: &Estate, inflight: &Inflight, left: &Left<'_>) {
    let board = &estate.board;
    let request_id = inflight.request_id(board.run_id()).to_string();
    let nanos = monotonic_ns().saturating_sub(inflight.started_ns);
    let access = Access {
        at_ms: unix_ms(),
        request_id: &request_id,
        client_id: &inflight.client_id,
        tenant: &board.label_text(inflight.key),
        method: &board.label_text(inflight.method),
        route: &board.label_text(inflight.route),
        model: &model(board, inflight),
        backend: &board.label_text(inflight.backend),
        attempts: inflight.attempts,
        status: left.status,
        cause: left.cause,
        detail: left.detail,
        is_stream: inflight.is_stream,
        duration_ms: std::time::Duration::from_nanos(nanos).as_secs_f64() * 1000.0,
        pid: left.pid,
        is_by_master: true,
        ..Access::default()
    };
    let mut line = String::new();
    access.write_line(&mut line);
    if !board.master_record_writer().write(line.as_bytes()) {
        let master = board.master();
        master.set_access_dropped(master.access_dropped().saturating_add(1));
    }
}

/// A line for the operator, unless everything went as it was ordered.
fn announce(record: &ExitRecord, name: &str) {
    let how = match record.status {
        Status::Code(0) if !matches!(record.initiator, Initiator::Boot | Initiator::Crash | Initiator::Unknown) => {
            return;
        }
        Status::Code(code) => format!("exit code {code}"),
        Status::Signal { number, core } => format!("signal {number}{}", if core { " (core dumped)" } else { "" }),
        Status::Unknown => "cause unknown".to_owned(),
    };
    let mut text = format!("{} (pid {}) ended: {how}, initiator {}", name, record.pid, record.initiator.name());
    if !record.lost.is_empty() {
        text.push_str(&format!(", {} lost", count(record.lost.len(), "request")));
    }
    if let Some(panic) = &record.panic {
        text.push_str(&format!(", last panic at {} ({} ms before)", panic.place, panic.age_ms));
    }
    for words in [&record.note, &record.evidence].into_iter().filter(|words| !words.is_empty()) {
        text.push_str(": ");
        text.push_str(words);
    }
    talk::say(&text);
}
