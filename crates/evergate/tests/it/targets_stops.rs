//! What ends a request between its attempts: its client, its deadline, the gateway's stop, its worker's death. Nobody is
//! called for a request that is over, and the record says how far it came.

use std::time::{Duration, Instant};

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, Raw, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{CHAT, LIMIT, ONE_WORKER, assert_error, rest_of, send};
use crate::targets::{ask, assert_path, before_two, record_of};

/// Sends a chat request with that client's id, and reads nothing yet.
#[track_caller]
fn open(gateway: &Evergate, model: &str, stream: bool, id: &str) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    let fields = format!("x-request-id: {id}\r\n");
    raw.send(&post_request(CHAT, &fields, &chat_body(model, stream, &Value::Null)));
    raw
}

/// A2: the record is written when the request's future is gone, so that nothing can be called after it.
#[test]
fn a_client_that_leaves_during_an_attempt_has_no_other() {
    let (first, second, gateway) = before_two(&["never-headers>ok|attempt = \"2s\""], "");
    for (index, stream) in [false, true].into_iter().enumerate() {
        let id = format!("left-{index}");
        let raw = open(&gateway, "never-headers>ok", stream, &id);
        let _ = first.wait_request(index, LIMIT);
        let left = Instant::now();
        raw.close();
        let record = gateway.wait_access(&id, LIMIT);
        assert!(left.elapsed() < Duration::from_millis(1900), "too late to prove anything: {:?}", left.elapsed());
        assert_eq!((&record["cause"], &record["attempts"]), (&json!("client_gone"), &json!(1)), "{record}");
        assert_eq!((&record["backend"], &record["path"]), (&json!("first"), &Value::Null), "{record}");
        let _ = first.wait_closed(index, LIMIT);
    }
    // The limits of both would have passed by now.
    let now = Instant::now();
    wait_until("the attempts' limits", LIMIT, || now.elapsed() > Duration::from_millis(2100));
    assert_eq!(second.request_count(), 0);
}

/// The client's end and the first attempt's come in the same moment, before the worker looks: it finds both.
#[test]
fn a_client_that_leaves_between_two_attempts_has_no_other() {
    let (first, second, gateway) = before_two(&["hold-fail>ok"], ONE_WORKER);
    let worker = gateway.workers()[0];
    for round in 0..20 {
        first.hold();
        let id = format!("between-{round}");
        let raw = open(&gateway, "hold-fail>ok", round % 2 == 1, &id);
        let _ = first.wait_request(round, LIMIT);
        send(worker, Signal::STOP);
        raw.close();
        first.release();
        let _ = first.wait_end(round, LIMIT);
        send(worker, Signal::CONT);
        let record = gateway.wait_access(&id, LIMIT);
        assert_eq!((&record["cause"], &record["attempts"]), (&json!("client_gone"), &json!(1)), "{record}");
    }
    assert_eq!(second.request_count(), 0);
}

