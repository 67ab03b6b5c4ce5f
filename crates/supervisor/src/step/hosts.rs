//! Hosts: one per program that serves a model, started when somebody asks for it, ended when nobody does.
//!
//! - **Start**: a want (a worker's, an operator's, `preload`, or the death of one that served) starts the host, once,
//!   unless it failed lately: then at its retry time, 0.5 s after a first failure, doubling to 30 s, +-20 %.
//! - **One of a group**: the next one starts when the last is buried and its programs are gone. The one that is there goes
//!   when it is idle, or has had its turn; it finishes what it has.
//! - **Reload**: a host whose section did not change is not touched. One that was replaced or removed stays for as long as
//!   workers of its generations are there; a replaced one goes first where its successor is wanted and must not overlap.
//! - **No lost want** (G24): the row says `stopping` before the host is told. A worker that connects before it sees that is
//!   in the socket, for which the host asks again before it goes; whoever sees it asks too, and is answered by the next one.
//!
//! Holds INV-HOST-1 (ARCHITECTURE.md).

use evergate_board::HostState;
use evergate_core::exit::{Initiator, Kind, Status};

use super::{
    Action, Caller, Child, HostRules, HostSeen, HostStart, MS, Ns, Phase, Refusal, SECOND, Shown, Sig, State, Tally,
    planted,
};

/// Ready for so long it is healthy again: the next failure is a first one.
const HEALTHY: Ns = 30 * SECOND;
/// One of a group that is idle stays so long after its start, so that whoever asked for it gets to it.
const STAY: Ns = SECOND;
/// One of a group that always has something to do goes for another after so long.
pub(crate) const TURN: Ns = 10 * SECOND;
/// Beyond its own time for the start a host has so long to say that its program did not.
const START_SLACK: Ns = 10 * SECOND;
/// Programs that cannot be killed are not waited for longer: they hang in the kernel.
pub(crate) const SWEEP_TIME: Ns = 10 * SECOND;
const STOPPING: &str = "the gateway is stopping";

/// A host: a section of a configuration, whether anything runs for it or not.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) rules: HostRules,
    /// Its row among the hosts'.
    pub(super) row: u32,
    /// Configurations that have this very section.
    generations: Vec<u32>,
    pub(super) child: Option<Child>,
    /// When the child took requests.
    ready_at: Option<Ns>,
    /// The last child's epoch, whose programs may be there still, and until when that is waited for.
    sweeping: Option<(u32, Ns)>,
    /// Since when somebody waits for it.
    wanted: Option<Ns>,
    /// Bad ends in a row, and in all.
    failures: u32,
    failures_total: u64,
    retry_at: Ns,
    /// Why the last one came to a bad end; empty if it did not.
    cause: String,
    seen: HostSeen,
    callers: Vec<(Caller, Wish)>,
    shown: Shown,
}

/// What an operator waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Load,
    Unload,
}

impl Host {
    fn new(rules: HostRules, row: u32) -> Self {
        Self {
            rules,
            row,
            generations: Vec::new(),
            child: None,
            ready_at: None,
            sweeping: None,
            wanted: None,
            failures: 0,
            failures_total: 0,
            retry_at: 0,
            cause: String::new(),
            seen: HostSeen::default(),
            callers: Vec::new(),
            shown: Shown { state: HostState::Cold, ..Shown::default() },
        }
    }

    /// Whether anything of it is there.
    fn is_alive(&self) -> bool {
        self.child.is_some() || (self.sweeping.is_some() && !planted!(SkipsSweep))
    }

    fn is_of(&self, generation: u32) -> bool {
        self.generations.contains(&generation)
    }

