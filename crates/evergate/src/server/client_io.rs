//! `ClientIo`: the one I/O type under a client connection.
//!
//! It tells HTTP/2 from HTTP/1 by the first bytes, holds the limits of heads, of idling and of a client that reads nothing,
//! lingers behind the last answer, and knows when an answer's last byte has been handed to the kernel.

use std::future::Future;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use evergate_core::head::HeadLimits;
use evergate_core::{Error, Fault};
use evergate_upstream::clock::{Clock, Sleep};
use evergate_upstream::standstill::Standstill;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::frames::Frames;
use super::frames_io::Http2;
use super::shared::Shared;
use super::stream::Stream;
use crate::http::fault::{Place, pass_by};

/// The HTTP/2 connection preface (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of one read of what nobody has asked for yet. On the stack, so that a connection that waits has no buffer.
const PIECE_BYTES: usize = 8 * 1024;

/// Most bytes read and thrown away after our last answer, so that the client can read it before a reset.
const LINGER_BYTES_MAX: usize = 256 * 1024;
const LINGER: Duration = Duration::from_millis(500);
/// Until the runtime has surely heard of bytes that lie in the kernel.
const SOON: Duration = Duration::from_millis(1);

/// What a connection may do, the same for all of a worker.
#[derive(Clone, Copy, Debug)]
pub struct IoLimits {
    /// Head sizes.
    pub head: HeadLimits,
    /// A head from its first byte.
    pub header_timeout: Duration,
    /// Without any request.
    pub idle_timeout: Duration,
    /// With bytes to be written of which the client takes none.
    pub stall_timeout: Duration,
}

/// A client connection.
pub struct ClientIo {
    pub(super) stream: Stream,
    pub(super) shared: Arc<Shared>,
    pub(super) limits: IoLimits,
    /// Read from the socket, not yet judged.
    pub(super) raw: BytesMut,
    /// When the first byte of the head came of which `raw` holds the beginning.
    pub(super) head_since: Option<Instant>,
    /// When it was accepted, or its last answer was the kernel's.
    pub(super) active_at: Instant,
    /// Whether a head was not complete in time.
    pub(super) is_late: bool,
    /// Whether a request has ever come.
    pub(super) is_used: bool,
    /// HTTP/2: whether bytes are not the kernel's yet.
    pub(super) is_writing: bool,
    pub(super) clock: Clock,
    pub(super) timer: Option<Sleep>,
    stall: Standstill,
    linger: Option<(usize, Sleep)>,
    /// HTTP/2: where the reader is in the client's frames; see `frames_io`.
    pub(super) frames: Frames,
    pub(super) h2: Http2,
}

/// What came of waiting for bytes.
pub(super) enum Filled {
    /// Some.
    Bytes,
    /// The end, or the connection has idled for too long.
    End,
    /// A head was not complete in time.
    Late,
}

impl ClientIo {
    /// A connection of which nothing has been read.
    #[must_use]
    pub fn new(stream: Stream, limits: IoLimits, clock: Clock) -> Self {
        Self {
            stream,
            shared: Arc::default(),
            limits,
            raw: BytesMut::new(),
            head_since: None,
            active_at: Instant::now(),
            is_late: false,
            is_used: false,
            is_writing: false,
            clock,
            timer: None,
            stall: Standstill::default(),
            linger: None,
            frames: Frames::after_preface(PREFACE.len()),
            h2: Http2::default(),
        }
    }

    /// Takes what the client has sent by now, before the runtime has been told that there is something: from the accept
    /// to the request's row on the board there is then no moment in which a death could not name it.
    pub fn read_ahead(&mut self) {
        let mut piece = [0; 4096];
        let read = self.stream.take_now(&mut piece);
        if read > 0 {
            self.raw.extend_from_slice(piece.get(..read).unwrap_or_default());
            self.head_since = Some(Instant::now());
        }
    }

    /// The side that requests see.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Reads until it is clear whether the client speaks HTTP/2, by agreement in the TLS handshake or by prior
    /// knowledge; `None` if it left before, took too long, or speaks TLS to a plain port.
    ///
    /// # Errors
    /// The socket's.
    pub async fn is_h2(&mut self) -> io::Result<Option<bool>> {
        let is_agreed = self.stream.is_h2_by_alpn();
        loop {
            let seen = self.raw.len().min(PREFACE.len());
            match self.raw.first() {
                Some(0x16) if !is_agreed => return Ok(None),
                // What was agreed on and is not spoken is the library's to refuse.
                Some(_) if self.raw.get(..seen) != PREFACE.get(..seen) => return Ok(Some(is_agreed)),
                Some(_) if seen == PREFACE.len() => return Ok(Some(true)),
                _ => {}
            }
            match std::future::poll_fn(|cx| self.poll_fill(cx)).await? {
                Filled::Bytes => {}
                Filled::End => return Ok(None),
                // It is answered by HTTP/1.1's rules; there is no answer for half a preface.
                Filled::Late => return Ok((!is_agreed).then_some(false)),
            }
        }
    }

    /// Ends the connection in order, without an answer.
    pub async fn close(mut self) {
        // An error means that it has ended already.
        let _ = std::future::poll_fn(|cx| self.poll_end(cx)).await;
    }

