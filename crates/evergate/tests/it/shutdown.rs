//! Stopping: who can finish finishes, the others are told, nothing is left.

use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::get_request;
use evergate_testkit::{FakeUpstream, Raw, post_chat, wait_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::balance::workers;
use crate::support::{
    CHAT, LIMIT, ONE_WORKER, assert_error, assert_failed_stream, assert_good_stream, before, echo, echo_with,
    last_message, open, open_stream, rest_of, via,
};

/// Nobody is told of a drain time that was not given.
const AT_ONCE: &str = "the operator stopped the gateway at once, without time for requests to finish; try again";

const STAGES: &str = "[shutdown]\ndrain = \"3s\"\ncancel = \"1s\"\ncleanup = \"1s\"\n";

/// F21: TERM during 50 open streams.
#[test]
fn term_lets_finish_what_can_and_tells_the_others() {
    let fake = FakeUpstream::start();
    let mut gateway = before(&fake, STAGES);
    let address = gateway.addr();
    let mut finishing: Vec<Raw> = (0..25).map(|_| open_stream(&gateway, "stream-20-50")).collect();
    let mut held: Vec<Raw> = (0..25).map(|_| open_stream(&gateway, "hold-mid")).collect();
    let mut unary = open(&gateway, "delay-1000", false);
    let _ = fake.wait_request(50, LIMIT);
    let children = gateway.children();
    let began = Instant::now();
    gateway.signal(Signal::TERM);
    wait_until("connects refused", LIMIT, || Raw::try_connect(&address).is_err());
    assert!(began.elapsed() < Duration::from_secs(2), "refused only after {:?}", began.elapsed());
    assert!(gateway.is_running(), "it went before its streams");

    let response = unary.read_response(LIMIT);
    assert_eq!(response.status, 200);
    for raw in &mut finishing {
        let events = rest_of(raw);
        assert_good_stream(&events, raw.body_is_complete());
    }
    for raw in &mut held {
        let events = rest_of(raw);
        assert_failed_stream(&events, raw.body_is_complete(), "server_shutting_down");
        assert!(last_message(&events).contains("(shutdown.drain) is over"), "{events:?}");
    }
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(2900) && took < Duration::from_secs(7), "{took:?}");
    assert!(children.iter().all(|child| !is_alive(child.pid)), "a child outlived its master");
    assert!(Raw::try_connect(&address).is_err());
    for child in &children {
        let exits = gateway.exits();
        let record = exits.iter().find(|record| record["pid"] == child.pid).expect("a record of each child");
        assert_eq!((record["code"].as_u64(), record["initiator"].as_str()), (Some(0), Some("operator")), "{record}");
    }
    assert!(!gateway.state_dir().join("run.json").exists(), "a clean end leaves no run file");
    // Closed they are; the upstream has its own time to see it.
    wait_until("the upstreams of cut streams are left", LIMIT, || fake.open_connections() == 0);
    let cut = gateway.access().iter().filter(|record| record["cause"] == "server_shutting_down").count();
    assert_eq!(cut, 25);
}

#[test]
fn an_idle_gateway_stops_at_once() {
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
        let mut gateway = echo();
        let _idle = Raw::connect(&gateway.addr());
        let began = Instant::now();
        gateway.signal(signal);
        assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{signal:?}: {}", gateway.stderr());
        assert!(began.elapsed() < Duration::from_secs(4), "{signal:?}: {:?}", began.elapsed());
        gateway.wait_no_children(Duration::ZERO);
    }
}

/// Children that end one right after the other: the end of the next one, while the master writes of the one before, wakes it too. Else it is
/// seen half a second later, at the master's next look: in a third of the stops of a debug build, in each of an optimised one.
#[test]
fn no_end_is_seen_late() {
    let stop = || {
        let mut gateway = echo();
        let began = Instant::now();
        gateway.signal(Signal::TERM);
        assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
        began.elapsed()
    };
    let times: Vec<Duration> = (0..30).map(|_| stop()).collect();
    let late = times.iter().filter(|took| **took >= Duration::from_millis(450)).count();
    // The machine may be away for that long now and then.
    assert!(late <= 4, "{times:?}");
}

/// H13.
#[test]
fn a_second_term_hastens() {
    let fake = FakeUpstream::start();
    for second in [Signal::TERM, Signal::INT] {
        let mut gateway = before(&fake, "[shutdown]\ndrain = \"20s\"\n");
        let address = gateway.addr();
        let mut held = open_stream(&gateway, "hold-mid");
        gateway.signal(Signal::TERM);
        wait_until("connects refused", LIMIT, || Raw::try_connect(&address).is_err());
        let began = Instant::now();
        gateway.signal(second);
        let events = rest_of(&mut held);
        assert_failed_stream(&events, held.body_is_complete(), "server_shutting_down");
        assert_eq!(last_message(&events), AT_ONCE);
        assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
        gateway.wait_no_children(Duration::ZERO);
    }
}

