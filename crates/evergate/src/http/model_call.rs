//! The model endpoints: one request from its body to its answer.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use evergate_board::InflightPhase;
use evergate_core::chat::{self, Chunks, Reply};
use evergate_core::deadline::Limit;
use evergate_core::ids::RequestId;
use evergate_core::json::{self, scan_answer, scan_request};
use evergate_core::router::{Place, Route};
use evergate_core::{Cause, Deadline, Error, Fault, traceparent};
use evergate_upstream::{Answer, AnswerBody, Call, Client};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use hyper::body::Incoming;

use super::app::App;
use super::body::{Body, Stream};
use super::fault::{Moment, planted, strike};
use super::relay::{Calling, Limits, Relay};
use super::{intake, refusal, respond};
use crate::context::{Token, cancelled};
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

    const fn upstream_path(self) -> &'static str {
        match self {
            Self::Chat => "/chat/completions",
            Self::Completions => "/completions",
            Self::Embeddings => "/embeddings",
        }
    }
}

/// Client headers that travel on to an upstream; all others stay here.
const FORWARDED: [HeaderName; 3] = [
    HeaderName::from_static("openai-beta"),
    HeaderName::from_static("anthropic-beta"),
    HeaderName::from_static("idempotency-key"),
];
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Most bytes of an upstream's error answer that are read.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;

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
}

/// How a request went: the answer, and the pass if it was admitted.
pub type Outcome = (Result<Response<Body>, Error>, Option<Pass>);

impl ModelCall {
    /// Serves it. What is awaited boxed here is rare or long: the way of a unary call is moved about whole.
    pub async fn run(self, body: Incoming) -> Outcome {
        let config = &self.app.sealed.config;
        if let Err(error) = intake::check_head(&self.headers, config) {
            return (Err(error), None);
        }
        let announced = self.app.gate.announce(self.id, &self.arrival);
        let body = match self.read(body).await {
            Ok(body) => body,
            Err(intake::Stopped::Refused(error)) => return (Err(error), None),
            Err(intake::Stopped::ClientGone) => {
                self.token.cancel(Cause::ClientGone);
                return (Err(cancelled(Cause::ClientGone)), None);
            }
        };
        let deadline = Deadline::new(self.started, config.timeouts.total, Limit::Total);
        let mut pass = match self.app.gate.admit(self.id, self.arrival.clone(), announced, deadline, &self.token).await
        {
            Ok(pass) => pass,
            Err(error) => return (Err(error), None),
        };
        pass.record.bytes_in = body.len() as u64;
        strike(planted(&self.headers), Moment::Handler);
        let served = self.serve(body, deadline, &mut pass).await;
        (served, Some(pass))
    }

    /// Reads the body; not beyond the time that a worker which ends has for its requests.
    async fn read(&self, body: Incoming) -> Result<Bytes, intake::Stopped> {
        let mut stage = self.app.gate.stage();
        tokio::select! {
            // Most bodies are there already. The loser is dropped, and the request with it; waiting for a stage is
            // cancel-safe.
            biased;
            read = intake::read(body, &self.app.sealed.config, &self.app.clock) => read,
            _ = stage.wait_for(|stage| *stage == Stage::Cancelling) => {
                Err(intake::Stopped::Refused(cancelled(Cause::Draining)))
            }
        }
    }

    async fn serve(&self, body: Bytes, deadline: Deadline, pass: &mut Pass) -> Result<Response<Body>, Error> {
        let limits = json::Limits { depth: self.app.sealed.config.limits.json_depth };
        let asked = scan_request(&body, &limits)?;
        let route = match self.app.router.route(&asked.model) {
            Ok(route) => route,
            Err(error) => {
                pass.set_model(&asked.model, "other");
                return Err(error);
            }
        };
        pass.set_model(&asked.model, route.label);
        // Embeddings have no stream; the field is the upstream's to judge.
        if asked.is_stream && self.endpoint != Endpoint::Embeddings {
            pass.set_stream();
        }
        match &route.target {
            Place::Echo => Box::pin(self.echo(&body, &asked, pass)).await,
            Place::Upstream { name, model, .. } => {
                let body = if **model == *asked.model {
                    body.clone()
                } else {
                    json::splice(&body, asked.model_span.clone(), model).into()
                };
                let client = self.client(&route, name)?;
                pass.set_backend(name, IsCall::Yes);
                pass.enter(InflightPhase::Wait);
                if pass.record.is_stream {
                    Box::pin(self.stream(client, name, body, deadline, pass)).await
                } else {
                    self.whole(&client, name, body, deadline, pass).await
                }
            }
        }
    }

