//! A worker that runs short of descriptors keeps serving: it takes no more connections than it can serve (J2), and when
//! accepting fails all the same it does not spin, serves what it has, and makes room (J1).

use std::time::{Duration, Instant};

use evergate_testkit::link::Gone;
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use crate::h2_wire::{ALL, PING, Wire};
use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, before, echo_with, open, open_stream, rest_of};

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

/// A used connection that has been idle since then.
fn used(gateway: &Evergate) -> (Raw, Instant) {
    let mut raw = Raw::connect(&gateway.addr());
    send(&mut raw);
    assert_eq!(raw.read_response(LIMIT).status, 200);
    (raw, Instant::now())
}

fn wait_idle(since: Instant, time: Duration) {
    wait_until("so long idle", LIMIT, || since.elapsed() > time);
}

/// A10: all places are taken and somebody waits: the connection that has been idle the longest ends, one that was active a
/// moment ago does not, nor one with a request under way.
#[test]
fn a10_the_oldest_idle_connection_makes_room_for_who_waits() {
    let fake = FakeUpstream::start();
    let more = format!("{ONE_WORKER}[limits]\nconnections = 3\n");
    let gateway = before(&fake, &more);
    wait_until("no connection of the start", LIMIT, || connections(&gateway) == 0);
    let used = || {
        let mut raw = open(&gateway, "ok", false);
        assert_eq!(raw.read_response(LIMIT).status, 200);
        (raw, Instant::now())
    };
    let mut busy = open_stream(&gateway, "hold-mid");
    let (mut oldest, since) = used();
    wait_idle(since, Duration::from_millis(2_300));
    let (mut young, _) = used();
    let began = Instant::now();
    let mut waiting = open(&gateway, "ok", false);
    assert_eq!(waiting.read_response(LIMIT).status, 200);
    // In place of 75 s.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let (bytes, gone) = oldest.read_to_close(LIMIT);
    assert_eq!((bytes.len(), gone), (0, Gone::Eof));
    young.send(&post_request(CHAT, "", &chat_body("fake/ok", false, &Value::Null)));
    assert_eq!(young.read_response(LIMIT).status, 200);
    fake.release();
    assert!(rest_of(&mut busy).last().unwrap().is_done());
    wait_until("it is counted", LIMIT, || metric(&gateway, "evergate_client_connections_shed_total") == 1);
}

/// The same for HTTP/2, by GOAWAY.
#[test]
fn a10_an_idle_http2_connection_makes_room_in_order() {
    let gateway = echo_with(&format!("{ONE_WORKER}[limits]\nconnections = 1\n"));
    wait_until("no connection of the start", LIMIT, || connections(&gateway) == 0);
    let mut wire = Wire::connect(&gateway);
    wire.get(1);
    let _ = wire.answer(1);
    wait_idle(Instant::now(), Duration::from_millis(2_300));
    let (_second, _) = used(&gateway);
    // In two steps; the second one comes though nobody has answered the PING of the first.
    assert_eq!(wire.goaway(), ALL);
    let _ = wire.skip_to(PING);
    assert_eq!(wire.goaway(), 1);
}

/// J1: without a descriptor left the idle ones go, and whoever waits is served though nobody sends anything.
#[test]
fn j1_idle_connections_end_when_there_is_no_descriptor_left() {
    let gateway = Evergate::builder(EXE).config(TEXT).start();
    let pid = gateway.workers()[0];
    wait_until("no connection of the start", LIMIT, || connections(&gateway) == 0);
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current: Some(below_which_are_free(pid, 3)), maximum };
    let _ = prlimit(Pid::from_raw(pid), Resource::Nofile, limit).unwrap();
    let mut idle: Vec<_> = (0..3).map(|_| used(&gateway)).collect();
    wait_idle(idle[2].1, Duration::from_millis(2_300));
    let mut waiting = Raw::connect(&gateway.addr());
    send(&mut waiting);
    assert_eq!(waiting.read_response(LIMIT).status, 200);
    for (raw, _) in &mut idle {
        assert_eq!(raw.read_to_close(LIMIT), (Vec::new(), Gone::Eof));
    }
    wait_until("they are counted", LIMIT, || metric(&gateway, "evergate_client_connections_shed_total") == 3);
    assert_eq!(gateway.workers(), [pid]);
}
