//! The server of an HTTP/1 connection (RFC 9112): one request after the other, each answered before the next is looked at.
//!
//! Own code and no library's, because of what a request touches on its way through one (docs/decisions/0026). The handler
//! runs in the connection's own task: what it waits for wakes the connection.
//!
//! Holds INV-FRAME-1 (ARCHITECTURE.md).

mod answer;
mod asking;
mod incoming;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use evergate_core::chunked::Chunks;
use http::{Request, Response};
use http_body::Body;
use hyper::service::Service;

use self::answer::{Coding, Out};
use self::asking::{Asked, Came};
pub use self::incoming::{Cut, H1Body, Inbox};
use super::client_io::{ClientIo, Filled};
use crate::http::incoming::Incoming;

/// Steps until others have their turn: who sends many requests at once, or makes an answer without end, has them between.
const STEPS_MAX: usize = 64;
/// Reads of one step that bring nothing for the one who waits.
const READS_MAX: usize = 4;
/// While one request is answered what is behind it is read, to see the end of a client that leaves, until so many bytes are here.
const AHEAD_BYTES: usize = 4 * 1024;
/// Bytes of a body that are read at once: the first ones, and at most, when each read brings as much as was asked for.
const BODY_PIECE_BYTES: usize = 8 * 1024;
const BODY_PIECE_BYTES_MAX: usize = 64 * 1024;

const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What the client sends next.
#[derive(Debug)]
enum Reading {
    Head,
    /// So many bytes of the body at hand.
    Body(u64),
    Chunked(Chunks),
    /// Nobody knows: nothing more is read as HTTP.
    Lost,
}

/// Whose turn it is.
#[derive(Debug)]
enum Turn<F, B> {
    /// The client's.
    Idle,
    /// The handler's.
    Serving(F),
    /// The answer's body's.
    Answering(B, Coding),
    /// Nobody's any more: the last answer has been made.
    Over,
}

/// What a step comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goes {
    On,
    /// The connection is over.
    Ended,
}

/// A connection, which ends with its future. What it still holds of a request is dropped with it, also when the client leaves.
pub struct Connection<S: Service<Request<Incoming>>, B> {
    // The requests end before the connection does.
    turn: Turn<S::Future, B>,
    service: S,
    asked: Asked,
    /// Takes the body of the request at hand, as long as more of it comes.
    inbox: Option<Inbox>,
    reading: Reading,
    /// Most bytes of the next read of a body.
    piece_bytes: usize,
    /// So many bytes of a head that has begun hold no end.
    searched: usize,
    /// Bytes of empty lines thrown away before it.
    blank: usize,
    out: Out,
    io: ClientIo,
}

