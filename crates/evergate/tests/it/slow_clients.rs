//! Clients that are slow on purpose, many of them, beside good ones.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::raw::chat_request;
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use serde_json::Value;

use crate::support::{LIMIT, ONE_WORKER, before, is_full, via};

/// Between two bytes of one slow head.
const PACE: Duration = Duration::from_secs(2);
const CLIENTS: usize = 4;

/// One connection that sends a head byte by byte, and connects again when it is turned away.
struct Slow {
    stream: TcpStream,
    at: usize,
}

impl Slow {
    fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nonblocking(true).unwrap();
        Self { stream, at: 0 }
    }

    /// Sends one more byte; says whether it was turned away.
    fn step(&mut self) -> bool {
        const HEAD: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx: ";
        let byte = HEAD.get(self.at).copied().unwrap_or(b'y');
        self.at += 1;
        let is_sent = self.stream.write(&[byte]).is_ok();
        // An answer, or the end: either is a refusal.
        let is_told =
            !matches!(self.stream.read(&mut [0; 512]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        !is_sent || is_told
    }
}

/// Slow heads until `is_over`; counts those that were turned away.
fn slowloris(address: &str, count: usize, is_over: &AtomicBool, refused: &AtomicUsize, ready: &AtomicBool) {
    let mut all: Vec<Slow> = (0..count).map(|_| Slow::connect(address)).collect();
    ready.store(true, Ordering::Relaxed);
    while !is_over.load(Ordering::Relaxed) {
        let round = Instant::now();
        for (index, slow) in all.iter_mut().enumerate() {
            if slow.step() {
                refused.fetch_add(1, Ordering::Relaxed);
                *slow = Slow::connect(address);
            }
            // Spread over the pace, as many clients are.
            let due = PACE.mul_f64((index + 1) as f64 / count as f64);
            if index % 50 == 0 {
                evergate_testkit::wait::try_wait_for(due.saturating_sub(round.elapsed()), || {
                    is_over.load(Ordering::Relaxed).then_some(())
                });
            }
        }
    }
}

/// Processor time of all workers so far.
fn cpu(gateway: &Evergate) -> Duration {
    let of = |pid: &i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    };
    gateway.workers().iter().map(of).sum()
}

/// Connections that were accepted so far.
fn accepted(gateway: &Evergate) -> usize {
    let metrics = gateway.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix("evergate_client_connections_total "));
    line.unwrap().parse().unwrap()
}

/// Good requests, each of which must be answered; the workers' processor time for one.
fn good(gateway: &Evergate, count: usize) -> Duration {
    let before = cpu(gateway);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let request = chat_request("fake/ok", false, &Value::Null);
                let mut raw = Raw::connect(&gateway.addr());
                for n in 1..=count / CLIENTS {
                    raw.send(&request);
                    let response = raw.read_response(LIMIT);
                    assert_eq!(response.status, 200, "{}", response.text());
                    // A worker with far more to do than its peer says so.
                    if n % 50 == 0 || response.header("connection") == Some("close") {
                        raw = Raw::connect(&gateway.addr());
                    }
                }
            });
        }
    });
    (cpu(gateway) - before) / u32::try_from(count).unwrap()
}

/// A8: slow heads cost good requests next to nothing of the processor, and no good one fails.
/// Quiet and troubled runs in turn; the figure is the median of their ratios.
#[test]
fn a8_slow_heads_cost_good_requests_little() {
    let (slow, requests, rounds) = if is_full() { (2_000, 4_000, 5) } else { (300, 1_200, 3) };
    let fake = FakeUpstream::start();
    // As many workers as before and after; the limits of clients are the defaults.
    let gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\n");
    let workers = gateway.workers();
    good(&gateway, requests / 4);
    let (mut ratios, mut turned_away) = (Vec::new(), 0);
    for _ in 0..rounds {
        let quiet = good(&gateway, requests);
        let (is_over, ready, refused) = (AtomicBool::new(false), AtomicBool::new(false), AtomicUsize::new(0));
        let troubled = std::thread::scope(|scope| {
            let (address, before) = (gateway.addr(), accepted(&gateway));
            let (is_over, ready, refused) = (&is_over, &ready, &refused);
            scope.spawn(move || slowloris(&address, slow, is_over, refused, ready));
            wait_until("all slow clients", LIMIT, || ready.load(Ordering::Relaxed));
            wait_until("all of them accepted", LIMIT, || accepted(&gateway) >= before + slow);
            let troubled = good(&gateway, requests);
            is_over.store(true, Ordering::Relaxed);
            troubled
        });
        turned_away += refused.load(Ordering::Relaxed);
        ratios.push(troubled.as_secs_f64() / quiet.as_secs_f64());
        println!("a good request: {quiet:?} alone, {troubled:?} beside {slow} slow heads");
    }
    ratios.sort_by(f64::total_cmp);
    let median = ratios[rounds / 2];
    println!("processor time of a good request: {median:.3} times; {turned_away} slow heads were turned away");
    assert_eq!(gateway.workers(), workers);
    assert!(gateway.exits().is_empty());
    // Far from what it costs, so that a busy machine does not matter: a loop over idle connections would be tens of times.
    assert!(median < 2.0, "{ratios:?}");
}

