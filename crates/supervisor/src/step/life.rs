//! From birth to burial: filling slots, the first ready worker, deaths and how soon a slot is filled again.

use evergate_board::MasterPhase;
use evergate_core::exit::{Initiator, Kind, Status};
use evergate_core::inherit::code;

use super::{
    Action, Birth, Child, MS, Ns, Phase, Refusal, Rules, SECOND, Seen, Slot, Stage, State, Tally, planted, watch::Rung,
};

/// Deaths this close to each other are one trouble.
const TROUBLE: Ns = 30 * SECOND;
/// Deaths in a row from which on a slot is shown as degraded.
const DEGRADED: u32 = 5;
/// A worker that was ready for so long and is killed from outside was well: it is replaced at once however often that
/// happens. Below it, somebody who kills whatever appears would have us start processes without a pause.
const WELL: Ns = 50 * MS;

/// What is said of a worker that nobody told to go.
const GOES: &str = "goes by itself";

/// Where a child stood when it ended.
pub(super) enum Place {
    /// In the slot at this place.
    Slot(usize),
    /// Among those that leave.
    Leaving,
    /// Among the new generation's, which is not in force yet.
    Coming,
    /// It was to take another's place.
    Successor,
    /// It was the host at this place.
    Host(usize),
}

impl State {
    /// Starts a child in every empty slot whose time has come.
    pub(super) fn fill(&mut self, now: Ns, out: &mut Vec<Action>) {
        for at in 0..self.slots.len() {
            let Some(slot) = self.slots.get(at).filter(|slot| slot.child.is_none() && slot.spawn_at <= now) else {
                continue;
            };
            let (kind, index, row) = (slot.kind, slot.index, slot.row);
            let cause = slot.cause;
            if !self.fills(kind) {
                continue;
            }
            let generation = if planted!(RespawnsOld) { 1 } else { self.generation };
            let child = self.bear((kind, index, row), generation, self.rules, now, out);
            if let Some(cause) = cause {
                out.push(Action::Count(Tally::Respawn { kind, cause }));
            }
            if let Some(slot) = self.slots.get_mut(at) {
                slot.child = Some(child);
            }
        }
    }

    /// Starts one child.
    pub(super) fn bear(
        &mut self,
        (kind, slot, row): (Kind, u32, u32),
        generation: u32,
        rules: Rules,
        now: Ns,
        out: &mut Vec<Action>,
    ) -> Child {
        let epoch = self.next_epoch;
        self.next_epoch = epoch.wrapping_add(1);
        let birth = Birth { kind, slot, row, epoch, generation };
        let percent = 90 + self.random() % 21;
        out.push(Action::Spawn(birth));
        out.push(Action::SaveRun);
        Child::new(birth, rules, percent, now)
    }

    /// Takes over what the board shows.
    pub(super) fn seen(&mut self, children: &[Seen], queue: u32, now: Ns, out: &mut Vec<Action>) {
        (self.queue, self.looked) = (queue, now);
        let floor = self.floor;
        for seen in children {
            let Some(child) = self.children_mut().find(|child| child.epoch == seen.epoch) else { continue };
            // A beat from the future is a child's nonsense, and would hide its hanging for ever.
            child.seen = Seen { beat: seen.beat.min(now), ..*seen };
            child.note_silence(floor);
            if seen.is_ready && child.ready_at.is_none() {
                child.ready_at = Some(now);
            }
        }
        let is_ready = |slot: &Slot| slot.child.as_ref().is_some_and(|child| child.ready_at.is_some());
        let has_ready_worker = self.slots.iter().any(|slot| slot.kind == Kind::Worker && is_ready(slot));
        if has_ready_worker && matches!(self.phase, Phase::Starting) {
            self.phase = Phase::Serving;
            out.extend([Action::SetPhase(MasterPhase::Serving), Action::Announce, Action::SaveRun]);
        }
        if planted!(AnnouncesTwice) && self.is_whole && self.degraded > 0 {
            out.push(Action::Announce);
        }
        self.is_whole |= self.slots.iter().all(is_ready) && !self.slots.is_empty();
        self.forgive(now);
        self.show_degraded(out);
    }

    /// A child has ended: it is buried first, whatever follows.
    pub(super) fn exited(&mut self, epoch: u32, status: Status, note: &str, now: Ns, out: &mut Vec<Action>) {
        let Some((child, place)) = self.take(epoch) else { return };
        let initiator = child.initiator(status);
        out.push(Action::Bury { epoch, initiator });
        if planted!(BuriesTwice) {
            out.push(Action::Bury { epoch, initiator });
        }
        out.push(Action::SaveRun);
        if let Phase::Stopping(stop) = &mut self.phase
            && (status == Status::Code(code::FORCED) || child.ending == Some(Initiator::Hang))
        {
            stop.force();
        }
        self.vacated(&child, &place, (status, note), now, out);
    }

