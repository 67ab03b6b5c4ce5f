//! As many workers as the load needs, within the configuration's bounds.
//!
//! The formula, over the workers that are ready and not told to go (those that leave are no capacity):
//!
//! - *backlog* = connections in the accept queues + requests that wait for a slot;
//! - *use* = their weighted requests, a stream counting two, those that wait for a full upstream left out, / (their
//!   number x `slots`);
//! - *lag* = the median of how late their event loops are.
//!
//! Samples are 100 ms apart while there is anything to see. **Up** by 1, 2, 4 ... workers when the backlog is at least
//! `backlog_high`, or above 0 in two samples in a row, or the use is above 80 % in two in a row, or the lag has been
//! above 20 ms for a second. **Down** by one when for `idle_after` the use was below 25 % without backlog and lag. A need
//! that comes back within a minute of a step down doubles that time, to ten minutes at most; twenty minutes without a
//! step restore it.

use evergate_core::exit::{Initiator, Kind};

use super::{Action, MS, Ns, Phase, SECOND, State, planted};

/// Between two samples.
const SAMPLE: Ns = 100 * MS;
/// A turn of the loop that comes this much before its time is a sample as well.
const SLACK: Ns = 10 * MS;
/// Samples in a row that are a need.
const ROW: u32 = 2;
/// A lag above this for [`LAG_TIME`] is a need.
const LAG_HIGH: Ns = 20 * MS;
const LAG_TIME: Ns = SECOND;
/// How long it is looked closely after the last sign of load.
const LIVELY: Ns = SECOND;
/// Workers that start count as help on the way for so long; after that the need is looked at as if there were none.
const START_TIME: Ns = SECOND;
/// Without a need for so long the steps up begin with one worker again.
const CALM: Ns = SECOND;
/// A need that returns so soon after a step down shows that the step was a mistake.
const REGRET: Ns = 60 * SECOND;
/// The longest wait before a step down, unless the configuration's is longer.
const WAIT_MAX: Ns = 600 * SECOND;
/// How long its doublings are remembered after the last step, longer than the wait itself.
const MEMORY: Ns = 2 * WAIT_MAX;

/// What is remembered of the load.
#[derive(Debug, Default)]
pub(super) struct Load {
    sampled: Ns,
    lively_until: Ns,
    /// Samples in a row with a backlog, and with too much in flight.
    backlogged: u32,
    crowded: u32,
    lag_since: Option<Ns>,
    low_since: Option<Ns>,
    needed: Ns,
    /// How often the next step up was doubled.
    ups: u32,
    /// How often the wait before a step down was doubled.
    doublings: u32,
    last_up: Option<Ns>,
    last_down: Option<Ns>,
    is_full_said: bool,
}

impl Load {
    /// Nothing that was seen before counts: the machine stood still, or other workers serve now.
    pub(super) fn forget(&mut self) {
        (self.backlogged, self.crowded) = (0, 0);
        (self.lag_since, self.low_since) = (None, None);
    }
}

/// One look at the workers.
struct Sample {
    workers: u64,
    backlog: u64,
    load: u64,
    capacity: u64,
    lag: Ns,
    rss_kib: u64,
}

impl State {
    /// Whether nothing has happened lately: then a first connection is worth being woken for, and the next look may be
    /// half a second away.
    pub(crate) fn is_quiet(&self) -> bool {
        self.may_follow() && self.load.lively_until <= self.last
    }

    /// Somebody connects: the next second is looked at closely.
    pub(super) fn knocked(&mut self, now: Ns) {
        self.load.lively_until = now.saturating_add(LIVELY);
    }

    pub(super) fn sample_due(&self) -> Option<Ns> {
        let is_lively = self.may_follow() && self.load.lively_until > self.last;
        is_lively.then(|| self.load.sampled.saturating_add(SAMPLE))
    }

    /// Whether there is anything to decide: with a fixed number of workers nobody has to look closely.
    fn may_follow(&self) -> bool {
        matches!(self.phase, Phase::Serving) && self.rules.workers_min < self.rules.workers_max
    }

    /// Looks at the load and changes the number of workers if it has to be changed.
    pub(super) fn follow_load(&mut self, now: Ns, out: &mut Vec<Action>) {
        if !self.may_follow() {
            return;
        }
        if now.saturating_sub(self.load.sampled) < SAMPLE - SLACK {
            // Too soon for a sample, but a worker that wakes us with a backlog does so once.
            if self.has_backlog() {
                self.knocked(now);
            }
            return;
        }
        self.load.sampled = now;
        let sample = self.sample();
        if sample.backlog > 0 || sample.load > 0 || sample.lag > LAG_HIGH {
            self.load.lively_until = now.saturating_add(LIVELY);
        }
        // Without a worker that works it is not for want of capacity.
        if sample.workers == 0 {
            return;
        }
        if self.needs_more(&sample, now) {
            self.load.low_since = None;
            self.grow(&sample, now, out);
        } else {
            self.shrink(&sample, now, out);
        }
    }

    fn has_backlog(&self) -> bool {
        self.queue > 0 || self.slots.iter().filter_map(|slot| slot.worker()).any(|child| child.seen.waiting > 0)
    }

