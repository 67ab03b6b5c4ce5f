//! The one table of faults: status, type, code, whether to retry, whose fault it is.
//!
//! Everything a client is told about a failure comes from here, so that the same failure looks the same wherever it is
//! met. The body is OpenAI's `ErrorResponse` (openai/openai-openapi, `openapi.yaml`): all four fields are required,
//! `param` and `code` may be null.

use std::borrow::Cow;
use std::fmt;

use crate::json::write_string;

/// Whose doing a fault is: decides the log level and who should look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The client sent something that cannot be served; at most `info` in a log.
    Client,
    /// The model's server or the way to it.
    Upstream,
    /// This gateway is full, stopping or starting: nobody's mistake.
    Capacity,
    /// A defect of Evergate: a human should look.
    Gateway,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// HTTP status sent while the response head is not out yet.
    pub status: u16,
    /// `error.type` of the body.
    pub kind: &'static str,
    /// `error.code` of the body, and the value of the `cause` label and field.
    pub code: &'static str,
    /// Value of `x-should-retry`, which the official SDKs obey above their own rules.
    pub should_retry: bool,
    /// Seconds for `retry-after`, where waiting helps.
    pub retry_after_s: Option<u32>,
    /// Whether the connection must end with this answer, because what follows on it cannot be trusted or read.
    pub close: bool,
    /// Whose doing it is.
    pub blame: Blame,
}

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident => $status:literal $kind:literal $code:literal retry=$retry:literal after=$after:expr, close=$close:literal $blame:ident;)+) => {
        /// Every failure a client can be told about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Fault { $($(#[$doc])* $name),+ }

        impl Fault {
            /// All faults, in the order of the table.
            pub const ALL: &'static [Fault] = &[$(Fault::$name),+];

            /// The fault's row.
            #[must_use]
            pub const fn row(self) -> &'static Row {
                match self {
                    $(Fault::$name => &Row {
                        status: $status, kind: $kind, code: $code, should_retry: $retry,
                        retry_after_s: $after, close: $close, blame: Blame::$blame,
                    }),+
                }
            }
        }
    };
}

