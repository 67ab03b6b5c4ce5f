//! The last clients of a listener that is not ours to close: it came from the service manager, who keeps it, so that a
//! connect does not fail. Once no worker accepts any more, the master accepts and says 503 (DESIGN.md, 2).
//!
//! This is no HTTP server: whatever is asked, the same bytes are the answer. Over TLS there is nobody left to shake
//! hands, and the connection is closed at once, which a client can see; a connect that waits it cannot.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use evergate_core::ids::RequestId;
use evergate_core::{Error, Fault};
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};

use crate::listen::Listener;
use crate::step::{Ns, SECOND};

/// Connections at once; whoever comes then waits in the kernel's queue.
const CLIENTS_MAX: usize = 64;
/// What a client has to say goodbye.
const PATIENCE: Ns = SECOND;

/// Clients that were told and have not gone yet. Closed at once, a connection with unread bytes is reset, and its client
/// may never see the answer (RFC 9112, 9.6).
#[derive(Debug)]
pub(crate) struct TurnedAway {
    is_open: bool,
    is_tls: bool,
    /// The last one's id; no child has the epoch 0.
    id: RequestId,
    clients: Vec<(UnixStream, Ns)>,
}

impl TurnedAway {
    /// Nobody yet; `run` is the board's.
    pub(crate) fn new(run: u64, is_tls: bool) -> Self {
        Self { is_open: false, is_tls, id: RequestId { run, epoch: 0, seq: 0 }, clients: Vec::new() }
    }

    /// From now on.
    pub(crate) fn begin(&mut self) {
        self.is_open = true;
    }

    /// What to wait for.
    pub(crate) fn fds<'a>(&'a self, listeners: &'a [Listener]) -> impl Iterator<Item = BorrowedFd<'a>> {
        let has_room = self.is_open && self.clients.len() < CLIENTS_MAX;
        let doors = listeners.iter().filter(move |listener| has_room && listener.is_passed).map(AsFd::as_fd);
        doors.chain(self.clients.iter().map(|(client, _)| client.as_fd()))
    }

    /// When the most impatient wait ends.
    pub(crate) fn due(&self) -> Option<Ns> {
        self.clients.iter().map(|(_, until)| *until).min()
    }

    /// Tells whoever has come, and lets go who has left.
    pub(crate) fn turn(&mut self, listeners: &[Listener], now: Ns) {
        self.clients.retain_mut(|(client, until)| *until > now && is_there(client));
        if !self.is_open {
            return;
        }
        for listener in listeners.iter().filter(|listener| listener.is_passed) {
            for _ in self.clients.len()..CLIENTS_MAX {
                let Ok(client) = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else { break };
                if !self.is_tls {
                    self.tell(client, now);
                }
            }
        }
    }

    fn tell(&mut self, client: OwnedFd, now: Ns) {
        // A stream socket like any other: read, write and poll do not ask for its family.
        let mut client = UnixStream::from(client);
        self.id.seq = self.id.seq.wrapping_add(1);
        // A fresh socket's buffer takes these few bytes whole.
        if client.write_all(answer(self.id).as_bytes()).is_ok() && shutdown(&client, Shutdown::Write).is_ok() {
            self.clients.push((client, now.saturating_add(PATIENCE)));
        }
    }
}

/// Whether the client has not closed yet; takes what it sends, at most some pieces at a time.
fn is_there(client: &mut UnixStream) -> bool {
    let mut piece = [0; 4096];
    for _ in 0..16 {
        match client.read(&mut piece) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
    true
}

fn answer(id: RequestId) -> String {
    let error = Error::new(Fault::ServerShuttingDown, "the gateway is stopping; try again");
    let body = error.body();
    format!(
        "HTTP/1.1 {} Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         retry-after: 1\r\nx-should-retry: true\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n{body}",
        error.status(),
        body.len()
    )
}
