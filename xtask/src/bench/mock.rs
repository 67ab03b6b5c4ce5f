//! The upstream behind every subject: as fast as hyper allows, scripted by the model's name in the request.
//!
//! `u<MS>`: a whole answer of about 600 bytes after MS milliseconds. `s<CHUNKS>x<MS>`: a stream of so many chunks, MS
//! milliseconds apart (0: one after the other, each in a write of its own). `hold`: one chunk, then silence until the
//! client leaves.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep};

const ANSWER: &str = r#"{"id":"chatcmpl-000000000000000000000000","object":"chat.completion","created":1790000000,"model":"mock","choices":[{"index":0,"message":{"role":"assistant","content":"A gateway takes what it is given, asks the right house for an answer, and carries that answer back as it was spoken; it neither loses a word nor adds one of its own.","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":120,"completion_tokens":38,"total_tokens":158,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0}},"service_tier":"default"}"#;
const CHUNK: &str = "data: {\"id\":\"chatcmpl-000000000000000000000000\",\"object\":\"chat.completion.chunk\",\"created\":1790000000,\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
const LAST: &str = "data: {\"id\":\"chatcmpl-000000000000000000000000\",\"object\":\"chat.completion.chunk\",\"created\":1790000000,\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";

/// Chunks of one stream that are not part of `CHUNKS`: the last one and `[DONE]` come as one frame.
pub const CLOSING_EVENTS: u64 = 2;

/// Serves until the process is ended; prints its address first.
pub async fn serve() -> Result<(), String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| format!("mock: bind: {error}"))?;
    super::announce(&listener)?;
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        tokio::task::spawn_local(async move {
            // A client that leaves in the middle of a held stream is the usual end here.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service_fn(answer))
                .await;
        });
    }
}

type Answer = Response<Either<Full<Bytes>, Stream>>;

async fn answer(request: Request<Incoming>) -> Result<Answer, Infallible> {
    let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut answer = match Script::of(&body) {
        Some(Script::Whole { delay }) => {
            if !delay.is_zero() {
                sleep(delay).await;
            }
            let mut answer = Response::new(Either::Left(Full::new(Bytes::from_static(ANSWER.as_bytes()))));
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            return Ok(answer);
        }
        Some(Script::Stream { chunks, gap }) => Response::new(Either::Right(Stream::new(chunks, gap))),
        None => {
            let mut answer = Response::new(Either::Left(Full::new(Bytes::from_static(b"unknown model"))));
            *answer.status_mut() = StatusCode::NOT_FOUND;
            return Ok(answer);
        }
    };
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    Ok(answer)
}

#[derive(Debug, PartialEq)]
enum Script {
    Whole { delay: Duration },
    Stream { chunks: u64, gap: Option<Duration> },
}

impl Script {
    /// Read from the model's name, without parsing the rest: the mock must cost less than what it measures.
    fn of(body: &[u8]) -> Option<Self> {
        const KEY: &[u8] = b"\"model\":\"";
        let start = memchr::memmem::find(body, KEY)? + KEY.len();
        let name = body.get(start..)?.split(|byte| *byte == b'"').next()?;
        let name = std::str::from_utf8(name).ok()?;
        if name == "hold" {
            return Some(Self::Stream { chunks: 1, gap: None });
        }
        if let Some(delay) = name.strip_prefix('u') {
            return Some(Self::Whole { delay: Duration::from_millis(delay.parse().ok()?) });
        }
        let (chunks, gap) = name.strip_prefix('s')?.split_once('x')?;
        Some(Self::Stream { chunks: chunks.parse().ok()?, gap: Some(Duration::from_millis(gap.parse().ok()?)) })
    }
}

/// The body of a streamed answer.
struct Stream {
    left: u64,
    /// Whether the closing frame is still to come; never for a held stream.
    closes: bool,
    is_held: bool,
    timer: Option<Interval>,
    /// Whether the next poll gives a frame: between two frames one poll is pending, so that hyper writes each by itself.
    is_turn: bool,
}

impl Stream {
    /// `gap`: `None` holds the stream after its chunks.
    fn new(chunks: u64, gap: Option<Duration>) -> Self {
        let timer = gap.filter(|gap| !gap.is_zero()).map(|gap| {
            let mut timer = interval_at(Instant::now() + gap, gap);
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
            timer
        });
        Self { left: chunks, closes: gap.is_some(), is_held: gap.is_none(), timer, is_turn: true }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 && self.is_held {
            return Poll::Pending;
        }
        if self.left == 0 && !self.closes {
            return Poll::Ready(None);
        }
        if let Some(timer) = &mut self.timer {
            std::task::ready!(timer.poll_tick(cx));
        } else if !self.is_turn {
            self.is_turn = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.is_turn = false;
        let text = if self.left == 0 {
            self.closes = false;
            LAST
        } else {
            self.left -= 1;
            CHUNK
        };
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(text.as_bytes())))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_name_is_the_script() {
        let script = |name: &str| Script::of(format!("{{\"model\":\"{name}\",\"stream\":true}}").as_bytes());
        assert_eq!(script("u200"), Some(Script::Whole { delay: Duration::from_millis(200) }));
        assert_eq!(script("s500x5"), Some(Script::Stream { chunks: 500, gap: Some(Duration::from_millis(5)) }));
        assert_eq!(script("hold"), Some(Script::Stream { chunks: 1, gap: None }));
        assert_eq!(script("gpt"), None);
    }
}
