//! From birth to burial: filling slots, the first ready worker, deaths and how soon a slot is filled again.

use evergate_board::MasterPhase;
use evergate_core::exit::{Initiator, Kind, Status};
use evergate_core::inherit::code;

use super::{Action, Birth, Child, MS, Ns, Phase, SECOND, Seen, Slot, State};

/// Deaths this close to each other are one trouble.
const TROUBLE: Ns = 30 * SECOND;
/// Deaths in a row from which on a slot is shown as degraded.
const DEGRADED: u32 = 5;

impl State {
    /// Starts a child in every empty slot whose time has come.
    pub(super) fn fill(&mut self, now: Ns, out: &mut Vec<Action>) {
        let mut is_changed = false;
        for at in 0..self.slots.len() {
            let Some(kind) = self.slots.get(at).map(|slot| slot.kind) else { break };
            if !self.fills(kind) {
                continue;
            }
            let (epoch, generation) = (self.next_epoch, self.generation);
            let Some(slot) = self.slots.get_mut(at).filter(|slot| slot.child.is_none() && slot.spawn_at <= now) else {
                continue;
            };
            let birth = Birth { kind, slot: slot.index, row: slot.row, epoch, generation };
            slot.child = Some(Child::new(birth, now));
            self.next_epoch = epoch.wrapping_add(1);
            out.push(Action::Spawn(birth));
            is_changed = true;
        }
        if is_changed {
            out.push(Action::SaveRun);
        }
    }

    /// Takes over what the board shows.
    pub(super) fn seen(&mut self, children: &[Seen], queue: u32, now: Ns, out: &mut Vec<Action>) {
        self.queue = queue;
        let mut has_ready_worker = false;
        for seen in children {
            let Some(child) = self.children_mut().find(|child| child.epoch == seen.epoch) else { continue };
            // A beat from the future is a child's nonsense, and would hide its hanging for ever.
            child.beat = seen.beat.min(now);
            child.took_queue = seen.took_queue;
            if seen.is_ready && child.ready_at.is_none() {
                child.ready_at = Some(now);
            }
            has_ready_worker |= child.kind == Kind::Worker && child.ready_at.is_some();
        }
        if has_ready_worker && matches!(self.phase, Phase::Starting) {
            self.phase = Phase::Serving;
            out.extend([Action::SetPhase(MasterPhase::Serving), Action::Announce, Action::SaveRun]);
        }
        self.forgive(now);
        self.show_degraded(out);
    }

    /// A child has ended: it is buried first, whatever follows.
    pub(super) fn exited(&mut self, epoch: u32, status: Status, now: Ns, out: &mut Vec<Action>) {
        let Some((child, slot)) = self.take(epoch) else { return };
        out.push(Action::Bury { epoch, initiator: child.initiator(status) });
        out.push(Action::SaveRun);
        if let Phase::Stopping(stop) = &mut self.phase
            && status == Status::Code(code::FORCED)
        {
            stop.force();
        }
        let Some(slot) = slot else { return };
        if matches!(self.phase, Phase::Starting) {
            let code = match status {
                Status::Code(code @ (code::INTERNAL | code::SYSTEM | code::CONFIG)) => code,
                Status::Code(_) | Status::Signal { .. } | Status::Unknown => code::INTERNAL,
            };
            out.push(Action::Say(format!(
                "the start has failed: the {} ended before any worker was ready",
                child.name()
            )));
            self.abandon(code, now, out);
            return;
        }
        self.postpone(slot, child.ready_at.is_some(), 0, now, out);
    }

    /// A child could not even be started.
    pub(super) fn spawn_failed(&mut self, epoch: u32, why: &str, now: Ns, out: &mut Vec<Action>) {
        let Some((child, slot)) = self.take(epoch) else { return };
        out.push(Action::Say(format!("cannot start the {}: {why}", child.name())));
        out.push(Action::SaveRun);
        let Some(slot) = slot else { return };
        if matches!(self.phase, Phase::Starting) {
            self.abandon(code::SYSTEM, now, out);
            return;
        }
        // Never at once: what the system refused it refuses again in the same instant.
        self.postpone(slot, false, 1, now, out);
    }

