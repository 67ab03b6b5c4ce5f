//! What reloads leave in the master, and what a validation that hangs does to it. Numbers are lines of the specification of
//! supervision.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::get_request;
use evergate_testkit::wait::try_wait_for;
use evergate_testkit::{Evergate, Raw, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::json;

use crate::reload::{failed, reload, status};
use crate::respawn::Master;
use crate::support::{LIMIT, assert_alive, echo, is_full, send, wait_ready};

/// Descriptors, threads and memory of the master, and no child of a generation that has gone.
#[test]
fn s18_a_hundred_reloads_leave_the_master_as_it_was() {
    let reloads = if is_full() { 100 } else { 12 };
    let gateway = echo();
    let settled = |generation: u64| {
        wait_until("only the last generation is left", 3 * LIMIT, || {
            let children = gateway.children();
            children.len() == 3 && children.iter().all(|child| child.generation == generation)
        });
        wait_ready(&gateway, 2);
        Master::look(gateway.pid())
    };
    let mut first = None;
    for generation in 2..reloads + 2 {
        assert_eq!(reload(&gateway), format!("generation {generation} serves\n"));
        let now = settled(generation);
        let first: &Master = if generation <= 6 { first.insert(now.clone()) } else { first.as_ref().unwrap() };
        // At one moment there may be a client's connection more, or a validation that has just ended; a leak stays.
        if try_wait_for(LIMIT, || Master::look(gateway.pid()).is_like(first).then_some(())).is_none() {
            panic!("generation {generation}: {first:?} {:?}", Master::look(gateway.pid()));
        }
    }
    println!("after {reloads} reloads {first:?}");
}

/// A reload replaces the clerk. Whoever it has let in is answered, also one that has not asked yet; the others wait for the next.
#[test]
fn s18_no_scrape_is_lost_in_twenty_reloads() {
    let gateway = echo();
    let (admin, is_over) = (gateway.admin(), AtomicBool::new(false));
    let scrape = |fields: &str, pause: Duration| {
        let mut raw = Raw::try_connect(&admin).map_err(|error| error.to_string())?;
        let began = Instant::now();
        // It was let in a while ago when it asks.
        try_wait_for(pause, || None::<()>);
        // A client that the machine made wait has no claim on a clerk that waits for a second.
        let is_late = began.elapsed() > pause + Duration::from_millis(400);
        let sent = raw.try_send(&get_request("/metrics", fields)).map_err(|_| "reset before it asked".to_owned());
        let answer = sent.and_then(|()| raw.try_read_response(LIMIT));
        match answer {
            Ok(response) if response.status == 200 && response.text().ends_with('\n') => {
                assert_eq!(response.header("connection"), Some("close"));
                Ok(())
            }
            Ok(response) => Err(format!("status {}", response.status)),
            Err(_) if is_late => Ok(()),
            Err(why) => Err(why),
        }
    };
    let client = |fields: &'static str, pause_ms: u64| {
        let (mut done, mut failed) = (0_u32, Vec::new());
        while !is_over.load(Ordering::Relaxed) {
            match scrape(fields, Duration::from_millis(pause_ms)) {
                Ok(()) => done += 1,
                Err(why) => failed.push(why),
            }
        }
        assert!(failed.is_empty(), "{} of {} scrapes failed: {failed:?}", failed.len(), done);
        done
    };
    std::thread::scope(|scope| {
        let clients = [("", 0), ("Connection: keep-alive\r\n", 0), ("", 50), ("Connection: keep-alive\r\n", 100)]
            .map(|(fields, pause)| scope.spawn(move || client(fields, pause)));
        for _ in 0..20 {
            assert!(gateway.cli(&["reload"]).status.success());
            // Each of them has met this clerk before it goes.
            try_wait_for(Duration::from_millis(150), || None::<()>);
        }
        is_over.store(true, Ordering::Relaxed);
        for client in clients {
            assert!(client.join().unwrap() > 20);
        }
    });
    let clerks = gateway.exits().iter().filter(|record| record["kind"] == "clerk").count();
    assert!(clerks >= 19, "{clerks}");
}

/// A file that is never read to its end: the master waits for it beside its work, and the reader does not outlive either.
#[test]
fn s20_a_validation_that_hangs_holds_nobody_up_and_ends_with_its_master() {
    let mut gateway = echo();
    let file = std::path::PathBuf::from(config_path(&gateway));
    std::fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    let reading = |gateway: &Evergate| wait_for("the validation", LIMIT, || validation(gateway.pid()));
    std::thread::scope(|scope| {
        let reload = scope.spawn(|| gateway.cli(&["reload"]));
        let pid = reading(&gateway);
        assert_alive(&gateway);
        assert!(status(&gateway)["master"]["reloading"] == json!(true));
        send(pid, Signal::KILL);
        let (_, why) = failed(&reload.join().unwrap());
        assert!(why.contains("ended by signal 9"), "{why}");
    });
    gateway.signal(Signal::HUP);
    let pid = reading(&gateway);
    gateway.signal(Signal::KILL);
    let _ = gateway.wait_exit(LIMIT);
    wait_until("its end", LIMIT, || !is_alive(pid));
    gateway.wait_no_children(LIMIT);
}

/// Where the running master reads its configuration.
fn config_path(gateway: &Evergate) -> String {
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", gateway.pid())).unwrap();
    line.split('\0').skip_while(|word| *word != "--config").nth(1).unwrap().to_owned()
}

/// The process that reads and judges a configuration for this master, if one does.
fn validation(master: i32) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{master}/task/{master}/children")).ok()?;
    let is_one = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with("evergate: compile"))
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_one)
}
