//! A panic is one request's: 500 or an error event, and nothing else (H1). Panics are made by a debug build that is
//! told so by its environment.

use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config};
use serde_json::{Value, json};

use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_error, assert_failed_stream, assert_good_stream, before, chat, open_stream,
    rest_of, via,
};

/// One worker: all neighbours are in the process that panics, and none is told to go to another worker.
fn faulty(fake: &FakeUpstream) -> Evergate {
    let config = gateway_config(fake.base_url(), &[], ONE_WORKER);
    Evergate::builder(EXE).config(config).env("EVERGATE_FAULT", "1").start()
}

fn ask(raw: &mut Raw, fault: &str, script: &str, stream: bool) {
    let fields = format!("x-evergate-fault: {fault}\r\nx-request-id: {fault}-{stream}\r\n");
    raw.send(&post_request(CHAT, &fields, &chat_body(&via(script), stream, &Value::Null)));
}

#[test]
fn a_panic_in_the_handler_is_a_500_for_that_request_alone() {
    let fake = FakeUpstream::start();
    let gateway = faulty(&fake);
    let workers = gateway.workers();
    let mut neighbours: Vec<Raw> = (0..8).map(|_| open_stream(&gateway, "hold-mid")).collect();
    for _ in 0..5 {
        for stream in [false, true] {
            let mut raw = Raw::connect(&gateway.addr());
            ask(&mut raw, "panic-handler", "ok", stream);
            assert_error(&raw.read_response(LIMIT), 500, "internal_error");
        }
    }
    fake.release();
    for raw in &mut neighbours {
        assert_good_stream(&rest_of(raw), raw.body_is_complete());
    }
    assert_eq!(gateway.workers(), workers);
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
    let record = gateway.wait_access("panic-handler-false", LIMIT);
    assert_eq!((&record["cause"], &record["status"]), (&json!("internal_error"), &json!(500)), "{record}");
}

#[test]
fn a_panic_in_a_stream_is_an_error_event_for_that_stream_alone() {
    let fake = FakeUpstream::start();
    let gateway = faulty(&fake);
    let workers = gateway.workers();
    let mut neighbours: Vec<Raw> = (0..8).map(|_| open_stream(&gateway, "hold-mid")).collect();
    let calls = fake.request_count();
    for n in 0..5 {
        let mut raw = Raw::connect(&gateway.addr());
        ask(&mut raw, "panic-stream", "stream-100-20", true);
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, 200);
        assert_failed_stream(&response.events(), response.is_complete, "internal_error");
        // What the panic interrupted is given up at the upstream too.
        let _ = fake.wait_closed(calls + n, LIMIT);
    }
    fake.release();
    for raw in &mut neighbours {
        assert_good_stream(&rest_of(raw), raw.body_is_complete());
    }
    assert_eq!(gateway.workers(), workers);
    let record = gateway.wait_access("panic-stream-true", LIMIT);
    assert_eq!(record["cause"], "internal_error", "{record}");
    let metrics = evergate_testkit::raw::get(&gateway.admin(), "/metrics").text();
    assert!(metrics.lines().any(|line| line == "evergate_panics_total 5"), "{metrics}");
}

/// Nobody can ask for a panic who was not given the means.
#[test]
fn without_the_switch_the_header_means_nothing() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for fault in ["panic-handler", "panic-stream"] {
        let mut raw = Raw::connect(&gateway.addr());
        ask(&mut raw, fault, "ok", fault == "panic-stream");
        assert_eq!(raw.read_response(LIMIT).status, 200);
        raw.send(&get_request("/v1/models", &format!("x-evergate-fault: {fault}\r\n")));
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    assert_eq!(chat(&gateway, "ok", false).status, 200);
}
