//! The model endpoints: one request from its body to its answer.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use evergate_core::chat::{self, Chunks, Reply};
use evergate_core::config::OnDisconnect;
use evergate_core::deadline::Limit;
use evergate_core::ids::RequestId;
use evergate_core::json::{self, scan_answer};
use evergate_core::redact::GONE;
use evergate_core::router::Place;
use evergate_core::{Cause, Deadline, Error, Fault};
use http::header::{HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use http_body::Body as _;

use super::app::App;
use super::attempts::Asked;
use super::body::Body;
use super::fault::{Bomb, Moment, Planted, planted, strike};
use super::incoming::Incoming;
use super::left::{Left, Watched};
use super::relay::Relay;
use super::scan::scan;
use super::{intake, respond, unread};
use crate::context::{Token, cancelled};
use crate::gate::memory::{Coming, LARGE_BYTES};
use crate::gate::pass::{IsCall, Pass};
use crate::gate::{Arrival, Stage};
use crate::telemetry::names::End;

/// Which endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/embeddings`.
    Embeddings,
}

impl Endpoint {
    /// Everything that `upstream_path` gives.
    pub const UPSTREAM_PATHS: [&str; 3] =
        [Self::Chat.upstream_path(), Self::Completions.upstream_path(), Self::Embeddings.upstream_path()];

    pub(super) const fn upstream_path(self) -> &'static str {
        match self {
            Self::Chat => "/chat/completions",
            Self::Completions => "/completions",
            Self::Embeddings => "/embeddings",
        }
    }
}

/// One request at a model endpoint.
#[derive(Debug)]
pub struct ModelCall {
    /// The worker.
    pub app: Arc<App>,
    /// Where.
    pub endpoint: Endpoint,
    /// Our id.
    pub id: RequestId,
    /// The same as a header's value.
    pub own_id: Option<HeaderValue>,
    /// What was known at arrival.
    pub arrival: Arrival,
    /// Its headers.
    pub headers: HeaderMap,
    /// Cancels it.
    pub token: Arc<Token>,
    /// When its head was read.
    pub started: Instant,
    /// When its client stops waiting, if it has said so.
    pub client_by: Option<Deadline>,
    /// How it goes on without its client, for a model that wants that.
    pub left: Option<Left>,
}

/// Why an answer is not made in place.
enum Stop {
    /// There is none.
    Error(Error),
    /// It may have to outlive its client, and so must be a piece of work by itself.
    Keep(Box<json::Request>, OnDisconnect),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// How a request went: the answer, and the pass if it was admitted.
pub type Outcome = (Result<Response<Body>, Error>, Option<Pass>);

impl ModelCall {
    /// Serves it. What is awaited boxed here is rare or long: the way of a unary call is moved about whole.
    pub async fn run(mut self: Box<Self>, mut body: Incoming) -> Outcome {
        let planted = planted(&self.headers);
        strike(planted, Moment::Head);
        let mut coming = match self.check_head() {
            Ok(coming) => coming,
            Err(error) => {
                unread::leave(body, &self.app.clock);
                return (Err(error), None);
            }
        };
        let announced = self.app.gate.announce(self.id, &self.arrival);
        let body = match body.take_whole(LARGE_BYTES) {
            Some(body) => body,
            None => match Box::pin(self.read(body)).await {
                Ok(body) => body,
                Err(intake::Stopped::Refused(error)) => return (Err(error), None),
                Err(intake::Stopped::ClientGone) => {
                    self.token.cancel(Cause::ClientGone);
                    return (Err(cancelled(Cause::ClientGone)), None);
                }
            },
        };
        coming.iter_mut().for_each(Coming::has_come);
        let deadline = match self.deadline() {
            Ok(deadline) => deadline,
            Err(error) => return (Err(error), None),
        };
        let mut pass = match self.app.gate.admit(self.id, self.arrival.clone(), announced, deadline, &self.token).await
        {
            Ok(pass) => pass,
            Err(error) => return (Err(error), None),
        };
        pass.record.bytes_in = body.len() as u64;
        strike(planted, Moment::Handler);
        let bomb = Bomb::new(planted, Planted::PanicDrop);
        let served = match self.serve(&body, deadline, &mut pass).await {
            Ok(response) => Ok(response),
            Err(Stop::Error(error)) => Err(error),
            Err(Stop::Keep(asked, policy)) => return Box::pin(self.kept(body, *asked, policy, (deadline, pass))).await,
        };
        drop(coming);
        // Not by the end of the scope: the compiler leaks a value on its way out when a drop panics there (rust#47949).
        drop(bomb);
        (served, Some(pass))
    }

