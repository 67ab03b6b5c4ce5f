//! A worker that runs short of descriptors keeps serving: it takes no more connections than it can serve (J2), and when
//! accepting fails all the same it does not spin, serves what it has, and makes room (J1).

use std::time::{Duration, Instant};

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, Raw, wait_until};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT};

const TEXT: &str = "[server]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = \"127.0.0.1:0\"\n\
                    [models.echo]\ntargets = [{ upstream = \"echo\" }]\n[workers]\nmin = 1\nmax = 1\nslots = 32\n";

fn send(raw: &mut Raw) {
    raw.send(&post_request(CHAT, "", &chat_body("echo", false, &Value::Null)));
}

fn metric(gateway: &Evergate, name: &str) -> u64 {
    let text = gateway.metrics();
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap_or_else(|| {
        panic!("{name} in {text}");
    })
}

fn connections(gateway: &Evergate) -> u64 {
    let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap();
    let children = status["children"].as_array().unwrap();
    children.iter().find(|child| child["kind"] == "worker").unwrap()["connections"].as_u64().unwrap()
}

/// User and system time of a process, in clock ticks of 10 ms.
fn ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    rest.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

#[test]
fn j2_no_more_connections_are_taken_than_there_are_descriptors_for() {
    // 160, of which 64 are the worker's own and 32 for upstreams.
    let limit = ["/bin/sh", "-c", "ulimit -n 160; exec \"$@\"", "sh"];
    let gateway = Evergate::builder(EXE).config(TEXT).wrapper(&limit).start();
    let said = gateway.wait_stderr("warning: a process may have 160 open files here", LIMIT);
    assert!(said.contains("may need 4192") && said.contains("it takes 64 connections at a time"), "{said}");
    wait_until("no connection of the start", LIMIT, || connections(&gateway) == 0);
    let mut clients: Vec<Raw> = (0..100).map(|_| Raw::connect(&gateway.addr())).collect();
    clients.iter_mut().for_each(send);
    wait_until("64 connections", LIMIT, || connections(&gateway) == 64);
    for client in &mut clients[..64] {
        assert_eq!(client.read_response(LIMIT).status, 200);
    }
    assert_eq!(connections(&gateway), 64);
    // Whoever waited is served when others go.
    for client in &mut clients.split_off(64) {
        assert_eq!(metric(&gateway, "evergate_accept_failures_total"), 0);
        clients.truncate(clients.len() - 1);
        assert_eq!(client.read_response(LIMIT).status, 200);
    }
}

/// The limit that leaves a process so many descriptors: it is one of their numbers, not of how many are open.
fn below_which_are_free(pid: i32, free: usize) -> u64 {
    let names = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().file_name());
    let open: Vec<u64> = names.map(|name| name.to_str().unwrap().parse().unwrap()).collect();
    (0..).filter(|number| !open.contains(number)).nth(free).unwrap()
}

#[test]
fn j1_a_worker_without_a_descriptor_left_does_not_spin_and_makes_room() {
    let gateway = Evergate::builder(EXE).config(TEXT).start();
    let pid = gateway.workers()[0];
    wait_until("no connection of the start", LIMIT, || connections(&gateway) == 0);
    let set = |current| {
        // It has inherited ours, raised.
        let maximum = getrlimit(Resource::Nofile).maximum;
        let _ = prlimit(Pid::from_raw(pid), Resource::Nofile, Rlimit { current, maximum }).unwrap();
    };
    set(Some(below_which_are_free(pid, 3)));
    let connect = |count| -> Vec<Raw> { (0..count).map(|_| Raw::connect(&gateway.addr())).collect() };
    let mut clients = connect(3);
    for client in &mut clients {
        send(client);
        assert_eq!(client.read_response(LIMIT).status, 200);
    }
    let mut waiting = connect(9);
    waiting.iter_mut().for_each(send);
    wait_until("an accept that failed", LIMIT, || metric(&gateway, "evergate_accept_failures_total") > 0);
    let (began, before) = (Instant::now(), ticks(pid));
    wait_until("a second of it", LIMIT, || began.elapsed() > Duration::from_secs(1));
    let used = ticks(pid) - before;
    assert!(used < 30, "{used} of 100 ticks");
    // What it has goes on, and is told to make room; whoever waits is served then.
    for client in &mut clients {
        send(client);
        let response = client.read_response(LIMIT);
        assert_eq!((response.status, response.header("connection")), (200, Some("close")));
    }
    for client in &mut waiting {
        assert_eq!(client.read_response(LIMIT).status, 200);
    }
    set(Some(1024));
    let mut last = Raw::connect(&gateway.addr());
    send(&mut last);
    assert_eq!(last.read_response(LIMIT).status, 200);
    assert_eq!(gateway.workers(), [pid]);
}

/// H9: a worker that loses descriptors is replaced before it has none left, by one that is ready before it goes.
#[test]
fn h9_a_worker_that_loses_descriptors_is_replaced() {
    let limit = ["/bin/sh", "-c", "ulimit -n 512; exec \"$@\"", "sh"];
    let gateway = Evergate::builder(EXE).config(TEXT).env("EVERGATE_FAULT", "1").wrapper(&limit).start();
    let pid = gateway.workers()[0];
    let ask = |fields: &str| {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&post_request(CHAT, fields, &chat_body("echo", false, &Value::Null)));
        raw.read_response(LIMIT).status
    };
    let of_worker = || metric(&gateway, "evergate_worker_descriptors");
    wait_until("its own are seen", LIMIT, || of_worker() > 0);
    // Connections are none of those, as long as they are open: no more than the worker takes.
    let kept: Vec<Raw> = (0..150).map(|_| Raw::connect(&gateway.addr())).collect();
    wait_until("the connections are seen", LIMIT, || of_worker() > 150);
    assert_eq!(ask("x-evergate-fault: lose-80\r\n"), 200);
    wait_until("the lost ones are seen", LIMIT, || of_worker() > 230);
    drop(kept);
    assert_eq!(ask("x-evergate-fault: lose-30\r\n"), 200);
    // Not in its first ten seconds.
    let gone = gateway.wait_exits(1, 2 * LIMIT, |record| record["initiator"] == "descriptors");
    assert_eq!((&gone[0]["pid"], &gone[0]["code"], &gone[0]["lost"]), (&json!(pid), &json!(0), &json!([])), "{gone:?}");
    assert_eq!(ask(""), 200);
    assert_ne!(gateway.wait_workers(1), [pid]);
}
