//! The fake upstream plays each fault as its name says, seen through the raw client.

use std::time::{Duration, Instant};

use evergate_testkit::fake::{How, PROMPT_TOKENS, TEXT};
use evergate_testkit::link::Gone;
use evergate_testkit::raw::{self, get_request, post_request};
use evergate_testkit::sse::text_of;
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, Response, chat_request, post_chat};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);

fn stream(fake: &FakeUpstream, model: &str) -> Response {
    post_chat(fake.address(), model, true, &Value::Null)
}

fn unary(fake: &FakeUpstream, model: &str) -> Response {
    post_chat(fake.address(), model, false, &Value::Null)
}

#[test]
fn a_right_answer_is_right() {
    let fake = FakeUpstream::start();
    let response = unary(&fake, "ok");
    assert_eq!((response.status, response.content().as_str()), (200, TEXT));
    assert_eq!(response.json()["usage"]["prompt_tokens"], PROMPT_TOKENS);

    let response = post_chat(fake.address(), "stream-5", true, &json!({"stream_options": {"include_usage": true}}));
    let events = response.events();
    assert!(response.is_complete && response.chunks_hold_whole_events());
    assert_eq!(text_of(&events), "word0 word1 word2 word3 word4 ");
    assert!(events.last().unwrap().is_done());
    assert_eq!(events[events.len() - 2].json()["usage"]["completion_tokens"], 5);
    assert_eq!(events[events.len() - 3].json()["choices"][0]["finish_reason"], "stop");
    assert!(events[0].json()["usage"].is_null());
}

