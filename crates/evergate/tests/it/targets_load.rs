//! Several targets under load: what a total outage costs, and what is lost when one of two upstreams dies.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::fake::refused_address;
use evergate_testkit::raw::{chat_body, post_request};
use evergate_testkit::sse::Event;
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use serde_json::Value;

use crate::support::{CHAT, LIMIT, assert_error};
use crate::targets::{ask, assert_path, before_two, gateway, record_of};

/// Times of `count` requests, all sent before one is answered.
fn ask_at_once(gateway: &Evergate, model: &str, count: usize) -> Vec<Duration> {
    let began = Instant::now();
    let mut open: Vec<Raw> = (0..count)
        .map(|number| {
            let mut raw = Raw::connect(&gateway.addr());
            raw.send(&post_request(CHAT, "", &chat_body(model, number % 2 == 0, &Value::Null)));
            raw
        })
        .collect();
    let ask = |raw: &mut Raw| {
        let response = raw.read_response(LIMIT);
        // Not the whole table: a worker far above its peers may close its connections.
        assert_eq!((response.status, response.error_code().as_str()), (502, "upstream_failed"), "{}", response.text());
        began.elapsed()
    };
    open.iter_mut().map(ask).collect()
}

/// Everything fails: each target is called exactly once, nothing is waited for, and the error says what failed.
#[test]
fn a_total_outage_is_answered_at_once_with_one_call_to_each_target() {
    let (second, third) = (FakeUpstream::start(), FakeUpstream::start());
    let refused = format!("http://{}/v1", refused_address());
    let model = "ok>status-503>status-500";
    let gateway = gateway(&[&refused, second.base_url(), third.base_url()], &[model], "");
    let _ = ask(&gateway, model, false);
    let mut times = Vec::new();
    for stream in [false, true, false, true, false, true] {
        let before = (second.request_count(), third.request_count());
        let began = Instant::now();
        let response = ask(&gateway, model, stream);
        times.push(began.elapsed());
        assert_error(&response, 502, "upstream_failed");
        let said = "tried: first (upstream_connect_failed), second (upstream_failed), third (upstream_failed)";
        assert!(response.text().contains(said), "{}", response.text());
        assert_eq!((second.request_count(), third.request_count()), (before.0 + 1, before.1 + 1));
        let record = record_of(&gateway, &response);
        let failed = "upstream_failed";
        assert_path(&record, &[("first", "upstream_connect_failed"), ("second", failed), ("third", failed)]);
    }
    times.sort_unstable();
    let before = second.request_count();
    let together = ask_at_once(&gateway, model, 200);
    assert_eq!((second.request_count(), third.request_count()), (before + 200, before + 200));
    let most = *together.iter().max().unwrap();
    println!("total outage of 3 targets: one request {:?} (median of 6), 200 at once all after {most:?}", times[3]);
    // What tells the promise from its absence: a pause between attempts, or a limit that was waited for.
    assert!(times[3] < Duration::from_millis(200) && most < Duration::from_secs(5), "{times:?} {most:?}");
}

/// What clients saw of one upstream's death.
#[derive(Default)]
struct Seen {
    is_over: AtomicBool,
    done: AtomicUsize,
    failed: Mutex<BTreeMap<String, usize>>,
}

/// Ends the asking, also when the test fails in between.
struct Over<'a>(&'a Seen);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

fn keep_asking(address: &str, stream: bool, seen: &Seen) {
    let request = post_request(CHAT, "", &chat_body("slow-30>ok", stream, &Value::Null));
    while !seen.is_over.load(Ordering::Relaxed) {
        let mut raw = Raw::connect(address);
        raw.send(&request);
        let response = raw.try_read_response(LIMIT);
        match response {
            Ok(response)
                if response.status == 200 && response.is_complete && !response.text().contains("\"error\"") =>
            {
                seen.done.fetch_add(1, Ordering::Relaxed);
            }
            other => {
                let what = match other {
                    Ok(response) if response.status == 200 => {
                        let code = response.events().last().and_then(Event::error_code);
                        code.map_or_else(|| response.text(), |code| format!("200 {code}"))
                    }
                    Ok(response) => format!("{} {}", response.status, response.error_code()),
                    Err(reason) => reason,
                };
                *seen.failed.lock().unwrap().entry(what).or_default() += 1;
            }
        }
    }
}

/// What is lost when the first of two upstreams dies under load, and how many clients there were.
fn lose_the_first(model_keys: &str) -> (BTreeMap<String, usize>, usize) {
    const CLIENTS: usize = 16;
    let model = format!("slow-30>ok{model_keys}");
    let (first, second, gateway) = before_two(&[&model], "");
    let (address, seen) = (gateway.addr(), Seen::default());
    std::thread::scope(|scope| {
        let _over = Over(&seen);
        for number in 0..CLIENTS {
            let (address, seen) = (&address, &seen);
            scope.spawn(move || keep_asking(address, number % 2 == 1, seen));
        }
        wait_until("load", LIMIT, || seen.done.load(Ordering::Relaxed) >= 100);
        assert_eq!(second.request_count(), 0);
        drop(first);
        let before = seen.done.load(Ordering::Relaxed);
        wait_until("load after the death", LIMIT, || seen.done.load(Ordering::Relaxed) >= before + 200);
    });
    assert!(second.request_count() >= 200);
    (seen.failed.into_inner().unwrap(), CLIENTS)
}

/// A stream that has had an event is its client's (F2): told, and not repeated.
const BEGUN: &str = "200 upstream_disconnected";

/// Only what was written and not answered is lost: at most one request of each client, and one more that was written to a
/// connection which the dying upstream's kernel still took. Everybody else is served.
#[test]
fn d10_the_death_of_an_upstream_loses_only_what_it_had_and_nothing_if_told_so() {
    let (failed, clients) = lose_the_first("");
    println!("one of two upstreams died under {clients} clients: {failed:?}");
    assert!(failed.keys().all(|what| what == "502 upstream_disconnected" || what == BEGUN), "{failed:?}");
    assert!(failed.values().sum::<usize>() <= 2 * clients, "{failed:?}");

    let (failed, clients) = lose_the_first("|retry_unknown = true");
    println!("the same with retry_unknown under {clients} clients: {failed:?}");
    assert!(failed.keys().all(|what| what == BEGUN), "{failed:?}");
    assert!(failed.values().sum::<usize>() <= 2 * clients, "{failed:?}");
}
