//! One upstream: its pool and its calls.
//!
//! Holds INV-CANCEL-1 (ARCHITECTURE.md).

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::config::BaseUrl;
use evergate_core::deadline::Limit;
use evergate_core::{Deadline, Error, Fault};
use http::header::{
    AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING,
    USER_AGENT,
};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::Full;
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;

use crate::answer::AnswerBody;
use crate::clock::Clock;
use crate::connect::{ConnectError, Connector};
use crate::io::{Care, UpstreamIo};
use crate::resolve::Resolver;
use crate::stall::{Patience, Stalled, Unsent};
use crate::tls::Trust;
use crate::wake::Filter;

/// What a client is made of.
#[derive(Debug)]
pub struct Settings {
    /// Watches over the limits.
    pub clock: Clock,
    /// The upstream's name, for messages.
    pub name: String,
    /// Where it is.
    pub base_url: BaseUrl,
    /// The paths below the base URL that are called.
    pub paths: &'static [&'static str],
    /// Value of `Authorization`, marked sensitive; none for an upstream without a credential.
    pub authorization: Option<HeaderValue>,
    /// What its certificate is checked against.
    pub trust: Trust,
    /// Finds its addresses.
    pub resolver: Resolver,
    /// Told what no retry mends, for people to see; at most once a minute.
    pub complain: fn(&str),
    /// `timeouts.connect`.
    pub connect: Duration,
    /// `timeouts.dns`.
    pub dns: Duration,
    /// `timeouts.write`.
    pub write: Duration,
    /// Tells what an upstream has taken of a request.
    pub unsent: Unsent,
    /// `timeouts.upstream_idle`.
    pub idle: Duration,
    /// `limits.upstream_idle`.
    pub idle_max: usize,
}

/// One call.
#[derive(Debug)]
pub struct Call {
    /// One of [`Settings::paths`].
    pub path: &'static str,
    /// Client headers that may travel on; everything else is built here.
    pub headers: HeaderMap,
    /// The JSON body.
    pub body: Bytes,
    /// The call's own end.
    pub deadline: Deadline,
    /// How long the response head may take once the request is written; none leaves it to `deadline`.
    pub first_byte: Option<Duration>,
    /// True while the request is a connection's, and the upstream may work for it.
    pub begun: Option<Arc<AtomicBool>>,
}

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing reached the upstream: another target may be tried.
    Connect,
    /// The request was (or may have been) sent: it may have been billed.
    Sent,
}

/// A call without an answer.
#[derive(Debug)]
pub struct Failure {
    /// For the client and the records.
    pub error: Error,
    /// How far it came.
    pub phase: Phase,
}

/// An answer's head, and its body to come.
#[derive(Debug)]
pub struct Answer {
    /// The upstream's status, whatever it is.
    pub status: StatusCode,
    /// The upstream's headers.
    pub headers: HeaderMap,
    /// The rest.
    pub body: AnswerBody,
}

type Asked = Request<Full<Bytes>>;

pub(crate) type Driver = http1::Connection<TokioIo<UpstreamIo>, Full<Bytes>>;

/// An open connection and the half that speaks on it.
pub(crate) struct Connection {
    pub(crate) sender: http1::SendRequest<Full<Bytes>>,
    /// `None` once it has ended; polled only by who holds the connection.
    pub(crate) driver: Option<Pin<Box<Driver>>>,
    pub(crate) filter: Filter,
    idle_since: Instant,
}

/// One upstream's connections and what every request to it carries.
#[derive(Debug)]
pub struct Client {
    settings: Settings,
    host: HeaderValue,
    /// What stands in the request line for each path that can be called.
    targets: Vec<(&'static str, Uri)>,
    pool: Arc<Pool>,
    complained: Mutex<Option<Instant>>,
    care: Care,
}

/// Idle connections, last in first out, so that the spare ones grow old and go.
pub(crate) struct Pool {
    /// The upstream's.
    name: String,
    idle: Mutex<Vec<Connection>>,
    idle_max: usize,
    open: Arc<AtomicU32>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("open", &self.open).finish_non_exhaustive()
    }
}

impl Pool {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        // The list is whole between any two operations, so a panic elsewhere cannot have broken it.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes back a connection that is between two requests.
    pub(crate) fn give(&self, mut connection: Connection) {
        if connection.driver.is_some() {
            connection.idle_since = Instant::now();
            let mut idle = self.lock();
            if idle.len() < self.idle_max {
                idle.push(connection);
            }
        }
    }
}

const AGENT: HeaderValue = HeaderValue::from_static(concat!("evergate/", env!("CARGO_PKG_VERSION")));
/// So soon after an answer a connection that was ready for more is not asked whether it has ended since. If it has, the call
/// finds that before anything of the request is written, and opens another.
const FRESH: Duration = Duration::from_millis(5);
/// Between two complaints of one client.
const COMPLAIN: Duration = Duration::from_secs(60);
const JSON: HeaderValue = HeaderValue::from_static("application/json");

