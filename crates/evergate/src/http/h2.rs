//! What HTTP/2 asks of an answer beyond HTTP/1.1: the last byte of its body may have to wait for the client's window, long after
//! the library has taken it.
//!
//! The library takes a piece when there is window for a single byte of it, and asks for the next one while most of the
//! last still waits. So each piece tells when its bytes have gone, the end is given only when all have, and what has to live until
//! then goes with it: a client whose window is shut has not been answered, and its stream can still be reset.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::header::{CONTENT_LENGTH, HeaderValue};
use http::{Method, Request, Response};
use http_body::{Frame, SizeHint};

use super::body::{Body, End};
use super::incoming::Incoming;
use super::service::{Bounded, Gone, Service};
use crate::server::streams::Taken;

/// The service of an HTTP/2 connection.
#[derive(Clone, Debug)]
pub struct H2Service(pub Service);

impl hyper::service::Service<Request<hyper::body::Incoming>> for H2Service {
    type Response = Response<H2Body>;
    type Error = Gone;
    type Future = H2Bounded;

    fn call(&self, request: Request<hyper::body::Incoming>) -> H2Bounded {
        let is_head = request.method() == Method::HEAD;
        let request = request.map(Incoming::H2);
        H2Bounded { bounded: hyper::service::Service::call(&self.0, request), is_head }
    }
}

/// A handler of an HTTP/2 stream.
pub struct H2Bounded {
    bounded: Bounded,
    is_head: bool,
}

impl Future for H2Bounded {
    type Output = Result<Response<H2Body>, Gone>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = ready!(Pin::new(&mut self.bounded).poll(cx))?;
        if !self.is_head {
            return Poll::Ready(Ok(response.map(H2Body::new)));
        }
        // Of HTTP/1 the connection leaves the content out by itself (RFC 9110, 9.3.2).
        let length = HeaderValue::from(response.body().len());
        response.headers_mut().insert(CONTENT_LENGTH, length);
        Poll::Ready(Ok(response.map(H2Body::without_content)))
    }
}

/// The body of an answer on an HTTP/2 stream.
#[derive(Debug)]
pub struct H2Body {
    body: Body,
    taken: Arc<Taken>,
    is_over: bool,
}

impl H2Body {
    fn new(body: Body) -> Self {
        let taken = body.taken().unwrap_or_default();
        Self { body, taken, is_over: false }
    }

    /// The head is all of the answer.
    fn without_content(body: Body) -> Self {
        Self { is_over: true, ..Self::new(body) }
    }
}

impl http_body::Body for H2Body {
    type Data = Piece;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece>, Infallible>>> {
        let this = self.get_mut();
        if this.is_over {
            return Poll::Ready(None);
        }
        let piece = match ready!(this.body.poll_content(cx)) {
            Some(bytes) => Piece::new(bytes, &this.taken, None),
            None => {
                ready!(this.taken.poll_gone(cx));
                ready!(this.taken.poll_unread(cx));
                this.is_over = true;
                Piece::new(Bytes::new(), &this.taken, this.body.take_end())
            }
        };
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }

    fn size_hint(&self) -> SizeHint {
        http_body::Body::size_hint(&self.body)
    }
}

/// Bytes of an answer, which the library drops when the last of them is in what it writes next.
#[derive(Debug)]
pub struct Piece {
    bytes: Bytes,
    taken: Arc<Taken>,
    /// Behind the last byte.
    end: Option<End>,
}

impl Piece {
    fn new(bytes: Bytes, taken: &Arc<Taken>, end: Option<End>) -> Self {
        taken.take();
        Self { bytes, taken: Arc::clone(taken), end }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.taken.go_on();
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.taken.give_back();
        if let Some(end) = self.end.take() {
            end.finish();
        }
    }
}