    /// Reads once what the socket has; nothing at its end.
    pub(super) fn poll_piece<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut Self, &[u8]) -> T,
    ) -> Poll<io::Result<T>> {
        let mut piece = [MaybeUninit::uninit(); PIECE_BYTES];
        let mut buf = ReadBuf::uninit(&mut piece);
        ready!(self.stream.poll_read(cx, &mut buf))?;
        Poll::Ready(Ok(take(self, buf.filled())))
    }

    /// Adds to `raw` what has come; a head begins with it, if none has.
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        self.raw.extend_from_slice(bytes);
        if self.head_since.is_none() {
            self.head_since = Some(Instant::now());
        }
    }

    /// Reads into `raw`, at most `bytes_max` bytes; says how many.
    pub(super) fn poll_raw(&mut self, cx: &mut Context<'_>, bytes_max: usize) -> Poll<io::Result<usize>> {
        self.raw.reserve(bytes_max);
        let mut limited = bytes::BufMut::limit(&mut self.raw, bytes_max);
        // It has no state of its own, so it can be made anew for each poll.
        let mut reading = std::pin::pin!(self.stream.read_buf(&mut limited));
        reading.as_mut().poll(cx)
    }

    /// Reads what the socket has into `raw`, under the header and idle timers.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Filled>> {
        let filled = self.poll_piece(cx, |io, bytes| {
            if bytes.is_empty() {
                return Filled::End;
            }
            io.keep(bytes);
            Filled::Bytes
        });
        if filled.is_pending() { self.poll_limits(cx).map(Ok) } else { filled }
    }

    /// When the limit that is running is over: the header's, the idle one, or the patience of a connection that is to
    /// end.
    fn due(&self) -> Instant {
        if !self.raw.is_empty() {
            let since = self.head_since.map_or(self.active_at, |since| since.max(self.active_at));
            return since + self.limits.header_timeout;
        }
        if self.shared.is_shed(self.active_at) {
            return self.active_at;
        }
        let idle = self.active_at + self.limits.idle_timeout;
        let Some(leaving) = self.shared.leaving() else { return idle };
        let mut due = self.active_at.max(leaving.since) + leaving.linger;
        if leaving.owes_first && !self.is_used {
            due = due.max(self.active_at + self.limits.header_timeout);
        }
        due.min(idle)
    }

    /// Waits for the limit that is running against a client that has no answer to come.
    pub(super) fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<Filled> {
        loop {
            let due = self.due();
            let timer = match &mut self.timer {
                // Armed later than needed only when a head has begun or the connection is to end; earlier is harmless,
                // it is looked at again.
                Some(timer) if timer.deadline() <= due => timer,
                slot => slot.insert(self.clock.sleep_until(due)),
            };
            ready!(Pin::new(timer).poll(cx));
            self.timer = None;
            if Instant::now() < due {
                continue;
            }
            if !self.raw.is_empty() {
                self.is_late = true;
                return Poll::Ready(Filled::Late);
            }
            if !self.stream.has_unread() {
                return Poll::Ready(Filled::End);
            }
            // A request that has come in the last instant: the runtime is about to hear of it.
            let soon = self.timer.insert(self.clock.sleep(SOON));
            ready!(Pin::new(soon).poll(cx));
        }
    }

    /// The socket takes nothing: `pending` unless that has lasted too long.
    fn poll_stuck<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        self.is_writing = true;
        self.shared.is_stuck();
        ready!(self.stall.poll(cx, &self.clock, self.limits.stall_timeout, || self.stream.unsent()));
        self.shared.stall();
        self.stream.reset_at_close();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client reads nothing (timeouts.client_stall)")))
    }

    /// Writes; says how many bytes of all parts together the kernel has now.
    pub(super) fn poll_parts(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        pass_by(Place::Connection);
        self.shared.is_tried();
        let Poll::Ready(written) = self.stream.poll_write_parts(cx, parts) else { return self.poll_stuck(cx) };
        self.stall.reset();
        self.shared.is_taken_from();
        self.is_writing = true;
        Poll::Ready(written)
    }

    /// What was written is the kernel's when this is ready, and requests whose last byte was in it are over.
    pub(super) fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.is_tried();
        let Poll::Ready(flushed) = self.stream.poll_flush(cx) else { return self.poll_stuck(cx) };
        flushed?;
        self.stall.reset();
        self.shared.is_taken_from();
        self.shared.flushed();
        Poll::Ready(Ok(()))
    }

    /// Says that nothing more comes, then reads on for a moment: closing a socket with unread bytes resets it, and the
    /// reset would overtake the answer.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.linger.is_none() {
            let Poll::Ready(shut) = self.stream.poll_shutdown(cx) else { return self.poll_stuck(cx) };
            shut?;
            self.linger = Some((0, self.clock.sleep(LINGER)));
        }
        while let Some((thrown_away, timer)) = &mut self.linger {
            if Pin::new(timer).poll(cx).is_ready() || *thrown_away > LINGER_BYTES_MAX {
                break;
            }
            let read = ready!(self.poll_piece(cx, |_, bytes| bytes.len()))?;
            if read == 0 {
                break;
            }
            if let Some((thrown_away, _)) = &mut self.linger {
                *thrown_away += read;
            }
        }
        Poll::Ready(Ok(()))
    }
}

pub(super) fn late_head() -> Error {
    Error::new(Fault::RequestTimeout, "the request head was not complete in time (timeouts.header)")
}

/// For the HTTP/2 library.
impl AsyncRead for ClientIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.raw.is_empty() {
            return this.poll_frames(cx, out);
        }
        let room = this.raw.len().min(out.remaining());
        let piece = this.raw.split_to(room);
        out.put_slice(&piece);
        this.follow(&piece);
        if !this.raw.has_remaining() {
            // Gives the memory back.
            this.raw = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

/// For the HTTP/2 library.
impl AsyncWrite for ClientIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_parts(cx, &[IoSlice::new(bytes)])
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_written(cx))?;
        if std::mem::take(&mut this.is_writing) && this.is_of_a_request() {
            this.active_at = Instant::now();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_end(cx)
    }
}
