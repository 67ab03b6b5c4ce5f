//! Upstreams with `in_flight_max`: how many are called at once, who waits, who is refused, and what becomes of a permit when
//! its holder goes. Over time and under load: `upstream_limit_load`.

use std::time::{Duration, Instant};

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, Response, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_error, assert_failed_stream, before, chat, open, open_as, open_stream,
    rest_of, send,
};
use crate::targets::{config, path_of, record_of};

/// One worker before an upstream with that limit; `more` is added to the configuration.
#[track_caller]
fn limited(fake: &FakeUpstream, max: u32, queue: u32, more: &str) -> Evergate {
    before(fake, &format!("in_flight_max = {max}\nqueue = {queue}\n{ONE_WORKER}{more}"))
}

/// Waits until that many calls are under way and that many requests wait.
#[track_caller]
pub fn wait_limit(gateway: &Evergate, upstream: &str, in_flight: u64, waiting: u64) {
    let lines = [
        format!("evergate_upstream_in_flight{{upstream=\"{upstream}\"}} {in_flight}\n"),
        format!("evergate_upstream_waiting{{upstream=\"{upstream}\"}} {waiting}\n"),
    ];
    wait_until(&format!("{in_flight} in flight and {waiting} waiting"), LIMIT, || {
        let metrics = gateway.metrics();
        lines.iter().all(|line| metrics.contains(line))
    });
}

/// How many requests the limit has kept from the upstream, for that reason.
pub fn shed(gateway: &Evergate, upstream: &str, reason: &str) -> u64 {
    let start = format!("evergate_shed_total{{upstream=\"{upstream}\",reason=\"{reason}\"}} ");
    gateway.metrics().lines().find_map(|line| line.strip_prefix(&start)?.parse().ok()).unwrap_or(0)
}

/// Refused in milliseconds, and told when to come again.
#[track_caller]
fn assert_refused(response: &Response, took: Duration) {
    assert_error(response, 503, "overloaded");
    assert!(took < Duration::from_millis(500), "refused after {took:?}");
    let ms: u32 = response.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((500..1500).contains(&ms), "{ms} ms");
}

#[test]
fn l1_calls_beyond_the_limit_wait_in_order_and_one_more_is_refused_at_once() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 1, 3, "");
    let mut first = open_stream(&gateway, "hold-mid");
    let mut waiting: Vec<Raw> = Vec::new();
    for n in 1..=3 {
        waiting.push(open(&gateway, &format!("delay-{n}"), n == 2));
        wait_limit(&gateway, "fake", 1, n);
    }
    let mut advice = Vec::new();
    for stream in [false, true, false] {
        let began = Instant::now();
        let response = chat(&gateway, "ok", stream);
        assert_refused(&response, began.elapsed());
        assert!(response.text().contains("in_flight_max"), "{}", response.text());
        advice.push(response.header("retry-after-ms").unwrap().to_owned());
        let record = record_of(&gateway, &response);
        let shown = ["backend", "cause", "attempts", "path"].map(|key| record[key].clone());
        assert_eq!(shown, [json!("fake"), json!("overloaded"), json!(0), Value::Null], "{record}");
    }
    advice.dedup();
    assert!(advice.len() > 1, "all are told to come back at once: {advice:?}");
    assert_eq!((shed(&gateway, "fake", "queue_full"), fake.request_count()), (3, 1));
    let status = String::from_utf8(gateway.cli(&["status"]).stdout).unwrap();
    assert!(status.contains("upstream fake: 1 of 1 calls under way, 3 waiting\n"), "{status}");
    fake.release();
    assert!(rest_of(&mut first).last().unwrap().is_done());
    for raw in &mut waiting {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    let order: Vec<String> = fake.requests().iter().skip(1).map(|recorded| recorded.request.model()).collect();
    assert_eq!(order, ["delay-1", "delay-2", "delay-3"]);
    assert_eq!(fake.take_working_most(), 1);
    wait_limit(&gateway, "fake", 0, 0);
    let refused = r#"evergate_attempts_total{upstream="fake",cause="overloaded"}"#;
    assert!(!gateway.metrics().contains(refused), "who was refused has called nobody");
}

#[test]
fn without_a_queue_nobody_waits_and_without_a_limit_nothing_is_counted() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 1, 0, "");
    let mut first = open_stream(&gateway, "hold-mid");
    let began = Instant::now();
    assert_refused(&chat(&gateway, "ok", false), began.elapsed());
    fake.release();
    rest_of(&mut first);
    wait_limit(&gateway, "fake", 0, 0);
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    let free = before(&fake, ONE_WORKER);
    assert_eq!(chat(&free, "ok", false).status, 200);
    assert!(!free.metrics().contains("evergate_upstream_in_flight{"));
}

