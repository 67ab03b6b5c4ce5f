//! `mode = "stdio"`: a pool of processes that are kept, and speak frames (docs/stdio-protocol.md).

mod answer;
mod frames;
mod pool;
mod process;
mod rule;
mod said;
mod serving;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use evergate_core::config::process::Stdio as Config;
use evergate_core::{Error, Fault};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout_at;

use crate::ask::{Answer, Ask, Endpoint, Mode, Refusal};
use crate::cause::Cause;
use crate::program::{Plan, Programs};
use crate::report::Report;
use crate::{tasks, tell};
use answer::Request;
use pool::{Shared, State};
use process::Lost;
use rule::{Rule, Settings};

/// Processes that a request is given to, of which none reads it: it may be what ends them.
const TRIES: u32 = 3;
/// Events that wait for the client.
const EVENTS: usize = 4;

/// Serves requests with processes that live longer than one. Dropping it ends them, each when it has nothing to do.
pub struct Stdio(Arc<Shared>);

/// What there is to know besides the mode's own section.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Until a process is ready.
    pub start_timeout: Duration,
    /// Bytes of one frame, and of one answer.
    pub output_bytes_max: u64,
    /// Requests at once, over all processes.
    pub in_flight_max: u32,
    /// Requests that wait for a place.
    pub queue: u32,
}

impl Stdio {
    /// A pool of processes that run `plan`; the fewest are started at once. To be called within the runtime.
    #[must_use]
    pub fn new(programs: Programs, plan: Plan, config: &Config, bounds: Bounds, report: Arc<dyn Report>) -> Self {
        let settings = Settings {
            min: config.min,
            max: config.max.max(config.min).max(1),
            in_flight_max: bounds.in_flight_max,
            queue: bounds.queue,
            requests_max: config.requests_max,
            lifetime_max: config.lifetime_max,
            rss_max: config.rss_max,
        };
        let rule = Rule::new(settings, Instant::now(), evergate_sys::unix_ms() ^ u64::from(std::process::id()));
        let shared = Arc::new(Shared {
            programs,
            plan,
            frames: config.frames,
            start_timeout: bounds.start_timeout,
            first_output: config.first_output,
            idle: config.idle,
            rss_max: config.rss_max,
            output_bytes_max: bounds.output_bytes_max,
            report,
            state: Mutex::new(State {
                rule,
                waiting: BTreeMap::new(),
                processes: BTreeMap::new(),
                told_ready: None,
                failure: None,
            }),
            wake: Notify::new(),
            changed: Notify::new(),
        });
        shared.tell(|_| ());
        tasks::finish(pool::keep(Arc::clone(&shared)));
        Self(shared)
    }

    /// Takes no request any more, and drains every process when it has none. Says whether all were gone by `until`; what is
    /// left then is [`Programs::end_all`]'s.
    pub async fn stop(&self, until: Instant) -> bool {
        self.0.tell(Rule::stop);
        let gone = self.0.until(|state| state.rule.is_empty().then_some(()));
        timeout_at(until.into(), gone).await.is_ok()
    }

    /// Waits until a process can take requests for the first time. Cancel-safe.
    ///
    /// # Errors
    /// Why none can, as soon as starts have come to nothing.
    pub async fn ready(&self) -> Result<(), Cause> {
        let is_ready = |state: &State| state.rule.has_ready().then_some(Ok(()));
        self.0.until(|state| is_ready(state).or_else(|| hopeless(state).map(Err))).await
    }

    /// Waits until there is no process, and none can be started at once. Cancel-safe.
    pub async fn failed(&self) -> Cause {
        self.0.until(hopeless).await
    }
}

fn hopeless(state: &State) -> Option<Cause> {
    state.failure.clone().filter(|_| state.rule.is_hopeless(Instant::now()))
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.0.tell(Rule::stop);
    }
}

impl Mode for Stdio {
    async fn call(self: Arc<Self>, ask: Ask) -> Result<Answer, Refusal> {
        for time in 0..TRIES {
            let is_again = time > 0;
            let place = self.0.enter(ask.deadline, is_again).await.map_err(Refusal::before)?;
            let heard = match Request::send(&ask, place) {
                Ok(mut request) => request.next().await.map(|heard| (heard, request)),
                Err(lost) => Err(lost),
            };
            match heard {
                Ok((heard, request)) => return self.answer(ask, heard, request).await,
                Err(Lost::Refused(refusal)) => return Err(refusal),
                Err(Lost::Unseen) => {}
            }
        }
        let message = "the processes of this model ended before they had read the request";
        Err(Refusal::before(Error::new(Fault::AdapterExited, message)))
    }
}

impl Stdio {
    async fn answer(&self, ask: Ask, heard: process::Heard, request: Request) -> Result<Answer, Refusal> {
        let (reply, bytes_max) = (tell::reply(&ask), self.0.output_bytes_max);
        if !ask.request.is_stream || ask.endpoint == Endpoint::Embeddings {
            let whole = answer::whole(&ask, reply, heard, request, bytes_max).await;
            return whole.map(Answer::Whole).map_err(Refusal::after);
        }
        let (send, mut rest) = mpsc::channel(EVENTS);
        tasks::finish(async move {
            if let Err(error) = answer::stream(&ask, &reply, heard, request, (&send, bytes_max)).await {
                // Who has gone hears nothing.
                let _ = send.send(Err(error)).await;
            }
        });
        match rest.recv().await {
            Some(Ok(first)) => Ok(Answer::Events { first, rest }),
            Some(Err(error)) => Err(Refusal::after(error)),
            None => Err(Refusal::after(Error::new(Fault::Internal, "the answer was lost"))),
        }
    }
}
