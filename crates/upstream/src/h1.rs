//! One HTTP/1.1 connection to an upstream (RFC 9112): one request at a time, polled by whoever holds it.
//!
//! Own code and no library's, because of what a library has to do in between: a channel from the one who asks to the one
//! who drives, and back, and buffers for each connection (docs/decisions/0024).

mod head;
mod outgoing;

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use evergate_core::chunked::Chunks;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::task::coop::has_budget_remaining;

pub use self::head::Kind;
use self::head::{FIELDS_MAX, HEAD_BYTES_MAX};
pub(crate) use self::head::{Framing, Head};
pub use self::outgoing::Fields;
pub(crate) use self::outgoing::Outgoing;
use crate::io::UpstreamIo;
use crate::stall::Stalled;

/// Bytes of one read. On the stack, so that a connection that waits has no buffer.
const PIECE_BYTES: usize = 16 * 1024;

/// Reads of one turn that bring nothing for the one who asks: who sends framing without end costs no more than that.
const READS_MAX: usize = 4;

/// Why a connection is of no more use.
#[derive(Debug)]
pub(crate) enum Broken {
    /// It failed.
    Io(io::Error),
    /// It ended before the answer did.
    Ended,
    /// What came breaks the rules of HTTP; says which.
    NotHttp(String),
    /// The head is.
    TooLarge,
    /// The answer's end is said in more than one way.
    FramedTwice,
}

impl Broken {
    /// Whether it was ended because the upstream reads nothing.
    pub(crate) fn is_stall(&self) -> bool {
        matches!(self, Self::Io(error) if Stalled::is_cause(error))
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "{error}"),
            Self::Ended => f.write_str("the connection was closed"),
            Self::NotHttp(what) => f.write_str(what),
            Self::TooLarge => write!(f, "more than {HEAD_BYTES_MAX} bytes or {FIELDS_MAX} fields"),
            Self::FramedTwice => f.write_str("the answer is framed in more than one way"),
        }
    }
}

/// What of an answer's body is still to come.
#[derive(Debug)]
enum Rest {
    Length(u64),
    Chunked(Chunks),
    /// It ends with the connection.
    Close,
}

/// An open connection.
pub(crate) struct Connection {
    io: UpstreamIo,
    /// The beginning of a head.
    begun: Vec<u8>,
    /// So many bytes of it hold no end.
    searched: usize,
    /// Read behind a head, and not given out.
    input: Bytes,
    rest: Rest,
    /// What is left of the request while its answer comes already.
    unsent: Option<Box<Outgoing>>,
    /// Whether another request may follow.
    is_kept: bool,
    /// Whether a write has failed: the end that is read then may be none.
    is_reset: bool,
}

