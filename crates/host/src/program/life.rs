//! A program's life from its fork to its burial, in a task that nobody can abort.
//!
//! Its first process is reaped last: until then its number, and the number of its group, cannot become another's, so
//! that every signal meets whom it is meant for.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use evergate_sys::{ExecReport, Exit, Pid, Signal, Step};
use rustix::process::{kill_process, kill_process_group};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};

use super::start::Failed;
use super::streams::LINGER;
use super::tail::Tail;
use super::{Ended, Ladder, Order, State, house};
use crate::cgroup::Group;
use crate::report::Report;

/// How long a sweep looks for descendants that must be dead already; beyond it they hang in the kernel.
const SWEEP_MAX: Duration = Duration::from_secs(2);
/// Between two looks of a sweep, at most.
const SWEEP_PAUSE_MAX: Duration = Duration::from_millis(50);
/// Between two looks at what the group of an ended program does with its grace.
const GROUP_PAUSE: Duration = Duration::from_millis(10);
/// After word of a child's death, so that a burst of them is one look.
const TIDY_PAUSE: Duration = Duration::from_millis(20);
/// Between two looks without any word.
const TIDY_INTERVAL: Duration = Duration::from_secs(1);

/// One program that lives.
pub(crate) struct Life {
    pub(crate) number: u64,
    pub(crate) pid: Pid,
    pub(crate) request: Option<String>,
    pub(crate) program: OsString,
    pub(crate) grace: Duration,
    /// Empty where it has none.
    pub(crate) group: Group,
    pub(crate) born: Instant,
    pub(crate) state: watch::Sender<State>,
    pub(crate) order: watch::Receiver<Order>,
    pub(crate) all: watch::Receiver<Order>,
    /// How many still read from it, and those of them that keep its log.
    pub(crate) open: watch::Sender<usize>,
    pub(crate) logs: watch::Sender<usize>,
    pub(crate) tail: Arc<Mutex<Tail>>,
    pub(crate) why: Arc<OnceLock<String>>,
    pub(crate) report: Arc<dyn Report>,
    pub(crate) _live: Live,
    pub(crate) is_buried: bool,
}

/// How an exec came out.
enum Begun {
    /// The program runs.
    Runs,
    /// It does not, and the child is ending.
    Failed(Failed),
    /// Nobody wanted it any more.
    Killed,
}

/// Counts a program as living.
pub(crate) struct Live(watch::Sender<usize>);

impl Live {
    pub(crate) fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Life {
    /// All of it.
    pub(crate) async fn live(mut self, exec: AsyncFd<ExecReport>, process: AsyncFd<OwnedFd>) {
        let begun = self.executed(&exec).await;
        // A descriptor less for as long as it lives.
        drop(exec);
        let (ladder, grace_end) = match begun {
            Begun::Failed(failed) => {
                // It is on its way out, and has made nothing.
                gone(&process).await;
                self.bury();
                self.state.send_modify(|state| state.started = Some(Err(failed)));
                return;
            }
            Begun::Killed => {
                self.state.send_modify(|state| state.started = Some(Err(Failed::lost())));
                gone(&process).await;
                (Ladder::Kill, Some(Instant::now()))
            }
            Begun::Runs => {
                self.state.send_modify(|state| state.started = Some(Ok(())));
                self.until_exit(&process).await
            }
        };
        let age = self.born.elapsed();
        // None could only be if somebody had reaped it before us; then the guard tidies up, and waiters hear that it is lost.
        let Ok(Some(status)) = evergate_sys::peek_status(self.pid) else { return };
        self.state.send_modify(|state| state.exited = Some((status, Instant::now())));
        match grace_end {
            // Nobody wants its answer any more; what it started may have something to put away all the same.
            Some(end) => self.group_grace(end).await,
            None => all_closed(&self.open).await,
        }
        self.signal_group(Signal::KILL);
        let (strays, left) = self.sweep().await;
        self.state.send_modify(|state| state.swept = Some(Instant::now()));
        // Nobody is left to write, so its last words come to their end at once.
        all_closed(&self.logs).await;
        let exit = self.bury().unwrap_or(Exit { status, rss_max_kib: 0, cpu_ms: 0 });
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner).bytes();
        let (request, oom_kills) = (self.request.take(), self.group.oom_kills());
        // Before anybody hears of the end: whoever starts the next one finds nothing of this.
        self.group = Group::default();
        let why = self.why.get().filter(|_| ladder != Ladder::Untouched).cloned();
        let ended = Ended { pid: self.pid, request, exit, ladder, why, age, strays, left, oom_kills, tail };
        self.report.ended(&ended);
        self.state.send_modify(|state| state.ended = Some(ended));
    }

