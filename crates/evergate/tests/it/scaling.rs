//! As many workers as the load needs. Numbers are lines of the specification of supervision.

use std::time::{Duration, Instant};

use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, FakeUpstream, Raw, chat_request, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::balance::Frozen;
use crate::support::{CHAT, EXE, LIMIT, before, echo_with, is_full, open, via, wait_ready};

fn master(gateway: &Evergate) -> Value {
    let output = gateway.cli(&["status", "--json"]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice::<Value>(&output.stdout).unwrap()["master"].clone()
}

/// Requests that their upstream holds until it is told to release them.
fn hold(gateway: &Evergate, count: usize) -> Vec<Raw> {
    (0..count).map(|_| open(gateway, "hold", false)).collect()
}

/// Ends them. A worker's own queue is bounded: where one had more than its share it has refused some.
fn finish(requests: Vec<Raw>) {
    for mut raw in requests {
        let response = raw.read_response(LIMIT);
        assert!(matches!(response.status, 200 | 503), "{}", response.text());
    }
}

#[test]
fn s13_workers_are_added_within_half_a_second_of_the_need() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 1\nmax = 4\nslots = 8\n");
    let begun = Instant::now();
    // One worker has places for eight; six wait.
    let requests = hold(&gateway, 14);
    wait_until("more workers are started", LIMIT, || gateway.workers().len() > 1);
    let took = begun.elapsed();
    // Half a second on a machine with nothing else to do; this one runs the other tests.
    assert!(took < Duration::from_secs(3), "{took:?}");
    let said = gateway.wait_stderr("workers instead of 1", LIMIT);
    assert!(waiting(&said) > 0, "{said}");
    wait_until("the backlog is shown", LIMIT, || !gateway.metrics().contains("\nevergate_backlog 0\n"));
    gateway.wait_workers(4);
    assert_eq!(master(&gateway)["workers_target"], 4);
    fake.release();
    finish(requests);
    let metrics = gateway.metrics();
    assert!(metrics.contains("evergate_scale_events_total{direction=\"up\"} 3"), "{metrics}");
    assert!(metrics.contains("evergate_workers_wanted 4"), "{metrics}");
    assert_eq!(gateway.workers().len(), 4, "never more than the most");
}

/// How many requests waited at the first step up.
fn waiting(said: &str) -> u64 {
    let line = said.lines().find(|line| line.contains("workers instead of 1: ")).unwrap();
    let (_, rest) = line.split_once("workers instead of 1: ").unwrap();
    rest.split_once(" requests wait").unwrap().0.parse().unwrap()
}

/// The accept queue alone is a need: nobody takes what waits there, and nothing else is to be seen.
#[test]
fn s13_connections_that_nobody_takes_bring_a_worker() {
    let gateway = echo_with("[workers]\nmin = 1\nmax = 2\nhang_timeout = \"60s\"\n");
    let _still = Frozen::new(gateway.wait_workers(1)[0]);
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&chat_request("echo", false, &Value::Null));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    let said = gateway.wait_stderr("2 workers instead of 1", LIMIT);
    assert_eq!(waiting(&said), 1, "{said}");
}

