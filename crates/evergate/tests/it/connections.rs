//! A client connection over time: slow, idle, pipelined, kept, half-sent.

use std::time::{Duration, Instant};

use evergate_testkit::link::{Gone, Wait};
use evergate_testkit::raw::{chat_body, chat_request, get_request, post_request};
use evergate_testkit::sse::text_of;
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use serde_json::{Value, json};

use crate::metrics::{samples, sum};
use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_alive, assert_counted, assert_error, assert_good_stream, before, chat, echo,
    echo_with, open,
};

/// Small limits, so that a test sees them pass.
const SHORT: &str =
    "[timeouts]\nheader = \"300ms\"\nclient_idle = \"400ms\"\nbody_idle = \"300ms\"\nbody = \"900ms\"\n";

/// A8.
#[test]
fn a_slow_head_is_answered_408() {
    let gateway = echo_with(SHORT);
    for start in ["G", "GET /healthz HTTP/1.1\r\n", "GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: "] {
        let mut raw = Raw::connect(&gateway.addr());
        let began = Instant::now();
        raw.send(start.as_bytes());
        assert_error(&raw.read_response(LIMIT), 408, "request_timeout");
        assert!(raw.read_to_close(LIMIT).0.is_empty());
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(250) && took < Duration::from_secs(3), "{took:?}");
    }
    assert_alive(&gateway);
}

/// A8, B7: its record says what its first line did, if that came, and how long its client took; the gateway's own time is none.
#[test]
fn a8_a_refused_head_is_on_record_as_what_was_known_of_it() {
    let gateway = echo_with(&format!("{SHORT}[limits]\nheader = \"4KiB\"\n"));
    let large = format!("PUT /v1/models?x=/healthz HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(5_000));
    for (head, status, known) in [
        ("POST /v1/chat/completions HTTP/1.1\r\nhost: local", 408, ["POST", "/v1/chat/completions"]),
        ("GET /healthz HTTP/1.1\r\n", 408, ["GET", "other"]),
        ("POST /v1/chat/completions HTT", 408, ["other", "other"]),
        (&large, 431, ["PUT", "/v1/models"]),
        ("GET /v1/models HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400, ["GET", "/v1/models"]),
    ] {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(head.as_bytes());
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, status, "{head}");
        let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
        assert_eq!([&record["method"], &record["route"]], known, "{head}: {record}");
        assert!(status != 408 || record["duration_ms"].as_f64().unwrap() >= 250.0, "{head}: {record}");
    }
    assert_eq!(sum(&samples(&gateway.metrics()), "evergate_first_byte_seconds_count", &[]), 0.0);
}

/// B7: what lies before its first byte is no part of it.
#[test]
fn b7_a_refused_head_behind_an_idle_time_is_on_record_without_it() {
    let gateway = echo_with(ONE_WORKER);
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&get_request("/healthz", ""));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    raw.link().pause(Duration::from_secs(1)).expect("still open");
    raw.send(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n");
    let response = raw.read_response(LIMIT);
    let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
    assert!(record["duration_ms"].as_f64().unwrap() < 900.0, "{record}");
}

/// A8: bytes that keep trickling in do not move the limit.
#[test]
fn a_trickling_head_is_answered_408() {
    let gateway = echo_with(SHORT);
    let mut raw = Raw::connect(&gateway.addr());
    let began = Instant::now();
    raw.send(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: ");
    while raw.stays_open(Duration::from_millis(30)) {
        assert!(began.elapsed() < Duration::from_secs(5), "a head may trickle for ever");
        let _ = raw.try_send(b"y");
    }
    assert_error(&raw.read_response(LIMIT), 408, "request_timeout");
}

/// A10.
#[test]
fn an_idle_connection_is_closed_without_a_word() {
    let gateway = echo_with(SHORT);
    let mut fresh = Raw::connect(&gateway.addr());
    let mut used = Raw::connect(&gateway.addr());
    used.send(&get_request("/healthz", ""));
    assert_eq!(used.read_response(LIMIT).status, 200);
    let began = Instant::now();
    assert!(used.read_to_close(LIMIT).0.is_empty());
    assert!(fresh.read_to_close(LIMIT).0.is_empty());
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(200) && took < Duration::from_secs(3), "{took:?}");
}

/// A10: also behind an answer that was waited for, whole or streamed, and with half a head behind it.
#[test]
fn a_connection_that_idles_after_a_slow_answer_is_closed() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, SHORT);
    for (script, is_stream) in [("delay-600", false), ("stream-8-100", true)] {
        let mut idle = open(&gateway, script, is_stream);
        let mut half = open(&gateway, script, is_stream);
        half.send(b"GET /healthz HTTP/1.1\r\nhost:");
        assert_eq!((idle.read_response(LIMIT).status, half.read_response(LIMIT).status), (200, 200));
        let began = Instant::now();
        assert!(idle.read_to_close(LIMIT).0.is_empty());
        assert_error(&half.read_response(LIMIT), 408, "request_timeout");
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(200) && took < Duration::from_secs(3), "{took:?}");
    }
}

