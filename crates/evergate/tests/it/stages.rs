//! A stop with a fault in each of its stages (I11): settle, drain, cancel, cleanup, and the clerk's part. Each ends within
//! the sum of the stages and a second for each of worker and clerk, with 0 or 75, and says what ran out.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, chat, is_full, machine, open_stream, send, via};

const SETTLE: Duration = Duration::from_millis(150);
const DRAIN: Duration = Duration::from_millis(200);
const CANCEL: Duration = Duration::from_millis(200);
/// Longer than the others: a machine that is busy with another build may need 200 ms for the clerk's last lines (seen).
const CLEANUP: Duration = Duration::from_millis(400);
/// What the master gives a worker, and the clerk, beyond its stages before it kills it.
const SLACK: Duration = Duration::from_secs(1);
/// What this machine may need for starting and ending processes while others use it.
const MACHINE: Duration = Duration::from_secs(2);

/// One way to disturb a stop.
struct Case {
    name: &'static str,
    /// `EVERGATE_FAULT_STOP`.
    stop: &'static str,
    /// What is in flight: the planted fault, and the upstream's script.
    request: Option<(&'static str, &'static str)>,
    /// Done to a child when the worker is in that phase.
    strike: Option<(&'static str, Target, Signal)>,
    /// The access log is on a disk that does not answer.
    is_log_stuck: bool,
    code: i32,
    /// Stands on stderr or in a record.
    named: &'static str,
}

#[derive(Clone, Copy, PartialEq)]
enum Target {
    Worker,
    Clerk,
}

const fn case(name: &'static str, code: i32, named: &'static str) -> Case {
    Case { name, stop: "", request: None, strike: None, is_log_stuck: false, code, named }
}

/// A stream that the upstream never ends: it holds up the drain.
const HELD: Option<(&str, &str)> = Some(("", "hold-mid"));
/// One that does not hear its cancel either.
const STUCK: Option<(&str, &str)> = Some(("stuck-stream", "hold-mid"));
const KILL: Signal = Signal::KILL;
const FREEZE: Signal = Signal::STOP;

fn cases() -> Vec<Case> {
    let ready = |target, signal| Some(("ready", target, signal));
    let draining = |target, signal| Some(("draining", target, signal));
    let worker_killed = "did not end in time and is killed";
    vec![
        case("nothing", 0, ""),
        Case { request: HELD, ..case("a stream that does not end", 0, "drain ran out: 1 request was ended") },
        Case { request: STUCK, ..case("a stream that ignores its cancel", 75, "out of time: cancel; 1 request left") },
        Case { stop: "hang", ..case("a resource that hangs", 75, "out of time: planted") },
        Case { stop: "panic", ..case("a resource that panics", 75, "panicked: planted") },
        Case { stop: "slow", ..case("a slow resource", 0, "") },
        Case { stop: "spin", ..case("a resource that holds the event loop", 75, worker_killed) },
        Case { request: Some(("spin", "ok")), ..case("a request that holds the event loop", 75, worker_killed) },
        Case {
            stop: "hang",
            request: STUCK,
            ..case("all of it at once", 75, "drain ran out: 1 request was ended; out of time: cancel, planted")
        },
        Case { strike: ready(Target::Worker, FREEZE), ..case("frozen while it settles", 75, worker_killed) },
        Case {
            request: HELD,
            strike: draining(Target::Worker, FREEZE),
            ..case("frozen in the drain", 75, worker_killed)
        },
        Case {
            request: STUCK,
            strike: Some(("cancelling", Target::Worker, FREEZE)),
            ..case("frozen in the cancel", 75, worker_killed)
        },
        Case {
            stop: "hang",
            strike: Some(("cleaning", Target::Worker, FREEZE)),
            ..case("frozen in the cleanup", 75, worker_killed)
        },
        Case { strike: ready(Target::Worker, KILL), ..case("killed while it settles", 0, "signal 9") },
        Case { request: HELD, strike: draining(Target::Worker, KILL), ..case("killed in the drain", 0, "signal 9") },
        Case {
            request: STUCK,
            strike: Some(("cancelling", Target::Worker, KILL)),
            ..case("killed in the cancel", 0, "signal 9")
        },
        Case {
            stop: "hang",
            strike: Some(("cleaning", Target::Worker, KILL)),
            ..case("killed in the cleanup", 0, "signal 9")
        },
        Case { strike: ready(Target::Clerk, FREEZE), ..case("a frozen clerk", 75, "clerk") },
        Case {
            request: HELD,
            strike: draining(Target::Clerk, KILL),
            ..case("a clerk killed in the drain", 0, "clerk")
        },
        Case { is_log_stuck: true, ..case("an access log that nobody takes", 75, "in time; 1 record is lost") },
    ]
}

fn phase(gateway: &Evergate, kind: &str) -> String {
    let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap_or_default();
    let children = status["children"].as_array().cloned().unwrap_or_default();
    let child = children.iter().find(|child| child["kind"] == kind);
    child.and_then(|child| child["phase"].as_str()).unwrap_or_default().to_owned()
}

fn start(case: &Case, fake: &FakeUpstream, state: &Path) -> Evergate {
    let ms = |time: Duration| time.as_millis();
    let stages = format!(
        "{ONE_WORKER}hang_timeout = \"20s\"\n[shutdown]\nsettle = \"{}ms\"\ndrain = \"{}ms\"\ncancel = \"{}ms\"\ncleanup = \"{}ms\"\n",
        ms(SETTLE),
        ms(DRAIN),
        ms(CANCEL),
        ms(CLEANUP)
    );
    let text = gateway_config(fake.base_url(), &[], &stages);
    if case.is_log_stuck {
        std::fs::write(state.join("fault"), "stuck").unwrap();
    }
    let fault = state.join("fault");
    let builder = Evergate::builder(EXE).config(text).state_dir(state);
    builder
        .env("EVERGATE_FAULT_CLERK", fault.to_str().unwrap())
        .env("EVERGATE_FAULT", "1")
        .env("EVERGATE_FAULT_STOP", case.stop)
        .start()
}

fn begin(gateway: &Evergate, (fault, script): (&str, &str)) -> Raw {
    if fault.is_empty() {
        return open_stream(gateway, script);
    }
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(
        CHAT,
        &format!("x-evergate-fault: {fault}\r\n"),
        &chat_body(&via(script), fault == "stuck-stream", &Value::Null),
    ));
    if fault == "stuck-stream" {
        assert_eq!(raw.read_head(LIMIT).status, 200);
        assert!(raw.next_event(LIMIT).is_some());
    } else {
        wait_until("the request at work", LIMIT, || {
            let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap();
            status["inflight"].as_array().is_some_and(|inflight| inflight.len() == 1)
        });
    }
    raw
}

