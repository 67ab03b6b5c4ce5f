//! Several targets for one model: which failures go on to the next one, which do not, and what the client is told when
//! all have failed. The rule itself is tested over its whole table in `core/attempts.rs`.

use std::time::{Duration, Instant};

use evergate_testkit::fake::{Slam, TEXT, mute, refused_address};
use evergate_testkit::raw::{post, post_chat};
use evergate_testkit::sse::{Event, text_of};
use evergate_testkit::{Evergate, FakeUpstream, Identity, Response, wait_until};
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, assert_error, assert_error_shape, assert_good_stream};

/// Upstreams' names, by their place in a model's targets.
pub const NAMES: [&str; 3] = ["first", "second", "third"];

/// A gateway before upstreams of these base URLs. A model is named after what each of its targets is asked for, such as
/// `status-500>ok`, and may have more keys behind a `|`.
#[track_caller]
pub fn gateway(base_urls: &[&str], models: &[&str], more: &str) -> Evergate {
    Evergate::builder(EXE).config(config(base_urls, models, more)).start()
}

/// The configuration of `gateway`.
pub fn config(base_urls: &[&str], models: &[&str], more: &str) -> String {
    let mut text =
        "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[presets]\nenabled = false\n"
            .to_owned();
    for (name, base_url) in NAMES.iter().zip(base_urls) {
        text += &format!("[upstreams.{name}]\nbase_url = \"{base_url}\"\n");
    }
    for model in models {
        let (name, keys) = model.split_once('|').unwrap_or((model, ""));
        let target = |(upstream, model): (&&str, &str)| format!("{{ upstream = \"{upstream}\", model = \"{model}\" }}");
        let targets: Vec<String> = NAMES.iter().zip(name.split('>')).map(target).collect();
        text += &format!("[models.\"{name}\"]\ntargets = [ {} ]\n{keys}\n", targets.join(", "));
    }
    text + more
}

/// A gateway before two scripted upstreams.
#[track_caller]
pub fn before_two(models: &[&str], more: &str) -> (FakeUpstream, FakeUpstream, Evergate) {
    let (first, second) = (FakeUpstream::start(), FakeUpstream::start());
    let gateway = gateway(&[first.base_url(), second.base_url()], models, more);
    (first, second, gateway)
}

/// One chat request to a model of `gateway`.
#[track_caller]
pub fn ask(gateway: &Evergate, model: &str, stream: bool) -> Response {
    post_chat(&gateway.addr(), model, stream, &Value::Null)
}

/// The access record of the request that was answered so.
#[track_caller]
pub fn record_of(gateway: &Evergate, response: &Response) -> Value {
    gateway.wait_access(response.header("x-request-id").unwrap(), LIMIT)
}

/// Upstream and cause of each attempt on record.
pub fn path_of(record: &Value) -> Vec<(String, String)> {
    let text = |step: &Value, key: &str| step[key].as_str().unwrap().to_owned();
    record["path"].as_array().unwrap().iter().map(|step| (text(step, "upstream"), text(step, "cause"))).collect()
}

#[track_caller]
pub fn assert_path(record: &Value, path: &[(&str, &str)]) {
    let expected: Vec<(String, String)> = path.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    assert_eq!(path_of(record), expected, "{record}");
    assert_eq!(record["attempts"], path.len(), "{record}");
    assert!(record["path"].as_array().unwrap().iter().all(|step| step["ms"].as_f64().unwrap() >= 0.0), "{record}");
}

/// The answer is the second upstream's, whole, and nothing of the first one's failure is in it.
#[track_caller]
fn assert_right(response: &Response, stream: bool, what: &str) {
    assert_eq!(response.status, 200, "{what}: {}", response.text());
    if stream {
        assert_good_stream(&response.events(), response.is_complete);
        assert_eq!(text_of(&response.events()), TEXT, "{what}");
    } else {
        assert_eq!(response.content(), TEXT, "{what}");
    }
}

/// Each script at the first target leads to the second's answer, with one call to each, and the record says so.
#[track_caller]
fn assert_goes_on(scripts: &[&str], streams: &[bool], cause: &str, more: &str) {
    let models: Vec<String> = scripts.iter().map(|script| format!("{script}>ok")).collect();
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    let (first, second, gateway) = before_two(&models, more);
    let mut count = 0;
    for model in models {
        for stream in streams.iter().copied() {
            let response = ask(&gateway, model, stream);
            assert_right(&response, stream, model);
            count += 1;
            assert_eq!((first.request_count(), second.request_count()), (count, count), "{model}, stream: {stream}");
            let record = record_of(&gateway, &response);
            assert_path(&record, &[("first", cause), ("second", "ok")]);
            assert_eq!((&record["backend"], &record["cause"]), (&json!("second"), &json!("ok")), "{record}");
        }
    }
}

