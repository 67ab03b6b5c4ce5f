//! The limits of an HTTP/2 connection: of heads, of idling, of a client that does not acknowledge its end.

use std::io;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::ReadBuf;

use super::client_io::{ClientIo, late_head};
use super::frames::{Frames, SHUTDOWN_ACK};
use super::shared::{Leaving, Refused};

/// What is known of an HTTP/2 connection.
#[derive(Debug, Default)]
pub(super) struct Http2 {
    /// The shutdown was acknowledged in the client's place: see `frames`.
    is_acknowledged: bool,
    /// Whether there was a request since the last answer's end.
    was_active: bool,
    /// The frame or header block that is under way, and since when it is.
    begun: Option<(u32, Instant)>,
}

impl Http2 {
    /// Takes over where in the client's frames the reader is now.
    pub(super) fn note(&mut self, frames: Frames) {
        let number = frames.ended();
        if frames.is_between() {
            self.begun = None;
        } else if self.begun.is_none_or(|(begun, _)| begun != number) {
            self.begun = Some((number, Instant::now()));
        }
    }
}

/// What comes when a limit is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Then {
    /// A frame or a header block was not complete in time: the connection ends.
    End,
    /// It has idled: it ends in order.
    Idle,
    /// The client has not acknowledged that it ends.
    Acknowledge,
}

impl ClientIo {
    /// Reads for the HTTP/2 library, under the limits of heads and of idling, and answers its PING when the client does not
    /// in time.
    pub(super) fn poll_frames(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        if let Poll::Ready(read) = self.stream.poll_read(cx, out) {
            self.follow(out.filled().get(before..).unwrap_or_default());
            return Poll::Ready(read);
        }
        let frames = self.frames;
        self.h2.was_active |= self.is_active();
        if !self.is_active() && self.shared.is_shed(self.active_at) {
            self.shared.send_elsewhere();
        }
        match ready!(self.poll_frames_due(cx, frames)) {
            // To the library that is the end of what the client sends.
            Then::End => {
                if let Some((_, since)) = self.h2.begun.filter(|_| frames.is_in_request_head()) {
                    self.shared.refuse(Refused::of(late_head(), &[], since));
                }
                Poll::Ready(Ok(()))
            }
            Then::Idle => {
                self.shared.send_elsewhere();
                Poll::Pending
            }
            Then::Acknowledge if out.remaining() < SHUTDOWN_ACK.len() => Poll::Pending,
            Then::Acknowledge => {
                self.h2.is_acknowledged = true;
                out.put_slice(&SHUTDOWN_ACK);
                Poll::Ready(Ok(()))
            }
        }
    }

    /// Waits for the first limit that is over.
    fn poll_frames_due(&mut self, cx: &mut Context<'_>, frames: Frames) -> Poll<Then> {
        loop {
            let Some((due, then)) = self.frames_due(frames) else { return Poll::Pending };
            let timer = match &mut self.timer {
                Some(timer) if timer.deadline() <= due => timer,
                slot => slot.insert(self.clock.sleep_until(due)),
            };
            ready!(std::pin::Pin::new(timer).poll(cx));
            self.timer = None;
            if Instant::now() < due {
                continue;
            }
            let now = Instant::now();
            match then {
                // The rest of a request's body has limits of its own; when they have ended the request, this one is left.
                Then::End if frames.is_in_data() && self.is_active() => self.h2.begun = Some((frames.ended(), now)),
                // A stream that ends without a word, as by the client's reset, is seen here only.
                Then::Idle if self.is_active() || self.is_writing || std::mem::take(&mut self.h2.was_active) => {
                    self.active_at = now;
                }
                then => return Poll::Ready(then),
            }
        }
    }

    /// The limit that is over first; none runs while it only awaits the end of its streams.
    fn frames_due(&self, frames: Frames) -> Option<(Instant, Then)> {
        let end = self.h2.begun.map(|(_, since)| (since + self.limits.header_timeout, Then::End));
        let other = match self.shared.leaving() {
            None => Some((self.active_at + self.limits.idle_timeout, Then::Idle)),
            Some(Leaving { since, linger, .. }) if !self.h2.is_acknowledged && frames.is_between() => {
                Some((since + linger, Then::Acknowledge))
            }
            // In half a frame nothing can be said in the client's place; its rest wakes this up.
            Some(_) => None,
        };
        end.into_iter().chain(other).min()
    }

    fn is_active(&self) -> bool {
        self.shared.active.load(Ordering::Relaxed) > 0
    }

    /// Whether what has just been written can be an answer: there is also talk about the connection, which does not keep it.
    pub(super) fn is_of_a_request(&mut self) -> bool {
        self.is_active() || std::mem::take(&mut self.h2.was_active)
    }

    /// Follows bytes that go to the library.
    pub(super) fn follow(&mut self, bytes: &[u8]) {
        self.frames.take(bytes);
        self.h2.note(self.frames);
    }
}
