//! More workers and fewer, by hand; within the configuration's bounds.

use evergate_core::count;
use evergate_core::exit::{Initiator, Kind};

use super::{Action, Ns, Phase, Sig, Slot, State};

impl State {
    /// One worker more.
    pub(super) fn more(&mut self, now: Ns, out: &mut Vec<Action>) {
        if !self.may_scale(out) {
            return;
        }
        if self.target >= self.rules.workers_max {
            out.push(Action::Say(format!("{} already, the most that is configured", count(self.target, "worker"))));
            return;
        }
        let is_worker = |slot: &&Slot| slot.kind == Kind::Worker;
        let index = (0..).find(|index| !self.slots.iter().filter(is_worker).any(|slot| slot.index == *index));
        let row = (1..self.rows).find(|row| {
            !self.slots.iter().any(|slot| slot.row == *row) && !self.leaving.iter().any(|child| child.row == *row)
        });
        let (Some(index), Some(row)) = (index, row) else {
            out.push(Action::Say("no place is left on the board until a leaving worker has ended".into()));
            return;
        };
        self.target = self.target.saturating_add(1);
        self.slots.push(Slot::new(Kind::Worker, index, row, now));
        out.push(Action::SetTarget(self.target));
    }

    /// One worker less: one that does not serve anyway if there is one, else the oldest.
    pub(super) fn fewer(&mut self, now: Ns, out: &mut Vec<Action>) {
        if !self.may_scale(out) {
            return;
        }
        if self.target <= self.rules.workers_min {
            out.push(Action::Say(format!("only {}, the fewest that is configured", count(self.target, "worker"))));
            return;
        }
        let rank = |slot: &Slot| slot.child.as_ref().map(|child| (child.ready_at.is_some(), child.born, child.epoch));
        let workers = self.slots.iter().enumerate().filter(|(_, slot)| slot.kind == Kind::Worker);
        let Some((at, _)) = workers.min_by_key(|(_, slot)| rank(slot)) else { return };
        let slot = self.slots.remove(at);
        self.target = self.target.saturating_sub(1);
        out.push(Action::SetTarget(self.target));
        let Some(mut child) = slot.child else { return };
        if child.ending.is_none() {
            child.ending = Some(Initiator::ScaleDown);
            child.kill_at = Some(now.saturating_add(self.rules.graceful()));
            out.push(Action::Send { epoch: child.epoch, signal: Sig::Term });
        }
        self.leaving.push(child);
    }

    fn may_scale(&self, out: &mut Vec<Action>) -> bool {
        let may = matches!(self.phase, Phase::Starting | Phase::Serving);
        if !may {
            out.push(Action::Say("stopping: the number of workers is not changed any more".into()));
        }
        may
    }
}
