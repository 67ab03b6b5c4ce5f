//! The invariants. Each has a sentence for a name, which MUTANTS.md and the failures use.

use evergate_core::exit::{Kind, Status};

use super::world::{Process, ROWS_COUNT, World};
use crate::step::ghosts::{GHOST_TIME, GHOSTS_MAX};
use crate::step::hosts::SWEEP_TIME;
use crate::step::reload::ROOM_TIME;
use crate::step::{Action, Event, MS, Ns, Phase, Rules, SECOND, Sig, TICK, Tally};

pub(crate) const BURIALS: &str = "every child is buried once, and after its end";
pub(crate) const ROWS: &str = "no row and no epoch is given to two";
pub(crate) const KNOWN: &str = "the rules and the world know the same children";
pub(crate) const BOUNDS: &str = "the number of workers stays within its bounds";
pub(crate) const OWN_GENERATION: &str = "a child is born with the generation in force, or with the one that comes";
pub(crate) const BEATS_AND_LIVES: &str = "nobody is ended for hanging before its time";
pub(crate) const WELL_KILLED: &str = "a well child that is killed from outside is replaced at once";
pub(crate) const PAUSES: &str = "a child that keeps dying is started ever more slowly";
pub(crate) const ENDS_IN_TIME: &str = "what has a time has ended by then";
pub(crate) const LEAVERS: &str = "who was told to go and hangs is ended for that";
pub(crate) const READY_FIRST: &str = "an old worker is told to go when its successor is ready, not before";
pub(crate) const LIFE_MIN: &str = "no worker is recycled in its first ten seconds";
pub(crate) const FAILED_RELOAD: &str = "a failed reload leaves everything as it was";
pub(crate) const EVERY_CALLER: &str = "every caller is answered once";
pub(crate) const GENERATIONS: &str = "at most three generations drain without haste";
pub(crate) const ROOM: &str = "a reload hastens those that drain only when it has waited for them";
pub(crate) const CLERK_LAST: &str = "the clerk is stopped after the last worker";
pub(crate) const LISTENERS: &str = "connects are refused at the end of a stop and not before";
pub(crate) const GHOSTS_PLACE: &str = "no place stays empty because of a child that was killed and does not end";
pub(crate) const FEW_GHOSTS: &str = "the work of four ghosts at most is taken over";
pub(crate) const ONE_OF_A_GROUP: &str = "of hosts that exclude each other one is there, with its programs";
pub(crate) const UNTOUCHED: &str = "a reload leaves a host alone whose section did not change";
pub(crate) const NEEDED: &str = "a host goes when it is idle, another needs its place, or nobody can ask for it";
pub(crate) const HOST_PAUSES: &str = "a host that failed is started after a pause";
pub(crate) const WANTS: &str = "a host that is asked for is started";
pub(crate) const GOERS: &str = "a worker that goes by itself has left its place";
pub(crate) const START: &str = "the gateway serves or says why it does not, once";

/// The longest time that a caller may wait: two validations, two times for the room, two boots and the rows of those that
/// leave.
const CALLER_TIME: Ns = 360 * SECOND;

impl World {
    /// What must be true of one step as a whole, before its actions are carried out.
    pub(super) fn check_step(&self, event: &Event, actions: &[Action]) {
        let adopted = actions.iter().find_map(|action| match action {
            Action::Adopt { generation, rules } => Some((*generation, *rules)),
            _ => None,
        });
        if self.state.generation() != adopted.map_or(self.generation, |(generation, _)| generation) {
            self.fail(FAILED_RELOAD, "the generation has changed without a reload");
        }
        let has_failed = actions.contains(&Action::Count(Tally::ReloadFailed));
        if has_failed && self.kept.is_some() && self.stop_began.is_none() && self.is_serving() {
            let failed = Action::Count(Tally::ReloadFailed);
            let until = actions.iter().position(|action| *action == failed).unwrap_or(0);
            for epoch in told_in(&actions[..until], &[Sig::Term, Sig::Quit]) {
                let is_own = |p: &Process| p.birth.generation == self.generation && p.birth.kind != Kind::Host;
                if self.living.get(&epoch).is_some_and(is_own) {
                    self.fail(FAILED_RELOAD, "a worker of the generation in force is told to go");
                }
            }
        }
        self.check_hosts_told(event, actions);
        if let Event::Exited { epoch, status, .. } = event {
            self.check_replaced(*epoch, *status, actions);
        }
        if self.stop_began.is_none() && self.kept_at.is_none_or(|at| self.now < at + ROOM_TIME) {
            let is_cut = |epoch: &u32| self.living.get(epoch).is_some_and(Process::is_unhurried);
            if told_in(actions, &[Sig::Quit]).iter().any(is_cut) {
                self.fail(ROOM, "it is too soon");
            }
        }
        self.check_ghosts(actions);
        if let Some((generation, rules)) = adopted {
            self.check_adopted(generation, &rules, actions);
        } else if !actions.contains(&Action::Count(Tally::ScaleDown)) && self.is_serving() {
            self.check_recycled(actions);
        }
    }

