//! Keeps a call from waking itself.
//!
//! The two halves of a connection, the one that asks and the one that drives, wake each other whenever one has
//! something for the other. Both are polled by the same task in the same turn, so each such wake would only cost a
//! second turn of everything that stands above them (measured: a third of the cost of a chunk). Wakes from within a
//! turn are therefore answered by looking again in that turn; wakes from outside go on to the task.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Looks in one turn. Tokio ends a turn by waking the task that has used up its budget, and nothing moves until it has
/// been away, so looking again without end would never end.
const TURNS_MAX: usize = 4;

/// The filter of one connection.
pub(crate) struct Filter {
    shared: Arc<Shared>,
    waker: Waker,
}

#[derive(Default)]
struct Shared {
    task: Mutex<Option<Waker>>,
    is_polling: AtomicBool,
    is_woken: AtomicBool,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::SeqCst);
        if !self.is_polling.load(Ordering::SeqCst) {
            let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(task) = task {
                task.wake();
            }
        }
    }
}

impl Filter {
    pub(crate) fn new() -> Self {
        let shared = Arc::<Shared>::default();
        Self { waker: Waker::from(Arc::clone(&shared)), shared }
    }

    /// Polls until there is a result or nothing moves any more.
    pub(crate) fn poll<T>(&self, cx: &Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let shared = &self.shared;
        match &mut *shared.task.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(task) => task.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        let mut inner = Context::from_waker(&self.waker);
        for _ in 0..TURNS_MAX {
            shared.is_polling.store(true, Ordering::SeqCst);
            shared.is_woken.store(false, Ordering::SeqCst);
            let polled = poll(&mut inner);
            shared.is_polling.store(false, Ordering::SeqCst);
            // A wake before the store above is seen here; one after it has woken the task.
            if polled.is_ready() || !shared.is_woken.load(Ordering::SeqCst) {
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
        let filter = Filter::new();
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
