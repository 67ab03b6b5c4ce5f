//! Which process gets the next request, and when there should be more of them, fewer or others. Pure: time is passed in.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// After a start that failed, doubled with each one more.
const BACKOFF: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// One that ends sooner without having had a request has failed at its start.
const PROVED: Duration = Duration::from_secs(10);
/// A process beyond the fewest is ended when it has had nothing to do for so long.
const SPARE: Duration = Duration::from_secs(60);

/// A process, by the order of starts.
pub(crate) type Number = u64;
/// A request that waits.
pub(crate) type Ticket = u64;

/// What the section says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) min: u32,
    pub(crate) max: u32,
    /// Requests at once, over all processes.
    pub(crate) in_flight_max: u32,
    pub(crate) queue: u32,
    pub(crate) requests_max: u32,
    pub(crate) lifetime_max: Duration,
    pub(crate) rss_max: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Start(Number),
    Give {
        ticket: Ticket,
        to: Number,
    },
    /// It has nothing to do, and will have nothing.
    Drain(Number),
    /// No process will come for it soon.
    Refuse(Ticket),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Starting,
    Ready,
    /// Gets nothing more, and is drained when it has nothing.
    Retiring,
    /// On its way out.
    Ending,
}

#[derive(Clone, Copy, Debug)]
struct Process {
    stage: Stage,
    /// Requests it takes at once.
    places: u32,
    taken: u32,
    /// Requests it was given.
    given: u32,
    since: Instant,
    /// When it last had something to do.
    used: Instant,
    /// What it is replaced after, of its own so that not all are replaced at once.
    requests_max: Option<u32>,
    until: Option<Instant>,
    is_fat: bool,
}

impl Process {
    fn is_due(&self, now: Instant) -> bool {
        self.is_fat
            || self.requests_max.is_some_and(|max| self.given >= max)
            || self.until.is_some_and(|until| now >= until)
    }

    /// Whether it serves, and is to go on serving.
    fn is_fresh(&self, now: Instant) -> bool {
        self.stage == Stage::Ready && !self.is_due(now)
    }
}

/// The processes of a model and the line before them.
#[derive(Debug)]
pub(crate) struct Rule {
    settings: Settings,
    processes: BTreeMap<Number, Process>,
    line: VecDeque<Ticket>,
    next: u64,
    /// Starts that failed since one was good.
    failures: u32,
    not_before: Instant,
    is_stopping: bool,
    dice: u64,
}

impl Rule {
    pub(crate) fn new(settings: Settings, now: Instant, seed: u64) -> Self {
        Self {
            settings,
            processes: BTreeMap::new(),
            line: VecDeque::new(),
            next: 1,
            failures: 0,
            not_before: now,
            is_stopping: false,
            dice: seed | 1,
        }
    }

    /// A request comes. None when the line is full. One that comes again, because its process died before it was told of
    /// it, has its turn already.
    pub(crate) fn enter(&mut self, is_again: bool) -> Option<Ticket> {
        let room = self.settings.queue as usize + self.count(|process| process.stage == Stage::Starting);
        if !is_again && self.line.len() >= room && !self.has_place() {
            return None;
        }
        let ticket = self.number();
        if is_again {
            self.line.push_front(ticket)
        } else {
            self.line.push_back(ticket)
        }
        Some(ticket)
    }

    /// A request that waits leaves.
    pub(crate) fn leave(&mut self, ticket: Ticket) {
        self.line.retain(|other| *other != ticket);
    }

    /// A process can take requests.
    pub(crate) fn ready(&mut self, number: Number, places: u32, now: Instant) {
        let scale = self.jitter();
        let Settings { requests_max, lifetime_max, .. } = self.settings;
        if let Some(process) = self.processes.get_mut(&number).filter(|process| process.stage == Stage::Starting) {
            let requests = u64::from(requests_max) * scale / 1000;
            process.requests_max = (requests_max > 0).then(|| u32::try_from(requests).unwrap_or(u32::MAX).max(1));
            let lifetime = lifetime_max.mul_f64(f64::from(u32::try_from(scale).unwrap_or(1000)) / 1000.0);
            process.until = (!lifetime_max.is_zero()).then(|| now + lifetime);
            (process.stage, process.places, process.since, process.used) = (Stage::Ready, places, now, now);
        }
    }

