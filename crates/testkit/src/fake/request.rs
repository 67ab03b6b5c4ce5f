//! One request as it came in.

use bytes::{Buf, BytesMut};
use serde_json::Value;

use crate::raw::find;

/// A request: its head byte for byte, its body unframed.
#[derive(Clone, Debug)]
pub struct Request {
    /// The head's own bytes, the blank line included.
    pub head: Vec<u8>,
    /// Method.
    pub method: String,
    /// Request target.
    pub target: String,
    /// Fields in their order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Request {
    /// The first field of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The credential of `authorization: Bearer`, empty if there is none.
    #[must_use]
    pub fn bearer(&self) -> &str {
        self.header("authorization").and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default()
    }

    /// The body as JSON; null if it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// `model` of the body, empty if it has none.
    #[must_use]
    pub fn model(&self) -> String {
        self.json()["model"].as_str().unwrap_or_default().to_owned()
    }

    /// Whether the body asks for a stream.
    #[must_use]
    pub fn is_stream(&self) -> bool {
        self.json()["stream"].as_bool().unwrap_or_default()
    }

    /// The target without its query.
    #[must_use]
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// Takes a request off the front of `inbox` when it is whole.
    ///
    /// # Errors
    /// One sentence when the bytes are no HTTP/1.1 request.
    pub(super) fn take(inbox: &mut BytesMut) -> Result<Option<Self>, String> {
        let Some(head_length) = find(inbox, b"\r\n\r\n").map(|at| at + 4) else { return Ok(None) };
        let head = inbox[..head_length].to_vec();
        let text = String::from_utf8_lossy(&head).into_owned();
        let mut lines = text.split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let [method, target, "HTTP/1.1"] = start.split(' ').collect::<Vec<_>>()[..] else {
            return Err(format!("not a request line: {start:?}"));
        };
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let mut request =
            Self { head, method: method.to_owned(), target: target.to_owned(), headers, body: Vec::new() };
        let Some(end) = request.read_body(inbox, head_length)? else { return Ok(None) };
        inbox.advance(end);
        Ok(Some(request))
    }

    /// Fills in the body when it is whole and returns where it ends.
    fn read_body(&mut self, inbox: &[u8], start: usize) -> Result<Option<usize>, String> {
        if self.header("transfer-encoding").is_some() {
            return self.read_chunks(inbox, start);
        }
        let length = self.header("content-length").unwrap_or("0");
        let length: usize = length.parse().map_err(|_| format!("not a content-length: {length:?}"))?;
        let Some(body) = inbox.get(start..start + length) else { return Ok(None) };
        self.body = body.to_vec();
        Ok(Some(start + length))
    }

    fn read_chunks(&mut self, inbox: &[u8], start: usize) -> Result<Option<usize>, String> {
        let (mut at, mut body) = (start, Vec::new());
        loop {
            let Some(line_length) = find(&inbox[at..], b"\r\n") else { return Ok(None) };
            let line = String::from_utf8_lossy(&inbox[at..at + line_length]).into_owned();
            let size = usize::from_str_radix(&line, 16).map_err(|_| format!("not a chunk's size: {line:?}"))?;
            at += line_length + 2;
            let Some(piece) = inbox.get(at..at + size + 2) else { return Ok(None) };
            body.extend_from_slice(&piece[..size]);
            at += size + 2;
            if size == 0 {
                self.body = body;
                return Ok(Some(at));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_taken_one_by_one_when_whole() {
        let text = "POST /v1/x?a=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}\
                    POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET";
        for size in [1, 7, text.len()] {
            let (mut inbox, mut requests) = (BytesMut::new(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                inbox.extend_from_slice(piece);
                while let Some(request) = Request::take(&mut inbox).unwrap() {
                    requests.push(request);
                }
            }
            assert_eq!(requests.len(), 2);
            assert!(requests.iter().all(|request| request.body == b"{}"));
            assert_eq!((requests[0].path(), requests[0].header("host")), ("/v1/x", Some("h")));
            assert_eq!(&inbox[..], b"GET");
        }
    }
}
