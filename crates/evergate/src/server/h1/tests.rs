use std::convert::Infallible;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use evergate_core::head::HeadLimits;
use evergate_upstream::clock::Clock;
use http::{HeaderMap, StatusCode, Version};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

use super::*;
use crate::server::client_io::IoLimits;
use crate::server::stream::Stream;

/// What the handler was given.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    method: String,
    target: String,
    is_http_1_0: bool,
    fields: Vec<(String, String)>,
    body: Result<String, String>,
}

/// A handler: does as the path says, and notes what it was given.
#[derive(Clone, Default)]
struct Handler {
    seen: Arc<Mutex<Vec<Seen>>>,
    /// Handlers and bodies of answers that there are.
    alive: Arc<AtomicU32>,
    /// Lets `/wait` go on.
    go: Arc<Notify>,
    /// What `/stream/fed` is made of.
    fed: Arc<Mutex<Option<mpsc::Receiver<Bytes>>>>,
}

struct Alive(Arc<AtomicU32>);

impl Alive {
    fn new(count: &Arc<AtomicU32>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The body of an answer; its last piece comes first here.
struct Pieces {
    pieces: Vec<Bytes>,
    is_whole: bool,
    is_endless: bool,
    /// Its end is told with its last piece.
    is_told: bool,
    fed: Option<mpsc::Receiver<Bytes>>,
    /// Bytes that are promised beyond what comes.
    lie: i64,
    _alive: Alive,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(fed) = &mut self.fed {
            return fed.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece))));
        }
        match self.pieces.pop() {
            Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            None if self.is_endless => Poll::Pending,
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_told && self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let bytes = self.pieces.iter().map(Bytes::len).sum::<usize>() as u64;
        let promised = bytes.saturating_add_signed(self.lie);
        if self.is_whole { SizeHint::with_exact(promised) } else { SizeHint::default() }
    }
}

/// `n` bytes of which each place is told from others.
fn pattern(n: usize) -> Bytes {
    (0..n).map(|at| b'a' + (at % 23) as u8).collect::<Vec<_>>().into()
}