impl Client {
    /// A client without open connections.
    ///
    /// # Errors
    /// When the base URL makes no `Host` header or no request target; configuration has ruled that out.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let host = HeaderValue::from_str(&settings.base_url.authority)
            .map_err(|_| format!("upstream {}: the base URL's host is not a header value", settings.name))?;
        let target = |path: &&'static str| match format!("{}{path}", settings.base_url.path).parse() {
            Ok(uri) => Ok((*path, uri)),
            Err(_) => Err(format!("upstream {}: the base URL's path makes no request target", settings.name)),
        };
        let targets = settings.paths.iter().map(target).collect::<Result<_, _>>()?;
        let pool = Arc::new(Pool {
            name: settings.name.clone(),
            idle: Mutex::new(Vec::new()),
            idle_max: settings.idle_max,
            open: Arc::new(AtomicU32::new(0)),
        });
        let Settings { clock, write, unsent, .. } = &settings;
        let patience = Patience { clock: clock.clone(), limit: *write, unsent: *unsent };
        let care = Care { open: Arc::clone(&pool.open), patience };
        Ok(Self { settings, host, targets, pool, complained: Mutex::new(None), care })
    }

    /// Open connections, busy and idle.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.pool.open.load(Ordering::Relaxed)
    }

    /// Closes idle connections that are older than the limit or that the upstream has closed.
    pub async fn sweep(&self) {
        let all = std::mem::take(&mut *self.pool.lock());
        let mut kept = Vec::with_capacity(all.len());
        for mut connection in all {
            if connection.idle_since.elapsed() < self.settings.idle && is_usable(&mut connection).await {
                kept.push(connection);
            }
        }
        let mut idle = self.pool.lock();
        // Connections given back meanwhile are younger: they stay on top.
        kept.append(&mut idle);
        *idle = kept;
    }

    /// Closes every idle connection.
    pub fn close_idle(&self) {
        self.pool.lock().clear();
    }

    /// Sends the call and waits for the answer's head. Dropping the future closes the connection.
    ///
    /// # Errors
    /// `upstream_connect_failed`, `overloaded` (no local port), `upstream_timeout` (connect, dns), `first_token_timeout`, `deadline_exceeded`,
    /// `upstream_disconnected`, `upstream_bad_response` (framing, a content encoding that was not asked for).
    pub fn call(&self, call: Call) -> impl Future<Output = Result<Answer, Failure>> {
        // Before anything is waited for, and in a box: what a future holds at its waits it has room for in all its states, and
        // this one is part of a request's, which is moved about whole.
        let request = self.request(&call).map(Box::new).map_err(Box::new);
        let Call { deadline, first_byte, begun, .. } = call;
        async move {
            let request = request.map_err(|failure| *failure)?;
            self.send(request, (deadline, first_byte), begun).await
        }
    }

    async fn send(
        &self,
        mut request: Box<Asked>,
        (deadline, first_byte): (Deadline, Option<Duration>),
        begun: Option<Arc<AtomicBool>>,
    ) -> Result<Answer, Failure> {
        let name = &self.settings.name;
        let sent = |error| Failure { error, phase: Phase::Sent };
        let begin = |has_begun| begun.iter().for_each(|begun| begun.store(has_begun, Ordering::Relaxed));
        let (mut connection, mut is_reused) = match self.take().await {
            Some(connection) => (connection, true),
            None => (Box::pin(self.open(deadline)).await?, false),
        };
        let response = loop {
            let until = match first_byte {
                Some(limit) => deadline.min(Deadline::new(Instant::now(), limit, Limit::FirstToken)),
                None => deadline,
            };
            begin(true);
            let answered = {
                let mut answering = std::pin::pin!(connection.sender.try_send_request(*request));
                let Connection { driver, filter, .. } = &mut connection;
                let head = poll_fn(|cx| {
                    filter.poll(cx, |cx| {
                        drive(driver, cx);
                        answering.as_mut().poll(cx)
                    })
                });
                match self.settings.clock.timeout_at(until.at(), head).await {
                    Ok(Ok(response)) => break response,
                    Ok(Err(failed)) => Box::new(failed),
                    Err(_) => return Err(sent(until.limit().overrun(name, "did not answer within"))),
                }
            };
            request = again(name, answered, is_reused)?;
            begin(false);
            connection = Box::pin(self.open(deadline)).await?;
            is_reused = false;
        };
        let (head, body) = response.into_parts();
        if head.headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            let message = format!("the upstream \"{name}\" compressed its answer although it was not asked to");
            return Err(sent(Error::new(Fault::UpstreamBadResponse, message)));
        }
        if is_framed_twice(&head.headers) {
            let message = format!("the upstream \"{name}\" framed its answer in more than one way");
            return Err(sent(Error::new(Fault::UpstreamBadResponse, message)));
        }
        let body = AnswerBody::new(body, connection, Arc::clone(&self.pool));
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    fn request(&self, call: &Call) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::new(Full::new(call.body.clone()));
        *request.method_mut() = Method::POST;
        let target = self.targets.iter().find(|(path, _)| *path == call.path).map(|(_, uri)| uri.clone());
        *request.uri_mut() = target.ok_or_else(|| Failure {
            error: Error::new(Fault::Internal, "the upstream is called at a path that it does not have"),
            phase: Phase::Connect,
        })?;
        let headers = request.headers_mut();
        headers.reserve(call.headers.len() + 4);
        headers.insert(HOST, self.host.clone());
        headers.insert(http::header::CONTENT_TYPE, JSON);
        headers.insert(USER_AGENT, AGENT);
        if let Some(authorization) = &self.settings.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        for (name, value) in &call.headers {
            headers.append(HeaderName::clone(name), value.clone());
        }
        Ok(request)
    }

    async fn take(&self) -> Option<Connection> {
        loop {
            let mut connection = self.pool.lock().pop()?;
            let idle = connection.idle_since.elapsed();
            let is_fresh = idle < FRESH && connection.sender.is_ready();
            if is_fresh || (idle < self.settings.idle && is_usable(&mut connection).await) {
                return Some(connection);
            }
        }
    }

    async fn open(&self, deadline: Deadline) -> Result<Connection, Failure> {
        let name = &self.settings.name;
        let until = deadline.min(Deadline::new(Instant::now(), self.settings.connect, Limit::Connect));
        let failed = |error| Failure { error, phase: Phase::Connect };
        let settings = &self.settings;
        let connector = Connector {
            transport: &settings.base_url.transport,
            trust: &settings.trust,
            resolver: &settings.resolver,
            clock: &settings.clock,
            dns: settings.dns,
            care: &self.care,
        };
        let io = connector.connect(until).await.map_err(|error| {
            self.complain(&error);
            failed(error.error(name))
        })?;
        let (sender, driver) =
            http1::Builder::new().handshake(TokioIo::new(io)).await.map_err(|error| failed(broken(name, &error)))?;
        Ok(Connection { sender, driver: Some(Box::pin(driver)), filter: Filter::new(), idle_since: Instant::now() })
    }

    /// A certificate that is not right stays so until somebody does something about it.
    fn complain(&self, error: &ConnectError) {
        let ConnectError::Tls(why) = error else { return };
        let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
            *complained = Some(Instant::now());
            let name = &self.settings.name;
            (self.settings.complain)(&format!("no connection to the upstream \"{name}\" could be made: tls: {why}"));
        }
    }
}

