//! What a program says in a frame, and what it is told (docs/stdio-protocol.md).

use bytes::Bytes;
use evergate_core::{Error, Fault, json};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::ask::{Ask, Endpoint};

/// The version that is spoken.
const PROTOCOL: u32 = 1;
/// Most of a program's words that a client is told.
const MESSAGE_CHARS_MAX: usize = 1000;

/// A frame from a program.
#[derive(Debug)]
pub(crate) enum Said {
    Ready { in_flight: u32 },
    Delta { id: u64, piece: Piece },
    Result { id: u64, last: Last },
    Error { id: u64, error: Error },
    Drained,
}

/// A piece of an answer.
#[derive(Debug)]
pub(crate) enum Piece {
    Text(String),
    /// As in a chunk's `choices[0].delta`.
    Delta(Map<String, Value>),
}

/// The end of an answer.
#[derive(Debug)]
pub(crate) struct Last {
    pub(crate) text: Option<String>,
    /// A whole answer in OpenAI's shape, as it was written.
    pub(crate) body: Option<Bytes>,
    pub(crate) usage: Option<Usage>,
    pub(crate) finish_reason: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Usage {
    #[serde(default)]
    pub(crate) prompt_tokens: u64,
    #[serde(default)]
    pub(crate) completion_tokens: u64,
}

/// Every field that any frame has; others are for versions to come.
#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "type")]
    kind: String,
    id: Option<String>,
    protocol: Option<u32>,
    in_flight: Option<u32>,
    text: Option<String>,
    delta: Option<Map<String, Value>>,
    body: Option<Box<RawValue>>,
    usage: Option<Usage>,
    finish_reason: Option<String>,
    message: Option<String>,
    status: Option<u16>,
    code: Option<String>,
    param: Option<String>,
}

/// Reads a frame.
///
/// # Errors
/// `AdapterProtocolError` for what is no JSON (G16), or breaks the protocol.
pub(crate) fn parse(frame: &[u8]) -> Result<Said, Error> {
    // All of it: a reader of JSON does not look into what it leaves out.
    let text = std::str::from_utf8(frame).map_err(|error| broken("wrote what is no UTF-8").detail(error))?;
    let raw: Raw = serde_json::from_str(text).map_err(|error| broken("wrote what is no frame").detail(error))?;
    Ok(match raw.kind.as_str() {
        "ready" if raw.protocol == Some(PROTOCOL) => Said::Ready { in_flight: raw.in_flight.unwrap_or(1).max(1) },
        "ready" => return Err(broken("speaks another version of the protocol")),
        "delta" => Said::Delta { id: id(&raw)?, piece: piece(raw)? },
        "result" => Said::Result { id: id(&raw)?, last: last(raw)? },
        "error" => Said::Error { id: id(&raw)?, error: error(raw)? },
        "drained" => Said::Drained,
        _ => return Err(broken("wrote a frame of an unknown type")),
    })
}

/// Ids are numbers of ours; another is nobody's (G18).
fn id(raw: &Raw) -> Result<u64, Error> {
    raw.id.as_deref().and_then(|id| id.parse().ok()).ok_or_else(|| broken("answered a request that there is not"))
}

fn piece(raw: Raw) -> Result<Piece, Error> {
    match (raw.text, raw.delta) {
        (Some(text), None) => Ok(Piece::Text(text)),
        (None, Some(delta)) => Ok(Piece::Delta(delta)),
        _ => Err(broken("wrote a delta without one text or delta")),
    }
}

fn last(raw: Raw) -> Result<Last, Error> {
    let body = raw.body.map(|body| Bytes::from(String::from(Box::<str>::from(body))));
    let is_object = body.as_ref().is_none_or(|body| body.starts_with(b"{"));
    if !is_object || (body.is_some() && raw.text.is_some()) {
        return Err(broken("wrote a result with a body that is none"));
    }
    Ok(Last { text: raw.text, body, usage: raw.usage, finish_reason: raw.finish_reason })
}

/// A status below 500 is the client's to mend, and its words are for the client; others are for the records.
fn error(raw: Raw) -> Result<Error, Error> {
    let status = raw.status.unwrap_or(500);
    let message: String = raw.message.unwrap_or_default().chars().take(MESSAGE_CHARS_MAX).collect();
    if !(400..600).contains(&status) {
        return Err(broken("wrote an error whose status is none"));
    }
    if status >= 500 {
        let error = Error::new(Fault::UpstreamFailed, "the program of this model could not answer");
        return Ok(error.detail(format_args!("status {status}: {message}")));
    }
    let fault = if status == 429 { Fault::RateLimitExceeded } else { Fault::UpstreamRefused };
    let mut error = Error::new(fault, message);
    (error.status, error.code) = (Some(status), raw.code);
    Ok(match raw.param {
        Some(param) => error.param(param),
        None => error,
    })
}

pub(crate) fn broken(what: &str) -> Error {
    Error::new(Fault::AdapterProtocolError, format!("the program of this model {what}"))
}