    /// Whether somebody waits for it.
    #[cfg(test)]
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.is_some()
    }

    /// A child that nobody has told to go.
    fn serving(&self) -> Option<&Child> {
        self.child.as_ref().filter(|child| child.ending.is_none())
    }

    /// Whether it has come up, and its program has not gone from it since.
    fn takes_requests(&self) -> bool {
        self.serving().is_some() && self.ready_at.is_some() && !self.seen.is_down
    }

    fn state(&self) -> HostState {
        match &self.child {
            Some(child) if child.ending.is_some() => HostState::Stopping,
            Some(_) if self.ready_at.is_some() => HostState::Ready,
            Some(_) => HostState::Starting,
            None if !self.cause.is_empty() => HostState::Failed,
            None if self.wanted.is_some() => HostState::Wanted,
            None => HostState::Cold,
        }
    }

    /// Whether the other must be gone before this one starts.
    fn excludes(&self, other: &Self) -> bool {
        let is_replaced = self.rules.name == other.rules.name && !self.rules.overlaps;
        let is_group = self.rules.group.is_some() && self.rules.group == other.rules.group;
        self.row != other.row && (is_replaced || is_group) && !planted!(IgnoresGroups)
    }

    /// Why it would go for another one of its group at this time.
    fn may_yield(&self, floor: Ns, now: Ns) -> bool {
        let since = |at: Ns| now.saturating_sub(at.max(floor));
        let is_idle = !self.seen.is_busy && self.wanted.is_none();
        self.ready_at.is_some_and(|at| (is_idle && since(at) >= STAY) || since(at) >= TURN)
    }

    fn answer(&mut self, wish: Wish, outcome: &Result<u32, Refusal>, out: &mut Vec<Action>) {
        self.callers.retain(|(caller, wants)| {
            if *wants == wish {
                out.push(Action::Answer { caller: *caller, outcome: outcome.clone() });
            }
            *wants != wish
        });
    }

    fn count_start(&self, outcome: HostStart, born: Ns, now: Ns, out: &mut Vec<Action>) {
        let took = now.saturating_sub(born);
        out.push(Action::Count(Tally::HostStart { host: self.row, outcome, took }));
    }

    /// Shows what is to be seen of it, if that has changed.
    fn show(&mut self, generation: u32, out: &mut Vec<Action>) {
        let shown = Shown {
            state: self.state(),
            failures: self.failures_total,
            retry_at: self.retry_at,
            is_retired: !self.is_of(generation),
            cause: self.cause.clone(),
        };
        if shown != self.shown {
            self.shown = shown.clone();
            out.push(Action::ShowHost { host: self.row, shown });
        }
    }

    /// Tells its child to go. The row says so first, see above.
    fn end(&mut self, why: Initiator, generation: u32, now: Ns, out: &mut Vec<Action>) {
        let grace = self.rules.grace;
        let Some(child) = self.child.as_mut().filter(|child| child.ending.is_none()) else { return };
        child.ending = Some(why);
        self.show(generation, out);
        if let Some(child) = &mut self.child {
            let kill_at = now.saturating_add(child.patience()).saturating_add(grace);
            child.tell(why, Sig::Term, kill_at, out);
        }
    }
}

impl State {
    /// The hosts of the generation that comes into force.
    pub(super) fn adopt_hosts(&mut self, all: &[HostRules], now: Ns, out: &mut Vec<Action>) {
        let generation = self.generation;
        for rules in all {
            let known = self.hosts.iter().position(|host| host.rules.fingerprint == rules.fingerprint);
            let at = match known.filter(|_| !planted!(ReplacesAll)) {
                Some(at) => at,
                None => {
                    let is_free = |row: &u32| !self.hosts.iter().any(|host| host.row == *row);
                    let Some(row) = (0..evergate_board::HOSTS_MAX).find(is_free) else {
                        out.push(Action::Say(format!("no room is left for the program \"{}\"", rules.name)));
                        continue;
                    };
                    let (name, fingerprint) = (rules.name.clone(), rules.fingerprint);
                    out.push(Action::AddHost { host: row, name, fingerprint });
                    self.hosts.push(Host::new(rules.clone(), row));
                    self.hosts.len() - 1
                }
            };
            let Some(host) = self.hosts.get_mut(at) else { continue };
            host.generations.push(generation);
            if host.rules.is_preloaded && host.serving().is_none() {
                host.wanted.get_or_insert(now);
            }
        }
    }

