//! `ClientIo`: the one I/O type under a client connection.
//!
//! It reads request heads whole and pre-scans them before the HTTP library sees a byte, follows the framing of bodies
//! to know where the next head begins, holds the header and idle timers, and knows when an answer's last byte has
//! been handed to the kernel. A head that is refused is replaced by one that only this process can have written, so that the refusal is
//! answered in its turn, behind the answers to earlier requests on the connection.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use evergate_core::chunked::Chunks;
use evergate_core::head::{self, Framing, HeadLimits};
use evergate_core::{Error, Fault};
use evergate_upstream::clock::{Clock, Sleep};
use evergate_upstream::standstill::Standstill;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frames::Frames;
use super::frames_io::Http2;
use super::shared::{Refused, Shared};
use super::stream::Stream;
use crate::http::fault::{Place, pass_by};

/// The HTTP/2 connection preface (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

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

#[derive(Debug)]
pub(super) enum Reading {
    Head,
    Body(u64),
    Chunked(Chunks),
    /// HTTP/2: the library judges, this only follows where frames end.
    Frames(Frames),
    /// A refusal was delivered: nothing more is read.
    Refused,
}

/// A client connection.
pub struct ClientIo {
    pub(super) stream: Stream,
    pub(super) shared: Arc<Shared>,
    pub(super) limits: IoLimits,
    pub(super) reading: Reading,
    /// Read from the socket, not yet judged.
    raw: BytesMut,
    searched: usize,
    /// Bytes of empty lines thrown away before the head that is awaited.
    blank: usize,
    /// Judged, not yet taken by the HTTP library.
    ready: Bytes,
    head_since: Option<Instant>,
    /// When it was accepted, or its last answer was the kernel's.
    pub(super) active_at: Instant,
    /// Whether bytes of an answer are not the kernel's yet.
    pub(super) is_writing: bool,
    /// Whether the limits wait for an answer to be gone.
    is_timer_due: bool,
    pub(super) clock: Clock,
    pub(super) timer: Option<Sleep>,
    stall: Standstill,
    linger: Option<(usize, Sleep)>,
    /// HTTP/2: see `frames_io`.
    pub(super) h2: Http2,
}

