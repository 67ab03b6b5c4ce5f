//! A raw HTTP/1.1 client: sends exactly the bytes it is given and shows exactly what came back, and when.

mod ask;
mod body;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ClientConfig;

pub use ask::{chat_body, chat_request, get, get_request, post, post_chat, post_request};
pub use body::Response;

use crate::link::{Gone, Link, Wait};
use crate::sse::{Event, Reader};
pub(crate) use body::find;
use body::{Body, Head};

/// One client connection.
pub struct Raw {
    link: Link,
    body: Body,
    reader: Reader,
    events: std::collections::VecDeque<Event>,
}

impl Raw {
    /// Connects to `HOST:PORT` or `unix:PATH`.
    ///
    /// # Panics
    /// When it cannot.
    #[track_caller]
    #[must_use]
    pub fn connect(address: &str) -> Self {
        Self::try_connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}"))
    }

    /// Connects to `HOST:PORT` or `unix:PATH`.
    ///
    /// # Errors
    /// Those of `connect(2)`.
    pub fn try_connect(address: &str) -> io::Result<Self> {
        Link::connect(address).map(Self::over)
    }

    /// Connects with TLS, as `localhost`; see [`crate::Identity::client_config`].
    ///
    /// # Panics
    /// When it cannot connect; a failed handshake shows as a peer that is gone.
    #[must_use]
    pub fn connect_tls(address: &str, config: &Arc<ClientConfig>) -> Self {
        let link = Link::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        Self::over(link.start_tls(config))
    }

    fn over(link: Link) -> Self {
        Self { link, body: Body::default(), reader: Reader::default(), events: std::collections::VecDeque::new() }
    }

    /// The connection below, for what has no method here.
    pub fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    /// Sends bytes.
    ///
    /// # Panics
    /// When the peer has left.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        if let Err(gone) = self.link.write_all(bytes) {
            panic!("the peer left while a request was sent: {gone:?}; it said {:?}", lossy(&self.link.inbox));
        }
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// How the peer left; what it said before can still be read.
    pub fn try_send(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.link.write_all(bytes)
    }

    /// Reads one whole response; interim ones (1xx) are skipped. One that was cut off has `is_complete == false`.
    ///
    /// # Panics
    /// When it has not ended within `limit`, or the connection ends before a head.
    #[track_caller]
    pub fn read_response(&mut self, limit: Duration) -> Response {
        match self.try_read_response(limit) {
            Ok(response) => response,
            Err(reason) => panic!("{reason}"),
        }
    }

    /// Like [`Raw::read_response`], with the reason why there is none.
    ///
    /// # Errors
    /// One sentence: the time was up, or the connection ended before a head.
    pub fn try_read_response(&mut self, limit: Duration) -> Result<Response, String> {
        let end = Instant::now() + limit;
        let head = self.head_until(end)?;
        let mut response = Response::new(head);
        while let Some((at, piece)) = self.chunk_until(end)? {
            response.body.extend_from_slice(&piece);
            response.chunks.push((at, piece));
        }
        response.is_complete = self.body.is_complete();
        response.ended_at = Instant::now();
        Ok(response)
    }

    /// Reads a response's head only; its body follows by [`Raw::next_chunk`] or [`Raw::next_event`].
    ///
    /// # Panics
    /// When it is not there within `limit`.
    #[track_caller]
    pub fn read_head(&mut self, limit: Duration) -> Response {
        match self.head_until(Instant::now() + limit) {
            Ok(head) => Response::new(head),
            Err(reason) => panic!("{reason}"),
        }
    }

    /// The body's next piece (one HTTP chunk, or what was there at once) and when it was whole; `None` at its end.
    ///
    /// # Panics
    /// When nothing comes within `limit`.
    #[track_caller]
    pub fn next_chunk(&mut self, limit: Duration) -> Option<(Instant, Vec<u8>)> {
        match self.chunk_until(Instant::now() + limit) {
            Ok(chunk) => chunk,
            Err(reason) => panic!("{reason}"),
        }
    }

    /// The next event of a stream; `None` at the body's end.
    ///
    /// # Panics
    /// When nothing comes within `limit`.
    #[track_caller]
    pub fn next_event(&mut self, limit: Duration) -> Option<Event> {
        let end = Instant::now() + limit;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            match self.chunk_until(end) {
                Ok(Some((at, piece))) => self.events.extend(self.reader.push(&piece, at)),
                Ok(None) => return None,
                Err(reason) => panic!("{reason}"),
            }
        }
    }

    /// Whether the last body ended as its framing says, rather than by a connection that ended.
    #[must_use]
    pub fn body_is_complete(&self) -> bool {
        self.body.is_complete()
    }

    /// Reads until the peer closes: all bytes, and how it left.
    ///
    /// # Panics
    /// When it has not left within `limit`.
    #[track_caller]
    pub fn read_to_close(&mut self, limit: Duration) -> (Vec<u8>, Gone) {
        let end = Instant::now() + limit;
        loop {
            match self.link.wait(end) {
                Wait::Data => {}
                Wait::Gone(gone) => return (self.link.inbox.split().to_vec(), gone),
                Wait::Time => panic!("not closed within {limit:?}; it said {:?}", lossy(&self.link.inbox)),
            }
        }
    }

    /// Whether the peer keeps the connection open, with nothing said, for `time`.
    pub fn stays_open(&mut self, time: Duration) -> bool {
        self.link.wait(Instant::now() + time) == Wait::Time
    }

    /// Ends the sending half with FIN.
    pub fn half_close(&mut self) {
        self.link.half_close();
    }

    /// Closes in order.
    pub fn close(self) {
        self.link.close();
    }

    /// Breaks the connection with RST.
    pub fn reset(self) {
        self.link.reset();
    }

    fn head_until(&mut self, end: Instant) -> Result<Head, String> {
        loop {
            if let Some(head) = Head::take(&mut self.link.inbox)? {
                if head.status < 200 && head.status != 101 {
                    continue;
                }
                self.body = Body::of(&head);
                self.reader = Reader::default();
                self.events.clear();
                return Ok(head);
            }
            match self.link.wait(end) {
                Wait::Data => {}
                Wait::Time => return Err(format!("no response head in time; got {:?}", lossy(&self.link.inbox))),
                Wait::Gone(gone) => {
                    return Err(format!("{gone:?} before a response head; got {:?}", lossy(&self.link.inbox)));
                }
            }
        }
    }

    fn chunk_until(&mut self, end: Instant) -> Result<Option<(Instant, Vec<u8>)>, String> {
        loop {
            if let Some(piece) = self.body.take(&mut self.link.inbox)? {
                return Ok(Some((Instant::now(), piece)));
            }
            if self.body.has_ended() {
                return Ok(None);
            }
            match self.link.wait(end) {
                Wait::Data => {}
                Wait::Time => return Err(format!("the body has not ended in time; got {:?}", lossy(&self.link.inbox))),
                Wait::Gone(gone) => self.body.cut(gone),
            }
        }
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]).into_owned()
}
