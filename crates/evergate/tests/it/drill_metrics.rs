//! What is scraped while workers are killed under load: nothing goes back, nothing vanishes, and in the end the counters are the
//! records (INV-COUNT-1, INV-RECORD-1).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use evergate_testkit::{Evergate, FakeUpstream, wait_until};

use crate::drill::{Seen, beside, client, kill_all};
use crate::metrics::{counters, samples, sum};
use crate::support::{LIMIT, before, is_full, via, wait_ready};

type Counters = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// Ends the scraping with the drill, also when that panics.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads the counters as fast as they are given, and compares each reading with the one before; gives how many there were.
fn scrape(gateway: &Evergate, is_over: &AtomicBool) -> (usize, Counters) {
    let (mut scrapes, mut last) = (0, Counters::new());
    while !is_over.load(Ordering::Relaxed) {
        let now: Counters =
            counters(gateway).into_iter().map(|(name, labels, value)| ((name, labels), value)).collect();
        for (series, value) in &last {
            let there = now.get(series);
            assert!(there.is_some_and(|now| now >= value), "{series:?} went from {value} to {there:?}");
        }
        scrapes += 1;
        last = now;
    }
    (scrapes, last)
}

#[test]
fn no_counter_goes_back_while_workers_are_killed_under_load() {
    let kills = if is_full() { 300 } else { 20 };
    let fake = FakeUpstream::start();
    let gateway = before(&fake, "");
    wait_ready(&gateway, 2);
    let (address, seen, is_over) = (gateway.addr(), Seen::default(), AtomicBool::new(false));
    let unary = (0..12).map(|number| (via(&format!("delay-{}", 20 + number)), false));
    let streams = (0..4).map(|_| (via("stream-10-10"), true));
    let refused = [("fake/status-500".to_owned(), false), ("unknown".to_owned(), false)];
    let clients: Vec<_> = unary.chain(streams).chain(refused).collect();
    let (scrapes, last) = beside(&address, &seen, (client, &clients), || {
        std::thread::scope(|scope| {
            let scraper = scope.spawn(|| scrape(&gateway, &is_over));
            let over = Over(&is_over);
            kill_all(&gateway, &seen, kills, &mut Vec::new());
            drop(over);
            scraper.join().unwrap()
        })
    });
    println!("{scrapes} scrapes of {} counters beside {kills} kills", last.len());
    assert!(scrapes > kills, "{scrapes} scrapes are none between two kills");
    let counted = || {
        let all = samples(&gateway.metrics());
        ["evergate_requests_total", "evergate_access_records_dropped_total"].map(|name| sum(&all, name, &[]))
    };
    let records = || gateway.access().len() as f64;
    wait_until("a record of each that was counted", LIMIT, || counted() == [records(), 0.0]);
}
