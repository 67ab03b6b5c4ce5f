//! Recycling: a worker that has served its requests, its time or its memory, or loses descriptors, is replaced by one that is ready before the
//! old one is told to finish. One at a time, and none that was not ready for ten seconds.

use evergate_core::exit::{Initiator, Kind};

use super::{Action, Child, Ns, Phase, SECOND, State, Tally, planted};

/// A worker is not recycled before it has been ready for so long, whatever the limits say.
const LIFE_MIN: Ns = 10 * SECOND;
/// After a successor that did not become ready none is tried for so long: the old one serves well enough.
const PAUSE: Ns = 30 * SECOND;

/// A worker that is to take another's place.
#[derive(Debug)]
pub(super) struct Succession {
    /// Epoch of the one that goes.
    pub(super) old: u32,
    /// Who comes.
    pub(super) child: Child,
    why: Initiator,
}

impl State {
    /// Takes the succession as far as it can go, or begins one.
    pub(super) fn recycle(&mut self, now: Ns, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Serving) {
            return;
        }
        match &self.succession {
            Some(succession) if succession.child.serves() => self.hand_over(now, out),
            Some(_) => {}
            None if self.reload.is_none() && self.succession_at <= now => self.begin_succession(now, out),
            None => {}
        }
    }

    fn begin_succession(&mut self, now: Ns, out: &mut Vec<Action>) {
        let workers = self.slots.iter().filter_map(|slot| slot.worker());
        let candidates = workers.filter_map(|child| Some((child, child.recycled_for(now)?)));
        // The largest first: it is memory that hurts others.
        let Some((child, why)) = candidates.max_by_key(|(child, _)| child.seen.rss_kib) else { return };
        let (old, index) = (child.epoch, child.slot);
        let Some(row) = self.free_row() else { return };
        out.push(Action::Say(format!("the {} is replaced: {}", child.name(), why.name())));
        let child = self.bear((Kind::Worker, index, row), self.generation, self.rules, now, out);
        out.push(Action::Count(Tally::Respawn { kind: Kind::Worker, cause: why }));
        self.succession = Some(Succession { old, child, why });
        if planted!(DrainsFirst) {
            self.hand_over(now, out);
        }
    }

    /// The successor is ready: now the old one may go.
    fn hand_over(&mut self, now: Ns, out: &mut Vec<Action>) {
        let Some(Succession { old, child, why }) = self.succession.take() else { return };
        let is_old = |slot: &&mut super::Slot| slot.child.as_ref().is_some_and(|child| child.epoch == old);
        let Some(slot) = self.slots.iter_mut().find(is_old) else {
            // It cannot be: whoever ends takes the successor in, and whoever is taken away ends the succession.
            return self.dismiss(child, why, now, out);
        };
        slot.row = child.row;
        if let Some(old) = slot.child.replace(child) {
            self.dismiss(old, why, now, out);
        }
        out.push(Action::SaveRun);
    }

    /// A worker has died whose successor was on its way: then that is what replaces it. Says whether there was one.
    pub(super) fn succeed_the_dead(&mut self, at: usize, epoch: u32) -> bool {
        let Some(succession) = self.succession.take_if(|succession| succession.old == epoch) else { return false };
        let Some(slot) = self.slots.get_mut(at) else { return false };
        slot.row = succession.child.row;
        slot.child = Some(succession.child);
        true
    }

    /// The successor has ended before it was ready: the old one stays.
    pub(super) fn succession_failed(&mut self, child: &Child, now: Ns, out: &mut Vec<Action>) {
        self.succession_at = now.saturating_add(PAUSE);
        out.push(Action::Say(format!("the successor of the {} was not ready; the old one stays", child.name())));
    }

    /// The succession is not needed any more.
    pub(super) fn end_succession(&mut self, now: Ns, out: &mut Vec<Action>) {
        if let Some(succession) = self.succession.take() {
            self.call_off(succession.child, succession.why, now, out);
        }
    }
}

impl Child {
    /// Why it has to be replaced at this time, if it has to be.
    fn recycled_for(&self, now: Ns) -> Option<Initiator> {
        let age = now.saturating_sub(self.ready_at?);
        if age < LIFE_MIN && !planted!(RecyclesYoung) {
            return None;
        }
        if self.seen.is_leaking {
            return Some(Initiator::Descriptors);
        }
        let rules = &self.rules;
        let reasons = [
            (rules.rss_max_kib, self.seen.rss_kib, Initiator::Rss),
            (rules.requests_max, self.seen.requests, Initiator::Requests),
            (rules.lifetime_max, age, Initiator::Lifetime),
        ];
        let is_reached =
            |limit: u64, value: u64| limit > 0 && value >= (limit.saturating_mul(self.percent) / 100).max(1);
        reasons.into_iter().find(|(limit, value, _)| is_reached(*limit, *value)).map(|(_, _, why)| why)
    }
}
