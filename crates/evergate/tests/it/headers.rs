//! What travels through the gateway besides bodies: a list of header fields each way, and nothing else.

use evergate_testkit::fake::Then;
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{FakeUpstream, Raw, Response, post_chat, wait_until};
use serde_json::{Value, json};

use crate::support::{CHAT, LIMIT, before, chat, via};

/// Fields that a client may send, each with a value that can be found again; `true` travels.
const FROM_CLIENT: [(&str, &str, bool); 44] = [
    ("openai-beta", "canary-a", true),
    ("anthropic-beta", "canary-b", true),
    ("idempotency-key", "canary-c", true),
    // RFC 9110, 7.6.1, and RFC 9113, 8.2.2: between two hops only.
    ("connection", "canary-hop", false),
    ("canary-hop", "canary-d", false),
    ("keep-alive", "timeout=5, canary", false),
    ("proxy-connection", "canary", false),
    ("te", "trailers, canary", false),
    ("trailer", "canary", false),
    ("upgrade", "canary", false),
    ("http2-settings", "canary", false),
    ("proxy-authenticate", "canary", false),
    ("proxy-authorization", "Basic canary", false),
    ("expect", "canary", false),
    ("max-forwards", "canary", false),
    ("via", "1.1 canary", false),
    // Who somebody is.
    ("authorization", "Bearer canary", false),
    ("api-key", "canary", false),
    ("x-api-key", "canary", false),
    ("x-goog-api-key", "canary", false),
    ("openai-organization", "canary", false),
    ("openai-project", "canary", false),
    ("cookie", "a=canary", false),
    ("from", "canary", false),
    ("referer", "http://localhost/canary", false),
    ("user-agent", "canary", false),
    ("x-request-id", "canary-id", false),
    ("x-real-ip", "canary", false),
    ("x-forwarded-for", "canary", false),
    ("x-forwarded-host", "canary", false),
    ("x-forwarded-proto", "canary", false),
    ("x-forwarded-port", "canary", false),
    ("x-forwarded-prefix", "canary", false),
    ("forwarded", "for=canary", false),
    ("x-original-url", "/canary", false),
    ("x-rewrite-url", "/canary", false),
    ("x-http-method-override", "canary", false),
    // What the answer shall be like.
    ("accept", "text/canary", false),
    ("accept-encoding", "gzip, canary", false),
    ("range", "bytes=0-canary", false),
    ("if-none-match", "canary", false),
    ("x-stainless-os", "canary", false),
    ("x-evergate-fault", "canary", false),
    ("x-canary", "canary \u{e9}\u{ff}", false),
];

/// Section 4.5 of the security paper: an allow-list, not a list of what is taken out.
#[test]
fn b18_only_listed_fields_reach_an_upstream() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for stream in [false, true] {
        let fields: String = FROM_CLIENT.iter().map(|(name, value, _)| format!("{name}: {value}\r\n")).collect();
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&post_request(CHAT, &fields, &chat_body(&via("ok"), stream, &Value::Null)));
        assert_eq!(raw.read_response(LIMIT).status, 200);
        let sent = fake.wait_request(usize::from(stream), LIMIT).request;
        let mut names: Vec<&str> = sent.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        let ours = [
            "anthropic-beta",
            "content-length",
            "content-type",
            "host",
            "idempotency-key",
            "openai-beta",
            "user-agent",
            "x-request-id",
        ];
        assert_eq!(names, ours, "{:?}", sent.headers);
        for (name, value, travels) in FROM_CLIENT {
            // `x-request-id` is our own id.
            assert_eq!(sent.header(name) == Some(value), travels, "{name}");
        }
        assert_eq!(String::from_utf8_lossy(&sent.head).matches("canary").count(), 3);
    }
}

/// Fields with bytes beyond ASCII that may travel do so unchanged, or the request is refused; none becomes two.
#[test]
fn b18_odd_bytes_do_not_become_more_fields() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let body = chat_body(&via("ok"), false, &Value::Null);
    for value in
        ["%0d%0ax-evil: 1", "\\r\\nx-evil: 1", "\u{e9}\u{2028}x-evil: 1", "a\tb", "a, b; c=\"d\"", "\u{ff}\u{0141}"]
    {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&post_request(CHAT, &format!("openai-beta: {value}\r\nidempotency-key: {value}\r\n"), &body));
        assert_eq!(raw.read_response(LIMIT).status, 200, "{value:?}");
        let sent = fake.requests().pop().unwrap().request;
        assert_eq!((sent.header("openai-beta"), sent.header("idempotency-key")), (Some(value), Some(value)));
        assert_eq!(sent.header("x-evil"), None);
    }
    for value in ["a\rx-evil: 1", "a\nx-evil: 1", "a\0b", "a\u{b}b", "a\r\n x-evil: 1", "a\u{7f}"] {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&post_request(CHAT, &format!("openai-beta: {value}\r\n"), &body));
        crate::support::assert_error(&raw.read_response(LIMIT), 400, "malformed_request");
    }
    assert_eq!(fake.request_count(), 6, "a refused one reached the upstream");
}

