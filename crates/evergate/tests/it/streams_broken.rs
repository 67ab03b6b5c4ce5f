//! Streams that break off: an error event and no `[DONE]`, never a silent cut and never a false end (fact 1).

use std::time::{Duration, Instant};

use evergate_testkit::fake::TEXT;
use evergate_testkit::sse::text_of;
use evergate_testkit::{Evergate, FakeUpstream};
use serde_json::json;

use crate::support::{EXE, LIMIT, ONE_WORKER, assert_failed_stream, assert_good_stream, before, chat};

/// F2, F3: what came whole is passed on, what did not is dropped.
#[test]
fn a_stream_that_breaks_off_ends_with_an_error() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for script in ["reset-mid", "eof-mid", "no-finish", "half-event"] {
        let response = chat(&gateway, script, true);
        assert_eq!(response.status, 200, "{script}");
        let events = response.events();
        assert_failed_stream(&events, response.is_complete, "upstream_disconnected");
        assert!(text_of(&events).starts_with("Hello "), "{script}: {events:?}");
        assert!(!response.text().contains("cut he"), "{script}: half an event was passed on");
        assert!(response.chunks_hold_whole_events());
    }
}

#[test]
fn a_broken_stream_is_on_record() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let response = chat(&gateway, "eof-mid", true);
    let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
    assert_eq!((&record["cause"], &record["status"]), (&json!("upstream_disconnected"), &json!(200)), "{record}");
}

/// F1.
#[test]
fn a_missing_done_after_the_finish_is_added() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let response = chat(&gateway, "no-done", true);
    let events = response.events();
    assert_good_stream(&events, response.is_complete);
    assert_eq!(text_of(&events), TEXT);
}

/// F4: the first one is the end, and its connection is not used again.
#[test]
fn nothing_follows_done() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    for script in ["two-done", "after-done"] {
        let response = chat(&gateway, script, true);
        let events = response.events();
        assert_good_stream(&events, response.is_complete);
        assert_eq!(text_of(&events), TEXT, "{script}");
        assert_eq!(chat(&gateway, "ok", true).events().len(), events.len(), "after {script}");
    }
}

/// F17: passed on or made ours, it is the one error and the end.
#[test]
fn an_error_event_midway_is_the_end() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let response = chat(&gateway, "error-event-mid", true);
    let events = response.events();
    let code = events.last().unwrap().error_code().expect("an error at the end");
    assert_failed_stream(&events, response.is_complete, &code);
    let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
    assert_ne!(record["cause"], "ok", "{record}");
}

/// F18: before the head is out a failure has a real status.
#[test]
fn a_failure_before_the_first_event_has_a_real_status() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for (script, status) in [
        ("error-event-first", 502),
        ("status-500", 502),
        ("status-429", 429),
        ("status-404", 404),
        ("close-early", 502),
        ("empty", 502),
    ] {
        let response = chat(&gateway, script, true);
        assert_eq!((response.status, response.header("content-type")), (status, Some("application/json")), "{script}");
        assert!(!response.error_code().is_empty());
    }
}

/// F10.
#[test]
fn an_event_beyond_the_limit_ends_the_stream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[limits]\nevent = \"64KiB\"\n");
    let response = chat(&gateway, "big-event-100000", true);
    assert_eq!(response.status, 200);
    assert_failed_stream(&response.events(), response.is_complete, "upstream_bad_response");
    assert!(response.body.len() < 64 * 1024);
    let response = chat(&gateway, "big-event-60000", true);
    assert_good_stream(&response.events(), response.is_complete);
}

/// F6.
#[test]
fn silence_midway_ends_the_stream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nidle = \"400ms\"\nkeepalive = \"100ms\"\n");
    let began = Instant::now();
    let response = chat(&gateway, "idle-mid", true);
    let events: Vec<_> = response.events().into_iter().filter(|event| !event.is_comment).collect();
    assert_failed_stream(&events, response.is_complete, "upstream_timeout");
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(350) && took < Duration::from_secs(3), "{took:?}");
    let _ = fake.wait_closed(0, LIMIT);
}

/// F22.
#[test]
fn stream_total_ends_a_stream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nstream_total = \"600ms\"\n");
    let began = Instant::now();
    let response = chat(&gateway, "stream-1000-50", true);
    assert_failed_stream(&response.events(), response.is_complete, "deadline_exceeded");
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(550) && took < Duration::from_secs(3), "{took:?}");
    let left = fake.wait_closed(0, LIMIT).saturating_duration_since(began);
    assert!(left < Duration::from_secs(3), "{left:?}");
    assert!(response.text().contains("word5"), "what came before was passed on");
    let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
    assert_eq!(record["cause"], "deadline_exceeded", "{record}");
}

/// A client that goes on after a broken stream is served on the same connection or told to make a new one.
#[test]
fn a_broken_stream_leaves_a_connection_that_is_right_or_closed() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut raw = crate::support::open(&gateway, "eof-mid", true);
    let response = raw.read_response(LIMIT);
    assert_failed_stream(&response.events(), response.is_complete, "upstream_disconnected");
    let closing = response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    if !closing {
        raw.send(&evergate_testkit::chat_request("fake/ok", false, &serde_json::Value::Null));
        assert_eq!(raw.read_response(LIMIT).content(), TEXT);
    }
}

/// An upstream that quotes our credential in an error, in whatever form, does not pass it on to the client.
#[test]
fn a_credential_in_an_upstreams_error_is_taken_out() {
    let fake = FakeUpstream::start();
    // The fake's errors say "the fake upstream says 500": one of these words is the credential here.
    let config = format!(
        "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[upstreams.fake]\nbase_url = \"{}\"\napi_key = {{ env = \"KEY\" }}\n",
        fake.base_url()
    );
    let gateway = Evergate::builder(EXE).config(config).env("KEY", "upstream").start();
    for (script, stream) in
        [("error-200", false), ("status-400", false), ("error-event-first", true), ("error-event-mid", true)]
    {
        let text = chat(&gateway, script, stream).text();
        assert!(text.contains("the fake [redacted] says"), "{script}: {text}");
        assert!(!text.contains("fake upstream"), "{script}: {text}");
    }
}
