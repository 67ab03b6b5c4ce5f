//! Counters over all workers, and one access record per request.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use evergate_testkit::fake::PROMPT_TOKENS;
use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, assert_error, before, chat, open, open_stream};

/// One line of the text format: name, labels, value.
pub type Sample = (String, BTreeMap<String, String>, f64);

/// Reads the Prometheus text format, strictly enough that a malformed line fails the test.
pub fn samples(text: &str) -> Vec<Sample> {
    let mut samples = Vec::new();
    let (mut helped, mut typed) = (Vec::new(), Vec::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            helped.push(rest.split(' ').next().unwrap().to_owned());
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
            assert!(!typed.contains(&name.to_owned()), "{name} has two TYPE lines");
            typed.push(name.to_owned());
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line:?}"));
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, labels(rest.strip_suffix('}').expect("a closing brace"))),
            None => (series, BTreeMap::new()),
        };
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(typed.iter().any(|known| known == name || known == base), "{name} has no TYPE line before it");
        assert!(helped.iter().any(|known| known == name || known == base), "{name} has no HELP line");
        samples.push((name.to_owned(), labels, value.parse().unwrap()));
    }
    samples
}

/// Reads `a="b",c="d"`; no value of ours holds a quote or a comma.
fn labels(text: &str) -> BTreeMap<String, String> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').expect("a label");
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).expect("a quoted value");
        (name.to_owned(), value.to_owned())
    };
    text.split(',').map(pair).collect()
}

/// The sum of all samples of that name whose labels include these.
pub fn sum(samples: &[Sample], name: &str, wanted: &[(&str, &str)]) -> f64 {
    let fits = |labels: &BTreeMap<String, String>| {
        wanted.iter().all(|(name, value)| labels.get(*name).is_some_and(|found| found == value))
    };
    samples.iter().filter(|(found, labels, _)| found == name && fits(labels)).map(|(_, _, value)| value).sum()
}

fn requests(gateway: &Evergate, wanted: &[(&str, &str)]) -> f64 {
    sum(&samples(&gateway.metrics()), "evergate_requests_total", wanted)
}

#[test]
fn every_request_is_counted_with_its_cause_and_tokens() {
    let fake = FakeUpstream::start();
    let more = "[models.\"named\"]\ntargets = [{ upstream = \"fake\", model = \"stream-5\" }]\n\
                [models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let gateway = before(&fake, more);
    for _ in 0..3 {
        assert_eq!(evergate_testkit::post_chat(&gateway.addr(), "named", false, &Value::Null).status, 200);
    }
    let usage = json!({"stream_options": {"include_usage": true}});
    assert!(evergate_testkit::post_chat(&gateway.addr(), "named", true, &usage).is_complete);
    assert_eq!(evergate_testkit::post_chat(&gateway.addr(), "echo", false, &Value::Null).status, 200);
    assert_error(&chat(&gateway, "status-500", false), 502, "upstream_failed");
    assert_error(&evergate_testkit::post_chat(&gateway.addr(), "unknown", false, &Value::Null), 404, "model_not_found");
    assert!(chat(&gateway, "eof-mid", true).is_complete);
    for (expected, wanted) in [
        (4.0, &[("model", "named"), ("upstream", "fake"), ("status", "200"), ("cause", "ok")][..]),
        (1.0, &[("model", "echo"), ("status", "200"), ("cause", "ok")]),
        (1.0, &[("model", "fake/*"), ("upstream", "fake"), ("status", "502"), ("cause", "upstream_failed")]),
        (1.0, &[("model", "fake/*"), ("status", "200"), ("cause", "upstream_disconnected")]),
        (1.0, &[("status", "404"), ("cause", "model_not_found")]),
    ] {
        wait_until(&format!("{expected} of {wanted:?}"), LIMIT, || requests(&gateway, wanted) == expected);
    }
    let all = samples(&gateway.metrics());
    let prompt = sum(&all, "evergate_tokens_in_total", &[("model", "named")]);
    assert_eq!(prompt, 4.0 * PROMPT_TOKENS as f64);
    assert_eq!(sum(&all, "evergate_tokens_out_total", &[("model", "named")]), 4.0 * 5.0);
    // Refusals have none, and come sooner than any.
    assert_eq!(sum(&all, "evergate_first_token_seconds_count", &[("model", "named")]), 4.0);
    assert_eq!(sum(&all, "evergate_first_token_seconds_count", &[("model", "fake/*")]), 1.0);
    let infinite = sum(&all, "evergate_first_token_seconds_bucket", &[("model", "named"), ("le", "+Inf")]);
    assert_eq!(infinite, sum(&all, "evergate_first_token_seconds_count", &[("model", "named")]));
    // A client's own words are never a label: they are not bounded.
    assert!(!gateway.metrics().contains("unknown\"") || !gateway.metrics().contains("model=\"unknown\""));
}