/// A9: long before the whole body's time is over, and nobody is called for it.
#[test]
fn a9_a_body_that_stalls_is_answered_408_and_reaches_no_upstream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[timeouts]\nbody_idle = \"300ms\"\nbody = \"10m\"\n");
    let mut raw = Raw::connect(&gateway.addr());
    let body = chat_body("fake/ok", false, &Value::Null);
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-request-id: stalled\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let began = Instant::now();
    raw.send(format!("{head}{}", &body[..body.len() - 1]).as_bytes());
    let response = raw.read_response(LIMIT);
    assert_error(&response, 408, "request_timeout");
    assert!(response.text().contains("within timeouts.body_idle"), "{}", response.text());
    assert!(raw.read_to_close(LIMIT).0.is_empty());
    assert!(began.elapsed() >= Duration::from_millis(300), "{:?}", began.elapsed());
    let record = gateway.wait_access("stalled", LIMIT);
    assert_eq!((&record["cause"], &record["status"]), (&json!("request_timeout"), &json!(408)), "{record}");
    assert_eq!(record["attempts"], 0, "{record}");
    assert_counted(&gateway, 408, "request_timeout", 1);
    assert_eq!((fake.connections().len(), fake.request_count()), (0, 0));
    assert_eq!(chat(&gateway, "ok", false).status, 200);
}

/// A9: each pause is short, the whole is too long.
#[test]
fn a_trickling_body_is_answered_408() {
    let gateway = echo_with(SHORT);
    let mut raw = Raw::connect(&gateway.addr());
    let began = Instant::now();
    raw.send(format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n").as_bytes());
    while raw.stays_open(Duration::from_millis(50)) {
        assert!(began.elapsed() < Duration::from_secs(5), "a body may trickle for ever");
        let _ = raw.try_send(b" ");
    }
    assert_error(&raw.read_response(LIMIT), 408, "request_timeout");
    assert!(began.elapsed() >= Duration::from_millis(700), "the idle limit ran though bytes came");
}

/// An answer that takes longer than the client's own limits is not cut by them.
#[test]
fn a_long_answer_is_not_the_clients_slowness() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, SHORT);
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&chat_request("fake/delay-1200", false, &Value::Null));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    raw.send(&chat_request("fake/stream-8-150", true, &Value::Null));
    let response = raw.read_response(LIMIT);
    assert_good_stream(&response.events(), response.is_complete);
}

/// B13.
#[test]
fn pipelined_requests_are_answered_in_order() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    let chat = |n: usize| {
        let messages = json!({"messages": [{"role": "user", "content": format!("number {n}")}]});
        chat_request("echo", n.is_multiple_of(3), &messages)
    };
    let mut all = Vec::new();
    for n in 0..60_usize {
        all.extend(chat(n));
    }
    all.extend(get_request("/nothing", ""));
    all.extend(get_request("/healthz", ""));
    raw.send(&all);
    for n in 0..60_usize {
        let response = raw.read_response(LIMIT);
        let text = if n.is_multiple_of(3) { text_of(&response.events()) } else { response.content() };
        assert_eq!(text, format!("number {n}"));
    }
    assert_error(&raw.read_response(LIMIT), 404, "not_found");
    assert_eq!(raw.read_response(LIMIT).status, 200);
}

/// B10: a request that is refused by its head gets its answer instead of the 100, and the connection ends.
#[test]
fn a_body_that_nobody_wants_is_not_asked_for() {
    let gateway = echo_with("[limits]\nbody = \"4KiB\"\n");
    for (path, length, status) in [(CHAT, 1_000_000, "413"), ("/nothing", 10, "404"), ("/healthz", 10, "405")] {
        let mut raw = Raw::connect(&gateway.addr());
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        );
        raw.send(head.as_bytes());
        let (bytes, _) = raw.read_to_close(LIMIT);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {text}");
    }
}

