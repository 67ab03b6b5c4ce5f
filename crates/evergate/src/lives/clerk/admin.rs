//! The admin listener: metrics and status for whoever may reach it, and for no web page.

use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_board::Board;
use evergate_core::{Error, Fault};
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderValue, ORIGIN};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use crate::tasks::Tasks;
use crate::telemetry::render::prometheus;
use crate::telemetry::status::snapshot;

/// Connections at a time; more wait in the accept queue.
const CONNECTIONS_MAX: u32 = 64;
/// A request head, from its connection on.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// An answer, until the kernel has all of it: a scraper takes milliseconds.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Bytes for which an answer has a second more: few links are slower, and metrics of hundreds of models are not small.
const ANSWER_BYTES_PER_S: u64 = 64 * 1024;
/// A whole connection, which is one request: nobody keeps a place by reading slowly.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// An answer that takes longer is slow, and goes when others wait for its place.
const SLOW: Duration = Duration::from_secs(1);
/// How often slow ones are looked for while all places are taken.
const SLOW_LOOK: Duration = Duration::from_millis(250);
/// After a failed accept (no descriptors left): trying again at once would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is answered from.
#[derive(Debug)]
pub(super) struct Desk {
    board: Board,
    /// The listener's own address; none on a Unix socket, which no browser reaches.
    ip: Option<IpAddr>,
    /// One for each connection.
    places: Arc<Semaphore>,
    guests: Mutex<Guests>,
}

/// Connections, the oldest first.
#[derive(Debug, Default)]
struct Guests {
    last: u64,
    all: VecDeque<Guest>,
}

#[derive(Debug)]
struct Guest {
    number: u64,
    /// Ends it.
    end: oneshot::Sender<()>,
    /// When it was answered; none while it asks nothing.
    answered_at: Option<Instant>,
}

impl Guests {
    /// Ends the one that can best be missed: the oldest that asks nothing, else the one that has taken the longest over its
    /// answer, if that is slow.
    fn make_room(&mut self) {
        loop {
            let idle = self.all.iter().position(|guest| guest.answered_at.is_none());
            let slowest = || {
                let answered = self.all.iter().enumerate().filter_map(|(at, guest)| Some((at, guest.answered_at?)));
                let (at, since) = answered.min_by_key(|(_, since)| *since)?;
                (since.elapsed() >= SLOW).then_some(at)
            };
            let Some(guest) = idle.or_else(slowest).and_then(|at| self.all.remove(at)) else { return };
            // One that is gone by itself has given its place back already.
            if guest.end.send(()).is_ok() {
                return;
            }
        }
    }
}

impl Desk {
    pub(super) fn new(board: Board, ip: Option<IpAddr>) -> Self {
        Self { board, ip, places: Arc::new(Semaphore::new(CONNECTIONS_MAX as usize)), guests: Mutex::default() }
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        // Whole between any two operations.
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for the next connection. While there is none, those that can be missed make room. Cancel-safe.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            // The loser of the two is dropped, and its turn with it: nobody else waits here for long.
            match timeout(SLOW_LOOK, Arc::clone(&self.places).acquire_owned()).await {
                Ok(place) => return place.ok(),
                Err(_) => self.guests().make_room(),
            }
        }
    }

    /// A new connection, which asks nothing yet: its number, and what resolves when its place is needed. The last place is
    /// kept free if it can be, so that who comes next is accepted at once.
    fn enter(&self) -> (u64, oneshot::Receiver<()>) {
        let (end, ended) = oneshot::channel();
        let mut guests = self.guests();
        if self.places.available_permits() == 0 {
            guests.make_room();
        }
        guests.last = guests.last.wrapping_add(1);
        let number = guests.last;
        guests.all.push_back(Guest { number, end, answered_at: None });
        (number, ended)
    }

    /// It has asked, and is being answered.
    fn serve(&self, number: u64) {
        let mut guests = self.guests();
        if let Some(guest) = guests.all.iter_mut().find(|guest| guest.number == number) {
            guest.answered_at = Some(Instant::now());
        }
    }

    /// It is gone.
    fn leave(&self, number: u64) {
        self.guests().all.retain(|guest| guest.number != number);
    }

    /// Waits until nobody is connected. Nobody may be let in any more.
    pub(super) async fn is_empty(&self) {
        // It is never closed.
        let _ = self.places.acquire_many(CONNECTIONS_MAX).await;
    }
}

