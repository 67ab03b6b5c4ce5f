//! The processes of a model: carries out what the rule decides, and passes on what happens.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use evergate_core::config::process::Frames;
use evergate_core::{Error, Fault};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{sleep_until, timeout_at};

use super::process::{self, Order};
use super::rule::{Action, Number, Rule, Ticket};
use crate::cause::Cause;
use crate::program::{Plan, Programs};
use crate::report::Report;
use crate::tasks;

/// Orders that a process may have before it; there are at most two for each of its places, and the last one.
const ORDERS: usize = 2 * 1024 + 2;

/// What comes of waiting.
pub(crate) type Given = Result<Place, Error>;

/// What a process is started and held to.
pub(crate) struct Shared {
    pub(crate) programs: Programs,
    pub(crate) plan: Plan,
    pub(crate) frames: Frames,
    pub(crate) start_timeout: Duration,
    pub(crate) first_output: Duration,
    pub(crate) idle: Duration,
    pub(crate) rss_max: u64,
    pub(crate) output_bytes_max: u64,
    pub(crate) report: Arc<dyn Report>,
    pub(crate) state: Mutex<State>,
    /// Something may be due at another time than was thought.
    pub(crate) wake: Notify,
    /// Something has changed, for whoever waits for a state of the whole.
    pub(crate) changed: Notify,
}

/// What changes.
pub(crate) struct State {
    pub(crate) rule: Rule,
    pub(crate) waiting: BTreeMap<Ticket, oneshot::Sender<Given>>,
    pub(crate) processes: BTreeMap<Number, mpsc::Sender<Order>>,
    /// What was last reported of whether any is ready.
    pub(crate) told_ready: Option<bool>,
    /// Why the last start failed.
    pub(crate) failure: Option<Cause>,
}

/// A place with a process, until it is dropped.
pub(crate) struct Place {
    shared: Arc<Shared>,
    number: Number,
    pub(crate) orders: mpsc::Sender<Order>,
    /// The process's resident set when the request had ended.
    pub(crate) rss: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let (number, rss) = (self.number, self.rss);
        self.shared.tell(|rule| rule.free(number, rss, Instant::now()));
    }
}

/// A request in the line; dropping it leaves the line.
struct Waiting<'a> {
    shared: &'a Arc<Shared>,
    ticket: Ticket,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let ticket = self.ticket;
        // Whatever was given to it goes back when the lock is free.
        let left = self.shared.state().waiting.remove(&ticket);
        if left.is_some() {
            self.shared.tell(|rule| rule.leave(ticket));
        }
    }
}

impl Shared {
    /// Waits for a place, in turn. Cancel-safe. `is_again`: for a request whose process died before it was told of it.
    ///
    /// # Errors
    /// `Overloaded` when the line is full or there was no place until `until`, `ModelLoading` when none was ready by then, or
    /// why there is no process.
    pub(crate) async fn enter(self: &Arc<Self>, until: Option<Instant>, is_again: bool) -> Result<Place, Error> {
        let (send, mut given) = oneshot::channel();
        let waiting = {
            let mut state = self.state();
            let Some(ticket) = state.rule.enter(is_again) else {
                let message = "the processes of this model have their hands full, and others wait";
                return Err(Error::new(Fault::Overloaded, message));
            };
            state.waiting.insert(ticket, send);
            Waiting { shared: self, ticket }
        };
        self.tell(|_| ());
        let lost = || Err(Error::new(Fault::Internal, "the request's turn was lost"));
        let place = match until {
            None => (&mut given).await.unwrap_or_else(|_| lost()),
            Some(until) => match timeout_at(until.into(), &mut given).await {
                Ok(place) => place.unwrap_or_else(|_| lost()),
                Err(_) => Err(self.not_in_time()),
            },
        };
        drop(waiting);
        place
    }