    /// Takes over what the board shows.
    pub(super) fn hosts_seen(&mut self, all: &[HostSeen], now: Ns, out: &mut Vec<Action>) {
        let generation = self.generation;
        for seen in all {
            let Some(host) = self.hosts.iter_mut().find(|host| host.row == seen.host) else { continue };
            host.seen = *seen;
            let is_serving = host.serving().is_some();
            if seen.is_wanted && !is_serving && !planted!(LosesWant) {
                host.wanted.get_or_insert(now);
            }
            let epoch = host.serving().map(|child| child.epoch);
            if epoch == Some(seen.ready_epoch) && host.ready_at.is_none() {
                host.count_start(HostStart::Ready, host.serving().map_or(now, |child| child.born), now, out);
                host.ready_at = Some(now);
                host.wanted = None;
                host.cause.clear();
                // Who hears of it may ask at once, and the worker looks at the row.
                host.show(generation, out);
            }
            if host.takes_requests() {
                host.answer(Wish::Load, &Ok(seen.ready_epoch), out);
            }
            if host.ready_at.is_some_and(|at| now.saturating_sub(at) >= HEALTHY) {
                host.failures = 0;
            }
        }
    }

    /// Whatever is to be done for the hosts at this time.
    pub(super) fn follow_hosts(&mut self, now: Ns, out: &mut Vec<Action>) {
        if self.hosts.is_empty() {
            return;
        }
        self.forget_generations(now, out);
        self.end_hosts(now, out);
        if self.may_start_hosts() {
            self.start_hosts(now, out);
        } else {
            self.hosts.iter_mut().for_each(|host| host.answer(Wish::Load, &Err(Refusal::failed(STOPPING)), out));
        }
        let generation = self.generation;
        self.hosts.iter_mut().for_each(|host| host.show(generation, out));
    }

    /// Workers ask for hosts until the last of them has gone.
    fn may_start_hosts(&self) -> bool {
        match &self.phase {
            Phase::Starting | Phase::Serving => true,
            Phase::Stopping(stop) => stop.starts_hosts(),
            Phase::Ended => false,
        }
    }

    /// Generations without workers need nothing; hosts of none are no hosts any more.
    fn forget_generations(&mut self, now: Ns, out: &mut Vec<Action>) {
        let mut living: Vec<u32> = self.workers().map(|child| child.generation).collect();
        living.push(self.generation);
        for host in &mut self.hosts {
            if !planted!(DropsNeeded) {
                host.generations.retain(|generation| living.contains(generation));
            } else {
                host.generations.retain(|generation| Some(generation) == living.last());
            }
            if host.sweeping.is_some_and(|(_, until)| until <= now) {
                host.sweeping = None;
                let name = &host.rules.name;
                out.push(Action::Say(format!("programs of \"{name}\" cannot be ended; they are left alone")));
            }
        }
        let generation = self.generation;
        self.hosts.retain_mut(|host| {
            if !host.is_of(generation) {
                let why = "the configuration has changed: it is not there any more, or another";
                host.answer(Wish::Load, &Err(Refusal::failed(why)), out);
            }
            let is_over = host.generations.is_empty() && host.child.is_none() && host.sweeping.is_none();
            if is_over {
                out.push(Action::DropHost { host: host.row });
            }
            !is_over
        });
    }

    fn workers(&self) -> impl Iterator<Item = &Child> {
        self.children().filter(|child| child.kind == Kind::Worker)
    }