/// Line 13's other signal: how long answers take to begin, whatever they are.
#[test]
fn s13_the_time_to_the_first_byte_is_measured_for_every_request() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    assert_eq!(chat(&gateway, "delay-400", false).status, 200);
    assert_eq!(chat(&gateway, "ok", true).status, 200);
    assert_error(&chat(&gateway, "status-500", false), 502, "upstream_failed");
    for (path, status) in [("/v1/models", 200), ("/nothing", 404), ("/healthz", 200), ("/readyz", 200)] {
        assert_eq!(evergate_testkit::raw::get(&gateway.addr(), path).status, status);
    }
    let all = samples(&gateway.metrics());
    let of = |name: &str, le: &str| {
        let wanted = [("le", le)];
        sum(&all, &format!("evergate_first_byte_seconds_{name}"), if le.is_empty() { &[] } else { &wanted })
    };
    assert_eq!((of("count", ""), of("bucket", "+Inf")), (5.0, 5.0), "probes are not counted");
    let slow = of("bucket", "+Inf") - of("bucket", "0.25");
    assert!(slow >= 1.0 && of("sum", "") >= 0.4, "{slow} {}", of("sum", ""));
    // On a busy machine others may be slow as well; the ones that need nobody are not.
    assert!(of("bucket", "0.25") >= 1.0);
}

#[test]
fn what_is_open_is_seen_and_what_has_ended_is_not() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let streams: Vec<Raw> = (0..3).map(|_| open_stream(&gateway, "hold-mid")).collect();
    let mut unary = open(&gateway, "hold", false);
    let open = |kind: &str| sum(&samples(&gateway.metrics()), "evergate_inflight_requests", &[("kind", kind)]);
    wait_until("three streams and a request", LIMIT, || open("stream") == 3.0 && open("unary") == 1.0);
    let all = samples(&gateway.metrics());
    let of = |name: &str, labels: &[(&str, &str)]| sum(&all, &format!("evergate_worker_{name}"), labels);
    for slot in ["0", "1"] {
        let [unary, streams] =
            ["unary", "stream"].map(|kind| of("inflight_requests", &[("worker", slot), ("kind", kind)]));
        assert_eq!(unary + 2.0 * streams, of("load", &[("worker", slot)]), "each stream counts two");
    }
    assert_eq!((of("inflight_requests", &[]), of("load", &[])), (4.0, 7.0));
    wait_until("four upstream connections", LIMIT, || {
        sum(&samples(&gateway.metrics()), "evergate_upstream_connections", &[]) == 4.0
    });
    fake.release();
    assert_eq!(unary.read_response(LIMIT).status, 200);
    for raw in streams {
        raw.close();
    }
    wait_until("nothing in flight", LIMIT, || open("stream") == 0.0 && open("unary") == 0.0);
    let workers = sum(&samples(&gateway.metrics()), "evergate_workers", &[]);
    assert_eq!(workers, 2.0);
}

/// What a dead process has counted is still counted.
#[test]
fn counters_never_go_back() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    for _ in 0..20 {
        assert_eq!(chat(&gateway, "ok", false).status, 200);
    }
    let ok = &[("cause", "ok")];
    wait_until("twenty requests", LIMIT, || requests(&gateway, ok) == 20.0);
    let before: Vec<Sample> = counters(&gateway);
    for round in 0..2 {
        let pid = gateway.kill_worker(round);
        let _ = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid);
        wait_until("the replacement", LIMIT, || !gateway.wait_workers(2).contains(&pid));
    }
    let after = counters(&gateway);
    for (name, labels, value) in &before {
        let now = after.iter().find(|(other, others, _)| other == name && others == labels).map(|(_, _, now)| *now);
        assert!(now.is_some_and(|now| now >= *value), "{name} {labels:?} went from {value} to {now:?}");
    }
    assert_eq!(sum(&samples(&gateway.metrics()), "evergate_exits_total", &[("kind", "worker")]), 2.0);
    for _ in 0..5 {
        assert_eq!(chat(&gateway, "ok", false).status, 200);
    }
    wait_until("twenty-five requests", LIMIT, || requests(&gateway, ok) == 25.0);
}

