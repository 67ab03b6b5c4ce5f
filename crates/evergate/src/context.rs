//! What belongs to one request and is passed along explicitly: its ids, its cancel token, its clock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context as Task, Waker};

use evergate_core::cancel::CauseCell;
use evergate_core::{Cause, Error};

/// Cancels one request, with a cause. Whoever works for the request registers itself and looks at the cause whenever
/// it is polled; dropping the work is what stops it.
#[derive(Debug, Default)]
pub struct Token {
    cause: CauseCell,
    waker: Mutex<Option<Waker>>,
    is_accounted: AtomicBool,
    tenant: OnceLock<Arc<str>>,
    /// Bytes of its body and its answer that lie in memory, if they are many.
    held: AtomicU64,
    note: OnceLock<&'static str>,
}

impl Token {
    /// Cancels, unless that has happened; wakes who is registered.
    pub fn cancel(&self, cause: Cause) {
        if self.cause.set(cause)
            && let Some(waker) = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            waker.wake();
        }
    }

    /// Says whose request it is, for a record that its handler cannot write. The first word counts.
    pub fn set_tenant(&self, tenant: &Arc<str>) {
        let _ = self.tenant.set(Arc::clone(tenant));
    }

    /// What was said; empty if nothing was.
    #[must_use]
    pub fn tenant(&self) -> Arc<str> {
        self.tenant.get().cloned().unwrap_or_default()
    }

    /// It holds so many bytes more.
    pub fn hold(&self, bytes: u64) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that go when it ends.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// The request has its record, or a pass that will write it.
    pub fn account(&self) {
        self.is_accounted.store(true, Ordering::Relaxed);
    }

    /// Whether nobody needs to write a record when the request's handler is lost.
    #[must_use]
    pub fn is_accounted(&self) -> bool {
        self.is_accounted.load(Ordering::Relaxed)
    }

    /// The cause, if it was cancelled.
    #[must_use]
    pub fn cause(&self) -> Option<Cause> {
        self.cause.get()
    }

    /// Says how the work for a client that has left went on and ended, for the record. The first word counts.
    pub fn note(&self, end: &'static str) {
        let _ = self.note.set(end);
    }

    /// What was noted.
    #[must_use]
    pub fn noted(&self) -> Option<&'static str> {
        self.note.get().copied()
    }

    /// Registers the task that is being polled and gives the cause, if there is one.
    pub fn check(&self, task: &Task<'_>) -> Option<Cause> {
        let mut waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *waker {
            Some(known) => known.clone_from(task.waker()),
            none => *none = Some(task.waker().clone()),
        }
        drop(waker);
        // Read after registering: a cancel in between has woken the task or is seen here.
        self.cause.get()
    }
}

/// The error a client that is still there gets for a cancelled request.
#[must_use]
pub fn cancelled(cause: Cause) -> Error {
    let message = match cause {
        Cause::Draining => "the gateway is stopping and the time to finish (shutdown.drain) is over; try again",
        Cause::StoppedAtOnce => {
            "the operator stopped the gateway at once, without time for requests to finish; try again"
        }
        Cause::Superseded => {
            "the configuration was reloaded again and again while the request was under way, and its worker had to go; try again"
        }
        Cause::DeadlinePassed => "the request's time is over",
        Cause::ClientGone | Cause::ClientStalled | Cause::LostRace => "the request was cancelled",
        Cause::Memory => "the gateway is short of memory and has ended the request that held the most; try again",
        Cause::Operator => "an operator ended the request",
    };
    let error = Error::new(cause.fault(), message);
    if cause == Cause::Memory { error.detail("memory") } else { error }
}