impl Handler {
    async fn answer(self, request: Request<Incoming>) -> Result<Response<Pieces>, ()> {
        let alive = Alive::new(&self.alive);
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let body = if path == "/unread" {
            drop(body);
            Ok(String::new())
        } else {
            body.collect().await.map(|body| String::from_utf8(body.to_bytes().to_vec()).unwrap())
        };
        let text = |value: &http::HeaderValue| value.to_str().unwrap().to_owned();
        self.seen.lock().unwrap().push(Seen {
            method: head.method.to_string(),
            target: head.uri.to_string(),
            is_http_1_0: head.version == Version::HTTP_10,
            fields: head.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
            body: body.map_err(|why| format!("{why:?}")),
        });
        if path == "/wait" {
            self.go.notified().await;
        }
        let sizes: Vec<usize> = path.split('/').filter_map(|word| word.parse().ok()).collect();
        let pieces = sizes.iter().rev().map(|size| pattern(*size)).collect();
        let is_whole = !path.starts_with("/stream");
        let mut response = Response::new(Pieces {
            pieces,
            is_whole,
            is_told: path.starts_with("/stream/told"),
            is_endless: path.ends_with("/endless"),
            fed: if path == "/stream/fed" { self.fed.lock().unwrap().take() } else { None },
            lie: if path.ends_with("/more") { 3 } else { -3 * i64::from(path.ends_with("/less")) },
            _alive: alive,
        });
        if path == "/204" {
            (*response.status_mut(), response.body_mut().pieces) = (StatusCode::NO_CONTENT, Vec::new());
        }
        if head.uri.query() == Some("close") {
            response.headers_mut().insert("connection", http::HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    fn alive(&self) -> u32 {
        self.alive.load(Ordering::Relaxed)
    }
}

type Serving = Pin<Box<dyn Future<Output = Result<Response<Pieces>, ()>>>>;

impl Service<Request<Incoming>> for Handler {
    type Response = Response<Pieces>;
    type Error = ();
    type Future = Serving;

    fn call(&self, request: Request<Incoming>) -> Serving {
        Box::pin(self.clone().answer(request))
    }
}

const LIMITS: IoLimits = IoLimits {
    head: HeadLimits { bytes: 2048, fields: 20, uri_bytes: 256 },
    header_timeout: Duration::from_secs(60),
    idle_timeout: Duration::from_secs(60),
    stall_timeout: Duration::from_secs(60),
};

/// Runs a conversation against a connection; one that hangs fails.
fn talk<F: Future<Output = ()>>(conversation: impl FnOnce(UnixStream, Handler) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let handler = Handler::default();
        let io = ClientIo::new(Stream::Unix(ours), LIMITS, Clock::new().unwrap());
        let connection = Connection::new(io, handler.clone());
        let both = async { tokio::join!(connection, conversation(theirs, handler.clone())) };
        tokio::time::timeout(Duration::from_secs(20), both).await.unwrap();
        assert_eq!(handler.alive(), 0, "something of a request is left");
    });
}

/// An answer as it came.
struct Answer {
    status: u16,
    version: &'static str,
    headers: HeaderMap,
    content: Vec<u8>,
}

impl Answer {
    fn field(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// Reads one answer, taking apart its framing; nothing at the end.
async fn read_answer(client: &mut UnixStream, is_head: bool) -> Option<Answer> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        match client.read_u8().await {
            Ok(byte) => bytes.push(byte),
            Err(_) if bytes.is_empty() => return None,
            Err(error) => panic!("{error} in {}", String::from_utf8_lossy(&bytes)),
        }
    }
    let mut fields = [httparse::EMPTY_HEADER; 20];
    let mut head = httparse::Response::new(&mut fields);
    assert!(head.parse(&bytes).unwrap().is_complete());
    let mut headers = HeaderMap::new();
    for field in head.headers.iter() {
        let name = http::HeaderName::from_bytes(field.name.as_bytes()).unwrap();
        assert!(headers.insert(name, http::HeaderValue::from_bytes(field.value).unwrap()).is_none(), "{}", field.name);
    }
    assert!(httpdate::parse_http_date(headers["date"].to_str().unwrap()).is_ok());
    let mut answer = Answer {
        status: head.code.unwrap(),
        version: if head.version == Some(1) { "1.1" } else { "1.0" },
        headers,
        content: Vec::new(),
    };
    if is_head || matches!(answer.status, 204) {
        return Some(answer);
    }
    if answer.field("transfer-encoding") == "chunked" {
        loop {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                line.push(client.read_u8().await.unwrap());
            }
            let size = usize::from_str_radix(str::from_utf8(&line).unwrap().trim(), 16).unwrap();
            let mut data = vec![0; size + 2];
            client.read_exact(&mut data).await.unwrap();
            assert!(data.ends_with(b"\r\n"));
            answer.content.extend_from_slice(&data[..size]);
            if size == 0 {
                break;
            }
        }
    } else if answer.field("content-length").is_empty() {
        client.read_to_end(&mut answer.content).await.unwrap();
    } else {
        answer.content = vec![0; answer.field("content-length").parse().unwrap()];
        client.read_exact(&mut answer.content).await.unwrap();
    }
    Some(answer)
}

/// The connection has more turns than it needs for what was sent.
async fn others_run() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

async fn is_at_end(client: &mut UnixStream) -> bool {
    client.read_u8().await.is_err()
}

#[test]
fn a_request_is_the_same_however_it_is_cut() {
    let whole = b"POST /4?q=1 HTTP/1.1\r\nHost: a\r\nX-One:  two \r\nContent-Length: 11\r\n\r\nhello world";
    let chunked = b"\r\nPOST /4?q=1 HTTP/1.1\r\nHost: a\r\nX-One:  two \r\nTransfer-Encoding: chunked\r\n\r\n\
        6;x=y\r\nhello \r\n5\r\nworld\r\n0\r\nt: u\r\n\r\n";
    for (text, framing) in [(&whole[..], ("content-length", "11")), (&chunked[..], ("transfer-encoding", "chunked"))] {
        let fields = [("host", "a"), ("x-one", "two"), framing];
        let expected = Seen {
            method: "POST".into(),
            target: "/4?q=1".into(),
            is_http_1_0: false,
            fields: fields.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            body: Ok("hello world".into()),
        };
        for split in 0..text.len() {
            let expected = expected.clone();
            talk(|mut client, handler| async move {
                client.write_all(&text[..split]).await.unwrap();
                others_run().await;
                client.write_all(&text[split..]).await.unwrap();
                let answer = read_answer(&mut client, false).await.unwrap();
                assert_eq!((answer.status, answer.content), (200, pattern(4).to_vec()), "{split}");
                assert_eq!(handler.seen(), [expected], "{split}");
                drop(client);
            });
        }
    }
}

