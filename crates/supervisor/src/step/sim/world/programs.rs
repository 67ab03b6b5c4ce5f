//! Programs that serve models: asked for at random, busy at random, slow, and sometimes leaving something behind.

use std::collections::BTreeMap;

use evergate_core::exit::Kind;

use super::super::check::*;
use super::{Process, World};
use crate::step::{Action, Birth, Event, HostRules, HostSeen, MS, Ns, Order, Phase, SECOND, Sig, TICK};

/// What a host's process does beside what every process does.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::step::sim) struct Program {
    /// When it takes requests.
    serves_at: Ns,
    is_busy: bool,
    asks_to_go: bool,
}

/// What the world knows of programs.
#[derive(Debug, Default)]
pub(in crate::step::sim) struct Programs {
    /// Every section there ever was, by fingerprint.
    sections: BTreeMap<u64, HostRules>,
    /// Those of each generation.
    of: BTreeMap<u32, Vec<u64>>,
    /// The hosts' rows.
    rows: BTreeMap<u32, u64>,
    /// Rows that somebody has asked for, and that the rules have not been shown yet.
    words: Vec<u32>,
    /// Since when somebody waits for a row, and nothing stood in the way.
    wants: BTreeMap<u32, Ns>,
    /// Bad ends, by row.
    failed: BTreeMap<u32, Ns>,
    /// And all others that may have been bad: told to go, and hung.
    ended: BTreeMap<u32, Ns>,
    /// What buried hosts have left: until when it is there, and the row.
    left: BTreeMap<u32, (Ns, u32)>,
    swept: Vec<u32>,
}

impl Programs {
    pub(super) fn new(first: Vec<HostRules>) -> Self {
        let mut programs = Self::default();
        programs.keep(1, first);
        programs
    }

    pub(super) fn keep(&mut self, generation: u32, hosts: Vec<HostRules>) {
        self.of.insert(generation, hosts.iter().map(|rules| rules.fingerprint).collect());
        self.sections.extend(hosts.into_iter().map(|rules| (rules.fingerprint, rules)));
    }

    /// It never comes into force.
    pub(super) fn forget(&mut self, generation: u32) {
        self.of.remove(&generation);
    }

    fn section(&self, row: u32) -> Option<&HostRules> {
        self.sections.get(self.rows.get(&row)?)
    }

    fn is_of(&self, row: u32, generation: u32) -> bool {
        let fingerprint = self.rows.get(&row);
        fingerprint.is_some_and(|one| self.of.get(&generation).is_some_and(|all| all.contains(one)))
    }

    /// Whether one may only start when the other is gone.
    fn excludes(&self, one: u32, other: u32) -> bool {
        let (Some(a), Some(b)) = (self.section(one), self.section(other)) else { return false };
        one != other && exclude(a, b)
    }
}

fn exclude(one: &HostRules, other: &HostRules) -> bool {
    (one.group.is_some() && one.group == other.group) || (one.name == other.name && !one.overlaps)
}

impl World {
    fn host(&self, row: u32) -> Option<&Process> {
        self.living.values().find(|process| process.birth.kind == Kind::Host && process.birth.slot == row)
    }

    /// Whether a host's process or anything that it left is there.
    fn is_there(&self, row: u32) -> bool {
        self.host(row).is_some() || self.programs.left.values().any(|(_, of)| *of == row)
    }

    pub(super) fn program(&mut self, birth: Birth) -> Program {
        if birth.kind != Kind::Host {
            return Program::default();
        }
        let slow = if self.is_trouble() { 3600 * SECOND } else { self.dice.roll(3000) * MS };
        Program { serves_at: self.now + slow, ..Program::default() }
    }

    pub(super) fn carry_out_host(&mut self, action: &Action) {
        match action {
            Action::AddHost { host, fingerprint, .. } => {
                let before = self.programs.rows.insert(*host, *fingerprint);
                if before.is_some() {
                    self.fail(ROWS, "a host's row is given to two");
                }
            }
            Action::DropHost { host } => {
                if self.is_there(*host) {
                    self.fail(NEEDED, "its row is dropped and it is there");
                }
                self.programs.rows.remove(host);
                self.programs.wants.remove(host);
                self.programs.failed.remove(host);
                self.programs.ended.remove(host);
            }
            Action::Sweep { epoch } => {
                let gone = self.programs.left.get(epoch).is_some_and(|(until, _)| *until <= self.now);
                if gone {
                    self.programs.left.remove(epoch);
                    self.programs.swept.push(*epoch);
                }
            }
            _ => {}
        }
    }

