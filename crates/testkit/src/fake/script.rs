//! The faults a fake upstream can play, chosen by the model's name in each request.

use std::time::Duration;

/// What to do with one request. Each variant's doc comment starts with the model name that asks for it.
///
/// Unless it says otherwise, a script looks at `stream` in the body: a stream gets events, a unary request a whole
/// answer. What is "in the middle" of a stream is so in the middle of a unary answer's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Script {
    /// `ok`: a right answer.
    Ok,
    /// `delay-MS`, `slow-200`: a right answer after that time without a byte.
    Delay(Duration),
    /// `stream-N`, `stream-N-MS`, `stream-slow` (20 words, 100 ms apart), `n-tokens-N`: N words of text, with a pause
    /// before each but the first.
    Words {
        /// How many, at least one.
        count: usize,
        /// Between two.
        every: Duration,
    },
    /// `tools`: a tool call in place of text.
    Tools,
    /// `echo-request`: a right answer with `received: {head, body, connection}` beside the usual fields.
    EchoRequest,
    /// `hold`: nothing until [`crate::FakeUpstream::release`], then a right answer.
    Hold,
    /// `hold-fail`: nothing until [`crate::FakeUpstream::release`], then status 500.
    HoldFail,
    /// `hold-mid`: the first half, then nothing until [`crate::FakeUpstream::release`], then the rest.
    HoldMid,

    /// `never-headers`: takes the request and never says a byte.
    NeverHeaders,
    /// `silent`: sends a head with status 200, then never a byte of the body.
    Silent,
    /// `pings-only`: a head, then a comment every 20 ms and never an event.
    PingsOnly,
    /// `idle-mid`: the first half, then silence.
    IdleMid,
    /// `close-early`: takes the request and closes without a byte.
    CloseEarly,
    /// `reset-early`: takes the request and resets without a byte.
    ResetEarly,
    /// `reset-mid`: the first half, then RST.
    ResetMid,
    /// `eof-mid`, `truncated`: the first half, then FIN, against the framing's promise.
    EofMid,
    /// `eof-head`: a head with status 200, then FIN, against the framing's promise.
    EofHead,
    /// `no-events`: a head with status 200 and a body that ends in order, with nothing in it.
    NoEvents,
    /// `compressed`: a right unary answer, compressed with gzip by its own word.
    Compressed,
    /// `two-lengths`: a right answer whose head has two differing lengths.
    TwoLengths,
    /// `two-framings`: a right chunked answer whose head names a length, too.
    TwoFramings,
    /// `stalled-500`: the head of a status 500, then silence.
    Stalled500,
    /// `stale`: a right answer that promises keep-alive, then FIN.
    Stale,

    /// `status-N`: an error of that status with OpenAI's error body; 429 with `retry-after: 1`, or `retry-after: S`
    /// with `status-N-S`.
    Status(u16, Option<u32>),
    /// `code-N-NAME`: as `status-N`, with NAME as the error's type and code.
    Code(u16, String),
    /// `leak-N`: an error of that status which quotes the request's credential in every way that comes to mind, also in
    /// header fields; 200 is an error object or error event, 500 a web page.
    Leak(u16),
    /// `html`, `html-N`: a web page, with status 200 or N.
    Html(u16),
    /// `empty`: status 200 and no body.
    Empty,
    /// `redirect`: 307 to the same server's `/redirected`.
    Redirect,
    /// `error-200`: status 200 with an error object.
    Error200,
    /// `bad-json`: status 200 and a body (or an event in the middle) that is not JSON, rightly framed.
    BadJson,
    /// `no-choices`: status 200 and an object that is no completion.
    NoChoices,
    /// `odd-usage`: a right answer whose usage is negative, huge and text.
    OddUsage,
    /// `half-emoji`: an answer with a lone surrogate escape, which strict JSON readers refuse.
    HalfEmoji,
    /// `too-long`: more bytes than its `content-length` says. Unary also for a stream request.
    TooLong,
    /// `huge-N`: a right unary answer with N bytes of text. Unary also for a stream request.
    Huge(usize),
    /// `json-for-stream`: a unary answer, whatever was asked.
    JsonForStream,
    /// `events-for-unary`: a stream, whatever was asked.
    EventsForUnary,

    /// `odd-tools`: a stream of tool calls whose deltas lack an index, jump to another, come with an id late, and end as no
    /// JSON.
    OddTools,
    /// `odd-chunks`: a right stream with empty choices, the role in every chunk and null deltas.
    OddChunks,
    /// `after-finish`: a right stream with a second `finish_reason` and more text before `[DONE]`.
    AfterFinish,
    /// `two-usages`: a right stream with usage in its middle and another at its end, asked for or not.
    TwoUsages,
    /// `error-event-first`: a stream whose first event is an error.
    ErrorEventFirst,
    /// `error-event-mid`: an error event in the middle, then a clean end without `[DONE]`.
    ErrorEventMid,
    /// `no-done`: all text and a `finish_reason`, then a clean end without `[DONE]`.
    NoDone,
    /// `second-open`: all of the first choice, its `finish_reason` too, the beginning of a second one, then a clean end.
    SecondOpen,
    /// `second-open-cut`: the same, then FIN against the framing's promise.
    SecondOpenCut,
    /// `no-done-cut`: all text and a `finish_reason`, then FIN against the framing's promise.
    NoDoneCut,
    /// `no-finish`: the first half, then a clean end with neither `finish_reason` nor `[DONE]`.
    NoFinish,
    /// `half-event`: the first half, then a part of an event and a clean end.
    HalfEvent,
    /// `two-done`: `[DONE]` twice in one piece, and once more in another.
    TwoDone,
    /// `after-done`: an event after `[DONE]`.
    AfterDone,
    /// `one-byte`: a right answer of [`super::MANY_BYTES_TEXT`], each byte in a write of its own.
    OneByte,
    /// `crlf`: a right stream with CRLF line ends, comments, `event` and `id` fields, and no space after `data:`.
    Crlf,
    /// `big-event`, `big-event-N`: a right stream with one event of 1 MiB, or N bytes, in its middle.
    BigEvent(usize),
    /// `flood`: events without a pause or an end, until the client leaves.
    Flood,
}

