//! An upstream that is a program of this machine: its host's row is looked at before a connection is made, since a connect
//! to its socket succeeds whether anybody accepts or not.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use evergate_board::{Board, HostRow, HostState, InflightPlace, monotonic_ns};
use evergate_core::{Deadline, Error, Fault, request_timeout};
use evergate_host::service::PLACE;
use evergate_upstream::Call;
use evergate_upstream::clock::Clock;
use http::header::{HeaderName, HeaderValue};

/// Between two looks of a request that waits for its host.
const LOOK: Duration = Duration::from_millis(10);
/// After a start that failed, the next one is waited for if it comes so soon; another target may serve otherwise.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Between two looks of one that waits for an answer.
const WATCH: Duration = Duration::from_millis(100);

/// A host's own word about the time comes so much before ours: it knows better what it was spent on.
const AHEAD: Duration = Duration::from_millis(20);

/// Tells a host how much time the request has, to which it holds its program whatever becomes of this worker, and where it is
/// to say that the program has it.
pub(super) fn tell(call: &mut Call, deadline: Deadline, place: InflightPlace) {
    let left = deadline.left(Instant::now());
    let left = left.saturating_sub(AHEAD.min(left / 2)).as_millis().max(1);
    if let Ok(value) = HeaderValue::try_from(format!("{left}ms")) {
        call.fields.push(&HeaderName::from_static(request_timeout::NAME), &value);
    }
    if let Ok(value) = HeaderValue::try_from(place.to_string()) {
        call.fields.push(&PLACE, &value);
    }
}

/// Wakes the master.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// A program's place on the board.
pub struct Local {
    board: Board,
    wake: Wake,
    name: String,
    fingerprint: u64,
    /// Most requests of this worker that wait for it to start.
    queue: u32,
    parked: AtomicU32,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").field("name", &self.name).finish_non_exhaustive()
    }
}

