//! One connection, TCP or Unix, plain or TLS, never blocking longer than it is told, that notices a peer's leaving
//! while it writes or waits.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

/// How a connection's other end left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It closed in order: FIN, or a TLS `close_notify`.
    Eof,
    /// It reset, or the connection broke.
    Reset,
}

/// What a wait on a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Bytes came in.
    Data,
    /// The time is up.
    Time,
    /// The peer left.
    Gone(Gone),
}

enum Sock {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection with what has been read from it and not been taken yet.
pub struct Link {
    sock: Sock,
    tls: Option<Box<Connection>>,
    /// Read and not yet taken.
    pub inbox: BytesMut,
    gone: Option<Gone>,
}

/// Unread bytes that are enough: beyond this the peer is left to its own flow control.
const INBOX_BYTES_MAX: usize = 64 * 1024 * 1024;

impl Link {
    /// A TCP connection, with Nagle's delay off.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { sock: Sock::Tcp(stream), tls: None, inbox: BytesMut::new(), gone: None })
    }

    /// A Unix connection.
    pub fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { sock: Sock::Unix(stream), tls: None, inbox: BytesMut::new(), gone: None })
    }

    /// Connects to `HOST:PORT` or `unix:PATH`.
    ///
    /// # Errors
    /// Those of `connect(2)`; five seconds at most.
    pub fn connect(address: &str) -> io::Result<Self> {
        match address.strip_prefix("unix:") {
            Some(path) => Self::unix(UnixStream::connect(path)?),
            None => {
                let address = address.parse().map_err(|_| io::Error::other(format!("not an address: {address}")))?;
                Self::tcp(TcpStream::connect_timeout(&address, Duration::from_secs(5))?)
            }
        }
    }

    /// Puts the server's side of TLS on it; the handshake happens with the first bytes.
    pub fn serve_tls(mut self, config: &Arc<ServerConfig>) -> Self {
        self.tls = Some(Box::new(ServerConnection::new(config.clone()).expect("TLS server").into()));
        self
    }

    /// Puts the client's side of TLS on it, asking for `localhost`.
    pub fn start_tls(mut self, config: &Arc<ClientConfig>) -> Self {
        let name = "localhost".try_into().expect("a name");
        self.tls = Some(Box::new(ClientConnection::new(config.clone(), name).expect("TLS client").into()));
        // Sends the ClientHello, so that a wait alone gets on with the handshake.
        let _ = self.write_some(&[]);
        self
    }

    /// The protocol that ALPN agreed on.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.tls.as_ref().and_then(|tls| tls.alpn_protocol())
    }

    /// Writes everything, meanwhile reading what comes in.
    ///
    /// # Errors
    /// How the peer left. An end of the peer's sending half alone counts as leaving, as the gateway's own rule is.
    ///
    /// # Panics
    /// When the peer takes nothing for 60 s: no test waits that long on purpose.
    pub fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Gone> {
        let end = Instant::now() + Duration::from_secs(60);
        while !bytes.is_empty() || self.tls.as_ref().is_some_and(|tls| tls.wants_write()) {
            match self.write_some(bytes) {
                Ok(0) => {
                    assert!(Instant::now() < end, "the peer took nothing for 60 s");
                    self.poll(true, end);
                    self.absorb();
                    if let Some(gone) = self.gone {
                        return Err(gone);
                    }
                }
                Ok(n) => bytes = &bytes[n..],
                Err(_) => return Err(self.leave(Gone::Reset)),
            }
        }
        Ok(())
    }

    /// Waits until bytes come in, the peer leaves, or `end`.
    pub fn wait(&mut self, end: Instant) -> Wait {
        loop {
            let before = self.inbox.len();
            self.absorb();
            if self.inbox.len() > before {
                return Wait::Data;
            }
            if let Some(gone) = self.gone {
                return Wait::Gone(gone);
            }
            if Instant::now() >= end {
                return Wait::Time;
            }
            self.poll(false, end);
        }
    }

    /// Lets `time` pass.
    ///
    /// # Errors
    /// How the peer left, as soon as it did.
    pub fn pause(&mut self, time: Duration) -> Result<(), Gone> {
        let end = Instant::now() + time;
        loop {
            match self.wait(end) {
                Wait::Data => {}
                Wait::Time => return Ok(()),
                Wait::Gone(gone) => return Err(gone),
            }
        }
    }

    /// Whether the peer has left, as far as is known.
    pub fn gone(&self) -> Option<Gone> {
        self.gone
    }

    /// Ends the sending half: FIN, with TLS a `close_notify` before it.
    pub fn half_close(&mut self) {
        self.close_notify();
        let _ = match &self.sock {
            Sock::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Sock::Unix(stream) => stream.shutdown(Shutdown::Write),
        };
    }

    /// Ends the connection in order.
    pub fn close(mut self) {
        self.close_notify();
    }

    /// Breaks the connection with RST; a Unix socket is just closed.
    pub fn reset(self) {
        if let Sock::Tcp(stream) = &self.sock {
            // With a linger time of zero close(2) sends RST and discards what is unsent (socket(7), tcp(7)).
            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).expect("SO_LINGER");
        }
    }

    fn close_notify(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = self.write_all(&[]);
        }
    }

    fn leave(&mut self, gone: Gone) -> Gone {
        *self.gone.get_or_insert(gone)
    }

    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return Ok(would_block(self.sock.write(bytes))?.unwrap_or(0));
        };
        // Before the handshake's end the writer only buffers; what it holds goes out when the handshake is done.
        let taken = if bytes.is_empty() { 0 } else { tls.writer().write(bytes)? };
        while tls.wants_write() && would_block(tls.write_tls(&mut self.sock))?.is_some() {}
        Ok(taken)
    }

    /// Reads all that is there without waiting.
    fn absorb(&mut self) {
        let mut piece = [0_u8; 16 * 1024];
        while self.gone.is_none() && self.inbox.len() < INBOX_BYTES_MAX {
            match self.read_some(&mut piece) {
                Ok(Some(0)) => {
                    self.leave(Gone::Eof);
                }
                Ok(Some(n)) => self.inbox.extend_from_slice(&piece[..n]),
                Ok(None) => return,
                Err(_) => {
                    self.leave(Gone::Reset);
                }
            }
        }
    }

    /// `None`: nothing there. `Some(0)`: the end.
    fn read_some(&mut self, piece: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(tls) = &mut self.tls else {
            return would_block(self.sock.read(piece));
        };
        loop {
            match tls.reader().read(piece) {
                Ok(n) => return Ok(Some(n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            match would_block(tls.read_tls(&mut self.sock))? {
                None => return Ok(None),
                // FIN without close_notify: the peer's process died or does not care; in order or not is one here.
                Some(0) => return Ok(Some(0)),
                Some(_) => {
                    let outcome = tls.process_new_packets();
                    while tls.wants_write() && would_block(tls.write_tls(&mut self.sock))?.is_some() {}
                    outcome.map_err(io::Error::other)?;
                }
            }
        }
    }

    /// Waits for the socket, at most until `end`.
    fn poll(&self, write: bool, end: Instant) {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let flags = if write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut fds = [PollFd::from_borrowed_fd(self.sock.as_fd(), flags)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }

    /// Makes the kernel take less from the peer than usual, for tests of a reader that does not read.
    pub fn shrink_receive_buffer(&self) {
        rustix::net::sockopt::set_socket_recv_buffer_size(&self.sock, 4096).expect("SO_RCVBUF");
    }

    /// Takes what one read gives, at most that many bytes, without waiting; how many it were. They are thrown away.
    pub fn read_piece(&mut self, bytes: usize) -> usize {
        let mut piece = vec![0; bytes];
        self.read_some(&mut piece).ok().flatten().unwrap_or(0)
    }

    /// Whether the peer's kernel has answered something of ours with RST since the last look; its FIN is none.
    pub fn was_reset(&self) -> bool {
        // After the peer's FIN a reset shows as EPIPE, before it as ECONNRESET (`tcp_reset` in the kernel's
        // net/ipv4/tcp_input.c).
        self.gone == Some(Gone::Reset)
            || rustix::net::sockopt::socket_error(&self.sock).is_ok_and(|state| state.is_err())
    }

    /// A second handle with which another thread can end the connection.
    pub(crate) fn end_handle(&self) -> io::Result<EndHandle> {
        Ok(EndHandle(match &self.sock {
            Sock::Tcp(stream) => Sock::Tcp(stream.try_clone()?),
            Sock::Unix(stream) => Sock::Unix(stream.try_clone()?),
        }))
    }
}

/// Ends a connection that another thread uses.
pub(crate) struct EndHandle(Sock);

impl EndHandle {
    /// Both directions at once, as when the peer had left.
    pub(crate) fn end(&self) {
        let _ = match &self.0 {
            Sock::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Sock::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

fn would_block(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

impl AsFd for Sock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Sock {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(piece),
            Self::Unix(stream) => stream.read(piece),
        }
    }
}

impl Write for Sock {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
