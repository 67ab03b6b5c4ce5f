//! Records are worth no request and none is lost in silence: whatever becomes of the log, of the clerk and of the workers,
//! records written and records dropped are the requests (J5, I12, H3).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::driver::Builder;
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, before, is_full, open, open_as, send};

fn echo_in(state: &Path, more: &str) -> Evergate {
    prepare(more).state_dir(state).start()
}

fn prepare(more: &str) -> Builder {
    let text = format!(
        "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [models.echo]\ntargets = [{{ upstream = \"echo\" }}]\n{more}"
    );
    Evergate::builder(EXE).config(text)
}

fn ask(raw: &mut Raw, id: &str) -> Result<u16, String> {
    let request = post_request(CHAT, &format!("x-request-id: {id}\r\n"), &chat_body("echo", false, &Value::Null));
    // Read also when it could not be sent: what was said before is still there.
    let _ = raw.try_send(&request);
    let response = raw.try_read_response(LIMIT)?;
    if response.is_complete { Ok(response.status) } else { Err("cut".to_owned()) }
}

/// Asks that many times over one connection; gives the longest answer's time.
fn ask_all(gateway: &Evergate, prefix: &str, count: usize) -> Duration {
    let mut raw = Raw::connect(&gateway.addr());
    let mut longest = Duration::ZERO;
    for number in 0..count {
        let began = Instant::now();
        assert_eq!(ask(&mut raw, &format!("{prefix}-{number}")), Ok(200));
        longest = longest.max(began.elapsed());
    }
    longest
}

