//! In-flight rows: whoever looks finds no request or a whole one, whenever its worker dies, and a host's mark stays.

use std::sync::{Arc, Mutex};

use super::{board, claim, mortal};
use crate::{Board, Inflight, InflightPhase, InflightPlace, InflightRows, InflightStart, Ticket};

/// What belongs to the request of a number; longer than one word, and of another length than the one before.
fn text(of: &str, seq: u32) -> String {
    format!("{of}-{seq}").repeat(usize::try_from(seq).unwrap() + 1)
}

fn admit(rows: &InflightRows, epoch: u32, seq: u32) -> Ticket {
    let number = u16::try_from(seq).unwrap();
    let client_id = text("client", seq);
    let started_ns = seq.into();
    rows.admit(InflightStart {
        seq,
        epoch,
        client_id: &client_id,
        route: number,
        key: number,
        method: number,
        started_ns,
    })
    .unwrap()
}

/// One request after the other in the same row.
fn work(board: &Board, epoch: u32) {
    let rows = board.inflight_rows(0);
    for seq in 1..=2 {
        let number = u16::try_from(seq).unwrap();
        let ticket = admit(&rows, epoch, seq);
        ticket.set_model(number, &text("model", seq));
        ticket.set_backend(number, seq);
        ticket.set_phase(InflightPhase::Write);
        ticket.set_end(number);
    }
}

/// Every value is this request's, or says that it was not there yet.
fn check(found: &Inflight) {
    let seq = found.seq;
    let number = u16::try_from(seq).unwrap();
    assert!((1..=2).contains(&seq) && (1..=2).contains(&found.epoch), "{found:?}");
    assert_eq!((found.client_id.clone(), found.started_ns), (text("client", seq), seq.into()), "{found:?}");
    assert_eq!([found.route, found.key, found.method], [number; 3], "{found:?}");
    assert!([0, number].contains(&found.model) && [0, number].contains(&found.backend), "{found:?}");
    assert!([0, seq].contains(&found.attempts), "{found:?}");
    assert!(found.model_name.is_empty() || found.model_name == text("model", seq), "{found:?}");
    assert!(found.end.is_none_or(|end| end == number), "{found:?}");
}

/// A worker that dies anywhere, its successor in the same rows, and somebody who looks all the while.
pub(super) fn whole_or_none() {
    let board = board(1);
    let (worker, reader) = (board.clone(), board.clone());
    let worker = mortal(120, move || work(&worker, 1));
    let reader =
        shuttle::thread::spawn(move || (0..3).for_each(|_| reader.inflight(0).for_each(|found| check(&found))));
    worker.join().unwrap();
    board.inflight(0).for_each(|found| check(&found));
    board.bury(0);
    assert_eq!(board.inflight(0).count(), 0);
    claim(&board, 0, 2);
    work(&board, 2);
    reader.join().unwrap();
}

/// Hosts mark two requests that had the same row, the first of them late: the mark of the second stays, and it has none
/// before that.
pub(super) fn marks_stay() {
    let board = board(1);
    let rows = board.inflight_rows(0);
    let first = admit(&rows, 1, 1);
    let place: InflightPlace = first.place();
    let late = board.clone();
    let late = shuttle::thread::spawn(move || late.mark_taken(place));
    drop(first);
    let second = admit(&rows, 1, 2);
    assert!(!second.is_taken(), "nobody has it yet");
    let (place, host, seen) = (second.place(), board, Arc::new(Mutex::new(second)));
    let second = Arc::clone(&seen);
    let host = shuttle::thread::spawn(move || {
        host.mark_taken(place);
        assert!(second.lock().unwrap().is_taken(), "it has just been taken");
    });
    host.join().unwrap();
    late.join().unwrap();
    assert!(seen.lock().unwrap().is_taken(), "it was taken");
}

#[test]
fn a_reader_finds_no_request_or_a_whole_one_whenever_its_worker_dies() {
    super::explore(whole_or_none);
}

#[test]
fn a_late_mark_takes_no_other_back() {
    super::explore(marks_stay);
}