impl ClientIo {
    /// A connection of which nothing has been read.
    #[must_use]
    pub fn new(stream: Stream, limits: IoLimits, clock: Clock) -> Self {
        Self {
            stream,
            shared: Arc::default(),
            limits,
            reading: Reading::Head,
            raw: BytesMut::new(),
            searched: 0,
            blank: 0,
            ready: Bytes::new(),
            head_since: None,
            active_at: Instant::now(),
            is_writing: false,
            is_timer_due: false,
            clock,
            timer: None,
            stall: Standstill::default(),
            linger: None,
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
                Some(_) if self.raw.get(..seen) != PREFACE.get(..seen) => {
                    // What was agreed on and is not spoken is the library's to refuse.
                    if is_agreed {
                        self.speak_h2();
                    }
                    return Ok(Some(is_agreed));
                }
                Some(_) if seen == PREFACE.len() => {
                    self.speak_h2();
                    return Ok(Some(true));
                }
                _ => {}
            }
            match std::future::poll_fn(|cx| self.poll_fill(cx)).await? {
                Filled::Bytes => {}
                Filled::End => return Ok(None),
                // The refusal, a 408, is answered by HTTP/1.1's rules; there is none for half a preface.
                Filled::Refused => return Ok((!is_agreed).then_some(false)),
            }
        }
    }

    fn speak_h2(&mut self) {
        self.ready = std::mem::take(&mut self.raw).freeze();
        self.reading = Reading::Frames(Frames::after_preface(PREFACE.len()));
    }

    /// Ends the connection in order, without an answer.
    pub async fn close(mut self) {
        // An error means that it has ended already.
        let _ = std::future::poll_fn(|cx| Pin::new(&mut self).poll_shutdown(cx)).await;
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

    /// Reads straight into the library's buffer. What is not one whole good head, with nothing behind it but its body, is taken
    /// out again and goes the long way, by `raw`.
    fn poll_head(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<Filled>> {
        let before = out.filled().len();
        let Poll::Ready(read) = self.stream.poll_read(cx, out) else { return self.poll_timer(cx).map(Ok) };
        read?;
        let bytes = out.filled().get(before..).unwrap_or_default();
        if bytes.is_empty() {
            return Poll::Ready(Ok(Filled::End));
        }
        match whole(bytes, &self.limits.head) {
            Some(reading) => self.begin(reading),
            None => {
                self.raw.extend_from_slice(bytes);
                self.head_since = self.head_since.or_else(|| Some(Instant::now()));
                out.set_filled(before);
            }
        }
        Poll::Ready(Ok(Filled::Bytes))
    }

    /// A head goes to the library.
    fn begin(&mut self, reading: Reading) {
        self.shared.deliver();
        (self.searched, self.blank) = (0, 0);
        self.head_since = None;
        self.reading = reading;
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
        if leaving.owes_first && !self.shared.is_used() {
            due = due.max(self.active_at + self.limits.header_timeout);
        }
        due.min(idle)
    }

    /// Waits for the limit that is running. None runs against the client while an answer is on its way, until its last byte
    /// has gone, which a slow reader can make much later than its end.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Filled> {
        if self.shared.active.load(Ordering::Relaxed) > 0 || self.is_writing {
            self.rest_timer(cx);
            return Poll::Pending;
        }
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
            if self.raw.is_empty() {
                if self.stream.has_unread() {
                    // A request that has come in the last instant: the runtime is about to hear of it.
                    let soon = self.timer.insert(self.clock.sleep(SOON));
                    ready!(Pin::new(soon).poll(cx));
                    continue;
                }
                return Poll::Ready(Filled::End);
            }
            self.refuse(late_head());
            return Poll::Ready(Filled::Refused);
        }
    }

    /// Notes that the limits begin to run when the answer has gone: the library does not read again by itself then, since
    /// it has seen that there is nothing to be read. A timer that is there goes on; its waker may be another task's, the
    /// one that accepted the connection.
    fn rest_timer(&mut self, cx: &mut Context<'_>) {
        let is_first = !std::mem::replace(&mut self.is_timer_due, true);
        if is_first && self.timer.as_mut().is_some_and(|timer| Pin::new(timer).poll(cx).is_ready()) {
            self.timer = None;
        }
    }

    /// The answer has gone: has the limits looked at again, unless a timer comes in time for that anyway, as it does
    /// between the requests of a busy connection.
    fn resume_timer(&mut self, cx: &Context<'_>, now: Instant) {
        if !self.is_timer_due || self.shared.active.load(Ordering::Relaxed) > 0 {
            return;
        }
        self.is_timer_due = false;
        let due = self.due();
        if !self.timer.as_ref().is_some_and(|timer| now < timer.deadline() && timer.deadline() <= due) {
            cx.waker().wake_by_ref();
        }
    }

    /// Puts a refusal in the place of the head at hand.
    fn refuse(&mut self, error: Error) {
        let since = self.head_since.unwrap_or(self.active_at).max(self.active_at);
        self.shared.refuse(Refused::of(error, &self.raw, since));
        self.ready = Bytes::from_static(b"GET /refused HTTP/1.1\r\nhost: refused\r\n\r\n");
        self.raw = BytesMut::new();
        self.reading = Reading::Refused;
    }

    /// Throws away empty lines before a head (RFC 9112, 2.2): who sends one behind a body and then nothing is idle, and has
    /// begun no request. No more of them than a head may have bytes.
    fn skip_blank(&mut self) {
        while self.raw.starts_with(b"\r\n") && self.blank < self.limits.head.bytes {
            self.raw.advance(2);
            self.blank += 2;
            self.searched = 0;
        }
        if self.raw.is_empty() {
            self.head_since = None;
        }
    }

    /// Judges `raw` if it holds a whole head; says whether there is something to deliver now.
    fn judge_head(&mut self) -> bool {
        self.skip_blank();
        let limit = self.limits.head.bytes;
        let Some(length) = head::complete(&self.raw, self.searched) else {
            self.searched = self.raw.len();
            if self.raw.len() > limit {
                self.refuse(self.limits.head.too_large());
                return true;
            }
            return false;
        };
        let checked = if length > limit {
            Err(self.limits.head.too_large())
        } else {
            self.raw.get(..length).map_or_else(
                || Err(Error::new(Fault::Internal, "a head longer than what was read")),
                |head| head::check(head, &self.limits.head),
            )
        };
        match checked {
            Ok(framing) => {
                self.ready = self.raw.split_to(length).freeze();
                self.begin(match framing {
                    Framing::Length(0) => Reading::Head,
                    Framing::Length(bytes) => Reading::Body(bytes),
                    Framing::Chunked => Reading::Chunked(Chunks::default()),
                });
                self.head_since = (!self.raw.is_empty()).then(Instant::now);
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
        let piece = self.ready.get(..room).unwrap_or_default();
        out.put_slice(piece);
        if let Reading::Frames(mut frames) = self.reading {
            frames.take(piece);
            self.reading = Reading::Frames(frames);
            self.h2.note(frames);
        }
        self.ready.advance(room);
        if self.ready.is_empty() {
            // Gives the memory back while a long answer is under way.
            self.ready = Bytes::new();
        }
    }
}

/// What follows `bytes`, if they are one whole good head, and behind it nothing but its body.
fn whole(bytes: &[u8], limits: &HeadLimits) -> Option<Reading> {
    // An empty line is counted on the long way.
    if bytes.first() == Some(&b'\r') {
        return None;
    }
    let length = head::complete(bytes, 0).filter(|length| *length <= limits.bytes)?;
    let rest = (bytes.len() - length) as u64;
    match head::check(bytes.get(..length)?, limits).ok()? {
        Framing::Length(body) if body == rest => Some(Reading::Head),
        Framing::Length(body) => body.checked_sub(rest).map(Reading::Body),
        Framing::Chunked => (rest == 0).then(|| Reading::Chunked(Chunks::default())),
    }
}

pub(super) fn late_head() -> Error {
    Error::new(Fault::RequestTimeout, "the request head was not complete in time (timeouts.header)")
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
                Reading::Frames(frames) => return this.poll_frames(cx, out, frames),
                // The refusal's answer ends the connection; end of file here would end it before.
                Reading::Refused => return Poll::Pending,
                Reading::Head if this.raw.is_empty() => match ready!(this.poll_head(cx, out))? {
                    Filled::Bytes if this.raw.is_empty() => return Poll::Ready(Ok(())),
                    Filled::End => return Poll::Ready(Ok(())),
                    Filled::Bytes | Filled::Refused => continue,
                },
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

impl ClientIo {
    /// The socket takes nothing: `pending` unless that has lasted too long.
    fn poll_stuck<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        self.is_writing = true;
        self.shared.is_stuck();
        ready!(self.stall.poll(cx, &self.clock, self.limits.stall_timeout, || self.stream.unsent()));
        self.shared.stall();
        self.stream.reset_at_close();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client reads nothing (timeouts.client_stall)")))
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        pass_by(Place::Connection);
        let this = self.get_mut();
        this.shared.is_tried();
        let Poll::Ready(written) = this.stream.poll_write(cx, bytes) else { return this.poll_stuck(cx) };
        this.stall.reset();
        this.shared.is_taken_from();
        this.is_writing = true;
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Poll::Ready(flushed) = this.stream.poll_flush(cx) else { return this.poll_stuck(cx) };
        flushed?;
        this.stall.reset();
        this.shared.is_taken_from();
        this.shared.flushed();
        if std::mem::take(&mut this.is_writing) && this.is_of_a_request() {
            this.active_at = Instant::now();
            this.resume_timer(cx, this.active_at);
        } else if this.is_timer_due {
            this.resume_timer(cx, Instant::now());
        }
        Poll::Ready(Ok(()))
    }

    /// Says that nothing more comes, then reads on for a moment: closing a socket with unread bytes resets it, and the
    /// reset would overtake the answer.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.linger.is_none() {
            let Poll::Ready(shut) = this.stream.poll_shutdown(cx) else { return this.poll_stuck(cx) };
            shut?;
            this.linger = Some((0, this.clock.sleep(LINGER)));
        }
        let mut piece = [std::mem::MaybeUninit::uninit(); 4096];
        while let Some((thrown_away, timer)) = &mut this.linger {
            let mut buf = ReadBuf::uninit(&mut piece);
            if Pin::new(timer).poll(cx).is_ready() || *thrown_away > LINGER_BYTES_MAX {
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
