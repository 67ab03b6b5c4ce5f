//! `ClientIo`: the one I/O type under a client connection.
//!
//! It reads request heads whole and pre-scans them before the HTTP library sees a byte, follows the framing of bodies
//! to know where the next head begins, holds the header and idle timers, and knows when an answer's last byte has
//! been handed to the kernel. A head that is refused is replaced by one that only this process can have written, so that the refusal is
//! answered in its turn, behind the answers to earlier requests on the connection.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use evergate_board::InflightPhase;
use evergate_core::{Error, Fault};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;

use super::head::{self, Chunks, Framing, HeadLimits};
use crate::gate::Pass;

/// The HTTP/2 connection preface (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Most bytes read and thrown away after our last answer, so that the client can read it before a reset.
const LINGER_BYTES_MAX: usize = 256 * 1024;
const LINGER: Duration = Duration::from_millis(500);

/// How a connection reaches us.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// A Unix socket.
    Unix(UnixStream),
}

/// What a connection may do, the same for all of a worker.
#[derive(Clone, Copy, Debug)]
pub struct IoLimits {
    /// Head sizes.
    pub head: HeadLimits,
    /// A head from its first byte.
    pub header_timeout: Duration,
    /// Without any request.
    pub idle_timeout: Duration,
}

/// What the I/O type and the requests of its connection tell each other.
#[derive(Debug, Default)]
pub struct Shared {
    /// Requests between head and last byte.
    pub active: AtomicU32,
    /// Heads delivered to the HTTP library, and heads it has made requests of.
    delivered: AtomicU32,
    requested: AtomicU32,
    /// The refusal that the last delivered head stands for.
    refusal: Mutex<Option<Error>>,
    is_refused: AtomicBool,
    /// Requests whose answers are written into the HTTP library's buffer but not yet to the kernel.
    finishing: Mutex<Vec<Pass>>,
    has_finishing: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Each value is replaced in one step, so a panic while it was locked cannot have left it half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// To be called once for each request, in their order: the refusal that it stands for, if it is none of the
    /// client's own.
    #[must_use]
    pub fn next_refusal(&self) -> Option<Error> {
        let number = self.requested.fetch_add(1, Ordering::Relaxed) + 1;
        let is_refused = self.is_refused.load(Ordering::Relaxed) && number == self.delivered.load(Ordering::Relaxed);
        if is_refused { lock(&self.refusal).take() } else { None }
    }

    /// Keeps a request's pass until its last byte is the kernel's, which is what comes next: the write and the flush
    /// follow in the same turn. Marked before them, since the client is woken by the write and may see a killer run
    /// before we do.
    pub fn finish(&self, pass: Pass) {
        pass.enter(InflightPhase::Write);
        lock(&self.finishing).push(pass);
        self.has_finishing.store(true, Ordering::Relaxed);
    }

    /// The socket is full: the last byte waits after all.
    fn is_stuck(&self) {
        if self.has_finishing.load(Ordering::Relaxed) {
            lock(&self.finishing).iter().for_each(|pass| pass.enter(InflightPhase::Stream));
        }
    }

