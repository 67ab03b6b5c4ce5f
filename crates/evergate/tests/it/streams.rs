//! Streams that go well: bytes, borders of events, heads held back, silence, slow readers.

use std::time::{Duration, Instant};

use evergate_testkit::sse::text_of;
use evergate_testkit::{FakeUpstream, post_chat, wait_until};
use serde_json::{Value, json};

use crate::support::{
    CHAT, LIMIT, ONE_WORKER, assert_failed_stream, assert_good_stream, assert_request_id, before, chat, open,
    open_stream, rest_of, via,
};

/// F5, F7, F8, F9, F16: what goes through is what came, whatever it looks like.
#[test]
fn the_bytes_of_a_stream_pass_unchanged() {
    // Ids count requests, so two of them are asked the same things in the same order.
    let (direct, behind) = (FakeUpstream::start(), FakeUpstream::start());
    let gateway = before(&behind, "");
    let usage = json!({"stream_options": {"include_usage": true}});
    for (script, extra) in [
        ("ok", &Value::Null),
        ("ok", &usage),
        ("stream-50", &Value::Null),
        ("tools", &Value::Null),
        ("one-byte", &usage),
        ("crlf", &Value::Null),
        ("odd-usage", &Value::Null),
        ("half-emoji", &Value::Null),
        ("bad-json", &Value::Null),
        ("big-event", &Value::Null),
        ("stale", &Value::Null),
    ] {
        let plain = post_chat(direct.address(), script, true, extra);
        let passed = post_chat(&gateway.addr(), &via(script), true, extra);
        assert_eq!(passed.status, 200, "{script}");
        assert_eq!(passed.header("content-type"), Some("text/event-stream"), "{script}");
        assert_request_id(&passed);
        assert!(passed.is_complete, "{script}");
        assert!(passed.body == plain.body, "{script}:\n{}\nbecame\n{}", plain.text(), passed.text());
        assert!(passed.chunks_hold_whole_events(), "{script}: an event was split");
    }
}

#[test]
fn text_completions_stream_the_same_way() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let body = r#"{"model":"fake/stream-5","prompt":"x","stream":true}"#;
    let response = evergate_testkit::raw::post(&gateway.addr(), "/v1/completions", body);
    assert_good_stream(&response.events(), response.is_complete);
    assert_eq!(text_of(&response.events()), "word0 word1 word2 word3 word4 ");
    assert_eq!(fake.requests()[0].request.path(), "/v1/completions");
}

/// Nothing is withheld: each event is at the client before the next one is sent.
#[test]
fn events_come_as_they_are_sent() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let response = chat(&gateway, "stream-6-150", true);
    let words: Vec<_> = response.events().into_iter().filter(|event| event.text().starts_with("word")).collect();
    assert_eq!(words.len(), 6);
    // On a busy machine one may be late and meet the next; withheld ones would all come together.
    let gaps: Vec<_> = words.windows(2).map(|two| two[1].at.duration_since(two[0].at)).collect();
    let apart = gaps.iter().filter(|gap| **gap >= Duration::from_millis(50)).count();
    assert!(apart >= 3, "the words came within {gaps:?} of each other");
}

/// The head waits for the first event so that early failures get a real status, but not for ever.
#[test]
fn a_held_head_is_let_go_with_a_comment() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nhead_hold = \"300ms\"\nkeepalive = \"100ms\"\n");
    let began = Instant::now();
    let mut raw = open(&gateway, "hold", true);
    let head = raw.read_head(LIMIT);
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    let held = began.elapsed();
    assert!(held >= Duration::from_millis(250) && held < Duration::from_secs(3), "{held:?}");
    for _ in 0..3 {
        assert!(raw.next_event(LIMIT).unwrap().is_comment);
    }
    fake.release();
    let events: Vec<_> = rest_of(&mut raw).into_iter().filter(|event| !event.is_comment).collect();
    assert_good_stream(&events, raw.body_is_complete());
}