    /// A host that ends badly, and what it leaves.
    pub(super) fn note_program(&mut self, event: &Event) {
        let Event::Exited { epoch, .. } = event else { return };
        let is_host = |process: &&Process| process.birth.kind == Kind::Host;
        let Some(process) = self.living.get(epoch).filter(is_host) else { return };
        let (row, is_planned) = (process.birth.slot, process.told.is_some());
        self.programs.ended.insert(row, self.now);
        if !is_planned {
            self.programs.failed.insert(row, self.now);
        }
        let slow = if self.is_trouble() { 2 * SECOND } else { 0 };
        self.programs.left.insert(*epoch, (self.now + slow, row));
    }

    pub(super) fn note_unborn(&mut self, birth: Birth) {
        if birth.kind == Kind::Host {
            self.programs.failed.insert(birth.slot, self.now);
            self.programs.ended.insert(birth.slot, self.now);
        }
    }

    /// An operator does not wait for pauses.
    pub(super) fn note_load(&mut self, name: &str) {
        let is_named = |row: &u32| self.programs.section(*row).is_some_and(|rules| rules.name == name);
        let rows: Vec<u32> = self.programs.rows.keys().copied().filter(is_named).collect();
        for row in rows {
            self.programs.failed.remove(&row);
            self.programs.wants.remove(&row);
        }
    }

    pub(super) fn show_swept(&mut self) {
        let now = self.now;
        let gone = |(epoch, (until, _)): (&u32, &(Ns, u32))| (*until <= now).then_some(*epoch);
        let over: Vec<u32> = self.programs.left.iter().filter_map(gone).collect();
        for epoch in over {
            self.programs.left.remove(&epoch);
            self.programs.swept.push(epoch);
        }
        for epoch in std::mem::take(&mut self.programs.swept) {
            self.tell(&Event::Swept { epoch });
        }
    }

    /// Somebody asks for a program of the configuration in force, or of one before.
    pub(super) fn want(&mut self) {
        let rows: Vec<u32> = self.programs.rows.keys().copied().collect();
        let count = u64::try_from(rows.len()).unwrap();
        if count > 0 {
            self.programs.words.push(rows[usize::try_from(self.dice.roll(count)).unwrap()]);
        }
    }

    /// Programs get something to do, or have nothing to do any more.
    pub(super) fn work(&mut self) {
        for process in self.living.values_mut().filter(|process| process.birth.kind == Kind::Host) {
            process.program.is_busy = self.dice.roll(2) == 0;
            process.program.asks_to_go = self.dice.roll(3) == 0;
        }
    }

    pub(super) fn show_hosts(&mut self) {
        let words = std::mem::take(&mut self.programs.words);
        let mut all = Vec::new();
        for row in self.programs.rows.keys().copied() {
            let host = self.host(row).filter(|host| host.shown_ready.is_some());
            let epoch = host.map_or(0, |host| host.birth.epoch);
            let program = host.map(|host| host.program).unwrap_or_default();
            let serves = host.is_some() && program.serves_at <= self.now;
            all.push(HostSeen {
                host: row,
                // Whoever waits goes on asking.
                is_wanted: words.contains(&row) || self.programs.wants.contains_key(&row),
                ready_epoch: if serves { epoch } else { 0 },
                idle_epoch: if serves && program.asks_to_go { epoch } else { 0 },
                is_busy: serves && program.is_busy,
                is_down: false,
            });
        }
        for row in words {
            if self.host(row).is_none_or(|host| host.told.is_some()) {
                let now = self.now;
                self.programs.wants.entry(row).or_insert(now);
            }
        }
        self.tell(&Event::Hosts(all));
    }

