//! Permits as several workers see them: threads with a mapping each, and processes that are killed.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use evergate_board::{Board, Claim, PERMITS_MAX, Permits, Phase, Shape, Slot, monotonic_ns};
use evergate_core::exit::Kind;

const SHAPE: Shape = Shape { children: 8, slots: 8, series: 64, labels: 512 };

fn claim(board: &Board, row: u32, epoch: u32) {
    let claim = Claim { kind: Kind::Worker, slot: row, epoch, generation: 1, spawned_ns: monotonic_ns() };
    board.child(row).unwrap().claim(&claim);
}

/// A board with children in its first rows, each with a mapping of its own.
fn workers(count: u32, max: u32) -> (Board, Vec<Permits>) {
    let board = Board::create(SHAPE, 7).unwrap();
    let permits = (0..count).map(|row| {
        claim(&board, row, row + 1);
        let other = Board::attach(board.fd().try_clone_to_owned().unwrap()).unwrap();
        let permits = other.permits("slow", (row, row + 1)).unwrap();
        permits.set_max(max);
        permits
    });
    let permits = permits.collect();
    (board, permits)
}

fn held(board: &Board) -> u32 {
    board.permits_seen().map(|seen| seen.held).sum()
}

fn take_all(permits: &Permits) -> Vec<Slot> {
    std::iter::from_fn(|| permits.take()).collect()
}

#[test]
fn there_are_as_many_as_the_limit_says_over_all_children() {
    let (board, permits) = workers(2, 5);
    let mut slots = take_all(&permits[0]);
    assert_eq!((slots.len(), permits[1].take().is_none(), permits[1].free()), (5, true, 0));
    assert_eq!((permits[0].held_here(), permits[1].held_here()), (5, 0));
    let seen: Vec<_> = board.permits_seen().collect();
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].upstream.as_str(), seen[0].max, seen[0].held, seen[0].waiting), ("slow", 5, 5, 0));
    permits[0].give(slots.pop().unwrap());
    assert_eq!(permits[1].free(), 1);
    let other = permits[1].take().unwrap();
    assert!(permits[0].take().is_none());
    permits[1].give(other);
    slots.into_iter().for_each(|slot| permits[0].give(slot));
    assert_eq!(held(&board), 0);
}

#[test]
fn each_upstream_has_its_own_and_there_is_an_end_to_them() {
    let (board, permits) = workers(1, 1);
    let _taken = permits[0].take().unwrap();
    let other = board.permits("fast", (0, 1)).unwrap();
    assert!(other.take().is_none(), "nobody has said a limit");
    other.set_max(u32::MAX);
    assert_eq!(other.max(), PERMITS_MAX);
    assert_eq!(take_all(&other).len(), PERMITS_MAX as usize);
    let found = (0..400).filter(|n| board.permits(&format!("upstream-{n}"), (0, 1)).is_some()).count();
    assert_eq!((found, board.permits_seen().count()), (126, 128));
    assert!(board.permits("slow", (0, 1)).is_some(), "those that have a place keep it");
    assert!(board.permits("", (0, 1)).is_none());
}

#[test]
fn a_lowered_limit_waits_for_what_is_held_beyond_it() {
    let (board, permits) = workers(2, 4);
    let mut slots = take_all(&permits[0]);
    permits[1].set_max(2);
    for left in (2..4).rev() {
        permits[0].give(slots.remove(0));
        assert_eq!(held(&board), left);
        assert!(permits[0].take().is_none() && permits[1].take().is_none(), "{left} are held, two are allowed");
    }
    permits[0].give(slots.remove(0));
    let one = permits[1].take().unwrap();
    assert_eq!((permits[0].take().is_none(), permits[0].free()), (true, 0));
    permits[1].give(one);
    permits[1].set_max(6);
    assert_eq!(take_all(&permits[0]).len(), 5, "raised again, one was held");
}

