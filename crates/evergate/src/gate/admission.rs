//! Places for requests, and the line of those that wait for one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use evergate_board::{Board, monotonic_ns};
use evergate_core::deadline::Limit;
use evergate_core::{Deadline, Error, Fault};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Between two words to the master that requests wait: it looks ten times a second once it knows.
const TELL: Duration = Duration::from_millis(100);

/// Of a worker that can take nothing more.
const FULL: &str =
    "all places of this worker are taken and as many requests wait as may (workers.slots, limits.queue); try again";

/// Called when requests begin to wait.
pub type Tell = Box<dyn Fn() + Send + Sync>;

/// Gives places in the order in which they were asked for, and says on the board who waits.
pub struct Admission {
    board: Board,
    row: u32,
    slots: Arc<Semaphore>,
    queue_max: u32,
    tell: Tell,
    line: Mutex<Line>,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission").field("slots", &self.slots).field("line", &self.line).finish_non_exhaustive()
    }
}

/// Requests that wait: since when (monotonic nanoseconds), by the order of their arrival.
#[derive(Debug, Default)]
struct Line {
    next: u64,
    since: BTreeMap<u64, u64>,
    /// When the master was last told.
    told: Option<Instant>,
}

impl Admission {
    /// `slots` places of the child that owns `row`, and a line of at most `queue_max`; `tell` is called when it is there
    /// after it was not, ten times a second at most.
    #[must_use]
    pub fn new(board: Board, row: u32, (slots, queue_max): (u32, u32), tell: Tell) -> Self {
        let slots = Arc::new(Semaphore::new(usize::try_from(slots).unwrap_or(usize::MAX)));
        Self { board, row, slots, queue_max, tell, line: Mutex::default() }
    }

    /// A place, if one is free and nobody waits for it.
    #[must_use]
    pub fn take(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore hands what is given back to those who wait before anybody else sees it.
        Arc::clone(&self.slots).try_acquire_owned().ok()
    }

    /// A place, waited for in turn until the deadline. Dropping the future leaves the line.
    ///
    /// # Errors
    /// `overloaded` at once when the line is full, or when the deadline came first; `deadline_exceeded` when that
    /// was the client's own.
    pub async fn wait(&self, deadline: Deadline) -> Result<OwnedSemaphorePermit, Error> {
        let refused = |why| Err(Error::new(Fault::Overloaded, why));
        let Some(_waiting) = Waiting::enter(self) else { return refused(FULL) };
        let place = Arc::clone(&self.slots).acquire_owned();
        match tokio::time::timeout_at(deadline.at().into(), place).await {
            Ok(Ok(place)) => Ok(place),
            Err(_) if deadline.limit() == Limit::Client => {
                let key = deadline.limit().key();
                let message = format!("no place of this worker was free within {key} (workers.slots)");
                Err(Error::new(Fault::DeadlineExceeded, message).detail(key))
            }
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => {
                refused("no place of this worker was free in time (workers.slots, timeouts.total); try again")
            }
        }
    }

    /// Refuses what would be refused now. A body that is large need not be read for that; a small one is there already.
    ///
    /// # Errors
    /// `overloaded` when the line is full.
    pub fn check_room(&self) -> Result<(), Error> {
        let is_full = self.slots.available_permits() == 0 && self.is_full(&self.lock_line());
        if is_full { Err(Error::new(Fault::Overloaded, FULL)) } else { Ok(()) }
    }

    fn is_full(&self, line: &Line) -> bool {
        line.since.len() >= usize::try_from(self.queue_max).unwrap_or(usize::MAX)
    }

    fn lock_line(&self) -> std::sync::MutexGuard<'_, Line> {
        // Inserting and removing leave the line whole whatever happens between.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, line: &Line) {
        let Some(child) = self.board.child(self.row) else { return };
        child.set_waiting(u32::try_from(line.since.len()).unwrap_or(u32::MAX));
        child.set_waiting_since_ns(line.since.values().next().copied().unwrap_or(0));
    }
}

struct Waiting<'a> {
    admission: &'a Admission,
    number: u64,
}

impl<'a> Waiting<'a> {
    fn enter(admission: &'a Admission) -> Option<Self> {
        let mut line = admission.lock_line();
        if admission.is_full(&line) {
            return None;
        }
        let number = line.next;
        line.next = number.wrapping_add(1);
        line.since.insert(number, monotonic_ns());
        admission.show(&line);
        let is_new = line.since.len() == 1 && line.told.is_none_or(|told| told.elapsed() >= TELL);
        if is_new {
            // Behind the board's word, which it will look for.
            line.told = Some(Instant::now());
            (admission.tell)();
        }
        Some(Self { admission, number })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut line = self.admission.lock_line();
        line.since.remove(&self.number);
        self.admission.show(&line);
    }
}
