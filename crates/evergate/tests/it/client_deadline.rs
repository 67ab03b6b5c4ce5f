//! A13: a client that says how long it waits (`x-request-timeout`) is answered by then, and its upstream is left.

use std::time::{Duration, Instant};

use evergate_testkit::fake::TEXT;
use evergate_testkit::raw::{Response, chat_body, post_request};
use evergate_testkit::sse::text_of;
use evergate_testkit::{Evergate, FakeUpstream, Raw};
use serde_json::{Value, json};

use crate::support::{
    CHAT, LIMIT, ONE_WORKER, assert_error, assert_failed_stream, assert_good_stream, before, open_stream, rest_of, via,
};

fn ask(gateway: &Evergate, model: &str, stream: bool, fields: &str) -> Response {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, fields, &chat_body(model, stream, &Value::Null)));
    raw.read_response(LIMIT)
}

fn asks(gateway: &Evergate, model: &str, stream: bool, time: &str) -> Response {
    ask(gateway, model, stream, &format!("x-request-timeout: {time}\r\n"))
}

#[track_caller]
fn assert_in_time(began: Instant, limit: Duration) {
    let took = began.elapsed();
    assert!(took >= limit.mul_f64(0.9) && took < limit + Duration::from_secs(2), "{took:?} for {limit:?}");
}

const TIME: Duration = Duration::from_millis(400);

#[test]
fn a13_a_shorter_deadline_of_the_client_ends_the_request() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let cases = [
        ("never-headers", false, "400ms"),
        ("idle-mid", false, "0.4"),
        ("never-headers", true, "0.4s"),
        ("pings-only", true, "400ms"),
    ];
    for (n, (script, stream, time)) in cases.into_iter().enumerate() {
        let began = Instant::now();
        let fields = format!("x-request-id: a13-{n}\r\nx-request-timeout: {time}\r\n");
        let response = ask(&gateway, &via(script), stream, &fields);
        // The table says "do not retry": who had no time for one has none for three.
        assert_error(&response, 504, "deadline_exceeded");
        assert_in_time(began, TIME);
        assert!(response.error_message().ends_with("within x-request-timeout"), "{}", response.text());
        let left = fake.wait_closed(n, LIMIT).saturating_duration_since(began);
        assert!(left < TIME + Duration::from_secs(1), "{script}: the upstream was left after {left:?}");
        let record = gateway.wait_access(&format!("a13-{n}"), LIMIT);
        assert_eq!(record["cause"], "deadline_exceeded", "{record}");
        assert_eq!(record["detail"], "x-request-timeout", "{record}");
        assert_eq!(fake.requests()[n].request.header("x-request-timeout"), None);
    }
}

/// The whole answer is meant, also of a stream that has begun.
#[test]
fn a13_a_stream_under_way_ends_at_the_clients_deadline() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\ntotal = \"200ms\"\n");
    for model in [via("stream-200-50"), via("idle-mid")] {
        let began = Instant::now();
        let response = asks(&gateway, &model, true, "400ms");
        assert_in_time(began, TIME);
        assert_failed_stream(&response.events(), response.is_complete, "deadline_exceeded");
        assert!(response.text().contains("within x-request-timeout"), "{}", response.text());
    }
    let _ = (fake.wait_closed(0, LIMIT), fake.wait_closed(1, LIMIT));
}

#[test]
fn a13_a_longer_deadline_changes_nothing() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\ntotal = \"400ms\"\nstream_total = \"900ms\"\n");
    assert_eq!(asks(&gateway, &via("ok"), false, "600").content(), TEXT);
    let response = asks(&gateway, &via("ok"), true, "600");
    assert_good_stream(&response.events(), response.is_complete);
    assert_eq!(text_of(&response.events()), TEXT);
    let began = Instant::now();
    let response = asks(&gateway, &via("never-headers"), false, "600");
    assert_error(&response, 504, "deadline_exceeded");
    assert!(response.error_message().ends_with("timeouts.total"));
    assert_in_time(began, TIME);
    let response = asks(&gateway, &via("stream-200-50"), true, "99999999999");
    assert!(response.text().contains("timeouts.stream_total"), "{}", response.text());
}

