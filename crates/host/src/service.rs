//! What workers see of a host: OpenAI's HTTP API over a Unix socket.
//!
//! Errors have the fault table's code in `x-evergate-fault`, for the record of the worker, and `x-evergate-dispatched`: `0`
//! says that no program has seen anything of the request, so that another may be asked without doing a thing twice. What only
//! the records are to have is beside the message, as `detail`: no client sees a body of ours as it is.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_board::Board;
use evergate_core::{Error, Fault, json, request_timeout};
use http::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::ask::{Answer, Ask, Endpoint, Events, Mode, Refusal};
use crate::mark::Mark;
use crate::tasks;

/// The fault table's code of an error.
pub const FAULT: HeaderName = HeaderName::from_static("x-evergate-fault");
/// Whether a program may have seen something of a request that failed.
pub const DISPATCHED: HeaderName = HeaderName::from_static("x-evergate-dispatched");
/// What identifies a request in records.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Where a request's row is on the board, for the mark that a program has seen something of it.
pub const PLACE: HeaderName = HeaderName::from_static("x-evergate-place");

/// A worker has the whole request before it asks; a head or a body that takes longer comes from somewhere else.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// After an accept that failed, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How large a request may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Its body.
    pub body_bytes_max: usize,
    /// What is in it.
    pub json: json::Limits,
}

/// What answers at a host's socket.
pub struct Front<M> {
    /// With what.
    pub mode: Arc<M>,
    /// Whom it answers.
    pub limits: Limits,
    /// Where it is marked that a program has seen something of a request; none where nobody looks.
    pub board: Option<Board>,
}

/// How far a host is with its stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It serves.
    Serving,
    /// It takes no further connection and finishes what it has. Who is not accepted yet stays in the socket's queue, which
    /// is the master's, for the next host.
    Draining,
    /// Whatever is left is cut off.
    Cutting,
}

/// Serves until `stage` says otherwise. Says how many connections were cut off.
pub async fn serve<M: Mode>(listener: UnixListener, front: Front<M>, mut stage: watch::Receiver<Stage>) -> usize {
    let front = Arc::new(front);
    let (open, cut) = (watch::Sender::new(0_usize), Arc::new(AtomicUsize::new(0)));
    while *stage.borrow_and_update() == Stage::Serving {
        let accepted = tokio::select! {
            // Both are cancel-safe.
            accepted = listener.accept() => accepted,
            // The next look tells what has changed; a sender that is gone has nothing more to say than to stop.
            changed = stage.changed() => if changed.is_ok() { continue } else { break },
        };
        let Ok((stream, _)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        open.send_modify(|open| *open += 1);
        let (open, cut, front, stage) = (Open(open.clone()), Arc::clone(&cut), Arc::clone(&front), stage.clone());
        tasks::finish(async move {
            if let Finish::Cut = connection(stream, front, stage).await {
                cut.fetch_add(1, Ordering::Relaxed);
            }
            drop(open);
        });
    }
    // Each of them hears of the stages by itself.
    let _ = open.subscribe().wait_for(|open| *open == 0).await;
    cut.load(Ordering::Relaxed)
}

/// How a connection came to its end.
enum Finish {
    /// By itself, or because the worker left.
    Own,
    /// By our stop.
    Cut,
}

/// One more connection, until it is dropped.
struct Open(watch::Sender<usize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open = open.saturating_sub(1));
    }
}

