//! A worker drains while the gateway serves on: what its HTTP/2 clients see, frame by frame (RFC 9113, 6.8).

use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::{get_request, post_request};
use evergate_testkit::{FakeUpstream, Raw, wait_until};
use serde_json::{Value, json};

use crate::balance::workers;
use crate::drain::{LINGER, is_closing, is_too_late, term_worker, tls_gateway, wait_connections};
use crate::h2_wire::{ALL, DATA, GOAWAY, HEADERS, PING, Wire};
use crate::support::{CHAT, LIMIT, ONE_WORKER, before, echo_with, via};

/// GOAWAY for no stream, PING; at its acknowledgement GOAWAY for those after the last one taken.
#[test]
fn s18_http2_ends_in_two_steps() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let mut wire = Wire::connect(&gateway);
    wire.post(1, &via("hold-mid"));
    assert_eq!(wire.skip_to(HEADERS).stream, 1);
    let pid = term_worker(&gateway);
    assert_eq!(wire.goaway(), ALL);
    let ping = wire.skip_to(PING);
    // A request that crossed the first GOAWAY is served ...
    wire.get(3);
    assert!(wire.answer(3).0);
    wire.send(PING, 1, 0, &ping.payload);
    assert_eq!(wire.goaway(), 3);
    // ... one after the second is not, and its sender knows that it may be sent elsewhere.
    wire.get(5);
    fake.release();
    let mut body = String::new();
    while let Some(frame) = wire.next() {
        assert_eq!(frame.stream, 1, "{frame:?}");
        if frame.kind == DATA {
            body += std::str::from_utf8(&frame.payload).unwrap();
        }
    }
    assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
    assert!(!wire.link.was_reset());
    drop(wire);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["code"], &record["lost"]), (&json!(0), &json!([])), "{record}");
}

#[test]
fn s18_http2_that_never_had_a_stream_ends_in_two_steps() {
    let plain = echo_with(ONE_WORKER);
    let (tls, identity) = tls_gateway("");
    let config = identity.client_config(&["h2"]);
    for (gateway, mut wire) in [(&plain, Wire::connect(&plain)), (&tls, Wire::connect_tls(&tls, &config))] {
        // The gateway's settings show that it has read the preface.
        assert!(wire.next_within(Duration::from_millis(100)).is_err());
        wait_connections(gateway, 1);
        let pid = term_worker(gateway);
        assert_eq!(wire.goaway(), ALL);
        wire.pong();
        assert_eq!(wire.goaway(), 0);
        wire.assert_ends();
        drop(wire);
        wait_until("the worker's end", LIMIT, || !is_alive(pid));
    }
}

#[test]
fn s18_http2_over_tls_ends_in_two_steps() {
    let (gateway, identity) = tls_gateway("");
    let mut wire = Wire::connect_tls(&gateway, &identity.client_config(&["h2"]));
    wire.get(1);
    assert!(wire.answer(1).0);
    term_worker(&gateway);
    assert_eq!(wire.goaway(), ALL);
    let ping = wire.skip_to(PING);
    wire.get(3);
    assert!(wire.answer(3).0);
    wire.send(PING, 1, 0, &ping.payload);
    assert_eq!(wire.goaway(), 3);
    wire.assert_ends();
}

/// A client that does not look at an idle connection neither acknowledges nor may it lose its next request.
#[test]
fn s18_http2_that_never_acknowledges_is_bounded() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let (mut idle, mut late, mut busy) = (Wire::connect(&gateway), Wire::connect(&gateway), Wire::connect(&gateway));
    for wire in [&mut idle, &mut late] {
        wire.get(1);
        assert!(wire.answer(1).0);
    }
    busy.post(1, &via("hold-mid"));
    assert_eq!(busy.skip_to(HEADERS).stream, 1);
    let began = Instant::now();
    term_worker(&gateway);
    // Thinks for a second, and sends without looking.
    let _ = late.link.pause(Duration::from_secs(1));
    if is_too_late(began) {
        return;
    }
    late.get(3);
    assert!(late.answer(3).0);
    for (wire, last) in [(&mut idle, 1), (&mut late, 3)] {
        while wire.goaway() != last {
            let _ = wire.skip_to(PING);
        }
        wire.assert_ends();
    }
    let took = began.elapsed();
    assert!(took >= LINGER - Duration::from_millis(100) && took < LIMIT / 2, "{took:?}");
    assert_eq!(busy.goaway(), ALL);
    let _ = busy.skip_to(PING);
    assert_eq!(busy.goaway(), 1);
    fake.release();
    let (is_ok, body) = busy.answer(1);
    assert!(!is_ok && body.ends_with("data: [DONE]\n\n"), "the head came before; {body}");
    busy.assert_ends();
}

