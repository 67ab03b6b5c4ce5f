//! Children that do not become ready, do not beat, or do not end in time.

use evergate_core::exit::Initiator;

use super::{Action, Child, Ns, Phase, SECOND, Sig, State};

/// From ABRT to KILL for a child that hangs: time to write a core.
const CORE_TIME: Ns = SECOND;

impl State {
    /// Everything that is due at this time.
    pub(super) fn watch(&mut self, now: Ns, out: &mut Vec<Action>) {
        if self.orphans_kill_at.is_some_and(|at| at <= now) {
            self.orphans_kill_at = None;
            out.push(Action::KillOrphans);
        }
        let (rules, floor) = (self.rules, self.floor);
        for slot in &mut self.slots {
            let Some(child) = slot.child.as_mut().filter(|child| child.ending.is_none()) else { continue };
            // From before the floor nothing counts: then the master was late itself (H7).
            let age = |since: Ns| now.saturating_sub(since.max(floor));
            match child.ready_at {
                None if age(child.born) > rules.boot_timeout => {
                    out.push(Action::Say(format!("the {} was not ready in time and is killed", child.name())));
                    child.end(Initiator::Boot, now);
                }
                Some(ready_at) if age(child.beat.max(ready_at)) > rules.hang_timeout => {
                    out.push(Action::Say(format!("the {} has stopped beating and is ended", child.name())));
                    out.push(Action::Send { epoch: child.epoch, signal: Sig::Abort });
                    child.end(Initiator::Hang, now.saturating_add(CORE_TIME));
                }
                _ => {}
            }
        }
        self.kill_overdue(now, out);
    }

    fn kill_overdue(&mut self, now: Ns, out: &mut Vec<Action>) {
        let mut has_forced = false;
        for child in self.children_mut() {
            if child.is_killed || child.kill_at.is_none_or(|at| at > now) {
                continue;
            }
            child.is_killed = true;
            out.push(Action::Send { epoch: child.epoch, signal: Sig::Kill });
            if matches!(child.ending, Some(Initiator::Operator | Initiator::ScaleDown)) {
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
    fn end(&mut self, initiator: Initiator, kill_at: Ns) {
        self.ending = Some(initiator);
        self.kill_at = Some(kill_at);
    }
}