/// One more request that waits, until it is dropped.
struct Parked<'a>(&'a AtomicU32);

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Local {
    /// The program of one section.
    #[must_use]
    pub fn new(board: Board, wake: Wake, (name, fingerprint): (&str, u64), queue: u32) -> Self {
        Self { board, wake, name: name.to_owned(), fingerprint, queue, parked: AtomicU32::new(0) }
    }

    /// Its own section's.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    fn look_at(&self, fingerprint: u64) -> Option<(&HostRow, HostState)> {
        self.board.hosts().find_map(|(_, row)| Some((row, row.look(fingerprint)?)))
    }

    /// The row and what the host is to be taken for; none before the master has made one for this generation. Of a section
    /// that a reload has replaced no host is started any more: then it is the row of the one that has its name now.
    fn look(&self) -> Option<(&HostRow, HostState)> {
        let own = self.look_at(self.fingerprint)?;
        if !own.0.is_retired() || matches!(own.1, HostState::Ready | HostState::Starting) {
            return Some(own);
        }
        let mut rows = self.board.hosts().map(|(_, row)| row);
        let successor = rows.find(|row| row.fingerprint() != 0 && !row.is_retired() && row.name() == self.name);
        Some(successor.and_then(|row| Some((row, row.look(row.fingerprint())?))).unwrap_or(own))
    }

    /// The section whose host is to be asked, and what that is to be taken for.
    #[must_use]
    pub fn place(&self) -> (u64, HostState) {
        self.look().map_or((self.fingerprint, HostState::Cold), |(row, state)| (row.fingerprint(), state))
    }

    /// What clients are told of it.
    #[must_use]
    pub fn shown(&self) -> HostState {
        self.look().map_or(HostState::Cold, |(row, state)| row.shown(state))
    }

    fn ask(&self, row: &HostRow) {
        if !row.is_wanted() {
            row.set_is_wanted(true);
            (self.wake)();
        }
    }

    /// Waits until the host takes requests, for whoever has seen that it does not; gives its section. Cancel-safe.
    ///
    /// # Errors
    /// Why it does not: as soon as a start has failed that this request has waited for, at once when the next try after one
    /// comes in more than a second or too late for it, else when its time is over; or that too many wait already.
    pub async fn ready(&self, clock: &Clock, until: Deadline) -> Result<u64, Error> {
        let before = self.parked.fetch_add(1, Ordering::Relaxed);
        let _parked = Parked(&self.parked);
        if before >= self.queue {
            let message = format!("too many requests wait for the program of \"{}\" to start", self.name);
            return Err(Error::new(Fault::Overloaded, message));
        }
        let mut known = None;
        loop {
            let now = Instant::now();
            match self.look() {
                Some((row, HostState::Ready)) => return Ok(row.fingerprint()),
                Some((row, HostState::Failed)) => self.weigh(row, &mut known, until)?,
                Some((row, state)) => {
                    known.get_or_insert(row.failures());
                    if state != HostState::Starting {
                        self.ask(row);
                    }
                }
                None => {}
            }
            if until.is_past(now) {
                return Err(self.late());
            }
            clock.sleep(LOOK).await;
        }
    }

    /// A host that has failed: whether it is worth waiting for the next one. Only who waits for that asks for it: one request
    /// is not two starts of a program that is broken.
    fn weigh(&self, row: &HostRow, known: &mut Option<u64>, until: Deadline) -> Result<(), Error> {
        let failures = row.failures();
        // One that has told why it cannot serve has been given up by its host, though it had come up.
        let has_come_up = row.ready_epoch() != 0 && row.fault() == 0;
        let is_new = known.is_some_and(|known| failures > known);
        let pause = Duration::from_nanos(row.retry_ns().saturating_sub(monotonic_ns()));
        let is_far = pause > PAUSE_MAX && !has_come_up;
        if (is_new && !has_come_up) || is_far || Instant::now() + pause >= until.at() {
            return Err(self.failed(row));
        }
        self.ask(row);
        // One that served until it died says nothing about the next.
        if known.is_none() || has_come_up {
            *known = Some(failures);
        }
        Ok(())
    }

    /// Waits for what a call to a section's host comes to, and sees to it that somebody serves it: a connection that was
    /// made just before the last host went lies in its socket until there is another.
    ///
    /// # Errors
    /// The call's own, or why there is no host, as `ready`; then the request has reached nobody.
    pub async fn watch<T, E: From<Error>>(
        &self,
        (clock, until): (&Clock, Deadline),
        section: u64,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut call = pin!(call);
        let (mut looks, mut known) = (0_u32, None);
        loop {
            tokio::select! {
                biased;
                // The call is kept outside the loop; the sleep may be dropped.
                outcome = &mut call => return outcome,
                () = clock.sleep(WATCH) => {}
            }
            match self.look_at(section) {
                // At the first look the end of a call that it had may be on the way to us.
                Some((_, HostState::Failed)) if looks == 0 => looks = 1,
                Some((row, HostState::Failed)) => self.weigh(row, &mut known, until)?,
                // Nobody will ever serve that socket again.
                None if looks > 0 => return Err(self.replaced().into()),
                Some((_, HostState::Cold | HostState::Wanted)) if looks > 0 && self.place().0 != section => {
                    return Err(self.replaced().into());
                }
                None => looks = 1,
                Some((row, HostState::Cold | HostState::Wanted)) => {
                    looks = 1;
                    self.ask(row);
                }
                _ => looks = 0,
            }
        }
    }

    fn failed(&self, row: &HostRow) -> Error {
        let said = row.fault().checked_sub(1).and_then(|place| Fault::ALL.get(usize::try_from(place).ok()?));
        let mut error = match said {
            Some(fault) => Error::new(*fault, row.told()),
            None => {
                let message = format!("the program of \"{}\" could not be started", self.name);
                Error::new(Fault::AdapterSpawnFailed, message)
            }
        };
        let pause = Duration::from_nanos(row.retry_ns().saturating_sub(monotonic_ns()));
        error.retry_after_s = u32::try_from(pause.as_secs()).ok().map(|seconds| seconds.saturating_add(1));
        error.detail(row.cause())
    }

    fn replaced(&self) -> Error {
        let message = format!("the program of \"{}\" was replaced before it had taken the request", self.name);
        Error::new(Fault::ModelLoading, message)
    }

    /// Why its program has seen nothing of a request whose time is over, for whoever has sent it there.
    #[must_use]
    pub fn unseen(&self) -> Error {
        if self.shown() != HostState::Ready {
            return self.late();
        }
        let message = format!("the program of \"{}\" was not free in time", self.name);
        Error::new(Fault::Overloaded, message).detail("its host is ready")
    }

    fn late(&self) -> Error {
        let state = self.shown().name();
        let message = format!("the program of \"{}\" was not ready in time", self.name);
        Error::new(Fault::ModelLoading, message).detail(format!("its host is {state}"))
    }
}
