//! A scripted, OpenAI-like upstream that plays a fault per request, chosen by the model's name, and records what it
//! saw.

mod answer;
mod connection;
mod log;
mod request;
mod script;
mod slam;
mod steps;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustls::ServerConfig;

pub use answer::{CREATED, MANY_BYTES_TEXT, PROMPT_TOKENS, TEXT};
pub use log::{Connection, End, How, Recorded};
pub use request::Request;
pub use script::Script;
pub use slam::Slam;

use crate::link::Link;
use crate::tls::Identity;
use log::Log;
use steps::Step;

/// A running fake upstream; ends, with its connections, when dropped.
pub struct FakeUpstream {
    address: String,
    base_url: String,
    log: Arc<Log>,
    /// Closing it ends the accepting thread.
    wake: Option<UnixStream>,
    accepting: Option<JoinHandle<()>>,
}

/// What becomes of the connection behind a staged answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is kept.
    Keep,
    /// It ends in order.
    Close,
    /// It is reset.
    Reset,
}

enum Listener {
    Tcp(TcpListener, Option<Arc<ServerConfig>>),
    Unix(UnixListener),
}

impl FakeUpstream {
    /// Plain HTTP on a free loopback port.
    #[must_use]
    pub fn start() -> Self {
        let (listener, address) = loopback();
        Self::run(Listener::Tcp(listener, None), address.to_string(), format!("http://{address}/v1"))
    }

    /// Plain HTTP at that address, whose port must be free.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    pub fn start_at(address: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap_or_else(|error| panic!("bind {address}: {error}"));
        Self::run(Listener::Tcp(listener, None), address.to_owned(), format!("http://{address}/v1"))
    }

    /// HTTPS on a free loopback port, with that certificate.
    #[must_use]
    pub fn start_tls(identity: &Identity) -> Self {
        let (listener, address) = loopback();
        let base_url = format!("https://localhost:{}/v1", address.port());
        Self::run(Listener::Tcp(listener, Some(identity.server_config())), address.to_string(), base_url)
    }

    /// Plain HTTP on a Unix socket of that path, which must not exist.
    #[must_use]
    pub fn start_unix(path: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("bind a Unix socket");
        let address = format!("unix:{}", path.display());
        let base_url = format!("{address}:/v1");
        Self::run(Listener::Unix(listener), address, base_url)
    }

    fn run(listener: Listener, address: String, base_url: String) -> Self {
        let log = Arc::new(Log::default());
        let (wake, woken) = UnixStream::pair().expect("a socket pair");
        let shared = log.clone();
        let accepting = std::thread::spawn(move || accept_all(&listener, &woken, &shared));
        Self { address, base_url, log, wake: Some(wake), accepting: Some(accepting) }
    }

    /// `HOST:PORT` or `unix:PATH`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// As an upstream's `base_url`, with `/v1`.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// Lets go what `hold` and `hold-mid` hold, now and from now on.
    pub fn release(&self) {
        self.log.change(|state| state.is_released = true);
    }

    /// Answers requests for the model `name` with these bytes, head and framing included, each piece in a write of its own.
    pub fn stage(&self, name: &str, pieces: Vec<Vec<u8>>, then: Then) {
        let end = match then {
            Then::Keep => None,
            Then::Close => Some(Step::Close),
            Then::Reset => Some(Step::Reset),
        };
        let steps = pieces.into_iter().map(Step::Send).chain(end).collect();
        self.log.change(|state| state.staged.insert(name.to_owned(), steps));
    }

    /// Makes `hold` and `hold-mid` hold again.
    pub fn hold(&self) {
        self.log.change(|state| state.is_released = false);
    }

    /// Closes every open connection in order, as a server does that restarts.
    pub fn close_connections(&self) {
        self.log.change(|state| state.handles.iter().flatten().for_each(crate::link::EndHandle::end));
    }

    /// All requests so far, in the order they came in.
    #[must_use]
    pub fn requests(&self) -> Vec<Recorded> {
        self.log.look(|state| state.requests.clone())
    }

    /// How many requests came in so far.
    #[must_use]
    pub fn request_count(&self) -> usize {
        self.log.look(|state| state.requests.len())
    }

    /// The most requests that were worked on at once, since the last time this was asked. A request is worked on until the
    /// last piece of its answer (of a stream: `[DONE]`) is about to be written, so that whoever has read that and asks again
    /// counts once.
    #[must_use]
    pub fn take_working_most(&self) -> usize {
        self.log.change(|state| std::mem::replace(&mut state.working_most, state.working))
    }

    /// All connections so far, in the order they came in.
    #[must_use]
    pub fn connections(&self) -> Vec<Connection> {
        self.log.look(|state| state.connections.clone())
    }

    /// How many connections are open.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.log.look(|state| state.connections.iter().filter(|connection| connection.end.is_none()).count())
    }

    /// Waits for the `index`th request, from 0.
    ///
    /// # Panics
    /// When it has not come within `limit`.
    #[track_caller]
    #[must_use]
    pub fn wait_request(&self, index: usize, limit: Duration) -> Recorded {
        match self.log.wait(limit, |state| state.requests.get(index).cloned()) {
            Some(recorded) => recorded,
            None => panic!("request {index} has not reached the upstream within {limit:?}"),
        }
    }

    /// Waits until the `index`th request has ended, however.
    ///
    /// # Panics
    /// When it has not within `limit`.
    #[track_caller]
    #[must_use]
    pub fn wait_end(&self, index: usize, limit: Duration) -> End {
        match self.log.wait(limit, |state| state.requests.get(index).and_then(|recorded| recorded.end)) {
            Some(end) => end,
            None => panic!("request {index} has not ended at the upstream within {limit:?}"),
        }
    }

    /// Waits until the client has left the `index`th request before its answer's end, and says when the fake knew.
    ///
    /// # Panics
    /// When it has not within `limit`, or when the request was answered.
    #[track_caller]
    #[must_use]
    pub fn wait_closed(&self, index: usize, limit: Duration) -> Instant {
        let end = self.wait_end(index, limit);
        assert!(matches!(end.how, How::Eof | How::Reset), "request {index} was not left but {:?}", end.how);
        end.at
    }
}

