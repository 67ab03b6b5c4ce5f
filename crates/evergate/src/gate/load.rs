//! A worker's load beside that of its peers: what it shows of itself on the board, and whether it should leave the next
//! connection to them.
//!
//! A request counts from its head on, a connection from its accept until its first request; a stream counts more than
//! a request that is answered whole, since it stays. The rules are pure functions over [`Share`]s; the rest reads and
//! writes the board.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use evergate_board::{Board, ChildRow, monotonic_ns};
use evergate_core::exit::Kind;
use tokio::sync::Notify;

/// What a request counts that is answered whole.
const UNARY: u32 = 1;
/// A stream holds its place for long, so it counts more.
const STREAM: u32 = 2;
/// A worker leaves a connection to a peer that has so much less. One alone would let two workers pass every connection
/// to and fro; measured even from 2 to 4.
const SLACK: u32 = 2;
/// Below this much no worker is far above its peers: four streams.
const FAR_LEAST: u32 = 8;
/// Beats come every quarter of a second when nothing is to be done; who has missed two is not counted on.
pub(super) const FRESH_NS: u64 = 600_000_000;
/// So long between two of its own beats, a worker was held up: more than an idle one's pause.
const HELD_UP_NS: u64 = FRESH_NS / 2;
/// A peer that has not moved for so long while connections waited for it is stuck: standing still, or out of
/// descriptors. On a crowded machine even a healthy one does not get a processor for some tens of milliseconds.
const STUCK: Duration = Duration::from_millis(100);
/// How long the answer to "far above the peers?" is good for; asked for each answer, worked out two hundred times a
/// second at most.
const FAR_NS: u64 = 5_000_000;

/// What workers compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Requests, weighted, and connections that have not sent one yet.
    pub load: u32,
    /// Client connections, idle ones too.
    pub connections: u32,
    /// Requests that it could begin at once.
    pub spare: u32,
}

impl Share {
    /// Whether the next connection is rather this peer's than `own`'s: its request would wait for a place there and not
    /// here; or the peer has clearly less to do; or not more, and clearly fewer connections, which may all send a request at once.
    #[must_use]
    fn goes_before(self, own: Self) -> bool {
        if (self.spare > 0) != (own.spare > 0) {
            return self.spare > 0;
        }
        let is_below = |peer: u32, own: u32| own.saturating_sub(peer) >= SLACK;
        is_below(self.load, own.load) || (self.load <= own.load && is_below(self.connections, own.connections))
    }
}

/// Whether a worker that holds `own` is far above one that holds `least`: half as much again, and four streams.
fn is_far_above(own: u32, least: u32) -> bool {
    own >= least.saturating_add(FAR_LEAST.max(least / 2))
}

/// A peer that should take the next connection, as it was when that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    row: u32,
    epoch: u32,
    accepted: u64,
    beat_ns: u64,
}

/// Counts a worker's load and shows it.
#[derive(Debug)]
pub struct Load {
    board: Board,
    row: u32,
    /// Places for requests.
    slots: u32,
    connections: AtomicU32,
    /// Connections that have sent a request.
    used: AtomicU32,
    accepted: AtomicU64,
    /// Requests, each once, and weighted.
    count: AtomicU32,
    requests: AtomicU32,
    /// The streams among them, and those that wait, weighted: they stay.
    lasting: AtomicU32,
    /// Those that wait for an upstream, weighted.
    parked: AtomicU32,
    /// The others, in sixteenths, as a mean over beats.
    passing: AtomicU32,
    /// Its last beat; 0 before the first.
    beat_ns: AtomicU64,
    /// For how long it was held up last, and until when it makes allowance for that.
    held_up_ns: AtomicU64,
    allows_until: AtomicU64,
    /// Peers that should have taken a connection, and how long one waited for them.
    waited: Mutex<Vec<(Peer, Duration)>>,
    far_at: AtomicU64,
    is_far: AtomicBool,
    relieved: Notify,
}

