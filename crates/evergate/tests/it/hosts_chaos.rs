//! Every process in turn is killed while models of programs are asked: each request is answered or truthfully refused, the next
//! one works, and nothing is left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, Raw, wait_until};
use rustix::process::Signal;
use serde_json::json;

use crate::hosts::{TR, ask, gateway, hosts, marked, marked_of, run_id, said};
use crate::hosts_kept::{ANSWER, model, question, section};
use crate::support::{CHAT, LIMIT, is_full, send, wait_ready};

/// Longer than the longest pause before a program that keeps dying is started again, 30 s.
const PATIENCE: Duration = Duration::from_secs(45);

const MODES: [&str; 3] = ["command", "stdio", "server"];

fn own(mode: &str) -> String {
    // A grandchild in a session of its own, another that is a daemon: what a kill must not leave.
    let steps = ["fork:setsid:hang", "fork:daemon:hang"];
    if mode == "command" { TR.to_owned() } else { section(mode, &steps, ", queue = 600") }
}

fn asked(mode: &str) -> (&'static str, &'static str, &'static str) {
    if mode == "command" { ("tiny/x", "hello", "HELLO") } else { (question(mode).0, question(mode).1, ANSWER) }
}

/// What came of a request: `ok`, an error's code, or `cut` for a connection that ended without an answer.
fn outcome(address: &str, (name, text, expected): (&str, &str, &str), is_stream: bool) -> String {
    let Ok(mut raw) = Raw::try_connect(address) else { return "refused".into() };
    let body = chat_body(name, is_stream, &json!({ "messages": [{ "role": "user", "content": text }] }));
    if raw.try_send(&post_request(CHAT, "", &body)).is_err() {
        return "cut".into();
    }
    let Ok(response) = raw.try_read_response(PATIENCE) else { return "cut".into() };
    if !response.is_complete {
        return "cut".into();
    }
    if is_stream && response.status == 200 {
        let events = response.events();
        let error = events.iter().find_map(evergate_testkit::sse::Event::error_code);
        let is_done = events.last().is_some_and(evergate_testkit::sse::Event::is_done);
        assert_eq!(is_done, error.is_none(), "a stream that lies: {}", response.text());
        let text = evergate_testkit::sse::text_of(&events);
        assert!(error.is_some() || text == expected, "{text:?}");
        return error.unwrap_or_else(|| "ok".into());
    }
    if response.status == 200 {
        assert_eq!(response.content(), expected);
        return "ok".into();
    }
    response.error_code()
}

/// Asks from four threads, while `disturb` does what it does; counts what came of it.
fn under_load(gateway: &Evergate, mode: &str, disturb: impl FnOnce()) -> BTreeMap<String, usize> {
    let (stop, address) = (AtomicBool::new(false), gateway.addr());
    let mut counts = BTreeMap::new();
    std::thread::scope(|scope| {
        let askers: Vec<_> = (0..4)
            .map(|asker| {
                let (stop, address) = (&stop, &address);
                scope.spawn(move || {
                    let mut outcomes = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        outcomes.push(outcome(address, asked(mode), asker % 2 == 1));
                    }
                    outcomes
                })
            })
            .collect();
        disturb();
        stop.store(true, Ordering::Relaxed);
        for outcome in askers.into_iter().flat_map(|asker| asker.join().unwrap()) {
            *counts.entry(outcome).or_default() += 1;
        }
    });
    counts
}

/// Answers between two kills, so that the others who ask have some too.
const ANSWERS: usize = 5;

/// Kills one after the other until the time is over; each time it waits until requests work again.
fn kill_again_and_again(gateway: &Evergate, mode: &str, victims: impl Fn() -> Vec<i32>) {
    let (began, time) = (Instant::now(), Duration::from_secs(if is_full() { 30 } else { 3 }));
    while began.elapsed() < time {
        let mut answers = 0;
        wait_until("answers", 2 * PATIENCE, || {
            answers += usize::from(outcome(&gateway.addr(), asked(mode), false) == "ok");
            answers == ANSWERS
        });
        victims().into_iter().for_each(|pid| send(pid, Signal::KILL));
    }
}

fn assert_only(counts: &BTreeMap<String, usize>, allowed: &[&str], what: &str) {
    let seen: BTreeSet<&str> = counts.keys().map(String::as_str).collect();
    let allowed: BTreeSet<&str> = allowed.iter().copied().chain(["ok"]).collect();
    assert!(seen.is_subset(&allowed), "{what}: {counts:?}");
    assert!(counts.get("ok").is_some_and(|count| *count > 3), "{what}: {counts:?}");
}

#[test]
fn killed_programs_cost_only_what_they_worked_on() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &own(mode))]);
        let victims = || match mode {
            // Whatever runs just now.
            "command" => marked(&gateway).into_iter().collect(),
            _ => model(&gateway, "tiny")["program_pid"]
                .as_i64()
                .and_then(|pid| i32::try_from(pid).ok())
                .into_iter()
                .collect(),
        };
        let counts = under_load(&gateway, mode, || kill_again_and_again(&gateway, mode, victims));
        assert_only(&counts, &["adapter_exited"], mode);
        assert_eq!(hosts(&gateway).len(), 1);
        leave_nothing(gateway, mode);
    }
}

#[test]
fn killed_hosts_take_their_programs_with_them() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &own(mode))]);
        let counts = under_load(&gateway, mode, || kill_again_and_again(&gateway, mode, || hosts(&gateway)));
        // What a dead host had is lost; it may have begun a stream.
        assert_only(&counts, &["upstream_disconnected"], mode);
        leave_nothing(gateway, mode);
    }
}

#[test]
fn killed_workers_disturb_no_host() {
    for mode in MODES {
        let gateway = gateway(&[("tiny", &own(mode))]);
        let victims = || gateway.workers().into_iter().take(1).collect();
        let counts = under_load(&gateway, mode, || kill_again_and_again(&gateway, mode, victims));
        assert_only(&counts, &["cut"], mode);
        assert!(gateway.exits().iter().all(|record| record["kind"] != "host"), "{mode}");
        leave_nothing(gateway, mode);
    }
}

#[test]
fn a_killed_master_leaves_no_program() {
    for mode in MODES {
        let mut gateway = gateway(&[("tiny", &own(mode))]);
        let (run, address) = (run_id(&gateway), gateway.addr());
        let counts = under_load(&gateway, mode, || {
            let (name, text, expected) = asked(mode);
            for _ in 0..10 {
                assert_eq!(said(&ask(&gateway, name, text, false)), expected);
            }
            send(gateway.pid(), Signal::KILL);
            wait_until("the end of the listener", LIMIT, || Raw::try_connect(&address).is_err());
        });
        assert_only(&counts, &["refused", "cut", "server_shutting_down"], mode);
        gateway.wait_exit(LIMIT);
        wait_until("the end of its programs", 2 * LIMIT, || marked_of(&run).is_empty());
        gateway.wait_no_children(2 * LIMIT);
    }
}

/// Ends the gateway, of which nothing may stay.
fn leave_nothing(mut gateway: Evergate, mode: &str) {
    let run = run_id(&gateway);
    wait_ready(&gateway, 2);
    // What was killed last may still be given one request, which is truthfully refused.
    wait_until("an answer", 2 * PATIENCE, || outcome(&gateway.addr(), asked(mode), false) == "ok");
    send(gateway.pid(), Signal::TERM);
    gateway.wait_exit(2 * LIMIT);
    assert_eq!(marked_of(&run), BTreeSet::new(), "{mode}");
}