    fn client(&self, route: &Route<'_>, name: &str) -> Result<Arc<Client>, Error> {
        self.app.clients.get(name).map(Arc::clone).ok_or_else(|| {
            Error::new(Fault::Internal, "the model's upstream is not there")
                .detail(format!("{} -> {name}", route.label))
        })
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
            wants_usage: asked.wants_usage,
        };
        if pass.record.is_stream {
            let tokens = chat::count_tokens(&reply.text);
            let chunks = if is_chat { Chunks::chat(reply) } else { Chunks::text(reply) };
            pass.record.usage = Some(json::Usage { tokens_in: tokens, tokens_out: tokens, is_suspect: false });
            return self
                .hold_head(
                    Relay::echo(
                        chunks,
                        self.limits(Deadline::new(self.started, self.app.sealed.config.timeouts.total, Limit::Total)),
                    ),
                    pass,
                )
                .await;
        }
        let answer = if is_chat { chat::completion(&reply) } else { chat::text_completion(&reply) };
        pass.note_first_token();
        pass.record.usage = scan_answer(answer.as_bytes()).ok().and_then(|answer| answer.usage);
        Ok(respond::json(StatusCode::OK, answer))
    }

    fn call(&self, body: Bytes, deadline: Deadline) -> Call {
        let mut headers = HeaderMap::new();
        let (mut parent, mut state, mut parents) = (None, None, 0);
        // One walk over the few that there are, instead of a look-up for each that might be.
        for (name, value) in &self.headers {
            if *name == TRACEPARENT {
                parent = Some(value);
                parents += 1;
            } else if *name == TRACESTATE {
                state = state.or(Some(value));
            } else if FORWARDED.contains(name) && !headers.contains_key(name) {
                headers.insert(name.clone(), value.clone());
            }
        }
        // Two cannot both be the parent.
        if let Some(parent) = parent.filter(|parent| parents == 1 && traceparent::is_valid(parent.as_bytes())) {
            headers.insert(TRACEPARENT, parent.clone());
            if let Some(state) = state {
                headers.insert(TRACESTATE, state.clone());
            }
        }
        if let Some(id) = &self.own_id {
            headers.insert(respond::REQUEST_ID, id.clone());
        }
        Call { path: self.endpoint.upstream_path(), headers, body, deadline, first_byte: None }
    }

    /// A unary call: the answer is read whole, checked and passed on byte for byte.
    async fn whole(
        &self,
        client: &Client,
        name: &str,
        body: Bytes,
        deadline: Deadline,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Error> {
        let answer = client.call(self.call(body, deadline)).await.map_err(|failure| failure.error)?;
        pass.note_first_token();
        if !answer.status.is_success() {
            return Err(Box::pin(self.refused(name, answer, deadline)).await);
        }
        let limits = &self.app.sealed.config.limits;
        let (status, headers) = (answer.status, answer.headers);
        let body = self.read_whole(answer.body, name, deadline, limits.answer_bytes).await?;
        let bad = |message: String| Error::new(Fault::UpstreamBadResponse, message);
        let seen = scan_answer(&body).map_err(|broken| {
            bad(format!("the upstream \"{name}\" sent an answer that is not JSON"))
                .detail(format!("byte {}: expected {}", broken.at, broken.expected))
        })?;
        if seen.has_error {
            return Err(refusal::of_object(&self.app, name, seen.error_message.as_deref()));
        }
        if !seen.has_choices_or_data {
            return Err(bad(format!("the upstream \"{name}\" sent an answer without choices or data")));
        }
        pass.record.usage = seen.usage;
        let mut response = respond::json(status, body);
        pass_headers(&headers, response.headers_mut());
        Ok(response)
    }

    async fn read_whole(
        &self,
        mut body: AnswerBody,
        name: &str,
        deadline: Deadline,
        bytes_max: u64,
    ) -> Result<Bytes, Error> {
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        loop {
            let idle = Deadline::new(Instant::now(), self.app.sealed.config.timeouts.idle, Limit::Idle);
            let until = deadline.min(idle);
            let data = match self.app.clock.timeout_at(until.at(), body.data()).await {
                Ok(Some(data)) => data?,
                Ok(None) => break,
                Err(_) => {
                    let fault =
                        if until.limit() == Limit::Idle { Fault::UpstreamTimeout } else { Fault::DeadlineExceeded };
                    let message =
                        format!("the upstream \"{name}\" did not finish its answer within {}", until.limit().key());
                    return Err(Error::new(fault, message));
                }
            };
            if (first.len() + rest.len() + data.len()) as u64 > bytes_max {
                let message = format!("the upstream \"{name}\" sent more than {bytes_max} bytes (limits.answer)");
                return Err(Error::new(Fault::UpstreamBadResponse, message));
            }
            if first.is_empty() && rest.is_empty() {
                first = data;
            } else {
                // One piece needs no copy; the second begins one.
                if !first.is_empty() {
                    rest.extend_from_slice(&std::mem::take(&mut first));
                }
                rest.extend_from_slice(&data);
            }
        }
        Ok(if rest.is_empty() { first } else { rest.freeze() })
    }

    /// The error for an answer that is not a 2xx. Its body only adds words, so no failure to read it matters.
    async fn refused(&self, name: &str, answer: Answer, deadline: Deadline) -> Error {
        let Answer { status, headers, body } = answer;
        let read = self.read_whole(body, name, deadline, REFUSAL_BYTES_MAX as u64).await.unwrap_or_default();
        refusal::of(&self.app, name, status, &headers, &read)
    }

    fn limits(&self, deadline: Deadline) -> Limits {
        let timeouts = &self.app.sealed.config.timeouts;
        let now = Instant::now();
        Limits {
            total: deadline,
            first_token: Deadline::new(now, timeouts.first_token, Limit::FirstToken),
            stream_total: Deadline::new(self.started, timeouts.stream_total, Limit::StreamTotal),
            idle: timeouts.idle,
            clock: self.app.clock.clone(),
            event_bytes: usize::try_from(self.app.sealed.config.limits.event_bytes).unwrap_or(usize::MAX),
        }
    }

    async fn stream(
        &self,
        client: Arc<Client>,
        name: &str,
        body: Bytes,
        deadline: Deadline,
        pass: &mut Pass,
    ) -> Result<Response<Body>, Error> {
        let limits = self.limits(deadline);
        let call = self.call(body, deadline.min(limits.stream_total));
        let asking = Self {
            app: Arc::clone(&self.app),
            headers: HeaderMap::new(),
            arrival: Arrival::default(),
            token: Arc::clone(&self.token),
            own_id: None,
            ..*self
        };
        let upstream = name.to_owned();
        let calling: Calling = Box::pin(async move {
            let answer = client.call(call).await.map_err(|failure| failure.error)?;
            if !answer.status.is_success() {
                return Err(asking.refused(&upstream, answer, deadline).await);
            }
            let kind = answer.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
            if kind.get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream")) {
                return Ok(answer.body);
            }
            let message = format!("the upstream \"{upstream}\" answered a stream request with something else");
            Err(Error::new(Fault::UpstreamBadResponse, message))
        });
        let (app, upstream) = (Arc::clone(&self.app), name.to_owned());
        let on_error_event = Box::new(move |message: Option<&str>| refusal::of_object(&app, &upstream, message));
        self.hold_head(Relay::new(calling, name.to_owned(), on_error_event, limits), pass).await
    }

    /// Waits with the response head until the first event, so that an early failure has a real status; longer than
    /// `head_hold` it does not wait, so that clients and proxies see the answer begin.
    async fn hold_head(&self, mut relay: Relay, pass: &mut Pass) -> Result<Response<Body>, Error> {
        let timeouts = &self.app.sealed.config.timeouts;
        let first = std::future::poll_fn(|cx| {
            loop {
                match std::task::ready!(relay.poll_next(cx)) {
                    // Comments alone do not commit: what follows may still be a refusal.
                    Some(Ok(_)) if !relay.has_begun() => {}
                    first => return std::task::Poll::Ready(first),
                }
            }
        });
        let first = match self.app.clock.timeout_at(Instant::now() + timeouts.head_hold, first).await {
            Ok(Some(Ok(first))) => {
                pass.note_first_token();
                Some(first)
            }
            Ok(Some(Err(error))) => return Err(error),
            Ok(None) => return Err(Error::new(Fault::UpstreamBadResponse, "the upstream's stream holds no event")),
            Err(_) => Some(Bytes::from_static(b": waiting for the model\n\n")),
        };
        pass.record.usage = relay.usage().or(pass.record.usage);
        Ok(respond::stream(Body::stream(Stream {
            relay,
            first,
            token: Arc::clone(&self.token),
            keepalive: timeouts.keepalive,
            planted: planted(&self.headers),
            pinger: None,
            written_at: Instant::now(),
            clock: self.app.clock.clone(),
        })))
    }
}

/// Headers of an upstream's answer that travel on.
fn pass_headers(from: &HeaderMap, to: &mut HeaderMap) {
    for (name, value) in from {
        let text = name.as_str();
        if text.starts_with("x-ratelimit-") || text == "openai-processing-ms" || text == "openai-version" {
            to.append(name.clone(), value.clone());
        }
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
