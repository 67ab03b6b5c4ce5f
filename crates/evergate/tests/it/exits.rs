//! The truth about every end: what an exit record says, and that the counts agree (SUPERVISION.md 7, lines 2, 9, 12).

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use evergate_testkit::driver::state_of;
use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::processes::{lost_ids, wait_no_zombies};
use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_alive, assert_counted, before, echo_with, open_as, open_stream, via,
    wait_ready,
};

fn faulty(fake: &FakeUpstream, more: &str) -> Evergate {
    Evergate::builder(EXE).config(gateway_config(fake.base_url(), &[], more)).env("EVERGATE_FAULT", "1").start()
}

/// Asks for a fault and reads nothing.
fn plant(gateway: &Evergate, fault: &str, stream: bool) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    let fields = format!("x-evergate-fault: {fault}\r\nx-request-id: {fault}\r\n");
    raw.send(&post_request(CHAT, &fields, &chat_body(&via("stream-100-20"), stream, &Value::Null)));
    raw
}

fn ended(gateway: &Evergate, pid: i32) -> Value {
    gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0)
}

/// The only worker, once it is another than the last.
fn fresh(gateway: &Evergate, last: i32) -> i32 {
    wait_until("the next worker", 3 * LIMIT, || gateway.workers().first().is_some_and(|pid| *pid != last));
    gateway.workers()[0]
}

/// Line 9: code and signal are exact, and a request that ends its own process is named as the one that was running.
#[test]
fn s09_a_request_that_ends_its_process_is_named_with_its_place() {
    let fake = FakeUpstream::start();
    let gateway = faulty(&fake, ONE_WORKER);
    let mut last = 0;
    for (fault, code, signal) in [
        ("exit-3", json!(3), Value::Null),
        ("double-panic", Value::Null, json!(6)),
        ("exit-255", json!(255), Value::Null),
    ] {
        last = fresh(&gateway, last);
        let mut neighbours: Vec<Raw> = (0..3).map(|_| open_stream(&gateway, "hold-mid")).collect();
        drop(plant(&gateway, fault, false).try_read_response(LIMIT));
        let record = ended(&gateway, last);
        assert_eq!((&record["code"], &record["signal"]), (&code, &signal), "{record}");
        assert_eq!(record["initiator"], "crash", "{record}");
        let lost = record["lost"].as_array().unwrap();
        assert_eq!(lost.len(), 4, "{record}");
        let culprit = lost.iter().find(|lost| lost["client_id"] == fault).unwrap();
        assert_eq!(record["running"], culprit["request_id"], "{record}");
        assert!(record["rss_max_kib"].as_u64().unwrap() > 1000 && record["cpu_ms"].is_u64(), "{record}");
        assert!(record["last_beat_ms"].as_u64().unwrap() < 5_000 && record["sent"] == json!([]), "{record}");
        if fault == "double-panic" {
            let place = record["panic"]["place"].as_str().unwrap();
            assert!(place.contains("http/fault.rs:") && place.split(':').count() == 3, "{record}");
            assert!(record["panic"]["age_ms"].as_u64().unwrap() < 2_000, "{record}");
        } else {
            assert_eq!(record["panic"], Value::Null, "{record}");
        }
        neighbours.iter_mut().for_each(|raw| drop(raw.next_event(LIMIT)));
    }
    let output = gateway.cli(&["exits"]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("signal 6 (SIGABRT)") && table.contains("code 255"), "{table}");
    assert!(table.contains("panic at ") && table.contains("running req_"), "{table}");
}

/// Line 9: the one that was running when somebody else ended the process, in the handler and in the body.
#[test]
fn s09_the_request_that_was_running_is_named() {
    let fake = FakeUpstream::start();
    let gateway = faulty(&fake, ONE_WORKER);
    let mut last = 0;
    for (fault, stream) in [("spin", false), ("spin-stream", true)] {
        last = fresh(&gateway, last);
        let _others: Vec<Raw> = (0..4).map(|_| open_stream(&gateway, "hold-mid")).collect();
        let before = cpu_ticks(last);
        let _culprit = plant(&gateway, fault, stream);
        // A tenth of a second of a processor is more than all else that it does, however little a full machine gives it.
        wait_until("it spins", LIMIT, || cpu_ticks(last) >= before + 10);
        gateway.kill_worker(0);
        let record = ended(&gateway, last);
        let lost = record["lost"].as_array().unwrap();
        let culprit = lost.iter().find(|lost| lost["client_id"] == fault).unwrap();
        assert_eq!((lost.len(), &record["running"]), (5, &culprit["request_id"]), "{record}");
        assert_eq!((&record["signal"], &record["initiator"]), (&json!(9), &json!("unknown")), "{record}");
        assert!(!record["evidence"].as_str().unwrap().is_empty(), "what tells a KILL's sender, or why nothing does");
    }
    // Between two requests nobody runs.
    last = fresh(&gateway, last);
    let _idle = open_stream(&gateway, "hold-mid");
    gateway.kill_worker(0);
    assert_eq!(ended(&gateway, last)["running"], Value::Null);
}

