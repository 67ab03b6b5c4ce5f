//! The body of an answer, and the connection it arrives on.

use std::any::Any;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use evergate_core::Error;

use crate::client::Pool;
use crate::h1::Connection;

/// Bytes that one turn of a task takes of an answer that comes faster than it is handled. The runtime looks at its timers
/// and sockets only every so many turns, and what is taken here is also split, scanned and copied in the same turn.
const TURN_BYTES_MAX: usize = 64 * 1024;

/// An answer's body. Read to its end, the connection goes back to the pool; dropped earlier, it is closed.
pub struct AnswerBody {
    connection: Option<Box<Connection>>,
    pool: Arc<Pool>,
    /// Taken since it last had nothing, or let others have their turn.
    turn_bytes: usize,
    /// Behind the connection, so that it goes after it.
    held: Option<Box<dyn Any + Send>>,
}

impl std::fmt::Debug for AnswerBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AnswerBody").field("connection", &self.connection).finish_non_exhaustive()
    }
}

impl AnswerBody {
    pub(crate) fn new(connection: Box<Connection>, pool: Arc<Pool>) -> Self {
        Self { connection: Some(connection), pool, turn_bytes: 0, held: None }
    }

    /// Keeps something until the call is over: until the answer has been read to its end, or this is dropped.
    pub fn hold(&mut self, held: Box<dyn Any + Send>) {
        self.held = Some(held);
    }

    /// The next bytes; `None` at the end that the framing promised. Also pending, with the task woken again, when the turn
    /// has had enough.
    ///
    /// # Errors
    /// `upstream_disconnected` when the connection ends or breaks its framing before that.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        if self.turn_bytes >= TURN_BYTES_MAX {
            self.turn_bytes = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        Poll::Ready(match connection.poll_body(cx) {
            Poll::Pending => {
                self.turn_bytes = 0;
                return Poll::Pending;
            }
            Poll::Ready(Ok(Some(data))) => {
                self.turn_bytes += data.len();
                Some(Ok(data))
            }
            Poll::Ready(Ok(None)) => {
                self.pool.give(self.connection.take());
                self.held = None;
                None
            }
            Poll::Ready(Err(broken)) => {
                self.connection = None;
                self.held = None;
                Some(Err(self.pool.cut(&broken)))
            }
        })
    }

    /// The next bytes, as a future; cancel-safe, since nothing is taken before it is ready.
    ///
    /// # Errors
    /// As `poll_data`.
    pub async fn data(&mut self) -> Option<Result<Bytes, Error>> {
        poll_fn(|cx| self.poll_data(cx)).await
    }
}