#[test]
fn what_is_sent_ahead_is_answered_in_its_turn() {
    talk(|mut client, handler| async move {
        let mut text = Vec::new();
        for number in 0..200 {
            text.extend_from_slice(format!("GET /{number} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes());
            text.extend_from_slice(b"POST /stream/3/2 HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc\r\n");
        }
        let (mut read, mut write) = client.split();
        let ask = async { write.write_all(&text).await.unwrap() };
        let hear = async {
            let mut answers = Vec::new();
            while String::from_utf8_lossy(&answers).matches("\r\n0\r\n\r\n").count() < 200 {
                let mut piece = vec![0; 999];
                let count = read.read(&mut piece).await.unwrap();
                answers.extend_from_slice(&piece[..count]);
            }
            String::from_utf8(answers).unwrap()
        };
        let (answers, ()) = tokio::join!(hear, ask);
        let lengths: Vec<usize> = answers
            .lines()
            .filter_map(|line| line.strip_prefix("content-length: ").map(|number| number.parse().unwrap()))
            .collect();
        assert!(
            lengths.iter().copied().eq(0..200),
            "{} answers, {:?}",
            lengths.len(),
            lengths.iter().enumerate().find(|(at, length)| at != *length)
        );
        assert!(handler.seen().chunks(2).all(|two| two[1].body == Ok("abc".into())));
        drop(client);
    });
}

#[test]
fn a_connection_is_kept_unless_somebody_is_against_it() {
    for (text, is_kept, says) in [
        ("GET /1 HTTP/1.1\r\nhost: a\r\n\r\n", true, ""),
        ("GET /1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", false, "close"),
        ("GET /1?close HTTP/1.1\r\nhost: a\r\n\r\n", false, "close"),
        ("GET /1 HTTP/1.0\r\n\r\n", false, "close"),
        ("GET /1 HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", true, "keep-alive"),
        ("GET /stream/1/2 HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", false, "close"),
    ] {
        talk(|mut client, _| async move {
            client.write_all(text.as_bytes()).await.unwrap();
            let answer = read_answer(&mut client, false).await.unwrap();
            assert_eq!((answer.status, answer.field("connection")), (200, says), "{text}");
            assert_eq!(answer.version, if text.contains("1.0\r\n") { "1.0" } else { "1.1" });
            if is_kept {
                client.write_all(b"GET /2?close HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
                assert_eq!(read_answer(&mut client, false).await.unwrap().content.len(), 2, "{text}");
            }
            assert!(is_at_end(&mut client).await, "{text}");
        });
    }
}

#[test]
fn answers_without_content_have_none() {
    talk(|mut client, _| async move {
        client.write_all(b"HEAD /7 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(read_answer(&mut client, true).await.unwrap().field("content-length"), "7");
        client.write_all(b"HEAD /stream/7 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(read_answer(&mut client, true).await.unwrap().field("transfer-encoding"), "chunked");
        client.write_all(b"GET /204 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let answer = read_answer(&mut client, false).await.unwrap();
        assert_eq!((answer.status, answer.field("content-length"), answer.field("transfer-encoding")), (204, "", ""));
        client.write_all(b"GET /? HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let answer = read_answer(&mut client, false).await.unwrap();
        assert_eq!((answer.field("content-length"), answer.content.len()), ("0", 0));
        for (path, connection) in [("/7", "keep-alive"), ("/204", "keep-alive"), ("/stream/7", "close")] {
            let text = format!("HEAD {path} HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
            client.write_all(text.as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client, true).await.unwrap().field("connection"), connection);
        }
        assert!(is_at_end(&mut client).await);
    });
}

/// Sizes on both sides of what is copied and of what is written at once; the socket holds less than most.
#[test]
fn answers_of_all_sizes_come_whole() {
    let sizes = [0, 1, 4_095, 4_096, 4_097, 16_383, 16_384, 100_000, 1_000_000];
    talk(|mut client, _| async move {
        for size in sizes {
            client.write_all(format!("GET /{size} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
            assert!(read_answer(&mut client, false).await.unwrap().content == pattern(size), "{size}");
        }
        for (one, other) in sizes.iter().flat_map(|one| sizes.map(|other| (*one, other))) {
            for kind in ["stream", "stream/told"] {
                let text = format!("GET /{kind}/{one}/3/{one}/{other} HTTP/1.1\r\nhost: a\r\n\r\n");
                client.write_all(text.as_bytes()).await.unwrap();
                let content = read_answer(&mut client, false).await.unwrap().content;
                let expected = [pattern(one), pattern(3), pattern(one), pattern(other)].concat();
                assert!(content == expected, "{kind} {one} {other}: {}", content.len());
            }
        }
        client.write_all(b"GET /stream/100000/5 HTTP/1.0\r\n\r\n").await.unwrap();
        let answer = read_answer(&mut client, false).await.unwrap();
        assert!(answer.content == [pattern(100_000), pattern(5)].concat());
    });
}

#[test]
fn a_hundred_is_said_once_and_only_to_who_waits_for_it() {
    talk(|mut client, handler| async move {
        let mut hundred = [0; CONTINUE.len()];
        for (framing, body) in
            [("content-length: 5", &b"hello"[..]), ("transfer-encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n")]
        {
            let head = format!("POST /1 HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n{framing}\r\n\r\n");
            client.write_all(head.as_bytes()).await.unwrap();
            client.read_exact(&mut hundred).await.unwrap();
            assert_eq!(hundred, CONTINUE);
            client.write_all(body).await.unwrap();
            assert_eq!(read_answer(&mut client, false).await.unwrap().status, 200);
            // It has sent some of it without: what is left comes anyway.
            client.write_all(head.as_bytes()).await.unwrap();
            client.read_exact(&mut hundred).await.unwrap();
            client.write_all(&body[..1]).await.unwrap();
            client.write_all(&body[1..]).await.unwrap();
            assert_eq!(read_answer(&mut client, false).await.unwrap().status, 200);
            client.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
            assert_eq!(read_answer(&mut client, false).await.unwrap().status, 200);
        }
        assert!(handler.seen().iter().all(|seen| seen.body == Ok("hello".into())));
        // A part of it is here already.
        client
            .write_all(b"POST /1 HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\nhel")
            .await
            .unwrap();
        others_run().await;
        client.write_all(b"lo").await.unwrap();
        assert_eq!(read_answer(&mut client, false).await.unwrap().status, 200);
        // Who is refused by the head alone is told at once, and its body is not awaited.
        client
            .write_all(b"POST /unread HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
            .await
            .unwrap();
        let answer = read_answer(&mut client, false).await.unwrap();
        assert_eq!((answer.status, answer.field("connection")), (200, "close"));
        assert!(is_at_end(&mut client).await);
    });
}

#[test]
fn a_body_that_nobody_reads_is_not_the_next_request() {
    // It is there with its head: the connection goes on behind it.
    talk(|mut client, handler| async move {
        for framing in ["content-length: 5\r\n\r\nhello", "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"] {
            let text = format!("POST /unread HTTP/1.1\r\nhost: a\r\n{framing}");
            client.write_all(text.as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client, false).await.unwrap().field("connection"), "");
        }
        client.write_all(b"GET /2?close HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(read_answer(&mut client, false).await.unwrap().content.len(), 2);
        assert!(is_at_end(&mut client).await);
        assert_eq!(handler.seen().len(), 3);
    });
    // It is not: what comes of it, whatever that is, is thrown away.
    for framing in [
        "content-length: 50\r\n\r\nhello",
        "transfer-encoding: chunked\r\n\r\n5\r\nhel",
        "transfer-encoding: chunked\r\n\r\nx\r\n",
    ] {
        talk(|mut client, handler| async move {
            let text = format!("POST /unread HTTP/1.1\r\nhost: a\r\n{framing}");
            client.write_all(text.as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client, false).await.unwrap().field("connection"), "close");
            let _ = client.write_all(b"GET /1 HTTP/1.1\r\nhost: a\r\n\r\n").await;
            assert!(is_at_end(&mut client).await);
            assert_eq!(handler.seen().len(), 1);
        });
    }
}

#[test]
fn a_broken_body_is_told_to_its_handler_and_ends_the_connection() {
    talk(|mut client, handler| async move {
        client
            .write_all(b"POST /1 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
            .await
            .unwrap();
        tokio::task::yield_now().await;
        client.write_all(b"zz\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let answer = read_answer(&mut client, false).await.unwrap();
        assert_eq!((answer.status, answer.field("connection")), (200, "close"));
        assert!(is_at_end(&mut client).await);
        let seen = handler.seen();
        assert_eq!(seen.len(), 1);
        assert!(seen[0].body.as_ref().unwrap_err().contains("breaks its framing"), "{seen:?}");
    });
}

#[test]
fn a_head_that_is_refused_comes_to_the_handler_as_such() {
    let large = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(2_048));
    let endless = "GET / HTTP/1.1\r\nhost: a\r\n".to_owned() + &"x: y\r\n".repeat(400);
    for bad in ["GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\nGET /1 HTTP/1.1\r\nhost: a\r\n\r\n", &large, &endless] {
        talk(|mut client, handler| async move {
            client.write_all(b"GET /1 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            assert_eq!(read_answer(&mut client, false).await.unwrap().field("connection"), "");
            client.write_all(bad.as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client, false).await.unwrap().field("connection"), "close");
            assert!(is_at_end(&mut client).await);
            let seen = handler.seen();
            assert_eq!((seen.len(), seen[1].target.as_str(), seen[1].fields.len()), (2, "/", 0));
        });
    }
}

#[test]
fn a_client_that_leaves_takes_what_it_asked_for_with_it() {
    for text in [
        "GET /wait HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET /stream/5/endless HTTP/1.1\r\nhost: a\r\n\r\n",
        // More than the socket holds.
        "GET /9000000 HTTP/1.1\r\nhost: a\r\n\r\n",
        // With more behind it.
        "GET /wait HTTP/1.1\r\nhost: a\r\n\r\nGET /1 HTTP/1.1\r\n",
        "POST /1 HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhell",
        "POST /1 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhell",
        "POST /1 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
        "GET /1 HTTP/1.1\r\nhost: a",
        "\r\n",
        "",
    ] {
        talk(|mut client, handler| async move {
            client.write_all(text.as_bytes()).await.unwrap();
            others_run().await;
            assert_eq!(handler.alive(), u32::from(text.len() > 30), "{text}");
            drop(client);
            // `talk` sees that the connection ends, with nothing left.
        });
    }
}

#[test]
fn a_handler_that_goes_on_is_waited_for() {
    talk(|mut client, handler| async move {
        client
            .write_all(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\nGET /2?close HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        others_run().await;
        assert_eq!(handler.seen().len(), 1, "one after the other");
        handler.go.notify_one();
        assert_eq!(read_answer(&mut client, false).await.unwrap().content.len(), 0);
        assert_eq!(read_answer(&mut client, false).await.unwrap().content.len(), 2);
        assert!(is_at_end(&mut client).await);
    });
}

#[test]
fn nothing_of_what_is_sent_ahead_is_lost() {
    let next =
        |body: usize| format!("POST /2 HTTP/1.1\r\nhost: a\r\ncontent-length: {body}\r\n\r\n{}", "x".repeat(body));
    let first = [
        "GET /wait HTTP/1.1\r\nhost: a\r\n\r\n",
        "POST /wait HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ];
    for text in first {
        talk(|client, handler| async move {
            let bodies = [3, 5_000, 20_000, 0, 70_000, 8_192, 1];
            let text = text.to_owned() + &bodies.map(next).concat();
            let (mut read, mut write) = client.into_split();
            let ask = async {
                write.write_all(text.as_bytes()).await.unwrap();
                write
            };
            let hear = async {
                others_run().await;
                assert_eq!(handler.seen.lock().unwrap().len(), 1);
                handler.go.notify_one();
                let mut answers = String::new();
                while answers.matches("content-length: 2\r\n").count() < bodies.len() {
                    let mut piece = vec![0; 999];
                    let count = read.read(&mut piece).await.unwrap();
                    answers += str::from_utf8(&piece[..count]).unwrap();
                }
            };
            let (_write, ()) = tokio::join!(ask, hear);
            let lengths: Vec<usize> =
                handler.seen()[1..].iter().map(|seen| seen.body.as_ref().unwrap().len()).collect();
            assert_eq!(lengths, bodies);
        });
    }
}

/// A head and what it has to say, an event and the end: one write each.
#[test]
fn what_belongs_together_comes_together() {
    talk(|mut client, handler| async move {
        let (feed, fed) = mpsc::channel(4);
        *handler.fed.lock().unwrap() = Some(fed);
        let mut piece = vec![0; 4_096];
        client.write_all(b"GET /900 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let count = client.read(&mut piece).await.unwrap();
        assert!(piece[..count].ends_with(&pattern(900)));
        client.write_all(b"GET /stream/fed HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        feed.send("one".into()).await.unwrap();
        let count = client.read(&mut piece).await.unwrap();
        assert!(piece[..count].starts_with(b"HTTP/1.1 200") && piece[..count].ends_with(b"\r\n\r\n3\r\none\r\n"));
        feed.send("two".into()).await.unwrap();
        drop(feed);
        let count = client.read(&mut piece).await.unwrap();
        assert_eq!(&piece[..count], b"3\r\ntwo\r\n0\r\n\r\n");
        drop(client);
    });
}

/// It is by its body's polls that a stream is ended from outside.
#[test]
fn a_stream_is_polled_on_while_its_client_takes_nothing() {
    talk(|client, handler| async move {
        let (feed, fed) = mpsc::channel(1);
        *handler.fed.lock().unwrap() = Some(fed);
        client.writable().await.unwrap();
        client.try_write(b"GET /stream/fed HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
        let mut taken = 0;
        while let Ok(sent) = tokio::time::timeout(Duration::from_millis(100), feed.send(pattern(1_000))).await {
            sent.unwrap();
            taken += 1_000;
        }
        let (mut piece, mut arrived) = (vec![0; 1 << 20], 0);
        client.readable().await.unwrap();
        // Nobody else runs meanwhile.
        while let Ok(count) = client.try_read(&mut piece) {
            arrived += count;
        }
        assert!(taken > arrived + 14_000 && taken < arrived + 40_000, "{taken} {arrived}");
        drop(client);
    });
}

#[test]
fn an_answer_that_is_not_as_long_as_it_says_is_cut() {
    for path in ["/5/more", "/100000/more", "/5/less", "/100000/less"] {
        talk(|mut client, _| async move {
            client.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
            let mut all = Vec::new();
            // A reset or an end, before the answer's.
            let _ = client.read_to_end(&mut all).await;
            let text = String::from_utf8_lossy(&all);
            let content = text.split_once("\r\n\r\n").map_or("", |(_, content)| content);
            let promised = if path.contains("100000") { 100_000 } else { 5 };
            assert!(content.len() < if path.ends_with("more") { promised + 3 } else { promised - 3 }, "{path}");
        });
    }
}

/// The board says that the last bytes are on their way before they are: nobody else runs between.
#[test]
fn what_has_ended_is_written_in_the_same_turn() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let handler = Handler::default();
        let io = ClientIo::new(Stream::Unix(ours), LIMITS, Clock::new().unwrap());
        let mut connection = std::pin::pin!(Connection::new(io, handler.clone()));
        let asked = "GET /1 HTTP/1.1\r\nhost: a\r\n\r\n".repeat(200);
        assert_eq!(theirs.try_write(asked.as_bytes()).unwrap(), asked.len());
        let (mut answered, mut piece) = (0, vec![0; 1 << 20]);
        while answered < 200 {
            tokio::task::yield_now().await;
            let once = std::future::poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx)));
            assert!(once.await.is_pending());
            let _ = theirs.readable().await;
            if let Ok(count) = theirs.try_read(&mut piece) {
                answered += String::from_utf8_lossy(&piece[..count]).matches("HTTP/1.1 200").count();
            }
            assert_eq!(handler.seen.lock().unwrap().len(), answered);
        }
    });
}
