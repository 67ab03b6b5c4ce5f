//! `mode = "server"`: a program with an OpenAI-compatible HTTP server of its own, started when it is asked for.
//!
//! `keeper` sees to the program's life, `state` is what is known of it, `running` is one run of it. `call` is one request,
//! on a connection of its own (`exchange`), which is proved to be the program's (`owner`).

mod address;
mod call;
mod events;
mod exchange;
mod keeper;
mod owner;
mod running;
mod state;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::config::process::Server as Config;
use evergate_core::{Error, Fault, json};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout_at;

use crate::ask::{Answer, Ask, Endpoint, Mode, Refusal};
use crate::cause::Cause;
use crate::gate::Gate;
use crate::program::{Plan, Programs};
use crate::tasks;
use call::{Bounds, Call};
use keeper::Keeper;
pub use state::Condition;
use state::{Phase, State};

/// Pieces that wait for the client; a program waits at its socket for the rest.
const EVENTS: usize = 4;

/// Serves requests with one program.
pub struct Server {
    state: Arc<watch::Sender<State>>,
    config: Config,
    setup: Setup,
    gate: Gate,
    /// Its end is the keeper's, and so the program's.
    alive: watch::Sender<()>,
}

/// What there is to know besides the mode's own section.
#[derive(Clone, Debug)]
pub struct Setup {
    /// From a start until the program answers.
    pub start_timeout: Duration,
    /// Bytes of one answer, and of one event of a stream.
    pub output_bytes_max: u64,
    /// Whether the program is started without being asked for.
    pub preload: bool,
    /// Ends in a row, before this host, that nobody ordered.
    pub failures: u32,
    /// A folder of the host's own, in which a program without `{port}` finds the path of its socket.
    pub folder: PathBuf,
}

impl Server {
    /// A mode that runs `plan`, in whose arguments and environment `{port}` or `{socket}` stand for where the program is to
    /// listen. To be called within a runtime.
    #[must_use]
    pub fn new(programs: Programs, plan: Plan, config: Config, setup: Setup, gate: Gate) -> Self {
        let state = Arc::new(watch::Sender::new(State::new(setup.preload, setup.failures)));
        let keeper = Keeper {
            programs,
            plan,
            config: config.clone(),
            start_timeout: setup.start_timeout,
            folder: setup.folder.clone(),
            state: Arc::clone(&state),
        };
        let (alive, mut gone) = watch::channel(());
        tasks::finish(async move {
            tokio::select! {
                // A keeper that is dropped ends its program. Nothing is ever sent, so a change is the sender's end.
                () = keeper.keep() => {}
                _ = gone.changed() => {}
            }
        });
        Self { state, config, setup, gate, alive }
    }

    /// How far the program is.
    #[must_use]
    pub fn condition(&self) -> Condition {
        self.state.borrow().condition()
    }

    /// Waits for another condition than `known`. Cancel-safe.
    pub async fn changed(&self, known: &Condition) -> Condition {
        let mut states = self.state.subscribe();
        // The sender is ours.
        let state = states.wait_for(|state| state.condition() != *known).await;
        state.map_or(Condition::Stopped, |state| state.condition())
    }

    /// Waits until the program serves for the first time. Cancel-safe.
    ///
    /// # Errors
    /// Why it does not, as soon as a start has come to nothing.
    pub async fn ready(&self) -> Result<(), Cause> {
        let mut known = self.condition();
        loop {
            match known {
                Condition::Ready(_) => return Ok(()),
                Condition::Failed(cause) => return Err(cause),
                Condition::Stopped => return Err(Cause::new(&state::stopping(), b"")),
                _ => known = self.changed(&known).await,
            }
        }
    }

    /// Waits until a start has come to nothing. Cancel-safe.
    pub async fn failed(&self) -> Cause {
        let mut known = self.condition();
        loop {
            match known {
                Condition::Failed(cause) => return cause,
                _ => known = self.changed(&known).await,
            }
        }
    }

