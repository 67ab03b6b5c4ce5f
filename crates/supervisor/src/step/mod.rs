//! The rules of supervision: a pure function over values, with the time passed in.
//!
//! Nothing here does anything. [`step`] takes what happened and says what is to be done; `crate::master` does it and
//! holds no rule. That is why a simulation can run thousands of lives of a master in a second.
//!
//! Holds INV-STEP-1 (ARCHITECTURE.md).

mod event;
mod ghosts;
mod hosts;
#[cfg(test)]
pub(crate) use hosts::SWEEP_TIME;
#[cfg(test)]
mod hosts_tests;
mod life;
mod load;
#[cfg(test)]
mod load_tests;
#[cfg(test)]
mod mutants;
mod recycle;
mod reload;
#[cfg(test)]
mod reload_tests;
mod scale;
#[cfg(test)]
mod sim;
mod stop;
#[cfg(test)]
mod tests;
pub(crate) mod watch;

use evergate_board::MasterPhase;
use evergate_core::exit::{Initiator, Kind};

pub use event::HostStart;
pub(crate) use event::{
    Action, Birth, Caller, Event, HostRules, HostSeen, MS, Next, Ns, Order, Refusal, Rules, SECOND, Seen, Shown, Sig,
    Tally,
};
use hosts::Host;
pub(crate) use hosts::name_hash;
use load::Load;
use recycle::Succession;
use reload::{HandOver, Reload, Stage};
use stop::Stop;

/// The shell turns at least this often. A turn that comes later than twice this means that the machine stood still, or
/// the master did, and then nobody is blamed for a late beat (H7).
pub(crate) const TICK: Ns = 500 * MS;

/// The clerk's row; workers have the rows after it.
const CLERK_ROW: u32 = 0;

/// Whether a planted mistake is switched on (`mutants`); never in the real program.
macro_rules! planted {
    ($name:ident) => {{
        #[cfg(test)]
        {
            crate::step::mutants::is_on(crate::step::mutants::Mutant::$name)
        }
        #[cfg(not(test))]
        {
            false
        }
    }};
}
pub(crate) use planted;

/// What the rules are given at the start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Circumstances {
    /// Rows on the board for the clerk and the workers.
    pub(crate) rows: u32,
    /// Rows behind those for hosts.
    pub(crate) host_rows: u32,
    /// A predecessor's children are still there.
    pub(crate) has_orphans: bool,
    /// The first boot that fails ends the start, even if other workers are ready.
    pub(crate) halts_on_boot_error: bool,
    /// Makes the jitter.
    pub(crate) seed: u64,
}

/// Everything the rules remember.
#[derive(Debug)]
pub(crate) struct State {
    /// Of the generation in force.
    rules: Rules,
    given: Circumstances,
    phase: Phase,
    slots: Vec<Slot>,
    /// Children without a place, which keep their rows until they are buried: told to go, gone by themselves, or ghosts.
    leaving: Vec<Child>,
    /// A worker that is to take the place of another.
    succession: Option<Succession>,
    /// Until then none is begun again, because the last one failed.
    succession_at: Ns,
    reload: Option<Reload>,
    /// Who waits for a reload that begins when the present one is over; one is enough for all of them.
    queued: Option<Vec<Caller>>,
    hand_overs: Vec<HandOver>,
    hosts: Vec<Host>,
    /// The first generation's, until the start.
    first_hosts: Vec<HostRules>,
    next_epoch: u32,
    generation: u32,
    /// The highest number that was ever given to a generation: one that failed is not used again.
    last_generation: u32,
    /// Workers wanted.
    target: u32,
    /// Below this many the load does not take the workers: what the operator asked for, the configuration's least
    /// while nobody did.
    base: Option<u32>,
    load: Load,
    degraded: u32,
    /// Whether every first child was ready.
    is_whole: bool,
    /// Connections in the accept queues, as last seen.
    queue: u32,
    /// When the board was last looked at. What children did after that nobody knows, so that they are judged as of then.
    looked: Ns,
    /// When the last step was.
    last: Ns,
    /// When the master itself was last found to be late: no age is counted from before.
    floor: Ns,
    orphans_kill_at: Option<Ns>,
    random: u64,
}

#[derive(Debug)]
enum Phase {
    /// No worker was ever ready.
    Starting,
    Serving,
    Stopping(Stop),
    Ended,
}

/// A place for one child, which is filled again whenever it is empty.
#[derive(Debug)]
struct Slot {
    kind: Kind,
    index: u32,
    row: u32,
    child: Option<Child>,
    /// When an empty slot is filled.
    spawn_at: Ns,
    /// Deaths in a row, each within 30 s of the one before.
    deaths: u32,
    last_death: Option<Ns>,
    /// Whose doing the last end of a child was.
    cause: Option<Initiator>,
}

