//! One upstream: its pool and its calls.
//!
//! Holds INV-CANCEL-1 (ARCHITECTURE.md).

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::config::BaseUrl;
use evergate_core::deadline::Limit;
use evergate_core::digits::push_decimal;
use evergate_core::{Deadline, Error, Fault};
use http::StatusCode;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, USER_AGENT};
use http::uri::PathAndQuery;

use crate::answer::AnswerBody;
use crate::clock::Clock;
use crate::connect::{ConnectError, Connector};
use crate::h1::{Broken, Connection, Fields, Head, Kind, Outgoing};
use crate::io::Care;
use crate::resolve::Resolver;
use crate::stall::{Patience, Unsent};
use crate::tls::Trust;

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
    /// What goes with this call; everything else is built here.
    pub fields: Fields,
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
    /// What it is made of.
    pub kind: Kind,
    /// The upstream's headers, as far as somebody asks for them: `x-*`, `openai-*`, `retry-after*`.
    pub headers: HeaderMap,
    /// The rest.
    pub body: AnswerBody,
}

/// One upstream's connections and what every request to it carries.
#[derive(Debug)]
pub struct Client {
    settings: Settings,
    targets: Vec<Target>,
    pool: Arc<Pool>,
    complained: Mutex<Option<Instant>>,
    care: Care,
}

/// A path that can be called, and what every request to it begins with: its line, and the fields that are always the same.
struct Target {
    path: &'static str,
    head: Vec<u8>,
}

// Its head holds the credential.
impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Idle connections with when they became so, last in first out, so that the spare ones grow old and go.
pub(crate) struct Pool {
    /// The upstream's, for messages.
    name: String,
    idle: Mutex<Vec<(Box<Connection>, Instant)>>,
    idle_max: usize,
    open: Arc<AtomicU32>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("open", &self.open).finish_non_exhaustive()
    }
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Box<Connection>, Instant)>> {
        // The list is whole between any two operations, so a panic elsewhere cannot have broken it.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes back a connection whose answer has been read, if another request may follow on it.
    pub(crate) fn give(&self, connection: Option<Box<Connection>>) {
        let Some(connection) = connection.filter(|connection| connection.is_reusable()) else { return };
        let mut idle = self.lock();
        if idle.len() < self.idle_max {
            idle.push((connection, Instant::now()));
        }
    }

    /// The error of an answer that does not end as its framing has promised.
    pub(crate) fn cut(&self, broken: &Broken) -> Error {
        let is_framing = matches!(broken, Broken::NotHttp(_));
        let what = if is_framing { "sent an answer whose framing is broken" } else { "broke off its answer" };
        Error::new(Fault::UpstreamDisconnected, format!("the upstream \"{}\" {what}", self.name)).detail(broken)
    }
}

const AGENT: HeaderValue = HeaderValue::from_static(concat!("evergate/", env!("CARGO_PKG_VERSION")));
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Between two complaints of one client.
const COMPLAIN: Duration = Duration::from_secs(60);