    /// Ends the program for good, and waits until nothing is left of it or `until` has come; says whether nothing is.
    /// Requests that are still under way hear of it, so they should be drained before.
    pub async fn stop(&self, until: Instant) -> bool {
        self.state.send_modify(|state| state.phase = Phase::Stopped);
        timeout_at(until.into(), self.alive.closed()).await.is_ok()
    }

    /// Until when a request waits for its turn and for the program.
    fn patience(&self, ask: &Ask) -> Instant {
        ask.deadline.unwrap_or_else(|| Instant::now() + self.setup.start_timeout)
    }

    /// A line that does not move because the program is not there yet is another thing than one that is too long.
    fn no_place(&self, error: Error, until: Instant) -> Error {
        let is_loading = Instant::now() >= until && !matches!(self.state.borrow().phase, Phase::Ready(_));
        if is_loading { state::loading() } else { error }
    }

    fn body(&self, ask: &Ask) -> Bytes {
        let Config { strip, set, .. } = &self.config;
        if strip.is_empty() && set.is_empty() {
            return ask.body.clone();
        }
        json::filter_fields(&ask.body, strip, set).into()
    }

    fn path(&self, endpoint: Endpoint) -> String {
        let path = match endpoint {
            Endpoint::Chat => "/chat/completions",
            Endpoint::Completions => "/completions",
            Endpoint::Embeddings => "/embeddings",
        };
        format!("{}{path}", self.config.base_path.trim_end_matches('/'))
    }

    /// Sends a request to the program, as soon as there is one.
    async fn begin(&self, ask: &Ask, until: Instant) -> Result<Call, Refusal> {
        let bounds = Bounds {
            deadline: ask.deadline,
            doubt_after: self.config.health_timeout,
            answer_bytes_max: self.setup.output_bytes_max,
        };
        loop {
            let running = state::ready(&self.state, until).await.map_err(Refusal::before)?;
            let connected = timeout_at(until.into(), running.connect()).await;
            let stream = match connected {
                Ok(Ok(stream)) => stream,
                // It has seen nothing yet, so the next one may have it.
                Ok(Err(_)) if running.is_doomed().await => continue,
                Ok(Err(error)) => {
                    running.doubt();
                    let message = "the program of this model takes no connections";
                    return Err(Refusal::before(Error::new(Fault::AdapterProtocolError, message).detail(error)));
                }
                Err(_) => {
                    let message = "the program of this model took no connection in the request's time";
                    return Err(Refusal::before(Error::new(Fault::AdapterTimeout, message)));
                }
            };
            let request = call::request(&self.path(ask.endpoint), &ask.id, self.body(ask)).map_err(|error| {
                Refusal::before(Error::new(Fault::Internal, "the request cannot be sent on").detail(error))
            })?;
            ask.mark.set();
            return Call::begin(running, stream, request, bounds).await.map_err(Refusal::after);
        }
    }
}

impl Mode for Server {
    async fn call(self: Arc<Self>, ask: Ask) -> Result<Answer, Refusal> {
        let until = self.patience(&ask);
        let user = state::enter(&self.state);
        let place = self.gate.enter(until).await;
        let place = place.map_err(|error| Refusal::before(self.no_place(error, until)))?;
        let call = self.begin(&ask, until).await?;
        if !call.is_stream() {
            return call.whole().await.map_err(Refusal::after);
        }
        let (send, mut rest) = mpsc::channel(EVENTS);
        tasks::finish(async move {
            if let Err(error) = call.stream(&send).await {
                // Who has gone hears nothing.
                let _ = send.send(Err(error)).await;
            }
            drop((user, place));
        });
        // Until there is a first word, a failure is an answer of its own.
        match rest.recv().await {
            Some(Ok(first)) => Ok(Answer::Events { first, rest }),
            Some(Err(error)) => Err(Refusal::after(error)),
            None => {
                let message = "the program of this model ended its stream without a word";
                Err(Refusal::after(Error::new(Fault::AdapterProtocolError, message)))
            }
        }
    }
}