    fn not_in_time(&self) -> Error {
        if self.state().rule.has_ready() {
            return Error::new(Fault::Overloaded, "no process of this model was free in time");
        }
        Error::new(Fault::ModelLoading, "this model was not ready in time")
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A start came to nothing.
    pub(crate) fn failed(self: &Arc<Self>, number: Number, cause: Cause) {
        self.state().failure = Some(cause);
        self.tell(|rule| rule.failed(number, Instant::now()));
    }

    /// A process is to get nothing more.
    pub(crate) fn retire(self: &Arc<Self>, number: Number) {
        self.tell(|rule| rule.retire(number));
    }

    /// A process is on its way out, and why.
    pub(crate) fn ending(self: &Arc<Self>, number: Number, cause: Option<Cause>) {
        if cause.is_some() {
            self.state().failure = cause;
        }
        self.tell(|rule| rule.ending(number, Instant::now()));
    }

    /// Nothing of a process is left.
    pub(crate) fn gone(self: &Arc<Self>, number: Number) {
        self.state().processes.remove(&number);
        self.tell(|rule| rule.gone(number));
    }

    /// Waits until the state of the whole gives something. Cancel-safe.
    pub(crate) async fn until<T>(&self, look: impl Fn(&State) -> Option<T>) -> T {
        loop {
            // Made before the look, it hears of what comes after it.
            let changed = self.changed.notified();
            if let Some(found) = look(&self.state()) {
                return found;
            }
            changed.await;
        }
    }

    /// Passes on what has happened, and does what comes of it.
    pub(crate) fn tell(self: &Arc<Self>, event: impl FnOnce(&mut Rule)) {
        let answers = {
            let mut state = self.state();
            event(&mut state.rule);
            let answers = self.act(&mut state);
            let (in_flight, waiting) = state.rule.load();
            self.report.load(in_flight, waiting);
            let is_any_ready = state.rule.has_ready();
            if state.told_ready.replace(is_any_ready) != Some(is_any_ready) {
                self.report.serves(is_any_ready);
            }
            answers
        };
        // Without the lock: a place that nobody takes any more goes back at once.
        for (to, answer) in answers {
            drop(to.send(answer));
        }
        self.wake.notify_one();
        self.changed.notify_waiters();
    }

    fn act(self: &Arc<Self>, state: &mut State) -> Vec<(oneshot::Sender<Given>, Given)> {
        let mut answers = Vec::new();
        for action in state.rule.decide(Instant::now()) {
            match action {
                Action::Start(number) => {
                    let (orders, heard) = mpsc::channel(ORDERS);
                    state.processes.insert(number, orders);
                    tasks::finish(process::live(Arc::clone(self), number, heard));
                }
                Action::Give { ticket, to } => {
                    let Some(orders) = state.processes.get(&to).cloned() else { continue };
                    let place = Place { shared: Arc::clone(self), number: to, orders, rss: 0 };
                    match state.waiting.remove(&ticket) {
                        Some(waiting) => answers.push((waiting, Ok(place))),
                        // It has just left; somebody to send it back without the lock.
                        None => answers.push((oneshot::channel().0, Ok(place))),
                    }
                }
                Action::Drain(number) => {
                    // One that does not hear is gone.
                    let _ = state.processes.get(&number).map(|orders| orders.try_send(Order::Drain));
                }
                Action::Refuse(ticket) => {
                    let error = refusal(state);
                    answers.extend(state.waiting.remove(&ticket).map(|waiting| (waiting, Err(error))));
                }
            }
        }
        answers
    }
}

/// Why nobody can be served.
fn refusal(state: &State) -> Error {
    if state.rule.is_stopping() {
        return Error::new(Fault::ServerShuttingDown, "this model is being stopped");
    }
    match &state.failure {
        Some(cause) => cause.error(),
        None => Error::new(Fault::ModelLoading, "this model has no process"),
    }
}

/// Looks at what is due, until nothing will be any more.
pub(crate) async fn keep(shared: Arc<Shared>) {
    loop {
        let wake = {
            let state = shared.state();
            if state.rule.is_stopping() && state.rule.is_empty() {
                return;
            }
            state.rule.wake(Instant::now())
        };
        tokio::select! {
            // Both are cancel-safe: a notification is kept, a moment is a value.
            () = shared.wake.notified() => {}
            () = async { match wake { Some(wake) => sleep_until(wake.into()).await, None => std::future::pending().await } } => {
                shared.tell(|_| ());
            }
        }
    }
}