impl Load {
    /// The load of the child that owns `row` and has places for so many requests: nothing yet.
    #[must_use]
    pub fn new(board: Board, row: u32, slots: u32) -> Self {
        let load = Self {
            board,
            row,
            slots,
            connections: AtomicU32::new(0),
            used: AtomicU32::new(0),
            accepted: AtomicU64::new(0),
            count: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            lasting: AtomicU32::new(0),
            parked: AtomicU32::new(0),
            passing: AtomicU32::new(0),
            beat_ns: AtomicU64::new(0),
            held_up_ns: AtomicU64::new(0),
            allows_until: AtomicU64::new(0),
            waited: Mutex::default(),
            far_at: AtomicU64::new(0),
            is_far: AtomicBool::new(false),
            relieved: Notify::new(),
        };
        load.show();
        load
    }

    fn child(&self) -> Option<&ChildRow> {
        self.board.child(self.row)
    }

    /// Counts client connections, by one more or less.
    pub fn change_connections(&self, by: i32) {
        change(&self.connections, by);
        self.show();
    }

    /// Counts a connection that was accepted. It is among the connections already.
    pub fn count_accepted(&self) {
        let accepted = self.accepted.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if let Some(child) = self.child() {
            child.set_accepted(accepted);
        }
    }

    /// What it shows to others.
    fn own(&self) -> Share {
        let connections = self.connections.load(Ordering::Relaxed);
        let fresh = connections.saturating_sub(self.used.load(Ordering::Relaxed));
        let taken = self.count.load(Ordering::Relaxed).saturating_add(fresh);
        let spare = self.slots.saturating_sub(taken);
        Share { load: self.requests.load(Ordering::Relaxed).saturating_add(fresh), connections, spare }
    }

    fn show(&self) {
        let Some(child) = self.child() else { return };
        let (own, requests) = (self.own(), self.requests.load(Ordering::Relaxed));
        child.set_load(requests);
        child.set_fresh(own.load.saturating_sub(requests));
        child.set_connections(own.connections);
        child.set_spare(own.spare);
        child.set_held(self.held());
        child.set_parked(self.parked.load(Ordering::Relaxed));
    }

    fn held(&self) -> u32 {
        self.lasting.load(Ordering::Relaxed).saturating_add(self.passing.load(Ordering::Relaxed) / 16)
    }

    /// Takes the beat's look at what comes and goes quickly: a moment's count of it says nothing.
    pub fn beat(&self) {
        let now = self.requests.load(Ordering::Relaxed).saturating_sub(self.lasting.load(Ordering::Relaxed));
        let mean = self.passing.load(Ordering::Relaxed);
        // A quarter of the new one: four beats, four tenths of a second under load.
        let next = mean.saturating_sub(mean.div_ceil(4)).saturating_add(now.saturating_mul(4));
        self.passing.store(next, Ordering::Relaxed);
        self.show();
    }

    /// Shows that the worker's event loop turns.
    pub fn show_beat(&self) {
        let now = monotonic_ns();
        self.note_beat(now);
        if let Some(child) = self.child() {
            child.set_beat_ns(now);
        }
    }

    fn note_beat(&self, now: u64) {
        let silent = self.silent_ns(now);
        if silent > HELD_UP_NS {
            self.held_up_ns.store(silent, Ordering::Relaxed);
            self.allows_until.store(now.saturating_add(FRESH_NS), Ordering::Relaxed);
        }
        self.beat_ns.store(now, Ordering::Relaxed);
    }

    /// How long its own last beat is ago.
    fn silent_ns(&self, now: u64) -> u64 {
        match self.beat_ns.load(Ordering::Relaxed) {
            0 => 0,
            beat => now.saturating_sub(beat),
        }
    }

