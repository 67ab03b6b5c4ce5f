//! The body of an answer, and the connection it arrives on.

use std::any::Any;
use std::error::Error as _;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use evergate_core::{Error, Fault};
use http_body::Body;
use hyper::body::Incoming;

use crate::client::{Connection, Pool, drive};

/// Bytes that one turn of a task takes of an answer that comes faster than it is handled. The runtime looks at its timers
/// and sockets only every so many turns, and what is taken here is also split, scanned and copied in the same turn.
const TURN_BYTES_MAX: usize = 64 * 1024;

/// An answer's body. Read to its end, the connection goes back to the pool; dropped earlier, it is closed.
pub struct AnswerBody {
    body: Incoming,
    connection: Option<Connection>,
    pool: Arc<Pool>,
    /// Taken since it last had nothing, or let others have their turn.
    turn_bytes: usize,
    /// Behind the connection, so that it goes after it.
    held: Option<Box<dyn Any + Send>>,
}

impl std::fmt::Debug for AnswerBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AnswerBody").field("body", &self.body).finish_non_exhaustive()
    }
}

impl AnswerBody {
    pub(crate) fn new(body: Incoming, connection: Connection, pool: Arc<Pool>) -> Self {
        Self { body, connection: Some(connection), pool, turn_bytes: 0, held: None }
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
        loop {
            let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
            let Connection { driver, filter, .. } = connection;
            let body = &mut self.body;
            let frame = filter.poll(cx, |cx| {
                // The body is asked first, because its wish for data is what makes the connection read.
                if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
                    return Poll::Ready(frame);
                }
                drive(driver, cx);
                Pin::new(&mut *body).poll_frame(cx)
            });
            let Poll::Ready(frame) = frame else {
                self.turn_bytes = 0;
                return Poll::Pending;
            };
            match frame {
                Some(Ok(frame)) => {
                    // Trailers carry nothing that a client was promised.
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        self.turn_bytes += data.len();
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Some(Err(error)) => {
                    self.connection = None;
                    self.held = None;
                    return Poll::Ready(Some(Err(cut(self.pool.name(), &error))));
                }
                None => {
                    self.give_back(cx);
                    return Poll::Ready(None);
                }
            }
        }
    }

    /// The next bytes, as a future; cancel-safe, since nothing is taken before it is ready.
    ///
    /// # Errors
    /// As `poll_data`.
    pub async fn data(&mut self) -> Option<Result<Bytes, Error>> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    fn give_back(&mut self, cx: &mut Context<'_>) {
        if let Some(mut connection) = self.connection.take() {
            let Connection { driver, filter, .. } = &mut connection;
            // Lets the connection notice that the body is done, and whether it may be kept.
            let _ = filter.poll(cx, |cx| {
                drive(driver, cx);
                Poll::<()>::Pending
            });
            self.pool.give(connection);
            self.held = None;
        }
    }
}

/// The error of an answer that does not end as its framing has promised.
fn cut(name: &str, error: &hyper::Error) -> Error {
    let why = error.source().and_then(|why| why.downcast_ref::<io::Error>());
    let is_broken =
        why.is_some_and(|why| matches!(why.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData));
    let what = if is_broken { "sent an answer whose framing is broken" } else { "broke off its answer" };
    // The library names the cause of its error only when it is asked.
    let cause = why.map(|why| format!(": {why}")).unwrap_or_default();
    let message = format!("the upstream \"{name}\" {what}");
    Error::new(Fault::UpstreamDisconnected, message).detail(format_args!("{error}{cause}"))
}