/// Whether two readers could see two ends of this answer (RFC 9112, 6.3): the library below takes one of them. What
/// follows on such a connection is somebody's choice, so it must not be kept.
fn is_framed_twice(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let coding = codings.next();
    let length = lengths.next();
    coding.is_some_and(|coding| length.is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
        || codings.next().is_some()
        || lengths.next().is_some()
}

/// Moves a connection forward; an end of it is seen by whoever waits for something from it.
pub(crate) fn drive(driver: &mut Option<Pin<Box<Driver>>>, cx: &mut std::task::Context<'_>) {
    if let Some(running) = driver
        && running.as_mut().poll(cx).is_ready()
    {
        *driver = None;
    }
}

/// Whether a request can be sent now; polls once, which is what notices that the upstream has closed.
async fn is_usable(connection: &mut Connection) -> bool {
    let Connection { driver, filter, sender, .. } = connection;
    poll_fn(|cx| {
        // Never pending: only this turn's state is asked for.
        let _ = filter.poll(cx, |cx| {
            drive(driver, cx);
            Poll::<()>::Pending
        });
        Poll::Ready(driver.is_some() && sender.is_ready())
    })
    .await
}

/// The request of a kept connection that was closed under our hands, if it is still ours: nothing was written.
fn again(name: &str, mut failed: Box<TrySendError<Asked>>, is_reused: bool) -> Result<Box<Asked>, Failure> {
    match failed.take_message() {
        Some(message) if is_reused => Ok(Box::new(message)),
        Some(_) => Err(unsent(name, failed.error())),
        None => Err(Failure { error: broken(name, failed.error()), phase: Phase::Sent }),
    }
}

/// The failure of a new connection that ended before a byte of the request was written.
fn unsent(name: &str, error: &hyper::Error) -> Failure {
    let message = format!("the upstream \"{name}\" closed the connection before the request was sent");
    let error = Error::new(Fault::UpstreamConnectFailed, message).detail(format!("connect: {error}"));
    Failure { error, phase: Phase::Connect }
}

/// The error of a connection that failed after the request was handed to it.
pub(crate) fn broken(name: &str, error: &hyper::Error) -> Error {
    if Stalled::is_cause(error) {
        Limit::Write.overrun(name, "did not take the request within")
    } else if error.is_parse_too_large() {
        let message = format!("the upstream \"{name}\" sent an answer whose head is too large, or has too many fields");
        Error::new(Fault::UpstreamBadResponse, message).detail(error)
    } else if error.is_parse() || error.is_parse_status() {
        let message = format!("the upstream \"{name}\" sent an answer that is not HTTP/1.1");
        Error::new(Fault::UpstreamBadResponse, message).detail(error)
    } else {
        Error::new(
            Fault::UpstreamDisconnected,
            format!("the upstream \"{name}\" closed the connection without an answer"),
        )
        .detail(error)
    }
}