    /// Whoever is given up was killed long ago, and is one of a few.
    fn check_ghosts(&self, actions: &[Action]) {
        let given_up = actions.iter().filter_map(|action| match action {
            Action::ShowGhost { epoch } => self.living.get(epoch),
            _ => None,
        });
        for process in given_up {
            if process.killed.is_none_or(|at| self.now < at + GHOST_TIME) {
                self.fail(BURIALS, "one is given up that was not killed, or a moment ago");
            }
        }
        let shown = actions.iter().filter(|action| matches!(action, Action::ShowGhost { .. })).count();
        // The end of one makes room for another in the same step, whose burials this world has not seen yet.
        let is_buried = |epoch: u32| {
            actions.iter().any(|action| matches!(action, Action::Bury { epoch: buried, .. } if *buried == epoch))
        };
        let is_there = |epoch: &&u32| self.living.contains_key(epoch) && !is_buried(**epoch);
        if shown > 0 && shown + self.taken_over.iter().filter(is_there).count() > GHOSTS_MAX {
            self.fail(FEW_GHOSTS, "a fifth one");
        }
    }

    fn is_ghost(&self, process: &Process) -> bool {
        process.killed.is_some_and(|at| self.now >= at.max(self.stalled_at) + GHOST_TIME)
    }

    /// A stop does not wait for ghosts.
    pub(super) fn may_be_left(&self, process: &Process) -> bool {
        self.stop_began.is_some() && self.is_ghost(process)
    }

    /// Ghosts that are in nobody's way.
    fn given_up(&self) -> usize {
        let leaving = self.state.leaving.iter().filter_map(|child| self.living.get(&child.epoch));
        leaving.filter(|process| self.is_ghost(process)).count()
    }

    /// A ghost is given up as soon as there may be one more and the board has a row for its successor.
    fn check_place(&self, process: &Process, killed: Ns) {
        let is_leaving = self.state.leaving.iter().any(|child| child.epoch == process.birth.epoch);
        let is_taken = |row: u32| {
            self.living.values().any(|other| other.birth.row == row) || self.state.slots.iter().any(|s| s.row == row)
        };
        let is_over = self.now > killed.max(self.stalled_at) + GHOST_TIME + 4 * TICK;
        // A host's place is nobody's while its program may have the memory that a successor needs.
        let is_host = process.birth.kind == Kind::Host;
        if is_over && !is_leaving && !is_host && self.given_up() < GHOSTS_MAX && !(1..ROWS_COUNT).all(is_taken) {
            self.fail(GHOSTS_PLACE, "one is waited for");
        }
    }

    pub(super) fn is_serving(&self) -> bool {
        matches!(self.state.phase, Phase::Serving)
    }

    /// A well child that somebody killed has its successor in the same step.
    fn check_replaced(&self, epoch: u32, status: Status, actions: &[Action]) {
        let Some(process) = self.living.get(&epoch).filter(|process| process.birth.kind != Kind::Host) else { return };
        if !self.was_well_killed(process, status) || !self.is_serving() {
            return;
        }
        let (kind, slot) = (process.birth.kind, process.birth.slot);
        let is_born = actions
            .iter()
            .any(|action| matches!(action, Action::Spawn(birth) if birth.kind == kind && birth.slot == slot));
        let is_coming = self.living.values().any(|other| {
            other.birth.epoch != epoch && other.birth.kind == kind && other.birth.slot == slot && other.stays()
        });
        // Of a generation that is still to come it is the failure of its reload.
        let is_in_force = process.birth.generation == self.generation;
        if is_in_force && !is_born && !is_coming {
            self.fail(WELL_KILLED, "it has no successor yet");
        }
    }

    pub(super) fn was_well_killed(&self, process: &Process, status: Status) -> bool {
        let is_outside = matches!(status, Status::Signal { number, .. } if !matches!(number, 4..=8 | 11 | 31));
        let is_well = process.shown_ready.is_some_and(|at| self.now >= at + 50 * MS);
        is_outside && is_well && process.stays() && !process.is_condemned
    }