/// All that only grow.
pub fn counters(gateway: &Evergate) -> Vec<Sample> {
    let is_counter = |name: &str| ["_total", "_bucket", "_sum", "_count"].iter().any(|end| name.ends_with(end));
    samples(&gateway.metrics()).into_iter().filter(|(name, _, _)| is_counter(name)).collect()
}

/// H3: its worker is dead, so it is written on its behalf.
#[test]
fn a_lost_request_has_its_record_and_its_count() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, crate::support::ONE_WORKER);
    let mut raw = Raw::connect(&gateway.addr());
    let body = chat_body("fake/never-headers", false, &Value::Null);
    raw.send(&post_request(CHAT, "x-request-id: to-be-lost\r\n", &body));
    let _ = fake.wait_request(0, LIMIT);
    let pid = gateway.kill_worker(0);
    let _ = raw.read_to_close(LIMIT);
    let record = gateway.wait_access("to-be-lost", LIMIT);
    assert_eq!((&record["cause"], &record["status"], &record["pid"]), (&json!("worker_lost"), &json!(0), &json!(pid)));
    wait_until("its count", LIMIT, || requests(&gateway, &[("cause", "worker_lost")]) == 1.0);
    // Not a second time, by anybody.
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    wait_until("the next record", LIMIT, || gateway.access().len() >= 2);
    let lines = gateway.access().iter().filter(|record| record["client_id"] == "to-be-lost").count();
    assert_eq!(lines, 1);
}

#[test]
fn each_request_has_exactly_one_line() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut expected = BTreeMap::new();
    let mut raw = Raw::connect(&gateway.addr());
    for (n, (script, stream, cause, status)) in [
        ("ok", false, "ok", 200),
        ("stream-5", true, "ok", 200),
        ("status-500", false, "upstream_failed", 502),
        ("status-401", true, "upstream_auth_failed", 502),
        ("close-early", false, "upstream_disconnected", 502),
        ("no-finish", true, "upstream_disconnected", 200),
        ("html", false, "upstream_bad_response", 502),
    ]
    .into_iter()
    .cycle()
    .take(35)
    .enumerate()
    {
        let id = format!("line-{n}");
        let extra = json!({"stream_options": {"include_usage": true}});
        let body = chat_body(&format!("fake/{script}"), stream, if stream { &extra } else { &Value::Null });
        raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), &body));
        assert!(raw.read_response(LIMIT).is_complete);
        expected.insert(id, (script, stream, cause, status));
    }
    raw.send(&get_request("/nothing", "x-request-id: no-path\r\n"));
    assert_error(&raw.read_response(LIMIT), 404, "not_found");
    assert_eq!(gateway.wait_access("no-path", LIMIT)["cause"], "not_found");
    wait_until("a line each", LIMIT, || gateway.access().len() > expected.len());
    let lines = gateway.access();
    for (id, (script, stream, cause, status)) in &expected {
        let own: Vec<&Value> = lines.iter().filter(|line| line["client_id"] == **id).collect();
        assert_eq!(own.len(), 1, "{id}: {own:?}");
        let line = own[0];
        assert_eq!((line["cause"].as_str(), line["status"].as_u64()), (Some(*cause), Some(*status)), "{line}");
        assert_eq!((line["stream"].as_bool(), line["route"].as_str()), (Some(*stream), Some(CHAT)), "{line}");
        assert_eq!((line["backend"].as_str(), line["attempts"].as_u64()), (Some("fake"), Some(1)), "{line}");
        assert_eq!(line["model"], format!("fake/{script}"));
        assert!(line["request_id"].as_str().is_some_and(|own| !own.is_empty() && own != id), "{line}");
        assert!(line["duration_ms"].as_f64().is_some_and(|ms| ms >= 0.0) && line["bytes_in"].as_u64() > Some(0));
        if *cause == "ok" {
            assert_eq!(line["tokens_in"].as_u64(), Some(PROMPT_TOKENS), "{line}");
            assert!(line["tokens_out"].as_u64() >= Some(5) && line["bytes_out"].as_u64() > Some(0), "{line}");
            assert!(line["first_byte_ms"].is_number(), "{line}");
        }
    }
}

