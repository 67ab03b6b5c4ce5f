//! A service whose requests are dropped at a given poll.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use evergate::http::body::Body;
use evergate::http::incoming::Incoming;
use evergate::http::service::Service;
use http::{Request, Response};
use http_body::Frame;

/// How many polls a request has left, its handler's and its body's together.
#[derive(Debug)]
pub struct Polls(AtomicU32);

impl Polls {
    pub fn new(count: u32) -> Arc<Self> {
        Arc::new(Self(AtomicU32::new(count)))
    }

    /// Takes one; `false` when none is left.
    fn take(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

fn dropped() -> io::Error {
    io::Error::other("dropped by the test")
}

pub struct Cut {
    pub service: Service,
    pub polls: Arc<Polls>,
}

impl hyper::service::Service<Request<Incoming>> for Cut {
    type Response = Response<CutBody>;
    type Error = io::Error;
    type Future = CutFuture;

    fn call(&self, request: Request<Incoming>) -> CutFuture {
        let serving = hyper::service::Service::call(&self.service, request);
        CutFuture { serving: Some(Box::pin(serving)), polls: Arc::clone(&self.polls) }
    }
}

type Serving = <Service as hyper::service::Service<Request<Incoming>>>::Future;

pub struct CutFuture {
    serving: Option<Pin<Box<Serving>>>,
    polls: Arc<Polls>,
}

impl Future for CutFuture {
    type Output = Result<Response<CutBody>, io::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.polls.take() {
            self.serving = None;
            return Poll::Ready(Err(dropped()));
        }
        let serving = self.serving.as_mut().expect("not polled after its end");
        let response = std::task::ready!(serving.as_mut().poll(cx)).map_err(io::Error::other)?;
        let polls = Arc::clone(&self.polls);
        Poll::Ready(Ok(response.map(|body| CutBody { body: Some(body), polls })))
    }
}

pub struct CutBody {
    body: Option<Body>,
    polls: Arc<Polls>,
}

impl http_body::Body for CutBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if !self.polls.take() {
            self.body = None;
            return Poll::Ready(Some(Err(dropped())));
        }
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        Pin::new(body).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(|never| match never {})))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.as_ref().map(http_body::Body::size_hint).unwrap_or_default()
    }
}
