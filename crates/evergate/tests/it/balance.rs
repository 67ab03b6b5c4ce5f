//! Who takes a connection: streams are spread evenly over the workers, whatever state one of them is in.

use std::time::{Duration, Instant};

use bytes::Bytes;
use evergate_testkit::raw::chat_body;
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_for, wait_until};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::drain::is_closing;
use crate::support::{CHAT, LIMIT, assert_counted, assert_good_stream, before, chat, open_stream, rest_of, via};

/// Those that stand still are not replaced for it, however long a busy machine takes.
const FOUR_WORKERS: &str = "[workers]\nmin = 4\nmax = 4\nhang_timeout = \"60s\"\n";
/// Streams of a burst.
const BURST: usize = 64;
/// The most that the fullest may have more than the emptiest (specification, line 27).
const APART_MAX: u64 = 4;

/// What the gateway says of its workers, by slot.
pub fn workers(gateway: &Evergate) -> Vec<Value> {
    let output = gateway.cli(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let children = status["children"].as_array().cloned().unwrap_or_default();
    let mut workers: Vec<Value> = children.into_iter().filter(|child| child["kind"] == "worker").collect();
    workers.sort_by_key(|worker| worker["slot"].as_u64());
    workers
}

/// The streams of each worker, once there are that many in all.
fn spread(gateway: &Evergate, streams: usize) -> Vec<u64> {
    wait_for("all streams on the board", LIMIT, || {
        let counts: Vec<u64> =
            workers(gateway).iter().map(|worker| worker["inflight"]["stream"].as_u64().unwrap()).collect();
        (counts.iter().sum::<u64>() == streams as u64).then_some(counts)
    })
}

/// Does it until it comes out even, three times at most: a worker that the machine gives no processor for a tenth of a
/// second takes no part, and is not meant to. Without the gate one worker has nearly all, each time.
#[track_caller]
fn assert_even(mut counts: impl FnMut() -> Vec<u64>) {
    let mut seen = Vec::new();
    for _ in 0..3 {
        let counts = counts();
        println!("streams by worker: {counts:?}");
        if counts.iter().max().unwrap() - counts.iter().min().unwrap() <= APART_MAX {
            return;
        }
        seen.push(counts);
    }
    panic!("streams by worker: {seen:?}");
}

fn stream_request() -> Vec<u8> {
    evergate_testkit::chat_request(&via("hold-mid"), true, &Value::Null)
}

/// Opens that many streams at once, each on a connection of its own; returns when each has begun. The workers of these
/// pids stand still until all are in the listener's queue: then whoever wakes first could take them all.
fn burst(gateway: &Evergate, pids: &[i32], count: usize) -> Vec<Raw> {
    let still = frozen(pids);
    let mut all = queued(gateway, count);
    drop(still);
    begun(&mut all);
    all
}

fn frozen(pids: &[i32]) -> Vec<Frozen> {
    pids.iter().map(|pid| Frozen::new(*pid)).collect()
}

/// Asks for that many streams, each on a connection of its own.
fn queued(gateway: &Evergate, count: usize) -> Vec<Raw> {
    let request = stream_request();
    let open = |_| {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&request);
        raw
    };
    (0..count).map(open).collect()
}

/// Waits until every stream has its head and its first event.
fn begun(streams: &mut [Raw]) {
    for raw in streams {
        assert_eq!(raw.read_head(LIMIT).status, 200);
        assert!(raw.next_event(LIMIT).is_some());
    }
}

/// A process that stands still until the end of the test.
pub struct Frozen(Pid);

impl Frozen {
    pub fn new(pid: i32) -> Self {
        let pid = Pid::from_raw(pid).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // It may have been replaced for standing still.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// H10.
#[test]
fn h10_s27_a_burst_of_streams_is_spread_evenly() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, FOUR_WORKERS);
    wait_accepting(&gateway, 4);
    let mut bursts = 0;
    assert_even(|| {
        bursts += 1;
        fake.hold();
        let mut streams = burst(&gateway, &gateway.wait_workers(4), BURST);
        let counts = spread(&gateway, BURST);
        fake.release();
        for raw in &mut streams {
            let events = rest_of(raw);
            assert_good_stream(&events, raw.body_is_complete());
        }
        counts
    });
    assert_counted(&gateway, 200, "ok", (bursts * BURST) as u64);
    assert_eq!(fake.request_count(), bursts * BURST, "one call each");
}