async fn connection<M: Mode>(stream: UnixStream, front: Arc<Front<M>>, mut stage: watch::Receiver<Stage>) -> Finish {
    let service = service_fn(move |request| {
        let front = Arc::clone(&front);
        async move { Ok::<_, Infallible>(answer(&front, request).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(READ_TIMEOUT);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    loop {
        tokio::select! {
            // A worker that leaves ends the connection, and with it the request on it.
            _ = connection.as_mut() => return Finish::Own,
            changed = stage.changed() => match *stage.borrow_and_update() {
                Stage::Serving if changed.is_ok() => {}
                Stage::Draining if changed.is_ok() => connection.as_mut().graceful_shutdown(),
                _ => return Finish::Cut,
            },
        }
    }
}

async fn answer<M: Mode>(front: &Front<M>, request: Request<Incoming>) -> Response<Content> {
    let id = request.headers().get(REQUEST_ID).cloned();
    let place = request.headers().get(PLACE).and_then(|value| value.to_str().ok());
    let mark = Mark::new(front.board.as_ref(), place);
    let mut response = match ask(front.limits, request, mark).await {
        Ok(ask) => match Arc::clone(&front.mode).call(ask).await {
            Ok(answer) => given(answer),
            Err(refusal) => refused(&refusal),
        },
        Err(error) => refused(&Refusal::before(error)),
    };
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Reads a request.
async fn ask(limits: Limits, request: Request<Incoming>, mark: Mark) -> Result<Ask, Error> {
    let endpoint = match request.uri().path() {
        "/v1/chat/completions" => Endpoint::Chat,
        "/v1/completions" => Endpoint::Completions,
        "/v1/embeddings" => Endpoint::Embeddings,
        _ => return Err(Error::new(Fault::NotFound, "a program that is a model has no such path")),
    };
    if request.method() != Method::POST {
        return Err(Error::new(Fault::MethodNotAllowed, "this path takes POST only"));
    }
    let field = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let id = field(REQUEST_ID.as_str()).unwrap_or("unnamed").to_owned();
    let deadline = field(request_timeout::NAME).and_then(|value| request_timeout::parse(value.as_bytes()));
    let deadline = deadline.map(|after| Instant::now() + after);
    let body = Limited::new(request.into_body(), limits.body_bytes_max).collect();
    let body = match timeout(READ_TIMEOUT, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Err(Error::new(Fault::RequestTooLarge, "the request body is too large for this model"));
        }
        Ok(Err(error)) => {
            return Err(Error::new(Fault::MalformedRequest, "the request body did not arrive").detail(error));
        }
        Err(_) => return Err(Error::new(Fault::RequestTimeout, "the request body did not arrive in time")),
    };
    let request = json::scan_request(&body, &limits.json)?;
    Ok(Ask { endpoint, id, body, request, deadline, mark })
}

fn given(answer: Answer) -> Response<Content> {
    let (kind, content) = match answer {
        Answer::Whole(bytes) => ("application/json", Content::Whole(bytes)),
        Answer::Passed { status, headers, body } => {
            let mut response = Response::new(Content::Whole(body));
            (*response.status_mut(), *response.headers_mut()) = (status, headers);
            return response;
        }
        Answer::Events { first, rest } => {
            ("text/event-stream", Content::Events { first: Some(first), rest: Some(rest) })
        }
    };
    let mut response = Response::new(content);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn refused(refusal: &Refusal) -> Response<Content> {
    let (error, row) = (&refusal.error, refusal.error.fault.row());
    let mut response = Response::new(Content::Whole(error.body_with_detail().into()));
    *response.status_mut() = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(FAULT, HeaderValue::from_static(row.code));
    headers.insert(DISPATCHED, HeaderValue::from_static(if refusal.is_dispatched { "1" } else { "0" }));
    if let Some(seconds) = row.retry_after_s {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if error.fault == Fault::MethodNotAllowed {
        headers.insert(ALLOW, HeaderValue::from_static("POST"));
    }
    response
}

/// A response's body.
enum Content {
    Whole(Bytes),
    Events { first: Option<Bytes>, rest: Option<Events> },
}

impl Body for Content {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = |bytes: Bytes| Poll::Ready(Some(Ok(Frame::data(bytes))));
        match &mut *self {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => frame(std::mem::take(bytes)),
            Self::Events { first, rest } => {
                if let Some(first) = first.take() {
                    return frame(first);
                }
                let Some(events) = rest else { return Poll::Ready(None) };
                match std::task::ready!(events.poll_recv(cx)) {
                    Some(Ok(event)) => frame(event),
                    // The last word, and nothing after it that would make it look like an end (INV-STREAM-1).
                    Some(Err(error)) => {
                        *rest = None;
                        frame(format!("data: {}\n\n", error.body_with_detail()).into())
                    }
                    None => Poll::Ready(None),
                }
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Events { .. } => SizeHint::default(),
        }
    }
}
