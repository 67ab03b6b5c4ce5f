//! HTTP/2 clients that take a part of an answer and leave the rest waiting for their window: such an answer is under way, however
//! little of it is missing.

use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::chat_body;
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, FakeUpstream, wait_until};
use serde_json::{Value, json};

use crate::drain::term_worker;
use crate::h2_wire::{ALL, DATA, END, HEADERS, RESET, Wire};
use crate::processes::lost_ids;
use crate::support::{LIMIT, ONE_WORKER, before, echo_with};

/// Windows that no answer here fits into.
const WINDOWS: [u32; 3] = [0, 1, 100];

fn inflight(gateway: &Evergate) -> Vec<Value> {
    let status: Value = serde_json::from_str(&gateway.printed(&["status", "--json"])).unwrap();
    status["inflight"].as_array().unwrap().clone()
}

/// Asks for an answer of some kilobytes on a connection whose streams begin with that window.
fn ask(gateway: &Evergate, window: u32, stream: bool) -> Wire {
    let mut wire = Wire::connect(gateway);
    wire.set_window(window);
    let text = "x".repeat(5_000);
    wire.post_as(
        1,
        &id(window, stream),
        &chat_body("echo", stream, &json!({"messages": [{"role": "user", "content": text}]})),
    );
    wire
}

fn id(window: u32, stream: bool) -> String {
    format!("window-{window}-{stream}")
}

/// Reads what the window has room for, and waits until nothing else is left to do for it.
#[track_caller]
fn read_window(gateway: &Evergate, wire: &mut Wire, window: u32) -> Vec<u8> {
    assert_eq!(wire.skip_to(HEADERS).stream, 1);
    let mut body = Vec::new();
    while body.len() < window as usize {
        let frame = wire.next().expect("not the end");
        assert_eq!((frame.kind, frame.flags & END), (DATA, 0), "{frame:?}");
        body.extend(frame.payload);
    }
    assert_eq!(body.len(), window as usize);
    let is_waiting = |row: &Value| row["phase"] == "stream";
    wait_until("a request under way", LIMIT, || inflight(gateway).iter().any(is_waiting));
    body
}

fn cases() -> impl Iterator<Item = (u32, bool)> {
    WINDOWS.into_iter().flat_map(|window| [(window, false), (window, true)])
}

/// Line 2: the death of a worker names them, and their records say what became of them.
#[test]
fn s02_answers_that_wait_for_a_window_are_lost_with_their_worker() {
    let gateway = echo_with(ONE_WORKER);
    let mut ids: Vec<String> = cases().map(|(window, stream)| id(window, stream)).collect();
    let mut wires: Vec<Wire> = cases().map(|(window, stream)| ask(&gateway, window, stream)).collect();
    for ((window, _), wire) in cases().zip(&mut wires) {
        read_window(&gateway, wire, window);
    }
    // Whatever could be written has been: a later answer comes.
    for wire in &mut wires {
        wire.get(3);
        wire.open_window(3, 10_000);
        let (is_ok, _) = wire.answer(3);
        assert!(is_ok);
    }
    assert_eq!(inflight(&gateway).len(), ids.len());
    let pid = gateway.kill_worker(0);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    ids.sort_unstable();
    assert_eq!(lost_ids(&record), ids, "{record}");
    for id in ids {
        assert_eq!(gateway.wait_access(&id, LIMIT)["cause"], "worker_lost");
    }
}

/// A3: who leaves with most of its answer unsent was not answered.
#[test]
fn a3_who_leaves_an_answer_that_waits_for_a_window_is_gone() {
    let gateway = echo_with(ONE_WORKER);
    for (window, stream) in cases() {
        let mut wire = ask(&gateway, window, stream);
        read_window(&gateway, &mut wire, window);
        assert!(gateway.access().iter().all(|record| record["client_id"] != id(window, stream)));
        if window == 1 {
            // The stream only.
            wire.send(RESET, 0, 1, &[0, 0, 0, 8]);
        } else {
            drop(wire);
        }
        let record = gateway.wait_access(&id(window, stream), LIMIT);
        let status = if stream { 200 } else { 499 };
        assert_eq!((&record["cause"], &record["status"]), (&json!("client_gone"), &json!(status)), "{record}");
    }
    wait_until("nothing left", LIMIT, || inflight(&gateway).is_empty());
}

/// A6: the end of an answer is watched as its middle is; the connection goes on.
#[test]
fn a6_the_end_of_an_answer_waits_for_its_window_as_long_as_the_rest() {
    let gateway = echo_with(&format!("{ONE_WORKER}[timeouts]\nclient_stall = \"500ms\"\n"));
    for (window, stream) in cases() {
        let began = Instant::now();
        let mut wire = ask(&gateway, window, stream);
        read_window(&gateway, &mut wire, window);
        let reset = wire.next().expect("the connection goes on");
        // CANCEL (RFC 9113, 7).
        assert_eq!((reset.kind, reset.stream, &reset.payload[..]), (RESET, 1, &[0, 0, 0, 8][..]));
        assert!(began.elapsed() >= Duration::from_millis(500));
        let record = gateway.wait_access(&id(window, stream), LIMIT);
        assert_eq!(record["cause"], "client_stalled", "{record}");
        wire.get(3);
        wire.open_window(3, 10_000);
        assert!(wire.answer(3).0);
    }
}