    /// How old the beat of a peer may be that is there. Whatever held this worker up may have held up all: nobody's beat is
    /// fresh then, and whoever wakes first would take everything that waits.
    fn believed_ns(&self, now: u64) -> u64 {
        let silent = self.silent_ns(now);
        if silent > HELD_UP_NS {
            return FRESH_NS.saturating_add(silent);
        }
        let is_past = now >= self.allows_until.load(Ordering::Relaxed);
        if is_past { FRESH_NS } else { FRESH_NS.saturating_add(self.held_up_ns.load(Ordering::Relaxed)) }
    }

    /// Whether anything is to be done, or was a moment ago.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.own().load == 0 && self.held() == 0
    }

    /// Whether the next request would have to wait for a place.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.own().spare == 0
    }

    /// Waits until this worker has less to do than before.
    pub async fn relieved(&self) {
        self.relieved.notified().await;
    }

    /// Peers that should take the next connection rather than this worker; none if it should itself. A worker alone
    /// always should.
    #[must_use]
    pub fn peers_before(&self) -> Vec<Peer> {
        let own = self.own();
        // Nobody can have clearly less than next to nothing.
        if own.load < SLACK && own.connections < SLACK && own.spare > 0 {
            return Vec::new();
        }
        let before = |(share, peer): (Share, Peer)| share.goes_before(own).then_some(peer);
        self.peers().filter_map(before).collect()
    }

    /// Whether somebody else takes what waits to be accepted.
    #[must_use]
    pub fn has_peers(&self) -> bool {
        self.peers().any(|(_, peer)| !self.are_stuck(&[peer]))
    }

    /// Peers that accept and beat.
    fn peers(&self) -> impl Iterator<Item = (Share, Peer)> {
        let now = monotonic_ns();
        let believed = self.believed_ns(now);
        self.board.children().filter(|(row, _)| *row != self.row).filter_map(move |(row, child)| {
            if !child.accepting() || child.kind() != Some(Kind::Worker) {
                return None;
            }
            let peer = Peer { row, epoch: child.epoch(), accepted: child.accepted(), beat_ns: child.beat_ns() };
            if now.saturating_sub(peer.beat_ns) > believed {
                return None;
            }
            let load = child.load().saturating_add(child.fresh());
            let share = Share { load, connections: child.connections(), spare: child.spare() };
            Some((share, peer))
        })
    }

    fn lock_waited(&self) -> std::sync::MutexGuard<'_, Vec<(Peer, Duration)>> {
        // Pushing and removing leave the list whole whatever happens between.
        self.waited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether each of them was waited for long in vain: none has accepted or beaten meanwhile.
    #[must_use]
    pub fn are_stuck(&self, peers: &[Peer]) -> bool {
        let waited = self.lock_waited();
        let is_stuck = |peer| waited.iter().any(|(one, waited)| one == peer && *waited >= STUCK);
        peers.iter().all(is_stuck)
    }

    /// Whether one of them has a place for a request.
    #[must_use]
    pub fn have_places(&self, peers: &[Peer]) -> bool {
        peers.iter().any(|peer| self.board.child(peer.row).is_some_and(|row| row.spare() > 0))
    }

    /// A connection has waited so long for these peers. The times add up over connections until a peer moves.
    pub fn waited_for(&self, peers: &[Peer], time: Duration) {
        let mut all = self.lock_waited();
        for peer in peers {
            match all.iter_mut().find(|(one, _)| one == peer) {
                Some((_, waited)) => *waited = waited.saturating_add(time),
                None => {
                    all.retain(|(one, _)| one.row != peer.row);
                    all.push((*peer, time));
                }
            }
        }
    }

    /// Connections that all workers together have accepted: whether the queue moves.
    #[must_use]
    pub fn accepted_by_all(&self) -> u64 {
        self.board.children().fold(0, |sum, (_, child)| sum.wrapping_add(child.accepted()))
    }

    /// Whether this worker holds so much more than the peer with the least, or has requests waiting for a place while a peer has one,
    /// that kept connections should be moved: by `Connection: close` or GOAWAY, since a new connection finds the right worker by the
    /// accept gate.
    #[must_use]
    pub fn is_far_above_peers(&self) -> bool {
        let held = self.held();
        let has_waiting = self.child().is_some_and(|child| child.waiting() > 0);
        if held < FAR_LEAST && !has_waiting {
            return false;
        }
        let now = monotonic_ns();
        if now.saturating_sub(self.far_at.load(Ordering::Relaxed)) >= FAR_NS {
            let held_by = |peer: Peer| self.board.child(peer.row).map(ChildRow::held);
            let is_far = self.peers().any(|(share, peer)| {
                (has_waiting && share.spare > 0 && !self.are_stuck(&[peer]))
                    || held_by(peer).is_some_and(|least| is_far_above(held, least))
            });
            self.is_far.store(is_far, Ordering::Relaxed);
            self.far_at.store(now, Ordering::Relaxed);
        }
        self.is_far.load(Ordering::Relaxed)
    }
}

