//! The kill drill: under load a worker is killed ten times, and what the clients lost is exactly what the records say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_for, wait_until};
use serde_json::{Value, json};

use crate::processes::{lost_ids, wait_no_zombies};
use crate::support::{CHAT, LIMIT, before, via};

/// Clients that ask one unary request after the other, about 200 ms each: about 200 requests a second.
const CLIENTS: usize = 42;
/// Streams that are open at any time.
const STREAMS: usize = 20;
/// Workers killed.
const KILLS: usize = 10;

/// How and when a client lost a request.
#[derive(Debug)]
struct Failure {
    at: Instant,
    /// None when not a byte of an answer came.
    answer: Option<String>,
}

/// What the clients saw.
#[derive(Default)]
struct Seen {
    is_over: AtomicBool,
    done: AtomicUsize,
    failed: Mutex<BTreeMap<String, Failure>>,
    refused: Mutex<Vec<String>>,
    wrong: Mutex<Vec<String>>,
}

/// Asks until the drill is over, each time with an id and a connection of its own.
fn client(address: &str, number: usize, script: &str, stream: bool, seen: &Seen) {
    let mut count = 0;
    while !seen.is_over.load(Ordering::Relaxed) {
        let id = format!("drill-{script}-{number}-{count}");
        count += 1;
        let mut raw = match Raw::try_connect(address) {
            Ok(raw) => raw,
            Err(error) => {
                seen.refused.lock().unwrap().push(format!("{id}: {error}"));
                continue;
            }
        };
        let request =
            post_request(CHAT, &format!("x-request-id: {id}\r\n"), &chat_body(&via(script), stream, &Value::Null));
        // Read also when it could not be sent: what was said before is still there.
        let _ = raw.try_send(&request);
        let response = raw.try_read_response(3 * LIMIT);
        let fail = |id, answer| {
            seen.failed.lock().unwrap().insert(id, Failure { at: Instant::now(), answer });
        };
        match response {
            Ok(response) if !response.is_complete => {
                fail(id, Some("cut in the body".to_owned()));
            }
            Ok(response) if response.status == 200 && !response.text().contains("\"error\"") => {
                seen.done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(response) => seen.wrong.lock().unwrap().push(format!("{id}: {} {}", response.status, response.text())),
            Err(reason) => {
                let is_silent = reason.ends_with("before a response head; got \"\"");
                fail(id, (!is_silent).then_some(reason));
            }
        }
    }
}

/// Kills workers in turn, each time after the last one's replacement serves and the load has gone on for a while.
fn kill_ten(gateway: &Evergate, seen: &Seen) -> Vec<(Instant, i32)> {
    let mut killed = Vec::new();
    for round in 0..KILLS {
        let before = seen.done.load(Ordering::Relaxed);
        wait_until("load between two kills", 3 * LIMIT, || seen.done.load(Ordering::Relaxed) >= before + 60);
        // Not at the moment when an answer came and its client asks again: a killer does not know of either.
        let (now, pause) = (Instant::now(), Duration::from_millis(7 * round as u64 + 5));
        wait_until("a moment of its own", LIMIT, || now.elapsed() >= pause);
        let at = Instant::now();
        let pid = gateway.kill_worker(round % 2);
        killed.push((at, pid));
        wait_for("the replacement", 3 * LIMIT, || {
            let workers = gateway.wait_workers(2);
            (!workers.contains(&pid)).then_some(())
        });
    }
    killed
}

/// Who is in no record had sent bytes that nobody had read: each on a connection of its own (see `client`), none with a
/// byte of an answer, and at each kill no more than its record counts connections without a request.
fn check_unnamed(
    killed: &[(Instant, i32)],
    records: &[Value],
    failed: &BTreeMap<String, Failure>,
    named: &BTreeSet<String>,
) {
    let unnamed: Vec<_> = failed.iter().filter(|(id, _)| !named.contains(*id)).collect();
    let begun: Vec<_> = unnamed.iter().filter(|(_, failure)| failure.answer.is_some()).collect();
    assert!(begun.is_empty(), "in no record, though not for want of being read: {begun:?}");
    let early: Vec<_> = unnamed.iter().filter(|(_, failure)| failure.at < killed[0].0).collect();
    assert!(early.is_empty(), "failed before anything was killed: {early:?}");
    for (index, ((at, pid), record)) in killed.iter().zip(records).enumerate() {
        let next = killed.get(index + 1).map(|(at, _)| *at);
        let is_of_this = |failure: &Failure| failure.at >= *at && next.is_none_or(|next| failure.at < next);
        let ids: Vec<_> = unnamed.iter().filter(|(_, failure)| is_of_this(failure)).map(|(id, _)| id).collect();
        let idle = record["connections_idle"].as_u64().unwrap();
        println!("worker {pid}: {} named, {} not, {idle} idle", lost_ids(record).len(), ids.len());
        assert!(ids.len() as u64 <= idle, "more than {idle} are in no record: {ids:?}; {record}");
    }
}

#[test]
fn ten_killed_workers_lose_exactly_what_their_records_name() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    let (address, seen) = (gateway.addr(), Seen::default());
    let began = Instant::now();
    let killed = std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (address, seen) = (&address, &seen);
            // Each with a pace of its own, or all would ask in step.
            scope.spawn(move || client(address, number, &format!("delay-{}", 180 + number), false, seen));
        }
        for number in 0..STREAMS {
            let (address, seen) = (&address, &seen);
            scope.spawn(move || client(address, number, &format!("stream-30-{}", 40 + number), true, seen));
        }
        // The clients must end also when this thread panics, or the scope would wait for ever.
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| kill_ten(&gateway, &seen)));
        seen.is_over.store(true, Ordering::Relaxed);
        killed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let done = seen.done.load(Ordering::Relaxed);
    let failed = seen.failed.into_inner().unwrap();
    let rate = done as f64 / began.elapsed().as_secs_f64();
    println!("{done} answered ({rate:.0}/s), {} lost to {KILLS} kills, {:?}", failed.len(), began.elapsed());

    let records = gateway.wait_exits(KILLS, LIMIT, |record| record["signal"] == 9);
    let found: Vec<i64> = records.iter().filter_map(|record| record["pid"].as_i64()).collect();
    assert_eq!(found, killed.iter().map(|(_, pid)| i64::from(*pid)).collect::<Vec<_>>(), "ten records, each once");
    assert_eq!(gateway.exits().len(), KILLS, "nothing else died");
    let named: BTreeSet<String> = records.iter().flat_map(lost_ids).collect();
    assert_eq!(seen.refused.into_inner().unwrap(), Vec::<String>::new(), "refused connects");
    assert_eq!(seen.wrong.into_inner().unwrap(), Vec::<String>::new(), "answers that are neither right nor cut");
    let unfelt: Vec<&String> = named.iter().filter(|id| !failed.contains_key(*id)).collect();
    assert!(unfelt.is_empty(), "in a record but answered: {unfelt:?}");
    check_unnamed(&killed, &records, &failed, &named);
    assert!(!failed.is_empty(), "ten kills under load that nobody felt are no drill");

    wait_no_zombies(gateway.pid());
    let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap();
    let mut shown: Vec<i64> = status["children"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|child| child["kind"] == "worker")
        .map(|child| child["pid"].as_i64().unwrap())
        .collect();
    shown.sort_unstable();
    let mut running: Vec<i64> = gateway.wait_workers(2).into_iter().map(i64::from).collect();
    running.sort_unstable();
    assert_eq!(shown, running, "status shows the replacements");
    // Each lost request has its line, written on its behalf.
    for id in &named {
        let record = gateway.wait_access(id, Duration::from_secs(10));
        assert_eq!((&record["cause"], &record["status"]), (&json!("worker_lost"), &json!(0)), "{record}");
    }
}
