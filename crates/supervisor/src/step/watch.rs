//! Children that do not become ready, do not beat, or do not end in time.

use evergate_core::exit::Initiator;

use super::{Action, Child, MS, Ns, Phase, SECOND, Sig, State, planted};

/// Without a beat for so long an operator is told. Children beat four times a second.
const WARN: Ns = SECOND;
/// Without a beat for so long it is found out what the child is doing.
const DIAGNOSE: Ns = 2 * SECOND;
/// Without a beat for so long it is asked how long the child has waited for a processor.
pub(crate) const ASK: Ns = SECOND / 2;
/// Waiting for a processor is no hanging, but of a child that hangs and waits the others' clients see no difference: this many
/// times `hang_timeout` at most are granted for it.
const GRANTED_MAX: Ns = 4;

/// How far a child that does not beat was warned about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rung {
    /// It beats.
    Well,
    /// The operator knows.
    Warned,
    /// The operator knows what it is doing.
    Diagnosed,
    /// The operator knows that it lives on only because it had to wait for a processor.
    Spared,
}

impl State {
    /// Everything that is due at this time.
    pub(super) fn watch(&mut self, now: Ns, out: &mut Vec<Action>) {
        if self.orphans_kill_at.is_some_and(|at| at <= now) {
            self.orphans_kill_at = None;
            out.push(Action::KillOrphans);
        }
        let floor = self.floor;
        let looked = self.looked;
        for child in self.children_mut().filter(|child| child.is_watched()) {
            // From before the floor nothing counts: then the master was late itself (H7).
            let age = |since: Ns| looked.saturating_sub(since.max(floor));
            match child.ready_at {
                // One that boots and was told to go has a time already.
                None if child.ending.is_some() => {}
                None if age(child.born) > child.rules.boot_timeout => {
                    out.push(Action::Say(format!("the {} was not ready in time and is killed", child.name())));
                    child.end(Initiator::Boot, now);
                }
                Some(ready_at) => {
                    let age = age(child.seen.beat.max(ready_at));
                    child.climb(age, child.granted(floor), (now, floor), out);
                }
                None => {}
            }
        }
        self.kill_overdue(now, out);
    }

    fn kill_overdue(&mut self, now: Ns, out: &mut Vec<Action>) {
        let mut has_forced = false;
        for child in self.children_mut() {
            if child.killed_at.is_some() || child.kill_at.is_none_or(|at| at > now) || planted!(NeverKills) {
                continue;
            }
            child.killed_at = Some(now);
            out.push(Action::Send { epoch: child.epoch, signal: Sig::Kill });
            if !child.is_condemned() {
                out.push(Action::Say(format!("the {} did not end in time and is killed", child.name())));
                has_forced = true;
            }
        }
        if let Phase::Stopping(stop) = &mut self.phase
            && has_forced
        {
            stop.force();
        }
    }
}

impl Child {
    /// Whether it is being ended for what it did not do. One that was told to go is watched until it has gone: its loop has
    /// to turn for that.
    fn is_condemned(&self) -> bool {
        matches!(self.ending, Some(Initiator::Boot | Initiator::Hang))
            || planted!(TrustsLeavers) && self.ending.is_some()
    }

    /// Whether more is to come for what it does not do. One that was killed and does not end can do nothing any more.
    fn is_watched(&self) -> bool {
        !self.is_condemned() && self.killed_at.is_none()
    }

    /// Ends it; never gives it more time than it had.
    pub(super) fn end(&mut self, initiator: Initiator, kill_at: Ns) {
        self.ending = Some(initiator);
        self.kill_at = Some(self.kill_at.map_or(kill_at, |before| before.min(kill_at)));
    }

    /// The silence that ABRT answers: from there to KILL there is time to write a core.
    fn abort_age(&self) -> Ns {
        let limit = self.rules.hang_timeout;
        limit.saturating_sub((limit / 10).min(SECOND))
    }

    /// When ABRT is due if it does not beat before: a look that came later would leave no time for the core.
    pub(super) fn abort_at(&self, floor: Ns) -> Option<Ns> {
        let since = self.seen.beat.max(self.ready_at?).max(floor);
        self.is_watched().then(|| since.saturating_add(self.abort_age()).saturating_add(self.granted(floor)))
    }

    /// Remembers how a silence began; of what was before `floor` nothing counts.
    pub(super) fn note_silence(&mut self, floor: Ns) {
        let (from, starved) = (self.seen.beat.max(floor), self.seen.starved);
        if starved > 0 && self.silent.is_none_or(|(before, _)| before != from) {
            self.silent = Some((from, starved));
        }
    }

    /// What of its silence is not held against it: the machine had no processor for it.
    fn granted(&self, floor: Ns) -> Ns {
        let is_this = |(from, _): &(Ns, Ns)| *from == self.seen.beat.max(floor);
        let from = self.silent.filter(|silent| is_this(silent) && !planted!(BlamesStarved));
        let waited = from.map_or(0, |(_, starved)| self.seen.starved.saturating_sub(starved));
        waited.min(self.rules.hang_timeout.saturating_mul(GRANTED_MAX))
    }

    /// The ladder for a child that has not beaten for so long: warn, diagnose, ABRT, and KILL at `hang_timeout`; the time that is
    /// `granted` to it counts for the last two only.
    fn climb(&mut self, age: Ns, granted: Ns, (now, floor): (Ns, Ns), out: &mut Vec<Action>) {
        let limit = self.rules.hang_timeout;
        let own = age.saturating_sub(granted);
        let is_over = own >= self.abort_age() || (planted!(HangsEarly) && age > limit / 4);
        if (is_over || age >= DIAGNOSE) && self.rung < Rung::Diagnosed {
            self.rung = Rung::Diagnosed;
            out.push(Action::Diagnose { epoch: self.epoch });
        } else if age >= WARN && self.rung < Rung::Warned {
            self.rung = Rung::Warned;
            out.push(Action::Say(format!("the {} has not beaten for a second", self.name())));
        } else if age < WARN && self.rung > Rung::Well {
            self.rung = Rung::Well;
            // Or its silence is forgiven since the machine stood still, as was said, and it may be as silent as before.
            if self.seen.beat > floor {
                out.push(Action::Say(format!("the {} beats again", self.name())));
            }
        } else if !is_over && age >= self.abort_age() && self.rung < Rung::Spared {
            self.rung = Rung::Spared;
            let (age, granted) = (age / MS, granted / MS);
            let name = self.name();
            out.push(Action::Say(format!(
                "the {name} has not beaten for {age} ms and has waited {granted} ms of them for a processor: the machine has \
                 more to do than it can, the {name} is given more time"
            )));
        }
        if is_over {
            out.push(Action::Say(format!("the {} has stopped beating and is ended", self.name())));
            out.push(Action::Send { epoch: self.epoch, signal: Sig::Abort });
            self.end(Initiator::Hang, now.saturating_add(limit.saturating_sub(own)));
        }
    }
}
