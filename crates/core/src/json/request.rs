//! A client's request: what decides where it goes, read without building a tree and checked to its last byte.
//!
//! Holds INV-BYTES-1 (ARCHITECTURE.md).

use std::ops::Range;

use super::escape::{inner, unescape};
use super::plain::{Kinds, kinds};
use super::scan::{Key, Scanner, Stop};
use crate::error::{Error, Fault};

/// Keys that decide where a request goes and what it may cost. Doubled, an upstream could read another value than we.
const ROUTING: [&str; 7] = ["model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "best_of"];

/// How far a request may go.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most nested objects and arrays, the outermost counted.
    pub depth: u32,
    /// Most answers to one request (`n`, `best_of`).
    pub choices: u32,
}

/// What the gateway reads of a request; the rest stays bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The model's name, unescaped, never empty.
    pub model: String,
    /// Where the model's JSON string stands in the body, quotes included.
    pub model_span: Range<usize>,
    /// `stream` is true.
    pub is_stream: bool,
    /// `stream_options.include_usage` is true.
    pub wants_usage: bool,
}

/// Reads a request body, which must be one JSON object (RFC 8259), in UTF-8 throughout and without a byte order mark.
///
/// # Errors
/// `InvalidJson` with the byte offset and what was expected there, never with the content. `InvalidValue` with its
/// param: a doubled routing key, a `model` that is missing, empty or no string, a `stream` that is neither boolean nor
/// null, an `n` or `best_of` beyond the limit or no number.
pub fn scan_request(body: &[u8], limits: &Limits) -> Result<Request, Error> {
    let kinds = check_text(body)?;
    let mut found = Found { choices: limits.choices, ..Found::default() };
    let mut scanner = Scanner::strict(body, limits.depth, kinds.has_control);
    scanner.space();
    let walked = scanner.members(|scanner, key| found.member(scanner, key)).and_then(|()| Ok(scanner.end()?));
    match walked {
        Ok(()) => found.request(),
        Err(Halt::Refused(error)) => Err(*error),
        Err(Halt::Stop(Stop::Broken(broken))) => Err(invalid(format!(
            "the request body is not valid JSON: expected {} at byte {}",
            broken.expected, broken.at
        ))),
        Err(Halt::Stop(Stop::TooDeep { at })) => Err(invalid(format!(
            "the request body is nested too deeply: more than {} levels at byte {at}",
            limits.depth
        ))),
    }
}

/// Copies `body` with the bytes at `span`, a JSON string as `scan_request` found it, replaced by `model` as a JSON
/// string. All other bytes stay as they are.
#[must_use]
pub fn splice(body: &[u8], span: Range<usize>, model: &str) -> Vec<u8> {
    let mut string = String::with_capacity(model.len() + 2);
    super::write_string(&mut string, model);
    let mut out = Vec::with_capacity(body.len() + string.len());
    out.extend_from_slice(body.get(..span.start).unwrap_or_default());
    out.extend_from_slice(string.as_bytes());
    out.extend_from_slice(body.get(span.end..).unwrap_or_default());
    out
}

fn check_text(body: &[u8]) -> Result<Kinds, Error> {
    if body.is_empty() {
        return Err(Error::new(Fault::InvalidJson, "the request body is empty; send a JSON object"));
    }
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err(invalid("the request body begins with a byte order mark; send JSON without one (byte 0)"));
    }
    let kinds = kinds(body);
    if kinds.is_ascii {
        return Ok(kinds);
    }
    match std::str::from_utf8(body) {
        Ok(_) => Ok(kinds),
        Err(error) => Err(invalid(format!("the request body is not valid UTF-8 at byte {}", error.valid_up_to()))),
    }
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(Fault::InvalidJson, message)
}

/// Why a request is not taken. Boxed because the way through is the one that has to be fast.
enum Halt {
    Stop(Stop),
    Refused(Box<Error>),
}

