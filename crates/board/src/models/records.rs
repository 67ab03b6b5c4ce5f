//! Records: what was said to be written comes once and whole, in order, whenever its writer or a clerk dies.

use std::sync::{Arc, Mutex};

use super::{board, mortal};
use crate::Board;

/// Lines of a writer, of different lengths; of three rounds over the ring.
fn line(of: &str, number: usize) -> String {
    format!("{of}{number}{}\n", "-".repeat(number % 3 * 8))
}

fn write(board: &Board, of: &str, told: &Mutex<Vec<String>>) {
    let mut writer = board.record_writer(0);
    for number in 0..6 {
        let line = line(of, number);
        if writer.write(line.as_bytes()) {
            told.lock().unwrap().push(line);
        }
    }
}

/// A clerk's life, as long as so many looks: what was looked at goes to the file, then it is let go. A predecessor may have
/// died between the two, so that the first look leaves out what is in the file.
fn carry(board: &Board, file: &Mutex<Vec<String>>, looks: usize) {
    for look in 0..looks {
        let found = board.records();
        assert_eq!(found.broken, 0);
        let text = String::from_utf8(found.bytes.clone()).unwrap();
        let mut file = file.lock().unwrap();
        for line in text.split_inclusive('\n') {
            assert!(line.ends_with('\n') && line.starts_with(['a', 'b', 'm']), "{line:?}");
            if look > 0 || !file.iter().any(|known| known == line) {
                file.push(line.to_owned());
            }
        }
        drop(file);
        board.take_records(&found);
    }
}

/// A worker that dies anywhere, the master who writes of it then, its successor in the same row, a clerk that dies anywhere, and
/// its successor.
pub(super) fn nothing_lost_or_torn() {
    let board = board(1);
    let (told, file) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let (own, said) = (board.clone(), Arc::clone(&told));
    let worker = mortal(60, move || write(&own, "a", &said));
    let (own, written) = (board.clone(), Arc::clone(&file));
    let clerk = mortal(80, move || carry(&own, &written, 4));
    worker.join().unwrap();
    let shown = told.lock().unwrap().clone();
    assert!(board.master_record_writer().write(b"m\n"));
    let (own, said) = (board.clone(), Arc::clone(&told));
    let successor = mortal(60, move || write(&own, "b", &said));
    clerk.join().unwrap();
    carry(&board, &file, 2);
    successor.join().unwrap();
    carry(&board, &file, 2);
    let (told, file) = (told.lock().unwrap().clone(), file.lock().unwrap().clone());
    // A writer may die between showing a record and saying so.
    let known: Vec<_> = file.iter().filter(|line| told.contains(line)).cloned().collect();
    assert_eq!(known, told, "{file:?}");
    assert!(file.len() <= told.len() + 3, "{file:?}, {told:?}");
    // What the dead one had written stands before what is written of it.
    let of = |wanted: &str| file.iter().position(|line| line == wanted);
    assert!(shown.iter().all(|line| of(line) < of("m\n")), "{file:?}");
}

#[test]
fn no_record_is_lost_torn_or_doubled_whoever_dies() {
    super::explore(nothing_lost_or_torn);
}
