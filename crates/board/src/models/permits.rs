//! Permits: never more than the limit over all processes, and all of them there again when the dead are buried
//! (INV-PERMIT-1).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{board, claim, mortal};
use crate::{Board, PermitsSeen};

const LIMIT: u32 = 2;

/// What a worker does; `inside` counts the calls under way, `own` its part of them.
fn work(board: &Board, row: u32, inside: &AtomicU32, own: &AtomicU32) {
    let permits = board.permits("slow", (row, row + 1)).unwrap();
    permits.set_max(LIMIT);
    for _ in 0..2 {
        let Some(slot) = permits.take() else { continue };
        own.fetch_add(1, Ordering::Relaxed);
        let now = inside.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(now <= LIMIT, "{now} calls at once");
        assert_eq!(permits.held_here(), 1, "nobody frees what a living one holds");
        inside.fetch_sub(1, Ordering::Relaxed);
        own.fetch_sub(1, Ordering::Relaxed);
        permits.give(slot);
    }
}

fn held(board: &Board) -> u32 {
    board.permits_seen().map(|PermitsSeen { held, .. }| held).sum()
}

/// Three workers share two permits; one of them dies anywhere and is buried while the others go on.
pub(super) fn within_the_limit() {
    let board = board(3);
    let inside = Arc::new(AtomicU32::new(0));
    let start = |row: u32, own: &Arc<AtomicU32>| {
        let (board, inside, own) = (board.clone(), Arc::clone(&inside), Arc::clone(own));
        move || work(&board, row, &inside, &own)
    };
    let of_the_dead = Arc::new(AtomicU32::new(0));
    let dies = mortal(60, start(0, &of_the_dead));
    let others: Vec<_> = [1, 2].map(|row| shuttle::thread::spawn(start(row, &Arc::default()))).into();
    dies.join().unwrap();
    // Its calls ended with its sockets.
    inside.fetch_sub(of_the_dead.load(Ordering::Relaxed), Ordering::Relaxed);
    board.bury(0);
    claim(&board, 0, 9);
    others.into_iter().for_each(|other| other.join().unwrap());
    assert_eq!(held(&board), 0, "given back, or freed at the burial");
    let all = board.permits("slow", (0, 9)).unwrap();
    all.set_max(LIMIT);
    let slots: Vec<_> = std::iter::from_fn(|| all.take()).collect();
    assert_eq!(slots.len(), 2, "none was lost");
}

/// One is taken for dead, is buried, and gives back what somebody else has by then.
pub(super) fn only_ones_own() {
    let board = board(2);
    let [ghost, other] = [0, 1].map(|row| board.permits("slow", (row, row + 1)).unwrap());
    ghost.set_max(1);
    let slot = ghost.take().unwrap();
    let late = shuttle::thread::spawn(move || ghost.give(slot));
    let takes = shuttle::thread::spawn(move || {
        let taken = other.take();
        (0..4).for_each(|_| assert_eq!(other.held_here(), u32::from(taken.is_some()), "it is its own"));
        taken.into_iter().for_each(|slot| other.give(slot));
    });
    board.bury(0);
    late.join().unwrap();
    takes.join().unwrap();
    assert_eq!(held(&board), 0);
}

#[test]
fn never_more_than_the_limit_and_none_lost_wherever_one_dies() {
    super::explore(within_the_limit);
}

#[test]
fn nobody_gives_back_what_is_another_s() {
    super::explore(only_ones_own);
}
