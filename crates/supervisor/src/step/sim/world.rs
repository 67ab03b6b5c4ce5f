//! The simulated world: processes that boot, beat, work, hang and die; operators; a file that is edited.

mod dice;
mod programs;
mod turns;

use std::collections::BTreeMap;

use evergate_core::exit::{Initiator, Kind, Status};

use super::Failure;
use super::check::*;
use crate::step::{
    Action, Birth, Caller, Circumstances, Event, MS, Next, Ns, Phase, Refusal, Rules, SECOND, Sig, State, Tally, step,
};
use dice::Dice;

pub(super) const ROWS_COUNT: u32 = 24;
/// And behind them, for hosts.
const HOST_ROWS: u32 = 6;

/// A process of the simulated world.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) birth: Birth,
    pub(super) born: Ns,
    ready_at: Ns,
    /// When the rules were first shown that it is ready.
    pub(super) shown_ready: Option<Ns>,
    /// Frozen: does not beat and obeys nothing but KILL.
    pub(super) is_frozen: bool,
    pub(super) frozen_at: Ns,
    beat: Ns,
    /// The machine has no processor for it until then: it waits for one nine tenths of the time, and does not beat.
    starves_until: Ns,
    starved: Ns,
    /// When and how it ends, once that is decided.
    end: Option<(Ns, Status)>,
    /// When it was first told to go.
    pub(super) told: Option<Ns>,
    /// Whether it goes by itself, and when the rules were first shown that.
    is_going: bool,
    pub(super) shown_going: Option<Ns>,
    is_hurried: bool,
    /// Whether we are to end it: ABRT or KILL.
    pub(super) is_condemned: bool,
    /// When it was killed by us.
    pub(super) killed: Option<Ns>,
    took_queue: bool,
    requests: u64,
    rss_kib: u64,
    pub(super) program: programs::Program,
}

impl Process {
    /// Whether it has ended, and nobody has been told.
    pub(super) fn is_over(&self, now: Ns) -> bool {
        self.end.is_some_and(|(at, _)| at <= now)
    }

    /// Whether it was neither told to go nor shown to go by itself.
    pub(super) fn stays(&self) -> bool {
        self.told.is_none() && self.shown_going.is_none()
    }

    /// Drains in its own time.
    pub(super) fn is_unhurried(&self) -> bool {
        self.birth.kind == Kind::Worker && self.told.is_some() && !self.is_hurried && !self.is_condemned
    }
}

/// Deaths in a row of the children of one slot.
#[derive(Default)]
struct Deaths {
    count: u32,
    last: Ns,
}

/// What a life was like, added up.
#[derive(Debug, Default)]
pub(super) struct Sum {
    pub(super) starts: u32,
    pub(super) failed_starts: u32,
    pub(super) forced: u32,
    pub(super) reloads: u32,
    pub(super) failed_reloads: u32,
    pub(super) recycled: u32,
    pub(super) ups: u32,
    pub(super) downs: u32,
    pub(super) hangs: u32,
    pub(super) starved: u32,
    pub(super) ghosts: u32,
    pub(super) hosts: u32,
    pub(super) goers: u32,
}

impl Sum {
    pub(super) fn add(&mut self, world: &World) {
        self.starts += world.announced;
        self.failed_starts += u32::from(world.exit == Some(70) || world.exit == Some(71));
        self.forced += u32::from(world.exit == Some(75));
        for (sum, of) in [
            (&mut self.reloads, world.sum.reloads),
            (&mut self.failed_reloads, world.sum.failed_reloads),
            (&mut self.recycled, world.sum.recycled),
            (&mut self.ups, world.sum.ups),
            (&mut self.downs, world.sum.downs),
            (&mut self.hangs, world.sum.hangs),
            (&mut self.starved, world.sum.starved),
            (&mut self.ghosts, world.sum.ghosts),
            (&mut self.hosts, world.sum.hosts),
            (&mut self.goers, world.sum.goers),
        ] {
            *sum += of;
        }
    }
}

