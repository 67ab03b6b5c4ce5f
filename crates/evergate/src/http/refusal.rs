//! What an upstream's refusal becomes for the client.
//!
//! Holds INV-AUTH-1 (ARCHITECTURE.md).

use std::time::SystemTime;

use evergate_core::{Error, Fault};
use evergate_host::service::{DISPATCHED, FAULT};
use http::StatusCode;
use http::header::{HeaderMap, RETRY_AFTER};
use serde_json::Value;

use super::app::App;

/// Longest message of an upstream that is passed on, bytes.
const MESSAGE_BYTES_MAX: usize = 2048;

/// The error for an answer that is not a 2xx; `body` is what was read of it.
#[must_use]
pub fn of(app: &App, upstream: &str, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Error {
    let code = status.as_u16();
    let detail = format!("upstream {upstream} answered {code}");
    let error = match code {
        401 | 403 | 407 => not_accepted(upstream),
        400..=499 => {
            let error = passed_on(app, upstream, status, body);
            match (error.code.as_deref(), code) {
                // Some say so with a 400.
                (Some("invalid_api_key"), _) => not_accepted(upstream),
                (Some("insufficient_quota"), 429) => Error { fault: Fault::InsufficientQuota, ..error },
                (_, 429) => {
                    let retry_after_s = wait_asked(headers, SystemTime::now());
                    Error { fault: Fault::RateLimitExceeded, retry_after_s, ..error }
                }
                _ => error,
            }
        }
        500..=599 => {
            Error::new(Fault::UpstreamFailed, format!("the upstream \"{upstream}\" failed with status {code}"))
        }
        // A redirect is never followed: the credential would travel along.
        300..=399 => Error::new(
            Fault::UpstreamBadResponse,
            format!("the upstream \"{upstream}\" answered with a redirect, which is not followed"),
        ),
        _ => Error::new(
            Fault::UpstreamBadResponse,
            format!("the upstream \"{upstream}\" answered with the unexpected status {code}"),
        ),
    };
    error.detail(detail)
}

/// How many seconds an upstream asks to wait: `retry-after-ms`, which the official SDKs read first, else `retry-after`, a
/// number or a date (RFC 9110, 10.2.3). What is none of these is no word.
fn wait_asked(headers: &HeaderMap, now: SystemTime) -> Option<u32> {
    let text = |name: &str| Some(headers.get(name)?.to_str().ok()?.trim());
    let number = |text: &str| text.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    let seconds = text("retry-after-ms").and_then(number).map(|ms| ms / 1000.0).or_else(|| {
        let text = text(RETRY_AFTER.as_str())?;
        // One that is over says to wait no longer.
        let until =
            || Some(httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default().as_secs_f64());
        number(text).or_else(until)
    })?;
    Some(seconds.ceil() as u32)
}

/// The client would take the upstream's own words for some about its own key.
fn not_accepted(upstream: &str) -> Error {
    let message =
        format!("the upstream \"{upstream}\" does not accept the gateway's credential; its operator has to look");
    Error::new(Fault::UpstreamAuthFailed, message)
}

/// The error that a program's host answers with, as it stands in its own table, and whether a program may have seen the
/// request; none if it is no host's.
#[must_use]
pub fn of_host(app: &App, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Option<(Error, bool)> {
    let code = headers.get(FAULT)?.to_str().ok()?;
    let fault = *Fault::ALL.iter().find(|fault| fault.row().code == code)?;
    let said = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let text = |key: &str| said.pointer(key).and_then(Value::as_str).map(|text| clean(app, text));
    let mut error = Error::new(fault, text("/error/message").unwrap_or_else(|| "the model's program failed".into()));
    error.param = text("/error/param").map(Into::into);
    if fault == Fault::UpstreamRefused {
        // A program's own word about the request.
        error.status = Some(status.as_u16());
        error.code = text("/error/code");
    }
    let error = for_the_record(error, text("/error/detail"));
    Some((error, headers.get(DISPATCHED).is_none_or(|value| value != "0")))
}

/// The error of an event by which a host ends a stream, as it stands in its own table; none if that is no host's, but
/// what a program has written.
#[must_use]
pub fn of_host_event(app: &App, event: &[u8]) -> Option<Error> {
    const OWN: [Fault; 5] = [
        Fault::AdapterExited,
        Fault::AdapterProtocolError,
        Fault::AdapterTimeout,
        Fault::DeadlineExceeded,
        Fault::ServerShuttingDown,
    ];
    let said = serde_json::from_slice::<Value>(event).ok()?;
    let text = |key: &str| said.pointer(key).and_then(Value::as_str);
    let code = text("/error/code")?;
    let fault = OWN.into_iter().find(|fault| fault.row().code == code)?;
    let error = Error::new(fault, clean(app, text("/error/message")?));
    Some(for_the_record(error, text("/error/detail").map(|text| clean(app, text))))
}

/// Adds a host's word for the record. Of a program's failure there is always one: the client's message at least, which names
/// the limit that was passed or the code that it ended with.
fn for_the_record(error: Error, detail: Option<String>) -> Error {
    let is_programs = matches!(
        error.fault,
        Fault::AdapterSpawnFailed
            | Fault::AdapterExited
            | Fault::AdapterProtocolError
            | Fault::AdapterTimeout
            | Fault::ModelLoading
    );
    let detail = detail.filter(|detail| !detail.is_empty());
    let detail = detail.or_else(|| is_programs.then(|| error.message.clone().into_owned()));
    Error { detail, ..error }
}

/// A 4xx that is the client's to mend: its status, and its words if they are in OpenAI's shape.
fn passed_on(app: &App, upstream: &str, status: StatusCode, body: &[u8]) -> Error {
    let said = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let said = said.get("error");
    let text = |key: &str| said.and_then(|error| error.get(key)).and_then(Value::as_str).map(|text| clean(app, text));
    let message = text("message")
        .unwrap_or_else(|| format!("the upstream \"{upstream}\" refused the request with status {}", status.as_u16()));
    let mut error = Error::new(Fault::UpstreamRefused, message);
    error.status = Some(status.as_u16());
    error.code = text("code");
    error.param = text("param").map(Into::into);
    error
}

/// Cut to its length after the secrets are out, and beforehand to what could matter: half a secret is known too.
fn clean(app: &App, text: &str) -> String {
    short(&app.redact(short(text, 2 * MESSAGE_BYTES_MAX)), MESSAGE_BYTES_MAX).to_owned()
}

fn short(text: &str, bytes_max: usize) -> &str {
    let end = (0..=bytes_max.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

/// The error that an upstream's error object stands for where its status said 200.
#[must_use]
pub fn of_object(app: &App, upstream: &str, message: Option<&str>) -> Error {
    let message = match message {
        Some(message) => format!("the upstream \"{upstream}\" reported: {}", clean(app, message)),
        None => format!("the upstream \"{upstream}\" reported an error"),
    };
    Error::new(Fault::UpstreamFailed, message)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use http::header::{HeaderMap, HeaderName, HeaderValue};

    use super::wait_asked;

    #[test]
    fn an_upstreams_wait_is_understood_in_every_form() {
        // Sun, 06 Nov 1994 08:49:37 GMT, RFC 9110's own example.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (fields, wait) in [
            (&[("retry-after", "7")][..], Some(7)),
            (&[("retry-after", " 0.2 ")], Some(1)),
            (&[("retry-after", "0")], Some(0)),
            (&[("retry-after-ms", "1500")], Some(2)),
            (&[("retry-after-ms", "500"), ("retry-after", "9")], Some(1)),
            (&[("retry-after-ms", "soon"), ("retry-after", "9")], Some(9)),
            (&[("retry-after", "Sun, 06 Nov 1994 08:50:37 GMT")], Some(60)),
            (&[("retry-after", "Sun Nov  6 08:49:47 1994")], Some(10)),
            (&[("retry-after", "Sun, 06 Nov 1994 08:49:07 GMT")], Some(0)),
            (&[("retry-after", "1e30")], Some(u32::MAX)),
            (&[("retry-after", "-5")], None),
            (&[("retry-after", "nan")], None),
            (&[("retry-after", "tomorrow")], None),
            (&[], None),
        ] {
            let field = |(name, value): &(&'static str, &'static str)| {
                (HeaderName::from_static(name), HeaderValue::from_static(value))
            };
            let headers: HeaderMap = fields.iter().map(field).collect();
            assert_eq!(wait_asked(&headers, now), wait, "{fields:?}");
        }
    }
}