impl Client {
    /// A client without open connections.
    ///
    /// # Errors
    /// When the base URL makes no `Host` header or no request target; configuration has ruled that out.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let targets = settings.paths.iter().map(|path| settings.target(path)).collect::<Result<_, _>>()?;
        let pool = Arc::new(Pool {
            name: settings.name.clone(),
            idle: Mutex::new(Vec::new()),
            idle_max: settings.idle_max,
            open: Arc::new(AtomicU32::new(0)),
        });
        let Settings { clock, write, unsent, .. } = &settings;
        let patience = Patience { clock: clock.clone(), limit: *write, unsent: *unsent };
        let care = Care { open: Arc::clone(&pool.open), patience };
        Ok(Self { settings, targets, pool, complained: Mutex::new(None), care })
    }

    /// Open connections, busy and idle.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.pool.open.load(Ordering::Relaxed)
    }

    /// Closes idle connections that are older than the limit or that the upstream has closed.
    pub async fn sweep(&self) {
        let mut all = std::mem::take(&mut *self.pool.lock());
        poll_fn(|cx| {
            all.retain_mut(|(connection, since)| since.elapsed() < self.settings.idle && connection.is_usable(cx));
            Poll::Ready(())
        })
        .await;
        let mut idle = self.pool.lock();
        // Connections given back meanwhile are younger: they stay on top.
        all.append(&mut idle);
        *idle = all;
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
        mut request: Box<Outgoing>,
        (deadline, first_byte): (Deadline, Option<Duration>),
        begun: Option<Arc<AtomicBool>>,
    ) -> Result<Answer, Failure> {
        let name = &self.settings.name;
        let begin = |has_begun| begun.iter().for_each(|begun| begun.store(has_begun, Ordering::Relaxed));
        let (mut connection, head) = loop {
            let (mut connection, is_reused) = match self.take() {
                Some(connection) => (connection, true),
                None => (Box::pin(self.open(deadline)).await?, false),
            };
            let until = match first_byte {
                Some(limit) => deadline.min(Deadline::new(Instant::now(), limit, Limit::FirstToken)),
                None => deadline,
            };
            begin(true);
            let head = poll_fn(|cx| connection.poll_head(&mut request, cx));
            match self.settings.clock.timeout_at(until.at(), head).await {
                Ok(Ok(head)) => break (connection, head),
                // A kept connection that was closed under our hands: nothing of the request is on it.
                Ok(Err(_)) if is_reused && !request.has_begun() => begin(false),
                Ok(Err(broken)) => return Err(failure(name, &broken, &request)),
                Err(_) => {
                    let error = until.limit().overrun(name, "did not answer within");
                    return Err(Failure { error, phase: Phase::Sent });
                }
            }
        };
        connection.go_on_sending(request);
        let Head { status, kind, is_coded, headers, .. } = head;
        if is_coded {
            let message = format!("the upstream \"{name}\" compressed its answer although it was not asked to");
            return Err(Failure { error: Error::new(Fault::UpstreamBadResponse, message), phase: Phase::Sent });
        }
        Ok(Answer { status, kind, headers, body: AnswerBody::new(connection, Arc::clone(&self.pool)) })
    }

    fn request(&self, call: &Call) -> Result<Outgoing, Failure> {
        let target = self.targets.iter().find(|target| target.path == call.path).ok_or_else(|| Failure {
            error: Error::new(Fault::Internal, "the upstream is called at a path that it does not have"),
            phase: Phase::Connect,
        })?;
        let mut length = String::with_capacity(24);
        push_decimal(&mut length, call.body.len() as u64);
        let parts: [&[u8]; 5] =
            [&target.head, call.fields.as_bytes(), b"content-length: ", length.as_bytes(), b"\r\n\r\n"];
        Ok(Outgoing::new(parts.concat(), call.body.clone()))
    }

    /// The idle connection that was used last. Whether it can still be used its next call finds before it sends anything.
    fn take(&self) -> Option<Box<Connection>> {
        loop {
            let (connection, since) = self.pool.lock().pop()?;
            if since.elapsed() < self.settings.idle {
                return Some(connection);
            }
        }
    }

    async fn open(&self, deadline: Deadline) -> Result<Box<Connection>, Failure> {
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
        Ok(Box::new(Connection::new(io)))
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

impl Settings {
    fn target(&self, path: &'static str) -> Result<Target, String> {
        let name = &self.name;
        let host = HeaderValue::from_str(&self.base_url.authority)
            .map_err(|_| format!("upstream {name}: the base URL's host is not a header value"))?;
        let uri = format!("{}{path}", self.base_url.path).parse::<PathAndQuery>();
        let uri = uri.map_err(|_| format!("upstream {name}: the base URL's path makes no request target"))?;
        let mut fields = Fields::default();
        fields.push(&HOST, &host);
        fields.push(&CONTENT_TYPE, &JSON);
        fields.push(&USER_AGENT, &AGENT);
        if let Some(authorization) = &self.authorization {
            fields.push(&AUTHORIZATION, authorization);
        }
        let line = format!("POST {uri} HTTP/1.1\r\n");
        Ok(Target { path, head: [line.as_bytes(), fields.as_bytes()].concat() })
    }
}

/// The failure of a call whose connection broke before the answer's head.
fn failure(name: &str, broken: &Broken, request: &Outgoing) -> Failure {
    let error = |fault, what: &str| Error::new(fault, format!("the upstream \"{name}\" {what}"));
    let error = match broken {
        Broken::NotHttp(_) => error(Fault::UpstreamBadResponse, "sent an answer that is not HTTP/1.1").detail(broken),
        Broken::TooLarge => {
            let what = "sent an answer whose head is too large, or has too many fields";
            error(Fault::UpstreamBadResponse, what).detail(broken)
        }
        Broken::FramedTwice => error(Fault::UpstreamBadResponse, "framed its answer in more than one way"),
        _ if broken.is_stall() => Limit::Write.overrun(name, "did not take the request within"),
        Broken::Io(_) | Broken::Ended if !request.has_begun() => {
            let error = error(Fault::UpstreamConnectFailed, "closed the connection before the request was sent");
            return Failure { error: error.detail(format!("connect: {broken}")), phase: Phase::Connect };
        }
        Broken::Io(_) | Broken::Ended => {
            error(Fault::UpstreamDisconnected, "closed the connection without an answer").detail(broken)
        }
    };
    Failure { error, phase: Phase::Sent }
}
