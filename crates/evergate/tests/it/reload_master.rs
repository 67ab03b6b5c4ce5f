//! What reloads leave in the master, and what a validation that hangs does to it. Numbers are lines of the specification of
//! supervision.

use evergate_testkit::driver::is_alive;
use evergate_testkit::{Evergate, wait_for, wait_until};
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
        wait_until("only the last generation is left", LIMIT, || {
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
        assert!(now.is_like(first), "{first:?} {now:?}");
    }
    println!("after {reloads} reloads {first:?}");
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