/// Whoever would wait for longer than he has time is not kept waiting; whoever has waited in vain is told so.
#[test]
fn l1_a_wait_that_would_outlast_the_request_is_refused_at_its_beginning() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 1, 8, "");
    for _ in 0..8 {
        assert_eq!(chat(&gateway, "delay-300", false).status, 200);
    }
    let mut first = open_stream(&gateway, "hold-mid");
    wait_limit(&gateway, "fake", 1, 0);
    let ask = |timeout: &str| {
        let began = Instant::now();
        let fields = format!("x-request-timeout: {timeout}\r\n");
        let response = open_as(&gateway, "ok", false, &fields).read_response(LIMIT);
        (response, began.elapsed())
    };
    // A call takes 300 ms, and one more is before the end of the one under way.
    let (response, took) = ask("250ms");
    assert_refused(&response, took);
    assert!(
        took < Duration::from_millis(250) && response.text().contains("longer than"),
        "{took:?}: {}",
        response.text()
    );
    let (response, took) = ask("600ms");
    assert_error(&response, 504, "deadline_exceeded");
    assert!(took >= Duration::from_millis(590), "{took:?}");
    // With three before it 600 ms are not enough any more.
    let mut waiting: Vec<Raw> = (0..3).map(|_| open(&gateway, "ok", false)).collect();
    wait_limit(&gateway, "fake", 1, 3);
    let (response, took) = ask("600ms");
    assert_refused(&response, took);
    assert_eq!(["too_late", "out_of_time", "queue_full"].map(|reason| shed(&gateway, "fake", reason)), [2, 1, 0]);
    fake.release();
    rest_of(&mut first);
    for raw in &mut waiting {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    assert_eq!(fake.request_count(), 12);
    wait_limit(&gateway, "fake", 0, 0);

    // Not the client's own time, but the gateway's.
    fake.hold();
    let gateway = limited(&fake, 1, 1, "[timeouts]\ntotal = \"400ms\"\n");
    let _first = open_stream(&gateway, "hold-mid");
    let began = Instant::now();
    let response = chat(&gateway, "ok", false);
    assert_error(&response, 503, "overloaded");
    assert!(began.elapsed() >= Duration::from_millis(390) && response.text().contains("none ended in time"));
    assert_eq!(shed(&gateway, "fake", "out_of_time"), 1);
}

/// Nobody who has left keeps a place in the line, or a permit.
#[test]
fn a_client_that_leaves_gives_up_its_place_or_its_permit() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 2, 4, "");
    let (unary, stream) = (open(&gateway, "hold", false), open_stream(&gateway, "hold-mid"));
    wait_limit(&gateway, "fake", 2, 0);
    let (gone, reset) = (open(&gateway, "delay-1", false), open(&gateway, "delay-2", true));
    wait_limit(&gateway, "fake", 2, 2);
    gone.close();
    reset.reset();
    wait_limit(&gateway, "fake", 2, 0);
    let mut stays = open(&gateway, "delay-3", false);
    wait_limit(&gateway, "fake", 2, 1);
    unary.close();
    assert_eq!(stays.read_response(LIMIT).status, 200);
    let mut other = open(&gateway, "hold", false);
    wait_limit(&gateway, "fake", 2, 0);
    let mut last = open(&gateway, "delay-4", false);
    wait_limit(&gateway, "fake", 2, 1);
    stream.reset();
    assert_eq!(last.read_response(LIMIT).status, 200);
    wait_limit(&gateway, "fake", 1, 0);
    fake.release();
    assert_eq!(other.read_response(LIMIT).status, 200);
    wait_limit(&gateway, "fake", 0, 0);
    let asked: Vec<String> = fake.requests().iter().map(|recorded| recorded.request.model()).collect();
    assert!(!asked.contains(&"delay-1".to_owned()) && !asked.contains(&"delay-2".to_owned()), "{asked:?}");
}

/// Every way in which a call can end gives its permit back.
#[test]
fn however_a_call_ends_its_permit_is_free() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 1, 0, "[timeouts]\nfirst_token = \"200ms\"\nidle = \"200ms\"\ntotal = \"1s\"\n");
    let scripts = [
        "ok",
        "status-500",
        "status-429",
        "status-400",
        "html-200",
        "reset-early",
        "close-early",
        "reset-mid",
        "eof-mid",
        "silent",
        "idle-mid",
        "never-headers",
        "bad-json",
        "stale",
        "error-200",
        "two-done",
        "no-finish",
        "stream-3",
    ];
    for script in scripts {
        for stream in [false, true] {
            let _ = chat(&gateway, script, stream);
            wait_limit(&gateway, "fake", 0, 0);
        }
    }
    assert_eq!(shed(&gateway, "fake", "queue_full"), 0);
}