pub(crate) struct World {
    seed: u64,
    dice: Dice,
    /// Of their own, so that the lives stay what they are without them.
    hunger: Dice,
    wander: Dice,
    pub(super) now: Ns,
    /// Of the generation in force.
    rules: Rules,
    pub(super) generation: u32,
    pub(super) target: u32,
    pub(super) rules_of: BTreeMap<u32, Rules>,
    /// The generation that comes.
    pub(super) kept: Option<u32>,
    /// When that was validated.
    pub(super) kept_at: Option<Ns>,
    /// When the validation under way ends, and how.
    compile: Option<(Ns, Result<Next, Refusal>)>,
    compiled: Option<Next>,
    pub(super) programs: programs::Programs,
    pub(super) state: State,
    pub(super) living: BTreeMap<u32, Process>,
    buried: Vec<u32>,
    /// Births that failed, which the rules have not been told yet.
    pub(super) unborn: Vec<u32>,
    deaths: BTreeMap<(Kind, u32), Deaths>,
    pub(super) exit: Option<u8>,
    pub(super) stop_began: Option<Ns>,
    /// How long the whole machine stood still.
    pub(super) stalled: Ns,
    /// When it last did: no age is counted from before.
    pub(super) stalled_at: Ns,
    /// Children that were given up for ghosts.
    pub(super) taken_over: Vec<u32>,
    listeners_closed: bool,
    /// By epoch: when a child that was told to go will be killed.
    pub(super) patience: BTreeMap<u32, Ns>,
    announced: u32,
    pub(super) has_begun: bool,
    /// Whether an operator has asked for the stop.
    is_ordered: bool,
    /// Who waits for an answer, and since when.
    pub(super) callers: BTreeMap<Caller, Ns>,
    last_caller: Caller,
    queue: u32,
    /// Of each worker, in percent of its slots.
    load: u64,
    lag: Ns,
    /// How much goes wrong in this life, percent.
    trouble: u64,
    sum: Sum,
    /// Written only when a life is lived for its story: it takes most of the time.
    is_logged: bool,
    pub(super) log: Vec<String>,
}