#[test]
fn a_kept_connection_is_numbered_and_requests_are_recorded() {
    let fake = FakeUpstream::start();
    let mut raw = Raw::connect(fake.address());
    let request = post_request("/v1/chat/completions?x=1", "x-Odd: 1\r\n", r#"{"model":"echo-request", "a":1.0}"#);
    for _ in 0..2 {
        raw.send(&request);
        let received = raw.read_response(LIMIT).json()["received"].clone();
        assert_eq!(received["body"], r#"{"model":"echo-request", "a":1.0}"#);
        assert!(request.starts_with(received["head"].as_str().unwrap().as_bytes()));
    }
    // Two at once: the second is read from what came with the first.
    raw.send(&[&request[..], &get_request("/v1/models", "")].concat());
    assert_eq!(raw.read_response(LIMIT).json()["received"]["connection"], 0);
    assert_eq!(raw.read_response(LIMIT).json()["object"], "list");
    raw.close();
    let _ = unary(&fake, "ok");
    let recorded = fake.requests();
    assert_eq!(recorded.iter().map(|one| one.connection).collect::<Vec<_>>(), [0, 0, 0, 0, 1]);
    assert_eq!(recorded[0].request.header("x-odd"), Some("1"));
    assert_eq!(fake.wait_end(4, LIMIT).how, How::Answered);
    evergate_testkit::wait_until("the ends of both connections", LIMIT, || fake.open_connections() == 0);
}

#[test]
fn cut_streams_are_cut_as_named() {
    let fake = FakeUpstream::start();
    for (model, is_complete, has_finish, dones) in [
        ("ok", true, true, 1),
        ("stale", true, true, 1),
        ("reset-mid", false, false, 0),
        ("eof-mid", false, false, 0),
        ("no-finish", true, false, 0),
        ("no-done", true, true, 0),
        ("half-event", true, false, 0),
        ("two-done", true, true, 3),
        ("after-done", true, true, 1),
        ("one-byte", true, true, 1),
        ("crlf", true, true, 1),
        ("big-event", true, true, 1),
        ("error-event-mid", true, false, 0),
        ("error-event-first", true, false, 0),
    ] {
        let response = stream(&fake, model);
        let events = response.events();
        let finished = events.iter().any(|event| event.data.contains("\"finish_reason\":\"stop\""));
        let found = (response.is_complete, finished, events.iter().filter(|event| event.is_done()).count());
        assert_eq!(found, (is_complete, has_finish, dones), "{model}");
        assert!(text_of(&events).starts_with("Hello ") || model == "error-event-first", "{model}");
        assert_eq!(model.starts_with("error-"), events.iter().any(|event| event.error_code().is_some()), "{model}");
    }
}

#[test]
fn cut_answers_are_cut_as_named() {
    let fake = FakeUpstream::start();
    for model in ["reset-mid", "eof-mid", "truncated"] {
        assert!(!unary(&fake, model).is_complete, "{model}");
    }
    for (model, gone) in [("close-early", Gone::Eof), ("reset-early", Gone::Reset)] {
        let mut raw = Raw::connect(fake.address());
        raw.send(&chat_request(model, true, &Value::Null));
        assert_eq!(raw.read_to_close(LIMIT), (Vec::new(), gone), "{model}");
    }
    assert!(serde_json::from_slice::<Value>(&unary(&fake, "bad-json").body).is_err());
    assert!(serde_json::from_slice::<Value>(&unary(&fake, "half-emoji").body).is_err());
    assert_eq!(unary(&fake, "odd-usage").json()["usage"]["prompt_tokens"], -5);
    assert_eq!(unary(&fake, "huge-100000").content().len(), 100_000);
    let mut raw = Raw::connect(fake.address());
    raw.send(&chat_request("too-long", false, &Value::Null));
    assert!(raw.read_response(LIMIT).is_complete);
    evergate_testkit::wait_until("bytes after the answer", LIMIT, || {
        let _ = raw.stays_open(Duration::ZERO);
        raw.link().inbox.starts_with(b"{\"and\"")
    });
}

#[test]
fn errors_have_their_status_and_shape() {
    let fake = FakeUpstream::start();
    for (model, status, code) in [
        ("status-401", 401, "invalid_api_key"),
        ("status-429", 429, "rate_limit_exceeded"),
        ("status-503", 503, "internal_error"),
        ("error-200", 200, "internal_error"),
        ("unheard-of", 404, "model_not_found"),
        ("redirect", 307, ""),
        ("html", 200, ""),
        ("html-502", 502, ""),
    ] {
        let response = unary(&fake, model);
        assert_eq!((response.status, response.error_code().as_str()), (status, code), "{model}");
    }
    assert_eq!(unary(&fake, "status-429").header("retry-after"), Some("1"));
    assert_eq!(unary(&fake, "status-503-300").header("retry-after"), Some("300"));
    assert_eq!(stream(&fake, "json-for-stream").content(), TEXT);
    assert_eq!(text_of(&unary(&fake, "events-for-unary").events()), TEXT);
}

#[test]
fn a_client_that_leaves_is_seen_at_once() {
    let fake = FakeUpstream::start();
    for (index, (model, reset)) in
        [("never-headers", false), ("silent", true), ("idle-mid", false), ("flood", true), ("pings-only", false)]
            .into_iter()
            .enumerate()
    {
        let mut raw = Raw::connect(fake.address());
        raw.send(&chat_request(model, true, &Value::Null));
        let _ = fake.wait_request(index, LIMIT);
        if model != "never-headers" {
            assert_eq!(raw.read_head(LIMIT).status, 200);
        }
        if matches!(model, "idle-mid" | "flood") {
            assert!(raw.next_event(LIMIT).is_some());
        }
        let left = Instant::now();
        if reset {
            raw.reset()
        } else {
            raw.close()
        }
        let seen = fake.wait_closed(index, LIMIT).saturating_duration_since(left);
        assert!(seen < Duration::from_secs(1), "{model}: {seen:?}");
    }
}

#[test]
fn a_held_answer_waits_for_its_release() {
    let fake = FakeUpstream::start();
    let (mut unary, mut stream) = (Raw::connect(fake.address()), Raw::connect(fake.address()));
    unary.send(&chat_request("hold", false, &Value::Null));
    stream.send(&chat_request("hold-mid", true, &Value::Null));
    assert_eq!(stream.read_head(LIMIT).status, 200);
    let first = stream.next_event(LIMIT).unwrap();
    assert!(unary.stays_open(Duration::from_millis(20)));
    fake.release();
    assert_eq!(unary.read_response(LIMIT).content(), TEXT);
    let mut text = first.text();
    while let Some(event) = stream.next_event(LIMIT) {
        text += &event.text();
    }
    assert_eq!(text, TEXT);
    assert!(stream.body_is_complete());
}

#[test]
fn pauses_lie_between_words() {
    let fake = FakeUpstream::start();
    let events = stream(&fake, "stream-3-30").events();
    let words: Vec<_> = events.iter().filter(|event| event.text().starts_with("word")).collect();
    assert_eq!(words.len(), 3);
    assert!(words[2].at.duration_since(words[0].at) >= Duration::from_millis(40));
}

#[test]
fn other_endpoints_and_tools_answer_too() {
    let fake = FakeUpstream::start();
    let body = r#"{"model":"ok","input":["a","b","c"],"dimensions":8}"#;
    let data = raw::post(fake.address(), "/v1/embeddings", body).json()["data"].clone();
    assert_eq!((data.as_array().unwrap().len(), data[2]["embedding"].as_array().unwrap().len()), (3, 8));
    assert_ne!(data[0]["embedding"], data[1]["embedding"]);
    let answer = raw::post(fake.address(), "/v1/completions", r#"{"model":"ok","prompt":"x"}"#).json();
    assert_eq!(answer["choices"][0]["text"], TEXT);
    let call = unary(&fake, "tools").json()["choices"][0].clone();
    assert_eq!(call["finish_reason"], "tool_calls");
    assert_eq!(call["message"]["tool_calls"][0]["function"]["arguments"], r#"{"city":"Oslo"}"#);
    assert_eq!(raw::get(fake.address(), "/v1/models/ok").json()["id"], "ok");
    assert_eq!(raw::get(fake.address(), "/elsewhere").status, 404);
}

#[test]
fn unix_sockets_and_tls_carry_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let fake = FakeUpstream::start_unix(&folder.path().join("fake.sock"));
    assert_eq!(unary(&fake, "ok").content(), TEXT);

    let identity = Identity::generate();
    let fake = FakeUpstream::start_tls(&identity);
    let mut raw = Raw::connect_tls(fake.address(), &identity.client_config(&["h2", "http/1.1"]));
    for model in ["ok", "big-event", "ok"] {
        raw.send(&chat_request(model, true, &Value::Null));
        let response = raw.read_response(LIMIT);
        assert!(response.is_complete && response.events().last().unwrap().is_done(), "{model}");
    }
    assert_eq!(raw.link().alpn(), Some(&b"http/1.1"[..]));
    raw.send(&chat_request("silent", true, &Value::Null));
    assert_eq!(raw.read_head(LIMIT).status, 200);
    raw.close();
    let _ = fake.wait_closed(3, LIMIT);

    let stranger = Identity::for_names(&["localhost"]);
    let mut raw = Raw::connect_tls(fake.address(), &stranger.client_config(&[]));
    raw.send(b"");
    assert!(raw.try_read_response(LIMIT).is_err());
}

#[test]
fn dropping_a_fake_ends_its_connections() {
    let fake = FakeUpstream::start();
    let mut raw = Raw::connect(fake.address());
    raw.send(&chat_request("never-headers", false, &Value::Null));
    let _ = fake.wait_request(0, LIMIT);
    drop(fake);
    let (bytes, _) = raw.read_to_close(LIMIT);
    assert!(bytes.is_empty());
}

#[test]
fn a_start_that_fails_says_how() {
    // Any program that ends at once without a run file.
    let ended = Evergate::builder("/bin/cat").arg("--no-such-option").try_start().err().unwrap();
    assert_eq!(ended.code(), 1);
    assert!(ended.stderr.contains("option"), "{}", ended.stderr);
}