    /// Removes a child from wherever it stands; with the place of its slot if it had not been told to go.
    fn take(&mut self, epoch: u32) -> Option<(Child, Option<usize>)> {
        if let Some(at) = self.leaving.iter().position(|child| child.epoch == epoch) {
            return Some((self.leaving.remove(at), None));
        }
        let is_here = |slot: &Slot| slot.child.as_ref().is_some_and(|child| child.epoch == epoch);
        let at = self.slots.iter().position(is_here)?;
        let child = self.slots.get_mut(at)?.child.take()?;
        Some((child, Some(at)))
    }

    /// Says when an emptied slot is filled again: at once for a first death, then after 100 ms, 200 ms, ... 10 s.
    fn postpone(&mut self, at: usize, was_ready: bool, deaths_min: u32, now: Ns, out: &mut Vec<Action>) {
        let jitter = self.random();
        let Some(slot) = self.slots.get_mut(at) else { return };
        let is_quiet = slot.last_death.is_none_or(|last| now.saturating_sub(last) >= TROUBLE);
        if is_quiet && was_ready {
            slot.deaths = 0;
        }
        slot.deaths = slot.deaths.max(deaths_min).saturating_add(1);
        slot.last_death = Some(now);
        slot.spawn_at = now.saturating_add(backoff(slot.deaths, jitter));
        if slot.deaths == DEGRADED {
            out.push(Action::Say(format!(
                "the {} has ended {DEGRADED} times in a row; it is started again ever more slowly, the others go on",
                slot.name()
            )));
        }
        self.show_degraded(out);
    }

    /// Forgets the deaths of a slot whose child has been well for long enough.
    fn forgive(&mut self, now: Ns) {
        for slot in &mut self.slots {
            let ready_at = slot.child.as_ref().and_then(|child| child.ready_at);
            if ready_at.is_some_and(|at| now.saturating_sub(at) >= TROUBLE) {
                slot.deaths = 0;
            }
        }
    }

    fn show_degraded(&mut self, out: &mut Vec<Action>) {
        let count = self.slots.iter().filter(|slot| slot.deaths >= DEGRADED).count();
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        if count != self.degraded {
            self.degraded = count;
            out.push(Action::SetDegraded(count));
        }
    }
}

impl Child {
    fn new(birth: Birth, now: Ns) -> Self {
        Self {
            kind: birth.kind,
            slot: birth.slot,
            row: birth.row,
            epoch: birth.epoch,
            born: now,
            ready_at: None,
            beat: 0,
            took_queue: false,
            ending: None,
            kill_at: None,
            is_killed: false,
        }
    }

    /// Whose doing an end was. The facts stand beside it in the record; this is a conclusion.
    fn initiator(&self, status: Status) -> Initiator {
        // Signals that a process raises by its own mistake: ILL, TRAP, ABRT, BUS, FPE, SEGV, SYS.
        let is_mistake = matches!(status, Status::Signal { number: 4..=8 | 11 | 31, .. });
        match self.ending {
            // We ask with TERM, QUIT and KILL; only hanging is answered with ABRT.
            Some(ending) if !is_mistake || ending == Initiator::Hang => ending,
            _ if is_mistake && self.ready_at.is_some() => Initiator::Crash,
            _ if self.ready_at.is_none() => Initiator::Boot,
            _ if matches!(status, Status::Code(1..)) => Initiator::Crash,
            _ => Initiator::Unknown,
        }
    }
}

/// The pause before a slot is filled after so many deaths in a row; +-20 %, so that slots that fail together do not
/// come back together.
fn backoff(deaths: u32, random: u64) -> Ns {
    let Some(doublings) = deaths.checked_sub(2) else { return 0 };
    let base = (100 * MS).saturating_mul(1 << doublings.min(20)).min(10 * SECOND);
    let percent = 80 + random % 41;
    base / 100 * percent
}
