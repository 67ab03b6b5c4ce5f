//! What a connection's I/O type, its task and its requests tell each other.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use evergate_board::InflightPhase;
use evergate_core::Error;
use http::Method;
use tokio::sync::Notify;

use crate::gate::pass::Pass;

/// That a connection is to end, and how much patience it has until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// When that was decided.
    pub since: Instant,
    /// How long it stays readable without a request, from then or from its last answer on.
    pub linger: Duration,
    /// Whether a connection on which nothing was ever sent has the time that a request head has.
    pub owes_first: bool,
}

/// A head that is refused, and what is known of it.
#[derive(Debug)]
pub struct Refused {
    /// What the client is told.
    pub error: Error,
    /// None when it did not come whole, or is none.
    pub method: Option<Method>,
    /// The target without its query; empty when it did not come whole.
    pub path: String,
    /// When its first byte came.
    pub since: Instant,
}

impl Refused {
    /// Of HTTP/1: what its first line says, if that has come to its end.
    pub(super) fn of(error: Error, head: &[u8], since: Instant) -> Self {
        let end = head.iter().position(|byte| *byte == b'\n').unwrap_or(0);
        let mut words = head.get(..end).unwrap_or_default().split(|byte| *byte == b' ');
        let method = words.next().and_then(|word| Method::from_bytes(word).ok());
        let target = words.next().and_then(|word| std::str::from_utf8(word).ok()).unwrap_or_default();
        let path = target.split_once('?').map_or(target, |(path, _)| path).to_owned();
        Self { error, method, path, since }
    }
}

/// What the I/O type, the task and the requests of one connection tell each other.
#[derive(Debug, Default)]
pub struct Shared {
    /// Requests between head and last byte; what HTTP/2 knows them by.
    pub active: AtomicU32,
    /// Of HTTP/1, that the request at hand stands for a head that is refused; of HTTP/2, see `refuse`.
    refusal: Mutex<Option<Box<Refused>>>,
    is_refused: AtomicBool,
    /// Requests whose answers are written into a buffer but not yet to the kernel.
    finishing: Mutex<Vec<Pass>>,
    has_finishing: AtomicBool,
    leaving: Mutex<Option<Leaving>>,
    is_leaving: AtomicBool,
    /// Who has been idle since then or before is to end.
    shed_before: Mutex<Option<Instant>>,
    is_shedding: AtomicBool,
    was_shed: AtomicBool,
    is_stalled: AtomicBool,
    /// Whether the socket is full, and when it ceased to be.
    is_full: AtomicBool,
    full_until: Mutex<Option<Instant>>,
    is_unwanted: AtomicBool,
    unwanted: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Each value is replaced in one step, so a panic while it was locked cannot have left it half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The next request of this connection is none: its head is refused. On HTTP/2 none comes: the connection ended in the
    /// middle of that head.
    pub(super) fn refuse(&self, refused: Refused) {
        *lock(&self.refusal) = Some(Box::new(refused));
        self.is_refused.store(true, Ordering::Relaxed);
    }

    /// What was refused, once.
    #[must_use]
    pub fn take_refusal(&self) -> Option<Box<Refused>> {
        if self.is_refused.load(Ordering::Relaxed) { lock(&self.refusal).take() } else { None }
    }

    /// Keeps a request's pass until its last byte is the kernel's, which is what comes next: the write and the flush
    /// follow in the same turn. Marked before them, since the client is woken by the write and may see a killer run
    /// before we do.
    pub fn finish(&self, pass: Pass) {
        pass.enter(InflightPhase::Write);
        lock(&self.finishing).push(pass);
        self.has_finishing.store(true, Ordering::Relaxed);
    }

    /// The socket is full: the last byte waits after all.
    pub(super) fn is_stuck(&self) {
        self.is_full.store(true, Ordering::Relaxed);
        if self.has_finishing.load(Ordering::Relaxed) {
            lock(&self.finishing).iter().for_each(|pass| pass.enter(InflightPhase::Stream));
        }
    }

    /// The socket was full and is tried again: what waits may go now, and its client may see that before this process runs on.
    pub(super) fn is_tried(&self) {
        if self.is_full.load(Ordering::Relaxed) && self.has_finishing.load(Ordering::Relaxed) {
            lock(&self.finishing).iter().for_each(|pass| pass.enter(InflightPhase::Write));
        }
    }

    /// The socket takes something.
    pub(super) fn is_taken_from(&self) {
        if self.is_full.load(Ordering::Relaxed) {
            self.is_full.store(false, Ordering::Relaxed);
            *lock(&self.full_until) = Some(Instant::now());
        }
    }

    /// Until when the socket was full, if it ever was.
    pub(super) fn full_until(&self) -> Option<Instant> {
        if self.is_full.load(Ordering::Relaxed) { Some(Instant::now()) } else { *lock(&self.full_until) }
    }

    /// Everything written is the kernel's now, so requests whose last byte was in it are over.
    pub(super) fn flushed(&self) {
        if self.has_finishing.swap(false, Ordering::Relaxed) {
            let finished = std::mem::take(&mut *lock(&self.finishing));
            finished.into_iter().for_each(Pass::complete);
        }
    }

    /// The client has read nothing for too long: its connection is cut, and every request on it ends for that.
    pub(super) fn stall(&self) {
        self.is_stalled.store(true, Ordering::Relaxed);
        lock(&self.finishing).iter().for_each(Pass::stall);
    }

    /// Whether the connection was cut because its client does not read.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.is_stalled.load(Ordering::Relaxed)
    }

    /// The connection is to end; a later word with less patience stands over an earlier one.
    pub(super) fn leave(&self, leaving: Leaving) {
        let mut slot = lock(&self.leaving);
        let is_sooner = slot.is_none_or(|before| leaving.since + leaving.linger <= before.since + before.linger);
        if is_sooner {
            *slot = Some(leaving);
            self.is_leaving.store(true, Ordering::Release);
        }
    }

    /// Whether, and how, the connection is to end.
    pub(super) fn leaving(&self) -> Option<Leaving> {
        if self.is_leaving.load(Ordering::Acquire) { *lock(&self.leaving) } else { None }
    }

    /// Idle connections are to make room, those that have idled since then.
    pub(super) fn shed(&self, before: Option<Instant>) {
        if before.is_some() {
            *lock(&self.shed_before) = before;
            self.is_shedding.store(true, Ordering::Release);
        }
    }

    /// Whether a connection that was active last at that time is one of those.
    pub(super) fn is_shed(&self, active_at: Instant) -> bool {
        let is_it = self.is_shedding.load(Ordering::Acquire)
            && lock(&self.shed_before).is_some_and(|before| active_at <= before);
        if is_it {
            self.was_shed.store(true, Ordering::Relaxed);
        }
        is_it
    }

    /// Whether it ended as one of those.
    #[must_use]
    pub fn was_shed(&self) -> bool {
        self.was_shed.load(Ordering::Relaxed)
    }

    /// This worker has more to do than its peers, so that an HTTP/2 connection would do better elsewhere.
    pub fn send_elsewhere(&self) {
        if !self.is_unwanted.swap(true, Ordering::Relaxed) {
            self.unwanted.notify_one();
        }
    }

    /// Waits for `send_elsewhere`. Cancel-safe: a word that nobody waited for is kept.
    pub(super) async fn sent_elsewhere(&self) {
        self.unwanted.notified().await;
    }
}
