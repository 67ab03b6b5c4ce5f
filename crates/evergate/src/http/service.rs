//! One request head to one response: dispatch, the door, the panic boundary, the books.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use evergate_core::ids::{RequestId, is_well_formed};
use evergate_core::{Cause, Error, Fault, chat, head};
use http::header::{ALLOW, CONNECTION, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};

use super::app::App;
use super::body::{Active, Body};
use super::incoming::Incoming;
use super::model_call::{Endpoint, ModelCall, settle};
use super::{cors, respond, unread};
use crate::context::{Token, cancelled};
use crate::gate::Arrival;
use crate::gate::load::Newcomer;
use crate::panics;
use crate::server::connection::limits;
use crate::server::shared::{Refused, Shared};
use crate::tasks::Caught;
use crate::telemetry::names::End;
use evergate_board::MasterPhase;

/// What an error says of a method; all that are registered are shorter.
const METHOD_BYTES_MAX: usize = 32;

/// The service of one client connection.
#[derive(Clone, Debug)]
pub struct Service {
    app: Arc<App>,
    shared: Arc<Shared>,
    newcomer: Arc<Newcomer>,
}

/// What is known of a request by its head alone.
#[derive(Clone, Copy, Debug)]
struct Seen {
    id: RequestId,
    path: Path,
    method: &'static str,
    started: Instant,
}

/// A request before anything was made of it. Boxed, and taken apart before the first wait: what a future is given, and what
/// it has while it waits, it has room for all the time.
struct Asked {
    request: Request<Incoming>,
    /// The client's own id, or empty.
    client_id: String,
    /// Our id as a header's value.
    own_id: Option<HeaderValue>,
    /// That its head was refused.
    refused: Option<Box<Refused>>,
}

/// What follows a request's head.
enum Next {
    /// A model is called.
    Call(Box<ModelCall>, Incoming),
    /// It is answered.
    Done(Box<Result<Response<Body>, Error>>),
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Model(Endpoint),
    Models,
    OneModel,
    Healthz,
    Readyz,
    Unknown,
}

impl Path {
    fn of(path: &str) -> Self {
        match path {
            "/v1/chat/completions" => Self::Model(Endpoint::Chat),
            "/v1/completions" => Self::Model(Endpoint::Completions),
            "/v1/embeddings" => Self::Model(Endpoint::Embeddings),
            "/v1/models" => Self::Models,
            "/healthz" => Self::Healthz,
            "/readyz" => Self::Readyz,
            path if path.starts_with("/v1/models/") => Self::OneModel,
            _ => Self::Unknown,
        }
    }

    /// That of a head which was refused. A probe's is no probe's any more: it is on record.
    fn of_refused(path: &str) -> Self {
        Some(Self::of(path)).filter(|path| !matches!(path, Self::Healthz | Self::Readyz)).unwrap_or(Self::Unknown)
    }

    /// As labelled: a bounded set.
    fn label(self) -> &'static str {
        match self {
            Self::Model(Endpoint::Chat) => "/v1/chat/completions",
            Self::Model(Endpoint::Completions) => "/v1/completions",
            Self::Model(Endpoint::Embeddings) => "/v1/embeddings",
            Self::Models => "/v1/models",
            Self::OneModel => "/v1/models/{id}",
            Self::Healthz => "/healthz",
            Self::Readyz => "/readyz",
            Self::Unknown => "other",
        }
    }

    fn allowed(self) -> &'static str {
        if matches!(self, Self::Model(_)) { "POST" } else { "GET" }
    }
}

fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// As it was sent: any word of the characters that methods are made of (RFC 9110, 5.6.2), none of which needs an escape.
fn method_sent(method: &Method) -> String {
    match method.as_str().split_at_checked(METHOD_BYTES_MAX) {
        Some((start, rest)) if !rest.is_empty() => format!("{start}..."),
        _ => method.to_string(),
    }
}

impl Service {
    /// The service of the connection that `shared` belongs to.
    #[must_use]
    pub fn new(app: Arc<App>, shared: Arc<Shared>) -> Self {
        let newcomer = Arc::new(Newcomer::new(app.gate.load()));
        Self { app, shared, newcomer }
    }