#[test]
fn a_burial_frees_what_the_dead_held_and_nothing_else() {
    let (board, permits) = workers(3, 6);
    let _dead = (permits[0].take().unwrap(), permits[0].take().unwrap());
    let mine = permits[1].take().unwrap();
    permits[0].show_waiting(3, 77);
    permits[1].show_waiting(1, 99);
    assert_eq!((held(&board), permits[2].peers_waiting().count()), (3, 2));
    board.bury(0);
    assert_eq!(
        (held(&board), permits[2].peers_waiting().map(|(_, n, since)| (n, since)).collect()),
        (1, vec![(1, 99)])
    );
    assert_eq!(permits[1].peers_waiting().count(), 0, "nobody is his own peer");
    // Somebody wrote a row that no board has, and one without a child.
    for nobody in [board.permits("slow", (4_000_000, 9)).unwrap(), board.permits("slow", (5, 9)).unwrap()] {
        let _nonsense = nobody.take().unwrap();
        nobody.show_waiting(1, 1);
    }
    assert_eq!(held(&board), 3);
    board.bury(0);
    assert_eq!(held(&board), 1);
    permits[1].give(mine);
    assert_eq!(held(&board), 0);
}

#[test]
fn who_gives_back_what_is_not_his_any_more_changes_nothing() {
    let (board, permits) = workers(2, 1);
    let late = permits[0].take().unwrap();
    board.child(0).unwrap().set_phase(Phase::Empty);
    board.bury(1);
    assert_eq!(held(&board), 0, "taken for dead");
    let mine = permits[1].take().unwrap();
    permits[0].give(late);
    assert_eq!(held(&board), 1);
    permits[1].give(mine);
}

/// Four workers take and give as fast as they can, while a fifth dies and is buried over and over.
#[test]
fn never_more_than_the_limit_whatever_the_interleaving() {
    const MAX: u32 = 3;
    const ROUNDS: u64 = 40_000;
    let (board, permits) = workers(5, MAX);
    let (inside, most, taken) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU64::new(0));
    let (mortal, others) = permits.split_last().unwrap();
    std::thread::scope(|scope| {
        for own in others {
            let (inside, most, taken) = (&inside, &most, &taken);
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    let Some(slot) = own.take() else {
                        std::thread::yield_now();
                        continue;
                    };
                    most.fetch_max(inside.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                    taken.fetch_add(1, Ordering::Relaxed);
                    inside.fetch_sub(1, Ordering::AcqRel);
                    own.give(slot);
                }
            });
        }
        for epoch in 6..2_006 {
            // Dies with it: nothing is given back. It is outside of the count, as a dead one's calls are.
            let _lost = mortal.take();
            board.bury(4);
            claim(&board, 4, epoch);
        }
    });
    println!("{} taken, {} at once at most", taken.load(Ordering::Relaxed), most.load(Ordering::Relaxed));
    assert!(most.load(Ordering::Acquire) <= MAX && taken.load(Ordering::Relaxed) > ROUNDS / 4);
    assert_eq!((held(&board), take_all(&permits[0]).len()), (0, MAX as usize));
}

/// Environment of a child of the test below: the board's path and the row.
const CHILD: &str = "EVERGATE_TEST_PERMITS";

/// Not a test by itself: what a child of the next one does until it is killed.
#[test]
fn child_that_takes_and_gives() {
    let Ok(told) = std::env::var(CHILD) else { return };
    let (path, row) = told.split_once(' ').unwrap();
    let row: u32 = row.parse().unwrap();
    let board = Board::attach(std::fs::File::options().read(true).write(true).open(path).unwrap().into()).unwrap();
    let permits = board.permits("slow", (row, board.child(row).unwrap().epoch())).unwrap();
    println!("\nready");
    loop {
        let slots: Vec<_> = (0..2).filter_map(|_| permits.take()).collect();
        slots.into_iter().for_each(|slot| permits.give(slot));
    }
}

/// Processes are killed in the middle of taking and giving: each burial frees what was held, and in the end nothing is
/// missing.
#[test]
fn killed_processes_leak_nothing() {
    const KILLS: u32 = 40;
    let (board, permits) = workers(1, 4);
    let path = format!("/proc/{}/fd/{}", std::process::id(), board.fd().as_raw_fd());
    for kill in 0..KILLS {
        let row = 1 + kill % 3;
        claim(&board, row, 100 + kill);
        let mut child = Command::new("/proc/self/exe")
            .args(["--exact", "child_that_takes_and_gives", "--nocapture"])
            .env(CHILD, format!("{path} {row}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        assert!(said.lines().any(|line| line.unwrap() == "ready"));
        // At another place of its loop each time, and with somebody beside it.
        for _ in 0..kill * 50 {
            if let Some(slot) = permits[0].take() {
                permits[0].give(slot);
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        board.bury(row);
        assert_eq!(held(&board), 0, "after kill {kill}");
    }
    assert_eq!(take_all(&permits[0]).len(), 4);
}
