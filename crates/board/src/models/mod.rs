//! The board's protocols under a checker of interleavings: small models, each run through thousands of schedules, with
//! processes that are killed between any two words.
//!
//! The code is the real one, on a real mapping; `word` makes every access a point to switch at. The checker (shuttle) runs
//! one thread at a time, so it sees all orders of the accesses and none of what weak memory adds to them; docs/testing.md
//! says what that leaves to argument. Each model is proved by planted mistakes ([`MISTAKES`]).
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod ends;
mod inflight;
mod labels;
mod permits;
mod records;
mod series;
mod text;
pub(crate) mod word;

use std::cell::Cell;
use std::panic::catch_unwind;

use evergate_core::exit::Kind;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner};

use crate::{Board, Claim, Shape};
use word::mortal;

/// Schedules of each kind that the ordinary tests try of a model.
const SCHEDULES: usize = 1_000;
/// How many changes of priority the second kind makes at most: the depth of the mistakes that it is made to find.
const DEPTH: usize = 4;
const SEED: u64 = 0x0e7e_4647;

/// A planted mistake: each undoes one rule of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// A request's id is written before what belongs to it.
    IdFirst,
    /// Its reader does not look whether the id is still the same.
    TrustsFirstLook,
    /// The length of the model's name is written before the name.
    LengthFirst,
    /// A host's mark takes a later one back.
    MarksBack,
    /// A request is counted without a note that it is going to be.
    CountsUnnoted,
    /// That note is made after the counting.
    NotesLate,
    /// Of a noted one the counter is not compared.
    TrustsNote,
    /// A record is shown without a note that it is going to be.
    ShowsUnnoted,
    /// That note is made after it is shown.
    NotesShownLate,
    /// Of a noted one the ring is not compared.
    TrustsShownNote,
    /// A counter is read, and written back with one more.
    AddsInTwo,
    /// A counter's key is written without a look who else does.
    KeysBlindly,
    /// A label is said to be there before its text is.
    ReadyFirst,
    /// A label whose writer has not come to the end is left to him.
    LeavesClaim,
    /// Who comes second to a place for a label takes it all the same.
    ClaimsTwice,
    /// A permit is taken without a look who else does.
    TakesBlindly,
    /// A permit is given back though it is somebody else's.
    GivesBlindly,
    /// A burial frees what nobody's worker holds, and what others hold.
    FreesAll,
    /// A burial frees nothing.
    FreesNone,
    /// A record is shown before it is written.
    ShowsFirst,
    /// A record is written over others that nobody has taken.
    WritesOver,
    /// Records are let go before they are copied.
    TakesFirst,
    /// Records are never let go.
    NeverTakes,
    /// The master's ring is looked at after the others.
    LooksAtMasterLast,
    /// A text is written without a word that somebody writes.
    WritesUnseen,
    /// A text's reader does not look whether it has changed.
    ReadsOnce,
}

/// Each mistake, and the model that must fail with it.
pub(crate) const MISTAKES: &[(Mistake, fn())] = &[
    (Mistake::IdFirst, inflight::whole_or_none),
    (Mistake::TrustsFirstLook, inflight::whole_or_none),
    (Mistake::LengthFirst, inflight::whole_or_none),
    (Mistake::MarksBack, inflight::marks_stay),
    (Mistake::CountsUnnoted, ends::counted_once),
    (Mistake::NotesLate, ends::counted_once),
    (Mistake::TrustsNote, ends::counted_once),
    (Mistake::ShowsUnnoted, ends::recorded_once),
    (Mistake::NotesShownLate, ends::recorded_once),
    (Mistake::TrustsShownNote, ends::recorded_once),
    (Mistake::AddsInTwo, series::nothing_lost),
    (Mistake::KeysBlindly, series::nothing_lost),
    (Mistake::ReadyFirst, labels::one_number_whole_text),
    (Mistake::LeavesClaim, labels::one_number_whole_text),
    (Mistake::ClaimsTwice, labels::one_number_whole_text),
    (Mistake::TakesBlindly, permits::within_the_limit),
    (Mistake::GivesBlindly, permits::only_ones_own),
    (Mistake::FreesAll, permits::within_the_limit),
    (Mistake::FreesNone, permits::within_the_limit),
    (Mistake::ShowsFirst, records::nothing_lost_or_torn),
    (Mistake::WritesOver, records::nothing_lost_or_torn),
    (Mistake::TakesFirst, records::nothing_lost_or_torn),
    (Mistake::NeverTakes, records::nothing_lost_or_torn),
    (Mistake::LooksAtMasterLast, records::nothing_lost_or_torn),
    (Mistake::WritesUnseen, text::whole_when_said_so),
    (Mistake::ReadsOnce, text::whole_when_said_so),
];

thread_local! {
    static ON: Cell<Option<Mistake>> = const { Cell::new(None) };
}

pub(crate) fn is_on(mistake: Mistake) -> bool {
    ON.get() == Some(mistake)
}

/// Runs a model through its schedules; prints the one that fails, and replays one that was printed.
fn explore(model: fn()) {
    if let Ok(schedule) = std::env::var("EVERGATE_MODEL_REPLAY") {
        return shuttle::replay(model, &schedule);
    }
    let schedules = std::env::var("EVERGATE_MODEL_SCHEDULES").map_or(SCHEDULES, |text| text.parse().unwrap());
    let seed = std::env::var("EVERGATE_MODEL_SEED").map_or(SEED, |text| text.parse().unwrap());
    run(model, (seed, schedules), FailurePersistence::Print);
}

fn run(model: fn(), (seed, schedules): (u64, usize), on_failure: FailurePersistence) {
    with(RandomScheduler::new_from_seed(seed, schedules), model, on_failure.clone());
    with(PctScheduler::new_from_seed(seed, DEPTH, schedules), model, on_failure);
}

fn with(scheduler: impl Scheduler + 'static, model: fn(), on_failure: FailurePersistence) {
    let mut config = Config::new();
    config.failure_persistence = on_failure;
    Runner::new(scheduler, config).run(model);
}

/// A small board with children in its first rows.
fn board(children: u32) -> Board {
    let board = Board::create(Shape { children: 4, slots: 2, series: 2, labels: 8 }, 1).unwrap();
    (0..children).for_each(|row| claim(&board, row, row + 1));
    board
}

/// What the master does when it starts a child.
fn claim(board: &Board, row: u32, epoch: u32) {
    let claim = Claim { kind: Kind::Worker, slot: row, epoch, generation: 1, spawned_ns: 1 };
    board.child(row).unwrap().claim(&claim);
}

#[test]
fn each_planted_mistake_is_caught_by_its_model() {
    let is_missed = |(mistake, model): &&(Mistake, fn())| {
        ON.set(Some(*mistake));
        let tries =
            || (SEED..SEED + 100).for_each(|seed| run(*model, (seed, SCHEDULES / 10), FailurePersistence::None));
        let ended = catch_unwind(tries);
        ON.set(None);
        ended.is_ok()
    };
    let missed: Vec<_> = MISTAKES.iter().filter(is_missed).map(|(mistake, _)| mistake).collect();
    assert!(missed.is_empty(), "nobody catches {missed:?}");
}
