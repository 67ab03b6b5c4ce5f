//! Workers that are killed, that hang, that cannot boot. Numbers are lines of the specification of supervision.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use evergate_testkit::driver::{is_alive, state_of};
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::sse::Event;
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};

use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_counted, assert_good_stream, before, chat, open_stream, rest_of, send,
    wait_ready,
};

/// Somebody's kill is no crash: however often, the next one comes at once and the slot is not called degraded.
#[test]
fn s07_a_well_worker_is_replaced_at_once_however_often_it_is_killed() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    let ready = "evergate_workers{phase=\"ready\"} 1\n";
    for round in 1..=12 {
        wait_until("a worker that is well", LIMIT, || gateway.metrics().contains(ready));
        // Ready for more than the 50 ms that make it well: ten answers, one after the other, and more.
        let until = Instant::now() + Duration::from_millis(100);
        while Instant::now() < until {
            assert_eq!(chat(&gateway, "ok", false).status, 200);
        }
        let (pid, killed) = (gateway.kill_worker(0), Instant::now());
        wait_until("another worker", LIMIT, || gateway.workers().first().is_some_and(|next| *next != pid));
        // With a pause for each death the last rounds would wait for ten seconds.
        assert!(killed.elapsed() < Duration::from_secs(3), "round {round}: {:?}", killed.elapsed());
        assert_eq!(chat(&gateway, "ok", false).status, 200);
    }
    let output = gateway.cli(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["master"]["degraded"], 0);
    let line = "evergate_respawns_total{kind=\"worker\",cause=\"unknown\"} 12";
    assert!(gateway.metrics().contains(line), "{}", gateway.metrics());
}

/// One that was told to go is watched like any other: it does not hold its clients until its drain runs out.
#[test]
fn s04_a_worker_that_hangs_while_it_drains_is_ended_in_time() {
    let fake = FakeUpstream::start();
    let more = format!("{ONE_WORKER}hang_timeout = \"2s\"\n[shutdown]\ndrain = \"100s\"\n");
    let gateway = before(&fake, &more);
    let (mut held, mut well) = (open_stream(&gateway, "hold-mid"), None);
    let pid = gateway.workers()[0];
    for round in 0..2 {
        assert!(gateway.cli(&["reload"]).status.success());
        well = Some(well.unwrap_or_else(|| open_stream(&gateway, "hold-mid")));
        if round == 0 {
            kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
        }
    }
    let frozen = Instant::now();
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["initiator"], &record["signal"]), (&json!("hang"), &json!(9)), "{record}");
    assert_eq!(record["sent"], json!(["TERM", "ABRT", "KILL"]), "{record}");
    assert!(frozen.elapsed() < Duration::from_secs(12), "{:?}", frozen.elapsed());
    let _ = rest_of(&mut held);
    assert!(!held.body_is_complete());
    // The other one that drains beats, and has its time; nobody is started in the place of one that was to go.
    fake.release();
    let mut well = well.unwrap();
    let events = rest_of(&mut well);
    assert_good_stream(&events, well.body_is_complete());
    wait_until("only the last generation", LIMIT, || {
        let children = gateway.children();
        children.iter().filter(|child| child.kind == "worker").all(|child| child.generation == 3)
    });
}

/// The ladder: a word after a second, a diagnosis after two, and the end at the limit; the other worker serves.
#[test]
fn s04_a_frozen_worker_is_reported_diagnosed_and_replaced_in_time() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\nhang_timeout = \"4s\"\n");
    // One that still boots has the boot's time, not this one.
    wait_until("ready workers", LIMIT, || gateway.metrics().contains("evergate_workers{phase=\"ready\"} 2\n"));
    let pid = gateway.wait_workers(2)[0];
    kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
    let frozen = Instant::now();
    gateway.wait_stderr("has not beaten for a second", LIMIT);
    let said = gateway.wait_stderr("does not beat", LIMIT);
    assert!(said.contains(&format!("(pid {pid}) does not beat")) && said.contains("state stopped"), "{said}");
    assert!(is_alive(pid), "it has its time");
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    let took = frozen.elapsed();
    assert_eq!((&record["initiator"], &record["signal"]), (&json!("hang"), &json!(9)), "{record}");
    // Its last beat may have been a quarter of a second before it was frozen.
    assert!(took > Duration::from_millis(3500) && took < Duration::from_secs(12), "{took:?}");
    gateway.wait_workers(2);
    assert_eq!(chat(&gateway, "ok", false).status, 200);
}

