//! One event of an upstream's stream, read only as far as the gateway needs it.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use super::escape::inner;
use super::scan::{Scanner, Stop};
use super::usage::{self, Usage};

/// What the gateway reads of one event's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Whether it is an object. Judged by its brackets alone where nothing else has to be read.
    pub is_object: bool,
    /// Whether the top-level `error` is there and not null.
    pub has_error: bool,
    /// The top-level `usage`, if it is an object with a count.
    pub usage: Option<Usage>,
    /// The choices it speaks of.
    pub choices: Choices,
    /// Those of them whose `finish_reason` is a string and not empty.
    pub finished: Choices,
    /// Whether any choice carries text, a tool call or any other piece of the answer, and not only its role.
    pub has_content: bool,
}

/// A set of choices, by their `index`; one without is the first. From the 127th on they count as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choices(u128);

impl Choices {
    const FIRST: Self = Self(1);

    fn of(index: u32) -> Self {
        Self(1 << index.min(u128::BITS - 1))
    }

    /// Takes these in, too.
    pub fn add(&mut self, others: Self) {
        self.0 |= others.0;
    }

    /// Whether it has any, and all of those.
    #[must_use]
    pub fn are_all_of(self, others: Self) -> bool {
        self.0 != 0 && others.0 & !self.0 == 0
    }
}

/// Of text for the first choice, and nothing else.
const TEXT: Chunk = Chunk {
    is_object: true,
    has_error: false,
    usage: None,
    choices: Choices::FIRST,
    finished: Choices(0),
    has_content: true,
};

/// Reads the events of one stream. Nearly each is like the one before but for its text, and is recognised by that: one
/// comparison instead of a search for each key that matters.
#[derive(Debug, Default)]
pub struct ChunkReader {
    /// What stood before the text of an event with text and nothing else; empty while there was none.
    before: Vec<u8>,
    /// What stood behind it, from its closing quote on.
    after: Vec<u8>,
}

/// Longest frame of a text that is kept for the next event.
const FRAME_BYTES_MAX: usize = 2048;

impl ChunkReader {
    /// As [`scan_chunk`].
    pub fn read(&mut self, data: &[u8]) -> Chunk {
        let data = data.trim_ascii();
        if self.is_like_before(data) {
            return TEXT;
        }
        let chunk = scan_chunk(data);
        if chunk == TEXT {
            self.learn(data);
        }
        chunk
    }

    fn is_like_before(&self, data: &[u8]) -> bool {
        let text = data.strip_prefix(&*self.before).and_then(|rest| rest.strip_suffix(&*self.after));
        // With an escape in it, the quote that seems to end it may be its own.
        let is_plain = |text: &[u8]| !text.is_empty() && memchr::memchr2(b'"', b'\\', text).is_none();
        !self.before.is_empty() && text.is_some_and(is_plain)
    }

    fn learn(&mut self, data: &[u8]) {
        self.before.clear();
        self.after.clear();
        let Some(start) = CONTENT.find(data).map(|at| at + CONTENT.needle().len()) else { return };
        let (before, text) = data.split_at_checked(start).unwrap_or((data, &[]));
        let length = memchr::memchr2(b'"', b'\\', text).filter(|end| text.get(*end) == Some(&b'"'));
        let Some((_, after)) = length.and_then(|length| text.split_at_checked(length)) else { return };
        // What was walked through may differ where its keys do not; what was recognised by them cannot.
        if before.len() + after.len() <= FRAME_BYTES_MAX && is_text_only(data) {
            self.before.extend_from_slice(before);
            self.after.extend_from_slice(after);
        }
    }
}

static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"error\""));
static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));
static FINISH: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"finish_reason\""));
static INDEX: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"index\":"));
static CONTENT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"content\":\""));

/// Reads one event's data. What is not a JSON object gives the default: nothing but `is_object: false`.
///
/// Nearly all events carry text and nothing else, and are recognised without a walk: quotes inside a JSON string are
/// escaped, so that a key's bytes with both its quotes cannot stand inside one.
#[must_use]
pub fn scan_chunk(data: &[u8]) -> Chunk {
    let data = data.trim_ascii();
    if !data.starts_with(b"{") || !data.ends_with(b"}") {
        return Chunk::default();
    }
    if is_text_only(data) {
        return TEXT;
    }
    walk(data).unwrap_or_default()
}