impl Script {
    /// The script of a model's name, if it is one. Whatever follows a colon is ignored: `ok:my-name`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let name = name.split(':').next()?;
        Self::fixed(name).or_else(|| Self::with_numbers(name))
    }

    fn fixed(name: &str) -> Option<Self> {
        Some(match name {
            "ok" => Self::Ok,
            "stream-slow" => Self::Words { count: 20, every: Duration::from_millis(100) },
            "tools" => Self::Tools,
            "echo-request" => Self::EchoRequest,
            "hold" => Self::Hold,
            "hold-fail" => Self::HoldFail,
            "hold-mid" => Self::HoldMid,
            "never-headers" => Self::NeverHeaders,
            "silent" => Self::Silent,
            "pings-only" => Self::PingsOnly,
            "idle-mid" => Self::IdleMid,
            "close-early" => Self::CloseEarly,
            "reset-early" => Self::ResetEarly,
            "reset-mid" => Self::ResetMid,
            "eof-mid" | "truncated" => Self::EofMid,
            "eof-head" => Self::EofHead,
            "no-events" => Self::NoEvents,
            "compressed" => Self::Compressed,
            "two-lengths" => Self::TwoLengths,
            "two-framings" => Self::TwoFramings,
            "stalled-500" => Self::Stalled500,
            "stale" => Self::Stale,
            "html" => Self::Html(200),
            "empty" => Self::Empty,
            "redirect" => Self::Redirect,
            "error-200" => Self::Error200,
            "bad-json" => Self::BadJson,
            "no-choices" => Self::NoChoices,
            "odd-usage" => Self::OddUsage,
            "half-emoji" => Self::HalfEmoji,
            "too-long" => Self::TooLong,
            "json-for-stream" => Self::JsonForStream,
            "events-for-unary" => Self::EventsForUnary,
            "odd-tools" => Self::OddTools,
            "odd-chunks" => Self::OddChunks,
            "after-finish" => Self::AfterFinish,
            "two-usages" => Self::TwoUsages,
            "error-event-first" => Self::ErrorEventFirst,
            "error-event-mid" => Self::ErrorEventMid,
            "no-done" => Self::NoDone,
            "second-open" => Self::SecondOpen,
            "second-open-cut" => Self::SecondOpenCut,
            "no-done-cut" => Self::NoDoneCut,
            "no-finish" => Self::NoFinish,
            "half-event" => Self::HalfEvent,
            "two-done" => Self::TwoDone,
            "after-done" => Self::AfterDone,
            "one-byte" => Self::OneByte,
            "crlf" => Self::Crlf,
            "big-event" => Self::BigEvent(1 << 20),
            "flood" => Self::Flood,
            _ => return None,
        })
    }

    fn with_numbers(name: &str) -> Option<Self> {
        if let Some((status, code)) = name.strip_prefix("code-").and_then(|rest| rest.split_once('-')) {
            return Some(Self::Code(status.parse().ok()?, code.to_owned()));
        }
        let (kind, numbers) = name.split_at(name.find(|c: char| c.is_ascii_digit())?);
        let numbers: Vec<u64> = numbers.split('-').map(str::parse).collect::<Result<_, _>>().ok()?;
        let words = |count: u64, ms: u64| {
            let count = usize::try_from(count).ok()?;
            Some(Self::Words { count: count.max(1), every: Duration::from_millis(ms) })
        };
        match (kind, numbers.as_slice()) {
            ("delay-" | "slow-", &[ms]) => Some(Self::Delay(Duration::from_millis(ms))),
            ("stream-" | "n-tokens-", &[count]) => words(count, 0),
            ("stream-", &[count, ms]) => words(count, ms),
            ("status-", &[status]) => Some(Self::Status(status.try_into().ok()?, (status == 429).then_some(1))),
            ("status-", &[status, seconds]) => {
                Some(Self::Status(status.try_into().ok()?, Some(seconds.try_into().ok()?)))
            }
            ("leak-", &[status]) => Some(Self::Leak(status.try_into().ok()?)),
            ("html-", &[status]) => Some(Self::Html(status.try_into().ok()?)),
            ("huge-", &[bytes]) => Some(Self::Huge(bytes.try_into().ok()?)),
            ("big-event-", &[bytes]) => Some(Self::BigEvent(bytes.try_into().ok()?)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_numbers_are_read() {
        let words = |count, ms| Some(Script::Words { count, every: Duration::from_millis(ms) });
        for (name, script) in [
            ("slow-200", Some(Script::Delay(Duration::from_millis(200)))),
            ("stream-5", words(5, 0)),
            ("stream-5-20", words(5, 20)),
            ("stream-slow", words(20, 100)),
            ("n-tokens-7", words(7, 0)),
            ("status-429", Some(Script::Status(429, Some(1)))),
            ("status-503-300", Some(Script::Status(503, Some(300)))),
            ("status-500", Some(Script::Status(500, None))),
            ("code-429-insufficient_quota", Some(Script::Code(429, "insufficient_quota".into()))),
            ("code-x-y", None),
            ("big-event-10", Some(Script::BigEvent(10))),
            ("delay-5:sk-1-2", Some(Script::Delay(Duration::from_millis(5)))),
            ("gpt-4o", None),
            ("status-", None),
            ("stream-1-2-3", None),
        ] {
            assert_eq!(Script::parse(name), script, "{name}");
        }
    }
}