    fn sample(&self) -> Sample {
        let workers = || self.slots.iter().filter_map(|slot| slot.worker());
        let sum =
            |value: fn(&super::Child) -> u64| workers().fold(0_u64, |sum, child| sum.saturating_add(value(child)));
        let count = sum(|_| 1);
        let mut lags: Vec<Ns> = workers().map(|child| child.seen.lag).collect();
        lags.sort_unstable();
        let all = self.children().filter(|child| child.kind == Kind::Worker);
        Sample {
            workers: count,
            backlog: u64::from(self.queue).saturating_add(sum(|child| child.seen.waiting.into())),
            load: sum(|child| child.seen.load.into()),
            capacity: count.saturating_mul(self.rules.slots.into()),
            lag: lags.get(lags.len() / 2).copied().unwrap_or(0),
            // Those that leave have theirs still.
            rss_kib: all.fold(0_u64, |sum, child| sum.saturating_add(child.seen.rss_kib)),
        }
    }

    fn needs_more(&mut self, sample: &Sample, now: Ns) -> bool {
        let count = |row: &mut u32, is_high| *row = if is_high { row.saturating_add(1) } else { 0 };
        let load = &mut self.load;
        count(&mut load.backlogged, sample.backlog > 0);
        count(&mut load.crowded, sample.load.saturating_mul(5) > sample.capacity.saturating_mul(4));
        load.lag_since = (sample.lag > LAG_HIGH).then(|| load.lag_since.unwrap_or(now));
        let is_lagging = load.lag_since.is_some_and(|since| now.saturating_sub(since) >= LAG_TIME);
        let is_high = sample.backlog >= self.rules.backlog_high.into();
        is_high || load.backlogged >= ROW || load.crowded >= ROW || is_lagging
    }

    fn grow(&mut self, sample: &Sample, now: Ns, out: &mut Vec<Action>) {
        if now.saturating_sub(self.load.needed) >= CALM {
            self.load.ups = 0;
        }
        self.load.needed = now;
        let limit = self.rules.rss_total_max_kib;
        let is_full = limit > 0 && sample.rss_kib >= limit;
        if is_full && self.target < self.rules.workers_max && !self.load.is_full_said {
            out.push(Action::Say(format!(
                "more workers are needed, but those that are there have {} MiB, workers.rss_total_max",
                sample.rss_kib / 1024
            )));
        }
        self.load.is_full_said = is_full;
        let is_starting = self.slots.iter().any(|slot| slot.kind == Kind::Worker && slot.worker().is_none());
        let is_help_coming = is_starting && self.load.last_up.is_some_and(|last| now.saturating_sub(last) < START_TIME);
        if is_full || is_help_coming || (self.target >= self.rules.workers_max && !planted!(GrowsBeyond)) {
            return;
        }
        let room = self.rules.workers_max.saturating_sub(self.target).max(u32::from(planted!(GrowsBeyond)));
        let wanted = (1_u32 << self.load.ups.min(10)).min(room);
        let before = self.target;
        for _ in 0..wanted {
            if self.add_worker(now, out).is_none() {
                break;
            }
        }
        if self.load.last_down.take_if(|last| now.saturating_sub(*last) < REGRET).is_some() {
            self.load.doublings = self.load.doublings.saturating_add(1);
        }
        self.load.ups = self.load.ups.saturating_add(1);
        self.load.last_up = Some(now);
        (self.load.backlogged, self.load.crowded, self.load.lag_since) = (0, 0, None);
        out.push(Action::Say(format!(
            "{} workers instead of {before}: {} requests wait, {} of {} places are taken, the loops are {} ms late",
            self.target,
            sample.backlog,
            sample.load,
            sample.capacity,
            sample.lag / MS
        )));
    }

    fn shrink(&mut self, sample: &Sample, now: Ns, out: &mut Vec<Action>) {
        let is_low = sample.load.saturating_mul(4) < sample.capacity && sample.backlog == 0 && sample.lag <= LAG_HIGH;
        if !is_low {
            self.load.low_since = None;
            return;
        }
        let since = *self.load.low_since.get_or_insert(now);
        let steps = [self.load.last_up, self.load.last_down];
        if steps.into_iter().flatten().all(|at| now.saturating_sub(at) >= MEMORY) {
            self.load.doublings = 0;
        }
        let is_starting = self.slots.iter().any(|slot| slot.kind == Kind::Worker && slot.worker().is_none());
        if now.saturating_sub(since) < self.idle_wait()
            || (self.target <= self.floor_workers() && !planted!(ShrinksBelow))
            || (self.target <= 1)
            || is_starting
            || self.reload.is_some()
        {
            return;
        }
        self.load.low_since = Some(now);
        self.load.last_down = Some(now);
        self.remove_worker(Initiator::ScaleDown, now, out);
        out.push(Action::Say(format!("{} workers: one fewer is enough for the load", self.target)));
    }

    /// How long the load must be low before one worker goes.
    fn idle_wait(&self) -> Ns {
        let base = self.rules.idle_after;
        base.saturating_mul(1 << self.load.doublings.min(20)).min(WAIT_MAX.max(base))
    }
}
