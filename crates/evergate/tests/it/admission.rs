//! Requests that wait for a slot: in order, bounded, visible, and no longer than they or their clients want.

use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_testkit::raw::chat_body;
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::balance::{h2_connect, h2_stream, run, workers};
use crate::processes::lost_ids;
use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_error, before, chat, open, open_as, open_stream, rest_of, via,
};
use crate::until::until;

/// One worker with one place, and this before it.
fn one_place(fake: &FakeUpstream, queue: u32, more: &str) -> Evergate {
    let more = format!("[workers]\nmin = 1\nmax = 1\nslots = 1\n[limits]\nqueue = {queue}\n{more}");
    before(fake, &more)
}

#[track_caller]
fn wait_waiting(gateway: &Evergate, count: u64) {
    wait_until("that many requests wait", LIMIT, || workers(gateway)[0]["waiting"] == count);
}

/// Refused in milliseconds, and told when to come again.
#[track_caller]
fn assert_refused(gateway: &Evergate) {
    let began = Instant::now();
    let response = chat(gateway, "ok", false);
    let took = began.elapsed();
    assert_error(&response, 503, "overloaded");
    assert!(took < Duration::from_millis(500), "refused after {took:?}");
    let ms: u32 = response.header("retry-after-ms").unwrap().parse().unwrap();
    let seconds: u32 = response.header("retry-after").unwrap().parse().unwrap();
    assert!((500..1500).contains(&ms) && seconds == ms.div_ceil(1000), "{ms} ms, {seconds} s");
}

#[test]
fn waiting_requests_are_served_in_the_order_of_their_arrival() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 8, "");
    let mut first = open_stream(&gateway, "hold-mid");
    let mut waiting: Vec<Raw> = Vec::new();
    for n in 1..=6 {
        waiting.push(open(&gateway, &format!("delay-{n}"), false));
        wait_waiting(&gateway, n);
    }
    assert_eq!(fake.request_count(), 1, "one place, one request at the upstream");
    let oldest = workers(&gateway)[0]["waiting_oldest_ms"].as_u64().unwrap();
    wait_until("it grows older", LIMIT, || workers(&gateway)[0]["waiting_oldest_ms"].as_u64().unwrap() >= oldest + 20);
    fake.release();
    assert!(rest_of(&mut first).last().unwrap().is_done());
    for raw in &mut waiting {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    let order: Vec<String> = fake.requests().iter().skip(1).map(|recorded| recorded.request.model()).collect();
    assert_eq!(order, ["delay-1", "delay-2", "delay-3", "delay-4", "delay-5", "delay-6"]);
    wait_waiting(&gateway, 0);
    assert_eq!(workers(&gateway)[0]["waiting_oldest_ms"], 0);
}

#[test]
fn one_more_than_may_wait_is_refused_at_once() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 2, "");
    let _first = open_stream(&gateway, "hold-mid");
    let mut waiting = vec![open(&gateway, "ok", false), open(&gateway, "ok", false)];
    wait_waiting(&gateway, 2);
    for _ in 0..5 {
        assert_refused(&gateway);
    }
    assert_eq!(fake.request_count(), 1);
    fake.release();
    for raw in &mut waiting {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
}

/// L1: a large body is not waited for: its head is enough to say so. While there is room in the line it is read.
#[test]
fn l1_a_full_line_refuses_a_large_body_before_it_is_read() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 1, "");
    let _first = open_stream(&gateway, "hold-mid");
    let head = |framing: &str| {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n").as_bytes());
        raw
    };
    let mut reading = head("content-length: 10000000");
    assert!(reading.stays_open(Duration::from_millis(300)), "the line has room for it");
    let mut waiting = open(&gateway, "ok", false);
    wait_waiting(&gateway, 1);
    for framing in ["content-length: 10000000", "transfer-encoding: chunked"] {
        let response = head(framing).read_response(LIMIT);
        assert_eq!((response.status, response.error_code().as_str()), (503, "overloaded"), "{}", response.text());
        assert!(response.error_message().contains("workers.slots"), "{}", response.text());
    }
    fake.release();
    assert_eq!(waiting.read_response(LIMIT).status, 200);
    assert_eq!(fake.request_count(), 2);
}

#[test]
fn without_a_queue_nobody_waits() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 0, "");
    let mut first = open_stream(&gateway, "hold-mid");
    assert_refused(&gateway);
    fake.release();
    rest_of(&mut first);
    wait_until("the place is free", LIMIT, || chat(&gateway, "ok", false).status == 200);
}