    /// A child has left its place for ever: what follows from that, and when somebody else gets the place.
    pub(super) fn vacated(
        &mut self,
        child: &Child,
        place: &Place,
        (status, note): (Status, &str),
        now: Ns,
        out: &mut Vec<Action>,
    ) {
        match *place {
            Place::Leaving => {}
            Place::Coming if child.goes() => self.coming_ended(child, GOES, now, out),
            Place::Coming => self.coming_ended(child, &ended(status, note), now, out),
            Place::Successor => self.succession_failed(child, now, out),
            Place::Host(at) => self.host_ended(at, child, (status, note), now, out),
            Place::Slot(at) => {
                let initiator = child.initiator(status);
                if let Some(slot) = self.slots.get_mut(at) {
                    slot.cause = Some(initiator);
                }
                if self.succeed_the_dead(at, child.epoch) {
                    return;
                }
                let is_clerk_renewed = child.ending == Some(Initiator::Reload);
                let is_well_killed = initiator == Initiator::Unknown
                    && matches!(status, Status::Signal { .. })
                    && child.ready_at.is_some_and(|at| now.saturating_sub(at) >= WELL)
                    && !planted!(KillsCount);
                if is_clerk_renewed || is_well_killed {
                    self.refill(at, now);
                    return;
                }
                self.postpone(at, child.ready_at.is_some(), 0, now, out);
                if self.is_end_of_start(child) {
                    let what = format!("the start has failed: the {} {}", child.name(), ended(status, note));
                    self.fail_start(&what, start_code(status), now, out);
                }
            }
        }
    }

    /// Workers that go by themselves, told by somebody else or because they cannot go on, accept no more. They leave their places
    /// at once, as by their deaths, and finish what they have in the time that their generation gives.
    pub(super) fn let_go(&mut self, now: Ns, out: &mut Vec<Action>) {
        if !self.fills(Kind::Worker) || planted!(KeepsGoers) {
            return;
        }
        let goer =
            |state: &Self| state.children().find(|child| child.goes() && state.may_leave(child)).map(|it| it.epoch);
        while let Some(epoch) = goer(self) {
            self.displace(epoch, GOES, (Status::Code(0), ""), now, out);
        }
    }

    /// Whether another one could take its place while it is there: a slot's next child needs a row.
    pub(super) fn may_leave(&self, child: &Child) -> bool {
        let is_here = |slot: &Slot| slot.child.as_ref().is_some_and(|other| other.epoch == child.epoch);
        self.free_row().is_some() || !self.slots.iter().any(is_here)
    }

    /// Takes a child that will serve no more from its place, which is vacated as by its death. It keeps its row until it is
    /// buried.
    pub(super) fn displace(&mut self, epoch: u32, how: &str, end: (Status, &str), now: Ns, out: &mut Vec<Action>) {
        let row = self.free_row();
        let Some((mut child, place)) = self.take(epoch) else { return };
        if let (Place::Slot(at), Some(row)) = (&place, row)
            && let Some(slot) = self.slots.get_mut(*at)
        {
            slot.row = row;
        }
        let what = if matches!(place, Place::Slot(_)) { "; another one takes its place" } else { "" };
        out.push(Action::Say(format!("the {} {how}{what}", child.name())));
        out.push(Action::SaveRun);
        self.vacated(&child, &place, end, now, out);
        child.kill_at = child.kill_at.or(Some(now.saturating_add(child.patience())));
        self.leaving.push(child);
    }

    /// A child could not even be started.
    pub(super) fn spawn_failed(&mut self, epoch: u32, why: &str, now: Ns, out: &mut Vec<Action>) {
        let Some((child, place)) = self.take(epoch) else { return };
        out.push(Action::Say(format!("cannot start the {}: {why}", child.name())));
        out.push(Action::SaveRun);
        match place {
            Place::Leaving => {}
            Place::Coming => self.coming_ended(&child, &format!("could not be started: {why}"), now, out),
            Place::Successor => self.succession_failed(&child, now, out),
            Place::Host(at) => self.host_unborn(at, &child, why, now, out),
            Place::Slot(at) => {
                if let Some(slot) = self.slots.get_mut(at) {
                    slot.cause = Some(Initiator::Boot);
                }
                // Never at once: what the system refused it refuses again in the same instant.
                self.postpone(at, false, 1, now, out);
                if self.is_end_of_start(&child) {
                    self.fail_start("the start has failed", code::SYSTEM, now, out);
                }
            }
        }
    }