    /// Waits for the exec, which an order cuts short.
    async fn executed(&mut self, exec: &AsyncFd<ExecReport>) -> Begun {
        loop {
            let ready = tokio::select! {
                // Both are cancel-safe: readiness is kept, and orders are values.
                ready = exec.readable() => ready,
                _ = ordered(&mut self.order, &mut self.all, Order::Live) => {
                    // Its group may not be made yet, and it has no children.
                    let _ = kill_process(self.pid, Signal::KILL);
                    return Begun::Killed;
                }
            };
            let outcome = match ready {
                Ok(mut guard) => match guard.try_io(|exec| exec.get_ref().outcome()) {
                    Ok(outcome) => outcome,
                    Err(_) => continue,
                },
                Err(error) => Err(error),
            };
            let (step, errno) = match outcome {
                Ok(Ok(())) => return Begun::Runs,
                Ok(Err(failed)) => (failed.step, failed.errno),
                // A pipe of our own cannot be read: whatever the child is about, it is not to be.
                Err(error) => {
                    let _ = kill_process(self.pid, Signal::KILL);
                    (Step::Exec, error.raw_os_error().unwrap_or(0))
                }
            };
            return Begun::Failed(Failed { program: self.program.clone(), step, errno });
        }
    }

    /// Waits for the end of the first process, and brings it about when that is ordered. How far it went, and until when
    /// the others of its group have, if it was.
    async fn until_exit(&mut self, process: &AsyncFd<OwnedFd>) -> (Ladder, Option<Instant>) {
        let order = tokio::select! {
            biased;
            // Both are cancel-safe: readiness is kept, and orders are values.
            () = gone(process) => return (Ladder::Untouched, None),
            order = ordered(&mut self.order, &mut self.all, Order::Live) => order,
        };
        if order == Order::End {
            let grace_end = Instant::now() + self.grace;
            self.signal_group(Signal::TERM);
            tokio::select! {
                biased;
                // As above; and a moment is a value too. One that has gone in time is not killed, whenever we look.
                () = gone(process) => return (Ladder::Term, Some(grace_end)),
                _ = ordered(&mut self.order, &mut self.all, Order::End) => {}
                () = sleep_until(grace_end.into()) => {}
            }
        }
        self.signal_group(Signal::KILL);
        gone(process).await;
        (Ladder::Kill, Some(Instant::now()))
    }

    /// Waits until what else there is of the program has ended, or its grace has.
    async fn group_grace(&mut self, end: Instant) {
        while Instant::now() < end && house::has_orphans(self.number) {
            tokio::select! {
                // A moment and orders are values.
                () = sleep(GROUP_PAUSE) => {}
                _ = ordered(&mut self.order, &mut self.all, Order::End) => return,
            }
        }
    }

    /// Kills what has left its group, and what that leaves, until nothing is found (G10). How many there were, and how many
    /// are still there.
    async fn sweep(&self) -> (u32, u32) {
        let (mut pause, end) = (Duration::from_millis(1), Instant::now() + SWEEP_MAX);
        let mut seen = house::strays(&self.group.members(), self.pid);
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        loop {
            self.group.kill();
            let members = self.group.members();
            seen.extend(house::strays(&members, self.pid));
            let swept = house::sweep(Some(self.number), &seen);
            seen.extend(&swept.killed);
            if (swept.is_clean() && members.is_empty()) || Instant::now() >= end {
                return (count(seen.len()), count(swept.killed.len().max(members.len())));
            }
            sleep(pause).await;
            pause = (pause * 2).min(SWEEP_PAUSE_MAX);
        }
    }

    fn signal_group(&self, signal: Signal) {
        // None of it may be left but its unreaped first process, or a program has given itself another group.
        if kill_process_group(self.pid, signal).is_err() {
            let _ = kill_process(self.pid, signal);
        }
    }

    /// Reaps the first process; its numbers are free from then on.
    fn bury(&mut self) -> Option<Exit> {
        let exit = evergate_sys::reap(self.pid).ok();
        house::leave(self.number);
        self.is_buried = true;
        exit
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        if !self.is_buried {
            // A defect of ours, or the runtime ends. As an orphan it is buried by the next look at those, if there is one.
            self.signal_group(Signal::KILL);
            house::leave(self.number);
        }
    }
}

/// Waits until a process has ended. Cancel-safe.
async fn gone(process: &AsyncFd<OwnedFd>) {
    // It fails only while the runtime ends, which ends this too.
    let _ = process.readable().await;
}

/// Waits until output is read to the end, or it is clear that somebody else holds it open (G9). Cancel-safe.
async fn all_closed(open: &watch::Sender<usize>) {
    let _ = timeout(LINGER, open.subscribe().wait_for(|open| *open == 0)).await;
}

/// Waits for an order beyond the one that is being carried out. Cancel-safe.
async fn ordered(own: &mut watch::Receiver<Order>, all: &mut watch::Receiver<Order>, beyond: Order) -> Order {
    async fn one(order: &mut watch::Receiver<Order>, beyond: Order) -> Order {
        match order.wait_for(|order| *order > beyond).await.map(|order| *order) {
            Ok(order) => order,
            // Nobody is left who could give one: dropping is the order to end.
            Err(_) if beyond == Order::Live => Order::End,
            Err(_) => pending().await,
        }
    }
    tokio::select! {
        order = one(own, beyond) => order,
        order = one(all, beyond) => order,
    }
}

/// Looks after orphans that no program's end has seen to: reaps the dead, and kills those that came late.
pub(crate) async fn tidy(mut deaths: tokio::signal::unix::Signal, is_wanted: impl Fn() -> bool) {
    while is_wanted() {
        // Cancel-safe; without a word of it (the signal is blocked, say) there is a look all the same.
        let _ = timeout(TIDY_INTERVAL, deaths.recv()).await;
        sleep(TIDY_PAUSE).await;
        house::sweep(None, &BTreeSet::new());
    }
}
