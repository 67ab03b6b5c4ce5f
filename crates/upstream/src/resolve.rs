//! Names of upstreams: each is looked up once at a time, on few threads, and what was found is remembered.
//!
//! The system's resolver (getaddrinfo(3)) blocks, cannot be called off and tells no time to live. So a look-up runs on a
//! thread of its own, nobody waits for it longer than their own limit, and how many there can be is bounded.

mod book;

use std::fmt;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use evergate_core::Deadline;

use crate::clock::Clock;
use book::{Answer, Book, Job};

/// Asks the world for a name's addresses; blocks.
pub type LookUp = Arc<dyn Fn(&str) -> Result<Vec<IpAddr>, String> + Send + Sync>;

/// The names that a process asks for. Clones share everything.
#[derive(Clone)]
pub struct Resolver(Arc<Shared>);

struct Shared {
    look_up: LookUp,
    clock: Clock,
    book: Mutex<Book>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    ok: AtomicU64,
    failed: AtomicU64,
    late: AtomicU64,
}

/// Look-ups since the last time somebody asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookUps {
    /// That found addresses.
    pub ok: u64,
    /// That found none.
    pub failed: u64,
    /// That somebody gave up waiting for; each counts once more when it ends.
    pub late: u64,
}

/// A name without addresses.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unresolved {
    /// The resolver said so.
    Failed(Arc<str>),
    /// Nothing was known in time.
    Late,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("book", &self.0.lock()).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Book> {
        // Its methods leave the book whole.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a look-up has found; gives the next one that waits for a thread.
    fn end(&self, job: &Job, found: Result<Vec<IpAddr>, String>) -> Option<Job> {
        let found = match found {
            Ok(addresses) if addresses.is_empty() => Err("the name has no address".to_owned()),
            found => found,
        };
        let count = if found.is_ok() { &self.counts.ok } else { &self.counts.failed };
        count.fetch_add(1, Ordering::Relaxed);
        self.lock().end(job, found, Instant::now())
    }
}

impl Resolver {
    /// Asks the system.
    #[must_use]
    pub fn system(clock: Clock) -> Self {
        Self::new(clock, Arc::new(look_up))
    }

    /// Asks `look_up`.
    #[must_use]
    pub fn new(clock: Clock, look_up: LookUp) -> Self {
        let (book, counts) = (Mutex::default(), Counts::default());
        Self(Arc::new(Shared { look_up, clock, book, counts }))
    }

    /// What was looked up since the last call.
    #[must_use]
    pub fn take_counts(&self) -> LookUps {
        let counts = &self.0.counts;
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        LookUps { ok: take(&counts.ok), failed: take(&counts.failed), late: take(&counts.late) }
    }

    /// The addresses of `host`: remembered ones, or those of a look-up that is waited for until the deadline. Dropping the
    /// future leaves the look-up to the others who wait for it, and to the next who ask.
    pub(crate) async fn resolve(&self, host: &str, until: Deadline) -> Result<Arc<[IpAddr]>, Unresolved> {
        loop {
            let (mut ended, patience) = match self.ask(host) {
                Answer::Known(addresses) => return Ok(addresses),
                Answer::Failed(why) => return Err(Unresolved::Failed(why)),
                Answer::Wait { ended, patience } => (ended, patience),
            };
            let at = patience.map_or(until.at(), |patience| patience.min(until.at()));
            // The channel says nothing: it closes when the look-up has ended, and the book knows how.
            if self.0.clock.timeout_at(at, ended.changed()).await.is_err() {
                let overrun = self.0.lock().overrun(host);
                self.0.counts.late.fetch_add(u64::from(overrun.is_first), Ordering::Relaxed);
                return overrun.known.ok_or(Unresolved::Late);
            }
        }
    }

    fn ask(&self, host: &str) -> Answer {
        let (answer, job) = self.0.lock().ask(host, Instant::now());
        if let Some(job) = job
            && let Err(error) = self.start(job.clone())
        {
            // Another that waits for a thread gets none now either; the next who asks for it tries again.
            let mut next = self.0.end(&job, Err(format!("no thread for the look-up: {error}")));
            while let Some(job) = next {
                next = self.0.end(&job, Err("no thread for the look-up".into()));
            }
        }
        answer
    }

    fn start(&self, job: Job) -> io::Result<()> {
        let shared = Arc::clone(&self.0);
        // Bounded by the book. Not of the runtime's blocking pool, whose queue has no end, and which panics when the system
        // gives it no thread.
        std::thread::Builder::new().name("evergate-dns".into()).spawn(move || run(&shared, job)).map(drop)
    }
}