    async fn serve(self, asked: Box<Asked>, seen: Seen, (token, active): (Arc<Token>, Active)) -> Response<Body> {
        let Seen { id, path, started, .. } = seen;
        let (arrival, next) = self.begin(*asked, seen, &token);
        let (served, mut pass) = match next {
            Next::Call(call, body) => call.run(body).await,
            Next::Done(served) => (*served, None),
        };
        match &mut pass {
            Some(pass) => settle(pass, &served),
            // Probes come every second and tell nothing of what was served.
            None if matches!(path, Path::Healthz | Path::Readyz) => {}
            None => {
                let (status, end) = match &served {
                    _ if token.cause() == Some(Cause::ClientGone) => (499, End::ClientGone),
                    Ok(response) => (response.status().as_u16(), End::Ok),
                    Err(error) => (error.status(), End::Fault(error.fault)),
                };
                token.account();
                self.app.gate.record_unadmitted(id, arrival, started, (status, end), served.as_ref().err());
            }
        }
        let mut response = served.unwrap_or_else(|error| {
            let error = self.app.clean(error);
            let mut response = respond::error(&error);
            if error.fault == Fault::MethodNotAllowed {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(path.allowed()));
            }
            response
        });
        response.body_mut().hold(pass, active);
        response
    }

    /// The client's own id, if it can be one. It is echoed, and stays on the board and in records: a key must not.
    fn client_id<'a>(&self, headers: &'a http::HeaderMap) -> Option<(&'a str, &'a HeaderValue)> {
        let value = headers.get(respond::REQUEST_ID).filter(|id| is_well_formed(id.as_bytes()))?;
        let id = value.to_str().ok().filter(|id| !self.app.tells_secret(id, headers))?;
        Some((id, value))
    }

    /// The sizes of a head that did not come as text.
    fn check_h2(&self, request: &Request<Incoming>) -> Result<(), Error> {
        let uri = request.uri();
        let target = uri.path_and_query().map_or(0, |target| target.as_str().len());
        let host = uri.authority().map(|host| "host".len() + host.as_str().len());
        let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
        head::check_sizes(target, host.into_iter().chain(fields), &limits(&self.app.sealed.config).head)
    }

    /// Of a refused head, what is known of it; of HTTP/1, the request is not the client's then.
    fn seen(&self, request: &Request<Incoming>, refused: Option<&Refused>) -> Seen {
        let id = self.app.gate.next_id();
        match refused {
            Some(Refused { method, path, since, .. }) => {
                let method = method.as_ref().map_or("other", method_label);
                Seen { id, path: Path::of_refused(path), method, started: *since }
            }
            None => {
                let (path, method) = (Path::of(request.uri().path()), method_label(request.method()));
                Seen { id, path, method, started: Instant::now() }
            }
        }
    }

    fn refused_h2(&self, request: &Request<Incoming>) -> Option<Box<Refused>> {
        let error = self.check_h2(request).err()?;
        let (method, path) = (Some(request.method().clone()), request.uri().path().to_owned());
        Some(Box::new(Refused { error, method, path, since: Instant::now() }))
    }

    /// What can be said by the head alone.
    fn judge(&self, head: &http::request::Parts, path: Path) -> Judged {
        // A browser asks without the key that it will send.
        if let Some(answer) = self.app.cors.preflight(head) {
            return Judged::Answered(answer);
        }
        self.admit(head, path).map_or_else(Judged::Refused, Judged::Served)
    }

    /// Gives the key's name.
    fn admit(&self, head: &http::request::Parts, path: Path) -> Result<Arc<str>, Error> {
        if matches!(path, Path::Healthz | Path::Readyz) {
            return Self::check_method(head, path).map(|()| Arc::default());
        }
        let tenant = self.app.door.enter(head, self.app.cors.listed(&head.headers).is_some())?;
        if path == Path::Unknown && head.method == Method::CONNECT {
            return Self::check_method(head, path).map(|()| tenant);
        }
        if path == Path::Unknown {
            let message = "there is nothing at this path; the API is under /v1, such as /v1/chat/completions";
            return Err(Error::new(Fault::NotFound, message));
        }
        Self::check_method(head, path)?;
        Ok(tenant)
    }

    fn check_method(head: &http::request::Parts, path: Path) -> Result<(), Error> {
        let is_allowed = head.method.as_str() == path.allowed();
        let message = || format!("{} is answered at this path, {} is not", path.allowed(), method_sent(&head.method));
        if is_allowed { Ok(()) } else { Err(Error::new(Fault::MethodNotAllowed, message())) }
    }

    /// What comes before the first wait.
    fn begin(&self, asked: Asked, seen: Seen, token: &Arc<Token>) -> (Arrival, Next) {
        let Asked { request, client_id, own_id, refused } = asked;
        let (head, body) = request.into_parts();
        let mut arrival = Arrival { client_id, tenant: Arc::default(), method: seen.method, route: seen.path.label() };
        let judged = match refused {
            Some(refused) => Judged::Refused(refused.error),
            None => self.judge(&head, seen.path),
        };
        let served = match (judged, seen.path) {
            (Judged::Served(tenant), path) => {
                if !tenant.is_empty() {
                    token.set_tenant(&tenant);
                }
                arrival.tenant = tenant;
                if let Path::Model(endpoint) = path {
                    let call = ModelCall {
                        app: Arc::clone(&self.app),
                        endpoint,
                        id: seen.id,
                        own_id,
                        arrival: arrival.clone(),
                        headers: head.headers,
                        token: Arc::clone(token),
                        started: seen.started,
                        client_by: None,
                        left: None,
                    };
                    return (arrival, Next::Call(Box::new(call), body));
                }
                self.answer(&head, path)
            }
            (Judged::Answered(response), _) => Ok(response),
            (Judged::Refused(error), _) => Err(error),
        };
        unread::leave(body, &self.app.clock);
        (arrival, Next::Done(Box::new(served)))
    }

    /// The answer to what is no call of a model.
    fn answer(&self, head: &http::request::Parts, path: Path) -> Result<Response<Body>, Error> {
        let app = &self.app;
        let plain = |text: String| respond::json(StatusCode::OK, text);
        match path {
            Path::Models => {
                let models = app.router.models().map(|name| app.listed(name));
                Ok(plain(chat::models_list(models, app.started_s)))
            }
            Path::OneModel => {
                let name = percent_decoded(head.uri.path().strip_prefix("/v1/models/").unwrap_or_default());
                app.router.find(&name).map(|name| plain(chat::model(&app.listed(name), app.started_s)))
            }
            Path::Healthz => Ok(plain("{\"status\":\"alive\"}".into())),
            Path::Readyz => self.readiness(),
            Path::Model(_) | Path::Unknown => Err(Error::new(Fault::NotFound, "there is nothing at this path")),
        }
    }

    fn readiness(&self) -> Result<Response<Body>, Error> {
        let is_serving = self.app.gate.board().master().phase() == MasterPhase::Serving;
        if is_serving && !self.app.gate.is_draining() {
            return Ok(respond::json(StatusCode::OK, "{\"status\":\"ready\"}"));
        }
        let message = "the gateway is starting or stopping; send no new requests";
        Err(Error::new(Fault::ServerShuttingDown, message))
    }
}

