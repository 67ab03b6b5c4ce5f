//! A hundred thousand panics, spread over every place where a request can meet one, end no process and cost nothing but
//! their own requests (H1); kept tasks that panic start again (H2).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, Raw, wait_until};
use serde_json::{Value, json};

use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_alive, assert_error, assert_failed_stream, assert_good_stream, is_full,
    wait_ready,
};

const CLIENTS: usize = 4;
/// What the clients ask for in turn: the fault, whether of a stream.
const FAULTS: [(&str, bool); 10] = [
    ("panic-handler", false),
    ("panic-stream", true),
    ("panic-head", false),
    ("panic-pass", false),
    ("panic-drop", false),
    ("panic-handler", true),
    ("panic-drop-stream", true),
    ("panic-stream", true),
    ("panic-drop", true),
    ("panic-connection", false),
];

fn faulty(more: &str) -> Evergate {
    let text = format!(
        "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [models.echo]\ntargets = [{{ upstream = \"echo\" }}]\n{more}"
    );
    Evergate::builder(EXE).config(text).env("EVERGATE_FAULT", "1").start()
}

/// Asks once; says whether the connection can be used again.
fn ask(raw: &mut Raw, fault: &str, stream: bool) -> bool {
    raw.send(&post_request(CHAT, &format!("x-evergate-fault: {fault}\r\n"), &chat_body("echo", stream, &Value::Null)));
    if fault == "panic-connection" {
        // Nobody is left who could answer: a client sees its connection end.
        assert!(raw.try_read_response(LIMIT).is_err());
        return false;
    }
    let response = raw.read_response(LIMIT);
    match fault {
        "panic-stream" => assert_failed_stream(&response.events(), response.is_complete, "internal_error"),
        "panic-drop-stream" => assert_good_stream(&response.events(), response.is_complete),
        "panic-pass" => assert_eq!(response.status, 200),
        _ => assert_error(&response, 500, "internal_error"),
    }
    true
}

fn metric(gateway: &Evergate, name: &str) -> u64 {
    let text = gateway.metrics();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
}

/// Anonymous memory of a process, KiB: what a leak grows.
fn anonymous_kib(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn drive(gateway: &Evergate, each: usize) {
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut raw = Raw::connect(&gateway.addr());
                for (fault, stream) in FAULTS.iter().cycle().take(each) {
                    if !ask(&mut raw, fault, *stream) {
                        raw = Raw::connect(&gateway.addr());
                    }
                }
            });
        }
    });
}

#[test]
fn h1_panics_by_the_thousand_end_no_process() {
    // Whole rounds of the faults.
    let each = if is_full() { 25_000 } else { 500 };
    let gateway = faulty("[workers]\nmin = 2\nmax = 2\n");
    wait_ready(&gateway, 2);
    let pids = gateway.children();
    // How many depends on the depth of the cgroup, whose files a worker holds.
    let idle: Vec<usize> = gateway.workers().iter().map(|pid| descriptors(*pid)).collect();
    // What is taken once, such as stacks, buffers and the unwinder's tables, is no growth.
    drive(&gateway, each / 10);
    let workers = gateway.workers();
    let before: Vec<u64> = workers.iter().map(|pid| anonymous_kib(*pid)).collect();
    let mut follow = gateway.follow_access();
    let (lines, good) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = |records: &[Value]| {
        lines.fetch_add(records.len() as u64, Ordering::Relaxed);
        good.fetch_add(records.iter().filter(|record| record["cause"] == "ok").count() as u64, Ordering::Relaxed);
        for record in records.iter().filter(|record| record["cause"] != "ok") {
            assert_eq!(record["cause"], "internal_error", "{record}");
            let detail = record["detail"].as_str().unwrap_or_default();
            assert!(detail.starts_with("panic at crates/evergate/src/http/fault.rs:"), "{record}");
        }
    };
    for _ in 0..10 {
        drive(&gateway, each / 10);
        count(&follow.read());
    }
    let asked = (CLIENTS * (each + each / 10)) as u64;
    assert_eq!(metric(&gateway, "evergate_panics_total"), asked);
    let of_ten = |faults: u64| asked / 10 * faults;
    assert_eq!(metric(&gateway, "evergate_access_records_dropped_total"), of_ten(1), "those whose books panicked");
    wait_until("a record for each of the others", LIMIT, || {
        count(&follow.read());
        lines.load(Ordering::Relaxed) == of_ten(9)
    });
    assert_eq!(good.load(Ordering::Relaxed), of_ten(1), "those whose stream panicked when it was over");
    assert_eq!(gateway.children(), pids);
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
    for ((pid, before), idle) in workers.iter().zip(before).zip(idle) {
        let after = anonymous_kib(*pid);
        assert!(after < before + 4096, "worker {pid} grew from {before} to {after} KiB");
        wait_until(&format!("{idle} descriptors, as an idle worker"), LIMIT, || descriptors(*pid) <= idle);
    }
    let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap();
    assert_eq!(status["inflight"], json!([]), "{status}");
    assert_alive(&gateway);
}