/// A thread's life: one look-up after the other while any wait for a thread.
fn run(shared: &Shared, job: Job) {
    let mut next = Some(job);
    while let Some(job) = next {
        // Unwind safety: what a panic leaves behind is the resolver's own; the book is not touched in there.
        let found = std::panic::catch_unwind(AssertUnwindSafe(|| (shared.look_up)(&job.host)));
        next = shared.end(&job, found.unwrap_or_else(|_| Err("the look-up panicked".into())));
    }
}

/// Asks the system; blocks.
///
/// # Errors
/// What the system's resolver says.
pub fn look_up(host: &str) -> Result<Vec<IpAddr>, String> {
    // The port is not part of the question.
    let found = (host, 0).to_socket_addrs().map_err(|error| error.to_string())?;
    Ok(found.map(|address| address.ip()).collect())
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::time::Duration;

    use evergate_core::deadline::Limit;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn in_runtime<T>(test: impl AsyncFnOnce(Clock) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let clock = Clock::new().unwrap();
            tokio::select! {
                biased;
                done = test(clock.clone()) => done,
                ran = clock.run() => panic!("{ran:?}"),
            }
        })
    }

    fn soon(limit: Duration) -> Deadline {
        Deadline::new(Instant::now(), limit, Limit::Dns)
    }

    type Told = Result<Vec<IpAddr>, String>;

    /// A resolver that says what it is told to, when it is told to; and the names it was asked for.
    fn told(clock: Clock) -> (Resolver, SyncSender<Told>, Receiver<String>) {
        let (tell, heard) = sync_channel::<Told>(64);
        let (asked, names) = sync_channel(64);
        let heard = Mutex::new(heard);
        let look_up = move |host: &str| {
            asked.send(host.to_owned()).unwrap();
            heard.lock().unwrap().recv().unwrap_or_else(|_| Err("the test is over".into()))
        };
        (Resolver::new(clock, Arc::new(look_up)), tell, names)
    }

    /// D2: one slow name is one look-up, whoever asks; each waits no longer than its own limit.
    #[test]
    fn five_hundred_wait_for_one_look_up_each_within_its_limit() {
        in_runtime(async |clock| {
            let (resolver, tell, names) = told(clock);
            let limit = |n: usize| soon(if n.is_multiple_of(2) { LONG } else { Duration::ZERO });
            let mut asking: Vec<_> = (0..500).map(|n| Box::pin(resolver.resolve("slow.test", limit(n)))).collect();
            for asking in asking.iter_mut().skip(1).step_by(2) {
                assert_eq!(asking.await, Err(Unresolved::Late));
            }
            // Polled once, so that they wait.
            for asking in asking.iter_mut().step_by(2) {
                let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx))).await;
                assert!(polled.is_pending());
            }
            let address: IpAddr = "192.0.2.7".parse().unwrap();
            tell.send(Ok(vec![address])).unwrap();
            for asking in asking.into_iter().step_by(2) {
                assert_eq!(asking.await.as_deref(), Ok(&[address][..]));
            }
            assert_eq!(names.try_iter().collect::<Vec<_>>(), ["slow.test"]);
            assert_eq!(resolver.take_counts(), LookUps { ok: 1, failed: 0, late: 1 });
            assert_eq!(resolver.take_counts(), LookUps::default());
        });
    }

    #[test]
    fn a_look_up_that_panics_or_finds_nothing_is_a_failure() {
        in_runtime(async |clock| {
            let panics = Resolver::new(clock.clone(), Arc::new(|_: &str| panic!("on purpose")));
            let failed = panics.resolve("a.test", soon(LONG)).await;
            assert_eq!(failed, Err(Unresolved::Failed("the look-up panicked".into())));
            let empty = Resolver::new(clock, Arc::new(|_: &str| Ok(Vec::new())));
            let failed = empty.resolve("a.test", soon(LONG)).await;
            assert_eq!(failed, Err(Unresolved::Failed("the name has no address".into())));
            assert_eq!(empty.take_counts(), LookUps { ok: 0, failed: 1, late: 0 });
        });
    }

    #[test]
    fn the_system_knows_localhost() {
        in_runtime(async |clock| {
            let found = Resolver::system(clock).resolve("localhost", soon(LONG)).await.unwrap();
            assert!(found.iter().all(IpAddr::is_loopback), "{found:?}");
        });
    }
}