/// A model's name in a path: `%2F` and the like undone; what is not valid stays as it is.
fn percent_decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = |at: usize| after.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high << 4 | low) as u8);
                rest = after.get(2..).unwrap_or_default();
            }
            _ => {
                out.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response<Body>;
    type Error = Gone;
    type Future = Bounded;

    fn call(&self, request: Request<Incoming>) -> Bounded {
        self.newcomer.has_sent();
        let is_h1 = request.version() <= Version::HTTP_11;
        let refused = if is_h1 { self.shared.take_refusal() } else { self.refused_h2(&request) };
        let is_refused = refused.is_some();
        let seen = self.seen(&request, refused.as_deref());
        let token = Arc::new(Token::default());
        let own_id = HeaderValue::from_bytes(seen.id.text().as_bytes()).ok();
        let (client_id, given) = self.client_id(request.headers()).unzip();
        let client_id = client_id.unwrap_or_default().to_owned();
        let echoed = given.cloned().or_else(|| own_id.clone());
        let page = self.app.cors.listed(request.headers()).cloned();
        // Active from here on: of HTTP/2 the library reads again before it polls the handler, and must not see the end of
        // an idle connection then.
        let active = Active::new(&self.shared);
        let asked = Box::new(Asked { request, client_id, own_id, refused });
        let serving = self.clone().serve(asked, seen, (Arc::clone(&token), active));
        Bounded {
            serving: Caught::of(Box::pin(serving)),
            seen,
            token,
            is_h1,
            is_refused,
            echoed,
            page,
            app: Arc::clone(&self.app),
            shared: Arc::clone(&self.shared),
        }
    }
}

/// The client has left while its request was read: nobody is there to be answered. That ends the connection, or the stream.
#[derive(Debug)]
pub struct Gone;

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the client has left")
    }
}