/// Fields of an upstream's answer; `true` travels.
const FROM_UPSTREAM: [(&str, &str, bool); 30] = [
    ("x-ratelimit-limit-requests", "canary-1", true),
    ("x-ratelimit-remaining-tokens", "canary-2", true),
    ("openai-processing-ms", "7", true),
    ("openai-version", "2020-10-01", true),
    ("set-cookie", "a=canary", false),
    ("set-cookie2", "a=canary", false),
    ("server", "canary", false),
    ("via", "1.1 canary", false),
    ("x-powered-by", "canary", false),
    ("alt-svc", "h3=\":443\"; canary", false),
    ("strict-transport-security", "max-age=1; canary", false),
    ("content-security-policy", "canary", false),
    ("access-control-allow-origin", "*", false),
    ("access-control-allow-credentials", "true", false),
    ("access-control-allow-headers", "canary", false),
    ("access-control-expose-headers", "canary", false),
    ("www-authenticate", "Basic realm=canary", false),
    ("proxy-authenticate", "Basic realm=canary", false),
    ("location", "http://127.0.0.1/canary", false),
    ("link", "</canary>; rel=preload", false),
    ("refresh", "0; url=/canary", false),
    ("upgrade", "canary", false),
    ("keep-alive", "timeout=5, canary", false),
    ("trailer", "canary", false),
    ("x-request-id", "canary", false),
    ("x-should-retry", "canary", false),
    ("openai-organization", "canary-org", false),
    ("cf-ray", "canary", false),
    ("etag", "\"canary\"", false),
    ("x-evergate", "canary", false),
];

#[test]
fn b18_only_listed_fields_reach_a_client() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let fields: String = FROM_UPSTREAM.iter().map(|(name, value, _)| format!("{name}: {value}\r\n")).collect();
    let whole = r#"{"choices":[]}"#;
    let events = "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    let error = r#"{"error":{"message":"no","type":"x","param":null,"code":"x"}}"#;
    for (name, status, kind, body, stream) in [
        ("whole", "200 OK", "application/json", whole, false),
        ("events", "200 OK", "text/event-stream", events, true),
        ("refused", "400 Bad Request", "application/json", error, false),
        ("failed", "500 Oops", "application/json", error, true),
    ] {
        let head =
            format!("HTTP/1.1 {status}\r\n{fields}content-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
        fake.stage(name, vec![[head.as_bytes(), body.as_bytes()].concat()], Then::Keep);
        let response = post_chat(&gateway.addr(), &via(name), stream, &Value::Null);
        assert_eq!(
            response.status,
            match name {
                "refused" => 400,
                "failed" => 502,
                _ => 200,
            }
        );
        check_answer(&response, name == "whole");
    }
}

fn check_answer(response: &Response, is_whole: bool) {
    for (name, value, travels) in FROM_UPSTREAM {
        let said: Vec<&str> =
            response.headers.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str()).collect();
        if travels && is_whole {
            assert_eq!(said, [value], "{name}");
        } else {
            assert!(!said.contains(&value), "{name}: {said:?}");
        }
    }
    let head = String::from_utf8_lossy(&response.head).into_owned();
    assert_eq!(head.matches("canary").count(), if is_whole { 2 } else { 0 }, "{head}");
    crate::support::assert_request_id(response);
}

/// E14: an answer that two readers could end at two places is refused and its connection never used again; what follows on
/// it is nobody's answer.
#[test]
fn e14_a_poisoned_connection_is_never_used_again() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, crate::support::ONE_WORKER);
    let good = r#"{"choices":[]}"#;
    let evil = "HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{\"choices\":[\"poison\"]}";
    for (name, head, body) in [
        ("both", "content-length: 14\r\ntransfer-encoding: chunked\r\n", format!("e\r\n{good}\r\n0\r\n\r\n")),
        ("two", "content-length: 14\r\ncontent-length: 14\r\n", good.to_owned()),
        ("twice", "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", format!("e\r\n{good}\r\n0\r\n\r\n")),
        ("list", "transfer-encoding: chunked, chunked\r\n", format!("e\r\n{good}\r\n0\r\n\r\n")),
        ("other", "transfer-encoding: xchunked\r\n", good.to_owned()),
    ] {
        let bytes = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{head}\r\n{body}{evil}");
        fake.stage(name, vec![bytes.into_bytes()], Then::Keep);
        let used = fake.connections().len();
        let response = post_chat(&gateway.addr(), &via(name), false, &Value::Null);
        crate::support::assert_error(&response, 502, "upstream_bad_response");
        assert!(!response.text().contains("poison"));
        let record = gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT);
        assert_eq!((&record["cause"], &record["attempts"]), (&json!("upstream_bad_response"), &json!(1)), "{record}");
        // On another connection, and its own answer.
        let next = chat(&gateway, "ok", false);
        assert_eq!(next.content(), evergate_testkit::fake::TEXT, "{name}");
        let last = fake.requests().pop().unwrap();
        let poisoned = fake.requests().into_iter().rev().find(|recorded| recorded.request.model() == name).unwrap();
        assert_ne!(last.connection, poisoned.connection, "{name}: {used} connections before");
        let is_over = || fake.connections()[poisoned.connection].end.is_some();
        wait_until("the end of its connection", LIMIT, is_over);
    }
    crate::support::assert_counted(&gateway, 502, "upstream_bad_response", 5);
}