fn metric(gateway: &Evergate, name: &str) -> u64 {
    let text = gateway.metrics();
    let lines = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

fn dropped(gateway: &Evergate) -> u64 {
    metric(gateway, "evergate_access_records_dropped_total")
}

fn clerk(gateway: &Evergate) -> i32 {
    gateway.children().iter().find(|child| child.kind == "clerk").expect("a clerk").pid
}

/// Whole records of a log's files; half of a line is what a kill in the middle of a write leaves, and is no record.
fn records(state: &Path, names: &[&str]) -> Vec<Value> {
    let text = names.iter().filter_map(|name| std::fs::read_to_string(state.join(name)).ok()).collect::<String>();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn a_log_that_was_renamed_is_opened_again_on_usr1_and_nothing_is_lost() {
    let state = tempfile::tempdir().unwrap();
    let gateway = echo_in(state.path(), ONE_WORKER);
    let (now, old) = (state.path().join("access.jsonl"), state.path().join("access.kept"));
    let count = |name| records(state.path(), &[name]).len();
    ask_all(&gateway, "before", 5);
    wait_until("five records", LIMIT, || count("access.jsonl") == 5);
    std::fs::rename(&now, &old).unwrap();
    ask_all(&gateway, "renamed", 5);
    wait_until("ten records in the renamed file", LIMIT, || count("access.kept") == 10);
    assert!(!now.exists());
    gateway.signal(Signal::USR1);
    let mut asked = 10;
    wait_until("a new file", LIMIT, || {
        ask_all(&gateway, "after", 1);
        asked += 1;
        now.exists()
    });
    wait_until("every record", LIMIT, || count("access.kept") + count("access.jsonl") == asked);
    assert_eq!(dropped(&gateway), 0);
}

/// A person's view of the log, with or without a gateway, and across a change of the file.
#[test]
fn access_records_are_shown_as_lines_for_people() {
    let state = tempfile::tempdir().unwrap();
    let show = |gateway: &Evergate, args: &[&str]| {
        let output = gateway.cli(&[&["access"], args].concat());
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let mut gateway = echo_in(state.path(), ONE_WORKER);
    assert_eq!(show(&gateway, &[]), "");
    let mut follower = Follower::start(&gateway);
    ask_all(&gateway, "early", 3);
    wait_until("three lines", LIMIT, || show(&gateway, &[]).lines().count() == 3);
    let last = show(&gateway, &["--last", "2"]);
    let lines: Vec<&str> = last.lines().collect();
    assert_eq!(lines.len(), 2, "{last}");
    for (line, id) in lines.iter().zip(["client_id=early-1", "client_id=early-2"]) {
        assert!(line.contains("Z 200 ok POST /v1/chat/completions model=echo backend=echo duration_ms="), "{line}");
        assert!(line.contains(id) && line.contains(" request_id=req_"), "{line}");
    }
    // As JSON they are what the file has.
    let file = std::fs::read_to_string(state.path().join("access.jsonl")).unwrap();
    assert_eq!(show(&gateway, &["--json", "-n", "9"]), file);
    follower.wait(3);

    std::fs::rename(state.path().join("access.jsonl"), state.path().join("access.jsonl.1")).unwrap();
    gateway.signal(Signal::USR1);
    let mut asked = 3;
    wait_until("a new file", LIMIT, || {
        ask_all(&gateway, "late", 1);
        asked += 1;
        state.path().join("access.jsonl").exists()
    });
    follower.wait(asked);
    assert!(follower.text().lines().last().unwrap().contains("client_id=late-0"));
    drop(follower);
    let mut unread = Follower::spawn(&gateway, "0", Stdio::piped());
    drop(unread.stdout.take());
    wait_until("the end of a follower that nobody reads", LIMIT, || unread.try_wait().unwrap().is_some());
    assert!(unread.wait().unwrap().success());
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0));
    assert_eq!(show(&gateway, &["-n", "1000"]).lines().count(), asked);
}

/// `evergate access --follow`, whose output goes to a file.
struct Follower {
    child: Child,
    out: tempfile::NamedTempFile,
}

impl Follower {
    fn start(gateway: &Evergate) -> Self {
        let out = tempfile::NamedTempFile::new().unwrap();
        let child = Self::spawn(gateway, "20", out.reopen().unwrap().into());
        Self { child, out }
    }

    fn spawn(gateway: &Evergate, last: &str, stdout: Stdio) -> Child {
        let mut command = Command::new(EXE);
        command.args(["access", "--follow", "-n", last, "--state-dir"]).arg(gateway.state_dir());
        command.stdin(Stdio::null()).stdout(stdout).spawn().unwrap()
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.out.path()).unwrap()
    }

    /// Waits until it has shown that many lines, and no more.
    fn wait(&mut self, count: usize) {
        wait_until("the followed lines", LIMIT, || self.text().lines().count() >= count);
        assert_eq!(self.text().lines().count(), count, "{}", self.text());
        assert!(self.child.try_wait().unwrap().is_none());
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // One that has ended already is what a failed test tells.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn j5_a_full_disk_costs_records_and_no_request() {
    let state = tempfile::tempdir().unwrap();
    // Every write to it fails with ENOSPC (full(4)).
    std::os::unix::fs::symlink("/dev/full", state.path().join("access.jsonl")).unwrap();
    let gateway = echo_in(state.path(), ONE_WORKER);
    let longest = ask_all(&gateway, "full", 500);
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    wait_until("every record dropped and counted", LIMIT, || dropped(&gateway) == 500);
    let _ = gateway.wait_stderr("cannot be written, records are dropped", LIMIT);
    assert_eq!(gateway.stderr().matches("records are dropped").count(), 1, "once for all of it");
    // There is room again.
    std::fs::remove_file(state.path().join("access.jsonl")).unwrap();
    gateway.signal(Signal::USR1);
    let mut asked = 500;
    wait_until("records again", LIMIT, || {
        ask_all(&gateway, "room", 1);
        asked += 1;
        !records(state.path(), &["access.jsonl"]).is_empty()
    });
    wait_until("as many as requests", LIMIT, || {
        records(state.path(), &["access.jsonl"]).len() as u64 + dropped(&gateway) == asked
    });
}

#[test]
fn i12_a_frozen_clerk_costs_records_and_no_request() {
    let state = tempfile::tempdir().unwrap();
    let gateway = echo_in(state.path(), &format!("{ONE_WORKER}hang_timeout = \"60s\"\n"));
    let clerk = clerk(&gateway);
    send(clerk, Signal::STOP);
    // A ring of a MiB holds two to three thousand.
    let longest = ask_all(&gateway, "frozen", 4_000);
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    send(clerk, Signal::CONT);
    wait_until("as many records as requests", LIMIT, || {
        records(state.path(), &["access.jsonl"]).len() as u64 + dropped(&gateway) == 4_000
    });
    assert!(dropped(&gateway) > 0, "the ring holds more than it should");
    assert_eq!(metric(&gateway, "evergate_requests_total"), 4_000);
}

/// INV-RECORD-1: it never was admitted, and ends without an answer.
#[test]
fn a_request_that_leaves_the_line_is_on_record() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("{ONE_WORKER}slots = 1\n"));
    let _holding = open(&gateway, "hold", false);
    let _ = fake.wait_request(0, LIMIT);
    let waiting = open_as(&gateway, "ok", false, "x-request-id: impatient\r\n");
    wait_until("a request that waits", LIMIT, || metric(&gateway, "evergate_waiting_requests") == 1);
    drop(waiting);
    let record = gateway.wait_access("impatient", LIMIT);
    assert_eq!((record["cause"].as_str(), record["status"].as_u64()), (Some("client_gone"), Some(499)), "{record}");
    assert_eq!(metric(&gateway, "evergate_waiting_requests"), 0);
}