#[derive(Debug)]
struct Child {
    kind: Kind,
    slot: u32,
    /// A host's upstream; empty for others.
    upstream: String,
    row: u32,
    epoch: u32,
    generation: u32,
    /// Its own generation's: what it was promised at its birth.
    rules: Rules,
    /// 90 to 110: its share of the limits at which it is replaced, so that workers of one age do not go together.
    percent: u64,
    born: Ns,
    ready_at: Option<Ns>,
    /// What the board last showed of it.
    seen: Seen,
    /// Since when it is silent, and how long it had waited for a processor when that was first seen.
    silent: Option<(Ns, Ns)>,
    /// How far it was warned about for not beating.
    rung: watch::Rung,
    /// Why we are ending it, once we are.
    ending: Option<Initiator>,
    /// Whether it was told to be quick.
    is_hastened: bool,
    /// When it is killed if it has not ended.
    kill_at: Option<Ns>,
    /// When it was.
    killed_at: Option<Ns>,
}

impl State {
    /// The state before [`Event::Start`].
    pub(crate) fn new(rules: Rules, given: Circumstances, now: Ns) -> Self {
        let orphans_last = rules.drain.saturating_add(rules.cancel).saturating_add(rules.cleanup);
        Self {
            rules,
            given,
            phase: Phase::Starting,
            slots: Vec::new(),
            leaving: Vec::new(),
            succession: None,
            succession_at: 0,
            reload: None,
            queued: None,
            hand_overs: Vec::new(),
            hosts: Vec::new(),
            first_hosts: Vec::new(),
            next_epoch: 1,
            generation: 1,
            last_generation: 1,
            target: rules.workers_min,
            base: None,
            load: Load::default(),
            degraded: 0,
            is_whole: false,
            queue: 0,
            looked: now,
            last: now,
            floor: now,
            orphans_kill_at: given.has_orphans.then(|| now.saturating_add(orphans_last)),
            random: given.seed | 1,
        }
    }

    /// With the programs of the first generation.
    pub(crate) fn with_hosts(self, hosts: Vec<HostRules>) -> Self {
        Self { first_hosts: hosts, ..self }
    }

    /// When the next step must come if nothing happens, never further away than one tick.
    pub(crate) fn due(&self) -> Ns {
        let tick = self.last.saturating_add(TICK);
        let empty = self.slots.iter().filter(|slot| slot.child.is_none() && self.fills(slot.kind));
        let spawns = empty.map(|slot| slot.spawn_at);
        let kills = self.children().filter(|child| child.killed_at.is_none()).filter_map(|child| child.kill_at);
        let aborts = self.children().filter_map(|child| child.abort_at(self.floor));
        // One that is overdue waits for a row or a burial, of which an event tells.
        let ghosts = self.children().filter_map(|child| child.ghost_at(self.floor)).filter(|at| *at > self.last);
        let stop = match &self.phase {
            Phase::Stopping(stop) => stop.due(self.last),
            Phase::Starting | Phase::Serving | Phase::Ended => None,
        };
        let reload = self.reload.as_ref().and_then(Reload::due);
        let hand_overs = self.hand_overs.iter().map(|hand_over| hand_over.until);
        let others = stop
            .into_iter()
            .chain(reload)
            .chain(hand_overs)
            .chain(self.orphans_kill_at)
            .chain(self.sample_due())
            .chain(self.hosts_due());
        spawns.chain(kills).chain(aborts).chain(ghosts).chain(others).fold(tick, Ns::min).max(self.last)
    }

    /// The configuration's generation.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    fn children(&self) -> impl Iterator<Item = &Child> {
        let slots = self.slots.iter().filter_map(|slot| slot.child.as_ref());
        let coming = self.reload.iter().flat_map(|reload| reload.children());
        let hosts = self.hosts.iter().filter_map(|host| host.child.as_ref());
        let successor = self.succession.iter().map(|succession| &succession.child);
        slots.chain(coming).chain(successor).chain(&self.leaving).chain(hosts)
    }

    fn children_mut(&mut self) -> impl Iterator<Item = &mut Child> {
        let slots = self.slots.iter_mut().filter_map(|slot| slot.child.as_mut());
        let coming = self.reload.iter_mut().flat_map(|reload| match &mut reload.stage {
            Stage::Booting { children, .. } => children.as_mut_slice(),
            Stage::Compiling { .. } | Stage::Waiting { .. } => &mut [],
        });
        let successor = self.succession.iter_mut().map(|succession| &mut succession.child);
        let hosts = self.hosts.iter_mut().filter_map(|host| host.child.as_mut());
        slots.chain(coming).chain(successor).chain(&mut self.leaving).chain(hosts)
    }

    /// Whether an empty slot of this kind is filled again.
    fn fills(&self, kind: Kind) -> bool {
        match &self.phase {
            Phase::Starting | Phase::Serving => true,
            Phase::Stopping(stop) => stop.fills(kind),
            Phase::Ended => false,
        }
    }

    /// A worker's row that nobody has.
    fn free_row(&self) -> Option<u32> {
        self.free_rows().next()
    }

    /// Workers' rows that nobody has.
    fn free_rows(&self) -> impl Iterator<Item = u32> {
        let is_taken = |row: u32| {
            let has_child = self.children().any(|child| child.row == row) && !planted!(TakesRows);
            has_child || self.slots.iter().any(|slot| slot.row == row)
        };
        (CLERK_ROW.saturating_add(1)..self.given.rows).filter(move |row| !is_taken(*row))
    }

    /// The next pseudo-random number (xorshift64).
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// Takes one event at one time and says what is to be done.
pub(crate) fn step(state: &mut State, event: Event, now: Ns) -> Vec<Action> {
    let mut out = Vec::new();
    let now = now.max(state.last);
    if now - state.last > 2 * TICK && !planted!(StallIsBlamed) {
        state.stood_still(now, &mut out);
    }
    state.last = now;
    match event {
        Event::Start => state.start(now, &mut out),
        Event::Seen { children, queue } => {
            state.seen(&children, queue, now, &mut out);
            state.follow_load(now, &mut out);
        }
        Event::Hosts(hosts) => state.hosts_seen(&hosts, now, &mut out),
        Event::Swept { epoch } => state.swept(epoch),
        Event::Knock => state.knocked(now),
        Event::SpawnFailed { epoch, why } => state.spawn_failed(epoch, &why, now, &mut out),
        Event::Exited { epoch, status, note } => state.exited(epoch, status, &note, now, &mut out),
        Event::Compiled(outcome) => state.compiled(outcome, now, &mut out),
        Event::Order(order) => state.order(order, now, &mut out),
    }
    state.watch(now, &mut out);
    state.give_up_ghosts(now, &mut out);
    state.go_on_reloading(now, &mut out);
    state.keep_floor(now, &mut out);
    state.recycle(now, &mut out);
    state.let_go(now, &mut out);
    state.follow_hosts(now, &mut out);
    state.go_on_stopping(now, &mut out);
    state.fill(now, &mut out);
    save_once(&mut out);
    out
}