    pub(super) fn check_host_birth(&mut self, birth: Birth) {
        let row = birth.slot;
        if !self.programs.is_of(row, birth.generation) {
            self.fail(OWN_GENERATION, "a host's section is not in its generation");
        }
        let has_worker = |p: &Process| p.birth.kind == Kind::Worker && p.birth.generation == birth.generation;
        if birth.generation != self.generation && !self.living.values().any(has_worker) {
            self.fail(OWN_GENERATION, "a host of a generation that nobody has any more");
        }
        let others: Vec<u32> = self.programs.rows.keys().copied().collect();
        if others.into_iter().any(|other| (other == row || self.programs.excludes(row, other)) && self.is_there(other))
        {
            self.fail(ONE_OF_A_GROUP, "a second one is started");
        }
        if self.programs.failed.get(&row).is_some_and(|at| self.now < at + 390 * MS) {
            self.fail(HOST_PAUSES, "at once");
        }
        self.programs.wants.remove(&row);
        self.sum.hosts += 1;
    }

    /// Before anything else: a second row for a section often is a reason for the first one's end as well.
    fn check_untouched(&self, actions: &[Action]) {
        let mut rows = self.programs.rows.clone();
        for action in actions {
            match action {
                Action::DropHost { host } => drop(rows.remove(host)),
                Action::AddHost { fingerprint, .. } if rows.values().any(|other| other == fingerprint) => {
                    self.fail(UNTOUCHED, "it has two rows");
                }
                _ => {}
            }
        }
    }

    /// Who of the hosts is told to go, and whether there is a reason.
    pub(in crate::step::sim) fn check_hosts_told(&self, event: &Event, actions: &[Action]) {
        self.check_untouched(actions);
        let adopted = actions.iter().find_map(|action| match action {
            Action::Adopt { generation, .. } => Some(*generation),
            _ => None,
        });
        let generation = adopted.unwrap_or(self.generation);
        for epoch in told_in(actions, &[Sig::Term, Sig::Quit]) {
            let is_host = |process: &&Process| process.birth.kind == Kind::Host && process.told.is_none();
            let Some(host) = self.living.get(&epoch).filter(is_host) else { continue };
            let row = host.birth.slot;
            let needs = |worker: &&Process| {
                let is_there = worker.birth.kind == Kind::Worker && !worker.is_over(self.now);
                let is_forgotten = actions.contains(&Action::Forget { generation: worker.birth.generation });
                is_there && !is_forgotten && self.programs.is_of(row, worker.birth.generation)
            };
            let is_needed = self.programs.is_of(row, generation) || self.living.values().filter(needs).any(|_| true);
            let has_asked = host.program.asks_to_go && !host.program.is_busy && host.shown_ready.is_some();
            let mut others = self.state.hosts.iter().filter(|other| other.is_wanted());
            // One that has just been added has no row in this world yet.
            let own = self.programs.section(row);
            let yields = others.any(|other| other.row != row && own.is_some_and(|own| exclude(&other.rules, own)));
            let is_unloaded = matches!(event, Event::Order(Order::Unload { name, .. })
                if self.programs.section(row).is_some_and(|rules| rules.name_hash() == *name));
            let is_worker = |p: &Process| p.birth.kind == Kind::Worker && !p.is_over(self.now) && !self.may_be_left(p);
            let is_end = self.stop_began.is_some() && !self.living.values().any(is_worker);
            let is_hastened = matches!(event, Event::Order(_)) && self.stop_began.is_some();
            if is_needed && !has_asked && !yields && !is_unloaded && !is_end && !is_hastened {
                self.fail(NEEDED, "there is no reason for its end");
            }
        }
    }

    pub(in crate::step::sim) fn check_wants(&mut self) {
        let (now, generation) = (self.now, self.generation);
        let is_calm = matches!(self.state.phase, Phase::Serving);
        let living = self.living.values().filter(|process| process.birth.kind == Kind::Host).count();
        let rows: Vec<u32> = self.programs.wants.keys().copied().collect();
        for row in rows {
            let others: Vec<u32> = self.programs.rows.keys().copied().collect();
            let mut others = others.into_iter().filter(|other| *other == row || self.programs.excludes(row, *other));
            let is_blocked = others.any(|other| self.is_there(other))
                || !self.programs.is_of(row, generation)
                || living >= usize::try_from(super::HOST_ROWS).unwrap()
                || !is_calm;
            let paused = self.programs.ended.get(&row).map_or(0, |at| at + 37 * SECOND);
            let stalled_at = self.stalled_at;
            let Some(since) = self.programs.wants.get_mut(&row) else { continue };
            *since = if is_blocked { now } else { (*since).max(paused.min(now)).max(stalled_at) };
            if now > *since + 4 * TICK {
                self.fail(WANTS, "it is not");
            }
        }
    }
}
