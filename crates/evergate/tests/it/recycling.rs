//! Workers that are replaced for their requests, their age or their memory. Line 16 of the specification of supervision.
//! Each test lasts ten seconds, the shortest life of a worker.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::post_request;
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::balance::workers;
use crate::support::{
    CHAT, LIMIT, ONE_WORKER, assert_counted, assert_good_stream, before, chat, open_stream, rest_of, send, via,
};

/// No request was lost, and each successor was ready before the one that it replaced was told to go.
fn assert_seamless(gateway: &Evergate, gone: &[Value]) {
    for record in gone {
        assert_eq!((&record["code"], &record["lost"]), (&json!(0), &json!([])), "{record}");
        assert!(record["age_ms"].as_u64().unwrap() >= 10_000, "not in its first ten seconds: {record}");
    }
    gateway.wait_workers(2);
}

#[test]
fn s16_a_worker_is_replaced_after_its_requests_and_its_lifetime_without_a_loss() {
    let fake = FakeUpstream::start();
    let by_requests = before(&fake, "[workers]\nmin = 2\nmax = 2\nrequests_max = 50\n");
    let by_age = before(&fake, "[workers]\nmin = 2\nmax = 2\nlifetime_max = \"10s\"\n");
    let (is_over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for gateway in [&by_requests, &by_age] {
            let (is_over, done) = (&is_over, &done);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let response = chat(gateway, "stream-3-5", done.fetch_add(1, Ordering::Relaxed) % 2 == 0);
                    assert!(response.status == 200 && response.is_complete, "{}", response.text());
                }
            });
        }
        // Ended also when a wait fails, or the scope would wait for its clients for ever.
        let _guard = Guard(&is_over);
        for (gateway, why) in [(&by_requests, "requests"), (&by_age, "lifetime")] {
            let gone = gateway.wait_exits(2, 2 * LIMIT, |record| record["initiator"] == why);
            assert_seamless(gateway, &gone[..2]);
        }
    });
}

struct Guard<'a>(&'a AtomicBool);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// H8.
#[test]
fn h8_s16_a_worker_with_too_much_memory_is_replaced_and_finishes_what_it_has() {
    let fake = FakeUpstream::start();
    // Without the guard: of eight bodies of 15 MiB one worker may get so many that they are given up before it is replaced.
    // What it has takes a full machine longer than the usual drain.
    let more = "[workers]\nmin = 2\nmax = 2\nrss_max = \"64MiB\"\n[timeouts]\ntotal = \"100s\"\n[shutdown]\ndrain = \"100s\"\n\
                [limits]\nmemory_guard = false\n";
    let gateway = before(&fake, more);
    let body = json!({ "model": via("hold"), "messages": [{ "role": "user", "content": "x".repeat(15 << 20) }] });
    let request = post_request(CHAT, "", &body.to_string());
    let mut held: Vec<Raw> = (0..8)
        .map(|_| {
            let mut raw = Raw::connect(&gateway.addr());
            raw.send(&request);
            raw
        })
        .collect();
    gateway.wait_stderr("is replaced: rss", Duration::from_secs(40));
    fake.release();
    for raw in &mut held {
        let response = raw.read_response(4 * LIMIT);
        assert_eq!(response.status, 200, "{}", response.text());
    }
    let gone = gateway.wait_exits(1, 2 * LIMIT, |record| record["initiator"] == "rss");
    assert_seamless(&gateway, &gone[..1]);
    assert_counted(&gateway, 200, "ok", 8);
    assert_eq!(fake.request_count(), 8, "each was called once");
    let counted = "evergate_exits_total{kind=\"worker\",initiator=\"rss\"} ";
    wait_until("its end is counted", LIMIT, || gateway.metrics().contains(counted));
}

/// Line 16: a worker that is told to go by somebody else (a `kill` of its pid) leaves its place to a successor while it finishes.
#[test]
fn s16_a_worker_told_by_somebody_else_is_succeeded_while_it_drains() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("{ONE_WORKER}[shutdown]\ndrain = \"60s\"\n"));
    let mut held = open_stream(&gateway, "hold-mid");
    let old = gateway.wait_workers(1)[0];
    send(old, Signal::TERM);
    // There is no other worker: without a successor this waits for as long as the stream lasts.
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    wait_until("the successor has the place", LIMIT, || {
        workers(&gateway).iter().any(|worker| worker["pid"] != old && worker["slot"] == 0)
    });
    assert!(is_alive(old) && gateway.exits().is_empty(), "it has its stream");
    gateway.wait_stderr("the worker 0 goes by itself", LIMIT);
    fake.release();
    assert_good_stream(&rest_of(&mut held), held.body_is_complete());
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == old).remove(0);
    assert_eq!((&record["code"], &record["initiator"], &record["lost"]), (&json!(0), &json!("unknown"), &json!([])));
    assert_eq!(gateway.wait_workers(1).len(), 1);
}