    fn check_adopted(&self, generation: u32, rules: &Rules, actions: &[Action]) {
        let ready = self.untold_workers().filter(|worker| worker.birth.generation == generation);
        let ready = u32::try_from(ready.filter(|worker| worker.shown_ready.is_some()).count()).unwrap();
        // An order of this very step counts.
        let earlier = actions.iter().take_while(|action| !matches!(action, Action::Adopt { .. }));
        let target = earlier.fold(self.target, |target, action| match action {
            Action::SetTarget(target) => *target,
            _ => target,
        });
        let before = target.clamp(rules.workers_min, rules.workers_max);
        if ready < before {
            self.fail(READY_FIRST, "fewer workers of the new generation are ready than the old one has");
        }
        let told = told_in(actions, &[Sig::Term, Sig::Abort, Sig::Kill]);
        let is_left = |worker: &&Process| !worker.is_condemned && !told.contains(&worker.birth.epoch);
        if self.untold_workers().filter(is_left).any(|worker| worker.birth.generation != generation) {
            self.fail(OWN_GENERATION, "a worker of the old generation is not told to go");
        }
    }

    /// A worker that is told to go while everything goes on is one that is recycled.
    fn check_recycled(&self, actions: &[Action]) {
        for epoch in told_in(actions, &[Sig::Term]) {
            // One that was never ready had nothing to do.
            let is_old = |old: &&Process| old.birth.kind == Kind::Worker && old.shown_ready.is_some();
            let Some(old) = self.living.get(&epoch).filter(is_old) else { continue };
            let is_successor = |other: &&Process| {
                other.birth.epoch != epoch && other.birth.slot == old.birth.slot && other.shown_ready.is_some()
            };
            if !self.untold_workers().any(|other| is_successor(&other)) {
                self.fail(READY_FIRST, "a worker is told to go without a successor that is ready");
            }
            if old.shown_ready.is_none_or(|at| self.now < at + 10 * SECOND) {
                self.fail(LIFE_MIN, "a young worker is told to go");
            }
        }
    }

    pub(super) fn untold_workers(&self) -> impl Iterator<Item = &Process> {
        self.living.values().filter(|process| process.birth.kind == Kind::Worker && process.stays())
    }

    /// What must be true after every step.
    pub(super) fn check(&mut self) {
        self.check_numbers();
        self.check_times();
        self.check_wants();
        self.check_goers();
        if self.exit.is_some() && !self.callers.is_empty() {
            self.fail(EVERY_CALLER, "the end came before the answer");
        }
        if self.state.due() < self.now && self.exit.is_none() {
            self.fail(ENDS_IN_TIME, "the rules want to be called in the past");
        }
    }

    /// It makes room at once, unless the board has no row for its successor.
    fn check_goers(&self) {
        let is_taken = |row: u32| {
            self.living.values().any(|other| other.birth.row == row) || self.state.slots.iter().any(|s| s.row == row)
        };
        let goes = |epoch: u32| {
            let process = self.living.get(&epoch);
            process
                .is_some_and(|process| process.shown_going.is_some() && process.told.is_none() && !process.is_condemned)
        };
        if !self.state.fills(Kind::Worker) {
            return;
        }
        let mut workers = self.state.slots.iter().filter(|slot| slot.kind == Kind::Worker);
        let is_kept = workers.any(|slot| slot.child.as_ref().is_some_and(|child| goes(child.epoch)));
        if is_kept && !(1..ROWS_COUNT).all(is_taken) {
            self.fail(GOERS, "one is in its slot still");
        }
        // Those that are to come into a place need no row for somebody else.
        let coming = self.state.reload.iter().flat_map(|reload| reload.children());
        let mut coming = coming.chain(self.state.succession.iter().map(|succession| &succession.child));
        if coming.any(|child| goes(child.epoch)) {
            self.fail(GOERS, "one is waited for to serve");
        }
    }

