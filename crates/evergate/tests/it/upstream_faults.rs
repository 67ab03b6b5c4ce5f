//! What a client is told when its upstream refuses, breaks or talks nonsense.

use std::time::{Duration, Instant};

use evergate_testkit::fake::{TEXT, Then, refused_address};
use evergate_testkit::{Evergate, FakeUpstream, Response, gateway_config, wait_until};
use serde_json::{Value, json};

use crate::support::{EXE, LIMIT, ONE_WORKER, assert_error, assert_error_shape, before, chat};

/// The client would think that its own key is bad.
#[test]
fn e2_an_upstreams_401_is_never_the_clients() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    // Some tell a bad key by another status.
    for script in ["status-401", "status-403", "status-407", "code-400-invalid_api_key"] {
        for stream in [false, true] {
            assert_error(&chat(&gateway, script, stream), 502, "upstream_auth_failed");
        }
    }
}

#[test]
fn e1_an_upstreams_complaint_about_the_request_is_passed_on() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for (script, status) in [("status-400", 400), ("status-404", 404), ("status-409", 409), ("status-422", 422)] {
        for stream in [false, true] {
            let response = chat(&gateway, script, stream);
            assert_eq!(response.status, status, "{}", response.text());
            assert_error_shape(&response);
            assert_eq!(response.json()["error"]["type"], "invalid_request_error");
            assert_eq!(response.header("x-should-retry"), Some("false"), "{script}");
        }
    }
}

/// Never a wait that Node's SDK would sleep out.
#[test]
fn e3_an_upstreams_429_says_how_long_to_wait() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for stream in [false, true] {
        let response = chat(&gateway, "status-429", stream);
        assert_error(&response, 429, "rate_limit_exceeded");
        assert_eq!(response.header("retry-after"), Some("1"));
        let response = chat(&gateway, "status-429-300", stream);
        assert_eq!((response.status, response.error_code().as_str()), (429, "rate_limit_exceeded"));
        let wait: u32 = response.header("retry-after").unwrap().parse().unwrap();
        assert!(wait <= 20 && response.header("x-should-retry") == Some("false"), "{:?}", response.headers);
    }
}

/// The SDKs would send it twice more, and wait in between.
#[test]
fn e3_an_exhausted_quota_is_not_retried() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for stream in [false, true] {
        let response = chat(&gateway, "code-429-insufficient_quota", stream);
        assert_error(&response, 429, "insufficient_quota");
        assert_eq!(response.json()["error"]["type"], "insufficient_quota");
        assert!(response.header("retry-after").is_none(), "{:?}", response.headers);
    }
}

#[test]
fn e4_an_upstreams_failure_is_a_502() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for script in ["status-500", "status-502", "status-503", "status-529", "html-502"] {
        for stream in [false, true] {
            let response = chat(&gateway, script, stream);
            assert_error(&response, 502, "upstream_failed");
            assert!(!response.text().contains("It works"));
        }
    }
}

/// Our key would travel with it.
#[test]
fn e10_a_redirect_is_never_followed() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for stream in [false, true] {
        let response = chat(&gateway, "redirect", stream);
        assert_error(&response, 502, "upstream_bad_response");
        assert!(response.header("location").is_none());
    }
    assert!(fake.requests().iter().all(|one| one.request.path() != "/redirected"));
    assert_eq!(fake.request_count(), 2);
}

/// E6, too.
#[test]
fn e5_nonsense_is_a_502_and_is_not_repeated() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for script in ["html", "empty", "no-choices"] {
        for stream in [false, true] {
            let response = chat(&gateway, script, stream);
            assert_error(&response, 502, "upstream_bad_response");
            assert!(!response.text().contains("It works") && !response.text().contains("hello"));
        }
    }
    assert_error(&chat(&gateway, "bad-json", false), 502, "upstream_bad_response");
}

/// F18, too.
#[test]
fn e12_an_error_under_status_200_is_an_error() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for (script, stream) in [("error-200", false), ("error-200", true), ("error-event-first", true)] {
        let response = chat(&gateway, script, stream);
        assert_eq!(response.status, 502, "{script}: {}", response.text());
        assert!(matches!(response.error_code().as_str(), "upstream_failed" | "upstream_bad_response"), "{script}");
        assert_error_shape(&response);
    }
}

/// D10, too: nothing is sent a second time, since it may have been billed.
#[test]
fn e7_a_cut_answer_is_a_502_and_is_not_asked_for_again() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for (index, script) in ["truncated", "reset-mid", "close-early", "reset-early"].into_iter().enumerate() {
        assert_error(&chat(&gateway, script, false), 502, "upstream_disconnected");
        assert_eq!(fake.request_count(), index + 1, "{script}");
    }
    for (index, script) in ["close-early", "reset-early"].into_iter().enumerate() {
        assert_error(&chat(&gateway, script, true), 502, "upstream_disconnected");
        assert_eq!(fake.request_count(), index + 5, "{script}");
    }
}