/// Whether there is text of the first choice for the client, and nothing that could be an error, a usage or an end.
fn is_text_only(data: &[u8]) -> bool {
    let is_null = |at: usize, key: &[u8]| data.get(at + key.len()..).is_some_and(|rest| rest.starts_with(b":null"));
    ERROR.find(data).is_none()
        && FINISH.find_iter(data).all(|at| is_null(at, FINISH.needle()))
        && USAGE.find_iter(data).all(|at| is_null(at, USAGE.needle()))
        && INDEX
            .find_iter(data)
            .all(|at| matches!(data.get(at + INDEX.needle().len()..), Some([b'0', b',' | b'}', ..])))
        && CONTENT.find(data).is_some_and(|at| data.get(at + CONTENT.needle().len()) != Some(&b'"'))
}

fn walk(data: &[u8]) -> Result<Chunk, Stop> {
    let mut chunk = Chunk { is_object: true, ..Chunk::default() };
    let mut scanner = Scanner::lenient(data);
    scanner.members::<Stop>(|scanner, key| {
        match &*scanner.name(key) {
            b"usage" => chunk.usage = usage::read(scanner)?,
            b"error" => {
                chunk.has_error = scanner.peek() != Some(b'n');
                scanner.skip_value()?;
            }
            b"choices" if scanner.peek() == Some(b'[') => scanner.items(|scanner| choice(scanner, &mut chunk))?,
            _ => {
                scanner.skip_value()?;
            }
        }
        Ok(())
    })?;
    scanner.end()?;
    Ok(chunk)
}

fn choice(scanner: &mut Scanner<'_>, chunk: &mut Chunk) -> Result<(), Stop> {
    if scanner.peek() != Some(b'{') {
        scanner.skip_value()?;
        return Ok(());
    }
    let (mut index, mut is_finished) = (0, false);
    scanner.members::<Stop>(|scanner, key| {
        match &*scanner.name(key) {
            b"index" => {
                let span = scanner.skip_value()?;
                index = std::str::from_utf8(scanner.slice(span)).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
            }
            b"finish_reason" => {
                let span = scanner.skip_value()?;
                let value = scanner.slice(span);
                is_finished = value.starts_with(b"\"") && value.len() > 2;
            }
            b"text" => chunk.has_content |= piece(scanner)?,
            b"delta" if scanner.peek() == Some(b'{') => scanner.members(|scanner, key| {
                // The role comes once and alone; all else, whatever its provider calls it, is the answer.
                let is_role = *scanner.name(key) == *b"role";
                chunk.has_content |= piece(scanner)? && !is_role;
                Ok::<_, Stop>(())
            })?,
            _ => {
                scanner.skip_value()?;
            }
        }
        Ok(())
    })?;
    chunk.choices.add(Choices::of(index));
    if is_finished {
        chunk.finished.add(Choices::of(index));
    }
    Ok(())
}