impl Drop for FakeUpstream {
    fn drop(&mut self) {
        self.wake = None;
        self.log.change(|state| {
            state.is_over = true;
            state.handles.iter().flatten().for_each(crate::link::EndHandle::end);
        });
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// An address that answers no connect: its listener's queue is full, and the kernel drops what comes beyond it.
pub struct BlackHole {
    address: String,
    _listener: TcpListener,
    /// Fill the queue.
    _waiting: Vec<TcpStream>,
}

impl BlackHole {
    /// At that address.
    ///
    /// # Panics
    /// When it cannot be bound, or goes on taking connects.
    #[must_use]
    pub fn at(address: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap_or_else(|error| panic!("bind {address}: {error}"));
        // The second listen(2) only sets the queue's length.
        rustix::net::listen(&listener, 0).expect("a short queue");
        let address = listener.local_addr().expect("own address");
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            waiting.push(stream);
            assert!(waiting.len() < 16, "a queue of none takes everybody");
        }
        Self { address: address.to_string(), _listener: listener, _waiting: waiting }
    }

    /// `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// An address on which nobody listens.
#[must_use]
pub fn refused_address() -> String {
    loopback().1.to_string()
}

/// A listener that completes connections in the kernel and never says a byte; it ends when dropped.
#[must_use]
pub fn mute() -> (TcpListener, String) {
    let (listener, address) = loopback();
    (listener, address.to_string())
}

fn loopback() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("bind a loopback port");
    let address = listener.local_addr().expect("own address");
    (listener, address)
}

fn accept_all(listener: &Listener, woken: &UnixStream, log: &Arc<Log>) {
    listener.set_nonblocking().expect("a listener that does not block");
    loop {
        {
            let mut fds = [
                match listener {
                    Listener::Tcp(listener, _) => PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
                    Listener::Unix(listener) => PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
                },
                PollFd::from_borrowed_fd(woken.as_fd(), PollFlags::IN),
            ];
            let _ = rustix::event::poll(&mut fds, None);
        }
        if log.look(|state| state.is_over) {
            return;
        }
        while let Ok(link) = listener.accept() {
            let log = log.clone();
            std::thread::spawn(move || connection::serve(link, &log));
        }
    }
}

impl Listener {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(listener, _) => listener.set_nonblocking(true),
            Self::Unix(listener) => listener.set_nonblocking(true),
        }
    }

    fn accept(&self) -> io::Result<Link> {
        match self {
            Self::Tcp(listener, tls) => {
                let link = Link::tcp(listener.accept()?.0)?;
                Ok(match tls {
                    Some(config) => link.serve_tls(config),
                    None => link,
                })
            }
            Self::Unix(listener) => Link::unix(listener.accept()?.0),
        }
    }
}
