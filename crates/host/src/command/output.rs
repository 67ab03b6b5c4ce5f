//! What a program wrote, as pieces of text or as an answer.

use bytes::Bytes;
use evergate_core::config::process::Output;
use evergate_core::{Error, Fault};
use serde_json::Value;

/// Longest line of a program whose lines are pieces of its answer (G17): beyond any text, and little memory.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Takes bytes as they come, and gives text as soon as it is text.
pub(crate) struct Collector {
    output: Output,
    left: u64,
    /// What is not told yet: an incomplete character or line, a line end that may be the last; or all of it.
    held: Vec<u8>,
}

/// What is left at the end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// The last piece of text.
    Text(String),
    /// A whole answer in its endpoint's shape.
    Answer(Bytes),
}

impl Collector {
    pub(crate) fn new(output: Output, bytes_max: u64) -> Self {
        Self { output, left: bytes_max, held: Vec::new() }
    }

    /// The pieces that are complete now.
    ///
    /// # Errors
    /// `AdapterProtocolError` beyond the limit of an answer or of a line.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, Error> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.left = self.left.checked_sub(length).ok_or_else(|| broken("wrote more than an answer may have"))?;
        self.held.extend_from_slice(bytes);
        match self.output {
            Output::Json => Ok(Vec::new()),
            Output::Text => Ok(self.text().into_iter().collect()),
            Output::Lines => self.lines(),
        }
    }

    /// What is left when the program has ended well.
    ///
    /// # Errors
    /// `AdapterProtocolError` for JSON that is none, or holds no answer.
    pub(crate) fn finish(self) -> Result<Piece, Error> {
        match self.output {
            Output::Json => answer(self.held),
            Output::Text => {
                let text = self.held.strip_suffix(b"\n").unwrap_or(&self.held);
                let text = text.strip_suffix(b"\r").unwrap_or(text);
                Ok(Piece::Text(String::from_utf8_lossy(text).into_owned()))
            }
            Output::Lines => Ok(Piece::Text(String::from_utf8_lossy(&self.held).into_owned())),
        }
    }

    /// All but what may still be part of a character, or of the line end that is cut off.
    fn text(&mut self) -> Option<String> {
        let end = whole_characters(&self.held);
        let told = self.held.get(..end).unwrap_or_default();
        let told = told.strip_suffix(b"\n").unwrap_or(told);
        let told = told.strip_suffix(b"\r").unwrap_or(told);
        let text = (!told.is_empty()).then(|| String::from_utf8_lossy(told).into_owned());
        let count = told.len();
        self.held.drain(..count);
        text
    }

    fn lines(&mut self) -> Result<Vec<String>, Error> {
        let mut pieces = Vec::new();
        if let Some(end) = memchr::memrchr(b'\n', &self.held) {
            let told: Vec<u8> = self.held.drain(..=end).collect();
            for line in told.split_inclusive(|byte| *byte == b'\n') {
                if line.len() > LINE_BYTES_MAX {
                    return Err(broken("wrote a line that is too long"));
                }
                pieces.push(String::from_utf8_lossy(line).into_owned());
            }
        }
        if self.held.len() > LINE_BYTES_MAX {
            return Err(broken("wrote a line that is too long"));
        }
        Ok(pieces)
    }
}

/// Where an incomplete character begins at the end of `bytes`; what is no character at all is not waited for.
fn whole_characters(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(3);
    let is_start = |byte: &u8| byte & 0b1100_0000 != 0b1000_0000;
    let last = bytes.get(tail..).unwrap_or_default().iter().rposition(is_start).map(|at| tail + at);
    let Some(last) = last else { return bytes.len() };
    match std::str::from_utf8(bytes.get(last..).unwrap_or_default()) {
        Err(error) if error.error_len().is_none() => last,
        _ => bytes.len(),
    }
}

/// An answer, or the text that is its content.
fn answer(bytes: Vec<u8>) -> Result<Piece, Error> {
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| {
        let what =
            if bytes.iter().all(u8::is_ascii_whitespace) { "ended without an answer" } else { "wrote what is no JSON" };
        broken(what).detail(error)
    })?;
    if let Value::String(text) = value {
        return Ok(Piece::Text(text));
    }
    if value.get("error").is_some_and(|error| !error.is_null()) {
        return Err(broken("wrote an error instead of an answer"));
    }
    if ["choices", "data"].iter().any(|key| value.get(key).is_some_and(Value::is_array)) {
        return Ok(Piece::Answer(bytes.into()));
    }
    match value.get("content").and_then(Value::as_str) {
        Some(content) => Ok(Piece::Text(content.to_owned())),
        None => Err(broken("wrote JSON that is neither a chat completion nor a content")),
    }
}