/// Metrics and status have no key, so a web page must not get at them either.
#[test]
fn the_admin_listener_refuses_foreign_hosts() {
    let gateway = Evergate::builder(EXE).start();
    let admin = gateway.admin();
    for path in ["/metrics", "/status"] {
        for (host, fields, is_allowed) in [
            ("localhost", "", true),
            (admin.as_str(), "", true),
            ("evil.example", "", false),
            ("localhost", "origin: https://evil.example\r\n", false),
        ] {
            let mut raw = Raw::connect(&admin);
            raw.send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n{fields}\r\n").as_bytes());
            let response = raw.read_response(Duration::from_secs(10));
            assert_eq!(response.status == 200, is_allowed, "{path} {host} {fields:?}: {}", response.status);
            assert!(is_allowed || !response.text().contains("evergate_"));
        }
    }
    let status = evergate_testkit::raw::get(&admin, "/status").json();
    assert_eq!(status["master"]["pid"], json!(gateway.pid()));
    assert_eq!(evergate_testkit::raw::get(&admin, "/nothing").status, 404);
    assert_eq!(evergate_testkit::raw::get(&admin, CHAT).status, 404, "the admin listener serves no models");
}

/// A scrape does not wait for connections that ask nothing, however many there are.
#[test]
fn idle_connections_do_not_keep_the_admin_listener_from_answering() {
    let gateway = crate::support::echo();
    let admin = gateway.admin();
    let mut idle: Vec<Raw> = (0..200).map(|_| Raw::connect(&admin)).collect();
    // One that has begun to ask has not asked.
    for raw in idle.iter_mut().step_by(2) {
        // The first of them may have gone already.
        let _ = raw.try_send(b"GET /metrics HT");
    }
    let began = Instant::now();
    for path in ["/healthz", "/metrics", "/status"] {
        assert_eq!(evergate_testkit::get(&admin, path).status, 200);
    }
    // The oldest went, and not for being ten seconds old; the newest may still ask.
    drop(idle[0].read_to_close(LIMIT));
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    let last = idle.last_mut().unwrap();
    last.send(&get_request("/healthz", ""));
    assert_eq!(last.try_read_response(LIMIT).unwrap().status, 200);
}

/// Nor for those that do not take their answers, which are larger than a socket holds.
#[test]
fn slow_readers_do_not_keep_the_admin_listener_from_answering() {
    const PLACES: usize = 64;
    const MODELS: usize = 150;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let name = |n: usize| format!("{:_<60}", format!("m{n}"));
    let model = |n: usize| format!("[models.{}]\ntargets = [{{ upstream = \"echo\" }}]\n", name(n));
    let models: String = (0..MODELS).map(model).collect();
    let head = format!("[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"unix:{}\"\n", socket.display());
    let gateway = Evergate::builder(EXE).config(format!("{head}{models}")).start();
    for n in 0..MODELS {
        assert_eq!(evergate_testkit::post_chat(&gateway.addr(), &name(n), false, &Value::Null).status, 200);
    }
    let size = gateway.metrics().len();
    assert!((250_000..640_000).contains(&size), "{size} bytes");
    let slow: Vec<UnixStream> = (0..PLACES)
        .map(|_| {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(&get_request("/metrics", "")).unwrap();
            // It is being answered, and takes no more of it.
            stream.read_exact(&mut [0]).unwrap();
            stream
        })
        .collect();
    let began = Instant::now();
    assert_eq!(evergate_testkit::get(&gateway.admin(), "/healthz").status, 200);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    // The others have five seconds and one for each 64 KiB, whether anybody needs their places or not.
    let is_cut = |stream: &UnixStream| {
        let mut fds = [PollFd::new(stream, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    };
    wait_until("all are cut", LIMIT + Duration::from_secs(5), || slow.iter().all(is_cut));
    assert!(began.elapsed() >= Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
}
