//! Timers for limits, which are nearly always called off.
//!
//! Tokio's timer hands its next deadline to every wait of the runtime, so each sleep of a worker between two packets
//! programs the kernel's timer and calls it off again; on a virtual machine that is an exit to the hypervisor each time.
//! Here one timerfd(2) is armed at the earliest deadline and left alone when that one is called off: it fires once for
//! nothing, much later, and is then armed again. Serving a request touches it not at all.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Timers of one process. Nothing fires unless [`Clock::run`] is being polled.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    waits: Mutex<Waits>,
    start: Instant,
    /// Up to when timers have been fired, nanoseconds since `start`; written under the lock.
    fired_ns: AtomicU64,
}

#[derive(Debug, Default)]
struct Waits {
    /// By deadline; the number tells equal ones apart.
    wakers: BTreeMap<(Instant, u64), Waker>,
    next: u64,
    /// When the timerfd fires.
    armed: Option<Instant>,
}

/// For tokio, which wants to own what it watches.
#[derive(Debug)]
struct Watched(Arc<Shared>);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waits> {
        // The map is whole between any two of its operations.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ns(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Arms the timerfd if it would fire too late.
    fn arm(&self, waits: &mut Waits, at: Instant, now: Instant) {
        if waits.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        // Zero would disarm it.
        let wait = at.saturating_duration_since(now).max(Duration::from_nanos(1));
        let it_value = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: i64::MAX / 2, tv_nsec: 0 });
        let spec = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        // The descriptor and the time are valid, so it cannot fail (timerfd_settime(2)); if it did, the next would try.
        waits.armed = timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec).is_ok().then_some(at);
    }

    /// Takes everybody whose time has come and arms the timerfd for the next one.
    fn due(&self) -> Vec<Waker> {
        let now = Instant::now();
        let mut waits = self.lock();
        self.fired_ns.store(self.ns(now), Ordering::Release);
        waits.armed = None;
        let mut due = Vec::new();
        while let Some(first) = waits.wakers.first_entry() {
            let at = first.key().0;
            if at > now {
                self.arm(&mut waits, at, now);
                break;
            }
            due.push(first.remove());
        }
        due
    }
}

impl Clock {
    /// A clock without timers.
    ///
    /// # Errors
    /// What timerfd_create(2) says.
    pub fn new() -> io::Result<Self> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let (start, fired_ns) = (Instant::now(), AtomicU64::new(0));
        Ok(Self(Arc::new(Shared { fd, waits: Mutex::default(), start, fired_ns })))
    }

    /// Fires timers until it is dropped.
    ///
    /// # Errors
    /// What epoll(7) says when the timerfd cannot be watched.
    pub async fn run(self) -> io::Result<()> {
        #[allow(deprecated, reason = "`Watched` keeps the descriptor open; what replaces this is unsafe")]
        let watched = AsyncFd::with_interest(Watched(Arc::clone(&self.0)), Interest::READABLE)?;
        loop {
            watched.readable().await?.clear_ready();
            // How often it fired does not matter, nor that it may have been armed again meanwhile.
            let _ = rustix::io::read(&self.0.fd, &mut [0_u8; 8]);
            self.0.due().into_iter().for_each(Waker::wake);
        }
    }

    /// Ends at `at`, or a moment later.
    #[must_use]
    pub fn sleep_until(&self, at: Instant) -> Sleep {
        Sleep { at_ns: self.0.ns(at), clock: self.clone(), at, waiting: None }
    }

    /// Ends in `time`, or a moment later.
    #[must_use]
    pub fn sleep(&self, time: Duration) -> Sleep {
        let now = Instant::now();
        // What is too far away for the clock's type never comes.
        self.sleep_until(now.checked_add(time).unwrap_or(now + Duration::from_secs(u64::from(u32::MAX))))
    }

    /// Polls `future` until `at`.
    ///
    /// # Errors
    /// `Elapsed` when it was not ready by then.
    pub fn timeout_at<F: Future>(&self, at: Instant, future: F) -> impl Future<Output = Result<F::Output, Elapsed>> {
        self.timeout_from(move || at, future)
    }

    /// Polls `future` until the time that `at` says when it was not ready at once: most pieces are there already, and then
    /// nobody has to look what time it is.
    ///
    /// # Errors
    /// As `timeout_at`.
    pub async fn timeout_from<F: Future>(&self, at: impl FnOnce() -> Instant, future: F) -> Result<F::Output, Elapsed> {
        let mut future = std::pin::pin!(future);
        let (mut at, mut sleep) = (Some(at), None);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            if let Some(at) = at.take() {
                sleep = Some(self.sleep_until(at()));
            }
            sleep.as_mut().map_or(Poll::Pending, |sleep| Pin::new(sleep).poll(cx).map(|()| Err(Elapsed)))
        })
        .await
    }
}

