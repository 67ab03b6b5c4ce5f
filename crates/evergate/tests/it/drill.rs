//! The kill drill, lines 2 and 3 of the specification of supervision: under load workers are killed again and again, and
//! what the clients lost is exactly what the records say; and nothing where the worker was idle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::driver::{Tail, state_of};
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Child, Evergate, FakeUpstream, Raw, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::h2_wire::{DATA, END, GOAWAY, HEADERS, PING, RESET, Wire};
use crate::processes::{ids_of, lost_ids, wait_no_zombies};
use crate::support::{CHAT, LIMIT, before, echo_with, is_full, send, via, wait_ready};

/// Clients that ask one unary request after the other, about 200 ms each: about 200 requests a second.
const CLIENTS: usize = 42;
/// Streams that are open at any time.
const STREAMS: usize = 20;
/// How and when a client lost a request.
#[derive(Debug)]
struct Failure {
    at: Instant,
    /// None when not a byte of an answer came.
    answer: Option<String>,
}

/// What the clients saw.
#[derive(Default)]
pub struct Seen {
    is_over: AtomicBool,
    pub done: AtomicUsize,
    failed: Mutex<BTreeMap<String, Failure>>,
    refused: Mutex<Vec<String>>,
    wrong: Mutex<Vec<String>>,
}

impl Seen {
    fn fail(&self, id: String, answer: Option<String>) {
        self.failed.lock().unwrap().insert(id, Failure { at: Instant::now(), answer });
    }
}

/// A client: asks a model until the drill is over. Its number makes its ids.
type Ask = fn(&str, usize, (&str, bool), &Seen);