/// On a connection that was used before: still nothing is sent twice.
#[test]
fn d10_a_used_connection_that_breaks_is_not_tried_again() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    assert_error(&chat(&gateway, "close-early", false), 502, "upstream_disconnected");
    assert_eq!(fake.request_count(), 2);
}

#[test]
fn e8_an_answer_beyond_the_limit_is_given_up() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[limits]\nanswer = \"64KiB\"\n");
    assert_error(&chat(&gateway, "huge-100000", false), 502, "upstream_bad_response");
    assert_eq!(chat(&gateway, "huge-60000", false).content().len(), 60_000);
}

#[test]
fn e11_odd_usage_passes_but_is_not_believed() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for stream in [false, true] {
        let response = chat(&gateway, "odd-usage", stream);
        assert_eq!(response.status, 200);
        assert!(response.text().contains(r#""prompt_tokens":-5"#), "{}", response.text());
        let record = record_of(&gateway, &response);
        let said = (record["cause"].clone(), record["tokens_in"].clone(), record["tokens_out"].clone());
        assert_eq!(said, (json!("ok"), json!(0), json!(10_000_000)), "{record}");
        assert_eq!(record["usage"], "suspect", "{record}");
    }
    wait_suspect(&gateway, 2);
    assert_eq!(record_of(&gateway, &chat(&gateway, "ok", false))["usage"], Value::Null);
    let shown = gateway.printed(&["access"]);
    assert_eq!(shown.matches(" tokens_out=10000000 usage=suspect ").count(), 2, "{shown}");
    wait_suspect(&gateway, 2);
}

/// E11: each part may be right, and they are not together.
#[test]
fn e11_a_total_that_is_not_the_sum_is_suspect() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for (name, total, suspect) in [("right", 7, Value::Null), ("wrong", 9, json!("suspect"))] {
        let usage = json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": total});
        let body = json!({"choices": [], "usage": usage}).to_string();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        fake.stage(name, vec![answer.into_bytes()], Then::Keep);
        let response = chat(&gateway, name, false);
        assert_eq!((response.status, response.text()), (200, body));
        let record = record_of(&gateway, &response);
        let said = ["tokens_in", "tokens_out", "usage"].map(|key| record[key].clone());
        assert_eq!(said, [json!(3), json!(4), suspect], "{record}");
    }
    wait_suspect(&gateway, 1);
}

fn record_of(gateway: &Evergate, response: &Response) -> Value {
    gateway.wait_access(response.header("x-request-id").unwrap(), Duration::from_secs(10))
}

fn wait_suspect(gateway: &Evergate, count: u64) {
    let line = format!("evergate_usage_suspect_total{{model=\"fake/*\"}} {count}\n");
    wait_until("as many suspect usages", LIMIT, || gateway.metrics().contains(&line));
}

/// It was not asked for, and bytes that pass unread may hold anything.
#[test]
fn e13_an_answer_that_is_compressed_unasked_is_a_502() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for stream in [false, true] {
        assert_error(&chat(&gateway, "compressed", stream), 502, "upstream_bad_response");
    }
}

/// Fact 12: what a strict reader refuses is passed through.
#[test]
fn half_an_emoji_passes_unchanged() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let response = chat(&gateway, "half-emoji", false);
    assert_eq!(response.status, 200);
    assert!(response.text().contains(r"half \ud83d"), "{}", response.text());
}

#[test]
fn d4_a_refused_connect_is_a_502_at_once() {
    let address = refused_address();
    let config = gateway_config(&format!("http://{address}/v1"), &[], "");
    let gateway = Evergate::builder(EXE).config(config).start();
    for stream in [false, true] {
        let began = Instant::now();
        let response = chat(&gateway, "ok", stream);
        assert_error(&response, 502, "upstream_connect_failed");
        assert!(began.elapsed() < Duration::from_secs(2));
        assert!(!response.text().contains(&address), "an upstream's address is not the client's business");
    }
    let folder = tempfile::tempdir().unwrap();
    let config = gateway_config(&format!("unix:{}:/v1", folder.path().join("none.sock").display()), &[], "");
    let gateway = Evergate::builder(EXE).config(config).start();
    assert_error(&chat(&gateway, "ok", false), 502, "upstream_connect_failed");
}

/// Nothing of an upstream's failure outlives it: the next request is served.
#[test]
fn a_failure_harms_nobody_else() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    for script in ["status-500", "reset-mid", "html", "truncated", "close-early", "bad-json", "redirect", "empty"] {
        let _ = chat(&gateway, script, false);
        assert_eq!(chat(&gateway, "ok", false).content(), TEXT, "after {script}");
        let _ = chat(&gateway, script, true);
        assert_eq!(chat(&gateway, "ok", false).content(), TEXT, "after {script}");
    }
    let pids: Vec<Value> = gateway.access().iter().map(|record| record["pid"].clone()).collect();
    assert!(pids.windows(2).all(|two| two[0] == two[1]), "one worker served all: {pids:?}");
}