impl From<Stop> for Halt {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

fn refused(param: &'static str, message: impl Into<std::borrow::Cow<'static, str>>) -> Halt {
    Halt::Refused(Box::new(Error::new(Fault::InvalidValue, message).param(param)))
}

/// What has been met so far.
#[derive(Default)]
struct Found {
    /// The limit.
    choices: u32,
    seen: [bool; ROUTING.len()],
    model_span: Option<Range<usize>>,
    model: String,
    is_stream: bool,
    wants_usage: bool,
}

impl Found {
    fn member(&mut self, scanner: &mut Scanner<'_>, key: Key) -> Result<(), Halt> {
        let name = scanner.name(key);
        // Most keys are told apart by their length alone.
        let is_it = |routing: &str| routing.len() == name.len() && routing.as_bytes() == &*name;
        let known = ROUTING.iter().zip(&mut self.seen).find(|(routing, _)| is_it(routing));
        let Some((routing, seen)) = known else {
            scanner.skip_value()?;
            return Ok(());
        };
        if *seen {
            return Err(refused(routing, format!("the key '{routing}' stands more than once in the request body")));
        }
        *seen = true;
        match *routing {
            "model" => self.model(scanner),
            "stream" => self.stream(scanner),
            "stream_options" => self.stream_options(scanner),
            "n" | "best_of" => self.choices(scanner, routing),
            _ => Ok(scanner.skip_value().map(|_| ())?),
        }
    }

    fn model(&mut self, scanner: &mut Scanner<'_>) -> Result<(), Halt> {
        let span = scanner.skip_value()?;
        let value = scanner.slice(span.clone());
        if !value.starts_with(b"\"") {
            return Err(refused("model", "the model parameter must be a string"));
        }
        self.model = unescape(inner(value));
        if self.model.is_empty() {
            return Err(refused("model", "the model parameter must not be empty"));
        }
        self.model_span = Some(span);
        Ok(())
    }

    fn stream(&mut self, scanner: &mut Scanner<'_>) -> Result<(), Halt> {
        let span = scanner.skip_value()?;
        self.is_stream = match scanner.slice(span) {
            b"true" => true,
            b"false" | b"null" => false,
            _ => return Err(refused("stream", "the stream parameter must be true or false")),
        };
        Ok(())
    }

    /// Model servers hold memory for every answer they are asked for, and some have no limit (CVE-2026-34756). They take
    /// a float or a text for a whole number too; a small or negative one is theirs to judge.
    fn choices(&self, scanner: &mut Scanner<'_>, key: &'static str) -> Result<(), Halt> {
        let span = scanner.skip_value()?;
        let value = scanner.slice(span);
        if value == b"null" {
            return Ok(());
        }
        let number = std::str::from_utf8(value).ok().and_then(|text| text.parse::<f64>().ok());
        let number = number.ok_or_else(|| refused(key, format!("the {key} parameter must be a number")))?;
        if number > f64::from(self.choices) {
            let message = format!("the {key} parameter must be at most {} (limits.choices)", self.choices);
            return Err(refused(key, message));
        }
        Ok(())
    }

    /// Anything but an object is left to the upstream to judge.
    fn stream_options(&mut self, scanner: &mut Scanner<'_>) -> Result<(), Halt> {
        if scanner.peek() != Some(b'{') {
            scanner.skip_value()?;
            return Ok(());
        }
        scanner.members(|scanner, key| {
            let is_usage = *scanner.name(key) == *b"include_usage";
            let span = scanner.skip_value()?;
            if is_usage {
                self.wants_usage = scanner.slice(span) == b"true";
            }
            Ok(())
        })
    }

    fn request(self) -> Result<Request, Error> {
        let Some(model_span) = self.model_span else {
            return Err(Error::new(Fault::InvalidValue, "you must provide a model parameter").param("model"));
        };
        let Self { model, is_stream, wants_usage, .. } = self;
        Ok(Request { model, model_span, is_stream, wants_usage })
    }
}

#[cfg(test)]
mod tests;
