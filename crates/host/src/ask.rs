//! What a host is asked, and what it answers: the border between the service and the modes.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use evergate_core::{Error, Fault, json};
use evergate_sys::Status;
use http::{HeaderMap, StatusCode};
use tokio::sync::mpsc;

use crate::mark::Mark;

/// A way of serving requests with programs.
pub trait Mode: Send + Sync + 'static {
    /// Answers one request. Dropping the future, or the events of its answer, means that nobody wants it any more.
    fn call(self: Arc<Self>, ask: Ask) -> impl Future<Output = Result<Answer, Refusal>> + Send;
}

/// Where a request was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/embeddings`.
    Embeddings,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Where it was sent to.
    pub endpoint: Endpoint,
    /// What identifies it in records.
    pub id: String,
    /// As it came.
    pub body: Bytes,
    /// What was read of it.
    pub request: json::Request,
    /// When nobody wants the answer any more; none if nobody has said.
    pub deadline: Option<Instant>,
    /// To be set before a program sees anything of it.
    pub mark: Mark,
}

/// What comes of a request.
#[derive(Debug)]
pub enum Answer {
    /// One JSON object.
    Whole(Bytes),
    /// What a program's own server answered, its errors too.
    Passed {
        /// As it came.
        status: StatusCode,
        /// Those of its fields that mean something to a client.
        headers: HeaderMap,
        /// As it came.
        body: Bytes,
    },
    /// A stream of events, each whole, with its blank line. Whoever sends them ends them with `[DONE]` or an error.
    Events {
        /// It has decided that there is an answer.
        first: Bytes,
        /// What comes after it.
        rest: Events,
    },
}

/// Events as they come. An error is the last.
pub type Events = mpsc::Receiver<Result<Bytes, Error>>;

/// Why there is no answer.
#[derive(Debug)]
pub struct Refusal {
    /// For the client.
    pub error: Error,
    /// Whether a program may have seen something of the request, so that doing it again may do it twice.
    pub is_dispatched: bool,
}

impl Refusal {
    /// A request that no program has seen.
    #[must_use]
    pub fn before(error: Error) -> Self {
        Self { error, is_dispatched: false }
    }

    /// A request that a program has seen something of.
    #[must_use]
    pub fn after(error: Error) -> Self {
        Self { error, is_dispatched: true }
    }
}

/// What a client is told of a program's end: its exact code or signal.
pub(crate) fn exited(status: Status) -> Error {
    let ended = match status {
        Status::Code(code) => format!("ended with exit code {code}"),
        Status::Signal { number, core } => {
            format!("was ended by signal {number}{}", if core { ", with a core dump" } else { "" })
        }
    };
    Error::new(Fault::AdapterExited, format!("the program of this model {ended}"))
}