/// Each time with a connection of its own.
pub fn client(address: &str, number: usize, (model, stream): (&str, bool), seen: &Seen) {
    let mut count = 0;
    while !seen.is_over.load(Ordering::Relaxed) {
        let id = format!("drill-{number}-{count}");
        count += 1;
        let mut raw = match Raw::try_connect(address) {
            Ok(raw) => raw,
            Err(error) => {
                seen.refused.lock().unwrap().push(format!("{id}: {error}"));
                continue;
            }
        };
        let request = post_request(CHAT, &format!("x-request-id: {id}\r\n"), &chat_body(model, stream, &Value::Null));
        // Read also when it could not be sent: what was said before is still there.
        let _ = raw.try_send(&request);
        let response = raw.try_read_response(3 * LIMIT);
        match response {
            Ok(response) if !response.is_complete => {
                seen.fail(id, Some("cut in the body".to_owned()));
            }
            Ok(response) if response.status == 200 && !response.text().contains("\"error\"") => {
                seen.done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(response) => seen.wrong.lock().unwrap().push(format!("{id}: {} {}", response.status, response.text())),
            Err(reason) => {
                let is_silent = reason.ends_with("before a response head; got \"\"");
                seen.fail(id, (!is_silent).then_some(reason));
            }
        }
    }
}

/// Over HTTP/2, one request behind the other on a connection for as long as it is kept.
fn client_h2(address: &str, number: usize, (model, stream): (&str, bool), seen: &Seen) {
    let (mut count, mut kept) = (0, None);
    while !seen.is_over.load(Ordering::Relaxed) {
        let id = format!("drill-{number}-{count}");
        let (mut wire, at) = match kept.take().map_or_else(|| Wire::try_connect(address).map(|wire| (wire, 1)), Ok) {
            Ok(found) => found,
            Err(error) => {
                seen.refused.lock().unwrap().push(format!("{id}: {error}"));
                continue;
            }
        };
        wire.post_as(at, &id, &chat_body(model, stream, &Value::Null));
        let (is_leaving, told) = read_h2(&mut wire, at);
        match told {
            // It was not looked at, and is asked again.
            Told::Unseen => continue,
            Told::Whole(text) if !text.contains("\"error\"") => {
                seen.done.fetch_add(1, Ordering::Relaxed);
                kept = (!is_leaving).then_some((wire, at + 2));
            }
            Told::Whole(text) => seen.wrong.lock().unwrap().push(format!("{id}: {text}")),
            Told::Cut(answer) => seen.fail(id, answer),
        }
        count += 1;
    }
}

/// What came of a request over HTTP/2.
enum Told {
    /// Its answer.
    Whole(String),
    /// The connection's end, and before that what there was of an answer.
    Cut(Option<String>),
    /// The connection was ending when it came.
    Unseen,
}

/// Reads one stream, and whether its connection is to end behind it.
fn read_h2(wire: &mut Wire, stream: u32) -> (bool, Told) {
    let (mut is_leaving, mut head, mut body) = (false, None, Vec::new());
    loop {
        let frame = match wire.next_within(3 * LIMIT) {
            Ok(Some(frame)) => frame,
            gone => {
                let begun = head.map(|head: bool| format!("{head} {} {gone:?}", String::from_utf8_lossy(&body)));
                return (true, Told::Cut(begun));
            }
        };
        match frame.kind {
            GOAWAY => {
                is_leaving = true;
                if u32::from_be_bytes(frame.payload[..4].try_into().unwrap()) < stream {
                    return (true, Told::Unseen);
                }
            }
            PING if frame.flags & END == 0 => wire.send(PING, END, 0, &frame.payload),
            // ":status 200" is entry 8.
            HEADERS => head = Some(frame.payload[0] == 0x88),
            DATA => body.extend(&frame.payload),
            _ => {}
        }
        if frame.stream == stream && (frame.kind == RESET || frame.flags & END != 0) {
            let text = String::from_utf8_lossy(&body).into_owned();
            let is_good = head == Some(true) && frame.kind != RESET;
            return (is_leaving, Told::Whole(if is_good { text } else { format!("\"error\": {frame:?} {text}") }));
        }
    }
}

/// One kill: when, of whom, and what is on record of it.
pub struct Kill {
    at: Instant,
    pub record: Value,
}

/// The gateway's worker of that slot. By its number within the run, since a process id may come again.
fn worker(gateway: &Evergate, slot: usize) -> Option<Child> {
    gateway.children().into_iter().find(|child| child.kind == "worker" && child.slot == slot as u64)
}

/// Waits until another worker has the place of that one and is ready, and returns the record of its end.
fn wait_replaced(gateway: &Evergate, tail: &mut Tail, dead: &Child, count: usize) -> Value {
    let mut record = None;
    wait_until("its record", 3 * LIMIT, || {
        record = record.take().or_else(|| tail.read().into_iter().find(|record| record["epoch"] == dead.epoch));
        record.is_some()
    });
    wait_until("the replacement", 3 * LIMIT, || {
        worker(gateway, usize::try_from(dead.slot).unwrap()).is_some_and(|next| next.epoch != dead.epoch)
    });
    wait_ready(gateway, count);
    record.unwrap()
}

/// Kills workers in turn, each time after the last one's replacement serves and the load has gone on for a while.
pub fn kill_all(gateway: &Evergate, seen: &Seen, kills: usize, lost: &mut Vec<String>) -> Vec<Kill> {
    let (mut exits, mut access) = (gateway.follow_exits(), gateway.follow_access());
    let mut killed = Vec::new();
    for round in 0..kills {
        let before = seen.done.load(Ordering::Relaxed);
        wait_until("load between two kills", 3 * LIMIT, || seen.done.load(Ordering::Relaxed) >= before + 60);
        // Not at the moment when an answer came and its client asks again: a killer does not know of either.
        let (now, pause) = (Instant::now(), Duration::from_millis(7 * (round as u64 % 12) + 5));
        wait_until("a moment of its own", LIMIT, || now.elapsed() >= pause);
        let at = Instant::now();
        let dead = worker(gateway, round % 2).expect("a worker to kill");
        send(dead.pid, Signal::KILL);
        killed.push(Kill { at, record: wait_replaced(gateway, &mut exits, &dead, 2) });
        lost.extend(lines_of_lost(&mut access));
    }
    // Each lost request has its line, written on its behalf.
    let named: usize = killed.iter().map(|kill| lost_ids(&kill.record).len()).sum();
    wait_until("the access records of all that was lost", LIMIT, || {
        lost.extend(lines_of_lost(&mut access));
        lost.len() >= named
    });
    killed
}

/// The clients' ids in the access records that were written for dead workers since the last look.
fn lines_of_lost(access: &mut Tail) -> Vec<String> {
    let mut lines = access.read();
    lines.retain(|line| line["cause"] == "worker_lost");
    assert!(lines.iter().all(|line| line["status"] == 0), "{lines:?}");
    lines.iter().map(|line| line["client_id"].as_str().unwrap().to_owned()).collect()
}

/// Whose last bytes were on their way may have them or not, and is in the record as that. Who is in no record had sent bytes that nobody had read: each the only one on its connection (see `client`), none with a
/// byte of an answer, and at each kill no more than its record counts connections without a request.
fn check_unnamed(killed: &[Kill], failed: &BTreeMap<String, Failure>, named: &BTreeSet<String>) {
    let unnamed: Vec<_> = failed.iter().filter(|(id, _)| !named.contains(*id)).collect();
    let ending: BTreeSet<String> = killed.iter().flat_map(|kill| ids_of(&kill.record, "ending")).collect();
    let (cut, unnamed): (Vec<_>, Vec<_>) = unnamed.into_iter().partition(|(id, _)| ending.contains(*id));
    assert!(cut.len() <= 1 + killed.len() / 100, "a rare one of them has not got its last bytes: {cut:?}");
    let begun: Vec<_> = unnamed.iter().filter(|(_, failure)| failure.answer.is_some()).collect();
    assert!(begun.is_empty(), "in no record, though not for want of being read: {begun:?}");
    let early: Vec<_> = unnamed.iter().filter(|(_, failure)| failure.at < killed[0].at).collect();
    assert!(early.is_empty(), "failed before anything was killed: {early:?}");
    for (index, kill) in killed.iter().enumerate() {
        let next = killed.get(index + 1).map(|next| next.at);
        let is_of_this = |failure: &Failure| failure.at >= kill.at && next.is_none_or(|next| failure.at < next);
        let ids: Vec<_> = unnamed.iter().filter(|(_, failure)| is_of_this(failure)).map(|(id, _)| id).collect();
        let idle = kill.record["connections_idle"].as_u64().unwrap();
        assert!(ids.len() as u64 <= idle, "more than {idle} are in no record: {ids:?}; {}", kill.record);
    }
    println!("{} of {} failures were of requests that nobody had read", unnamed.len(), failed.len());
}

/// Runs `drill` beside clients, each given by its model and whether it wants streams, which end with it, also when it
/// panics.
pub fn beside<T>(address: &str, seen: &Seen, (ask, clients): (Ask, &[(String, bool)]), drill: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        for (number, (model, stream)) in clients.iter().enumerate() {
            scope.spawn(move || ask(address, number, (model, *stream), seen));
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(drill));
        seen.is_over.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn s02_killed_workers_lose_exactly_what_their_records_name() {
    drill(client, if is_full() { 1000 } else { 30 });
}

#[test]
fn s02_killed_workers_lose_exactly_what_their_records_name_over_http2() {
    drill(client_h2, if is_full() { 1000 } else { 10 });
}

fn drill(ask: Ask, kills: usize) {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    wait_ready(&gateway, 2);
    let (address, seen) = (gateway.addr(), Seen::default());
    let (began, mut lines) = (Instant::now(), Vec::new());
    // Each with a pace of its own, or all would ask in step.
    let unary = (0..CLIENTS).map(|number| (via(&format!("delay-{}", 180 + number)), false));
    let streams = (0..STREAMS).map(|number| (via(&format!("stream-30-{}", 40 + number)), true));
    let clients: Vec<_> = unary.chain(streams).collect();
    let killed = beside(&address, &seen, (ask, &clients), || kill_all(&gateway, &seen, kills, &mut lines));
    let done = seen.done.load(Ordering::Relaxed);
    let failed = seen.failed.into_inner().unwrap();
    let rate = done as f64 / began.elapsed().as_secs_f64();
    println!("{done} answered ({rate:.0}/s), {} lost to {kills} kills, {:?}", failed.len(), began.elapsed());

    assert!(killed.iter().all(|kill| kill.record["signal"] == 9 && kill.record["initiator"] == "unknown"));
    let ends = format!("evergate_exits_total{{kind=\"worker\",initiator=\"unknown\"}} {kills}\n");
    assert!(gateway.metrics().contains(&ends), "nobody else died: {}", gateway.metrics());
    assert_eq!(seen.refused.into_inner().unwrap(), Vec::<String>::new(), "refused connects");
    assert_eq!(seen.wrong.into_inner().unwrap(), Vec::<String>::new(), "answers that are neither right nor cut");
    let all: Vec<String> = killed.iter().flat_map(|kill| lost_ids(&kill.record)).collect();
    let named: BTreeSet<String> = all.iter().cloned().collect();
    assert_eq!(named.len(), all.len(), "each in one record");
    let unfelt: Vec<&String> = named.iter().filter(|id| !failed.contains_key(*id)).collect();
    assert!(unfelt.is_empty(), "in a record but answered: {unfelt:?}");
    check_unnamed(&killed, &failed, &named);
    assert!(named.len() > kills, "kills under load that nobody felt are no drill");
    lines.sort_unstable();
    assert_eq!(lines, named.into_iter().collect::<Vec<_>>(), "one access record for each, and for nobody else");

    wait_no_zombies(gateway.pid());
    let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap();
    let children = status["children"].as_array().unwrap();
    let shown = children.iter().filter(|child| child["kind"] == "worker").map(|child| child["pid"].as_i64().unwrap());
    let running = gateway.wait_workers(2).into_iter().map(i64::from);
    assert_eq!(shown.collect::<BTreeSet<_>>(), running.collect(), "status shows the replacements");
}

/// Sockets among the descriptors of a process.
fn sockets(pid: i32) -> usize {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .map(|entries| entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect::<Vec<_>>());
    links.unwrap_or_default().iter().filter(|link| link.to_string_lossy().starts_with("socket:")).count()
}

/// Kills the worker of a slot while it has no connection. What it has can only be known while it stands still: between
/// a look and a kill a running one would accept the next.
fn kill_idle(gateway: &Evergate, slot: usize, sockets_idle: usize) -> Child {
    let dead = worker(gateway, slot).expect("a worker to kill");
    wait_until("a moment without a connection", 3 * LIMIT, || {
        send(dead.pid, Signal::STOP);
        wait_until("it stands still", LIMIT, || state_of(dead.pid) == Some('T'));
        let is_idle = sockets(dead.pid) == sockets_idle;
        send(dead.pid, if is_idle { Signal::KILL } else { Signal::CONT });
        is_idle
    });
    dead
}

#[test]
fn s03_killed_workers_without_a_connection_cost_nobody_anything() {
    const WORKERS: usize = 4;
    let kills = if is_full() { 1000 } else { 60 };
    let gateway = echo_with("[workers]\nmin = 4\nmax = 4\n");
    wait_ready(&gateway, WORKERS);
    let fewest = || (0..WORKERS).filter_map(|slot| worker(&gateway, slot)).map(|child| sockets(child.pid)).min();
    let (address, seen, idle) = (gateway.addr(), Seen::default(), fewest().unwrap());
    let mut exits = gateway.follow_exits();
    // Answers of the process itself: a kept connection to an upstream would be one more socket.
    let clients = vec![("echo".to_owned(), false); 3];
    let killed: Vec<Value> = beside(&address, &seen, (client, &clients), || {
        let replace = |round: usize| {
            let before = seen.done.load(Ordering::Relaxed);
            let dead = kill_idle(&gateway, round % WORKERS, idle);
            let record = wait_replaced(&gateway, &mut exits, &dead, WORKERS);
            wait_until("load between two kills", 3 * LIMIT, || seen.done.load(Ordering::Relaxed) >= before + 20);
            record
        };
        (0..kills).map(replace).collect()
    });
    let done = seen.done.load(Ordering::Relaxed);
    println!("{done} answered beside {kills} kills of idle workers");
    let busy: Vec<&Value> = killed.iter().filter(|record| record["lost"] != json!([])).collect();
    assert!(busy.is_empty(), "{busy:?}");
    assert_eq!(seen.failed.into_inner().unwrap().into_keys().collect::<Vec<_>>(), Vec::<String>::new());
    assert_eq!(seen.refused.into_inner().unwrap(), Vec::<String>::new(), "refused connects");
    assert_eq!(seen.wrong.into_inner().unwrap(), Vec::<String>::new());
}
