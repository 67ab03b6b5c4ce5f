//! Heads of answers: the request id on each, and for errors what the one table says.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use evergate_core::Error;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{HeaderName, Response, StatusCode};

use super::body::Body;

/// `x-request-id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Read before `retry-after` by the official SDKs.
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
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
    if let Some(seconds) = wait_s.map(|seconds| seconds.min(RETRY_AFTER_MAX_S)) {
        // Our own advice is spread, so that clients that were refused together do not come back together; what an
        // upstream asks for is passed on.
        let ms = if error.retry_after_s.is_some() { seconds * 1000 } else { spread(seconds * 1000) };
        headers.insert(RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
        headers.insert(RETRY_AFTER_MS, HeaderValue::from(ms));
    }
    if row.close {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Anything from half of it to half as much again.
fn spread(ms: u32) -> u32 {
    static DRAWN: AtomicU64 = AtomicU64::new(0);
    // splitmix64 over the clock and a count: far from secret, and never twice the same.
    let drawn = DRAWN.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed) ^ evergate_board::monotonic_ns();
    let mixed = (drawn ^ drawn >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ms / 2 + u32::try_from((mixed >> 32) % u64::from(ms.max(1))).unwrap_or(0)
}

/// Longest `retry-after` that is passed on, seconds.
const RETRY_AFTER_MAX_S: u32 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_spread_around_what_was_meant() {
        let drawn: Vec<u32> = (0..1_000).map(|_| spread(1_000)).collect();
        assert!(drawn.iter().all(|ms| (500..1_500).contains(ms)));
        let mean = drawn.iter().sum::<u32>() / 1_000;
        assert!((900..1_100).contains(&mean), "{mean}");
        assert!(drawn.windows(2).any(|two| two[0].abs_diff(two[1]) > 200));
    }
}
