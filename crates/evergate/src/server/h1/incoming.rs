//! The body of a request, as its connection hands it on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use bytes::Bytes;
use evergate_core::Error;

/// Why a body does not come to its end.
#[derive(Debug)]
pub enum Cut {
    /// The client has left.
    Gone,
    /// Its framing is broken.
    Broken(Error),
}

/// A request's body. It is read by a future of its connection's own task, so nobody has to be woken.
#[derive(Debug, Default)]
pub struct H1Body {
    /// What was there with the head.
    first: Bytes,
    /// Where the rest comes, if there is any.
    rest: Option<Arc<Mutex<Slot>>>,
}

/// Where a connection puts what it reads of a body.
#[derive(Debug)]
pub struct Inbox(Arc<Mutex<Slot>>);

#[derive(Debug, Default)]
struct Slot {
    data: Option<Bytes>,
    is_wanted: bool,
    is_over: bool,
    cut: Option<Cut>,
    /// Bytes that are still to be put, where the client has said how many.
    left: Option<u64>,
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    // No step leaves it half-changed.
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inbox {
    /// Whether the handler waits for more.
    pub(super) fn is_wanted(&self) -> bool {
        lock(&self.0).is_wanted
    }

    /// Hands on what was read, and whether that was the last of it.
    pub(super) fn put(&self, data: Option<Bytes>, is_over: bool) {
        let mut slot = lock(&self.0);
        let bytes = data.as_ref().map_or(0, Bytes::len) as u64;
        slot.left = slot.left.map(|left| left.saturating_sub(bytes));
        (slot.data, slot.is_over, slot.is_wanted) = (data, is_over, false);
    }

    /// Nothing more comes.
    pub(super) fn cut(&self, why: Cut) {
        let mut slot = lock(&self.0);
        (slot.cut, slot.is_wanted) = (Some(why), false);
    }
}

impl H1Body {
    /// One that is here.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self { first: bytes, rest: None }
    }

    /// One of which the beginning is here, and `left` bytes, or nobody knows how many, are to come.
    pub(super) fn begun(first: Bytes, left: Option<u64>) -> (Self, Option<Inbox>) {
        let slot = Arc::new(Mutex::new(Slot { left, ..Slot::default() }));
        (Self { first, rest: Some(Arc::clone(&slot)) }, Some(Inbox(slot)))
    }

    /// All of it, if it is here and no larger than that.
    pub fn take_whole(&mut self, bytes_max: u64) -> Option<Bytes> {
        let is_whole = self.rest.is_none() && self.first.len() as u64 <= bytes_max;
        is_whole.then(|| std::mem::take(&mut self.first))
    }

    /// The next bytes, never none; `None` at the end.
    pub fn poll_data(&mut self) -> Poll<Option<Result<Bytes, Cut>>> {
        if !self.first.is_empty() {
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.first))));
        }
        let Some(rest) = &self.rest else { return Poll::Ready(None) };
        let mut slot = lock(rest);
        if let Some(data) = slot.data.take() {
            return Poll::Ready(Some(Ok(data)));
        }
        if let Some(why) = slot.cut.take() {
            slot.is_over = true;
            return Poll::Ready(Some(Err(why)));
        }
        if slot.is_over {
            return Poll::Ready(None);
        }
        slot.is_wanted = true;
        Poll::Pending
    }

    /// Whether nothing more comes.
    #[must_use]
    pub fn is_end(&self) -> bool {
        let is_over = |slot: &Arc<Mutex<Slot>>| {
            let slot = lock(slot);
            slot.is_over && slot.data.is_none() && slot.cut.is_none()
        };
        self.first.is_empty() && self.rest.as_ref().is_none_or(is_over)
    }

    /// Bytes that are here or were announced, and whether those are all.
    #[must_use]
    pub fn size(&self) -> (u64, bool) {
        let first = self.first.len() as u64;
        let Some(rest) = &self.rest else { return (first, true) };
        let slot = lock(rest);
        let here = first + slot.data.as_ref().map_or(0, Bytes::len) as u64;
        (here + slot.left.unwrap_or(0), slot.is_over || slot.left.is_some())
    }
}
