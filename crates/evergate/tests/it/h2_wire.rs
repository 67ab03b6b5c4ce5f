//! An HTTP/2 client made of frames, so that a test decides what is acknowledged and when (RFC 9113).

use std::sync::Arc;
use std::time::{Duration, Instant};

use evergate_testkit::Evergate;
use evergate_testkit::link::{Gone, Link, Wait};
use evergate_testkit::raw::chat_body;
use serde_json::Value;

use crate::support::{CHAT, LIMIT};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RESET: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
/// END_STREAM, and ACK where a frame has that.
pub const END: u8 = 1;
const END_HEADERS: u8 = 4;
/// The highest stream id: "no stream is refused yet".
pub const ALL: u32 = (1 << 31) - 1;

/// One frame as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The last stream of a GOAWAY, which must be without an error.
    #[track_caller]
    pub fn goaway(&self) -> u32 {
        assert_eq!(self.payload[4..8], [0; 4], "an error in GOAWAY");
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }
}

/// A connection after its preface and settings.
pub struct Wire {
    pub link: Link,
}

impl Wire {
    pub fn connect(gateway: &Evergate) -> Self {
        Self::over(Link::connect(&gateway.addr()).unwrap())
    }

    /// For whoever counts refused connects.
    pub fn try_connect(address: &str) -> std::io::Result<Self> {
        Link::connect(address).map(Self::over)
    }

    /// Agreed on by ALPN; the gateway's preface is what it waits for.
    pub fn connect_tls(gateway: &Evergate, config: &Arc<rustls::ClientConfig>) -> Self {
        Self::over(Link::connect(&gateway.addr()).unwrap().start_tls(config))
    }

    fn over(link: Link) -> Self {
        let mut wire = Self { link };
        wire.link.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        wire.send(SETTINGS, 0, 0, &[]);
        wire
    }

