//! Planted mistakes, compiled into tests only: each switches one rule off or turns it round, and the simulation must
//! catch it by the invariant that is named for it. MUTANTS.md beside this crate is the list.

use std::cell::Cell;

use super::sim;

thread_local! {
    static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    StallIsBlamed,
    BlamesStarved,
    RespawnsOld,
    KillsCount,
    NoPause,
    NeverKills,
    TrustsLeavers,
    HangsEarly,
    SwapsEarly,
    ForgetsGeneration,
    LosesCaller,
    AnyGenerations,
    HastensAtOnce,
    DrainsFirst,
    RecyclesYoung,
    GrowsBeyond,
    ShrinksBelow,
    ClerkFirst,
    BuriesTwice,
    TakesRows,
    LosesChild,
    ClosesTwice,
    AnnouncesTwice,
    WaitsForBurial,
    WaitsForGhosts,
    GhostsWithoutEnd,
    IgnoresGroups,
    SkipsSweep,
    ReplacesAll,
    DropsNeeded,
    NoHostPause,
    LosesWant,
    EndsBusy,
    HostsFirst,
    KeepsGoers,
}

/// Which invariant catches each.
const CAUGHT_BY: &[(Mutant, &str)] = &[
    (Mutant::StallIsBlamed, sim::BEATS_AND_LIVES),
    (Mutant::BlamesStarved, sim::BEATS_AND_LIVES),
    (Mutant::RespawnsOld, sim::OWN_GENERATION),
    (Mutant::KillsCount, sim::WELL_KILLED),
    (Mutant::NoPause, sim::PAUSES),
    (Mutant::NeverKills, sim::ENDS_IN_TIME),
    (Mutant::TrustsLeavers, sim::LEAVERS),
    (Mutant::HangsEarly, sim::BEATS_AND_LIVES),
    (Mutant::SwapsEarly, sim::READY_FIRST),
    (Mutant::ForgetsGeneration, sim::FAILED_RELOAD),
    (Mutant::LosesCaller, sim::EVERY_CALLER),
    (Mutant::AnyGenerations, sim::GENERATIONS),
    (Mutant::HastensAtOnce, sim::ROOM),
    (Mutant::DrainsFirst, sim::READY_FIRST),
    (Mutant::RecyclesYoung, sim::LIFE_MIN),
    (Mutant::GrowsBeyond, sim::BOUNDS),
    (Mutant::ShrinksBelow, sim::BOUNDS),
    (Mutant::ClerkFirst, sim::CLERK_LAST),
    (Mutant::BuriesTwice, sim::BURIALS),
    (Mutant::TakesRows, sim::ROWS),
    (Mutant::LosesChild, sim::KNOWN),
    (Mutant::ClosesTwice, sim::LISTENERS),
    (Mutant::AnnouncesTwice, sim::START),
    (Mutant::IgnoresGroups, sim::ONE_OF_A_GROUP),
    (Mutant::SkipsSweep, sim::ONE_OF_A_GROUP),
    (Mutant::ReplacesAll, sim::UNTOUCHED),
    (Mutant::DropsNeeded, sim::NEEDED),
    (Mutant::NoHostPause, sim::HOST_PAUSES),
    (Mutant::LosesWant, sim::WANTS),
    (Mutant::EndsBusy, sim::NEEDED),
    (Mutant::HostsFirst, sim::NEEDED),
    (Mutant::KeepsGoers, sim::GOERS),
    (Mutant::WaitsForBurial, sim::GHOSTS_PLACE),
    (Mutant::WaitsForGhosts, sim::ENDS_IN_TIME),
    (Mutant::GhostsWithoutEnd, sim::FEW_GHOSTS),
];

/// Whether that mistake is switched on in this thread.
pub(crate) fn is_on(mutant: Mutant) -> bool {
    ON.get() == Some(mutant)
}

/// Lives until one is caught; how, and with which seed.
fn hunt(mutant: Mutant) -> Option<(u64, sim::Failure)> {
    ON.set(Some(mutant));
    let caught = (1..=2000).find_map(|seed| sim::live(seed).err().map(|failure| (seed, failure)));
    ON.set(None);
    caught
}

#[test]
fn every_planted_mistake_is_caught_by_its_invariant() {
    let list = include_str!("../../MUTANTS.md");
    for (mutant, invariant) in CAUGHT_BY {
        let caught = hunt(*mutant);
        let Some((seed, failure)) = caught else { panic!("{mutant:?} lives through 2,000 lives") };
        println!("{mutant:?} is caught in life {seed}: {}", failure.text.lines().next().unwrap_or_default());
        assert_eq!(failure.invariant, *invariant, "{mutant:?}, caught in life {seed}");
        let row = format!("| `{mutant:?}` | {invariant} |");
        assert!(list.contains(&row), "MUTANTS.md has no row beginning with {row}");
    }
}
