//! Requests as bytes, and whole exchanges on a connection of their own.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Raw, Response};

/// Long enough for a busy machine, short enough to end a test that hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// A chat request's body: one user message, `extra`'s fields added or put in place of the usual ones.
#[must_use]
pub fn chat_body(model: &str, stream: bool, extra: &Value) -> String {
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": "Say hello"}]});
    if stream {
        body["stream"] = json!(true);
    }
    for (key, value) in extra.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body.to_string()
}

/// A request with a JSON body; `fields` are whole lines, each with its CRLF.
#[must_use]
pub fn post_request(path: &str, fields: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{fields}content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A chat request.
#[must_use]
pub fn chat_request(model: &str, stream: bool, extra: &Value) -> Vec<u8> {
    post_request("/v1/chat/completions", "", &chat_body(model, stream, extra))
}

/// A GET request.
#[must_use]
pub fn get_request(path: &str, fields: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{fields}\r\n").into_bytes()
}

/// One chat request on a connection of its own.
///
/// # Panics
/// When there is no whole answer within 30 s.
#[track_caller]
#[must_use]
pub fn post_chat(address: &str, model: &str, stream: bool, extra: &Value) -> Response {
    ask(address, &chat_request(model, stream, extra))
}

/// One POST of a JSON body on a connection of its own.
///
/// # Panics
/// When there is no whole answer within 30 s.
#[track_caller]
#[must_use]
pub fn post(address: &str, path: &str, body: &str) -> Response {
    ask(address, &post_request(path, "", body))
}

/// One GET on a connection of its own.
///
/// # Panics
/// When there is no whole answer within 30 s.
#[track_caller]
#[must_use]
pub fn get(address: &str, path: &str) -> Response {
    ask(address, &get_request(path, ""))
}

#[track_caller]
fn ask(address: &str, request: &[u8]) -> Response {
    let mut raw = Raw::connect(address);
    raw.send(request);
    let response = raw.read_response(LIMIT);
    raw.close();
    response
}