/// All have stood still for longer than a beat is believed, as on a machine that was suspended, or starved by others: the one
/// that wakes first must not take its peers for dead, be it that it has only just started.
#[test]
fn h10_s27_a_burst_after_a_standstill_is_spread_evenly() {
    assert_even(|| {
        let fake = FakeUpstream::start();
        let gateway = before(&fake, FOUR_WORKERS);
        wait_accepting(&gateway, 4);
        let mut still = frozen(&gateway.wait_workers(4));
        wait_until("their beats are old", LIMIT, || {
            workers(&gateway).iter().all(|worker| worker["beat_age_ms"].as_u64().unwrap() > 700)
        });
        let mut streams = queued(&gateway, BURST);
        drop(still.remove(0));
        wait_until("it takes some", LIMIT, || workers(&gateway)[0]["connections"] != 0);
        drop(still);
        begun(&mut streams);
        spread(&gateway, BURST)
    });
}

fn wait_accepting(gateway: &Evergate, count: usize) {
    wait_until("workers that accept", LIMIT, || {
        workers(gateway).iter().filter(|worker| worker["accepting"] == true).count() == count
    });
}

/// Clients that connect first and ask later: what they are is not known when they are accepted.
#[test]
fn s27_a_burst_of_connections_is_spread_evenly_before_they_ask() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, FOUR_WORKERS);
    wait_accepting(&gateway, 4);
    assert_even(|| {
        let still = frozen(&gateway.wait_workers(4));
        let _silent: Vec<Raw> = (0..BURST).map(|_| Raw::connect(&gateway.addr())).collect();
        drop(still);
        wait_for("all of them accepted", LIMIT, || {
            let workers = workers(&gateway);
            let counts: Vec<u64> = workers.iter().map(|worker| worker["connections"].as_u64().unwrap()).collect();
            (counts.iter().sum::<u64>() >= BURST as u64).then_some(counts)
        })
    });
}

#[test]
fn s27_a_burst_is_spread_over_the_others_when_one_worker_is_frozen() {
    assert_even(|| {
        let fake = FakeUpstream::start();
        let gateway = before(&fake, FOUR_WORKERS);
        wait_accepting(&gateway, 4);
        // Its last beat is still fresh: the others find out by what it does not do.
        let mut pids = gateway.wait_workers(4);
        let _frozen = Frozen::new(pids.remove(1));
        let _streams = burst(&gateway, &pids, BURST);
        let mut counts = spread(&gateway, BURST);
        assert_eq!(counts.remove(1), 0);
        counts
    });
}

#[test]
fn s27_a_burst_is_spread_over_the_others_when_one_worker_does_not_accept() {
    assert_even(|| beside_one_that_drains(60));
}

/// Streams of the three others after a burst of that many.
fn beside_one_that_drains(count: usize) -> Vec<u64> {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, FOUR_WORKERS);
    wait_accepting(&gateway, 4);
    let pids = gateway.wait_workers(4);
    // A stream keeps the one that is told to end.
    let (mut first, began) = (Vec::new(), Instant::now());
    let kept = loop {
        first.push(open_stream(&gateway, "hold-mid"));
        let counts = spread(&gateway, first.len());
        if counts[2] > 0 {
            break counts[2];
        }
        assert!(began.elapsed() < LIMIT, "{} streams and none on it: {counts:?}", first.len());
    };
    kill_process(Pid::from_raw(pids[2]).unwrap(), Signal::TERM).unwrap();
    wait_until("it drains", LIMIT, || {
        workers(&gateway).iter().any(|worker| worker["pid"] == pids[2] && worker["accepting"] == false)
    });
    let _streams = burst(&gateway, &pids, count);
    wait_for("all streams on the board", LIMIT, || {
        let workers = workers(&gateway);
        let of = |worker: &Value| worker["inflight"]["stream"].as_u64().unwrap();
        let drained = workers.iter().find(|worker| worker["pid"] == pids[2]).map(of);
        assert!(drained.is_none_or(|streams| streams <= kept), "it took more: {workers:?}");
        let others: Vec<&Value> = workers.iter().filter(|worker| worker["pid"] != pids[2]).collect();
        let is_all = others.iter().map(|worker| of(worker)).sum::<u64>() == (count + first.len()) as u64 - kept;
        // A successor that came in the middle of it does not count.
        let is_old = |worker: &&&Value| pids.iter().any(|pid| worker["pid"] == *pid);
        is_all.then(|| others.iter().filter(is_old).map(|worker| of(worker)).collect())
    })
}