#[test]
fn a_body_that_is_wanted_is_asked_for() {
    let gateway = echo();
    let body = chat_body("echo", false, &Value::Null);
    let mut raw = Raw::connect(&gateway.addr());
    for _ in 0..2 {
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        raw.send(head.as_bytes());
        assert_eq!(raw.link().wait(Instant::now() + LIMIT), Wait::Data);
        assert!(raw.link().inbox.starts_with(b"HTTP/1.1 100 "), "{:?}", raw.link().inbox);
        raw.send(body.as_bytes());
        assert_eq!(raw.read_response(LIMIT).content(), "Say hello");
    }
}

#[test]
fn a_connection_is_kept_until_the_client_says_otherwise() {
    let gateway = echo();
    let mut raw = Raw::connect(&gateway.addr());
    for stream in [false, true, false, true] {
        raw.send(&chat_request("echo", stream, &Value::Null));
        assert!(raw.read_response(LIMIT).is_complete);
    }
    raw.send(&get_request("/healthz", "connection: close\r\n"));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    assert!(raw.read_to_close(LIMIT).0.is_empty());
}

#[test]
fn an_old_client_gets_an_answer_that_ends_with_the_connection() {
    let gateway = echo();
    for stream in [false, true] {
        let body = chat_body("echo", stream, &Value::Null);
        let mut raw = Raw::connect(&gateway.addr());
        let head = format!(
            "POST {CHAT} HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        raw.send(&[head.as_bytes(), body.as_bytes()].concat());
        let (bytes, _) = raw.read_to_close(LIMIT);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200") || head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "HTTP/1.0 knows no chunks: {head}");
        assert!(body.contains("hello") && body.starts_with(if stream { "data: {" } else { "{" }), "{body}");
    }
}

/// A request that arrives byte by byte is the same request.
#[test]
fn a_request_may_come_in_any_pieces() {
    let gateway = echo();
    let request = chat_request("echo", false, &Value::Null);
    let mut raw = Raw::connect(&gateway.addr());
    for byte in &request {
        raw.send(&[*byte]);
    }
    assert_eq!(raw.read_response(LIMIT).content(), "Say hello");
    for split in [1, 16, request.len() - 1] {
        raw.send(&request[..split]);
        assert!(raw.stays_open(Duration::from_millis(5)));
        raw.send(&request[split..]);
        assert_eq!(raw.read_response(LIMIT).content(), "Say hello");
    }
}

#[test]
fn a_unix_socket_serves_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("front.sock");
    let text = format!(
        "[server]\nlisten = [\"unix:{}\", \"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [models.echo]\ntargets = [{{ upstream = \"echo\" }}]\n",
        socket.display()
    );
    let gateway = Evergate::builder(EXE).config(text).start();
    assert_eq!(gateway.addrs().len(), 2);
    for address in gateway.addrs() {
        assert_eq!(evergate_testkit::post_chat(&address, "echo", false, &Value::Null).content(), "Say hello");
    }
}

/// A1: a client that leaves while its body is read has asked for nothing.
#[test]
fn a_client_that_leaves_in_its_body_causes_no_call() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let request = post_request(CHAT, "x-request-id: left-in-body\r\n", &chat_body("fake/ok", false, &Value::Null));
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&request[..request.len() - 5]);
    raw.close();
    let record = gateway.wait_access("left-in-body", LIMIT);
    assert_eq!((&record["cause"], &record["status"]), (&json!("client_gone"), &json!(499)), "{record}");
    assert_eq!(fake.request_count(), 0);
}

/// A1: the same for one that only ends its own half: nobody is told anything, and a connection without an end would be.
#[test]
fn a1_a_client_that_half_closes_in_its_body_hears_nothing() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let chunked = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n");
    for (n, framing) in ["length", "chunked"].into_iter().enumerate() {
        let (id, body) = (format!("half-{n}"), chat_body("fake/ok", false, &Value::Null));
        let field = format!("x-request-id: {id}\r\n");
        let mut raw = Raw::connect(&gateway.addr());
        // An answer before it is its client's all the same.
        raw.send(&get_request("/healthz", ""));
        assert_eq!(raw.read_response(LIMIT).status, 200);
        match framing {
            "length" => {
                let request = post_request(CHAT, &field, &body);
                raw.send(&request[..request.len() - 5]);
            }
            _ => raw.send(format!("{chunked}{field}\r\n4\r\n{}\r\n", &body[..4]).as_bytes()),
        }
        raw.half_close();
        let record = gateway.wait_access(&id, LIMIT);
        assert_eq!((&record["cause"], &record["status"]), (&json!("client_gone"), &json!(499)), "{record}");
        let (bytes, _) = raw.read_to_close(LIMIT);
        assert_eq!(String::from_utf8_lossy(&bytes), "", "{framing}");
    }
    assert_eq!(fake.request_count(), 0);
}