/// H6: a handler that holds the event loop: the request at work is named, and ABRT is enough to end it.
#[test]
fn h6_s04_a_handler_that_never_yields_is_named_and_its_worker_replaced() {
    let fake = FakeUpstream::start();
    let config = gateway_config(fake.base_url(), &[], "[workers]\nmin = 2\nmax = 2\nhang_timeout = \"4s\"\n");
    let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT", "1").start();
    wait_until("ready workers", LIMIT, || gateway.metrics().contains("evergate_workers{phase=\"ready\"} 2\n"));
    let before = gateway.wait_workers(2);
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(
        CHAT,
        "x-evergate-fault: spin\r\nx-request-id: culprit\r\n",
        &chat_body("fake/ok", false, &Value::Null),
    ));
    let said = gateway.wait_stderr("at work on", LIMIT);
    assert!(said.contains("state running") && said.contains(CHAT), "{said}");
    // Others are answered meanwhile.
    for _ in 0..10 {
        assert_eq!(chat(&gateway, "ok", false).status, 200);
    }
    // Where it gets no processor the master waits for up to five times the limit, and longer where it gets none itself.
    let record = gateway.wait_exits(1, 3 * LIMIT, |record| record["kind"] == "worker").remove(0);
    assert_eq!(
        (&record["initiator"], &record["signal"], &record["sent"]),
        (&json!("hang"), &json!(6), &json!(["ABRT"]))
    );
    assert_eq!(
        (&record["lost"][0]["client_id"], &record["running"]),
        (&json!("culprit"), &record["lost"][0]["request_id"])
    );
    let after = gateway.wait_workers(2);
    assert_eq!(after.iter().filter(|pid| before.contains(pid)).count(), 1, "the other one was left alone");
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    assert!(raw.try_read_response(LIMIT).is_err(), "its connection ends");
    let record = gateway.wait_access("culprit", LIMIT);
    assert_eq!((&record["cause"], &record["by_master"]), (&json!("worker_lost"), &json!(true)), "{record}");
    assert_counted(&gateway, 0, "worker_lost", 1);
    let counted = "evergate_exits_total{kind=\"worker\",initiator=\"hang\"} 1\n";
    assert!(gateway.metrics().contains(counted), "{}", gateway.metrics());
    assert_eq!(fake.request_count(), 11, "it had called nobody");
}

/// H7: everything stands still for longer than any limit. The master goes on first, and sees children that have not beaten.
#[test]
fn h7_a_standstill_of_the_whole_machine_ends_nobody() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\nhang_timeout = \"4s\"\n");
    wait_ready(&gateway, 2);
    let mut held = open_stream(&gateway, "hold-mid");
    let children = gateway.children();
    let all: Vec<i32> = [gateway.pid()].into_iter().chain(children.iter().map(|child| child.pid)).collect();
    for pid in &all {
        send(*pid, Signal::STOP);
    }
    wait_until("all stand still", LIMIT, || all.iter().all(|pid| state_of(*pid) == Some('T')));
    let since = Instant::now();
    wait_until("more than the limit", LIMIT, || since.elapsed() > Duration::from_secs(5));
    send(gateway.pid(), Signal::CONT);
    gateway.wait_stderr("stood still for", LIMIT);
    for child in &children {
        send(child.pid, Signal::CONT);
    }
    fake.release();
    let events = rest_of(&mut held);
    assert_good_stream(&events, held.body_is_complete());
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    assert_counted(&gateway, 200, "ok", 2);
    assert_eq!(fake.request_count(), 2);
    // Longer than the limit, from when it went on.
    wait_until("a while", LIMIT, || since.elapsed() > Duration::from_secs(11));
    assert_eq!((gateway.children(), gateway.exits()), (children, Vec::new()));
}