    fn check_numbers(&mut self) {
        let is_clerk = |process: &&Process| process.birth.kind == Kind::Clerk && process.killed.is_none();
        let clerks = self.living.values().filter(is_clerk).count();
        if clerks > 1 {
            self.fail(BOUNDS, "two clerks");
        }
        let known: Vec<u32> = self.state.children().map(|child| child.epoch).collect();
        if self.living.keys().any(|epoch| !known.contains(epoch))
            || known.len() != self.living.len() + self.unborn.len()
        {
            self.fail(KNOWN, "one is missing or too many");
        }
        // One that is to take another's place may be there besides, and one that hangs and is being ended.
        let is_own = |worker: &&Process| worker.birth.generation == self.generation && !worker.is_condemned;
        let own = self.untold_workers().filter(is_own).count();
        if own > usize::try_from(self.target).unwrap() + 1 && self.stop_began.is_none() {
            self.fail(BOUNDS, "more workers than wanted");
        }
        if matches!(self.state.phase, Phase::Starting | Phase::Serving) {
            let slots = self.state.slots.iter().filter(|slot| slot.kind == Kind::Worker).count();
            if self.has_begun && slots != usize::try_from(self.state.target).unwrap() {
                self.fail(BOUNDS, "not as many slots as workers are wanted");
            }
            if self.state.slots.iter().any(|slot| slot.child.is_none() && slot.spawn_at > self.now + 12 * SECOND + 1) {
                self.fail(PAUSES, "an empty slot that is not filled within the longest pause");
            }
        }
        let mut draining: Vec<u32> =
            self.living.values().filter(|p| p.is_unhurried()).map(|p| p.birth.generation).collect();
        draining.retain(|generation| *generation != self.generation);
        draining.sort_unstable();
        draining.dedup();
        if draining.len() > 3 && self.stop_began.is_none() {
            self.fail(GENERATIONS, "a fourth one");
        }
    }

    fn check_times(&mut self) {
        for child in &self.state.leaving {
            let Some(kill_at) = child.kill_at else { self.fail(ENDS_IN_TIME, "a child that leaves has no end") };
            if self.patience.insert(child.epoch, kill_at).is_some_and(|before| kill_at > before) {
                self.fail(ENDS_IN_TIME, "a child that was told to go gets more time");
            }
        }
        // Programs have a second at most to end.
        let slack = self.stalled + 4 * TICK + SECOND;
        for process in self.living.values() {
            let rules = &self.rules_of[&process.birth.generation];
            if let Some(killed) = process.killed {
                self.check_place(process, killed);
                continue;
            }
            let is_left = || self.state.leaving.iter().any(|child| child.epoch == process.birth.epoch);
            let went = process.shown_going.filter(|_| process.told.is_none() && is_left());
            if went.is_some_and(|at| self.now > at + rules.graceful() + slack) {
                self.fail(ENDS_IN_TIME, "a child that goes by itself is still there");
            }
            if process.told.is_some_and(|at| self.now > at + rules.graceful() + slack) {
                self.fail(ENDS_IN_TIME, "a child that was told to go is still there");
            }
            let since = |at: Ns| at.max(self.stalled_at);
            let waits = process.shown_ready.is_none();
            if process.told.is_some() {
                let silent_from = process.frozen_at.max(process.shown_ready.unwrap_or(0));
                if process.is_frozen && !waits && self.now > since(silent_from) + rules.hang_timeout + 4 * TICK {
                    self.fail(LEAVERS, "it is still there");
                }
                continue;
            }
            if waits && self.now > since(process.born) + rules.boot_timeout + 4 * TICK {
                self.fail(ENDS_IN_TIME, "a child that never became ready is still there");
            }
            let silent_from = process.frozen_at.max(process.shown_ready.unwrap_or(0));
            if process.is_frozen && !waits && self.now > since(silent_from) + rules.hang_timeout + 4 * TICK {
                self.fail(ENDS_IN_TIME, "a child that does not beat is still there");
            }
        }
        // Each stage of the slowest generation, and a few turns to see that it is over.
        let slowest = |stage: fn(&Rules) -> Ns| self.rules_of.values().map(stage).max().unwrap_or(0);
        let hosts = slowest(|r| r.quick()) + SECOND + SWEEP_TIME;
        let longest = slowest(|r| r.settle) + slowest(|r| r.graceful()) + hosts + slowest(|r| r.last()) + slack;
        // Workers, hosts and the clerk may each hang in the kernel, and each standstill gives those their time anew.
        let ghosts = 3 * (GHOST_TIME + 4 * TICK) + 2 * self.stalled;
        if self.stop_began.is_some_and(|began| self.now > began + longest + ghosts) && self.exit.is_none() {
            self.fail(ENDS_IN_TIME, "the stop takes longer than its stages together");
        }
        // Whoever waits for a host's end in a stop waits for it as long as the stop does.
        let in_stop = if self.stop_began.is_some() { longest + ghosts } else { 0 };
        if self.callers.values().any(|since| self.now > since + CALLER_TIME + self.stalled + in_stop) {
            self.fail(EVERY_CALLER, "one waits for ever");
        }
    }
}

/// Who is sent one of these signals.
pub(super) fn told_in(actions: &[Action], signals: &[Sig]) -> Vec<u32> {
    let told = actions.iter().filter_map(|action| match action {
        Action::Send { epoch, signal } if signals.contains(signal) => Some(*epoch),
        _ => None,
    });
    told.collect()
}
