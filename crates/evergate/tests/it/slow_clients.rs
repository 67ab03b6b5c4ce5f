//! Clients that are slow on purpose, many of them, beside good ones.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::raw::chat_request;
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use serde_json::Value;

use crate::support::{LIMIT, before, is_full};

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