/// F21: by the command, and while a body is still on its way.
#[test]
fn f21_stop_now_says_that_the_operator_stopped_it_at_once() {
    let fake = FakeUpstream::start();
    let mut gateway = before(&fake, "[shutdown]\ndrain = \"20s\"\n");
    let mut held = open_stream(&gateway, "hold-mid");
    let mut half = Raw::connect(&gateway.addr());
    half.send(format!("POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{").as_bytes());
    wait_until("both in flight", LIMIT, || {
        let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap_or_default();
        status["inflight"].as_array().is_some_and(|inflight| inflight.len() == 2)
    });
    assert!(gateway.cli(&["stop", "--now"]).status.success());
    let events = rest_of(&mut held);
    assert_failed_stream(&events, held.body_is_complete(), "server_shutting_down");
    assert_eq!(last_message(&events), AT_ONCE);
    let response = half.read_response(LIMIT);
    assert_error(&response, 503, "server_shutting_down");
    assert_eq!(response.json()["error"]["message"], AT_ONCE);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
    wait_until("the upstream is left", LIMIT, || fake.open_connections() == 0);
    let cut = gateway.access().iter().filter(|record| record["cause"] == "server_shutting_down").count();
    assert_eq!(cut, 2);
}

#[test]
fn int_does_not_wait_for_the_drain() {
    let fake = FakeUpstream::start();
    let mut gateway = before(&fake, "[shutdown]\ndrain = \"20s\"\n");
    let mut held = open_stream(&gateway, "hold-mid");
    let mut unary = open(&gateway, "never-headers", false);
    let _ = fake.wait_request(1, LIMIT);
    let began = Instant::now();
    gateway.signal(Signal::INT);
    let events = rest_of(&mut held);
    assert_failed_stream(&events, held.body_is_complete(), "server_shutting_down");
    assert_eq!(last_message(&events), AT_ONCE);
    let response = unary.read_response(LIMIT);
    assert_error(&response, 503, "server_shutting_down");
    assert_eq!(response.json()["error"]["message"], AT_ONCE);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    gateway.wait_no_children(Duration::ZERO);
}

/// Closing idle connections at once would lose the requests that are on their way.
#[test]
fn a_kept_connection_gets_a_last_answer() {
    let fake = FakeUpstream::start();
    let mut gateway = before(&fake, STAGES);
    let address = gateway.addr();
    let mut held = open_stream(&gateway, "hold-mid");
    let mut kept: Vec<Raw> = (0..10).map(|_| Raw::connect(&address)).collect();
    for raw in &mut kept {
        raw.send(&get_request("/v1/models", ""));
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    gateway.signal(Signal::TERM);
    for raw in &mut kept {
        raw.send(&get_request("/v1/models", ""));
    }
    for raw in &mut kept {
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, 200, "{}", response.text());
    }
    // They do not hold up the stop either.
    fake.release();
    assert_good_stream(&rest_of(&mut held), held.body_is_complete());
    assert_eq!(gateway.wait_exit(Duration::from_secs(5)).code(), Some(0));
}

#[test]
fn readiness_turns_before_service_ends() {
    let mut gateway = echo_with("[shutdown]\nsettle = \"1500ms\"\ndrain = \"1s\"\n");
    assert_eq!(gateway.get("/readyz").status, 200);
    gateway.signal(Signal::TERM);
    wait_until("readiness 503", Duration::from_secs(1), || gateway.get("/readyz").status == 503);
    // Still serving, for those whom the load balancer sends meanwhile.
    assert_eq!(gateway.get("/healthz").status, 200);
    assert_eq!(post_chat(&gateway.addr(), "echo", false, &Value::Null).status, 200);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0));
}

/// Requests that were in the queue when TERM came are served, not refused, also by a worker that has been told already.
#[test]
fn what_is_queued_at_term_is_served() {
    // The master's patience with the queue is half a second: a busy machine may spoil a try, not each of five.
    assert!((0..5).any(|_| is_queue_served()), "what was in the queue was not served");
}

/// Stops a gateway while ten requests wait in its queue, for one whose only connection is taken until it is told. False if that took
/// longer than they may wait.
fn is_queue_served() -> bool {
    let fake = FakeUpstream::start();
    let mut gateway = before(&fake, &format!("{ONE_WORKER}[limits]\nconnections = 1\n{STAGES}"));
    let mut held = open_stream(&gateway, "hold-mid");
    let address = gateway.addr();
    let request = evergate_testkit::chat_request(&via("ok"), false, &Value::Null);
    let mut queued: Vec<Raw> = (0..10).map(|_| Raw::connect(&address)).collect();
    queued.iter_mut().for_each(|raw| raw.send(&request));
    wait_until("they are in the queue", LIMIT, || gateway.metrics().contains("\nevergate_accept_queue 10\n"));
    let began = Instant::now();
    gateway.signal(Signal::TERM);
    wait_until("it drains", LIMIT, || workers(&gateway).iter().all(|worker| worker["phase"] == "draining"));
    fake.release();
    let took = began.elapsed();
    assert_good_stream(&rest_of(&mut held), held.body_is_complete());
    drop(held);
    // Who has an answer goes, and makes room for the next.
    let status = |mut raw: Raw| raw.try_read_response(LIMIT).map(|answer| answer.status);
    let answers: Vec<_> = queued.into_iter().map(status).collect();
    let is_served = answers.iter().all(|status| matches!(status, Ok(200)));
    if !is_served {
        println!("released after {took:?}: {answers:?}");
    }
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0), "{}", gateway.stderr());
    is_served
}