#[test]
fn a_head_is_held_until_the_first_event() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut raw = open(&gateway, "hold", true);
    let _ = fake.wait_request(0, LIMIT);
    assert!(raw.stays_open(Duration::from_millis(300)), "something was said before the first event");
    fake.release();
    assert_eq!(raw.read_head(LIMIT).status, 200);
    let first = raw.next_event(LIMIT).unwrap();
    assert!(!first.is_comment);
    let events = rest_of(&mut raw);
    assert_good_stream(&events, raw.body_is_complete());
}

/// A failure after the head was let go is an error event.
#[test]
fn a_failure_after_a_held_head_is_an_event() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nhead_hold = \"200ms\"\nfirst_token = \"600ms\"\nkeepalive = \"100ms\"\n");
    for script in ["never-headers", "silent", "pings-only"] {
        let response = chat(&gateway, script, true);
        assert_eq!(response.status, 200, "{script}");
        let events: Vec<_> = response.events().into_iter().filter(|event| !event.is_comment).collect();
        assert_failed_stream(&events, response.is_complete, "first_token_timeout");
    }
}

/// F6.
#[test]
fn a_silent_stream_is_kept_alive_by_comments() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nkeepalive = \"100ms\"\n");
    let mut raw = open_stream(&gateway, "hold-mid");
    let mut comments = 0;
    while comments < 3 {
        comments += usize::from(raw.next_event(LIMIT).expect("the stream goes on").is_comment);
    }
    fake.release();
    let events: Vec<_> = rest_of(&mut raw).into_iter().filter(|event| !event.is_comment).collect();
    assert_good_stream(&events, raw.body_is_complete());
}

/// F5: an upstream's comments keep a stream alive that has begun.
#[test]
fn a_stream_that_goes_on_is_not_idle() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nidle = \"500ms\"\n");
    let response = chat(&gateway, "stream-10-150", true);
    assert_good_stream(&response.events(), response.is_complete);
}

/// A6, F11: what a client does not read is not collected.
#[test]
fn a_reader_that_does_not_read_holds_its_upstream_back() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    // The first stream's own costs are not counted.
    assert!(chat(&gateway, "stream-50", true).is_complete);
    let worker = gateway.workers()[0];
    let before = rss_kib(worker);
    let mut readers: Vec<_> = (0..4)
        .map(|_| {
            let mut raw = open(&gateway, "flood", true);
            raw.link().shrink_receive_buffer();
            raw
        })
        .collect();
    for index in 0..readers.len() {
        let _ = fake.wait_request(index + 1, LIMIT);
    }
    let (began, mut most) = (Instant::now(), 0);
    wait_until("two seconds of flood", LIMIT, || {
        most = most.max(rss_kib(worker));
        began.elapsed() > Duration::from_secs(2)
    });
    let grown = most.saturating_sub(before);
    assert!(grown < 16 * 1024, "four readers that do not read cost {grown} KiB");
    // They are still served, and others too.
    assert_eq!(readers[0].read_head(LIMIT).status, 200);
    assert!(readers[0].next_event(LIMIT).is_some());
    assert!(chat(&gateway, "stream-50", true).is_complete);
    for raw in readers {
        raw.reset();
    }
    for index in 1..5 {
        let _ = fake.wait_closed(index, LIMIT);
    }
}

fn rss_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// F11: many small events cost about what their bytes cost.
#[test]
fn a_flood_of_events_flows() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let began = Instant::now();
    let response = chat(&gateway, "stream-20000", true);
    let events = response.events();
    assert_good_stream(&events, response.is_complete);
    assert_eq!(events.iter().filter(|event| event.text().starts_with("word")).count(), 20_000);
    assert!(response.chunks_hold_whole_events());
    assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
}

/// Streams side by side do not mix.
#[test]
fn many_streams_at_once_stay_apart() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut open: Vec<_> = (0..50).map(|n| (n, open(&gateway, &format!("stream-{}-5", n + 1), true))).collect();
    for (n, raw) in &mut open {
        let response = raw.read_response(LIMIT);
        assert_good_stream(&response.events(), response.is_complete);
        let expected: String = (0..=*n).map(|word| format!("word{word} ")).collect();
        assert_eq!(text_of(&response.events()), expected);
    }
    assert!(fake.requests().iter().all(|one| one.request.path() == CHAT));
}
