//! What nobody reads of a request's body, since its answer is there already.
//!
//! On HTTP/2 the library resets a stream behind an answer whose request has not come to its end (NO_ERROR; RFC 9113, 8.1), and
//! there are clients that throw the answer away at that, such as curl 7.88. So the answer's end waits a little while the
//! rest of the body is read and thrown away, as far as that is small. Of HTTP/1, the connection sees to it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use evergate_upstream::clock::{Clock, Sleep};
use http_body::Body as _;

use super::incoming::Incoming;
use crate::server::streams::Taken;

/// What is on its way of most bodies when the answer comes. Of a larger one the client has to stop sending anyway.
const BYTES_MAX: u64 = 64 * 1024;
/// A round trip and the writing of that.
const TIME: Duration = Duration::from_millis(100);

/// The rest of a body.
#[derive(Debug)]
pub struct Unread {
    body: Incoming,
    bytes_left: u64,
    end: Sleep,
}

/// Of an HTTP/2 stream, leaves the body to what writes the end of the answer; else it ends here.
pub fn leave(body: Incoming, clock: &Clock) {
    if body.is_end_stream() || body.size_hint().lower() > BYTES_MAX {
        return;
    }
    if let Some(taken) = Taken::current() {
        let end = clock.sleep_until(Instant::now() + TIME);
        taken.keep(Unread { body, bytes_left: BYTES_MAX, end });
    }
}

impl Unread {
    /// Reads to its end, or as far as is worth it.
    pub fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // What is there counts, however late somebody looks.
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                return Pin::new(&mut self.end).poll(cx).map(drop);
            };
            let Some(Ok(frame)) = frame else { return Poll::Ready(()) };
            let bytes = frame.data_ref().map_or(0, bytes::Bytes::len) as u64;
            match self.bytes_left.checked_sub(bytes) {
                Some(left) => self.bytes_left = left,
                None => return Poll::Ready(()),
            }
        }
    }
}
