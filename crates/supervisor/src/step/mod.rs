//! The rules of supervision: a pure function over values, with the time passed in.
//!
//! Nothing here does anything. [`step`] takes what happened and says what is to be done; `crate::master` does it and
//! holds no rule. That is why a simulation can run thousands of lives of a master in a second.

mod event;
mod life;
mod scale;
#[cfg(test)]
mod sim;
mod stop;
#[cfg(test)]
mod tests;
mod watch;

use evergate_board::MasterPhase;
use evergate_core::exit::{Initiator, Kind};

pub(crate) use event::{Action, Birth, Event, MS, Ns, Order, Rules, SECOND, Seen, Sig};
use stop::Stop;

/// The shell turns at least this often. A turn that comes later than twice this means that the machine stood still, or
/// the master did, and then nobody is blamed for a late beat (H7).
pub(crate) const TICK: Ns = 500 * MS;

/// The clerk's row; workers have the rows after it.
const CLERK_ROW: u32 = 0;

/// Everything the rules remember.
#[derive(Debug)]
pub(crate) struct State {
    rules: Rules,
    /// Rows on the board.
    rows: u32,
    phase: Phase,
    slots: Vec<Slot>,
    /// Children that were told to go: they keep their rows until they are buried, and nobody replaces them.
    leaving: Vec<Child>,
    next_epoch: u32,
    generation: u32,
    /// Workers wanted.
    target: u32,
    degraded: u32,
    /// Connections in the accept queues, as last seen.
    queue: u32,
    /// When the last step was.
    last: Ns,
    /// When the master itself was last found to be late: no age is counted from before.
    floor: Ns,
    orphans_kill_at: Option<Ns>,
    random: u64,
}

#[derive(Debug)]
enum Phase {
    /// No worker was ever ready: an end of any child is the end of the start.
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
}

#[derive(Debug)]
struct Child {
    kind: Kind,
    slot: u32,
    row: u32,
    epoch: u32,
    born: Ns,
    ready_at: Option<Ns>,
    beat: Ns,
    took_queue: bool,
    /// Why we are ending it, once we are.
    ending: Option<Initiator>,
    /// When it is killed if it has not ended.
    kill_at: Option<Ns>,
    is_killed: bool,
}

impl State {
    /// The state before [`Event::Start`]. `rows` are the board's; `orphans` says that a predecessor's children are
    /// still there, `seed` makes the jitter.
    pub(crate) fn new(rules: Rules, rows: u32, orphans: bool, seed: u64, now: Ns) -> Self {
        Self {
            rules,
            rows,
            phase: Phase::Starting,
            slots: Vec::new(),
            leaving: Vec::new(),
            next_epoch: 1,
            generation: 1,
            target: rules.workers_min,
            degraded: 0,
            queue: 0,
            last: now,
            floor: now,
            orphans_kill_at: orphans
                .then(|| now.saturating_add(rules.drain).saturating_add(rules.cancel).saturating_add(rules.cleanup)),
            random: seed | 1,
        }
    }

    /// When the next step must come if nothing happens, never further away than one tick.
    pub(crate) fn due(&self) -> Ns {
        let tick = self.last.saturating_add(TICK);
        let empty = self.slots.iter().filter(|slot| slot.child.is_none() && self.fills(slot.kind));
        let spawns = empty.map(|slot| slot.spawn_at);
        let kills = self.children().filter(|child| !child.is_killed).filter_map(|child| child.kill_at);
        let stop = match &self.phase {
            Phase::Stopping(stop) => stop.due(self.last),
            Phase::Starting | Phase::Serving | Phase::Ended => None,
        };
        spawns.chain(kills).chain(stop).chain(self.orphans_kill_at).fold(tick, Ns::min)
    }

    /// The configuration's generation.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    fn children(&self) -> impl Iterator<Item = &Child> {
        self.slots.iter().filter_map(|slot| slot.child.as_ref()).chain(&self.leaving)
    }

    fn children_mut(&mut self) -> impl Iterator<Item = &mut Child> {
        self.slots.iter_mut().filter_map(|slot| slot.child.as_mut()).chain(&mut self.leaving)
    }

    /// Whether an empty slot of this kind is filled again.
    fn fills(&self, kind: Kind) -> bool {
        match &self.phase {
            Phase::Starting | Phase::Serving => true,
            Phase::Stopping(stop) => stop.fills(kind),
            Phase::Ended => false,
        }
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
    if now - state.last > 2 * TICK {
        state.floor = now;
    }
    state.last = now;
    match event {
        Event::Start => state.start(now, &mut out),
        Event::Seen { children, queue } => state.seen(&children, queue, now, &mut out),
        Event::SpawnFailed { epoch, why } => state.spawn_failed(epoch, &why, now, &mut out),
        Event::Exited { epoch, status } => state.exited(epoch, status, now, &mut out),
        Event::Order(order) => state.order(order, now, &mut out),
    }
    state.watch(now, &mut out);
    state.go_on_stopping(now, &mut out);
    state.fill(now, &mut out);
    out
}

impl State {
    fn start(&mut self, now: Ns, out: &mut Vec<Action>) {
        out.push(Action::SetPhase(MasterPhase::Starting));
        out.push(Action::SetTarget(self.target));
        self.slots.push(Slot::new(Kind::Clerk, 0, CLERK_ROW, now));
        for index in 0..self.target {
            self.slots.push(Slot::new(Kind::Worker, index, index.saturating_add(1), now));
        }
    }

    fn order(&mut self, order: Order, now: Ns, out: &mut Vec<Action>) {
        match order {
            Order::Term | Order::Interrupt | Order::Stop | Order::StopNow => self.stop(order, now, out),
            Order::More => self.more(now, out),
            Order::Fewer => self.fewer(now, out),
            Order::Reload => out.push(Action::Say(
                "reload is not in this version: the configuration stays as it is; to change it, stop and start".into(),
            )),
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
        Self { kind, index, row, child: None, spawn_at: now, deaths: 0, last_death: None }
    }

    /// What it is called in words for the operator.
    fn name(&self) -> String {
        name(self.kind, self.index)
    }
}

impl Child {
    fn name(&self) -> String {
        name(self.kind, self.slot)
    }
}

/// What a child is called: there is one clerk, and workers are counted.
pub(crate) fn name(kind: Kind, slot: u32) -> String {
    match kind {
        Kind::Master | Kind::Clerk => kind.name().to_owned(),
        Kind::Worker | Kind::Runner | Kind::Host => format!("{} {slot}", kind.name()),
    }
}
