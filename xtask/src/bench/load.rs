//! The load generator: a closed loop over kept connections, with an HTTP/1.1 client of its own.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// One answer may take this long before it counts as an error; nothing here is meant to take a tenth of it.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// The model's name, which is the mock's script.
    pub model: &'static str,
    /// Connections at once.
    pub connections: u64,
    /// Requests over all connections.
    pub requests: u64,
    /// Events a whole stream has; 0 for a unary answer.
    pub events: u64,
}

/// What came back.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Time of each answered request, from its first byte sent to its answer's last byte, ns, sorted.
    pub latencies: Vec<u64>,
    /// Requests that were not answered as they should have been, with the first one's reason.
    pub errors: Vec<String>,
    /// From the first connect to the last answer.
    pub elapsed: Duration,
}

impl Outcome {
    /// The latency that `percent` of the requests stayed under, ns.
    pub fn percentile(&self, percent: usize) -> u64 {
        let at = (self.latencies.len() * percent / 100).min(self.latencies.len().saturating_sub(1));
        self.latencies.get(at).copied().unwrap_or(0)
    }
}

/// The request that asks for `model`; about 1 kB, as a short conversation has.
pub fn request(address: SocketAddr, model: &str, is_stream: bool) -> Vec<u8> {
    let words = "Tell me in a few plain sentences what a gateway in front of language models is good for. ";
    let text = words.repeat(8);
    let body = format!(
        "{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"system\",\"content\":\"You are a helpful assistant.\"}},\
         {{\"role\":\"user\",\"content\":\"{text}\"}}],\"temperature\":0.2,\"max_tokens\":256,\"stream\":{is_stream}}}"
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         authorization: Bearer none\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Sends all of `load` and waits for the answers.
pub async fn run(address: SocketAddr, load: Load) -> Outcome {
    let start = Instant::now();
    let left = Rc::new(Cell::new(load.requests));
    let bytes: Rc<[u8]> = request(address, load.model, load.events > 0).into();
    let connections: Vec<_> = (0..load.connections)
        .map(|_| tokio::task::spawn_local(connection(address, load, Rc::clone(&left), Rc::clone(&bytes))))
        .collect();
    let mut outcome = Outcome::default();
    for connection in connections {
        match connection.await {
            Ok(mut part) => {
                outcome.latencies.append(&mut part.latencies);
                outcome.errors.append(&mut part.errors);
            }
            Err(error) => outcome.errors.push(error.to_string()),
        }
    }
    outcome.elapsed = start.elapsed();
    outcome.latencies.sort_unstable();
    outcome
}

async fn connection(address: SocketAddr, load: Load, left: Rc<Cell<u64>>, request: Rc<[u8]>) -> Outcome {
    let mut outcome = Outcome::default();
    let mut client = None;
    while let Some(rest) = left.get().checked_sub(1) {
        left.set(rest);
        let start = Instant::now();
        match tokio::time::timeout(ANSWER_WITHIN, once(address, &mut client, &request, load.events)).await {
            Ok(Ok(())) => outcome.latencies.push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)),
            Ok(Err(error)) => {
                outcome.errors.push(error);
                client = None;
            }
            Err(_) => {
                outcome.errors.push(format!("no answer within {ANSWER_WITHIN:?}"));
                client = None;
            }
        }
    }
    outcome
}

async fn once(address: SocketAddr, client: &mut Option<Client>, request: &[u8], events: u64) -> Result<(), String> {
    let open = match client {
        Some(open) => open,
        None => client.insert(Client::connect(address).await?),
    };
    let answer = open.exchange(request).await?;
    if answer.status != 200 {
        let text: String = String::from_utf8_lossy(&open.body).chars().take(200).collect();
        return Err(format!("status {}: {text}", answer.status));
    }
    if events == 0 {
        return if open.body.len() > 400 { Ok(()) } else { Err(format!("an answer of {} bytes", open.body.len())) };
    }
    let seen = memchr::memmem::find_iter(&open.body, b"data: ").count() as u64;
    if seen != events || !open.body.ends_with(b"data: [DONE]\n\n") {
        return Err(format!("a stream of {seen} events instead of {events}, or without its end"));
    }
    if answer.closes {
        *client = None;
    }
    Ok(())
}

