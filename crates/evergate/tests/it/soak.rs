//! A steady load in which one request in twenty meets a fault, and now and then a worker dies: nothing grows, and no end
//! is unexplained. Each request's outcome, as its client saw it, is what its record says.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::driver::Tail;
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, FakeUpstream, Raw, gateway_config, wait_until};
use serde_json::Value;

use crate::support::{CHAT, EXE, LIMIT, is_full, via, wait_ready};

const CLIENTS: usize = 8;
/// Between two requests of a client: some 400 a second in all.
const THOUGHT: Duration = Duration::from_millis(15);
/// One request in so many meets a fault.
const FAULT_EVERY: usize = 20;
/// What `stream-20-20` takes at the least, and some for the way.
const WHOLE_ANSWER: Duration = Duration::from_millis(19 * 20 - 80);
/// Around a kill, when connections may end without an answer: a worker's connections end at once, and a new one may be
/// queued for it.
const AROUND_A_KILL: Duration = Duration::from_secs(1);

/// Faults of upstreams by their script, planted ones by their header (`panic-...`), and those of clients.
const FAULTS: [(&str, bool); 20] = [
    ("reset-early", false),
    ("status-500", true),
    ("panic-handler", false),
    ("reset-mid", true),
    ("client-leaves", true),
    ("status-429", false),
    ("idle-mid", true),
    ("panic-stream", true),
    ("bad-json", false),
    ("client-leaves", false),
    ("error-event-mid", true),
    ("html", false),
    ("panic-drop", false),
    ("no-finish", true),
    ("half-a-request", false),
    ("eof-mid", false),
    ("panic-head", true),
    ("pings-only", true),
    ("error-200", false),
    ("panic-drop-stream", true),
];

/// What a client saw.
#[derive(Clone, Debug, PartialEq)]
enum End {
    Ok,
    /// An error's code, as an answer or as an event.
    Failed(String),
    /// It did not wait for the end.
    Left(Instant),
    /// The same, but the machine held it up for so long that its answer may have come before.
    LeftLate(Instant),
    /// The connection ended.
    Cut(Instant),
}

struct Load<'a> {
    gateway: &'a Evergate,
    is_over: AtomicBool,
    asked: AtomicUsize,
    seen: Mutex<BTreeMap<String, End>>,
}

impl Load<'_> {
    /// Asks until the time is up.
    fn client(&self, until: Instant) {
        let mut kept = None;
        while Instant::now() < until {
            let number = self.asked.fetch_add(1, Ordering::Relaxed);
            let id = format!("soak-{number}");
            let (fault, stream) = if number.is_multiple_of(FAULT_EVERY) {
                FAULTS[number / FAULT_EVERY % FAULTS.len()]
            } else {
                (["ok", "stream-5"][number % 2], number % 4 < 2)
            };
            let Some(mut raw) = kept.take().or_else(|| Raw::try_connect(&self.gateway.addr()).ok()) else {
                panic!("a connect was refused");
            };
            let (end, is_kept) = ask(&mut raw, &id, fault, stream);
            if is_kept {
                kept = Some(raw);
            }
            self.seen.lock().unwrap().insert(id, end);
            let _ = try_wait_for(THOUGHT, || None::<()>);
        }
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// Asks, and says how it ended and whether the connection may be used again.
fn ask(raw: &mut Raw, id: &str, fault: &str, stream: bool) -> (End, bool) {
    let header = if fault.starts_with("panic-") { format!("x-evergate-fault: {fault}\r\n") } else { String::new() };
    let is_script = header.is_empty() && !["client-leaves", "half-a-request"].contains(&fault);
    let model = via(if is_script { fault } else { "stream-20-20" });
    let request =
        post_request(CHAT, &format!("x-request-id: {id}\r\n{header}"), &chat_body(&model, stream, &Value::Null));
    if fault == "half-a-request" {
        let _ = raw.try_send(&request[..request.len() - 10]);
        return (End::Left(Instant::now()), false);
    }
    // Read also when it could not be sent: what was said before is still there.
    let began = Instant::now();
    let _ = raw.try_send(&request);
    if fault == "client-leaves" {
        let _ = try_wait_for(Duration::from_millis(50), || None::<()>);
        let left = if began.elapsed() < WHOLE_ANSWER { End::Left } else { End::LeftLate };
        return (left(Instant::now()), false);
    }
    let response = raw.try_read_response(LIMIT);
    let is_kept =
        response.as_ref().is_ok_and(|response| response.is_complete && response.header("connection").is_none());
    let end = match response {
        Ok(response) if !response.is_complete => End::Cut(Instant::now()),
        Ok(response) if response.status != 200 => End::Failed(response.error_code()),
        Ok(response) if stream => {
            let events = response.events();
            let is_done = events.iter().any(|event| event.is_done());
            match events.iter().find_map(|event| event.error_code()) {
                Some(code) if !is_done => End::Failed(code),
                None if is_done => End::Ok,
                other => panic!("{id}: a stream that lies: {other:?}, [DONE] {is_done}"),
            }
        }
        Ok(_) => End::Ok,
        Err(_) => End::Cut(Instant::now()),
    };
    (end, is_kept)
}

/// Of one worker, when nothing is going on.
#[derive(Debug)]
struct Weight {
    anonymous_kib: u64,
    descriptors: usize,
    tasks: u64,
}

fn weigh(gateway: &Evergate) -> Weight {
    let pid = gateway.workers()[0];
    let value = |name: &str| {
        let text = gateway.metrics();
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok()).unwrap()
    };
    wait_until("nothing in flight, and nobody connected", 3 * LIMIT, || {
        let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap_or_default();
        let children = status["children"].as_array().cloned().unwrap_or_default();
        status["inflight"].as_array().is_some_and(Vec::is_empty)
            && children.iter().all(|child| child["connections"].as_u64().unwrap_or(0) == 0)
            && children.iter().all(|child| child["upstream_connections"].as_u64().unwrap_or(0) == 0)
    });
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    Weight {
        anonymous_kib: line.trim().strip_suffix(" kB").unwrap().parse().unwrap(),
        descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        tasks: value("evergate_tasks"),
    }
}

