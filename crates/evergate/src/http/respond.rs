//! Heads of answers: the request id on each, and for errors what the one table says.

use bytes::Bytes;
use evergate_core::Error;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{HeaderName, Response, StatusCode};

use super::body::Body;

/// `x-request-id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A whole JSON answer.
#[must_use]
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::whole(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// The head of a stream.
#[must_use]
pub fn stream(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx in front of us would otherwise collect events before it passes them on.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// An error, as the table has it.
#[must_use]
pub fn error(error: &Error) -> Response<Body> {
    let row = error.fault.row();
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(status, error.body());
    let headers = response.headers_mut();
    // Told to wait long, the SDKs must not do it by themselves: Node's would sleep it out.
    let wait_s = error.retry_after_s.or(row.retry_after_s);
    let is_patient = error.retry_after_s.is_none_or(|seconds| seconds <= RETRY_AFTER_MAX_S);
    let retry = HeaderValue::from_static(if row.should_retry && is_patient { "true" } else { "false" });
    headers.insert(SHOULD_RETRY, retry);
    if let Some(seconds) = wait_s {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds.min(RETRY_AFTER_MAX_S)));
    }
    if row.close {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Longest `retry-after` that is passed on, seconds.
const RETRY_AFTER_MAX_S: u32 = 20;
