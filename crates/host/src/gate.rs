//! How many requests a host works on at once, and how many may wait for a place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use evergate_core::{Error, Fault};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

use crate::report::Report;

/// Places, and the line before them.
pub struct Gate {
    places: Arc<Semaphore>,
    counts: Arc<Counts>,
    queue: u32,
}

struct Counts {
    in_flight: AtomicU32,
    waiting: AtomicU32,
    report: Arc<dyn Report>,
}

/// A place, until it is dropped.
pub struct Place {
    _permit: OwnedSemaphorePermit,
    _count: Count,
}

/// One more in a count, until it is dropped.
struct Count {
    counts: Arc<Counts>,
    of: fn(&Counts) -> &AtomicU32,
}

impl Count {
    fn new(counts: &Arc<Counts>, of: fn(&Counts) -> &AtomicU32) -> Self {
        of(counts).fetch_add(1, Ordering::Relaxed);
        counts.tell();
        Self { counts: Arc::clone(counts), of }
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        (self.of)(&self.counts).fetch_sub(1, Ordering::Relaxed);
        self.counts.tell();
    }
}

impl Counts {
    fn tell(&self) {
        self.report.load(self.in_flight.load(Ordering::Relaxed), self.waiting.load(Ordering::Relaxed));
    }
}

impl Gate {
    /// So many places, and so many that may wait for one.
    #[must_use]
    pub fn new(places: u32, queue: u32, report: Arc<dyn Report>) -> Self {
        let counts = Counts { in_flight: AtomicU32::new(0), waiting: AtomicU32::new(0), report };
        Self { places: Arc::new(Semaphore::new(places as usize)), counts: Arc::new(counts), queue }
    }

    /// Waits for a place, in turn. Cancel-safe: who leaves the line leaves no gap in it.
    ///
    /// # Errors
    /// `Overloaded` when the line is full or there was no place until `until`.
    pub async fn enter(&self, until: Instant) -> Result<Place, Error> {
        let in_flight = |counts: &Arc<Counts>| Count::new(counts, |counts| &counts.in_flight);
        if let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(Place { _permit: permit, _count: in_flight(&self.counts) });
        }
        if self.counts.waiting.load(Ordering::Relaxed) >= self.queue {
            return Err(Error::new(Fault::Overloaded, "the program of this model has its hands full, and others wait"));
        }
        let waiting = Count::new(&self.counts, |counts| &counts.waiting);
        let permit = timeout_at(until.into(), Arc::clone(&self.places).acquire_owned()).await;
        let place = match permit {
            Ok(Ok(permit)) => Ok(Place { _permit: permit, _count: in_flight(&self.counts) }),
            Ok(Err(_)) | Err(_) => Err(Error::new(Fault::Overloaded, "the program of this model was not free in time")),
        };
        drop(waiting);
        place
    }
}