    /// Ends those that nobody needs, and kills those whose start takes too long.
    fn end_hosts(&mut self, now: Ns, out: &mut Vec<Action>) {
        let (generation, floor) = (self.generation, self.floor);
        let coming = self.reload.as_ref().map_or(&[][..], |reload| reload.hosts());
        for host in &mut self.hosts {
            let is_coming = coming.iter().any(|rules| rules.fingerprint == host.rules.fingerprint);
            let Some(child) = host.serving() else { continue };
            let (epoch, age) = (child.epoch, now.saturating_sub(child.born.max(floor)));
            let has_asked = host.seen.idle_epoch == epoch && host.ready_at.is_some() && !host.rules.is_preloaded;
            let is_idle = !host.seen.is_busy || planted!(EndsBusy);
            if host.generations.is_empty() && !is_coming {
                host.end(Initiator::Reload, generation, now, out);
            } else if has_asked && is_idle && host.wanted.is_none() {
                host.end(Initiator::Idle, generation, now, out);
            } else if host.ready_at.is_none() && age > host.rules.start.saturating_add(START_SLACK) {
                let name = &host.rules.name;
                out.push(Action::Say(format!("the program of \"{name}\" was not ready in time, nor did its host end")));
                if let Some(child) = &mut host.child {
                    child.end(Initiator::Boot, now);
                }
            }
        }
    }

    /// Starts those that are wanted, longest wanted first, and makes room for them.
    fn start_hosts(&mut self, now: Ns, out: &mut Vec<Action>) {
        let mut wanted: Vec<(Ns, u32)> = Vec::new();
        for at in 0..self.hosts.len() {
            let may_start = self.hosts.get(at).is_some_and(|host| self.may_start(host));
            let Some(host) = self.hosts.get_mut(at) else { continue };
            if !may_start {
                // Who asks for it goes to the one that has replaced it.
                host.wanted = None;
            }
            let is_due = host.retry_at <= now || planted!(NoHostPause);
            if let Some(since) = host.wanted.filter(|_| is_due && !host.is_alive()) {
                wanted.push((since, host.row));
            }
        }
        wanted.sort_unstable();
        for (_, row) in wanted {
            self.start_host(row, now, out);
        }
    }

    /// One that the configuration in force does not have is started for the workers of before, unless another one of its
    /// name has taken its place, beside which there may be none.
    fn may_start(&self, host: &Host) -> bool {
        let has_successor = |other: &Host| {
            let is_named = other.rules.name == host.rules.name && other.row != host.row;
            is_named && other.is_of(self.generation) && !other.rules.overlaps
        };
        host.is_of(self.generation) || (!host.generations.is_empty() && !self.hosts.iter().any(has_successor))
    }

    fn start_host(&mut self, row: u32, now: Ns, out: &mut Vec<Action>) {
        let (generation, floor) = (self.generation, self.floor);
        let Some(at) = self.hosts.iter().position(|host| host.row == row) else { return };
        let Some(host) = self.hosts.get(at) else { return };
        let in_the_way: Vec<u32> =
            self.hosts.iter().filter(|other| host.excludes(other) && other.is_alive()).map(|other| other.row).collect();
        let name = host.rules.name.clone();
        let Some(of) = host.generations.iter().copied().max() else { return };
        if !in_the_way.is_empty() {
            for other in self.hosts.iter_mut().filter(|other| in_the_way.contains(&other.row)) {
                if other.rules.name == name && !other.is_of(generation) {
                    other.end(Initiator::Reload, generation, now, out);
                } else if other.may_yield(floor, now) {
                    other.end(Initiator::Group, generation, now, out);
                }
            }
            return;
        }
        let rows = self.given.rows..self.given.rows.saturating_add(self.given.host_rows);
        let is_taken = |row: &u32| self.children().any(|child| child.row == *row);
        // One that is told to go leaves its row.
        let Some(child_row) = rows.into_iter().find(|row| !is_taken(row)) else { return };
        // What its own configuration promises; one of before is there for the sake of its workers.
        let of_before = self.workers().find(|worker| worker.generation == of && of != generation);
        let rules = of_before.map_or(self.rules, |worker| worker.rules);
        let child = self.bear((Kind::Host, row, child_row), of, rules, now, out);
        if let Some(host) = self.hosts.get_mut(at) {
            host.child = Some(Child { upstream: name, ..child });
            host.ready_at = None;
            host.wanted = None;
            host.seen = HostSeen { host: row, ..HostSeen::default() };
        }
    }

