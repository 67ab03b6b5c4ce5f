//! Children that were killed and do not end: they hang in the kernel (a disk that does not answer, a frozen cgroup).
//!
//! Such a ghost will never run an instruction of ours again, so that its work can be another's at once; but it is there,
//! with its memory and its connections, and its row on the board is its own until it is buried.

use evergate_core::exit::{Kind, Status};

use super::{Action, Child, Ns, Phase, SECOND, State, planted};

/// A KILL ends a process within milliseconds, or a second when the machine is full. Whoever is still there after two hangs
/// in the kernel, and nobody knows for how long.
pub(crate) const GHOST_TIME: Ns = 2 * SECOND;
/// Most ghosts whose work others have taken over. Where a successor hangs as well it is the machine that is ill, and every
/// further one would only cost it a process more. The board has rows for so many (`evergate_board::Shape::for_plan`).
pub(crate) const GHOSTS_MAX: usize = 4;
/// What is said of one.
const HANGS: &str = "it hangs in the kernel";

impl State {
    /// Makes room for a successor wherever a ghost stands in the way: the ghost goes to those that leave, and its place is
    /// vacated as by its death.
    pub(super) fn give_up_ghosts(&mut self, now: Ns, out: &mut Vec<Action>) {
        while let Some(epoch) = self.ghost_in_the_way(now) {
            let killed = Status::Signal { number: 9, core: false };
            self.displace(epoch, "was killed and hangs in the kernel", (killed, HANGS), now, out);
            out.push(Action::ShowGhost { epoch });
        }
    }

    /// In a stop nobody waits for a ghost: it is recorded as what it is, and the stop goes on as at its burial.
    pub(super) fn leave_ghosts(&mut self, now: Ns, out: &mut Vec<Action>) {
        let is_ghost = |child: &&Child| child.is_ghost(self.floor, now) && !planted!(WaitsForGhosts);
        if matches!(&self.phase, Phase::Stopping(stop) if stop.is_settling()) {
            return;
        }
        let ghosts: Vec<(u32, String)> =
            self.children().filter(is_ghost).map(|child| (child.epoch, child.name())).collect();
        for (epoch, name) in ghosts {
            out.push(Action::Say(format!(
                "the {name} was killed and hangs in the kernel; the stop goes on without it"
            )));
            self.exited(epoch, Status::Unknown, HANGS, now, out);
            if let Phase::Stopping(stop) = &mut self.phase {
                stop.force();
            }
        }
    }

    /// A ghost that does not only leave, if there may be one more.
    fn ghost_in_the_way(&self, now: Ns) -> Option<u32> {
        let is_ghost = |child: &&Child| child.is_ghost(self.floor, now);
        let gone = self.leaving.iter().filter(is_ghost).count();
        let most = if planted!(GhostsWithoutEnd) { usize::MAX } else { GHOSTS_MAX };
        if planted!(WaitsForBurial) || gone >= most {
            return None;
        }
        let is_leaving = |child: &&Child| self.leaving.iter().any(|other| other.epoch == child.epoch);
        // A host's program may have what its successor needs: nobody takes its place.
        let is_host = |child: &&Child| child.kind == Kind::Host;
        let is_in_the_way = |child: &&Child| !is_leaving(child) && !is_host(child) && self.may_leave(child);
        self.children().filter(is_ghost).find(is_in_the_way).map(|child| child.epoch)
    }
}

impl Child {
    /// Whether it was killed long ago. The machine's own standstill does not count.
    pub(super) fn is_ghost(&self, floor: Ns, now: Ns) -> bool {
        self.ghost_at(floor).is_some_and(|at| at <= now)
    }

    /// When it becomes a ghost if it is not buried before.
    pub(super) fn ghost_at(&self, floor: Ns) -> Option<Ns> {
        self.killed_at.map(|at| at.max(floor).saturating_add(GHOST_TIME))
    }
}