/// The upstream has done its work when its answer has been read, whatever the client does with it.
#[test]
fn a_client_that_reads_slowly_holds_no_permit_of_a_whole_answer() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 1, 0, "");
    let unread = open(&gateway, "huge-8000000", false);
    let _ = fake.wait_request(0, LIMIT);
    wait_limit(&gateway, "fake", 0, 0);
    wait_until("the answer is on its way", LIMIT, || {
        gateway.metrics().contains("evergate_inflight_requests{kind=\"unary\"} 1\n")
    });
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    drop(unread);
}

/// Two upstreams with a limit of one each, no line before the first and one place before the second.
fn two_limited(model: &str) -> (FakeUpstream, FakeUpstream, Evergate) {
    let (first, second) = (FakeUpstream::start(), FakeUpstream::start());
    let text = config(&[first.base_url(), second.base_url()], &[model], ONE_WORKER)
        .replace("[upstreams.first]\n", "[upstreams.first]\nin_flight_max = 1\n")
        .replace("[upstreams.second]\n", "[upstreams.second]\nin_flight_max = 1\nqueue = 1\n");
    (first, second, Evergate::builder(EXE).config(text).start())
}

fn ask_as(gateway: &Evergate, model: &str, stream: bool, id: &str) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, &format!("x-request-id: {id}\r\n"), &chat_body(model, stream, &Value::Null)));
    raw
}

#[test]
fn l1_a_full_target_is_left_out_at_once_and_only_the_last_ones_line_is_waited_in() {
    let model = "hold>hold";
    for stream in [false, true] {
        let (first, second, gateway) = two_limited(model);
        let mut one = ask_as(&gateway, model, stream, "one");
        wait_limit(&gateway, "first", 1, 0);
        let mut two = ask_as(&gateway, model, stream, "two");
        wait_limit(&gateway, "second", 1, 0);
        let mut three = ask_as(&gateway, model, stream, "three");
        wait_limit(&gateway, "second", 1, 1);
        wait_limit(&gateway, "first", 1, 0);
        let began = Instant::now();
        let mut four = ask_as(&gateway, model, stream, "four");
        let response = four.read_response(LIMIT);
        assert_refused(&response, began.elapsed());
        let said = "tried: first (upstream_full), second (upstream_full)";
        assert!(response.text().contains(said), "{}", response.text());
        first.release();
        second.release();
        for raw in [&mut one, &mut two, &mut three] {
            assert_eq!(raw.read_response(LIMIT).status, 200);
        }
        assert_eq!((first.request_count(), second.request_count()), (1, 2));
        let path = |id: &str| path_of(&gateway.wait_access(id, LIMIT));
        let step = |upstream: &str, cause: &str| (upstream.to_owned(), cause.to_owned());
        let full = step("first", "upstream_full");
        assert_eq!(path("two"), [full.clone(), step("second", "ok")]);
        assert_eq!(path("three"), [full.clone(), step("second", "ok")]);
        assert_eq!(path("four"), [full, step("second", "upstream_full")]);
        let attempts = ["one", "two", "three", "four"].map(|id| gateway.wait_access(id, LIMIT)["attempts"].clone());
        assert_eq!(attempts, [1, 1, 1, 0].map(|count| json!(count)), "a full upstream is not called");
        assert_eq!((shed(&gateway, "first", "next_target"), shed(&gateway, "second", "queue_full")), (3, 1));
        let calls = r#"evergate_attempts_total{upstream="first",cause="ok"} 1"#;
        assert!(gateway.metrics().contains(calls), "{}", gateway.metrics());
    }
}

/// A worker that is told to stop serves its line within `drain`; what is left then is told so.
#[test]
fn those_that_wait_while_a_worker_drains_are_served_or_told() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 1, 4, "[shutdown]\ndrain = \"2s\"\n");
    let mut held = open(&gateway, "hold", false);
    wait_limit(&gateway, "fake", 1, 0);
    let mut waits = open(&gateway, "ok", true);
    wait_limit(&gateway, "fake", 1, 1);
    send(gateway.workers()[0], Signal::TERM);
    gateway.wait_workers(1);
    fake.release();
    assert_eq!(held.read_response(LIMIT).status, 200);
    let response = waits.read_response(LIMIT);
    assert_eq!((response.status, response.is_complete), (200, true));

    fake.hold();
    wait_until("the successor", LIMIT, || Raw::try_connect(&gateway.addr()).is_ok());
    let mut held = open(&gateway, "hold", true);
    wait_limit(&gateway, "fake", 1, 0);
    let mut waits = open_as(&gateway, "ok", false, "x-request-id: waits\r\n");
    wait_limit(&gateway, "fake", 1, 1);
    send(*gateway.workers().last().unwrap(), Signal::TERM);
    assert_error(&waits.read_response(LIMIT), 503, "server_shutting_down");
    assert_error(&held.read_response(LIMIT), 503, "server_shutting_down");
    let record = gateway.wait_access("waits", LIMIT);
    assert_eq!((&record["cause"], &record["attempts"]), (&json!("server_shutting_down"), &json!(0)), "{record}");
    wait_limit(&gateway, "fake", 0, 0);
}

