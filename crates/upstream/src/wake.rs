//! Keeps a call from waking itself.
//!
//! The two halves of a connection, the one that asks and the one that drives, wake each other whenever one has
//! something for the other. Both are polled by the same task in the same turn, so each such wake would only cost a
//! second turn of everything that stands above them (measured: a third of the cost of a chunk). Wakes from within a
//! turn are therefore answered by looking again in that turn; wakes from outside go on to the task.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Looks in one turn. Tokio ends a turn by waking the task that has used up its budget, and nothing moves until it has
/// been away, so looking again without end would never end.
const TURNS_MAX: usize = 4;

/// A turn is under way.
const POLLING: u8 = 1;
/// Somebody was woken in it.
const WOKEN: u8 = 2;

/// The filter of one connection.
pub(crate) struct Filter {
    shared: Arc<Shared>,
    waker: Waker,
    /// Who polled last, as `shared` has it: asked at every poll, and without a lock.
    task: Option<Waker>,
}

#[derive(Default)]
struct Shared {
    task: Mutex<Option<Waker>>,
    /// One word, so that a turn's end and a wake from another thread cannot miss each other.
    state: AtomicU8,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Who has been woken already has not looked since.
        if self.state.fetch_or(WOKEN, Ordering::AcqRel) == 0 {
            let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(task) = task {
                task.wake();
            }
        }
    }
}

impl Filter {
    pub(crate) fn new() -> Self {
        let shared = Arc::<Shared>::default();
        Self { waker: Waker::from(Arc::clone(&shared)), shared, task: None }
    }

    /// Polls until there is a result or nothing moves any more.
    pub(crate) fn poll<T>(&mut self, cx: &Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        if !self.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            let (before, task) = (self.task.replace(cx.waker().clone()), cx.waker().clone());
            let shared = self.shared.task.lock().unwrap_or_else(PoisonError::into_inner).replace(task);
            // Outside the lock: it may be the last thing that holds a task.
            drop((before, shared));
        }
        let mut inner = Context::from_waker(&self.waker);
        for _ in 0..TURNS_MAX {
            self.shared.state.swap(POLLING, Ordering::AcqRel);
            let polled = poll(&mut inner);
            // A wake before this is seen here; one after it wakes the task.
            if self.shared.state.swap(0, Ordering::AcqRel) & WOKEN == 0 || polled.is_ready() {
                return polled;
            }
        }
        // Still moving: the runtime wants its turn (a task's budget is spent), or will get it.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn own_wakes_poll_again_and_foreign_ones_reach_the_task() {
        let count = Arc::new(Count::default());
        let task = Waker::from(Arc::clone(&count));
        let mut filter = Filter::new();
        let mut kept = None;
        let mut turns = 0;
        let polled = filter.poll(&Context::from_waker(&task), |cx| {
            turns += 1;
            if turns < 3 {
                cx.waker().wake_by_ref();
            }
            kept = Some(cx.waker().clone());
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        assert_eq!((turns, count.0.load(Ordering::SeqCst)), (3, 0));
        kept.unwrap().wake();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn who_never_rests_is_sent_back_to_the_runtime() {
        let count = Arc::new(Count::default());
        let task = Waker::from(Arc::clone(&count));
        let polled = Filter::new().poll(&Context::from_waker(&task), |cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
    }
}