    fn check_head(&mut self) -> Result<Option<Coming>, Error> {
        let length = intake::check_head(&self.headers, &self.app.sealed.config)?;
        let by = intake::client_timeout(&self.headers)?;
        self.client_by = by.map(|time| Deadline::new(self.started, time, Limit::Client));
        if length.is_none_or(|bytes| bytes > LARGE_BYTES) {
            self.app.gate.check_room()?;
        }
        self.app.memory.admit(length)
    }

    /// The request's one deadline; its client may have gone beyond its own by now.
    fn deadline(&self) -> Result<Deadline, Error> {
        let total = Deadline::new(self.started, self.app.sealed.config.timeouts.total, Limit::Total);
        let Some(client) = self.client_by else { return Ok(total) };
        if client.is_past(Instant::now()) {
            let message = format!("the request did not arrive within {}", client.limit().key());
            return Err(Error::new(Fault::DeadlineExceeded, message).detail(client.limit().key()));
        }
        Ok(total.min(client))
    }

    /// Reads the body; not beyond the time that a worker which ends has for its requests.
    async fn read(&self, body: Incoming) -> Result<Bytes, intake::Stopped> {
        let is_large = body.size_hint().exact().is_none_or(|bytes| bytes > LARGE_BYTES);
        let _shown = is_large.then(|| self.app.gate.show_incoming(self.id.seq, &self.token));
        let mut stage = self.app.gate.stage();
        tokio::select! {
            // What is there counts. The loser is dropped, and the request with it; waiting for a stage is cancel-safe.
            biased;
            read = intake::read(body, &self.app.sealed.config, (&self.app.clock, &self.app.memory, &self.token)) => read,
            _ = stage.wait_for(|stage| *stage == Stage::Cancelling) => {
                Err(intake::Stopped::Refused(cancelled(self.app.gate.ending())))
            }
        }
    }

    /// Serves a request of a model whose calls may outlive their clients.
    async fn kept(
        mut self: Box<Self>,
        body: Bytes,
        request: json::Request,
        policy: OnDisconnect,
        (deadline, mut pass): (Deadline, Pass),
    ) -> Outcome {
        let left = Left::new(&self.app, policy, &self.token, self.id.seq);
        self.left = Some(left.clone());
        let work = Box::pin(async move {
            let served = self.kept_call(&body, &request, deadline, &mut pass).await;
            (served, pass)
        });
        let (served, pass) = Watched::new(work, left).await;
        (served, Some(pass))
    }