#[test]
fn h1_a_panic_is_told_with_its_place_its_request_and_its_calls() {
    let gateway = faulty(ONE_WORKER);
    let mut raw = Raw::connect(&gateway.addr());
    assert!(ask(&mut raw, "panic-handler", false));
    let said = gateway.wait_stderr("panic at ", LIMIT);
    let line = said.lines().find(|line| line.contains("panic at ")).unwrap();
    wait_until("the record", LIMIT, || gateway.access().len() == 1);
    let record = gateway.access().remove(0);
    assert!(line.contains(record["request_id"].as_str().unwrap()), "{line} {record}");
    let (_, calls) = line.split_once("; calls ").unwrap();
    let calls: Vec<u64> = calls.split(' ').map(|call| u64::from_str_radix(call, 16).unwrap()).collect();
    assert!(calls.len() > 8, "{line}");
    // The same stand in the record of the process's end.
    let pid = gateway.kill_worker(0);
    let exit = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    let offsets = exit["panic"]["offsets"].as_str().unwrap();
    assert!(line.ends_with(offsets), "{line} {exit}");
}

/// A request that floods the log with its panics says so ten times a second.
#[test]
fn h1_a_thousand_panics_do_not_flood_the_log() {
    let gateway = faulty(ONE_WORKER);
    let began = std::time::Instant::now();
    drive(&gateway, 250);
    let seconds = began.elapsed().as_secs() + 2;
    let told = gateway.stderr().lines().filter(|line| line.contains("panic at ")).count() as u64;
    assert!((10..=10 * seconds).contains(&told), "{told} lines in {seconds} s");
}

fn plant(gateway: &Evergate, fault: &str) {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, &format!("x-evergate-fault: {fault}\r\n"), &chat_body("echo", false, &Value::Null)));
    assert_eq!(raw.read_response(LIMIT).status, 200);
}

#[test]
fn h2_a_kept_task_that_panics_starts_again() {
    let gateway = faulty(&format!("{ONE_WORKER}[timeouts]\nbody_idle = \"500ms\"\n"));
    let workers = gateway.workers();
    for (number, task) in ["accept", "beat", "clock"].iter().enumerate() {
        plant(&gateway, &format!("panic-{task}"));
        // Which makes the accept loop turn.
        assert_alive(&gateway);
        let _ = gateway.wait_stderr(&format!("the task {task} panicked, and starts again in 100 ms"), LIMIT);
        assert_alive(&gateway);
        assert_eq!(metric(&gateway, "evergate_panics_total"), number as u64 + 1);
    }
    // Its limits still run: that is the clock's work, and the beat's that it is not taken for hung.
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{");
    assert_eq!(raw.read_response(3 * LIMIT).status, 408);
    assert_eq!(gateway.workers(), workers);
}

#[test]
fn h2_a_task_that_does_nothing_but_panic_has_its_worker_replaced() {
    let gateway = faulty(ONE_WORKER);
    let pid = gateway.workers()[0];
    for _ in 0..5 {
        plant(&gateway, "panic-beat");
    }
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["code"], &record["initiator"]), (&json!(70), &json!("crash")), "{record}");
    let note = record["note"].as_str().unwrap();
    assert!(note.starts_with("the task beat panicked again and again; the last panic at crates/evergate"), "{note}");
    wait_until("the next worker", LIMIT, || gateway.workers().first().is_some_and(|worker| *worker != pid));
    wait_until("it serves", LIMIT, || gateway.get("/readyz").status == 200);
    assert_alive(&gateway);
    wait_until("five panics", Duration::from_secs(5), || metric(&gateway, "evergate_panics_total") == 5);
}
