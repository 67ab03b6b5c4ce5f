//! Streams that are odd and not broken: they pass as they are. And whole answers where a stream was asked for.

use evergate_testkit::fake::{PROMPT_TOKENS, TEXT};
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::sse::text_of;
use evergate_testkit::{Evergate, FakeUpstream, Raw, post_chat};
use serde_json::{Value, json};

use crate::support::{
    CHAT, LIMIT, ONE_WORKER, assert_error, assert_failed_stream, assert_good_stream, before, chat, via,
};

/// What passes through, byte for byte, and its record.
#[track_caller]
fn assert_passes(gateway: &Evergate, direct: &FakeUpstream, script: &str, extra: &Value) -> Value {
    let plain = post_chat(direct.address(), script, true, extra);
    let passed = post_chat(&gateway.addr(), &via(script), true, extra);
    assert!(passed.body == plain.body, "{script}:\n{}\nbecame\n{}", plain.text(), passed.text());
    assert!(passed.is_complete && passed.chunks_hold_whole_events());
    assert!(passed.events().last().unwrap().is_done(), "{script}");
    let record = gateway.wait_access(passed.header("x-request-id").unwrap(), LIMIT);
    assert_eq!(record["cause"], "ok", "{record}");
    record
}

/// F12, F13, F14, F16: dialects are not translated, so nothing is normalised: the client's library reads what its provider
/// sent. A connection that said all of it is kept.
#[test]
fn f13_odd_chunks_pass_as_they_are() {
    let (direct, behind) = (FakeUpstream::start(), FakeUpstream::start());
    let gateway = before(&behind, ONE_WORKER);
    for script in ["odd-tools", "odd-chunks", "after-finish", "bad-json", "half-emoji"] {
        assert_passes(&gateway, &direct, script, &Value::Null);
    }
    assert_eq!(behind.connections().len(), 1);
}

/// F15: the last usage counts; none is made up where none was sent.
#[test]
fn f15_the_last_usage_counts_and_none_is_made_up() {
    let (direct, behind) = (FakeUpstream::start(), FakeUpstream::start());
    let gateway = before(&behind, ONE_WORKER);
    let record = assert_passes(&gateway, &direct, "two-usages", &Value::Null);
    assert_eq!((&record["tokens_in"], &record["tokens_out"]), (&json!(PROMPT_TOKENS), &json!(5)), "{record}");
    let record = assert_passes(&gateway, &direct, "ok", &Value::Null);
    assert_eq!((&record["tokens_in"], &record["tokens_out"]), (&Value::Null, &Value::Null), "{record}");
}

fn ask(gateway: &Evergate, path: &str, body: &str) -> evergate_testkit::raw::Response {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(path, "", body));
    raw.read_response(LIMIT)
}

/// F19: an upstream that does not heed `stream: true` is heard: its answer comes as a stream of one chunk.
#[test]
fn f19_a_whole_answer_to_a_stream_request_is_told_as_a_stream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let usage = json!({"stream_options": {"include_usage": true}});
    for (extra, chunks) in [(&Value::Null, 2), (&usage, 3)] {
        let response = ask(&gateway, CHAT, &chat_body(&via("json-for-stream"), true, extra));
        assert_eq!((response.status, response.header("content-type")), (200, Some("text/event-stream")));
        let events = response.events();
        assert_good_stream(&events, response.is_complete);
        assert_eq!((text_of(&events).as_str(), events.len()), (TEXT, chunks), "{}", response.text());
        let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
        assert_eq!((&record["cause"], &record["stream"]), (&json!("ok"), &json!(true)), "{record}");
        assert_eq!(record["tokens_in"], PROMPT_TOKENS, "{record}");
    }
    let body = r#"{"model":"fake/json-for-stream","prompt":"x","stream":true}"#;
    let response = ask(&gateway, "/v1/completions", body);
    assert_good_stream(&response.events(), response.is_complete);
    assert_eq!(text_of(&response.events()), TEXT);
    assert_eq!(fake.connections().len(), 1, "the connection is kept");
}

/// F19: what cannot be told truthfully is refused with a real status: an error, nonsense, an answer that is too large or
/// breaks off, and a stream where a whole answer was asked for.
#[test]
fn f19_what_is_no_answer_is_refused() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[limits]\nanswer = \"64KiB\"\n");
    for (script, stream, code) in [
        ("error-200", true, "upstream_failed"),
        ("no-choices", true, "upstream_bad_response"),
        ("html", true, "upstream_bad_response"),
        ("empty", true, "upstream_bad_response"),
        ("huge-100000", true, "upstream_bad_response"),
        ("events-for-unary", false, "upstream_bad_response"),
    ] {
        assert_error(&chat(&gateway, script, stream), 502, code);
    }
}

/// F1: what had its finish was complete, however its connection ended.
#[test]
fn f1_a_cut_after_the_finish_takes_nothing_away() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for script in ["no-done", "no-done-cut"] {
        let response = chat(&gateway, script, true);
        assert_good_stream(&response.events(), response.is_complete);
        assert_eq!(text_of(&response.events()), TEXT, "{script}");
        let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
        assert_eq!(record["cause"], "ok", "{record}");
    }
}

/// F3: a choice that has its finish says nothing of another one.
#[test]
fn f3_a_stream_cut_in_its_second_choice_ends_with_an_error() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for script in ["second-open", "second-open-cut"] {
        let response = chat(&gateway, script, true);
        assert!(response.text().contains("\"index\":1"), "{}", response.text());
        assert_failed_stream(&response.events(), response.is_complete, "upstream_disconnected");
        let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
        assert_eq!(record["cause"], "upstream_disconnected", "{record}");
    }
}

/// F2, F3, F7: in the middle of an event and of a character; what was whole is passed on.
#[test]
fn f3_a_stream_cut_in_an_event_ends_with_an_error() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for script in ["half-event", "reset-mid", "eof-mid", "no-finish"] {
        let response = chat(&gateway, script, true);
        assert_failed_stream(&response.events(), response.is_complete, "upstream_disconnected");
        let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
        assert_eq!(record["cause"], "upstream_disconnected", "{record}");
    }
    let count = "cause=\"upstream_disconnected\"} 4\n";
    evergate_testkit::wait_until("four are counted", LIMIT, || gateway.metrics().contains(count));
}
