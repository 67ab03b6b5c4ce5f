//! What the tests share: ready-made gateways, and the contract of error answers.

use std::time::Duration;

use evergate_testkit::raw::{Response, chat_body, get_request, post_request};
use evergate_testkit::sse::Event;
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The binary under test.
pub const EXE: &str = env!("CARGO_BIN_EXE_evergate");

/// Long enough for a busy machine, short enough to end a test that hangs.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Whether this is `./test --full`: the counts of the specification in place of those that a minute allows.
pub fn is_full() -> bool {
    std::env::var_os("EVERGATE_TEST_FULL").is_some_and(|value| value == "1")
}

/// The chat endpoint.
pub const CHAT: &str = "/v1/chat/completions";

/// One worker, where a test needs to know which process serves it.
pub const ONE_WORKER: &str = "[workers]\nmin = 1\nmax = 1\n";

/// A gateway that serves `echo` only.
#[track_caller]
pub fn echo() -> Evergate {
    Evergate::builder(EXE).start()
}

/// A gateway that serves `echo` only, with more sections.
#[track_caller]
pub fn echo_with(more: &str) -> Evergate {
    let text = format!(
        "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [models.echo]\ntargets = [{{ upstream = \"echo\" }}]\n{more}"
    );
    Evergate::builder(EXE).config(text).start()
}

/// A gateway before `fake`, which is reached as `fake/SCRIPT`; `more` is added to the configuration.
#[track_caller]
pub fn before(fake: &FakeUpstream, more: &str) -> Evergate {
    Evergate::builder(EXE).config(gateway_config(fake.base_url(), &[], more)).start()
}

/// Waits until exactly that many workers are ready.
#[track_caller]
pub fn wait_ready(gateway: &Evergate, count: usize) {
    let line = format!("evergate_workers{{phase=\"ready\"}} {count}\n");
    // A reload replaces the clerk too, which does not wait for a reader of metrics that it has just accepted.
    let metrics = || {
        let mut raw = Raw::try_connect(&gateway.admin()).ok()?;
        raw.try_send(&get_request("/metrics", "")).ok()?;
        raw.try_read_response(LIMIT).ok().map(|response| response.text())
    };
    wait_until("as many ready workers", 3 * LIMIT, || metrics().is_some_and(|text| text.contains(&line)));
}

/// Sends a signal to a process; that there is no such process any more is no mistake.
pub fn send(pid: i32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
}

/// The name under which a script of the fake upstream is asked for.
pub fn via(script: &str) -> String {
    format!("fake/{script}")
}

/// One chat request for a script, on a connection of its own.
#[track_caller]
pub fn chat(gateway: &Evergate, script: &str, stream: bool) -> Response {
    evergate_testkit::post_chat(&gateway.addr(), &via(script), stream, &Value::Null)
}

/// Sends a chat request for a script and reads nothing yet.
#[track_caller]
pub fn open(gateway: &Evergate, script: &str, stream: bool) -> Raw {
    open_as(gateway, script, stream, "")
}

/// As `open`, with more header fields, each with its CRLF.
#[track_caller]
pub fn open_as(gateway: &Evergate, script: &str, stream: bool, fields: &str) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, fields, &chat_body(&via(script), stream, &Value::Null)));
    raw
}

/// A stream whose head and first event have come.
#[track_caller]
pub fn open_stream(gateway: &Evergate, script: &str) -> Raw {
    let mut raw = open(gateway, script, true);
    assert_eq!(raw.read_head(LIMIT).status, 200);
    assert!(raw.next_event(LIMIT).is_some(), "no first event");
    raw
}

/// The rest of a stream.
#[track_caller]
pub fn rest_of(raw: &mut Raw) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = raw.next_event(LIMIT) {
        events.push(event);
    }
    events
}

/// Waits until that many requests are counted with that status and cause, over all models.
#[track_caller]
pub fn assert_counted(gateway: &Evergate, status: u16, cause: &str, count: u64) {
    let end = format!(",status=\"{status}\",cause=\"{cause}\"}} ");
    let counted = || {
        let text = gateway.metrics();
        let lines = text.lines().filter(|line| line.starts_with("evergate_requests_total{"));
        lines.filter_map(|line| line.split_once(&end)?.1.parse::<u64>().ok()).sum::<u64>()
    };
    wait_until(&format!("{count} counted as {status} {cause}"), LIMIT, || counted() == count);
}

/// Checks the promise that an upstream is left within 100 ms of its client's leaving: nine times of ten, in one round of several,
/// since in any of them the machine may have given this test or the gateway no processor.
#[track_caller]
pub fn assert_left_soon(what: &str, mut measure: impl FnMut() -> Vec<Duration>) {
    const ROUNDS: usize = 8;
    let mut rounds = Vec::new();
    while rounds.len() < ROUNDS {
        let mut times = measure();
        times.sort_unstable();
        assert!(times.len() >= 10, "too few to tell");
        let (median, most) = (times[times.len() / 2], times[times.len() * 9 / 10 - 1]);
        println!(
            "client gone, {what}: upstream left after {median:?} (median of {}), nine of ten {most:?}",
            times.len()
        );
        if most < Duration::from_millis(100) {
            return;
        }
        rounds.push((median, most));
    }
    panic!("{what}: median and nine of ten in each round: {rounds:?}");
}