/// A worker that finishes what it has goes on to the next target; the time of a stop is bounded by `drain`.
#[test]
fn a_drain_during_the_first_attempt_lets_the_second_answer() {
    let (first, second, mut gateway) = before_two(&["hold-fail>ok"], ONE_WORKER);
    let mut open: Vec<Raw> =
        [false, true].into_iter().map(|stream| open(&gateway, "hold-fail>ok", stream, "drained")).collect();
    let _ = first.wait_request(1, LIMIT);
    gateway.signal(Signal::TERM);
    let draining = || gateway.metrics().contains("evergate_workers{phase=\"draining\"} 1\n");
    wait_until("the drain", LIMIT, draining);
    first.release();
    for raw in &mut open {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    assert_eq!(second.request_count(), 2);
    assert!(gateway.wait_exit(LIMIT).success());
}

/// When `drain` is over nobody else is called, whatever the first attempt comes to.
#[test]
fn a_cancelled_request_has_no_other_attempt() {
    let more = "[shutdown]\ndrain = \"300ms\"\n";
    let (first, second, mut gateway) = before_two(&["never-headers>ok|attempt = \"1s\""], more);
    let mut open: Vec<Raw> = [false, true]
        .into_iter()
        .map(|stream| open(&gateway, "never-headers>ok", stream, &format!("cut-{stream}")))
        .collect();
    let _ = first.wait_request(1, LIMIT);
    gateway.signal(Signal::TERM);
    for raw in &mut open {
        assert_error(&raw.read_response(LIMIT), 503, "server_shutting_down");
    }
    for id in ["cut-false", "cut-true"] {
        let record = gateway.wait_access(id, LIMIT);
        let found = (&record["cause"], &record["attempts"], &record["path"]);
        assert_eq!(found, (&json!("server_shutting_down"), &json!(1), &Value::Null), "{record}");
    }
    let _ = gateway.wait_exit(LIMIT);
    assert_eq!((first.request_count(), second.request_count()), (2, 0));
}

/// One deadline for all attempts: a second one does not begin another.
#[test]
fn the_deadline_ends_the_second_attempt() {
    let more = "[timeouts]\ntotal = \"900ms\"\n";
    let (first, second, gateway) = before_two(&["never-headers>never-headers|attempt = \"300ms\""], more);
    for (index, stream) in [false, true].into_iter().enumerate() {
        let began = Instant::now();
        let response = ask(&gateway, "never-headers>never-headers", stream);
        let took = began.elapsed();
        assert_error(&response, 504, "deadline_exceeded");
        assert!(took >= Duration::from_millis(850) && took < Duration::from_millis(2500), "{took:?}");
        let text = response.text();
        assert!(text.contains("first (upstream_timeout), second (deadline_exceeded)"), "{text}");
        let record = record_of(&gateway, &response);
        assert_path(&record, &[("first", "upstream_timeout"), ("second", "deadline_exceeded")]);
        assert_eq!((&record["cause"], &record["backend"]), (&json!("deadline_exceeded"), &json!("second")), "{record}");
        let ms = |index: usize| record["path"][index]["ms"].as_f64().unwrap();
        assert!(ms(0) >= 290.0 && ms(1) >= 290.0 && ms(0) + ms(1) <= record["duration_ms"].as_f64().unwrap() + 1.0);
        let _ = (first.wait_closed(index, LIMIT), second.wait_closed(index, LIMIT));
    }
}

/// A stall in each phase of the first attempt, and in the second: every one ends by a limit, within one deadline.
#[test]
fn a_stall_in_any_phase_of_both_attempts_ends_within_one_deadline() {
    let stalls = ["never-headers", "silent", "idle-mid", "stalled-500", "pings-only"];
    let models: Vec<String> =
        stalls.iter().flat_map(|one| stalls.map(|other| format!("{one}>{other}|attempt = \"200ms\""))).collect();
    let more = "[timeouts]\ntotal = \"800ms\"\nidle = \"200ms\"\nfirst_token = \"200ms\"\nhead_hold = \"700ms\"\n";
    let (first, second, gateway) = before_two(&models.iter().map(String::as_str).collect::<Vec<_>>(), more);
    let began = Instant::now();
    let ends: Vec<_> = std::thread::scope(|scope| {
        let asking: Vec<_> = models
            .iter()
            .flat_map(|model| [false, true].map(|stream| (model.split_once('|').unwrap().0, stream)))
            .map(|(model, stream)| {
                let mut raw = open(&gateway, model, stream, &format!("{model}-{stream}").replace('>', "."));
                scope.spawn(move || (model, stream, raw.try_read_response(LIMIT)))
            })
            .collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    });
    // 800 ms for each, all at once; the rest is this machine's.
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    for (model, stream, response) in ends {
        let response = response.unwrap();
        let record = gateway.wait_access(&format!("{model}-{stream}").replace('>', "."), LIMIT);
        // A stream whose first event has come is its client's: it ends with an error event.
        assert!(response.status != 200 || (stream && model.contains("idle-mid")), "{model}: {}", response.text());
        assert_ne!(record["cause"], "ok", "{record}");
        assert!(response.is_complete && response.text().contains("\"error\""), "{model} {}", response.text());
    }
    // At most one each; a busy machine may need all of an attempt's time for its connect.
    assert!(first.request_count() <= 50 && second.request_count() <= 50);
    let is_idle =
        |kind: &str| gateway.metrics().contains(&format!("evergate_inflight_requests{{kind=\"{kind}\"}} 0\n"));
    wait_until("every request's end", LIMIT, || is_idle("unary") && is_idle("stream"));
    // What is left open is kept for other requests: of stalled calls nothing is.
    for fake in [&first, &second] {
        for index in 0..fake.request_count() {
            let _ = fake.wait_end(index, LIMIT);
        }
    }
}

/// What a dead worker knew: the upstream that was being called, and how many had been before.
#[test]
fn a_worker_killed_in_the_second_attempt_leaves_its_name_on_record() {
    let (_first, second, gateway) = before_two(&["status-500>hold-mid"], ONE_WORKER);
    let unary = open(&gateway, "status-500>hold-mid", false, "lost-unary");
    let mut stream = open(&gateway, "status-500>hold-mid", true, "lost-stream");
    assert_eq!(stream.read_head(LIMIT).status, 200);
    assert!(stream.next_event(LIMIT).is_some());
    let _ = second.wait_request(1, LIMIT);
    let _ = gateway.kill_worker(0);
    for id in ["lost-unary", "lost-stream"] {
        let record = gateway.wait_access(id, LIMIT);
        let found = (&record["backend"], &record["attempts"], &record["cause"], &record["by_master"]);
        assert_eq!(found, (&json!("second"), &json!(2), &json!("worker_lost"), &json!(true)), "{record}");
    }
    let metrics = |line: &str| gateway.metrics().lines().any(|found| found == line);
    for line in [
        r#"evergate_attempts_total{upstream="first",cause="upstream_failed"} 2"#,
        r#"evergate_attempts_total{upstream="second",cause="worker_lost"} 2"#,
    ] {
        wait_until(line, LIMIT, || metrics(line));
    }
    assert!(rest_of(&mut stream).iter().all(|event| !event.is_done()));
    drop(unary);
}