#[test]
fn s27_streams_over_warmed_connections_are_spread_evenly() {
    assert_even(over_warmed_connections);
}

fn over_warmed_connections() -> Vec<u64> {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, FOUR_WORKERS);
    wait_accepting(&gateway, 4);
    let mut kept: Vec<Raw> = (0..BURST).map(|_| warmed(&gateway)).collect();
    let request = stream_request();
    kept.iter_mut().for_each(|raw| raw.send(&request));
    begun(&mut kept);
    spread(&gateway, BURST)
}

/// A kept connection with one answer behind it.
fn warmed(gateway: &Evergate) -> Raw {
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&evergate_testkit::chat_request(&via("ok"), false, &Value::Null));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    raw
}

pub type H2 = hyper::client::conn::http2::SendRequest<Full<Bytes>>;

#[allow(clippy::disallowed_methods, reason = "a task of the test, which ends with its runtime")]
pub async fn h2_connect(gateway: &Evergate) -> H2 {
    let io = TokioIo::new(tokio::net::TcpStream::connect(gateway.addr()).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::runtime::Handle::current().spawn(connection);
    sender
}

/// Opens a stream that is held until the upstream lets it go, over another connection when the gateway takes no more on
/// this one, as every client does; then the old one is returned, on which earlier streams go on.
pub async fn h2_stream(gateway: &Evergate, client: &mut H2) -> (hyper::body::Incoming, Option<H2>) {
    let mut old = None;
    loop {
        let body = Full::new(Bytes::from(chat_body(&via("hold-mid"), true, &Value::Null)));
        let request = http::Request::post(format!("http://localhost{CHAT}"))
            .header("content-type", "application/json")
            .body(body)
            .unwrap();
        match client.send_request(request).await {
            Ok(response) => {
                assert_eq!(response.status(), 200);
                return (response.into_body(), old);
            }
            // Not sent: told to go elsewhere.
            Err(error) if error.is_canceled() => old = Some(std::mem::replace(client, h2_connect(gateway).await)),
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Sends the burst over four connections in turn; gives the streams of each worker.
async fn over_four_connections(gateway: &Evergate, fake: &FakeUpstream) -> Vec<u64> {
    let (mut clients, mut bodies, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..BURST {
        if n < 4 {
            clients.push(h2_connect(gateway).await);
        }
        let (body, old) = h2_stream(gateway, &mut clients[n % 4]).await;
        bodies.push(body);
        left.extend(old);
    }
    println!("{} connections were left for others", left.len());
    let counts = spread(gateway, BURST);
    fake.release();
    for body in bodies {
        let text = body.collect().await.unwrap().to_bytes();
        assert!(text.ends_with(b"data: [DONE]\n\n"));
    }
    counts
}

pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(3 * LIMIT, test).await.expect("in time") })
}

#[test]
fn s27_streams_over_four_http2_connections_are_spread_evenly() {
    assert_even(|| {
        let fake = FakeUpstream::start();
        let gateway = before(&fake, FOUR_WORKERS);
        wait_accepting(&gateway, 4);
        run(over_four_connections(&gateway, &fake))
    });
}

/// All clients hold connections to one worker: they are told to come anew, and then are spread.
#[test]
fn s27_kept_connections_to_one_worker_are_moved() {
    assert_even(after_they_were_moved);
}

fn after_they_were_moved() -> Vec<u64> {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, FOUR_WORKERS);
    wait_accepting(&gateway, 4);
    let others = frozen(&gateway.wait_workers(4)[1..]);
    let mut kept: Vec<Raw> = (0..BURST).map(|_| warmed(&gateway)).collect();
    drop(others);
    wait_until("they beat again", LIMIT, || {
        workers(&gateway).iter().all(|worker| worker["beat_age_ms"].as_u64().unwrap() < 300)
    });
    let request = stream_request();
    kept.iter_mut().for_each(|raw| raw.send(&request));
    let heads: Vec<bool> = kept
        .iter_mut()
        .map(|raw| {
            let head = raw.read_head(LIMIT);
            assert_eq!(head.status, 200);
            head.header("connection") == Some("close")
        })
        .collect();
    assert_eq!(spread(&gateway, BURST), [BURST as u64, 0, 0, 0], "where they are they stay to their end");
    let moved = heads.iter().filter(|is_closing| **is_closing).count();
    println!("{moved} of {BURST} are told to come anew");
    assert!(moved >= BURST / 2, "only {moved}");
    fake.release();
    for (raw, is_closing) in kept.iter_mut().zip(heads) {
        let events = rest_of(raw);
        assert_good_stream(&events, raw.body_is_complete());
        if is_closing {
            *raw = Raw::connect(&gateway.addr());
        }
    }
    fake.hold();
    kept.iter_mut().for_each(|raw| raw.send(&request));
    begun(&mut kept);
    spread(&gateway, BURST)
}

/// Four HTTP/2 connections to one worker that is far above its peers: each is told to come anew by GOAWAY. What is under way
/// stays where it is, and the next streams go to the others.
#[test]
fn s27_four_http2_connections_on_one_worker_are_moved() {
    assert_even(|| run(after_four_were_moved()));
}

async fn after_four_were_moved() -> Vec<u64> {
    const EACH: usize = 4;
    let fake = FakeUpstream::start();
    let gateway = before(&fake, FOUR_WORKERS);
    wait_accepting(&gateway, 4);
    let others = frozen(&gateway.wait_workers(4)[1..]);
    // Who was frozen a moment ago is believed to be there, and then connections are moved at once. So is, for a while, who was
    // frozen before the machine held up the one that looks: these are older than it may hold up anybody.
    wait_until("their beats are old", LIMIT, || {
        workers(&gateway)[1..].iter().all(|worker| worker["beat_age_ms"].as_u64().unwrap() > 2_000)
    });
    let (mut clients, mut bodies) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let mut client = h2_connect(&gateway).await;
        for _ in 0..EACH {
            let (body, old) = h2_stream(&gateway, &mut client).await;
            assert!(old.is_none(), "nobody else is there");
            bodies.push(body);
        }
        clients.push(client);
    }
    drop(others);
    wait_until("they beat again", LIMIT, || {
        workers(&gateway).iter().all(|worker| worker["beat_age_ms"].as_u64().unwrap() < 300)
    });
    // With its next answer each connection hears of it.
    for client in &mut clients {
        let (body, old) = h2_stream(&gateway, client).await;
        assert!(old.is_none(), "it was told too soon");
        bodies.push(body);
    }
    assert_eq!(spread(&gateway, 4 * (EACH + 1)), [4 * (EACH as u64 + 1), 0, 0, 0], "where they are they stay");
    let mut left = 0;
    for n in bodies.len()..4 * BURST / 3 {
        let (body, old) = h2_stream(&gateway, &mut clients[n % 4]).await;
        bodies.push(body);
        left += usize::from(old.is_some());
    }
    assert!(left >= 4, "only {left} connections were left for others");
    let counts = spread(&gateway, bodies.len());
    fake.release();
    for body in bodies {
        assert!(body.collect().await.unwrap().to_bytes().ends_with(b"data: [DONE]\n\n"));
    }
    counts
}