/// What the error table promises about a code: type, `x-should-retry`, whether waiting helps, whether the connection
/// ends.
fn promise(code: &str) -> (&'static str, &'static str, bool, bool) {
    const REQUEST: &str = "invalid_request_error";
    const SERVER: &str = "server_error";
    match code {
        "malformed_request" => (REQUEST, "false", false, true),
        "invalid_json"
        | "invalid_value"
        | "invalid_api_key"
        | "model_not_found"
        | "not_found"
        | "method_not_allowed"
        | "unsupported_media_type" => (REQUEST, "false", false, false),
        "origin_not_allowed" => ("permission_error", "false", false, false),
        "request_timeout" => (REQUEST, "true", false, true),
        "request_too_large" | "uri_too_long" | "headers_too_large" => (REQUEST, "false", false, true),
        "insufficient_quota" => ("insufficient_quota", "false", false, false),
        "rate_limit_exceeded" => ("rate_limit_error", "true", true, false),
        "internal_error"
        | "upstream_bad_response"
        | "upstream_connect_failed"
        | "upstream_disconnected"
        | "upstream_failed"
        | "upstream_timeout"
        | "first_token_timeout" => (SERVER, "true", false, false),
        "upstream_auth_failed" | "deadline_exceeded" => (SERVER, "false", false, false),
        "server_shutting_down" => (SERVER, "true", true, true),
        "overloaded" => (SERVER, "true", true, false),
        other => panic!("the error table has no code {other:?}"),
    }
}

/// Checks an error answer against the table: status, body, headers.
#[track_caller]
pub fn assert_error(response: &Response, status: u16, code: &str) {
    assert_refusal(response, status, code);
    let (.., closes) = promise(code);
    assert_eq!(is_closing(response), closes, "{code}: connection: close");
}

fn is_closing(response: &Response) -> bool {
    response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

/// As [`assert_error`], but the request's body may not have come to its end, which ends the connection too.
#[track_caller]
pub fn assert_refusal(response: &Response, status: u16, code: &str) {
    let (kind, should_retry, waits, closes) = promise(code);
    let text = response.text();
    assert_eq!((response.status, response.error_code().as_str()), (status, code), "{text}");
    assert_error_shape(response);
    assert_eq!(response.json()["error"]["type"], kind, "{text}");
    assert_eq!(response.header("x-should-retry"), Some(should_retry), "{code}");
    assert_eq!(response.header("retry-after").is_some(), waits, "{code}");
    assert!(is_closing(response) || !closes, "{code}: connection: close");
}

/// Checks what every error answer has: a whole JSON body with the four fields, a request id, `x-should-retry`.
#[track_caller]
pub fn assert_error_shape(response: &Response) {
    assert!(response.is_complete);
    assert_eq!(response.header("content-type"), Some("application/json"));
    let value = response.json();
    let error = value["error"].as_object().expect("an error object");
    let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["code", "message", "param", "type"]);
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert!(matches!(response.header("x-should-retry"), Some("true" | "false")));
    assert_request_id(response);
}

/// Checks that there is one well-formed `x-request-id`.
#[track_caller]
pub fn assert_request_id(response: &Response) {
    let ids: Vec<&String> =
        response.headers.iter().filter(|(name, _)| name == "x-request-id").map(|(_, value)| value).collect();
    assert_eq!(ids.len(), 1, "{:?}", response.headers);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
    assert!((1..=64).contains(&ids[0].len()) && ids[0].bytes().all(is_plain), "{ids:?}");
}

/// Checks the end of a stream that failed: one error event with that code as the last event, no `[DONE]`, and a body
/// that ends in order, since a cut one hides the message from the official SDKs (fact 1).
#[track_caller]
pub fn assert_failed_stream(events: &[Event], is_complete: bool, code: &str) {
    let said: Vec<&str> = events.iter().map(|event| event.data.as_str()).collect();
    assert!(is_complete, "the body was cut after {said:?}");
    assert!(!events.iter().any(Event::is_done), "{said:?}");
    let codes: Vec<String> = events.iter().filter_map(Event::error_code).collect();
    assert_eq!(codes, [code], "{said:?}");
    assert!(events.last().unwrap().error_code().is_some(), "{said:?}");
    let error = events.last().unwrap().json()["error"].clone();
    assert!(error["message"].is_string() && error["type"].is_string() && error.get("param").is_some(), "{error}");
}

/// The words of the error event that ends a stream.
#[track_caller]
pub fn last_message(events: &[Event]) -> String {
    let error = events.last().expect("an event").json()["error"].clone();
    error["message"].as_str().unwrap_or_else(|| panic!("no message in {error}")).to_owned()
}

/// Checks the end of a stream that went well: exactly one `[DONE]`, as the last event, and no error.
#[track_caller]
pub fn assert_good_stream(events: &[Event], is_complete: bool) {
    let said: Vec<&str> = events.iter().map(|event| event.data.as_str()).collect();
    assert!(is_complete, "the body was cut after {said:?}");
    assert!(events.iter().all(|event| event.error_code().is_none()), "{said:?}");
    assert_eq!(events.iter().filter(|event| event.is_done()).count(), 1, "{said:?}");
    assert!(events.last().unwrap().is_done(), "{said:?}");
}

/// A plain request on a new connection works: whatever came before has done no harm.
#[track_caller]
pub fn assert_alive(gateway: &Evergate) {
    let response = evergate_testkit::post_chat(&gateway.addr(), "echo", false, &Value::Null);
    assert_eq!((response.status, response.content().as_str()), (200, "Say hello"));
}

/// Holds back other tests that ask for the whole machine for as long as it lives: each of them measures what the others would
/// take from it.
pub fn machine() -> std::sync::MutexGuard<'static, ()> {
    static MACHINE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