/// Takes a value and says whether there is something in it: a string, array or object that is not empty.
fn piece(scanner: &mut Scanner<'_>) -> Result<bool, Stop> {
    let span = scanner.skip_value()?;
    let value = scanner.slice(span);
    Ok(match value.first() {
        Some(b'"') => value.len() > 2,
        Some(b'[' | b'{') => !inner(value).trim_ascii().is_empty(),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(data: &str) -> Chunk {
        scan_chunk(data.as_bytes())
    }

    #[test]
    fn a_piece_of_text_is_content_and_nothing_else() {
        let text = Chunk { is_object: true, has_content: true, choices: Choices::FIRST, ..Chunk::default() };
        for data in [
            r#"{"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}],"usage":null}"#,
            r#" {"choices":[{"index":0,"delta":{"content": "hi"},"finish_reason": null}], "usage": null, "error":null} "#,
            r#"{"choices":[{"delta":{"role":"assistant","reasoning_content":"hm"}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#,
            r#"{"choices":[{"text":"a"}]}"#,
            r#"{"choices":[{"delta":{"content":"\"usage\":{\"prompt_tokens\":1},\"error\":1,\"finish_reason\":\"stop\""}}]}"#,
            r#"{"choices":[{"delta":{"content":"usage"}},{"delta":{"content":"error"}},{"delta":{"content":"finish_reason"}}]}"#,
            r#"{"choices":[{"delta":{"content":"x","error":{"a":1},"usage":{"prompt_tokens":1}}}]}"#,
            r#"{"choices":[{"delta":{"content":"\ud83d"},"finish_reason":""}]}"#,
        ] {
            assert_eq!(read(data), text, "{data}");
        }
    }

    #[test]
    fn a_stream_is_read_as_its_events_are_one_by_one() {
        let frame = |text: &str| {
            format!(
                r#"{{"id":"a","choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}],"usage":null}}"#
            )
        };
        let texts = [
            " word",
            "b",
            "",
            r"\n",
            r#"\""#,
            r"\\",
            "\\",
            r#"x\"}],\"error\":{"#,
            r#"x"},"error":{"a":"b"#,
            "\"",
            "ü",
            " end",
        ];
        let mut events: Vec<String> = texts.iter().map(|text| frame(text)).collect();
        events.push(r#"{"choices":[{"index":1,"delta":{"content":"other"},"finish_reason":null}]}"#.into());
        events.push(r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#.into());
        events.push(
            r#"{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}"#
                .into(),
        );
        events.push(r#"{"error":{"message":"x"},"choices":[{"delta":{"content":"x"}}]}"#.into());
        events
            .push(format!(r#"{{"pad":"{}","choices":[{{"delta":{{"content":"x"}}}}]}}"#, "p".repeat(FRAME_BYTES_MAX)));
        events.push("not JSON".into());
        // Every event behind every other one, so that whatever one teaches is tried on all.
        let mut reader = ChunkReader::default();
        for first in &events {
            for second in &events {
                for event in [first, second, first, second] {
                    assert_eq!(reader.read(event.as_bytes()), read(event), "{event} behind {first}");
                }
            }
        }
        assert!(reader.read(frame("a").as_bytes()) == TEXT && reader.is_like_before(frame("b").as_bytes()));
    }

    #[test]
    fn a_role_alone_is_no_content() {
        for data in [
            r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"role":"assistant","content":null,"tool_calls":[ ],"audio":{}}}]}"#,
            r#"{"choices":[{"delta":{}},{"delta":null},7,{"text":""}]}"#,
            r#"{"choices":[]}"#,
            r#"{"choices":null}"#,
            r"{}",
        ] {
            let chunk = read(data);
            assert_eq!(
                Chunk { choices: Choices::default(), ..chunk },
                Chunk { is_object: true, ..Chunk::default() },
                "{data}"
            );
        }
    }

    #[test]
    fn ends_usage_and_errors_are_found() {
        let end = read(
            r#"{"choices":[{"delta":{"content":"x"},"finish_reason":null},{"delta":{},"finish_reason":"length"}]}"#,
        );
        assert!(end.finished == Choices::FIRST && end.has_content && end.usage.is_none());
        let usage = read(r#"{"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}"#).usage.unwrap();
        assert_eq!((usage.tokens_in, usage.tokens_out), (2, 3));
        assert!(read(r#"{"error":{"message":"overloaded"}}"#).has_error);
        assert!(read(r#"{"\u0065rror":"x"}"#).has_error);
        assert!(!read(r#"{"error":null}"#).has_error);
    }

    #[test]
    fn each_choice_has_an_end_of_its_own() {
        let (mut choices, mut finished) = (Choices::default(), Choices::default());
        for (data, is_whole) in [
            (r#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#, false),
            (r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#, true),
            (r#"{"choices":[{"index":1,"delta":{"content":"b"},"finish_reason":null}]}"#, false),
            (r#"{"choices":[{"delta":{"content":"c"}, "index": 2}]}"#, false),
            (r#"{"choices":[{"index":1,"text":"","finish_reason":"length"}]}"#, false),
            (r#"{"choices":[],"usage":{"prompt_tokens":1}}"#, false),
            (r#"{"choices":[{"finish_reason":"stop","index":2}]}"#, true),
            (r#"{"choices":[{"index":400,"delta":{"content":"d"}}]}"#, false),
            (r#"{"choices":[{"index":400,"delta":{},"finish_reason":"stop"}]}"#, true),
        ] {
            let chunk = read(data);
            choices.add(chunk.choices);
            finished.add(chunk.finished);
            assert_eq!(finished.are_all_of(choices), is_whole, "{data}");
        }
        assert!(!Choices::default().are_all_of(Choices::default()), "no choice has ended where there was none");
    }

    #[test]
    fn what_is_no_object_says_so() {
        for data in ["", "[DONE]", "[]", "\"x\"", "{", "{\"a\":1}x", "{\"error\":}", "{}{}"] {
            assert_eq!(read(data), Chunk::default(), "{data}");
        }
    }
}