/// With one place in each of two workers, two requests run and none waits, whichever worker takes which connection.
#[test]
fn s28_no_request_waits_while_a_peer_has_a_place() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\nslots = 1\nhang_timeout = \"60s\"\n");
    wait_accepting(&gateway, 2);
    let mut waited = 0;
    for round in 0..20 {
        fake.hold();
        let ask = || {
            let mut raw = Raw::connect(&gateway.addr());
            raw.send(&evergate_testkit::chat_request(&via("hold"), false, &Value::Null));
            raw
        };
        let mut first = ask();
        let _ = fake.wait_request(2 * round, LIMIT);
        let mut second = ask();
        let until = Instant::now() + Duration::from_secs(2);
        wait_until("both at the upstream", LIMIT, || fake.request_count() > 2 * round + 1 || Instant::now() > until);
        waited += usize::from(fake.request_count() == 2 * round + 1);
        fake.release();
        assert_eq!([&mut first, &mut second].map(|raw| raw.read_response(LIMIT).status), [200, 200]);
    }
    // A peer that the machine holds up for half a second is not waited for. Without the rule it is every other round.
    assert!(waited <= 3, "{waited} of 20");
}

/// On kept connections a request may come to a worker without a place; its connections are sent to the peer that has one.
#[test]
fn s28_kept_connections_leave_a_worker_whose_requests_wait() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\nslots = 1\nhang_timeout = \"60s\"\n");
    wait_accepting(&gateway, 2);
    // A peer that the machine holds up for half a second at the wrong moment is nobody to be sent to.
    let is_sent = (0..5).any(|round| {
        wait_accepting(&gateway, 2);
        is_sent_to_the_peer(&gateway, &fake, 4 * round)
    });
    assert!(is_sent, "the next request finds the peer");
}

