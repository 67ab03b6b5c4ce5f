//! Permits of upstreams with `in_flight_max`: who may call one, over all workers, and the line of those that wait.
//!
//! The permits themselves are on the board (`board/permits.rs`). Each worker serves its own line in the order of arrival;
//! between the workers the oldest goes first, nearly: each shows since when its first has waited, and who could take a
//! permit leaves it for a moment to a peer whose first came clearly earlier. A peer that does not move (stopped, dead, or
//! without a processor) costs that moment and nothing more.
//!
//! Holds INV-PERMIT-1 (ARCHITECTURE.md).

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use evergate_board::{Board, Permits, Slot, monotonic_ns};
use evergate_core::{Deadline, Error, Fault};
use evergate_upstream::clock::{Clock, Sleep};

use super::load::FRESH_NS;
use crate::telemetry::names::{self, Shed};

/// How often the first in line looks whether a peer has given a permit back. Its own worker's wake it.
const LOOK: Duration = Duration::from_millis(2);
/// A peer's first goes before ours when it came this much earlier: ages that differ by less are the same.
const EARLIER_NS: u64 = 10_000_000;
/// How long a free permit is left to such a peer, which looks every [`LOOK`].
const GRACE_NS: u64 = 5_000_000;
/// How long nobody is yielded to after a grace in vain: on a crowded machine even a healthy peer may be that late.
const RUDE_NS: u64 = 50_000_000;
/// Calls that must have ended before the time of the next ones is foretold.
const MEASURED_LEAST: u32 = 8;

/// One upstream's limit, as a worker sees it.
#[derive(Debug)]
pub struct Limit {
    board: Board,
    row: u32,
    generation: u32,
    permits: Permits,
    label: u16,
    max: u32,
    queue: u32,
    clock: Clock,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    next: u64,
    /// By the order of arrival.
    waiting: BTreeMap<u64, Waiter>,
    /// Permits for those whose turn has come and who have not been polled since.
    granted: BTreeMap<u64, Slot>,
    hold: Hold,
    /// Since when a free permit is left to a peer.
    yields_since: Option<u64>,
    rude_until: u64,
}

#[derive(Debug)]
struct Waiter {
    since_ns: u64,
    waker: Waker,
}

/// How long permits are held: the mean, the last ones weighing most.
#[derive(Debug, Default)]
struct Hold {
    mean_ns: u64,
    measured: u32,
}

impl Hold {
    fn add(&mut self, ns: u64) {
        let mean = self.mean_ns;
        self.mean_ns = if self.measured == 0 { ns } else { mean.saturating_sub(mean / 8).saturating_add(ns / 8) };
        self.measured = self.measured.saturating_add(1);
    }

    /// How long a request will wait that has so many before it: each permit serves one after the other. None while too
    /// little is known.
    fn wait_ns(&self, ahead: u64, permits: u32) -> Option<u64> {
        if self.measured < MEASURED_LEAST {
            return None;
        }
        self.mean_ns.saturating_mul(ahead.saturating_add(1)).checked_div(permits.into())
    }
}

/// What a peer's line makes of a chance to take a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Take it.
    Ours,
    /// Leave it.
    Theirs,
}

/// Whose turn it is when `free` permits are free and the first of so many peers came clearly earlier. Pure but for what it
/// remembers in the line.
fn turn(line: &mut Line, free: u32, earlier: u32, now: u64) -> Turn {
    if earlier == 0 || now < line.rude_until || free > earlier {
        line.yields_since = None;
        return Turn::Ours;
    }
    if free == 0 {
        line.yields_since = None;
        return Turn::Theirs;
    }
    let since = *line.yields_since.get_or_insert(now);
    if now.saturating_sub(since) < GRACE_NS {
        return Turn::Theirs;
    }
    line.yields_since = None;
    line.rude_until = now.saturating_add(RUDE_NS);
    Turn::Ours
}

impl Limit {
    /// The limit of `max` calls to an upstream, and a line of at most `queue` in this worker, which owns `row`; none when
    /// the board has no room for it.
    #[must_use]
    pub fn new(
        board: &Board,
        (row, epoch): (u32, u32),
        upstream: &str,
        (max, queue): (u32, u32),
        clock: Clock,
    ) -> Option<Arc<Self>> {
        let permits = board.permits(upstream, (row, epoch))?;
        let generation = board.child(row)?.generation();
        let (board, label) = (board.clone(), board.label(upstream));
        Some(Arc::new(Self { board, row, generation, permits, label, max, queue, clock, line: Mutex::default() }))
    }

