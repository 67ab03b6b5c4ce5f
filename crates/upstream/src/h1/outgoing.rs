//! A request on its way.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use tokio::io::AsyncWrite;

use crate::io::UpstreamIo;

/// Fields of a request's head, as they are sent.
#[derive(Default)]
pub struct Fields(Vec<u8>);

// A credential may be among them.
impl std::fmt::Debug for Fields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fields").finish_non_exhaustive()
    }
}

impl Fields {
    /// Adds one. Neither a name nor a value can hold the end of a line.
    pub fn push(&mut self, name: &HeaderName, value: &HeaderValue) {
        let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
        self.0.reserve(name.len() + value.len() + 4);
        for part in [name, b": ", value, b"\r\n"] {
            self.0.extend_from_slice(part);
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A request's bytes, and how many of them are the kernel's.
pub(crate) struct Outgoing {
    head: Vec<u8>,
    body: Bytes,
    sent: usize,
    is_flushed: bool,
}

// Its head holds the credential.
impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing").field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl Outgoing {
    /// `head` with its empty line.
    pub(crate) fn new(head: Vec<u8>, body: Bytes) -> Self {
        Self { head, body, sent: 0, is_flushed: false }
    }

    #[cfg(test)]
    pub(super) fn head_len(&self) -> usize {
        self.head.len()
    }

    /// Whether a byte of it may have reached the upstream.
    pub(crate) fn has_begun(&self) -> bool {
        self.sent > 0
    }

    /// Whether all of it has left this process.
    pub(crate) fn is_sent(&self) -> bool {
        self.is_flushed
    }

    /// Sends what is left.
    pub(crate) fn poll_send(&mut self, io: &mut UpstreamIo, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_flushed {
            return Poll::Ready(Ok(()));
        }
        while self.sent < self.head.len() + self.body.len() {
            let in_body = self.sent.saturating_sub(self.head.len());
            let head = self.head.get(self.sent..).unwrap_or_default();
            let body = self.body.get(in_body..).unwrap_or_default();
            // Both in one segment, if they fit, and neither is copied.
            let parts = [IoSlice::new(head), IoSlice::new(body)];
            let written = if head.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, body))?
            } else {
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &parts))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        ready!(Pin::new(io).poll_flush(cx))?;
        self.is_flushed = true;
        Poll::Ready(Ok(()))
    }
}