    /// A host has ended and was buried: its programs are looked for, and its row says what comes next.
    pub(super) fn host_ended(
        &mut self,
        at: usize,
        child: &Child,
        (status, note): (Status, &str),
        now: Ns,
        out: &mut Vec<Action>,
    ) {
        let until = now.saturating_add(SWEEP_TIME);
        if let Some(host) = self.hosts.get_mut(at) {
            host.sweeping = Some((child.epoch, until));
            out.push(Action::Sweep { epoch: child.epoch });
        }
        let is_planned =
            matches!(child.ending, Some(Initiator::Operator | Initiator::Reload | Initiator::Idle | Initiator::Group));
        self.host_is_gone(at, child, (!is_planned).then(|| cause(child, status, note)), now, out);
    }

    /// One that could not even be started.
    pub(super) fn host_unborn(&mut self, at: usize, child: &Child, why: &str, now: Ns, out: &mut Vec<Action>) {
        self.host_is_gone(at, child, Some(format!("its host could not be started: {why}")), now, out);
    }

    fn host_is_gone(&mut self, at: usize, child: &Child, failed: Option<String>, now: Ns, out: &mut Vec<Action>) {
        let jitter = self.random();
        let Some(host) = self.hosts.get_mut(at) else { return };
        let was_ready = host.ready_at.take().is_some();
        if !was_ready {
            let outcome = if failed.is_some() { HostStart::Failed } else { HostStart::Stopped };
            host.count_start(outcome, child.born, now, out);
        }
        host.answer(Wish::Unload, &Ok(child.epoch), out);
        let Some(cause) = failed else {
            // Who waited for its next program waits in vain.
            if was_ready {
                host.answer(Wish::Load, &Err(Refusal::failed("it was stopped")), out);
            }
            return;
        };
        host.failures = host.failures.saturating_add(1);
        host.failures_total = host.failures_total.saturating_add(1);
        host.retry_at = now.saturating_add(backoff(host.failures, jitter));
        // Connections that wait in its socket have nobody to ask for them again.
        if was_ready || host.rules.is_preloaded {
            host.wanted.get_or_insert(now);
        }
        out.push(Action::Say(format!("the program of \"{}\" has failed: {cause}", host.rules.name)));
        host.answer(Wish::Load, &Err(Refusal::failed(cause.clone())), out);
        host.cause = cause;
    }

    /// Nothing is left of the programs of a buried host.
    pub(super) fn swept(&mut self, epoch: u32) {
        for host in &mut self.hosts {
            host.sweeping.take_if(|(swept, _)| *swept == epoch);
        }
    }

    /// Nobody could have ended them meanwhile.
    pub(super) fn excuse_sweeps(&mut self, gap: Ns) {
        for (_, until) in self.hosts.iter_mut().filter_map(|host| host.sweeping.as_mut()) {
            *until = until.saturating_add(gap);
        }
    }

    /// `models load`: an operator has it started now, whatever came before.
    pub(super) fn load(&mut self, name: u64, caller: Caller, now: Ns, out: &mut Vec<Action>) {
        if !self.may_start_hosts() {
            return Self::refuse(Some(caller), STOPPING.into(), out);
        }
        let generation = self.generation;
        let is_named = |host: &&mut Host| host.rules.name_hash() == name && host.is_of(generation);
        let Some(host) = self.hosts.iter_mut().find(is_named) else {
            return Self::refuse(Some(caller), "no upstream of that name has a program".into(), out);
        };
        if let Some(child) = host.serving().filter(|_| host.takes_requests()) {
            return out.push(Action::Answer { caller, outcome: Ok(child.epoch) });
        }
        if host.serving().is_none() {
            host.wanted.get_or_insert(now);
            host.retry_at = now;
        }
        host.callers.push((caller, Wish::Load));
    }