    /// A permit, if one is free and nobody waits for it.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Box<Permit>> {
        let mut line = self.lock();
        let woken = self.grant(&mut line);
        let slot = if line.waiting.is_empty() { self.try_take(&mut line, monotonic_ns()) } else { None };
        drop(line);
        woken.into_iter().for_each(Waker::wake);
        slot.map(|slot| self.permit(slot))
    }

    /// A permit, waited for in turn until the deadline. Dropping the future leaves the line.
    ///
    /// # Errors
    /// Why there is none: at once when the line is full or the deadline will most likely come first, else when it has come.
    pub async fn wait(self: &Arc<Self>, deadline: Deadline) -> Result<Box<Permit>, Shed> {
        let waiting = Waiting::enter(self, deadline)?;
        let mut look: Option<Sleep> = None;
        let taking = poll_fn(|cx| {
            loop {
                match waiting.poll(cx) {
                    Poll::Ready(Some(slot)) => return Poll::Ready(self.permit(slot)),
                    // Who has somebody before him is woken by that one's leaving.
                    Poll::Ready(None) => return Poll::Pending,
                    Poll::Pending => {}
                }
                let sleep = look.get_or_insert_with(|| self.clock.sleep(LOOK));
                if Pin::new(sleep).poll(cx).is_pending() {
                    return Poll::Pending;
                }
                look = None;
            }
        });
        self.clock.timeout_at(deadline.at(), taking).await.map_err(|_| Shed::OutOfTime)
    }

    /// Counts a request that this upstream's limit has kept from it.
    pub fn count(&self, shed: Shed) {
        if let Some(series) = self.board.series(self.row) {
            series.add(names::key(names::SHED, shed as u16, self.label, 0), 1);
        }
    }

    /// Whether nobody in this worker has a permit or waits for one.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.lock().waiting.is_empty() && self.permits.held_here() == 0
    }

    fn permit(self: &Arc<Self>, slot: Slot) -> Box<Permit> {
        Box::new(Permit { limit: Arc::clone(self), slot: Some(slot), taken: Instant::now() })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Line> {
        // Each change leaves the line whole.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the configuration in force counts for all workers, so that one which drains keeps to a new number.
    /// Called with each beat, too: where nobody asks, a line in an old worker still goes on by it.
    pub fn settle_max(&self) {
        let there = self.permits.max();
        if there != self.max && (there == 0 || self.board.master().generation() == self.generation) {
            self.permits.set_max(self.max);
        }
    }

    /// Peers with a line: since when their first waits, and how many do.
    fn peers(&self, now: u64) -> impl Iterator<Item = (u64, u64)> {
        let is_fresh = move |beat_ns| now.saturating_sub(beat_ns) <= FRESH_NS;
        let fresh = self.permits.peers_waiting().filter(move |(child, ..)| is_fresh(child.beat_ns()));
        fresh.map(|(_, waiting, since_ns)| (since_ns, waiting))
    }

    /// Takes a permit for whoever has waited since then, if it is his turn.
    fn try_take(&self, line: &mut Line, since_ns: u64) -> Option<Slot> {
        self.settle_max();
        let now = monotonic_ns();
        let is_earlier = |(since, _): &(u64, u64)| since.saturating_add(EARLIER_NS) < since_ns;
        let earlier = u32::try_from(self.peers(now).filter(is_earlier).count()).unwrap_or(u32::MAX);
        // Counted only where it matters.
        let free = if earlier == 0 { 0 } else { self.permits.free() };
        if turn(line, free, earlier, now) == Turn::Theirs {
            return None;
        }
        self.permits.take()
    }

    /// Gives those that wait what is free, as far as it is their turn; gives who is to be woken. Whoever comes by does this
    /// for all of them: on a worker with much to do each is polled seldom, and one after the other would leave permits idle.
    fn grant(&self, line: &mut Line) -> Vec<Waker> {
        let mut woken = Vec::new();
        while let Some((number, since_ns)) = line.waiting.first_key_value().map(|(number, one)| (*number, one.since_ns))
            && let Some(slot) = self.try_take(line, since_ns)
        {
            woken.extend(line.waiting.remove(&number).map(|one| one.waker));
            line.granted.insert(number, slot);
        }
        if !woken.is_empty() {
            self.show(line);
            // Who is the first now looks for permits of peers.
            woken.extend(line.waiting.values().next().map(|first| first.waker.clone()));
        }
        woken
    }

    /// Whether a request that comes now will most likely wait for longer than it has time.
    fn is_too_late(&self, line: &Line, deadline: Deadline) -> bool {
        let own = u64::try_from(line.waiting.len()).unwrap_or(u64::MAX);
        let ahead = self.peers(monotonic_ns()).fold(own, |sum, (_, waiting)| sum.saturating_add(waiting));
        let left = deadline.at().saturating_duration_since(Instant::now());
        line.hold.wait_ns(ahead, self.permits.max()).is_some_and(|ns| u128::from(ns) > left.as_nanos())
    }

    fn show(&self, line: &Line) {
        let since_ns = line.waiting.values().next().map_or(0, |first| first.since_ns);
        self.permits.show_waiting(u32::try_from(line.waiting.len()).unwrap_or(u32::MAX), since_ns);
    }

    fn give(&self, slot: Slot, held: Duration) {
        self.permits.give(slot);
        let mut line = self.lock();
        line.hold.add(u64::try_from(held.as_nanos()).unwrap_or(u64::MAX));
        let woken = self.grant(&mut line);
        drop(line);
        woken.into_iter().for_each(Waker::wake);
    }
}

/// The right to one call; dropping it gives it back.
#[derive(Debug)]
pub struct Permit {
    limit: Arc<Limit>,
    slot: Option<Slot>,
    taken: Instant,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.limit.give(slot, self.taken.elapsed());
        }
    }
}

