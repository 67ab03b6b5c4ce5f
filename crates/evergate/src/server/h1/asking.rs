//! The head of a request.

use std::io;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};
use evergate_core::chunked::Chunks;
use evergate_core::head::{self, Framing};
use evergate_core::{Error, Fault};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, Uri, Version};
use http_body::Body;
use hyper::service::Service;

use super::incoming::H1Body;
use super::{Connection, Reading};
use crate::http::incoming::Incoming;
use crate::server::client_io::{Filled, late_head};
use crate::server::shared::Refused;

/// Fields that most requests have at most.
const FIELDS: usize = 12;

/// What the answer has to know of its request. The default is that of one which is refused.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    pub(super) is_http_1_0: bool,
    /// `HEAD`: the answer has no content.
    pub(super) is_head: bool,
    /// Whether the connection goes on behind its answer, as far as is known.
    pub(super) is_kept: bool,
    /// Whether it waits for a 100, which it has not got.
    pub(super) expects_continue: bool,
}

/// What came of waiting for a head.
pub(super) enum Came {
    Request(Box<Request<Incoming>>),
    Refused(Refused),
    /// No head yet, or none at all.
    Filled(Filled),
}

impl<S, B> Connection<S, B>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: Unpin,
    B: Body<Data = Bytes> + Unpin,
{
    /// Waits for a head, under the limits of heads and of idling.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Came>> {
        if self.io.is_late {
            return Poll::Ready(Ok(self.refuse(late_head(), &self.io.raw)));
        }
        if !self.io.raw.is_empty() {
            if let Some(came) = self.take_head() {
                return Poll::Ready(Ok(came));
            }
            return self.io.poll_fill(cx).map_ok(Came::Filled);
        }
        // A buffer is for what does not come whole.
        self.io.raw = BytesMut::new();
        let limit = self.io.limits.head.bytes;
        let read = self.io.poll_piece(cx, |io, bytes| {
            if bytes.is_empty() {
                return Err(Filled::End);
            }
            // An empty line is counted on the long way.
            let is_plain = bytes.first() != Some(&b'\r');
            let length = head::complete(bytes, 0).filter(|length| is_plain && *length <= limit);
            length.map(|length| (BytesMut::from(bytes), length)).ok_or_else(|| {
                io.keep(bytes);
                Filled::Bytes
            })
        });
        let Poll::Ready(read) = read else { return self.io.poll_limits(cx).map(|filled| Ok(Came::Filled(filled))) };
        Poll::Ready(Ok(match read? {
            Ok((bytes, length)) => self.begin(bytes, length),
            Err(filled) => Came::Filled(filled),
        }))
    }

    /// What is made of `raw`, if that is enough.
    fn take_head(&mut self) -> Option<Came> {
        self.skip_blank();
        let limits = self.io.limits.head;
        let Some(length) = head::complete(&self.io.raw, self.searched) else {
            self.searched = self.io.raw.len();
            let is_large = self.io.raw.len() > limits.bytes;
            return is_large.then(|| self.refuse(limits.too_large(), &self.io.raw));
        };
        if length > limits.bytes {
            return Some(self.refuse(limits.too_large(), &self.io.raw));
        }
        let bytes = std::mem::take(&mut self.io.raw);
        Some(self.begin(bytes, length))
    }

    /// Throws away empty lines before a head (RFC 9112, 2.2): who sends one behind a body and then nothing is idle, and has
    /// begun no request. No more of them than a head may have bytes.
    fn skip_blank(&mut self) {
        let io = &mut self.io;
        while io.raw.starts_with(b"\r\n") && self.blank < io.limits.head.bytes {
            io.raw.advance(2);
            self.blank += 2;
            self.searched = 0;
        }
        if io.raw.is_empty() {
            io.head_since = None;
        }
    }

    fn refuse(&self, error: Error, head: &[u8]) -> Came {
        let since = self.io.head_since.unwrap_or_else(Instant::now).max(self.io.active_at);
        Came::Refused(Refused::of(error, head, since))
    }

    /// Makes a request of bytes whose first `length` are a head.
    fn begin(&mut self, mut bytes: BytesMut, length: usize) -> Came {
        let head = bytes.split_to(length).freeze();
        (self.searched, self.blank) = (0, 0);
        let (mut request, framing) = match self.parse(&head) {
            Ok(parsed) => parsed,
            Err(error) => return self.refuse(error, &head),
        };
        self.asked.expects_continue &= bytes.is_empty();
        let (body, inbox) = match framing {
            Framing::Length(length) => {
                let here = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
                let first = bytes.split_to(here).freeze();
                match length - here as u64 {
                    0 => (H1Body::whole(first), None),
                    left => {
                        self.reading = Reading::Body(left);
                        H1Body::begun(first, Some(left))
                    }
                }
            }
            Framing::Chunked => {
                self.reading = Reading::Chunked(Chunks::default());
                H1Body::begun(Bytes::new(), None)
            }
        };
        (*request.body_mut(), self.inbox) = (Incoming::H1(body), inbox);
        self.io.head_since = (!bytes.is_empty()).then(Instant::now);
        if !bytes.is_empty() {
            self.io.raw = bytes;
        }
        Came::Request(request)
    }

    fn parse(&mut self, bytes: &Bytes) -> Result<(Box<Request<Incoming>>, Framing), Error> {
        let mut headers = HeaderMap::with_capacity(FIELDS);
        let mut is_good = true;
        let head = head::read(bytes, &self.io.limits.head, |name, value| {
            let value = HeaderValue::from_maybe_shared(bytes.slice_ref(value));
            match (HeaderName::from_bytes(name), value) {
                (Ok(name), Ok(value)) => is_good &= headers.try_append(name, value).is_ok(),
                _ => is_good = false,
            }
        })?;
        // `head` has refused what these do.
        let wrong = |what: &'static str| Error::new(Fault::MalformedRequest, what);
        if !is_good {
            return Err(wrong("a header field cannot be read"));
        }
        let method = Method::from_bytes(head.method).map_err(|_| wrong("the request method is not a token"))?;
        let target = Uri::from_maybe_shared(bytes.slice_ref(head.target));
        let mut request = Box::new(Request::new(Incoming::H1(H1Body::default())));
        *request.uri_mut() = target.map_err(|_| wrong("the request target cannot be read"))?;
        *request.version_mut() = if head.is_http_1_0 { Version::HTTP_10 } else { Version::HTTP_11 };
        *request.headers_mut() = headers;
        self.asked = Asked {
            is_http_1_0: head.is_http_1_0,
            is_head: method == Method::HEAD,
            is_kept: head.is_kept,
            expects_continue: head.expects_continue,
        };
        *request.method_mut() = method;
        Ok((request, head.framing))
    }
}