/// Whether a kept connection is closed that has been answered while another one's request waits. The upstream has seen so many
/// requests before.
fn is_sent_to_the_peer(gateway: &Evergate, fake: &FakeUpstream, before: usize) -> bool {
    let peer = frozen(&gateway.wait_workers(2)[1..]);
    let mut kept = [Raw::connect(&gateway.addr()), Raw::connect(&gateway.addr())];
    for raw in &mut kept {
        raw.send(&evergate_testkit::chat_request(&via("ok"), false, &Value::Null));
        assert!(!is_closing(&raw.read_response(LIMIT)));
    }
    drop(peer);
    wait_until("the peer is there again", LIMIT, || {
        workers(gateway).iter().all(|worker| worker["beat_age_ms"].as_u64().is_some_and(|age| age <= 260))
    });
    fake.hold();
    for (at, raw) in kept.iter_mut().enumerate() {
        raw.send(&evergate_testkit::chat_request(&via("hold"), false, &Value::Null));
        wait_until("one works, the next waits", LIMIT, || {
            let waiting: u64 = workers(gateway).iter().map(|worker| worker["waiting"].as_u64().unwrap()).sum();
            (fake.request_count(), waiting) == (before + 3, at as u64)
        });
    }
    fake.release();
    let is_sent = is_closing(&kept[0].read_response(LIMIT));
    assert_eq!(kept[1].read_response(LIMIT).status, 200);
    is_sent
}

/// Peers that have less to do are waited for a moment only, though they are believed to be alive, since they stand still since a moment
/// ago. Without that limit a connection waits until their beats are too old, 300 ms at least.
#[test]
fn s27_the_gate_delays_and_never_starves() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, FOUR_WORKERS);
    wait_accepting(&gateway, 4);
    let pids = gateway.wait_workers(4);
    let still = frozen(&pids[1..]);
    // Each connection after them is rather one for the others.
    let _held: Vec<Raw> = (0..4).map(|_| open_stream(&gateway, "hold-mid")).collect();
    drop(still);
    let ask = |count: usize| {
        let began = Instant::now();
        (0..count).for_each(|_| assert_eq!(chat(&gateway, "ok", false).status, 200));
        began.elapsed()
    };
    let mut seen = Vec::new();
    for _ in 0..10 {
        // An idle worker's beats are 250 ms apart.
        let has_beaten = |worker: &Value| worker["beat_age_ms"].as_u64().is_some_and(|age| age <= 260);
        wait_until("all beat", LIMIT, || workers(&gateway).iter().all(has_beaten));
        let _still = frozen(&pids[1..]);
        let first = ask(1);
        let rest = ask(49);
        println!("beside three frozen workers the first request took {first:?}, the next 49 {rest:?}");
        // Nobody stands behind each of them for long, either.
        assert!(rest < Duration::from_secs(10), "{rest:?}");
        if first < Duration::from_millis(150) {
            return;
        }
        // The machine had no processor for it.
        seen.push(first);
    }
    panic!("the first request beside frozen workers took {seen:?}");
}
