//! One HTTP/1.1 exchange with a program, on a connection of its own: dropping it closes that, which is how a program hears
//! that nobody wants its answer any more.

use std::future::Future;
use std::pin::{Pin, pin};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use super::address::Stream;

/// An exchange under way.
pub(super) struct Exchange {
    /// None when it has done all it can.
    connection: Option<Connection>,
}

type Connection = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Exchange {
    /// Sends a request, and waits for the head of its answer.
    ///
    /// # Errors
    /// What hyper says; the program may have seen something of it.
    pub(super) async fn begin(
        stream: Stream,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<(Self, Response<Incoming>)> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let mut exchange = Self { connection: Some(Box::pin(connection)) };
        let response = exchange.drive(sender.send_request(request)).await?;
        Ok((exchange, response))
    }

    /// The next bytes of the answer; none at its end. Cancel-safe.
    ///
    /// # Errors
    /// What hyper says of an answer that breaks off.
    pub(super) async fn next(&mut self, body: &mut Incoming) -> hyper::Result<Option<Bytes>> {
        loop {
            match self.drive(body.frame()).await.transpose()? {
                Some(frame) => {
                    // Fields behind the body are of no use to anybody.
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
                None => return Ok(None),
            }
        }
    }

    /// Does a part of the exchange, which needs the connection's own work to get on.
    async fn drive<T>(&mut self, part: impl Future<Output = T>) -> T {
        let mut part = pin!(part);
        loop {
            let Some(connection) = &mut self.connection else { return part.await };
            tokio::select! {
                biased;
                // Both are kept: one is pinned here, the other in its box.
                done = &mut part => return done,
                // What went wrong with it, the part is told too.
                _ = connection => self.connection = None,
            }
        }
    }
}
