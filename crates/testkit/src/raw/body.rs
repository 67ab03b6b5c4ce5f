//! Taking a response's head and body out of the bytes that came in (RFC 9112), strictly.

use std::time::Instant;

use bytes::{Buf, BytesMut};
use serde_json::Value;

use crate::link::Gone;
use crate::sse::{Event, Reader};

/// A response's head.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) status: u16,
    headers: Vec<(String, String)>,
    bytes: Vec<u8>,
}

/// A response.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Fields in their order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The head's own bytes, the blank line included.
    pub head: Vec<u8>,
    /// The whole body, unframed.
    pub body: Vec<u8>,
    /// The body by pieces: HTTP chunks where it was chunked, otherwise what was there at once; each with its moment.
    pub chunks: Vec<(Instant, Vec<u8>)>,
    /// Whether the body ended as its framing says; false when the connection ended before that.
    pub is_complete: bool,
    /// When the head was there.
    pub started_at: Instant,
    /// When the body had ended.
    pub ended_at: Instant,
}

impl Response {
    pub(super) fn new(head: Head) -> Self {
        let now = Instant::now();
        Self {
            status: head.status,
            headers: head.headers,
            head: head.bytes,
            body: Vec::new(),
            chunks: Vec::new(),
            is_complete: false,
            started_at: now,
            ended_at: now,
        }
    }

    /// The first field of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }

    /// `error.code` of an error body, empty if it has none.
    #[must_use]
    pub fn error_code(&self) -> String {
        let value: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        value["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// `error.message` of a JSON error; empty when there is none.
    #[must_use]
    pub fn error_message(&self) -> String {
        let value: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        value["error"]["message"].as_str().unwrap_or_default().to_owned()
    }

    /// `choices[0].message.content` of a chat completion, empty if it has none.
    #[must_use]
    pub fn content(&self) -> String {
        let value: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        value["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned()
    }

    /// The body's events, each with the moment of the piece that completed it.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        let mut reader = Reader::default();
        self.chunks.iter().flat_map(|(at, piece)| reader.push(piece, *at)).collect()
    }

    /// Whether each piece of the body holds whole events only.
    #[must_use]
    pub fn chunks_hold_whole_events(&self) -> bool {
        self.chunks.iter().all(|(at, piece)| {
            let mut reader = Reader::default();
            reader.push(piece, *at);
            reader.rest().is_empty()
        })
    }
}

#[derive(Clone, Copy, Debug)]
enum Framing {
    /// Bytes left.
    Length(u64),
    Chunked,
    /// Until the connection ends.
    Close,
}

/// Where in a body the reader is.
#[derive(Debug)]
pub(super) struct Body {
    framing: Framing,
    is_complete: bool,
    is_cut: bool,
}

impl Default for Body {
    fn default() -> Self {
        Self { framing: Framing::Length(0), is_complete: true, is_cut: false }
    }
}

impl Head {
    /// Takes a head off the front of `inbox` when it is whole.
    pub(super) fn take(inbox: &mut BytesMut) -> Result<Option<Self>, String> {
        let Some(length) = find(inbox, b"\r\n\r\n").map(|at| at + 4) else { return Ok(None) };
        let bytes: Vec<u8> = inbox.split_to(length).to_vec();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let mut lines = text.split("\r\n");
        let start = lines.next().unwrap_or_default();
        let status = start.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
        let Some(status) = status else { return Err(format!("not a status line: {start:?}")) };
        let mut headers = Vec::new();
        for line in lines.filter(|line| !line.is_empty()) {
            let Some((name, value)) = line.split_once(':') else { return Err(format!("not a field: {line:?}")) };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Ok(Some(Self { status, headers, bytes }))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl Body {
    /// What the head says of the body (RFC 9112, 6.3).
    pub(super) fn of(head: &Head) -> Self {
        let framing = if matches!(head.status, 101 | 204 | 304) {
            Framing::Length(0)
        } else if head.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            Framing::Chunked
        } else if let Some(length) = head.header("content-length").and_then(|value| value.parse().ok()) {
            Framing::Length(length)
        } else {
            Framing::Close
        };
        Self { framing, is_complete: matches!(framing, Framing::Length(0)), is_cut: false }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.is_complete
    }

    pub(super) fn has_ended(&self) -> bool {
        self.is_complete || self.is_cut
    }

    /// The connection ended: an end in order completes a body that has no other end.
    pub(super) fn cut(&mut self, gone: Gone) {
        self.is_complete |= matches!(self.framing, Framing::Close) && gone == Gone::Eof;
        self.is_cut = true;
    }

    /// Takes the next piece, never an empty one.
    pub(super) fn take(&mut self, inbox: &mut BytesMut) -> Result<Option<Vec<u8>>, String> {
        if self.is_complete || inbox.is_empty() {
            return Ok(None);
        }
        match self.framing {
            Framing::Close => Ok(Some(inbox.split().to_vec())),
            Framing::Length(left) => {
                let size = inbox.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                self.framing = Framing::Length(left - size as u64);
                self.is_complete = left == size as u64;
                Ok(Some(inbox.split_to(size).to_vec()))
            }
            Framing::Chunked => self.take_chunk(inbox),
        }
    }

    fn take_chunk(&mut self, inbox: &mut BytesMut) -> Result<Option<Vec<u8>>, String> {
        let Some(line_end) = find(inbox, b"\r\n") else { return Ok(None) };
        let line = String::from_utf8_lossy(&inbox[..line_end]).into_owned();
        let digits = line.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(digits, 16).map_err(|_| format!("not a chunk's size: {line:?}"))?;
        let start = line_end + 2;
        if size == 0 {
            // Trailer fields, if any, end with a blank line; the size line's own end is the start of "\r\n\r\n".
            let Some(end) = find(&inbox[line_end..], b"\r\n\r\n") else { return Ok(None) };
            inbox.advance(line_end + end + 4);
            self.is_complete = true;
            return Ok(None);
        }
        if inbox.len() < start + size + 2 {
            return Ok(None);
        }
        if &inbox[start + size..start + size + 2] != b"\r\n" {
            return Err(format!("a chunk of {size} bytes does not end with CRLF"));
        }
        let piece = inbox[start..start + size].to_vec();
        inbox.advance(start + size + 2);
        Ok(Some(piece))
    }
}

/// Where `needle` starts first.
pub(crate) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> (Body, Vec<Vec<u8>>, BytesMut) {
        let mut inbox = BytesMut::from(text);
        let head = Head::take(&mut inbox).unwrap().unwrap();
        let mut body = Body::of(&head);
        let mut pieces = Vec::new();
        while let Some(piece) = body.take(&mut inbox).unwrap() {
            pieces.push(piece);
        }
        (body, pieces, inbox)
    }

    #[test]
    fn a_body_ends_where_its_framing_says() {
        let (body, pieces, rest) = all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP");
        assert!(body.is_complete() && pieces == [b"abc"] && &rest[..] == b"HTTP");
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\nt: 1\r\n\r\nHTTP";
        let (body, pieces, rest) = all(chunked);
        assert!(body.is_complete() && pieces.concat() == b"abc" && pieces.len() == 2 && &rest[..] == b"HTTP");
    }

    #[test]
    fn a_cut_body_is_not_complete() {
        let (mut body, pieces, _) = all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n");
        body.cut(Gone::Eof);
        assert!(!body.is_complete() && body.has_ended() && pieces.len() == 1);
        let (mut body, _, _) = all(b"HTTP/1.1 200 OK\r\n\r\nabc");
        body.cut(Gone::Eof);
        assert!(body.is_complete());
    }
}