faults! {
    /// The request head or its framing breaks RFC 9112.
    MalformedRequest => 400 "invalid_request_error" "malformed_request" retry=false after=None, close=true Client;
    /// The body is not the JSON that is required.
    InvalidJson => 400 "invalid_request_error" "invalid_json" retry=false after=None, close=false Client;
    /// A field is missing or has a value that cannot be used.
    InvalidValue => 400 "invalid_request_error" "invalid_value" retry=false after=None, close=false Client;
    /// The upstream refuses the request with a 4xx of its own, which is passed on.
    UpstreamRefused => 400 "invalid_request_error" "upstream_refused" retry=false after=None, close=false Client;
    /// No key, or a wrong one.
    InvalidApiKey => 401 "invalid_request_error" "invalid_api_key" retry=false after=None, close=false Client;
    /// A web page's origin, or a host name that is not ours, while auth is off.
    OriginNotAllowed => 403 "permission_error" "origin_not_allowed" retry=false after=None, close=false Client;
    /// No such model.
    ModelNotFound => 404 "invalid_request_error" "model_not_found" retry=false after=None, close=false Client;
    /// No such path.
    NotFound => 404 "invalid_request_error" "not_found" retry=false after=None, close=false Client;
    /// The path exists, the method does not.
    MethodNotAllowed => 405 "invalid_request_error" "method_not_allowed" retry=false after=None, close=false Client;
    /// The client did not send its request in time.
    RequestTimeout => 408 "invalid_request_error" "request_timeout" retry=true after=None, close=true Client;
    /// The body is larger than the limit.
    RequestTooLarge => 413 "invalid_request_error" "request_too_large" retry=false after=None, close=true Client;
    /// The request target is longer than the limit.
    UriTooLong => 414 "invalid_request_error" "uri_too_long" retry=false after=None, close=true Client;
    /// The body is in a form that is not understood.
    UnsupportedMediaType => 415 "invalid_request_error" "unsupported_media_type" retry=false after=None, close=false Client;
    /// The head is larger, or has more fields, than the limit.
    HeadersTooLarge => 431 "invalid_request_error" "headers_too_large" retry=false after=None, close=true Client;
    /// The upstream refuses for its rate limit.
    RateLimitExceeded => 429 "rate_limit_error" "rate_limit_exceeded" retry=true after=Some(1), close=false Upstream;
    /// The upstream's account has used up what it may; waiting does not help.
    InsufficientQuota => 429 "insufficient_quota" "insufficient_quota" retry=false after=None, close=false Upstream;
    /// A defect of ours, a caught panic included.
    Internal => 500 "server_error" "internal_error" retry=true after=None, close=false Gateway;
    /// The upstream's answer is not what its API promises.
    UpstreamBadResponse => 502 "server_error" "upstream_bad_response" retry=true after=None, close=false Upstream;
    /// No connection to the upstream: name, route, refused, TLS.
    UpstreamConnectFailed => 502 "server_error" "upstream_connect_failed" retry=true after=None, close=false Upstream;
    /// The upstream's connection ended before its answer did.
    UpstreamDisconnected => 502 "server_error" "upstream_disconnected" retry=true after=None, close=false Upstream;
    /// The upstream answered 5xx.
    UpstreamFailed => 502 "server_error" "upstream_failed" retry=true after=None, close=false Upstream;
    /// The upstream does not accept the gateway's own credential.
    UpstreamAuthFailed => 502 "server_error" "upstream_auth_failed" retry=false after=None, close=false Upstream;
    /// A program that is a model cannot be executed as it is configured.
    AdapterSpawnFailed => 502 "server_error" "adapter_spawn_failed" retry=false after=None, close=false Upstream;
    /// A program that is a model ended with another code than 0, or by a signal.
    AdapterExited => 502 "server_error" "adapter_exited" retry=true after=None, close=false Upstream;
    /// What a program that is a model wrote is not what its mode promises.
    AdapterProtocolError => 502 "server_error" "adapter_protocol_error" retry=true after=None, close=false Upstream;
    /// All places are taken.
    Overloaded => 503 "server_error" "overloaded" retry=true after=Some(1), close=false Capacity;
    /// The gateway is stopping.
    ServerShuttingDown => 503 "server_error" "server_shutting_down" retry=true after=Some(1), close=true Capacity;
    /// A program that is a model is being started, and was not ready in time.
    ModelLoading => 503 "server_error" "model_loading" retry=true after=Some(2), close=false Capacity;
    /// An operator ended the request.
    OperatorCancelled => 503 "server_error" "cancelled_by_operator" retry=false after=None, close=false Capacity;
    /// The upstream was silent for longer than `idle`, or took longer than `connect`.
    UpstreamTimeout => 504 "server_error" "upstream_timeout" retry=true after=None, close=false Upstream;
    /// The upstream sent nothing within `first_token`.
    FirstTokenTimeout => 504 "server_error" "first_token_timeout" retry=true after=None, close=false Upstream;
    /// A program that is a model was not executed, read nothing, or wrote nothing for too long.
    AdapterTimeout => 504 "server_error" "adapter_timeout" retry=true after=None, close=false Upstream;
    /// The request used up `total` or `stream_total`.
    DeadlineExceeded => 504 "server_error" "deadline_exceeded" retry=false after=None, close=false Upstream;
}

/// A failure with the words for the one who has to deal with it.
///
/// `message` says what was wrong, where, and what to do; it goes to the client and therefore never holds a secret, a
/// URL with a query, or an upstream's own text that was not redacted. `detail` is for our records only.
#[derive(Debug)]
pub struct Error {
    /// Which row of the table.
    pub fault: Fault,
    /// For the client.
    pub message: Cow<'static, str>,
    /// The request field that is at fault, as OpenAI's `param`.
    pub param: Option<Cow<'static, str>>,
    /// For records: the underlying cause, free of secrets.
    pub detail: Option<String>,
    /// Another status than the table's, only for an upstream's own 4xx that is passed on.
    pub status: Option<u16>,
    /// Another `code` than the table's, only for an upstream's own 4xx that is passed on.
    pub code: Option<String>,
    /// Seconds that the upstream asked to wait.
    pub retry_after_s: Option<u32>,
}