/// RFC 9112, 2.2: empty lines before a request are nothing, also when none follows them: the connection is idle then, and
/// ends as such, without a word.
#[test]
fn empty_lines_behind_a_body_are_no_request() {
    let gateway = echo_with("[timeouts]\nheader = \"300ms\"\nclient_idle = \"1200ms\"\n");
    for lines in ["\r\n", "\r\n\r\n\r\n"] {
        let mut request = post_request(CHAT, "", &chat_body("echo", false, &Value::Null));
        request.extend_from_slice(lines.as_bytes());
        let mut raw = Raw::connect(&gateway.addr());
        for _ in 0..2 {
            raw.send(&request);
            assert_eq!(raw.read_response(LIMIT).status, 200);
            // Longer than a head may take, within what an idle connection has.
            let began = Instant::now();
            wait_until("more than the time of a head", LIMIT, || began.elapsed() > Duration::from_millis(500));
        }
        assert_eq!(raw.read_to_close(LIMIT), (Vec::new(), Gone::Eof), "{lines:?}");
        // And on a new connection, before anything.
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(lines.as_bytes());
        assert_eq!(raw.read_to_close(LIMIT), (Vec::new(), Gone::Eof), "{lines:?}");
    }
}

/// But no more of them than a head may have bytes.
#[test]
fn endless_empty_lines_are_refused() {
    let gateway = echo_with("[limits]\nheader = \"8KiB\"\n");
    let mut raw = Raw::connect(&gateway.addr());
    // More than what is thrown away and what a head may have.
    let _ = raw.try_send("\r\n".repeat(12 * 1024).as_bytes());
    assert_error(&raw.read_response(LIMIT), 400, "malformed_request");
}

/// A client stall that a test sees pass.
const STALL: &str = "[timeouts]\nclient_stall = \"500ms\"\n";

/// A6: whoever takes no byte of an answer is cut, its upstream left, and the record says why.
#[test]
fn a_client_that_reads_nothing_is_cut() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("{STALL}{ONE_WORKER}"));
    for (n, script) in ["flood", "huge-20000000"].into_iter().enumerate() {
        let id = format!("stalled-{script}");
        let mut raw = Raw::connect(&gateway.addr());
        raw.link().shrink_receive_buffer();
        let body = chat_body(&format!("fake/{script}"), script == "flood", &Value::Null);
        raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), &body));
        let _ = fake.wait_request(n, LIMIT);
        let record = gateway.wait_access(&id, LIMIT);
        assert_eq!(record["cause"], "client_stalled", "{record}");
        if script == "flood" {
            let _ = fake.wait_closed(n, LIMIT);
        }
        wait_until("the reset", LIMIT, || raw.link().was_reset());
        let (bytes, _) = raw.read_to_close(LIMIT);
        assert!(bytes.len() < 10_000_000, "{} bytes", bytes.len());
    }
    assert_eq!(chat(&gateway, "ok", false).status, 200);
}

/// A7: reading slowly is no stall, however long a full socket stays full.
#[test]
fn a_client_that_reads_slowly_is_not_cut() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, STALL);
    let mut raw = open(&gateway, "flood", true);
    raw.link().shrink_receive_buffer();
    let (began, mut bytes) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(3) {
        bytes += raw.link().read_piece(2048);
        evergate_testkit::wait::try_wait_for(Duration::from_millis(20), || None::<()>);
    }
    assert!(bytes > 20_000, "{bytes}");
    assert!(!raw.link().was_reset(), "cut after {:?}", began.elapsed());
    assert!(gateway.access().is_empty());
}

/// A6 where TLS has a buffer of its own.
#[test]
fn a_client_that_reads_nothing_of_tls_is_cut() {
    let (gateway, identity) = crate::drain::tls_gateway(STALL);
    let mut raw = Raw::connect_tls(&gateway.addr(), &identity.client_config(&["http/1.1"]));
    raw.link().shrink_receive_buffer();
    let messages = json!({"messages": [{"role": "user", "content": "x".repeat(10_000_000)}]});
    let body = chat_body("echo", false, &messages);
    raw.send(&post_request(CHAT, "x-request-id: stalled-tls\r\n", &body));
    let record = gateway.wait_access("stalled-tls", LIMIT);
    assert_eq!(record["cause"], "client_stalled", "{record}");
    wait_until("the reset", LIMIT, || raw.link().was_reset());
}
