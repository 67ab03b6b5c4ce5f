//! Takes connections from the listeners that the master opened.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;
use std::time::Duration;

use rustix::net::AddressFamily;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::connection;
use super::stream::Stream;
use crate::gate::{Gate, Stage};
use crate::http::app::App;
use crate::tasks::{Caught, Tasks, count_panic};
use crate::telemetry::names;

/// A listener as inherited.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// Adopts an inherited listening socket; needs a runtime.
    ///
    /// # Errors
    /// The system's, when it is no listening stream socket of a kind we know.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(fd.as_fd(), true)?;
        let address = rustix::net::getsockname(&fd)?;
        if address.address_family() == AddressFamily::UNIX {
            return Ok(Self::Unix(UnixListener::from_std(fd.into())?));
        }
        Ok(Self::Tcp(TcpListener::from_std(fd.into())?))
    }

    fn poll_accept(&self, cx: &mut std::task::Context<'_>) -> Poll<io::Result<Accepted>> {
        match self {
            Self::Tcp(listener) => listener.poll_accept(cx).map_ok(|(stream, _)| Accepted::Tcp(stream)),
            Self::Unix(listener) => listener.poll_accept(cx).map_ok(|(stream, _)| Accepted::Unix(stream)),
        }
    }
}

enum Accepted {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

/// What all accept loops of a worker share.
pub struct Acceptor {
    /// The worker.
    pub app: Arc<App>,
    /// Starts connection tasks.
    pub tasks: Tasks,
    /// TLS for TCP listeners.
    pub tls: Option<TlsAcceptor>,
    /// Open connections that are still allowed.
    pub places: Arc<Semaphore>,
    /// Listeners whose queue was not yet seen empty since the drain began.
    pub unseen: AtomicU32,
    /// Tells the master that the queues were taken.
    pub took_queue: Box<dyn Fn() + Send + Sync>,
}

/// Pause after an accept that failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(20);

impl Acceptor {
    /// Accepts until the listener is shut. While draining it goes on, since what is queued was promised an answer; it
    /// ends at the first empty queue if the master is not stopping everything (`stays` is false then).
    pub async fn run(self: Arc<Self>, listener: Listener) {
        let gate = Arc::clone(&self.app.gate);
        let mut stage = gate.stage();
        let mut has_seen_empty = false;
        loop {
            // A place is taken before a connection: what is too many waits in the kernel's queue, where the master
            // sees it, and costs no memory here.
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
            let accepted = poll_fn(|cx| match poll_counted(&gate, &listener, cx) {
                Poll::Pending if gate.is_draining() => {
                    if !has_seen_empty {
                        has_seen_empty = true;
                        self.see_empty();
                    }
                    if stays(&gate) { Poll::Pending } else { Poll::Ready(None) }
                }
                Poll::Pending => Poll::Pending,
                Poll::Ready(accepted) => Poll::Ready(Some(accepted)),
            });
            let accepted = tokio::select! {
                // Cancel-safe: a connection is only taken when the future is ready.
                accepted = accepted => accepted,
                _ = stage.changed() => continue,
            };
            match accepted {
                None => return,
                Some(Ok(stream)) => self.start(stream, place).await,
                Some(Err(error)) if is_shut(&error) => {
                    self.see_empty_unless(has_seen_empty);
                    return;
                }
                // The connection died in the queue, or descriptors are short: the others must not wait for it.
                Some(Err(error)) if is_short(&error) => tokio::time::sleep(PAUSE).await,
                Some(Err(_)) => {}
            }
        }
    }

    fn see_empty_unless(&self, has_seen: bool) {
        if !has_seen {
            self.see_empty();
        }
    }

    fn see_empty(&self) {
        if self.unseen.fetch_sub(1, Ordering::Relaxed) == 1 {
            (self.took_queue)();
        }
    }

    /// Begins a connection: its first turn is taken here, before the next accept, so that a request which is already
    /// there is on the board when this returns.
    async fn start(&self, stream: Accepted, place: tokio::sync::OwnedSemaphorePermit) {
        let gate = &self.app.gate;
        let open = Open::new(gate, place);
        if let Some(series) = gate.board().series(gate.row()) {
            series.add(names::key(names::CONNECTIONS, 0, 0, 0), 1);
        }
        let (app, tasks, stage, tls) = (Arc::clone(&self.app), self.tasks.clone(), gate.stage(), self.tls.clone());
        let mut connection = Caught(Box::pin(async move {
            let _open = open;
            let stream = match (stream, tls) {
                (Accepted::Unix(stream), _) => Stream::Unix(stream),
                (Accepted::Tcp(stream), tls) => {
                    // Events are whole when written. A socket that refuses is dead and says so at its first read.
                    let _ = stream.set_nodelay(true);
                    let Some(tls) = tls else { return connection::serve(app, tasks, Stream::Tcp(stream), stage).await };
                    let limit = app.sealed.config.timeouts.header;
                    match tokio::time::timeout(limit, tls.accept(stream)).await {
                        Ok(Ok(stream)) => Stream::Tls(Box::new(stream)),
                        _ => return,
                    }
                }
            };
            connection::serve(app, tasks, stream, stage).await;
        }));
        match poll_fn(|cx| Poll::Ready(Pin::new(&mut connection).poll(cx))).await {
            Poll::Pending => drop(self.tasks.spawn_caught("connection", connection)),
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => count_panic(gate.board(), gate.row()),
        }
    }
}

/// Accepts, and counts the connection on the board before the kernel gives it, so that a death in the middle of the
/// accept shows it too.
fn poll_counted(gate: &Gate, listener: &Listener, cx: &mut std::task::Context<'_>) -> Poll<io::Result<Accepted>> {
    gate.count_connections(1);
    let accepted = listener.poll_accept(cx);
    if !matches!(accepted, Poll::Ready(Ok(_))) {
        gate.count_connections(-1);
    }
    accepted
}

/// Whether a drained queue may still fill: the whole gateway is stopping and the master has not shut the listener yet.
fn stays(gate: &Gate) -> bool {
    use evergate_board::MasterPhase;
    *gate.stage().borrow() == Stage::Draining && gate.board().master().phase() == MasterPhase::Draining
}

fn is_shut(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error())
}

fn is_short(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let short = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    short.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Counts an open connection on the board.
struct Open {
    gate: Arc<Gate>,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Open {
    fn new(gate: &Arc<Gate>, place: tokio::sync::OwnedSemaphorePermit) -> Self {
        // `poll_counted` has counted it.
        Self { gate: Arc::clone(gate), _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.gate.count_connections(-1);
    }
}