/// A7: a client that opens its window a little at a time reads slowly, and is answered.
#[test]
fn a7_a_window_that_opens_slowly_is_waited_for() {
    let gateway = echo_with(&format!("{ONE_WORKER}[timeouts]\nclient_stall = \"2s\"\n"));
    for stream in [false, true] {
        let began = Instant::now();
        let mut wire = ask(&gateway, 100, stream);
        let mut body = read_window(&gateway, &mut wire, 100).len();
        while began.elapsed() < Duration::from_secs(5) {
            let _ = wire.link.pause(Duration::from_millis(200));
            wire.open_window(1, 100);
            let enough = body + 100;
            while body < enough {
                let frame = wire.next().expect("not the end");
                assert_eq!((frame.kind, frame.flags & END), (DATA, 0), "{frame:?}");
                body += frame.payload.len();
            }
        }
        wire.open_window(1, 100_000);
        let (_, rest) = wire.answer(1);
        assert!(body + rest.len() > 5_000);
        let record = gateway.wait_access(&id(100, stream), LIMIT);
        assert_eq!((&record["cause"], &record["status"]), (&json!("ok"), &json!(200)), "{record}");
    }
}

/// A worker that drains waits for it as for any other answer; when its time is over the stream is reset.
#[test]
fn s21_a_drain_waits_for_an_answer_that_waits_for_its_window() {
    let gateway = echo_with(&format!("{ONE_WORKER}[shutdown]\ndrain = \"4s\"\n"));
    for stream in [false, true] {
        for is_read in [true, false] {
            let mut wire = ask(&gateway, 100, stream);
            read_window(&gateway, &mut wire, 100);
            let began = Instant::now();
            let pid = term_worker(&gateway);
            assert_eq!(wire.goaway(), ALL);
            if is_read {
                assert!(is_alive(pid));
                wire.open_window(1, 100_000);
                assert!(!wire.answer(1).1.is_empty());
            } else {
                let reset = std::iter::from_fn(|| wire.next()).find(|frame| frame.kind == RESET);
                assert!(reset.is_some_and(|frame| frame.stream == 1));
            }
            let took = began.elapsed();
            assert!(is_read || took >= Duration::from_secs(4), "{took:?}");
            let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
            assert_eq!((&record["code"], &record["lost"]), (&json!(0), &json!([])), "{record}");
            let records = gateway.access();
            let cause = &records.iter().rfind(|record| record["client_id"] == id(100, stream)).unwrap()["cause"];
            assert_eq!(cause, if is_read { "ok" } else { "server_shutting_down" });
            let _ = gateway.wait_workers(1);
        }
    }
}

/// An error that ends a stream is its last piece, and may wait for the window too.
#[test]
fn a_late_error_waits_for_its_window() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let mut wire = Wire::connect(&gateway);
    wire.set_window(0);
    wire.post_as(1, "late", &chat_body("fake/eof-mid", true, &Value::Null));
    assert_eq!(wire.skip_to(HEADERS).stream, 1);
    let (mut body, mut is_over) = (String::new(), false);
    while !body.contains("{\"error\"") {
        wire.open_window(1, 1);
        let frame = wire.skip_to(DATA);
        assert_eq!((frame.flags & END, frame.payload.len()), (0, 1), "{frame:?}");
        body.push(char::from(frame.payload[0]));
    }
    assert_eq!((inflight(&gateway).len(), gateway.access().len()), (1, 0));
    wire.open_window(1, 100_000);
    while !is_over {
        let frame = wire.skip_to(DATA);
        is_over = frame.flags & END != 0;
        body += std::str::from_utf8(&frame.payload).unwrap();
    }
    assert!(body.contains("upstream_disconnected") && !body.contains("[DONE]"), "{body}");
    let record = gateway.wait_access("late", LIMIT);
    assert_eq!(record["cause"], "upstream_disconnected", "{record}");
}

/// A7: a socket that is full says nothing of the window: there, what the client's kernel takes is what counts.
#[test]
fn a7_a_slow_reader_with_open_windows_is_not_cut() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("{ONE_WORKER}[timeouts]\nclient_stall = \"1s\"\n"));
    let mut wire = Wire::connect(&gateway);
    wire.link.shrink_receive_buffer();
    wire.set_window(1 << 30);
    wire.open_window(0, 1 << 30);
    for stream in [1, 3, 5] {
        wire.post_as(stream, "slow", &chat_body("fake/flood", true, &Value::Null));
    }
    let (began, mut bytes) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(4) {
        bytes += wire.link.read_piece(2048);
        try_wait_for(Duration::from_millis(20), || None::<()>);
    }
    assert!(bytes > 20_000, "{bytes}");
    assert!(!wire.link.was_reset() && gateway.access().is_empty(), "{:?}", gateway.access());
    drop(wire);
    let causes = || gateway.access().iter().map(|record| record["cause"].clone()).collect::<Vec<_>>();
    wait_until("its records", LIMIT, || causes().len() == 3);
    assert!(causes().iter().all(|cause| cause == "client_gone"), "{:?}", causes());
}
