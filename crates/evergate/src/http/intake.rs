//! Reads a request body: bounded in size, and in time between pieces and as a whole.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use evergate_core::config::Config;
use evergate_core::{Error, Fault, request_timeout};
use evergate_upstream::clock::Clock;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, ORIGIN};
use http_body::Body;
use http_body_util::BodyExt;

use super::incoming::Incoming;
use super::unread;
use crate::context::Token;
use crate::gate::memory::{LARGE_BYTES, Memory};

fn too_large(limit: u64) -> Error {
    Error::new(Fault::RequestTooLarge, format!("the request body is larger than {limit} bytes (limits.body)"))
}

/// Refuses by the head alone what need not be read; gives the body's length, if it says one.
///
/// # Errors
/// `request_too_large`, `unsupported_media_type`.
pub fn check_head(headers: &HeaderMap, config: &Config) -> Result<Option<u64>, Error> {
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > config.limits.body_bytes) {
        return Err(too_large(config.limits.body_bytes));
    }
    let is_plain = |encoding: &HeaderValue| encoding.as_bytes().eq_ignore_ascii_case(b"identity");
    if !headers.get_all(CONTENT_ENCODING).iter().all(is_plain) {
        return Err(Error::new(
            Fault::UnsupportedMediaType,
            "a compressed request body is not supported; send it plain",
        ));
    }
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes());
    let is_json = kind.is_some_and(|kind| {
        let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        kind.eq_ignore_ascii_case(b"application/json")
    });
    // A browser sends text/plain to anywhere without asking first; programs that forget the type mean JSON.
    if !is_json && headers.contains_key(ORIGIN) {
        return Err(Error::new(Fault::UnsupportedMediaType, "the content type must be application/json"));
    }
    if kind
        .is_some_and(|kind| kind.len() >= 10 && kind.get(..10).is_some_and(|it| it.eq_ignore_ascii_case(b"multipart/")))
    {
        return Err(Error::new(Fault::UnsupportedMediaType, "this endpoint takes application/json, not a form"));
    }
    Ok(length)
}

/// How long the client is ready to wait, if it says so.
///
/// # Errors
/// `invalid_value` for what is no time.
pub fn client_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let mut values = headers.get_all(request_timeout::NAME).iter();
    let Some(value) = values.next() else { return Ok(None) };
    match request_timeout::parse(value.as_bytes()).filter(|_| values.next().is_none()) {
        Some(time) => Ok(Some(time)),
        None => {
            let message =
                "x-request-timeout must be one time above zero: seconds (30, 1.5, 30s) or milliseconds (500ms)";
            Err(Error::new(Fault::InvalidValue, message).param(request_timeout::NAME))
        }
    }
}

/// Why a body was not read to its end.
#[derive(Debug)]
pub enum Stopped {
    /// The client closed or reset its connection.
    ClientGone,
    /// The client is told.
    Refused(Error),
}

impl From<hyper::Error> for Stopped {
    fn from(error: hyper::Error) -> Self {
        use std::io::ErrorKind;
        let io = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<std::io::Error>());
        let is_gone = io.is_some_and(|io| matches!(io.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset));
        if is_gone || error.is_incomplete_message() || error.is_canceled() {
            return Self::ClientGone;
        }
        Self::broken(error)
    }
}

impl Stopped {
    /// What has come is no body.
    #[must_use]
    pub fn broken(why: impl std::fmt::Display) -> Self {
        let message = "the request body breaks its framing";
        Self::Refused(Error::new(Fault::MalformedRequest, message).detail(why))
    }
}

/// Reads the whole body. Whose request it is holds what has come of a large one.
///
/// # Errors
/// `request_too_large` at the limit, `request_timeout`, `malformed_request` when its framing breaks, `overloaded` when
/// one that said no length grows and memory is short; or the client is gone.
pub async fn read(
    mut body: Incoming,
    config: &Config,
    (clock, memory, token): (&Clock, &Memory, &Token),
) -> Result<Bytes, Stopped> {
    let limit = config.limits.body_bytes;
    let mut looked = if body.size_hint().exact().is_some() { u64::MAX } else { LARGE_BYTES };
    // From when it has to be waited for.
    let mut end = None;
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        let mut is_idle = false;
        let until = || {
            let now = Instant::now();
            let (end, idle) = (*end.get_or_insert(now + config.timeouts.body), now + config.timeouts.body_idle);
            is_idle = idle < end;
            end.min(idle)
        };
        let frame = match clock.timeout_from(until, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => break,
            Ok(Some(Err(stopped))) => return Err(stopped),
            Err(_) => {
                let key = if is_idle { "timeouts.body_idle" } else { "timeouts.body" };
                let message = format!("the request body did not arrive within {key}");
                return Err(Stopped::Refused(Error::new(Fault::RequestTimeout, message)));
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        let bytes = (first.len() + rest.len() + data.len()) as u64;
        if bytes > limit {
            unread::leave(body, clock);
            return Err(Stopped::Refused(too_large(limit)));
        }
        if bytes > looked {
            memory.admit_large(0).map_err(Stopped::Refused)?;
            looked = bytes.saturating_add(LARGE_BYTES);
        }
        if bytes > LARGE_BYTES {
            token.hold(bytes.saturating_sub(token.held()));
        }
        if first.is_empty() {
            // Most bodies are one piece, and need no copy.
            first = data;
        } else {
            if rest.is_empty() {
                let hint = usize::try_from(body.size_hint().lower()).unwrap_or(0);
                rest.reserve(first.len() + data.len() + hint.min(1 << 20));
                rest.extend_from_slice(&first);
                first = Bytes::from_static(b" ");
            }
            rest.extend_from_slice(&data);
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}