impl std::error::Error for Gone {}

/// What a request's head comes to.
enum Judged {
    /// It is served, for the key of that name.
    Served(Arc<str>),
    /// The head was all of it.
    Answered(Response<Body>),
    Refused(Error),
}

/// A handler with its two boundaries: a panic is a 500 for this request alone, and a cancel is answered at once,
/// wherever the handler waits.
pub struct Bounded {
    serving: Caught<dyn Future<Output = Response<Body>> + Send>,
    seen: Seen,
    token: Arc<Token>,
    is_h1: bool,
    /// By its head: how long that took is its client's doing.
    is_refused: bool,
    /// Goes on every answer: the client's own id, or ours.
    echoed: Option<HeaderValue>,
    /// The origin of the page that may read the answer.
    page: Option<HeaderValue>,
    app: Arc<App>,
    shared: Arc<Shared>,
}

impl Bounded {
    /// After a panic: nothing is left of the handler, and of its pass only the record, if it had one.
    fn lost(&self) -> Response<Body> {
        let error = Error::new(Fault::Internal, "an internal error ended the request").detail(panics::last());
        if !self.token.is_accounted() {
            self.record((error.status(), End::Fault(error.fault)), Some(&error));
        }
        self.answer(&error)
    }

    /// Cancelled, wherever the handler waits. Before the admission, in its body, there is no pass to write the record.
    fn given_up(&mut self, cause: Cause) -> Response<Body> {
        // What it holds, its row on the board above all, goes before there is a record.
        self.serving.clear();
        let error = cancelled(cause);
        if !self.token.is_accounted() {
            self.record((error.status(), End::Fault(error.fault)), Some(&error));
        }
        self.answer(&error)
    }

    /// The record of a request whose handler can write none.
    fn record(&self, end: (u16, End), error: Option<&Error>) {
        let Seen { id, path, method, started } = self.seen;
        let echoed = self.echoed.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default();
        let client_id = if echoed == id.text().as_str() { "" } else { echoed }.to_owned();
        let arrival = Arrival { client_id, tenant: self.token.tenant(), method, route: path.label() };
        self.token.account();
        self.app.gate.record_unadmitted(id, arrival, started, end, error);
    }

    fn answer(&self, error: &Error) -> Response<Body> {
        let mut response = respond::error(error);
        response.body_mut().hold(None, Active::new(&self.shared));
        response
    }

    /// Says whether the connection goes on behind this answer: not when the worker drains, and not when others have so
    /// much less to do that the client's next request is better off there.
    fn say_connection(&self, response: &mut Response<Body>) {
        let gate = &self.app.gate;
        if !self.is_h1 {
            response.headers_mut().remove(CONNECTION);
            if gate.is_far_above_peers() {
                self.shared.send_elsewhere();
            }
        } else if gate.is_draining() || gate.is_far_above_peers() || self.app.is_short() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// A client that leaves takes the handler with it. Before the admission there is no pass to write the record.
impl Drop for Bounded {
    fn drop(&mut self) {
        self.serving.clear();
        let is_probe = matches!(self.seen.path, Path::Healthz | Path::Readyz);
        if !is_probe && !self.token.is_accounted() {
            self.record((499, End::ClientGone), None);
        }
    }
}

impl Future for Bounded {
    type Output = Result<Response<Body>, Gone>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = if let Some(cause) = self.token.check(cx) {
            self.given_up(cause)
        } else {
            self.app.gate.set_running(self.seen.id.seq);
            let polled = Pin::new(&mut self.serving).poll(cx);
            self.app.gate.set_running(0);
            match std::task::ready!(polled) {
                Ok(response) => response,
                Err(_) => self.lost(),
            }
        };
        if self.token.cause() == Some(Cause::ClientGone) {
            return Poll::Ready(Err(Gone));
        }
        // The head is written in this very turn. Probes tell nothing of what was served.
        if !self.is_refused && !matches!(self.seen.path, Path::Healthz | Path::Readyz) {
            self.app.gate.count_first_byte(self.seen.started.elapsed());
        }
        self.say_connection(&mut response);
        if let Some(echoed) = self.echoed.take() {
            response.headers_mut().insert(respond::REQUEST_ID, echoed);
        }
        if let Some(page) = self.page.take() {
            cors::dress(response.headers_mut(), page);
        }
        Poll::Ready(Ok(response))
    }
}