/// At the worst moments: records that it has in its hands, and those that it has just written.
#[test]
fn h3_a_clerk_that_dies_loses_no_record_and_doubles_none() {
    let state = tempfile::tempdir().unwrap();
    let fault = state.path().join("fault");
    let gateway =
        prepare(ONE_WORKER).state_dir(state.path()).env("EVERGATE_FAULT_CLERK", fault.to_str().unwrap()).start();
    for (round, moment) in ["before-write", "after-write", "before-write", "after-write"].iter().enumerate() {
        std::fs::write(&fault, moment).unwrap();
        ask_all(&gateway, moment, 50);
        let _ = gateway.wait_exits(round + 1, LIMIT, |record| record["kind"] == "clerk" && record["signal"] == 6);
        ask_all(&gateway, moment, 50);
    }
    wait_until("a record for each request", LIMIT, || records(state.path(), &["access.jsonl"]).len() >= 400);
    // Once more, so that what might come twice has come.
    ask_all(&gateway, "last", 1);
    wait_until("the last record", LIMIT, || {
        records(state.path(), &["access.jsonl"]).iter().any(|record| record["client_id"] == "last-0")
    });
    let records = records(state.path(), &["access.jsonl"]);
    let ids: BTreeSet<&str> = records.iter().map(|record| record["request_id"].as_str().unwrap()).collect();
    assert_eq!((records.len(), ids.len()), (401, 401));
}

/// What each request came to, as its client saw it.
fn client(gateway: &Evergate, number: usize, is_over: &AtomicBool, seen: &Mutex<BTreeMap<String, bool>>) {
    let mut raw = None;
    let mut count = 0;
    while !is_over.load(Ordering::Relaxed) {
        let Some(connection) = raw.as_mut() else {
            raw = Raw::try_connect(&gateway.addr()).ok();
            continue;
        };
        let id = format!("drill-{number}-{count}");
        count += 1;
        let answer = ask(connection, &id);
        if answer.is_err() {
            raw = None;
        }
        seen.lock().unwrap().insert(id, answer == Ok(200));
    }
}

/// Workers and clerks are killed at any moment; then every answered request has one record, and no request has two.
#[test]
fn h3_records_and_drops_are_the_requests_whoever_is_killed() {
    let time = Duration::from_secs(if is_full() { 120 } else { 6 });
    let state = tempfile::tempdir().unwrap();
    let gateway = echo_in(state.path(), "[workers]\nmin = 3\nmax = 3\n");
    let (is_over, seen) = (AtomicBool::new(false), Mutex::new(BTreeMap::new()));
    let mut kills = 0;
    std::thread::scope(|scope| {
        for number in 0..6 {
            let (gateway, is_over, seen) = (&gateway, &is_over, &seen);
            scope.spawn(move || client(gateway, number, is_over, seen));
        }
        let began = Instant::now();
        let mut random = 7_u64;
        while began.elapsed() < time {
            // Numbers without a pattern that matters (Knuth's multiplicative hash), the same in every run.
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (now, pause) = (Instant::now(), Duration::from_millis((random >> 33) % 120));
            wait_until("the next kill", LIMIT, || now.elapsed() >= pause);
            // A clerk in a crash loop is started ever later, and a full ring drops what this is about.
            let kind = if kills % 8 == 3 { "clerk" } else { "worker" };
            let mut children = gateway.children();
            children.retain(|child| child.kind == kind);
            if let Some(child) = children.get(usize::try_from(random >> 40).unwrap() % children.len().max(1)) {
                send(child.pid, Signal::KILL);
                kills += 1;
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let seen = seen.into_inner().unwrap();
    let names = ["access.jsonl.1", "access.jsonl"];
    let count = || {
        let found = records(state.path(), &names).len() as u64;
        let metrics = Raw::try_connect(&gateway.admin())
            .is_ok()
            .then(|| (metric(&gateway, "evergate_requests_total"), dropped(&gateway)));
        metrics.map(|(requests, dropped)| (found, dropped, requests))
    };
    let mut last = None;
    wait_until("a clerk that answers, and as many records as requests", LIMIT, || {
        last = count();
        println!("{last:?}");
        last.is_some_and(|(found, dropped, requests)| found + dropped == requests)
    });
    let records = records(state.path(), &names);
    let ids: BTreeSet<&str> = records.iter().map(|record| record["request_id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), records.len(), "one record for each request");
    let of_client: BTreeMap<&str, &Value> =
        records.iter().map(|record| (record["client_id"].as_str().unwrap(), record)).collect();
    let answered = seen.iter().filter(|(_, is_answered)| **is_answered).map(|(id, _)| id.as_str());
    let without = answered.clone().filter(|id| !of_client.contains_key(id)).count() as u64;
    for record in answered.filter_map(|id| of_client.get(id)) {
        // A worker that dies when the client has its last byte may not have noted yet that it was the last.
        let is_of_the_dead = record["cause"] == "worker_lost" && record["by_master"] == true;
        assert!(record["cause"] == "ok" || is_of_the_dead, "{record}");
    }
    let (_, dropped, requests) = last.unwrap();
    println!("{kills} kills, {requests} requests, {dropped} dropped, {without} answered without a record");
    assert!(without <= dropped, "every answered request has its record, or was counted as dropped");
    assert!(kills >= 20, "{kills}");
}