/// Who has left must not get a place, nor keep one from others.
#[test]
fn a_client_that_left_leaves_the_queue_at_once() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 2, "");
    let _first = open_stream(&gateway, "hold-mid");
    let (gone, reset) = (open(&gateway, "delay-1", false), open(&gateway, "delay-2", false));
    wait_waiting(&gateway, 2);
    let left = Instant::now();
    gone.close();
    reset.reset();
    wait_waiting(&gateway, 0);
    assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
    let mut stays = open(&gateway, "delay-3", false);
    wait_waiting(&gateway, 1);
    fake.release();
    assert_eq!(stays.read_response(LIMIT).status, 200);
    let asked: Vec<String> = fake.requests().iter().map(|recorded| recorded.request.model()).collect();
    assert_eq!(asked, ["hold-mid", "delay-3"]);
}

/// On HTTP/2 a client leaves one request and keeps the connection.
#[test]
#[allow(clippy::disallowed_methods, reason = "a task of the test, which ends with its runtime")]
fn a_cancelled_http2_request_leaves_the_queue_at_once() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 2, "");
    run(async {
        let mut client = h2_connect(&gateway).await;
        let (body, _) = h2_stream(&gateway, &mut client).await;
        let mut other = client.clone();
        let waiting = tokio::runtime::Handle::current().spawn(async move {
            let request = http::Request::post(format!("http://localhost{CHAT}"));
            let body = Full::new(Bytes::from(chat_body(&via("ok"), false, &Value::Null)));
            other.send_request(request.body(body).unwrap()).await.map(drop)
        });
        let are_waiting = |count: u64| workers(&gateway)[0]["waiting"] == count;
        until("it waits", LIMIT, || are_waiting(1)).await;
        waiting.abort();
        until("it waits no more", LIMIT, || are_waiting(0)).await;
        drop(body);
    });
    assert_eq!(fake.request_count(), 1);
}

/// H3: what waits in a worker is lost with it, and named. More wait than there are places.
#[test]
fn a_killed_worker_names_those_that_waited() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 8, "");
    let _first = open_as(&gateway, "hold-mid", true, "x-request-id: w0\r\n");
    let _ = fake.wait_request(0, LIMIT);
    let mut ids = vec!["w0".to_owned()];
    let mut waiting = Vec::new();
    for n in 1..=6 {
        ids.push(format!("w{n}"));
        waiting.push(open_as(&gateway, "ok", false, &format!("x-request-id: w{n}\r\n")));
        wait_waiting(&gateway, n);
    }
    let pid = gateway.kill_worker(0);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!(lost_ids(&record), ids, "{record}");
    wait_until("a successor without a line", LIMIT, || {
        workers(&gateway).first().is_some_and(|worker| worker["accepting"] == true && worker["waiting"] == 0)
    });
    assert_eq!(chat(&gateway, "ok", false).status, 200);
}

#[test]
fn nobody_waits_longer_than_the_request_may_take() {
    let fake = FakeUpstream::start();
    let gateway = one_place(&fake, 2, "[timeouts]\ntotal = \"400ms\"\n");
    let _first = open_stream(&gateway, "hold-mid");
    let began = Instant::now();
    let response = chat(&gateway, "ok", false);
    let took = began.elapsed();
    assert_error(&response, 503, "overloaded");
    assert!(response.text().contains("timeouts.total"), "{}", response.text());
    assert!(took >= Duration::from_millis(390) && took < Duration::from_secs(3), "{took:?}");
    wait_waiting(&gateway, 0);
}

/// Who leaves before he has a place is on record with his key, too.
#[test]
fn whoever_leaves_the_line_is_on_record_with_its_key() {
    let fake = FakeUpstream::start();
    let more = format!("{ONE_WORKER}slots = 1\n[keys.team-a]\nsecret = {{ env = \"TEAM_A\" }}\n");
    let config = gateway_config(fake.base_url(), &[], &more).replace("[server]\n", "[server]\nauth = \"keys\"\n");
    let gateway = Evergate::builder(EXE).config(config).env("TEAM_A", "secret-of-team-a").start();
    let open = |id: &str| {
        let fields = format!("authorization: Bearer secret-of-team-a\r\nx-request-id: {id}\r\n");
        open_as(&gateway, "hold", false, &fields)
    };
    let first = open("served");
    let _ = fake.wait_request(0, LIMIT);
    let second = open("left-the-line");
    wait_waiting(&gateway, 1);
    second.close();
    let record = gateway.wait_access("left-the-line", LIMIT);
    assert_eq!((&record["cause"], &record["tenant"]), (&json!("client_gone"), &json!("team-a")), "{record}");
    drop(first);
}