    /// `models unload`: an operator has it stopped; the next request starts it again.
    pub(super) fn unload(&mut self, name: u64, caller: Caller, now: Ns, out: &mut Vec<Action>) {
        let generation = self.generation;
        let is_named = |host: &&mut Host| host.rules.name_hash() == name && host.is_of(generation);
        let Some(host) = self.hosts.iter_mut().find(is_named) else {
            return Self::refuse(Some(caller), "no upstream of that name has a program".into(), out);
        };
        host.wanted = None;
        host.answer(Wish::Load, &Err(Refusal::failed("it was unloaded")), out);
        if host.child.is_none() {
            return out.push(Action::Answer { caller, outcome: Ok(0) });
        }
        host.callers.push((caller, Wish::Unload));
        host.end(Initiator::Operator, generation, now, out);
    }

    /// The end of the gateway: the workers have gone.
    pub(super) fn stop_hosts(&mut self, signal: Sig, now: Ns, out: &mut Vec<Action>) {
        for host in &mut self.hosts {
            host.wanted = None;
            host.answer(Wish::Load, &Err(Refusal::failed(STOPPING)), out);
            let grace = host.rules.grace;
            if let Some(child) = &mut host.child {
                // Nobody is left who could have anything to finish.
                let kill_at = now.saturating_add(child.rules.quick()).saturating_add(grace);
                child.tell(Initiator::Operator, signal, kill_at, out);
            }
        }
    }

    /// An operator does not want to wait for them.
    pub(super) fn kill_hosts(&mut self, now: Ns, out: &mut Vec<Action>) {
        for child in self.hosts.iter_mut().filter_map(|host| host.child.as_mut()) {
            child.tell(Initiator::Operator, Sig::Quit, now, out);
        }
    }

    pub(super) fn has_hosts(&self) -> bool {
        self.hosts.iter().any(Host::is_alive)
    }

    /// When the first that waits for its retry time is due, and what is swept is given up.
    pub(super) fn hosts_due(&self) -> Option<Ns> {
        let retries = self.hosts.iter().filter(|host| host.wanted.is_some() && host.child.is_none());
        let sweeps = self.hosts.iter().filter_map(|host| host.sweeping).map(|(_, until)| until);
        // What is overdue waits for another one's end, of which an event tells.
        retries.map(|host| host.retry_at).chain(sweeps).filter(|at| *at > self.last).min()
    }
}

impl HostRules {
    /// What an operator's order calls it.
    pub(crate) fn name_hash(&self) -> u64 {
        name_hash(&self.name)
    }
}

/// FNV-1a, 64 bits.
pub(crate) fn name_hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// A bad end in words; what the host has said about it knows best.
fn cause(child: &Child, status: Status, note: &str) -> String {
    match (child.ending, status) {
        (Some(Initiator::Hang), _) => "its host had stopped beating".to_owned(),
        (Some(Initiator::Boot), _) => "it was not ready in time".to_owned(),
        _ if !note.is_empty() => note.to_owned(),
        (_, Status::Code(code)) => format!("its host ended with exit code {code}"),
        (_, Status::Signal { number, .. }) => format!("its host was ended by signal {number}"),
        (_, Status::Unknown) => "its host ended".to_owned(),
    }
}

/// The pause after so many failures in a row, +-20 %.
fn backoff(failures: u32, random: u64) -> Ns {
    let base = (500 * MS).saturating_mul(1 << failures.saturating_sub(1).min(20)).min(30 * SECOND);
    base / 100 * (80 + random % 41)
}
