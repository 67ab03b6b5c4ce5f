//! Every wait ends: with the limit that ended it named, or because the client has left.

use std::time::{Duration, Instant};

use evergate_testkit::fake::{TEXT, mute};
use evergate_testkit::sse::text_of;
use evergate_testkit::{Evergate, FakeUpstream, gateway_config};
use serde_json::json;

use crate::support::{
    EXE, LIMIT, ONE_WORKER, assert_error, assert_good_stream, assert_left_soon, before, chat, open, open_as,
    open_stream,
};

/// Ends within its limit, not before it and not long after it.
#[track_caller]
fn assert_took(began: Instant, limit_ms: u64) {
    let took = began.elapsed();
    let limit = Duration::from_millis(limit_ms);
    assert!(took >= limit.mul_f64(0.9) && took < limit + Duration::from_secs(2), "{took:?} for a limit of {limit:?}");
}

#[test]
fn total_ends_a_unary_request() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\ntotal = \"400ms\"\n");
    for (index, script) in ["never-headers", "silent", "idle-mid", "delay-5000"].into_iter().enumerate() {
        let began = Instant::now();
        assert_error(&chat(&gateway, script, false), 504, "deadline_exceeded");
        assert_took(began, 400);
        let left = fake.wait_closed(index, LIMIT).saturating_duration_since(began);
        assert!(left < Duration::from_secs(2), "{script}: the upstream was left after {left:?}");
    }
}

/// `total` bounds a stream until its first token, comments or not.
#[test]
fn total_ends_a_stream_without_a_first_token() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\ntotal = \"400ms\"\n");
    for script in ["never-headers", "silent", "pings-only"] {
        let began = Instant::now();
        assert_error(&chat(&gateway, script, true), 504, "deadline_exceeded");
        assert_took(began, 400);
    }
}

#[test]
fn total_does_not_end_a_stream_that_has_begun() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\ntotal = \"1s\"\n");
    let response = chat(&gateway, "stream-15-100", true);
    assert_good_stream(&response.events(), response.is_complete);
}

/// F5: comments are no token.
#[test]
fn first_token_ends_a_silent_stream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nfirst_token = \"400ms\"\n");
    for (index, script) in ["never-headers", "silent", "pings-only"].into_iter().enumerate() {
        let began = Instant::now();
        assert_error(&chat(&gateway, script, true), 504, "first_token_timeout");
        assert_took(began, 400);
        let _ = fake.wait_closed(index, LIMIT);
    }
}

/// A whole answer has no first token to wait for: long answers are not slow ones.
#[test]
fn first_token_does_not_end_a_unary_request() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nfirst_token = \"200ms\"\n");
    assert_eq!(chat(&gateway, "delay-600", false).content(), TEXT);
}

#[test]
fn idle_ends_a_unary_answer_that_stops_midway() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nidle = \"400ms\"\n");
    let began = Instant::now();
    assert_error(&chat(&gateway, "idle-mid", false), 504, "upstream_timeout");
    assert_took(began, 400);
    let _ = fake.wait_closed(0, LIMIT);
}

/// D8: a handshake that stalls is a connect that does not come about.
#[test]
fn connect_ends_a_stalled_handshake() {
    let (_mute, address) = mute();
    let config = gateway_config(&format!("https://{address}/v1"), &[], "[timeouts]\nconnect = \"400ms\"\n");
    let gateway = Evergate::builder(EXE).config(config).start();
    for stream in [false, true] {
        let began = Instant::now();
        assert_error(&chat(&gateway, "ok", stream), 504, "upstream_timeout");
        assert_took(began, 400);
    }
}

/// Within its time a slow upstream is no fault.
#[test]
fn a_slow_answer_within_its_limits_is_right() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\ntotal = \"5s\"\nfirst_token = \"2s\"\nidle = \"2s\"\n");
    assert_eq!(chat(&gateway, "delay-500", false).content(), TEXT);
    let response = chat(&gateway, "delay-500", true);
    assert_good_stream(&response.events(), response.is_complete);
    assert_eq!(text_of(&response.events()), TEXT);
}

/// How a client leaves.
#[derive(Clone, Copy)]
enum Way {
    Close,
    Reset,
}

/// How long the upstream waits for the news that its client has left, over all scripts and ways.
fn cancel_times(gateway: &Evergate, fake: &FakeUpstream, scripts: &[&str], stream: bool) -> Vec<Duration> {
    let mut times = Vec::new();
    for script in scripts {
        for way in [Way::Close, Way::Reset, Way::Close, Way::Reset] {
            let index = fake.request_count();
            let raw = if stream { open_stream(gateway, script) } else { open(gateway, script, false) };
            let _ = fake.wait_request(index, LIMIT);
            let left = Instant::now();
            match way {
                Way::Close => raw.close(),
                Way::Reset => raw.reset(),
            }
            times.push(fake.wait_closed(index, LIMIT).saturating_duration_since(left));
        }
    }
    times
}

/// A2, A5.
#[test]
fn client_gone_stops_the_upstream_of_a_unary_request() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let scripts = ["never-headers", "silent", "idle-mid", "hold"];
    assert_left_soon("unary", || cancel_times(&gateway, &fake, &scripts, false));
}

/// A3, A5.
#[test]
fn client_gone_stops_the_upstream_of_a_stream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let scripts = ["idle-mid", "flood", "hold-mid", "stream-200-50"];
    assert_left_soon("stream", || cancel_times(&gateway, &fake, &scripts, true));
}

/// A2, A3: the record says who ended it.
#[test]
fn client_gone_is_on_record() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let raw = open_as(&gateway, "never-headers", false, "x-request-id: gone-unary\r\n");
    let _ = fake.wait_request(0, LIMIT);
    raw.close();
    let record = gateway.wait_access("gone-unary", LIMIT);
    assert_eq!((&record["cause"], &record["status"]), (&json!("client_gone"), &json!(499)), "{record}");

    let mut raw = open_as(&gateway, "idle-mid", true, "x-request-id: gone-stream\r\n");
    assert!(raw.read_head(LIMIT).status == 200 && raw.next_event(LIMIT).is_some());
    raw.reset();
    let record = gateway.wait_access("gone-stream", LIMIT);
    assert_eq!((&record["cause"], &record["status"]), (&json!("client_gone"), &json!(200)), "{record}");
    assert_eq!(record["stream"], true);
}

/// A stream's client may leave before the head, too.
#[test]
fn client_gone_before_the_first_event_stops_the_upstream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let left_one = |script: &str| {
        let index = fake.request_count();
        let raw = open(&gateway, script, true);
        let _ = fake.wait_request(index, LIMIT);
        let left = Instant::now();
        raw.close();
        fake.wait_closed(index, LIMIT).saturating_duration_since(left)
    };
    let scripts = ["never-headers", "silent", "pings-only"];
    assert_left_soon("before the first event", || scripts.into_iter().cycle().take(12).map(left_one).collect());
    // Nothing was left behind in the worker.
    assert_eq!(chat(&gateway, "ok", false).content(), TEXT);
}

/// A4 is dropped: a client that half-closes cannot be told from one that has left.
#[test]
fn a_half_closed_client_counts_as_gone() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut raw = open(&gateway, "never-headers", false);
    let _ = fake.wait_request(0, LIMIT);
    raw.half_close();
    let _ = fake.wait_closed(0, LIMIT);
}
