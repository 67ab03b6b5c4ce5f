//! What is done at a child's death, in this order and without waiting for anything: its row is read, its end recorded,
//! its requests accounted for, its row emptied.

use evergate_board::{Board, Inflight, InflightPhase, monotonic_ns};
use evergate_core::exit::{ExitRecord, Initiator, Lost, Status};
use evergate_core::record::Access;
use evergate_sys::{Exit, unix_ms};

use crate::Options;
use crate::children::{Estate, Running};
use crate::exits::Exits;
use crate::step::name;
use crate::talk;

/// Buries one child.
pub(crate) fn bury(estate: &Estate, exits: &mut Exits, options: &Options, dead: &Running, initiator: Initiator) {
    let board = &estate.board;
    // In phase `Write` the last byte of the answer is the kernel's already: the client has it, only the record is missing.
    let (answered, lost): (Vec<_>, Vec<_>) =
        board.inflight(dead.birth.row).partition(|inflight| inflight.phase == InflightPhase::Write);
    let record = record(board, dead, initiator, &lost);
    if let Err(error) = exits.append(&record) {
        talk::say(&format!("cannot record the end of process {}: {error}", record.pid));
    }
    (options.on_exit)(board, record.kind, initiator);
    for inflight in &lost {
        write_access(estate, inflight, record.pid, ("worker_lost", ""));
        (options.on_lost)(board, dead.birth.row, inflight);
    }
    for inflight in &answered {
        write_access(estate, inflight, record.pid, ("ok", "answered; the worker died before its record was written"));
    }
    board.bury(dead.birth.row);
    announce(&record);
}

/// How the rules and the records see what the kernel said.
pub(crate) fn status(exit: Option<Exit>) -> Status {
    match exit.map(|exit| exit.status) {
        Some(evergate_sys::Status::Code(code)) => Status::Code(code),
        Some(evergate_sys::Status::Signal { number, core }) => Status::Signal { number, core },
        None => Status::Unknown,
    }
}

fn record(board: &Board, dead: &Running, initiator: Initiator, lost: &[Inflight]) -> ExitRecord {
    let now = monotonic_ns();
    let row = board.child(dead.birth.row);
    let ms_since = |then: u64| now.saturating_sub(then) / 1_000_000;
    let beat = row.map_or(0, |row| row.beat_ns());
    ExitRecord {
        at_ms: unix_ms(),
        kind: dead.birth.kind,
        pid: dead.pid.as_raw_nonzero().get(),
        slot: dead.birth.slot,
        epoch: dead.birth.epoch,
        generation: dead.birth.generation,
        status: status(dead.exit),
        initiator,
        age_ms: ms_since(dead.spawned_ns),
        last_beat_ms: (beat > 0).then(|| ms_since(beat)),
        phase: row.map_or("empty", |row| row.phase().name()).to_owned(),
        rss_max_kib: dead.exit.map_or(0, |exit| exit.rss_max_kib),
        cpu_ms: dead.exit.map_or(0, |exit| exit.cpu_ms),
        note: row.map(|row| row.note()).unwrap_or_default(),
        connections_idle: row.map_or(0, |row| row.connections()).saturating_sub(u32::try_from(lost.len()).unwrap_or(0)),
        lost: lost.iter().map(|inflight| lost_line(board, inflight, now)).collect(),
    }
}

fn lost_line(board: &Board, inflight: &Inflight, now: u64) -> Lost {
    Lost {
        request_id: inflight.request_id(board.run_id()).to_string(),
        client_id: inflight.client_id.clone(),
        route: board.label_text(inflight.route),
        model: board.label_text(inflight.model),
        phase: inflight.phase.name().to_owned(),
        age_ms: now.saturating_sub(inflight.started_ns) / 1_000_000,
    }
}

/// The access record that the dead worker cannot write any more.
fn write_access(estate: &Estate, inflight: &Inflight, pid: i32, (cause, detail): (&str, &str)) {
    let board = &estate.board;
    let request_id = inflight.request_id(board.run_id()).to_string();
    let nanos = monotonic_ns().saturating_sub(inflight.started_ns);
    let access = Access {
        at_ms: unix_ms(),
        request_id: &request_id,
        client_id: &inflight.client_id,
        tenant: &board.label_text(inflight.key),
        route: &board.label_text(inflight.route),
        model: &board.label_text(inflight.model),
        status: 0,
        cause,
        detail,
        is_stream: inflight.is_stream,
        duration_ms: std::time::Duration::from_nanos(nanos).as_secs_f64() * 1000.0,
        pid,
        ..Access::default()
    };
    let mut line = String::new();
    access.write_line(&mut line);
    if rustix::io::write(&estate.access.1, line.as_bytes()) != Ok(line.len()) {
        let master = board.master();
        master.set_access_dropped(master.access_dropped().saturating_add(1));
    }
}

/// A line for the operator, unless everything went as it was ordered.
fn announce(record: &ExitRecord) {
    let how = match record.status {
        Status::Code(0) if !matches!(record.initiator, Initiator::Boot | Initiator::Crash | Initiator::Unknown) => {
            return;
        }
        Status::Code(code) => format!("exit code {code}"),
        Status::Signal { number, core } => format!("signal {number}{}", if core { " (core dumped)" } else { "" }),
        Status::Unknown => "cause unknown".to_owned(),
    };
    let mut text = format!(
        "{} (pid {}) ended: {how}, initiator {}",
        name(record.kind, record.slot),
        record.pid,
        record.initiator.name()
    );
    if !record.lost.is_empty() {
        text.push_str(&format!(", {} requests lost", record.lost.len()));
    }
    if !record.note.is_empty() {
        text.push_str(": ");
        text.push_str(&record.note);
    }
    talk::say(&text);
}