/// What the process has used of processors in its own code, hundredths of a second.
fn cpu_ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_whitespace().nth(11).and_then(|ticks| ticks.parse().ok()).unwrap_or(0)
}

/// A caught panic of earlier is told with its age, and blamed for nothing.
#[test]
fn s09_a_caught_panic_is_a_fact_and_not_the_cause() {
    let fake = FakeUpstream::start();
    let gateway = faulty(&fake, ONE_WORKER);
    assert_eq!(plant(&gateway, "panic-handler", false).read_response(LIMIT).status, 500);
    let pid = gateway.kill_worker(0);
    let record = ended(&gateway, pid);
    assert!(record["panic"]["place"].as_str().unwrap().contains("http/fault.rs:"), "{record}");
    assert_eq!((&record["signal"], &record["initiator"]), (&json!(9), &json!("unknown")), "{record}");
}

/// What a lost request was, in the exit record and in its access record.
#[test]
fn s09_a_lost_request_has_method_model_and_backend() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let mut raw = open_as(&gateway, "hold-mid", true, "x-request-id: mine\r\n");
    assert_eq!(raw.read_head(LIMIT).status, 200);
    assert!(raw.next_event(LIMIT).is_some());
    let pid = gateway.kill_worker(0);
    let record = ended(&gateway, pid);
    let access = gateway.wait_access("mine", LIMIT);
    for (key, value) in
        [("method", "POST"), ("route", "/v1/chat/completions"), ("model", &via("hold-mid")), ("backend", "fake")]
    {
        assert_eq!((&record["lost"][0][key], &access[key]), (&json!(value), &json!(value)), "{record} {access}");
    }
    assert_eq!((&access["attempts"], &access["by_master"]), (&json!(1), &json!(true)), "{access}");
    let said = gateway.wait_stderr("1 request lost", LIMIT);
    assert!(!said.contains("1 requests"), "{said}");
}

