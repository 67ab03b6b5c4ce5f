//! The board's word under the checker: before each access any other thread may go on, and a mortal one may end.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64 as Word, Ordering};
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::TaskId;
use shuttle::thread::JoinHandle;

/// A word of the board.
#[derive(Debug, Default)]
#[repr(transparent)]
pub(crate) struct AtomicU64(Word);

thread_local! {
    /// After how many accesses each mortal thread of this execution dies.
    static LIVES: RefCell<Vec<(TaskId, u32)>> = const { RefCell::new(Vec::new()) };
}

/// What a thread that dies unwinds with. Its destructors run, as a killed process's would not; they change nothing.
struct Killed;

/// Starts a process that dies before one of its first `accesses` words, anywhere with the same likelihood, or not at all
/// if it needs fewer. Joining it is the master's `wait`.
pub(super) fn mortal(accesses: u32, life: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    let left = thread_rng().gen_range(0..accesses);
    shuttle::thread::spawn(move || {
        let own = shuttle::current::me();
        LIVES.with_borrow_mut(|lives| lives.push((own, left)));
        let ended = catch_unwind(AssertUnwindSafe(life));
        LIVES.with_borrow_mut(|lives| lives.retain(|(task, _)| *task != own));
        if let Err(why) = ended
            && !why.is::<Killed>()
        {
            resume_unwind(why);
        }
    })
}

/// Takes an access from a mortal thread's life; gives whether it had one left.
fn lives_on() -> bool {
    let own = shuttle::current::me();
    LIVES.with_borrow_mut(|lives| match lives.iter_mut().find(|(task, _)| *task == own) {
        Some((_, 0)) => false,
        Some((_, left)) => {
            *left -= 1;
            true
        }
        None => true,
    })
}

/// Somebody else's turn, perhaps, and perhaps this thread's end. Whether the access counts: the dead write nothing.
fn turn() -> bool {
    if std::thread::panicking() {
        return false;
    }
    // The other tests of this crate use the board without the checker.
    if shuttle::current::try_get_current_task().is_none() {
        return true;
    }
    // Time stands still under the checker: this is a point to switch at, and nothing else.
    shuttle::thread::sleep(Duration::ZERO);
    if !lives_on() {
        resume_unwind(Box::new(Killed));
    }
    true
}

impl AtomicU64 {
    pub(crate) const fn new(value: u64) -> Self {
        Self(Word::new(value))
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        turn();
        self.0.load(order)
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        if turn() {
            self.0.store(value, order);
        }
    }

    pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
        if turn() { self.0.swap(value, order) } else { 0 }
    }

    pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        if turn() { self.0.fetch_add(value, order) } else { 0 }
    }

    pub(crate) fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
        if turn() { self.0.fetch_max(value, order) } else { 0 }
    }

    pub(crate) fn compare_exchange(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        if turn() { self.0.compare_exchange(current, new, success, failure) } else { Err(0) }
    }
}
