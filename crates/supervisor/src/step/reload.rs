//! Reload: validate, have the new generation ready, and only then let the old one go. Whatever fails before that leaves
//! everything as it was.

use evergate_core::exit::{Initiator, Kind};
use evergate_core::inherit::code;

use super::{
    Action, Caller, Child, HostRules, Next, Ns, Phase, Refusal, Rules, SECOND, Sig, Slot, State, Tally, planted,
};

/// How long the configuration may take to be validated.
const COMPILE_TIME: Ns = 30 * SECOND;
/// Most generations that drain at once; a reload that would make one more waits for the oldest.
const GENERATIONS_MAX: usize = 3;
/// How long it waits before the oldest is told to be quick. By then a generation with the default stages has ended by
/// itself (25 s), so that reloading often cuts nothing that one reload would not; one whose drain takes hours must not
/// keep a new certificate out.
pub(super) const ROOM_TIME: Ns = 30 * SECOND;
/// How long a caller waits at most for the old workers to accept no more; one that is frozen accepts nothing anyway.
const HAND_OVER_TIME: Ns = SECOND;
/// What a caller hears while the gateway stops.
const STOPPING: &str = "the gateway is stopping: the configuration stays as it is";

/// A reload under way.
#[derive(Debug)]
pub(super) struct Reload {
    callers: Vec<Caller>,
    pub(super) stage: Stage,
    /// The programs of the configuration, once that is known.
    hosts: Vec<HostRules>,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// A child of the shell reads the configuration.
    Compiling { until: Ns },
    /// The configuration is good, but so many generations drain that there is no room for another.
    Waiting { rules: Rules, generation: u32, until: Ns },
    /// Workers of the new generation start; the old ones serve. When more are wanted by now than the board has rows for,
    /// those that drain still have the time that they had in `Waiting`.
    Booting { rules: Rules, generation: u32, until: Ns, children: Vec<Child> },
}

/// A reload that has come into force, whose callers are told when the old workers accept no more: whoever connects after
/// that meets the new configuration.
#[derive(Debug)]
pub(super) struct HandOver {
    callers: Vec<Caller>,
    generation: u32,
    pub(super) until: Ns,
}

impl Reload {
    pub(super) fn due(&self) -> Option<Ns> {
        match self.stage {
            Stage::Compiling { until } | Stage::Waiting { until, .. } => Some(until),
            Stage::Booting { .. } => None,
        }
    }

    /// The new generation's programs, as far as they are known.
    pub(super) fn hosts(&self) -> &[HostRules] {
        &self.hosts
    }

    /// The new generation's workers.
    pub(super) fn children(&self) -> &[Child] {
        match &self.stage {
            Stage::Compiling { .. } | Stage::Waiting { .. } => &[],
            Stage::Booting { children, .. } => children,
        }
    }
}