/// Kills the second worker again and again, and reads the records meanwhile. The first one lives through it all.
fn disturb(load: &Load<'_>, every: Duration, tail: &mut Tail, records: &mut Vec<Value>) -> Vec<Instant> {
    let mut kills = Vec::new();
    let mut last = Instant::now();
    while !load.is_over.load(Ordering::Relaxed) {
        let _ = try_wait_for(Duration::from_millis(100), || None::<()>);
        records.extend(tail.read());
        if last.elapsed() >= every && load.gateway.workers().len() == 2 {
            last = Instant::now();
            kills.push(last);
            load.gateway.kill_worker(1);
        }
    }
    kills
}

#[test]
fn h9_a_steady_load_with_faults_of_every_kind_leaves_nothing_behind() {
    let (warm_up, time, every) = if is_full() { (60, 540, 10) } else { (4, 10, 2) };
    let fake = FakeUpstream::start();
    let more =
        "[workers]\nmin = 2\nmax = 2\n[timeouts]\nfirst_token = \"500ms\"\nidle = \"500ms\"\nupstream_idle = \"1s\"\n";
    let gateway =
        Evergate::builder(EXE).config(gateway_config(fake.base_url(), &[], more)).env("EVERGATE_FAULT", "1").start();
    let survivor = gateway.workers()[0];
    let (mut tail, mut records, mut weights) = (gateway.follow_access(), Vec::new(), Vec::new());
    let (mut seen, mut kills, mut asked) = (BTreeMap::new(), Vec::new(), 0);
    for seconds in [warm_up, time] {
        let load = Load {
            gateway: &gateway,
            is_over: AtomicBool::new(false),
            asked: AtomicUsize::new(asked),
            seen: Mutex::default(),
        };
        let until = Instant::now() + Duration::from_secs(seconds);
        kills.extend(std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| load.client(until));
            }
            disturb(&load, Duration::from_secs(every), &mut tail, &mut records)
        }));
        asked = load.asked.into_inner();
        seen.extend(load.seen.into_inner().unwrap());
        wait_ready(&gateway, 2);
        weights.push(weigh(&gateway));
    }
    assert_eq!(gateway.workers()[0], survivor);
    let [before, after] = &weights[..] else { panic!("{weights:?}") };
    println!("{asked} requests, {} kills, {before:?}, {after:?}", kills.len());
    assert!(after.anonymous_kib < before.anonymous_kib + 6 * 1024, "{before:?} {after:?}");
    assert!(after.descriptors <= before.descriptors + 1 && after.tasks <= before.tasks + 1, "{before:?} {after:?}");
    settle(&mut tail, &mut records, &seen);
    judge(&seen, &records, &kills);
}

/// Reads records until every answered request has one.
fn settle(tail: &mut Tail, records: &mut Vec<Value>, seen: &BTreeMap<String, End>) {
    let answered = seen.values().filter(|end| matches!(end, End::Ok | End::Failed(_))).count();
    wait_until("a record for each answer", LIMIT, || {
        records.extend(tail.read());
        let known = records.iter().filter(|record| {
            let end = seen.get(record["client_id"].as_str().unwrap());
            matches!(end, Some(End::Ok | End::Failed(_)))
        });
        known.count() >= answered
    });
}

/// Each outcome is that of the record, and each cut has a kill.
fn judge(seen: &BTreeMap<String, End>, records: &[Value], kills: &[Instant]) {
    let mut of_client: BTreeMap<&str, (&str, bool)> = BTreeMap::new();
    for record in records {
        let told = (record["cause"].as_str().unwrap(), record["by_master"] == true);
        let before = of_client.insert(record["client_id"].as_str().unwrap(), told);
        assert_eq!(before, None, "two records of one request: {record}");
    }
    let mut causes: BTreeMap<&str, usize> = BTreeMap::new();
    let is_near = |at: &Instant| kills.iter().any(|kill| at.max(kill).duration_since(*at.min(kill)) < AROUND_A_KILL);
    for (id, end) in seen {
        let (cause, is_by_master) = of_client.get(id.as_str()).copied().unzip();
        *causes.entry(cause.unwrap_or("none")).or_default() += 1;
        let is_explained = match end {
            // The worker may die between the last byte and its note of it.
            End::Ok => matches!(cause, Some("ok" | "worker_lost")),
            End::Failed(code) => cause == Some(code) || cause == Some("worker_lost"),
            // A head that came is on record, unless it lay unread in a worker that died.
            End::Left(at) => matches!(cause, Some("client_gone" | "worker_lost")) || (cause.is_none() && is_near(at)),
            End::LeftLate(at) => {
                matches!(cause, Some("ok" | "client_gone" | "worker_lost")) || (cause.is_none() && is_near(at))
            }
            // The last bytes of its answer, whatever that was, were on their way when the worker died.
            End::Cut(at) => {
                (is_by_master == Some(true) || matches!(cause, None | Some("worker_lost" | "ok"))) && is_near(at)
            }
        };
        assert!(is_explained, "{id}: {end:?}, on record as {cause:?}");
    }
    println!("{causes:?}");
    assert!(causes.len() >= 9, "too few kinds of ends: {causes:?}");
}