fn pid_of(gateway: &Evergate, target: Target) -> i32 {
    let kind = if target == Target::Worker { "worker" } else { "clerk" };
    gateway.children().iter().find(|child| child.kind == kind).unwrap().pid
}

/// How long the machine, or the master, stood still, as it has said itself; three seconds at most, since a longer standstill is rather
/// its own.
fn stood_still(said: &str) -> Duration {
    let times =
        said.lines().filter_map(|line| line.split_once("stood still for ")?.1.split_once(" ms")?.0.parse().ok());
    times.map(Duration::from_millis).sum::<Duration>().min(Duration::from_secs(3))
}

/// Whether the stop was disturbed as the case says: on a busy machine a stage may be over before we see it.
fn stop_with(case: &Case, fake: &FakeUpstream) -> bool {
    let state = tempfile::tempdir().unwrap();
    let mut gateway = start(case, fake, state.path());
    let name = case.name;
    // Nothing to be written would be nothing to wait for.
    if case.is_log_stuck {
        assert_eq!(chat(&gateway, "ok", false).status, 200);
    }
    let request = case.request.map(|request| begin(&gateway, request));
    let began = Instant::now();
    gateway.signal(Signal::TERM);
    if let Some((phase_wanted, target, signal)) = case.strike {
        let pid = pid_of(&gateway, target);
        if phase_wanted != "ready" {
            let worker = pid_of(&gateway, Target::Worker);
            wait_until("the phase", LIMIT, || phase(&gateway, "worker") == phase_wanted || !is_alive(worker));
        }
        send(pid, signal);
    }
    let status = gateway.wait_exit(LIMIT);
    let took = began.elapsed();
    let exits = gateway.exits();
    let struck = |kind: &str| exits.iter().find(|record| record["kind"] == kind && record["signal"] == 9);
    if let Some((phase, target, _)) = case.strike {
        let kind = if target == Target::Worker { "worker" } else { "clerk" };
        if struck(kind).is_none_or(|record| target == Target::Worker && record["phase"] != phase) {
            return false;
        }
    }
    assert_eq!(status.code(), Some(case.code), "{name}: {}", gateway.stderr());
    gateway.wait_no_children(Duration::ZERO);
    let said = format!("{}{}", gateway.last_words(), Value::from(exits.clone()));
    let most = SETTLE + DRAIN + CANCEL + CLEANUP + SLACK + CLEANUP + SLACK + MACHINE + stood_still(&said);
    assert!(took < most, "{name}: {took:?}, {said}");
    // On a machine that stood still for a second the master's patience may end before the child's own word.
    let is_killed = said.contains("did not end in time and is killed");
    if is_killed && !said.contains(case.named) {
        return false;
    }
    assert!(said.contains(case.named), "{name}: {said}");
    drop(request);
    true
}

#[test]
fn i11_a_fault_in_any_stage_ends_in_time_and_is_named() {
    let _machine = machine();
    let rounds = if is_full() { 50 } else { 2 };
    let fake = FakeUpstream::start();
    let cases: Vec<Case> = (0..rounds).flat_map(|_| cases()).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    assert!((0..10).any(|_| stop_with(case, &fake)), "{}: never struck where it should be", case.name);
                }
            });
        }
    });
}