/// The time was over first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

/// A wait for a moment.
#[derive(Debug)]
pub struct Sleep {
    clock: Clock,
    at: Instant,
    at_ns: u64,
    /// Number and waker, once somebody is to be woken.
    waiting: Option<(u64, Waker)>,
}

impl Sleep {
    /// When it ends.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.at
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let shared = &this.clock.0;
        // Streams poll their timers with each piece: what is known needs neither the time nor the lock.
        if let Some((_, waker)) = &this.waiting
            && waker.will_wake(cx.waker())
            && shared.fired_ns.load(Ordering::Acquire) < this.at_ns
        {
            return Poll::Pending;
        }
        let now = Instant::now();
        if now >= this.at {
            return Poll::Ready(());
        }
        let mut waits = shared.lock();
        let number = match &this.waiting {
            Some((number, _)) => *number,
            None => {
                waits.next += 1;
                waits.next
            }
        };
        let before = waits.wakers.insert((this.at, number), cx.waker().clone());
        shared.arm(&mut waits, this.at, now);
        drop(waits);
        // Outside the lock: it may be the last thing that holds a task.
        drop(before);
        this.waiting = Some((number, cx.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((number, _)) = self.waiting.take() {
            let gone = self.clock.0.lock().wakers.remove(&(self.at, number));
            // Outside the lock: it may be the last thing that holds a task.
            drop(gone);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    fn with_clock<T>(test: impl AsyncFnOnce(Clock) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let clock = Clock::new().unwrap();
            tokio::select! {
                result = test(clock.clone()) => result,
                end = clock.run() => panic!("the clock ended: {end:?}"),
            }
        })
    }

    #[test]
    fn a_sleep_ends_when_its_time_has_come() {
        with_clock(async |clock| {
            let start = Instant::now();
            clock.sleep(SHORT).await;
            assert!(start.elapsed() >= SHORT);
            assert!(clock.0.lock().wakers.is_empty());
        });
    }

    #[test]
    fn the_earliest_comes_first_in_whatever_order_they_were_made() {
        with_clock(async |clock| {
            let start = Instant::now();
            let order = Mutex::new(Vec::new());
            let wait = |times: u32| {
                let (clock, order) = (&clock, &order);
                async move {
                    clock.sleep_until(start + SHORT * times).await;
                    order.lock().unwrap().push(times);
                }
            };
            tokio::join!(wait(3), wait(1), wait(2));
            // On a machine that was away for as long all of them are due at once, and nobody is first.
            let is_late = start.elapsed() >= SHORT * 4;
            assert!(is_late || *order.lock().unwrap() == [1, 2, 3], "{order:?} after {:?}", start.elapsed());
        });
    }

    #[test]
    fn what_was_called_off_leaves_nothing_and_stops_nobody() {
        with_clock(async |clock| {
            assert_eq!(clock.timeout_at(Instant::now() + SHORT, std::future::ready(7)).await, Ok(7));
            // Armed by one that is then called off: the later one still comes.
            let mut gone = clock.sleep(SHORT);
            assert!(std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut gone).poll(cx))).await.is_pending());
            drop(gone);
            assert!(clock.0.lock().wakers.is_empty());
            let start = Instant::now();
            clock.sleep(SHORT * 2).await;
            assert!(start.elapsed() >= SHORT * 2);
        });
    }

    #[test]
    fn whoever_polled_last_is_woken() {
        with_clock(async |clock| {
            let mut sleep = clock.sleep(SHORT);
            let other = Waker::noop();
            assert!(Pin::new(&mut sleep).poll(&mut Context::from_waker(other)).is_pending());
            assert!(Pin::new(&mut sleep).poll(&mut Context::from_waker(other)).is_pending());
            sleep.await;
        });
    }

    #[test]
    fn a_limit_ends_what_takes_too_long() {
        with_clock(async |clock| {
            let late = clock.timeout_at(Instant::now() + SHORT, clock.sleep(LONG)).await;
            assert_eq!(late, Err(Elapsed));
            assert!(clock.0.lock().wakers.is_empty());
        });
    }

    #[test]
    fn what_is_called_off_arms_nothing() {
        with_clock(async |clock| {
            let mut keeper = clock.sleep(LONG);
            assert!(std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut keeper).poll(cx))).await.is_pending());
            let armed = clock.0.lock().armed;
            for _ in 0..100 {
                let mut sleep = clock.sleep(LONG * 2);
                assert!(std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut sleep).poll(cx))).await.is_pending());
            }
            assert_eq!(clock.0.lock().armed, armed);
        });
    }
}