    pub fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        // A peer that has closed is seen at the next read.
        let _ = self.link.write_all(&frame);
    }

    /// Asks for `/healthz`.
    pub fn get(&mut self, stream: u32) {
        self.ask(stream, END, "GET", "/healthz");
    }

    /// Sends the head of a request; whether a body follows is in `flags`.
    pub fn ask(&mut self, stream: u32, flags: u8, method: &str, path: &str) {
        // HPACK (RFC 7541, appendix A): ":scheme http" is entry 6; the rest is literal.
        let mut head = vec![0x86];
        literal(&mut head, &[0x02], method);
        literal(&mut head, &[0x04], path);
        literal(&mut head, &[0x01], "localhost");
        self.send(HEADERS, flags | END_HEADERS, stream, &head);
    }

    /// Asks for a chat stream.
    pub fn post(&mut self, stream: u32, model: &str) {
        self.post_body(stream, &chat_body(model, true, &Value::Null));
    }

    /// Sends a chat request.
    pub fn post_body(&mut self, stream: u32, body: &str) {
        self.post_as(stream, "h2", body);
    }

    /// Sends a chat request with that id.
    pub fn post_as(&mut self, stream: u32, id: &str, body: &str) {
        let mut head = vec![0x83, 0x86];
        literal(&mut head, &[0x04], CHAT);
        literal(&mut head, &[0x01], "localhost");
        // "content-type" is entry 31, which needs a second byte.
        literal(&mut head, &[0x0f, 31 - 15], "application/json");
        head.push(0);
        literal(&mut head, &[], "x-request-id");
        literal(&mut head, &[], id);
        self.send(HEADERS, END_HEADERS, stream, &head);
        self.send(DATA, END, stream, body.as_bytes());
    }

    /// Sets the window that a stream begins with.
    pub fn set_window(&mut self, bytes: u32) {
        self.send(SETTINGS, 0, 0, &[&[0, 4], &bytes.to_be_bytes()[..]].concat());
    }

    /// Opens a stream's window.
    pub fn open_window(&mut self, stream: u32, bytes: u32) {
        self.send(WINDOW_UPDATE, 0, stream, &bytes.to_be_bytes());
    }

    /// The next frame, with settings acknowledged and left out; `None` at the connection's end.
    #[track_caller]
    pub fn next(&mut self) -> Option<Frame> {
        match self.next_within(LIMIT) {
            Ok(frame) => frame,
            Err(why) => panic!("no frame: {why}"),
        }
    }

    /// As `next`, or why there is none: the limit was over first, or the connection was reset.
    pub fn next_within(&mut self, limit: Duration) -> Result<Option<Frame>, String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(frame) = self.take() {
                if frame.kind == SETTINGS && frame.flags & END == 0 {
                    self.send(SETTINGS, END, 0, &[]);
                }
                if !matches!(frame.kind, SETTINGS | WINDOW_UPDATE) {
                    return Ok(Some(frame));
                }
                continue;
            }
            match self.link.wait(end) {
                Wait::Data => {}
                Wait::Gone(Gone::Eof) => return Ok(None),
                Wait::Gone(gone) => return Err(format!("{gone:?}")),
                Wait::Time => return Err(format!("nothing for {limit:?}")),
            }
        }
    }

    /// As `next_within`, for a connection that may be reset: that is an end too.
    pub fn next_or_gone(&mut self, limit: Duration) -> Result<Option<Frame>, Duration> {
        let end = Instant::now() + limit;
        loop {
            if let Some(frame) = self.take() {
                return Ok(Some(frame));
            }
            match self.link.wait(end) {
                Wait::Data => {}
                Wait::Gone(_) => return Ok(None),
                Wait::Time => return Err(limit),
            }
        }
    }

    fn take(&mut self) -> Option<Frame> {
        let inbox = &mut self.link.inbox;
        let length =
            usize::from(*inbox.first()?) << 16 | usize::from(*inbox.get(1)?) << 8 | usize::from(*inbox.get(2)?);
        if inbox.len() < 9 + length {
            return None;
        }
        let bytes = inbox.split_to(9 + length);
        let stream = u32::from_be_bytes(bytes[5..9].try_into().unwrap());
        Some(Frame { kind: bytes[3], flags: bytes[4], stream, payload: bytes[9..].to_vec() })
    }

    /// The last stream of a GOAWAY without an error, which must be the next frame but for those of streams.
    #[track_caller]
    pub fn goaway(&mut self) -> u32 {
        self.skip_to(GOAWAY).goaway()
    }

    /// The next frame of that kind; frames of streams before it are dropped.
    #[track_caller]
    pub fn skip_to(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.next().expect("not the end");
            if frame.kind == kind {
                return frame;
            }
            assert!(matches!(frame.kind, DATA | HEADERS), "{frame:?}");
        }
    }

    /// As `goaway`, behind whatever PING asks whether the client is still there.
    #[track_caller]
    pub fn skip_to_goaway(&mut self) -> u32 {
        loop {
            let frame = self.next().expect("not the end");
            if frame.kind == GOAWAY {
                return frame.goaway();
            }
            assert_eq!(frame.kind, PING, "{frame:?}");
            self.send(PING, END, 0, &frame.payload);
        }
    }

    /// Acknowledges the PING that comes next.
    #[track_caller]
    pub fn pong(&mut self) {
        let ping = self.skip_to(PING);
        self.send(PING, END, 0, &ping.payload);
    }

    /// Reads until a stream's end: whether it began with status 200, and its body. Other streams' frames are dropped.
    #[track_caller]
    pub fn answer(&mut self, stream: u32) -> (bool, String) {
        let (mut is_ok, mut body) = (false, Vec::new());
        loop {
            let frame = self.next().expect("not the end");
            if frame.stream != stream {
                continue;
            }
            match frame.kind {
                // ":status 200" is entry 8.
                HEADERS => is_ok = frame.payload[0] == 0x88,
                DATA => body.extend(&frame.payload),
                _ => panic!("{frame:?}"),
            }
            if frame.flags & END != 0 {
                return (is_ok, String::from_utf8(body).unwrap());
            }
        }
    }

    /// Nothing but the end comes, in order and without a reset.
    #[track_caller]
    pub fn assert_ends(&mut self) {
        assert_eq!(self.next(), None);
        assert!(!self.link.was_reset());
    }
}

/// Of up to 126 bytes.
fn literal(head: &mut Vec<u8>, name: &[u8], value: &str) {
    head.extend(name);
    head.push(value.len() as u8);
    head.extend(value.as_bytes());
}
