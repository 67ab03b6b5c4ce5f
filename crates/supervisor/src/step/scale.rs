//! More workers and fewer, by hand; within the configuration's bounds. What is asked for by hand is also the floor below
//! which the load does not take the number, and it outlives a reload.

use evergate_core::exit::{Initiator, Kind};

use super::{Action, Caller, Ns, Phase, Slot, State, Tally};

impl State {
    /// `TTIN`: one worker more.
    pub(super) fn more(&mut self, now: Ns, out: &mut Vec<Action>) {
        let wanted = self.target.saturating_add(1);
        if let Err(why) = self.may_scale(wanted) {
            return out.push(Action::Say(why));
        }
        self.base = Some(self.floor_workers().saturating_add(1).min(wanted));
        if self.add_worker(now, out).is_none() {
            let text = "no place is left on the board: it is started when a worker that leaves has ended";
            self.base = Some(wanted);
            out.push(Action::Say(text.into()));
        }
    }

    /// `TTOU`: one worker less.
    pub(super) fn fewer(&mut self, now: Ns, out: &mut Vec<Action>) {
        let wanted = self.target.saturating_sub(1);
        if let Err(why) = self.may_scale(wanted) {
            return out.push(Action::Say(why));
        }
        self.base = Some(self.floor_workers().min(wanted));
        self.remove_worker(Initiator::ScaleDown, now, out);
    }

    /// So many workers; the load may add to them and take away what it added.
    pub(super) fn scale_to(&mut self, workers: u32, caller: Caller, now: Ns, out: &mut Vec<Action>) {
        if let Err(why) = self.may_scale(workers) {
            return Self::refuse(Some(caller), why, out);
        }
        self.base = Some(workers);
        while self.target > workers {
            self.remove_worker(Initiator::ScaleDown, now, out);
        }
        out.push(Action::Answer { caller, outcome: Ok(workers) });
    }

    /// Adds what is missing to the floor: what was asked for by hand, as soon as the board has rows for it.
    pub(super) fn keep_floor(&mut self, now: Ns, out: &mut Vec<Action>) {
        let floor = self.floor_workers();
        while matches!(self.phase, Phase::Starting | Phase::Serving)
            && self.target < floor
            && self.add_worker(now, out).is_some()
        {}
    }

    /// Fewest workers whatever the load.
    pub(super) fn floor_workers(&self) -> u32 {
        self.base.unwrap_or(self.rules.workers_min)
    }

    fn may_scale(&self, wanted: u32) -> Result<(), String> {
        let (min, max) = (self.rules.workers_min, self.rules.workers_max);
        if !matches!(self.phase, Phase::Starting | Phase::Serving) {
            Err("stopping: the number of workers is not changed any more".into())
        } else if wanted > max {
            Err(format!("{wanted} workers are more than workers.max, {max}, the most that is configured"))
        } else if wanted < min {
            Err(format!("{wanted} workers are fewer than workers.min, {min}, the fewest that is configured"))
        } else {
            Ok(())
        }
    }

    /// Adds a slot, which is filled in this very step; none if the board has no row.
    pub(super) fn add_worker(&mut self, now: Ns, out: &mut Vec<Action>) -> Option<()> {
        let is_worker = |slot: &&Slot| slot.kind == Kind::Worker;
        let is_free = |index: &u32| !self.slots.iter().filter(is_worker).any(|slot| slot.index == *index);
        let index = (0..).find(is_free)?;
        let row = self.free_row()?;
        self.target = self.target.saturating_add(1);
        self.slots.push(Slot::new(Kind::Worker, index, row, now));
        out.extend([Action::SetTarget(self.target), Action::Count(Tally::ScaleUp)]);
        Some(())
    }

    /// Takes one worker away: one that does not serve anyway if there is one, else the one with the least to do, of those
    /// the oldest.
    pub(super) fn remove_worker(&mut self, why: Initiator, now: Ns, out: &mut Vec<Action>) {
        let rank = |slot: &Slot| {
            let child = slot.child.as_ref()?;
            Some((child.ready_at.is_some(), child.seen.load, child.born, child.epoch))
        };
        let workers = self.slots.iter().enumerate().filter(|(_, slot)| slot.kind == Kind::Worker);
        let Some((at, _)) = workers.min_by_key(|(_, slot)| rank(slot)) else { return };
        let slot = self.slots.remove(at);
        self.target = self.target.saturating_sub(1);
        out.extend([Action::SetTarget(self.target), Action::Count(Tally::ScaleDown)]);
        self.show_degraded(out);
        let Some(child) = slot.child else { return };
        if self.succession.as_ref().is_some_and(|succession| succession.old == child.epoch) {
            self.end_succession(now, out);
        }
        self.dismiss(child, why, now, out);
    }
}