    /// Removes a child from wherever it stands.
    pub(super) fn take(&mut self, epoch: u32) -> Option<(Child, Place)> {
        let find = |all: &mut Vec<Child>| {
            let at = all.iter().position(|child| child.epoch == epoch)?;
            Some(all.remove(at))
        };
        if let Some(child) = find(&mut self.leaving) {
            return Some((child, Place::Leaving));
        }
        if let Some(Stage::Booting { children, .. }) = self.reload.as_mut().map(|reload| &mut reload.stage)
            && let Some(child) = find(children)
        {
            return Some((child, Place::Coming));
        }
        if let Some(succession) = self.succession.take_if(|succession| succession.child.epoch == epoch) {
            return Some((succession.child, Place::Successor));
        }
        if let Some(at) =
            self.hosts.iter().position(|host| host.child.as_ref().is_some_and(|child| child.epoch == epoch))
        {
            let child = self.hosts.get_mut(at)?.child.take()?;
            return Some((child, Place::Host(at)));
        }
        let is_here = |slot: &Slot| slot.child.as_ref().is_some_and(|child| child.epoch == epoch);
        let at = self.slots.iter().position(is_here)?;
        let child = self.slots.get_mut(at)?.child.take()?;
        Some((child, Place::Slot(at)))
    }

    /// Whether the end of a child is the end of the start: the clerk's, or the last hope of a first ready worker.
    fn is_end_of_start(&self, child: &Child) -> bool {
        let halts = self.given.halts_on_boot_error;
        match self.phase {
            Phase::Starting => {
                let have_all_failed =
                    self.slots.iter().filter(|slot| slot.kind == Kind::Worker).all(|slot| slot.deaths > 0);
                halts || child.kind == Kind::Clerk || have_all_failed
            }
            Phase::Serving => halts && !self.is_whole && child.ready_at.is_none(),
            Phase::Stopping(_) | Phase::Ended => false,
        }
    }

    fn fail_start(&mut self, what: &str, code: u8, now: Ns, out: &mut Vec<Action>) {
        out.push(Action::Say(what.to_owned()));
        self.abandon(code, now, out);
    }

    /// Fills a slot at once: its child was well, or went because it was told to.
    fn refill(&mut self, at: usize, now: Ns) {
        if let Some(slot) = self.slots.get_mut(at) {
            slot.spawn_at = now;
        }
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

    pub(super) fn show_degraded(&mut self, out: &mut Vec<Action>) {
        let count = self.slots.iter().filter(|slot| slot.deaths >= DEGRADED).count();
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        if count != self.degraded {
            self.degraded = count;
            out.push(Action::SetDegraded(count));
        }
    }

    /// Answers somebody who asked, and tells the operator what was refused.
    pub(super) fn refuse(caller: Option<u64>, why: String, out: &mut Vec<Action>) {
        out.push(Action::Say(why.clone()));
        if let Some(caller) = caller {
            out.push(Action::Answer { caller, outcome: Err(Refusal::failed(why)) });
        }
    }
}

impl Child {
    fn new(birth: Birth, rules: Rules, percent: u64, now: Ns) -> Self {
        Self {
            kind: birth.kind,
            slot: birth.slot,
            upstream: String::new(),
            row: birth.row,
            epoch: birth.epoch,
            generation: birth.generation,
            rules,
            percent,
            born: now,
            ready_at: None,
            seen: Seen::default(),
            silent: None,
            rung: Rung::Well,
            ending: None,
            is_hastened: false,
            kill_at: None,
            killed_at: None,
        }
    }

    /// Whether it is ready and meant to go on.
    pub(super) fn serves(&self) -> bool {
        self.ready_at.is_some() && self.ending.is_none() && !self.seen.is_going
    }

    /// Whether it goes though nobody told it, and has its place still.
    pub(super) fn goes(&self) -> bool {
        let is_going = self.kind == Kind::Worker && self.ready_at.is_some() && self.seen.is_going;
        is_going && self.ending.is_none() && self.kill_at.is_none()
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

/// An end in words, after the name of who ended.
fn ended(status: Status, note: &str) -> String {
    let how = match status {
        Status::Code(code) => format!("exit code {code}"),
        Status::Signal { number, .. } => format!("signal {number}"),
        Status::Unknown => "cause unknown".to_owned(),
    };
    let colon = if note.is_empty() { "" } else { ": " };
    format!("ended before it was ready ({how}){colon}{note}")
}

/// What the master's own exit code is when a child's end is the end of the start.
fn start_code(status: Status) -> u8 {
    match status {
        Status::Code(code @ (code::INTERNAL | code::SYSTEM | code::CONFIG)) => code,
        Status::Code(_) | Status::Signal { .. } | Status::Unknown => code::INTERNAL,
    }
}

/// The pause before a slot is filled after so many deaths in a row; +-20 %, so that slots that fail together do not
/// come back together.
fn backoff(deaths: u32, random: u64) -> Ns {
    if planted!(NoPause) {
        return 0;
    }
    let Some(doublings) = deaths.checked_sub(2) else { return 0 };
    let base = (100 * MS).saturating_mul(1 << doublings.min(20)).min(10 * SECOND);
    let percent = 80 + random % 41;
    base / 100 * percent
}