/// One kept connection.
pub struct Client {
    stream: TcpStream,
    /// What was read and not consumed.
    rest: Vec<u8>,
    /// The last answer's body, decoded.
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    closes: bool,
}

/// How an answer's body ends.
enum Length {
    Known(usize),
    Chunked,
}

impl Client {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))?;
        stream.set_nodelay(true).map_err(|error| format!("connect: {error}"))?;
        Ok(Self { stream, rest: Vec::with_capacity(16 << 10), body: Vec::new() })
    }

    /// Sends a request and reads its whole answer.
    async fn exchange(&mut self, request: &[u8]) -> Result<Answer, String> {
        self.stream.write_all(request).await.map_err(|error| format!("write: {error}"))?;
        let (answer, length) = self.head().await?;
        self.body.clear();
        match length {
            Length::Known(length) => {
                while self.rest.len() < length {
                    self.fill().await?;
                }
                self.body.extend(self.rest.drain(..length));
            }
            Length::Chunked => while self.chunk().await? {},
        }
        Ok(answer)
    }

    async fn fill(&mut self) -> Result<(), String> {
        match self.stream.read_buf(&mut self.rest).await {
            Ok(0) => Err("the connection was closed in the middle of an answer".into()),
            Ok(_) => Ok(()),
            Err(error) => Err(format!("read: {error}")),
        }
    }

    async fn head(&mut self) -> Result<(Answer, Length), String> {
        let end = loop {
            if let Some(end) = memchr::memmem::find(&self.rest, b"\r\n\r\n") {
                break end + 4;
            }
            self.fill().await?;
        };
        let head: Vec<u8> = self.rest.drain(..end).collect();
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let status = head.get(9..12).and_then(|text| text.parse().ok()).ok_or("no status line")?;
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let length = match field("content-length:") {
            Some(text) => Length::Known(text.parse().map_err(|_| "bad content-length")?),
            None if field("transfer-encoding:") == Some("chunked") => Length::Chunked,
            None => return Err("an answer without a length".into()),
        };
        Ok((Answer { status, closes: field("connection:") == Some("close") }, length))
    }

    /// Reads one chunk into `body`; false at the last one.
    async fn chunk(&mut self) -> Result<bool, String> {
        let (start, size) = loop {
            if let Some(end) = memchr::memmem::find(&self.rest, b"\r\n") {
                let size = self.rest.get(..end).and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
                let size = usize::from_str_radix(size, 16).map_err(|_| format!("bad chunk size {size:?}"))?;
                break (end + 2, size);
            }
            self.fill().await?;
        };
        while self.rest.len() < start + size + 2 {
            self.fill().await?;
        }
        self.body.extend_from_slice(self.rest.get(start..start + size).unwrap_or_default());
        self.rest.drain(..start + size + 2);
        Ok(size > 0)
    }

    /// Sends a request and waits for its answer's first event, which is the last thing it reads.
    pub async fn hold(&mut self, request: &[u8]) -> Result<(), String> {
        self.stream.write_all(request).await.map_err(|error| format!("write: {error}"))?;
        let (answer, _) = self.head().await?;
        if answer.status != 200 {
            return Err(format!("status {}", answer.status));
        }
        while memchr::memmem::find(&self.rest, b"data: ").is_none() {
            self.fill().await?;
        }
        Ok(())
    }
}

/// Opens `count` held streams, at most 64 of them being opened at a time.
pub async fn hold(address: SocketAddr, count: usize) -> Result<Vec<Client>, String> {
    let bytes: Rc<[u8]> = request(address, "hold", true).into();
    let mut held = Vec::with_capacity(count);
    while held.len() < count {
        let batch = (count - held.len()).min(64);
        let opening: Vec<_> = (0..batch)
            .map(|_| {
                let bytes = Rc::clone(&bytes);
                tokio::task::spawn_local(async move {
                    let mut client = Client::connect(address).await?;
                    let opened = tokio::time::timeout(ANSWER_WITHIN, client.hold(&bytes)).await;
                    opened.map_err(|_| "no first event".to_string())?.map(|()| client)
                })
            })
            .collect();
        for one in opening {
            held.push(one.await.map_err(|error| error.to_string())??);
        }
    }
    Ok(held)
}
