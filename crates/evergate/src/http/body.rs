//! Bodies of answers. Each holds what must live until the last byte: the request's pass and the count of active
//! requests on its connection.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_board::InflightPhase;
use evergate_core::{Error, Fault};
use evergate_upstream::clock::{Clock, Sleep};
use http_body::{Frame, SizeHint};

use super::fault::{Bomb, Moment, Planted, is_stuck, strike};
use super::left::{Left, take_over};
use super::relay::Relay;
use crate::context::{Token, cancelled};
use crate::gate::pass::Pass;
use crate::panics;
use crate::server::shared::Shared;
use crate::server::streams::Taken;
use crate::tasks::caught;
use crate::telemetry::names;

/// What the HTTP/2 library gets of a whole body at once, the least that is the largest frame everywhere (RFC 9113, 4.2):
/// what it holds is lost to memory until the client opens its window.
const H2_PIECE_BYTES: usize = 16 * 1024;

/// Counts a request as active on its connection for as long as it lives.
#[derive(Debug)]
pub struct Active(Arc<Shared>);

impl Active {
    /// One request more.
    #[must_use]
    pub fn new(shared: &Arc<Shared>) -> Self {
        shared.active.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(shared))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What an answer holds until its last byte has gone.
#[derive(Debug)]
pub(super) struct End {
    pass: Option<Pass>,
    active: Active,
}

impl End {
    /// The end of the answer is about to be written.
    pub(super) fn finish(self) {
        if let Some(pass) = self.pass {
            self.active.0.finish(pass);
        }
    }
}

/// The body of an answer.
#[derive(Debug)]
pub struct Body {
    content: Content,
    pass: Option<Pass>,
    active: Option<Active>,
    /// Of an HTTP/2 stream.
    taken: Option<Arc<Taken>>,
}

#[derive(Debug)]
enum Content {
    Whole(Bytes),
    Stream(Box<Stream>),
    Done,
}

/// A stream under way.
#[derive(Debug)]
pub struct Stream {
    /// Where events come from.
    pub relay: Relay,
    /// Events that came before the head was sent.
    pub first: Option<Bytes>,
    /// Ends it from outside.
    pub token: Arc<Token>,
    /// Silence after which a comment is sent.
    pub keepalive: Duration,
    /// A fault to plant.
    pub planted: Option<Planted>,
    /// Another.
    pub bomb: Bomb,
    /// Sends comments; armed at the first silence.
    pub pinger: Option<Sleep>,
    /// Times the silence.
    pub clock: Clock,
    /// When the last piece was written.
    pub written_at: Instant,
    /// How it goes on without its client; none for a model whose calls are stopped then.
    pub left: Option<Left>,
}

impl Body {
    /// A body in one piece.
    #[must_use]
    pub fn whole(bytes: Bytes) -> Self {
        Self { content: Content::Whole(bytes), pass: None, active: None, taken: None }
    }

    /// A stream.
    #[must_use]
    pub fn stream(stream: Stream) -> Self {
        Self { content: Content::Stream(Box::new(stream)), pass: None, active: None, taken: None }
    }

    /// Bytes of a whole body.
    #[must_use]
    pub fn len(&self) -> usize {
        if let Content::Whole(bytes) = &self.content { bytes.len() } else { 0 }
    }

    /// Whether it is known to be empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self.content, Content::Done) || (!matches!(self.content, Content::Stream(_)) && self.len() == 0)
    }

    /// Gives the body what has to live as long as it does.
    pub fn hold(&mut self, pass: Option<Pass>, active: Active) {
        self.pass = pass;
        self.active = Some(active);
        self.taken = Taken::current();
        if let (Some(taken), Some(pass)) = (&self.taken, &self.pass) {
            taken.set_token(pass.token());
        }
    }

    /// The stream under way, if this is one: what is left has no content.
    pub(super) fn take_stream(&mut self) -> Option<Box<Stream>> {
        match std::mem::replace(&mut self.content, Content::Done) {
            Content::Stream(stream) => Some(stream),
            whole => {
                self.content = whole;
                None
            }
        }
    }

    /// The last byte was taken: the pass waits for the flush. On HTTP/2 it may wait for the client's window first, and goes
    /// with the frame behind it: see [`Body::take_end`].
    fn finish(&mut self) {
        self.drop_content();
        if self.taken.is_some() {
            self.pass.iter().for_each(|pass| pass.enter(InflightPhase::Stream));
        } else if let (Some(pass), Some(active)) = (self.pass.take(), &self.active) {
            active.0.finish(pass);
        }
    }

    /// What there is to say of the library's pieces of it; of an HTTP/2 stream's answer.
    pub(super) fn taken(&self) -> Option<Arc<Taken>> {
        self.taken.clone()
    }

