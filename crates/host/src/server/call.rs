//! One request at a program with a server of its own, from its first byte to the answer's last.

use std::future::pending;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use evergate_core::{Error, Fault};
use http::header::{
    ACCEPT, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, HeaderValue, RETRY_AFTER, TRANSFER_ENCODING,
};
use http::{HeaderMap, Method, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use serde::de::IgnoredAny;
use tokio::sync::mpsc;
use tokio::time::{sleep, sleep_until};

use super::events::Whole;
use super::exchange::Exchange;
use super::running::Running;
use crate::ask::Answer;

/// Fields of an answer that mean something to a client.
const PASSED: [HeaderName; 2] = [CONTENT_TYPE, RETRY_AFTER];

/// What a stream that is whole ends with, blank lines aside.
const DONE: &[u8] = b"[DONE]";

/// What bounds a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) deadline: Option<Instant>,
    /// Silence after which the program's health is looked at out of turn.
    pub(super) doubt_after: Duration,
    pub(super) answer_bytes_max: u64,
}

/// A request that the program may have seen something of.
pub(super) struct Call {
    running: Running,
    bounds: Bounds,
    exchange: Exchange,
    head: http::response::Parts,
    body: Incoming,
}

/// What is sent to a program.
pub(super) fn request(path: &str, id: &str, body: Bytes) -> Result<Request<Full<Bytes>>, http::Error> {
    let id = HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("unnamed"));
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, "*/*")
        .header(CONNECTION, "close")
        .header("x-request-id", id)
        .body(Full::new(body))
}

impl Call {
    /// Sends a request, and waits for the head of its answer.
    ///
    /// # Errors
    /// What came between: the request's deadline, or the program's end with its cause.
    pub(super) async fn begin(
        running: Running,
        stream: super::address::Stream,
        request: Request<Full<Bytes>>,
        bounds: Bounds,
    ) -> Result<Self, Error> {
        let begun = tokio::select! {
            biased;
            // An exchange that is dropped is closed, which is what is wanted then.
            begun = Exchange::begin(stream, request) => begun,
            error = between(&running, bounds) => return Err(error),
        };
        match begun {
            Ok((exchange, response)) => {
                running.hear();
                let (head, body) = Response::into_parts(response);
                Ok(Self { running, bounds, exchange, head, body })
            }
            Err(error) => Err(running
                .broken("the program of this model ended the connection without an answer")
                .await
                .detail(error)),
        }
    }

    pub(super) fn is_stream(&self) -> bool {
        let kind = self.head.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default();
        self.head.status.is_success() && kind.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
    }

    /// All of an answer that is no stream.
    ///
    /// # Errors
    /// As [`Call::begin`], and `AdapterProtocolError` beyond the limit of an answer.
    pub(super) async fn whole(mut self) -> Result<Answer, Error> {
        let mut all = BytesMut::new();
        while let Some(bytes) = self.next().await? {
            all.extend_from_slice(&bytes);
            self.check(all.len())?;
        }
        let is_whole = || serde_json::from_slice::<IgnoredAny>(&all).is_ok();
        if self.ends_with_its_connection() && !is_whole() {
            self.running.fell().await?;
        }
        let mut headers = HeaderMap::new();
        for name in PASSED {
            if let Some(value) = self.head.headers.remove(&name) {
                headers.insert(name, value);
            }
        }
        Ok(Answer::Passed { status: self.head.status, headers, body: all.freeze() })
    }

    /// Sends on a stream's events as they come, as fast as they are taken. Returns when it is over, or nobody wants it.
    ///
    /// # Errors
    /// As [`Call::begin`].
    pub(super) async fn stream(mut self, to: &mpsc::Sender<Result<Bytes, Error>>) -> Result<(), Error> {
        let (mut whole, mut is_done) = (Whole::default(), false);
        loop {
            let bytes = tokio::select! {
                // Both are cancel-safe; who has gone needs nothing more.
                bytes = self.next() => bytes?,
                () = to.closed() => return Ok(()),
            };
            let Some(bytes) = bytes else { break };
            if let Some(events) = whole.push(bytes) {
                is_done = events.trim_ascii_end().ends_with(DONE);
                // Who has gone is noticed above.
                let _ = to.send(Ok(events)).await;
            }
            self.check(whole.len())?;
        }
        if self.ends_with_its_connection() && !is_done {
            self.running.fell().await?;
        }
        if let Some(rest) = whole.finish() {
            let _ = to.send(Ok(rest)).await;
        }
        Ok(())
    }

    /// Whether nothing else tells the end of its body, so that one that was cut off looks like one that is whole.
    fn ends_with_its_connection(&self) -> bool {
        ![CONTENT_LENGTH, TRANSFER_ENCODING].iter().any(|name| self.head.headers.contains_key(name))
    }

    /// The next bytes of the answer. Cancel-safe.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let next = tokio::select! {
            biased;
            // Both are cancel-safe.
            next = self.exchange.next(&mut self.body) => next,
            error = between(&self.running, self.bounds) => return Err(error),
        };
        match next {
            Ok(bytes) => {
                self.running.hear();
                Ok(bytes)
            }
            Err(error) => {
                Err(self.running.broken("the program of this model broke off its answer").await.detail(error))
            }
        }
    }

    fn check(&self, length: usize) -> Result<(), Error> {
        if u64::try_from(length).is_ok_and(|length| length <= self.bounds.answer_bytes_max) {
            return Ok(());
        }
        let message = "the program of this model wrote more than an answer may have";
        Err(Error::new(Fault::AdapterProtocolError, message))
    }
}

/// Waits for whatever ends a request before its answer does.
async fn between(running: &Running, bounds: Bounds) -> Error {
    tokio::select! {
        // All are cancel-safe: a fate is a value, and so are moments.
        error = running.over() => error,
        error = late(bounds.deadline) => error,
        error = doubt(running, bounds.doubt_after) => error,
    }
}

async fn late(deadline: Option<Instant>) -> Error {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => pending().await,
    }
    Error::new(Fault::DeadlineExceeded, "the program of this model did not answer in the request's time")
}

/// Doubts the program's health after a silence, again and again.
async fn doubt(running: &Running, after: Duration) -> Error {
    loop {
        sleep(after).await;
        running.doubt();
    }
}
