//! Upstreams with `in_flight_max` under load: the limit holds over all workers, the upstream stays busy under five times
//! what it can do, killed and frozen workers cost no permit, and others are not kept waiting.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::driver::state_of;
use evergate_testkit::raw::{chat_body, get_request, post_request};
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::balance::Frozen;
use crate::support::{CHAT, EXE, LIMIT, ONE_WORKER, before, is_full, machine, send, via, wait_ready};
use crate::targets::config;
use crate::upstream_limit::{shed, wait_limit};

/// The drills look at times and rates: one after the other.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How a request went: when it was sent, how long it took, and its status; none when the connection ended.
#[derive(Clone, Copy, Debug)]
struct Asked {
    at: Instant,
    took: Duration,
    status: Option<u16>,
    waits: bool,
}

/// Asks once, on the kept connection or a new one.
fn ask(address: &str, kept: &mut Option<Raw>, request: &[u8]) -> Asked {
    let at = Instant::now();
    let asked = |status, waits| Asked { at, took: at.elapsed(), status, waits };
    let mut raw = match kept.take() {
        Some(raw) => raw,
        None => match Raw::try_connect(address) {
            Ok(raw) => raw,
            Err(_) => return asked(None, false),
        },
    };
    if raw.try_send(request).is_err() {
        return asked(None, false);
    }
    let Ok(response) = raw.try_read_response(3 * LIMIT) else { return asked(None, false) };
    let is_whole = response.is_complete && (response.status != 200 || !response.text().contains("\"error\""));
    if is_whole && response.header("connection").is_none() {
        *kept = Some(raw);
    }
    let waits = response.header("retry-after-ms").is_some() && response.header("retry-after").is_some();
    asked(is_whole.then_some(response.status), waits)
}

fn request(model: &str, stream: bool) -> Vec<u8> {
    post_request(CHAT, "", &chat_body(model, stream, &Value::Null))
}

/// So many clients ask one request after the other for that long, and the answers that came within it.
fn closed_loop(address: &str, clients: usize, request: &[u8], time: Duration) -> Vec<Asked> {
    let (all, end) = (Mutex::new(Vec::new()), Instant::now() + time);
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut kept = None;
                while Instant::now() < end {
                    let one = ask(address, &mut kept, request);
                    all.lock().unwrap().push(one);
                }
            });
        }
    });
    all.into_inner().unwrap()
}

/// Asks at a steady pace, whatever becomes of the requests before, with so many clients to send them.
fn open_loop(address: &str, (every, count): (Duration, u32), clients: usize, request: &[u8]) -> Vec<Asked> {
    let (all, next, began) = (Mutex::new(Vec::new()), AtomicU32::new(0), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut kept = None;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return;
                    }
                    let due = began + every * number;
                    let _ = try_wait_for(LIMIT, || (Instant::now() >= due).then_some(()));
                    let one = ask(address, &mut kept, request);
                    all.lock().unwrap().push(one);
                }
            });
        }
    });
    all.into_inner().unwrap()
}

fn counts(all: &[Asked]) -> BTreeMap<Option<u16>, usize> {
    let mut counts = BTreeMap::new();
    all.iter().for_each(|one| *counts.entry(one.status).or_default() += 1);
    counts
}

/// Answers a second that came in the middle of a run: between the second and the last but one tenth of it.
fn rate(all: &[Asked], began: Instant, time: Duration) -> f64 {
    let (from, to) = (began + time / 10, began + time * 9 / 10);
    let good = all.iter().filter(|one| one.status == Some(200) && one.at + one.took >= from && one.at + one.took < to);
    good.count() as f64 / (to - from).as_secs_f64()
}

fn percentile(times: &mut [Duration], part: usize) -> Duration {
    times.sort_unstable();
    times.get(times.len() * part / 100).or(times.last()).copied().unwrap_or_default()
}

