//! What clients send: heads, framing and bodies.

use evergate_testkit::corpus::{self, Case};
use evergate_testkit::link::Gone;
use evergate_testkit::raw::{get_request, post_request};
use evergate_testkit::{FakeUpstream, Raw, Response};

use super::run;
use crate::support::{CHAT, LIMIT, before, echo_with};

/// Short limits, so that what never ends is seen to end.
const SHORT: &str = "[limits]\nbody = \"64KiB\"\n[timeouts]\nheader = \"1500ms\"\nclient_idle = \"2s\"\nbody_idle = \"1500ms\"\nbody = \"4s\"\n";

/// B1-B18: `tests/hostile/http1.txt`.
#[test]
fn no_bytes_of_a_client_harm_the_gateway() {
    let gateway = echo_with(SHORT);
    let cases = corpus::parse(include_str!("../../hostile/http1.txt"));
    run(&gateway, &cases, 250, |case| {
        let mut raw = Raw::try_connect(&gateway.addr()).map_err(|error| error.to_string())?;
        for piece in &case.pieces {
            // A refusal may come before the last byte; what was said can still be read.
            if raw.try_send(piece).is_err() {
                break;
            }
        }
        match case.expect.as_str() {
            "closed" => nothing_more(&mut raw),
            "left" => {
                raw.half_close();
                // Whatever is said now is said to nobody.
                raw.read_to_close(LIMIT);
                Ok(())
            }
            expect => match expect.strip_prefix("text ") {
                Some(status) => one_old_answer(&mut raw, status),
                None => answers(raw, expect),
            },
        }
    });
}

/// The connection ends, and not a byte comes before.
fn nothing_more(raw: &mut Raw) -> Result<(), String> {
    let (bytes, gone) = raw.read_to_close(LIMIT);
    let said = bytes[..bytes.len().min(300)].escape_ascii();
    match gone {
        Gone::Eof | Gone::Reset if bytes.is_empty() => Ok(()),
        _ => Err(format!("it said \"{said}\"")),
    }
}

/// One answer whose body ends with the connection.
fn one_old_answer(raw: &mut Raw, status: &str) -> Result<(), String> {
    let (bytes, _) = raw.read_to_close(LIMIT);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let is_right = text.starts_with(&format!("HTTP/1.1 {status} ")) || text.starts_with(&format!("HTTP/1.0 {status} "));
    let is_one = text.matches("HTTP/1.").count() == 1;
    let has_body = text.split_once("\r\n\r\n").is_some_and(|(_, body)| body.starts_with('{'));
    if is_right && is_one && (has_body || status == "405") { Ok(()) } else { Err(format!("it said {text:?}")) }
}

/// Answers in their order; then the connection ends, or is as good as new.
fn answers(mut raw: Raw, expect: &str) -> Result<(), String> {
    let (list, closes) = match expect.strip_suffix(" closed") {
        Some(list) => (list, true),
        None => (expect, false),
    };
    let mut last = None;
    for wanted in list.split(", ") {
        let response = raw.try_read_response(LIMIT)?;
        check(&response, wanted, closes)?;
        last = Some(response);
    }
    let says_close = last.is_some_and(|last| last.header("connection") == Some("close"));
    if closes || says_close {
        return nothing_more(&mut raw);
    }
    raw.send(&get_request("/v1/models", "x-request-id: still-in-step\r\n"));
    let response = raw.try_read_response(LIMIT).map_err(|reason| format!("not in step behind it: {reason}"))?;
    if response.status == 200 && response.header("x-request-id") == Some("still-in-step") {
        return Ok(());
    }
    Err(format!("not in step behind it: {}", response.text()))
}

/// One answer against `200`, or against `400 invalid_value model`: status, code and param. Where the connection is to end, an answer
/// may say so though its code alone is no reason.
fn check(response: &Response, wanted: &str, may_close: bool) -> Result<(), String> {
    let mut words = wanted.split(' ');
    let status: u16 = words.next().and_then(|status| status.parse().ok()).ok_or("no status is expected")?;
    let code = words.next();
    let said = || format!("{} {}", response.status, response.text());
    if response.status != status || !response.is_complete {
        return Err(said());
    }
    let Some(code) = code else { return Ok(()) };
    if response.error_code() != code {
        return Err(said());
    }
    // Type, retry and the rest as the table has them.
    if may_close {
        crate::support::assert_refusal(response, status, code);
    } else {
        crate::support::assert_error(response, status, code);
    }
    let param = response.json()["error"]["param"].clone();
    match words.next() {
        Some(wanted) if param != wanted => Err(format!("param {param}: {}", said())),
        _ => Ok(()),
    }
}

/// C1-C9: `tests/hostile/json.txt`. A body that is refused does not reach the upstream; one that is not arrives there byte
/// for byte, but for the model's name.
#[test]
fn no_body_harms_the_gateway() {
    let fake = FakeUpstream::start();
    let more = "[models.m]\ntargets = [{ upstream = \"fake\", model = \"ok\" }]\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let gateway = before(&fake, &format!("{more}{SHORT}"));
    let cases = corpus::parse(include_str!("../../hostile/json.txt"));
    run(&gateway, &cases, 150, |case| {
        let id = format!("line-{}", case.line);
        let mut raw = Raw::try_connect(&gateway.addr()).map_err(|error| error.to_string())?;
        let body = case.bytes();
        let head = post_request(CHAT, &format!("idempotency-key: {id}\r\n"), &" ".repeat(body.len()));
        raw.send(&[&head[..head.len() - body.len()], &body].concat());
        answered(&mut raw, case)?;
        let arrived: Vec<Vec<u8>> = fake
            .requests()
            .into_iter()
            .filter(|recorded| recorded.request.header("idempotency-key") == Some(&id))
            .map(|recorded| recorded.request.body)
            .collect();
        match (case.expect.starts_with("passed"), arrived.as_slice()) {
            (true, [one]) if *one == renamed(&body) => Ok(()),
            (false, []) => Ok(()),
            (_, other) => Err(format!(
                "{} arrived at the upstream: {:?}",
                other.len(),
                other.first().map(|body| String::from_utf8_lossy(body).into_owned())
            )),
        }
    });
}

/// `passed`: whatever the upstream said of it; else as in `http1.txt`. The connection goes on behind every one.
fn answered(raw: &mut Raw, case: &Case) -> Result<(), String> {
    let response = raw.try_read_response(LIMIT)?;
    if case.expect != "passed" {
        check(&response, case.expect.strip_prefix("passed ").unwrap_or(&case.expect), false)?;
    }
    raw.send(&get_request("/v1/models", ""));
    let behind = raw.try_read_response(LIMIT)?;
    if behind.status == 200 { Ok(()) } else { Err(format!("not in step behind it: {}", behind.status)) }
}

/// The body with the upstream's name of the model: every spelling of `"m"` at the key `model` that the file uses.
fn renamed(body: &[u8]) -> Vec<u8> {
    let names: [&[u8]; 2] = [b"\"m\"", b"\"\\u006d\""];
    let keys: [&[u8]; 3] = [b"\"model\"", b"\"mod\\u0065l\"", b"\"\\u006d\\u006f\\u0064\\u0065\\u006c\""];
    let starts = keys.iter().filter_map(|key| Some(position(body, key)? + key.len()));
    let Some(start) = starts.min() else { return body.to_vec() };
    let found = names.iter().filter_map(|name| Some((position(&body[start..], name)? + start, name.len()))).min();
    let Some((at, length)) = found else { return body.to_vec() };
    [&body[..at], b"\"ok\"", &body[at + length..]].concat()
}

fn position(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