    /// A start came to nothing; what there is of it is being ended.
    pub(crate) fn failed(&mut self, number: Number, now: Instant) {
        if let Some(process) = self.processes.get_mut(&number) {
            process.stage = Stage::Ending;
            self.back_off(now);
        }
    }

    /// A process has a place more; `rss` is its resident set, zero if nobody has looked.
    pub(crate) fn free(&mut self, number: Number, rss: u64, now: Instant) {
        let rss_max = self.settings.rss_max;
        if let Some(process) = self.processes.get_mut(&number) {
            process.taken = process.taken.saturating_sub(1);
            process.used = now;
            process.is_fat |= rss_max > 0 && rss > rss_max;
        }
    }

    /// A request was answered: the program works.
    pub(crate) fn answered(&mut self) {
        self.failures = 0;
    }

    /// A process is to get nothing more.
    pub(crate) fn retire(&mut self, number: Number) {
        if let Some(process) = self.processes.get_mut(&number).filter(|process| process.stage == Stage::Ready) {
            process.stage = Stage::Retiring;
        }
    }

    /// A process is being ended, by whomever.
    pub(crate) fn ending(&mut self, number: Number, now: Instant) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        let was = std::mem::replace(&mut process.stage, Stage::Ending);
        let is_unproved = process.given == 0 && now.saturating_duration_since(process.since) < PROVED;
        if was == Stage::Ready && is_unproved {
            self.back_off(now);
        }
    }

    /// Nothing of a process is left.
    pub(crate) fn gone(&mut self, number: Number) {
        self.processes.remove(&number);
    }

    /// No request is taken any more, and every process ends when it has none.
    pub(crate) fn stop(&mut self) {
        self.is_stopping = true;
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    /// Whether the next process has to wait because others have failed.
    pub(crate) fn is_backing_off(&self, now: Instant) -> bool {
        self.failures > 0 && now < self.not_before
    }

    /// Whether nobody serves or is about to, because others have failed.
    pub(crate) fn is_hopeless(&self, now: Instant) -> bool {
        self.is_backing_off(now) && self.count(|process| matches!(process.stage, Stage::Starting | Stage::Ready)) == 0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.processes.is_empty()
    }

    pub(crate) fn has_ready(&self) -> bool {
        self.processes.values().any(|process| process.stage == Stage::Ready)
    }

    /// Requests that processes work on, and those that wait.
    pub(crate) fn load(&self) -> (u32, u32) {
        (self.taken(), u32::try_from(self.line.len()).unwrap_or(u32::MAX))
    }

    /// What is to be done now. It counts as done.
    pub(crate) fn decide(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        self.replace(now);
        self.give(now, &mut actions);
        self.start(now, &mut actions);
        self.refuse(now, &mut actions);
        for (number, process) in &mut self.processes {
            let is_done = process.stage == Stage::Retiring && process.taken == 0;
            if is_done || (self.is_stopping && process.stage == Stage::Starting) {
                process.stage = Stage::Ending;
                actions.push(Action::Drain(*number));
            }
        }
        actions
    }

    /// When there may be something to do without anything having happened.
    pub(crate) fn wake(&self, now: Instant) -> Option<Instant> {
        let ready = || self.processes.values().filter(|process| process.stage == Stage::Ready);
        let lives = ready().filter_map(|process| process.until);
        let spares = ready().map(|process| process.used + SPARE);
        lives.chain(spares).chain([self.not_before]).filter(|moment| *moment > now).min()
    }

    /// Ends the service of those that are due, when a successor serves or there is no room for one; and of those too many.
    fn replace(&mut self, now: Instant) {
        let min = self.settings.min as usize;
        let due: Vec<Number> = self.serving().filter(|(_, process)| process.is_due(now)).map(|(at, _)| at).collect();
        for number in due {
            let has_room = self.processes.len() < self.settings.max as usize;
            let is_changing = self.count(|process| process.stage != Stage::Ready) > 0;
            let has_successor = self.count(|process| process.is_fresh(now)) >= min.max(1);
            if has_successor || (!has_room && !is_changing) {
                self.retire(number);
            }
        }
        let spare: Vec<Number> = self
            .serving()
            .filter(|(_, process)| process.taken == 0 && now.saturating_duration_since(process.used) >= SPARE)
            .map(|(at, _)| at)
            .collect();
        for number in spare {
            if self.line.is_empty() && self.count(|process| process.is_fresh(now)) > min {
                self.retire(number);
            }
        }
        if self.is_stopping {
            let all: Vec<Number> = self.serving().map(|(at, _)| at).collect();
            all.into_iter().for_each(|number| self.retire(number));
        }
    }

    /// To the one with the least to do; to those that are due only when nobody else has a place.
    fn give(&mut self, now: Instant, actions: &mut Vec<Action>) {
        while self.taken() < self.settings.in_flight_max && !self.line.is_empty() {
            let free = self.serving().filter(|(_, process)| process.taken < process.places);
            let best = free.min_by_key(|(number, process)| (process.is_due(now), process.taken, *number));
            let Some((to, _)) = best else { break };
            let (Some(ticket), Some(process)) = (self.line.pop_front(), self.processes.get_mut(&to)) else { break };
            (process.taken, process.given, process.used) = (process.taken + 1, process.given.saturating_add(1), now);
            actions.push(Action::Give { ticket, to });
        }
    }

    fn start(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Settings { min, max, in_flight_max, .. } = self.settings;
        while !self.is_stopping && now >= self.not_before && self.processes.len() < max as usize {
            let starting = self.count(|process| process.stage == Stage::Starting);
            let has_due = self.serving().any(|(_, process)| process.is_due(now));
            let fewest = if has_due { min.max(1) } else { min } as usize;
            let is_short = self.count(|process| process.is_fresh(now)) + starting < fewest;
            let is_wanted = self.line.len() > starting && self.taken() < in_flight_max;
            // As long as none has come up again, one at a time.
            if !(is_short || is_wanted) || (self.failures > 0 && starting > 0) {
                break;
            }
            let number = self.number();
            let process = Process {
                stage: Stage::Starting,
                places: 0,
                taken: 0,
                given: 0,
                since: now,
                used: now,
                requests_max: None,
                until: None,
                is_fat: false,
            };
            self.processes.insert(number, process);
            actions.push(Action::Start(number));
        }
    }

    /// Who waits for nothing is told so at once, so that another target may be asked.
    fn refuse(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.is_stopping || self.is_hopeless(now) {
            actions.extend(self.line.drain(..).map(Action::Refuse));
        }
    }

    fn back_off(&mut self, now: Instant) {
        let pause = BACKOFF.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(BACKOFF_MAX);
        self.failures = self.failures.saturating_add(1).min(16);
        self.not_before = now + pause;
    }

    fn serving(&self) -> impl Iterator<Item = (Number, &Process)> {
        let all = self.processes.iter().map(|(number, process)| (*number, process));
        all.filter(|(_, process)| process.stage == Stage::Ready)
    }

    fn count(&self, of: impl Fn(&Process) -> bool) -> usize {
        self.processes.values().filter(|process| of(process)).count()
    }

    fn has_place(&self) -> bool {
        let has_room = self.taken() < self.settings.in_flight_max;
        has_room && self.serving().any(|(_, process)| process.taken < process.places)
    }

    fn taken(&self) -> u32 {
        self.processes.values().map(|process| process.taken).sum()
    }

    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// 900 to 1,100 thousandths (xorshift64).
    fn jitter(&mut self) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        900 + self.dice % 201
    }
}

#[cfg(test)]
mod tests;