impl World {
    pub(super) fn new(seed: u64, is_logged: bool) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let rules = dice.rules();
        let now = 1_000 * SECOND;
        let trouble = [0, 1, 5, 25][usize::try_from(dice.roll(4)).unwrap()];
        let given = Circumstances {
            rows: ROWS_COUNT,
            host_rows: HOST_ROWS,
            has_orphans: dice.roll(4) == 0,
            halts_on_boot_error: dice.roll(8) == 0,
            seed,
        };
        let hosts = dice.hosts();
        Self {
            seed,
            state: State::new(rules, given, now).with_hosts(hosts.clone()),
            programs: programs::Programs::new(hosts),
            dice,
            hunger: Dice(seed.wrapping_mul(0xd6e8_feb8_6659_fd93) | 1),
            wander: Dice(seed.wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1),
            now,
            rules,
            generation: 1,
            target: rules.workers_min,
            rules_of: BTreeMap::from([(1, rules)]),
            kept: None,
            kept_at: None,
            compile: None,
            compiled: None,
            living: BTreeMap::new(),
            buried: Vec::new(),
            unborn: Vec::new(),
            deaths: BTreeMap::new(),
            exit: None,
            stop_began: None,
            stalled: 0,
            stalled_at: 0,
            taken_over: Vec::new(),
            listeners_closed: false,
            patience: BTreeMap::new(),
            announced: 0,
            has_begun: false,
            is_ordered: false,
            callers: BTreeMap::new(),
            last_caller: 0,
            queue: 0,
            load: 0,
            lag: 0,
            trouble,
            sum: Sum::default(),
            is_logged,
            log: Vec::new(),
        }
    }

    pub(super) fn fail(&self, invariant: &'static str, what: &str) -> ! {
        let tail = self.log.iter().rev().take(60).rev().cloned().collect::<Vec<_>>().join("\n");
        let text =
            format!("{invariant}: {what}\nreplay with EVERGATE_SIM_SEED={}\n{:?}\n{tail}", self.seed, self.rules);
        std::panic::resume_unwind(Box::new(Failure { invariant, text }));
    }

    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.dice.roll(sides)
    }

    fn is_trouble(&mut self) -> bool {
        self.dice.roll(100) < self.trouble
    }

    /// Whether the kernel holds on to one that is killed: often, in a life where that happens at all.
    fn is_haunted(&mut self) -> bool {
        self.trouble > 0 && self.seed.is_multiple_of(4) && self.dice.roll(8) > 0
    }

    /// Whether many hang, and whoever is killed then hangs for ever: a longer life, in which ghosts gather.
    pub(super) fn gathers_ghosts(&self) -> bool {
        self.trouble > 0 && self.seed.is_multiple_of(8)
    }

    fn hang_time(&mut self) -> Ns {
        if self.gathers_ghosts() { 100_000 * SECOND } else { self.dice.roll(120) * SECOND }
    }

    pub(super) fn begin(&mut self) {
        self.tell(&Event::Start);
        self.has_begun = true;
        if self.exit.is_none() && self.trouble == 0 && self.living.is_empty() {
            self.fail(START, "nothing was started");
        }
    }

    fn tell(&mut self, event: &Event) {
        if self.exit.is_some() {
            return;
        }
        if self.is_logged {
            self.log.push(format!("{:>9} ms  {event:?}", (self.now - 1_000 * SECOND) / MS));
        }
        let is_leaving = |epoch: u32| self.state.leaving.iter().any(|child| child.epoch == epoch);
        let had_left = matches!(event, Event::Exited { epoch, .. } if is_leaving(*epoch));
        let actions = step(&mut self.state, event.clone(), self.now);
        self.note_stop();
        for action in actions.iter().filter(|_| self.is_logged) {
            self.log.push(format!("              -> {action:?}"));
        }
        self.check_step(event, &actions);
        if !had_left {
            self.note_death(event);
        }
        self.note_program(event);
        for action in &actions {
            self.carry_out(action);
        }
        while let Some(epoch) = self.unborn.pop() {
            self.tell(&Event::SpawnFailed { epoch, why: "no memory".into() });
        }
        self.check();
    }

    /// A failed start is a stop that the rules begin themselves; nothing else is.
    fn note_stop(&mut self) {
        if self.stop_began.is_none() && !matches!(self.state.phase, Phase::Starting | Phase::Serving) {
            if self.announced > 0 && !self.state.given.halts_on_boot_error {
                self.fail(START, "a stop that nobody began, after the start had succeeded");
            }
            self.stop_began = Some(self.now);
        }
    }

    /// Deaths that make the next start of the slot wait; that of one whose place another has does not.
    fn note_death(&mut self, event: &Event) {
        let Event::Exited { epoch, status, .. } = event else { return };
        let Some(process) = self.living.get(epoch).filter(|process| process.birth.kind != Kind::Host) else { return };
        // Those that come with a reload or to take another's place are not tried again.
        let has_place = |other: &Process| {
            other.birth.kind == process.birth.kind && other.birth.slot == process.birth.slot && other.stays()
        };
        let is_extra = process.birth.generation != self.generation
            || self.living.values().any(|other| other.birth.epoch != *epoch && has_place(other));
        if process.told.is_some() || is_extra || self.was_well_killed(process, *status) {
            return;
        }
        let now = self.now;
        let deaths = self.deaths.entry((process.birth.kind, process.birth.slot)).or_default();
        let is_same_trouble = now < deaths.last + 30 * SECOND;
        *deaths = Deaths { count: if is_same_trouble { deaths.count + 1 } else { 1 }, last: now };
    }

    fn carry_out(&mut self, action: &Action) {
        if self.exit.is_some() {
            self.fail(START, "an action after the exit");
        }
        match action {
            Action::Spawn(birth) => self.spawn(*birth),
            Action::Send { epoch, signal } => self.send(*epoch, *signal),
            Action::Bury { epoch, initiator } => self.bury(*epoch, *initiator),
            Action::CloseListeners => {
                if self.listeners_closed || self.stop_began.is_none() {
                    self.fail(LISTENERS, "twice, or without a stop");
                }
                self.listeners_closed = true;
            }
            Action::Announce => {
                self.announced += 1;
                if self.announced > 1 {
                    self.fail(START, "announced twice");
                }
            }
            Action::SetTarget(target) => {
                if *target < self.rules.workers_min || *target > self.rules.workers_max {
                    self.fail(BOUNDS, "a target outside the bounds");
                }
                self.target = *target;
            }
            Action::Answer { caller, outcome } => {
                if self.callers.remove(caller).is_none() {
                    self.fail(EVERY_CALLER, "an answer for nobody");
                }
                if outcome.as_ref().is_err_and(|refusal| refusal.why.is_empty()) {
                    self.fail(EVERY_CALLER, "a refusal without a reason");
                }
            }
            Action::Exit(code) => {
                if !self.living.is_empty() || !self.listeners_closed {
                    self.fail(BURIALS, "the exit came before the last burial, or with listeners open");
                }
                self.exit = Some(*code);
            }
            Action::ShowGhost { epoch } => {
                self.taken_over.push(*epoch);
                self.sum.ghosts += 1;
            }
            Action::Count(tally) => self.count(*tally),
            Action::Compile | Action::StopCompile | Action::Keep { .. } => self.carry_out_reload(action),
            Action::Adopt { .. } | Action::Forget { .. } => self.carry_out_reload(action),
            Action::AddHost { .. } | Action::ShowHost { .. } | Action::DropHost { .. } | Action::Sweep { .. } => {
                self.carry_out_host(action);
            }
            Action::SetPhase(_)
            | Action::SetDegraded(_)
            | Action::SetReloading(_)
            | Action::SaveRun
            | Action::KillOrphans
            | Action::Diagnose { .. }
            | Action::Say(_) => {}
        }
    }

    fn carry_out_reload(&mut self, action: &Action) {
        match action {
            Action::Compile => {
                if self.compile.is_some() {
                    self.fail(FAILED_RELOAD, "two validations at once");
                }
                let time = if self.is_trouble() { 60 * SECOND } else { self.dice.roll(200) * MS };
                let outcome = if self.dice.roll(4) == 0 {
                    Err(Refusal { code: 78, why: "a mistake".into() })
                } else {
                    Ok(Next { rules: self.dice.rules(), hosts: self.dice.hosts() })
                };
                self.compile = Some((self.now + time, outcome));
            }
            Action::StopCompile if self.compile.take().is_none() => {
                self.fail(FAILED_RELOAD, "no validation to be stopped");
            }
            Action::Keep { generation } => {
                let Some(Next { rules, hosts }) = self.compiled.take() else {
                    self.fail(FAILED_RELOAD, "nothing to keep")
                };
                self.programs.keep(*generation, hosts);
                if self.rules_of.insert(*generation, rules).is_some() {
                    self.fail(OWN_GENERATION, "a generation's number is used twice");
                }
                (self.kept, self.kept_at) = (Some(*generation), Some(self.now));
            }
            Action::Adopt { generation, rules } => {
                if self.kept != Some(*generation) {
                    self.fail(OWN_GENERATION, "a generation comes into force that was not validated");
                }
                (self.rules, self.generation, self.kept) = (*rules, *generation, None);
                // The slots are others.
                self.deaths.clear();
            }
            Action::Forget { generation } => {
                self.kept = None;
                self.programs.forget(*generation);
            }
            _ => {}
        }
    }

    fn count(&mut self, tally: Tally) {
        match tally {
            Tally::ScaleUp => self.sum.ups += 1,
            Tally::ScaleDown => {
                self.sum.downs += 1;
                self.deaths.clear();
            }
            Tally::Reload => self.sum.reloads += 1,
            Tally::ReloadFailed => self.sum.failed_reloads += 1,
            Tally::Respawn { .. } | Tally::HostStart { .. } => {}
        }
    }

    fn bury(&mut self, epoch: u32, initiator: Initiator) {
        if self.buried.contains(&epoch) {
            self.fail(BURIALS, "twice");
        }
        match self.living.get(&epoch) {
            None => self.fail(BURIALS, "nobody is buried"),
            Some(process) if process.end.is_none_or(|(at, _)| at > self.now) && !self.may_be_left(process) => {
                self.fail(BURIALS, "it is alive");
            }
            Some(_) => {}
        }
        let recycled = [Initiator::Requests, Initiator::Lifetime, Initiator::Rss, Initiator::Descriptors];
        self.sum.recycled += u32::from(recycled.contains(&initiator));
        self.living.remove(&epoch);
        self.buried.push(epoch);
    }

    fn spawn(&mut self, birth: Birth) {
        if self.buried.contains(&birth.epoch) || self.living.contains_key(&birth.epoch) {
            self.fail(ROWS, "an epoch is used twice");
        }
        let rows = if birth.kind == Kind::Host { ROWS_COUNT..ROWS_COUNT + HOST_ROWS } else { 0..ROWS_COUNT };
        if !rows.contains(&birth.row) || self.living.values().any(|process| process.birth.row == birth.row) {
            self.fail(ROWS, "a row is given to two, or is not on the board");
        }
        let may = if birth.kind == Kind::Worker { self.kept } else { None };
        if birth.kind == Kind::Host {
            self.check_host_birth(birth);
        } else if birth.generation != self.generation && Some(birth.generation) != may {
            self.fail(OWN_GENERATION, "another one");
        }
        if self.listeners_closed && birth.kind == Kind::Worker {
            self.fail(LISTENERS, "a worker is started though connects are refused");
        }
        if self.stop_began.is_some() && !self.is_ordered {
            self.fail(START, "a child is started after the start has failed");
        }
        let deaths = self.deaths.get(&(birth.kind, birth.slot));
        if birth.generation == self.generation
            && deaths.is_some_and(|deaths| deaths.count >= 3 && self.now < deaths.last + 80 * MS)
            && !self.living.values().any(|p| p.birth.kind == birth.kind && p.birth.slot == birth.slot)
        {
            self.fail(PAUSES, "after three deaths without a pause");
        }
        if self.is_trouble() {
            self.note_unborn(birth);
            self.unborn.push(birth.epoch);
            return;
        }
        let program = self.program(birth);
        let slow = if self.is_trouble() { 60 * SECOND } else { self.dice.roll(100) * MS };
        let end = if self.is_trouble() {
            let code = u8::try_from(self.dice.roll(256)).unwrap();
            Some((self.now + self.dice.roll(200) * MS, Status::Code(code)))
        } else {
            None
        };
        let process = Process {
            birth,
            born: self.now,
            ready_at: self.now + slow,
            shown_ready: None,
            is_frozen: false,
            frozen_at: 0,
            beat: 0,
            starves_until: 0,
            starved: self.now,
            end,
            told: None,
            is_going: false,
            shown_going: None,
            is_hurried: false,
            is_condemned: false,
            killed: None,
            took_queue: false,
            requests: 0,
            rss_kib: 20_000,
            program,
        };
        self.living.insert(birth.epoch, process);
    }

    fn send(&mut self, epoch: u32, signal: Sig) {
        let now = self.now;
        let slow = self.is_trouble();
        if self.unborn.contains(&epoch) {
            return;
        }
        let Some(generation) = self.living.get(&epoch).map(|process| process.birth.generation) else {
            self.fail(BURIALS, "a signal for a buried child")
        };
        let rules = self.rules_of[&generation];
        let work = self.dice.roll(rules.drain / MS + 1) * MS;
        // It hangs in the kernel: its death takes long.
        let hangs = if signal == Sig::Kill && self.is_haunted() { self.hang_time() } else { 0 };
        let is_clerk = |process: &Process| process.birth.kind == Kind::Clerk;
        let has_workers = self.living.values().any(|process| !is_clerk(process));
        let is_too_soon = self.stop_began.is_some() && has_workers && is_clerk(&self.living[&epoch]);
        let Some(process) = self.living.get_mut(&epoch) else { return };
        let told = |end: &mut Option<(Ns, Status)>, at: Ns, status| {
            if end.is_none_or(|(before, _)| before > at) {
                *end = Some((at, status));
            }
        };
        let silent = now - process.beat.max(process.shown_ready.unwrap_or(0)).min(now);
        let is_early = silent < rules.hang_timeout / 100 * 85;
        if signal == Sig::Abort && (!process.is_frozen || is_early || process.killed.is_some()) {
            self.fail(BEATS_AND_LIVES, "a child that beats, or did lately");
        }
        match signal {
            Sig::Kill => {
                process.is_condemned = true;
                process.killed.get_or_insert(now);
                (process.is_frozen, process.frozen_at) = (true, process.frozen_at.max(now));
                process.starves_until = 0;
                told(&mut process.end, now + hangs, Status::Signal { number: 9, core: false });
            }
            Sig::Usr1 => {}
            Sig::Term | Sig::Quit => {
                process.told.get_or_insert(now);
                process.is_hurried |= signal == Sig::Quit || process.shown_ready.is_none();
                if is_too_soon {
                    self.fail(CLERK_LAST, "a worker is still there");
                }
                if process.is_frozen {
                    return;
                }
                process.took_queue = true;
                // A slow one overruns its time and has to be killed.
                let late = if slow { 3600 * SECOND } else { 0 };
                let time = if signal == Sig::Term { work } else { rules.cancel };
                told(&mut process.end, now + time + late, Status::Code(0));
            }
            Sig::Abort => {
                process.is_condemned = true;
                self.sum.hangs += 1;
            }
        }
    }
}