#[test]
fn l1_the_limit_holds_exactly_over_four_workers() {
    let _alone = alone();
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "in_flight_max = 6\nqueue = 64\n[workers]\nmin = 4\nmax = 4\n");
    wait_ready(&gateway, 4);
    let (address, most) = (gateway.addr(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for client in 0..40_usize {
            let (address, most) = (&address, &most);
            scope.spawn(move || {
                let script = ["delay-20", "stream-3-5", "delay-7", "status-500"][client % 4];
                let request = request(&via(script), client % 2 == 1);
                for _ in 0..12 {
                    // A connection each, so that all workers have some.
                    let one = ask(address, &mut None, &request);
                    let expected = if script == "status-500" { 502 } else { 200 };
                    assert_eq!(one.status, Some(expected), "{script}");
                    most.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!((most.into_inner(), fake.request_count()), (480, 480));
    assert_eq!(fake.take_working_most(), 6, "as many as the limit says, and it is reached");
    wait_limit(&gateway, "fake", 0, 0);
    let workers = crate::balance::workers(&gateway);
    assert!(workers.iter().all(|worker| worker["requests"].as_u64().unwrap() > 0), "{workers:?}");
}

/// How long a call lasts in the drill.
const CALL_MS: u32 = 50;

/// What came of a load of so many requests a second.
#[derive(Debug)]
struct Pressed {
    goodput: f64,
    /// Of the refusals, at their clients: the median and the last of a hundred.
    refused: (Duration, Duration),
    /// The same of questions whether the gateway is alive, asked all the while by one client.
    probed: (Duration, Duration),
    /// The same of the gateway's own clock, from a request's head to its answer's: at most that, or nothing is known.
    own: Option<(Duration, Duration)>,
}

impl Pressed {
    /// Whether a refusal costs next to nothing. What a machine that others use adds, it adds to the question whether the gateway
    /// is alive, too: that goes the same way up to the point at which a request is refused. A refusal that waited for a turn would take
    /// 50 ms more, and one that waited in the line 100 ms. Of the gateway's own times only the middle one is free of pauses
    /// in which it had no processor.
    fn is_prompt(&self) -> bool {
        let ms = Duration::from_millis;
        let own_max = ms(if cfg!(debug_assertions) { 2 } else { 1 });
        self.own.is_none_or(|own| own.0 <= own_max)
            && self.refused.0 < 3 * self.probed.0 + ms(2)
            && self.refused.1 < 3 * self.probed.1 + ms(10)
    }
}

/// Asks whether the gateway is alive, again and again, until it is over.
fn probe(address: &str, is_over: &AtomicBool) -> Vec<Duration> {
    let (mut times, mut kept, request) = (Vec::new(), None, get_request("/healthz", ""));
    while !is_over.load(Ordering::Relaxed) {
        let one = ask(address, &mut kept, &request);
        assert_eq!(one.status, Some(200));
        times.push(one.took);
        let _ = try_wait_for(Duration::from_millis(2), || None::<()>);
    }
    times
}

/// Of all workers so far: how long they had a processor, and how long they waited for one.
fn processor(gateway: &Evergate) -> (Duration, Duration) {
    let of = |pid: i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
        let numbers: Vec<u64> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
        (Duration::from_nanos(numbers[0]), Duration::from_nanos(numbers[1]))
    };
    gateway
        .workers()
        .into_iter()
        .map(of)
        .fold((Duration::ZERO, Duration::ZERO), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// The bounds, in milliseconds, of the buckets in which the gateway had the middle and the last of a hundred of the requests
/// that were answered before a call could have been: these are the refusals.
fn own_times(before: &str, after: &str) -> Option<(Duration, Duration)> {
    let buckets = |text: &str| -> Vec<(f64, f64)> {
        let line = |line: &str| {
            let (bound, count) = line.strip_prefix("evergate_first_byte_seconds_bucket{le=\"")?.split_once("\"} ")?;
            Some((bound.parse().ok()?, count.parse().ok()?))
        };
        text.lines().filter_map(line).collect()
    };
    let (before, after) = (buckets(before), buckets(after));
    let grown = after.iter().zip(before).map(|((bound, now), (_, then))| (*bound, now - then));
    let early: Vec<(f64, f64)> = grown.filter(|(bound, _)| *bound < f64::from(CALL_MS) / 1000.0).collect();
    let all = early.last()?.1;
    let of = |part: f64| {
        early.iter().find(|(_, count)| *count >= all * part).map(|(bound, _)| Duration::from_secs_f64(*bound))
    };
    Some((of(0.5)?, of(0.99)?))
}

/// Asks so many times what the upstream can do, and accounts for every request.
fn press(gateway: &Evergate, fake: &FakeUpstream, (slots, times): (u32, u32), time: Duration) -> Pressed {
    let request = request(&via(&format!("delay-{CALL_MS}")), false);
    let every = Duration::from_millis(CALL_MS.into()) / slots / times;
    let count = u32::try_from(time.as_micros() / every.as_micros()).unwrap();
    let _ = fake.take_working_most();
    let (asked, said, began) = (fake.request_count(), gateway.metrics(), Instant::now());
    let (address, is_over, before) = (gateway.addr(), AtomicBool::new(false), processor(gateway));
    let (all, mut probes) = std::thread::scope(|scope| {
        let probing = scope.spawn(|| probe(&address, &is_over));
        let all = open_loop(&address, (every, count), 16 * slots as usize, &request);
        is_over.store(true, Ordering::Relaxed);
        (all, probing.join().unwrap())
    });
    let (after, lasted) = (processor(gateway), began.elapsed());
    let goodput = rate(&all, began, time);
    let own = own_times(&said, &gateway.metrics());
    let counts = counts(&all);
    let of = |status| counts.get(&Some(status)).copied().unwrap_or(0);
    assert_eq!((all.len(), of(200) + of(503)), (count as usize, count as usize), "{counts:?}");
    assert_eq!(fake.request_count() - asked, of(200), "what was refused has called nobody");
    assert!(fake.take_working_most() <= slots as usize);
    assert!(all.iter().all(|one| one.status != Some(503) || one.waits), "a refusal says when to come again");
    let took = |status| all.iter().filter(move |one| one.status == Some(status)).map(|one| one.took);
    let (mut refused, mut served): (Vec<_>, Vec<_>) = (took(503).collect(), took(200).collect());
    let refused = (percentile(&mut refused, 50), percentile(&mut refused, 99));
    let probed = (percentile(&mut probes, 50), percentile(&mut probes, 99));
    println!(
        "{times} times, {:.0}/s: goodput {goodput:.0}/s; {} answered ({:?} median, {:?} p99), {} refused ({:?} median, {:?} \
         p99 at their clients, {own:?} in the gateway; {probed:?} of {} probes); workers had a processor for {:.0} % and waited \
         for one {:.0} % of the time",
        1.0 / every.as_secs_f64(),
        of(200),
        percentile(&mut served, 50),
        percentile(&mut served, 99),
        of(503),
        refused.0,
        refused.1,
        probes.len(),
        100.0 * (after.0 - before.0).as_secs_f64() / lasted.as_secs_f64(),
        100.0 * (after.1 - before.1).as_secs_f64() / lasted.as_secs_f64(),
    );
    Pressed { goodput, refused, probed, own }
}

/// An upstream of 20 slots of 50 ms, and five times the load, or more: what it answers stays at nine tenths of the most it can
/// do, and whoever is refused is refused at once.
#[test]
fn l1_under_five_times_the_load_the_upstream_does_what_it_can() {
    let _machine = machine();
    let _alone = alone();
    // Two thousand requests a second are too many for a program without optimisation: `./test --full` has this one built with it.
    let is_full = is_full() && !cfg!(debug_assertions);
    let (slots, loads): (u32, &[u32]) = if is_full { (20, &[5, 10, 20]) } else { (6, &[5]) };
    let fake = FakeUpstream::start();
    let more = format!("in_flight_max = {slots}\n[workers]\nmin = 2\nmax = 2\n");
    let gateway = before(&fake, &more);
    wait_ready(&gateway, 2);
    let time = Duration::from_secs(if is_full { 10 } else { 4 });
    let calm = request(&via(&format!("delay-{CALL_MS}")), false);
    for times in loads {
        // On a machine that others use a part may be lost to them: it is looked at again before it counts as wrong.
        let mut found = Vec::new();
        for _ in 0..8 {
            let began = Instant::now();
            let peak = rate(&closed_loop(&gateway.addr(), 2 * slots as usize, &calm, time), began, time);
            let pressed = press(&gateway, &fake, (slots, *times), time);
            println!("{:.0} % of {peak:.0}/s", 100.0 * pressed.goodput / peak);
            let is_right = pressed.goodput >= 0.9 * peak && pressed.is_prompt();
            found.push((peak, pressed));
            if is_right {
                break;
            }
        }
        let is_right = |(peak, pressed): &(f64, Pressed)| pressed.goodput >= 0.9 * peak && pressed.is_prompt();
        assert!(found.iter().any(is_right), "{times} times: {found:?}");
    }
    wait_limit(&gateway, "fake", 0, 0);
    assert!(shed(&gateway, "fake", "queue_full") > 0);
}

/// What clients that go on and on have seen.
#[derive(Default)]
struct Seen {
    is_over: AtomicBool,
    sent: AtomicUsize,
    answered: AtomicUsize,
    refused: AtomicUsize,
    lost: AtomicUsize,
    wrong: Mutex<Vec<String>>,
}

/// Asks until it is over, on a new connection each time.
fn keep_asking(address: &str, request: &[u8], seen: &Seen) {
    while !seen.is_over.load(Ordering::Relaxed) {
        seen.sent.fetch_add(1, Ordering::Relaxed);
        let one = ask(address, &mut None, request);
        let count = match one.status {
            Some(200) => &seen.answered,
            Some(503) => &seen.refused,
            None => &seen.lost,
            Some(other) => {
                seen.wrong.lock().unwrap().push(format!("{other} after {:?}", one.took));
                continue;
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        if one.status != Some(200) {
            // As a client that was refused or cut would, shortly.
            let _ = try_wait_for(Duration::from_millis(10), || None::<()>);
        }
    }
}

/// Runs `drill` beside clients, which end with it.
fn beside(address: &str, clients: usize, scripts: &[(&str, bool)], seen: &Seen, drill: impl FnOnce()) {
    std::thread::scope(|scope| {
        for (script, stream) in scripts.iter().cycle().take(clients) {
            let request = request(&via(script), *stream);
            scope.spawn(move || keep_asking(address, &request, seen));
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(drill));
        seen.is_over.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// All `max` permits can be had at the same time.
#[track_caller]
fn assert_usable(gateway: &Evergate, fake: &FakeUpstream, max: usize) {
    fake.hold();
    let held = request(&via("hold"), false);
    let open = || {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&held);
        raw
    };
    let mut all: Vec<Raw> = (0..max).map(|_| open()).collect();
    wait_limit(gateway, "fake", max as u64, 0);
    let mut one_more = open();
    wait_limit(gateway, "fake", max as u64, 1);
    fake.release();
    for raw in all.iter_mut().chain([&mut one_more]) {
        assert_eq!(raw.read_response(LIMIT).status, 200);
    }
    wait_limit(gateway, "fake", 0, 0);
}

/// Workers that hold permits are killed under load, again and again: none is lost.
#[test]
fn l1_killed_workers_leak_no_permit() {
    const MAX: usize = 8;
    let _alone = alone();
    let kills = if is_full() { 300 } else { 30 };
    let fake = FakeUpstream::start();
    let gateway = before(&fake, &format!("in_flight_max = {MAX}\nqueue = 8\n[workers]\nmin = 2\nmax = 2\n"));
    wait_ready(&gateway, 2);
    let (address, seen) = (gateway.addr(), Seen::default());
    beside(&address, 24, &[("delay-30", false), ("stream-4-10", true), ("delay-5", false)], &seen, || {
        for kill in 0..kills {
            let before = seen.answered.load(Ordering::Relaxed);
            wait_until("load between two kills", 3 * LIMIT, || seen.answered.load(Ordering::Relaxed) >= before + 20);
            let workers = gateway.wait_workers(2);
            // Not before it is there in the run file, nor twice the same.
            send(workers[kill % 2], Signal::KILL);
            wait_until("its successor", 3 * LIMIT, || {
                let now = gateway.workers();
                now.len() == 2 && !now.contains(&workers[kill % 2])
            });
        }
    });
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let (sent, lost) = (count(&seen.sent), count(&seen.lost));
    println!(
        "{kills} kills: {sent} sent, {} answered, {} refused, {lost} lost",
        count(&seen.answered),
        count(&seen.refused)
    );
    assert_eq!(seen.wrong.into_inner().unwrap(), Vec::<String>::new());
    assert_eq!(sent, seen.answered.into_inner() + seen.refused.into_inner() + lost);
    assert!(lost >= kills, "kills that cost nothing held no permit");
    wait_limit(&gateway, "fake", 0, 0);
    wait_ready(&gateway, 2);
    assert_usable(&gateway, &fake, MAX);
}

/// Freezes the first worker when it does not have that many permits, which would be all of them.
fn freeze_with_less_than(gateway: &Evergate, permits: usize) -> Frozen {
    let pid = gateway.workers()[0];
    wait_for("a moment in which the other one has a permit", LIMIT, || {
        let frozen = Frozen::new(pid);
        wait_until("it stands still", LIMIT, || state_of(pid) == Some('T'));
        let status: Value = serde_json::from_slice(&gateway.cli(&["status", "--json"]).stdout).unwrap();
        let is_call = |one: &&Value| one["pid"] == pid && one["phase"] != "queued" && one["phase"] != "body";
        (status["inflight"].as_array().unwrap().iter().filter(is_call).count() < permits).then_some(frozen)
    })
}

/// One of two workers stands still with permits and a line: what it holds is gone until it goes on, the rest serves.
#[test]
fn l1_a_frozen_worker_costs_what_it_holds_and_no_more() {
    let _alone = alone();
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "in_flight_max = 8\nqueue = 16\n[workers]\nmin = 2\nmax = 2\nhang_timeout = \"60s\"\n");
    wait_ready(&gateway, 2);
    let (address, seen) = (gateway.addr(), Seen::default());
    // Clients of the frozen one wait with it: the others' rate is what counts.
    beside(&address, 28, &[("delay-20", false), ("stream-2-10", true)], &seen, || {
        let pace = |what: &str, least: usize| {
            let (before, began) = (seen.answered.load(Ordering::Relaxed), Instant::now());
            wait_until(what, 3 * LIMIT, || seen.answered.load(Ordering::Relaxed) >= before + least);
            least as f64 / began.elapsed().as_secs_f64()
        };
        let calm = pace("load", 300);
        let frozen = freeze_with_less_than(&gateway, 8);
        let (one, two) = (pace("load beside the frozen one", 100), pace("more of it", 200));
        drop(frozen);
        let after = pace("load of both", 300);
        println!("answered a second: {calm:.0}, with one of two frozen {one:.0} and {two:.0}, after that {after:.0}");
        // Eight permits are free or in the frozen one's hands, at most; without grace and turns it would be nothing.
        assert!(two > calm / 20.0, "{calm:.0} before, {two:.0} beside the frozen one");
    });
    assert_eq!(seen.wrong.into_inner().unwrap(), Vec::<String>::new());
    wait_limit(&gateway, "fake", 0, 0);
    assert_usable(&gateway, &fake, 8);
}

/// L5: one model is asked five times what it can do; another one, in the same worker, answers as before.
#[test]
fn l5_a_full_upstream_keeps_nobody_waiting_for_another() {
    let _alone = alone();
    let (slow, fast) = (FakeUpstream::start(), FakeUpstream::start());
    let text = config(&[slow.base_url(), fast.base_url()], &[], &format!("{ONE_WORKER}slots = 24\n"))
        .replace("[upstreams.first]\n", "[upstreams.first]\nin_flight_max = 4\nqueue = 8\n");
    let gateway = Evergate::builder(EXE).config(text).start();
    let (address, is_over) = (gateway.addr(), AtomicBool::new(false));
    let slow_request = request("first/delay-100", false);
    let fast_request = request("second/delay-5", false);
    let times = || {
        let mut kept = None;
        let mut times: Vec<Duration> = (0..30)
            .map(|_| {
                let one = ask(&address, &mut kept, &fast_request);
                assert_eq!(one.status, Some(200));
                one.took
            })
            .collect();
        (percentile(&mut times, 50), percentile(&mut times, 95))
    };
    let calm = times();
    // Four calls of 100 ms: 40 a second; 200 come, most of which are refused.
    let crowd = std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                let mut kept = None;
                while !is_over.load(Ordering::Relaxed) {
                    let one = ask(&address, &mut kept, &slow_request);
                    assert!(matches!(one.status, Some(200 | 503)), "{one:?}");
                    let _ = try_wait_for(Duration::from_millis(140), || is_over.load(Ordering::Relaxed).then_some(()));
                }
            });
        }
        // All of them have asked: the slow one has what it can take.
        let crowd = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until("the slow one is full", LIMIT, || slow.request_count() >= 8);
            times()
        }));
        is_over.store(true, Ordering::Relaxed);
        crowd.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    println!("the fast model alone: {calm:?} (median, p95); beside the slow one: {crowd:?}");
    // Behind the slow one's calls it would wait for 100 ms each time.
    assert!(crowd.0 < Duration::from_millis(60), "{calm:?} alone, {crowd:?} beside the slow one");
    assert!(slow.take_working_most() <= 4 && shed(&gateway, "first", "queue_full") > 0);
}