/// Each script at the first target is the end of the request: the second one is not called.
#[track_caller]
fn assert_stays(scripts: &[&str], streams: &[bool], more: &str, check: impl Fn(&str, &Response)) {
    let models: Vec<String> = scripts.iter().map(|script| format!("{script}>ok")).collect();
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    let (first, second, gateway) = before_two(&models, more);
    let mut count = 0;
    for model in models {
        for stream in streams.iter().copied() {
            let response = ask(&gateway, model, stream);
            check(model.split_once('>').unwrap().0, &response);
            count += 1;
            assert_eq!((first.request_count(), second.request_count()), (count, 0), "{model}, stream: {stream}");
            let record = record_of(&gateway, &response);
            assert_eq!((&record["attempts"], &record["path"]), (&json!(1), &Value::Null), "{record}");
        }
    }
}

const BOTH: [bool; 2] = [false, true];

#[test]
fn d4_a_refused_connect_goes_on_to_the_next_target() {
    let second = FakeUpstream::start();
    let refused = format!("http://{}/v1", refused_address());
    let gateway = gateway(&[&refused, second.base_url()], &["ok>ok"], "");
    for stream in BOTH {
        let began = Instant::now();
        let response = ask(&gateway, "ok>ok", stream);
        assert_right(&response, stream, "refused");
        assert!(began.elapsed() < Duration::from_secs(2));
        let record = record_of(&gateway, &response);
        assert_path(&record, &[("first", "upstream_connect_failed"), ("second", "ok")]);
    }
}

#[test]
fn d5_a_connect_that_takes_too_long_goes_on_to_the_next_target() {
    let (_mute, address) = mute();
    let second = FakeUpstream::start();
    // Only a handshake shows that nobody is there: the kernel itself completes a connect on loopback.
    let silent = format!("https://{address}/v1");
    let gateway = gateway(&[&silent, second.base_url()], &["ok>ok"], "[timeouts]\nconnect = \"300ms\"\n");
    for stream in BOTH {
        let began = Instant::now();
        let response = ask(&gateway, "ok>ok", stream);
        assert_right(&response, stream, "mute");
        assert!(began.elapsed() >= Duration::from_millis(290), "{:?}", began.elapsed());
        assert_path(&record_of(&gateway, &response), &[("first", "upstream_timeout"), ("second", "ok")]);
    }
}

#[test]
fn d7_a_certificate_that_is_not_trusted_goes_on_and_nothing_was_sent() {
    let first = FakeUpstream::start_tls(&Identity::generate());
    let second = FakeUpstream::start();
    let gateway = gateway(&[first.base_url(), second.base_url()], &["ok>ok"], "");
    for stream in BOTH {
        let response = ask(&gateway, "ok>ok", stream);
        assert_right(&response, stream, "untrusted");
        assert_path(&record_of(&gateway, &response), &[("first", "upstream_connect_failed"), ("second", "ok")]);
    }
    assert_eq!(first.request_count(), 0);
}

/// A kept connection that the upstream has closed costs nothing, least of all an attempt.
#[test]
fn d9_a_stale_connection_is_no_failed_attempt() {
    let (first, second, gateway) = before_two(&["ok>ok"], ONE_WORKER);
    for round in 1..=5 {
        let response = ask(&gateway, "ok>ok", false);
        assert_right(&response, false, "kept");
        let record = record_of(&gateway, &response);
        assert_eq!((&record["attempts"], &record["path"]), (&json!(1), &Value::Null), "{record}");
        assert_eq!((first.request_count(), second.request_count()), (round, 0));
        first.close_connections();
        wait_until("the end of the kept connection", LIMIT, || first.open_connections() == 0);
    }
}