/// A place in the line; dropping it leaves the line.
struct Waiting<'a> {
    limit: &'a Limit,
    number: u64,
}

impl<'a> Waiting<'a> {
    fn enter(limit: &'a Limit, deadline: Deadline) -> Result<Self, Shed> {
        let mut line = limit.lock();
        if line.waiting.len() >= usize::try_from(limit.queue).unwrap_or(usize::MAX) {
            return Err(Shed::QueueFull);
        }
        if limit.is_too_late(&line, deadline) {
            return Err(Shed::TooLate);
        }
        let (number, since_ns) = (line.next, monotonic_ns());
        line.next = number.wrapping_add(1);
        line.waiting.insert(number, Waiter { since_ns, waker: Waker::noop().clone() });
        limit.show(&line);
        Ok(Self { limit, number })
    }

    /// Ready with a permit, or without one for who is not the first; pending for the first.
    fn poll(&self, cx: &Context<'_>) -> Poll<Option<Slot>> {
        let mut line = self.limit.lock();
        if let Some(own) = line.waiting.get_mut(&self.number) {
            own.waker.clone_from(cx.waker());
        }
        let woken = self.limit.grant(&mut line);
        let slot = line.granted.remove(&self.number);
        let is_first = line.waiting.first_key_value().is_some_and(|(number, _)| *number == self.number);
        drop(line);
        woken.into_iter().for_each(Waker::wake);
        match slot {
            Some(slot) => Poll::Ready(Some(slot)),
            None if is_first => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut line = self.limit.lock();
        let was_first = line.waiting.first_key_value().is_some_and(|(number, _)| *number == self.number);
        let own = line.waiting.remove(&self.number);
        if let Some(slot) = line.granted.remove(&self.number) {
            self.limit.permits.give(slot);
        }
        self.limit.show(&line);
        let mut woken = self.limit.grant(&mut line);
        woken.extend(line.waiting.values().next().filter(|_| was_first).map(|first| first.waker.clone()));
        drop(line);
        // Outside the lock: it may be the last thing that holds a task.
        drop(own);
        woken.into_iter().for_each(Waker::wake);
    }
}

impl Shed {
    /// What the client is told.
    #[must_use]
    pub fn error(self, upstream: &str) -> Error {
        let why = match self {
            Self::QueueFull | Self::NextTarget => "and as many wait for one to end as may (in_flight_max, queue)",
            Self::TooLate => {
                "and the wait for one to end would be longer than the request's time (in_flight_max, timeouts)"
            }
            Self::OutOfTime => "and none ended in time for this request (in_flight_max, timeouts)",
        };
        let message = format!("the upstream \"{upstream}\" has as many calls under way as it may, {why}; try again");
        Error::new(Fault::Overloaded, message)
    }
}

#[cfg(test)]
mod tests;