impl State {
    /// Somebody wants the configuration to be read again. One that comes during another waits; one waiting is enough,
    /// since it reads the configuration as it is then.
    pub(super) fn reload(&mut self, caller: Option<Caller>, now: Ns, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Stopping(_) | Phase::Ended => Self::refuse(caller, STOPPING.into(), out),
            Phase::Serving if self.reload.is_none() => self.begin_reload(caller.into_iter().collect(), now, out),
            Phase::Starting | Phase::Serving => self.queued.get_or_insert_default().extend(caller),
        }
    }

    fn begin_reload(&mut self, callers: Vec<Caller>, now: Ns, out: &mut Vec<Action>) {
        let stage = Stage::Compiling { until: now.saturating_add(COMPILE_TIME) };
        self.reload = Some(Reload { callers, stage, hosts: Vec::new() });
        out.extend([Action::SetReloading(true), Action::Compile]);
    }

    /// The validation has ended.
    pub(super) fn compiled(&mut self, outcome: Result<Next, Refusal>, now: Ns, out: &mut Vec<Action>) {
        let Some(reload) = self.reload.as_mut().filter(|reload| matches!(reload.stage, Stage::Compiling { .. })) else {
            return;
        };
        match outcome {
            Err(refusal) => self.abandon_reload(&refusal, now, out),
            Ok(Next { rules, hosts }) => {
                reload.hosts = hosts;
                self.last_generation = self.last_generation.saturating_add(1);
                let generation = self.last_generation;
                reload.stage = Stage::Waiting { rules, generation, until: now.saturating_add(ROOM_TIME) };
                out.push(Action::Keep { generation });
                if !self.has_room(&rules) {
                    let seconds = ROOM_TIME / SECOND;
                    out.push(Action::Say(format!(
                        "generation {generation} waits for an older one to finish what it has, {seconds} s at most"
                    )));
                }
            }
        }
    }

    /// Takes the reload as far as it can go at this time, and begins the one that waits.
    pub(super) fn go_on_reloading(&mut self, now: Ns, out: &mut Vec<Action>) {
        if let Some(Reload { stage: Stage::Compiling { until }, .. }) = &self.reload
            && *until <= now
        {
            out.push(Action::StopCompile);
            let why = "the validation of the configuration did not end in time";
            self.abandon_reload(&Refusal { code: code::INTERNAL, why: why.into() }, now, out);
        }
        self.stop_waiting(now, out);
        self.bear_generation(now, out);
        if self.is_generation_ready() {
            self.commit(now, out);
        }
        if matches!(self.phase, Phase::Serving)
            && self.reload.is_none()
            && let Some(callers) = self.queued.take()
        {
            self.begin_reload(callers, now, out);
        }
        self.answer_callers(now, out);
        self.limit_generations(now, out);
    }

    /// Whether another generation may come now: not too many drain, and the board has rows for its workers.
    fn has_room(&self, rules: &Rules) -> bool {
        let is_few = self.draining_generations().len() < GENERATIONS_MAX || planted!(AnyGenerations);
        is_few && self.free_rows().take(to_usize(self.wanted(rules))).count() == to_usize(self.wanted(rules))
    }

    /// The new generation's turn comes when there is room for it, or when it has waited for that long enough.
    fn stop_waiting(&mut self, now: Ns, out: &mut Vec<Action>) {
        let Some(Reload { stage: Stage::Waiting { rules, generation, until }, .. }) = &self.reload else { return };
        let (rules, generation, until) = (*rules, *generation, *until);
        if !self.has_room(&rules) {
            if now < until && !planted!(HastensAtOnce) {
                return;
            }
            // It makes one more when it comes into force.
            while self.draining_generations().len() >= GENERATIONS_MAX && !planted!(AnyGenerations) {
                self.hasten_oldest(now, out);
            }
        }
        if let Some(reload) = &mut self.reload {
            reload.stage = Stage::Booting { rules, generation, until, children: Vec::new() };
        }
        // Who was to be replaced is replaced by this.
        self.end_succession(now, out);
    }

    /// As many workers as there are to be, within the new bounds. Where the board has no row left, the rows of the oldest
    /// of those that leave are waited for.
    fn bear_generation(&mut self, now: Ns, out: &mut Vec<Action>) {
        loop {
            let Some(Reload { stage: Stage::Booting { rules, generation, until, children }, .. }) = &self.reload else {
                return;
            };
            let (rules, generation, until) = (*rules, *generation, *until);
            let Some(index) = next_index(children, self.wanted(&rules)) else { return };
            let Some(row) = self.free_row() else {
                if now >= until || planted!(HastensAtOnce) {
                    let missing = to_usize(self.wanted(&rules)).saturating_sub(children.len());
                    self.hasten_for(missing, now, out);
                }
                return;
            };
            let child = self.bear((Kind::Worker, index, row), generation, rules, now, out);
            if let Some(Stage::Booting { children, .. }) = self.reload.as_mut().map(|reload| &mut reload.stage) {
                children.push(child);
            }
        }
    }

    fn wanted(&self, rules: &Rules) -> u32 {
        self.target.clamp(rules.workers_min, rules.workers_max.max(rules.workers_min))
    }

    fn is_generation_ready(&self) -> bool {
        let Some(Reload { stage: Stage::Booting { rules, children, .. }, .. }) = &self.reload else { return false };
        let is_ready = |child: &&Child| child.serves() || (planted!(SwapsEarly) && child.ending.is_none());
        let ready = children.iter().filter(is_ready).count();
        u32::try_from(ready).is_ok_and(|ready| ready >= self.wanted(rules))
    }

    /// The new generation comes into force; the old one finishes what it has.
    fn commit(&mut self, now: Ns, out: &mut Vec<Action>) {
        let Some(Reload { callers, stage: Stage::Booting { rules, generation, mut children, .. }, hosts }) =
            self.reload.take()
        else {
            return;
        };
        let wanted = self.wanted(&rules);
        // Fewer may be wanted by now than when they were started.
        let keep = to_usize(wanted).min(children.len());
        let surplus = children.split_off(keep);
        let (clerk, old): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.slots).into_iter().partition(|slot| slot.kind == Kind::Clerk);
        self.slots = clerk;
        self.slots.extend(children.into_iter().map(|child| Slot::of(child, now)));
        self.rules = rules;
        self.generation = generation;
        self.target = wanted;
        self.base = self.base.map(|base| base.clamp(rules.workers_min, rules.workers_max));
        self.load.forget();
        out.extend([Action::Adopt { generation, rules }, Action::SetTarget(wanted), Action::Count(Tally::Reload)]);
        for child in old.into_iter().filter_map(|slot| slot.child).chain(surplus) {
            self.dismiss(child, Initiator::Reload, now, out);
        }
        self.adopt_hosts(&hosts, now, out);
        self.renew_clerk(now, out);
        self.show_degraded(out);
        out.push(Action::Say(format!("generation {generation} of the configuration is in force")));
        out.extend([Action::SetReloading(false), Action::SaveRun]);
        self.hand_overs.push(HandOver { callers, generation, until: now.saturating_add(HAND_OVER_TIME) });
    }

    /// Tells those who wait that the new generation serves, once the old one accepts no more.
    fn answer_callers(&mut self, now: Ns, out: &mut Vec<Action>) {
        let is_stopping = !matches!(self.phase, Phase::Serving);
        let leaving = &self.leaving;
        self.hand_overs.retain_mut(|hand_over| {
            let accepts = |child: &Child| {
                child.kind == Kind::Worker
                    && child.generation < hand_over.generation
                    && child.ready_at.is_some()
                    && !child.seen.took_queue
            };
            let is_over = is_stopping || hand_over.until <= now || !leaving.iter().any(accepts);
            if is_over {
                let (callers, generation) = (std::mem::take(&mut hand_over.callers), hand_over.generation);
                out.extend(callers.into_iter().map(|caller| Action::Answer { caller, outcome: Ok(generation) }));
            }
            !is_over
        });
    }

    /// Tells a child to finish what it has and go, and gives it the time that its own generation promised.
    pub(super) fn dismiss(&mut self, mut child: Child, why: Initiator, now: Ns, out: &mut Vec<Action>) {
        if child.ending.is_none() {
            child.tell(why, Sig::Term, now.saturating_add(child.patience()), out);
        }
        self.leaving.push(child);
    }

    /// Ends a child that is not needed after all. One that boots has no handler yet and would leave a core at QUIT.
    pub(super) fn call_off(&mut self, mut child: Child, why: Initiator, now: Ns, out: &mut Vec<Action>) {
        let signal = if child.ready_at.is_some() { Sig::Quit } else { Sig::Term };
        child.tell(why, signal, now.saturating_add(child.rules.quick()), out);
        child.is_hastened = true;
        if !planted!(LosesChild) {
            self.leaving.push(child);
        }
    }

    /// The clerk goes before its successor comes: two would read the same rings of records. Its listener is the master's,
    /// so that connections wait meanwhile.
    fn renew_clerk(&mut self, now: Ns, out: &mut Vec<Action>) {
        for slot in self.slots.iter_mut().filter(|slot| slot.kind == Kind::Clerk) {
            if let Some(child) = slot.child.as_mut().filter(|child| child.ending.is_none()) {
                child.tell(Initiator::Reload, Sig::Term, now.saturating_add(child.rules.last()), out);
            }
        }
    }

    /// A worker of the new generation has ended before the generation was in force.
    pub(super) fn coming_ended(&mut self, child: &Child, how: &str, now: Ns, out: &mut Vec<Action>) {
        // Killed because it was not ready in time.
        let how = if child.ending == Some(Initiator::Boot) { "was not ready in time" } else { how };
        let why = format!("the {} of generation {} {how}", child.name(), child.generation);
        self.abandon_reload(&Refusal::failed(why), now, out);
    }

    /// Leaves everything as it was.
    fn abandon_reload(&mut self, refusal: &Refusal, now: Ns, out: &mut Vec<Action>) {
        let Some(Reload { callers, stage, .. }) = self.reload.take() else { return };
        let kept = match stage {
            Stage::Compiling { .. } => None,
            Stage::Waiting { generation, .. } => Some((generation, Vec::new())),
            Stage::Booting { generation, children, .. } => Some((generation, children)),
        };
        if let Some((generation, children)) = kept {
            for child in children {
                self.call_off(child, Initiator::Reload, now, out);
            }
            out.push(Action::Forget { generation });
        }
        if planted!(ForgetsGeneration) {
            self.generation = self.last_generation.saturating_add(1);
        }
        let first = refusal.why.lines().next().unwrap_or_default();
        out.push(Action::Say(format!("the reload has failed, generation {} serves on: {first}", self.generation)));
        out.push(Action::Count(Tally::ReloadFailed));
        for caller in callers {
            out.push(Action::Answer { caller, outcome: Err(refusal.clone()) });
        }
        out.extend([Action::SetReloading(false), Action::SaveRun]);
    }

    /// The stop ends every reload, the one under way and the one that waits.
    pub(super) fn end_reloads(&mut self, now: Ns, out: &mut Vec<Action>) {
        if matches!(&self.reload, Some(Reload { stage: Stage::Compiling { .. }, .. })) {
            out.push(Action::StopCompile);
        }
        self.abandon_reload(&Refusal::failed(STOPPING), now, out);
        for caller in self.queued.take().into_iter().flatten() {
            if !planted!(LosesCaller) {
                out.push(Action::Answer { caller, outcome: Err(Refusal::failed(STOPPING)) });
            }
        }
    }

    /// Has the oldest generations be quick, until those that were told so have as many rows as are missing.
    fn hasten_for(&mut self, missing: usize, now: Ns, out: &mut Vec<Action>) {
        let floor = self.floor;
        // A ghost's row may never be free.
        let is_quick = |child: &&Child| child.kind == Kind::Worker && child.is_hastened && !child.is_ghost(floor, now);
        while self.leaving.iter().filter(is_quick).count() < missing && !self.draining_generations().is_empty() {
            self.hasten_oldest(now, out);
        }
    }

    /// What is left to be done when the generations that drain are too many all the same.
    fn limit_generations(&mut self, now: Ns, out: &mut Vec<Action>) {
        while self.draining_generations().len() > GENERATIONS_MAX && !planted!(AnyGenerations) {
            self.hasten_oldest(now, out);
        }
    }

    /// Generations that are not in force and have workers that were neither told to be quick nor killed; the oldest first.
    pub(super) fn draining_generations(&self) -> Vec<u32> {
        let is_draining = |child: &&Child| {
            let is_old = child.kind == Kind::Worker && child.generation != self.generation;
            is_old && !child.is_hastened && child.killed_at.is_none()
        };
        let mut all: Vec<u32> = self.leaving.iter().filter(is_draining).map(|child| child.generation).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn hasten_oldest(&mut self, now: Ns, out: &mut Vec<Action>) {
        let Some(oldest) = self.draining_generations().first().copied() else { return };
        for child in self.leaving.iter_mut().filter(|child| child.generation == oldest) {
            child.tell(Initiator::Reload, Sig::Quit, now.saturating_add(child.rules.quick()), out);
        }
    }
}

impl Child {
    /// What it has from TERM to its end: one that is not ready yet has accepted nothing that could be finished.
    pub(super) fn patience(&self) -> Ns {
        if self.ready_at.is_some() { self.rules.graceful() } else { self.rules.quick() }
    }
}

impl Slot {
    /// A slot around a worker that is there already.
    fn of(child: Child, now: Ns) -> Self {
        let (index, row) = (child.slot, child.row);
        Self { child: Some(child), ..Self::new(Kind::Worker, index, row, now) }
    }
}

fn to_usize(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// The lowest number that none of them has, if there are fewer than wanted.
fn next_index(children: &[Child], wanted: u32) -> Option<u32> {
    if u32::try_from(children.len()).is_ok_and(|count| count >= wanted) {
        return None;
    }
    (0..wanted).find(|index| !children.iter().any(|child| child.slot == *index))
}