// What it has read may repeat what it was sent.
impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("io", &self.io).field("rest", &self.rest).finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(io: UpstreamIo) -> Self {
        let (begun, input) = (Vec::new(), Bytes::new());
        Self { io, begun, searched: 0, input, rest: Rest::Length(0), unsent: None, is_kept: true, is_reset: false }
    }

    /// Whether a request can be sent now: nothing may come, not even the end, before something was asked.
    pub(crate) fn is_usable(&mut self, cx: &mut Context<'_>) -> bool {
        self.is_kept && read(&mut self.io, cx, |_| ()).is_pending()
    }

    /// Sends the request and waits for the head of its answer, whichever is first: an upstream may refuse what it has not
    /// read. Interim answers (RFC 9110, 15.2) are passed over.
    pub(crate) fn poll_head(&mut self, out: &mut Outgoing, cx: &mut Context<'_>) -> Poll<Result<Head, Broken>> {
        if !out.has_begun() {
            // Without its turn the socket would seem silent, whatever lies there.
            if !has_budget_remaining() {
                return again(cx);
            }
            if !self.is_usable(cx) {
                return Poll::Ready(Err(Broken::Ended));
            }
        }
        let failed = match out.poll_send(&mut self.io, cx) {
            // What it has answered before it ended the connection can still be read.
            Poll::Ready(Err(error)) if !Stalled::is_cause(&error) && out.has_begun() => Some(error),
            Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::Io(error))),
            Poll::Ready(Ok(())) | Poll::Pending => None,
        };
        for _ in 0..READS_MAX {
            let Self { io, begun, searched, input, .. } = self;
            let polled = read(io, cx, |piece| {
                if piece.is_empty() {
                    return Err(Broken::Ended);
                }
                head::take(piece, begun, searched, input)
            });
            let read = match (polled, &failed) {
                // After a failed write, too: the runtime may not have heard of what lies there yet, and it will.
                (Poll::Pending, _) => return Poll::Pending,
                (Poll::Ready(Ok(read)), _) => read,
                (Poll::Ready(Err(error)), None) => Err(Broken::Io(error)),
                (Poll::Ready(Err(_)), Some(error)) => Err(Broken::Io(io::Error::new(error.kind(), error.to_string()))),
            };
            match read {
                Ok(Some(head)) => {
                    self.begin(&head, failed.is_none());
                    return Poll::Ready(Ok(head));
                }
                Ok(None) => {}
                Err(broken) => return Poll::Ready(Err(broken)),
            }
        }
        again(cx)
    }

    fn begin(&mut self, head: &Head, is_whole: bool) {
        self.is_kept = head.is_kept && is_whole;
        self.is_reset = !is_whole;
        self.rest = match head.framing {
            Framing::Length(bytes) => Rest::Length(bytes),
            Framing::Chunked => Rest::Chunked(Chunks::default()),
            Framing::Close => {
                self.is_kept = false;
                Rest::Close
            }
        };
    }

    /// The answer has begun: what is left of its request goes out while it is read.
    pub(crate) fn go_on_sending(&mut self, out: Box<Outgoing>) {
        self.unsent = (!out.is_sent()).then_some(out);
    }

    /// The next bytes of the answer's body, never none; `None` at its end.
    pub(crate) fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        self.poll_unsent(cx);
        for _ in 0..READS_MAX {
            if let Some(data) = self.next_data()? {
                return Poll::Ready(Ok(Some(data)));
            }
            if self.is_over() {
                // More than was promised, or a request that was not wanted whole: nobody knows what comes next.
                self.is_kept &= self.input.is_empty() && self.unsent.is_none();
                return Poll::Ready(Ok(None));
            }
            match ready!(read(&mut self.io, cx, Bytes::copy_from_slice)) {
                Ok(piece) if piece.is_empty() => {
                    // A write that failed has taken the reset that a read would have told.
                    if !matches!(self.rest, Rest::Close) || self.is_reset {
                        return Poll::Ready(Err(Broken::Ended));
                    }
                    self.rest = Rest::Length(0);
                }
                Ok(piece) => self.input = piece,
                Err(error) => return Poll::Ready(Err(Broken::Io(error))),
            }
        }
        again(cx)
    }

    /// A failure is no reason to lose the answer.
    fn poll_unsent(&mut self, cx: &mut Context<'_>) {
        let Some(out) = &mut self.unsent else { return };
        if let Poll::Ready(sent) = out.poll_send(&mut self.io, cx) {
            self.is_kept &= sent.is_ok();
            self.is_reset |= sent.is_err();
            self.unsent = None;
        }
    }

    fn is_over(&self) -> bool {
        match &self.rest {
            Rest::Length(left) => *left == 0,
            Rest::Chunked(chunks) => chunks.is_done(),
            Rest::Close => false,
        }
    }

    /// Whether it can take another request: its answer has been read to the end, and no word of either side is against it.
    pub(crate) fn is_reusable(&self) -> bool {
        self.is_kept && self.is_over()
    }

    /// What of the bytes read belongs to the body.
    fn next_data(&mut self) -> Result<Option<Bytes>, Broken> {
        if self.input.is_empty() {
            return Ok(None);
        }
        match &mut self.rest {
            Rest::Close => Ok(Some(std::mem::take(&mut self.input))),
            Rest::Length(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(self.input.len());
                *left -= here as u64;
                let data = self.input.split_to(here);
                Ok((!data.is_empty()).then_some(data))
            }
            Rest::Chunked(chunks) => {
                let joined = chunks.joined(&self.input);
                let (data, taken) = joined.map_err(|error| Broken::NotHttp(error.message.into_owned()))?;
                self.input = self.input.split_off(taken);
                Ok(data)
            }
        }
    }
}

/// Lets others have their turn.
fn again<T>(cx: &Context<'_>) -> Poll<T> {
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// Reads once; none at the end.
fn read<T>(io: &mut UpstreamIo, cx: &mut Context<'_>, take: impl FnOnce(&[u8]) -> T) -> Poll<io::Result<T>> {
    let mut piece = [MaybeUninit::uninit(); PIECE_BYTES];
    let mut buf = ReadBuf::uninit(&mut piece);
    ready!(Pin::new(io).poll_read(cx, &mut buf))?;
    Poll::Ready(Ok(take(buf.filled())))
}

#[cfg(test)]
mod tests;