    /// What has lived until the last byte has gone; of an HTTP/2 stream's answer, after its content.
    pub(super) fn take_end(&mut self) -> Option<End> {
        self.active.take().map(|active| End { pass: self.pass.take(), active })
    }

    /// A panic in it would end the connection, and with it the other requests on it.
    fn drop_content(&mut self) {
        if let Content::Stream(stream) = std::mem::replace(&mut self.content, Content::Done) {
            caught(|| drop(stream));
        }
    }

    fn poll_stream(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Content::Stream(stream) = &mut self.content else { return Poll::Ready(None) };
        let pass = &mut self.pass;
        if let Some(pass) = pass {
            pass.run();
        }
        // Unwind safety: after a panic the stream is dropped, never polled again.
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| stream.poll(cx, pass.as_mut())));
        if let Some(pass) = pass {
            pass.rest();
        }
        let piece = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(piece)) => piece,
            Err(_) => {
                Some(Err(Error::new(Fault::Internal, "an internal error ended the stream").detail(panics::last())))
            }
        };
        match piece {
            Some(Ok(bytes)) => Poll::Ready(Some(self.count(bytes))),
            Some(Err(error)) => {
                let event = Bytes::from(error.event());
                if let Some(pass) = &mut self.pass {
                    pass.set_error(200, &error);
                }
                let event = self.count(event);
                // Dropping the relay closes the upstream; the event is the last piece.
                self.finish();
                Poll::Ready(Some(event))
            }
            None => {
                if let Some(pass) = &mut self.pass {
                    pass.set_end(200, names::End::Ok);
                }
                self.finish();
                Poll::Ready(None)
            }
        }
    }

    /// The next piece of the content.
    pub(super) fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        match &mut self.content {
            Content::Done => Poll::Ready(None),
            Content::Whole(bytes) if self.taken.is_some() && bytes.len() > H2_PIECE_BYTES => {
                Poll::Ready(Some(bytes.split_to(H2_PIECE_BYTES)))
            }
            Content::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                self.finish();
                Poll::Ready((!bytes.is_empty()).then_some(bytes))
            }
            Content::Stream(_) => self.poll_stream(cx),
        }
    }

    fn count(&mut self, bytes: Bytes) -> Bytes {
        if let Some(pass) = &mut self.pass {
            pass.record.bytes_out += bytes.len() as u64;
        }
        bytes
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let is_stalled = self.active.as_ref().is_some_and(|active| active.0.is_stalled())
            || self.taken.as_ref().is_some_and(|taken| taken.is_stalled());
        if let Some(pass) = self.pass.as_ref().filter(|_| is_stalled) {
            pass.stall();
        }
        if matches!(&self.content, Content::Stream(stream) if stream.left.is_some())
            && let Some(stream) = self.take_stream()
        {
            let (stream, pass) = take_over(stream, self.pass.take());
            self.pass = pass;
            self.content = stream.map_or(Content::Done, Content::Stream);
        }
        self.drop_content();
    }
}

impl Stream {
    fn poll(&mut self, cx: &mut Context<'_>, mut pass: Option<&mut Pass>) -> Poll<Option<Result<Bytes, Error>>> {
        if self.first.is_none() && is_stuck(self.planted) {
            return Poll::Pending;
        }
        if let Some(cause) = self.token.check(cx) {
            return Poll::Ready(Some(Err(cancelled(cause))));
        }
        if let Some(first) = self.first.take() {
            self.written_at = Instant::now();
            if let Some(pass) = &mut pass {
                pass.enter(InflightPhase::Stream);
            }
            return Poll::Ready(Some(Ok(first)));
        }
        strike(self.planted, Moment::Stream);
        if let Poll::Ready(piece) = self.relay.poll_next(cx) {
            self.written_at = Instant::now();
            if let Some(pass) = pass {
                if self.relay.has_begun() {
                    pass.note_first_token();
                }
                pass.record.usage = self.relay.usage().or(pass.record.usage);
            }
            return Poll::Ready(piece);
        }
        self.poll_keepalive(cx)
    }

    /// A comment when nothing was written for a while, so that proxies and clients do not take silence for death.
    fn poll_keepalive(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            let due = self.written_at + self.keepalive;
            let pinger = self.pinger.get_or_insert_with(|| self.clock.sleep_until(due));
            if Pin::new(pinger).poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.pinger = None;
            let now = Instant::now();
            if now >= due {
                self.written_at = now;
                return Poll::Ready(Some(Ok(Bytes::from_static(b": keepalive\n\n"))));
            }
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.get_mut().poll_content(cx).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        // Never true while a pass is held: who writes it must ask for the end, which is when the pass is handed on.
        matches!(self.content, Content::Done)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Done => SizeHint::with_exact(0),
            Content::Stream(_) => SizeHint::default(),
        }
    }
}
