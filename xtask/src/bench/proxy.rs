//! The bare hyper proxy Evergate is measured against: reads the model's name out of the body, forwards, streams back.
//!
//! What it leaves out is what a gateway is for: no limits, timers, errors, records, metrics, supervision. One thread,
//! kept-alive upstream connections, Evergate's allocator.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Sender = SendRequest<Full<Bytes>>;

/// Idle upstream connections.
struct Pool {
    upstream: SocketAddr,
    idle: RefCell<Vec<Sender>>,
}

impl Pool {
    async fn take(&self) -> Result<Sender, Failure> {
        loop {
            // Bound first: the borrow must be over before the await.
            let kept = self.idle.borrow_mut().pop();
            let Some(mut sender) = kept else { break };
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(self.upstream).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::task::spawn_local(connection);
        Ok(sender)
    }
}

/// The answer's body, which gives its connection back when it has been read to the end.
struct Answer {
    body: Incoming,
    sender: Option<Sender>,
    pool: Rc<Pool>,
}

impl Answer {
    fn give_back(&mut self) {
        self.pool.idle.borrow_mut().extend(self.sender.take());
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.give_back();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The one thing a gateway must read.
#[derive(serde::Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    model: std::borrow::Cow<'a, str>,
}

async fn forward(pool: Rc<Pool>, request: Request<Incoming>) -> Result<Response<Answer>, Failure> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let parsed: Head<'_> = serde_json::from_slice(&body)?;
    if parsed.model.is_empty() {
        return Err("no model".into());
    }
    let mut sender = pool.take().await?;
    let mut request = Request::post(head.uri.path()).header(HOST, pool.upstream.to_string());
    if let Some(kind) = head.headers.get(CONTENT_TYPE) {
        request = request.header(CONTENT_TYPE, kind);
    }
    let (mut head, body) = sender.send_request(request.body(Full::new(body))?).await?.into_parts();
    head.headers.remove(hyper::header::CONNECTION);
    Ok(Response::from_parts(head, Answer { body, sender: Some(sender), pool }))
}

/// Serves until the process is ended; prints its address first.
pub async fn serve(upstream: SocketAddr) -> Result<(), String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| format!("proxy: bind: {error}"))?;
    super::announce(&listener)?;
    let pool = Rc::new(Pool { upstream, idle: RefCell::default() });
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let pool = Rc::clone(&pool);
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request| forward(Rc::clone(&pool), request));
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