    async fn kept_call(
        &self,
        body: &Bytes,
        request: &json::Request,
        deadline: Deadline,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Error> {
        let route = self.app.router.route(&request.model)?;
        let Place::Upstream { name, model, .. } = route.target else {
            return Err(Error::new(Fault::Internal, "a call of the built-in model was to be kept"));
        };
        self.attempt_each((name, model), route.fallback, &Asked { body, request, deadline }, pass).await
    }

    async fn serve(&self, body: &Bytes, deadline: Deadline, pass: &mut Pass) -> Result<Response<Body>, Stop> {
        let asked = scan(&self.app, body, deadline).await?;
        let route = match self.app.router.route(&asked.model) {
            Ok(route) => route,
            Err(error) => {
                pass.set_model(self.shown(&asked.model), "other");
                return Err(error.into());
            }
        };
        // The names of the configuration are no keys.
        let is_configured = asked.model == route.label;
        pass.set_model(if is_configured { route.label } else { self.shown(&asked.model) }, route.label);
        // Embeddings have no stream; the field is the upstream's to judge.
        if asked.is_stream && self.endpoint != Endpoint::Embeddings {
            pass.set_stream();
        }
        match &route.target {
            Place::Echo => Ok(Box::pin(self.echo(body, &asked, pass)).await?),
            Place::Upstream { .. } if route.on_disconnect != OnDisconnect::Cancel => {
                let policy = route.on_disconnect;
                Err(Stop::Keep(Box::new(asked), policy))
            }
            Place::Upstream { name, model, .. } => {
                let asked = Asked { body, request: &asked, deadline };
                let is_plain = route.fallback.targets.is_empty() && !pass.record.is_stream;
                let has_line = self.app.limits.contains_key(&**name) || self.app.locals.contains_key(&**name);
                if is_plain && !has_line {
                    let attempt = self.begin((name, model), &asked, pass)?;
                    return self.whole(attempt, pass).await.map_err(|failure| failure.error.into());
                }
                Ok(Box::pin(self.attempt_each((name, model), route.fallback, &asked, pass)).await?)
            }
        }
    }

    /// A model's name as the client has written it, which may be anything, a key too, and stays on the board until its row
    /// is used again, and in the record.
    fn shown<'a>(&self, model: &'a str) -> &'a str {
        if self.app.tells_secret(model, &self.headers) { GONE } else { model }
    }

    async fn echo(&self, body: &[u8], asked: &json::Request, pass: &mut Pass) -> Result<Response<Body>, Error> {
        pass.set_backend("echo", IsCall::No);
        if self.endpoint == Endpoint::Embeddings {
            let answer = chat::embeddings(body, &asked.model)?;
            pass.note_first_token();
            pass.record.usage = scan_answer(answer.as_bytes()).ok().and_then(|answer| answer.usage);
            return Ok(respond::json(StatusCode::OK, answer));
        }
        let is_chat = self.endpoint == Endpoint::Chat;
        let reply = Reply {
            id: format!("{}{}", if is_chat { "chatcmpl-" } else { "cmpl-" }, self.id),
            created: evergate_sys::unix_ms() / 1000,
            model: asked.model.clone(),
            text: json::messages_text(body)?,
            tokens_in: None,
            wants_usage: asked.wants_usage,
        };
        if pass.record.is_stream {
            let tokens = chat::count_tokens(&reply.text);
            let chunks = if is_chat { Chunks::chat(reply) } else { Chunks::text(reply) };
            pass.record.usage = Some(json::Usage { tokens_in: tokens, tokens_out: tokens, is_suspect: false });
            let timeouts = &self.app.sealed.config.timeouts;
            let limits = self.limits(Deadline::new(self.started, timeouts.total, Limit::Total));
            let held = self.hold_head(Relay::echo(chunks, limits), Instant::now() + timeouts.head_hold, pass).await;
            return held.map_err(|failure| failure.error);
        }
        let answer = if is_chat { chat::completion(&reply) } else { chat::text_completion(&reply) };
        pass.note_first_token();
        pass.record.usage = scan_answer(answer.as_bytes()).ok().and_then(|answer| answer.usage);
        Ok(respond::json(StatusCode::OK, answer))
    }
}

/// Closes the books of a request: the status that is sent, and how it ended if that is known now.
pub fn settle(pass: &mut Pass, served: &Result<Response<Body>, Error>) {
    match served {
        // A stream's end is known when it is there.
        Ok(response) if pass.record.is_stream => pass.record.sent_status = Some(response.status().as_u16()),
        Ok(response) => {
            pass.record.bytes_out = response.body().len() as u64;
            pass.set_end(response.status().as_u16(), End::Ok);
        }
        Err(error) => pass.set_error(error.status(), error),
    }
}
