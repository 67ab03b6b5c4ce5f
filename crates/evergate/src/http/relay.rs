//! A stream of events on its way through: bytes pass unchanged, whole events at a time, under the limits of time and
//! size, and never end in a way that looks complete when it is not.
//!
//! Holds INV-STREAM-1 (ARCHITECTURE.md).

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_core::attempts::{How, Reached};
use evergate_core::chat::Chunks;
use evergate_core::deadline::Limit;
use evergate_core::json::{Choices, Chunk, ChunkReader, Usage, scan_chunk};
use evergate_core::sse::{Splitter, TooLarge};
use evergate_core::{Deadline, Error, Fault};
use evergate_upstream::AnswerBody;
use evergate_upstream::clock::{Clock, Sleep};

use super::attempts::Failure;

/// Pieces read behind `[DONE]` before the connection is given up.
const AFTER_DONE_PIECES_MAX: u8 = 4;
/// How long the end of the framing may follow `[DONE]`; the client has everything and waits for our end meanwhile.
const AFTER_DONE: Duration = Duration::from_millis(5);

/// Bytes of events made here that one turn gives, as `AnswerBody` does for those of an upstream.
const MADE_BYTES_MAX: usize = 64 * 1024;

/// A call on its way to a stream's head.
pub type Calling = Pin<Box<dyn Future<Output = Result<Called, Failure>> + Send>>;

/// What a call for a stream was answered with.
pub enum Called {
    /// Events to come.
    Events(AnswerBody),
    /// A whole answer, told as events.
    Whole {
        /// Each with its blank line, `[DONE]` too.
        events: Vec<String>,
        /// What the answer said of it.
        usage: Option<Usage>,
    },
}

/// Makes the client's error of an error event's message, with every secret taken out of it.
pub type OnErrorEvent = Box<dyn Fn(&[u8]) -> Error + Send>;

/// The limits of one stream.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Until the first event: `total`.
    pub total: Deadline,
    /// Until the first event: `first_token`.
    pub first_token: Deadline,
    /// To the last byte.
    pub stream_total: Deadline,
    /// Between two pieces.
    pub idle: Duration,
    /// Watches over them.
    pub clock: Clock,
    /// One event.
    pub event_bytes: usize,
}

enum Source {
    Calling(Calling),
    Reading(AnswerBody),
    /// Events that are made here, of the built-in model or of a whole answer.
    Made(Box<dyn Iterator<Item = String> + Send>),
    /// `[DONE]` has passed; the answer's framing should end now, and its connection is kept if it does.
    Closing {
        body: AnswerBody,
        until: Deadline,
        pieces: u8,
    },
    /// Everything was said.
    Ended,
}

/// One stream.
pub struct Relay {
    source: Source,
    upstream: String,
    on_error_event: OnErrorEvent,
    /// Of what ended it, if that was an error.
    how: How,
    limits: Limits,
    splitter: Splitter,
    seen: Seen,
    ready: VecDeque<Result<Bytes, Error>>,
    timer: Option<Sleep>,
    piece_at: Instant,
    /// Made since others last had their turn.
    made_bytes: usize,
}

/// What the events so far have said.
#[derive(Debug, Default)]
struct Seen {
    /// An event that is more than a comment.
    any: bool,
    reader: ChunkReader,
    choices: Choices,
    finished: Choices,
    done: bool,
    usage: Option<Usage>,
    /// What an error object stands for; the bytes before it in the same piece end here.
    error: Option<(Box<Error>, usize)>,
    /// Where `[DONE]` ends.
    done_at: usize,
}

impl Seen {
    /// Whether every choice has its `finish_reason`, so that nothing but `[DONE]` can be missing.
    fn is_whole(&self) -> bool {
        self.finished.are_all_of(self.choices)
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("upstream", &self.upstream).field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Relay {
    /// A stream that an upstream is asked for.
    #[must_use]
    pub fn new(calling: Calling, upstream: String, on_error_event: OnErrorEvent, limits: Limits) -> Self {
        Self::from_source(Source::Calling(calling), upstream, on_error_event, limits)
    }

    /// A stream of the built-in model.
    #[must_use]
    pub fn echo(chunks: Chunks, limits: Limits) -> Self {
        let never = Box::new(|_: &[u8]| Error::new(Fault::Internal, "echo reported an error"));
        Self::from_source(Source::Made(Box::new(chunks)), "echo".into(), never, limits)
    }

    fn from_source(source: Source, upstream: String, on_error_event: OnErrorEvent, limits: Limits) -> Self {
        Self {
            source,
            upstream,
            on_error_event,
            how: How::Broken,
            splitter: Splitter::new(limits.event_bytes),
            limits,
            seen: Seen::default(),
            ready: VecDeque::new(),
            timer: None,
            piece_at: Instant::now(),
            made_bytes: 0,
        }
    }

    /// Whether an event has come that is more than a comment.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.seen.any
    }

    /// Who is asked.
    #[must_use]
    pub fn upstream(&self) -> &str {
        &self.upstream
    }

    /// How it failed, after an error.
    #[must_use]
    pub fn how(&self) -> How {
        self.how
    }

    /// Usage, once an event has told it.
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.seen.usage
    }

