//! Children that die, masters that die, starts that fail.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use evergate_testkit::driver::{is_alive, state_of};
use evergate_testkit::link::Wait;
use evergate_testkit::raw::get_request;
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    CHAT, EXE, LIMIT, ONE_WORKER, assert_alive, assert_failed_stream, assert_good_stream, before, chat, echo,
    echo_with, open_as, open_stream, rest_of, send, wait_ready,
};

/// Waits until the master has no child that has ended and was not reaped.
pub fn wait_no_zombies(master: i32) {
    wait_until("no zombie under the master", LIMIT, || {
        let children = std::fs::read_to_string(format!("/proc/{master}/task/{master}/children")).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).all(|pid| state_of(pid) != Some('Z'))
    });
}

/// Opens that many streams, each with an id of its own; with ten of them each worker serves some.
fn streams(gateway: &Evergate, count: usize) -> Vec<(String, Raw)> {
    (0..count)
        .map(|n| {
            let id = format!("stream-{n}");
            let mut raw = open_as(gateway, "hold-mid", true, &format!("x-request-id: {id}\r\n"));
            assert_eq!(raw.read_head(LIMIT).status, 200);
            assert!(raw.next_event(LIMIT).is_some());
            (id, raw)
        })
        .collect()
}

/// H3.
#[test]
fn a_killed_worker_is_replaced_and_the_record_names_what_was_lost() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let mut open = streams(&gateway, 10);
    let (old, killed_at) = (gateway.workers(), Instant::now());
    let pid = gateway.kill_worker(0);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!((&record["signal"], &record["code"], &record["core"]), (&json!(9), &Value::Null, &json!(false)));
    assert_eq!((&record["kind"], &record["initiator"]), (&json!("worker"), &json!("unknown")), "{record}");
    assert!(record["rss_max_kib"].as_u64().unwrap() > 0 && record["last_beat_ms"].is_u64(), "{record}");
    let lost = lost_ids(&record);

    let workers = wait_for("a replacement", LIMIT, || {
        let workers = gateway.workers();
        (workers.len() == 2 && !workers.contains(&pid)).then_some(workers)
    });
    assert!(workers.contains(&old[1]), "the other worker was left alone");
    assert!(killed_at.elapsed() < Duration::from_secs(5), "{:?}", killed_at.elapsed());

    fake.release();
    let mut cut = Vec::new();
    for (id, raw) in &mut open {
        let events = rest_of(raw);
        if raw.body_is_complete() {
            assert_good_stream(&events, true);
        } else {
            cut.push(id.clone());
        }
    }
    cut.sort_unstable();
    assert_eq!(cut, lost, "what the clients lost and what the record says");
    assert!(!cut.is_empty() && cut.len() < 10, "the gate spreads streams over both workers: {cut:?}");
    for lost in record["lost"].as_array().unwrap() {
        assert_eq!((&lost["route"], &lost["phase"]), (&json!("/v1/chat/completions"), &json!("stream")), "{lost}");
    }
    wait_no_zombies(gateway.pid());
}

/// H3: a request counts from its head on; what comes before the upstream is called is lost too.
#[test]
fn a_request_whose_body_was_being_read_is_named_too() {
    let gateway = echo_with(ONE_WORKER);
    let mut raw = Raw::connect(&gateway.addr());
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-request-id: in-body\r\nexpect: 100-continue\r\n\
         content-length: 1000\r\n\r\n"
    );
    raw.send(head.as_bytes());
    // The worker asks for the body, so it has read the head.
    assert_eq!(raw.link().wait(Instant::now() + LIMIT), Wait::Data);
    raw.send(b"{\"model\"");
    let pid = gateway.kill_worker(0);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid).remove(0);
    assert_eq!(lost_ids(&record), ["in-body"], "{record}");
    assert_eq!(record["lost"][0]["phase"], "body", "{record}");
    assert_eq!(gateway.wait_access("in-body", LIMIT)["cause"], "worker_lost");
}