/// An event loop that is late is a need, though nothing waits and no place is taken to speak of.
#[test]
fn s13_a_worker_whose_loop_is_late_gets_company() {
    let config = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\n\
                  targets = [{ upstream = \"echo\" }]\n[workers]\nmin = 1\nmax = 2\nhang_timeout = \"60s\"\n";
    let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT", "1").start();
    // One connection: nothing is ever in a queue.
    let mut raw = Raw::connect(&gateway.addr());
    let body = chat_body("echo", false, &Value::Null);
    let request = post_request(CHAT, "x-evergate-fault: work-150\r\n", &body);
    wait_until("a step up", 2 * LIMIT, || {
        raw.send(&request);
        assert_eq!(raw.read_response(LIMIT).status, 200);
        gateway.stderr().contains("2 workers instead of 1")
    });
    let said = gateway.stderr();
    assert_eq!(waiting(&said), 0, "{said}");
    let lag = |line: &str| line.strip_prefix("evergate_loop_lag_seconds")?.rsplit(' ').next()?.parse::<f64>().ok();
    wait_until("the lag is shown", LIMIT, || {
        raw.send(&request);
        assert_eq!(raw.read_response(LIMIT).status, 200);
        gateway.metrics().lines().filter_map(lag).any(|seconds| seconds > 0.02)
    });
}

/// A burst on kept connections of a gateway that was quiet shows in no accept queue: the worker itself says that requests
/// wait. Without that the master looks only twice a second, and two in five rounds take longer than this.
#[test]
fn s13_a_burst_on_kept_connections_is_seen_at_once() {
    let mut seen = Vec::new();
    // A busy machine may spoil a set of rounds, not each of four.
    for _ in 0..4 {
        let rounds: Vec<Duration> = (0..5).map(|_| burst_on_kept_connections()).collect();
        println!("{rounds:?}");
        if rounds.iter().all(|took| *took < Duration::from_millis(300)) {
            return;
        }
        seen.push(rounds);
    }
    panic!("{seen:?}");
}

/// How long it takes from the burst to the step up.
fn burst_on_kept_connections() -> Duration {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 1\nmax = 4\nslots = 4\n");
    let mut kept: Vec<Raw> = (0..8).map(|_| Raw::connect(&gateway.addr())).collect();
    for raw in &mut kept {
        raw.send(&get_request("/healthz", ""));
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    // After a second without load it is looked at twice a second only.
    let pause = try_wait_for(Duration::from_millis(1700), || (gateway.workers().len() > 1).then_some(()));
    assert!(pause.is_none());
    let request = chat_request(&via("hold"), false, &Value::Null);
    let begun = Instant::now();
    kept.iter_mut().for_each(|raw| raw.send(&request));
    gateway.wait_stderr("workers instead of 1", LIMIT);
    let took = begun.elapsed();
    fake.release();
    finish(kept);
    took
}

#[test]
fn s14_workers_go_one_by_one_when_they_are_not_needed_and_never_below_the_least() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 4\nslots = 8\nidle_after = \"1s\"\n");
    wait_ready(&gateway, 2);
    let requests = hold(&gateway, 20);
    gateway.wait_workers(4);
    fake.release();
    finish(requests);
    let gone = gateway.wait_exits(2, LIMIT, |record| record["initiator"] == "scale_down");
    assert!(gone.iter().all(|record| record["code"] == 0 && record["lost"] == json!([])), "{gone:?}");
    // One by one.
    gateway.wait_stderr("3 workers: one fewer", LIMIT);
    gateway.wait_workers(2);
    // Twice the time after which a third one would have gone.
    let is_less = try_wait_for(Duration::from_millis(2500), || (gateway.workers().len() < 2).then_some(()));
    assert!(is_less.is_none(), "fewer than the least");
}

/// A load that comes and goes: after the first step down that was a mistake the gateway waits for longer than the load is
/// away. In ten minutes of a wave of 20 s there are four steps down at most.
#[test]
fn s15_a_square_wave_does_not_flap() {
    let (waves, half, idle_after) =
        if is_full() { (30, Duration::from_secs(10), "5s") } else { (8, Duration::from_millis(1500), "1s") };
    let fake = FakeUpstream::start();
    let workers = format!("[workers]\nmin = 1\nmax = 3\nslots = 8\nidle_after = \"{idle_after}\"\n");
    let gateway = before(&fake, &workers);
    let script = format!("delay-{}", half.as_millis());
    let mut needed = 0;
    for _ in 0..waves {
        let begun = Instant::now();
        let requests: Vec<Raw> = (0..20).map(|_| open(&gateway, &script, false)).collect();
        finish(requests);
        needed += usize::from(master(&gateway)["workers_target"].as_u64().unwrap() > 1);
        wait_until("the other half of the wave", LIMIT, || begun.elapsed() >= 2 * half);
    }
    let events = |direction: &str| -> u64 {
        let (metrics, name) = (gateway.metrics(), format!("evergate_scale_events_total{{direction=\"{direction}\"}} "));
        metrics.lines().find_map(|line| line.strip_prefix(&name)).map_or(0, |count| count.parse().unwrap())
    };
    let (up, down) = (events("up"), events("down"));
    println!("{waves} waves: {up} workers more, {down} fewer");
    assert!(needed >= waves - 1, "the load was a need {needed} times");
    assert!(down >= 1, "that no worker ever goes is no answer");
    assert!(down <= 4, "{down} steps down in {waves} waves: {}", gateway.stderr());
}

#[test]
fn s17_hands_change_the_number_within_bounds_and_are_told_where_those_are() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 1\nmax = 3\nidle_after = \"1s\"\n");
    gateway.signal(Signal::TTIN);
    gateway.wait_workers(2);
    gateway.signal(Signal::TTOU);
    gateway.wait_exits(1, LIMIT, |record| record["initiator"] == "scale_down");
    gateway.signal(Signal::TTOU);
    gateway.wait_stderr("0 workers are fewer than workers.min, 1", LIMIT);
    let scale = |workers: &str| {
        let output = gateway.cli(&["scale", workers, "--json"]);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code().unwrap(), answer)
    };
    assert_eq!(scale("3"), (0, json!({ "scaled": true, "workers": 3 })));
    gateway.wait_workers(3);
    for (workers, why) in [("4", "more than workers.max, 3"), ("0", "fewer than workers.min, 1")] {
        let (code, answer) = scale(workers);
        assert!(code == 1 && answer["error"].as_str().unwrap().contains(why), "{answer}");
    }
    // What was asked for by hand is not taken away for want of load.
    let is_less = try_wait_for(Duration::from_millis(2500), || (gateway.workers().len() < 3).then_some(()));
    assert!(is_less.is_none(), "the load took what was asked for");
    assert_eq!(scale("1").0, 0);
    gateway.wait_exits(3, LIMIT, |record| record["initiator"] == "scale_down");
    gateway.wait_workers(1);
}

/// The growth stops at the memory that all workers may have together.
#[test]
fn s16_no_worker_is_added_beyond_the_memory_of_all() {
    let fake = FakeUpstream::start();
    let more = "[workers]\nmin = 5\nmax = 6\nslots = 4\nrss_total_max = \"64MiB\"\n";
    let gateway = before(&fake, more);
    wait_ready(&gateway, 5);
    wait_for("five workers have more than that", LIMIT, || {
        let output = gateway.cli(&["status", "--json"]);
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        let workers = all["children"].as_array().unwrap().iter().filter(|child| child["kind"] == "worker");
        let sum: u64 = workers.map(|child| child["rss_kib"].as_u64().unwrap()).sum();
        (sum >= 64 << 10).then_some(())
    });
    let requests = hold(&gateway, 20);
    gateway.wait_stderr("workers.rss_total_max", LIMIT);
    assert_eq!(gateway.workers().len(), 5);
    fake.release();
    finish(requests);
}
