//! An upstream's whole answer, read leniently: what its client makes of it is the client's business.

use super::escape::{inner, unescape};
use super::scan::{Broken, Scanner, Stop};
use super::usage::{self, Usage};

/// Most characters that are taken of an upstream's error message.
const MESSAGE_CHARS_MAX: usize = 512;

/// What the gateway reads of a whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The top-level `usage`, if it is an object with a count.
    pub usage: Option<Usage>,
    /// Whether the top-level `error` is there and not null.
    pub has_error: bool,
    /// Whether the top-level `choices` or `data` is an array.
    pub has_choices_or_data: bool,
    /// `error.message`, or `error` itself if it is a string; cut to 512 characters. It is an upstream's text and may
    /// hold what a client must not see.
    pub error_message: Option<String>,
}

/// Reads an upstream's whole answer, which must be one JSON object. Lone surrogate escapes, numbers of any size and
/// invalid UTF-8 inside strings are accepted, and so is a byte order mark.
///
/// # Errors
/// `Broken` says where the bytes end being JSON; the offset counts from after a byte order mark.
pub fn scan_answer(body: &[u8]) -> Result<Answer, Broken> {
    let mut answer = Answer::default();
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let mut scanner = Scanner::lenient(body);
    scanner.space();
    let walked = scanner.members::<Stop>(|scanner, key| {
        match &*scanner.name(key) {
            b"usage" => answer.usage = usage::read(scanner)?,
            b"error" => {
                answer.has_error = scanner.peek() != Some(b'n');
                answer.error_message = message(scanner)?;
            }
            b"choices" | b"data" => {
                answer.has_choices_or_data |= scanner.peek() == Some(b'[');
                scanner.skip_value()?;
            }
            _ => {
                scanner.skip_value()?;
            }
        }
        Ok(())
    });
    match walked.and_then(|()| scanner.end()) {
        Ok(()) => Ok(answer),
        Err(Stop::Broken(broken)) => Err(broken),
        Err(Stop::TooDeep { at }) => Err(Broken { at, expected: "less nesting" }),
    }
}

/// Takes the value of `error`.
fn message(scanner: &mut Scanner<'_>) -> Result<Option<String>, Stop> {
    let mut found = None;
    match scanner.peek() {
        Some(b'"') => found = Some(scanner.string()?),
        Some(b'{') => scanner.members::<Stop>(|scanner, key| {
            if *scanner.name(key) == *b"message" && scanner.peek() == Some(b'"') {
                found = Some(scanner.string()?);
            } else {
                scanner.skip_value()?;
            }
            Ok(())
        })?,
        _ => {
            scanner.skip_value()?;
        }
    }
    Ok(found.map(|span| unescape(inner(scanner.slice(span))).chars().take(MESSAGE_CHARS_MAX).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_and_shape_are_found() {
        let body = br#"{"id":"x","choices":[{"message":{"content":"\"usage\":{\"prompt_tokens\":9}"}}],
            "usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;
        let answer = scan_answer(body).unwrap();
        assert_eq!(answer.usage, Some(Usage { tokens_in: 3, tokens_out: 4, is_suspect: false }));
        assert!(answer.has_choices_or_data && !answer.has_error);
        let answer = scan_answer(br#"{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}"#).unwrap();
        assert_eq!(answer.usage, Some(Usage { tokens_in: 5, tokens_out: 0, is_suspect: false }));
        assert!(answer.has_choices_or_data);
        let answer = scan_answer(br#"{"choices":null,"usage":null,"error":null}"#).unwrap();
        assert_eq!(answer, Answer::default());
    }

    #[test]
    fn a_200_with_an_error_is_told_apart() {
        for (body, message) in [
            (r#"{"error":{"code":1,"message":"no \ud83d\ude00 gpu"}}"#, Some("no 😀 gpu")),
            (r#"{"error":"plain"}"#, Some("plain")),
            (r#"{"error":{"message":7}}"#, None),
            (r#"{"error":true}"#, None),
        ] {
            let answer = scan_answer(body.as_bytes()).unwrap();
            assert!(answer.has_error, "{body}");
            assert_eq!(answer.error_message.as_deref(), message, "{body}");
        }
        let long = format!(r#"{{"error":"{}"}}"#, "é".repeat(5000));
        let message = scan_answer(long.as_bytes()).unwrap().error_message.unwrap();
        assert_eq!(message.chars().count(), MESSAGE_CHARS_MAX);
    }

    #[test]
    fn what_serde_json_refuses_in_answers_is_accepted() {
        for body in [
            &br#"{"a":"\ud800","b":1e400,"c":"\udc00\ud800"}"#[..],
            b"{\"a\":\"\xff\xfe\"}",
            b"{\"a\":\"\x01\n\"}",
            b"\xef\xbb\xbf{}",
            b" \r\n\t{ } \n",
        ] {
            scan_answer(body).unwrap();
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        scan_answer(deep.as_bytes()).unwrap();
    }

    #[test]
    fn what_is_not_an_object_is_broken() {
        for (body, at) in [
            (&b""[..], 0),
            (b"<html>", 0),
            (b"[]", 0),
            (b"{\"a\":1", 6),
            (b"{\"a\":1}}", 7),
            (b"{\"a\":}", 5),
            (b"{\"a\":\"x", 7),
            (b"{\"usage\":{\"prompt_tokens\":", 26),
            (b"{\"error\":{\"message\":\"x\"", 23),
        ] {
            assert_eq!(scan_answer(body).unwrap_err().at, at, "{body:?}");
        }
    }
}