/// Line 5, the other half: what runs out for a request is its own time, never its process.
#[test]
fn s05_a_requests_deadline_ends_no_process() {
    let fake = FakeUpstream::start();
    let more =
        "[workers]\nmin = 1\nmax = 1\nhang_timeout = \"2s\"\n[timeouts]\ntotal = \"1s\"\nstream_total = \"2s\"\n";
    let gateway = before(&fake, more);
    let worker = gateway.wait_workers(1);
    let mut stream = open_stream(&gateway, "hold-mid");
    for _ in 0..3 {
        assert_eq!(chat(&gateway, "never-headers", false).status, 504);
    }
    let events = rest_of(&mut stream);
    assert!(!events.iter().any(Event::is_done) && stream.body_is_complete(), "its own end: {events:?}");
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    assert_eq!(gateway.workers(), worker);
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
}

#[test]
fn s05_a_long_silent_stream_is_no_hanging() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 1\nmax = 1\nhang_timeout = \"3s\"\n");
    let mut stream = open_stream(&gateway, "hold-mid");
    let worker = gateway.workers();
    // What the upstream sends before it falls silent is more than the one event that was read.
    wait_until("its silence", LIMIT, || stream.stays_open(Duration::from_secs(1)));
    assert!(stream.stays_open(Duration::from_secs(6)), "twice the limit");
    fake.release();
    let events = rest_of(&mut stream);
    assert_good_stream(&events, stream.body_is_complete());
    assert_eq!(gateway.workers(), worker);
    assert!(gateway.exits().is_empty());
}

#[test]
fn s07_a_start_fails_only_when_every_worker_has_and_says_why() {
    let fake = FakeUpstream::start();
    let start = |fault: &str, arg: Option<&str>| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), fault).unwrap();
        let config = gateway_config(fake.base_url(), &[], "[workers]\nmin = 2\nmax = 2\n");
        let builder = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT_BOOT", file.path().to_str().unwrap());
        let started = arg.into_iter().fold(builder, evergate_testkit::driver::Builder::arg).try_start();
        (started, file)
    };
    for (fault, arg) in [("fail", None), ("fail 1", Some("--halt-on-boot-error"))] {
        let (code, stderr) = match start(fault, arg).0 {
            Err(ended) => (Some(ended.code()), ended.stderr),
            // The other one was ready a moment before.
            Ok(mut gateway) => (gateway.wait_exit(LIMIT).code(), gateway.last_words()),
        };
        assert_eq!(code, Some(70), "{fault}: {stderr}");
        for said in ["the start has failed", "a planted fault"] {
            assert!(stderr.contains(said), "{fault}: {stderr}");
        }
    }
    // One that serves is enough, and the other is tried again until it does.
    let (started, file) = start("fail 1", None);
    let gateway = started.map_err(|ended| ended.stderr).unwrap();
    let _ = gateway.wait_exits(3, LIMIT, |record| record["slot"] == 1 && record["initiator"] == "boot");
    assert_eq!(chat(&gateway, "ok", false).status, 200);
    std::fs::write(file.path(), "").unwrap();
    gateway.wait_workers(2);
}

/// Threads that want one processor for themselves, until this is dropped.
struct Spinners {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Spinners {
    fn start(processor: CpuSet) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let spin = |_| {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || {
                sched_setaffinity(None, &processor).unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        };
        Self { threads: (0..4).map(spin).collect(), is_over }
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// H7: a worker that gets no processor for a long piece of work is slow, not hung.
#[test]
fn h7_a_worker_that_waits_for_a_processor_is_not_ended() {
    let fake = FakeUpstream::start();
    let config = gateway_config(fake.base_url(), &[], &format!("{ONE_WORKER}hang_timeout = \"2s\"\n"));
    let gateway = Evergate::builder(EXE).config(config).env("EVERGATE_FAULT", "1").start();
    let workers = gateway.wait_workers(1);
    let pid = Pid::from_raw(workers[0]);
    let allowed = sched_getaffinity(None).unwrap();
    let mut processor = CpuSet::new();
    processor.set((0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap());
    sched_setaffinity(pid, &processor).unwrap();
    let spinners = Spinners::start(processor);
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, "x-evergate-fault: work-700\r\n", &chat_body("fake/ok", false, &Value::Null)));
    let said = gateway.wait_stderr("is given more time", LIMIT);
    assert!(said.contains("the worker 0 has not beaten for") && said.contains("of them for a processor"), "{said}");
    drop(spinners);
    assert_eq!(raw.read_response(LIMIT).status, 200);
    assert_eq!(gateway.workers(), workers);
    assert!(gateway.exits().is_empty(), "{:?}", gateway.exits());
}