/// In the line before the places, and before the next of several targets.
#[test]
fn a13_waiting_counts() {
    let fake = FakeUpstream::start();
    let target = |model: &str| format!("{{ upstream = \"fake\", model = \"{model}\" }}");
    let targets = ["delay-5000", "ok"].map(target).join(", ");
    let more = format!("[workers]\nmin = 1\nmax = 1\nslots = 1\n[models.two]\ntargets = [{targets}]\n");
    let gateway = before(&fake, &more);
    let mut first = open_stream(&gateway, "hold-mid");
    let began = Instant::now();
    let response = asks(&gateway, &via("ok"), false, "400ms");
    assert_error(&response, 504, "deadline_exceeded");
    assert!(response.error_message().contains("x-request-timeout"), "{}", response.text());
    assert_in_time(began, TIME);
    assert_eq!(fake.request_count(), 1);
    fake.release();
    assert!(rest_of(&mut first).last().unwrap().is_done());
    let began = Instant::now();
    assert_error(&asks(&gateway, "two", false, "400ms"), 504, "deadline_exceeded");
    assert_in_time(began, TIME);
    assert_eq!(fake.request_count(), 2, "no time was left for the second target");
}

/// In the line before an upstream with a limit.
#[test]
fn a13_waiting_for_an_upstream_counts() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("in_flight_max = 1\nqueue = 4\n{ONE_WORKER}"));
    let mut first = open_stream(&gateway, "hold-mid");
    for stream in [false, true] {
        let began = Instant::now();
        let response = asks(&gateway, &via("ok"), stream, "400ms");
        assert_error(&response, 504, "deadline_exceeded");
        assert!(response.error_message().ends_with("within x-request-timeout"), "{}", response.text());
        assert_in_time(began, TIME);
    }
    assert_eq!(fake.request_count(), 1);
    fake.release();
    assert!(rest_of(&mut first).last().unwrap().is_done());
}

/// A body that comes later than its client wants to wait is not passed on any more.
#[test]
fn a13_a_body_after_the_deadline_calls_nobody() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    // A kept connection takes a request at once.
    assert_eq!(ask(&gateway, &via("ok"), false, "").content(), TEXT);
    let request = post_request(CHAT, "x-request-timeout: 100ms\r\n", &chat_body(&via("ok"), false, &Value::Null));
    let mut raw = Raw::connect(&gateway.addr());
    let (head, rest) = request.split_at(request.len() - 9);
    raw.send(head);
    let began = Instant::now();
    evergate_testkit::wait_until("the time is over", LIMIT, || began.elapsed() > Duration::from_millis(150));
    raw.send(rest);
    assert_error(&raw.read_response(LIMIT), 504, "deadline_exceeded");
    assert_eq!(fake.request_count(), 1);
}

#[test]
fn a13_what_is_no_time_is_refused() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    for value in ["0", "-1", "soon", "1m", "1e3", "", "5, 6", "999999999999999999"] {
        let response = asks(&gateway, &via("ok"), false, value);
        assert_error(&response, 400, "invalid_value");
        assert_eq!(response.json()["error"]["param"], json!("x-request-timeout"), "{value}");
    }
    let twice = "x-request-timeout: 5\r\nx-request-timeout: 5\r\n";
    assert_error(&ask(&gateway, &via("ok"), true, twice), 400, "invalid_value");
    assert_eq!(fake.request_count(), 0);
    // What the SDKs and proxies send of their own is not ours to obey.
    for field in ["x-stainless-timeout: 0", "x-stainless-read-timeout: 0.001", "grpc-timeout: 1m"] {
        assert_eq!(ask(&gateway, &via("delay-100"), false, &format!("{field}\r\n")).content(), TEXT, "{field}");
    }
}
