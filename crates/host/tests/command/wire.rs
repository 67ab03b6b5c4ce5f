//! A host at a socket, and a client that says and hears every byte itself.

use std::sync::Arc;

use evergate_core::config::process::{Command as Config, Input, Output};
use evergate_core::json;
use evergate_host::Plan;
use evergate_host::ask::Mode;
use evergate_host::command::{Bounds, Command};
use evergate_host::gate::Gate;
use evergate_host::service::{self, Front, Limits, Stage};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::support::{House, LONG, folder};

/// How a host is set up in a test.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) plan: Plan,
    pub(crate) config: Config,
    pub(crate) places: u32,
    pub(crate) queue: u32,
    pub(crate) output_bytes_max: u64,
    pub(crate) body_bytes_max: usize,
}

pub(crate) fn setup(plan: Plan) -> Setup {
    Setup {
        plan,
        config: Config {
            input: Input::Text(None),
            output: Output::Text,
            prompt_arg: false,
            timeout: LONG,
            first_output: LONG,
            idle: LONG,
        },
        places: 8,
        queue: 8,
        output_bytes_max: 32 << 20,
        body_bytes_max: 32 << 20,
    }
}

/// A host at its socket.
pub(crate) struct Host {
    path: std::path::PathBuf,
    pub(crate) stage: watch::Sender<Stage>,
    pub(crate) served: JoinHandle<usize>,
    _folder: tempfile::TempDir,
}

pub(crate) fn serve(house: &House, setup: Setup) -> Host {
    let gate = Gate::new(setup.places, setup.queue, house.ear.clone());
    let bounds = Bounds { start_timeout: LONG, output_bytes_max: setup.output_bytes_max };
    let mode = Command::new(house.programs.clone(), setup.plan, setup.config, bounds, gate);
    serve_mode(Arc::new(mode), setup.body_bytes_max)
}

pub(crate) fn serve_mode<M: Mode>(mode: Arc<M>, body_bytes_max: usize) -> Host {
    let folder = folder();
    let path = folder.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (stage, heard) = watch::channel(Stage::Serving);
    let limits = Limits { body_bytes_max, json: json::Limits { depth: 64, choices: 8 } };
    #[allow(clippy::disallowed_methods, reason = "a test's own task, joined by it")]
    let served = tokio::spawn(service::serve(listener, Front { mode, limits, board: None }, heard));
    Host { path, stage, served, _folder: folder }
}

/// An answer as it came.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
    /// Whether the body came to the end that was promised.
    pub(crate) is_whole: bool,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    pub(crate) fn content(&self) -> String {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }

    /// The events' data.
    pub(crate) fn events(&self) -> Vec<String> {
        let text = String::from_utf8(self.body.clone()).unwrap();
        text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap().to_owned()).collect()
    }

    /// The code of an error, or of the one that a stream ends with.
    pub(crate) fn error_code(&self) -> Option<String> {
        let is_stream = self.header("content-type") == Some("text/event-stream");
        let last = if is_stream { self.events().pop()? } else { String::from_utf8(self.body.clone()).unwrap() };
        let last: Value = serde_json::from_str(&last).ok()?;
        last["error"]["code"].as_str().map(str::to_owned)
    }

    /// The text of a stream, and its last event.
    pub(crate) fn streamed(&self) -> (String, String) {
        assert_eq!((self.status, self.header("content-type")), (200, Some("text/event-stream")), "{self:?}");
        let mut events = self.events();
        let last = events.pop().unwrap();
        let texts = events.iter().map(|event| {
            let event: Value = serde_json::from_str(event).unwrap();
            let choice = &event["choices"][0];
            choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default().to_owned()
        });
        (texts.collect(), last)
    }

    /// Status, code, and whether a program may have seen it; the message.
    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, code: &str, dispatched: &str) -> String {
        let error = &self.json()["error"];
        assert_eq!((self.status, error["code"].as_str()), (status, Some(code)), "{error}");
        assert_eq!(self.header("x-evergate-fault"), Some(code));
        assert_eq!(self.header("x-evergate-dispatched"), Some(dispatched));
        error["message"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn chat(text: &str) -> Value {
    json!({ "model": "m", "messages": [{ "role": "user", "content": text }] })
}

impl Host {
    pub(crate) async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).await.unwrap()
    }

    /// Sends a request on a connection of its own.
    pub(crate) async fn send(&self, path: &str, headers: &str, body: &[u8]) -> UnixStream {
        let mut stream = self.connect().await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: host\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // One that is refused early need not be read to its end.
        let _ = stream.write_all(body).await;
        stream
    }

    pub(crate) async fn ask(&self, body: &Value) -> Response {
        self.ask_at("/v1/chat/completions", "", body).await
    }

    pub(crate) async fn ask_at(&self, path: &str, headers: &str, body: &Value) -> Response {
        read(self.send(path, headers, body.to_string().as_bytes()).await).await
    }

    pub(crate) async fn say(&self, text: &str) -> Response {
        self.ask(&chat(text)).await
    }

    pub(crate) async fn stream(&self, text: &str) -> Response {
        let mut body = chat(text);
        body["stream"] = true.into();
        self.ask(&body).await
    }
}

/// Reads an answer to its end.
pub(crate) async fn read(mut stream: UnixStream) -> Response {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("no head: {bytes:?}"));
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut response = Response { status, head, body: bytes[end + 4..].to_vec(), is_whole: true };
    if response.header("transfer-encoding") == Some("chunked") {
        (response.body, response.is_whole) = unchunk(&response.body);
    }
    response
}

fn unchunk(mut bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return (body, true);
        }
        let Some(chunk) = bytes.get(end + 2..end + 2 + size) else { break };
        body.extend_from_slice(chunk);
        bytes = &bytes[end + 4 + size..];
    }
    (body, false)
}

/// How much of an answer has come that nobody has read yet, bytes.
pub(crate) fn unread(stream: &UnixStream) -> usize {
    usize::try_from(rustix::io::ioctl_fionread(stream).unwrap()).unwrap()
}