    fn refuse(&self, error: Error) {
        // Nothing is delivered behind it, so the count stays its number.
        self.delivered.fetch_add(1, Ordering::Relaxed);
        *lock(&self.refusal) = Some(error);
        self.is_refused.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Reading {
    Head,
    Body(u64),
    Chunked(Chunks),
    /// HTTP/2, or nothing more to judge.
    Opaque,
    /// A refusal was delivered: nothing more is read.
    Refused,
}

/// A client connection.
pub struct ClientIo {
    stream: Stream,
    shared: Arc<Shared>,
    limits: IoLimits,
    reading: Reading,
    /// Read from the socket, not yet judged.
    raw: BytesMut,
    searched: usize,
    /// Judged, not yet taken by the HTTP library.
    ready: Bytes,
    head_since: Option<Instant>,
    active_at: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    linger: Option<(usize, Pin<Box<Sleep>>)>,
}

impl ClientIo {
    /// A connection of which nothing has been read.
    #[must_use]
    pub fn new(stream: Stream, limits: IoLimits) -> Self {
        Self {
            stream,
            shared: Arc::default(),
            limits,
            reading: Reading::Head,
            raw: BytesMut::new(),
            searched: 0,
            ready: Bytes::new(),
            head_since: None,
            active_at: Instant::now(),
            timer: None,
            linger: None,
        }
    }

    /// Takes what the client has sent by now, before the runtime has been told that there is something: from the accept
    /// to the request's row on the board there is then no moment in which a death could not name it.
    pub fn read_ahead(&mut self) {
        let mut piece = [0; 4096];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        let read = match &self.stream {
            Stream::Tcp(stream) => rustix::net::recv(stream, &mut piece[..], flags),
            Stream::Unix(stream) => rustix::net::recv(stream, &mut piece[..], flags),
            // The handshake has been waited for already.
            Stream::Tls(_) => return,
        };
        // Nothing there, the end, or an error: the first ordinary read says so in its own way.
        if let Ok((read, _)) = read
            && read > 0
        {
            self.raw.extend_from_slice(piece.get(..read).unwrap_or_default());
            self.head_since = Some(Instant::now());
        }
    }

    /// The side that requests see.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Whether HTTP/2 was agreed on in the TLS handshake.
    #[must_use]
    pub fn is_h2_by_alpn(&self) -> bool {
        matches!(&self.stream, Stream::Tls(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2"))
    }

    /// Reads until it is clear whether the client speaks HTTP/2 by prior knowledge; `None` if it left before, or
    /// speaks TLS to a plain port.
    ///
    /// # Errors
    /// The socket's.
    pub async fn is_h2(&mut self) -> io::Result<Option<bool>> {
        if self.is_h2_by_alpn() {
            self.reading = Reading::Opaque;
            return Ok(Some(true));
        }
        loop {
            let seen = self.raw.len().min(PREFACE.len());
            match self.raw.first() {
                Some(0x16) => return Ok(None),
                Some(_) if self.raw.get(..seen) != PREFACE.get(..seen) => return Ok(Some(false)),
                Some(_) if seen == PREFACE.len() => {
                    self.ready = std::mem::take(&mut self.raw).freeze();
                    self.reading = Reading::Opaque;
                    return Ok(Some(true));
                }
                _ => {}
            }
            match std::future::poll_fn(|cx| self.poll_fill(cx)).await? {
                Filled::Bytes => {}
                Filled::End => return Ok(None),
                // The refusal, a 408, is answered by HTTP/1.1's rules.
                Filled::Refused => return Ok(Some(false)),
            }
        }
    }

    /// Reads what the socket has into `raw`, under the header and idle timers.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Filled>> {
        if self.raw.capacity() - self.raw.len() < 1024 {
            self.raw.reserve(4096);
        }
        let before = self.raw.len();
        // Through a fixed piece on the stack: the library's buffer type cannot be filled without unsafe code.
        let mut piece = [std::mem::MaybeUninit::uninit(); 4096];
        let mut buf = ReadBuf::uninit(&mut piece);
        match self.stream.poll_read(cx, &mut buf) {
            Poll::Ready(Ok(())) => {
                self.raw.extend_from_slice(buf.filled());
                if self.raw.len() == before {
                    return Poll::Ready(Ok(Filled::End));
                }
                if self.head_since.is_none() {
                    self.head_since = Some(Instant::now());
                }
                Poll::Ready(Ok(Filled::Bytes))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.poll_timer(cx).map(Ok),
        }
    }

    /// Waits for the header or idle limit, whichever is running.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Filled> {
        loop {
            let due = match self.head_since {
                Some(since) if !self.raw.is_empty() => since + self.limits.header_timeout,
                _ => self.active_at + self.limits.idle_timeout,
            };
            let timer = match &mut self.timer {
                // Armed later than needed only when a head has begun; earlier is harmless, it is looked at again.
                Some(timer) if timer.deadline() <= due.into() => timer,
                slot => slot.insert(Box::pin(tokio::time::sleep_until(due.into()))),
            };
            ready!(timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.shared.active.load(Ordering::Relaxed) > 0 {
                // An answer is on its way: neither limit runs against the client.
                self.active_at = now;
                self.head_since = self.head_since.map(|_| now);
            }
            self.timer = None;
            if now < due || self.shared.active.load(Ordering::Relaxed) > 0 {
                continue;
            }
            if self.raw.is_empty() {
                return Poll::Ready(Filled::End);
            }
            let message = "the request head was not complete in time (timeouts.header)";
            self.refuse(Error::new(Fault::RequestTimeout, message));
            return Poll::Ready(Filled::Refused);
        }
    }

    /// Puts a refusal in the place of the head at hand.
    fn refuse(&mut self, error: Error) {
        self.shared.refuse(error);
        self.ready = Bytes::from_static(b"GET /refused HTTP/1.1\r\nhost: refused\r\n\r\n");
        self.raw = BytesMut::new();
        self.reading = Reading::Refused;
    }

    /// Judges `raw` if it holds a whole head; says whether there is something to deliver now.
    fn judge_head(&mut self) -> bool {
        let limit = self.limits.head.bytes;
        let Some(length) = head::complete(&self.raw, self.searched) else {
            self.searched = self.raw.len();
            if self.raw.len() > limit {
                let message = format!("the request head is larger than {limit} bytes");
                self.refuse(Error::new(Fault::HeadersTooLarge, message));
                return true;
            }
            return false;
        };
        let checked = if length > limit {
            Err(Error::new(Fault::HeadersTooLarge, format!("the request head is larger than {limit} bytes")))
        } else {
            self.raw.get(..length).map_or_else(
                || Err(Error::new(Fault::Internal, "a head longer than what was read")),
                |head| head::check(head, &self.limits.head),
            )
        };
        match checked {
            Ok(framing) => {
                self.ready = self.raw.split_to(length).freeze();
                self.shared.delivered.fetch_add(1, Ordering::Relaxed);
                self.searched = 0;
                self.head_since = (!self.raw.is_empty()).then(Instant::now);
                self.reading = match framing {
                    Framing::Length(0) => Reading::Head,
                    Framing::Length(bytes) => Reading::Body(bytes),
                    Framing::Chunked => Reading::Chunked(Chunks::default()),
                };
            }
            Err(error) => self.refuse(error),
        }
        true
    }

    /// Delivers what lies in `raw` of the body at hand; says whether there was something.
    fn judge_body(&mut self) -> io::Result<bool> {
        if self.raw.is_empty() {
            return Ok(false);
        }
        let (taken, is_done) = match &mut self.reading {
            Reading::Body(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(self.raw.len());
                *left -= here as u64;
                (here, *left == 0)
            }
            Reading::Chunked(chunks) => {
                chunks.take(&self.raw).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?
            }
            _ => return Ok(false),
        };
        self.ready = self.raw.split_to(taken).freeze();
        if is_done {
            self.reading = Reading::Head;
            self.head_since = (!self.raw.is_empty()).then(Instant::now);
        }
        Ok(true)
    }

    /// Reads body bytes straight into the library's buffer, never past the body's end.
    fn poll_body(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>, left: u64) -> Poll<io::Result<()>> {
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(out.remaining());
        let mut part = ReadBuf::new(out.initialize_unfilled_to(room));
        ready!(self.stream.poll_read(cx, &mut part))?;
        let read = part.filled().len();
        out.advance(read);
        self.reading = match left - read as u64 {
            0 => Reading::Head,
            left => Reading::Body(left),
        };
        Poll::Ready(Ok(()))
    }

    fn deliver(&mut self, out: &mut ReadBuf<'_>) {
        let room = self.ready.len().min(out.remaining());
        out.put_slice(self.ready.get(..room).unwrap_or_default());
        self.ready.advance(room);
        if self.ready.is_empty() {
            // Gives the memory back while a long answer is under way.
            self.ready = Bytes::new();
        }
    }
}

enum Filled {
    Bytes,
    End,
    Refused,
}

impl AsyncRead for ClientIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.ready.is_empty() {
                this.deliver(out);
                return Poll::Ready(Ok(()));
            }
            let has_more = match this.reading {
                Reading::Opaque => return this.stream.poll_read(cx, out),
                // The refusal's answer ends the connection; end of file here would end it before.
                Reading::Refused => return Poll::Pending,
                Reading::Head => this.judge_head(),
                Reading::Body(left) if this.raw.is_empty() => return this.poll_body(cx, out, left),
                Reading::Body(_) | Reading::Chunked(_) => this.judge_body()?,
            };
            if has_more {
                continue;
            }
            match ready!(this.poll_fill(cx))? {
                Filled::Bytes | Filled::Refused => {}
                Filled::End => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.stream.poll_write(cx, bytes);
        if written.is_pending() {
            this.shared.is_stuck();
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = this.stream.poll_flush(cx);
        if flushed.is_pending() {
            this.shared.is_stuck();
        }
        ready!(flushed)?;
        // Everything written so far is the kernel's now, so requests whose last byte was in it are over.
        if this.shared.has_finishing.swap(false, Ordering::Relaxed) {
            let finished = std::mem::take(&mut *lock(&this.shared.finishing));
            finished.into_iter().for_each(Pass::complete);
            this.active_at = Instant::now();
        }
        Poll::Ready(Ok(()))
    }

    /// Says that nothing more comes, then reads on for a moment: closing a socket with unread bytes resets it, and the
    /// reset would overtake the answer.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.linger.is_none() {
            ready!(this.stream.poll_shutdown(cx))?;
            if matches!(this.reading, Reading::Opaque) {
                return Poll::Ready(Ok(()));
            }
            this.linger = Some((0, Box::pin(tokio::time::sleep(LINGER))));
        }
        let mut piece = [std::mem::MaybeUninit::uninit(); 4096];
        while let Some((thrown_away, timer)) = &mut this.linger {
            let mut buf = ReadBuf::uninit(&mut piece);
            if timer.as_mut().poll(cx).is_ready() || *thrown_away > LINGER_BYTES_MAX {
                break;
            }
            ready!(this.stream.poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                break;
            }
            *thrown_away += buf.filled().len();
        }
        Poll::Ready(Ok(()))
    }
}

macro_rules! each {
    ($self:ident, $stream:ident => $body:expr) => {
        match $self {
            Stream::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $body
            }
            Stream::Tls($stream) => {
                let $stream = Pin::new(&mut **$stream);
                $body
            }
            Stream::Unix($stream) => {
                let $stream = Pin::new($stream);
                $body
            }
        }
    };
}

impl Stream {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_read(cx, buf))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_shutdown(cx))
    }
}