impl<S, B> Connection<S, B>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: Unpin,
    B: Body<Data = Bytes> + Unpin,
{
    /// Serves a client whose first bytes were none of HTTP/2.
    #[must_use]
    pub fn new(io: ClientIo, service: S) -> Self {
        Self {
            turn: Turn::Idle,
            service,
            asked: Asked::default(),
            inbox: None,
            reading: Reading::Head,
            piece_bytes: BODY_PIECE_BYTES,
            searched: 0,
            blank: 0,
            out: Out::default(),
            io,
        }
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Goes>> {
        // First of all: nothing is done any more for a client that has left.
        if matches!(self.turn, Turn::Serving(_) | Turn::Answering(..)) && self.has_left(cx)? {
            return Poll::Ready(Ok(Goes::Ended));
        }
        // Before all of it is gone nothing is made but more of the same answer: its body is where it is ended from outside.
        if self.out.is_due() && (self.out.is_full() || !matches!(self.turn, Turn::Answering(..))) {
            ready!(self.poll_send(cx))?;
        }
        match &mut self.turn {
            Turn::Idle => self.poll_idle(cx),
            Turn::Serving(serving) => match Pin::new(serving).poll(cx) {
                Poll::Ready(Ok(response)) => {
                    self.begin_answer(response, cx);
                    self.poll_answering(cx)
                }
                // Nobody is there to be answered.
                Poll::Ready(Err(_)) => Poll::Ready(Ok(Goes::Ended)),
                Poll::Pending => self.poll_body(cx),
            },
            Turn::Answering(..) => self.poll_answering(cx),
            Turn::Over => {
                ready!(self.io.poll_end(cx))?;
                Poll::Ready(Ok(Goes::Ended))
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.out.poll_send(&mut self.io, cx))?;
        if !matches!(self.turn, Turn::Answering(..)) {
            self.io.active_at = Instant::now();
        }
        Poll::Ready(Ok(()))
    }

    /// Awaits a request.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Goes>> {
        let request = match ready!(self.poll_head(cx))? {
            Came::Request(request) => *request,
            // As the handler sees it, a request with nothing in it.
            Came::Refused(refused) => {
                self.io.shared.refuse(refused);
                (self.asked, self.reading) = (Asked::default(), Reading::Lost);
                Request::new(Incoming::H1(H1Body::default()))
            }
            Came::Filled(Filled::End) => {
                self.turn = Turn::Over;
                return Poll::Ready(Ok(Goes::On));
            }
            Came::Filled(_) => return Poll::Ready(Ok(Goes::On)),
        };
        self.io.is_used = true;
        self.turn = Turn::Serving(self.service.call(request));
        Poll::Ready(Ok(Goes::On))
    }

    /// The handler waits: for more of the body, or for what is none of the client's business.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Goes>> {
        if !self.inbox.as_ref().is_some_and(Inbox::is_wanted) {
            return Poll::Pending;
        }
        if std::mem::take(&mut self.asked.expects_continue) {
            self.out.say(CONTINUE);
            return Poll::Ready(Ok(Goes::On));
        }
        for _ in 0..READS_MAX {
            let data = match self.take_data() {
                Ok(data) => data,
                Err(broken) => return self.cut(Cut::Broken(broken)),
            };
            let is_over = matches!(self.reading, Reading::Head);
            if data.is_some() || is_over {
                if let Some(inbox) = &self.inbox {
                    inbox.put(data, is_over);
                }
                return Poll::Ready(Ok(Goes::On));
            }
            match ready!(self.poll_more(cx)) {
                Ok(1..) => {}
                Ok(0) | Err(_) => return self.cut(Cut::Gone),
            }
        }
        again(cx)
    }

    /// The body does not come to its end, which its handler is told.
    fn cut(&mut self, why: Cut) -> Poll<io::Result<Goes>> {
        self.reading = Reading::Lost;
        if let Some(inbox) = self.inbox.take() {
            inbox.cut(why);
        }
        Poll::Ready(Ok(Goes::On))
    }

    /// Reads more of the body at hand.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let room = match self.reading {
            Reading::Body(left) => usize::try_from(left).unwrap_or(usize::MAX).min(self.piece_bytes),
            _ => self.piece_bytes,
        };
        let read = ready!(self.io.poll_raw(cx, room))?;
        if read == self.piece_bytes {
            self.piece_bytes = (2 * read).min(BODY_PIECE_BYTES_MAX);
        }
        Poll::Ready(Ok(read))
    }

    /// What of the bytes read belongs to the body at hand. When it is over, what is read next is a head.
    fn take_data(&mut self) -> Result<Option<Bytes>, evergate_core::Error> {
        let raw = &mut self.io.raw;
        if raw.is_empty() {
            return Ok(None);
        }
        let (data, is_over) = match &mut self.reading {
            Reading::Body(left) => {
                let here = usize::try_from(*left).unwrap_or(usize::MAX).min(raw.len());
                *left -= here as u64;
                (Some(raw.split_to(here).freeze()), *left == 0)
            }
            Reading::Chunked(chunks) => {
                let piece = raw.split().freeze();
                let (data, taken) = chunks.joined(&piece)?;
                raw.extend_from_slice(piece.get(taken..).unwrap_or_default());
                (data, chunks.is_done())
            }
            Reading::Head | Reading::Lost => return Ok(None),
        };
        if raw.is_empty() {
            // It would keep what was given out.
            *raw = BytesMut::new();
        }
        if is_over {
            (self.reading, self.piece_bytes) = (Reading::Head, BODY_PIECE_BYTES);
            self.io.head_since = (!raw.is_empty()).then(Instant::now);
        }
        Ok(data)
    }

    /// Throws away what has come of a body that nobody reads; says whether that was all of it.
    fn is_body_over(&mut self, cx: &mut Context<'_>) -> bool {
        self.inbox = None;
        for _ in 0..READS_MAX {
            if self.take_data().is_err() {
                self.reading = Reading::Lost;
            }
            match self.reading {
                Reading::Head => return true,
                Reading::Lost => return false,
                Reading::Body(_) | Reading::Chunked(_) => {}
            }
            if !matches!(self.poll_more(cx), Poll::Ready(Ok(1..))) {
                return false;
            }
        }
        false
    }

    fn begin_answer(&mut self, response: Response<B>, cx: &mut Context<'_>) {
        self.asked.is_kept &= self.is_body_over(cx);
        let (head, body) = response.into_parts();
        let coding = self.out.begin(&head, body.size_hint().exact(), &mut self.asked);
        self.turn = if coding == Coding::Nothing { self.behind() } else { Turn::Answering(body, coding) };
    }

    /// Whose turn it is behind the answer.
    fn behind(&self) -> Turn<S::Future, B> {
        if self.asked.is_kept { Turn::Idle } else { Turn::Over }
    }

    /// Takes what the body has, and writes it.
    fn poll_answering(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Goes>> {
        while let Turn::Answering(body, coding) = &mut self.turn {
            if self.out.is_full() {
                return Poll::Ready(Ok(Goes::On));
            }
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    let is_good = frame.into_data().is_ok_and(|data| self.out.push(data, coding));
                    if is_good && !body.is_end_stream() {
                        continue;
                    }
                    if !is_good {
                        return self.give_up();
                    }
                }
                Poll::Ready(None) => {}
                Poll::Ready(Some(Err(_))) => return self.give_up(),
                Poll::Pending => {
                    if self.out.is_due() {
                        ready!(self.poll_send(cx))?;
                    }
                    return Poll::Pending;
                }
            }
            if !self.out.end(*coding) {
                return self.give_up();
            }
            self.turn = self.behind();
        }
        // In the same turn, as its end was told to be on its way.
        ready!(self.poll_send(cx))?;
        Poll::Ready(Ok(Goes::On))
    }

    /// Cuts an answer that has no end, so that no client takes it for whole.
    fn give_up(&mut self) -> Poll<io::Result<Goes>> {
        self.io.stream.reset_at_close();
        Poll::Ready(Ok(Goes::Ended))
    }

    /// Whether the client has left while it has an answer to come; if not, its end wakes the connection. What it sends ahead
    /// is kept.
    fn has_left(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        if !matches!(self.reading, Reading::Head) {
            return Ok(false);
        }
        while self.io.raw.len() < AHEAD_BYTES {
            let read = self.io.poll_piece(cx, |io, bytes| {
                if !bytes.is_empty() {
                    io.keep(bytes);
                }
                bytes.is_empty()
            });
            match read? {
                Poll::Ready(true) => return Ok(true),
                Poll::Ready(false) => {}
                Poll::Pending => return Ok(false),
            }
        }
        Ok(false)
    }
}

impl<S, B> Future for Connection<S, B>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Unpin,
    S::Future: Unpin,
    B: Body<Data = Bytes> + Unpin,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        for _ in 0..STEPS_MAX {
            match ready!(this.poll_step(cx)) {
                Ok(Goes::On) => {}
                // An error is the connection's own: what was on it has its record.
                Ok(Goes::Ended) | Err(_) => return Poll::Ready(()),
            }
        }
        again(cx)
    }
}

/// Lets others have their turn.
fn again<T>(cx: &Context<'_>) -> Poll<T> {
    cx.waker().wake_by_ref();
    Poll::Pending
}

#[cfg(test)]
mod tests;