/// Accepts until the task is aborted.
pub(super) async fn serve_tcp(listener: Arc<TcpListener>, desk: Arc<Desk>, tasks: Tasks) {
    while let Some(place) = desk.place().await {
        match listener.accept().await {
            Ok((stream, _)) => start(stream, place, &desk, &tasks),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Accepts until the task is aborted.
pub(super) async fn serve_unix(listener: Arc<UnixListener>, desk: Arc<Desk>, tasks: Tasks) {
    while let Some(place) = desk.place().await {
        match listener.accept().await {
            Ok((stream, _)) => start(stream, place, &desk, &tasks),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

fn start<S>(stream: S, place: OwnedSemaphorePermit, desk: &Arc<Desk>, tasks: &Tasks)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let desk = Arc::clone(desk);
    let (number, mut ended) = desk.enter();
    tasks.spawn("admin_connection", async move {
        let (said, size) = oneshot::channel();
        let (said, asked) = (Cell::new(Some(said)), Arc::clone(&desk));
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            asked.serve(number);
            let response = answer(&asked, request.method(), request.uri().path(), request.headers());
            // There is one request, and whoever hears of it may have gone.
            let _ = said.take().map(|said| said.send(response.body().size_hint().lower()));
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        tokio::select! {
            // Each may be dropped. A client that breaks off or breaks the protocol is its own affair.
            _ = timeout(CONNECTION_TIME, connection) => {}
            Ok(()) = &mut ended => {}
            () = overdue(size) => {}
        }
        desk.leave(number);
        drop(place);
    });
}

/// Resolves when an answer should have been taken; never, if none was made.
async fn overdue(size: oneshot::Receiver<u64>) {
    match size.await {
        Ok(bytes) => tokio::time::sleep(ANSWER_TIME + Duration::from_secs(bytes / ANSWER_BYTES_PER_S)).await,
        Err(_) => std::future::pending().await,
    }
}

/// The answer to one request; its body is not read.
fn answer(desk: &Desk, method: &Method, path: &str, headers: &HeaderMap) -> Response<Full<Bytes>> {
    if let Err(error) = check_origin(desk.ip, headers) {
        return refuse(&error);
    }
    let page: fn(&Desk) -> (&'static str, String) = match path {
        "/metrics" => |desk| ("text/plain; version=0.0.4; charset=utf-8", prometheus(&desk.board)),
        "/status" => |desk| ("application/json", serde_json::to_string(&snapshot(&desk.board)).unwrap_or_default()),
        "/healthz" => |_| ("application/json", "{\"status\":\"ok\"}".to_owned()),
        _ => return refuse(&Error::new(Fault::NotFound, "there is /metrics, /status and /healthz here")),
    };
    if *method != Method::GET && *method != Method::HEAD {
        let mut response = refuse(&Error::new(Fault::MethodNotAllowed, "only GET and HEAD are allowed here"));
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let (kind, text) = page(desk);
    respond(StatusCode::OK, kind, text)
}

fn refuse(error: &Error) -> Response<Full<Bytes>> {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = respond(status, "application/json", error.body());
    let should_retry = if error.fault.row().should_retry { "true" } else { "false" };
    response.headers_mut().insert("x-should-retry", HeaderValue::from_static(should_retry));
    response
}

fn respond(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// A web page can make its reader's browser ask here: as a foreign origin, or, by rebinding its own name to our address
/// (DNS rebinding), as a foreign host.
fn check_origin(ip: Option<IpAddr>, headers: &HeaderMap) -> Result<(), Error> {
    let refuse = |what| Err(Error::new(Fault::OriginNotAllowed, what));
    let Some(ip) = ip else { return Ok(()) };
    let mut hosts = headers.get_all(HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    // HTTP/1.0 has no Host; a browser always sends one.
    let is_own_host = host.is_none_or(|host| host.to_str().is_ok_and(|host| is_own(host, ip)));
    if !is_own_host || second.is_some() {
        return refuse("the Host header does not name this listener; use its IP address or localhost");
    }
    for origin in headers.get_all(ORIGIN) {
        let authority = origin.to_str().ok().and_then(|origin| origin.strip_prefix("http://"));
        if !authority.is_some_and(|authority| is_own(authority, ip)) {
            return refuse("requests from web pages are not allowed here");
        }
    }
    Ok(())
}

/// Whether `HOST[:PORT]` is loopback, `localhost` or the listener's address. The port is not compared: whoever forwards one
/// may choose another.
fn is_own(authority: &str, ip: IpAddr) -> bool {
    let (host, rest) = match authority.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']').unwrap_or((bracketed, "]")),
        None => authority.find(':').map_or((authority, ""), |at| authority.split_at(at)),
    };
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    if !rest.is_empty() && !rest.strip_prefix(':').is_some_and(is_port) {
        return false;
    }
    if host.eq_ignore_ascii_case("localhost") {
        return true;
    }
    // On "all addresses" any literal one can be ours; a page cannot rebind a number.
    host.parse::<IpAddr>().is_ok_and(|host| host.is_loopback() || host == ip || ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_board::Shape;
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn desk() -> Desk {
        let board = Board::create(Shape { children: 1, slots: 1, series: 8, labels: 8 }, 1).unwrap();
        Desk::new(board, Some(IpAddr::from([127, 0, 0, 1])))
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { timeout(Duration::from_secs(10), future).await.unwrap() })
    }

    fn ask(method: &Method, path: &str, pairs: &[(&'static str, &'static str)]) -> (u16, HeaderMap, String) {
        let response = answer(&desk(), method, path, &headers(pairs));
        let (head, body) = response.into_parts();
        let bytes = block_on(body.collect()).unwrap().to_bytes();
        (head.status.as_u16(), head.headers, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[test]
    fn pages_have_their_types() {
        let (status, head, text) = ask(&Method::GET, "/metrics", &[("host", "127.0.0.1:4701")]);
        assert_eq!((status, text.contains("evergate_build_info")), (200, true));
        assert!(head[CONTENT_TYPE].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
        let (status, _, text) = ask(&Method::GET, "/status", &[]);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((status, value["children"].as_array().map(Vec::len)), (200, Some(0)));
        assert_eq!(ask(&Method::GET, "/healthz", &[]).0, 200);
    }

    #[test]
    fn everything_else_is_refused_from_the_table() {
        let (status, _, text) = ask(&Method::GET, "/nothing", &[]);
        assert_eq!((status, text.contains("\"not_found\"")), (404, true));
        let (status, head, text) = ask(&Method::POST, "/metrics", &[]);
        assert_eq!((status, text.contains("\"method_not_allowed\"")), (405, true));
        assert_eq!((&head[ALLOW], &head["x-should-retry"]), (&"GET, HEAD".parse().unwrap(), &"false".parse().unwrap()));
    }

    #[test]
    fn web_pages_get_nothing() {
        for pairs in [
            [("host", "evil.example:4701"), ("x-a", "b")],
            [("host", "localhost.evil.example"), ("x-a", "b")],
            [("host", "127.0.0.1:4701"), ("origin", "http://evil.example")],
            [("host", "127.0.0.1:4701"), ("origin", "null")],
            [("host", "127.0.0.1:4701"), ("origin", "https://127.0.0.1")],
        ] {
            let (status, _, text) = ask(&Method::GET, "/status", &pairs);
            assert_eq!((status, text.contains("origin_not_allowed")), (403, true), "{pairs:?}");
        }
        for pairs in
            [[("host", "localhost:9"), ("x-a", "b")], [("host", "[::1]:4701"), ("origin", "http://[::1]:4701")]]
        {
            assert_eq!(ask(&Method::GET, "/status", &pairs).0, 200, "{pairs:?}");
        }
    }

    #[test]
    fn hosts_are_compared_whole() {
        let ip = IpAddr::from([192, 0, 2, 1]);
        for own in ["192.0.2.1", "192.0.2.1:80", "LOCALHOST", "127.0.0.9", "[::1]"] {
            assert!(is_own(own, ip), "{own}");
        }
        for foreign in ["192.0.2.10", "192.0.2.1:", "192.0.2.1:x", "a.192.0.2.1", "", "[::1", "[::1]x", "::1"] {
            assert!(!is_own(foreign, ip), "{foreign}");
        }
        assert!(is_own("10.0.0.1", IpAddr::from([0, 0, 0, 0])) && !is_own("evil.example", IpAddr::from([0, 0, 0, 0])));
    }

    #[test]
    fn one_request_per_connection_over_the_wire() {
        block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let desk = Arc::new(desk());
            let tasks = Tasks::new("clerk");
            let door = tasks.spawn("admin", serve_tcp(Arc::new(listener), desk, tasks.clone()));
            let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
            client.write_all(b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).await.unwrap();
            assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\n"), "{text}");
            door.abort();
        });
    }
}
