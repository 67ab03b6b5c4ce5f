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
    /// Whether any choice has a `finish_reason` that is a string and not empty.
    pub finish: bool,
    /// Whether any choice carries text, a tool call or any other piece of the answer, and not only its role.
    pub has_content: bool,
}

static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"error\""));
static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));
static FINISH: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"finish_reason\""));
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
        return Chunk { is_object: true, has_content: true, ..Chunk::default() };
    }
    walk(data).unwrap_or_default()
}

/// Whether there is text for the client, and nothing that could be an error, a usage or an end.
fn is_text_only(data: &[u8]) -> bool {
    let is_null = |at: usize, key: &[u8]| data.get(at + key.len()..).is_some_and(|rest| rest.starts_with(b":null"));
    ERROR.find(data).is_none()
        && FINISH.find_iter(data).all(|at| is_null(at, FINISH.needle()))
        && USAGE.find_iter(data).all(|at| is_null(at, USAGE.needle()))
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
    scanner.members(|scanner, key| {
        match &*scanner.name(key) {
            b"finish_reason" => {
                let span = scanner.skip_value()?;
                let value = scanner.slice(span);
                chunk.finish |= value.starts_with(b"\"") && value.len() > 2;
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
    })
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
        let text = Chunk { is_object: true, has_content: true, ..Chunk::default() };
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
    fn a_role_alone_is_no_content() {
        for data in [
            r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"role":"assistant","content":null,"tool_calls":[ ],"audio":{}}}]}"#,
            r#"{"choices":[{"delta":{}},{"delta":null},7,{"text":""}]}"#,
            r#"{"choices":[]}"#,
            r#"{"choices":null}"#,
            r"{}",
        ] {
            assert_eq!(read(data), Chunk { is_object: true, ..Chunk::default() }, "{data}");
        }
    }

    #[test]
    fn ends_usage_and_errors_are_found() {
        let end = read(
            r#"{"choices":[{"delta":{"content":"x"},"finish_reason":null},{"delta":{},"finish_reason":"length"}]}"#,
        );
        assert!(end.finish && end.has_content && end.usage.is_none());
        let usage = read(r#"{"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}"#).usage.unwrap();
        assert_eq!((usage.tokens_in, usage.tokens_out), (2, 3));
        assert!(read(r#"{"error":{"message":"overloaded"}}"#).has_error);
        assert!(read(r#"{"\u0065rror":"x"}"#).has_error);
        assert!(!read(r#"{"error":null}"#).has_error);
    }

    #[test]
    fn what_is_no_object_says_so() {
        for data in ["", "[DONE]", "[]", "\"x\"", "{", "{\"a\":1}x", "{\"error\":}", "{}{}"] {
            assert_eq!(read(data), Chunk::default(), "{data}");
        }
    }
}