/// One write of the run file is enough for everything that happens in a step. Nothing comes after the exit.
fn save_once(out: &mut Vec<Action>) {
    let before = out.len();
    out.retain(|action| *action != Action::SaveRun);
    if out.len() < before {
        let is_end = matches!(out.last(), Some(Action::Exit(_)));
        let at = if is_end { out.len().saturating_sub(1) } else { out.len() };
        out.insert(at, Action::SaveRun);
    }
}

impl State {
    /// The machine, or this process, stood still up to now. What was late meanwhile is nobody's fault, and whoever was
    /// given a time has it still.
    fn stood_still(&mut self, now: Ns, out: &mut Vec<Action>) {
        let gap = now.saturating_sub(self.last).saturating_sub(TICK);
        out.push(Action::Say(format!(
            "the machine, or the master, stood still for {} ms; nobody is ended for that",
            gap / MS
        )));
        self.floor = now;
        self.load.forget();
        for child in self.children_mut().filter(|child| child.killed_at.is_none()) {
            child.kill_at = child.kill_at.map(|at| at.saturating_add(gap));
        }
        self.excuse_sweeps(gap);
    }

    fn start(&mut self, now: Ns, out: &mut Vec<Action>) {
        out.push(Action::SetPhase(MasterPhase::Starting));
        out.push(Action::SetTarget(self.target));
        self.slots.push(Slot::new(Kind::Clerk, 0, CLERK_ROW, now));
        for index in 0..self.target {
            self.slots.push(Slot::new(Kind::Worker, index, index.saturating_add(1), now));
        }
        let hosts = std::mem::take(&mut self.first_hosts);
        self.adopt_hosts(&hosts, now, out);
    }

    fn order(&mut self, order: Order, now: Ns, out: &mut Vec<Action>) {
        match order {
            Order::Term | Order::Interrupt | Order::Stop | Order::StopNow => self.stop(order, now, out),
            Order::More => self.more(now, out),
            Order::Fewer => self.fewer(now, out),
            Order::Scale { workers, caller } => self.scale_to(workers, caller, now, out),
            Order::Load { name, caller } => self.load(name, caller, now, out),
            Order::Unload { name, caller } => self.unload(name, caller, now, out),
            Order::Reload(caller) => self.reload(caller, now, out),
            Order::ReopenLogs => {
                for clerk in self.children().filter(|child| child.kind == Kind::Clerk) {
                    out.push(Action::Send { epoch: clerk.epoch, signal: Sig::Usr1 });
                }
            }
        }
    }
}

impl Slot {
    fn new(kind: Kind, index: u32, row: u32, now: Ns) -> Self {
        Self { kind, index, row, child: None, spawn_at: now, deaths: 0, last_death: None, cause: None }
    }

    /// What it is called in words for the operator.
    fn name(&self) -> String {
        name(self.kind, self.index)
    }

    /// Its child, if it is one that works and is meant to go on.
    fn worker(&self) -> Option<&Child> {
        self.child.as_ref().filter(|child| child.kind == Kind::Worker && child.serves())
    }
}

impl Child {
    fn name(&self) -> String {
        if self.upstream.is_empty() { name(self.kind, self.slot) } else { format!("host {}", self.upstream) }
    }
}

/// What a child is called: there is one clerk, and workers are counted.
pub(crate) fn name(kind: Kind, slot: u32) -> String {
    match kind {
        Kind::Master | Kind::Clerk => kind.name().to_owned(),
        Kind::Worker | Kind::Runner | Kind::Host => format!("{} {slot}", kind.name()),
    }
}
