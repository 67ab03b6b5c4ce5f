//! Which web pages may call from a browser (the Fetch standard's CORS protocol): an exact list, empty unless configured.
//!
//! It only ever adds: a page on the list is told that it may read the answer. Who may call at all is `auth`'s to say.

use evergate_core::config::Config;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderValue, ORIGIN, VARY,
};
use http::request::Parts;
use http::{Method, Response, StatusCode};

use super::body::Body;

/// Request headers that a page may send, besides the official SDKs' `x-stainless-`.
const HEADERS: [&str; 8] = [
    "authorization",
    "content-type",
    "idempotency-key",
    "openai-beta",
    "anthropic-beta",
    "x-request-id",
    "traceparent",
    "tracestate",
];
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, DELETE");
/// How long a browser may remember an answer to its question, seconds.
const MAX_AGE_S: HeaderValue = HeaderValue::from_static("600");
/// Beyond those that every page may read.
const EXPOSED: HeaderValue = HeaderValue::from_static("x-request-id, x-should-retry, retry-after, retry-after-ms");

/// The list.
#[derive(Debug)]
pub struct Cors {
    origins: Vec<String>,
    is_any: bool,
}

impl Cors {
    /// What a configuration allows.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let origins = config.server.cors.clone();
        let is_any = origins.iter().any(|origin| origin == "*");
        Self { origins, is_any }
    }

    /// The request's origin if it is on the list; browsers send exactly one.
    #[must_use]
    pub fn listed<'a>(&self, headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
        if self.origins.is_empty() {
            return None;
        }
        let mut origins = headers.get_all(ORIGIN).iter();
        let origin = origins.next().filter(|_| origins.next().is_none())?;
        let is_listed = |known: &String| known.as_bytes() == origin.as_bytes();
        (self.is_any || self.origins.iter().any(is_listed)).then_some(origin)
    }

    /// The answer to a browser's question whether a page on the list may send what it is about to.
    #[must_use]
    pub fn preflight(&self, head: &Parts) -> Option<Response<Body>> {
        let is_asked = head.method == Method::OPTIONS && head.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
        if !is_asked || self.listed(&head.headers).is_none() {
            return None;
        }
        let mut response = Response::new(Body::whole(bytes::Bytes::new()));
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
        headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE_S);
        if let Some(allowed) = allowed(&head.headers) {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, allowed);
        }
        Some(response)
    }
}

/// Those of the headers that the page wants to send which it may.
fn allowed(headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = headers.get(ACCESS_CONTROL_REQUEST_HEADERS)?.to_str().ok()?.to_ascii_lowercase();
    let may = |name: &&str| HEADERS.contains(name) || name.starts_with("x-stainless-");
    let names: Vec<&str> = wanted.split(',').map(str::trim).filter(may).collect();
    HeaderValue::try_from(names.join(", ")).ok()
}

/// Lets the page read an answer: its own origin, never credentials.
pub fn dress(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    headers.append(VARY, HeaderValue::from_static("Origin"));
}