/// Clients that ask and read nothing.
fn unread(gateway: &Evergate, fake: &FakeUpstream, count: usize, scripts: &[&str], is_small: bool) -> Vec<Raw> {
    let before = fake.request_count();
    let ask = |n: usize| {
        let script = scripts[n % scripts.len()];
        let mut raw = Raw::connect(&gateway.addr());
        if is_small {
            raw.link().shrink_receive_buffer();
        }
        raw.send(&chat_request(&via(script), script == "flood", &Value::Null));
        raw
    };
    let all = (0..count).map(ask).collect();
    wait_until("all that read nothing", 3 * LIMIT, || fake.request_count() >= before + count);
    all
}

/// A6: floods that come faster than they are handled take their turns with everybody else.
#[test]
fn a6_floods_leave_others_their_turns() {
    let fake = FakeUpstream::start();
    // Nobody is ended for what a full machine keeps from it: without turns no answer comes at all.
    let gateway = before(&fake, &format!("{ONE_WORKER}hang_timeout = \"10m\"\n"));
    let workers = gateway.workers();
    let mut raw = Raw::connect(&gateway.addr());
    // Connections on both sides are there before.
    raw.send(&chat_request("fake/ok", false, &Value::Null));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    // Large buffers: in an unoptimized build they take more than ten seconds to fill.
    let floods = unread(&gateway, &fake, 40, &["flood"], false);
    let mut slowest = Duration::ZERO;
    for _ in 0..10 {
        let began = cpu(&gateway);
        raw.send(&chat_request("fake/ok", false, &Value::Null));
        assert_eq!(raw.read_response(LIMIT).status, 200);
        slowest = slowest.max(cpu(&gateway) - began);
    }
    println!("work done before the slowest of ten answers beside {} floods: {slowest:?}", floods.len());
    assert_eq!(gateway.workers(), workers, "{:?}", gateway.exits());
    // The worker's own processor time, whatever else the machine does: 0.9 s in an unoptimized build. Without turns
    // it works until it is ended for hanging.
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
}

/// Waits until the workers do next to nothing: every buffer on the way is full.
fn wait_idle(gateway: &Evergate) {
    let (mut then, mut since) = (cpu(gateway), Instant::now());
    wait_until("workers at rest", 6 * LIMIT, || {
        let now = cpu(gateway);
        if now - then > Duration::from_millis(10) {
            (then, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(400)
    });
}

/// The most that is allowed of a good request's processor time beside unread answers (issue 4 asks for it).
const COST_MAX: f64 = 1.1;

/// Measures pairs until the median of three or more is within the bound, nine at most: what else the machine does makes a
/// pair come out worse or better, a cost makes all of them worse.
#[track_caller]
fn assert_costs_little(mut pair: impl FnMut() -> f64) {
    let mut ratios: Vec<f64> = Vec::new();
    for _ in 0..9 {
        ratios.push(pair());
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        if ratios.len() >= 3 && median <= COST_MAX {
            println!("processor time of a good request: {median:.3} times, of {} pairs", ratios.len());
            return;
        }
    }
    panic!("processor time of a good request, times that of one alone: {ratios:.3?}");
}

/// A6: answers that nobody reads cost good requests next to nothing of the processor, and no good one fails.
#[test]
fn a6_unread_answers_cost_good_requests_little() {
    let (readers, requests) = if is_full() { (200, 4_000) } else { (40, 1_200) };
    let fake = FakeUpstream::start();
    // Nobody is cut for the stall while it is measured.
    let gateway = before(&fake, "[timeouts]\nclient_stall = \"1h\"\n[workers]\nmin = 2\nmax = 2\n");
    let workers = gateway.workers();
    good(&gateway, requests / 4);
    assert_costs_little(|| {
        // Alone before and after: what drifts meanwhile counts half.
        let before = good(&gateway, requests / 2);
        let mut stalled = unread(&gateway, &fake, readers, &["flood", "huge-3000000"], true);
        // A whole answer that has begun was read and looked through before: that work is no good request's.
        stalled.iter_mut().for_each(|raw| assert_eq!(raw.read_head(3 * LIMIT).status, 200));
        wait_idle(&gateway);
        let troubled = good(&gateway, requests);
        drop(stalled);
        let idle = ["unary", "stream"].map(|kind| format!("evergate_inflight_requests{{kind=\"{kind}\"}} 0\n"));
        wait_until("all gone", LIMIT, || idle.iter().all(|line| gateway.metrics().contains(line)));
        wait_idle(&gateway);
        let quiet = (before + good(&gateway, requests / 2)) / 2;
        println!("a good request: {quiet:?} alone, {troubled:?} beside {readers} unread answers");
        troubled.as_secs_f64() / quiet.as_secs_f64()
    });
    assert_eq!(gateway.workers(), workers, "{:?}", gateway.exits());
}