impl Error {
    /// An error with its message and nothing else.
    #[must_use]
    pub fn new(fault: Fault, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            fault,
            message: message.into(),
            param: None,
            detail: None,
            status: None,
            code: None,
            retry_after_s: None,
        }
    }

    /// Names the request field that is at fault.
    #[must_use]
    pub fn param(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Adds what only the records should have.
    #[must_use]
    pub fn detail(mut self, detail: impl fmt::Display) -> Self {
        self.detail = Some(detail.to_string());
        self
    }

    /// The status to answer with.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.status.unwrap_or(self.fault.row().status)
    }

    /// The body: `{"error":{"message","type","param","code"}}`.
    #[must_use]
    pub fn body(&self) -> String {
        let row = self.fault.row();
        let mut out = String::with_capacity(128 + self.message.len());
        out.push_str("{\"error\":{\"message\":");
        write_string(&mut out, &self.message);
        out.push_str(",\"type\":");
        write_string(&mut out, row.kind);
        out.push_str(",\"param\":");
        match &self.param {
            Some(param) => write_string(&mut out, param),
            None => out.push_str("null"),
        }
        out.push_str(",\"code\":");
        write_string(&mut out, self.code.as_deref().unwrap_or(row.code));
        out.push_str("}}");
        out
    }

    /// As [`Error::body`], with `detail` beside the four fields: what one process of ours tells another, and never a client.
    #[must_use]
    pub fn body_with_detail(&self) -> String {
        let mut out = self.body();
        if let Some(detail) = &self.detail {
            // Its two closing braces.
            out.truncate(out.len().saturating_sub(2));
            out.push_str(",\"detail\":");
            write_string(&mut out, detail);
            out.push_str("}}");
        }
        out
    }

    /// The event that ends a stream whose head is out already. No `[DONE]` may follow it: the official SDKs raise
    /// `APIError` with this message, and take any other end for success or for a broken connection.
    #[must_use]
    pub fn event(&self) -> String {
        format!("data: {}\n\n", self.body())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.fault.row().code, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_unique() {
        let mut codes: Vec<_> = Fault::ALL.iter().map(|fault| fault.row().code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Fault::ALL.len());
    }

    #[test]
    fn statuses_are_errors_and_waiting_is_short() {
        for fault in Fault::ALL {
            let row = fault.row();
            assert!((400..600).contains(&row.status), "{fault:?}");
            // Node's SDK sleeps out whatever it is told; Python's gives up above 120 s.
            assert!(row.retry_after_s.is_none_or(|seconds| seconds <= 5), "{fault:?}");
        }
    }

    #[test]
    fn body_has_all_four_fields_and_escapes() {
        let error = Error::new(Fault::InvalidValue, "say \"hi\"\n").param("messages");
        let value: serde_json::Value = serde_json::from_str(&error.body()).unwrap();
        assert_eq!(value["error"]["message"], "say \"hi\"\n");
        assert_eq!(value["error"]["param"], "messages");
        assert_eq!(value["error"]["type"], "invalid_request_error");
        assert_eq!(value["error"]["code"], "invalid_value");
        let bare = Error::new(Fault::Internal, "x");
        let value: serde_json::Value = serde_json::from_str(&bare.body()).unwrap();
        assert!(value["error"]["param"].is_null());
    }

    #[test]
    fn a_detail_is_told_only_where_it_is_asked_for() {
        let error = Error::new(Fault::AdapterExited, "x");
        assert_eq!(error.body_with_detail(), error.body());
        let error = error.detail("no \"weights\"\n");
        assert!(!error.body().contains("weights") && !error.event().contains("weights"));
        let value: serde_json::Value = serde_json::from_str(&error.body_with_detail()).unwrap();
        assert_eq!((&value["error"]["detail"], &value["error"]["message"]), (&"no \"weights\"\n".into(), &"x".into()));
    }
}
