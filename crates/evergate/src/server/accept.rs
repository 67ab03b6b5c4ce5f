//! Takes connections from the listeners that the master opened, each worker its share of them.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

use super::connection;
use super::stream::Stream;
use crate::gate::load::{Load, Peer};
use crate::gate::{Gate, Stage};
use crate::http::app::App;
use crate::http::fault::{Place, pass_by};
use crate::tasks::{Caught, Tasks};
use crate::telemetry::names;

/// A listener as inherited.
#[derive(Debug)]
pub struct Listener {
    fd: AsyncFd<OwnedFd>,
    is_unix: bool,
    /// Whether its queue was seen empty since the drain began.
    is_seen_empty: AtomicBool,
}

impl Listener {
    /// Adopts an inherited listening socket; needs a runtime.
    ///
    /// # Errors
    /// The system's, when it is no socket or cannot be watched.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(fd.as_fd(), true)?;
        let is_unix = rustix::net::getsockname(&fd)?.address_family() == AddressFamily::UNIX;
        #[allow(deprecated, reason = "an owned descriptor is what it asks for; its successor is unsafe to call")]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE)?;
        Ok(Self { fd, is_unix, is_seen_empty: AtomicBool::new(false) })
    }

    fn accept(&self) -> io::Result<Accepted> {
        let accepted = rustix::net::accept_with(self.fd.get_ref(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let fd = match accepted {
            // The kernel looks for a descriptor before it looks for a connection.
            Err(error) if is_short(&error.into()) && !self.has_waiting() => return Err(empty()),
            accepted => accepted?,
        };
        Ok(if self.is_unix {
            Accepted::Unix(tokio::net::UnixStream::from_std(fd.into())?)
        } else {
            Accepted::Tcp(tokio::net::TcpStream::from_std(fd.into())?)
        })
    }

    /// Whether a connection waits at this moment. An error counts as one: accepting says which.
    fn has_waiting(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.get_ref(), PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) != Ok(0)
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
/// Between two looks whether somebody waits for a place while all are taken.
const FULL: Duration = Duration::from_millis(50);
/// How long a connection waits for a peer that should rather take it while nobody takes any; one look for one that is
/// stuck.
const PATIENCE: Duration = Duration::from_millis(5);
/// And while others are taken: then it is on its way, but a queue that never ends is everybody's.
const PATIENCE_MAX: Duration = Duration::from_millis(25);
/// Either of a worker that has no place for a request itself: it would wait there as well.
const PATIENCE_FULL: Duration = Duration::from_millis(100);
/// How often a worker looks again while it leaves a connection to a peer; nothing looks when no connection waits.
const LOOK: Duration = Duration::from_millis(1);

impl Acceptor {
    /// Accepts until the listener is shut. While draining it goes on, since what is queued was promised an answer. It
    /// ends when peers take what is queued, or at the first empty queue, unless the master is stopping everything.
    pub async fn run(self: Arc<Self>, listener: Arc<Listener>) {
        let mut stage = self.app.gate.stage();
        let mut turn = Turn::default();
        loop {
            pass_by(Place::Accept);
            // A place is taken before a connection: what is too many waits in the kernel's queue, where the master
            // sees it, and costs no memory here.
            let Some(place) = self.place(&listener).await else { return };
            let accepted = tokio::select! {
                // Cancel-safe: a connection is taken by the last step of the future, which then is ready.
                accepted = self.next(&listener, &mut turn) => accepted,
                _ = stage.changed() => continue,
            };
            match accepted {
                None => return self.see_empty(&listener),
                Some(Ok(stream)) => self.start(stream, place).await,
                Some(Err(error)) if is_shut(&error) => return self.see_empty(&listener),
                // The connection died in the queue, or descriptors are short: the others must not wait for it.
                Some(Err(error)) if is_short(&error) => {
                    self.make_room();
                    tokio::time::sleep(PAUSE).await;
                }
                Some(Err(_)) => {}
            }
        }
    }

    /// A place for a connection. While there is none and somebody waits for it, those that are idle make room.
    async fn place(&self, listener: &Listener) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Some(place);
        }
        let mut place = pin!(Arc::clone(&self.places).acquire_owned());
        loop {
            tokio::select! {
                // Pinned outside, so that it keeps its turn; waiting is cancel-safe.
                biased;
                place = place.as_mut() => return place.ok(),
                () = self.app.clock.sleep(FULL) => {}
            }
            if listener.has_waiting() {
                self.shed_idle();
            }
        }
    }

    fn shed_idle(&self) {
        self.app.gate.shed_idle(self.app.sealed.config.timeouts.client_idle);
    }

    /// The next connection; none when no more is to be taken.
    async fn next(&self, listener: &Listener, turn: &mut Turn) -> Option<io::Result<Accepted>> {
        let gate = &self.app.gate;
        loop {
            if is_closed(gate) {
                return None;
            }
            if gate.is_draining() {
                if !is_last_stop(gate) && gate.load().has_peers() {
                    return None;
                }
                match counted(gate, || listener.accept()) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.see_empty(listener);
                        if !is_last_stop(gate) {
                            return None;
                        }
                    }
                    outcome => return Some(outcome),
                }
            }
            let mut ready = match listener.fd.readable().await {
                Ok(ready) => ready,
                Err(error) => return Some(Err(error)),
            };
            if is_closed(gate) {
                return None;
            }
            if !gate.is_draining() && turn.is_another(gate.load()) {
                if listener.has_waiting() {
                    turn.wait(gate.load()).await;
                } else {
                    // Nothing can come between the look and this unseen: the next one wakes the runtime again.
                    ready.clear_ready();
                    turn.is_over();
                }
                continue;
            }
            let accepted = counted(gate, || ready.try_io(|_| listener.accept()).unwrap_or_else(|_| Err(empty())));
            turn.is_over();
            match accepted {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Some(outcome),
            }
        }
    }

    /// There is no descriptor left: what is idle goes. The connection that could not be taken stays in the queue, where a
    /// peer may take it; it is not accepted and closed, which would refuse it in everybody's name.
    fn make_room(&self) {
        let gate = &self.app.gate;
        if let Some(series) = gate.board().series(gate.row()) {
            series.add(names::key(names::ACCEPT_FAILURES, 0, 0, 0), 1);
        }
        gate.run_short();
        self.app.clients.values().for_each(|client| client.close_idle());
        self.shed_idle();
    }

    fn see_empty(&self, listener: &Listener) {
        if !listener.is_seen_empty.swap(true, Ordering::Relaxed) && self.unseen.fetch_sub(1, Ordering::Relaxed) == 1 {
            (self.took_queue)();
        }
    }

    /// Begins a connection: its first turn is taken here, before the next accept, so that a request which is already
    /// there is on the board when this returns.
    async fn start(&self, stream: Accepted, place: OwnedSemaphorePermit) {
        let gate = &self.app.gate;
        let open = Open::new(gate, place);
        if let Some(series) = gate.board().series(gate.row()) {
            series.add(names::key(names::CONNECTIONS, 0, 0, 0), 1);
        }
        let (app, tasks, stage, tls) = (Arc::clone(&self.app), self.tasks.clone(), gate.stage(), self.tls.clone());
        let mut connection = Caught::of(Box::pin(async move {
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
            // It is over; a panic has cut it.
            Poll::Ready(_) => {}
        }
    }
}

/// Whose turn it is to accept: what a loop remembers while it leaves a connection to its peers. Time is counted in
/// looks, so that a machine that stood still does not look like a peer that did.
#[derive(Debug, Default)]
struct Turn {
    /// The peers that should take it.
    left_to: Vec<Peer>,
    /// How long it has waited, and how long since anybody took one.
    waited: (Duration, Duration),
    /// What all have accepted, as last looked at.
    accepted: u64,
}

impl Turn {
    /// Whether the connection that waits is rather a peer's, and has not waited too long for it.
    fn is_another(&mut self, load: &Load) -> bool {
        self.left_to = load.peers_before();
        if self.left_to.is_empty() {
            return false;
        }
        let accepted = load.accepted_by_all();
        if std::mem::replace(&mut self.accepted, accepted) != accepted {
            self.waited.1 = Duration::ZERO;
        }
        let (patience, most) = match load.are_stuck(&self.left_to) {
            true => (LOOK, PATIENCE_MAX),
            false if load.is_full() && load.have_places(&self.left_to) => (PATIENCE_FULL, PATIENCE_FULL),
            false => (PATIENCE, PATIENCE_MAX),
        };
        self.waited.0 < most && self.waited.1 < patience
    }

    /// Until it is worth another look: a moment, or when this worker has less to do.
    async fn wait(&mut self, load: &Load) {
        let began = Instant::now();
        tokio::select! {
            // Cancel-safe: each only waits.
            () = tokio::time::sleep(LOOK) => {}
            () = load.relieved() => {}
        }
        let time = began.elapsed().min(2 * LOOK);
        self.waited.0 += time;
        self.waited.1 += time;
        load.waited_for(&self.left_to, time);
    }

    /// A connection was taken, by this worker or another.
    fn is_over(&mut self) {
        self.waited = (Duration::ZERO, Duration::ZERO);
    }
}

/// Accepts, and counts the connection on the board before the kernel gives it, so that a death in the middle of the
/// accept shows it too.
fn counted(gate: &Gate, accept: impl FnOnce() -> io::Result<Accepted>) -> io::Result<Accepted> {
    gate.load().change_connections(1);
    let accepted = accept();
    match accepted {
        Ok(_) => gate.load().count_accepted(),
        Err(_) => gate.load().change_connections(-1),
    }
    accepted
}

fn empty() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

/// Whether the whole gateway is stopping and the master has not shut the listener yet: then a drained queue may still
/// fill.
fn is_last_stop(gate: &Gate) -> bool {
    use evergate_board::MasterPhase;
    *gate.stage().borrow() == Stage::Draining && gate.board().master().phase() == MasterPhase::Draining
}

/// Whether the master has closed the listeners for good: one that came from the service manager is not shut by that, and
/// what comes to it now is for the master to turn away.
fn is_closed(gate: &Gate) -> bool {
    gate.is_draining() && gate.board().master().is_closed()
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
    _place: OwnedSemaphorePermit,
}

impl Open {
    fn new(gate: &Arc<Gate>, place: OwnedSemaphorePermit) -> Self {
        // `counted` has counted it.
        Self { gate: Arc::clone(gate), _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.gate.load().change_connections(-1);
    }
}
