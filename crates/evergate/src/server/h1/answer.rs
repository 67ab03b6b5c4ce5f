//! Bytes of answers on their way to the client.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use evergate_core::digits::{push_decimal_bytes, push_hex_bytes};
use http::StatusCode;
use http::header::{CONNECTION, HeaderMap};
use http::response::Parts;

use super::asking::Asked;
use crate::server::client_io::ClientIo;

/// Up to here a piece is copied, so that it goes with its head or its framing in one part.
const COPIED_BYTES_MAX: usize = 4 * 1024;
/// So many bytes are written before more is taken.
const FULL_BYTES: usize = 16 * 1024;
/// Of an answer's head.
const HEAD_BYTES: usize = 512;
/// What a connection keeps for the next piece.
const KEPT_BYTES_MAX: usize = 1024;

/// How an answer's content is framed (RFC 9112, 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    /// It has none.
    Nothing,
    /// `Content-Length`, and how much of it is still to come.
    Length(u64),
    Chunked,
    /// By the end of the connection, for a client of HTTP/1.0.
    Close,
}

/// What is to be written.
#[derive(Debug, Default)]
pub(super) struct Out {
    /// Goes first ...
    bytes: Vec<u8>,
    /// ... then this, which is not worth a copy ...
    data: Bytes,
    /// ... and this.
    tail: &'static [u8],
    /// Bytes of all three that have gone.
    sent: usize,
    is_due: bool,
}

impl Out {
    /// Whether there is something to be written, or to be flushed.
    pub(super) fn is_due(&self) -> bool {
        self.is_due
    }

    /// Whether it has to be written before more is taken.
    pub(super) fn is_full(&self) -> bool {
        !self.data.is_empty() || self.bytes.len() >= FULL_BYTES
    }

    /// Adds bytes as they are.
    pub(super) fn say(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.is_due = true;
    }

    /// Adds a head, with what the framing and the connection ask for: `length` is the content's, where it is known. What the
    /// answer says of the connection ends it, if that is so.
    pub(super) fn begin(&mut self, head: &Parts, length: Option<u64>, asked: &mut Asked) -> Coding {
        let has_content = !matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let coding = match length {
            _ if !has_content => Coding::Nothing,
            Some(length) => Coding::Length(length),
            None if asked.is_http_1_0 => Coding::Close,
            None => Coding::Chunked,
        };
        asked.is_kept &= coding != Coding::Close && !says_close(&head.headers);
        self.bytes.reserve(HEAD_BYTES);
        self.status(head.status, asked.is_http_1_0);
        for (name, value) in &head.headers {
            if name != CONNECTION {
                self.field(name.as_str().as_bytes(), value.as_bytes());
            }
        }
        match coding {
            Coding::Length(length) => {
                self.bytes.extend_from_slice(b"content-length: ");
                push_decimal_bytes(&mut self.bytes, length);
                self.bytes.extend_from_slice(b"\r\n");
            }
            Coding::Chunked => self.field(b"transfer-encoding", b"chunked"),
            Coding::Nothing | Coding::Close => {}
        }
        match (asked.is_kept, asked.is_http_1_0) {
            (false, _) => self.field(b"connection", b"close"),
            (true, true) => self.field(b"connection", b"keep-alive"),
            (true, false) => {}
        }
        self.field(b"date", &date());
        self.say(b"\r\n");
        if asked.is_head { Coding::Nothing } else { coding }
    }

    fn status(&mut self, status: StatusCode, is_http_1_0: bool) {
        // Who knows 1.0 only is spoken to in it.
        self.bytes.extend_from_slice(if is_http_1_0 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
        self.bytes.extend_from_slice(status.as_str().as_bytes());
        self.bytes.push(b' ');
        self.bytes.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
        self.bytes.extend_from_slice(b"\r\n");
    }

    fn field(&mut self, name: &[u8], value: &[u8]) {
        for part in [name, b": ", value, b"\r\n"] {
            self.bytes.extend_from_slice(part);
        }
    }

    /// Adds a piece of the content; not what is more than was promised, which it says.
    pub(super) fn push(&mut self, data: Bytes, coding: &mut Coding) -> bool {
        self.is_due = true;
        // A chunk of no bytes is the last one.
        if data.is_empty() {
            return true;
        }
        let is_chunked = *coding == Coding::Chunked;
        match coding {
            Coding::Length(left) => match left.checked_sub(data.len() as u64) {
                Some(rest) => *left = rest,
                None => return false,
            },
            Coding::Chunked => {
                push_hex_bytes(&mut self.bytes, data.len() as u64);
                self.bytes.extend_from_slice(b"\r\n");
            }
            Coding::Nothing | Coding::Close => {}
        }
        let end: &'static [u8] = if is_chunked { b"\r\n" } else { b"" };
        if data.len() <= COPIED_BYTES_MAX {
            self.bytes.extend_from_slice(&data);
            self.bytes.extend_from_slice(end);
        } else {
            (self.data, self.tail) = (data, end);
        }
        true
    }

    /// Adds the end of the content; says whether all came that was promised.
    pub(super) fn end(&mut self, coding: Coding) -> bool {
        self.is_due = true;
        if coding == Coding::Chunked && self.data.is_empty() {
            self.bytes.extend_from_slice(b"0\r\n\r\n");
        } else if coding == Coding::Chunked {
            self.tail = b"\r\n0\r\n\r\n";
        }
        !matches!(coding, Coding::Length(1..))
    }

    /// Writes what there is; ready when all of it is the kernel's.
    pub(super) fn poll_send(&mut self, io: &mut ClientIo, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let total = self.bytes.len() + self.data.len() + self.tail.len();
        while self.sent < total {
            let from = |part: usize, before: usize| part.min(self.sent.saturating_sub(before));
            let (in_bytes, in_data) = (from(self.bytes.len(), 0), from(self.data.len(), self.bytes.len()));
            let in_tail = from(self.tail.len(), self.bytes.len() + self.data.len());
            let parts = [
                IoSlice::new(self.bytes.get(in_bytes..).unwrap_or_default()),
                IoSlice::new(self.data.get(in_data..).unwrap_or_default()),
                IoSlice::new(self.tail.get(in_tail..).unwrap_or_default()),
            ];
            let written = if self.data.is_empty() {
                ready!(io.poll_parts(cx, parts.get(..1).unwrap_or_default()))?
            } else {
                ready!(io.poll_parts(cx, &parts))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        ready!(io.poll_written(cx))?;
        (self.data, self.tail, self.sent, self.is_due) = (Bytes::new(), b"", 0, false);
        if self.bytes.capacity() > KEPT_BYTES_MAX {
            self.bytes = Vec::new();
        }
        self.bytes.clear();
        Poll::Ready(Ok(()))
    }
}

fn says_close(headers: &HeaderMap) -> bool {
    headers.get(CONNECTION).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"))
}

/// The time as a field has it (RFC 9110, 5.6.7).
fn date() -> [u8; 29] {
    thread_local! {
        /// That of which second.
        static LAST: Cell<(u64, [u8; 29])> = const { Cell::new((u64::MAX, [0; 29])) };
    }
    let now = evergate_sys::unix_ms() / 1000;
    let (second, text) = LAST.get();
    if second == now {
        return text;
    }
    let text = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(now));
    let text = <[u8; 29]>::try_from(text.as_bytes()).unwrap_or([b' '; 29]);
    LAST.set((now, text));
    text
}