fn requests_total(gateway: &Evergate) -> u64 {
    let text = gateway.metrics();
    let lines = text.lines().filter(|line| line.starts_with("evergate_requests_total{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

fn dropped(gateway: &Evergate) -> u64 {
    let text = gateway.metrics();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("evergate_access_records_dropped_total "));
    lines.next().unwrap().parse().unwrap()
}

/// Line 2: whatever is killed when, every request has one record and one count: records + dropped == requests.
#[test]
fn s02_records_and_counts_agree_whatever_is_killed() {
    const KILLS: usize = 12;
    let gateway = echo_with("[workers]\nmin = 3\nmax = 3\n");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let Ok(mut raw) = Raw::try_connect(&gateway.addr()) else { continue };
                    // Answers of this process itself: as many ends of requests as can be, to be hit by a kill.
                    let _ = raw.try_send(&post_request(CHAT, "", &chat_body("echo", false, &Value::Null)));
                    let _ = raw.try_read_response(LIMIT);
                }
            });
        }
        for round in 0..KILLS {
            let pid = gateway.workers()[round % 3];
            gateway.kill_worker(round % 3);
            let _ = ended(&gateway, pid);
            wait_until("the replacement", 3 * LIMIT, || {
                let workers = gateway.wait_workers(3);
                !workers.contains(&pid)
            });
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let mut last = (0, 0);
    wait_until("as many records as requests", LIMIT, || {
        last = (gateway.access().len() as u64 + dropped(&gateway), requests_total(&gateway));
        last.0 == last.1
    });
    let records = gateway.access();
    let ids: BTreeSet<&str> = records.iter().map(|record| record["request_id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), records.len(), "one record for each request");
    assert!(records.iter().all(|record| record["status"] == 200 || record["cause"] == "worker_lost"));
    let lost: usize = gateway.exits().iter().map(|record| lost_ids(record).len()).sum();
    let recorded = records.iter().filter(|record| record["cause"] == "worker_lost").count();
    assert_eq!(lost, recorded, "what exit records and access records call lost");
    wait_no_zombies(gateway.pid());
}

/// Line 2: the worker dies anywhere in the books of a request, also where the request was never admitted: one count, one
/// record, and it is not called lost.
#[test]
fn s02_a_death_anywhere_in_the_books_leaves_one_count_and_one_record() {
    let config = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\n\
                  targets = [{ upstream = \"echo\" }]\n[workers]\nmin = 1\nmax = 1\n";
    let chat = |fields: &str, model: &str| post_request(CHAT, fields, &chat_body(model, false, &Value::Null));
    let victim = "x-request-id: victim\r\n";
    let requests = [
        ("models", get_request("/v1/models", victim), 200, "/v1/models"),
        ("refused by its path", get_request("/nothing", victim), 404, "other"),
        ("refused by its body", post_request(CHAT, victim, "{"), 400, CHAT),
        ("admitted", chat(victim, "echo"), 200, CHAT),
    ];
    for place in ["noted", "added", "counted", "recording", "written"] {
        for (name, request, status, route) in &requests {
            let what = format!("{name}, {place}");
            let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT", "1").start();
            let mut raw = Raw::connect(&gateway.addr());
            raw.send(&chat(&format!("x-evergate-fault: abort-{place}\r\nx-request-id: armed\r\n"), "echo"));
            assert_eq!(raw.read_response(LIMIT).status, 200);
            let _ = gateway.wait_access("armed", LIMIT);
            let mut raw = Raw::connect(&gateway.addr());
            raw.send(request);
            let record = gateway.wait_exits(1, LIMIT, |record| record["kind"] == "worker").remove(0);
            assert_eq!((&record["signal"], &record["lost"]), (&json!(6), &json!([])), "{what}: {record}");
            let victim = gateway.wait_access("victim", LIMIT);
            let is_by_master = place != "written";
            assert_eq!(
                (victim["by_master"] == true, &victim["status"]),
                (is_by_master, &json!(status)),
                "{what}: {victim}"
            );
            assert_eq!(victim["route"], *route, "{what}: {victim}");
            let told = "over; the worker died before its record was written";
            assert!(!is_by_master || victim["detail"] == told, "{what}: {victim}");
            let counted = (gateway.access().len() as u64 + dropped(&gateway), requests_total(&gateway));
            assert_eq!(counted, (2, 2), "{what}");
            assert_counted(
                &gateway,
                *status,
                victim["cause"].as_str().unwrap(),
                1 + u64::from(*name == "admitted" || *name == "models"),
            );
        }
    }
}

/// Line 2: between its record and the end of its row a worker stands still for so long that others' records follow in the log.
#[test]
fn s02_a_worker_that_dies_long_after_a_record_leaves_no_second_one() {
    let config = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\n\
                  targets = [{ upstream = \"echo\" }]\n[workers]\nmin = 2\nmax = 2\nhang_timeout = \"60s\"\n";
    let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT", "1").start();
    wait_ready(&gateway, 2);
    let chat = |fields: &str| post_request(CHAT, fields, &chat_body("echo", false, &Value::Null));
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&chat("x-evergate-fault: stop-written\r\nx-request-id: armed\r\n"));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    raw.send(&chat("x-request-id: victim\r\n"));
    let stopped = gateway.wait_access("victim", LIMIT)["pid"].as_i64().unwrap() as i32;
    wait_until("its stop", LIMIT, || state_of(stopped) == Some('T'));
    for id in ["next", "after-that"] {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&chat(&format!("x-request-id: {id}\r\n")));
        assert_eq!(raw.read_response(LIMIT).status, 200);
        let _ = gateway.wait_access(id, LIMIT);
    }
    kill_process(Pid::from_raw(stopped).unwrap(), Signal::KILL).unwrap();
    let record = ended(&gateway, stopped);
    assert_eq!((&record["signal"], &record["lost"]), (&json!(9), &json!([])), "{record}");
    // What the master would have written stands before that.
    raw = Raw::connect(&gateway.addr());
    raw.send(&chat("x-request-id: last\r\n"));
    let _ = gateway.wait_access("last", LIMIT);
    let victims: Vec<_> = gateway.access().into_iter().filter(|record| record["client_id"] == "victim").collect();
    assert!(victims.len() == 1 && victims[0]["by_master"] != true, "{victims:?}");
    assert_eq!((gateway.access().len() as u64 + dropped(&gateway), requests_total(&gateway)), (5, 5));
}

/// I13: whatever ends leaves a record with a cause: what was killed, what was told to, and what nobody saw.
#[test]
fn i13_every_end_leaves_a_cause_also_one_that_nobody_saw() {
    let state = tempfile::tempdir().unwrap();
    let start = || Evergate::builder(EXE).state_dir(state.path()).start();
    let mut first = start();
    wait_ready(&first, 2);
    let killed = first.kill_worker(0);
    let record = ended(&first, killed);
    assert_eq!((&record["signal"], &record["initiator"]), (&json!(9), &json!("unknown")), "{record}");
    assert_ne!(record["evidence"], "", "{record}");
    wait_ready(&first, 2);
    first.signal(Signal::TERM);
    assert_eq!(first.wait_exit(LIMIT).code(), Some(0));
    let told: Vec<Value> = first.exits().into_iter().filter(|record| record["pid"] != killed).collect();
    let is_told = |record: &Value| (&record["code"], &record["initiator"]) == (&json!(0), &json!("operator"));
    assert!(told.len() == 3 && told.iter().all(is_told), "{told:?}");
    // That is all there is to say of a run that was ended in order.
    let mut second = start();
    assert_eq!(second.exits().len(), 4, "{:?}", second.exits());
    wait_ready(&second, 2);
    let master = second.pid();
    second.signal(Signal::KILL);
    let _ = second.wait_exit(LIMIT);
    let third = start();
    third.wait_stderr(&format!("the last run (pid {master}) was not ended cleanly"), LIMIT);
    let record = third.wait_exits(1, LIMIT, |record| record["pid"] == master).remove(0);
    assert_eq!((&record["kind"], &record["initiator"]), (&json!("master"), &json!("unknown")), "{record}");
    assert_eq!((&record["code"], &record["signal"]), (&Value::Null, &Value::Null), "nobody guesses: {record}");
    assert!(record["note"].as_str().unwrap().contains("nobody saw the end"), "{record}");
    assert!(record["last_beat_ms"].is_u64() && record["age_ms"].is_u64(), "{record}");
    assert_alive(&third);
}

/// Line 12, and what H12 leaves: the master's end and that of each of its children are recorded by the successor.
#[test]
fn s12_a_killed_masters_children_are_recorded_too() {
    let fake = FakeUpstream::start();
    let state = tempfile::tempdir().unwrap();
    let text =
        gateway_config(fake.base_url(), &[], "[shutdown]\ndrain = \"1s\"\ncancel = \"500ms\"\ncleanup = \"500ms\"\n");
    let mut first = Evergate::builder(EXE).config(text.clone()).state_dir(state.path()).start();
    // One that is not ready yet has no handler for the successor's TERM, and would rightly be recorded as ended by it.
    wait_until("two ready workers", LIMIT, || first.metrics().contains("evergate_workers{phase=\"ready\"} 2"));
    let _held = open_stream(&first, "hold-mid");
    let (master, children) = (first.pid(), first.children());
    assert_eq!(children.len(), 3);
    first.signal(Signal::KILL);
    let _ = first.wait_exit(LIMIT);
    let second = Evergate::builder(EXE).config(text).state_dir(state.path()).start();
    let records = second.wait_exits(4, LIMIT, |record| record["epoch"] == 0 || record["initiator"] == "orphan");
    let of_master = records.iter().find(|record| record["kind"] == "master").unwrap();
    assert_eq!(
        (&of_master["pid"], &of_master["code"], &of_master["signal"]),
        (&json!(master), &Value::Null, &Value::Null)
    );
    for child in &children {
        let record = records.iter().find(|record| record["pid"] == child.pid).unwrap();
        assert_eq!((&record["kind"], &record["slot"]), (&json!(child.kind), &json!(child.slot)), "{record}");
        // Whoever saw its end knows the status, and an orphan that drained ended with 0; nobody guesses.
        assert!(record["code"].is_null() || record["code"] == 0, "{record}");
        assert!(record["signal"].is_null() && record["age_ms"].as_u64().unwrap() > 0, "{record}");
    }
    let of_second = second.pid();
    assert!(second.exits().iter().all(|record| record["pid"] != of_second));
}