/// The clients' ids in an exit record, sorted.
pub fn lost_ids(record: &Value) -> Vec<String> {
    ids_of(record, "lost")
}

/// The clients' ids in a list of an exit record.
pub fn ids_of(record: &Value, list: &str) -> Vec<String> {
    let requests = record[list].as_array().unwrap();
    let mut ids: Vec<String> = requests.iter().map(|one| one["client_id"].as_str().unwrap().to_owned()).collect();
    ids.sort_unstable();
    ids
}

/// The queue in front of a worker is not its own: with the only worker gone, connections wait for the next one.
#[test]
fn no_connection_is_refused_while_the_only_worker_is_replaced() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    for _ in 0..3 {
        let pid = gateway.wait_workers(1)[0];
        gateway.kill_worker(0);
        for _ in 0..5 {
            assert_eq!(chat(&gateway, "ok", false).status, 200);
        }
        let _ = gateway.wait_exits(1, LIMIT, |record| record["pid"] == pid);
        wait_until("another worker", LIMIT, || gateway.workers().first().is_some_and(|next| *next != pid));
    }
}

#[test]
fn a_killed_clerk_is_replaced_and_metrics_come_back() {
    let gateway = echo();
    assert_alive(&gateway);
    let admin = gateway.admin();
    let clerk = gateway.children().into_iter().find(|child| child.kind == "clerk").unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(clerk.pid).unwrap(), Signal::KILL).unwrap();
    let _ = gateway.wait_exits(1, LIMIT, |record| record["pid"] == clerk.pid && record["signal"] == 9);
    assert_alive(&gateway);
    wait_until("metrics at the same address", LIMIT, || {
        let Ok(mut raw) = Raw::try_connect(&admin) else { return false };
        raw.send(&get_request("/metrics", ""));
        raw.try_read_response(Duration::from_secs(5)).is_ok_and(|response| response.status == 200)
    });
    assert!(gateway.metrics().contains("evergate_requests_total"), "{}", gateway.metrics());
}

/// What children are never told by a terminal: a Ctrl-C reaches every process of it.
#[test]
fn workers_ignore_a_terminals_signals() {
    let gateway = echo();
    let workers = gateway.workers();
    for child in gateway.children() {
        let pid = rustix::process::Pid::from_raw(child.pid).unwrap();
        for signal in [Signal::INT, Signal::HUP] {
            rustix::process::kill_process(pid, signal).unwrap();
        }
    }
    for _ in 0..10 {
        assert_alive(&gateway);
    }
    assert_eq!(gateway.workers(), workers);
    assert!(gateway.exits().is_empty());
}

/// H12, I1, I7: no child is left after the drain time, and the next start works at once, on the same port.
#[test]
fn a_killed_master_leaves_nothing_and_the_next_start_works_at_once() {
    let fake = FakeUpstream::start();
    let state = tempfile::tempdir().unwrap();
    let config = |port: &str| {
        gateway_config(fake.base_url(), &[], "[shutdown]\ndrain = \"2s\"\ncancel = \"500ms\"\ncleanup = \"500ms\"\n")
            .replacen("127.0.0.1:0", &format!("127.0.0.1:{port}"), 1)
    };
    let mut first = Evergate::builder(EXE).config(config("0")).state_dir(state.path()).start();
    let (address, pid) = (first.addr(), first.pid());
    let port = address.rsplit(':').next().unwrap().to_owned();
    let mut finishing = open_stream(&first, "stream-10-50");
    let mut held = open_stream(&first, "hold-mid");
    first.signal(Signal::KILL);
    let _ = first.wait_exit(LIMIT);

    let began = Instant::now();
    let second = Evergate::builder(EXE).config(config(&port)).state_dir(state.path()).start();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    assert_eq!(second.addr(), address);
    assert_eq!(chat(&second, "ok", false).status, 200);
    first.wait_no_children(LIMIT);
    let record = second.wait_exits(1, LIMIT, |record| record["kind"] == "master").remove(0);
    assert_eq!(record["pid"], pid);
    // Each stream ended in order: the short one with its end, the other at the latest when the drain was over.
    assert_good_stream(&rest_of(&mut finishing), finishing.body_is_complete());
    let events = rest_of(&mut held);
    assert!(!events.iter().any(|event| event.is_done()));
    wait_no_zombies(second.pid());
}

