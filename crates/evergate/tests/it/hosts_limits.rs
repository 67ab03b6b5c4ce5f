//! Programs and the time of the requests they work on: it reaches them, and ends their work whatever becomes of the worker; a
//! client that leaves ends it at once.

use std::time::{Duration, Instant, SystemTime};

use evergate_testkit::raw::{Response, chat_body, post_request};
use evergate_testkit::{Evergate, Raw, adaptersim, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::hosts::{code, gateway, hosts, marked, waiter};
use crate::hosts_kept::{model, section};
use crate::support::{CHAT, LIMIT, assert_failed_stream, is_full, rest_of, send};

/// A program in each mode that never ends its answer, and what is asked of it for that.
const ALL: [(&str, &str, &str); 3] =
    [("command", "tiny/x", "hello"), ("stdio", "tiny/x", "hang"), ("server", "tiny/never-headers", "hello")];

fn endless(mode: &str) -> String {
    if mode == "command" { waiter("/nowhere/to/be/found") } else { section(mode, &[], "") }
}

fn open(gateway: &Evergate, model: &str, text: &str, stream: bool, fields: &str) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    let body = chat_body(model, stream, &json!({ "messages": [{ "role": "user", "content": text }] }));
    raw.send(&post_request(CHAT, fields, &body));
    raw
}

fn ask_within(gateway: &Evergate, model: &str, text: &str, time: &str) -> Response {
    open(gateway, model, text, false, &format!("x-request-timeout: {time}\r\n")).read_response(LIMIT)
}

fn wait_in_flight(gateway: &Evergate, count: u64) {
    wait_until("as many requests at its program", LIMIT, || model(gateway, "tiny")["in_flight"] == count);
}

#[test]
fn the_time_of_a_request_reaches_its_program() {
    let gateway = gateway(&[("tiny", &section("stdio", &[], ""))]);
    let response = ask_within(&gateway, "tiny/x", "echo", "9s");
    let frame: Value = serde_json::from_str(&response.content()).unwrap();
    let left = frame["deadline_ms"].as_u64().unwrap();
    assert!((1..9000).contains(&left), "{frame}");
    let response = ask_within(&gateway, "tiny/x", "echo", "100s");
    let frame: Value = serde_json::from_str(&response.content()).unwrap();
    assert!((60_000..100_000).contains(&frame["deadline_ms"].as_u64().unwrap()), "{frame}");
}

#[test]
fn whoever_notices_first_that_the_time_is_over_names_whose_limit_it_was() {
    for (mode, name, text) in ALL {
        let gateway = gateway(&[("tiny", &endless(mode))]);
        for _ in 0..5 {
            let response = ask_within(&gateway, name, text, "400ms");
            // The first may find the program not started yet.
            if response.status != 503 {
                assert_eq!(code(&response), (504, "deadline_exceeded".into()), "{mode}: {}", response.text());
                assert!(response.text().contains("x-request-timeout"), "{mode}: {}", response.text());
            }
        }
        wait_in_flight(&gateway, 0);
    }
}

#[test]
fn a_stream_of_a_program_is_ended_in_the_name_of_its_limit() {
    let own = section("stdio", &[], "");
    let text = format!("{}[timeouts]\nstream_total = \"1500ms\"\n", crate::hosts::config(&[("tiny", &own)]));
    let gateway = Evergate::builder(crate::support::EXE).config(text).start();
    let mut raw = open(&gateway, "tiny/x", "say=a;hang", true, "");
    assert_eq!(raw.read_head(LIMIT).status, 200);
    let events = rest_of(&mut raw);
    assert_failed_stream(&events, raw.body_is_complete(), "deadline_exceeded");
    assert!(events.last().unwrap().data.contains("timeouts.stream_total"), "{:?}", events.last());
    wait_in_flight(&gateway, 0);
}

#[test]
fn g6_a_stream_of_a_program_that_dies_ends_with_what_it_died_of() {
    let gateway = gateway(&[("tiny", &section("stdio", &[], ""))]);
    let mut raw = open(&gateway, "tiny/x", "say=a;exit=7", true, "");
    assert_eq!(raw.read_head(LIMIT).status, 200);
    let events = rest_of(&mut raw);
    assert_failed_stream(&events, raw.body_is_complete(), "adapter_exited");
    assert!(events.last().unwrap().data.contains("exit code 7"), "{:?}", events.last());
}

#[test]
fn a_program_does_not_work_on_after_its_clients_time_though_the_worker_is_frozen() {
    for (mode, name, text) in ALL {
        let gateway = gateway(&[("tiny", &endless(mode))]);
        // Its host is there before the time begins.
        assert!(gateway.cli(&["models", "load", "tiny"]).status.success());
        let began = Instant::now();
        let raw = open(&gateway, name, text, false, "x-request-timeout: 5s\r\n");
        wait_in_flight(&gateway, 1);
        for worker in gateway.workers() {
            send(worker, Signal::STOP);
        }
        assert!(began.elapsed() < Duration::from_secs(5), "the machine was too slow for this test");
        wait_in_flight(&gateway, 0);
        let took = began.elapsed();
        // The grace is a second, and a look takes its time.
        assert!(took > Duration::from_millis(4900) && took < Duration::from_secs(9), "{mode}: {took:?}");
        if mode == "command" {
            wait_until("the end of its program", LIMIT, || marked(&gateway).is_empty());
        }
        for worker in gateway.workers() {
            send(worker, Signal::CONT);
        }
        drop(raw);
        assert_eq!(hosts(&gateway).len(), 1, "{mode}");
    }
}

/// When a line was logged, milliseconds since 1970.
fn logged(gateway: &Evergate, word: &str) -> Vec<u64> {
    let log = std::fs::read_to_string(gateway.state_dir().join("models/tiny.log")).unwrap_or_default();
    log.lines()
        .filter(|line| line.contains(word))
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect()
}

#[test]
fn a2_a_client_that_leaves_stops_the_programs_work_within_100_ms() {
    let script = "trap 'echo gone >&2; exit 0' TERM; echo here >&2; while :; do sleep 0.01; done";
    let command = format!("process = {{ mode = \"command\", argv = [\"sh\", \"-c\", {script:?}] }}");
    let argv = [&*adaptersim().display().to_string(), "serve-hold:127.0.0.1:{port}", "hang"].map(str::to_owned);
    let server = format!("process = {{ mode = \"server\", argv = {argv:?} }}");
    let cases = [
        (command, "hello", "here", "gone"),
        (section("stdio", &[], ""), "hang", "request ", "cancel "),
        (server, "hello", "here", "gone"),
    ];
    let rounds = if is_full() { 30 } else { 9 };
    for (own, text, here, gone) in cases {
        let gateway = gateway(&[("tiny", &own)]);
        let mut gaps = Vec::new();
        for round in 1..=rounds {
            let raw = open(&gateway, "tiny/x", text, round % 2 == 0, "");
            wait_until("its work", LIMIT, || logged(&gateway, here).len() == round);
            let left = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
            raw.close();
            wait_until("its end", LIMIT, || logged(&gateway, gone).len() == round);
            gaps.push(u128::from(*logged(&gateway, gone).last().unwrap()).saturating_sub(left));
        }
        gaps.sort_unstable();
        // The median, since the machine may have other things to do for once.
        assert!(gaps[rounds / 2] < 100, "{own}: {gaps:?}");
        wait_in_flight(&gateway, 0);
    }
}