fn change(count: &AtomicU32, by: i32) {
    let next = count.load(Ordering::Relaxed).saturating_add_signed(by);
    count.store(next, Ordering::Relaxed);
}

/// What one request counts, from its head to its last byte.
#[derive(Debug)]
pub struct Weight {
    load: Arc<Load>,
    counted: u32,
    is_lasting: bool,
    parked: u32,
}

impl Weight {
    /// One request more.
    #[must_use]
    pub fn new(load: &Arc<Load>) -> Self {
        let mut weight = Self { load: Arc::clone(load), counted: 0, is_lasting: false, parked: 0 };
        change(&load.count, 1);
        weight.set(UNARY, false);
        weight
    }

    /// It waits for a place, or has one now.
    pub fn set_waiting(&mut self, is_waiting: bool) {
        self.set(self.counted, is_waiting);
    }

    /// It waits for an upstream, or does not any more.
    pub fn set_parked(&mut self, is_parked: bool) {
        let parked = if is_parked { self.counted } else { 0 };
        change(&self.load.parked, parked.wrapping_sub(self.parked).cast_signed());
        self.parked = parked;
        self.load.show();
    }

    /// It is a stream.
    pub fn set_stream(&mut self) {
        self.set(STREAM, true);
    }

    fn set(&mut self, counted: u32, is_lasting: bool) {
        if (counted, is_lasting) == (self.counted, self.is_lasting) {
            return;
        }
        let difference = |new: u32, old: u32| new.wrapping_sub(old).cast_signed();
        let lasting = |counted: u32, is_lasting: bool| if is_lasting { counted } else { 0 };
        change(&self.load.requests, difference(counted, self.counted));
        let lasting_by = difference(lasting(counted, is_lasting), lasting(self.counted, self.is_lasting));
        change(&self.load.lasting, lasting_by);
        (self.counted, self.is_lasting) = (counted, is_lasting);
        self.load.show();
    }
}

impl Drop for Weight {
    fn drop(&mut self) {
        if self.parked > 0 {
            self.set_parked(false);
        }
        change(&self.load.count, -1);
        self.set(0, false);
        self.load.relieved.notify_waiters();
    }
}

/// Tells a connection that has sent a request from one that is new, and counts as load for being new.
#[derive(Debug)]
pub struct Newcomer {
    load: Arc<Load>,
    has_sent: AtomicBool,
}

impl Newcomer {
    /// A connection without a request.
    #[must_use]
    pub fn new(load: &Arc<Load>) -> Self {
        Self { load: Arc::clone(load), has_sent: AtomicBool::new(false) }
    }

    /// A request came.
    pub fn has_sent(&self) {
        if !self.has_sent.swap(true, Ordering::Relaxed) {
            change(&self.load.used, 1);
            self.load.show();
        }
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        if self.has_sent.load(Ordering::Relaxed) {
            change(&self.load.used, -1);
            self.load.show();
        }
    }
}

#[cfg(test)]
mod tests;