/// ALPN has agreed on HTTP/2 and the client says nothing: that has its limit, draining or not.
#[test]
fn s18_http2_without_a_preface_is_closed() {
    let (gateway, identity) = tls_gateway("[timeouts]\nheader = \"3s\"\n");
    let mut raw = Raw::connect_tls(&gateway.addr(), &identity.client_config(&["h2"]));
    // The handshake has the limit, too, and goes on only while this side is waited on: on a busy machine more than a moment.
    wait_until("ALPN has agreed", LIMIT, || {
        let _ = raw.link().pause(Duration::from_millis(10));
        raw.link().alpn() == Some(b"h2")
    });
    let pid = term_worker(&gateway);
    assert!(raw.read_to_close(LIMIT).0.is_empty());
    assert!(!raw.link().was_reset());
    drop(raw);
    wait_until("the worker's end", LIMIT, || !is_alive(pid));
}

/// A worker with far more to do than its peer tells kept connections so; the peer tells nobody.
#[test]
fn s27_kept_connections_leave_a_worker_with_too_much_to_do() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\n");
    let mut kept: Vec<Raw> = (0..16).map(|_| Raw::connect(&gateway.addr())).collect();
    for (n, raw) in kept.iter_mut().enumerate() {
        raw.send(&ask("before", n));
        assert!(!is_closing(&raw.read_response(LIMIT)));
    }
    let mut wire = Wire::connect(&gateway);
    for stream in 0..12 {
        wire.post(1 + 2 * stream, &via("hold-mid"));
    }
    let _ = fake.wait_request(kept.len() + 11, LIMIT);
    assert_eq!(goaway_with_an_answer(&mut wire, 25), ALL);
    let streams = |worker: &Value| worker["inflight"]["stream"].as_u64();
    let busy = workers(&gateway).into_iter().max_by_key(streams).unwrap()["pid"].clone();
    for (n, raw) in kept.iter_mut().enumerate() {
        let mut times = 0;
        // With the next answer, if the peer is counted on at that moment, which one that the machine holds up is not.
        wait_until("a connection of the busy one is told", LIMIT, || {
            times += 1;
            raw.send(&ask(&format!("after-{times}"), n));
            let is_told = is_closing(&raw.read_response(LIMIT));
            let is_busy = gateway.wait_access(&format!("kept-after-{times}-{n}"), LIMIT)["pid"] == busy;
            assert!(is_busy || !is_told, "the one with little to do sends nobody away");
            is_told == is_busy
        });
    }
    wire.pong();
    fake.release();
    let ends = std::iter::from_fn(|| wire.next())
        .filter(|frame| frame.kind == DATA && frame.flags & 1 != 0 && frame.stream < 25);
    assert_eq!(ends.count(), 12, "streams in flight finish");
}

/// It comes with an answer, if a peer is counted on at that moment, which one that the machine holds up is not: then with a later
/// one, of streams from that on.
#[track_caller]
fn goaway_with_an_answer(wire: &mut Wire, mut stream: u32) -> u32 {
    let end = Instant::now() + LIMIT;
    while Instant::now() < end {
        match wire.next_within(Duration::from_secs(1)) {
            Ok(Some(frame)) if frame.kind == GOAWAY => return frame.goaway(),
            Ok(frame) => assert!(frame.is_some_and(|frame| matches!(frame.kind, DATA | HEADERS))),
            Err(_) => {
                wire.get(stream);
                stream += 2;
            }
        }
    }
    panic!("never told");
}

fn ask(when: &str, n: usize) -> Vec<u8> {
    let body = evergate_testkit::raw::chat_body(&via("ok"), false, &Value::Null);
    post_request(CHAT, &format!("x-request-id: kept-{when}-{n}\r\n"), &body)
}

/// A plain probe on a new connection, for tests whose own connections are all leaving.
#[test]
fn s18_a_drained_workers_successor_serves() {
    let gateway = echo_with(ONE_WORKER);
    let mut wire = Wire::connect(&gateway);
    wire.get(1);
    assert!(wire.answer(1).0);
    let pid = term_worker(&gateway);
    assert_eq!(wire.goaway(), ALL);
    wire.pong();
    assert_eq!(wire.goaway(), 1);
    wire.assert_ends();
    drop(wire);
    let mut next = Raw::connect(&gateway.addr());
    next.send(&get_request("/healthz", ""));
    assert!(!is_closing(&next.read_response(LIMIT)));
    assert!(!gateway.wait_workers(1).contains(&pid));
}