/// A new connection that ends before a byte of the request is written: nothing was sent, so the next target is asked; alone
/// it is told as a connection that did not come about.
#[test]
fn d9_a_new_connection_that_ends_at_once_was_sent_nothing() {
    let identity = Identity::generate();
    let (slam, second) = (Slam::start(&identity, 6), FakeUpstream::start());
    let text = config(&[slam.base_url(), second.base_url()], &["ok>ok", "ok"], "");
    let text = text.replace("[upstreams.second]", "[upstreams.first.roots]\nfile = \"ca.pem\"\n[upstreams.second]");
    let gateway = Evergate::builder(EXE).config(text).file("ca.pem", &identity.cert_pem).start();
    for stream in [false, true, false, true] {
        let response = ask(&gateway, "ok>ok", stream);
        assert_right(&response, stream, "slammed");
        assert_path(&record_of(&gateway, &response), &[("first", "upstream_connect_failed"), ("second", "ok")]);
    }
    for stream in BOTH {
        assert_error(&ask(&gateway, "ok", stream), 502, "upstream_connect_failed");
    }
    assert_eq!(slam.join(), 0, "bytes of requests");
}

/// The upstream may have worked, and billed: nobody else is asked, unless the operator says that this is right.
#[test]
fn d10_a_request_that_was_written_and_not_answered_goes_on_only_if_told_to() {
    assert_stays(&["close-early", "reset-early"], &BOTH, "", |_, response| {
        assert_error(response, 502, "upstream_disconnected");
    });
    let (first, second, gateway) = before_two(&["close-early>ok|retry_unknown = true"], "");
    for (index, stream) in BOTH.into_iter().enumerate() {
        let response = ask(&gateway, "close-early>ok", stream);
        assert_right(&response, stream, "retry_unknown");
        assert_eq!((first.request_count(), second.request_count()), (index + 1, index + 1));
        assert_path(&record_of(&gateway, &response), &[("first", "upstream_disconnected"), ("second", "ok")]);
    }
}

#[test]
fn e1_a_complaint_about_the_request_is_the_clients_and_nobody_else_is_asked() {
    assert_stays(&["status-400", "status-404", "status-409", "status-422"], &BOTH, "", |script, response| {
        assert_eq!(format!("status-{}", response.status), script, "{}", response.text());
        assert_error_shape(response);
        assert_eq!(response.header("x-should-retry"), Some("false"));
        assert!(!response.text().contains("tried"), "its own words: {}", response.text());
    });
    // Also from the second target, whatever the first one's failure was.
    let (first, second, gateway) = before_two(&["status-500>status-422"], "");
    let response = ask(&gateway, "status-500>status-422", false);
    assert_eq!((response.status, response.header("x-should-retry")), (422, Some("false")), "{}", response.text());
    assert!(!response.text().contains("tried"), "{}", response.text());
    assert_eq!((first.request_count(), second.request_count()), (1, 1));
    assert_path(&record_of(&gateway, &response), &[("first", "upstream_failed"), ("second", "upstream_refused")]);
}

#[test]
fn e2_a_refused_credential_goes_on_and_is_never_the_clients() {
    assert_goes_on(&["status-401", "status-403", "code-400-invalid_api_key"], &BOTH, "upstream_auth_failed", "");
    let (first, second, gateway) = before_two(&["status-401>status-403", "status-500>status-401"], "");
    assert_error(&ask(&gateway, "status-401>status-403", false), 502, "upstream_auth_failed");
    // What may pass is told before what will not.
    assert_error(&ask(&gateway, "status-500>status-401", false), 502, "upstream_failed");
    assert_eq!((first.request_count(), second.request_count()), (2, 2));
}

#[test]
fn e3_a_429_goes_on_and_is_told_only_if_all_said_so() {
    assert_goes_on(&["status-429", "status-429-300"], &BOTH, "rate_limit_exceeded", "");
    assert_goes_on(&["code-429-insufficient_quota"], &BOTH, "insufficient_quota", "");
    let all = ["status-429-7>status-429-3", "status-429-300>status-429-400", "status-429-7>status-500"];
    let (_first, second, gateway) = before_two(&all, "");
    for stream in BOTH {
        let response = ask(&gateway, all[0], stream);
        assert_error(&response, 429, "rate_limit_exceeded");
        assert_eq!(response.header("retry-after"), Some("3"), "the shortest wait");
        let response = ask(&gateway, all[1], stream);
        assert_eq!((response.status, response.header("x-should-retry")), (429, Some("false")));
        assert_error(&ask(&gateway, all[2], stream), 502, "upstream_failed");
    }
    assert_eq!(second.request_count(), 6);
}

#[test]
fn e4_a_failed_upstream_goes_on() {
    let scripts = ["status-500", "status-502", "status-503", "status-529", "html-502", "status-599"];
    assert_goes_on(&scripts, &BOTH, "upstream_failed", "");
}