/// The text of a chat completion, for a client that wants it as a stream.
///
/// # Errors
/// `AdapterProtocolError` where there is none.
pub(crate) fn content_of(answer: &[u8]) -> Result<String, Error> {
    let value: Option<Value> = serde_json::from_slice(answer).ok();
    let first = value.as_ref().and_then(|value| value.get("choices")?.get(0));
    let text = first
        .and_then(|choice| choice.get("message").and_then(|message| message.get("content")).or(choice.get("text")));
    text.and_then(Value::as_str).map(str::to_owned).ok_or_else(|| broken("wrote a completion without a text"))
}

fn broken(what: &str) -> Error {
    Error::new(Fault::AdapterProtocolError, format!("the program of this model {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of it, fed in pieces of `size`.
    fn told(output: Output, bytes: &[u8], size: usize) -> (Vec<String>, Piece) {
        let mut collector = Collector::new(output, 1 << 20);
        let pieces = bytes.chunks(size).flat_map(|chunk| collector.push(chunk).unwrap()).collect();
        (pieces, collector.finish().unwrap())
    }

    #[test]
    fn g16_text_is_the_same_however_it_comes() {
        let bytes = "né 😀\r\n\nend\u{0}\r\n".as_bytes();
        for size in 1..=bytes.len() {
            let (pieces, Piece::Text(last)) = told(Output::Text, bytes, size) else { panic!() };
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{size}: {pieces:?}");
            assert_eq!(pieces.concat() + &last, "né 😀\r\n\nend\0", "{size}");
        }
    }

    #[test]
    fn g16_what_is_no_utf_8_becomes_a_sign_of_that() {
        let bytes = b"a\xffb\xf0\x9fc\xe2\x82";
        for size in 1..=bytes.len() {
            let (pieces, Piece::Text(last)) = told(Output::Text, bytes, size) else { panic!() };
            assert_eq!(pieces.concat() + &last, "a\u{fffd}b\u{fffd}c\u{fffd}", "{size}");
        }
    }

    #[test]
    fn lines_are_pieces_with_their_ends() {
        let bytes = "one\n\ntwé\r\nthree".as_bytes();
        for size in 1..=bytes.len() {
            let (pieces, last) = told(Output::Lines, bytes, size);
            assert_eq!(pieces, ["one\n", "\n", "twé\r\n"]);
            assert_eq!(last, Piece::Text("three".into()));
        }
    }

    #[test]
    fn g17_a_line_without_an_end_is_not_kept_for_ever() {
        let mut collector = Collector::new(Output::Lines, 1 << 30);
        let block = vec![b'x'; 64 << 10];
        let refused = (0..2000).find(|_| collector.push(&block).is_err()).unwrap();
        assert_eq!(refused * block.len(), LINE_BYTES_MAX);
        let mut collector = Collector::new(Output::Text, 1000);
        assert!(collector.push(&[b'x'; 1000]).is_ok());
        assert_eq!(collector.push(b"x").unwrap_err().fault, Fault::AdapterProtocolError);
    }

    #[test]
    fn json_is_an_answer_or_its_content() {
        let finish = |bytes: &[u8]| {
            let mut collector = Collector::new(Output::Json, 1 << 20);
            assert!(collector.push(bytes).unwrap().is_empty());
            collector.finish()
        };
        let whole = br#" {"choices":[{"message":{"content":"hi"}}],"x":1.0}"#;
        assert_eq!(finish(whole).unwrap(), Piece::Answer(Bytes::from_static(whole)));
        assert_eq!(content_of(whole).unwrap(), "hi");
        let vectors = br#"{"data":[{"embedding":[1]}]}"#;
        assert_eq!(finish(vectors).unwrap(), Piece::Answer(Bytes::from_static(vectors)));
        assert_eq!(finish(br#""hi \u00e9""#).unwrap(), Piece::Text("hi é".into()));
        assert_eq!(finish(br#"{"content":"hi"}"#).unwrap(), Piece::Text("hi".into()));
        for bytes in
            [&b""[..], b"\n", b"{", b"hi", b"[]", b"{}", b"7", br#"{"content":7}"#, br#"{"error":"no"}"#, b"{}{}"]
        {
            assert_eq!(finish(bytes).unwrap_err().fault, Fault::AdapterProtocolError, "{bytes:?}");
        }
    }
}
