//! A request's end: whoever of worker and master counts it and records it, that is done once, wherever the worker dies
//! (INV-RECORD-1).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::{board, claim, mortal};
use crate::{Board, InflightStart, SeriesKey};

const KEY: SeriesKey = SeriesKey { metric: 1, a: 2, b: 3, c: 4 };
const REQUESTS: u32 = 2;

/// What a worker does at the end of each request (`gate/pass.rs`). What is over and gone from the board it says to `gone`,
/// which is no word of the board: nothing can happen between the two.
fn work(board: &Board, epoch: u32, gone: &AtomicU64) {
    let rows = board.inflight_rows(0);
    for seq in 1..=REQUESTS {
        let start = InflightStart { seq, epoch, client_id: "", route: 1, key: 1, method: 1, started_ns: 1 };
        let ticket = rows.admit(start).unwrap();
        ticket.set_end(7);
        board.series(0).unwrap().add_one(KEY, |before| ticket.set_counting(7, before));
        ticket.set_counted();
        drop(ticket);
        gone.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the master does at a burial (`telemetry/names.rs`, `supervisor/burial.rs`); gives how many it found.
fn bury(board: &Board) -> u64 {
    let left: Vec<_> = board.inflight(0).collect();
    let series = board.series(0).unwrap();
    left.iter().filter(|request| !request.was_counted(series.get(KEY))).for_each(|_| series.add(KEY, 1));
    board.bury(0);
    u64::try_from(left.len()).unwrap()
}

/// Two workers have the row one after the other and die anywhere, while somebody reads the counter.
pub(super) fn counted_once() {
    let board = board(1);
    let scrape = board.clone();
    let scrape = shuttle::thread::spawn(move || {
        (0..6).fold(0, |last, _| {
            let now = scrape.series(0).unwrap().get(KEY);
            assert!(now >= last, "from {last} back to {now}");
            now
        });
    });
    let gone = Arc::new(AtomicU64::new(0));
    let mut found = 0;
    for epoch in 1..=2 {
        let (worker, says) = (board.clone(), Arc::clone(&gone));
        mortal(70, move || work(&worker, epoch, &says)).join().unwrap();
        found += bury(&board);
        claim(&board, 0, epoch + 1);
    }
    scrape.join().unwrap();
    assert_eq!(board.series(0).unwrap().get(KEY), gone.load(Ordering::Relaxed) + found, "{found} were found dead");
}

/// What the clerk does, whoever has written.
fn carry(board: &Board, file: &Mutex<Vec<String>>) {
    let found = board.records();
    let text = String::from_utf8(found.bytes.clone()).unwrap();
    file.lock().unwrap().extend(text.lines().map(str::to_owned));
    board.take_records(&found);
}

/// Two workers have the row one after the other, record what ends, and die anywhere, while the clerk takes the records away; the
/// master records what is left without. Each request that was admitted has one record.
pub(super) fn recorded_once() {
    let board = board(1);
    let (file, admitted) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    for epoch in 1..=2 {
        let (own, said) = (board.clone(), Arc::clone(&admitted));
        let worker = mortal(60, move || {
            let (rows, mut ring) = (own.inflight_rows(0), own.record_writer(0));
            for seq in 1..=REQUESTS {
                let start = InflightStart { seq, epoch, client_id: "", route: 1, key: 1, method: 1, started_ns: 1 };
                let ticket = rows.admit(start).unwrap();
                let line = format!("{epoch}.{seq}\n");
                said.lock().unwrap().push(line.trim_end().to_owned());
                assert!(ring.write_noted(line.as_bytes(), |before| ticket.set_recording(before)), "two words of eight");
            }
        });
        let (clerk, taken) = (board.clone(), Arc::clone(&file));
        let clerk = shuttle::thread::spawn(move || (0..2).for_each(|_| carry(&clerk, &taken)));
        worker.join().unwrap();
        let written = board.records_written(0);
        for left in board.inflight(0).filter(|left| !left.was_recorded(written)) {
            assert!(board.master_record_writer().write(format!("{}.{}\n", left.epoch, left.seq).as_bytes()));
        }
        board.bury(0);
        claim(&board, 0, epoch + 1);
        clerk.join().unwrap();
        carry(&board, &file);
    }
    let (mut file, mut admitted) = (file.lock().unwrap().clone(), admitted.lock().unwrap().clone());
    file.sort();
    admitted.sort();
    assert_eq!(file, admitted);
}

#[test]
fn a_request_is_recorded_once_wherever_its_worker_dies() {
    super::explore(recorded_once);
}

#[test]
fn a_request_is_counted_once_wherever_its_worker_dies() {
    super::explore(counted_once);
}