/// I1: a worker that stands still does not see that its master is gone, and keeps the port: the next start ends it.
#[test]
fn i1_a_frozen_orphan_does_not_keep_the_port() {
    let state = tempfile::tempdir().unwrap();
    let config = |address: &str| {
        format!(
            "[server]\nlisten = [\"{address}\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
             [models.echo]\ntargets = [{{ upstream = \"echo\" }}]\n{ONE_WORKER}"
        )
    };
    let mut first = Evergate::builder(EXE).config(config("127.0.0.1:0")).state_dir(state.path()).start();
    let (address, worker) = (first.addr(), first.workers()[0]);
    let frozen = crate::balance::Frozen::new(worker);
    first.signal(Signal::KILL);
    let _ = first.wait_exit(LIMIT);
    let second = Evergate::builder(EXE).config(config(&address)).state_dir(state.path()).start();
    assert_eq!(second.addr(), address);
    assert_alive(&second);
    let record = second.wait_exits(1, LIMIT, |record| record["pid"] == worker).remove(0);
    assert_eq!((&record["kind"], &record["initiator"]), (&json!("worker"), &json!("orphan")), "{record}");
    assert!(!is_alive(worker));
    drop(frozen);
}

#[test]
fn without_its_master_a_worker_refuses_and_finishes() {
    let fake = FakeUpstream::start();
    let gateway_text =
        gateway_config(fake.base_url(), &[], "[shutdown]\ndrain = \"10s\"\ncancel = \"500ms\"\ncleanup = \"500ms\"\n");
    let mut gateway = Evergate::builder(EXE).config(gateway_text).start();
    let address = gateway.addr();
    let mut held = open_stream(&gateway, "hold-mid");
    let children = gateway.children();
    gateway.signal(Signal::KILL);
    let _ = gateway.wait_exit(LIMIT);
    wait_until("connects refused", LIMIT, || Raw::try_connect(&address).is_err());
    fake.release();
    assert_good_stream(&rest_of(&mut held), held.body_is_complete());
    drop(held);
    // All requests are done: nobody waits for the drain to run out.
    let began = Instant::now();
    gateway.wait_no_children(LIMIT);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(children.iter().all(|child| !is_alive(child.pid)));
}

/// I6.
#[test]
fn a_second_start_on_one_state_folder_exits_71() {
    let state = tempfile::tempdir().unwrap();
    let first = Evergate::builder(EXE).state_dir(state.path()).start();
    let ended = Evergate::builder(EXE).state_dir(state.path()).try_start().err().unwrap();
    assert_eq!(ended.code(), 71, "{}", ended.stderr);
    assert!(ended.stderr.contains(&first.pid().to_string()), "who holds it: {}", ended.stderr);
    assert_alive(&first);
}

#[test]
fn a_taken_port_exits_71_and_leaves_nothing() {
    let first = echo();
    let address = first.addr();
    let config = format!(
        "[server]\nlisten = [\"127.0.0.1:0\", \"{address}\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
         [models.echo]\ntargets = [{{ upstream = \"echo\" }}]\n"
    );
    let state = tempfile::tempdir().unwrap();
    let ended = Evergate::builder(EXE).config(config).state_dir(state.path()).try_start().err().unwrap();
    assert_eq!(ended.code(), 71, "{}", ended.stderr);
    assert!(ended.stderr.contains(&address), "{}", ended.stderr);
    assert!(!state.path().join("run.json").exists());
    assert!(!state.path().join("control.sock").exists());
    assert_alive(&first);
    // The folder can be used again at once.
    assert_alive(&Evergate::builder(EXE).state_dir(state.path()).start());
}

/// Who was started with CHLD ignored has that from its parent: the kernel would keep no child's end.
#[test]
fn a_parent_that_ignores_chld_is_no_trouble() {
    let wrapper = ["env", "--ignore-signal=CHLD"];
    let mut gateway = Evergate::builder(EXE).wrapper(&wrapper).start();
    wait_ready(&gateway, 2);
    let dead = gateway.kill_worker(0);
    let record = gateway.wait_exits(1, LIMIT, |record| record["pid"] == dead).remove(0);
    assert_eq!(record["signal"], 9, "{record}");
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0));
}

/// Standard error that takes nothing (a full disk, a reader that is dead) costs words, and no process.
#[test]
fn i12_a_standard_error_that_fails_ends_no_worker() {
    let fake = FakeUpstream::start();
    let wrapper = ["/bin/sh", "-c", "exec \"$@\" 2>/dev/full", "sh"];
    let config = gateway_config(fake.base_url(), &[], "[shutdown]\ndrain = \"300ms\"\n");
    let gateway = Evergate::builder(EXE).config(config).wrapper(&wrapper).start();
    wait_ready(&gateway, 2);
    let mut held = open_stream(&gateway, "hold-mid");
    let pids = gateway.workers();
    pids.iter().for_each(|pid| send(*pid, Signal::TERM));
    assert_failed_stream(&rest_of(&mut held), held.body_is_complete(), "server_shutting_down");
    let records = gateway.wait_exits(2, LIMIT, |record| pids.iter().any(|pid| record["pid"] == *pid));
    assert!(records.iter().all(|record| record["code"] == 0 && record["panic"].is_null()), "{records:?}");
    let said = records.iter().filter(|record| record["note"] == "drain ran out: 1 request was ended");
    assert_eq!(said.count(), 1, "{records:?}");
}

/// What a host says of a program's confinement nobody hears; the program runs all the same.
#[test]
fn i12_a_standard_error_that_fails_ends_no_host() {
    let wrapper = ["/bin/sh", "-c", "exec \"$@\" 2>/dev/full", "sh"];
    let process = r#"process = { mode = "command", argv = ["cat"], sandbox = { read = ["/"] } }"#;
    let gateway = Evergate::builder(EXE).config(crate::hosts::config(&[("tiny", process)])).wrapper(&wrapper).start();
    wait_ready(&gateway, 2);
    assert_eq!(crate::hosts::said(&crate::hosts::ask(&gateway, "tiny/x", "x", false)), "x");
    assert!(gateway.exits().iter().all(|record| record["kind"] != "host"), "{:?}", gateway.exits());
}

/// A logrotate that knows the processes by their name only, say.
#[test]
fn signals_that_are_the_masters_end_no_child_and_programs_find_theirs_at_the_default() {
    let own = r#"process = { mode = "command", argv = ["grep", "Sig[BI]", "/proc/self/status"] }"#;
    let gateway = crate::hosts::gateway(&[("tiny", own)]);
    let default = format!("SigBlk:\t{0:016x}\nSigIgn:\t{0:016x}", 0);
    assert_eq!(crate::hosts::said(&crate::hosts::ask(&gateway, "tiny/x", "x", false)), default);
    let children = || gateway.children().into_iter().map(|child| (child.kind, child.pid)).collect::<BTreeSet<_>>();
    let before = children();
    assert_eq!(before.iter().map(|(kind, _)| kind.as_str()).collect::<Vec<_>>(), ["clerk", "host", "worker", "worker"]);
    for signal in [Signal::USR1, Signal::USR2] {
        before.iter().for_each(|(_, pid)| send(*pid, signal));
    }
    for _ in 0..8 {
        assert_eq!(crate::hosts::said(&crate::hosts::ask(&gateway, "tiny/x", "x", false)), default);
    }
    assert!(gateway.metrics().contains("evergate_workers"), "the clerk is there");
    assert_eq!(children(), before);
    assert_eq!(gateway.exits().len(), 0);
}