    /// The next bytes for the client: whole events. After an error nothing more comes.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                if piece.is_err() {
                    self.end();
                    self.ready.clear();
                }
                return Poll::Ready(Some(piece));
            }
            let polled = match &mut self.source {
                Source::Ended => return Poll::Ready(None),
                Source::Made(_) if self.made_bytes >= MADE_BYTES_MAX => {
                    self.made_bytes = 0;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Source::Made(chunks) => {
                    let chunk = chunks.next();
                    self.take_made(chunk);
                    continue;
                }
                Source::Calling(calling) => calling.as_mut().poll(cx).map(|called| match called {
                    Ok(Called::Events(body)) => self.source = Source::Reading(body),
                    Ok(Called::Whole { events, usage }) => {
                        self.seen.usage = usage;
                        self.source = Source::Made(Box::new(events.into_iter()));
                    }
                    Err(Failure { error, how }) => {
                        self.how = how;
                        self.ready.push_back(Err(error));
                    }
                }),
                Source::Reading(body) => body.poll_data(cx).map(|data| self.take(data)),
                Source::Closing { body, until, pieces } => {
                    *pieces += 1;
                    let is_over = match body.poll_data(cx) {
                        Poll::Ready(Some(Ok(_))) if *pieces < AFTER_DONE_PIECES_MAX => continue,
                        Poll::Ready(_) => true,
                        Poll::Pending => {
                            let until = *until;
                            self.poll_due(until, cx).is_ready()
                        }
                    };
                    if !is_over {
                        return Poll::Pending;
                    }
                    self.end();
                    return Poll::Ready(None);
                }
            };
            match polled {
                Poll::Ready(()) => self.piece_at = Instant::now(),
                Poll::Pending => {
                    let Poll::Ready(limit) = self.poll_limit(cx) else { return Poll::Pending };
                    let error = self.overrun(limit);
                    self.how = How::of(Reached::Answer, error.fault);
                    self.ready.push_back(Err(error));
                }
            }
        }
    }

    fn take_made(&mut self, chunk: Option<String>) {
        match chunk {
            Some(chunk) => {
                let data = chunk.strip_prefix("data: ").unwrap_or_default();
                self.seen.any = true;
                self.made_bytes += chunk.len();
                self.seen.usage = scan_chunk(data.trim_end().as_bytes()).usage.or(self.seen.usage);
                self.ready.push_back(Ok(Bytes::from(chunk)));
            }
            None => self.end(),
        }
    }

    fn end(&mut self) {
        self.source = Source::Ended;
        self.timer = None;
    }

    fn take(&mut self, data: Option<Result<Bytes, Error>>) {
        match data {
            Some(Ok(data)) => self.take_bytes(data),
            Some(Err(error)) if self.seen.is_whole() && !self.seen.done => {
                // The answer itself was complete; only its end was cut.
                self.ready.push_back(Ok(Bytes::from_static(b"data: [DONE]\n\n")));
                drop(error);
                self.end();
            }
            Some(Err(error)) => self.ready.push_back(Err(error)),
            None if self.seen.is_whole() => {
                self.ready.push_back(Ok(Bytes::from_static(b"data: [DONE]\n\n")));
                self.end();
            }
            None => {
                let what = if self.seen.any {
                    "ended its stream without a finish reason"
                } else {
                    "sent a stream without an event"
                };
                let message = format!("the upstream \"{}\" {what}", self.upstream);
                self.ready.push_back(Err(Error::new(Fault::UpstreamDisconnected, message)));
            }
        }
    }

    fn take_bytes(&mut self, data: Bytes) {
        let (seen, on_error_event) = (&mut self.seen, &self.on_error_event);
        let pushed = self.splitter.push(data, &mut |event| {
            if event.is_comment || seen.done || seen.error.is_some() {
                return;
            }
            if event.is_done() {
                seen.any = true;
                seen.done = true;
                seen.done_at = event.raw.end;
                return;
            }
            if !event.has_data {
                seen.any = true;
                return;
            }
            let chunk: Chunk = seen.reader.read(&event.data);
            let is_error_event = event.event == Some(b"error");
            if chunk.has_error || is_error_event {
                // Not begun, if nothing came before: a comment in the same piece does not cost the real status.
                seen.error = Some((Box::new(on_error_event(&event.data)), event.raw.start));
                return;
            }
            seen.any = true;
            seen.choices.add(chunk.choices);
            seen.finished.add(chunk.finished);
            seen.usage = chunk.usage.or(seen.usage);
        });
        let (bytes, overflow) = match pushed {
            Ok(bytes) => (bytes, None),
            Err(TooLarge { bytes_max, completed }) => (completed, Some(bytes_max)),
        };
        self.pass_on(&bytes, overflow);
    }

    /// Queues what may go to the client of the events just completed, and what ends the stream.
    fn pass_on(&mut self, bytes: &Bytes, overflow: Option<usize>) {
        let keep = if let Some((_, start)) = &self.seen.error {
            *start
        } else if self.seen.done {
            // Whatever follows the end is not part of the answer.
            self.seen.done_at
        } else {
            bytes.len()
        };
        let bytes = bytes.slice(..keep.min(bytes.len()));
        if !bytes.is_empty() {
            self.ready.push_back(Ok(bytes));
        }
        if let Some((error, _)) = self.seen.error.take() {
            self.ready.push_back(Err(*error));
        } else if self.seen.done {
            self.finish_reading();
        } else if let Some(bytes_max) = overflow {
            let message = format!(
                "the upstream \"{}\" sent an event larger than {bytes_max} bytes (limits.event)",
                self.upstream
            );
            self.how = How::TooLarge;
            self.ready.push_back(Err(Error::new(Fault::UpstreamBadResponse, message)));
        }
    }

    /// After `[DONE]`.
    fn finish_reading(&mut self) {
        self.timer = None;
        self.source = match std::mem::replace(&mut self.source, Source::Ended) {
            Source::Reading(body) => {
                let until = Deadline::new(Instant::now(), AFTER_DONE, Limit::Idle);
                Source::Closing { body, until, pieces: 0 }
            }
            _ => Source::Ended,
        };
    }

    /// The limit that is running now, once it is over.
    fn poll_limit(&mut self, cx: &mut Context<'_>) -> Poll<Limit> {
        let limits = &self.limits;
        let mut due = limits.stream_total;
        if self.seen.any {
            due = due.min(Deadline::new(self.piece_at, limits.idle, Limit::Idle));
        } else {
            due = due.min(limits.total).min(limits.first_token);
            if matches!(self.source, Source::Reading(_)) {
                due = due.min(Deadline::new(self.piece_at, limits.idle, Limit::Idle));
            }
        }
        self.poll_due(due, cx)
    }

    fn poll_due(&mut self, due: Deadline, cx: &mut Context<'_>) -> Poll<Limit> {
        loop {
            let timer = match &mut self.timer {
                // An earlier alarm is only looked at again; a later one would come too late.
                Some(timer) if timer.deadline() <= due.at() => timer,
                slot => slot.insert(self.limits.clock.sleep_until(due.at())),
            };
            if Pin::new(timer).poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.timer = None;
            if due.is_past(Instant::now()) {
                return Poll::Ready(due.limit());
            }
        }
    }

    fn overrun(&self, limit: Limit) -> Error {
        let what = match limit {
            Limit::FirstToken | Limit::Attempt => "sent no event within",
            Limit::Idle => "was silent for longer than",
            _ => "did not finish within",
        };
        limit.overrun(&self.upstream, what)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn events_made_here_take_their_turns() {
        let now = Instant::now();
        let never = Deadline::new(now, Duration::from_secs(3600), Limit::Total);
        let (idle, clock) = (Duration::from_secs(3600), Clock::new().unwrap());
        let limits =
            Limits { total: never, first_token: never, stream_total: never, idle, clock, event_bytes: 1 << 20 };
        let chunk = || format!("data: {{\"choices\":[],\"x\":\"{}\"}}\n\n", "y".repeat(1_000));
        let made = Source::Made(Box::new((0..1_000).map(move |_| chunk())));
        let on_error_event = Box::new(|_: &[u8]| Error::new(Fault::Internal, "none comes"));
        let mut relay = Relay::from_source(made, "echo".into(), on_error_event, limits);
        let (mut bytes, mut turns, mut in_turn) = (0, 1, 0);
        loop {
            match relay.poll_next(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(None) => break,
                Poll::Ready(Some(piece)) => in_turn += piece.unwrap().len(),
                Poll::Pending => {
                    assert!((1..=MADE_BYTES_MAX + 2_000).contains(&in_turn), "{in_turn}");
                    turns += 1;
                    bytes += std::mem::take(&mut in_turn);
                }
            }
        }
        assert!(bytes + in_turn > 1_000_000);
        assert!(turns > 10, "{turns}");
    }
}
