//! Counters: none goes back, and none loses a count that a living process made (INV-COUNT-1).

use super::{board, mortal};
use crate::{Board, SeriesKey};

fn key(a: u16) -> SeriesKey {
    SeriesKey { metric: 1, a, b: 0, c: 0 }
}

/// What stands in the table, by key, and how much found no place.
fn sums(board: &Board) -> (u64, u64, u64) {
    let series = board.series(0).unwrap();
    let cells: Vec<_> = series.iter().collect();
    let of = |a| cells.iter().filter(|(there, _)| *there == key(a)).map(|(_, n)| n).sum::<u64>();
    (of(1), of(2), of(3))
}

/// Two write the same row (a worker's own threads, or the master after a burial), one of them dies, and one reads: there are
/// three keys and two places.
pub(super) fn nothing_lost() {
    let board = board(1);
    let count =
        |board: Board, keys: &'static [u16]| move || keys.iter().for_each(|a| board.series(0).unwrap().add(key(*a), 1));
    let lives = shuttle::thread::spawn(count(board.clone(), &[1, 2, 1]));
    let dies = mortal(20, count(board.clone(), &[2, 1, 3]));
    let seen = board.clone();
    let reads = shuttle::thread::spawn(move || {
        (0..3).fold((0, 0, 0), |last, _| {
            let now = sums(&seen);
            assert!(now.0 >= last.0 && now.1 >= last.1 && now.2 >= last.2, "from {last:?} back to {now:?}");
            now
        });
    });
    for thread in [lives, dies, reads] {
        thread.join().unwrap();
    }
    let (one, two, three) = sums(&board);
    let series = board.series(0).unwrap();
    assert_eq!((series.get(key(1)), series.get(key(2)), series.get(key(3))), (one, two, three), "a key has one place");
    let dropped = series.dropped();
    assert!(one <= 3 && two <= 2 && three <= 1, "counted twice: {one}, {two}, {three}");
    assert!((3..=6).contains(&(one + two + three + dropped)), "{one}, {two}, {three}, {dropped} without a place");
}

#[test]
fn counters_lose_nothing_and_never_go_back() {
    super::explore(nothing_lost);
}