/// The frame of a request, but for what sets it off from others. The body is as the client sent it: what comes in has no line
/// end within a string, and one between two words means as much as a space.
pub(crate) fn request(id: u64, ask: &Ask, deadline_ms: Option<u64>) -> Vec<u8> {
    let endpoint = match ask.endpoint {
        Endpoint::Chat => "chat",
        Endpoint::Completions => "completions",
        Endpoint::Embeddings => "embeddings",
    };
    let mut head = format!("{{\"type\":\"request\",\"id\":\"{id}\",\"endpoint\":\"{endpoint}\",\"request_id\":");
    json::write_string(&mut head, &ask.id);
    if let Some(ms) = deadline_ms {
        head.push_str(&format!(",\"deadline_ms\":{ms}"));
    }
    head.push_str(",\"body\":");
    let mut frame = Vec::with_capacity(head.len() + ask.body.len() + 1);
    frame.extend_from_slice(head.as_bytes());
    frame.extend(ask.body.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
    frame.push(b'}');
    frame
}

pub(crate) fn cancel(id: u64) -> Vec<u8> {
    format!("{{\"type\":\"cancel\",\"id\":\"{id}\"}}").into_bytes()
}

pub(crate) fn drain(grace_ms: u128) -> Vec<u8> {
    format!("{{\"type\":\"drain\",\"grace_ms\":{grace_ms}}}").into_bytes()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mark::Mark;

    fn ask(body: &'static [u8]) -> Ask {
        let request = json::scan_request(body, &json::Limits { depth: 8, choices: 1 }).unwrap();
        Ask {
            endpoint: Endpoint::Chat,
            id: "a \"b\"".into(),
            body: body.into(),
            request,
            deadline: None,
            mark: Mark::default(),
        }
    }

    #[test]
    fn g16_what_is_no_frame_breaks_the_protocol() {
        let bad: [&[u8]; 22] = [
            b"",
            b"\xff",
            b"{\"type\":\"drained\",\"x\":\"\xff\"}",
            b"{\"type\":\"drained\",\"x\":\"\xe2\x82\"}",
            b"{\"type\":\"drai\0ned\"}",
            b"[]",
            b"null",
            b"hello",
            b"{\"type\":\"drained\"} x",
            b"{\"type\":\"dance\"}",
            b"{\"type\":1}",
            b"{\"id\":\"1\"}",
            b"{\"type\":\"ready\"}",
            b"{\"type\":\"ready\",\"protocol\":2}",
            b"{\"type\":\"delta\",\"text\":\"a\"}",
            b"{\"type\":\"delta\",\"id\":1,\"text\":\"a\"}",
            b"{\"type\":\"delta\",\"id\":\"x\",\"text\":\"a\"}",
            b"{\"type\":\"delta\",\"id\":\"1\"}",
            b"{\"type\":\"delta\",\"id\":\"1\",\"text\":\"a\",\"delta\":{}}",
            b"{\"type\":\"result\",\"id\":\"1\",\"body\":[]}",
            b"{\"type\":\"result\",\"id\":\"1\",\"body\":{},\"text\":\"a\"}",
            b"{\"type\":\"error\",\"id\":\"1\",\"status\":200}",
        ];
        for frame in bad {
            let error = parse(frame).map(|said| panic!("{said:?}: {}", String::from_utf8_lossy(frame))).unwrap_err();
            assert_eq!(error.fault, Fault::AdapterProtocolError);
        }
    }

    #[test]
    fn a_body_stays_as_it_was_written() {
        let frame = b"{\"type\":\"result\",\"id\":\"7\",\"body\":{ \"z\": 0.10000000000000000001, \"a\": [] }}";
        let Said::Result { id: 7, last } = parse(frame).unwrap() else { panic!() };
        assert_eq!(last.body.unwrap(), "{ \"z\": 0.10000000000000000001, \"a\": [] }");
    }

    #[test]
    fn only_what_the_client_can_mend_is_told_in_the_programs_words() {
        let error = |fields: Value| {
            let mut frame = json!({ "type": "error", "id": "1", "message": "words" });
            frame.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let Said::Error { error, .. } = parse(frame.to_string().as_bytes()).unwrap() else { panic!() };
            error
        };
        let mended = error(json!({ "status": 422, "code": "too_hot", "param": "temperature" }));
        assert_eq!((mended.status(), mended.message.as_ref()), (422, "words"));
        assert_eq!((mended.code.as_deref(), mended.param.as_deref()), (Some("too_hot"), Some("temperature")));
        assert_eq!(error(json!({ "status": 429 })).fault, Fault::RateLimitExceeded);
        for own in [error(json!({})), error(json!({ "status": 599 }))] {
            assert_eq!((own.status(), own.fault), (502, Fault::UpstreamFailed));
            assert!(!own.message.contains("words") && own.detail.unwrap().contains("words"));
        }
    }

    #[test]
    fn a_request_is_one_line_with_the_clients_body() {
        let frame = request(3, &ask(b"{\r\n \"model\": \"m\",\n\"messages\":[] }"), Some(50));
        assert!(!frame.contains(&b'\n'));
        let frame: Value = serde_json::from_slice(&frame).unwrap();
        let body = json!({ "model": "m", "messages": [] });
        let expected = json!({ "type": "request", "id": "3", "endpoint": "chat", "request_id": "a \"b\"",
            "deadline_ms": 50, "body": body });
        assert_eq!(frame, expected);
    }
}