/// Its words would add nothing, and the next target is waiting.
#[test]
fn e4_a_failure_whose_body_stalls_goes_on_soon() {
    let began = Instant::now();
    assert_goes_on(&["stalled-500"], &[false], "upstream_failed", "");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn e5_nonsense_goes_on() {
    assert_goes_on(&["html", "empty"], &BOTH, "upstream_bad_response", "");
    assert_goes_on(&["events-for-unary"], &[false], "upstream_bad_response", "");
}

#[test]
fn e6_an_answer_without_choices_goes_on() {
    assert_goes_on(&["no-choices"], &BOTH, "upstream_bad_response", "");
}

#[test]
fn e7_a_cut_answer_goes_on() {
    assert_goes_on(&["truncated", "reset-mid", "eof-head"], &[false], "upstream_disconnected", "");
    assert_goes_on(&["bad-json"], &[false], "upstream_bad_response", "");
}

/// Another one would make as long an answer, for the same price.
#[test]
fn e8_an_answer_beyond_the_limit_does_not_go_on() {
    assert_stays(&["huge-100000"], &[false], "[limits]\nanswer = \"64KiB\"\n", |_, response| {
        assert_error(response, 502, "upstream_bad_response");
    });
    assert_stays(&["big-event-100000"], &[true], "[limits]\nevent = \"64KiB\"\n", |_, response| {
        assert_eq!(response.status, 200, "events were sent before it");
    });
}

#[test]
fn e9_a_slow_upstream_goes_on_by_the_limit_that_it_broke() {
    assert_goes_on(&["idle-mid"], &[false], "upstream_timeout", "[timeouts]\nidle = \"300ms\"\n");
    let limits = "[timeouts]\nfirst_token = \"300ms\"\n";
    assert_goes_on(&["never-headers", "silent", "pings-only"], &[true], "first_token_timeout", limits);
    let silent = ["never-headers>ok|attempt = \"300ms\"", "silent>ok|attempt = \"300ms\""];
    let (first, _second, gateway) = before_two(&silent, "");
    for (index, (model, stream)) in
        [("never-headers>ok", false), ("never-headers>ok", true), ("silent>ok", true)].into_iter().enumerate()
    {
        let began = Instant::now();
        let response = ask(&gateway, model, stream);
        assert_right(&response, stream, model);
        assert!(began.elapsed() >= Duration::from_millis(290) && began.elapsed() < Duration::from_secs(5));
        let record = record_of(&gateway, &response);
        assert_path(&record, &[("first", "upstream_timeout"), ("second", "ok")]);
        assert!(record["path"][0]["ms"].as_f64().unwrap() >= 290.0, "{record}");
        let _ = first.wait_closed(index, LIMIT);
    }
}

/// There is nobody to go on to: what comes late is better than nothing.
#[test]
fn e9_the_last_targets_attempt_has_no_limit_of_its_own() {
    let (_first, second, gateway) = before_two(&["status-500>delay-900|attempt = \"300ms\""], "");
    for stream in BOTH {
        assert_right(&ask(&gateway, "status-500>delay-900", stream), stream, "late");
    }
    assert_eq!(second.request_count(), 2);
}

/// A redirect is a mistake in the configuration, which must not hide behind another target.
#[test]
fn e10_a_redirect_does_not_go_on() {
    assert_stays(&["redirect"], &BOTH, "", |_, response| assert_error(response, 502, "upstream_bad_response"));
}

#[test]
fn e12_an_error_under_status_200_goes_on() {
    assert_goes_on(&["error-200"], &BOTH, "upstream_failed", "");
}

#[test]
fn e13_a_compressed_answer_goes_on() {
    assert_goes_on(&["compressed"], &BOTH, "upstream_bad_response", "");
}

#[test]
fn e14_conflicting_framing_goes_on_and_its_connection_is_not_kept() {
    assert_goes_on(&["two-lengths"], &BOTH, "upstream_bad_response", "");
    assert_goes_on(&["two-framings"], &[false], "upstream_bad_response", "");
    let (first, _second, gateway) = before_two(&["two-framings>ok"], "");
    assert_right(&ask(&gateway, "two-framings>ok", false), false, "two framings");
    wait_until("the end of its connection", LIMIT, || first.open_connections() == 0);
}

#[test]
fn f2_a_stream_that_ends_before_its_first_event_goes_on() {
    assert_goes_on(&["eof-head"], &[true], "upstream_disconnected", "");
    assert_goes_on(&["no-events"], &[true], "upstream_disconnected", "");
}

/// R3: after its first event a stream is the client's, however it ends.
#[test]
fn f2_a_stream_that_breaks_off_after_an_event_does_not_go_on() {
    for (scripts, code) in [
        (&["no-finish", "reset-mid", "eof-mid", "half-event"][..], "upstream_disconnected"),
        (&["error-event-mid"], "upstream_failed"),
    ] {
        assert_stays(scripts, &[true], "", |script, response| {
            let events = response.events();
            assert_eq!(response.status, 200, "{script}");
            let last = events.last().unwrap();
            assert_eq!(last.error_code().as_deref(), Some(code), "{script}: {events:?}");
            assert!(response.is_complete && !events.iter().any(Event::is_done), "{script}: {events:?}");
        });
    }
}

/// F6: once `head_hold` has sent the head there is no other target, only comments and the truth.
#[test]
fn f6_after_the_head_is_out_there_is_no_other_target() {
    let limits = "[timeouts]\nhead_hold = \"200ms\"\nfirst_token = \"600ms\"\n";
    for script in ["never-headers", "silent", "pings-only"] {
        assert_stays(&[script], &[true], limits, |script, response| {
            assert_eq!(response.status, 200, "{script}");
            let events = response.events();
            let last = events.last().unwrap();
            assert_eq!(last.error_code().as_deref(), Some("first_token_timeout"), "{script}: {events:?}");
        });
    }
}

#[test]
fn f17_an_error_as_the_first_event_goes_on() {
    assert_goes_on(&["error-event-first"], &[true], "upstream_failed", "");
}

#[test]
fn f18_errors_as_first_events_everywhere_are_a_real_status() {
    let (first, second, gateway) = before_two(&["error-event-first>error-event-first"], "");
    let response = ask(&gateway, "error-event-first>error-event-first", true);
    assert_error(&response, 502, "upstream_failed");
    assert_eq!((first.request_count(), second.request_count()), (1, 1));
}

/// Every byte but the model's name is the client's own at each target.
#[test]
fn each_target_gets_the_clients_bytes_and_its_own_name_of_the_model() {
    let (first, second, gateway) = before_two(&["status-500>echo-request"], "");
    let body =
        r#" {"n": 1e0,"messages":[{"role":"user","content":"\u00e9"}], "model" : "status-500>echo-request","z":[ ]} "#;
    assert_eq!(post(&gateway.addr(), CHAT, body).status, 200);
    for (fake, name) in [(&first, "status-500"), (&second, "echo-request")] {
        let expected = body.replace("status-500>echo-request", name);
        assert_eq!(String::from_utf8(fake.wait_request(0, LIMIT).request.body).unwrap(), expected);
    }
}

/// Embeddings and completions go the same way.
#[test]
fn every_endpoint_has_the_other_targets() {
    let (first, second, gateway) = before_two(&["status-500>ok"], "");
    for (path, body) in [
        ("/v1/completions", r#"{"model":"status-500>ok","prompt":"x"}"#),
        ("/v1/embeddings", r#"{"model":"status-500>ok","input":"x","stream":true}"#),
    ] {
        let response = post(&gateway.addr(), path, body);
        assert_eq!(response.status, 200, "{}", response.text());
        assert_path(&record_of(&gateway, &response), &[("first", "upstream_failed"), ("second", "ok")]);
    }
    assert_eq!((first.request_count(), second.request_count()), (2, 2));
}

/// Metrics count each call, the failed ones too, and the request once.
#[test]
fn every_attempt_is_counted() {
    let (_first, _second, gateway) = before_two(&["status-500>ok", "status-503>status-429"], "");
    for _ in 0..3 {
        assert_eq!(ask(&gateway, "status-500>ok", false).status, 200);
    }
    assert_eq!(ask(&gateway, "status-503>status-429", true).status, 502);
    let has = |line: &str| gateway.metrics().lines().any(|found| found == line);
    for line in [
        r#"evergate_attempts_total{upstream="first",cause="upstream_failed"} 4"#,
        r#"evergate_attempts_total{upstream="second",cause="ok"} 3"#,
        r#"evergate_requests_total{model="status-500>ok",upstream="second",status="200",cause="ok"} 3"#,
    ] {
        wait_until(line, LIMIT, || has(line));
    }
}