/// The new number counts for all, also for what an old worker still does; a failed reload changes nothing.
#[test]
fn a_reload_changes_the_limit() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 4, 16, "");
    let text = |max: &str| {
        let config = std::fs::read_to_string(gateway.config_file()).unwrap();
        let number = config.split("in_flight_max = ").nth(1).unwrap().split('\n').next().unwrap().to_owned();
        config.replace(&format!("in_flight_max = {number}\n"), &format!("in_flight_max = {max}\n"))
    };
    let mut old: Vec<Raw> = (0..4).map(|_| open(&gateway, "hold", false)).collect();
    wait_limit(&gateway, "fake", 4, 0);
    let mut waits = open(&gateway, "hold", false);
    wait_limit(&gateway, "fake", 4, 1);

    gateway.write("evergate.toml", &text("nonsense"));
    assert!(!gateway.cli(&["reload"]).status.success());
    gateway.write("evergate.toml", &text("2"));
    assert!(gateway.cli(&["reload"]).status.success());
    let mut new = open(&gateway, "hold", false);
    wait_limit(&gateway, "fake", 4, 2);
    // Three left by their clients leave one: one of the two that wait may go, the old worker's or the new one's.
    for raw in old.drain(..3) {
        raw.close();
    }
    wait_limit(&gateway, "fake", 2, 1);
    fake.release();
    for raw in old.iter_mut().chain([&mut waits, &mut new]) {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    wait_limit(&gateway, "fake", 0, 0);
    let (_, before) = (fake.take_working_most(), fake.request_count());
    fake.hold();
    let mut many: Vec<Raw> = (0..6).map(|_| open(&gateway, "hold", false)).collect();
    wait_limit(&gateway, "fake", 2, 4);
    gateway.write("evergate.toml", &text("5"));
    assert!(gateway.cli(&["reload"]).status.success());
    // The old worker's line goes on by the new number.
    wait_limit(&gateway, "fake", 5, 1);
    wait_until("they are at the upstream", LIMIT, || fake.request_count() >= before + 5);
    fake.release();
    for raw in &mut many {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    assert_eq!(fake.take_working_most(), 5);
    wait_limit(&gateway, "fake", 0, 0);
}

/// L7, as far as there is something: streams have permits like everything else, for as long as they last, and whoever
/// does not find one is refused or goes on; nothing sets permits apart for short requests.
#[test]
fn l7_long_streams_hold_their_permits_and_no_longer() {
    let fake = FakeUpstream::start();
    let gateway = limited(&fake, 2, 0, "[timeouts]\nstream_total = \"1500ms\"\n");
    let (leaves, mut stays) = (open_stream(&gateway, "hold-mid"), open_stream(&gateway, "hold-mid"));
    let began = Instant::now();
    assert_refused(&chat(&gateway, "ok", false), began.elapsed());
    leaves.close();
    wait_limit(&gateway, "fake", 1, 0);
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    let events = rest_of(&mut stays);
    assert_failed_stream(&events, stays.body_is_complete(), "deadline_exceeded");
    wait_limit(&gateway, "fake", 0, 0);
}

/// More workers do not help an upstream that is full: its line is no backlog and no use of slots.
#[test]
fn requests_that_wait_for_an_upstream_call_for_no_more_workers() {
    let fake = FakeUpstream::start();
    let more = "in_flight_max = 1\nqueue = 18\n[workers]\nmin = 1\nmax = 3\nslots = 20\n";
    let gateway = before(&fake, more);
    let mut all: Vec<Raw> = (0..19).map(|_| open(&gateway, "hold", false)).collect();
    wait_limit(&gateway, "fake", 1, 18);
    let since = Instant::now();
    // Nineteen of twenty slots are taken; two samples, 100 ms apart, would be enough for another worker.
    wait_until("a second and a half", LIMIT, || since.elapsed() >= Duration::from_millis(1500));
    let metrics = gateway.metrics();
    assert!(metrics.contains("evergate_scale_events_total{direction=\"up\"} 0\n"), "{metrics}");
    assert!(metrics.contains("evergate_backlog 0\n"), "{metrics}");
    fake.release();
    for raw in &mut all {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
}
